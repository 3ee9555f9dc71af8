"""The measuring scripts in docs/examples: they run, their figures are figures, and they measure what they say."""

import ctypes
import dataclasses
import importlib
import importlib.util
import re
import signal
import sys
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from subprocesses import run_python, run_script

import fastbn
from fastbn._measure import RESNET50
from fastbn.kernels.grid import SEGMENT, Grid, fused_grid, split_grid

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
PAGES = FOLDER.parent / "explanation"
NAMES = ("report", "scaling", "startup", "small_calls", "accuracy")

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
    assert "Measured on" in printed
    return parsed(printed), printed


def parsed(text):
    """The tables in a text: [(what stands before it, its rows as {column: cell})]."""
    found = []
    for title, block in re.findall(r"([^|]*)\n((?:\|.*\|\n)+)", text):
        head, _, *rows = ([cell.strip() for cell in line[1:-2].split("|")] for line in block.splitlines(keepends=True))
        found.append((title.strip(), [dict(zip(head, row, strict=True)) for row in rows]))
    return found


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


# ------------------------------------------------------------------------------------------------------------ batches


def test_batches_cost_prints_what_the_page_says():
    (of_batches, of_machines), _ = tables("batches_cost")
    assert len(figures(of_batches[1])) == 5 * 4
    assert [row["bytes from each"] for row in of_machines[1]] == [str(16 * n + 8) for n in (64, 2048)]
    page = parsed((PAGES.parent / "how-to" / "larger-than-memory.md").read_text())
    (shown,) = [rows for _, rows in page if "samples a batch" in rows[0]]
    assert list(shown[0]) == list(of_batches[1][0])


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
    "fused runs": (Grid(True, True, 3, np.array([2, 5, 100, 1, 3]), 0), [200, 400, 400]),
    # the same in groups of two channels: the last group is one
    "fused groups": (Grid(True, True, 2, np.array([2, 5, 100, 2, 2]), 0), [400, 600]),
    # 2 channels of 2 runs, each a whole segment and 100 more, in 3 tiles: 1, 1 and 2 segments
    "split runs": (Grid(True, False, 3, np.array([1, 2, SEGMENT + 100, 0, 3]), 0), [SEGMENT, 100, SEGMENT + 100]),
    # 3 rows of 5 channels of 2, two channels a strip
    "fused rows": (Grid(False, True, 3, np.array([30, 10, 5, 2, 1, 2, 3, 3]), 0), [12, 12, 6]),
    # the same in two tiles
    "fused strips": (Grid(False, True, 2, np.array([30, 10, 5, 2, 1, 2, 3, 2]), 0), [12, 18]),
    # the same in two blocks, of one row and of two
    "split rows": (Grid(False, False, 6, np.array([30, 10, 5, 2, 2, 2, 3, 0]), 0), [4, 4, 2, 8, 8, 4]),
    # 21 rows of 3 channels, eight of them folded into one; the last has 5 of 8
    "folded rows": (Grid(False, False, 2, np.array([63, 24, 3, 1, 2, 3, 1, 0]), 0), [24, 39]),
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
    assert len(compiled) == 1, "one kernel, nothing that the verb does not need"
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
    for (_, rows), expected in ((modules, {"_threads", "_check", "functional"}), (functions, {"_threads._run"})):
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
    assert met.most_common(1)[0][0] == "_threads._run"


# ----------------------------------------------------------------------------------------------------------- accuracy

# What brings each system of the page.
PACKAGES = {"PyTorch": "torch", "JAX": "jax", "Keras": "keras", "ONNX Runtime": "onnxruntime"}
KEYS = ("dtype", "layout", "result", "case", "parts", "")  # columns that name a row


@pytest.fixture(scope="module")
def published():
    """The tables of docs/explanation/accuracy.md that the program prints."""
    found = parsed((PAGES / "accuracy.md").read_text())
    return [rows for _, rows in found if not rows[0].keys() & {"terms", "x"}]


def keys(rows):
    return [tuple(row[k] for k in KEYS if k in row) for row in rows]


def unit(cell):
    """The error in a cell, 1.76 of "1.76 (huge)"."""
    return float(cell.split(" ")[0])


def test_accuracy_prints_the_tables_of_its_page(published):
    """The same rows, columns and dashes, and on ordinary data every system computes what the others do."""
    found, _ = tables("accuracy", timeout=300)
    assert len(found) == len(published)
    absent = {system for system, package in PACKAGES.items() if importlib.util.find_spec(package) is None}
    for (title, rows), page in zip(found, published, strict=True):
        assert keys(rows) == keys(page)
        for row, expected in zip(rows, page, strict=True):
            assert list(row) == list(expected)
            ordinary = "Ordinary" in title or row.get("case", "").startswith("normal")
            for column in set(row) - set(KEYS):
                dash = column in absent or expected[column] == "-"
                assert (row[column] == "-") is dash, (title, keys([row]), column, row[column])
                if ordinary and not dash:
                    assert unit(row[column]) < 100, (title, keys([row]), column, row[column])


