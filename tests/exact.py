"""A second oracle, which rounds nothing: Python's integers and fractions, and a square root to 60 digits.

It shares no line with `reference`, and takes other ways where there are any: the variance is the mean of the squares
less the square of the mean, dx follows the six equations of the paper. Arrays here are rows, one for each channel.

Ioffe & Szegedy 2015, arXiv:1502.03167, Algorithm 1 and section 3.
"""

from fractions import Fraction
from math import isqrt
from types import SimpleNamespace

import numpy as np

TINY = Fraction(float(np.finfo(np.float64).smallest_subnormal))


def rows(a, axis):
    """An array as (channels, values of each)."""
    a = np.asarray(a)
    axes = sorted(i % a.ndim for i in (axis if isinstance(axis, tuple) else (axis,)))
    a = np.moveaxis(a, axes, range(len(axes)))
    return a.reshape(int(np.prod(a.shape[: len(axes)])), -1)


def rational(a):
    """The same values as fractions, those of a long double too."""
    a = np.asarray(a)
    high = a.astype(np.float64)
    values = [Fraction(v) for v in high.ravel().tolist()]
    if a.dtype.itemsize > high.itemsize:
        values = [v + Fraction(w) for v, w in zip(values, (a - high).astype(np.float64).ravel().tolist(), strict=True)]
    out = np.empty(a.size, object)
    out[:] = values
    return out.reshape(a.shape)


def moments(values):
    """Mean and variance of many values, quickly: as integers, multiples of one power of two."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64).ravel())
    low = int(exponent.min())
    v = (mantissa * 2.0**53).astype(np.int64).astype(object) << (exponent - low).astype(object)
    n, s, q = v.size, v.sum(), v.dot(v)
    unit = Fraction(2) ** (low - 53)
    return s * unit / n, (n * q - s * s) * unit**2 / n**2


def weighted(x, w):
    """Total weight, mean and variance of each row of x with weights w; where there is no weight they are 0."""
    x = np.where(np.asarray(w) == 0, 0, x)  # what has none may be no number
    x, w = rational(x), rational(w)
    total = w.sum(1)
    by = np.where(total == 0, Fraction(1), total)
    mean = (w * x).sum(1) / by
    return total, mean, (w * x * x).sum(1) / by - mean * mean


def invstd(var, eps):
    """1 / sqrt(var + eps), cut after 200 bits; 0 where it is infinite, so that y is beta."""
    v = Fraction(var) + Fraction(eps)
    if not v:
        return v
    bits = 200 + max(0, v.numerator.bit_length() - v.denominator.bit_length())
    return Fraction(isqrt((v.denominator << 2 * bits) // v.numerator), 1 << bits)


def forward(x, gamma, beta, eps, given=None):
    """Mean, var, invstd, xhat, y of rows x; `given`: the (mean, var) of a frozen layer.

    y_condition: the terms that add up to y in its dtype, over y; y_wide: the same of what is rounded in float64 before.
    """
    x, gamma, beta = rational(x), rational(gamma), rational(beta)
    if given is None:
        mean = x.sum(1) / x.shape[1]
        var = (x * x).sum(1) / x.shape[1] - mean * mean
    else:
        mean, var = (rational(a) for a in given)
    r = np.array([invstd(v, eps) for v in var])
    xhat = (x - mean[:, None]) * r[:, None]
    y = gamma[:, None] * xhat + beta[:, None]
    return SimpleNamespace(
        mean=mean,
        var=var,
        invstd=r,
        xhat=xhat,
        y=y,
        y_condition=ratio(abs(gamma[:, None] * xhat) + abs(beta[:, None]), y),
        y_wide=ratio(abs(gamma[:, None] * xhat) + abs(mean * r * gamma)[:, None], y),
    )


def backward(dy, x, gamma, eps, given=None):
    """dx, dgamma and dbeta by the six equations, with the conditions of each."""
    f = forward(x, gamma, np.zeros(len(gamma)), eps, given)
    dy, x, gamma = rational(dy), rational(x), rational(gamma)[:, None]
    n, r, d = x.shape[1], f.invstd[:, None], x - f.mean[:, None]
    dxhat = dy * gamma
    dx = dxhat * r
    terms = abs(dx)
    if given is None:
        dvar = (dxhat * d).sum(1)[:, None] * Fraction(-1, 2) * r**3
        dmean = (dxhat * -r).sum(1)[:, None] + dvar * (-2 * d).sum(1)[:, None] / n
        dx = dx + dvar * 2 * d / n + dmean / n
        terms = terms + abs(dvar * 2 * d / n) + abs(dmean / n)
    products = dy * f.xhat
    dgamma, dbeta = products.sum(1), dy.sum(1)

    sum_dy, moved = abs(dy).sum(1), abs(f.mean * f.invstd)
    sum_products = abs(products).sum(1) + moved * sum_dy
    wide = terms
    if given is None:
        sums = sum_dy[:, None] + abs(f.xhat) * sum_products[:, None] + (moved * abs(dgamma))[:, None]
        wide = terms + abs(gamma) * r * sums / n
    return SimpleNamespace(
        dx=dx,
        dgamma=dgamma,
        dbeta=dbeta,
        dx_condition=ratio(terms, dx),
        dx_wide=ratio(wide, dx),
        dgamma_condition=1,
        dgamma_wide=ratio(sum_products, dgamma),
        dbeta_condition=1,
        dbeta_wide=ratio(sum_dy, dbeta),
    )


def ratio(a, b):
    """abs(a / b) as floats; infinite where b is 0."""
    quotients = [float(abs(i / j)) if j else np.inf for i, j in np.broadcast(a, b)]
    return np.reshape(quotients, np.broadcast(a, b).shape)


def ulp(value, dtype):
    """The last place of a float of `dtype` that is nearest to a true value."""
    info = np.finfo(dtype)
    exponent = value.numerator.bit_length() - value.denominator.bit_length() if value else info.minexp
    exponent -= abs(value) < Fraction(2) ** exponent
    return Fraction(2) ** (max(exponent, info.minexp) - info.nmant)


def error(found, expected):
    """abs(found - expected) of floats and true values, without rounding."""
    return abs(rational(found) - expected)


def ulps(found, expected, dtype):
    """The same in units in the last place of the true values."""
    expected = np.asarray(expected, object)
    units = np.reshape([ulp(v, dtype) for v in expected.flat], expected.shape)
    return ratio(error(found, expected), units)


def digits(found, expected, scale=0.0):
    """The largest error in parts of the true value, or of `scale` where that is larger.

    Half a subnormal of float64 is no error: nothing is nearer. Where both values are 0 there is none either.
    """
    parts = [
        float(e / max(abs(v), Fraction(float(s)), TINY)) if e > TINY / 2 else 0.0
        for e, v, s in np.broadcast(error(found, expected), expected, scale)
    ]
    return max(parts, default=0.0)
