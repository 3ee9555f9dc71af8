"""Numba's threading layers: which are installed, and scripts that run under one of them, in a process of their own."""

import functools
import os

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

def together(*works):
    # Runs them in threads that start at once; what they raise is an error of the script.
    start, errors = threading.Barrier(len(works)), []
    def run(work):
        start.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=run, args=(w,)) for w in works]
    for t in threads: t.start()
    for t in threads: t.join()
    if errors: raise errors[0]

fastbn.set_num_threads(1)
expected = digest()
fastbn.set_num_threads(None)
right = lambda: digest() == expected
"""


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


def skip_without(layer):
    if unavailable(layer):
        pytest.skip(f"threading layer {layer}: {unavailable(layer)}")


def run_layer(layer, script, threads="2", **env):
    """Runs PREAMBLE and a script; at the end the bits must be right, and the layer the one that was asked for."""
    skip_without(layer)
    end = f'\nassert right() and layer() == "{layer}", layer()\nprint("done")'
    printed = run_script(PREAMBLE + script + end, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=threads, **env)
    assert printed.endswith("done\n"), printed
