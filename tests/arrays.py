"""The inputs: a table of cases (shape, channel axis, memory order), their data, and awkward views of an array."""

import functools
import itertools
import math
import mmap
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace

import ml_dtypes  # noqa: F401  np.dtype("bfloat16")
import numpy as np
import reference
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from fastbn._layout import layout
from fastbn._threads import SERIAL_SIZE
from fastbn.kernels.grid import AHEAD, FOLD, RUN, SEGMENT, STRIP

FLOATS = ("float32", "float64")
HALVES = ("float16", "bfloat16")
INTEGERS = ("int8", "uint8", "int32", "bool")
# Which elements have a weight of their own, and its dtype: those of a sample or of a position share one (padding).
WEIGHTS = (
    *("sample bool", "sample float32", "position bool", "position float64", "full bool", "full float64", "full uint8"),
    *("channel float64", "last float64", "one float64", "without bool", "without float64"),
)


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
        p = reference.parameter_dtype(r)
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
            gamma=gamma.astype(p),
            beta=rng.normal(size=self.channels).astype(p),
            mean=(mean + 0.1).astype(p),
            var=(std**2 * 1.1).astype(p),
        )

    def residual(self, rng, dtype):
        """What is added before the activation, in the memory order of x."""
        return self.lay(rng.normal(0.1, 1, self.shape).astype(dtype))

    def weights(self, rng, kind):
        """A `where` of one of the `WEIGHTS`; all channels have weight, but for the first one of "without"."""
        what, dtype = kind.split()
        ranks = range(len(self.shape))
        channel = reference.channel_axes(np.empty(self.shape, bool), self.axis)
        others = [a for a in ranks if a not in channel]
        along = {"sample": others[:1], "position": others, "channel": channel, "last": ranks[-1:], "one": ()}
        w = rng.uniform(0.25, 2, [n if a in along.get(what, ranks) else 1 for a, n in enumerate(self.shape)])
        if what not in ("channel", "last", "one"):
            w[rng.random(w.shape) < 0.3] = 0
            w[tuple(slice(2 if a in others else None) for a in ranks)] = 1.5
            if many := [a for a in others if w.shape[a] > 2]:
                w[tuple(slice(2, 3) if a in many else slice(None) for a in ranks)] = 0
        if what == "without":
            w[tuple(slice(1 if a in channel else None) for a in ranks)] = 0
        w = (np.ceil(w) if np.dtype(dtype).kind in "iu" else w).astype(dtype)
        return self.lay(w) if w.shape == self.shape else w.reshape({"last": -1, "one": ()}.get(what, w.shape))

    def grid(self, dtype):
        """(long runs?, fused?, parallel?) of a training forward."""
        x = self.lay(np.empty(self.shape, dtype))
        whole = layout(x.shape, x.strides, x.itemsize, reference.channel_axes(x, self.axis), 2).measured
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


# --------------------------------------------------------------------------------------------------- awkward arrays


class Marked(np.ndarray):
    """A subclass that adds nothing."""


class ArrayLike:
    """Gives an array where it is asked for one."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class Interface:
    """Describes its memory, and is no array."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


GUARD = 64
"""Bytes before and after an awkward array that belong to nobody."""


def _in(buffer, shift=0):
    """Makes arrays in the middle of a new buffer; `shift` takes them off their alignment."""

    def make(shape, dtype):
        size = math.prod(shape) * np.dtype(dtype).itemsize + 2 * GUARD
        memory = buffer(size)
        memory[:] = bytes([0x5B]) * size if not isinstance(memory, np.ndarray) else 0x5B
        return np.ndarray(shape, dtype, memory, GUARD + shift)

    return make


# What the memory is: each takes a shape and a dtype.
MEMORIES = {
    "array": _in(lambda n: np.empty(n, np.uint8)),
    "unaligned": _in(lambda n: np.empty(n, np.uint8), 1),
    "bytearray": _in(bytearray),
    "anonymous-map": _in(lambda n: mmap.mmap(-1, n)),
}


def _ordered(order):
    """The axes as `order(rank)` lists them, the slowest first."""

    def step(make, shape, dtype):
        axes = order(len(shape))
        return make([shape[a] for a in axes], dtype).transpose(np.argsort(axes))

    return step


