"""Hostile values: statistics against exact arithmetic, offsets, outliers, NaN and Inf, both ends of a range."""

from fractions import Fraction

import numpy as np
import pytest
import reference
from arrays import FLOATS
from reference import assert_within

import fastbn
from fastbn.kernels.grid import SEGMENT

# (samples, inner run) of one channel: long and short runs, fused and split; each with channels beside it.
SHAPES = {"rows": (701, 1), "short-runs": (40, 49), "long-runs": (3, 700), "segments": (1, 3 * SEGMENT + 5)}
CHANNELS = 5


def exact(values):
    """Mean and variance of the stored values, without any rounding."""
    v = [Fraction(float(a)) for a in values]
    mean = sum(v) / len(v)
    return mean, sum((a - mean) ** 2 for a in v) / len(v)


def relative(found, expected, scale=None):
    """The error in parts of `scale`, by default of the value itself."""
    error = abs(Fraction(float(found)) - expected)
    return float(error / abs(scale if scale is not None else expected)) if error else 0.0


def hostile(rng, n):
    """n values of each kind."""
    z = rng.normal(size=n)
    ramp = np.arange(n, dtype=np.float64)
    return {
        "mean 1e6 std 1e-1": 1e6 + 0.1 * z,
        "mean 1e4 std 1": 1e4 + z,
        "mean -1e8 std 1": -1e8 + z,
        "mean 1e12 std 1": 1e12 + z,
        "outlier first": np.concatenate([[1e8], z[1:]]),
        "outlier first, offset": np.concatenate([[-1e6], 1e6 + z[1:]]),
        "outlier last": np.concatenate([z[1:], [1e8]]),
        "outliers in the first rows": np.where(ramp < 20, 1e7, z),
        "step": np.where(ramp < n // 2, 1e6, -1e6) + z,
        "late step": np.where(ramp < n - 3, 1.0, 1e6) + z,
        "sorted": np.sort(1e3 * z),
        "ramp": 1e7 + ramp,
        "large": 1e12 * z,
        "small": 1e-12 * z,
        "alternating": np.where(ramp % 2, 1e7, 1e7 + 1),
        "one other": np.where(ramp == n - 1, 1.0, 0.0),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_against_exact_arithmetic(rng, shape, dtype):
    """float32: mean and variance within 1 ulp of float32; float64: 14 digits."""
    n, inner = SHAPES[shape]
    for name, values in hostile(rng, n * inner).items():
        x = rng.normal(size=(n, CHANNELS, inner)).astype(dtype)
        x[:, 2] = values.reshape(n, inner)
        m = fastbn.moments(x)
        mean, var = exact(x[:, 2].ravel())
        digits = 1e-14 if dtype == "float64" else float(np.finfo(np.float32).eps)
        size = max(abs(mean), Fraction(np.sqrt(float(var)))) if dtype == "float64" else None
        assert relative(m.mean[2], mean, size) <= digits, f"{name}: mean"
        assert relative(m.var()[2], var) <= digits, f"{name}: var"


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
    x = np.ones(shape)
    if kind == "two values":
        x.ravel()[::2] = 3
    elif kind == "few values":
        x[:] = np.round(rng.normal(size=shape))
    x[:20].reshape(len(x[:20]), shape[1], -1)[..., :20] += 1e7 * 16
    units = [int(v) for v in x[:, 0].ravel()]  # of 1 / 16
    n, total = len(units), sum(units)
    mean, var = Fraction(total, 16 * n), Fraction(n * sum(u * u for u in units) - total**2, 256 * n * n)
    m = fastbn.moments(x / 16)
    assert relative(m.mean[0], mean, max(abs(mean), Fraction(np.sqrt(float(var))))) <= 1e-14
    assert relative(m.var()[0], var) <= 1e-14
    dy = x / 16
    _, saved = fastbn.batch_norm_train(x / 16 - 3)
    _, dgamma, dbeta = fastbn.batch_norm_backward(dy, saved)  # sum(x * xhat) = n * std
    assert relative(dbeta[0], n * mean) <= 1e-14
    wide = np.longdouble(float(var))
    # The 14 digits of the sum, and half of those of the variance.
    assert abs(dgamma[0] / (n * wide / np.sqrt(wide + 1e-5)) - 1) <= 1.5e-14


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_of_hostile_values(rng, shape, dtype):
    n, inner = SHAPES[shape]
    for name, values in hostile(rng, n * inner).items():
        x = np.stack([values.reshape(n, inner), rng.normal(size=(n, inner))], axis=1).astype(dtype)
        dy = rng.normal(size=x.shape).astype(dtype)
        gamma, beta = rng.normal(size=(2, 2)).astype(dtype)
        y, saved = fastbn.batch_norm_train(x, gamma, beta)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, saved)
        expected = reference.train(x, gamma, beta)
        assert_within(y, expected.y, expected.budget, f"{name}: y")
        expected = reference.backward(dy, x, gamma)
        assert_within(dgamma, expected.dgamma, expected.dgamma_budget, f"{name}: dgamma")
        assert_within(dbeta, expected.dbeta, expected.dbeta_budget, f"{name}: dbeta")
        assert_within(dx, expected.dx, expected.dx_budget, f"{name}: dx")


def test_a_small_array_in_full_against_exact_arithmetic():
    """y itself in rationals, where 1 / sqrt(var + eps) is one: var = 3, eps = 1."""
    x = np.array([[2.0**20], [2.0**20 + 3], [2.0**20 + 3], [2.0**20 - 0]], "float32")
    x[3] = 2.0**20 + 1
    mean, var = exact(x.ravel())
    assert (mean, var) == (Fraction(2**20) + Fraction(7, 4), Fraction(27, 16))
    y, saved = fastbn.batch_norm_train(x, eps=4 - float(var))
    assert float(saved.mean[0]) == mean
    assert float(saved.var[0]) == var
    for found, value in zip(y.ravel(), x.ravel(), strict=True):
        assert relative(found, (Fraction(float(value)) - mean) / 2) <= np.finfo(np.float32).eps


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "eps"), [(1e30, 1e-5), (1e-30, 1e-5), (1e20, 0), (1e-20, 0)])
def test_results_of_huge_and_tiny_values(rng, shape, dtype, size, eps):
    """Inputs and results fit the dtype with room to spare, and so must all between: invstd**2 does not."""
    n, inner = SHAPES[shape]
    x = (size * rng.normal(size=(n, 2, inner))).astype(dtype)
    dy = (1 + 0.3 * x / size + rng.normal(size=x.shape)).astype(dtype)
    m = fastbn.moments(x)
    mean, var = exact(x[:, 1].ravel())
    assert relative(m.mean[1], mean, Fraction(np.sqrt(float(var)))) <= 1e-14
    assert relative(m.var()[1], var) <= 1e-14
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


