"""Every asv benchmark computes what its name says: none times the wrong thing."""

import importlib
import inspect
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from subprocesses import run_script

FOLDER = Path(__file__).parents[1] / "asv_bench"


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


def layer(case, result):
    y, dx = result
    expected = reference.train(case.x, axis=case.axis)
    assert y is case.out
    reference.assert_within(y, expected.y, expected.budget, "y")
    expected = reference.backward(case.dy, case.x, axis=case.axis)
    reference.assert_within(dx, expected.dx, expected.dx_budget, "dx")


# Each time_ method: the case it times, and what checks it.
BENCHMARKS = {
    "forward.TrainForward.time_batch_norm_train": (lambda m, *p: m["forward"].case(*p), train),
    "backward.Backward.time_batch_norm_backward": (lambda m, *p: m["backward"].case(*p), backward),
    "inference.Inference.time_batch_norm": (lambda m, *p: m["inference"].case(*p), inference),
    "moments.OfLayers.time_moments": (lambda m, *p: m["moments"].case(*p), moments),
    "moments.Merge.time_merge": (lambda m, channels: m["moments"].merge_case(channels), moments),
    "small_calls.Small.time_batch_norm_train": (lambda m, s: m["forward"].case("NCHW", s, "float32"), train),
    "small_calls.Small.time_batch_norm_backward": (lambda m, s: m["backward"].case("NCHW", s, "float32"), backward),
    "small_calls.Small.time_batch_norm": (lambda m, s: m["inference"].case("NCHW", s, "float32"), inference),
    "small_calls.Small.time_layer_forward_and_backward": (lambda m, s: m["small_calls"].layer_case(True, s), layer),
    "small_calls.Small.time_layer_inference": (lambda m, s: m["small_calls"].layer_case(False, s), inference),
}


def classes(modules):
    return {
        f"{name}.{cls.__name__}": cls
        for name, module in modules.items()
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__
    }


def test_every_benchmark_is_checked_here(modules):
    found = [f"{n}.{m}" for n, cls in classes(modules).items() for m in vars(cls) if m.startswith("time_")]
    assert sorted(found) == sorted(BENCHMARKS)


def test_no_benchmark_has_a_setup(modules):
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
        case.out.fill(np.nan)
        result = getattr(cls(), method)(*combination)
        assert build(modules, *combination) is case, "it timed another case"
        check(case, result)
        if len(combination) == 3:
            layout, (n, c, *space), dtype = combination
            assert case.x.dtype == dtype
            assert case.x.shape == ((n, c, *space) if layout == "NCHW" else (n, *space, c))
            assert case.x.flags.c_contiguous
        else:
            assert combination[0] in (case.x.shape, case.x.shape[1])


def small(values):
    """asv's own values of one parameter; of ResNet's layers, two little ones in their place."""
    return [(2, 3, 4, 5), (3, 2, 5, 4)] if (32, 64, 56, 56) in values else values


def test_importing_the_benchmarks_loads_no_numba():
    run_script(
        "import importlib, pathlib, sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        f"for path in pathlib.Path({str(FOLDER)!r}, 'benchmarks').glob('*.py'):\n"
        "    importlib.import_module(f'benchmarks.{path.stem}')\n"
        "assert 'benchmarks.forward' in sys.modules\n"
        "assert 'numba' not in sys.modules\n"
    )
