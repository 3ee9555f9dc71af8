"""Statistics and normalization over the tiles: one kernel for long inner runs, one for short ones.

    y = relu((x - mean) / sqrt(var + eps) * gamma + beta + z)            Ioffe & Szegedy 2015, Algorithm 1

`state` holds the rows mean, m2, gamma and beta, with var = m2 / count; measuring sets the first two. With given
statistics the second row is the variance and count is 1; for the moments alone the first two rows are enough. `write`
says whether y is written.

What a call has not is None, and compiled as if it did not exist:

measure True: the statistics come from x. None: they are given, as in inference
fused   True: tiles hold whole channels, whose statistics come from x. split: True, where they do not. One of the two is
        None: no call needs both, and either takes long to compile
z       the residual, laid out as y
relu    True: y is rectified. An array of uint16: so it is, and a bit for each element says whether y > 0
w       weights in the statistics, and in `step` their steps in samples, channels and elements of a run; the count is
        then an array, the sum of the weights of each channel
far     x lies in another order than y: its steps in samples, channels and elements of y's runs (y alone)

Memory traffic: fused tiles read x once and write y once. Split tiles read x twice, the second time from the end, where
the cache still holds what was read last. z is read once, with y.
"""

import numpy as np

from .._jit import exact, kernel, prange
from .grid import SEGMENT, TERMS
from .lanes import LANES, apart, compact, element, like, of_channel, row, rows_like
from .leaves import (
    PIECE,
    add_up,
    affine,
    block_sums,
    few_rows_sums,
    normalize_rows,
    normalize_run,
    run_sums,
    run_weights,
    settle,
    sum_group,
    weighted_pivot,
    weighted_pivots,
)

# Typed: for a literal in their place Numba would compile the called function once more.
ZERO, ONE = np.intp(0), np.intp(1)
YES, NO = map(np.bool_, (True, False))

# What a parallel region does with each of its tiles: all of it; or its sums, and in a second region the rest.
FUSED, SUMS, WRITE = np.intp(0), np.intp(1), np.intp(2)

# Numbers between what two tiles write: two cache lines, which no two threads share.
APART = 32

PIVOT_RUN = 256  # elements of a long run whose mean is the pivot
PIVOT_ROWS = 16  # values of a channel, taken from the first rows, for the same, and wherever there are weights


# ------------------------------------------------------------------------------------------------------------ long runs


@exact
def run_pivot(x, c, outer, channels, inner, w, step):
    """The mean of a channel's first values, accurate for any offset: one value plus the mean distance from it."""
    compact()
    if w is not None:
        return weighted_pivot(x, w, step, c, outer, channels, inner, PIVOT_ROWS)
    i = c * inner
    first = element(x, i)
    size = min(PIVOT_RUN, inner)
    s, _ = run_sums(x, i, i + size, first, None)
    return first + s / size


