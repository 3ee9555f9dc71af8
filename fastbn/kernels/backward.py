"""Gradients over the tiles: one kernel for long inner runs, one for short ones.

With xhat = (x - mean) * invstd and sums over the n values of a channel (Ioffe & Szegedy 2015, section 3, with the two
terms of the mean and the variance written out):

    dbeta  = sum(dy)
    dgamma = sum(dy * xhat)
    dx     = gamma * invstd * (dy - dbeta / n - xhat * dgamma / n)

and with the statistics held fixed (`frozen`) dx = gamma * invstd * dy. `state` holds the rows mean, m2, gamma and beta
of the forward, as it left them; `grads` receives the rows dgamma and dbeta.

Memory traffic: fused tiles read dy and x once and write dx once, and so does the frozen backward. Split tiles read dy
and x twice, the second time from the end. dx may be dy.
"""

import numpy as np

from .._jit import elementwise, exact, kernel, prange
from .forward import APART, FUSED, NO, ONE, SUMS, WRITE, ZERO, fold_columns, spread, strip_room
from .grid import AHEAD, SEGMENT, TERMS
from .lanes import (
    LANES,
    apart,
    compact,
    load,
    load64,
    load64_part,
    load_part,
    minus,
    muladd,
    only,
    plus,
    prefetch,
    store,
    store_part,
    times,
    total,
    zeros,
)
from .leaves import PIECE, add, add_exactly, add_up, ahead, inverse_std, normalize_rows, normalize_run

FROZEN = 3  # sums and dx of a tile at once: dx does not wait for the sums


# ------------------------------------------------------------------------------------------------------------- leaves


@elementwise
def run_products(dy, x, low, high, centre):
    """sum(dy) and sum(dy * (x - centre)) from `low` to `high`, of no more than TERMS pieces."""
    sss, qqq = zeros(), zeros()
    whole = high - (high - low) % LANES
    for piece in range(low, whole, PIECE):
        ss, qq = zeros(), zeros()
        for i in range(piece, min(piece + PIECE, whole), LANES):
            prefetch(x, i + AHEAD)
            prefetch(dy, i + AHEAD)
            g = load64(dy, i)
            ss, qq = plus(ss, g), muladd(g, minus(load64(x, i), centre), qq)
        sss, qqq = plus(sss, ss), plus(qqq, qq)
    if whole < high:
        rest = high - whole
        g = load64_part(dy, whole, rest)
        d = only(minus(load64_part(x, whole, rest), centre), rest)  # a given mean may be infinite, and 0 * inf is NaN
        sss, qqq = plus(sss, g), muladd(g, d, qqq)
    return total(sss), total(qqq)


