"""The oracle itself: its gradients against finite differences, its forward against hand-worked numbers."""

import numpy as np
import pytest
import reference

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


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_forward(rng, shape, axis, frozen):
    x, dy = rng.normal(1, 2, shape), rng.normal(size=shape)
    channels = tuple(shape[a] for a in reference.channel_axes(x, axis))
    gamma, beta = rng.normal(size=channels), rng.normal(size=channels)
    fixed = (rng.normal(size=channels), rng.uniform(0.5, 2, channels)) if frozen else None

    def loss(x, gamma, beta):
        if fixed is None:
            y = reference.train(x, gamma, beta, axis=axis, eps=1e-3).y
        else:
            y = reference.infer(x, *fixed, gamma, beta, axis=axis, eps=1e-3).y
        return (y * dy).sum()

    x, gamma, beta = (a.astype(np.longdouble) for a in (x, gamma, beta))
    found = reference.backward(dy, x, gamma, axis=axis, eps=1e-3, fixed=fixed)
    np.testing.assert_allclose(found.dx, difference(lambda v: loss(v, gamma, beta), x), atol=1e-8, rtol=1e-8)
    np.testing.assert_allclose(found.dgamma, difference(lambda v: loss(x, v, beta), gamma), atol=1e-8, rtol=1e-8)
    np.testing.assert_allclose(found.dbeta, difference(lambda v: loss(x, gamma, v), beta), atol=1e-8, rtol=1e-8)


def test_forward_by_hand():
    x = np.array([[1.0, 10.0], [3.0, 30.0]])
    np.testing.assert_array_equal(reference.mean_var(x, 1), [[2, 20], [1, 100]])
    np.testing.assert_array_equal(reference.train(x, [2, 3], [1, 0], eps=0).y, [[-1, -3], [3, 3]])
    np.testing.assert_array_equal(reference.mean_var(x, ()), [11, 131.5])  # squares: 100, 1, 64, 361
    np.testing.assert_array_equal(reference.infer(x, [1, 10], [0, 3], [1, 2], [5, 7], eps=1).y, [[5, 7], [7, 27]])


def test_a_constant_channel_with_eps_0_gives_beta():
    np.testing.assert_array_equal(reference.train(np.full((3, 1), 7.0), [2], [4], eps=0).y, [[4]] * 3)


def test_the_budget_is_a_few_ulp():
    assert reference.tolerance(np.float32, 1.0) <= 4 * np.finfo(np.float32).eps
    assert reference.tolerance(np.float64, 1.0) <= 4 * np.finfo(np.float64).eps
    with pytest.raises(AssertionError, match="times the error budget"):
        reference.assert_within(np.float32(1.00001), 1.0, reference.tolerance(np.float32, 1.0))
    with pytest.raises(AssertionError, match="inf times"):
        reference.assert_within(np.array([np.nan]), np.array([1.0]), 1.0)
