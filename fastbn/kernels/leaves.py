"""The innermost loops of the forward: sums of a run, a group of channels or a block of rows, and x to y.

Those of the backward are in `backward`; a frozen one uses `normalize_run` and `normalize_rows` from here.

Statistics are shifted sums. With a pivot p near the mean of a channel,

    s = sum(x - p)        q = sum((x - p)**2)
    mean = p + s / n      m2 = q - s**2 / n

in float64, which is exact to float64 as long as (mean - p)**2 is not large beside the variance; `settle` checks that,
and asks for a second pass with the mean as the pivot where it fails. (Chan, Golub, LeVeque 1983, "Algorithms for
computing the sample variance", section 3, the shifted two-pass family.)
"""

import numpy as np

from .._jit import elementwise, exact
from .grid import AHEAD, TERMS
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
    total,
    zeros,
)

# Elements whose sum, in sixteen lanes of TERMS terms each, is one term of the sum above it.
PIECE = TERMS * LANES

# Past this share of q, s**2 / n has cancelled two bits of m2.
CANCELLED = 0.75


@elementwise
def ahead(k, row, step):
    """Where the values lie that come AHEAD after position k of a row: in this row, or in the next, `step` away."""
    far = k + min(AHEAD, row)
    return far if far < row else far - row + step


@elementwise
def run_sums(x, low, high, pivot):
    """s and q of x[low:high], of no more than TERMS pieces."""
    sss, qqq = zeros(), zeros()
    whole = high - (high - low) % LANES
    for piece in range(low, whole, PIECE):
        ss, qq = zeros(), zeros()
        for i in range(piece, min(piece + PIECE, whole), LANES):
            prefetch(x, i + AHEAD)
            d = minus(load64(x, i), pivot)
            ss, qq = plus(ss, d), muladd(d, d, qq)
        sss, qqq = plus(sss, ss), plus(qqq, qq)
    if whole < high:
        d = only(minus(load64_part(x, whole, high - whole), pivot), high - whole)
        sss, qqq = plus(sss, d), muladd(d, d, qqq)
    return total(sss), total(qqq)


