"""How arrays are cut into tiles: each rule of `kernels.grid` at both sides of its bound."""

import numpy as np
import pytest

from fastbn.kernels.grid import (
    AHEAD,
    FEW,
    FEW_RUN,
    FOLD,
    FUSED_ROWS,
    FUSED_ROWS_BYTES,
    FUSED_RUNS_BYTES,
    GROUP_BYTES,
    RUN,
    SEGMENT,
    STRIP,
    TILE_BYTES,
    TILES,
    fused_grid,
    split_grid,
)


def test_the_constants():
    """As the docstrings have them: with others the figures of the documentation would be those of another program."""
    assert (RUN, FEW, FEW_RUN, AHEAD, FOLD, STRIP, SEGMENT) == (32, 8, 8, 768, 512, 1024, 8192)
    assert (FUSED_RUNS_BYTES, FUSED_ROWS_BYTES, FUSED_ROWS) == (2 << 20, 512 << 10, 512)
    assert (GROUP_BYTES, TILE_BYTES, TILES) == (256 << 10, 64 << 10, 128)


@pytest.mark.parametrize(
    ("outer", "inner", "runs"),
    [(8, 31, False), (8, 32, True), (100, 31, False), (100, 32, True), (7, 8, True), (7, 7, False), (8, 8, False),
     (1, 8, True), (1, 7, False), (8, 1, False), (1, 1, False), (1, 10_000, True)],
)  # fmt: skip
def test_runs_or_rows(outer, inner, runs):
    assert split_grid(outer, 300, inner, 4).runs is runs
    assert fused_grid(outer, 300, inner, 4, 2).runs is runs


FUSED_RUNS = [
    # outer, channels, inner, itemsize, threads -> group, tiles; None where they are split
    ((32, 64, 56 * 56, 4, 2), (1, 2)),  # a channel of 401 kB
    ((32, 64, 56 * 56, 4, 100), (1, 64)),  # no more tiles than groups
    ((32, 64, 56 * 56, 4, 1), (1, 1)),
    ((32, 512, 49, 4, 2), (16, 2)),  # 16 runs of 49 are 784 elements, 100 kB of all samples
    ((32, 512, 49, 8, 2), (16, 2)),
    ((32, 512, 768, 4, 2), (1, 2)),
    ((32, 512, 767, 4, 2), (2, 2)),  # 196,352 bytes
    ((32, 5, 384, 4, 3), (None, None)),  # of so few channels threads would share too little
    ((32, 8, 384, 4, 3), (2, 3)),
    ((64, 100, 500, 4, 2), (2, 2)),  # two channels have 256,000 bytes, of 262,144
    ((65, 100, 504, 4, 2), (2, 2)),  # 262,080
    ((65, 100, 505, 4, 2), (1, 2)),  # 262,600
    ((1, 10, 32, 4, 3), (10, 1)),  # no larger than all channels
    ((1, 24, 32, 4, 8), (24, 1)),
    ((1, 25, 32, 4, 8), (24, 2)),
    ((1, 1, 100, 4, 2), (1, 1)),  # one run of one segment: nothing to share
    ((1, 1, SEGMENT, 4, 2), (1, 1)),
    ((1, 1, SEGMENT + 1, 4, 2), (None, None)),
    ((1, 2, SEGMENT + 1, 4, 2), (1, 2)),
    ((3, 2, 100, 4, 2), (None, None)),
    ((3, 3, 100, 4, 2), (3, 1)),
    ((9, 7, 100, 4, 2), (None, None)),
    ((9, 8, 100, 4, 2), (8, 1)),
    ((64, 9, 8192, 4, 2), (1, 2)),  # 2 MB
    ((64, 9, 8193, 4, 2), (None, None)),
    ((64, 9, 4096, 8, 2), (1, 2)),
    ((64, 9, 4097, 8, 2), (None, None)),
]


@pytest.mark.parametrize(("array", "expected"), FUSED_RUNS)
def test_fused_runs(array, expected):
    outer, channels, inner, itemsize, threads = array
    grid = fused_grid(outer, channels, inner, itemsize, threads)
    if expected == (None, None):
        assert grid is None
        return
    group, tiles = expected
    assert (grid.runs, grid.kind, grid.tiles) == (True, (True, None), tiles)
    assert grid.sizes.tolist() == [outer, channels, inner, group, tiles]
    assert grid.sizes.dtype == np.int64


