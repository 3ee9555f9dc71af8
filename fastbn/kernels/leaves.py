"""The innermost loops of the forward: sums of a run, a channel or a block of rows, and x to y.

Those of the backward are in `backward`, beside the kernels that use them.

Statistics are shifted sums. With a pivot p near the mean of a channel,

    s = sum(x - p)        q = sum((x - p)**2)
    mean = p + s / n      m2 = q - s**2 / n

in float64, which is exact to float64 as long as (mean - p)**2 is not large beside the variance; `settle` checks that,
and asks for a second pass with the mean as the pivot where it fails. (Chan, Golub, LeVeque 1983, "Algorithms for
computing the sample variance", section 3, the shifted two-pass family.)
"""

import numpy as np

from .._jit import elementwise, exact
from .grid import SEGMENT
from .lanes import LANES, load, load64, minus, muladd, plus, store, total, zeros

# Past this share of q, s**2 / n has cancelled three bits of m2.
CANCELLED = 0.875


@elementwise
def run_sums(run, pivot):
    """s and q of one contiguous run."""
    ss, qq = zeros(), zeros()
    whole = run.size // LANES * LANES
    for i in range(0, whole, LANES):
        d = minus(load64(run, i), pivot)
        ss, qq = plus(ss, d), muladd(d, d, qq)
    s, q = total(ss), total(qq)
    for i in range(whole, run.size):
        d = run[i] - pivot
        s += d
        q += d * d
    return s, q