def _moved(axis, to):
    def order(rank):
        axes = list(range(rank))
        if axis < rank:
            axes.insert(to % rank, axes.pop(axis))
        return axes

    return _ordered(order)


def _sliced(steps):
    """Slices of a larger array, by the steps that `steps(rank)` lists."""

    def step(make, shape, dtype):
        given = steps(len(shape))
        whole = make([n * abs(s) for n, s in zip(shape, given, strict=True)], dtype)
        return whole[(..., *(slice(None, None, s) for s in given))]

    return step


def _cropped(make, shape, dtype):
    return make([n + 2 for n in shape], dtype)[(..., *(slice(1, -1),) * len(shape))]


def _plane(make, shape, dtype):
    return make([*shape, 2], dtype)[..., 1]


def _swapped_bytes(make, shape, dtype):
    return make(shape, np.dtype(dtype).newbyteorder("S"))


def _field(*before):
    """A field of a record array, behind others of these dtypes."""

    def step(make, shape, dtype):
        fields = [*((f"f{i}", d) for i, d in enumerate(before)), ("value", dtype), ("last", "f8")]
        return make(shape, fields).view(np.recarray).value

    return step


def _real(make, shape, dtype):
    d = np.dtype(dtype)
    return make(shape, np.dtype(f"c{2 * d.itemsize}").newbyteorder(d.byteorder)).real


def _length_1(make, shape, dtype):
    """Where an axis of length 1 leads to is nonsense, and nobody's business."""
    a = make(shape, dtype)
    nonsense = itertools.cycle((10**9 + 7, -3, 0, 1, -(10**6)))
    return as_strided(a, a.shape, [s if n != 1 else next(nonsense) for n, s in zip(a.shape, a.strides, strict=True)])


def _broadcast(*axes):
    """One value for all positions along these axes."""

    def step(make, shape, dtype):
        among = {a % len(shape) for a in axes if a < len(shape)} if shape else ()
        a = make([min(n, 1) if i in among else n for i, n in enumerate(shape)], dtype)
        return as_strided(a, shape, [0 if i in among else s for i, s in enumerate(a.strides)])

    return step


def _windows(make, shape, dtype):
    """Overlapping windows along the last axis."""
    if len(shape) < 2 or not math.prod(shape):
        return make(shape, dtype)
    a = make([*shape[:-2], shape[-2] + shape[-1] - 1], dtype)
    return sliding_window_view(a, shape[-1], axis=-1, writeable=True)


# How it is looked at: each takes what makes the memory, a shape and a dtype.
STEPS = {
    "fortran": _ordered(lambda rank: range(rank)[::-1]),
    "channels-last": _moved(1, -1),
    "channels-first": _moved(1, 0),
    "samples-last": _moved(0, -1),
    "stepped": _sliced(lambda rank: (2,) * rank),
    "stepped-outer": _sliced(lambda rank: (3, *(1,) * (rank - 1))[:rank]),
    "stepped-inner": _sliced(lambda rank: (*(1,) * (rank - 1), 2)[-rank:] if rank else ()),
    "negative": _sliced(lambda rank: (-1,) * rank),
    "negative-inner": _sliced(lambda rank: (*(1,) * (rank - 1), -1)[-rank:] if rank else ()),
    "negative-stepped-channels": _sliced(lambda rank: (1, -2, *(1,) * (rank - 2))[:rank]),
    "cropped": _cropped,
    "plane": _plane,
    "big-endian": _swapped_bytes,
    "record": _field("i8"),
    "packed-record": _field("i1", "S2"),
    "real-part": _real,
    "length-1": _length_1,
    "broadcast-samples": _broadcast(0),
    "broadcast-channels": _broadcast(1),
    "broadcast-inner": _broadcast(-1),
    "broadcast-all": _broadcast(*range(-32, 32)),
    "windows": _windows,
}
ORDERS = {f"order-{''.join(map(str, o))}": _ordered(lambda _, o=o: o) for o in itertools.permutations(range(4))}


