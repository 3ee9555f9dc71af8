"""What Hypothesis draws: a `Problem` is an array layout, how to fill it, and the code that is to run on it.

It consists of small numbers and words, so that it shrinks well, and its repr is the line that repeats it. The data come
from its seed.
"""

import functools
import math
import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
import reference
from arrays import FLOATS, Case
from builds import LAYOUTS, built
from hypothesis import given
from hypothesis import strategies as st

from fastbn.kernels.grid import FOLD, RUN, SEGMENT, STRIP

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
"""How much Hypothesis tries: one of those that conftest.py registers."""

EXAMPLES = Counter()
"""How many examples of each property ran to their end."""

MOST = 3 * SEGMENT // 2  # elements, but for the oracle's time

# Sizes around the width of a vector, several of them, and the constants that cut an array into tiles.
EDGES = {
    "tiny": [0, *(n + d for n in (8, 16) for d in (0, 1, -1)), 33, 67, 129, 301],
    "real": [0, *(n + d for n in (16, RUN, 128, FOLD, STRIP, SEGMENT) for d in (0, 1, -1)), SEGMENT + 17],
}

PATHS = {
    "runs fused, one tile", "runs fused, many tiles", "groups", "a smaller last group",
    "runs split, one tile", "runs split, many tiles", "segments",
    "rows fused, one tile", "rows fused, many tiles", "rows fused, strips",
    "rows split, one tile", "rows split, many tiles", "blocks", "rows split, strips",
    "folded", "a last row that is not full", "channels brought together",
}  # fmt: skip
"""The ways through the kernels, in the words of `Problem.path`."""

PARTS = [
    ("float32", False, False, "bool"),
    ("float64", False, False, "float64"),
    ("float32", True, True, None),
    ("float32", True, True, "float64"),
    ("float64", True, True, "bool"),
    ("float16", True, True, "float64"),
    ("bfloat16", True, True, "bool"),
]
"""Dtype, ReLU?, residual?, and the dtype of weights: a few, since each compiles for seconds; test_parts.py has more."""

WEIGHTED = [parts for parts in PARTS if parts[3]]

SEEDS = st.integers(0, 2**32 - 1)


def holds(*strategies):
    """As `given`; it counts the examples."""

    def decorate(test):
        @functools.wraps(test)
        def counted(*args, **kwargs):
            test(*args, **kwargs)
            EXAMPLES[test.__name__] += 1

        return given(*strategies)(counted)

    return decorate


@dataclass(frozen=True)
class Problem(Case):
    """A case with its data and options. `where` is a kind of weights, in the words of `Case.weights`."""

    dtype: str = "float32"
    seed: int = 0
    offset: float = 3.0
    spread: float = 1.0
    eps: float = 1e-5
    scale: bool = True
    center: bool = True
    build: str = "serial"
    threads: int = 1
    tiles: str = "real"
    relu: bool = False
    residual: bool = False
    where: str | None = None

    @functools.cached_property
    def d(self):
        """The data; `affine` is gamma and beta as they are handed over, None where the problem has none."""
        one, two, three = (np.random.default_rng([self.seed, *more]) for more in ((), (1,), (2,)))
        d = self.data(one, self.dtype, self.offset, self.spread)
        d.z = Case.residual(self, two, d.dy.dtype) if self.residual else None
        d.w = self.weights(three, self.where) if self.where else None
        d.affine = (d.gamma if self.scale else None, d.beta if self.center else None)
        if not self.scale:
            d.gamma = np.ones_like(d.gamma)
        if not self.center:
            d.beta = np.zeros_like(d.beta)
        return d

    @property
    def axes(self):
        """The channel axes, ascending."""
        return tuple(sorted(a % len(self.shape) for a in (self.axis if isinstance(self.axis, tuple) else (self.axis,))))

    @property
    def reduced(self):
        """All other axes."""
        return [a for a in range(len(self.shape)) if a not in self.axes]

    @property
    def options(self):
        return {"axis": self.axis, "eps": self.eps}

    @property
    def given(self):
        """The options that an inference has, too."""
        return self.options | {"residual": self.d.z, "activation": "relu" if self.relu else None}

    @property
    def training(self):
        return self.given | {"where": self.d.w}

    def spread_out(self, v):
        """A value per channel, in a shape that broadcasts against x."""
        return reference.spread(v, self.d.x, self.axis)

    def built(self, **changes):
        """Run the code of this problem, or of one that differs from it by `changes`."""
        return built(**{"build": self.build, "threads": self.threads, "tiles": self.tiles} | changes)

    def path(self):
        """What of the kernels a training forward goes through, in words."""
        layouts, x = LAYOUTS[self.tiles], self.lay(np.empty(self.shape, self.dtype))
        lay = layouts.layout(x.shape, x.strides, x.itemsize, self.axes, self.threads)
        name = f"{'runs' if lay.measured.runs else 'rows'} {'fused' if lay.measured.fused else 'split'}"
        words = {name, name + (", many tiles" if lay.measured.tiles > 1 else ", one tile")}
        words |= set() if lay.keeps_order else {"channels brought together"}
        if lay.measured.runs:
            _, channels, inner, group, _ = map(int, lay.measured.sizes)
            words |= {"groups"} if group > 1 else set()
            words |= {"a smaller last group"} if group > 1 and channels % group else set()
            words |= {"segments"} if not group and inner > SEGMENT else set()
        else:
            total, width, channels, inner, blocks, _, panels, fused = map(int, lay.measured.sizes)
            words |= {"folded"} if width > channels * inner else set()
            words |= {"a last row that is not full"} if total % width and not fused else set()
            words |= {"blocks"} if blocks > 1 else set()
            words |= {f"{name}, strips"} if panels > 1 else set()
        return words