@elementwise
def block_sums(x, i, rows, stride, pivot, s, q):
    """Add to the column sums s and q those of `rows` rows, `stride` elements apart, from x[i] on.

    Four rows in one sweep over s and q: a quarter of their loads and stores, 1.2 times as fast.
    """
    w = pivot.size
    whole = w // LANES * LANES
    swept = rows // 4 * 4
    for r in range(0, swept, 4):
        a = i + r * stride
        b = a + stride
        c = b + stride
        d = c + stride
        for j in range(0, whole, LANES):
            p = load(pivot, j)
            va, vb = minus(load64(x, a + j), p), minus(load64(x, b + j), p)
            vc, vd = minus(load64(x, c + j), p), minus(load64(x, d + j), p)
            store(s, j, plus(load(s, j), plus(plus(va, vb), plus(vc, vd))))
            store(q, j, muladd(vd, vd, muladd(vc, vc, muladd(vb, vb, muladd(va, va, load(q, j))))))
        for j in range(whole, w):
            ea, eb = x[a + j] - pivot[j], x[b + j] - pivot[j]
            ec, ed = x[c + j] - pivot[j], x[d + j] - pivot[j]
            s[j] += (ea + eb) + (ec + ed)
            q[j] = ed * ed + (ec * ec + (eb * eb + (ea * ea + q[j])))
    for r in range(swept, rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            va = minus(load64(x, a + j), load(pivot, j))
            store(s, j, plus(load(s, j), va))
            store(q, j, muladd(va, va, load(q, j)))
        for j in range(whole, w):
            ea = x[a + j] - pivot[j]
            s[j] += ea
            q[j] = ea * ea + q[j]


@exact
def settle(part, pivot, count, stats, first, final):
    """Mean and m2 of the channels from `first` on, from partial sums (tiles, 2, channels) added in that order.

    Returns True when done. False: some pivots were too far from the mean; they have been replaced, sum again. Pivots
    that were good stay, so that one wild channel does not move the bits of the others.
    """
    done = True
    for c in range(pivot.size):
        s = np.float64(0.0)
        q = np.float64(0.0)
        for t in range(part.shape[0]):
            s += part[t, 0, c]
            q += part[t, 1, c]
        mean = pivot[c] + s / count
        stats[0, first + c] = mean
        m2 = q - s * (s / count)
        stats[1, first + c] = max(m2, np.float64(0.0)) if m2 == m2 else m2
        if not s * (s / count) <= CANCELLED * q and not final:  # also true for NaN
            done = False
            pivot[c] = mean if np.isfinite(mean) else np.float64(0.0)
    return done


@exact
def inverse_std(var, eps):
    """1 / sqrt(var + eps); 0 where that is infinite, so that a constant channel gives exactly beta."""
    v = var + eps
    return np.float64(0.0) if v == 0.0 else 1.0 / np.sqrt(v)


@exact
def affine(mean, invstd, gamma, beta, coefficients, c):
    """Column c of `coefficients` = (centre, scale, shift) of y = (x - centre) * scale + shift, in y's dtype.

    centre is the mean, rounded; what the rounding lost goes into shift. x - centre is exact where x is near the mean,
    so no digit is lost for |mean| >> std, as it would be in x * scale + shift.
    """
    scale = gamma * invstd
    coefficients[0, c] = mean
    coefficients[1, c] = scale
    coefficients[2, c] = beta + (coefficients[0, c] - mean) * scale


@elementwise
def normalize_run(x, y, centre, scale, shift):
    """y = (x - centre) * scale + shift over one contiguous run."""
    whole = x.size // LANES * LANES
    for i in range(0, whole, LANES):
        store(y, i, muladd(minus(load(x, i), centre), scale, shift))
    for i in range(whole, x.size):
        y[i] = (x[i] - centre) * scale + shift


@elementwise
def channel_sums(x, j, outer, stride, inner, up, pivot):
    """s and q of one channel: `outer` runs of `inner` elements, `stride` apart, from x[j] on, `up` or down."""
    s, q = np.float64(0.0), np.float64(0.0)
    ss, qq = zeros(), zeros()
    summed = 0
    for m in range(outer):
        n = m if up else outer - 1 - m
        for low in range(0, inner, SEGMENT):
            b = j + n * stride + low
            size = min(SEGMENT, inner - low)
            whole = size // LANES * LANES
            for k in range(0, whole, LANES):
                d = minus(load64(x, b + k), pivot)
                ss, qq = plus(ss, d), muladd(d, d, qq)
            for k in range(whole, size):
                e = x[b + k] - pivot
                s += e
                q += e * e
            summed += size
            if summed >= SEGMENT:
                s, q = s + total(ss), q + total(qq)
                ss, qq = zeros(), zeros()
                summed = 0
    return s + total(ss), q + total(qq)


@elementwise
def normalize_channel_ahead(x, y, i, j, outer, stride, inner, up, centre, scale, shift, pivot):
    """Write y of the channel that starts at i and, in the same loop, take `channel_sums` of the one at j.

    Writing one channel while reading the next keeps both directions of memory busy: the training forward takes 1.2
    times a copy where one after the other takes 1.6. Alternating between the two by blocks gains nothing.
    """
    s, q = np.float64(0.0), np.float64(0.0)
    ss, qq = zeros(), zeros()
    summed = 0
    for m in range(outer):
        n = m if up else outer - 1 - m
        for low in range(0, inner, SEGMENT):
            a = i + n * stride + low
            b = j + n * stride + low
            size = min(SEGMENT, inner - low)
            whole = size // LANES * LANES
            for k in range(0, whole, LANES):
                store(y, a + k, muladd(minus(load(x, a + k), centre), scale, shift))
                d = minus(load64(x, b + k), pivot)
                ss, qq = plus(ss, d), muladd(d, d, qq)
            for k in range(whole, size):
                e = x[b + k] - pivot
                s += e
                q += e * e
                y[a + k] = (x[a + k] - centre) * scale + shift
            summed += size
            if summed >= SEGMENT:
                s, q = s + total(ss), q + total(qq)
                ss, qq = zeros(), zeros()
                summed = 0
    return s + total(ss), q + total(qq)


@elementwise
def normalize_rows(x, y, i, rows, stride, centre, scale, shift):
    """Write y of `rows` rows, `stride` elements apart, from y[i] on, with coefficients per column."""
    w = centre.size
    whole = w // LANES * LANES
    for r in range(rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            store(y, a + j, muladd(minus(load(x, a + j), load(centre, j)), load(scale, j), load(shift, j)))
        for j in range(whole, w):
            y[a + j] = (x[a + j] - centre[j]) * scale[j] + shift[j]