@exact
def fused_channels(first, last, x, y, state, eps, count, write, grid, z, relu, w, step, room, w_room, k):
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
    outer, channels, inner, group, _ = grid
    stride = channels * inner
    pivot, sums, lanes = room[:group], room[group : 5 * group], room[5 * group :]
    for c in range(first - group, last, group):
        now, then = min(group, last - c), min(group, last - c - group)
        up = (c // group) % 2 != 0
        i, j = c * inner, (c + group) * inner
        for n in range(then):
            pivot[n] = run_pivot(x, c + group + n, outer, channels, inner, w, step)
        summed = False
        if write and c >= first:
            summed = then == now
            affine(state, eps, count, c, now, k)
            b = j if summed else i
            sum_group(
                x, y, i, b, outer, stride, inner, up, True, k, z, relu, pivot, now, w, step, w_room, lanes, sums
            )  # fmt: skip
        for attempt in range(2 if then > 0 else 0):
            if attempt == 1 or not summed:
                sum_group(
                    x, y, j, j, outer, stride, inner, up, False, k, z, relu, pivot, then, w, step, w_room, lanes, sums
                )  # fmt: skip
            if settle(sums, pivot, count, state, c + group, then, attempt == 1):
                break


@exact
def segments_tile(measure, phase, t, x, y, pivot, part, k, grid, z, relu, w, step, w_room, far):
    """A few consecutive segments of runs: their partial sums, or their y."""
    apart()
    outer, channels, inner, _, tiles = grid
    per_run = -(-inner // SEGMENT)
    segments = outer * channels * per_run
    for i in range(t * segments // tiles, (t + 1) * segments // tiles):
        run, piece = i // per_run, i % per_run
        if far is not None:  # the same elements of all channels, which lie side by side in x
            run, piece = i // (channels * per_run) * channels + i % channels, i // channels % per_run
        n, c = run // channels, run % channels
        start = piece * SEGMENT
        low = run * inner + start
        high = min(low + SEGMENT, (run + 1) * inner)
        if measure is not None and phase == SUMS:
            run_weights(w, step, n, c, start, high - low, w_room)
            s, q = run_sums(x, low, high, pivot[c], w_room)
            slot = 2 * (n * per_run + piece) * channels + c
            part[slot] = s
            part[slot + channels] = q
        else:
            word = run * -(-inner // LANES) + start // LANES
            at = low
            if far is not None:
                at = n * far[0] + c * far[1] + start * far[2]
            normalize_run(
                x, at, of_channel(far, 2), y, low, high, k[c], k[channels + c], k[2 * channels + c], z, relu, word
            )


@kernel
def forward_runs(x, y, state, eps, count, measure, fused, split, write, sizes, z, relu, w, step, far):
    """Long inner runs. `sizes` is that of `grid`."""
    outer, channels, inner, group, tiles = sizes
    grid = outer, channels, inner, group, tiles
    groups = -(-channels // group) if group > 0 else 0
    phase = FUSED if fused is not None else SUMS if measure is not None else WRITE
    pieces = outer * -(-inner // SEGMENT)
    # A tile allocates nothing: where that failed, Numba would lose the exception, and go on.
    room = np.empty((tiles if phase == FUSED else 0, (5 + 2 * LANES) * group + APART))
    pivot = np.empty(channels if phase == SUMS else 0)
    part = np.empty(pieces * 2 * channels if phase == SUMS else 0)
    k = np.full(tiles * (3 * group + APART) if phase == FUSED else 3 * channels, like(y))
    w_room = rows_like(w, tiles, (PIECE if phase == FUSED else min(SEGMENT, inner)) + LANES)
    if phase == WRITE:
        affine(state, eps, count, ZERO, channels, k)
    elif measure is not None and phase == SUMS:
        for c in range(channels):
            pivot[c] = run_pivot(x, c, outer, channels, inner, w, step)
    final = NO
    while True:
        for t in prange(tiles):
            tile_w = row(w_room, np.intp(t))
            if fused is not None:
                first = np.intp(t) * groups // tiles * group
                last = min((np.intp(t) + 1) * groups // tiles * group, channels)
                own, k_own = room[np.intp(t)], k[np.intp(t) * (3 * group + APART) :]
                fused_channels(
                    first, last, x, y, state, eps, count, write, grid, z, relu, w, step, own, tile_w, k_own
                )  # fmt: skip
            if split is not None:
                tile = tiles - 1 - np.intp(t) if phase == WRITE and measure else np.intp(t)  # the second pass goes back
                segments_tile(measure, phase, tile, x, y, pivot, part, k, grid, z, relu, w, step, tile_w, far)
        if phase != SUMS:
            break
        if split is not None and measure is not None:  # phase says so; this leaves it out of the machine code
            add_up(part, ZERO, pieces, 2 * channels)
            if settle(part, pivot, count, state, ZERO, channels, final):
                if not write:
                    break
                affine(state, eps, count, ZERO, channels, k)
                phase = WRITE
            final = YES


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
def row_pivots(x, first, outer, stride, channels, inner, w, step, pivot, columns, part, sums):
    """The pivots of `channels` channels from `first` on: their means over the first rows, accurate for any offset.

    `columns`, `part` and `sums` are room for as many numbers as in `fused_strips`.
    """
    compact()
    if w is not None:
        all_channels = stride // inner
        weighted_pivots(x, w, step, first, channels, outer, all_channels, inner, PIVOT_ROWS, pivot, sums, columns)
        return
    start, rows = first * inner, min(outer, -(-PIVOT_ROWS // inner))
    width = channels * inner
    part[: 2 * width] = 0.0
    for c in range(channels):
        pivot[c] = element(x, start + c * inner)
    spread(pivot, ZERO, channels, inner, columns, ZERO, width)
    few_rows_sums(x, start, rows, stride, width, columns, ZERO, None, part, ZERO, width)
    fold_columns(part, ONE, width, channels, inner, sums)
    for c in range(channels):
        pivot[c] += sums[c] / (rows * inner)


@exact
def fused_strips(t, x, y, state, eps, count, write, sizes, z, relu, w, step, room, w_room, k, k_columns):
    """Some strips of a few channels each: all of their statistics, and while they are in the cache, their y."""
    compact()
    total, stride, channels, inner, _, panel, panels, tiles = sizes
    outer, wide = total // stride, panel * inner
    own = t * strip_room(panel, inner)
    pivot, sums, columns = room[own : own + panel], room[own + panel : own + 3 * panel], room[own + 3 * panel :]
    part, few = columns[wide:], columns[3 * wide :]  # s and q of all rows; of TERMS of them
    k, k_columns = k[t * (3 * panel + APART) :], k_columns[t * (3 * wide + APART) :]
    words = strip_words(stride, panel, inner, panels)
    for p in range(t * panels // tiles, (t + 1) * panels // tiles):
        first = p * panel
        start, number = first * inner, min(panel, channels - first)
        width = number * inner
        row_pivots(x, first, outer, stride, number, inner, w, step, pivot, columns, part, sums)
        for attempt in range(2):
            part[: 2 * width] = 0.0
            spread(pivot, ZERO, number, inner, columns, ZERO, width)
            block_sums(
                x, start, outer, stride, width, columns, ZERO, w, step, channels, inner, w_room,
                part, ZERO, width, few, ZERO,
            )  # fmt: skip
            fold_columns(part, ONE, width, number, inner, sums)
            if settle(sums, pivot, count, state, first, number, attempt == 1):
                break
        if write:
            affine(state, eps, count, first, number, k)
            for i in range(3):
                spread(k, i * number, number, inner, k_columns, i * width, width)
            normalize_rows(
                x, y, start, outer, stride, width, k_columns, ZERO, width, z, relu, p * words, panels * words
            )


@exact
def strip_room(panel, inner):
    """The numbers that a fused tile of rows needs: pivot, s and q of each channel of a strip, five of each column.

    Those are its pivot, s and q of all rows, and s and q of TERMS of them.
    """
    return 3 * panel + 5 * panel * inner + APART


@exact
def strip_words(width, panel, inner, panels):
    """The words that the bits of one row of a strip need; those of all strips of a row lie side by side."""
    return -(-(width if panels == 1 else panel * inner) // LANES)


@exact
def rows_tile(measure, phase, t, x, y, pivot, part, room, k, sizes, z, relu, w, step, w_room):
    """A block of rows of a strip: its column sums, or its y. `pivot` and `k` are by column."""
    compact()
    total, width, channels, inner, blocks, panel, panels, _ = sizes
    b, p = t // panels, t % panels
    low = p * panel * inner
    high = width if p == panels - 1 else low + panel * inner
    full = total // width
    row, end = b * full // blocks, (b + 1) * full // blocks
    words = strip_words(width, panel, inner, panels)
    for last in range(2):
        r = end if last else row
        i = r * width + low
        rows = (1 if b == blocks - 1 else 0) if last else end - row
        columns = total - full * width if last else high - low  # the last row may not be full: then it is one strip
        if rows * columns == 0:
            continue
        if measure is not None and phase == SUMS:
            slot = 2 * b * width + low
            block_sums(
                x, i, rows, width, columns, pivot, low, w, step, channels, inner, w_room,
                part, slot, slot + width, room, 2 * (b * width + low),
            )  # fmt: skip
        else:
            word = (r * panels + p) * words
            normalize_rows(x, y, i, rows, width, columns, k, low, width, z, relu, word, panels * words)


@kernel
def forward_rows(x, y, state, eps, count, measure, fused, split, write, sizes, z, relu, w, step):
    """Short inner runs. `sizes` is that of `grid`."""
    total, width, channels, inner, blocks, panel, panels, whole = sizes
    phase = FUSED if fused is not None else SUMS if measure is not None else WRITE
    tiles = whole if phase == FUSED else blocks * panels
    outer = total // (channels * inner)
    many = total // width // blocks >= TERMS  # rows of a block
    # A tile allocates nothing: where that failed, Numba would lose the exception, and go on.
    split_room = 2 * blocks * width if phase == SUMS and many else 0
    room = np.empty(tiles * strip_room(panel, inner) if phase == FUSED else split_room)
    pivot = np.empty(channels if phase == SUMS else 0)
    sums = np.empty(2 * channels if phase == SUMS else 0)
    columns = np.empty(width if phase == SUMS else 0)
    part = np.empty(2 * blocks * width if phase == SUMS else 0)
    k = np.full(tiles * (3 * panel + APART) if phase == FUSED else 3 * channels, like(y))
    k_columns = np.full(tiles * (3 * panel * inner + APART) if phase == FUSED else 3 * width, like(y))
    w_room = rows_like(w, tiles, (TERMS * strip_words(width, panel, inner, panels) + 1) * LANES)
    if measure is not None and phase == SUMS:
        row_pivots(x, ZERO, outer, channels * inner, channels, inner, w, step, pivot, columns, part, sums)
    final = NO
    while True:
        if phase == SUMS:
            part[:] = 0.0
            spread(pivot, ZERO, channels, inner, columns, ZERO, width)
        elif phase == WRITE:
            affine(state, eps, count, ZERO, channels, k)
            for i in range(3):
                spread(k, i * channels, channels, inner, k_columns, i * width, width)
        for t in prange(tiles):
            tile_w = row(w_room, np.intp(t))
            if fused is not None:
                fused_strips(
                    np.intp(t), x, y, state, eps, count, write, sizes, z, relu, w, step,
                    room, tile_w, k, k_columns,
                )  # fmt: skip
            if split is not None:
                tile = tiles - 1 - np.intp(t) if phase == WRITE and measure else np.intp(t)  # the second pass goes back
                rows_tile(measure, phase, tile, x, y, columns, part, room, k_columns, sizes, z, relu, w, step, tile_w)
        if phase != SUMS:
            break
        if split is not None and measure is not None:
            fold_columns(part, blocks, width, channels, inner, sums)
            if settle(sums, pivot, count, state, ZERO, channels, final):
                if not write:
                    break
                phase = WRITE
            final = YES
