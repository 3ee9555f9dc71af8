"""The kernels on every way to cut a small array into tiles, also ways that `grid` keeps for large ones."""

import functools
import itertools

import numpy as np
import pytest
import reference
from reference import assert_within

from fastbn.kernels import backward, forward
from fastbn.kernels.forward import PIVOT_RUN
from fastbn.kernels.grid import SEGMENT
from fastbn.kernels.plain import LANES

EPS = 1e-3
FUSED, SPLIT = True, False


def runs(outer, channels, inner, group, tiles):
    return (outer, channels, inner), True, np.array([outer, channels, inner, group, tiles])


def rows(outer, channels, inner, fold, blocks, panel, fused=SPLIT):
    """`fused` is the number of tiles."""
    panels = -(-channels // panel)
    row = channels * inner
    sizes = [outer * row, row * fold, channels, inner, blocks, panel, panels, fused]
    return (outer, channels, inner), False, np.array(sizes)


GRIDS = [
    # Fused runs: groups of one channel and of several, a last one that is smaller, more tiles than groups.
    *(runs(3, 5, inner, group, tiles) for inner in (33, 48) for group in (1, 2, 5) for tiles in (1, 2, 4)),
    runs(4, 7, 40, 3, 3),
    runs(2, 2, SEGMENT + 17, 1, 1),
    # Samples enough that the lanes are added up in between.
    runs(515, 3, 32, 2, 1),
    # Split runs: segments of one sample and of several, tiles of several segments and of none.
    *(runs(2, 3, inner, 0, tiles) for inner in (8, 47, SEGMENT, SEGMENT + 1) for tiles in (1, 4, 16)),
    # Fused rows: strips of some channels, the last one narrower; odd rows and a tail beside whole lanes.
    *(rows(n, c, i, 1, 1, panel, FUSED) for n in (1, 2, 7, 9) for c, i in ((37, 1), (9, 4)) for panel in (4, 9, 37)),
    *(rows(n, 37, 1, 1, 1, 4, tiles) for n in (2, 9) for tiles in (2, 3, 10)),
    # Rows so many that a pivot from the first of them may be far from the mean.
    *(rows(300, 3, inner, 1, 1, panel, FUSED) for inner in (9, 25) for panel in (2, 3)),
    rows(300, 3, 25, 1, 2, 3),
    # Split rows: blocks of rows by strips of columns.
    *(rows(n, c, i, 1, b, panel) for n in (7, 9) for c, i in ((37, 1), (9, 4)) for b in (1, 2, 4) for panel in (4, 37)),
    # Folded rows, of which the last is not full: then there is one strip.
    *(
        rows(n, c, i, fold, b, c)
        for n in (9, 16, 37)
        for c, i in ((3, 1), (2, 9))
        for fold in (1, 3, 8)
        for b in (1, 2)
    ),
]


def name(case):
    shape, is_runs, sizes = case
    return f"{'runs' if is_runs else 'rows'}-{'x'.join(map(str, shape))}-{'_'.join(str(int(n)) for n in sizes[3:])}"


def guarded(a):
    """A copy of a, flat, with an array's worth of room around it that must stay as it is."""
    room = np.full(a.size + 4 * LANES, 77, a.dtype)
    inside = room[2 * LANES : room.size - 2 * LANES]
    inside[:] = a.ravel()
    return room, inside


def untouched(room):
    assert (room[: 2 * LANES] == 77).all()
    assert (room[room.size - 2 * LANES :] == 77).all()


@functools.cache
def arrays(shape, dtype):
    """x, dy, mean, var, gamma, beta. The first values of channel 1, of which its pivot is made, are far from the rest.

    Where those are many, its sums must be taken twice.
    """
    rng = np.random.default_rng(7)
    std = rng.uniform(0.5, 2, shape[1])
    x = rng.normal(size=shape) * std[:, None] + rng.uniform(-3, 3, (shape[1], 1))
    x[0, 1, :PIVOT_RUN] += 1e7
    x[:, 0] += 1e3
    d = x.astype(dtype), rng.normal(0.3, 1, shape).astype(dtype)
    return *d, *rng.normal(size=(1, shape[1])), std**2, *rng.normal(size=(2, shape[1]))


def forward_of(case, x, state, count, measure, write):
    shape, is_runs, sizes = case
    kernel = forward.forward_runs if is_runs else forward.forward_rows
    room, y = guarded(np.full(x.size, 55, x.dtype))
    given_room, given = guarded(x)
    kernel.serial(
        given, y, state, EPS, count, measure or None, *kind(case), write, sizes, *(None,) * (5 if is_runs else 4)
    )
    untouched(room)
    untouched(given_room)
    np.testing.assert_array_equal(given, x.ravel())
    return y.reshape(shape)


@pytest.mark.parametrize("case", GRIDS, ids=name)
def test_every_way_to_cut(case):
    shape, _, _ = case
    for dtype in ("float32", "float64") if shape[2] < SEGMENT else ("float32",):
        x, dy, mean, var, gamma, beta = arrays(shape, dtype)
        n = float(shape[0] * shape[2])
        both = np.stack([0 * gamma, 0 * gamma, gamma, beta])

        if n > 1:
            y = forward_of(case, x, both, n, True, True)
            expected = reference.train(x, gamma, beta, eps=EPS)
            assert_within(y, expected.y, expected.budget, "y")
            exact_mean, exact_var = reference.mean_var(x, 1)
            assert_within(both[0], exact_mean, reference.tolerance("float64", 0, abs(exact_mean) + np.sqrt(exact_var)))
            assert_within(both[1] / n, exact_var, reference.tolerance("float64", 0, exact_var), "var")

            alone = np.zeros((2, shape[1]))
            assert (forward_of(case, x, alone, n, True, False) == 55).all()  # the moments alone write no y
            np.testing.assert_array_equal(alone, both[:2])
            check_backward(case, dy, x, both, n, frozen=False)
            check_in_place(case, dy, y, both, n)

        if not fused(case):  # fused tiles are there to be measured
            given = np.stack([mean, var, gamma, beta])
            y = forward_of(case, x, given, 1.0, False, True)
            expected = reference.infer(x, mean, var, gamma, beta, eps=EPS)
            assert_within(y, expected.y, expected.budget, "inference")
            np.testing.assert_array_equal(given, [mean, var, gamma, beta])
            check_backward(case, dy, x, given, 1.0, frozen=True)


def fused(case):
    _, is_runs, sizes = case
    return bool(sizes[3] if is_runs else sizes[7])


def kind(case):
    return (True, None) if fused(case) else (None, True)


def backward_of(case, dy, x, state, count, frozen, overwritten):
    shape, is_runs, sizes = case
    kernel = backward.backward_runs if is_runs else backward.backward_rows
    grads = np.full((2, shape[1]), 33.0)
    before = state.copy()
    rooms, (given, flat_x, dx) = zip(*(guarded(a) for a in (dy, x, np.full_like(x, 55))), strict=True)
    kernel.serial(
        given, flat_x, dx, state, EPS, count, grads, not frozen or None, *kind(case), overwritten, sizes, *(None,) * 4
    )
    for room in rooms:
        untouched(room)
    np.testing.assert_array_equal(given, dy.ravel())
    np.testing.assert_array_equal(flat_x, x.ravel())
    np.testing.assert_array_equal(state, before)
    return dx.reshape(shape), grads


def check_backward(case, dy, x, state, count, frozen):
    dx, (dgamma, dbeta) = backward_of(case, dy, x, state, count, frozen, overwritten=False)
    fixed = (state[0], state[1]) if frozen else None
    expected = reference.backward(dy, x, state[2], eps=EPS, fixed=fixed)
    assert_within(dx, expected.dx, expected.dx_budget, "dx")
    assert_within(dgamma, expected.dgamma, expected.dgamma_budget, "dgamma")
    assert_within(dbeta, expected.dbeta, expected.dbeta_budget, "dbeta")


def check_in_place(case, dy, y, state, count):
    """Where y has overwritten x: xhat = (y - beta) / gamma in the formulas of the backward."""
    dx, (dgamma, dbeta) = backward_of(case, dy, y, state, count, frozen=False, overwritten=True)
    gamma, beta = (reference.spread(row, y, 1) for row in state[2:])
    scale = gamma * reference.spread(reference.invstd(state[1] / count, EPS), y, 1)
    g, xhat = dy.astype(reference.WIDE), (y - beta) / gamma
    sums = [reference.reduce(a, 1) for a in (g, g * xhat, abs(g), abs(g * xhat) + abs(g * beta / gamma))]
    assert_within(dbeta, sums[0], reference.tolerance("float64", 0, sums[2]), "dbeta in place")
    assert_within(dgamma, sums[1], reference.tolerance("float64", 0, sums[3]), "dgamma in place")
    through_mean, through_var, size, size_hat = (reference.spread(s, y, 1) / count for s in sums)
    rounded = abs(scale) * (abs(g) + abs(through_mean) + abs(xhat * through_var))
    budget = reference.tolerance(y.dtype, rounded, rounded + abs(scale) * (size + abs(xhat) * size_hat))
    assert_within(dx, scale * (g - through_mean - xhat * through_var), budget, "dx in place")


@pytest.mark.parametrize("build", ["serial", "parallel"])
def test_fused_tiles_give_the_bits_of_one(build):
    """How many channels a tile holds changes nothing; neither does which build runs it."""
    found = set()
    for group, tiles in itertools.product((2,), (1, 2, 3, 4)):
        shape, _, sizes = runs(5, 7, 50, group, tiles)
        x, dy, _, _, gamma, beta = arrays(shape, "float32")
        state, y, grads = np.stack([0 * gamma, 0 * gamma, gamma, beta]), np.empty(x.size, x.dtype), np.empty((2, 7))
        dx = np.empty_like(y)
        getattr(forward.forward_runs, build)(
            x.ravel(), y, state, EPS, 250.0, True, True, None, True, sizes, None, None, None, None, None
        )
        arguments = dy.ravel(), x.ravel(), dx, state, EPS, 250.0, grads, True, True, None, False, sizes
        getattr(backward.backward_runs, build)(*arguments, None, None, None, None)
        found.add((y.tobytes(), state.tobytes(), dx.tobytes(), grads.tobytes()))
    assert len(found) == 1