FUSED_ROWS_CASES = [
    # outer, channels, inner, itemsize -> channels of a strip, strips
    ((100, 64, 1, 4), (64, 1)),
    ((100, 256, 1, 4), (256, 1)),
    ((100, 257, 1, 4), (256, 2)),
    ((100, 2048, 1, 4), (256, 8)),
    ((100, 2049, 1, 4), (257, 8)),  # an eighth of the columns
    ((100, 8191, 1, 4), (1024, 8)),
    ((100, 10_000, 1, 4), (1024, 10)),  # no more than STRIP
    ((100, 1000, 25, 4), (40, 25)),  # 1,024 columns are 40 channels of 25
    ((100, 100, 9, 4), (28, 4)),  # 256 columns are 28 of 9
    ((100, 2, 31, 4), (2, 1)),
    ((512, 256, 1, 4), (256, 1)),  # 512 rows of 1 kB
    ((513, 200, 1, 4), None),  # one row too many
    ((512, 300, 1, 8), None),  # 1 MB
    ((256, 300, 1, 8), (256, 2)),
    ((257, 300, 1, 8), None),  # 526,336 bytes
    ((512, 255, 1, 8), None),
    ((128, 8192, 1, 4), (1024, 8)),
    ((129, 8192, 1, 4), None),
]


@pytest.mark.parametrize(("array", "expected"), FUSED_ROWS_CASES)
def test_fused_rows(array, expected):
    outer, channels, inner, itemsize = array
    for threads in (1, 2, 64):  # they share the strips, which are the same
        grid = fused_grid(outer, channels, inner, itemsize, threads)
        if expected is None:
            assert grid is None
            continue
        panel, panels = expected
        tiles = min(panels, threads)
        assert (grid.runs, grid.kind, grid.tiles) == (False, (True, None), tiles)
        row = channels * inner
        assert grid.sizes.tolist() == [outer * row, row, channels, inner, 1, panel, panels, tiles]
        assert grid.sizes.dtype == np.int64


SPLIT_RUNS = [
    # outer, channels, inner, itemsize -> tiles, a power of two
    ((1, 1, 100, 4), 1),
    ((1, 1, 16_384, 4), 1),  # 64 kB
    ((1, 1, 32_767, 4), 1),
    ((1, 1, 32_768, 4), 2),
    ((1, 1, 32_768, 8), 4),
    ((1, 1, 65_535, 4), 2),
    ((1, 1, 65_536, 4), 4),
    ((1, 3, 21_844, 4), 2),  # 262,128 bytes: three times 64 kB
    ((1, 3, 21_846, 4), 4),
    ((2, 1, 8192, 400), 2),  # no more than there are segments
    ((2, 1, 8193, 400), 4),
    ((32, 64, 56 * 56, 4), 128),  # no more than TILES
]


@pytest.mark.parametrize(("array", "tiles"), SPLIT_RUNS)
def test_split_runs(array, tiles):
    outer, channels, inner, _ = array
    grid = split_grid(*array)
    assert (grid.runs, grid.kind, grid.tiles) == (True, (None, True), tiles)
    assert grid.sizes.tolist() == [outer, channels, inner, 0, tiles]
    assert grid.sizes.dtype == np.int64


SPLIT_ROWS = [
    # outer, channels, inner, itemsize -> rows folded into one, channels of a strip, blocks of rows
    ((100_000, 64, 1, 4), (8, 64, 128)),
    ((100_000, 3, 1, 4), (168, 3, 8)),  # 170 rows of 3 are 510 columns: 168 rows are whole vectors
    ((100_000, 1, 1, 4), (512, 1, 2)),
    ((100_000, 100, 1, 4), (5, 100, 128)),  # fewer than eight are taken as they are
    ((100_000, 256, 1, 4), (2, 256, 128)),
    ((100_000, 257, 1, 4), (1, 257, 128)),
    ((3, 64, 1, 4), (3, 64, 1)),  # no more than there are
    ((100_000, 2048, 1, 4), (1, 2048, 128)),  # one strip up to twice its width
    ((100_000, 2049, 1, 4), (1, 1024, 128)),
    ((100_000, 700, 3, 4), (1, 341, 128)),
    ((100_000, 10, 7, 4), (7, 10, 128)),
    ((127, 1000, 1, 4), (1, 1000, 1)),  # 64 rows at least in a block
    ((128, 1000, 1, 4), (1, 1000, 2)),
    ((255, 1000, 1, 4), (1, 1000, 2)),
    ((256, 1000, 1, 4), (1, 1000, 4)),
    ((1000, 20, 1, 4), (24, 20, 1)),  # 42 folded rows
    ((8 * 64, 64, 1, 4), (8, 64, 1)),
    ((8 * 128, 64, 1, 4), (8, 64, 2)),
    ((8 * 128 - 8, 64, 1, 8), (8, 64, 1)),
    ((257, 120, 1, 4), (4, 120, 1)),  # 124,800 bytes
    ((520, 120, 1, 4), (4, 120, 2)),
    ((100_000, 8, 31, 4), (2, 8, 128)),
]


@pytest.mark.parametrize(("array", "expected"), SPLIT_ROWS)
def test_split_rows(array, expected):
    outer, channels, inner, _ = array
    fold, panel, blocks = expected
    grid = split_grid(*array)
    panels = -(-channels // panel)
    assert (grid.runs, grid.kind, grid.tiles) == (False, (None, True), blocks * panels)
    row = channels * inner
    assert grid.sizes.tolist() == [outer * row, row * fold, channels, inner, blocks, panel, panels, 0]
    assert grid.sizes.dtype == np.int64
