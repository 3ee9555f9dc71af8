"""The oracle: batch normalization in plain NumPy, one formula a line, in long double, and the error budget.

Ioffe & Szegedy 2015, arXiv:1502.03167. Statistics have the shape ``[x.shape[a] for a in sorted(axis)]``.
"""

from types import SimpleNamespace

import numpy as np

WIDE = np.longdouble
EPS64 = float(np.finfo(np.float64).eps)


def channel_axes(x, axis):
    return tuple(sorted(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))))


def reduce(a, axis):
    """Sum over everything but the channels."""
    kept = channel_axes(a, axis)
    return a.sum(tuple(i for i in range(a.ndim) if i not in kept), dtype=WIDE)


def spread(v, x, axis):
    """A value per channel (or a scalar), in a shape that broadcasts against x."""
    v = np.asarray(v, WIDE)
    return v.reshape([n if i in channel_axes(x, axis) else 1 for i, n in enumerate(x.shape)]) if v.ndim else v


def count(x, axis):
    return x.size // max(int(np.prod([x.shape[a] for a in channel_axes(x, axis)])), 1)


def mean_var(x, axis):
    x = x.astype(WIDE)
    mean = reduce(x, axis) / count(x, axis)
    mean = mean + reduce(x - spread(mean, x, axis), axis) / count(x, axis)  # what the sum rounded: of a constant, all
    d = x - spread(mean, x, axis)
    var = reduce(d**2, axis) / count(x, axis) - (reduce(d, axis) / count(x, axis)) ** 2  # and the rounding of the mean
    return mean, var


def invstd(var, eps):
    v = np.asarray(var, WIDE) + eps
    return np.where(v == 0, WIDE(0), 1 / np.sqrt(np.where(v == 0, WIDE(1), v)))


def infer(x, mean, var, gamma=1.0, beta=0.0, *, axis=1, eps=1e-5):
    """y; and `budget`, the bound of its error in the dtype of the result."""
    xhat = (x.astype(WIDE) - spread(mean, x, axis)) * spread(invstd(var, eps), x, axis)
    y = xhat * spread(gamma, x, axis) + spread(beta, x, axis)
    scale = abs(spread(gamma, x, axis) * spread(invstd(var, eps), x, axis))
    moved = abs(spread(mean, x, axis)) * scale  # what an error of one part in the mean moves y by
    budget = tolerance(x.dtype, abs(xhat * spread(gamma, x, axis)) + abs(spread(beta, x, axis)), moved)
    return SimpleNamespace(y=y, budget=budget)


def train(x, gamma=1.0, beta=0.0, *, axis=1, eps=1e-5):
    mean, var = mean_var(x, axis)
    result = infer(x, mean, var, gamma, beta, axis=axis, eps=eps)
    # 14 digits of the variance are those of 2 / invstd; a mean has them of the size of what it adds up.
    mean_moves = abs(spread(gamma * np.sqrt(var) * invstd(var, eps), x, axis))
    result.budget += tolerance("float64", 0, abs(result.y - spread(beta, x, axis)) / 2 + mean_moves)
    return result


def backward(dy, x, gamma=1.0, *, axis=1, eps=1e-5, fixed=None):
    """dx, dgamma, dbeta with the budget of each; `fixed`: the given (mean, var) of a frozen layer."""
    mean, var = mean_var(x, axis) if fixed is None else fixed
    n = count(x, axis)
    g = dy.astype(WIDE)
    xhat = (x.astype(WIDE) - spread(mean, x, axis)) * spread(invstd(var, eps), x, axis)
    scale = spread(gamma, x, axis) * spread(invstd(var, eps), x, axis)
    dbeta = reduce(g, axis)
    dgamma = reduce(g * xhat, axis)
    through_mean = spread(dbeta, x, axis) / n if fixed is None else 0 * g
    through_var = xhat * spread(dgamma, x, axis) / n if fixed is None else 0 * g
    dx = scale * (g - through_mean - through_var)

    r = result_dtype(x.dtype)
    size = abs(np.asarray(mean, WIDE)) + (np.sqrt(var) if fixed is None else 0)
    moved = size * invstd(var, eps)  # xhat's error for one part in the mean
    sum_dy, sum_dyxhat = reduce(abs(g), axis), reduce(abs(g * xhat), axis) + moved * reduce(abs(g), axis)
    rounded = abs(scale) * (abs(g) + abs(through_mean) + abs(through_var))
    wide = 0 * rounded
    if fixed is None:
        sum_dyxhat, rounded_var = sum_dyxhat + abs(dgamma) / 2, 1.5 * rounded  # 1 / sqrt(var): once, and in scale
        wide = spread(sum_dy, x, axis) + abs(xhat) * spread(sum_dyxhat, x, axis)
        wide = abs(scale) * (wide + spread(moved * abs(dgamma), x, axis)) / n + rounded_var
    return SimpleNamespace(
        dx=dx,
        dgamma=dgamma,
        dbeta=dbeta,
        dx_budget=tolerance(r, rounded, wide),
        dgamma_budget=tolerance(r, abs(dgamma), sum_dyxhat),
        dbeta_budget=tolerance(r, abs(dbeta), sum_dy),
    )


def running(old, new, momentum):
    return momentum * np.asarray(old, WIDE) + (1 - WIDE(momentum)) * new


def result_dtype(dtype):
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def tolerance(dtype, rounded, wide=0.0):
    """The one error budget: what rounding in `dtype` may cost, and what float64 sums may.

    `rounded` is the sum of the magnitudes of the terms that the formula adds in the result's dtype. Each bears at most
    four roundings of half an eps (parameter, difference, product, sum): 2 eps, and 1 for the second order. `wide` is
    the condition of what is computed in float64 before: it has 14 digits (a mean in float64 has them of itself, a sum
    over n values of sum(abs(terms))). `rounded` also bounds what rounding the mean to `dtype` leaves: eps**2 * wide.
    """
    info = np.finfo(result_dtype(dtype))
    eps = WIDE(info.eps)
    return 3 * eps * (rounded + eps * wide) + WIDE(1e-14) * wide + 2 * WIDE(info.smallest_subnormal)


def assert_within(actual, expected, budget, what=""):
    """abs(actual - expected) <= budget everywhere; the message names the worst place."""
    assert np.shape(actual) == np.shape(expected), f"{what}: shape {np.shape(actual)}, expected {np.shape(expected)}"
    if not np.size(actual):
        return
    excess = np.asarray(abs(np.asarray(actual, WIDE) - expected) / np.broadcast_to(budget, np.shape(expected)))
    excess = np.where(np.isnan(excess), np.inf, excess)
    at = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[at] <= 1, (
        f"{what}{[int(i) for i in at]}: {np.asarray(actual)[at]!r}, expected {np.asarray(expected)[at]!r}, "
        f"{float(excess[at]):.3g} times the error budget"
    )