@elementwise
def few_rows_products(dy, x, i, rows, stride, width, centre, p, sums, s, q):
    """Add to the column sums s and q those of `rows` rows: as `leaves.few_rows_sums`, two rows in one sweep."""
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    swept = rows // 2 * 2
    for r in range(0, swept, 2):
        a = i + r * stride
        b = a + stride
        for j in range(0, whole, LANES):
            far = ahead(j, width, 2 * stride)
            prefetch(x, a + far)
            prefetch(dy, a + far)
            prefetch(x, b + far)
            prefetch(dy, b + far)
            ga, gb, v = load64(dy, a + j), load64(dy, b + j), load(centre, p + j)
            store(sums, s + j, plus(load(sums, s + j), plus(ga, gb)))
            products = muladd(ga, minus(load64(x, a + j), v), load(sums, q + j))
            store(sums, q + j, muladd(gb, minus(load64(x, b + j), v), products))
        if rest > 0:
            j = whole
            ga, gb = load64_part(dy, a + j, rest), load64_part(dy, b + j, rest)
            v = load_part(centre, p + j, rest)
            store_part(sums, s + j, rest, plus(load_part(sums, s + j, rest), plus(ga, gb)))
            products = muladd(ga, minus(load64_part(x, a + j, rest), v), load_part(sums, q + j, rest))
            store_part(sums, q + j, rest, muladd(gb, minus(load64_part(x, b + j, rest), v), products))
    for r in range(swept, rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            ga = load64(dy, a + j)
            store(sums, s + j, plus(load(sums, s + j), ga))
            store(sums, q + j, muladd(ga, minus(load64(x, a + j), load(centre, p + j)), load(sums, q + j)))
        if rest > 0:
            j = whole
            ga, v = load64_part(dy, a + j, rest), load_part(centre, p + j, rest)
            store_part(sums, s + j, rest, plus(load_part(sums, s + j, rest), ga))
            products = muladd(ga, minus(load64_part(x, a + j, rest), v), load_part(sums, q + j, rest))
            store_part(sums, q + j, rest, products)


@exact
def block_products(dy, x, i, rows, stride, width, centre, p, sums, s, q, room, r):
    """The same for any number of rows, as `leaves.block_sums`."""
    compact()
    few_rows_products(dy, x, i, min(rows, TERMS), stride, width, centre, p, sums, s, q)
    for row in range(TERMS, rows, TERMS):
        room[r : r + 2 * width] = 0.0
        few = min(TERMS, rows - row)
        few_rows_products(dy, x, i + row * stride, few, stride, width, centre, p, room, r, r + width)
        add(sums, s, room, r, width)
        add(sums, q, room, r + width, width)


@elementwise
def dx_run(dy, x, dx, low, high, scale, weight, slope, centre, shift):
    """dx = scale * dy + weight * ((x - centre) * slope) + shift from `low` to `high`."""
    whole = high - (high - low) % LANES
    for i in range(low, whole, LANES):
        prefetch(x, i + AHEAD)
        prefetch(dy, i + AHEAD)
        prefetch(dx, i + AHEAD)
        xhat = times(minus(load(x, i), centre), slope)
        store(dx, i, muladd(load(dy, i), scale, muladd(xhat, weight, shift)))
    if whole < high:
        rest = high - whole
        xhat = times(minus(load_part(x, whole, rest), centre), slope)
        store_part(dx, whole, rest, muladd(load_part(dy, whole, rest), scale, muladd(xhat, weight, shift)))


@elementwise
def sum_group(dy, x, dx, i, j, outer, stride, inner, up, write, k5, point, first, group, lanes, sums):
    """Set `sums` to sum(dy) of `group` channels, then sum(dy * (x - centre)), and `write` dx: as `leaves.sum_group`.

    The centres of those that are summed, from element j on, start at point[first]. dx is written of those that start at
    i, whose coefficients by `dx_coefficients` are k5.
    """
    apart()
    row, step = group * inner, stride if up else -stride
    sums[:] = 0.0
    for c in range(2 * group):
        store(lanes, c * LANES, zeros())
    often = max(1, TERMS // -(-inner // LANES))  # samples, after which the lanes are added up
    for m in range(outer):
        n = m if up else outer - 1 - m
        a, b = i + n * stride, j + n * stride
        drained = m % often == often - 1 or m == outer - 1
        for c in range(group):
            ahead_centre = point[first + c]
            scale, weight, slope = k5[c], k5[group + c], k5[2 * group + c]
            centre, shift = k5[3 * group + c], k5[4 * group + c]
            for low in range(c * inner, (c + 1) * inner, PIECE):
                ss, qq = load64(lanes, 2 * c * LANES), load64(lanes, (2 * c + 1) * LANES)
                high = min(low + PIECE, (c + 1) * inner)
                whole = high - (high - low) % LANES
                for k in range(low, whole, LANES):
                    far = ahead(k, row, step)
                    prefetch(x, b + far)
                    prefetch(dy, b + far)
                    g = load64(dy, b + k)
                    ss, qq = plus(ss, g), muladd(g, minus(load64(x, b + k), ahead_centre), qq)
                    if write:
                        prefetch(dx, a + far)
                        xhat = times(minus(load(x, a + k), centre), slope)
                        store(dx, a + k, muladd(load(dy, a + k), scale, muladd(xhat, weight, shift)))
                if whole < high:
                    rest = high - whole
                    g = load64_part(dy, b + whole, rest)
                    ss, qq = plus(ss, g), muladd(g, minus(load64_part(x, b + whole, rest), ahead_centre), qq)
                    if write:
                        xhat = times(minus(load_part(x, a + whole, rest), centre), slope)
                        new = muladd(load_part(dy, a + whole, rest), scale, muladd(xhat, weight, shift))
                        store_part(dx, a + whole, rest, new)
                if drained:
                    add_exactly(sums, c, 2 * group, total(ss))
                    add_exactly(sums, group + c, 2 * group, total(qq))
                    ss, qq = zeros(), zeros()
                store(lanes, 2 * c * LANES, ss)
                store(lanes, (2 * c + 1) * LANES, qq)
    for c in range(2 * group):
        error = sums[2 * group + c]
        sums[c] += error if error == error else 0.0


@elementwise
def dx_rows(dy, x, dx, i, rows, stride, width, k, scale, weight, slope, centre, shift):
    """`dx_run` for `rows` rows of `width` columns, `stride` elements apart, from element i on.

    The coefficients of the columns start at k[scale], k[weight] ...
    """
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    for r in range(rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            far = a + ahead(j, width, stride)
            prefetch(x, far)
            prefetch(dy, far)
            prefetch(dx, far)
            xhat = times(minus(load(x, a + j), load(k, centre + j)), load(k, slope + j))
            rows_shift = muladd(xhat, load(k, weight + j), load(k, shift + j))
            store(dx, a + j, muladd(load(dy, a + j), load(k, scale + j), rows_shift))
        if rest > 0:
            j = whole
            xhat = minus(load_part(x, a + j, rest), load_part(k, centre + j, rest))
            xhat = times(xhat, load_part(k, slope + j, rest))
            rows_shift = muladd(xhat, load_part(k, weight + j, rest), load_part(k, shift + j, rest))
            store_part(dx, a + j, rest, muladd(load_part(dy, a + j, rest), load_part(k, scale + j, rest), rows_shift))


# ------------------------------------------------------------------------------------------------ parts of both kernels


@exact
def points(state, eps, count, overwritten):
    """Three rows, one value a channel: centre, slope and scale. xhat = (x - centre) * slope, scale = gamma * invstd.

    Where y has overwritten x, centre = beta and slope = 1 / gamma.
    """
    compact()
    channels = state.shape[1]
    point = np.empty(3 * channels)
    for c in range(channels):
        invstd = inverse_std(state[1, c] / count, eps)
        point[c] = state[3, c] if overwritten else state[0, c]
        point[channels + c] = 1.0 / state[2, c] if overwritten else invstd
        point[2 * channels + c] = state[2, c] * invstd
    return point


@exact
def finish_sums(sums, point, grads, first, number):
    """dgamma and dbeta of `number` channels from `first` on, from sums as in `settle`."""
    compact()
    channels = grads.shape[1]
    for c in range(number):
        grads[0, first + c] = sums[number + c] * point[channels + first + c]
        grads[1, first + c] = sums[c]


@exact
def dx_coefficients(point, grads, count, first, number, k, frozen):
    """k = `number` scales, weights, slopes, centres and shifts, in dx's dtype, of the channels from `first` on.

    dx = scale * dy + weight * xhat + shift with xhat = (x - centre) * slope; xhat on its own, because slope * weight
    leaves the range of float32 long before dx does. As in `affine`, what rounding the centre loses goes into shift.
    Frozen: all but scale are 0.
    """
    compact()
    channels = grads.shape[1]
    for i in range(number):
        c = first + i
        centre, slope, scale = point[c], point[channels + c], point[2 * channels + c]
        k[i] = scale
        for row in range(1, 5):
            k[row * number + i] = 0.0
        if not frozen:
            weight = -scale * (grads[0, c] / count)
            k[number + i] = weight
            k[2 * number + i] = slope
            k[3 * number + i] = centre
            k[4 * number + i] = weight * (slope * (k[3 * number + i] - centre)) - scale * (grads[1, c] / count)


# ------------------------------------------------------------------------------------------------------------ long runs


@exact
def fused_channels(first, last, dy, x, dx, point, count, grads, outer, channels, inner, group, room, k):
    """Consecutive channels in groups, pipelined as in the forward: dx of one is written while the next is summed."""
    compact()
    stride = channels * inner
    sums, lanes = room[: 4 * group], room[4 * group :]
    for c in range(first - group, last, group):
        now, then = min(group, last - c), min(group, last - c - group)
        up = (c // group) % 2 != 0
        i, j = c * inner, (c + group) * inner
        summed = False
        if c >= first:
            finish_sums(sums, point, grads, c, now)
            dx_coefficients(point, grads, count, c, now, k, NO)
            summed = then == now  # else the group is summed once more, in vain: it is the same loop
            n, b = (c + group, j) if summed else (c, i)
            sum_group(dy, x, dx, i, b, outer, stride, inner, up, True, k, point, n, now, lanes, sums)
        if then > 0 and not summed:
            sum_group(dy, x, dx, j, j, outer, stride, inner, up, False, k, point, c + group, then, lanes, sums)


@exact
def segments_tile(phase, t, dy, x, dx, part, point, k, channels, inner, tiles):
    """A few consecutive segments of runs: their partial sums, their dx, or both."""
    apart()
    per_run = -(-inner // SEGMENT)
    segments = dy.size // inner * per_run
    for i in range(t * segments // tiles, (t + 1) * segments // tiles):
        run, piece = i // per_run, i % per_run
        n, c = run // channels, run % channels
        low = run * inner + piece * SEGMENT
        high = min(low + SEGMENT, (run + 1) * inner)
        scale, weight, slope = k[c], k[channels + c], k[2 * channels + c]
        centre, shift = k[3 * channels + c], k[4 * channels + c]
        if phase != WRITE:
            s, q = run_products(dy, x, low, high, point[c])
            own = 2 * (n * per_run + piece) * channels + c
            part[own] = s
            part[own + channels] = q
        if phase == FROZEN:
            normalize_run(dy, dx, low, high, centre, scale, shift)  # centre and shift are 0
        elif phase == WRITE:
            dx_run(dy, x, dx, low, high, scale, weight, slope, centre, shift)


@kernel
def backward_runs(dy, x, dx, state, eps, count, grads, frozen, overwritten, sizes):
    """Long inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    outer, channels, inner, group, tiles = sizes
    groups = -(-channels // group) if group > 0 else 0
    phase = FUSED if group > 0 else FROZEN if frozen else SUMS
    pieces = outer * -(-inner // SEGMENT)
    point = points(state, eps, count, overwritten)
    room = np.empty((tiles if phase == FUSED else 0, (4 + 2 * LANES) * group + APART))
    part = np.empty(0 if phase == FUSED else pieces * 2 * channels)
    k = np.empty(tiles * (5 * group + APART) if phase == FUSED else 5 * channels, dx.dtype)
    if phase == FROZEN:
        dx_coefficients(point, grads, count, ZERO, channels, k, frozen)
    while True:
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * groups // tiles * group
                last = min((np.intp(t) + 1) * groups // tiles * group, channels)
                own, k_own = room[np.intp(t)], k[np.intp(t) * (5 * group + APART) :]
                fused_channels(first, last, dy, x, dx, point, count, grads, outer, channels, inner, group, own, k_own)
            else:
                tile = tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t)  # the second pass goes back
                segments_tile(phase, tile, dy, x, dx, part, point, k, channels, inner, tiles)
        if phase == FUSED or phase == WRITE:
            break
        add_up(part, ZERO, pieces, 2 * channels)
        finish_sums(part, point, grads, ZERO, channels)
        if phase == FROZEN:
            break
        dx_coefficients(point, grads, count, ZERO, channels, k, frozen)
        phase = WRITE


# ----------------------------------------------------------------------------------------------------------- short runs


@exact
def fused_strips(t, dy, x, dx, point, count, grads, sizes, room, k, k_columns):
    """Some strips of a few channels each: their sums, and while dy and x are in the cache, their dx."""
    compact()
    total, stride, channels, inner, _, panel, panels, tiles = sizes
    outer, wide = total // stride, panel * inner
    own = t * strip_room(panel, inner)
    sums, columns = room[own : own + 2 * panel], room[own + 2 * panel :]
    part, more = columns[wide:], columns[3 * wide :]
    k, k_columns = k[t * (5 * panel + APART) :], k_columns[t * (5 * wide + APART) :]
    for first in range(t * panels // tiles * panel, min((t + 1) * panels // tiles * panel, channels), panel):
        start, number = first * inner, min(panel, channels - first)
        width = number * inner
        part[: 2 * width] = 0.0
        spread(point, first, number, inner, columns, ZERO, width)
        block_products(dy, x, start, outer, stride, width, columns, ZERO, part, ZERO, width, more, ZERO)
        fold_columns(part, ONE, width, number, inner, sums)
        finish_sums(sums, point, grads, first, number)
        dx_coefficients(point, grads, count, first, number, k, NO)
        for i in range(5):
            spread(k, i * number, number, inner, k_columns, i * width, width)
        dx_rows(dy, x, dx, start, outer, stride, width, k_columns, ZERO, width, 2 * width, 3 * width, 4 * width)


@exact
def rows_tile(phase, t, dy, x, dx, centres, part, room, k, sizes):
    """A block of rows of a strip: its column sums, its dx, or both. `centres` and `k` are by column."""
    compact()
    total, width, _, inner, blocks, panel, panels, _ = sizes
    b, p = t // panels, t % panels
    low = p * panel * inner
    high = width if p == panels - 1 else low + panel * inner
    full = total // width
    row, end = b * full // blocks, (b + 1) * full // blocks
    scale, weight, slope, centre, shift = low, width + low, 2 * width + low, 3 * width + low, 4 * width + low
    for last in range(2):
        i = end * width if last else row * width + low
        rows = (1 if b == blocks - 1 else 0) if last else end - row
        columns = total - full * width if last else high - low  # the last row may not be full: then it is one strip
        if rows * columns > 0:
            if phase != WRITE:
                own = 2 * b * width + low
                at = 2 * (b * width + low)
                block_products(dy, x, i, rows, width, columns, centres, low, part, own, own + width, room, at)
            if phase == FROZEN:  # centre and shift are 0
                normalize_rows(dy, dx, i, rows, width, columns, k, centre, scale, shift)
            elif phase == WRITE:
                dx_rows(dy, x, dx, i, rows, width, columns, k, scale, weight, slope, centre, shift)


@kernel
def backward_rows(dy, x, dx, state, eps, count, grads, frozen, overwritten, sizes):
    """Short inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    total, width, channels, inner, blocks, panel, panels, fused = sizes
    phase = FUSED if fused > 0 else FROZEN if frozen else SUMS
    tiles = fused if fused > 0 else blocks * panels
    many = total // width // blocks >= TERMS  # rows of a block
    room = np.empty(fused * strip_room(panel, inner) if fused > 0 else 2 * blocks * width if many else 0)
    point = points(state, eps, count, overwritten)
    sums = np.empty(0 if fused > 0 else 2 * channels)
    part = np.zeros(0 if fused > 0 else 2 * blocks * width)
    columns = np.empty(0 if fused > 0 else width)
    k = np.empty(fused * (5 * panel + APART) if fused > 0 else 5 * channels, dx.dtype)
    k_columns = np.empty(fused * (5 * panel * inner + APART) if fused > 0 else 5 * width, dx.dtype)
    if fused == 0:
        spread(point, ZERO, channels, inner, columns, ZERO, width)
    while True:
        if phase == WRITE or phase == FROZEN:
            dx_coefficients(point, grads, count, ZERO, channels, k, frozen)
            for i in range(5):
                spread(k, i * channels, channels, inner, k_columns, i * width, width)
        for t in prange(tiles):
            if phase == FUSED:
                fused_strips(np.intp(t), dy, x, dx, point, count, grads, sizes, room, k, k_columns)
            else:
                tile = tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t)  # the second pass goes back
                rows_tile(phase, tile, dy, x, dx, columns, part, room, k_columns, sizes)
        if phase == FUSED or phase == WRITE:
            break
        fold_columns(part, blocks, width, channels, inner, sums)
        finish_sums(sums, point, grads, ZERO, channels)
        if phase == FROZEN:
            break
        phase = WRITE
