"""Gradients over the tiles: one kernel for long inner runs, one for short ones.

With xhat = (x - mean) * invstd, g = dy where y > 0 (everywhere, without an activation) and sums over the n values of a
channel (Ioffe & Szegedy 2015, section 3, with the two terms of the mean and the variance written out):

    dbeta  = sum(g)
    dgamma = sum(g * xhat)
    dx     = gamma * invstd * (g - w * (dbeta / n + xhat * dgamma / n))
    dz     = g

where the weights w are those of the statistics, n is their sum, and 1 stands for them if there are none. With the
statistics held fixed dx = gamma * invstd * g. `state` holds the rows mean, m2, gamma and beta of the
forward, as it left them; `grads` receives the rows dgamma and dbeta.

What a call has not is None, as in `forward`: dz, relu (the bits that the forward has left) and w, fused or split; and
`through`, which is True unless the statistics were held fixed. An element of weight 0 whose x or dy is not finite adds
nothing to the sums.

Memory traffic: fused tiles read dy and x once and write dx once, and so does the frozen backward. Split tiles read dy
and x twice, the second time from the end. dz is written once, with dx. dx may be dy.
"""

import numpy as np

from .._jit import elementwise, exact, kernel, prange
from .forward import APART, FUSED, ONE, SUMS, WRITE, ZERO, fold_columns, spread, strip_room, strip_words
from .grid import AHEAD, SEGMENT, TERMS
from .lanes import (
    LANES,
    apart,
    compact,
    guarded,
    inlined,
    inside,
    like,
    load,
    load64,
    load_weights,
    minus,
    muladd,
    of_channel,
    only,
    passed,
    plus,
    prefetch,
    row,
    rows_like,
    store,
    times,
    total,
    zeros,
)
from .leaves import (
    PIECE,
    add,
    add_exactly,
    add_up,
    ahead,
    inverse_std,
    renewed,
    row_weights,
    run_weights,
    variance,
)

# -------------------------------------------------------------------------------------------------------------- pieces


@elementwise
def products(dy, x, i, n, centre, relu, word, w, j):
    """g and x - centre of a piece."""
    inlined()
    weight = load_weights(w, j, n)
    g = passed(load64(dy, i, n), relu, word)
    d = only(minus(load64(x, i, n), centre), n)  # 0 * inf, of a given mean, would be NaN
    return guarded(g, d, weight), guarded(d, g, weight)


@elementwise
def gradient(dy, x, dx, i, n, scale, weight, slope, centre, shift, dz, relu, word, w, j):
    """A piece of dx = scale * g + w * (weight * ((x - centre) * slope) + shift), and of dz = g.

    Without x, of dx = scale * g, as it is where the statistics were held fixed.
    """
    inlined()
    g = passed(load(dy, i, n, dx), relu, word)
    store(dz, i, n, g)
    if x is None:
        store(dx, i, n, times(g, scale))
    else:
        within = load_weights(w, j, n)
        xhat = times(minus(load(x, i, n, dx), centre), slope)
        store(dx, i, n, muladd(g, scale, times(inside(muladd(xhat, weight, shift), within), within)))


# ---------------------------------------------------------------------------------------------------------------- sums


