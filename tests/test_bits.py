"""The same bits, whatever computes them: any number of threads, build, threading layer, process, and alignment."""

import copy
import functools
import json

import numpy as np
import pytest
from builds import force
from digests import CASES, KEYS, PARTS, data, digests
from strategies import PATHS, Problem
from subprocesses import run_python
from test_threads import LAYERS, unavailable

# Each in a process of its own, with another seed of Python's hashes. None: the layer that users get.
PROCESSES = [*((layer, 8) for layer in LAYERS), (None, 3), (None, 5), (None, 7)]


@functools.cache
def expected(key):
    """Digests of the serial build, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        force(patch, lambda kernel, *args: kernel.serial(*args))
        return digests(key)


def differences(key, setting, found):
    return [f"{key}: {name} of {setting}" for name, digest in expected(key).items() if found[name] != digest]


@pytest.mark.parametrize(("layer", "threads"), PROCESSES, ids=str)
def test_threads_builds_layers_and_processes(layer, threads):
    if layer and unavailable(layer):
        pytest.skip(f"threading layer {layer}: {unavailable(layer)}")
    seed = str(1 + PROCESSES.index((layer, threads)))
    program = "digests.py"
    variables = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": str(threads), "PYTHONHASHSEED": seed}
    printed = json.loads(run_python(program, timeout=300, **variables))
    assert printed["layer"] == layer or layer is None
    assert printed["digests"].keys() == (KEYS | PARTS).keys()
    wrong = []
    for key, settings in printed["digests"].items():
        assert len(settings) == threads + 3
        assert all(results.keys() == expected(key).keys() for results in settings.values())
        wrong += [d for setting, results in settings.items() for d in differences(key, setting, results)]
    assert not wrong, f"not the bits of the serial build: {wrong}"


def at(a, offset):
    """The same values in the same order of memory, `offset` bytes after a multiple of 64."""
    memory = np.empty(a.nbytes + 128, np.uint8)
    moved = np.ndarray(a.shape, a.dtype, memory.data, -memory.ctypes.data % 64 + offset, a.strides)
    moved[...] = a
    assert moved.ctypes.data % 64 == offset
    return moved


@pytest.mark.parametrize("build", ["serial", "parallel"])
@pytest.mark.parametrize("key", [key for key, (case, *_) in KEYS.items() if case.size < 1 << 20])  # the time it takes
def test_alignment(monkeypatch, key, build):
    """Of inputs and of outputs, also where they are not aligned to whole elements."""
    force(monkeypatch, lambda kernel, *args: getattr(kernel, build)(*args))
    d, wrong = data(key), []
    for offset in (*range(0, 64, d.x.itemsize), 1, 63):
        wrong += differences(key, f"outputs at {offset} bytes", digests(key, d, functools.partial(at, offset=offset)))
        moved = copy.copy(d)
        moved.x, moved.dy = at(d.x, offset), at(d.dy, offset)
        wrong += differences(key, f"inputs at {offset} bytes", digests(key, moved))
    assert not wrong, f"not the bits of aligned arrays: {wrong}"


def test_the_cases_go_every_way_through_the_kernels():
    paths = set().union(*(Problem(**vars(case), dtype=dtype, threads=8).path() for case, dtype in KEYS.values()))
    # One tile is what small arrays have, and channels are brought together by a copy.
    assert PATHS - paths <= {p for p in PATHS if p.endswith("one tile")} | {"channels brought together"}
    assert len(KEYS) == 2 * len(CASES)