@elementwise
def few_rows_sums(x, i, rows, stride, width, pivot, p, sums, s, q):
    """Add to the column sums s and q those of `rows` rows, `stride` elements apart, from x[i] on.

    The pivots of the `width` columns start at pivot[p], the sums at sums[s] and sums[q]. Four rows in one sweep over
    the sums: a quarter of their loads and stores, 1.2 times as fast.
    """
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    swept = rows // 4 * 4
    for r in range(0, swept, 4):
        a = i + r * stride
        b = a + stride
        c = b + stride
        d = c + stride
        for j in range(0, whole, LANES):
            far = ahead(j, width, 4 * stride)
            prefetch(x, a + far)
            prefetch(x, b + far)
            prefetch(x, c + far)
            prefetch(x, d + far)
            v = load(pivot, p + j)
            va, vb = minus(load64(x, a + j), v), minus(load64(x, b + j), v)
            vc, vd = minus(load64(x, c + j), v), minus(load64(x, d + j), v)
            store(sums, s + j, plus(load(sums, s + j), plus(plus(va, vb), plus(vc, vd))))
            store(sums, q + j, muladd(vd, vd, muladd(vc, vc, muladd(vb, vb, muladd(va, va, load(sums, q + j))))))
        if rest > 0:
            j = whole
            v = load_part(pivot, p + j, rest)
            va, vb = minus(load64_part(x, a + j, rest), v), minus(load64_part(x, b + j, rest), v)
            vc, vd = minus(load64_part(x, c + j, rest), v), minus(load64_part(x, d + j, rest), v)
            store_part(sums, s + j, rest, plus(load_part(sums, s + j, rest), plus(plus(va, vb), plus(vc, vd))))
            before = load_part(sums, q + j, rest)
            squares = muladd(vd, vd, muladd(vc, vc, muladd(vb, vb, muladd(va, va, before))))
            store_part(sums, q + j, rest, squares)
    for r in range(swept, rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            va = minus(load64(x, a + j), load(pivot, p + j))
            store(sums, s + j, plus(load(sums, s + j), va))
            store(sums, q + j, muladd(va, va, load(sums, q + j)))
        if rest > 0:
            j = whole
            va = minus(load64_part(x, a + j, rest), load_part(pivot, p + j, rest))
            store_part(sums, s + j, rest, plus(load_part(sums, s + j, rest), va))
            store_part(sums, q + j, rest, muladd(va, va, load_part(sums, q + j, rest)))


@exact
def block_sums(x, i, rows, stride, width, pivot, p, sums, s, q, room, r):
    """The same for any number of rows, TERMS at a time; sums[s] and sums[q] are 0 before.

    From room[r] on there is room for 2 * `width` sums, if there are more than TERMS rows.
    """
    compact()
    few_rows_sums(x, i, min(rows, TERMS), stride, width, pivot, p, sums, s, q)
    for row in range(TERMS, rows, TERMS):
        room[r : r + 2 * width] = 0.0
        few = min(TERMS, rows - row)
        few_rows_sums(x, i + row * stride, few, stride, width, pivot, p, room, r, r + width)
        add(sums, s, room, r, width)
        add(sums, q, room, r + width, width)


@elementwise
def add_exactly(sums, c, error, term):
    """sums[c] += term, and what rounding loses of it goes to sums[error + c]; NaN where the sum is not finite.

    Knuth 1997, "The Art of Computer Programming" 2, section 4.2.2, theorem B.
    """
    before = sums[c]
    after = before + term
    share = after - before
    sums[c] = after
    sums[error + c] += (before - (after - share)) + (term - share)


@elementwise
def add(a, i, b, j, number):
    """a[i] += b[j] and so on, `number` of them."""
    whole = number // LANES * LANES
    for k in range(0, whole, LANES):
        store(a, i + k, plus(load(a, i + k), load(b, j + k)))
    for k in range(whole, number):
        a[i + k] += b[j + k]


@exact
def add_up(a, first, number, size):
    """Add up `number` stretches of `size` values, from a[first] on: halves upon halves, into the first."""
    compact()
    while number > 1:
        half = number // 2
        add(a, first, a, first + (number - half) * size, half * size)
        number -= half


@exact
def settle(sums, pivot, number, count, state, first, final):
    """Mean and m2 of `number` channels from `first` on, from `sums`: s of each channel, then q of each.

    Returns True when done. False: some pivots were too far from the mean; they have been replaced, sum again. Pivots
    that were good stay, so that one wild channel does not move the bits of the others.
    """
    compact()
    done = True
    for c in range(number):
        s, q = sums[c], sums[number + c]
        mean = pivot[c] + s / count
        state[0, first + c] = mean
        m2 = q - s * (s / count)
        state[1, first + c] = max(m2, np.float64(0.0)) if m2 == m2 else m2
        trusted = s * (s / count) <= CANCELLED * q  # False for NaN
        if not trusted and not final:
            done = False
            pivot[c] = mean if np.isfinite(mean) else np.float64(0.0)
    return done


@exact
def inverse_std(var, eps):
    """1 / sqrt(var + eps); 0 where that is infinite, so that a constant channel gives exactly beta."""
    v = var + eps
    return np.float64(0.0) if v == 0.0 else 1.0 / np.sqrt(v)


@exact
def affine(state, eps, count, first, number, k):
    """k = `number` centres, scales and shifts of y = (x - centre) * scale + shift, in y's dtype.

    They belong to the channels from `first` on.

    centre is the mean, rounded; what the rounding lost goes into shift. x - centre is exact where x is near the mean,
    so no digit is lost for |mean| >> std, as it would be in x * scale + shift.
    """
    compact()
    for i in range(number):
        mean, gamma, beta = state[0, first + i], state[2, first + i], state[3, first + i]
        scale = gamma * inverse_std(state[1, first + i] / count, eps)
        k[i] = mean
        k[number + i] = scale
        if state[1, first + i] == 0.0 and np.isinf(k[number + i]):  # 0 * inf would be NaN
            scale = np.float64(0.0)
            k[number + i] = scale
        k[2 * number + i] = beta + (k[i] - mean) * scale


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
def sum_group(x, y, i, j, outer, stride, inner, up, write, k3, pivot, group, lanes, sums):
    """Set `sums` to s of `group` consecutive channels, then to their q, and in the same loop `write` y of other ones.

    x[j] is the first value of those that are summed. Each of the `outer` samples, `stride` apart and taken `up` or
    down, has the runs of `inner` elements of the group side by side. `lanes` is room for the sixteen partial sums of
    every s and q. y is written of the channels that start at i, whose coefficients by `affine` are k3. `write` is
    passed as a literal True or False, and Numba compiles one function for each: a test in the loop costs 3 %, at 7 x 7
    a tenth. `pivot` has a value for each channel of the group.

    Writing some channels while reading the next keeps both directions of memory busy: training took 1.6 copies where
    one came after the other. Alternating between the two by blocks gained nothing.
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
            p, centre, scale, shift = pivot[c], k3[c], k3[group + c], k3[2 * group + c]
            for low in range(c * inner, (c + 1) * inner, PIECE):
                ss, qq = load64(lanes, 2 * c * LANES), load64(lanes, (2 * c + 1) * LANES)
                high = min(low + PIECE, (c + 1) * inner)
                whole = high - (high - low) % LANES
                for k in range(low, whole, LANES):
                    far = ahead(k, row, step)
                    prefetch(x, b + far)
                    if write:
                        prefetch(y, a + far)
                        store(y, a + k, muladd(minus(load(x, a + k), centre), scale, shift))
                    d = minus(load64(x, b + k), p)
                    ss, qq = plus(ss, d), muladd(d, d, qq)
                if whole < high:
                    rest = high - whole
                    if write:
                        new = muladd(minus(load_part(x, a + whole, rest), centre), scale, shift)
                        store_part(y, a + whole, rest, new)
                    d = only(minus(load64_part(x, b + whole, rest), p), rest)
                    ss, qq = plus(ss, d), muladd(d, d, qq)
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
def normalize_rows(x, y, i, rows, stride, width, k, centre, scale, shift):
    """Write y of `rows` rows, `stride` elements apart, from y[i] on.

    The coefficients of the `width` columns start at k[centre], k[scale] and k[shift].
    """
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    for r in range(rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            far = a + ahead(j, width, stride)
            prefetch(x, far)
            prefetch(y, far)
            d = minus(load(x, a + j), load(k, centre + j))
            store(y, a + j, muladd(d, load(k, scale + j), load(k, shift + j)))
        if rest > 0:
            j = whole
            d = minus(load_part(x, a + j, rest), load_part(k, centre + j, rest))
            new = muladd(d, load_part(k, scale + j, rest), load_part(k, shift + j, rest))
            store_part(y, a + j, rest, new)
