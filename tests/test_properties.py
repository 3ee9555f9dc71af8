"""What is true of every input: symmetries of the formula, on arrays that Hypothesis makes up."""

import numpy as np
import reference
from hypothesis import given
from hypothesis import strategies as st

import fastbn

DTYPES = st.sampled_from(["float32", "float64"])
SEEDS = st.integers(0, 2**32 - 1)
OFFSETS = st.sampled_from([0.0, 1.0, -100.0, 1e4])


@st.composite
def problems(draw, dtypes=DTYPES):
    """x (N, C, L) with L around the change of kernel, dy, gamma, beta."""
    dtype = draw(dtypes)
    shape = draw(st.tuples(st.integers(2, 9), st.integers(1, 9), st.sampled_from([1, 2, 7, 64, 127, 128, 200])))
    rng = np.random.default_rng(draw(SEEDS))
    scale = 2.0 ** rng.integers(-6, 7, shape[1])
    x = (rng.normal(size=shape) + draw(OFFSETS)) * scale[:, None]
    dy = rng.normal(draw(st.sampled_from([0, 1])), 1, shape)
    return tuple(a.astype(dtype) for a in (x, dy, rng.normal(size=shape[1]), rng.normal(size=shape[1])))


def all_results(x, dy, gamma, beta, **options):
    y, saved = fastbn.batch_norm_train(x, gamma, beta, **options)
    return y, *fastbn.batch_norm_backward(dy, saved)


def budgets(x, dy, gamma, beta, axis=1, eps=1e-5):
    b = reference.backward(dy, x, gamma, axis=axis, eps=eps)
    y = reference.train(x, gamma, beta, axis=axis, eps=eps).budget
    return y, b.dx_budget, b.dgamma_budget, b.dbeta_budget


def assert_close(found, expected, budget):
    """Two computations of one thing: each may use its error budget."""
    for a, b, most, what in zip(found, expected, budget, ("y", "dx", "dgamma", "dbeta"), strict=True):
        reference.assert_within(a, b, 2 * most, what)


@given(problems(), st.integers(-1000, 1000))
def test_a_shift_changes_nothing(problem, shift):
    x, dy, gamma, beta = problem
    x = np.rint(x * 16).clip(-30000, 30000)  # integers: the shift is exact
    moved = x + np.asarray(shift, x.dtype)
    most = [np.maximum(a, b) for a, b in zip(budgets(x, *problem[1:]), budgets(moved, *problem[1:]), strict=True)]
    assert_close(all_results(moved, dy, gamma, beta), all_results(x, dy, gamma, beta), most)


@given(problems(), st.integers(-12, 12))
def test_a_scale_by_a_power_of_two_is_exact(problem, k):
    x, dy, gamma, beta = problem
    factor = x.dtype.type(2.0**k)
    y, dx, dgamma, dbeta = all_results(x, dy, gamma, beta, eps=1e-5)
    scaled = all_results(x * factor, dy, gamma, beta, eps=1e-5 * 4.0**k)
    for a, b in zip(scaled, (y, dx / factor, dgamma, dbeta), strict=True):
        np.testing.assert_array_equal(a, b)


@given(problems(), SEEDS)
def test_the_order_of_samples_does_not_matter(problem, seed):
    x, dy, gamma, beta = problem
    order = np.random.default_rng(seed).permutation(x.shape[0])
    y, dx, dgamma, dbeta = all_results(x[order], dy[order], gamma, beta)
    back = np.argsort(order)
    assert_close((y[back], dx[back], dgamma, dbeta), all_results(x, dy, gamma, beta), budgets(*problem))


@given(problems(), st.data())
def test_split_and_merged_is_the_whole(problem, data):
    x = problem[0]
    at = data.draw(st.integers(0, x.shape[0]))
    parts, whole = fastbn.moments(x[:at]) + fastbn.moments(x[at:]), fastbn.moments(x)
    mean, var = (a.astype("float64") for a in reference.mean_var(x, 1))
    size = abs(mean) + np.sqrt(var)
    assert parts.count == whole.count
    reference.assert_within(parts.mean, whole.mean, reference.tolerance("float64", 0, 2 * size), "mean")
    lost = 2 * np.finfo(float).eps * abs(mean) * size  # means are float64: delta is off by eps * mean
    reference.assert_within(parts.var(), whole.var(), reference.tolerance("float64", 0, 2 * var) + lost, "var")


@given(problems())
def test_layouts_agree(problem):
    x, dy, gamma, beta = problem
    last = [np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy)]
    expected, budget = all_results(*problem), budgets(*problem)
    y, dx, dgamma, dbeta = all_results(*last, gamma, beta, axis=-1)
    assert_close((np.moveaxis(y, -1, 1), np.moveaxis(dx, -1, 1), dgamma, dbeta), expected, budget)
    views = [np.moveaxis(a, -1, 1) for a in last]
    for a, b in zip(all_results(*views, gamma, beta), (y, dx, dgamma, dbeta), strict=True):
        np.testing.assert_array_equal(a, np.moveaxis(b, -1, 1) if b.ndim > 1 else b)


