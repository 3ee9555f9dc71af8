"""Every asv benchmark computes what its name says: none times the wrong thing."""

import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from subprocesses import run_script

import fastbn
from fastbn import _measure

FOLDER = Path(__file__).parents[1] / "asv_bench"

pytestmark = pytest.mark.jit("the benchmarks have arrays of full size")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    try:
        names = [p.stem for p in sorted((FOLDER / "benchmarks").glob("*.py")) if p.stem != "__init__"]
        yield {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in [m for m in sys.modules if m.partition(".")[0] == "benchmarks"]:
            del sys.modules[name]


def train(case, result):
    y, saved = result
    expected = reference.train(case.x, case.gamma, case.beta, axis=case.axis)
    assert y is case.out
    reference.assert_within(y, expected.y, expected.budget, "y")
    np.testing.assert_allclose(saved.mean, reference.mean_var(case.x, case.axis)[0].astype(float), rtol=1e-12)


def train_fresh(case, result):
    assert np.isnan(case.out).all(), "it wrote into the array that it was not given"
    case.out = result[0]
    train(case, result)


def backward(case, result):
    dx, dgamma, dbeta = result
    expected = reference.backward(case.dy, case.x, case.gamma, axis=case.axis)
    assert dx is case.out
    reference.assert_within(dx, expected.dx, expected.dx_budget, "dx")
    reference.assert_within(dgamma, expected.dgamma, expected.dgamma_budget, "dgamma")
    reference.assert_within(dbeta, expected.dbeta, expected.dbeta_budget, "dbeta")


def inference(case, result):
    expected = reference.infer(case.x, case.mean, case.var, case.gamma, case.beta, axis=case.axis)
    assert result is case.out
    reference.assert_within(result, expected.y, expected.budget, "y")


def moments(case, result):
    mean, var = (a.astype(float) for a in reference.mean_var(case.x, case.axis))
    assert result.count == reference.count(case.x, case.axis)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(result.var(), var, rtol=1e-12)


def fused_forward(case, result):
    y, _ = result
    plain = reference.train(case.x, case.gamma, case.beta, axis=case.axis)
    assert y is case.out
    budget = plain.budget + reference.tolerance(case.x.dtype, abs(case.residual))
    reference.assert_within(y, np.maximum(plain.y + case.residual, 0), budget, "y")


def fused_backward(case, result):
    *gradients, dresidual = result
    y, _ = fastbn.batch_norm_train(
        case.x, case.gamma, case.beta, axis=case.axis, residual=case.residual, activation="relu"
    )
    given, case.dy = case.dy, case.dy * (y > 0)
    backward(case, gradients)
    np.testing.assert_array_equal(dresidual, case.dy)
    case.dy = given


def half_forward(case, result):
    y, _ = result
    expected = reference.train(case.x.astype(np.float64), case.gamma, case.beta, axis=case.axis)
    assert y is case.out
    assert_rounded(y, expected)


def assert_rounded(y, expected):
    """Within the rounding of half precision, or of whatever y is in."""
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(y.dtype.name, 0.0)
    rounded = unit * abs(expected.y) + (2.0**-25 if unit else 0)
    reference.assert_within(y.astype(np.float64), expected.y, expected.budget + rounded, "y")


def weighted(case):
    """Count, mean and variance of each channel."""
    x, w = case.x.astype(reference.WIDE), np.broadcast_to(case.where, case.x.shape)
    count = reference.reduce(w, case.axis)
    mean = reference.reduce(w * x, case.axis) / count
    return count, mean, reference.reduce(w * (x - reference.spread(mean, x, case.axis)) ** 2, case.axis) / count


def masked_forward(case, result):
    y, saved = result
    count, mean, var = weighted(case)
    assert 0 < count[0] < case.x.size / case.gamma.size
    assert y is case.out
    np.testing.assert_array_equal(saved.count, count.astype(float))
    np.testing.assert_allclose(saved.mean, mean.astype(float), rtol=1e-12)
    np.testing.assert_allclose(saved.var, var.astype(float), rtol=1e-12)
    expected = reference.infer(case.x, saved.mean, saved.var, case.gamma, case.beta, axis=case.axis)
    reference.assert_within(y, expected.y, expected.budget, "y")


def weighted_moments(case, result):
    for found, expected in zip((result.count, result.mean, result.var()), weighted(case), strict=True):
        np.testing.assert_allclose(found, expected.astype(float), rtol=1e-12)


def images(case, result):
    assert result is case.out
    assert case.x.dtype == np.uint8
    assert case.x.flags.c_contiguous
    x = case.x.astype(np.float64 if case.out.dtype == np.float16 else np.float32)
    assert_rounded(result, reference.infer(x, case.mean, case.var, axis=case.axis))


def folded(case, result):
    scale, shift = case.bn.fold()
    outputs = (-1, 1, 1, 1) if case.layout == "OIHW" else (-1,)
    np.testing.assert_allclose(result[0], case.weight * scale.reshape(outputs), rtol=1e-6)
    np.testing.assert_allclose(result[1], case.bias * scale + shift, rtol=1e-5, atol=1e-6)


def layer_forward(case, y):
    expected = reference.train(case.x, axis=case.axis)
    assert y is case.out
    reference.assert_within(y, expected.y, expected.budget, "y")


def layer(case, result):
    y, dx = result
    layer_forward(case, y)
    expected = reference.backward(case.dy, case.x, axis=case.axis)
    reference.assert_within(dx, expected.dx, expected.dx_budget, "dx")


# Each time_ method: the case it times, and what checks it.
BENCHMARKS = {
    "forward.TrainForward.time_batch_norm_train": (lambda m, *p: m["forward"].case(*p), train),
    "backward.Backward.time_batch_norm_backward": (lambda m, *p: m["backward"].case(*p), backward),
    "inference.Inference.time_batch_norm": (lambda m, *p: m["inference"].case(*p), inference),
    "moments.OfLayers.time_moments": (lambda m, *p: m["moments"].case(*p), moments),
    "forward.HalfForward.time_batch_norm_train": (lambda m, *p: m["forward"].case(*p), half_forward),
    "forward.FusedForward.time_residual_and_relu": (lambda m, *p: m["forward"].fused_case(*p), fused_forward),
    "forward.MaskedForward.time_where": (lambda m, *p: m["forward"].masked_case(*p), masked_forward),
    "backward.FusedBackward.time_residual_and_relu": (lambda m, *p: m["backward"].fused_case(*p), fused_backward),
    "moments.Weighted.time_moments": (lambda m, *p: m["moments"].weighted_case(*p), weighted_moments),
    "images.Images.time_of_bytes": (lambda m, *p: m["images"].case(*p), images),
    "folding.FoldConv.time_fold_conv": (lambda m, *p: m["folding"].case(*p), folded),
    "moments.Batches.time_a_hundred_batches": (lambda m, channels: m["moments"].batches_case(channels), moments),
    "moments.Merge.time_merge": (lambda m, channels: m["moments"].merge_case(channels), moments),
    "small_calls.Small.time_batch_norm_train": (lambda m, s: m["forward"].case("NCHW", s, "float32"), train),
    "small_calls.Small.time_batch_norm_backward": (lambda m, s: m["backward"].case("NCHW", s, "float32"), backward),
    "small_calls.Small.time_batch_norm": (lambda m, s: m["inference"].case("NCHW", s, "float32"), inference),
    "small_calls.Small.time_layer_forward": (lambda m, s: m["small_calls"].layer_case("forward", s), layer_forward),
    "small_calls.Small.time_layer_forward_and_backward": (
        lambda m, s: m["small_calls"].layer_case("forward and backward", s),
        layer,
    ),
    "small_calls.Small.time_layer_inference": (lambda m, s: m["small_calls"].layer_case("inference", s), inference),
}
# The others have tests of their own below.
TIMERAW = {"startup.Import.timeraw_import_numpy", "startup.Import.timeraw_import_fastbn"}
TIMERAW |= {"startup.FirstResult.timeraw_first_result"}
TRACK = {"small_calls.AfterIdle.track_call", "memory.Peak.track_above_the_arrays"}
TRACK |= {f"peers.{cls}.track_time" for cls in ("InCopies", "InTriads", "InPyTorch", "FreshOverGiven")}
TRACK |= {f"peers.{cls}.track_time" for cls in ("PairInPyTorch", "PartsInTheirUnits", "ImagesInCopies")}


def classes(modules):
    return {
        f"{name}.{cls.__name__}": cls
        for name, module in modules.items()
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
    }


def test_every_benchmark_is_checked_here(modules):
    kinds = ("time_", "timeraw_", "track_", "mem_", "peakmem_")
    found = [f"{n}.{m}" for n, cls in classes(modules).items() for m in dir(cls) if m.startswith(kinds)]
    assert sorted(found) == sorted({*BENCHMARKS, *TIMERAW, *TRACK})


def test_no_timed_benchmark_has_a_setup(modules):
    # asv would call it before every single timed call; and would choose number=1 from a first call that compiles.
    for name, cls in classes(modules).items():
        if any(m.startswith("time_") for m in dir(cls)):
            assert not hasattr(cls, "setup"), name
            assert cls.number > 0, name
    assert not any(hasattr(module, "setup") for module in modules.values())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_computes_what_it_says(modules, name):
    module, cls, method = name.split(".")
    cls = getattr(modules[module], cls)
    build, check = BENCHMARKS[name]
    combinations = list(itertools.product(*(small(values) for values in cls.params)))
    assert combinations
    for combination in combinations:
        case = build(modules, *combination)
        if module != "folding":
            case.out.fill(np.nan)
        result = getattr(cls(), method)(*combination)
        assert build(modules, *combination) is case, "it timed another case"
        check(case, result)
        if len(combination) > 2:
            layout, (n, c, *space), dtype, *mask = combination
            # Images are NHWC always, and their y has the layout.
            given = np.moveaxis(case.out, -1, 1) if (module, layout) == ("images", "NCHW") else case.x
            assert (case.out if module == "images" else case.x).dtype == dtype
            assert given.shape == ((n, c, *space) if layout == "NCHW" else (n, *space, c))
            assert given.flags.c_contiguous
            if mask:
                varies = {"per sample": n, "per position": n * int(np.prod(space))}[mask[0]]
                assert (case.where.size, case.where.dtype) == (varies, bool)
        elif module == "folding":
            layout, shape = combination
            assert case.layout == layout
            assert (case.weight if layout == "OIHW" else case.weight.transpose(3, 2, 0, 1)).shape == shape
        else:
            assert combination[0] in (case.x.shape, case.x.shape[1])


def small(values):
    """asv's own values of one parameter; of ResNet's layers and of images, two little ones in their place."""
    if (32, 3, 224, 224) in values:
        return [(2, 3, 4, 5), (3, 3, 5, 4)]
    return [(2, 3, 4, 5), (3, 2, 5, 4)] if (32, 64, 56, 56) in values else values


def test_after_idle_times_a_forward(modules, monkeypatch):
    small_calls = modules["small_calls"]
    monkeypatch.setattr(small_calls.time, "sleep", lambda seconds: naps.append(seconds))
    naps = []
    (values,) = small_calls.AfterIdle.params
    for shape in values:
        case = modules["forward"].case("NCHW", shape, "float32")
        case.out.fill(np.nan)
        assert 0 < small_calls.AfterIdle().track_call(shape) < np.inf
        assert set(naps) == {0.02}
        assert modules["forward"].case("NCHW", shape, "float32") is case, "it timed another case"
        expected = reference.train(case.x, case.gamma, case.beta)
        reference.assert_within(case.out, expected.y, expected.budget, "y")


def test_importing_is_what_is_timed(modules):
    for package in ("numpy", "fastbn"):
        code = getattr(modules["startup"].Import(), f"timeraw_import_{package}")()
        run_script(f"import sys; assert {package!r} not in sys.modules\n{code}\nassert {package!r} in sys.modules\n")


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("call", ["train forward NCHW", "inference NHWC"])
def test_first_results_are_right_and_the_cache_is_as_it_says(modules, tmp_path, cache, call):
    cls = modules["startup"].FirstResult
    assert cls.params == (("warm", "cold"), tuple(modules["startup"].CALLS))
    benchmark = cls()
    benchmark.setup(cache, call)
    code, before = benchmark.timeraw_first_result(cache, call)
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    compiled = sorted(folder.rglob("*.nbc"))
    check = (
        "import sys, pathlib, numba\n"
        "np.save(sys.argv[1], y)\n"
        "from fastbn import kernels\n"
        "stats = [b.stats for k in (kernels.forward.forward_runs, kernels.forward.forward_rows)\n"
        "         for b in (k.serial, k.parallel)]\n"
        "print(sum(len(s.cache_hits) for s in stats), sum(len(s.cache_misses) for s in stats))\n"
    )
    # What runs unmeasured must not have imported anything of ours.
    first = "import sys\nassert not {'numpy', 'fastbn', 'numba'} & set(sys.modules)\n"
    printed = run_script(f"{before}\n{first}\n{code}\n{check}", str(tmp_path / "y.npy"))
    hits, misses = map(int, printed.split())
    assert (hits > 0, misses > 0) == ((True, False) if cache == "warm" else (False, True))
    assert sorted(folder.rglob("*.nbc")) == compiled, "it compiled into the cache that other benchmarks use"

    y, variables = np.load(tmp_path / "y.npy"), {"np": np}
    exec(modules["startup"].CALLS[call][0], variables)
    x = variables["x"]
    assert x.size >= 1 << 16, "serial"
    if call == "inference NHWC":
        expected = reference.infer(x, np.full(64, 125.0), np.full(64, 5250.0), axis=-1)
    else:
        expected = reference.train(x)
    reference.assert_within(y, expected.y, expected.budget, "y")


MEMORY = {
    "train forward, out=": train,
    "train forward, fresh": train_fresh,
    "backward, out=": backward,
    "inference, out=": inference,
}
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asv skips it, too: needs Linux")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("call", MEMORY)
def test_memory_is_that_of_the_right_call(modules, call, layout):
    memory = modules["memory"]
    assert memory.Peak.params == (tuple(MEMORY), ("NCHW", "NHWC"))
    case, saved = memory.case(layout, (3, 4, 5, 6))
    assert case.x.shape == ((3, 4, 5, 6) if layout == "NCHW" else (3, 5, 6, 4))
    case.out.fill(np.nan)
    MEMORY[call](case, memory.CALLS[call](case, saved))


@needs_linux
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("call", MEMORY)
def test_memory_is_none_or_the_output(modules, call, layout):
    memory = modules["memory"]
    peak = memory.Peak()
    peak.setup(call, layout)
    y = memory.case(layout, memory.SHAPE)[0].out.nbytes if "fresh" in call else 0
    assert abs(peak.track_above_the_arrays(call, layout) - y) <= 2 * memory.MIB  # a page may have two MiB


@needs_linux
def test_the_peak_sees_what_is_used_and_nothing_before(modules):
    peak, size = modules["memory"].peak, 100 << 20
    np.ones(2 * size, np.uint8)
    assert peak(lambda: None) == 0
    assert abs(peak(lambda: np.ones(size, np.uint8)) - size) <= 2 << 20


def test_memory_skips_where_it_cannot_be_read(modules, monkeypatch, tmp_path):
    monkeypatch.setattr(modules["memory"], "PROC", tmp_path)
    with pytest.raises(NotImplementedError):
        modules["memory"].Peak().setup("backward, out=", "NCHW")


def test_peers_are_measured(modules, monkeypatch):
    """What is measured is right: tests/test_main.py and tests/test_peers.py."""
    peers = modules["peers"]
    monkeypatch.setattr(peers, "LAYERS", ((8, 14, 1), (16, 7, 1)))
    monkeypatch.setattr(peers, "SHAPES", shapes := ((32, 8, 14, 14), (32, 16, 7, 7)))
    monkeypatch.setattr(peers, "ROUNDS", 1)
    monkeypatch.setattr(peers, "PART_ROUNDS", 1)
    monkeypatch.setattr(peers, "keep_freed_memory", lambda: None)  # it would for the tests that follow
    monkeypatch.setattr(_measure, "LARGE", 0)
    monkeypatch.setattr(_measure, "IMAGES", (_measure.BATCH, 6, 6, 3))
    seconds = peers.InCopies().setup_cache()
    assert tuple(seconds) == shapes
    for cls in (peers.InCopies, peers.InTriads):
        for operation, shape in itertools.product(cls.params[0], shapes):
            assert 0 < cls().track_time(seconds, operation, shape) < np.inf
    for operation in peers.FreshOverGiven.params[0]:
        assert 0 < peers.FreshOverGiven().track_time(seconds, operation) < np.inf
    optional = ((peers.InPyTorch, "torch"), (peers.PairInPyTorch, "torch"), (peers.PartsInTheirUnits, "ml_dtypes"))
    for cls, package in optional:
        seconds = cls().setup_cache()
        assert tuple(seconds) == shapes
        for operation in cls.params[0]:
            try:
                cls().setup(seconds, operation)
            except NotImplementedError:
                assert importlib.util.find_spec(package) is None
            else:
                assert 0 < cls().track_time(seconds, operation) < np.inf
    seconds = peers.ImagesInCopies().setup_cache()
    for operation in peers.ImagesInCopies.params[0]:
        assert 0 < peers.ImagesInCopies().track_time(seconds, operation) < np.inf


def test_peers_compare_with_what_they_say(modules):
    peers = modules["peers"]
    operations = [op.key for op in _measure.OPERATIONS]
    assert sorted(peers.InPyTorch.params[0]) == sorted(operations)
    assert sorted(peers.InCopies.params[0]) == sorted(op.key for op in _measure.OPERATIONS if op.moved == 8)
    assert sorted(peers.InTriads.params[0]) == sorted(op.key for op in _measure.OPERATIONS if op.moved == 12)
    assert [(_measure.BATCH, c, s, s) for c, s, _ in peers.LAYERS] == list(peers.SHAPES)
    assert sorted(peers.FreshOverGiven.params[0]) == sorted(operations)
    one, two = {"copy": 2.0, "triad": 3.0}, {"copy": 4.0, "triad": 5.0}
    for op in operations:
        one |= {f"fastbn {op}": 6.0, f"fastbn fresh {op}": 3.0, f"PyTorch {op}": 10.0}
        two |= {f"fastbn {op}": 20.0, f"fastbn fresh {op}": 36.0, f"PyTorch {op}": 42.0}
    seconds = dict(zip(peers.SHAPES, (one, two), strict=False))
    for op in operations:
        assert peers.InPyTorch().setup(seconds, op) is None
        assert peers.InPyTorch().track_time(seconds, op) == 0.5
        assert peers.FreshOverGiven().track_time(seconds, op) == 1.5
        ratios = ((peers.InCopies, [3.0, 5.0]), (peers.InTriads, [2.0, 4.0]))
        for cls, expected in ratios:
            assert [cls().track_time(seconds, op, shape) for shape in seconds] == expected
        del two[f"PyTorch {op}"]
        with pytest.raises(NotImplementedError):
            peers.InPyTorch().setup(seconds, op)


def test_parts_are_given_in_the_units_of_the_table(modules):
    peers = modules["peers"]
    assert list(peers.PARTS) == [op.key for op in _measure.PARTS]
    assert list(peers.PAIRS) == [op.key for op in _measure.PARTS if op.name == "pair"]
    assert list(peers.IMAGES) == [op.key for op in _measure.OF_IMAGES]
    yardsticks = {"copy": 2.0, "triad": 3.0, "read": 1.0, "read2": 1.5}
    plain = {"fastbn train forward NCHW": 4.0, "fastbn train forward NHWC": 5.0}
    units = [3.0, 4.0, 4.0, 5.5, 7.0, 9.5, 4.0, 4.0, 4.0, 5.0, 4.0, 5.0]  # of the parts, in the table's order
    for op, unit in zip(peers.PARTS, units, strict=True):
        first = yardsticks | plain | {f"fastbn {op}": 3 * unit, f"PyTorch {op}": 4 * unit}
        second = first | {f"fastbn {op}": unit, f"PyTorch {op}": 4 * unit}
        seconds = dict(zip(peers.SHAPES, (first, second, yardsticks), strict=False))  # the third has not got it
        assert peers.PartsInTheirUnits().setup(seconds, op) is None
        assert peers.PartsInTheirUnits().track_time(seconds, op) == 2.0
        with pytest.raises(NotImplementedError):
            peers.PartsInTheirUnits().setup({"shape": yardsticks}, op)
        with pytest.raises(NotImplementedError):
            peers.PairInPyTorch().setup(seconds, op)
        del seconds[peers.SHAPES[2]]
        assert peers.PairInPyTorch().track_time(seconds, op) == 0.5
    images = {"copy": 2.0} | {f"fastbn {op}": 3.0 for op in peers.IMAGES}
    assert [peers.ImagesInCopies().track_time(images, op) for op in peers.IMAGES] == [1.5, 1.5]


def test_bfloat16_is_timed_where_its_package_is(modules):
    assert ("bfloat16" in modules["common"].HALVES) == (importlib.util.find_spec("ml_dtypes") is not None)


def test_importing_the_benchmarks_loads_no_numba():
    run_script(
        "import importlib, pathlib, sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        f"for path in pathlib.Path({str(FOLDER)!r}, 'benchmarks').glob('*.py'):\n"
        "    importlib.import_module(f'benchmarks.{path.stem}')\n"
        "assert 'benchmarks.forward' in sys.modules\n"
        "assert 'numba' not in sys.modules\n"
    )
