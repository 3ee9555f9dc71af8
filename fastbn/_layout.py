"""(shape, strides, channel axes) -> the canonical view (outer, channel, inner), and how it is cut into tiles.

Take the axes in memory order, drop those of length 1, and merge neighbours of one kind. What is left of every common
layout is (outer, channel, inner), with any of them 1:

    NCHW, axis 1              (N, C, H*W)
    NHWC, axis -1             (N*H*W, C, 1)
    (N, D), axis 1            (N, D, 1)
    whole array, axis ()      (1, 1, size)

Memory order is read from the strides: an NCHW-shaped view of NHWC memory is the second row.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._threads import planned_threads
from .kernels.grid import TERMS, Grid, fused_grid, split_grid
from .kernels.plain import CARRIERS

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


class Layout(NamedTuple):
    """The canonical view of one kind of array.

    Attributes
    ----------
    order
        The axes in memory order: ``x.transpose(order)`` is the canonical view, not yet merged.
    in_order
        Whether that is the order of the axes themselves.
    keeps_order
        Whether an array that NumPy makes like this one is in this order: not if channels had to be brought together.
    steps
        Strides in elements of an array that is dense in this order. Such an array is used in place, others are copied.
    channel_shape, channels
        Shape and number of the statistics.
    per_channel
        Values of each channel.
    size
        Elements in all.
    measured, given
        The tiles of a forward that measures the statistics of x or a backward through them, and of those where the
        statistics are given.
    """

    order: Shape
    in_order: bool
    keeps_order: bool
    steps: Shape
    channel_shape: Shape
    channels: int
    per_channel: int
    size: int
    measured: Grid
    given: Grid


def layout_of(x: Array, axes: Shape) -> Layout:
    """The canonical view of x, with `axes` (ascending, not negative) as the channels."""
    return layout(x.shape, x.strides, x.itemsize, axes, planned_threads(x.size))


@lru_cache(maxsize=4096)
def layout(shape: Shape, strides: Shape, itemsize: int, axes: Shape, threads: int) -> Layout:
    """`layout_of` any array of this shape, these strides and item size, for this many threads."""
    rank = range(len(shape))
    # Stable: axes of equal stride (of length 1, or broadcast) stay as they are.
    order = tuple(sorted(rank, key=lambda a: -abs(strides[a])))
    merged = _merge(shape, order, axes)
    keeps_order = merged is not None
    if merged is None:  # no single (outer, channel, inner): lay a copy out as (everything else, channels)
        order = tuple(a for a in order if a not in axes) + axes
        merged = _merge(shape, order, axes)
        assert merged is not None
    outer, channels, inner = merged
    steps = [0] * len(shape)
    step = 1
    for a in reversed(order):
        steps[a] = step
        step *= shape[a]
    size = math.prod(shape)
    sides = max(outer, 1), max(channels, 1), max(inner, 1)  # of an empty array no tile is ever used
    split = split_grid(*sides, itemsize)
    return Layout(
        order=order,
        in_order=order == tuple(rank),
        keeps_order=keeps_order,
        steps=tuple(steps),
        channel_shape=tuple(shape[a] for a in axes),
        channels=channels,
        per_channel=outer * inner,
        size=size,
        measured=fused_grid(*sides, itemsize, threads) or split,
        given=split,
    )


def _merge(shape: Shape, order: Shape, axes: Shape) -> tuple[int, int, int] | None:
    """(outer, channels, inner) with the axes in this order; None if the channels are not one ascending block."""
    groups = _groups(shape, order, axes)
    if groups is None:
        return None
    outer, channels, inner = (math.prod(shape[a] for a in group) for group in groups)
    return outer, channels, inner


def _groups(shape: Shape, order: Shape, axes: Shape) -> tuple[list[int], list[int], list[int]] | None:
    """The axes, but those of length 1, that become outer, channels and inner."""
    long = [a for a in order if shape[a] != 1]
    where = [i for i, a in enumerate(long) if a in axes]
    if not where:  # all channels (if any) have length 1: everything is one long inner run
        return [], [], long
    first, last = where[0], where[-1] + 1
    block = long[first:last]
    if len(block) != len(where) or block != sorted(block):
        return None
    return long[:first], block, long[last:]


def steps_in(x: Array, axes: Shape, lay: Layout) -> npt.NDArray[np.int64] | None:
    """By how many elements the samples, channels and elements of runs of another layout lie apart in x.

    None where that is no fixed number.
    """
    groups = _groups(x.shape, lay.order, axes)
    steps = []
    for group in groups or ():
        step = [x.strides[a] for a in group] or [0]
        spans = zip(group[1:], step[:-1], step[1:], strict=False)
        if any(outer != x.shape[a] * inner for a, outer, inner in spans):
            return None
        steps.append(step[-1] // x.itemsize)
    return np.array(steps, np.int64) if steps else None


class Weights(NamedTuple):
    """Weights of the values of an array, in its canonical view.

    Attributes
    ----------
    flat
        uint8 (of booleans), float32 or float64. That of sample n, channel c and element k of a run is
        ``flat[n * step[0] + c * step[1] + k * step[2]]``.
    step
        0 where they do not vary.
    totals
        Their sum in each channel, float64.
    exponent
        None; or, where a sum is so large or small that what is computed with it would leave a dtype's range, `flat` and
        `totals` are 2**-exponent times the weights given, which changes nothing but the range.
    """

    flat: Array
    step: npt.NDArray[np.int64]
    totals: Array
    exponent: Array | None = None

    def given(self, sums: Array) -> Array:
        """Sums over weights, one a channel, as the weights given have them."""
        return sums if self.exponent is None else np.ldexp(sums, self.exponent)


def weights_of(w: Array, shape: Shape, axes: Shape, lay: Layout) -> Weights:
    """The canonical view of weights that broadcast to `shape`, no larger than what of it they vary along."""
    groups = _groups(shape, lay.order, axes)
    assert groups is not None  # a layout's order has one
    w = w.reshape((1,) * (len(shape) - w.ndim) + w.shape)
    varies = [any(w.shape[a] != 1 for a in group) for group in groups]
    kept = [a for group, v in zip(groups, varies, strict=True) if v for a in group]
    wide = np.broadcast_to(w, [shape[a] if a in kept else 1 for a in range(len(shape))])
    sides = [math.prod(shape[a] for a in group) if v else 1 for group, v in zip(groups, varies, strict=True)]
    rest = [a for a in range(len(shape)) if a not in kept]  # of length 1 now
    view = np.require(wide.transpose(kept + rest), requirements=["C", "A"]).reshape(sides)
    times = lay.per_channel / max(sides[0] * sides[2], 1)  # of an empty array 0
    with np.errstate(all="ignore"):  # whether the sum is finite is checked
        totals = np.broadcast_to(_totals(view) * times, lay.channels).copy()
    step = [sides[1] * sides[2] * varies[0], sides[2] * varies[1], int(varies[2])]
    exponent = None
    if view.dtype.kind == "f" and ((totals > 0) & ((totals < 2.0**-64) | (totals > 2.0**64)) & (totals < np.inf)).any():
        exponent = np.frexp(totals)[1]
        own = -(exponent if varies[1] else exponent[:1])[:, None]
        with np.errstate(all="ignore"):
            view = np.ldexp(view.astype(np.float64), own).astype(view.dtype)
        totals = np.ldexp(totals, -exponent)
    flat = _writable(view.reshape(-1))
    return Weights(flat.view(np.uint8) if flat.dtype.kind == "b" else flat, np.array(step, np.int64), totals, exponent)


def _totals(view: Array) -> Array:
    """Sums over the first and the last axis, in float64.

    NumPy adds rows one after another: a million equal weights would have eleven digits. Here TERMS of them are, as in
    the kernels.
    """
    while len(view) > TERMS and view.dtype.kind != "b":  # ones are added exactly
        whole = len(view) // TERMS * TERMS
        parts = view[:whole].reshape(whole // TERMS, TERMS, *view.shape[1:]).sum((1, 3), np.float64)
        view = np.concatenate([parts, view[whole:].sum((0, 2), np.float64)[None]])[..., None]
    sums: Array = view.sum((0, 2), np.float64)
    return sums


def is_dense(a: Array, lay: Layout) -> bool:
    """Whether `a` (of the layout's shape) can be used in place: dense in the layout's order, aligned, native."""
    flags = a.flags
    if not (flags.aligned and a.dtype.isnative):
        return False
    if lay.in_order and flags.c_contiguous:  # the usual case, quickly
        return True
    item = a.itemsize
    return all(n == 1 or s == item * t for n, s, t in zip(a.shape, a.strides, lay.steps, strict=True))


def flat(a: Array, lay: Layout) -> Array:
    """The elements of a dense array in memory order, 1-d, without a copy, and typed as the kernels want them.

    Half precision goes to them in disguise, and everything as writable: Numba compiles anew for read-only arrays. The
    kernels never write to an input (a test compiles them with read-only inputs), so a read-only array is passed through
    an alias of its memory.
    """
    a = a.reshape(-1) if lay.in_order else a.transpose(lay.order).reshape(-1)
    carrier = CARRIERS.get(a.dtype.name) if a.itemsize == 2 else None
    if carrier:
        a = a.view(np.uint16)
    a = _writable(a)
    return a.view(carrier) if carrier else a


def _writable(a: Array) -> Array:
    return a if a.flags.writeable else np.asarray(_Alias(a))


class _Alias:
    """The memory of an array, said to be writable."""

    def __init__(self, base: Array) -> None:
        self.base = base
        interface = dict(base.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