def test_fastbn_is_as_accurate_as_the_page_says(published):
    """Within a factor of two: the bits are the same on one kind of CPU, not on all."""
    found = parsed(run_python(str(FOLDER / "accuracy.py"), "--no-peers", "--markdown", timeout=300))
    compared = 0
    for (title, rows), page in zip(found, published, strict=True):
        for row, expected in zip(rows, page, strict=True):
            for column in set(row) - set(KEYS):
                if expected[column] != "-":
                    new, old = unit(row[column]), unit(expected[column])
                    assert max(new, old) <= 2 * min(new, old) + 0.5, (title, keys([row]), column, new, old)
                    compared += 1
    assert compared > 150
    every = [row for row in found[1][1] if row["dtype"] == "float32"]  # what the README promises
    assert len(every) == 12
    for row in every:
        assert unit(row["fastbn"]) < {"y": 2, "dx": 4}.get(row["result"], 1), row


def test_accuracy_without_any_peer():
    """Each has its column, of dashes, and its reason."""
    script = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
sys.stderr = sys.stdout
for package in {sorted(PACKAGES.values())}:
    sys.modules[package] = None  # to import it raises ImportError
import accuracy
accuracy.main(["--quick", "--markdown"])
"""
    printed = run_script(script)
    for system, package in PACKAGES.items():
        assert re.search(rf"^{system}: .*(onnx|{package})", printed, re.M), printed  # ONNX Runtime needs onnx, too
    seen = set()
    for _, rows in parsed(printed):
        for row in rows:
            seen |= row.keys()
            assert {row[system] for system in PACKAGES.keys() & row.keys()} <= {"-"}
            assert row.get("fastbn") != "-" or row["case"] == "huge"
    assert seen > PACKAGES.keys()


def test_accuracy_leaves_out_what_it_cannot_judge(scripts, monkeypatch):
    """float64, where long double is no wider."""
    accuracy = scripts.accuracy
    monkeypatch.setattr(accuracy, "WIDE", np.float64)
    case = accuracy.CASES[0].small()
    found = accuracy.measure([accuracy.FastBN()], [case])
    assert {key[1] for key in found} == {"float32"}


def test_a_unit_counted_by_hand(scripts):
    """An ulp at 1.5 is 2**-23, at the 5 of larger terms 2**-21; of subnormals 2**-149; where all is 0, that of 1."""
    exact, unit = scripts.accuracy._with_unit(
        np.array([1.5, 1.5, -1.5, 1e-44, 0]).astype(np.longdouble), np.array([0, 5, 1, 0, 0]), "float32"
    )
    assert [float(u) for u in unit] == [2.0**-23, 2.0**-21, 2.0**-23, 2.0**-149, 2.0**-23]
    assert scripts.accuracy.error(exact + np.array([1, 0, -3, 2, 0]) * unit, exact, unit) == 3
    assert np.isnan(scripts.accuracy.error(exact + np.array([np.nan, 0, 0, 9, 0]), exact, unit))
    assert [scripts.accuracy.figure(e) for e in (0.004, 9.99, 9.996, 9999.4, 9999.6, 4e18, np.nan, np.inf)] == [
        "0.00", "9.99", "10", "9999", "1e4", "4e18", "nan", "inf",
    ]  # fmt: skip


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than float64")
def test_what_is_exact_is(scripts):
    """To a hundredth of a unit of float64, against decimal arithmetic, on every case."""
    accuracy = scripts.accuracy
    for case in accuracy.CASES:
        d = accuracy.Data(dataclasses.replace(case, shape=(3, 2, 2, 2)), case.dtypes[-1])
        with localcontext(prec=60):
            for c in range(2):
                for name, expected in decimal_batch_norm(d, c, Decimal(accuracy.EPS)).items():
                    exact, unit = (np.broadcast_to(a, d.exact[name][0].shape)[c] for a in d.exact[name])
                    assert len(exact) == len(expected)
                    for found, u, value in zip(exact, unit, expected, strict=True):
                        assert abs(decimal(found) - value) <= decimal(u) / 100, f"{case.name}: {name} {value}"


def decimal(value):
    """A long double, exactly."""
    mantissa, exponent = np.frexp(value)
    return Decimal(int(np.ldexp(mantissa, 64))) * Decimal(2) ** (int(exponent) - 64)


def decimal_batch_norm(d, c, eps):
    """{result: values} of a channel, the formulas of the paper."""
    x, dy = ([Decimal(float(v)) for v in a[c]] for a in (d.x, d.dy))
    gamma, beta, given_mean, given_var = (Decimal(float(a[c])) for a in (d.gamma, d.beta, d.mean, d.var))
    n = len(x)
    mean = sum(x) / n
    var = sum((v - mean) ** 2 for v in x) / n
    xhat = [(v - mean) / (var + eps).sqrt() for v in x]
    dbeta, dgamma = sum(dy), sum(g * h for g, h in zip(dy, xhat, strict=True))
    scale = gamma / (var + eps).sqrt()
    return {
        "mean": [mean],
        "var": [var],
        "y": [gamma * h + beta for h in xhat],
        "dx": [scale * (g - dbeta / n - h * dgamma / n) for g, h in zip(dy, xhat, strict=True)],
        "dgamma": [dgamma],
        "dbeta": [dbeta],
        "y, inference": [gamma * (v - given_mean) / (given_var + eps).sqrt() + beta for v in x],
    }
