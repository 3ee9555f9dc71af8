"""The innermost loops of the forward: sums of a run, a group of channels or a block of rows, and x to y.

Those of the backward are in `backward`; a frozen one uses `normalize_run` and `normalize_rows` from here.

Statistics are shifted sums. With weights w (1 if there are none), their sum n, and a pivot p near a channel's mean,

    s = sum(w * (x - p))        q = sum(w * (x - p)**2)
    mean = p + s / n            m2 = q - s**2 / n

in float64, which is exact to float64 as long as (mean - p)**2 is not large beside the variance; `settle` checks that,
and asks for a second pass with the mean as the pivot where it fails. (Chan, Golub, LeVeque 1983, "Algorithms for
computing the sample variance", section 3, the shifted two-pass family.)

    y = relu((x - centre) * scale + shift + z)

with the residual z and the activation only where there are any: the parts of a formula that may be None are z, `relu`
(True, or the array that receives the bits of y > 0) and w (see `lanes`).
"""

import numpy as np

from .._jit import elementwise, exact
from .grid import AHEAD, TERMS
from .lanes import (
    LANES,
    apart,
    compact,
    element,
    inlined,
    inside,
    load,
    load64,
    load_weights,
    minus,
    move,
    muladd,
    of_channel,
    only,
    plus,
    prefetch,
    rectified,
    repeat,
    store,
    times,
    total,
    transformed,
    zeros,
)

# Elements whose sum, in sixteen lanes of TERMS terms each, is one term of the sum above it.
PIECE = TERMS * LANES

# Past this share of q, s**2 / n has cancelled two bits of m2.
CANCELLED = 0.75


# -------------------------------------------------------------------------------------------------------------- pieces


@elementwise
def ahead(k, row, step):
    """Where the values lie that come AHEAD after position k of a row: in this row, or in the next, `step` away."""
    inlined()
    far = k + min(AHEAD, row)
    return far if far < row else far - row + step


@elementwise
def terms(x, i, n, pivot, w, j):
    """d = x - pivot of a piece, and w * d; 0 where the weight is."""
    inlined()
    weight = load_weights(w, j, n)
    d = inside(only(minus(load64(x, i, n), pivot), n), weight)
    return d, times(d, weight)


@elementwise
def normalize(x, i, step, y, j, n, centre, scale, shift, z, relu, word):
    """A piece of y from element j on, from those of x that lie `step` apart from i on."""
    inlined()
    value = transformed(x, i, step, y, j, n, centre, scale, shift, z)
    store(y, j, n, rectified(value, relu, word, y))


@elementwise
def add_rows(x, a, stride, n, pivot, w, j, width, sums, s, q):
    """Add a piece of four rows to their column sums: a quarter of the loads and stores of these."""
    inlined()
    da, ea = terms(x, a, n, pivot, w, j)
    db, eb = terms(x, a + stride, n, pivot, w, j + width)
    dc, ec = terms(x, a + 2 * stride, n, pivot, w, j + 2 * width)
    dd, ed = terms(x, a + 3 * stride, n, pivot, w, j + 3 * width)
    store(sums, s, n, plus(load64(sums, s, n), plus(plus(ea, eb), plus(ec, ed))))
    store(sums, q, n, muladd(ed, dd, muladd(ec, dc, muladd(eb, db, muladd(ea, da, load64(sums, q, n))))))


@elementwise
def add_row(x, a, n, pivot, w, j, sums, s, q):
    """Add a piece of one row to its column sums."""
    inlined()
    d, e = terms(x, a, n, pivot, w, j)
    store(sums, s, n, plus(load64(sums, s, n), e))
    store(sums, q, n, muladd(e, d, load64(sums, q, n)))


# ------------------------------------------------------------------------------------------------------------- weights


@elementwise
def fill(room, j, w, i, number):
    """room[j : j + number] = w[i], and up to LANES - 1 elements more."""
    inlined()
    for m in range(0, number, LANES):
        repeat(room, j + m, w, i)