def memory(a):
    """The bytes under an array, those included that are not its own, as one array; of a list none."""
    while True:
        if isinstance(a, (ArrayLike, Interface)):
            a = a.array
        elif isinstance(a, memoryview):
            a = a.obj
        elif getattr(a, "base", None) is not None:
            a = a.base
        else:
            break
    if isinstance(a, (list, float)):
        return np.empty(0, np.uint8)
    return a.ravel("K").view(np.uint8) if isinstance(a, np.ndarray) else np.frombuffer(a, np.uint8)


def _read_only(a):
    a = a.view()
    a.flags.writeable = False
    return a


def _over(kind, a, buffer):
    """The same view of other memory with the same bytes."""
    offset = a.__array_interface__["data"][0] - memory(a).__array_interface__["data"][0]
    return np.ndarray.__new__(kind, a.shape, a.dtype, buffer, offset if a.size else 0, a.strides)


def _on_bytes(a):
    return _over(np.ndarray, a, memory(a).tobytes())


def _on_file(mode):
    def end(a):
        with tempfile.TemporaryFile() as file:
            file.write(memory(a).tobytes())
            file.flush()
            return _over(np.memmap, a, np.memmap(file, np.uint8, mode))

    return end


# What becomes of it in the end: each takes the array, filled.
ENDS = {
    "read-only": _read_only,
    "subclass": lambda a: a.view(Marked),
    "matrix": lambda a: a.view(np.matrix),
    "bytes": _on_bytes,
    "map-read-only": _on_file("r"),
    "map-copy-on-write": _on_file("c"),
    "map-shared": _on_file("r+"),
    "list": lambda a: a.tolist(),
    "list-of-arrays": list,
    "array-like": ArrayLike,
    "interface": Interface,
    "buffer": memoryview,
}
NO_ARRAYS = {"list", "list-of-arrays", "array-like", "interface", "buffer"}


@dataclass(frozen=True)
class View:
    """A way to lay out an array that a program may come up with: memory, how it is looked at, what becomes of it."""

    memory: str = "array"
    steps: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def __str__(self):
        return "+".join((*((self.memory,) if self.memory != "array" else ()), *self.steps, *self.ends)) or "plain"

    def fits(self, shape):
        """Whether it makes a difference, and an array of this shape can be had."""
        names = {*self.steps, *self.ends}
        return (
            (len(shape) == 2 or "matrix" not in names)
            and (math.prod(shape) or not names & {"list", "list-of-arrays"})
            and (shape or "list-of-arrays" not in names)
            and (1 in shape or "length-1" not in names)
            and (len(shape) == 4 or not names & {*ORDERS})
            and not (self.steps[:1] == ("real-part",) and names & {"record", "packed-record"})  # parts of a number
            and not names >= {"matrix", "list-of-arrays"}  # whose rows are matrices again
        )

    def __call__(self, x):
        """The values of x, laid out so; where elements overlap, some of them."""
        make = MEMORIES[self.memory]
        for name in self.steps:
            make = functools.partial((STEPS | ORDERS)[name], make)
        a = make(x.shape, x.dtype)
        a[...] = x
        for name in self.ends:
            a = ENDS[name](a)
        return a


def takes_results(a):
    """Whether it can be an `out`: a writable native array of which no two elements share memory."""
    if not isinstance(a, np.ndarray) or not a.flags.writeable or not a.dtype.isnative:
        return False
    at = sum(i * s for i, s in zip(np.indices(a.shape, sparse=True), a.strides, strict=True)) + np.zeros(a.shape, int)
    return np.unique(at).size == a.size


SINGLE_VIEWS = [
    *(View(m) for m in MEMORIES),
    *(View(steps=(s,)) for s in STEPS | ORDERS),
    *(View(ends=(e,)) for e in ENDS),
]
PAIRED_VIEWS = [
    *(View(m, steps=(s,)) for m in MEMORIES if m != "array" for s in STEPS),
    *(View(m, ends=(e,)) for m in MEMORIES if m != "array" for e in ENDS),
    *(View(steps=pair) for pair in itertools.combinations(STEPS, 2)),
    *(View(steps=(s,), ends=(e,)) for s in STEPS for e in ENDS),
    *(View(ends=pair) for pair in itertools.permutations(ENDS, 2) if pair[0] not in NO_ARRAYS and pair[1] != "bytes"),
]
