"""Hostile values: statistics against exact arithmetic, offsets, outliers, NaN and Inf, both ends of a range."""

import functools
from fractions import Fraction

import exact
import numpy as np
import pytest
import reference
from arrays import BIG, FLOATS, Case
from reference import assert_within

import fastbn
from fastbn._layout import layout
from fastbn.kernels.grid import SEGMENT

# (samples, inner run) of one channel: long and short runs, fused and split; each with channels beside it.
SHAPES = {
    "rows-fused": (40, 9),
    "rows-split": (701, 1),
    "runs-fused": (3, 700),
    "runs-split": (40, 49),
    "segments": (1, 3 * SEGMENT + 5),
}
CHANNELS = 5

# Every way through the kernels below the size where calls go parallel; above it: `arrays.BIG`.
SERIAL = [
    Case("rows-fused", (301, 21)),
    Case("rows-fused-inner", (40, 13, 9)),
    Case("rows-split", (701, 5)),
    Case("rows-split-folded", (2001, 3)),
    Case("rows-split-inner", (600, 5, 9)),
    Case("rows-split-NHWC", (7, 11, 13, 24), -1),
    Case("rows-split-NHWC-as-NCHW", (7, 24, 11, 13), 1, (0, 2, 3, 1)),
    Case("runs-fused", (3, 21, 800)),
    Case("runs-fused-segments", (1, 3, 2 * SEGMENT + 5)),
    Case("runs-fused-groups", (40, 21, 49)),
    Case("runs-fused-tuple", (40, 3, 7, 50), (1, 2)),
    Case("runs-fused-apart", (40, 3, 50, 7), (1, 3)),
    Case("runs-split", (40, 5, 49)),
    Case("runs-split-CN", (3, 9, 200), 0),
    Case("runs-split-all", (2, SEGMENT + 7), ()),
]


