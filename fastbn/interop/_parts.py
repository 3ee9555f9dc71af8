"""Moments of the parts of a whole, where the parts lie on many machines: what a part sends, and how parts merge.

Chan's formula needs the differences of the parts' means. A mean rounded to float64 has lost what is below its last
digit: with a mean of 1e8 and a standard deviation of 1 that is 1e-8, and the merged variance would have nine digits.
So a part whose mean lies far from 0 also tells the `rest`, what its mean lost, and the parts merge as `Moments` around
the mean of the first of them.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..functional import batch_norm
from ..moments import Moments, moments

Array = npt.NDArray[Any]

PART = np.dtype([("count", "f8"), ("mean", "f8"), ("rest", "f8"), ("m2", "f8")])
"""Of each channel. The true mean is ``mean + rest``."""

FAR = 1000.0
"""Standard deviations between a mean and 0 from which the rest is computed: nearer, the merge has 13 digits without."""


def part(count: Any, mean: Any, rest: Any, m2: Any) -> Array:
    """An array of PART."""
    mean = np.asarray(mean)
    p = np.empty(mean.shape, PART)
    p["count"], p["mean"], p["rest"], p["m2"] = count, mean, rest, m2
    return p


def measured(x: Array, axis: Any, where: Array | None = None) -> Array:
    """The part that x is: one PART a channel.

    Reads x once; where the mean of a channel is FAR from 0, x is copied as float64 and read twice more.
    """
    m = moments(x, axis=axis, where=where)
    rest = np.zeros_like(m.mean)
    with np.errstate(all="ignore"):
        # Not of a constant, whose mean is exact; nor of NaN.
        far = (m.m2 > 0) & (abs(m.mean) * np.sqrt(m.count) > FAR * np.sqrt(m.m2))
    if far.any():
        d = np.asarray(x).astype(np.float64)  # in the memory order of x
        centre = np.where(far, m.mean, 0.0)
        batch_norm(d, centre, 1.0, axis=axis, eps=0.0, out=d)
        rest = np.where(far, moments(d, axis=axis, where=where).mean, 0.0)
    return part(m.count, m.mean, rest, m.m2)


def merged(parts: Array) -> Array:
    """The part that all of `parts` (along the first axis) are together, in a tree that their positions alone decide.

    Neighbours merge with neighbours: of P parts each number goes through log2(P) roundings.
    """
    if len(parts) == 1:
        return np.asarray(parts[0])
    sides = len(parts), math.prod(parts.shape[1:])
    whole, p = np.empty(sides[1], PART), parts.reshape(sides)
    step = max(1, CACHED // len(parts))
    for c in range(0, sides[1], step):
        whole[c : c + step] = _tree(p[:, c : c + step])
    return whole.reshape(parts.shape[1:])


def _tree(parts: Array) -> Array:
    count, mean, rest, m2 = (np.ascontiguousarray(parts[f]) for f in ("count", "mean", "rest", "m2"))
    if (count == count[:, :1]).all():
        count = count[:, :1]  # one for all channels, as without weights
    with np.errstate(all="ignore"):
        pivot = None
        if not (count * mean**2 <= FAR**2 * m2).all():  # nor of a constant: what merges into it may be no constant
            pivot = mean[np.argmax(count > 0, axis=0), np.arange(mean.shape[1])]
            pivot = np.where(np.isfinite(pivot), pivot, 0.0)
            high, low = _two_sum(mean, -pivot)
            mean = high + (low + rest)
        m = Moments.trusted(count, mean, m2)
        while len(m.mean) > 1:
            even = len(m.mean) // 2 * 2
            pairs = _of(m, slice(0, even, 2)) + _of(m, slice(1, even, 2))
            odd = _of(m, slice(even, None))
            m = Moments.trusted(*(np.concatenate([getattr(a, f) for a in (pairs, odd)]) for f in FIELDS))
        high, low = (m.mean[0], np.zeros_like(m.mean[0])) if pivot is None else _two_sum(pivot, m.mean[0])
    return part(np.asarray(m.count)[0], high, low, m.m2[0])


CACHED = 1 << 15
"""Parts of channels that merge at once: their arrays fit in a cache."""

FIELDS = ("count", "mean", "m2")


def _of(m: Moments, which: slice) -> Moments:
    return Moments.trusted(*(np.asarray(getattr(m, f))[which] for f in FIELDS))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum, and what rounding it lost (Knuth); of what is not finite, nothing."""
    s = a + b
    t = s - a
    lost = (a - (s - t)) + (b - t)
    return s, np.where(np.isfinite(lost), lost, 0.0)


def moments_of(p: Array, count: int | None) -> Moments:
    """`Moments` of a part; `count` if all channels have one, else the weights that the part has."""
    return Moments.trusted(np.array(p["count"]) if count is None else count, np.array(p["mean"]), np.array(p["m2"]))