@elementwise
def take(room, j, w, i, number):
    """room[j : j + number] = w[i : i + number]; they never overlap, which LLVM cannot know."""
    inlined()
    whole = number // LANES * LANES
    for m in range(0, whole, LANES):
        move(room, j + m, w, i + m)
    for m in range(whole, number):
        room[j + m] = w[i + m]


@elementwise
def run_weights(w, step, n, c, k, number, room):
    """Set `room` to the weights of `number` elements of a run, from its k-th on; it has LANES elements to spare.

    The weight of sample n, channel c and element k is w[n * step[0] + c * step[1] + k * step[2]]. They are copied even
    where they lie side by side: a leaf that hands out one of two arrays would have to count its references.
    """
    if w is not None:
        at = n * step[0] + c * step[1] + k * step[2]
        if step[2] == 0:
            fill(room, 0, w, at, number)
        else:
            take(room, 0, w, at, number)


@elementwise
def renewed(step, inner, c, k):
    """Whether channel c of a group has other weights from element k of a run on than the piece before."""
    inlined()
    return step[1] != 0 or (step[2] != 0 and inner > PIECE) or (c == 0 and k == 0)


@elementwise
def row_weights(w, step, channels, inner, first, rows, stride, width, room):
    """Set `room` to the weights of `rows` rows of `width` elements, `stride` apart, from element `first` on.

    It has LANES elements to spare.
    """
    if w is None:
        return
    apart()
    row = channels * inner
    for r in range(rows):
        n, rest = (first + r * stride) // row, (first + r * stride) % row
        j, end = r * width, (r + 1) * width
        while j < end:
            few, at = min(row - rest, end - j), n * step[0]
            if step[1] == 0 and step[2] == 0:
                fill(room, j, w, at, few)
            elif step[1] == inner and step[2] == min(inner - 1, 1):  # a weight for every element
                take(room, j, w, at + rest, few)
            else:
                c, k = rest // inner, rest % inner
                for m in range(few):
                    room[j + m] = w[at + c * step[1] + k * step[2]]
                    k += 1
                    if k == inner:
                        c, k = c + 1, 0
            n, rest, j = n + 1, 0, j + few


@exact
def weighted_pivot(x, w, step, c, outer, channels, inner, most):
    """The weighted mean of the first values of a channel whose weights are not 0, at most `most`; 0 if there are none.

    As accurate for any offset as the pivots of the kernels: one value plus the mean distance from it.
    """
    compact()
    seen = 0
    first, s, weights = np.float64(0.0), np.float64(0.0), np.float64(0.0)
    for n in range(outer):
        at = n * step[0] + c * step[1]
        for k in range(inner if step[2] != 0 or w[at] > 0 else 0):
            weight = np.float64(w[at + k * step[2]])
            if weight > 0.0:
                value = element(x, (n * channels + c) * inner + k)
                if seen == 0:
                    first = value
                s += weight * (value - first)
                weights += weight
                seen += 1
                if seen == most:
                    return first + s / weights
    return first + s / weights if seen > 0 else np.float64(0.0)


@exact
def weighted_pivots(x, w, step, start, number, outer, channels, inner, most, pivot, sums, seen):
    """`weighted_pivot` of `number` channels from `start` on, whose values lie in rows, which are walked in their order.

    Rows without weight come first for nothing; of those that follow, four times as many as `most` values take are
    looked at. `sums` has room for two numbers of each channel, `seen` for one.
    """
    compact()
    for c in range(number):
        pivot[c], sums[c], sums[number + c], seen[c] = 0.0, 0.0, 0.0, 0.0
    found, left, n = 0, 4 * most, 0
    while n < outer and left > 0 and found < number:
        some = False
        for c in range(number):
            at = n * step[0] + (start + c) * step[1]
            for k in range(inner if seen[c] < most else 0):
                weight = np.float64(w[at + k * step[2]])
                if weight > 0.0:
                    some = True
                    value = element(x, (n * channels + start + c) * inner + k)
                    if seen[c] == 0.0:
                        pivot[c] = value
                    sums[c] += weight * (value - pivot[c])
                    sums[number + c] += weight
                    seen[c] += 1.0
                    if seen[c] == most:
                        found += 1
                        break
            if not some and step[1] == 0 and step[2] == 0:
                break  # a row without weight
        left -= 1 if some or left < 4 * most else 0
        n += 1
    for c in range(number):
        if seen[c] > 0.0:
            pivot[c] += sums[c] / sums[number + c]


