"""Any number of Python threads may call at once, under every threading layer, and nobody's settings change."""

import sys

import pytest
from layers import LAYERS, PREAMBLE, run_layer, skip_without, unavailable
from subprocesses import run_script

pytestmark = pytest.mark.jit("no threading layer ever starts")

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# 8 threads, 10,000 calls each: every verb and a layer, small arrays and (one call in 100) ones that go parallel. Each
# result must have the bits of the same call made alone and serial.
MIXED = """
threads, calls, warm, stretch = 8, 10_000, 2_000, 2_000
tiny = [((4, 3, 5, 7), 1, "float32"), ((4, 5, 7, 3), -1, "float32"), ((8, 5), 1, "float64"), ((11,), (), "float32"),
        ((2, 4, 40), 1, "int8")]
inputs = [(rng.normal(3, 9, size=shape).astype(dtype), axis) for shape, axis, dtype in tiny]
big = [(rng.normal(3, 1, size=shape).astype("float32"), axis) for shape, axis in shapes]

def jobs_of(x, axis):
    mean, var = np.zeros(()), np.full((), 4.0)
    _, saved = fastbn.batch_norm_train(x, axis=axis)
    dy = np.sin(np.arange(x.size)).reshape(x.shape)
    def train():
        y, saved = fastbn.batch_norm_train(x, axis=axis)
        return y, saved.mean, saved.var
    return [
        train,
        lambda: fastbn.batch_norm_backward(dy, saved),
        lambda: (fastbn.batch_norm(x, mean, var, axis=axis),),
        lambda: (fastbn.moments(x, axis=axis).m2,),
    ]

bits = lambda arrays: b"".join(a.tobytes() for a in arrays)
fastbn.set_num_threads(1)
often = [(job, bits(job())) for x, axis in inputs for job in jobs_of(x, axis)]
seldom = [(job, bits(job())) for x, axis in big for job in jobs_of(x, axis)]

def a_layer():
    # Calls of a layer that no other thread has; the state depends on all of them.
    x, axis = inputs[0]
    bn = fastbn.BatchNorm(x.shape[axis])
    def step():
        y = bn(x)
        return y, bn.backward(y), bn.running_mean, bn.running_var
    return step

alone = a_layer()
states = [bits(alone()) for _ in range(calls // 10)]

import ctypes, gc
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
def rss():
    # What is in use: the C library returns what it keeps for each thread, which depends on who met whom.
    gc.collect()
    trim(0)
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) * 1024

memory = []
pause = threading.Barrier(threads, action=lambda: memory.append(rss()))
begin = threading.Barrier(threads, action=lambda: fastbn.set_num_threads(None))
def work(number):
    for job, expects in often + seldom:  # serial, as under workqueue at any time: each thread's stack has its depth
        assert bits(job()) == expects, number
    begin.wait()
    step, steps = a_layer(), iter(states)
    for k in range(calls):
        if k >= warm and (k - warm) % stretch == 0:
            pause.wait()
        if k % 10 == 5:
            assert bits(step()) == next(steps), ("the layer", k)
            continue
        some = seldom if k % 100 == 7 else often
        at = (k * 7 + number * 3) % len(some)
        job, expects = some[at]
        assert bits(job()) == expects, (number, k, at)
    pause.wait()

together(*(lambda n=n: work(n) for n in range(threads)))
# What leaks does so in every stretch; a heap that grows because threads happened to meet does not.
growth = min(after - before for before, after in zip(memory, memory[1:]))
# Each verb is a fifth of the calls; one that kept the smallest array of each would go beyond this.
bound = threads * stretch // 5 * sys.getsizeof(np.empty(0))
assert growth < bound, f"{growth:,} bytes more in every {stretch:,} calls a thread, expected less than {bound:,}"
"""

# Everything that sets a limit, in one thread, while others compute: parallel, serial, and with recycled outputs.
LIMITS = """
import random
x = rng.normal(size=(8, 16, 100, 100)).astype("float32")  # above 4 MiB: recycled
y = fastbn.batch_norm_train(x)[0].tobytes()
busy = threading.Semaphore(0)

def compute():
    try:
        for _ in range(25):
            assert right()
            assert fastbn.batch_norm_train(x)[0].tobytes() == y
    finally:
        busy.release()

def change():
    pick = random.Random(0)
    ended = 0
    while ended < 3:
        fastbn.set_num_threads(pick.choice([1, 2, 3, 99, None]))
        fastbn.set_pool_limit(pick.choice([0, 1, x.nbytes, 1 << 29]))
        if pick.random() < 0.3:
            fastbn.empty_pool()
        assert 1 <= fastbn.get_num_threads() <= 3
        ended += busy.acquire(timeout=0.0005)

together(compute, compute, compute, change)
fastbn.set_num_threads(None)
import numba
assert numba.get_num_threads() == 3
"""

# No kernel has been compiled or loaded in the process when 16 threads need the same one: the parallel build, and under
# workqueue, which bears one region at a time, the serial one too.
FIRST = """
import sys, threading
import numpy as np
import fastbn

x = np.arange(96_000, dtype="float32").reshape(8, 4, -1) % 7
expected = ((x - x.mean((0, 2), keepdims=True, dtype="float64")) ** 2).sum((0, 2))
start, found = threading.Barrier(16), []

def work():
    start.wait()
    m = fastbn.moments(x)
    np.testing.assert_allclose(m.m2, expected, rtol=1e-12)
    found.append(m.m2.tobytes())

threads = [threading.Thread(target=work) for _ in range(16)]
assert "numba" not in sys.modules
for t in threads: t.start()
for t in threads: t.join()
assert len(found) == 16 and len(set(found)) == 1, (len(found), len(set(found)))
print(__import__("numba").threading_layer())
"""


@LINUX
@pytest.mark.parametrize("layer", LAYERS)
def test_mixed_calls_in_many_threads(layer):
    run_layer(layer, MIXED)


@pytest.mark.parametrize("layer", LAYERS)
def test_limits_change_while_others_compute(layer):
    run_layer(layer, LIMITS, threads="3")


@pytest.mark.parametrize("layer", LAYERS)
def test_the_very_first_call_in_many_threads(layer, tmp_path):
    """Compiled by one of them, then loaded by one of them."""
    skip_without(layer)
    for _ in range(2):
        env = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
        assert run_script(FIRST, **env) == f"{layer}\n"


def test_some_layer_is_installed():
    assert None in [unavailable(layer) for layer in LAYERS]


@pytest.mark.skipif(sys.platform != "linux", reason="the dependency has a wheel there")
def test_the_tbb_that_pip_installed_is_found():
    printed = run_script(PREAMBLE + "right(); print(layer())", NUMBA_THREADING_LAYER=None)
    skip_without("tbb")
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


@LINUX
@pytest.mark.parametrize("what", ["small calls", "large calls with one thread"])
def test_serial_calls_start_no_threads(what):
    script = f"""
import os
import numpy as np, numba, fastbn
if {what == "large calls with one thread"}:
    fastbn.set_num_threads(1)
x = np.ones(({100 if what == "small calls" else 10_000}, 8), "float32")
fastbn.batch_norm_train(x)  # loads the kernels
before = len(os.listdir("/proc/self/task"))
y, saved = fastbn.batch_norm_train(x)
fastbn.batch_norm_backward(y, saved)
assert len(os.listdir("/proc/self/task")) == before
try:
    print(numba.threading_layer())
except ValueError:
    print("not started")
"""
    assert run_script(script, NUMBA_NUM_THREADS="2") == "not started\n"
