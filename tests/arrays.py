"""The inputs: a table of cases (shape, channel axis, memory order), their data, and awkward views of an array."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import reference

from fastbn._layout import layout
from fastbn._threads import SERIAL_SIZE
from fastbn.kernels.grid import AHEAD, FOLD, RUN, SEGMENT, STRIP

FLOATS = ("float32", "float64")
INTEGERS = ("int8", "uint8", "int32", "bool")


@dataclass(frozen=True)
class Case:
    """An array layout. `order` lists the axes as they lie in memory, the slowest first."""

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = 1
    order: tuple[int, ...] | None = None

    def __str__(self):
        axis = str(self.axis).replace(" ", "")
        order = "" if self.order is None else "-order" + "".join(map(str, self.order))
        return f"{self.name}-{'x'.join(map(str, self.shape))}-axis{axis}{order}"

    @property
    def channels(self):
        return tuple(self.shape[a] for a in reference.channel_axes(np.empty(self.shape, bool), self.axis))

    @property
    def size(self):
        return int(np.prod(self.shape))

    def lay(self, values):
        """The same values, in the memory order of this case."""
        if self.order is None:
            return np.ascontiguousarray(values)
        return np.ascontiguousarray(values.transpose(self.order)).transpose(np.argsort(self.order))

    def data(self, rng, dtype, offset=3.0, spread=1.0):
        """x, dy, gamma, beta, mean, var. Channels differ in offset and scale; one gamma is 0."""
        dtype = np.dtype(dtype)
        r = reference.result_dtype(dtype)
        values = rng.normal(size=self.shape)
        mean, std = rng.uniform(-offset, offset, self.channels), spread * rng.uniform(0.5, 2, self.channels)
        values = values * reference.spread(std, values, self.axis) + reference.spread(mean, values, self.axis)
        if dtype.kind in "iu":
            values = np.clip(np.rint(values * 9), max(np.iinfo(dtype).min, -1000), min(np.iinfo(dtype).max, 1000))
        elif dtype.kind == "b":
            values = values > 0
        gamma = rng.normal(size=self.channels)
        if gamma.size > 1:
            gamma.flat[0] = 0
        return SimpleNamespace(
            x=self.lay(values.astype(dtype)),
            dy=self.lay(rng.normal(0.3, 1, self.shape).astype(r)),
            gamma=gamma.astype(r),
            beta=rng.normal(size=self.channels).astype(r),
            mean=(mean + 0.1).astype(r),
            var=(std**2 * 1.1).astype(r),
        )

    def grid(self, dtype):
        """(long runs?, fused?, parallel?) of a training forward."""
        x = self.lay(np.empty(self.shape, dtype))
        whole = layout(x.shape, x.strides, x.itemsize, reference.channel_axes(x, self.axis), 2).whole
        return whole.runs, whole.fused, x.size >= SERIAL_SIZE


# A few hundred elements each: every arrangement of axes. These run as plain Python too.
SMALL = [
    Case("NCHW", (4, 3, 5, 7)),
    Case("NHWC", (4, 5, 7, 3), -1),
    Case("NHWC-as-NCHW", (4, 3, 5, 7), 1, (0, 2, 3, 1)),
    Case("NCHW-as-NHWC", (4, 5, 7, 3), 3, (0, 3, 1, 2)),
    Case("NCL", (4, 3, 9)),
    Case("NLC", (4, 9, 3), 2),
    Case("NCDHW", (2, 3, 2, 3, 4)),
    Case("NDHWC", (2, 2, 3, 4, 3), 4),
    Case("ND", (8, 5)),
    Case("ND-fortran", (8, 5), 1, (1, 0)),
    Case("CN", (5, 8), 0),
    Case("CHWN", (3, 4, 2, 5), 0),
    Case("all-of-1d", (11,), ()),
    Case("all-of-3d", (3, 4, 5), ()),
    Case("all-permuted", (3, 4, 5), (), (2, 0, 1)),
    Case("rank6", (2, 3, 2, 3, 2, 2), 3),
    Case("rank6-tuple", (2, 3, 2, 3, 2, 2), (-1, 1, 3)),
    Case("adjacent", (4, 3, 5, 2), (1, 2)),
    Case("apart", (4, 3, 5, 2), (1, 3)),
    Case("apart-permuted", (4, 3, 5, 2), (1, 3), (0, 2, 1, 3)),
    Case("outermost", (3, 2, 6), (0, 1)),
    Case("swapped", (4, 3, 5, 2), (1, 2), (0, 2, 1, 3)),
    Case("around", (4, 3, 5, 2), (0, 3)),
    Case("one-sample", (1, 3, 4, 4)),
    Case("one-channel", (6, 1, 5)),
    Case("size-1-axes", (1, 5, 1, 3, 1), 1),
    Case("two-values", (2, 4)),
    Case("long-runs", (3, 2, RUN + 1)),
]

# Around vector widths and the constants that cut an array into tiles: below the size where calls go parallel.
EDGES = [
    *(Case("inner", (5, 3, n)) for n in (1, 2, 8, 15, 16, 17, RUN - 1, RUN, RUN + 1, 49, 127, 128, 129)),
    # Groups of short runs: whole ones, one that is not full, one channel too many for the cache.
    *(Case("group", (n, 65, 49)) for n in (1, 3)),
    Case("group-narrow", (150, 11, 100)),
    Case("group-ends", (2, 9, AHEAD // 4)),
    *(Case("columns", (37, n)) for n in (1, 3, 7, 8, 9, 16, 17, 65, 257)),
    *(Case("fold", (n, 3)) for n in (85, 86, 301, 1021)),
    *(Case("fold", (53, n)) for n in (FOLD - 1, FOLD, FOLD + 1)),
    *(Case("strip", (9, n)) for n in (STRIP - 1, STRIP, STRIP + 1, 2 * STRIP + 1)),
    *(Case("short-runs", (n, 65, 25)) for n in (1, 6)),
    Case("short-runs-folded", (301, 2, 9)),
    *(Case("segment", (2, 2, n)) for n in (SEGMENT - 1, SEGMENT, SEGMENT + 1)),
    Case("segment-fused", (1, 3, 2 * SEGMENT + 1)),
    Case("all", (3 * SEGMENT + 1,), ()),
    Case("one-wide", (1, 257, 130)),
]

# Large enough to run parallel: both kernels, fused and split.
BIG = [
    Case("runs-fused", (4, 16, 40, 40)),
    Case("runs-fused-odd", (3, 65, 391)),
    Case("runs-grouped", (32, 70, 49)),
    Case("runs-grouped-even", (16, 64, 14, 14)),
    Case("runs-split", (8, 3, 64, 64)),
    Case("runs-split-long", (1, 2, 5 * SEGMENT + 3)),
    Case("runs-split-short", (300, 2, 129)),
    Case("all-split", (333, 333), ()),
    Case("rows-fused", (256, 300)),
    Case("rows-fused-inner", (40, 257, 9)),
    Case("rows-split", (8, 40, 41, 16), -1),
    Case("rows-split-view", (8, 16, 40, 41), 1, (0, 2, 3, 1)),
    Case("rows-split-3", (4, 97, 97, 3), -1),
    Case("rows-split-1", (70001, 1)),
    Case("rows-split-inner", (1031, 5, 25)),
    Case("rows-split-strips", (600, 2 * STRIP + 5)),
]

CASES = SMALL + EDGES + BIG


class Marked(np.ndarray):
    """A subclass that adds nothing."""


def _spaced(x, steps):
    big = np.full([n * abs(s) + 1 for n, s in zip(x.shape, steps, strict=True)], 99, x.dtype)
    view = big[tuple(slice(None, None, s) for s in steps)][tuple(slice(n) for n in x.shape)]
    view[...] = x
    return view


def _unaligned(x):
    view = np.ndarray(x.shape, x.dtype, bytearray(x.nbytes + 1), offset=1)
    view[...] = x
    return view


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


# Each gives the values of x in awkward memory.
VIEWS = {
    "read-only": _read_only,
    "fortran": np.asfortranarray,
    "channels-last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
    "samples-last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0),
    "stepped": lambda x: _spaced(x, (2,) * x.ndim),
    "stepped-outer": lambda x: _spaced(x, (3,) + (1,) * (x.ndim - 1)),
    "negative": lambda x: _spaced(x, (-1,) * x.ndim),
    "negative-inner": lambda x: _spaced(x, (1,) * (x.ndim - 1) + (-1,)),
    "negative-stepped-channels": lambda x: _spaced(x, (1, -2) + (1,) * (x.ndim - 2)),
    "flipped": lambda x: np.ascontiguousarray(np.flip(x)).reshape(x.shape)[(slice(None, None, -1),) * x.ndim],
    "unaligned": _unaligned,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "subclass": lambda x: x.copy().view(Marked),
    "broadcast-samples": lambda x: np.broadcast_to(x[:1], x.shape),
    "broadcast-channels": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "broadcast-inner": lambda x: np.broadcast_to(x[..., :1], x.shape),
}
