"""Gradients over the tiles: one kernel for long inner runs, one for short ones.

With xhat = (x - mean) * invstd and sums over the n values of a channel (Ioffe & Szegedy 2015, section 3, with the two
terms of the mean and the variance written out):

    dbeta  = sum(dy)
    dgamma = sum(dy * xhat)
    dx     = gamma * invstd * (dy - dbeta / n - xhat * dgamma / n)

and with the statistics held fixed (`frozen`) dx = gamma * invstd * dy. `point` holds, per channel, the rows centre,
slope and scale: xhat = (x - centre) * slope and scale = gamma * invstd. `grads` receives the rows dgamma and dbeta.

Memory traffic: fused tiles read dy and x once and write dx once, and so does the frozen backward. Split tiles read dy
and x twice, the second time from the end. dx may be dy.
"""

import numpy as np

from .._jit import elementwise, exact, kernel, prange
from .forward import FUSED, ONE, SUMS, WRITE, ZERO, gather, spread
from .lanes import LANES, load, load64, minus, muladd, plus, store, times, total, zeros
from .leaves import SEGMENT, normalize_row, normalize_run

FROZEN = 3  # sums and dx of a tile at once: dx does not wait for the sums


# ------------------------------------------------------------------------------------------------------------- leaves


@elementwise
def run_products(dy, x, centre):
    """sum(dy) and sum(dy * (x - centre)) of one contiguous run."""
    ss, qq = zeros(), zeros()
    whole = dy.size // LANES * LANES
    for i in range(0, whole, LANES):
        g = load64(dy, i)
        ss, qq = plus(ss, g), muladd(g, minus(load64(x, i), centre), qq)
    s, q = total(ss), total(qq)
    for i in range(whole, dy.size):
        g = np.float64(dy[i])
        s += g
        q += g * (x[i] - centre)
    return s, q


@elementwise
def row_products(dy, x, centre, s, q):
    """Add one row to the column sums."""
    whole = dy.size // LANES * LANES
    for j in range(0, whole, LANES):
        g = load64(dy, j)
        store(s, j, plus(load(s, j), g))
        store(q, j, muladd(g, minus(load64(x, j), load(centre, j)), load(q, j)))
    for j in range(whole, dy.size):
        g = np.float64(dy[j])
        s[j] += g
        q[j] += g * (x[j] - centre[j])


@elementwise
def two_row_products(dya, dyb, xa, xb, centre, s, q):
    """Add two rows in one sweep over s and q."""
    whole = dya.size // LANES * LANES
    for j in range(0, whole, LANES):
        ga, gb, c = load64(dya, j), load64(dyb, j), load(centre, j)
        store(s, j, plus(load(s, j), plus(ga, gb)))
        store(q, j, muladd(gb, minus(load64(xb, j), c), muladd(ga, minus(load64(xa, j), c), load(q, j))))
    for j in range(whole, dya.size):
        ga, gb = np.float64(dya[j]), np.float64(dyb[j])
        s[j] += ga + gb
        q[j] = gb * (xb[j] - centre[j]) + (ga * (xa[j] - centre[j]) + q[j])


@elementwise
def dx_run(dy, x, dx, scale, weight, slope, centre, shift):
    """dx = scale * dy + weight * ((x - centre) * slope) + shift over one contiguous run."""
    whole = dy.size // LANES * LANES
    for i in range(0, whole, LANES):
        xhat = times(minus(load(x, i), centre), slope)
        store(dx, i, muladd(load(dy, i), scale, muladd(xhat, weight, shift)))
    for i in range(whole, dy.size):
        dx[i] = scale * dy[i] + (weight * ((x[i] - centre) * slope) + shift)


@elementwise
def channel_products(dy, x, j, outer, stride, inner, centre):
    """sum(dy) and sum(dy * (x - centre)) of one channel: see the forward's `channel_sums`."""
    s, q = np.float64(0.0), np.float64(0.0)
    ss, qq = zeros(), zeros()
    summed = 0
    for n in range(outer):
        for low in range(0, inner, SEGMENT):
            b = j + n * stride + low
            size = min(SEGMENT, inner - low)
            whole = size // LANES * LANES
            for k in range(0, whole, LANES):
                g = load64(dy, b + k)
                ss, qq = plus(ss, g), muladd(g, minus(load64(x, b + k), centre), qq)
            for k in range(whole, size):
                h = np.float64(dy[b + k])
                s += h
                q += h * (x[b + k] - centre)
            summed += size
            if summed >= SEGMENT:
                s, q = s + total(ss), q + total(qq)
                ss, qq = zeros(), zeros()
                summed = 0
    return s + total(ss), q + total(qq)


