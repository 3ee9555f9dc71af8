"""Threads and forks never hurt, under every threading layer that is installed; each fault in a process of its own."""

import functools
import os
import sys

import pytest
from subprocesses import run_script

LAYERS = ("tbb", "omp", "workqueue")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# What all scripts share: arrays large enough for a parallel region of each kernel, and the bits of all results.
PREAMBLE = """
import hashlib, os, signal, sys, threading
import numpy as np
import fastbn

rng = np.random.default_rng(0)
shapes = [((4, 16, 40, 40), 1), ((8, 40, 41, 16), 3)]
arrays = [(rng.normal(size=shape).astype("float32"), axis) for shape, axis in shapes]

def digest():
    found = hashlib.sha256()
    for x, axis in arrays:
        y, saved = fastbn.batch_norm_train(x, axis=axis)
        for a in (y, saved.mean, saved.var, *fastbn.batch_norm_backward(x, saved), fastbn.moments(x, axis=axis).m2,
                  fastbn.batch_norm(x, saved.mean, saved.var, axis=axis)):
            found.update(a.tobytes())
    return found.hexdigest()

def layer():
    import numba
    return numba.threading_layer()

def in_child(work):
    # Whether work() gives the right bits in a forked child that ends well; one that hangs is ended.
    pid = os.fork()
    if not pid:
        signal.alarm(40)
        ok = False
        try:
            ok = work()
        finally:
            os._exit(0 if ok else 3)
    return os.waitpid(pid, 0)[1] == 0

fastbn.set_num_threads(1)
expected = digest()
fastbn.set_num_threads(None)
right = lambda: digest() == expected
"""

SCRIPTS = {
    "two threads at once": """
start, found = threading.Barrier(3), []
def work():
    start.wait()
    for _ in range(8):
        found.append(right())
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
assert found == [True] * 24, found
""",
    "a forked child": """
assert right()
assert in_child(right)
assert right()
""",
    "a child forked before the first region": """
assert in_child(right)
assert right()
assert in_child(right)
""",
    "a grandchild": """
assert right()
assert in_child(lambda: in_child(right))
assert in_child(lambda: right() and in_child(right) and right())
""",
    "a fork from another thread": """
assert right()
results = []
def fork():
    results.append(in_child(right))
    results.append(in_child(lambda: right() and in_child(right)))
t = threading.Thread(target=fork)
t.start()
t.join()
assert results == [True, True]
""",
    "a fork by a thread that started the regions": """
results = []
def fork():
    results.append(right())
    results.append(in_child(right))
t = threading.Thread(target=fork)
t.start()
t.join()
assert results == [True, True]
assert in_child(right)
""",
    "a fork while another thread computes": """
assert right()
stop = threading.Event()
def work():
    while not stop.is_set():
        right()
t = threading.Thread(target=work)
t.start()
results = [in_child(right) for _ in range(6)]
stop.set()
t.join()
assert all(results), results
""",
    "threads in a forked child": """
assert right()
def threads():
    found = []
    workers = [threading.Thread(target=lambda: found.append(right())) for _ in range(3)]
    for t in workers: t.start()
    for t in workers: t.join()
    return found == [True] * 3
assert in_child(threads)
""",
    "a pool of forked workers": """
import multiprocessing
assert right()
def work(_):
    return right()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map_async(work, range(4)).get(60))
""",
}