@st.composite
def problems(draw, dtypes=FLOATS, offsets=(0.0, 3.0, 100.0, 1e4), parts=None):
    """Any rank from 1 to 5, any channel axes, memory order and tiles; two values per channel at least.

    `parts`: those to choose from, as in `PARTS`; they bring their dtype.
    """
    rank = draw(st.sampled_from([1, 2, 3, 2, 3, 4, 5]))
    number = draw(st.sampled_from([1, 0, 2, 1, 3, 1]))
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=min(number, rank), max_size=min(number, rank), unique=True))
    shape = [draw(st.integers(1, 5)) for _ in range(rank)]
    tiles = draw(st.sampled_from(["tiny", "real"]))
    edge = draw(st.sampled_from(EDGES[tiles]))
    if edge:
        at = draw(st.sampled_from([0, *range(rank)]))
        shape[at] = edge
        for a in range(rank):  # the longest axis alone is enough of them
            if a != at and math.prod(shape) > MOST:
                shape[a] = 1
    if len(axes) == rank:
        axes.pop()
    reduced = [a for a in range(rank) if a not in axes]
    if all(shape[a] == 1 for a in reduced):
        shape[reduced[0]] = 2
    order = draw(st.none() | st.permutations(range(rank)).map(tuple)) if rank > 1 else None
    if draw(st.booleans()):
        axes = [a - rank for a in axes]
    options = draw(st.sampled_from(parts or [(dtype, False, False, None) for dtype in dtypes]))
    dtype, relu, residual, weights = options
    kinds = ["sample", "position", "full", "without"] + (["channel", "last", "one"] if weights != "bool" else [])
    # A parallel region takes milliseconds where others use the processor too; those for integers, a minute to compile.
    builds = ["serial"] * 7 + ["parallel" if dtype in FLOATS and not parts else "serial"]
    return Problem(
        "drawn", tuple(shape), axes[0] if len(axes) == 1 else tuple(axes), order,
        dtype=dtype,
        seed=draw(SEEDS),
        offset=draw(st.sampled_from(offsets)),
        spread=2.0 ** draw(st.sampled_from([0, -6, 6])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0] if weights else [1e-5, 0.0, 1e-3, 1.0])),
        scale=draw(st.booleans()),
        center=draw(st.booleans()),
        build=draw(st.sampled_from(builds)),
        threads=draw(st.integers(1, 8)),
        tiles=tiles,
        relu=relu,
        residual=residual,
        where=f"{draw(st.sampled_from(kinds))} {weights}" if weights else None,
    )  # fmt: skip