def test_more_equal_values_than_float32_can_count():
    n = 2**24 + 1
    m = fastbn.moments(np.full((n, 1), 0.1, "float32"))
    assert m.count == n
    assert m.mean[0] == np.float64(np.float32(0.1))
    assert m.m2[0] == 0
    x = np.ones((n, 1), "int8")
    x[-1] = 2
    assert fastbn.moments(x).mean[0] == 1 + 1 / n


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wild", ["outlier", "nan", "inf", "huge"])
def test_a_wild_channel_leaves_the_bits_of_the_others(rng, dtype, shape, wild):
    n, inner = SHAPES[shape]
    x = rng.normal(2, 3, (n, CHANNELS, inner)).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    others = [c for c in range(CHANNELS) if c != 2]

    def results(x):
        y, saved = fastbn.batch_norm_train(x)
        z = fastbn.batch_norm(x, saved.mean, saved.var)
        return y, saved.mean, saved.var, z, *fastbn.batch_norm_backward(dy, saved)

    tame = results(x)
    x[0, 2, 0] = {"outlier": 1e8, "nan": np.nan, "inf": -np.inf, "huge": np.finfo(dtype).max}[wild]
    for i, (before, after) in enumerate(zip(tame, results(x), strict=True)):
        take = (slice(None), others) if before.ndim > 1 else others
        np.testing.assert_array_equal(before[take], after[take], err_msg=f"result {i}")
        if wild in ("nan", "inf") and i not in (3, 6):
            assert np.isnan(after[:, 2] if after.ndim > 1 else after[2]).any() or np.isinf(after[2]).any()


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
        mean, var = exact(x[:, 1])
        assert relative(m.mean[1], mean) <= 1e-14
        assert relative(m.var()[1], var) <= 1e-14
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