# ---------------------------------------------------------------------------------------------------------------- sums


@elementwise
def run_sums(x, low, high, pivot, w):
    """s and q of x[low:high], of no more than TERMS pieces, whose weights are w."""
    sss, qqq = zeros(), zeros()
    whole = high - (high - low) % LANES
    for piece in range(low, whole, PIECE):
        ss, qq = zeros(), zeros()
        for i in range(piece, min(piece + PIECE, whole), LANES):
            prefetch(x, i + AHEAD)
            d, e = terms(x, i, LANES, pivot, w, i - low)
            ss, qq = plus(ss, e), muladd(e, d, qq)
        sss, qqq = plus(sss, ss), plus(qqq, qq)
    if whole < high:
        d, e = terms(x, whole, high - whole, pivot, w, whole - low)
        sss, qqq = plus(sss, e), muladd(e, d, qqq)
    return total(sss), total(qqq)


@elementwise
def few_rows_sums(x, i, rows, stride, width, pivot, p, w, sums, s, q):
    """Add to the column sums s and q those of `rows` rows, `stride` elements apart, from x[i] on.

    The pivots of the `width` columns start at pivot[p], the sums at sums[s] and sums[q]; w has the weights of the rows
    side by side. Four rows in one sweep over the sums are 1.2 times as fast.
    """
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    swept = rows // 4 * 4
    for r in range(0, swept, 4):
        a = i + r * stride
        for j in range(0, whole, LANES):
            far = a + ahead(j, width, 4 * stride)
            prefetch(x, far)
            prefetch(x, far + stride)
            prefetch(x, far + 2 * stride)
            prefetch(x, far + 3 * stride)
            v = load64(pivot, p + j, LANES)
            add_rows(x, a + j, stride, LANES, v, w, r * width + j, width, sums, s + j, q + j)
        if rest > 0:
            v = load64(pivot, p + whole, rest)
            add_rows(x, a + whole, stride, rest, v, w, r * width + whole, width, sums, s + whole, q + whole)
    for r in range(swept, rows):
        a = i + r * stride
        for j in range(0, whole, LANES):
            add_row(x, a + j, LANES, load64(pivot, p + j, LANES), w, r * width + j, sums, s + j, q + j)
        if rest > 0:
            v = load64(pivot, p + whole, rest)
            add_row(x, a + whole, rest, v, w, r * width + whole, sums, s + whole, q + whole)


@exact
def block_sums(x, i, rows, stride, width, pivot, p, w, step, channels, inner, w_room, sums, s, q, room, r):
    """The same for any number of rows, TERMS at a time; sums[s] and sums[q] are 0 before.

    From room[r] on there is room for 2 * `width` sums, if there are more than TERMS rows, and in `w_room` for as many
    rows of weights.
    """
    compact()
    for row in range(0, rows, TERMS):
        few = min(TERMS, rows - row)
        at = i + row * stride
        row_weights(w, step, channels, inner, at, few, stride, width, w_room)
        if row == 0:
            few_rows_sums(x, at, few, stride, width, pivot, p, w_room, sums, s, q)
        else:
            room[r : r + 2 * width] = 0.0
            few_rows_sums(x, at, few, stride, width, pivot, p, w_room, room, r, r + width)
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
        store(a, i + k, LANES, plus(load64(a, i + k, LANES), load64(b, j + k, LANES)))
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


