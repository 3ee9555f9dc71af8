"""How the canonical view (outer, channel, inner) is cut into tiles.

The shape alone decides which numbers are summed together, so that bits never depend on threads; how many whole channels
a thread takes at once may. Two kinds of kernel serve every layout: the inner run of one sample and channel is

- long: the *runs* kernels reduce along it, one channel or a small group of them at a time (NCHW images);
- short or 1: the *rows* kernels add rows of many channels elementwise (NHWC, (N, D), tiny images), where an inner run
  of 9 is 9 pseudo-channels to be added up.

Either way a tile is *fused* (it holds all values of its channels: statistics, then normalization while it is still in
the cache; the tensor is read from memory once) or *split* (statistics of all tiles first, then a second pass).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RUN = 32
"""An inner run of at least this many elements is reduced along itself.

At 6 x 6 (36) that takes 0.85 of the time of rows, at 5 x 5 the same, at 4 x 4 1.2 times theirs.
"""

FEW, FEW_RUN = 8, 8
"""With fewer samples than that a run of this length is: so few rows do not repay the setting up of their columns."""

FUSED_RUNS_BYTES = 1 << 21
"""The largest slab (all values of one channel) that is expected to stay in the cache between two passes."""

FUSED_ROWS_BYTES = 1 << 19
"""The same for a strip of columns, whose rows lie apart in memory."""

FUSED_ROWS = 1 << 9
"""The most rows of a fused strip. More in so few bytes are narrow ones, and up to twelve times as fast if folded."""

SEGMENT = 1 << 13
"""Elements of a run that are a piece of work of their own in a split tile."""

TERMS = 32
"""The numbers that are added up one after another; their sum is then a term of another sum.

Terms that all round the same way, as rounded data do after an outlier, cost TERMS / 2 roundings, 1.8e-15 of a sum of
positive ones, at each of these levels: two or three. With 512 terms the variance had 13 digits, with 64 nearly 14.
"""

AHEAD = 768
"""Elements by which memory is asked for before it is needed: 3 kB of float32.

A processor's own guess of what comes next ends with a page, 4 kB. With 512 or 1024 the training forward and the
backward take as long, with 1536 the backward takes a tenth longer.
"""

GROUP_BYTES = 1 << 18
"""The largest group of channels, in bytes of all samples.

Short runs are taken in groups: as many channels as give a sample AHEAD elements side by side, fewer if that is more.
"""

TILE_BYTES = 1 << 16
"""Bytes that one split tile covers, at least."""

TILES = 128
"""The most blocks of rows (in each strip of columns), or of segments, that a split pass is cut into.

Their number is a power of two, and they are of one size, to within one row or segment.
"""

STRIP = 1024
"""Columns of a strip: three float64 accumulators of this length fit the first-level cache."""

FOLD = 512
"""Rows shorter than this are folded, several into one long row."""

WORD = 16
"""Bits of a word, one for each lane."""


class Grid(NamedTuple):
    """The tiles of one array: `runs` names the kernel, `sizes` is what the kernel unpacks.

    `sizes` is an array because that is the cheapest type to hand to Numba:

    runs: outer, channels, inner, channels per group (0: split), tiles
    rows: elements, columns of a folded row, channels, inner, blocks of rows, channels per strip, strips, fused tiles

    `words` of sixteen bits hold a bit for each element: a run, or a row of a strip, starts with a new one.
    """

    runs: bool
    fused: bool
    tiles: int
    sizes: npt.NDArray[np.int64]
    words: int

    @property
    def kind(self) -> tuple[bool | None, bool | None]:
        """What the kernels take as `fused` and `split`: True and None, or the reverse."""
        return (True, None) if self.fused else (None, True)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _words_of_rows(total: int, width: int, columns: int, panels: int) -> int:
    """Those of rows of `width` in strips of so many columns."""
    return _ceil(total, width) * panels * _ceil(width if panels == 1 else columns, WORD)


def _reduces_runs(outer: int, inner: int) -> bool:
    return inner >= RUN or (outer < FEW and inner >= FEW_RUN)


def _even(most: int) -> int:
    """The largest power of two that is not above `most` or TILES; at least 1."""
    return int(1 << min(max(most, 1), TILES).bit_length() - 1)


def fused_grid(outer: int, channels: int, inner: int, itemsize: int, threads: int) -> Grid | None:
    """Tiles that hold whole channels, or None where they would not stay in the cache or be too few."""
    if _reduces_runs(outer, inner):
        if outer * inner * itemsize > FUSED_RUNS_BYTES or channels < min(8, outer * _ceil(inner, SEGMENT)):
            return None
        group = min(_ceil(AHEAD, inner), channels, max(1, GROUP_BYTES // (outer * inner * itemsize)))
        # Neighbours are pipelined: the fewer tiles the better, and Numba deals them out before they run.
        tiles = min(_ceil(channels, group), threads)
        sizes = np.array([outer, channels, inner, group, tiles], np.int64)
        return Grid(True, True, tiles, sizes, outer * channels * _ceil(inner, WORD))
    # At least 256 columns, 1 kB of float32 in each row; else an eighth of the columns, but no more than STRIP.
    width = min(STRIP, max(256, _ceil(channels * inner, 8)))
    panel = min(channels, max(1, width // inner))
    if outer > FUSED_ROWS or outer * panel * inner * itemsize > FUSED_ROWS_BYTES:
        return None
    panels = _ceil(channels, panel)
    tiles = min(panels, threads)
    total, row = outer * channels * inner, channels * inner
    sizes = np.array([total, row, channels, inner, 1, panel, panels, tiles], np.int64)
    return Grid(False, True, tiles, sizes, _words_of_rows(total, row, panel * inner, panels))


def split_grid(outer: int, channels: int, inner: int, itemsize: int) -> Grid:
    """Tiles of one size, for statistics and normalization in two passes, or for inference."""
    if _reduces_runs(outer, inner):
        segments = outer * channels * _ceil(inner, SEGMENT)
        tiles = _even(min(segments, outer * channels * inner * itemsize // TILE_BYTES))
        sizes = np.array([outer, channels, inner, 0, tiles], np.int64)
        return Grid(True, False, tiles, sizes, outer * channels * _ceil(inner, WORD))
    row = channels * inner
    fold = max(1, FOLD // row)
    fold = min(fold // 8 * 8 or fold, outer)  # whole vectors where rows are very short
    panel = channels if row <= 2 * STRIP else max(1, STRIP // inner)
    panels = _ceil(channels, panel)
    rows = _ceil(outer, fold)
    width = row * fold
    # A partial result takes 32 bytes per column and block: at least 64 rows keep that small beside the block itself.
    columns = min(width, panel * inner * fold)
    blocks = _even(min(rows // 64, rows * columns * itemsize // TILE_BYTES))
    total = outer * row
    sizes = np.array([total, width, channels, inner, blocks, panel, panels, 0], np.int64)
    return Grid(False, False, blocks * panels, sizes, _words_of_rows(total, width, panel * inner, panels))
