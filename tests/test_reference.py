"""The oracle itself: its gradients against finite differences, its forward against hand-worked numbers."""

import ml_dtypes
import numpy as np
import pytest
import reference
from arrays import HALVES, WEIGHTS, Case

SHAPES = [((6, 3), 1), ((3, 2, 4), 1), ((3, 4, 2), -1), ((2, 3, 4), (0, 2)), ((7,), ())]


def difference(f, a, h=1e-3):
    """The gradient of a scalar function by central differences over six points: exact to about h**6.

    In the dtype of `a`, and f gets arrays in its memory order.
    """
    grad, moved = np.empty(a.shape, a.dtype), a.copy("K")
    for i in np.ndindex(a.shape):
        total = 0
        for step, weight in ((1, 45), (-1, -45), (2, -9), (-2, 9), (3, 1), (-3, -1)):
            moved[i] = a[i] + step * h
            total += weight * f(moved)
        grad[i], moved[i] = total / (60 * a.dtype.type(h)), a[i]
    return grad


def away_from_the_kink(residual, forward):
    """A residual with which no y is so near to 0 that a difference would step over it."""
    return residual + np.where(abs(forward(residual).before) < 0.3, 1, 0)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("where", [None, "full bool", "full float64", "sample float32", "without float64", "frozen"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_are_those_of_the_forward(rng, shape, axis, where, activation):
    x, dy, residual = rng.normal(1, 2, shape), rng.normal(size=shape), rng.normal(size=shape)
    channels = tuple(shape[a] for a in reference.channel_axes(x, axis))
    gamma, beta = rng.normal(size=channels), rng.normal(size=channels)
    options = {"axis": axis, "eps": 1e-3}
    fixed = (rng.normal(size=channels), rng.uniform(0.5, 2, channels)) if where == "frozen" else None
    weights = None if where in (None, "frozen") else Case(where, shape, axis).weights(rng, where)

    def forward(x, gamma, beta, residual):
        parts = {"residual": residual, "activation": activation}
        if fixed is None:
            return reference.train(x, gamma, beta, **options, **parts, where=weights)
        return reference.infer(x, *fixed, gamma, beta, **options, **parts)

    residual = away_from_the_kink(residual, lambda z: forward(x, gamma, beta, z))
    given = [a.astype(np.longdouble) for a in (x, gamma, beta, residual)]
    y = forward(*given).y
    assert (y < 0).any() == (activation is None)
    found = reference.backward(dy, given[0], gamma, **options, fixed=fixed, where=weights, y=y if activation else None)
    for i, name in enumerate(("dx", "dgamma", "dbeta", "dresidual")):
        expected = difference(lambda a, i=i: (forward(*given[:i], a, *given[i + 1 :]).y * dy).sum(), given[i])
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-8, rtol=1e-8, err_msg=name)


def test_without_a_residual_it_is_0(rng):
    x, mean, var = rng.normal(size=(4, 3)), rng.normal(size=3), rng.uniform(1, 2, 3)
    for f in (reference.train, lambda x, **parts: reference.infer(x, mean, var, **parts)):
        without, zero = f(x, activation="relu"), f(x, activation="relu", residual=np.zeros((4, 3)))
        np.testing.assert_array_equal(without.y, zero.y)
        np.testing.assert_array_equal(without.budget, zero.budget)
    assert (f(x, residual=x).budget > zero.budget).all()


def test_forward_by_hand():
    x = np.array([[1.0, 10.0], [3.0, 30.0]])
    np.testing.assert_array_equal(reference.mean_var(x, 1), [[2, 20], [1, 100]])
    np.testing.assert_array_equal(reference.train(x, [2, 3], [1, 0], eps=0).y, [[-1, -3], [3, 3]])
    np.testing.assert_array_equal(reference.mean_var(x, ()), [11, 131.5])  # squares: 100, 1, 64, 361
    np.testing.assert_array_equal(reference.infer(x, [1, 10], [0, 3], [1, 2], [5, 7], eps=1).y, [[5, 7], [7, 27]])


def test_weights_by_hand():
    x = np.array([[1.0, 10.0], [5.0, 30.0], [np.nan, np.inf]])
    np.testing.assert_array_equal(reference.mean_var(x, 1, [[1], [3], [0]]), [[4, 25], [3, 75]])
    np.testing.assert_array_equal(reference.mean_var(x, 1, [[1, 0], [1, 0], [0, 0]]), [[3, 0], [4, 0]])
    np.testing.assert_array_equal(reference.mean_var(x[:2], (), 0.5), reference.mean_var(x[:2], ()))
    y = reference.train(x[:, :1], 2, 1, eps=1, where=[[1], [3], [0]]).y  # 1 / sqrt(3 + 1)
    np.testing.assert_array_equal(y, [[-2], [2], [np.nan]])
    assert reference.total(x, 1, [[1, 0], [1, 0], [0, 0]]).tolist() == [2, 1]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_repeat_samples(rng, kind):
    """A weight of 2 is a sample twice; weights count in relation to each other."""
    case = Case("NLC", (7, 3, 2), 2)
    x, w = rng.normal(3, 1, case.shape), np.ceil(case.weights(rng, kind))
    wide = np.broadcast_to(w, case.shape).astype(int)
    for c in range(2):
        if kind.startswith("without") and c == 0:
            assert not wide[..., c].any()
            continue
        repeated = np.repeat(x[..., c], wide[..., c].ravel())
        mean, var = reference.mean_var(x, 2, w / 8)
        np.testing.assert_allclose((mean[c], var[c]), reference.mean_var(repeated, ()), rtol=1e-14)


def test_what_is_no_number_hides_under_a_weight_of_0(rng):
    x, w, dy = rng.normal(size=(9, 2)), np.ones((9, 1)), rng.normal(size=(9, 2))
    w[3:5] = 0
    x[3], x[4], dy[4] = np.nan, -np.inf, np.nan
    kept = w[:, 0] > 0
    found = reference.backward(dy, x, where=w)
    expected = reference.backward(dy[kept], x[kept])
    for name in ("dgamma", "dbeta", "dgamma_budget", "dbeta_budget"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-14)
    np.testing.assert_allclose(found.dx[kept], expected.dx, rtol=1e-14)
    np.testing.assert_allclose(found.dx_budget[kept], expected.dx_budget, rtol=1e-14)
    assert np.isfinite(found.dx[3]).all()  # nothing of x reaches it
    x[3] = 7  # a number counts in the sums, whatever its weight
    np.testing.assert_allclose(reference.backward(dy, x, where=w).dbeta, expected.dbeta + dy[3], rtol=1e-14)


def test_relu_by_hand():
    x = np.array([[-2.0, np.nan, 3.0, 0.0, -np.inf, np.inf]])
    y = reference.infer(x, 0, 1, eps=0, activation="relu").y
    np.testing.assert_array_equal(y, [[0, np.nan, 3, 0, 0, np.inf]])
    dresidual = reference.backward(np.full((1, 6), 5.0), x, eps=0, fixed=(np.zeros(6), np.ones(6)), y=y).dresidual
    np.testing.assert_array_equal(dresidual, [[0, 0, 5, 0, 0, 5]])
    f = reference.infer(np.float32([[1e-9, 1, 1.0001]]), 1, 1, eps=0, residual=np.float32([[1, 0, 0]]))
    np.testing.assert_array_equal(reference.near_zero(f), [[True, True, False]])


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_rounded_once(dtype):
    """Every half, what lies between two of them, and what lies beside that, as close as long doubles can."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):  # signalling NaN
        halves = bits.view(dtype).astype(np.longdouble)
    np.testing.assert_array_equal(reference.to_half(halves, dtype), halves)
    info = ml_dtypes.finfo(dtype)
    positive = halves[np.isfinite(halves) & (bits < 1 << 15)]
    low, high = positive[:-1], positive[1:]
    even = np.where(np.arange(low.size) % 2 == 0, low, high)
    for sign in (1, -1):
        np.testing.assert_array_equal(reference.to_half(sign * (low + high) / 2, dtype), sign * even)
        for toward in (low, high):
            beside = np.nextafter((low + high) / 2, toward)
            np.testing.assert_array_equal(reference.to_half(sign * beside, dtype), sign * toward)
    end = np.longdouble(info.max) + (np.longdouble(info.max) - low[-1]) / 2
    np.testing.assert_array_equal(
        reference.to_half([end, -end, np.nextafter(end, 0)], dtype), [np.inf, -np.inf, info.max]
    )
    assert (info.nmant, info.minexp) == reference.HALVES[dtype][:2]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_must_be_a_rounding_of_what_the_budget_allows(dtype):
    one = np.ones(1, dtype)
    next_one = np.nextafter(one, np.full(1, 2, dtype))
    middle = (one.astype(np.longdouble) + next_one.astype(np.longdouble)) / 2
    budget = reference.tolerance(dtype, middle)
    assert budget < 1e-14
    for actual in (one, next_one):  # a tie within the budget
        reference.assert_within(actual, middle, budget)
        reference.assert_within(actual[0], middle[0], budget[0])
    reference.assert_within(next_one, middle + 2 * budget, budget)
    with pytest.raises(AssertionError, match="times the error budget"):
        reference.assert_within(one, middle + 2 * budget, budget)
    with pytest.raises(AssertionError, match="inf times"):
        reference.assert_within(np.full(1, np.nan, dtype), middle, budget)


def test_a_constant_channel_with_eps_0_gives_beta():
    np.testing.assert_array_equal(reference.train(np.full((3, 1), 7.0), [2], [4], eps=0).y, [[4]] * 3)


def test_the_budget_is_a_few_ulp():
    assert reference.tolerance(np.float32, 1.0) <= 4 * np.finfo(np.float32).eps
    assert reference.tolerance(np.float64, 1.0) <= 4 * np.finfo(np.float64).eps
    with pytest.raises(AssertionError, match="times the error budget"):
        reference.assert_within(np.float32(1.00001), 1.0, reference.tolerance(np.float32, 1.0))
    with pytest.raises(AssertionError, match="inf times"):
        reference.assert_within(np.array([np.nan]), np.array([1.0]), 1.0)
