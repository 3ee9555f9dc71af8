"""Processes: forked in any state, spawned, pooled, ended while threads compute; nothing hangs, dies or is wrong."""

import multiprocessing
import pickle

import numpy as np
import pytest
from arrays import View
from layers import FORKS, LAYERS, PREAMBLE, run_layer, skip_without
from subprocesses import run_python, run_script

import fastbn

SCRIPTS = {
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
    "a child that ends by itself": """
assert right()
pid = os.fork()
if not pid:
    signal.alarm(40)
    sys.exit(0 if right() else 3)
assert os.waitpid(pid, 0)[1] == 0
""",
    "a grandchild": """
assert right()
assert in_child(lambda: in_child(right))
assert in_child(lambda: right() and in_child(right) and right())
assert in_child(lambda: right() and in_child(lambda: in_child(right)))
""",
    "a fork from another thread": """
assert right()
results = []
def fork():
    results.append(in_child(right))
    results.append(in_child(lambda: right() and in_child(right)))
together(fork)
assert results == [True, True]
""",
    "a fork by a thread that started the regions": """
results = []
def fork():
    results.append(right())
    results.append(in_child(right))
together(fork)
assert results == [True, True]
assert in_child(right)
""",
    "a fork after the user's own code has started Numba's threads": """
import numba
from fastbn import _threads
_threads.load_tbb()
together(numba.get_num_threads)
assert right()
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
    "a fork while other threads take outputs from the pool and give them back": """
x = rng.normal(size=(8, 16, 100, 100)).astype("float32")  # above 4 MiB: recycled
y = fastbn.batch_norm_train(x)[0].tobytes()
pooled = lambda: all(fastbn.batch_norm_train(x)[0].tobytes() == y for _ in range(3))
stop = threading.Event()
def lease():
    from fastbn import _memory
    while not stop.is_set():
        buffers = [_memory._lease(1 << 22) for _ in range(10)]
        fastbn.empty_pool()
        del buffers
threads = [threading.Thread(target=lease) for _ in range(2)]
for t in threads: t.start()
results = [in_child(pooled) for _ in range(10)]
stop.set()
for t in threads: t.join()
assert all(results), results
assert pooled()
""",
    "threads in a forked child": """
assert right()
def threads():
    found = []
    together(*[lambda: found.append(right())] * 3)
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

# A file, so that spawned children can import it. The parent has used the layer before; children get what has state.
POOLS = '''
import concurrent.futures, multiprocessing, sys
import numpy as np
import fastbn

def make():
    rng = np.random.default_rng(1)
    x = rng.normal(3, 2, (4, 40, 40, 16)).astype("float32")
    bn = fastbn.BatchNorm(16, axis=-1)
    for part in np.array_split(x, 2):
        bn(part)
    _, saved = fastbn.batch_norm_train(x, bn.gamma, bn.beta, axis=-1)
    return x, bn, fastbn.moments(x, axis=-1), saved

def work(x, bn, m, saved):
    """All that there is to compute from them: bytes."""
    merged = m + fastbn.moments(x[:2], axis=-1)
    results = [*fastbn.batch_norm_backward(x, saved), merged.mean, merged.m2, saved.mean, saved.var]
    y = bn(x)
    results += [y, bn.backward(y), bn.running_mean, bn.running_var, bn.dgamma, bn.eval()(x)]
    return [a.tobytes() for a in results]

def main(method):
    given = make()
    expected = work(*given)
    given = make()
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        assert pool.starmap_async(work, [given] * 3).get(100) == [expected] * 3
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        assert [f.result(100) for f in [executor.submit(work, *given) for _ in range(3)]] == [expected] * 3
    queue = context.Queue()
    child = context.Process(target=put, args=(queue, *given))
    child.start()
    assert queue.get(timeout=100) == expected
    child.join(100)
    assert child.exitcode == 0

def put(queue, *given):
    queue.put(work(*given))

if __name__ == "__main__":
    main(sys.argv[1])
    print("done")
'''

LOKY = """
import joblib
from pools import make, work
given = make()
expected = work(*given)
given = make()
found = joblib.Parallel(n_jobs=2, backend="loky")(joblib.delayed(work)(*given) for _ in range(4))
assert found == [expected] * 4
print("done")
"""

# The main thread ends while daemon threads are in a kernel.
EXIT = """
import time
assert right()
x = {x}
ready = threading.Semaphore(0)
def work():
    while True:
        y, saved = fastbn.batch_norm_train(x)
        fastbn.batch_norm_backward(y, saved)
        ready.release()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
for _ in range(9):
    ready.acquire()
time.sleep({seconds})
print("done", layer())
"""

LATE = """
import atexit
class AtShutdown:
    # Deleted when the main module is cleared: nothing here may use its names.
    def __init__(self):
        self.x, self.y = arrays[0][0], fastbn.batch_norm_train(arrays[0][0])[0]
        self.verb, self.write = fastbn.batch_norm_train, os.write
    def __del__(self):
        same = self.verb(self.x)[0].tobytes() == self.y.tobytes()
        self.write(1, b"in __del__: %d\\n" % same)
kept = AtShutdown()
atexit.register(lambda: print("at exit:", right(), flush=True))
assert right()
"""


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("what", SCRIPTS)
@FORKS
def test_a_fork_hurts_nobody(what, layer):
    run_layer(layer, SCRIPTS[what])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_processes(method, tmp_path):
    """Layers, Moments and Saved go to the workers and give there the bits that they give here."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot start processes by {method}")
    script = tmp_path / "pools.py"
    script.write_text(POOLS)
    quiet = method != "forkserver"  # whose resource tracker at times cannot find the semaphores it calls leaked
    assert run_python(str(script), method, NUMBA_NUM_THREADS="2", quiet=quiet) == "done\n"


def test_workers_of_joblib(tmp_path):
    pytest.importorskip("joblib")
    (tmp_path / "pools.py").write_text(POOLS)
    script = tmp_path / "script.py"
    script.write_text(LOKY)
    assert run_python(str(script), NUMBA_NUM_THREADS="2", quiet=True) == "done\n"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("x", "seconds"),
    [("arrays[0][0][:2, :4, :3, :3].copy()", 0.003), ("np.ones((32, 64, 56, 56), 'float32')", 0.02)],
    ids=["small", "long"],
)
def test_the_interpreter_ends_while_threads_compute(x, seconds, layer):
    skip_without(layer)
    script = PREAMBLE + EXIT.format(x=x, seconds=seconds)
    assert run_script(script, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2", quiet=True) == f"done {layer}\n"


@pytest.mark.parametrize("layer", LAYERS)
def test_calls_at_the_very_end(layer):
    skip_without(layer)
    printed = run_script(PREAMBLE + LATE, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2", quiet=True)
    assert printed == "at exit: True\nin __del__: 1\n"


@FORKS
@pytest.mark.parametrize("delay", [0.001, 0.05, 0.15])
def test_forks_while_another_thread_makes_the_very_first_call(delay):
    """The child must not find a module's lock held by a thread that it does not have."""
    script = f"""
import os, signal, sys, threading, time
import numpy as np, fastbn
assert "logging" in sys.modules  # else its lock is taken before a fork waits for a thread that wants it
x = np.ones((2, 4, 4, 4), "float32")
thread = threading.Thread(target=lambda: fastbn.batch_norm_train(x))
thread.start()
found = []
while thread.is_alive():
    time.sleep({delay})
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        fastbn.batch_norm_train(x)
        os._exit(0)
    found.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in found)
print("done" if found else "no fork")
"""
    assert run_script(script, quiet=True) == "done\n"


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


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "view",
    [View("unaligned"), View(ends=("read-only",))]
    + [View(steps=(step,)) for step in ("fortran", "channels-last", "stepped", "negative")],
    ids=str,
)
def test_what_a_forward_saved_is_pickled_in_any_memory_order(view, protocol, rng):
    """A pickled array comes back in another memory order; the backward has the bits of the one that saw the forward."""
    x = view(rng.normal(3, 2, (6, 5, 4, 3)).astype("float32"))
    dy = rng.normal(size=x.shape).astype("float32")
    y, saved = fastbn.batch_norm_train(x, np.arange(5.0), axis=1)
    fixed = fastbn.Saved.fixed(x, np.ones(5), np.full(5, 2.0), np.arange(5.0))
    in_place = fastbn.batch_norm_train(y.copy(), out=y)[1]
    for kept in (saved, fixed, in_place):
        back = pickle.loads(pickle.dumps(kept, protocol))
        assert repr(back) == repr(kept)
        for a, b in zip(fastbn.batch_norm_backward(dy, kept), fastbn.batch_norm_backward(dy, back), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b, strict=True)
        np.testing.assert_array_equal(back.moments.m2, kept.moments.m2, strict=True)