@given(problems())
def test_in_place_is_out_of_place_bit_by_bit(problem):
    x, dy, gamma, beta = problem
    y, dx, _, _ = all_results(*problem)
    saved = fastbn.batch_norm_train(x, gamma, beta)[1]
    np.testing.assert_array_equal(fastbn.batch_norm_backward(dy, saved, out=dy)[0], dx)
    z = fastbn.batch_norm(x, saved.mean, saved.var, gamma, beta)
    again = x.copy()
    np.testing.assert_array_equal(fastbn.batch_norm_train(x, gamma, beta, out=x)[0], y)
    np.testing.assert_array_equal(fastbn.batch_norm(again, saved.mean, saved.var, gamma, beta, out=again), z)


@given(problems())
def test_y_has_mean_beta_and_std_gamma(problem):
    x, _, gamma, beta = problem
    y = fastbn.batch_norm_train(x, gamma, beta)[0]
    _, var = reference.mean_var(x, 1)
    mean, found = reference.mean_var(y, 1)
    most = reference.reduce(reference.train(x, gamma, beta).budget, 1) / reference.count(x, 1)
    reference.assert_within(mean.astype("float64"), beta, most, "mean")
    std = abs(gamma) * np.sqrt(var / (var + 1e-5))
    np.testing.assert_allclose(np.sqrt(found).astype("float64"), std.astype("float64"), atol=8 * float(most.max()))


@given(problems())
def test_gradients_are_orthogonal_to_what_the_forward_removes(problem):
    """sum(dx) = 0, and sum(dx * xhat) = 0 up to the share of eps in the variance."""
    x, dy, gamma, beta = problem
    _, dx, dgamma, dbeta = all_results(x, dy, gamma, beta, eps=0.0)
    expected = reference.backward(dy, x, gamma, eps=0.0)
    mean, var = reference.mean_var(x, 1)
    xhat = (x - reference.spread(mean, x, 1)) * reference.spread(reference.invstd(var, 0), x, 1)
    reference.assert_within(reference.reduce(dx, 1), 0 * mean, reference.reduce(expected.dx_budget, 1), "sum dx")
    most = reference.reduce(expected.dx_budget * abs(xhat), 1)
    reference.assert_within(reference.reduce(dx * xhat, 1), 0 * mean, most, "sum dx * xhat")
    reference.assert_within(dbeta, reference.reduce(dy, 1), expected.dbeta_budget, "dbeta")
    reference.assert_within(dgamma, expected.dgamma, expected.dgamma_budget, "dgamma")


@given(problems(), st.sampled_from([-4.0, 0.5, 2.0]))
def test_the_backward_is_linear_in_dy(problem, factor):
    x, dy, gamma, beta = problem
    saved = fastbn.batch_norm_train(x, gamma, beta)[1]
    other = np.flip(dy).copy()
    one, two = fastbn.batch_norm_backward(dy, saved), fastbn.batch_norm_backward(other, saved)
    scaled = fastbn.batch_norm_backward(dy * dy.dtype.type(factor), saved)
    for a, b in zip(scaled, one, strict=True):  # a power of two: exact
        np.testing.assert_array_equal(a, b * b.dtype.type(factor))
    both = fastbn.batch_norm_backward(dy + other, saved)
    most = [a + b for a, b in zip(budgets(x, dy, gamma, beta), budgets(x, other, gamma, beta), strict=True)][1:]
    rounding = reference.tolerance(dy.dtype, float(abs(dy).max() * 2))  # of dy + other itself
    scale = abs(
        reference.spread(gamma, x, 1) * reference.spread(reference.invstd(reference.mean_var(x, 1)[1], 1e-5), x, 1)
    )
    n = reference.count(x, 1)
    slack = (rounding * scale * (2 + np.sqrt(n)), rounding * n, rounding * n)
    for found, a, b, m, s in zip(both, one, two, most, slack, strict=True):
        reference.assert_within(found, a.astype(np.longdouble) + b, 2 * m + s)


@given(problems(), st.booleans())
def test_folded_is_inference(problem, wide):
    x, _, gamma, beta = problem
    bn = fastbn.BatchNorm(x.shape[1], dtype=x.dtype)
    bn.gamma[:], bn.beta[:] = gamma, beta
    bn(x)
    scale, shift = bn.fold()
    y = bn.eval()(x)
    expected = reference.infer(x, bn.running_mean, bn.running_var, gamma, beta)
    reference.assert_within(y, expected.y, expected.budget, "y")
    terms = abs(x * scale[:, None]) + abs(shift[:, None])  # digits that folding may lose
    reference.assert_within(x * scale[:, None] + shift[:, None], y, 2 * reference.tolerance(x.dtype, terms), "folded")


@given(problems(), st.sampled_from([None, 0.5, 0.9]), st.booleans(), st.booleans())
def test_a_state_goes_round(problem, momentum, center, scale):
    x = problem[0]
    options = {"momentum": momentum, "center": center, "scale": scale, "dtype": x.dtype}
    one, two = fastbn.BatchNorm(x.shape[1], **options), fastbn.BatchNorm(x.shape[1], **options)
    one(x)
    two.load_state_dict(one.state_dict())
    for a, b in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert a[0] == b[0]
        np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(two.eval()(x), one.eval()(x))


@given(problems())
def test_gamma_0_gives_beta_and_no_gradient(problem):
    x, dy, gamma, beta = problem
    y, dx, _, _ = all_results(x, dy, 0 * gamma, beta)
    np.testing.assert_array_equal(y, np.broadcast_to(beta[:, None], y.shape))
    np.testing.assert_array_equal(dx, 0)
