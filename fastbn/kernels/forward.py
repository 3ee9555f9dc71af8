"""Statistics and normalization over the tiles: one kernel for long inner runs, one for short ones.

    y = (x - mean) / sqrt(var + eps) * gamma + beta            Ioffe & Szegedy 2015, Algorithm 1

Each kernel has two switches, `measure` (statistics come from x and go to `stats`) and `write` (y is written): both is a
training forward, the first alone the moments, the second alone inference. `stats` holds the rows mean and m2, with
var = m2 / count; `params` the rows gamma and beta.

Memory traffic: fused tiles read x once and write y once. Split tiles read x twice, the second time from the end, where
the cache still holds what was read last.
"""

import numpy as np

from .._jit import exact, kernel, prange
from .leaves import (
    affine,
    block_sums,
    channel_sums,
    inverse_std,
    normalize_channel_ahead,
    normalize_row,
    normalize_run,
    run_sums,
    settle,
)

FUSED, SUMS, WRITE = 0, 1, 2  # what a parallel region does with each of its tiles

# Typed: for a literal in their place Numba would compile the called function once more.
ZERO, ONE = np.intp(0), np.intp(1)

PIVOT_RUN = 256  # elements of a long run whose mean is the pivot
PIVOT_ROWS = 16  # values of a channel, taken from the first rows, for the same


# ------------------------------------------------------------------------------------------------ parts of both kernels


@exact
def channel_coefficients(stats, params, eps, count, first, coefficients):
    """`affine` for the channels from `first` on: coefficients (3, channels)."""
    for i in range(coefficients.shape[1]):
        c = first + i
        affine(stats[0, c], inverse_std(stats[1, c] / count, eps), params[0, c], params[1, c], coefficients, i)


# ------------------------------------------------------------------------------------------------------------ long runs


@exact
def run_pivot(run):
    """The mean of a run, accurate for any offset: its first value plus the mean distance from it."""
    first = np.float64(run[0])
    s, _ = run_sums(run, first)
    return first + s / run.size


@exact
def fused_channels(first, last, x, y, stats, params, eps, count, write, outer, channels, inner):
    """Consecutive channels: y of each is written while the next one is summed, and while it is still in the cache."""
    stride = channels * inner
    part = np.empty((1, 2, 1))
    pivot = np.empty(1)
    k = np.empty((3, 1), y.dtype)
    for c in range(first - 1, last if write else last - 1):
        here = c >= first and write
        ahead = min(c + 1, last - 1)  # the last channel is summed in vain: the same loop writes it
        i, j = c * inner, ahead * inner
        if here:
            channel_coefficients(stats, params, eps, count, c, k)
        if ahead > c:
            pivot[0] = run_pivot(x[j : j + min(PIVOT_RUN, inner)])
        if here:
            part[0, 0, 0], part[0, 1, 0] = normalize_channel_ahead(
                x, y, i, j, outer, stride, inner, k[0, 0], k[1, 0], k[2, 0], pivot[0]
            )
        else:
            part[0, 0, 0], part[0, 1, 0] = channel_sums(x, j, outer, stride, inner, pivot[0])
        if ahead > c and not settle(part, pivot, count, stats, ahead, False):
            part[0, 0, 0], part[0, 1, 0] = channel_sums(x, j, outer, stride, inner, pivot[0])
            settle(part, pivot, count, stats, ahead, True)