@elementwise
def dx_channel_ahead(dy, x, dx, i, j, outer, stride, inner, scale, weight, slope, centre, shift, centre_ahead):
    """Write dx of the channel that starts at i and, in the same loop, take `channel_products` of the one at j."""
    s, q = np.float64(0.0), np.float64(0.0)
    ss, qq = zeros(), zeros()
    summed = 0
    for n in range(outer):
        for low in range(0, inner, SEGMENT):
            a = i + n * stride + low
            b = j + n * stride + low
            size = min(SEGMENT, inner - low)
            whole = size // LANES * LANES
            for k in range(0, whole, LANES):
                g = load64(dy, b + k)
                ss, qq = plus(ss, g), muladd(g, minus(load64(x, b + k), centre_ahead), qq)
                xhat = times(minus(load(x, a + k), centre), slope)
                store(dx, a + k, muladd(load(dy, a + k), scale, muladd(xhat, weight, shift)))
            for k in range(whole, size):
                h = np.float64(dy[b + k])
                s += h
                q += h * (x[b + k] - centre_ahead)
                dx[a + k] = scale * dy[a + k] + (weight * ((x[a + k] - centre) * slope) + shift)
            summed += size
            if summed >= SEGMENT:
                s, q = s + total(ss), q + total(qq)
                ss, qq = zeros(), zeros()
                summed = 0
    return s + total(ss), q + total(qq)


@elementwise
def dx_row(dy, x, dx, scale, weight, slope, centre, shift):
    """`dx_run` over one row, with a coefficient per column."""
    whole = dy.size // LANES * LANES
    for j in range(0, whole, LANES):
        xhat = times(minus(load(x, j), load(centre, j)), load(slope, j))
        store(dx, j, muladd(load(dy, j), load(scale, j), muladd(xhat, load(weight, j), load(shift, j))))
    for j in range(whole, dy.size):
        dx[j] = scale[j] * dy[j] + (weight[j] * ((x[j] - centre[j]) * slope[j]) + shift[j])


# ------------------------------------------------------------------------------------------------ parts of both kernels


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
def fused_channels(first, last, dy, x, dx, point, count, grads, outer, channels, inner):
    """Consecutive channels: dx of each is written while the next one is summed, and while it is still in the cache."""
    stride = channels * inner
    part = np.empty((1, 2, 1))
    k = np.empty((5, 1), dx.dtype)
    part[0, 0, 0], part[0, 1, 0] = channel_products(dy, x, first * inner, outer, stride, inner, point[0, first])
    for c in range(first, last):
        finish_sums(part, point, grads, c)
        dx_coefficients(point, grads, count, c, k, False)
        ahead = min(c + 1, last - 1)  # the last channel is summed in vain: the same loop writes it
        part[0, 0, 0], part[0, 1, 0] = dx_channel_ahead(
            dy, x, dx, c * inner, ahead * inner, outer, stride, inner, k[0, 0], k[1, 0], k[2, 0], k[3, 0], k[4, 0],
            point[0, ahead],
        )  # fmt: skip


