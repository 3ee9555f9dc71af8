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


def weights(x, where):
    """One for each element; None: all 1."""
    return np.broadcast_to(np.asarray(1 if where is None else where).astype(WIDE), x.shape)


def total(x, axis, where=None):
    """Sum of the weights of each channel, and 1 where that is 0: nothing is divided by it then."""
    w = reduce(weights(x, where), axis) if where is not None else np.asarray(count(x, axis), WIDE)
    return np.where(w == 0, WIDE(1), w)


def mean_var(x, axis, where=None):
    w, n = weights(x, where), total(x, axis, where)
    x = np.where(w > 0, x.astype(WIDE), WIDE(0))  # a weight of 0 hides even NaN
    mean = reduce(w * x, axis) / n
    d = np.where(w > 0, x - spread(mean, x, axis), WIDE(0))
    mean = mean + reduce(w * d, axis) / n  # what the sum rounded: of a constant, all
    d = np.where(w > 0, x - spread(mean, x, axis), WIDE(0))
    var = reduce(w * d**2, axis) / n - (reduce(w * d, axis) / n) ** 2  # and the rounding of the mean
    return mean, var


def invstd(var, eps):
    v = np.asarray(var, WIDE) + eps
    return np.where(v == 0, WIDE(0), 1 / np.sqrt(np.where(v == 0, WIDE(1), v)))


@np.errstate(invalid="ignore")
def infer(x, mean, var, gamma=1.0, beta=0.0, *, axis=1, eps=1e-5, residual=None, activation=None, dtype=None):
    """y in `dtype` (x's, if None); `budget`, the bound of its error; `before`, which is y without the activation."""
    added = WIDE(0) if residual is None else residual.astype(WIDE)
    xhat = (x.astype(WIDE) - spread(mean, x, axis)) * spread(invstd(var, eps), x, axis)
    before = xhat * spread(gamma, x, axis) + spread(beta, x, axis) + added
    scale = abs(spread(gamma, x, axis) * spread(invstd(var, eps), x, axis))
    moved = abs(spread(mean, x, axis)) * scale  # what an error of one part in the mean moves y by
    terms = abs(xhat * spread(gamma, x, axis)) + abs(spread(beta, x, axis)) + abs(added)
    budget = tolerance(dtype or x.dtype, terms, moved)
    return SimpleNamespace(y=relu(before) if activation == "relu" else before, budget=budget, before=before)


def relu(v):
    return np.where(v < 0, WIDE(0), v)  # NaN stays


def near_zero(forward):
    """Where the error of a result may decide whether its ReLU lets the gradient through."""
    return abs(forward.before) <= forward.budget


@np.errstate(invalid="ignore")
def train(x, gamma=1.0, beta=0.0, *, axis=1, eps=1e-5, where=None, residual=None, activation=None, dtype=None):
    mean, var = mean_var(x, axis, where)
    parts = {"residual": residual, "activation": activation, "dtype": dtype}
    result = infer(x, mean, var, gamma, beta, axis=axis, eps=eps, **parts)
    # 14 digits of the variance are those of 2 / invstd; a mean has them of the size of what it adds up.
    scaled = (x.astype(WIDE) - spread(mean, x, axis)) * spread(gamma * invstd(var, eps), x, axis)
    mean_moves = abs(spread(gamma * np.sqrt(var) * invstd(var, eps), x, axis))
    result.budget += tolerance("float64", 0, abs(scaled) / 2 + mean_moves)
    return result