# -------------------------------------------------------------------------------------------------- what sums amount to


@exact
def settle(sums, pivot, count, state, first, number, final):
    """Mean and m2 of `number` channels from `first` on, from `sums`: s of each channel, then q of each.

    `count` is the sum of the weights, for all channels or for each. Returns True when done. False: some pivots were too
    far from the mean; they have been replaced, sum again. Pivots that were good stay, so that one wild channel does not
    move the bits of the others.
    """
    compact()
    done = True
    for c in range(number):
        s, q, n = sums[c], sums[number + c], of_channel(count, first + c)
        if n == 0.0:  # no value at all
            state[0, first + c], state[1, first + c] = np.float64(0.0), np.float64(0.0)
            continue
        mean = pivot[c] + s / n
        state[0, first + c] = mean
        m2 = q - s * (s / n)
        state[1, first + c] = max(m2, np.float64(0.0)) if m2 == m2 else m2
        trusted = s * (s / n) <= CANCELLED * q  # False for NaN
        if not trusted and not final:
            done = False
            pivot[c] = mean if np.isfinite(mean) else np.float64(0.0)
    return done


@exact
def variance(state, count, c):
    """The variance of a channel; 0 where there is no value."""
    n = of_channel(count, c)
    return state[1, c] / n if n != 0.0 else np.float64(0.0)


@exact
def inverse_std(var, eps):
    """1 / sqrt(var + eps); 0 where that is infinite, so that a constant channel gives exactly beta."""
    v = var + eps
    return np.float64(0.0) if v == 0.0 else 1.0 / np.sqrt(v)


@exact
def affine(state, eps, count, first, number, k):
    """k = `number` centres, scales and shifts of y = (x - centre) * scale + shift, in the dtype y is computed in.

    They belong to the channels from `first` on.

    centre is the mean, rounded; what the rounding lost goes into shift. x - centre is exact where x is near the mean,
    so no digit is lost for |mean| >> std, as it would be in x * scale + shift.
    """
    compact()
    for i in range(number):
        mean, gamma, beta = state[0, first + i], state[2, first + i], state[3, first + i]
        var = variance(state, count, first + i)
        scale = gamma * inverse_std(var, eps)
        k[i] = mean
        k[number + i] = scale
        if var == 0.0 and np.isinf(k[number + i]):  # 0 * inf would be NaN
            scale = np.float64(0.0)
            k[number + i] = scale
        k[2 * number + i] = beta + (k[i] - mean) * scale


# -------------------------------------------------------------------------------------------------------------- x to y


