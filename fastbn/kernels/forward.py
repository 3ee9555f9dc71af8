"""Statistics and normalization over the tiles: one kernel for long inner runs, one for short ones.

    y = (x - mean) / sqrt(var + eps) * gamma + beta            Ioffe & Szegedy 2015, Algorithm 1

Each kernel has two switches, `measure` (statistics come from x) and `write` (y is written): both is a training forward,
the first alone the moments, the second alone inference. `state` holds the rows mean, m2, gamma and beta, with
var = m2 / count; measuring sets the first two.

Memory traffic: fused tiles read x once and write y once. Split tiles read x twice, the second time from the end, where
the cache still holds what was read last.
"""

import numpy as np

from .._jit import exact, kernel, prange
from .grid import SEGMENT
from .lanes import LANES
from .leaves import (
    affine,
    block_sums,
    group_sums,
    inverse_std,
    normalize_group_ahead,
    normalize_rows,
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
def channel_coefficients(state, eps, count, first, coefficients):
    """`affine` for the channels from `first` on: coefficients (3, channels)."""
    for i in range(coefficients.shape[1]):
        c = first + i
        affine(state[0, c], inverse_std(state[1, c] / count, eps), state[2, c], state[3, c], coefficients, i)


# ------------------------------------------------------------------------------------------------------------ long runs


@exact
def run_pivot(x, i, inner):
    """The mean of the first values of a run, accurate for any offset: one value plus the mean distance from it."""
    first = np.float64(x[i])
    size = min(PIVOT_RUN, inner)
    s, _ = run_sums(x, i, i + size, first)
    return first + s / size


@exact
def fused_channels(first, last, x, y, state, eps, count, write, outer, channels, inner, group):
    """Consecutive channels in groups, pipelined: y of one group is written, from the cache, while the next is summed.

    g = first - group    sums of the group at first
    g = first            y of that group, sums of the one at first + group
    ...
    g = last group       y of that group (and once more its sums, in vain: it is the same loop)

    A group is one channel, or as many short ones as lie side by side in a few kB. Without y to write, each step is the
    sums of the next group alone. Steps go up and down through the samples in turn: what was summed last, and is most
    surely in the cache, is normalized first.
    """
    stride = channels * inner
    lanes = np.empty(2 * group * LANES)
    part = np.empty((1, 2, group))
    pivots = np.empty(group)
    k = np.empty((3, group), y.dtype)
    for c in range(first - group, last, group):
        now, then = min(group, last - c), min(group, last - c - group)
        up = (c // group) % 2 != 0
        j = (c + group) * inner
        pivot = pivots[:then]
        for i in range(then):
            pivot[i] = run_pivot(x, j + i * inner, inner)
        summed = False
        if write and c >= first:
            summed = then == now
            channel_coefficients(state, eps, count, c, k[:, :now])
            normalize_group_ahead(
                x, y, c * inner, j if summed else c * inner, outer, stride, inner, up, k, pivots[:now], lanes, part[0]
            )
        if then > 0:
            if not summed:
                group_sums(x, j, outer, stride, inner, up, pivot, lanes, part[0])
            if not settle(part, pivot, count, state, c + group, False):
                group_sums(x, j, outer, stride, inner, up, pivot, lanes, part[0])
                settle(part, pivot, count, state, c + group, True)


@exact
def segments_tile(phase, t, x, y, part, pivot, coefficients, channels, inner, tiles):
    """A few consecutive segments of runs: their partial sums, or their y."""
    per_run = -(-inner // SEGMENT)
    segments = x.size // inner * per_run
    for i in range(t * segments // tiles, (t + 1) * segments // tiles):
        run, k = i // per_run, i % per_run
        n, c = run // channels, run % channels
        low = run * inner + k * SEGMENT
        high = min(low + SEGMENT, (run + 1) * inner)
        if phase == SUMS:
            s, q = run_sums(x, low, high, pivot[c])
            part[n * per_run + k, 0, c] = s
            part[n * per_run + k, 1, c] = q
        else:
            normalize_run(x, y, low, high, coefficients[0, c], coefficients[1, c], coefficients[2, c])


@kernel
def forward_runs(x, y, state, eps, count, measure, write, sizes):
    """Long inner runs. `sizes` is that of `grid`."""
    outer, channels, inner, group, tiles = sizes
    fused = group > 0
    groups = -(-channels // group) if fused else 0
    phase = FUSED if fused else SUMS if measure else WRITE
    pivot = np.empty(channels if phase == SUMS else 0)
    part = np.empty((outer * -(-inner // SEGMENT) if phase == SUMS else 0, 2, channels))
    coefficients = np.empty((3, 0 if phase == FUSED else channels), y.dtype)
    if phase == SUMS:
        for c in range(channels):
            pivot[c] = run_pivot(x, c * inner, inner)
    elif phase == WRITE:
        channel_coefficients(state, eps, count, ZERO, coefficients)
    final = False
    while True:
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * groups // tiles * group
                last = min((np.intp(t) + 1) * groups // tiles * group, channels)
                fused_channels(first, last, x, y, state, eps, count, write, outer, channels, inner, group)
            else:
                i = tiles - 1 - np.intp(t) if phase == WRITE and measure else np.intp(t)  # the second pass goes back
                segments_tile(phase, i, x, y, part, pivot, coefficients, channels, inner, tiles)
        if phase != SUMS:
            break
        if settle(part, pivot, count, state, ZERO, final):
            if not write:
                break
            channel_coefficients(state, eps, count, ZERO, coefficients)
            phase = WRITE
        final = True


# ----------------------------------------------------------------------------------------------------------- short runs


@exact
def spread(per_channel, inner, per_column):
    """Repeat each channel's value for the `inner` columns of the channel, and all of that until the row is full."""
    row = per_channel.size * inner
    for j in range(0, per_column.size, row):
        if inner == 1:  # a loop of its own, which becomes vectors
            for c in range(per_channel.size):
                per_column[j + c] = per_channel[c]
        else:
            for c in range(per_channel.size):
                for i in range(inner):
                    per_column[j + c * inner + i] = per_channel[c]


@exact
def gather(per_column, inner, per_channel):
    """Add to each channel's value its columns: the inverse of `spread`."""
    row = per_channel.size * inner
    for j in range(0, per_column.size, row):
        if inner == 1:
            for c in range(per_channel.size):
                per_channel[c] += per_column[j + c]
        else:
            for c in range(per_channel.size):
                for i in range(inner):
                    per_channel[c] += per_column[j + c * inner + i]


@exact
def fold_columns(part, inner, own):
    """Add up the tiles' column sums part (tiles, 2, columns), in that order, and set own (1, 2, channels) to them."""
    column = np.empty(part.shape[2])
    for i in range(2):
        for j in range(column.size):
            column[j] = 0.0
        for t in range(part.shape[0]):
            for j in range(column.size):
                column[j] += part[t, i, j]
        for c in range(own.shape[2]):
            own[0, i, c] = 0.0
        gather(column, inner, own[0, i])


@exact
def row_pivots(x, start, outer, stride, inner, pivot):
    """The pivot of each channel of a strip: its mean over the first rows."""
    rows = min(outer, -(-PIVOT_ROWS // inner))
    first = np.empty(pivot.size)
    own = np.empty((1, 2, pivot.size))
    columns = np.empty(pivot.size * inner)
    part = np.zeros((1, 2, columns.size))
    for c in range(pivot.size):
        first[c] = x[start + c * inner]
    spread(first, inner, columns)
    block_sums(x, start, rows, stride, columns, part[0, 0], part[0, 1])
    fold_columns(part, inner, own)
    for c in range(pivot.size):
        pivot[c] = first[c] + own[0, 0, c] / (rows * inner)


@exact
def fused_strip(first, last, x, y, state, eps, count, measure, write, outer, stride, inner):
    """All of a few channels: their statistics, and while they are in the cache, their y."""
    start = first * inner
    w = (last - first) * inner
    if measure:
        pivot = np.empty(last - first)
        own = np.empty((1, 2, last - first))
        columns = np.empty(w)
        row_pivots(x, start, outer, stride, inner, pivot)
        for attempt in range(2):
            part = np.zeros((1, 2, w))
            spread(pivot, inner, columns)
            block_sums(x, start, outer, stride, columns, part[0, 0], part[0, 1])
            fold_columns(part, inner, own)
            if settle(own, pivot, count, state, first, attempt == 1):
                break
    if write:
        k = np.empty((3, last - first), y.dtype)
        by_column = np.empty((3, w), y.dtype)
        channel_coefficients(state, eps, count, first, k)
        for i in range(3):
            spread(k[i], inner, by_column[i])
        normalize_rows(x, y, start, outer, stride, by_column[0], by_column[1], by_column[2])


@exact
def rows_tile(phase, t, x, y, pivot, part, k, sizes):
    """A block of rows of a strip: its column sums, or its y. `pivot` and `k` (3) are by column."""
    total, width, _, inner, blocks, panel, panels, _ = sizes
    b, p = t // panels, t % panels
    low = p * panel * inner
    high = width if p == panels - 1 else low + panel * inner
    full = total // width
    row = b * full // blocks
    rows = (b + 1) * full // blocks - row
    rest = total - full * width if b == blocks - 1 else 0  # elements of a last row that is not full
    start = row * width + low
    end = start + rows * width
    if phase == SUMS:
        block_sums(x, start, rows, width, pivot[low:high], part[b, 0, low:high], part[b, 1, low:high])
        if rest > 0:
            block_sums(x, end, ONE, width, pivot[:rest], part[b, 0, :rest], part[b, 1, :rest])
    else:
        normalize_rows(x, y, start, rows, width, k[0, low:high], k[1, low:high], k[2, low:high])
        if rest > 0:
            normalize_rows(x, y, end, ONE, width, k[0, :rest], k[1, :rest], k[2, :rest])


@kernel
def forward_rows(x, y, state, eps, count, measure, write, sizes):
    """Short inner runs. `sizes` is that of `grid`."""
    total, width, channels, inner, blocks, panel, panels, fused = sizes
    phase = FUSED if fused else SUMS if measure else WRITE
    tiles = blocks * panels
    outer = total // (channels * inner)
    pivot = np.empty(channels)
    own = np.empty((1, 2, channels))
    pivot_columns = np.empty(width if phase == SUMS else 0)
    part = np.zeros((blocks if phase == SUMS else 0, 2, width))
    k = np.empty((3, 0 if phase == FUSED else channels), y.dtype)
    k_columns = np.empty((3, 0 if phase == FUSED else width), y.dtype)
    if phase == SUMS:
        row_pivots(x, ZERO, outer, channels * inner, inner, pivot)
    final = False
    while True:
        if phase == SUMS:
            spread(pivot, inner, pivot_columns)
        elif phase == WRITE:
            channel_coefficients(state, eps, count, ZERO, k)
            for i in range(3):
                spread(k[i], inner, k_columns[i])
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * panel
                last = min(first + panel, channels)
                fused_strip(first, last, x, y, state, eps, count, measure, write, outer, channels * inner, inner)
            else:
                i = tiles - 1 - np.intp(t) if phase == WRITE and measure else np.intp(t)
                rows_tile(phase, i, x, y, pivot_columns, part, k_columns, sizes)
        if phase != SUMS:
            break
        fold_columns(part, inner, own)
        if settle(own, pivot, count, state, ZERO, final):
            if not write:
                break
            phase = WRITE
        else:
            final = True
            for i in range(part.size):
                part.reshape(-1)[i] = 0.0
