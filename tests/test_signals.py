"""Ctrl-C at any time leaves every state whole: as before the call or as after it, locks free, counts given back.

Python runs a signal's handler between two instructions of the main thread, but not between any two: after a call, a
jump backwards or the start of a function. One test puts an exception at each such place in turn; another has a timer
do it.
"""

import os
import signal
import subprocess
import sys

import pytest
from subprocesses import ROOT, run_script

POSIX = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")

# Actions on a layer (or on two arrays), what they start from, and all of the state that they may change.
PREAMBLE = """
import copy, itertools, random, signal, sys, time
import numpy as np
import fastbn
from fastbn import _threads

rng = np.random.default_rng(5)
C = 4
x = rng.normal(3, 2, (8, C, 3, 3)).astype("float32")

class Running:
    "Two running statistics without a layer."
    def __init__(self):
        self.mean, self.var = np.zeros(C, "float32"), np.ones(C)
        self.m = fastbn.moments(x)
    def update(self):
        fastbn.update_running(self.mean, self.var, self.m)

def layer(**options):
    bn = fastbn.BatchNorm(C, **options)
    bn(x[:3])
    return bn

def state(a):
    if isinstance(a, Running):
        return a.mean.tobytes(), a.var.tobytes()
    kept = tuple(getattr(a, name) for name in ("gamma", "beta", "running_mean", "running_var", "dgamma", "dbeta"))
    pool = a._pool.count, a._pool.mean.tobytes(), a._pool.m2.tobytes()
    return tuple(None if v is None else v.tobytes() for v in kept), a.num_batches_tracked, pool

other = layer()
other(x * 2)
loaded = {k: v + 1 for k, v in other.state_dict().items()}
pooled = layer(momentum=None)
pooled(x * 2)
pooled = {k: v + 1 for k, v in pooled.state_dict().items()}

CASES = {
    "a training call": (layer(), lambda bn: bn(x)),
    "a training call of float64": (layer(dtype="float64", momentum=0.0), lambda bn: bn(x)),
    "a training call that pools": (layer(momentum=None), lambda bn: bn(x)),
    "a training call in place": (layer(), lambda bn: (y := x.copy(), bn(y, out=y))),
    "a backward": (layer(), lambda bn: bn.backward(x[:3])),
    "load_state_dict": (layer(), lambda bn: bn.load_state_dict(loaded)),
    "load_state_dict without gamma": (
        layer(scale=False), lambda bn: bn.load_state_dict({k: v for k, v in loaded.items() if k != "gamma"})
    ),
    "load_state_dict of a pool": (layer(momentum=None), lambda bn: bn.load_state_dict(pooled)),
    "fit_population": (layer(), lambda bn: bn.fit_population([x, x[:2]])),
    "update_running": (Running(), Running.update),
}

def copied(a):
    b = copy.deepcopy(a)
    if isinstance(a, fastbn.BatchNorm):
        b._saved = a._saved
    return b

def sides(start, action):
    "The two states that may be found."
    done = copied(start)
    action(done)
    before, after = state(start), state(done)
    assert before != after
    return before, after
"""

AT_EVERY_PLACE = (
    PREAMBLE
    + """
import dis

class Interrupt(BaseException):
    pass

# After these no handler runs. It does after some of the others only; that is Python's business and may change.
QUIET = ("LOAD_", "STORE_", "SWAP", "COPY", "UNPACK_SEQUENCE", "POP_TOP", "PUSH_NULL", "NOP", "CACHE", "EXTENDED_ARG",
         "POP_JUMP_FORWARD_IF", "POP_JUMP_IF", "JUMP_FORWARD", "NOT_TAKEN", "BUILD_TUPLE", "RETURN_", "PRECALL",
         "DICT_MERGE", "KW_NAMES", "MAKE_CELL", "COPY_FREE_VARS", "RESUME_CHECK")
ours = (fastbn.__path__[0], "ufunc/parallel.py")
names = {}

def quiet(code, at):
    if code not in names:
        names[code] = {i.offset: i.opname for i in dis.get_instructions(code)}
    return names[code].get(at, "?").startswith(QUIET)

def interrupted(place, call):
    "Whether there are so many places; the call is left at this one."
    seen = 0
    def trace(frame, event, arg):
        if event == "call":
            if not any(o in frame.f_code.co_filename.replace("\\\\", "/") for o in ours):
                return None
            frame.f_trace_lines, frame.f_trace_opcodes = False, True
            last = None
            def within(frame, event, arg):
                nonlocal seen, last
                if event == "opcode":
                    if last is not None and not quiet(frame.f_code, last):
                        seen += 1
                        if seen == place:
                            raise Interrupt
                    last = frame.f_lasti
                elif event == "exception":
                    last = None
                return within
            return within
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False
"""
)

EVERY_CASE = (
    AT_EVERY_PLACE
    + """
for what, (start, action) in CASES.items():
    before, after = sides(start, action)
    for place in itertools.count(1):
        a = copied(start)
        if not interrupted(place, lambda: action(a)):
            break
        found = state(a)
        assert found in (before, after), f"{what}, place {place}: neither before nor after"
        if found == before:
            action(a)
            assert state(a) == after, f"{what}, place {place}: it cannot be repeated"
    assert state(a) == after
    assert place > 20, (what, place)
    print(what, place)
"""
)