@elementwise
def run_products(dy, x, low, high, centre, relu, word, w):
    """sum(g) and sum(g * (x - centre)) from `low` to `high`, of no more than TERMS pieces."""
    sss, qqq = zeros(), zeros()
    whole = high - (high - low) % LANES
    for piece in range(low, whole, PIECE):
        ss, qq = zeros(), zeros()
        for i in range(piece, min(piece + PIECE, whole), LANES):
            prefetch(x, i + AHEAD)
            prefetch(dy, i + AHEAD)
            g, d = products(dy, x, i, LANES, centre, relu, word + (i - low) // LANES, w, i - low)
            ss, qq = plus(ss, g), muladd(g, d, qq)
        sss, qqq = plus(sss, ss), plus(qqq, qq)
    if whole < high:
        g, d = products(dy, x, whole, high - whole, centre, relu, word + (whole - low) // LANES, w, whole - low)
        sss, qqq = plus(sss, g), muladd(g, d, qqq)
    return total(sss), total(qqq)


@elementwise
def add_rows(dy, x, a, stride, n, centre, relu, word, words, w, j, width, sums, s, q):
    """Add a piece of two rows to their column sums."""
    inlined()
    ga, da = products(dy, x, a, n, centre, relu, word, w, j)
    gb, db = products(dy, x, a + stride, n, centre, relu, word + words, w, j + width)
    store(sums, s, n, plus(load64(sums, s, n), plus(ga, gb)))
    store(sums, q, n, muladd(gb, db, muladd(ga, da, load64(sums, q, n))))


@elementwise
def add_row(dy, x, a, n, centre, relu, word, w, j, sums, s, q):
    """Add a piece of one row to its column sums."""
    inlined()
    g, d = products(dy, x, a, n, centre, relu, word, w, j)
    store(sums, s, n, plus(load64(sums, s, n), g))
    store(sums, q, n, muladd(g, d, load64(sums, q, n)))


@elementwise
def few_rows_products(dy, x, i, rows, stride, width, centre, p, relu, word, words, w, sums, s, q):
    """Add to the column sums s and q those of `rows` rows: as `leaves.few_rows_sums`, two rows in one sweep."""
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    swept = rows // 2 * 2
    for r in range(0, swept, 2):
        a, bits = i + r * stride, word + r * words
        for j in range(0, whole, LANES):
            far = a + ahead(j, width, 2 * stride)
            prefetch(x, far)
            prefetch(dy, far)
            prefetch(x, far + stride)
            prefetch(dy, far + stride)
            v, at, at_w = load64(centre, p + j, LANES), bits + j // LANES, r * width + j
            add_rows(dy, x, a + j, stride, LANES, v, relu, at, words, w, at_w, width, sums, s + j, q + j)
        if rest > 0:
            j = whole
            v, at, at_w = load64(centre, p + j, rest), bits + j // LANES, r * width + j
            add_rows(dy, x, a + j, stride, rest, v, relu, at, words, w, at_w, width, sums, s + j, q + j)
    for r in range(swept, rows):
        a, bits = i + r * stride, word + r * words
        for j in range(0, whole, LANES):
            v, at = load64(centre, p + j, LANES), bits + j // LANES
            add_row(dy, x, a + j, LANES, v, relu, at, w, r * width + j, sums, s + j, q + j)
        if rest > 0:
            j = whole
            v, at = load64(centre, p + j, rest), bits + j // LANES
            add_row(dy, x, a + j, rest, v, relu, at, w, r * width + j, sums, s + j, q + j)


@exact
def block_products(
    dy, x, i, rows, stride, width, centre, p, relu, word, words, w, step, channels, inner, w_room, sums, s, q, room, r
):  # fmt: skip
    """The same for any number of rows, as `leaves.block_sums`."""
    compact()
    for m in range(0, rows, TERMS):
        few = min(TERMS, rows - m)
        at, bits = i + m * stride, word + m * words
        row_weights(w, step, channels, inner, at, few, stride, width, w_room)
        if m == 0:
            few_rows_products(dy, x, at, few, stride, width, centre, p, relu, bits, words, w_room, sums, s, q)
        else:
            room[r : r + 2 * width] = 0.0
            few_rows_products(dy, x, at, few, stride, width, centre, p, relu, bits, words, w_room, room, r, r + width)
            add(sums, s, room, r, width)
            add(sums, q, room, r + width, width)


@elementwise
def sum_group(
    dy, x, dx, i, j, outer, stride, inner, up, write, k5, dz, relu, point, first, group, w, step, w_room, lanes, sums
):  # fmt: skip
    """Set `sums` to sum(g) of `group` channels, then sum(g * (x - centre)), and `write` dx: as `leaves.sum_group`.

    The centres of those that are summed, from element j on, start at point[first]. dx is written of those that start at
    i, whose coefficients by `dx_coefficients` are k5.
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
        word_a, word_b = a // inner * words, b // inner * words
        drained = m % often == often - 1 or m == outer - 1
        for c in range(group):
            ahead_centre = point[first + c]
            scale, weight, slope = k5[c], k5[group + c], k5[2 * group + c]
            centre, shift = k5[3 * group + c], k5[4 * group + c]
            start = c * inner
            for low in range(start, start + inner, PIECE):
                ss, qq = load64(lanes, 2 * c * LANES, LANES), load64(lanes, (2 * c + 1) * LANES, LANES)
                high = min(low + PIECE, start + inner)
                whole = high - (high - low) % LANES
                if w is not None:
                    if renewed(step, inner, c, low - start):
                        run_weights(w, step, n, j // inner + c, low - start, high - low, w_room)
                        if write:
                            run_weights(w, step, n, i // inner + c, low - start, high - low, w_room[PIECE:])
                bits = c * words + (low - start) // LANES
                for k in range(low, whole, LANES):
                    far = ahead(k, row, down)
                    prefetch(x, b + far)
                    prefetch(dy, b + far)
                    at = bits + (k - low) // LANES
                    g, d = products(dy, x, b + k, LANES, ahead_centre, relu, word_b + at, w_room, k - low)
                    ss, qq = plus(ss, g), muladd(g, d, qq)
                    if write:
                        prefetch(dx, a + far)
                        prefetch(dz, a + far)
                        gradient(
                            dy, x, dx, a + k, LANES, scale, weight, slope, centre, shift,
                            dz, relu, word_a + at, w_room, PIECE + (k - low),
                        )  # fmt: skip
                if whole < high:
                    rest = high - whole
                    at = bits + (whole - low) // LANES
                    g, d = products(dy, x, b + whole, rest, ahead_centre, relu, word_b + at, w_room, whole - low)
                    ss, qq = plus(ss, g), muladd(g, d, qq)
                    if write:
                        gradient(
                            dy, x, dx, a + whole, rest, scale, weight, slope, centre, shift,
                            dz, relu, word_a + at, w_room, PIECE + (whole - low),
                        )  # fmt: skip
                if drained:
                    add_exactly(sums, c, 2 * group, total(ss))
                    add_exactly(sums, group + c, 2 * group, total(qq))
                    ss, qq = zeros(), zeros()
                store(lanes, 2 * c * LANES, LANES, ss)
                store(lanes, (2 * c + 1) * LANES, LANES, qq)
    for c in range(2 * group):
        error = sums[2 * group + c]
        sums[c] += error if error == error else 0.0


# ---------------------------------------------------------------------------------------------------------------- to dx


@elementwise
def dx_run(dy, x, dx, low, high, scale, weight, slope, centre, shift, dz, relu, word, w):
    """`gradient` from `low` to `high`."""
    whole = high - (high - low) % LANES
    for i in range(low, whole, LANES):
        prefetch(x, i + AHEAD)
        prefetch(dy, i + AHEAD)
        prefetch(dx, i + AHEAD)
        prefetch(dz, i + AHEAD)
        at, at_w = word + (i - low) // LANES, i - low
        gradient(dy, x, dx, i, LANES, scale, weight, slope, centre, shift, dz, relu, at, w, at_w)
    if whole < high:
        at, at_w, rest = word + (whole - low) // LANES, whole - low, high - whole
        gradient(dy, x, dx, whole, rest, scale, weight, slope, centre, shift, dz, relu, at, w, at_w)


@elementwise
def gradient_of_columns(dy, x, dx, i, n, k, j, width, dz, relu, word, w, at_w):
    """`gradient` of a piece of a row: coefficients for each column, rows of `width` in k, from the j-th on."""
    inlined()
    scale, weight, slope = load(k, j, n, dx), load(k, width + j, n, dx), load(k, 2 * width + j, n, dx)
    centre, shift = load(k, 3 * width + j, n, dx), load(k, 4 * width + j, n, dx)
    gradient(dy, x, dx, i, n, scale, weight, slope, centre, shift, dz, relu, word, w, at_w)


@elementwise
def dx_rows(dy, x, dx, i, rows, stride, width, k, low, k_width, dz, relu, word, words, w):
    """`gradient` of `rows` rows of `width` columns, `stride` elements apart, from element i on.

    The coefficients of the columns are rows of `k_width` in k, from the `low`-th on.
    """
    compact()
    whole = width // LANES * LANES
    rest = width - whole
    for r in range(rows):
        a, bits = i + r * stride, word + r * words
        for j in range(0, whole, LANES):
            far = a + ahead(j, width, stride)
            prefetch(x, far)
            prefetch(dy, far)
            prefetch(dx, far)
            prefetch(dz, far)
            at = bits + j // LANES
            gradient_of_columns(dy, x, dx, a + j, LANES, k, low + j, k_width, dz, relu, at, w, r * width + j)
        if rest > 0:
            j = whole
            at = bits + j // LANES
            gradient_of_columns(dy, x, dx, a + j, rest, k, low + j, k_width, dz, relu, at, w, r * width + j)


@exact
def block_dx(
    dy, x, dx, i, rows, stride, width, k, low, k_width, dz, relu, word, words, w, step, channels, inner, w_room
):  # fmt: skip
    """The same for any number of rows, whose statistics were not held fixed."""
    compact()
    if w is None:
        dx_rows(dy, x, dx, i, rows, stride, width, k, low, k_width, dz, relu, word, words, None)
    else:
        for m in range(0, rows, TERMS):
            few, at, bits = min(TERMS, rows - m), i + m * stride, word + m * words
            row_weights(w, step, channels, inner, at, few, stride, width, w_room)
            dx_rows(dy, x, dx, at, few, stride, width, k, low, k_width, dz, relu, bits, words, w_room)


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
        invstd = inverse_std(variance(state, count, c), eps)
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
def dx_coefficients(through, point, grads, count, first, number, k):
    """k = `number` scales, weights, slopes, centres and shifts of the channels from `first` on, for dx.

    dx = scale * g + w * (weight * xhat + shift) with xhat = (x - centre) * slope; xhat by itself, because slope *
    weight leaves the range of float32 long before dx does. As in `affine`, what rounding the centre loses goes into
    shift. Where the statistics were held fixed (`through` is None) all but scale are 0.
    """
    compact()
    channels = grads.shape[1]
    for i in range(number):
        c = first + i
        centre, slope, scale = point[c], point[channels + c], point[2 * channels + c]
        k[i] = scale
        for m in range(1, 5):
            k[m * number + i] = 0.0
        n = of_channel(count, c)
        if through is not None and n != 0.0:
            weight = -scale * (grads[0, c] / n)
            k[number + i] = weight
            k[2 * number + i] = slope
            k[3 * number + i] = centre
            k[4 * number + i] = weight * (slope * (k[3 * number + i] - centre)) - scale * (grads[1, c] / n)


# ------------------------------------------------------------------------------------------------------------ long runs


@exact
def fused_channels(first, last, dy, x, dx, point, count, grads, grid, dz, relu, w, step, room, w_room, k):
    """Consecutive channels in groups, pipelined as in the forward: dx of one is written while the next is summed."""
    compact()
    outer, channels, inner, group, _ = grid
    stride = channels * inner
    sums, lanes = room[: 4 * group], room[4 * group :]
    for c in range(first - group, last, group):
        now, then = min(group, last - c), min(group, last - c - group)
        up = (c // group) % 2 != 0
        i, j = c * inner, (c + group) * inner
        summed = False
        if c >= first:
            finish_sums(sums, point, grads, c, now)
            dx_coefficients(True, point, grads, count, c, now, k)
            summed = then == now  # else the group is summed once more, in vain: it is the same loop
            n, b = (c + group, j) if summed else (c, i)
            sum_group(
                dy, x, dx, i, b, outer, stride, inner, up, True, k, dz, relu, point, n, now, w, step, w_room,
                lanes, sums,
            )  # fmt: skip
        if then > 0 and not summed:
            n = c + group
            sum_group(
                dy, x, dx, j, j, outer, stride, inner, up, False, k, dz, relu, point, n, then, w, step, w_room,
                lanes, sums,
            )  # fmt: skip


@exact
def segments_tile(through, phase, t, dy, x, dx, point, part, k, grid, dz, relu, w, step, w_room):
    """A few consecutive segments of runs: their partial sums, their dx, or both."""
    apart()
    outer, channels, inner, _, tiles = grid
    per_run = -(-inner // SEGMENT)
    segments = outer * channels * per_run
    for i in range(t * segments // tiles, (t + 1) * segments // tiles):
        run, piece = i // per_run, i % per_run
        n, c = run // channels, run % channels
        start = piece * SEGMENT
        low = run * inner + start
        high = min(low + SEGMENT, (run + 1) * inner)
        word = run * -(-inner // LANES) + start // LANES
        run_weights(w, step, n, c, start, high - low, w_room)
        scale, weight, slope = k[c], k[channels + c], k[2 * channels + c]
        centre, shift = k[3 * channels + c], k[4 * channels + c]
        if phase != WRITE:
            s, q = run_products(dy, x, low, high, point[c], relu, word, w_room)
            slot = 2 * (n * per_run + piece) * channels + c
            part[slot] = s
            part[slot + channels] = q
        if through is None:
            dx_run(dy, None, dx, low, high, scale, weight, slope, centre, shift, dz, relu, word, w_room)
        elif phase == WRITE:
            dx_run(dy, x, dx, low, high, scale, weight, slope, centre, shift, dz, relu, word, w_room)


@kernel
def backward_runs(dy, x, dx, state, eps, count, grads, through, fused, split, overwritten, sizes, dz, relu, w, step):
    """Long inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    outer, channels, inner, group, tiles = sizes
    grid = outer, channels, inner, group, tiles
    groups = -(-channels // group) if group > 0 else 0
    phase = FUSED if fused is not None else SUMS
    pieces = outer * -(-inner // SEGMENT)
    point = points(state, eps, count, overwritten)
    room = np.empty((tiles if phase == FUSED else 0, (4 + 2 * LANES) * group + APART))
    part = np.empty(0 if phase == FUSED else pieces * 2 * channels)
    k = np.full(tiles * (5 * group + APART) if phase == FUSED else 5 * channels, like(dx))
    w_room = rows_like(w, tiles, (2 * PIECE if phase == FUSED else min(SEGMENT, inner)) + LANES)
    if split is not None and through is None:  # dx does not wait for the sums
        dx_coefficients(through, point, grads, count, ZERO, channels, k)
    while True:
        for t in prange(tiles):
            tile_w = row(w_room, np.intp(t))
            if fused is not None:
                first = np.intp(t) * groups // tiles * group
                last = min((np.intp(t) + 1) * groups // tiles * group, channels)
                own, k_own = room[np.intp(t)], k[np.intp(t) * (5 * group + APART) :]
                fused_channels(
                    first, last, dy, x, dx, point, count, grads, grid, dz, relu, w, step, own, tile_w, k_own
                )  # fmt: skip
            if split is not None:
                tile = tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t)  # the second pass goes back
                segments_tile(through, phase, tile, dy, x, dx, point, part, k, grid, dz, relu, w, step, tile_w)
        if phase != SUMS:
            break
        if split is not None:  # phase says so; this leaves it out of the machine code
            add_up(part, ZERO, pieces, 2 * channels)
            finish_sums(part, point, grads, ZERO, channels)
            if through is None:
                break
            dx_coefficients(through, point, grads, count, ZERO, channels, k)
            phase = WRITE


# ----------------------------------------------------------------------------------------------------------- short runs


@exact
def fused_strips(t, dy, x, dx, point, count, grads, sizes, dz, relu, w, step, room, w_room, k, k_columns):
    """Some strips of a few channels each: their sums, and while dy and x are in the cache, their dx."""
    compact()
    total, stride, channels, inner, _, panel, panels, tiles = sizes
    outer, wide = total // stride, panel * inner
    own = t * strip_room(panel, inner)
    sums, columns = room[own : own + 2 * panel], room[own + 2 * panel :]
    part, few = columns[wide:], columns[3 * wide :]  # both sums of all rows; of TERMS of them
    k, k_columns = k[t * (5 * panel + APART) :], k_columns[t * (5 * wide + APART) :]
    words = strip_words(stride, panel, inner, panels)
    for p in range(t * panels // tiles, (t + 1) * panels // tiles):
        first = p * panel
        start, number = first * inner, min(panel, channels - first)
        width = number * inner
        part[: 2 * width] = 0.0
        spread(point, first, number, inner, columns, ZERO, width)
        block_products(
            dy, x, start, outer, stride, width, columns, ZERO, relu, p * words, panels * words,
            w, step, channels, inner, w_room, part, ZERO, width, few, ZERO,
        )  # fmt: skip
        fold_columns(part, ONE, width, number, inner, sums)
        finish_sums(sums, point, grads, first, number)
        dx_coefficients(True, point, grads, count, first, number, k)
        for i in range(5):
            spread(k, i * number, number, inner, k_columns, i * width, width)
        block_dx(
            dy, x, dx, start, outer, stride, width, k_columns, ZERO, width, dz, relu, p * words, panels * words,
            w, step, channels, inner, w_room,
        )  # fmt: skip


@exact
def rows_tile(through, phase, t, dy, x, dx, centres, part, room, k, sizes, dz, relu, w, step, w_room):
    """A block of rows of a strip: its column sums, its dx, or both. `centres` and `k` are by column."""
    compact()
    total, width, channels, inner, blocks, panel, panels, _ = sizes
    b, p = t // panels, t % panels
    low = p * panel * inner
    high = width if p == panels - 1 else low + panel * inner
    full = total // width
    row, end = b * full // blocks, (b + 1) * full // blocks
    words = panels * strip_words(width, panel, inner, panels)
    for last in range(2):
        r = end if last else row
        i, word = r * width + low, r * words + p * (words // panels)
        rows = (1 if b == blocks - 1 else 0) if last else end - row
        columns = total - full * width if last else high - low  # the last row may not be full: then it is one strip
        if rows * columns > 0:
            if phase != WRITE:
                slot = 2 * b * width + low
                block_products(
                    dy, x, i, rows, width, columns, centres, low, relu, word, words,
                    w, step, channels, inner, w_room, part, slot, slot + width, room, 2 * (b * width + low),
                )  # fmt: skip
            if through is None:
                dx_rows(dy, None, dx, i, rows, width, columns, k, low, width, dz, relu, word, words, None)
            elif phase == WRITE:
                block_dx(
                    dy, x, dx, i, rows, width, columns, k, low, width, dz, relu, word, words,
                    w, step, channels, inner, w_room,
                )  # fmt: skip


@exact
def column_coefficients(through, point, grads, count, channels, inner, width, k, k_columns):
    """`dx_coefficients` of all channels, and those of each of `width` columns."""
    compact()
    dx_coefficients(through, point, grads, count, ZERO, channels, k)
    for i in range(5):
        spread(k, i * channels, channels, inner, k_columns, i * width, width)


@kernel
def backward_rows(dy, x, dx, state, eps, count, grads, through, fused, split, overwritten, sizes, dz, relu, w, step):
    """Short inner runs. `sizes` is that of `grid`; a frozen backward takes the split one."""
    total, width, channels, inner, blocks, panel, panels, whole = sizes
    phase = FUSED if fused is not None else SUMS
    tiles = whole if phase == FUSED else blocks * panels
    many = total // width // blocks >= TERMS  # rows of a block
    room = np.empty(tiles * strip_room(panel, inner) if phase == FUSED else 2 * blocks * width if many else 0)
    point = points(state, eps, count, overwritten)
    sums = np.empty(0 if phase == FUSED else 2 * channels)
    part = np.zeros(0 if phase == FUSED else 2 * blocks * width)
    columns = np.empty(0 if phase == FUSED else width)
    k = np.full(tiles * (5 * panel + APART) if phase == FUSED else 5 * channels, like(dx))
    k_columns = np.full(tiles * (5 * panel * inner + APART) if phase == FUSED else 5 * width, like(dx))
    w_room = rows_like(w, tiles, (TERMS * strip_words(width, panel, inner, panels) + 1) * LANES)
    if phase != FUSED:
        spread(point, ZERO, channels, inner, columns, ZERO, width)
    if split is not None and through is None:  # dx does not wait for the sums
        column_coefficients(through, point, grads, count, channels, inner, width, k, k_columns)
    while True:
        for t in prange(tiles):
            tile_w = row(w_room, np.intp(t))
            if fused is not None:
                fused_strips(
                    np.intp(t), dy, x, dx, point, count, grads, sizes, dz, relu, w, step, room, tile_w, k, k_columns
                )  # fmt: skip
            if split is not None:
                tile = tiles - 1 - np.intp(t) if phase == WRITE else np.intp(t)  # the second pass goes back
                rows_tile(
                    through, phase, tile, dy, x, dx, columns, part, room, k_columns, sizes, dz, relu, w, step, tile_w
                )
        if phase != SUMS:
            break
        if split is not None:
            fold_columns(part, blocks, width, channels, inner, sums)
            finish_sums(sums, point, grads, ZERO, channels)
            if through is None:
                break
            column_coefficients(through, point, grads, count, channels, inner, width, k, k_columns)
            phase = WRITE