def hostile(rng, n, dtype):
    """n values of each kind."""
    z = rng.normal(size=n)
    ramp = np.arange(n, dtype=np.float64)
    huge = float(np.finfo(np.float32).max) / 4 if dtype == "float32" else 1e150
    tiny = float(np.finfo(dtype).smallest_subnormal)
    return {
        "mean 1e6 std 1e-1": 1e6 + 0.1 * z,
        "mean 1e4 std 1": 1e4 + z,
        "mean -1e8 std 1": -1e8 + z,
        "mean 1e12 std 1": 1e12 + z,
        "mean 1 std 1e-8": 1 + 1e-8 * z,
        "outlier first": np.concatenate([[1e8], z[1:]]),
        "outlier first, offset": np.concatenate([[-1e6], 1e6 + z[1:]]),
        "outliers first, of both signs": np.concatenate([[1e8, -1e8, 3e7], z[3:]]),
        "outlier in the middle": np.where(ramp == n // 2, -1e8, z),
        "outlier last": np.concatenate([z[1:], [1e8]]),
        "outliers in the first rows": np.where(ramp < 20, 1e7, z),
        "step": np.where(ramp < n // 2, 1e6, -1e6) + z,
        "late step": np.where(ramp < n - 3, 1.0, 1e6) + z,
        "quiet, then loud": np.where(ramp < n // 2, 5.0, 5 + 1e4 * z),
        "sorted": np.sort(1e3 * z),
        "sorted downwards": -np.sort(1e3 * z),
        "sorted over many sizes": np.sort(np.exp(5 * z)),
        "ramp": 1e7 + ramp,
        "ramp over 0": ramp - n // 3,
        "ramp downwards": 1e4 - 1e-3 * ramp,
        "constant": np.full(n, 0.1),
        "constant, large": np.full(n, 1e8 + 8),
        "zero": np.zeros(n),
        "large": 1e12 * z,
        "small": 1e-12 * z,
        "subnormal": tiny * rng.integers(-50, 50, n),
        "subnormal constant": np.full(n, 7 * tiny),
        "huge": huge * rng.uniform(-1, 1, n),
        "huge, of one sign": huge * rng.uniform(0.99, 1, n),
        "huge constant": np.full(n, huge),
        "alternating": np.where(ramp % 2, 1e7, 1e7 + 1),
        "few values": 1e6 + np.round(z) / 16,
        "one other": np.where(ramp == n - 1, 1.0, 0.0),
    }


def few_values(rng, n, dtype):
    """Of few digits or few in number, after outliers: their sums are all rounded the same way."""
    z, ramp = rng.normal(size=n), np.arange(n)
    return {
        "of 1 / 16": np.where(ramp < 20, 1e7, np.round(z) / 16),
        "of 1 / 16 after one": np.where(ramp < 1, 1e8, np.round(z) / 16),
        "of 1 / 1000": np.where(ramp < 20, 1e6, np.round(z) / 1000),
        "of float32": np.where(ramp < 20, 1e7, z.astype("float32")),
        "of float32, offset": np.where(ramp < 20, -1e6, 1e6 + z).astype("float32"),
        "two": np.where(ramp < 20, 1e7, np.where(ramp % 2, 1 / 16, 3 / 16)),
        "one": np.where(ramp < 20, 1e7, 0.1),
    }


KINDS = list(hostile(np.random.default_rng(0), 8, "float32"))


@functools.cache
def known(make, n, dtype):
    """(name, values, mean, variance) of every kind; the statistics of the stored values, without any rounding."""
    found = []
    for name, values in make(np.random.default_rng(n), n, dtype).items():
        values = values.astype(dtype)
        found.append((name, values, *exact.moments(values)))
    return found


def batches(case, dtype, make=hostile):
    """Arrays of a case with a hostile kind in each channel, in turn, as many as it takes: (what is known, x)."""
    channels = int(np.prod(case.channels))
    kinds = known(make, case.size // channels, dtype)
    axes = [a % len(case.shape) for a in (case.axis if isinstance(case.axis, tuple) else (case.axis,))]
    rest = [n for a, n in enumerate(case.shape) if a not in axes]
    for first in range(0, len(kinds), channels):
        chosen = [kinds[(first + c) % len(kinds)] for c in range(channels)]
        x = np.stack([values for _, values, _, _ in chosen]).reshape(*case.channels, *rest)
        yield chosen, case.lay(np.moveaxis(x, range(len(axes)), sorted(axes)))


def normal(x):
    """x with 0 for subnormals of float64: their mean is one too and has no 14 digits, and nor has then dgamma."""
    x[abs(x) < np.finfo(np.float64).tiny] = 0
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", SERIAL + BIG, ids=str)
def test_statistics_against_exact_arithmetic(case, dtype):
    """float32: within 1 ulp of float32; float64: 14 digits. A mean that cancels has 14 digits of what it adds up."""
    for kinds, x in batches(case, dtype):
        m = fastbn.moments(x, axis=case.axis)
        for (name, _, mean, var), found, found_var in zip(kinds, m.mean.flat, m.var().flat, strict=True):
            std = float(var) ** 0.5
            if dtype == "float32":
                close = exact.digits(found, mean, std) <= 1e-14 or exact.ulps(found, mean, dtype) <= 1
                assert close, f"{name}: mean {found!r}, expected {float(mean)!r}"
                assert exact.ulps(found_var, var, dtype) <= 1, f"{name}: var {found_var!r}, expected {float(var)!r}"
            else:
                assert exact.digits(found, mean, std) <= 1e-14, f"{name}: mean {found!r}, expected {float(mean)!r}"
                assert exact.digits(found_var, var) <= 1e-14, f"{name}: var {found_var!r}, expected {float(var)!r}"


@pytest.mark.parametrize("case", [*SERIAL, *BIG, Case("runs-fused", (32, 64, 196))], ids=str)
def test_few_values_after_outliers_keep_14_digits(case):
    for kinds, x in batches(case, "float64", few_values):
        m = fastbn.moments(x, axis=case.axis)
        for (name, _, mean, var), found, found_var in zip(kinds, m.mean.flat, m.var().flat, strict=True):
            errors = exact.digits(found, mean, float(var) ** 0.5), exact.digits(found_var, var)
            assert max(errors) <= 1e-14, f"values {name}: mean and var are {errors} off"


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_statistics_are_those_of_every_grid(dtype):
    every = {(runs, fused) for runs in (True, False) for fused in (True, False)}
    for table, parallel in ((SERIAL, False), (BIG, True)):
        assert {case.grid(dtype) for case in table} == {(*grid, parallel) for grid in every}
        groups = set()
        for case in table:
            x = case.lay(np.empty(case.shape, dtype))
            axes = tuple(reference.channel_axes(x, case.axis))
            grid = layout(x.shape, x.strides, x.itemsize, axes, 2).measured
            groups |= {min(grid.sizes[3], 2)} if grid.runs else set()
        assert groups == {0, 1, 2}  # split, one channel at a time, several
    grids = {Case(name, (n, CHANNELS, inner)).grid(dtype)[:2] for name, (n, inner) in SHAPES.items()}
    assert grids == every


ROUNDED = {
    "runs, fused, in groups": (701, 65, 49),
    "runs, fused": (32, 8, 3136),
    "runs, fused, one sample": (1, 8, 2**18),
    "runs, split": (64, 1, 2**16),
    "rows, fused": (400, 300),
    "rows, split": (70000, 2, 16),
    "rows, split, folded": (32000, 2),
    "rows, split, one channel": (2000000, 1),
}


@pytest.mark.parametrize("shape", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("kind", ["few values", "two values", "one value"])
def test_terms_that_all_round_the_same_way_keep_14_digits(rng, shape, kind):
    """Few different values after outliers: the error grows with the number of additions in a row.

    Added one by one, 32,000 rows left 12 digits; 512 additions a lane left 13.
    """
    x = np.ones(shape) / 16
    if kind == "two values":
        x.ravel()[::2] = 3 / 16
    elif kind == "few values":
        x[:] = np.round(rng.normal(size=shape)) / 16
    x[:20].reshape(len(x[:20]), shape[1], -1)[..., :20] += 1e7
    mean, var = exact.moments(x[:, 0])
    m = fastbn.moments(x)
    assert exact.digits(m.mean[0], mean, max(abs(mean), Fraction(np.sqrt(float(var))))) <= 1e-14
    assert exact.digits(m.var()[0], var) <= 1e-14
    _, saved = fastbn.batch_norm_train(x - 3)
    _, dgamma, dbeta = fastbn.batch_norm_backward(x, saved)  # sum(x * xhat) = n * var / sqrt(var + eps)
    n = saved.count
    assert exact.digits(dbeta[0], n * mean) <= 1e-14
    # The 14 digits of the sum, and half of those of the variance.
    assert exact.digits(dgamma[0], n * var * exact.invstd(var, 1e-5)) <= 1.5e-14


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [*SERIAL, BIG[0], BIG[2], BIG[6], BIG[8], BIG[14]], ids=str)
def test_results_of_hostile_values(rng, case, dtype):
    for kinds, x in batches(case, dtype):
        x, d = normal(x), case.data(rng, dtype)
        y, saved = fastbn.batch_norm_train(x, d.gamma, d.beta, axis=case.axis)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
        what = f"channels {[name for name, *_ in kinds]}: "
        expected = reference.train(x, d.gamma, d.beta, axis=case.axis)
        assert_within(y, expected.y, expected.budget, what + "y")
        expected = reference.backward(d.dy, x, d.gamma, axis=case.axis)
        assert_within(dgamma, expected.dgamma, expected.dgamma_budget, what + "dgamma")
        assert_within(dbeta, expected.dbeta, expected.dbeta_budget, what + "dbeta")
        assert_within(dx, expected.dx, expected.dx_budget, what + "dx")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "eps"), [(1e30, 1e-5), (1e-30, 1e-5), (1e20, 0), (1e-20, 0)])
def test_results_of_huge_and_tiny_values(rng, shape, dtype, size, eps):
    """Inputs and results fit the dtype with room to spare, and so must all between: invstd**2 does not."""
    n, inner = SHAPES[shape]
    x = (size * rng.normal(size=(n, 2, inner))).astype(dtype)
    dy = (1 + 0.3 * x / size + rng.normal(size=x.shape)).astype(dtype)
    m = fastbn.moments(x)
    mean, var = exact.moments(x[:, 1])
    assert exact.digits(m.mean[1], mean, float(var) ** 0.5) <= 1e-14
    assert exact.digits(m.var()[1], var) <= 1e-14
    y, saved = fastbn.batch_norm_train(x, eps=eps)
    expected = reference.train(x, eps=eps)
    assert_within(y, expected.y, expected.budget, "y")
    found = fastbn.batch_norm_backward(dy, saved)
    expected = reference.backward(dy, x, eps=eps)
    assert_within(found[1], expected.dgamma, expected.dgamma_budget, "dgamma")
    assert_within(found[0], expected.dx, expected.dx_budget, "dx")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e7, 1e-40, 1e30])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_constant_channel_gives_exactly_beta(rng, dtype, value, eps):
    for n, inner in SHAPES.values():
        x = np.full((n, CHANNELS, inner), value, dtype)
        gamma, beta = rng.normal(size=(2, CHANNELS)).astype(dtype)
        y, saved = fastbn.batch_norm_train(x, gamma, beta, eps=eps)
        np.testing.assert_array_equal(saved.mean, x[0, :, 0].astype("float64"))
        np.testing.assert_array_equal(saved.var, 0)
        np.testing.assert_array_equal(y, np.broadcast_to(beta[:, None], x.shape))
        dx, dgamma, _ = fastbn.batch_norm_backward(np.ones_like(y), saved)
        np.testing.assert_array_equal(dgamma, 0)
        assert np.isfinite(dx).all()