@np.errstate(invalid="ignore")
def backward(dy, x, gamma=1.0, *, axis=1, eps=1e-5, fixed=None, where=None, y=None, dtype=None):
    """dx, dgamma, dbeta with the budget of each, and dresidual, which is exact.

    `fixed`: the given (mean, var) of a frozen layer; `y`: the result of a forward with ReLU; `dtype`: as in `infer`.
    """
    mean, var = mean_var(x, axis, where) if fixed is None else fixed
    w = weights(x, where)
    share = w / spread(total(x, axis, where), x, axis) if fixed is None else 0 * w
    g = dy.astype(WIDE)
    if y is not None:
        g = np.where(y.astype(WIDE) > 0, g, WIDE(0))
    xhat = (x.astype(WIDE) - spread(mean, x, axis)) * spread(invstd(var, eps), x, axis)
    scale = spread(gamma, x, axis) * spread(invstd(var, eps), x, axis)
    hidden = (w == 0) & ~(np.isfinite(xhat) & np.isfinite(g))  # what is not finite, under a weight of 0
    dbetas, dgammas = np.where(hidden, WIDE(0), g), np.where(hidden, WIDE(0), g * xhat)
    dbeta, dgamma = reduce(dbetas, axis), reduce(dgammas, axis)
    through_mean = share * spread(dbeta, x, axis)
    through_var = np.where(share > 0, share * xhat * spread(dgamma, x, axis), WIDE(0))
    dx = scale * (g - through_mean - through_var)

    r = dtype or result_dtype(x.dtype)
    size = abs(np.asarray(mean, WIDE)) + (np.sqrt(var) if fixed is None else 0)
    moved = size * invstd(var, eps)  # xhat's error for one part in the mean
    sum_dy, sum_dyxhat = reduce(abs(dbetas), axis), reduce(abs(dgammas), axis) + moved * reduce(abs(dbetas), axis)
    rounded = abs(scale) * (abs(g) + abs(through_mean) + abs(through_var))
    wide = 0 * rounded
    if fixed is None:
        sum_dyxhat, rounded_var = sum_dyxhat + abs(dgamma) / 2, 1.5 * rounded  # 1 / sqrt(var): once, and in scale
        wide = spread(sum_dy, x, axis) + abs(xhat) * spread(sum_dyxhat, x, axis) + spread(moved * abs(dgamma), x, axis)
        wide = abs(scale) * np.where(share > 0, share * wide, WIDE(0)) + rounded_var
    return SimpleNamespace(
        dx=dx,
        dgamma=dgamma,
        dbeta=dbeta,
        dresidual=g,
        dx_budget=tolerance(r, rounded, wide),
        dgamma_budget=tolerance(parameter_dtype(r), abs(dgamma), sum_dyxhat),
        dbeta_budget=tolerance(parameter_dtype(r), abs(dbeta), sum_dy),
    )


def running(old, new, momentum):
    return momentum * np.asarray(old, WIDE) + (1 - WIDE(momentum)) * new


HALVES = {"float16": (10, -14, 15), "bfloat16": (7, -126, 127)}
"""Digits after the point, and the exponents of the smallest normal and of the largest number."""


def is_half(dtype):
    return np.dtype(dtype).name in HALVES


def result_dtype(dtype):
    """Of y, for an x of `dtype`."""
    return np.dtype(dtype).newbyteorder("=") if is_half(dtype) else parameter_dtype(dtype)


def parameter_dtype(dtype):
    """Of parameters and their gradients, beside a y of `dtype`."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def tolerance(dtype, rounded, wide=0.0):
    """The one error budget: what rounding in `dtype` may cost, and what float64 sums may.

    `rounded` is the sum of the magnitudes of the terms that the formula adds in the result's dtype. Each bears at most
    five roundings of half an eps (parameter, difference, product, sum, and the sum with a residual): 2.5 eps, and 0.5
    for the second order. `wide` is the condition of what is computed in float64 before: it has 14 digits (a mean in
    float64 has them of itself, a sum over n values of sum(abs(terms))). `rounded` also bounds what rounding the mean to
    `dtype` leaves: eps**2 * wide.

    Halves are computed in float64 and rounded once: theirs is the budget before that, and `assert_within` does the
    rounding.
    """
    info = np.finfo(np.float64 if is_half(dtype) else result_dtype(dtype))
    eps = WIDE(info.eps)
    return 3 * eps * (rounded + eps * wide) + WIDE(1e-14) * wide + 2 * WIDE(info.smallest_subnormal)


def to_half(v, dtype):
    """Long doubles rounded once to the nearest half, of two the even one, as long doubles. NumPy goes by float64."""
    digits, lowest, highest = HALVES[np.dtype(dtype).name]
    v = np.asarray(v, WIDE)
    unit = np.ldexp(WIDE(1), np.maximum(np.frexp(v)[1] - 1, lowest) - digits)
    rounded = np.rint(v / unit) * unit
    return np.where(abs(rounded) >= WIDE(2) ** (highest + 1), np.copysign(WIDE(np.inf), v), rounded)


def assert_within(actual, expected, budget, what=""):
    """abs(actual - expected) <= budget everywhere; the message names the worst place.

    A half must be what some value within the budget is rounded to.
    """
    assert np.shape(actual) == np.shape(expected), f"{what}: shape {np.shape(actual)}, expected {np.shape(expected)}"
    if not np.size(actual):
        return
    error = abs(np.asarray(actual).astype(WIDE) - expected)
    if is_half(np.asarray(actual).dtype):
        low, high = (to_half(v, actual.dtype) for v in (expected - budget, expected + budget))
        error = np.where((low <= actual.astype(WIDE)) & (actual.astype(WIDE) <= high), WIDE(0), error)
    excess = np.asarray(error / np.broadcast_to(budget, np.shape(expected)))
    excess = np.where(np.isnan(excess), np.inf, excess)
    at = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[at] <= 1, (
        f"{what}{[int(i) for i in at]}: {np.asarray(actual)[at]!r}, expected {np.asarray(expected)[at]!r}, "
        f"{float(excess[at]):.3g} times the error budget"
    )
