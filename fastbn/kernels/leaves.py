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
from .grid import AHEAD, SEGMENT
from .lanes import (
    LANES,
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
    total,
    zeros,
)

# Past this share of q, s**2 / n has cancelled three bits of m2.
CANCELLED = 0.875


@elementwise
def ahead(k, row, step):
    """Where the values lie that come AHEAD after position k of a row: in this row, or in the next, `step` away."""
    far = k + min(AHEAD, row)
    return far if far < row else far - row + step


@elementwise
def run_sums(x, low, high, pivot):
    """s and q of x[low:high]."""
    ss, qq = zeros(), zeros()
    whole = high - (high - low) % LANES
    for i in range(low, whole, LANES):
        prefetch(x, i + AHEAD)
        d = minus(load64(x, i), pivot)
        ss, qq = plus(ss, d), muladd(d, d, qq)
    if whole < high:
        d = only(minus(load64_part(x, whole, high - whole), pivot), high - whole)
        ss, qq = plus(ss, d), muladd(d, d, qq)
    return total(ss), total(qq)


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
            far = ahead(j, w, 4 * stride)
            prefetch(x, a + far)
            prefetch(x, b + far)
            prefetch(x, c + far)
            prefetch(x, d + far)
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
def settle(part, pivot, count, state, first, final):
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
        state[0, first + c] = mean
        m2 = q - s * (s / count)
        state[1, first + c] = max(m2, np.float64(0.0)) if m2 == m2 else m2
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
def normalize_run(x, y, low, high, centre, scale, shift):
    """y = (x - centre) * scale + shift from `low` to `high`."""
    whole = high - (high - low) % LANES
    for i in range(low, whole, LANES):
        prefetch(x, i + AHEAD)
        prefetch(y, i + AHEAD)
        store(y, i, muladd(minus(load(x, i), centre), scale, shift))
    if whole < high:
        rest = high - whole
        store_part(y, whole, rest, muladd(minus(load_part(x, whole, rest), centre), scale, shift))


@elementwise
def group_sums(x, j, outer, stride, inner, up, pivot, lanes, sums):
    """Set sums (2, channels) to s and q of consecutive channels, of which x[j] is the first value.

    Each of the `outer` samples, `stride` apart and taken `up` or down, has the runs of `inner` elements of these
    channels side by side. `lanes` is room for the sixteen partial sums of every s and q.
    """
    group = pivot.size
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
            p = pivot[c]
            for low in range(c * inner, (c + 1) * inner, SEGMENT):
                b = j + n * stride
                ss, qq = load64(lanes, 2 * c * LANES), load64(lanes, (2 * c + 1) * LANES)
                high = min(low + SEGMENT, (c + 1) * inner)
                whole = high - (high - low) % LANES
                for k in range(low, whole, LANES):
                    prefetch(x, b + ahead(k, row, step))
                    d = minus(load64(x, b + k), p)
                    ss, qq = plus(ss, d), muladd(d, d, qq)
                if whole < high:
                    d = only(minus(load64_part(x, b + whole, high - whole), p), high - whole)
                    ss, qq = plus(ss, d), muladd(d, d, qq)
                if settled:
                    sums[0, c] += total(ss)
                    sums[1, c] += total(qq)
                    ss, qq = zeros(), zeros()
                store(lanes, 2 * c * LANES, ss)
                store(lanes, (2 * c + 1) * LANES, qq)


@elementwise
def normalize_group_ahead(x, y, i, j, outer, stride, inner, up, k3, pivot, lanes, sums):
    """Write y of the channels that start at i and, in the same loop, take `group_sums` of those at j.

    k3 (3, channels) are the coefficients of `affine`. Writing some channels while reading the next keeps both
    directions of memory busy: the training forward takes 1.2 times a copy where one after the other takes 1.6.
    Alternating between the two by blocks gains nothing.
    """
    group = pivot.size
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
            p, centre, scale, shift = pivot[c], k3[0, c], k3[1, c], k3[2, c]
            for low in range(c * inner, (c + 1) * inner, SEGMENT):
                a, b = i + n * stride, j + n * stride
                ss, qq = load64(lanes, 2 * c * LANES), load64(lanes, (2 * c + 1) * LANES)
                high = min(low + SEGMENT, (c + 1) * inner)
                whole = high - (high - low) % LANES
                for k in range(low, whole, LANES):
                    far = ahead(k, row, step)
                    prefetch(x, b + far)
                    prefetch(y, a + far)
                    store(y, a + k, muladd(minus(load(x, a + k), centre), scale, shift))
                    d = minus(load64(x, b + k), p)
                    ss, qq = plus(ss, d), muladd(d, d, qq)
                if whole < high:
                    rest = high - whole
                    store_part(y, a + whole, rest, muladd(minus(load_part(x, a + whole, rest), centre), scale, shift))
                    d = only(minus(load64_part(x, b + whole, rest), p), rest)
                    ss, qq = plus(ss, d), muladd(d, d, qq)
                if settled:
                    sums[0, c] += total(ss)
                    sums[1, c] += total(qq)
                    ss, qq = zeros(), zeros()
                store(lanes, 2 * c * LANES, ss)
                store(lanes, (2 * c + 1) * LANES, qq)


@elementwise
def normalize_rows(x, y, i, rows, stride, centre, scale, shift):
    """Write y of `rows` rows, `stride` elements apart, from y[i] on, with coefficients per column."""
    w = centre.size
    whole = w // LANES * LANES
    for r in range(rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            far = a + ahead(j, w, stride)
            prefetch(x, far)
            prefetch(y, far)
            store(y, a + j, muladd(minus(load(x, a + j), load(centre, j)), load(scale, j), load(shift, j)))
        for j in range(whole, w):
            y[a + j] = (x[a + j] - centre[j]) * scale[j] + shift[j]
