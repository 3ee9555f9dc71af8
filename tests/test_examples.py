"""The measuring scripts in docs/examples: they run, their figures are figures, and they measure what they say."""

import ctypes
import importlib
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from subprocesses import run_python

import fastbn
from fastbn._measure import RESNET50
from fastbn.kernels.grid import SEGMENT, Grid, fused_grid, split_grid

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
NAMES = ("report", "scaling", "startup", "small_calls")

pytestmark = pytest.mark.jit("the scripts measure arrays of full size")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


def tables(script, *args, **env):
    """What a script's quick run prints: [(text before a table, its rows as {column: cell})], and all of it."""
    printed = run_python(str(FOLDER / f"{script}.py"), "--quick", "--markdown", *args, **env)
    found = []
    for title, block in re.findall(r"([^|]*)\n((?:\|.*\|\n)+)", printed):
        head, _, *rows = ([cell.strip() for cell in line[1:-2].split("|")] for line in block.splitlines(keepends=True))
        found.append((title.strip(), [dict(zip(head, row, strict=True)) for row in rows]))
    assert "Measured on" in printed
    return found, printed


def names(rows):
    """The first column."""
    return [next(iter(row.values())) for row in rows]


def figures(rows, *, signed=()):
    """Every figure of a table but for its first column; only those of a column that is a difference may be negative."""
    found = []
    for row in rows:
        for column, cell in list(row.items())[1:]:
            if re.fullmatch(r"-?[\d.]+", cell):
                found.append(float(cell))
                assert found[-1] >= 0 or column in signed, (column, cell)
    return found


# ------------------------------------------------------------------------------------------------------------ scaling


def test_scaling_prints_growth_and_threads():
    found = tables("scaling", "--only", "growth")[0] + tables("scaling", "--only", "threads", NUMBA_NUM_THREADS="2")[0]
    expected = ("Growth", 3 * 7), ("in units of copy", 2 * 6), ("2 over one", 2 * 9)
    for (title, rows), (text, count) in zip(found, expected, strict=True):
        assert text in title
        assert len(figures(rows)) == count
        assert min(figures(rows)) > 0


def test_scaling_compares_fresh_outputs_with_given_ones():
    ((title, rows),), _ = tables("scaling", "--only", "outputs")
    assert "without out=, over with it" in title
    assert names(rows) == ["1", "5"]
    assert len(figures(rows)) == 4
    assert min(figures(rows)) > 0


def test_scaling_has_nothing_to_compare_with_one_thread():
    found, printed = tables("scaling", "--only", "threads", NUMBA_NUM_THREADS="1")
    assert not found
    assert "nothing to compare" in printed


def test_scaling_prints_the_balance_of_every_layer(scripts):
    ((_, summary), *details), _ = tables("scaling", "--only", "balance")
    operations = [" ".join(op) for op in scripts.scaling.OPERATIONS]
    assert names(summary) == operations
    assert [title.split(",")[0] for title, _ in details] == operations
    for total, (_, rows) in zip(summary, details, strict=True):
        assert len(rows) == len(RESNET50)
        for threads in list(total)[1:]:
            balance = [float(row[threads].split()[0]) for row in rows]
            assert 0 < min(balance) <= float(total[threads]) <= max(balance) <= 1
            assert threads != "1 thread" or set(balance) == {1.0}


HAND = {  # grid: elements of its tiles
    # 5 channels of 2 runs of 100, in 3 tiles
    "fused runs": (Grid(True, True, 3, np.array([2, 5, 100, 1, 3])), [200, 400, 400]),
    # the same in groups of two channels: the last group is one
    "fused groups": (Grid(True, True, 2, np.array([2, 5, 100, 2, 2])), [400, 600]),
    # 2 channels of 2 runs, each a whole segment and 100 more, in 3 tiles: 1, 1 and 2 segments
    "split runs": (Grid(True, False, 3, np.array([1, 2, SEGMENT + 100, 0, 3])), [SEGMENT, 100, SEGMENT + 100]),
    # 3 rows of 5 channels of 2, two channels a strip
    "fused rows": (Grid(False, True, 3, np.array([30, 10, 5, 2, 1, 2, 3, 1])), [12, 12, 6]),
    # the same in two blocks, of one row and of two
    "split rows": (Grid(False, False, 6, np.array([30, 10, 5, 2, 2, 2, 3, 0])), [4, 4, 2, 8, 8, 4]),
    # 21 rows of 3 channels, eight of them folded into one; the last has 5 of 8
    "folded rows": (Grid(False, False, 2, np.array([63, 24, 3, 1, 2, 3, 1, 0])), [24, 39]),
}