@exact
def segments_tile(phase, t, dy, x, dx, part, point, k, channels, inner, segment, per_tile):
    """A few consecutive segments of runs: their partial sums, their dx, or both."""
    per_run = -(-inner // segment)
    for i in range(t * per_tile, min((t + 1) * per_tile, dy.size // inner * per_run)):
        run, j = i // per_run, i % per_run
        n, c = run // channels, run % channels
        low = run * inner + j * segment
        high = min(low + segment, (run + 1) * inner)
        if phase != WRITE:
            s, q = run_products(dy[low:high], x[low:high], point[0, c])
            part[n * per_run + j, 0, c] = s
            part[n * per_run + j, 1, c] = q
        if phase == FROZEN:
            normalize_run(dy[low:high], dx[low:high], k[3, c], k[0, c], k[4, c])  # centre and shift are 0
        elif phase == WRITE:
            dx_run(dy[low:high], x[low:high], dx[low:high], k[0, c], k[1, c], k[2, c], k[3, c], k[4, c])


@kernel
def backward_runs(dy, x, dx, point, count, grads, frozen, sizes):
    """Long inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    outer, channels, inner, segment, fused, per_tile, tiles = sizes
    phase = FUSED if fused else FROZEN if frozen else SUMS
    part = np.empty((0 if fused else outer * -(-inner // segment), 2, channels))
    k = np.empty((5, channels), dx.dtype)
    if phase == FROZEN:
        dx_coefficients(point, grads, count, ZERO, k, True)
    while True:
        for t in prange(tiles):
            if phase == FUSED:
                first = np.intp(t) * per_tile
                last = min(first + per_tile, channels)
                fused_channels(first, last, dy, x, dx, point, count, grads, outer, channels, inner)
            else:
                segments_tile(
                    phase, tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t), dy, x, dx, part, point, k,
                    channels, inner, segment, per_tile,
                )  # fmt: skip
        if phase == FUSED or phase == WRITE:
            break
        finish_sums(part, point, grads, ZERO)
        if phase == FROZEN:
            break
        dx_coefficients(point, grads, count, ZERO, k, False)
        phase = WRITE


# ----------------------------------------------------------------------------------------------------------- short runs


@exact
def block_products(dy, x, start, rows, stride, centre, s, q):
    """Set the column sums s and q over `rows` rows, `stride` elements apart, from element `start` on."""
    w = centre.size
    for j in range(w):
        s[j] = 0.0
        q[j] = 0.0
    swept = rows // 2 * 2
    for r in range(0, swept, 2):
        i = start + r * stride
        j = i + stride
        two_row_products(dy[i : i + w], dy[j : j + w], x[i : i + w], x[j : j + w], centre, s, q)
    for r in range(swept, rows):
        i = start + r * stride
        row_products(dy[i : i + w], x[i : i + w], centre, s, q)


@exact
def strip_products(dy, x, start, rows, stride, rest, inner, centre, part, b, first, columns):
    """Set part[b, :, first ...] to the sums of `rows` rows of a strip, and of `rest` elements of one row more."""
    sums = part[b, 0, first : first + centre.size]
    products = part[b, 1, first : first + centre.size]
    for c in range(centre.size):
        sums[c] = 0.0
        products[c] = 0.0
    spread(centre, inner, columns[0])
    block_products(dy, x, start, rows, stride, columns[0], columns[1], columns[2])
    gather(columns[1], inner, sums)
    gather(columns[2], inner, products)
    if rest > 0:
        end = start + rows * stride
        block_products(dy, x, end, ONE, stride, columns[0, :rest], columns[1, :rest], columns[2, :rest])
        gather(columns[1, :rest], inner, sums)
        gather(columns[2, :rest], inner, products)


@exact
def strip_dx(dy, x, dx, start, rows, stride, rest, frozen, k):
    """dx of a strip, with the coefficients `k` (5, columns)."""
    for r in range(rows + (rest > 0)):
        i = start + r * stride
        w = k.shape[1] if r < rows else rest
        j = i + w
        if frozen:  # centre and shift are 0
            normalize_row(dy[i:j], dx[i:j], k[3, :w], k[0, :w], k[4, :w])
        else:
            dx_row(dy[i:j], x[i:j], dx[i:j], k[0, :w], k[1, :w], k[2, :w], k[3, :w], k[4, :w])


@exact
def rows_tile(phase, t, dy, x, dx, point, count, grads, part, sizes):
    """A block of rows of a strip of channels: its partial sums, its dx, or all there is to do with it."""
    total, width, channels, inner, block, blocks, panel, panels, _ = sizes
    b, first = t // panels, t % panels * panel
    last = min(first + panel, channels)
    full = total // width
    rows = min(block, full - b * block)
    rest = total - full * width if b == blocks - 1 else 0
    start = b * block * width + first * inner
    w = width if panels == 1 else (last - first) * inner
    columns = np.empty((3, w))
    centre = point[0, first:last]
    if phase == FUSED:
        own = np.empty((1, 2, last - first))
        strip_products(dy, x, start, rows, width, rest, inner, centre, own, ZERO, ZERO, columns)
        finish_sums(own, point, grads, first)
    elif phase != WRITE:
        strip_products(dy, x, start, rows, width, rest, inner, centre, part, b, first, columns)
    if phase != SUMS:
        k = np.empty((5, last - first), dx.dtype)
        dx_coefficients(point, grads, count, first, k, phase == FROZEN)
        spread_k = np.empty((5, w), dx.dtype)
        for i in range(5):
            spread(k[i], inner, spread_k[i])
        strip_dx(dy, x, dx, start, rows, width, rest, phase == FROZEN, spread_k)


@kernel
def backward_rows(dy, x, dx, point, count, grads, frozen, sizes):
    """Short inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    _, _, channels, _, _, blocks, _, panels, fused = sizes
    phase = FUSED if fused else FROZEN if frozen else SUMS
    part = np.empty((0 if fused else blocks, 2, channels))
    tiles = blocks * panels
    while True:
        for t in prange(tiles):
            rows_tile(
                phase, tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t), dy, x, dx, point, count, grads,
                part, sizes,
            )  # fmt: skip
        if phase == FUSED or phase == WRITE:
            break
        finish_sums(part, point, grads, ZERO)
        if phase == FROZEN:
            break
        phase = WRITE