@exact
def segments_tile(phase, t, x, y, part, pivot, coefficients, channels, inner, segment, per_tile):
    """A few consecutive segments of runs: their partial sums, or their y."""
    per_run = -(-inner // segment)
    for i in range(t * per_tile, min((t + 1) * per_tile, x.size // inner * per_run)):
        run, k = i // per_run, i % per_run
        n, c = run // channels, run % channels
        low = run * inner + k * segment
        high = min(low + segment, (run + 1) * inner)
        if phase == SUMS:
            s, q = run_sums(x[low:high], pivot[c])
            part[n * per_run + k, 0, c] = s
            part[n * per_run + k, 1, c] = q
        else:
            normalize_run(x[low:high], y[low:high], coefficients[0, c], coefficients[1, c], coefficients[2, c])


@kernel
def forward_runs(x, y, stats, params, eps, count, measure, write, sizes):
    """Long inner runs. `sizes` is that of `grid`."""
    outer, channels, inner, segment, fused, per_tile, tiles = sizes
    phase = FUSED if fused else SUMS if measure else WRITE
    pivot = np.empty(channels if phase == SUMS else 0)
    part = np.empty((outer * -(-inner // segment) if phase == SUMS else 0, 2, channels))
    coefficients = np.empty((3, 0 if phase == FUSED else channels), y.dtype)
    if phase == SUMS:
        for c in range(channels):
            pivot[c] = run_pivot(x[c * inner : c * inner + min(PIVOT_RUN, inner)])
    elif phase == WRITE:
        channel_coefficients(stats, params, eps, count, ZERO, coefficients)
    final = False
    while True:
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * per_tile
                last = min(first + per_tile, channels)
                fused_channels(first, last, x, y, stats, params, eps, count, write, outer, channels, inner)
            else:
                segments_tile(
                    phase, np.intp(t) if phase == SUMS else tiles - 1 - np.intp(t), x, y, part, pivot, coefficients,
                    channels, inner, segment, per_tile,
                )  # fmt: skip
        if phase != SUMS:
            break
        if settle(part, pivot, count, stats, ZERO, final):
            if not write:
                break
            channel_coefficients(stats, params, eps, count, ZERO, coefficients)
            phase = WRITE
        final = True


# ----------------------------------------------------------------------------------------------------------- short runs


@exact
def spread(per_channel, inner, per_column):
    """Repeat each channel's value for the `inner` columns of the channel, and all of that until the row is full."""
    j = 0
    while j < per_column.size:
        for c in range(per_channel.size):
            for _ in range(inner):
                per_column[j] = per_channel[c]
                j += 1


@exact
def gather(per_column, inner, per_channel):
    """Add to each channel's value its columns: the inverse of `spread`. A last row may end anywhere."""
    j = 0
    while j < per_column.size:
        for c in range(per_channel.size):
            for _ in range(min(inner, per_column.size - j)):
                per_channel[c] += per_column[j]
                j += 1


@exact
def row_pivots(x, start, outer, stride, inner, pivot, columns):
    """The pivot of each channel of a strip: its mean over the first rows."""
    rows = min(outer, -(-PIVOT_ROWS // inner))
    w = pivot.size * inner
    first = np.empty(pivot.size)
    for c in range(pivot.size):
        first[c] = x[start + c * inner]
        pivot[c] = 0.0
    spread(first, inner, columns[0, :w])
    block_sums(x, start, rows, stride, columns[0, :w], columns[1, :w], columns[2, :w])
    gather(columns[1, :w], inner, pivot)
    for c in range(pivot.size):
        pivot[c] = first[c] + pivot[c] / (rows * inner)


@exact
def strip_sums(x, start, rows, stride, rest, inner, pivot, part, b, first, columns):
    """Set part[b, :, first ...] to the sums of `rows` rows of a strip, and of `rest` elements of one row more."""
    sums = part[b, 0, first : first + pivot.size]
    squares = part[b, 1, first : first + pivot.size]
    for c in range(pivot.size):
        sums[c] = 0.0
        squares[c] = 0.0
    spread(pivot, inner, columns[0])
    block_sums(x, start, rows, stride, columns[0], columns[1], columns[2])
    gather(columns[1], inner, sums)
    gather(columns[2], inner, squares)
    if rest > 0:
        block_sums(x, start + rows * stride, ONE, stride, columns[0, :rest], columns[1, :rest], columns[2, :rest])
        gather(columns[1, :rest], inner, sums)
        gather(columns[2, :rest], inner, squares)


@exact
def strip_write(x, y, start, rows, stride, rest, inner, k):
    """y of a strip, with the coefficients `k` (3, columns)."""
    w = k.shape[1]
    centre, scale, shift = k[0], k[1], k[2]
    for r in range(rows):
        i = start + r * stride
        normalize_row(x[i : i + w], y[i : i + w], centre, scale, shift)
    if rest > 0:
        i = start + rows * stride
        normalize_row(x[i : i + rest], y[i : i + rest], centre[:rest], scale[:rest], shift[:rest])


@exact
def rows_tile(phase, t, x, y, stats, params, eps, count, measure, write, part, pivots, sizes):
    """A block of rows of a strip of channels: its partial sums, its y, or all there is to do with it."""
    total, width, channels, inner, block, blocks, panel, panels, _ = sizes
    b, first = t // panels, t % panels * panel
    last = min(first + panel, channels)
    full = total // width
    rows = min(block, full - b * block)
    rest = total - full * width if b == blocks - 1 else 0
    start = b * block * width + first * inner
    w = width if panels == 1 else (last - first) * inner
    columns = np.empty((3, w))
    if phase == SUMS:
        strip_sums(x, start, rows, width, rest, inner, pivots[first:last], part, b, first, columns)
    elif phase == FUSED and measure:
        pivot = np.empty(last - first)
        own = np.empty((1, 2, last - first))
        row_pivots(x, start, rows, width, inner, pivot, columns)
        for attempt in range(2):
            strip_sums(x, start, rows, width, rest, inner, pivot, own, ZERO, ZERO, columns)
            if settle(own, pivot, count, stats, first, attempt == 1):
                break
    if phase == WRITE or (phase == FUSED and write):
        k = np.empty((3, last - first), y.dtype)
        spread_k = np.empty((3, w), y.dtype)
        channel_coefficients(stats, params, eps, count, first, k)
        for i in range(3):
            spread(k[i], inner, spread_k[i])
        strip_write(x, y, start, rows, width, rest, inner, spread_k)


@kernel
def forward_rows(x, y, stats, params, eps, count, measure, write, sizes):
    """Short inner runs. `sizes` is that of `grid`."""
    total, _, channels, inner, _, blocks, _, panels, fused = sizes
    phase = FUSED if fused else SUMS if measure else WRITE
    pivot = np.empty(channels)
    part = np.empty((blocks if phase == SUMS else 0, 2, channels))
    tiles = blocks * panels
    if phase == SUMS:
        columns = np.empty((3, channels * inner))
        row_pivots(x, ZERO, total // (channels * inner), channels * inner, inner, pivot, columns)
    final = False
    while True:
        for t in prange(tiles):
            rows_tile(
                phase, tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t), x, y, stats, params, eps, count,
                measure, write, part, pivot, sizes,
            )  # fmt: skip
        if phase != SUMS:
            break
        if settle(part, pivot, count, stats, ZERO, final):
            if not write:
                break
            phase = WRITE
        final = True