@pytest.mark.parametrize("name", HAND)
def test_elements_of_tiles_are_those_counted_by_hand(scripts, name):
    grid, expected = HAND[name]
    np.testing.assert_array_equal(scripts.scaling.tile_elements(grid), expected)


def test_the_busiest_thread_counted_by_hand(scripts):
    elements = np.array([400, 400, 200])
    assert [scripts.scaling.busiest(elements, t) for t in (1, 2, 3, 4)] == [1000, 800, 400, 400]


@pytest.mark.parametrize("threads", [1, 3, 64])
def test_tiles_have_every_element_once(scripts, threads):
    sides = [(32, c, s * s) for c, s, _ in RESNET50] + [(32 * s * s, c, 1) for c, s, _ in RESNET50]
    sides += [
        (1, 1, 10**6 + 1),
        (10**6 + 1, 3, 1),
        (999, 65, 50),
        (7, 257, 33),
        (5, 1, 8193),
        (1, 2, 1),
        (301, 1000, 3),
    ]
    for side in sides:
        grids = [fused_grid(*side, 4, threads), split_grid(*side, 4)]
        for grid in filter(None, grids):
            elements = scripts.scaling.tile_elements(grid)
            assert elements.size == grid.tiles
            assert elements.sum() == np.prod(side)
            assert elements.min() > 0


def test_numba_cuts_tiles_into_the_same_chunks(scripts):
    from numba.np.ufunc import workqueue  # of the same source in every threading layer

    pointer = ctypes.POINTER(ctypes.c_ssize_t)
    schedule = ctypes.CFUNCTYPE(None, ctypes.c_size_t, pointer, pointer, ctypes.c_size_t, pointer, ctypes.c_ssize_t)(
        workqueue.do_scheduling_signed
    )
    rng = np.random.default_rng(0)
    for tiles in (1, 2, 3, 7, 13, 25, 26, 32, 98, 128):
        elements = rng.integers(1, 1000, tiles)
        for threads in (1, 2, 3, 4, 16, 64):
            first, last, chunks = ctypes.c_ssize_t(0), ctypes.c_ssize_t(tiles - 1), (ctypes.c_ssize_t * (2 * threads))()
            schedule(1, ctypes.byref(first), ctypes.byref(last), threads, chunks, 0)
            work = [elements[a : b + 1].sum() for a, b in zip(chunks[::2], chunks[1::2], strict=True)]
            assert sum(work) == elements.sum()
            assert max(work) == scripts.scaling.busiest(elements, threads)


def test_scaling_times_what_it_says(scripts):
    x, dy, y, dx = arrays = scripts.scaling.buffers(1)
    try:
        found, number = scripts.scaling.calls(1, 1, *arrays)
    finally:
        fastbn.set_num_threads(None)
    assert number > 1
    y[:] = np.nan
    found["copy"]()
    np.testing.assert_array_equal(y, x + np.float32(0.5))
    gamma, beta = np.linspace(0.5, 1.5, 64, dtype="float32"), np.linspace(-1, 1, 64, dtype="float32")
    for operation, name in scripts.scaling.OPERATIONS:
        axis = scripts.scaling.AXES[name]
        shape = (1, 64, 56, 56) if axis == 1 else (1, 56, 56, 64)
        for a in (y, dx):
            a[:] = np.nan
        found[operation, name]()
        if operation == "backward":
            expected = reference.backward(dy.reshape(shape), x.reshape(shape), gamma, axis=axis)
            reference.assert_within(dx.reshape(shape), expected.dx, expected.dx_budget, "dx")
        else:  # inference is given the statistics of x
            expected = reference.train(x.reshape(shape), gamma, beta, axis=axis)
            reference.assert_within(y.reshape(shape), expected.y, expected.budget, "y")


# ------------------------------------------------------------------------------------------------------------ startup


def test_startup_prints_imports_and_first_calls():
    ((_, imports), (_, calls)), _ = tables("startup")
    *whole, above = imports
    assert {"import numpy", "import fastbn"} < set(names(whole))
    assert "above" in names([above])[0]
    assert names(calls) == ["batch_norm_train"]
    assert len(figures(whole)) >= 3
    for rows in (whole, calls):
        assert min(figures(rows)) > 0