EVERY_REGION = (
    AT_EVERY_PLACE
    + """
import numba
x = rng.normal(size=(2, 64, 32, 32)).astype("float32")
fastbn.set_num_threads(2)
before = numba.get_num_threads()
expected = fastbn.batch_norm_train(x)[0].tobytes()
regions = 0
for place in itertools.count(1):
    assert not _threads._inside and not _threads._region.locked() and numba.get_num_threads() == before, place
    if not interrupted(place, lambda: fastbn.batch_norm_train(x)):
        break
assert fastbn.batch_norm_train(x)[0].tobytes() == expected
assert numba.get_num_threads() == before > 2
assert place > 50
print(numba.threading_layer(), place)
"""
)

TIMER = (
    PREAMBLE
    + """
signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C runs
random.seed(0)

def interrupt(delay, call):
    "A KeyboardInterrupt, surely: in the call or after it. Python drops one that comes in a __del__: then the next."
    try:
        signal.setitimer(signal.ITIMER_REAL, delay, 0.5)
        call()
        while True:
            pass
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)

for rounds, shape in ((400, (8, C, 3, 3)), (100, (64, C, 128, 64))):
    x = rng.normal(3, 2, shape).astype("float32")
    for what in ("a training call", "a training call that pools", "load_state_dict"):
        start, action = CASES[what]
        before, after = sides(start, action)
        begin = time.perf_counter()
        for _ in range(20):
            action(copied(start))
        usual = (time.perf_counter() - begin) / 20
        found = [0, 0]
        for i in range(rounds):
            a = copied(start)
            interrupt(max(1e-6, random.uniform(0, 2 * usual)), lambda: action(a))
            assert state(a) in (before, after), (what, i)
            found[state(a) == after] += 1
            assert not _threads._inside and not _threads._region.locked()
        assert all(found), (what, found)
        print(what, found)
"""
)

COMPILING = """
import signal, sys, time
import numpy as np
import fastbn
from fastbn.kernels import forward  # Numba too: Python cannot import again a package whose import was interrupted
signal.signal(signal.SIGALRM, signal.default_int_handler)
x = np.array([[1, 2], [3, 6]], "float32")
interrupts = 0
for delay in (0.01, 0.1, 0.4, 0.8, 1.5, 0):
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        y = fastbn.batch_norm_train(x, eps=0)[0]
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
assert interrupts
assert y.tolist() == [[-1, -1], [1, 1]]
"""

POOL = """
import multiprocessing, os, signal, sys
import numpy as np
import fastbn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without

def work(seed):
    x = np.random.default_rng(seed).normal(size=(4, 16, 40, 40)).astype("float32")
    return float(fastbn.batch_norm_train(x)[1].var.sum())

if __name__ == "__main__":
    expected = work(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.imap_unordered(work, [0] * 10**6)
        assert next(found) == expected
        try:
            print("working", flush=True)  # the signal may come before this returns
            for value in found:
                assert value == expected
        except KeyboardInterrupt:
            pool.terminate()
            pool.join()
    print(work(0) == expected, flush=True)
"""

FOREVER = """
import signal
import numpy as np
import fastbn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without
bn, x = fastbn.BatchNorm(64), np.ones((16, 64, 56, 56), "float32")
bn(x)
print("working", flush=True)
while True:
    bn(x)
"""


def test_an_interrupt_at_every_place_leaves_the_state_before_or_after():
    printed = run_script(EVERY_CASE)
    assert printed.count("\n") == 10, printed


@pytest.mark.parametrize("layer", ["workqueue", "default"])
def test_an_interrupt_at_every_place_of_a_region(layer):
    """It is left: no lock held, Numba's thread count as the user had it."""
    printed = run_script(EVERY_REGION, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="4")
    assert layer in ("default", printed.split()[0])


@POSIX
def test_a_timer_interrupts_calls():
    printed = run_script(TIMER)
    assert printed.count("\n") == 6, printed


@POSIX
def test_interrupted_compilations(tmp_path):
    """The next call compiles again; no part of a file is left in the cache."""
    run_script(COMPILING, NUMBA_CACHE_DIR=str(tmp_path))
    # None if the last interrupt came when all was compiled and not yet stored.
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] in ([], [".nbc"])


def started(source):
    """A process in a group of its own, once it works."""
    path = os.pathsep.join((str(ROOT), os.path.dirname(__file__)))
    process = subprocess.Popen(
        [sys.executable, "-c", source], env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "working\n", process.communicate()
    return process


def ended(process):
    """Its exit status and output, when all of its group are gone."""
    try:
        printed, errors = process.communicate(timeout=60)  # until the last of the group has closed its output
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            gone = False
        except ProcessLookupError:
            gone = True
    assert gone, "a process of the group is left"
    return process.returncode, printed, errors


@POSIX
def test_an_interrupted_worker_pool_ends():
    process = started(POOL)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process)[:2] == (0, "True\n")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_computes(number):
    """At once, as Python does: by the signal, or by an exception that nobody catches."""
    process = started(FOREVER)
    process.send_signal(number)
    status, _, errors = ended(process)
    assert status == -number
    assert number == signal.SIGTERM or errors.rstrip().endswith("KeyboardInterrupt")