@functools.cache
def unavailable(layer):
    """Why a threading layer cannot be used here, or None."""
    probe = "import numba, numpy as np\n@numba.njit(parallel=True)\ndef f(a):\n    for i in numba.prange(9): a[i] = i\n"
    load = "from fastbn import _threads; _threads.load_tbb()\n" if layer == "tbb" else ""
    try:
        run_script(f"{load}{probe}f(np.zeros(9))\n", NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    except AssertionError as error:
        return str(error).strip().splitlines()[-1]
    return None


def run_layer(layer, script, threads="2"):
    if unavailable(layer):
        pytest.skip(f"threading layer {layer}: {unavailable(layer)}")
    end = f'\nassert right() and layer() == "{layer}", layer()\nprint("done")'
    printed = run_script(PREAMBLE + script + end, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=threads)
    assert printed.endswith("done\n"), printed


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("what", [pytest.param(w, marks=() if w == "two threads at once" else FORKS) for w in SCRIPTS])
def test_nothing_hurts(what, layer):
    run_layer(layer, SCRIPTS[what])


def test_some_layer_is_installed():
    assert None in [unavailable(layer) for layer in LAYERS]


@pytest.mark.skipif(sys.platform != "linux", reason="the dependency has a wheel there")
def test_the_tbb_that_pip_installed_is_found():
    printed = run_script(PREAMBLE + "right(); print(layer())", NUMBA_THREADING_LAYER=None)
    if unavailable("tbb"):
        pytest.skip(unavailable("tbb"))
    assert printed == "tbb\n"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_users_settings_stay(layer):
    script = """
import numba
fastbn.set_num_threads(1)
assert right() and fastbn.get_num_threads() == 1 and numba.get_num_threads() == 3
fastbn.set_num_threads(2)
assert right() and fastbn.get_num_threads() == 2 and numba.get_num_threads() == 3
fastbn.set_num_threads(None)
assert right() and fastbn.get_num_threads() == numba.get_num_threads() == 3
numba.set_num_threads(1)
assert right() and numba.get_num_threads() == 1
fastbn.set_num_threads(2)
assert right() and numba.get_num_threads() == 1
assert numba.config.NUMBA_NUM_THREADS == 3
"""
    run_layer(layer, script, threads="3")


def test_the_limit_is_that_of_the_process():
    script = """
import threading
fastbn.set_num_threads(1)
found = []
t = threading.Thread(target=lambda: found.append(fastbn.get_num_threads()))
t.start()
t.join()
assert found == [1], found
fastbn.set_num_threads(99)
print(fastbn.get_num_threads())
"""
    assert run_script("import fastbn\n" + script, NUMBA_NUM_THREADS="3") == "3\n"


def test_small_calls_start_no_threads():
    script = """
import os
import numpy as np, numba, fastbn
fastbn.batch_norm_train(np.ones((64, 8), "float32"))  # loads the kernels
before = len(os.listdir("/proc/self/task"))
y, saved = fastbn.batch_norm_train(np.ones((100, 8), "float32"))
fastbn.batch_norm_backward(y, saved)
assert len(os.listdir("/proc/self/task")) == before
try:
    print(numba.threading_layer())
except ValueError:
    print("not started")
"""
    if sys.platform != "linux":
        pytest.skip("counts threads in /proc")
    assert run_script(script) == "not started\n"


def test_the_bits_are_those_of_every_layer():
    available = [layer for layer in LAYERS if not unavailable(layer)]
    found = {run_script(PREAMBLE + "print(digest())", NUMBA_THREADING_LAYER=layer) for layer in available}
    assert len(found) == 1


@FORKS
def test_a_fork_while_another_thread_compiles(tmp_path):
    """The child must not find Numba's compiler lock held by a thread that it does not have."""
    script = """
import os, signal, threading, time
import numpy as np, fastbn
x = np.random.default_rng(0).normal(size=(4, 16, 40, 40)).astype("float32")
fastbn.moments(np.ones((3, 2)))  # Numba is loaded
thread = threading.Thread(target=lambda: fastbn.batch_norm_train(x))
thread.start()
time.sleep(0.5)
pid = os.fork()
if not pid:
    signal.alarm(60)
    fastbn.batch_norm_train(x)
    os._exit(0)
thread.join()
print(os.waitpid(pid, 0)[1])
"""
    assert run_script(script, NUMBA_CACHE_DIR=str(tmp_path)).split()[-1] == "0"
