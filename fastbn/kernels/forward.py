"""Statistics and normalization over the tiles: one kernel for long inner runs, one for short ones.

    y = (x - mean) / sqrt(var + eps) * gamma + beta            Ioffe & Szegedy 2015, Algorithm 1

Each kernel has two switches, `measure` (statistics come from x) and `write` (y is written): both is a training forward,
the first alone the moments, the second alone inference. `state` holds the rows mean, m2, gamma and beta, with
var = m2 / count; measuring sets the first two. With given statistics the second row is the variance and count is 1; for
the moments alone the first two rows are enough.

Memory traffic: fused tiles read x once and write y once. Split tiles read x twice, the second time from the end, where
the cache still holds what was read last.
"""

import numpy as np

from .._jit import exact, kernel, prange
from .grid import SEGMENT, TERMS
from .lanes import LANES, apart, compact
from .leaves import (
    add_up,
    affine,
    block_sums,
    few_rows_sums,
    normalize_rows,
    normalize_run,
    run_sums,
    settle,
    sum_group,
)

FUSED, SUMS, WRITE = 0, 1, 2  # what a parallel region does with each of its tiles

# Typed: for a literal in their place Numba would compile the called function once more.
ZERO, ONE = np.intp(0), np.intp(1)
NO = np.bool_(False)

# Numbers between what two tiles write: two cache lines, which no two threads share.
APART = 32

PIVOT_RUN = 256  # elements of a long run whose mean is the pivot
PIVOT_ROWS = 16  # values of a channel, taken from the first rows, for the same


# ------------------------------------------------------------------------------------------------------------ long runs


@exact
def run_pivot(x, i, inner):
    """The mean of the first values of a run, accurate for any offset: one value plus the mean distance from it."""
    compact()
    first = np.float64(x[i])
    size = min(PIVOT_RUN, inner)
    s, _ = run_sums(x, i, i + size, first)
    return first + s / size


