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
from .forward import FUSED, ONE, SUMS, WRITE, ZERO, fold_columns, spread
from .grid import AHEAD, SEGMENT
from .lanes import (
    LANES,
    load,
    load64,
    load64_part,
    load_part,
    minus,
    muladd,
    plus,
    prefetch,
    store,
    store_part,
    times,
    total,
    zeros,
)
from .leaves import ahead, inverse_std, normalize_rows, normalize_run

FROZEN = 3  # sums and dx of a tile at once: dx does not wait for the sums


# ------------------------------------------------------------------------------------------------------------- leaves


@elementwise
def run_products(dy, x, low, high, centre):
    """sum(dy) and sum(dy * (x - centre)) from `low` to `high`."""
    ss, qq = zeros(), zeros()
    whole = high - (high - low) % LANES
    for i in range(low, whole, LANES):
        prefetch(x, i + AHEAD)
        prefetch(dy, i + AHEAD)
        g = load64(dy, i)
        ss, qq = plus(ss, g), muladd(g, minus(load64(x, i), centre), qq)
    if whole < high:
        g = load64_part(dy, whole, high - whole)
        ss, qq = plus(ss, g), muladd(g, minus(load64_part(x, whole, high - whole), centre), qq)
    return total(ss), total(qq)


@elementwise
def block_products(dy, x, i, rows, stride, centre, s, q):
    """Add to the column sums s and q those of `rows` rows, `stride` elements apart, from element i on; two a sweep."""
    w = centre.size
    whole = w // LANES * LANES
    swept = rows // 2 * 2
    for r in range(0, swept, 2):
        a = i + r * stride
        b = a + stride
        for j in range(0, whole, LANES):
            far = ahead(j, w, 2 * stride)
            prefetch(x, a + far)
            prefetch(dy, a + far)
            prefetch(x, b + far)
            prefetch(dy, b + far)
            ga, gb, c = load64(dy, a + j), load64(dy, b + j), load(centre, j)
            store(s, j, plus(load(s, j), plus(ga, gb)))
            products = muladd(ga, minus(load64(x, a + j), c), load(q, j))
            store(q, j, muladd(gb, minus(load64(x, b + j), c), products))
        for j in range(whole, w):
            ha, hb = np.float64(dy[a + j]), np.float64(dy[b + j])
            s[j] += ha + hb
            q[j] = hb * (x[b + j] - centre[j]) + (ha * (x[a + j] - centre[j]) + q[j])
    for r in range(swept, rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            ga = load64(dy, a + j)
            store(s, j, plus(load(s, j), ga))
            store(q, j, muladd(ga, minus(load64(x, a + j), load(centre, j)), load(q, j)))
        for j in range(whole, w):
            ha = np.float64(dy[a + j])
            s[j] += ha
            q[j] = ha * (x[a + j] - centre[j]) + q[j]


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
def group_products(dy, x, j, outer, stride, inner, up, centre, lanes, sums):
    """Set sums (2, channels) to sum(dy) and sum(dy * (x - centre)): see the forward's `group_sums`."""
    group = centre.size
    row, step = group * inner, stride if up else -stride
    for c in range(group):
        sums[0, c] = sums[1, c] = 0.0
        store(lanes, 2 * c * LANES, zeros())
        store(lanes, (2 * c + 1) * LANES, zeros())
    often = max(1, SEGMENT // inner)
    for m in range(outer):
        n = m if up else outer - 1 - m
        settled = m % often == often - 1 or m == outer - 1
        for c in range(group):
            p = centre[c]
            for low in range(c * inner, (c + 1) * inner, SEGMENT):
                b = j + n * stride
                ss, qq = load64(lanes, 2 * c * LANES), load64(lanes, (2 * c + 1) * LANES)
                high = min(low + SEGMENT, (c + 1) * inner)
                whole = high - (high - low) % LANES
                for k in range(low, whole, LANES):
                    far = b + ahead(k, row, step)
                    prefetch(x, far)
                    prefetch(dy, far)
                    g = load64(dy, b + k)
                    ss, qq = plus(ss, g), muladd(g, minus(load64(x, b + k), p), qq)
                if whole < high:
                    g = load64_part(dy, b + whole, high - whole)
                    ss, qq = plus(ss, g), muladd(g, minus(load64_part(x, b + whole, high - whole), p), qq)
                if settled:
                    sums[0, c] += total(ss)
                    sums[1, c] += total(qq)
                    ss, qq = zeros(), zeros()
                store(lanes, 2 * c * LANES, ss)
                store(lanes, (2 * c + 1) * LANES, qq)


@elementwise
def dx_group_ahead(dy, x, dx, i, j, outer, stride, inner, up, k5, centre_ahead, lanes, sums):
    """Write dx of the channels that start at i and, in the same loop, take `group_products` of those at j.

    k5 (5, channels) are the coefficients of `dx_coefficients`.
    """
    group = centre_ahead.size
    row, step = group * inner, stride if up else -stride
    for c in range(group):
        sums[0, c] = sums[1, c] = 0.0
        store(lanes, 2 * c * LANES, zeros())
        store(lanes, (2 * c + 1) * LANES, zeros())
    often = max(1, SEGMENT // inner)
    for m in range(outer):
        n = m if up else outer - 1 - m
        settled = m % often == often - 1 or m == outer - 1
        for c in range(group):
            p, scale, weight, slope, centre, shift = centre_ahead[c], k5[0, c], k5[1, c], k5[2, c], k5[3, c], k5[4, c]
            for low in range(c * inner, (c + 1) * inner, SEGMENT):
                a, b = i + n * stride, j + n * stride
                ss, qq = load64(lanes, 2 * c * LANES), load64(lanes, (2 * c + 1) * LANES)
                high = min(low + SEGMENT, (c + 1) * inner)
                whole = high - (high - low) % LANES
                for k in range(low, whole, LANES):
                    far = ahead(k, row, step)
                    prefetch(x, b + far)
                    prefetch(dy, b + far)
                    prefetch(dx, a + far)
                    g = load64(dy, b + k)
                    ss, qq = plus(ss, g), muladd(g, minus(load64(x, b + k), p), qq)
                    xhat = times(minus(load(x, a + k), centre), slope)
                    store(dx, a + k, muladd(load(dy, a + k), scale, muladd(xhat, weight, shift)))
                if whole < high:
                    rest = high - whole
                    g = load64_part(dy, b + whole, rest)
                    ss, qq = plus(ss, g), muladd(g, minus(load64_part(x, b + whole, rest), p), qq)
                    xhat = times(minus(load_part(x, a + whole, rest), centre), slope)
                    new = muladd(load_part(dy, a + whole, rest), scale, muladd(xhat, weight, shift))
                    store_part(dx, a + whole, rest, new)
                if settled:
                    sums[0, c] += total(ss)
                    sums[1, c] += total(qq)
                    ss, qq = zeros(), zeros()
                store(lanes, 2 * c * LANES, ss)
                store(lanes, (2 * c + 1) * LANES, qq)


@elementwise
def dx_rows(dy, x, dx, i, rows, stride, scale, weight, slope, centre, shift):
    """`dx_run` for `rows` rows, `stride` elements apart, from element i on, with coefficients per column."""
    w = centre.size
    whole = w // LANES * LANES
    for r in range(rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            far = a + ahead(j, w, stride)
            prefetch(x, far)
            prefetch(dy, far)
            prefetch(dx, far)
            xhat = times(minus(load(x, a + j), load(centre, j)), load(slope, j))
            store(dx, a + j, muladd(load(dy, a + j), load(scale, j), muladd(xhat, load(weight, j), load(shift, j))))
        for j in range(whole, w):
            xhat_j = (x[a + j] - centre[j]) * slope[j]
            dx[a + j] = scale[j] * dy[a + j] + (weight[j] * xhat_j + shift[j])


# ------------------------------------------------------------------------------------------------ parts of both kernels


@exact
def points(state, eps, count, overwritten):
    """The rows centre, slope, scale of each channel: xhat = (x - centre) * slope, scale = gamma * invstd.

    Where x was overwritten by y, xhat is recovered from that: xhat = (y - beta) / gamma.
    """
    point = np.empty((3, state.shape[1]))
    for c in range(state.shape[1]):
        invstd = inverse_std(state[1, c] / count, eps)
        point[0, c] = state[3, c] if overwritten else state[0, c]
        point[1, c] = 1.0 / state[2, c] if overwritten else invstd
        point[2, c] = state[2, c] * invstd
    return point


@exact
def finish_sums(part, point, grads, first):
    """dgamma and dbeta of the channels from `first` on, from partial sums (tiles, 2, channels) added in that order."""
    for c in range(part.shape[2]):
        s = np.float64(0.0)
        q = np.float64(0.0)
        for t in range(part.shape[0]):
            s += part[t, 0, c]
            q += part[t, 1, c]
        grads[0, first + c] = q * point[1, first + c]
        grads[1, first + c] = s


@exact
def dx_coefficients(point, grads, count, first, k, frozen):
    """k (5, channels) = scale, weight, slope, centre, shift, in dx's dtype.

    dx = scale * dy + weight * xhat + shift with xhat = (x - centre) * slope; xhat on its own, because slope * weight
    leaves the range of float32 long before dx does. As in `affine`, what rounding the centre loses goes into shift.
    Frozen: all but scale are 0.
    """
    for i in range(k.shape[1]):
        c = first + i
        k[0, i] = point[2, c]
        for row in range(1, 5):
            k[row, i] = 0.0
        if not frozen:
            weight = -point[2, c] * (grads[0, c] / count)
            k[1, i] = weight
            k[2, i] = point[1, c]
            k[3, i] = point[0, c]
            k[4, i] = weight * (point[1, c] * (k[3, i] - point[0, c])) - point[2, c] * (grads[1, c] / count)


# ------------------------------------------------------------------------------------------------------------ long runs


@exact
def fused_channels(first, last, dy, x, dx, point, count, grads, outer, channels, inner, group):
    """Consecutive channels in groups, pipelined as in the forward: dx of one is written while the next is summed."""
    stride = channels * inner
    lanes = np.empty(2 * group * LANES)
    part = np.empty((1, 2, group))
    k = np.empty((5, group), dx.dtype)
    for c in range(first - group, last, group):
        now, then = min(group, last - c), min(group, last - c - group)
        up = (c // group) % 2 != 0
        j = (c + group) * inner
        summed = False
        if c >= first:
            finish_sums(part[:, :, :now], point, grads, c)
            dx_coefficients(point, grads, count, c, k[:, :now], False)
            summed = then == now  # else the group is summed once more, in vain: the same loop writes it
            ahead_of = c + group if summed else c
            dx_group_ahead(
                dy, x, dx, c * inner, ahead_of * inner, outer, stride, inner, up, k,
                point[0, ahead_of : ahead_of + now], lanes, part[0],
            )  # fmt: skip
        if then > 0 and not summed:
            group_products(dy, x, j, outer, stride, inner, up, point[0, c + group : c + group + then], lanes, part[0])


@exact
def segments_tile(phase, t, dy, x, dx, part, point, k, channels, inner, tiles):
    """A few consecutive segments of runs: their partial sums, their dx, or both."""
    per_run = -(-inner // SEGMENT)
    segments = dy.size // inner * per_run
    for i in range(t * segments // tiles, (t + 1) * segments // tiles):
        run, j = i // per_run, i % per_run
        n, c = run // channels, run % channels
        low = run * inner + j * SEGMENT
        high = min(low + SEGMENT, (run + 1) * inner)
        if phase != WRITE:
            s, q = run_products(dy, x, low, high, point[0, c])
            part[n * per_run + j, 0, c] = s
            part[n * per_run + j, 1, c] = q
        if phase == FROZEN:
            normalize_run(dy, dx, low, high, k[3, c], k[0, c], k[4, c])  # centre and shift are 0
        elif phase == WRITE:
            dx_run(dy, x, dx, low, high, k[0, c], k[1, c], k[2, c], k[3, c], k[4, c])


@kernel
def backward_runs(dy, x, dx, state, eps, count, grads, frozen, overwritten, sizes):
    """Long inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    outer, channels, inner, group, tiles = sizes
    point = points(state, eps, count, overwritten)
    fused = group > 0
    groups = -(-channels // group) if fused else 0
    phase = FUSED if fused else FROZEN if frozen else SUMS
    part = np.empty((0 if fused else outer * -(-inner // SEGMENT), 2, channels))
    k = np.empty((5, channels), dx.dtype)
    if phase == FROZEN:
        dx_coefficients(point, grads, count, ZERO, k, True)
    while True:
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * groups // tiles * group
                last = min((np.intp(t) + 1) * groups // tiles * group, channels)
                fused_channels(first, last, dy, x, dx, point, count, grads, outer, channels, inner, group)
            else:
                i = tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t)
                segments_tile(phase, i, dy, x, dx, part, point, k, channels, inner, tiles)
        if phase == FUSED or phase == WRITE:
            break
        finish_sums(part, point, grads, ZERO)
        if phase == FROZEN:
            break
        dx_coefficients(point, grads, count, ZERO, k, False)
        phase = WRITE


# ----------------------------------------------------------------------------------------------------------- short runs


@exact
def fused_strip(first, last, dy, x, dx, point, count, grads, outer, stride, inner):
    """All of a few channels: their sums, and while dy and x are in the cache, their dx."""
    start = first * inner
    w = (last - first) * inner
    own = np.empty((1, 2, last - first))
    centre = np.empty(w)
    part = np.zeros((1, 2, w))
    k = np.empty((5, last - first), dx.dtype)
    by_column = np.empty((5, w), dx.dtype)
    spread(point[0, first:last], inner, centre)
    block_products(dy, x, start, outer, stride, centre, part[0, 0], part[0, 1])
    fold_columns(part, inner, own)
    finish_sums(own, point, grads, first)
    dx_coefficients(point, grads, count, first, k, False)
    for i in range(5):
        spread(k[i], inner, by_column[i])
    dx_rows(dy, x, dx, start, outer, stride, by_column[0], by_column[1], by_column[2], by_column[3], by_column[4])


@exact
def block_dx(dy, x, dx, start, rows, stride, frozen, low, high, k):
    """dx of the columns from `low` to `high` of some rows; `k` (5) is by column."""
    scale, weight, slope, centre, shift = k[0, low:high], k[1, low:high], k[2, low:high], k[3, low:high], k[4, low:high]
    if frozen:  # centre and shift are 0
        normalize_rows(dy, dx, start, rows, stride, centre, scale, shift)
    else:
        dx_rows(dy, x, dx, start, rows, stride, scale, weight, slope, centre, shift)


@exact
def rows_tile(phase, t, dy, x, dx, centre, part, k, sizes):
    """A block of rows of a strip: its column sums, its dx, or both. `centre` and `k` (5) are by column."""
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
    if phase != WRITE:
        block_products(dy, x, start, rows, width, centre[low:high], part[b, 0, low:high], part[b, 1, low:high])
        if rest > 0:
            block_products(dy, x, end, ONE, width, centre[:rest], part[b, 0, :rest], part[b, 1, :rest])
    if phase != SUMS:
        block_dx(dy, x, dx, start, rows, width, phase == FROZEN, low, high, k)
        if rest > 0:
            block_dx(dy, x, dx, end, ONE, width, phase == FROZEN, ZERO, rest, k)


@kernel
def backward_rows(dy, x, dx, state, eps, count, grads, frozen, overwritten, sizes):
    """Short inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    total, width, channels, inner, blocks, panel, panels, fused = sizes
    point = points(state, eps, count, overwritten)
    phase = FUSED if fused else FROZEN if frozen else SUMS
    tiles = blocks * panels
    outer = total // (channels * inner)
    own = np.empty((1, 2, channels))
    part = np.zeros((0 if fused else blocks, 2, width))
    centre = np.empty(0 if fused else width)
    k = np.empty((5, 0 if fused else channels), dx.dtype)
    k_columns = np.empty((5, 0 if fused else width), dx.dtype)
    if not fused:
        spread(point[0], inner, centre)
    while True:
        if phase == WRITE or phase == FROZEN:
            dx_coefficients(point, grads, count, ZERO, k, phase == FROZEN)
            for i in range(5):
                spread(k[i], inner, k_columns[i])
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * panel
                last = min(first + panel, channels)
                fused_strip(first, last, dy, x, dx, point, count, grads, outer, channels * inner, inner)
            else:
                i = tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t)
                rows_tile(phase, i, dy, x, dx, centre, part, k_columns, sizes)
        if phase == FUSED or phase == WRITE:
            break
        fold_columns(part, inner, own)
        finish_sums(own, point, grads, ZERO)
        if phase == FROZEN:
            break
        phase = WRITE