@elementwise
def normalize_run(x, at, step, y, low, high, centre, scale, shift, z, relu, word):
    """y from `low` to `high`, from those elements of x that lie `step` apart from `at` on (None: side by side)."""
    whole = high - (high - low) % LANES
    for i in range(low, whole, LANES):
        far = at + (i - low) * (1 if step is None else step)
        prefetch(x, far + AHEAD)
        prefetch(y, i + AHEAD)
        prefetch(z, i + AHEAD)
        normalize(x, far, step, y, i, LANES, centre, scale, shift, z, relu, word + (i - low) // LANES)
    if whole < high:
        far = at + (whole - low) * (1 if step is None else step)
        last = word + (whole - low) // LANES
        normalize(x, far, step, y, whole, high - whole, centre, scale, shift, z, relu, last)


@elementwise
def sum_group(x, y, i, j, outer, stride, inner, up, write, k3, z, relu, pivot, group, w, step, w_room, lanes, sums):
    """Set `sums` to s of `group` consecutive channels, then to their q, and in the same loop `write` y of other ones.

    x[j] is the first value of those that are summed. Each of the `outer` samples, `stride` apart and taken `up` or
    down, has the runs of `inner` elements of the group side by side. `lanes` is room for the sixteen partial sums of
    every s and q. y is written of the channels that start at i, whose coefficients by `affine` are k3. `write` is
    passed as a literal True or False, and Numba compiles one function for each: a test in the loop costs 3 %, at 7 x 7
    a tenth. `pivot` has a value for each channel of the group, `w_room` room for a piece of weights.

    Writing some channels while reading the next keeps both directions of memory busy: training took 1.6 copies where
    one came after the other. Alternating between the two by blocks gained nothing.
    """
    apart()
    row, down = group * inner, stride if up else -stride
    words = -(-inner // LANES)  # of the bits of a run
    sums[:] = 0.0
    for c in range(2 * group):
        store(lanes, c * LANES, LANES, zeros())
    often = max(1, TERMS // words)  # samples, after which the lanes are added up
    for m in range(outer):
        n = m if up else outer - 1 - m
        a, b = i + n * stride, j + n * stride
        word = a // inner * words
        drained = m % often == often - 1 or m == outer - 1
        for c in range(group):
            p, centre, scale, shift = pivot[c], k3[c], k3[group + c], k3[2 * group + c]
            start = c * inner
            for low in range(start, start + inner, PIECE):
                ss, qq = load64(lanes, 2 * c * LANES, LANES), load64(lanes, (2 * c + 1) * LANES, LANES)
                high = min(low + PIECE, start + inner)
                whole = high - (high - low) % LANES
                if w is not None:
                    if renewed(step, inner, c, low - start):
                        run_weights(w, step, n, j // inner + c, low - start, high - low, w_room)
                for k in range(low, whole, LANES):
                    far = ahead(k, row, down)
                    prefetch(x, b + far)
                    if write:
                        prefetch(y, a + far)
                        prefetch(z, a + far)
                        at = word + c * words + (k - start) // LANES
                        normalize(x, a + k, None, y, a + k, LANES, centre, scale, shift, z, relu, at)
                    d, e = terms(x, b + k, LANES, p, w_room, k - low)
                    ss, qq = plus(ss, e), muladd(e, d, qq)
                if whole < high:
                    rest = high - whole
                    if write:
                        at = word + c * words + (whole - start) // LANES
                        normalize(x, a + whole, None, y, a + whole, rest, centre, scale, shift, z, relu, at)
                    d, e = terms(x, b + whole, rest, p, w_room, whole - low)
                    ss, qq = plus(ss, e), muladd(e, d, qq)
                if drained:
                    add_exactly(sums, c, 2 * group, total(ss))
                    add_exactly(sums, group + c, 2 * group, total(qq))
                    ss, qq = zeros(), zeros()
                store(lanes, 2 * c * LANES, LANES, ss)
                store(lanes, (2 * c + 1) * LANES, LANES, qq)
    for c in range(2 * group):
        error = sums[2 * group + c]
        sums[c] += error if error == error else 0.0


@elementwise
def normalize_rows(x, y, i, rows, stride, width, k, low, k_width, z, relu, word, words):
    """Write y of `rows` rows, `stride` elements apart, from y[i] on.

    The coefficients of the `width` columns are rows of `k_width` in k, from the `low`-th on; the bits of the rows start
    at relu[word], `words` apart.
    """
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    centre, scale, shift = low, k_width + low, 2 * k_width + low
    for r in range(rows):
        a, bits = i + r * stride, word + r * words
        for j in range(0, whole, LANES):
            far = a + ahead(j, width, stride)
            prefetch(x, far)
            prefetch(y, far)
            prefetch(z, far)
            kc, ks, kb = load(k, centre + j, LANES, y), load(k, scale + j, LANES, y), load(k, shift + j, LANES, y)
            normalize(x, a + j, None, y, a + j, LANES, kc, ks, kb, z, relu, bits + j // LANES)
        if rest > 0:
            j = whole
            kc, ks, kb = load(k, centre + j, rest, y), load(k, scale + j, rest, y), load(k, shift + j, rest, y)
            normalize(x, a + j, None, y, a + j, rest, kc, ks, kb, z, relu, bits + j // LANES)