@exact
def fused_channels(first, last, x, y, state, eps, count, write, outer, channels, inner, group, room, k):
    """Consecutive channels in groups, pipelined: y of one group is written, from the cache, while the next is summed.

    c = first - group    sums of the group at first
    c = first            y of that group, sums of the one at first + group
    ...
    c = last group       y of that group; its sums are taken once more and dropped, which is less than a second loop

    The same happens before a last group that is smaller, which is then summed by itself.

    A group is one channel, or as many short ones as lie side by side in a few kB. Without y to write, each step is the
    sums of the next group alone. Steps go up and down through the samples in turn: what was summed last, and is most
    surely in the cache, is normalized first.
    """
    compact()
    stride = channels * inner
    pivot, sums, lanes = room[:group], room[group : 5 * group], room[5 * group :]
    for c in range(first - group, last, group):
        now, then = min(group, last - c), min(group, last - c - group)
        up = (c // group) % 2 != 0
        i, j = c * inner, (c + group) * inner
        for n in range(then):
            pivot[n] = run_pivot(x, j + n * inner, inner)
        summed = False
        if write and c >= first:
            summed = then == now
            affine(state, eps, count, c, now, k)
            sum_group(x, y, i, j if summed else i, outer, stride, inner, up, True, k, pivot, now, lanes, sums)
        for attempt in range(2 if then > 0 else 0):
            if attempt == 1 or not summed:
                sum_group(x, y, j, j, outer, stride, inner, up, False, k, pivot, then, lanes, sums)
            if settle(sums, pivot, then, count, state, c + group, attempt == 1):
                break


@exact
def segments_tile(phase, t, x, y, part, pivot, k, channels, inner, tiles):
    """A few consecutive segments of runs: their partial sums, or their y."""
    apart()
    per_run = -(-inner // SEGMENT)
    segments = x.size // inner * per_run
    for i in range(t * segments // tiles, (t + 1) * segments // tiles):
        run, piece = i // per_run, i % per_run
        n, c = run // channels, run % channels
        low = run * inner + piece * SEGMENT
        high = min(low + SEGMENT, (run + 1) * inner)
        if phase == SUMS:
            s, q = run_sums(x, low, high, pivot[c])
            own = 2 * (n * per_run + piece) * channels + c
            part[own] = s
            part[own + channels] = q
        else:
            normalize_run(x, y, low, high, k[c], k[channels + c], k[2 * channels + c])


@kernel
def forward_runs(x, y, state, eps, count, measure, write, sizes):
    """Long inner runs. `sizes` is that of `grid`."""
    outer, channels, inner, group, tiles = sizes
    groups = -(-channels // group) if group > 0 else 0
    phase = FUSED if group > 0 else SUMS if measure else WRITE
    pieces = outer * -(-inner // SEGMENT)
    # A tile allocates nothing: where that failed, Numba would lose the exception, and go on.
    room = np.empty((tiles if phase == FUSED else 0, (5 + 2 * LANES) * group + APART))
    pivot = np.empty(channels if phase == SUMS else 0)
    part = np.empty(pieces * 2 * channels if phase == SUMS else 0)
    k = np.empty(tiles * (3 * group + APART) if phase == FUSED else 3 * channels, y.dtype)
    if phase == SUMS:
        for c in range(channels):
            pivot[c] = run_pivot(x, c * inner, inner)
    elif phase == WRITE:
        affine(state, eps, count, ZERO, channels, k)
    final = False
    while True:
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * groups // tiles * group
                last = min((np.intp(t) + 1) * groups // tiles * group, channels)
                own, k_own = room[np.intp(t)], k[np.intp(t) * (3 * group + APART) :]
                fused_channels(first, last, x, y, state, eps, count, write, outer, channels, inner, group, own, k_own)
            else:
                tile = tiles - 1 - np.intp(t) if phase == WRITE and measure else np.intp(t)  # the second pass goes back
                segments_tile(phase, tile, x, y, part, pivot, k, channels, inner, tiles)
        if phase != SUMS:
            break
        add_up(part, ZERO, pieces, 2 * channels)
        if settle(part, pivot, channels, count, state, ZERO, final):
            if not write:
                break
            affine(state, eps, count, ZERO, channels, k)
            phase = WRITE
        final = True


# ----------------------------------------------------------------------------------------------------------- short runs


@exact
def spread(values, v, number, inner, columns, first, width):
    """Set `width` columns from `first` on: the `number` values from v on, each `inner` times, and so on until full."""
    compact()
    for j in range(first, first + width, number * inner):
        if inner == 1:  # a loop of its own, which becomes vectors
            for c in range(number):
                columns[j + c] = values[v + c]
        else:
            for c in range(number):
                for i in range(inner):
                    columns[j + c * inner + i] = values[v + c]


@exact
def fold_columns(part, blocks, width, number, inner, sums):
    """Set `sums` to s of each channel, then q: those of the columns of all blocks, halves upon halves.

    The inverse of `spread`. part holds rows of `width`: s of the first block, its q, s of the second block ...; it is
    overwritten.
    """
    compact()
    add_up(part, ZERO, blocks, 2 * width)
    for i in range(2):
        add_up(part, i * width, width // (number * inner), number * inner)
        for c in range(number):
            sums[i * number + c] = 0.0
            for j in range(i * width + c * inner, i * width + (c + 1) * inner):
                sums[i * number + c] += part[j]


@exact
def row_pivots(x, start, outer, stride, number, inner, pivot, columns, part, sums):
    """The pivots of `number` channels: their means over the first rows, accurate for any offset.

    `columns`, `part` and `sums` are room for as many numbers as in `fused_strips`.
    """
    compact()
    rows = min(outer, -(-PIVOT_ROWS // inner))
    width = number * inner
    part[: 2 * width] = 0.0
    for c in range(number):
        pivot[c] = x[start + c * inner]
    spread(pivot, ZERO, number, inner, columns, ZERO, width)
    few_rows_sums(x, start, rows, stride, width, columns, ZERO, part, ZERO, width)
    fold_columns(part, ONE, width, number, inner, sums)
    for c in range(number):
        pivot[c] += sums[c] / (rows * inner)


@exact
def fused_strips(t, x, y, state, eps, count, measure, write, sizes, room, k, k_columns):
    """Some strips of a few channels each: all of their statistics, and while they are in the cache, their y."""
    compact()
    total, stride, channels, inner, _, panel, panels, tiles = sizes
    outer, wide = total // stride, panel * inner
    own = t * strip_room(panel, inner)
    pivot, sums, columns = room[own : own + panel], room[own + panel : own + 3 * panel], room[own + 3 * panel :]
    part, more = columns[wide:], columns[3 * wide :]
    k, k_columns = k[t * (3 * panel + APART) :], k_columns[t * (3 * wide + APART) :]
    for first in range(t * panels // tiles * panel, min((t + 1) * panels // tiles * panel, channels), panel):
        start, number = first * inner, min(panel, channels - first)
        width = number * inner
        if measure:
            row_pivots(x, start, outer, stride, number, inner, pivot, columns, part, sums)
            for attempt in range(2):
                part[: 2 * width] = 0.0
                spread(pivot, ZERO, number, inner, columns, ZERO, width)
                block_sums(x, start, outer, stride, width, columns, ZERO, part, ZERO, width, more, ZERO)
                fold_columns(part, ONE, width, number, inner, sums)
                if settle(sums, pivot, number, count, state, first, attempt == 1):
                    break
        if write:
            affine(state, eps, count, first, number, k)
            for i in range(3):
                spread(k, i * number, number, inner, k_columns, i * width, width)
            normalize_rows(x, y, start, outer, stride, width, k_columns, ZERO, width, 2 * width)


@exact
def strip_room(panel, inner):
    """The numbers that a fused tile of rows needs: three for each channel of a strip, five for each column."""
    return 3 * panel + 5 * panel * inner + APART


@exact
def rows_tile(phase, t, x, y, pivot, part, room, k, sizes):
    """A block of rows of a strip: its column sums, or its y. `pivot` and `k` are by column."""
    compact()
    total, width, _, inner, blocks, panel, panels, _ = sizes
    b, p = t // panels, t % panels
    low = p * panel * inner
    high = width if p == panels - 1 else low + panel * inner
    full = total // width
    row, end = b * full // blocks, (b + 1) * full // blocks
    for last in range(2):
        i = end * width if last else row * width + low
        rows = (1 if b == blocks - 1 else 0) if last else end - row
        columns = total - full * width if last else high - low  # the last row may not be full: then it is one strip
        if rows * columns > 0 and phase == SUMS:
            own = 2 * b * width + low
            block_sums(x, i, rows, width, columns, pivot, low, part, own, own + width, room, 2 * (b * width + low))
        elif rows * columns > 0:
            normalize_rows(x, y, i, rows, width, columns, k, low, width + low, 2 * width + low)


@kernel
def forward_rows(x, y, state, eps, count, measure, write, sizes):
    """Short inner runs. `sizes` is that of `grid`."""
    total, width, channels, inner, blocks, panel, panels, fused = sizes
    phase = FUSED if fused > 0 else SUMS if measure else WRITE
    tiles = fused if fused > 0 else blocks * panels
    outer = total // (channels * inner)
    many = total // width // blocks >= TERMS  # rows of a block
    # A tile allocates nothing: where that failed, Numba would lose the exception, and go on.
    room = np.empty(fused * strip_room(panel, inner) if fused > 0 else 2 * blocks * width if measure and many else 0)
    pivot = np.empty(channels if phase == SUMS else 0)
    sums = np.empty(2 * channels if phase == SUMS else 0)
    columns = np.empty(width if phase == SUMS else 0)
    part = np.empty(2 * blocks * width if phase == SUMS else 0)
    k = np.empty(fused * (3 * panel + APART) if fused > 0 else 3 * channels, y.dtype)
    k_columns = np.empty(fused * (3 * panel * inner + APART) if fused > 0 else 3 * width, y.dtype)
    if phase == SUMS:
        row_pivots(x, ZERO, outer, channels * inner, channels, inner, pivot, columns, part, sums)
    final = False
    while True:
        if phase == SUMS:
            part[:] = 0.0
            spread(pivot, ZERO, channels, inner, columns, ZERO, width)
        elif phase == WRITE:
            affine(state, eps, count, ZERO, channels, k)
            for i in range(3):
                spread(k, i * channels, channels, inner, k_columns, i * width, width)
        for t in prange(tiles):
            if phase == FUSED:
                fused_strips(np.intp(t), x, y, state, eps, count, measure, write, sizes, room, k, k_columns)
            else:
                tile = tiles - 1 - np.intp(t) if phase == WRITE and measure else np.intp(t)  # the second pass goes back
                rows_tile(phase, tile, x, y, columns, part, room, k_columns, sizes)
        if phase != SUMS:
            break
        fold_columns(part, blocks, width, channels, inner, sums)
        if settle(sums, pivot, channels, count, state, ZERO, final):
            if not write:
                break
            phase = WRITE
        final = True