@pytest.mark.jit("so many values take minutes as plain Python")
@pytest.mark.parametrize(("channels", "dtype"), [(1, "float32"), (1, "float64"), (2, "float32"), (2, "uint8")])
def test_more_equal_values_than_float32_can_count(channels, dtype):
    """As one long run, and as rows."""
    n = 2**24 + 1
    x = np.full((n, channels), 0.1 if dtype != "uint8" else 251, dtype)
    m = fastbn.moments(x)
    assert m.count == n
    np.testing.assert_array_equal(m.mean, x[0].astype("float64"))
    np.testing.assert_array_equal(m.m2, 0)
    if dtype == "uint8":
        x[-1] = 252
        m = fastbn.moments(x)
        assert exact.digits(m.mean, 251 + Fraction(1, n)) <= 1e-14
        assert exact.digits(m.m2, 1 - Fraction(1, n)) <= 1e-14


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [c for c in SERIAL + BIG if np.prod(c.channels) > 1], ids=str)
def test_a_wild_channel_leaves_the_bits_of_the_others(rng, case, dtype):
    d = case.data(rng, dtype)
    channels = d.gamma.size
    wild = channels // 2
    others = [c for c in range(channels) if c != wild]
    where = [0] * d.x.ndim
    for axis, i in zip(reference.channel_axes(d.x, case.axis), np.unravel_index(wild, case.channels), strict=True):
        where[axis] = i

    def results(value):
        d.x[tuple(where)] = value
        y, saved = fastbn.batch_norm_train(d.x, axis=case.axis)
        z = fastbn.batch_norm(d.x, saved.mean, saved.var, axis=case.axis)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
        found = {name: exact.rows(a, case.axis) for name, a in (("y", y), ("z", z), ("dx", dx))}
        stats = {"mean": saved.mean, "var": saved.var, "dgamma": dgamma, "dbeta": dbeta}
        return found | {name: a.reshape(channels, 1) for name, a in stats.items()}

    tame = results(0.5)
    for value in (1e8, np.nan, -np.inf, np.finfo(dtype).max):
        for name, found in results(value).items():
            np.testing.assert_array_equal(found[others], tame[name][others], err_msg=f"{name}, {value} in a channel")
            if not np.isfinite(value) and name != "dbeta":
                assert not np.isfinite(found[wild]).all(), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nan_and_inf_do_what_the_formula_says(rng, dtype, shape):
    n, inner = SHAPES[shape]
    x = rng.normal(size=(n, 3, inner)).astype(dtype)
    x[n // 2, 0, inner // 2], x[-1, 1, -1] = np.nan, np.inf
    y, saved = fastbn.batch_norm_train(x)
    assert np.isnan(saved.mean[0])
    assert saved.mean[1] == np.inf
    assert np.isnan(saved.var[:2]).all()
    assert np.isnan(y[:, :2]).all()
    assert np.isfinite(y[:, 2]).all()
    z = fastbn.batch_norm(x, [0, 0, 0], [1, 1, 1], eps=0)
    np.testing.assert_array_equal(z, x)


@pytest.mark.parametrize("shape", [(5, 2), (5, 2, 16), (9, 2, 40), (70, 2, 5)])
def test_an_infinite_running_mean_is_no_nan(shape):
    """In the frozen dgamma = sum(dy * (x - mean)) * invstd, whatever is left over after whole vectors."""
    saved = fastbn.Saved.fixed(np.ones(shape), mean=[np.inf, 0], var=1, eps=0)
    _, dgamma, dbeta = fastbn.batch_norm_backward(np.ones(shape), saved)
    np.testing.assert_array_equal(dgamma, [-np.inf, saved.count])
    np.testing.assert_array_equal(dbeta, saved.count)


@pytest.mark.parametrize("size", [1e300, 1e38, 1e-300])
def test_gradients_beyond_float32_raise_nothing(size):
    """Neither dy nor the sums: as in a kernel they are infinite or 0, not an exception with dx half written."""
    x = np.array([[1.0], [2.0], [4.0], [5.0]], "float32")
    _, saved = fastbn.batch_norm_train(x)
    with np.errstate(all="raise"):
        _, dgamma, dbeta = fastbn.batch_norm_backward(np.full(x.shape, size), saved, out=np.empty_like(x))
    assert dgamma.dtype == dbeta.dtype == np.float32
    assert dbeta[0] == (np.inf if size > 1 else 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_input(rng, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    x = (rng.integers(-50, 50, (64, 3)) * tiny).astype(dtype)
    m = fastbn.moments(x)
    if dtype == "float32":  # subnormal float32 is normal float64: exact statistics
        mean, var = exact.moments(x[:, 1])
        assert exact.digits(m.mean[1], mean) <= 1e-14
        assert exact.digits(m.var()[1], var) <= 1e-14
    y = fastbn.batch_norm_train(x)[0]
    assert_within(y, reference.train(x).y, reference.tolerance(dtype, 1e-300), "y")
    z = fastbn.batch_norm(x, 0, 1, eps=0)
    np.testing.assert_array_equal(z, x)


def test_huge_float32():
    """Values near the largest float32: their squares overflow it, but not the float64 sums."""
    big = np.finfo(np.float32).max
    x = np.array([[big], [-big], [big], [-big]])
    assert x.dtype == np.float32
    y, saved = fastbn.batch_norm_train(x)
    np.testing.assert_array_max_ulp(y, np.sign(x), 1)
    assert saved.var[0] == float(big) ** 2


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_sums_that_overflow(rng, shape):
    """Two of these values add up to more than the largest float32; their statistics are normal float64."""
    n, inner = SHAPES[shape]
    big = np.finfo(np.float32).max
    x = (big * rng.uniform(0.7, 1, (n, CHANNELS, inner))).astype("float32")
    x[:, 2:] *= rng.choice([-1, 1], x[:, 2:].shape).astype("float32")
    x[:, -1] = big
    m = fastbn.moments(x)
    for values, mean, var in zip(exact.rows(x, 1), m.mean, m.var(), strict=True):
        true_mean, true_var = exact.moments(values)
        assert exact.digits(mean, true_mean, float(true_var) ** 0.5) <= 1e-14
        assert exact.ulps(var, true_var, "float32") <= 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_eps_0_and_eps_beside_a_small_variance(rng, dtype):
    x = (1e-4 * rng.normal(size=(50, 4, 6))).astype(dtype)
    for eps in (0.0, 1e-12, 1e-5, 1.0):
        y, saved = fastbn.batch_norm_train(x, eps=eps)
        expected = reference.train(x, eps=eps)
        assert_within(y, expected.y, expected.budget, f"eps {eps}: y")
        dx, _, _ = fastbn.batch_norm_backward(x, saved)
        expected = reference.backward(x, x, eps=eps)
        assert_within(dx, expected.dx, expected.dx_budget, f"eps {eps}: dx")


@pytest.mark.parametrize("low", [-128, 0, 127])
def test_integers_at_the_ends_of_their_range(low):
    x = np.array([[low], [127]] * 40, "int8")
    y, saved = fastbn.batch_norm_train(x)
    assert saved.mean[0] == (low + 127) / 2
    assert saved.var[0] == ((127 - low) / 2) ** 2
    assert y.dtype == np.float32
    expected = reference.train(x)
    assert_within(y, expected.y, expected.budget)


def test_integers_that_float32_cannot_hold():
    x = np.array([[2**31 - 1], [2**31 - 3]] * 8, "int32")
    y, saved = fastbn.batch_norm_train(x, eps=0)
    assert (saved.mean[0], saved.var[0]) == (2**31 - 2, 1)
    np.testing.assert_array_equal(y, [[1], [-1]] * 8)


@pytest.mark.parametrize("inner", [32, 33, 49])
def test_a_pivot_that_is_just_good_enough(inner):
    """The first sample is nearly as far from the mean as a pivot may be, and terms round the same way."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a, r = rng.uniform(1, 2), rng.uniform(1.6, 2.7)
        x = np.full((400, 8, inner), a * (1 - 1 / r))
        x[200:], x[0] = a * (1 + 1 / r), 0
        mean, var = exact.moments(x[:, 0])
        m = fastbn.moments(x)
        assert exact.digits(m.mean[0], mean) <= 1e-14, seed
        assert exact.digits(m.var()[0], var) <= 1e-14, seed