@pytest.mark.parametrize("verb", ["batch_norm_train", "batch_norm_backward", "batch_norm"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_first_call_is_of_the_verb_and_parallel(scripts, verb, layout):
    given = {}
    exec(scripts.startup.call(verb, layout), given)
    x, axis = given["x"], given["axis"]
    assert (x.shape[axis], x.size) == (64, 8 * 64 * 28 * 28)
    assert x.size >= fastbn._threads.SERIAL_SIZE
    assert scripts.startup.VERBS[verb].startswith(f"fastbn.{verb}(")


def test_a_cold_start_compiles_and_a_warm_one_loads(scripts, tmp_path):
    def cached():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}

    program = scripts.startup.call("batch_norm", "NHWC")
    assert scripts.startup.seconds(scripts.startup.IMPORTS["import fastbn"], tmp_path) > 0
    assert not cached()
    assert scripts.startup.seconds(program, tmp_path) > 0
    compiled = cached()
    assert len(compiled) == 2, "an index and one kernel, nothing that the verb does not need"
    assert scripts.startup.seconds(program, tmp_path) > 0
    assert cached() == compiled


# -------------------------------------------------------------------------------------------------------- small calls


def test_small_calls_prints_calls_parts_and_idling(scripts):
    (*calls, modules, functions, idle), _ = tables("small_calls")
    assert len(calls) == len(scripts.small_calls.SHAPES)
    for shape, (title, rows) in zip(scripts.small_calls.SHAPES, calls, strict=True):
        assert f"{shape} float32" in title
        assert names(rows) == list(scripts.small_calls.PEERS)
        assert min(figures(rows)) > 0
    for (_, rows), expected in ((modules, {"_threads", "_check", "functional"}), (functions, {"_threads.run"})):
        assert expected < set(names(rows))
        *parts, total = np.reshape(figures(rows), (len(rows), -1))
        np.testing.assert_allclose(np.sum(parts, axis=0), total, atol=0.005 * len(rows))
        assert total.min() > 0
    assert len(idle[1]) >= 2 * len(scripts.small_calls.PEERS)
    assert all(float(row["hot, µs"]) > 0 for row in idle[1])
    figures(idle[1], signed=("above hot, µs",))


def test_small_calls_times_what_it_says(scripts):
    shape = (2, 3, 4, 5)
    x, dy = np.random.default_rng(0).standard_normal((2, *shape), dtype="float32")
    expected, backward = reference.train(x), reference.backward(dy, x)
    plain = reference.infer(x, np.zeros(3), np.ones(3))
    for out in (False, True):
        calls = scripts.small_calls.fastbn_calls(shape, out)
        assert calls.keys() == scripts.small_calls.PEERS.keys()
        y, saved = calls["batch_norm_train"]()
        reference.assert_within(y, expected.y, expected.budget, "y")
        np.testing.assert_array_equal(saved.x, x)
        dx = calls["batch_norm_backward"]()[0]
        assert (dx is y) is out
        reference.assert_within(dx, backward.dx, backward.dx_budget, "dx")
        np.testing.assert_allclose(calls["batch_norm"](), np.asarray(expected.y, float), atol=1e-5)
        reference.assert_within(calls["BatchNorm, train"](), expected.y, expected.budget, "y")
        reference.assert_within(calls["BatchNorm, eval"](), plain.y, plain.budget, "y")


def test_pytorch_is_timed_for_the_same_work(scripts):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    shape = (2, 3, 4, 5)
    ours = scripts.small_calls.fastbn_calls(shape, out=False)
    theirs = scripts.small_calls.torch_calls(torch, shape)
    for what, peers in scripts.small_calls.PEERS.items():
        for peer in peers:
            if what.startswith("BatchNorm") and not peer.startswith("layer"):
                continue  # the bare function stands for the layer, which in evaluation has other statistics
            mine, other = ours[what](), theirs[peer]()
            mine, other = (r[0] if isinstance(r, tuple) else r for r in (mine, other))
            np.testing.assert_allclose(mine, other.detach().numpy(), atol=1e-5)
            assert other.requires_grad is (peer in ("train, recorded", "layer, train"))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that interrupts a program")
def test_samples_find_the_function_that_takes_the_time(scripts):
    x = np.ones((256, 128), "float32")
    before = signal.getsignal(signal.SIGALRM)
    met = scripts.small_calls.samples(lambda: fastbn.moments(x), 0.3)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert met.most_common(1)[0][0] == "_threads.run"
