"""Moments of the parts of a whole, where the parts lie on many machines: what a part sends, and how parts merge.

A mean rounded to float64 has lost what is below its last digit (see `fastbn.moments.lost`). So a part also tells the
`rest`, what its mean lost, and the parts merge as `Moments` around the mean of the first of them.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..moments import FAR, Moments, lost, moments, two_sum

Array = npt.NDArray[Any]

PART = np.dtype([("count", "f8"), ("mean", "f8"), ("rest", "f8"), ("m2", "f8")])
"""Of each channel. The true mean is ``mean + rest``."""


def part(count: Any, mean: Any, rest: Any, m2: Any) -> Array:
    """An array of PART."""
    mean = np.asarray(mean)
    p = np.empty(mean.shape, PART)
    p["count"], p["mean"], p["rest"], p["m2"] = count, mean, rest, m2
    return p


def measured(x: Array, axis: Any, where: Array | None = None) -> Array:
    """The part that x is: one PART a channel.

    Reads x once; where the mean of a channel is FAR from 0, twice.
    """
    m = moments(x, axis=axis, where=where)
    axes = (axis,) if isinstance(axis, int) else axis
    rest = lost(x, tuple(a % x.ndim for a in axes), m, where)
    return part(m.count, m.mean, 0.0 if rest is None else rest, m.m2)


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
            high, low = two_sum(mean, -pivot)
            mean = high + (low + rest)
        m = Moments._trusted(count, mean, m2)
        while len(m.mean) > 1:
            even = len(m.mean) // 2 * 2
            pairs = _of(m, slice(0, even, 2)) + _of(m, slice(1, even, 2))
            odd = _of(m, slice(even, None))
            m = Moments._trusted(*(np.concatenate([getattr(a, f) for a in (pairs, odd)]) for f in FIELDS))
        high, low = (m.mean[0], np.zeros_like(m.mean[0])) if pivot is None else two_sum(pivot, m.mean[0])
    return part(np.asarray(m.count)[0], high, low, m.m2[0])


CACHED = 1 << 15
"""Parts of channels that merge at once: their arrays fit in a cache."""

FIELDS = ("count", "mean", "m2")


def _of(m: Moments, which: slice) -> Moments:
    return Moments._trusted(*(np.asarray(getattr(m, f))[which] for f in FIELDS))


def moments_of(p: Array, count: int | None) -> Moments:
    """`Moments` of a part; `count` if all channels have one, else the weights that the part has."""
    return Moments._trusted(np.array(p["count"]) if count is None else count, np.array(p["mean"]), np.array(p["m2"]))
