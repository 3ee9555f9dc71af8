"""What is true of every input: symmetries of the formula, on arrays that Hypothesis makes up.

`pytest` runs a few examples of each property, ``HYPOTHESIS_PROFILE=ci`` 29,000 in all, always the same, and
``HYPOTHESIS_PROFILE=soak`` new ones at every run: 10,000 of each property, or as many as FASTBN_EXAMPLES says. A
property that does not hold prints the shortest example found and the line that repeats it.
"""

import copy
import io
import itertools
import pickle
from dataclasses import replace

import numpy as np
import reference
from arrays import FLOATS, HALVES, INTEGERS
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import WIDE, assert_within, tolerance
from strategies import EXAMPLES, PARTS, PATHS, PROFILE, SEEDS, WEIGHTED, Problem, holds, problems

import fastbn

NAMES = ("y", "dx", "dgamma", "dbeta")
SMALL_OFFSETS = (0.0, 3.0)
CLONES = {
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    **{f"pickle {n}": lambda a, n=n: pickle.loads(pickle.dumps(a, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
}


def all_results(p, x=None, dy=None, **changes):
    """y, dx, dgamma, dbeta of a problem, with other data or options where they are given."""
    d = p.d
    y, saved = fastbn.batch_norm_train(d.x if x is None else x, *d.affine, **p.options | changes)
    return y, *fastbn.batch_norm_backward(d.dy if dy is None else dy, saved)


def every_result(p, d=None):
    """The bits of all that the verbs compute, by name."""
    d = d or p.d
    m = fastbn.moments(d.x, axis=p.axis)
    y, saved = fastbn.batch_norm_train(d.x, *d.affine, **p.options)
    frozen = fastbn.Saved.fixed(d.x, d.mean, d.var, *d.affine, **p.options)
    return {
        "mean": m.mean,
        "m2": m.m2,
        "saved mean": saved.mean,
        "saved var": saved.var,
        "inference": fastbn.batch_norm(d.x, d.mean, d.var, *d.affine, **p.options),
        "y": y,
        **dict(zip(NAMES[1:], fastbn.batch_norm_backward(d.dy, saved), strict=True)),
        **{f"frozen {k}": a for k, a in zip(NAMES[1:], fastbn.batch_norm_backward(d.dy, frozen), strict=True)},
    }


def budgets(p, x=None, dy=None):
    x, dy = p.d.x if x is None else x, p.d.dy if dy is None else dy
    b = reference.backward(dy, x, p.d.gamma, **p.options)
    y = reference.train(x, p.d.gamma, p.d.beta, **p.options).budget
    return y, b.dx_budget, b.dgamma_budget, b.dbeta_budget


def assert_close(found, expected, budget):
    """Two computations of one thing: each may use its error budget."""
    for a, b, most, what in zip(found, expected, budget, NAMES, strict=True):
        assert_within(a, b, 2 * most, what)


def assert_same_bits(found, expected):
    """Of two dictionaries of arrays, or sequences. NaN has one kind, and -0 is not 0."""
    if not isinstance(found, dict):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    assert found.keys() == expected.keys()
    for name, a in found.items():
        b = expected[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        np.testing.assert_array_equal(a, b, err_msg=str(name))
        np.testing.assert_array_equal(np.signbit(a[a == 0]), np.signbit(b[b == 0]), err_msg=f"{name}: the sign of 0")


def layer_of(p, **options):
    """A layer for the array of a problem, with its parameters."""
    channels = p.channels[0] if len(p.channels) == 1 else p.channels
    options = {"axis": p.axis, "eps": p.eps, "scale": p.scale, "center": p.center, "dtype": p.d.dy.dtype} | options
    bn = fastbn.BatchNorm(channels, **options)
    for a, value in ((bn.gamma, p.d.gamma), (bn.beta, p.d.beta)):
        if a is not None:
            a[...] = value
    return bn


# ---------------------------------------------------------------------------------------------------------- the formula


@holds(problems(FLOATS + INTEGERS))
def test_the_formula(p):
    """Every verb gives what the oracle gives, in new memory, and leaves its inputs alone."""
    d = p.d
    before = [None if a is None else a.tobytes() for a in (d.x, d.dy, *d.affine, d.mean, d.var)]
    with p.built():
        found = every_result(p)
    assert before == [None if a is None else a.tobytes() for a in (d.x, d.dy, *d.affine, d.mean, d.var)]
    for name, a in found.items():
        assert not any(np.shares_memory(a, b) for b in (d.x, d.dy)), name
    mean, var = reference.mean_var(d.x, p.axis)
    n = reference.count(d.x, p.axis)
    assert_within(found["mean"], mean, tolerance("float64", 0, abs(mean) + np.sqrt(var)), "mean")
    assert_within(found["m2"], var * n, tolerance("float64", 0, var * n), "m2")
    assert_same_bits([found["saved mean"], found["saved var"]], [found["mean"], found["m2"] / n])
    expected = reference.train(d.x, d.gamma, d.beta, **p.options)
    assert_within(found["y"], expected.y, expected.budget, "y")
    expected = reference.infer(d.x, d.mean, d.var, d.gamma, d.beta, **p.options)
    assert_within(found["inference"], expected.y, expected.budget, "inference")
    for prefix, fixed in (("", None), ("frozen ", (d.mean, d.var))):
        expected = vars(reference.backward(d.dy, d.x, d.gamma, fixed=fixed, **p.options))
        for name in NAMES[1:]:
            assert_within(found[prefix + name], expected[name], expected[f"{name}_budget"], prefix + name)


@holds(problems(INTEGERS))
def test_integers_are_their_float32_values(p):
    """The statistics to the last bit; the rest may be rounded less: large integers are subtracted in float64."""
    x = p.d.x.astype("float32")
    with p.built():
        assert_close(all_results(p), all_results(p, x), budgets(p, x))
        a, b = fastbn.moments(p.d.x, axis=p.axis), fastbn.moments(x, axis=p.axis)
    assert_same_bits([a.mean, a.m2], [b.mean, b.m2])


@holds(problems(), st.integers(-1000, 1000))
def test_a_shift_changes_nothing(p, shift):
    x = np.rint(p.d.x / p.d.x.dtype.type(p.spread) * 16).clip(-30000, 30000)  # integers: the shift is exact
    moved = x + x.dtype.type(shift)
    most = [np.maximum(a, b) for a, b in zip(budgets(p, x), budgets(p, moved), strict=True)]
    with p.built():
        assert_close(all_results(p, moved), all_results(p, x), most)


@holds(problems(), st.integers(-12, 12))
def test_a_scale_by_a_power_of_two_is_exact(p, k):
    factor = p.d.x.dtype.type(2.0**k)
    with p.built():
        y, dx, dgamma, dbeta = all_results(p)
        scaled = all_results(p, p.d.x * factor, eps=p.eps * 4.0**k)
    assert_same_bits(scaled, (y, dx / factor, dgamma, dbeta))


@holds(problems(), st.data())
def test_the_order_of_samples_does_not_matter(p, data):
    axis = data.draw(st.sampled_from(p.reduced), "axis")
    order = np.random.default_rng(p.seed).permutation(p.shape[axis])
    x, dy = (p.lay(a.take(order, axis)) for a in (p.d.x, p.d.dy))
    with p.built():
        y, dx, dgamma, dbeta = all_results(p, x, dy)
        back = np.argsort(order)
        assert_close((y.take(back, axis), dx.take(back, axis), dgamma, dbeta), all_results(p), budgets(p))


@holds(problems(), st.data())
def test_each_channel_is_normalized_by_itself(p, data):
    """A channel alone gives what it gives among the others."""
    at = tuple(data.draw(st.integers(0, n - 1), "channel") for n in p.channels)
    where = dict(zip(p.axes, at, strict=True))
    here = tuple(slice(where[a], where[a] + 1) if a in where else slice(None) for a in range(len(p.shape)))
    own = tuple(slice(i, i + 1) for i in at)
    affine = [None if a is None else a[own] for a in p.d.affine]
    with p.built():
        y, saved = fastbn.batch_norm_train(p.d.x[here], *affine, **p.options)
        found = y, *fastbn.batch_norm_backward(p.d.dy[here], saved)
        expected = [a[here] if a.shape == p.shape else a[own] for a in all_results(p)[:2]]
        expected += [a[own] for a in all_results(p)[2:]]
    most = [np.broadcast_to(b, p.shape)[here] for b in budgets(p)[:2]] + [b[own] for b in budgets(p)[2:]]
    assert_close(found, expected, most)


@holds(problems(), st.data())
def test_layouts_agree(p, data):
    """NCHW equals NHWC: any order of the axes, in memory to the last roundings, by name alone to the last bit."""
    rank = len(p.shape)
    order = data.draw(st.permutations(range(rank)).map(tuple), "memory order")
    other = Problem(**vars(p) | {"order": order})
    x, dy = other.lay(p.d.x), other.lay(p.d.dy)
    with p.built():
        found = all_results(p, x, dy)
        assert_close(found, all_results(p), budgets(p))
        # The same memory by another order of names; channel axes stay in order, or gamma's would change.
        names = list(data.draw(st.permutations(range(rank)), "order of the axes"))
        for place, a in zip(sorted(names.index(a) for a in p.axes), p.axes, strict=True):
            names[place] = a
        axis = tuple(names.index(a) for a in p.axes)
        renamed = all_results(p, x.transpose(names), dy.transpose(names), axis=axis)
    assert_same_bits(renamed, [a.transpose(names) if a.shape == p.shape else a for a in found[:2]] + list(found[2:]))


@holds(problems())
def test_train_statistics_fed_to_inference_give_the_training_output(p):
    with p.built():
        y, saved = fastbn.batch_norm_train(p.d.x, *p.d.affine, **p.options)
        z = fastbn.batch_norm(p.d.x, saved.mean, saved.var, *p.d.affine, **p.options)
    expected = reference.train(p.d.x, p.d.gamma, p.d.beta, **p.options)
    largest = abs(expected.y - p.spread_out(p.d.beta)) + abs(p.spread_out(p.d.beta))
    rounding = tolerance(p.d.dy.dtype, largest) / 3  # m2 / n and back again: the last rounding
    assert_within(z, y.astype(WIDE), rounding, "y")


@holds(problems())
def test_y_has_mean_beta_and_std_gamma(p):
    with p.built():
        y = fastbn.batch_norm_train(p.d.x, *p.d.affine, **p.options)[0]
    _, var = reference.mean_var(p.d.x, p.axis)
    mean, found = reference.mean_var(y, p.axis)
    budget = reference.train(p.d.x, p.d.gamma, p.d.beta, **p.options).budget
    n = reference.count(p.d.x, p.axis)
    assert_within(mean, p.d.beta.astype(WIDE), reference.reduce(budget, p.axis) / n, "mean")
    std = abs(p.d.gamma) * np.sqrt(var) * reference.invstd(var, p.eps)
    # No error of y moves its standard deviation by more than the root of its mean square.
    assert_within(np.sqrt(found), std, np.sqrt(reference.reduce(budget**2, p.axis) / n), "std")


@holds(problems())
def test_gamma_0_gives_beta_and_no_gradient(p):
    with p.built():
        y, saved = fastbn.batch_norm_train(p.d.x, 0 * p.d.gamma, p.d.beta, **p.options)
        dx = fastbn.batch_norm_backward(p.d.dy, saved)[0]
    np.testing.assert_array_equal(y, np.broadcast_to(p.spread_out(p.d.beta), y.shape))
    np.testing.assert_array_equal(dx, 0)


# --------------------------------------------------------------------------------------------------------- the gradient


@holds(problems())
def test_gradients_are_orthogonal_to_what_the_forward_removes(p):
    """sum(dx) = 0, and sum(dx * xhat) = 0 up to the share of eps in the variance."""
    with p.built():
        _, dx, dgamma, dbeta = all_results(p)
    expected = reference.backward(p.d.dy, p.d.x, p.d.gamma, **p.options)
    mean, var = reference.mean_var(p.d.x, p.axis)
    invstd = reference.invstd(var, p.eps)
    xhat = (p.d.x - p.spread_out(mean)) * p.spread_out(invstd)
    assert_within(reference.reduce(dx, p.axis), 0 * mean, reference.reduce(expected.dx_budget, p.axis), "sum dx")
    share = p.d.gamma * invstd * expected.dgamma * (1 - var * invstd**2)
    most = reference.reduce(expected.dx_budget * abs(xhat), p.axis) + tolerance("float64", 0)
    assert_within(reference.reduce(dx * xhat, p.axis), share, most, "sum dx * xhat")
    assert_within(dbeta, reference.reduce(p.d.dy, p.axis), expected.dbeta_budget, "dbeta")
    assert_within(dgamma, reference.reduce(p.d.dy * xhat, p.axis), expected.dgamma_budget, "dgamma")


@holds(problems(), st.sampled_from([-4.0, 0.5, 2.0]))
def test_the_backward_is_linear_in_dy(p, factor):
    x, dy = p.d.x, p.d.dy
    other = p.lay(np.flip(dy))
    with p.built():
        saved = fastbn.batch_norm_train(x, *p.d.affine, **p.options)[1]
        one, two = fastbn.batch_norm_backward(dy, saved), fastbn.batch_norm_backward(other, saved)
        scaled = fastbn.batch_norm_backward(dy * dy.dtype.type(factor), saved)
        both = fastbn.batch_norm_backward(dy + other, saved)
    for a, b in zip(scaled, one, strict=True):  # a power of two: exact
        np.testing.assert_array_equal(a, b * b.dtype.type(factor))
    most = [a + b for a, b in zip(budgets(p), budgets(p, dy=other), strict=True)][1:]
    # The rounding of dy + other itself goes through the backward too: to dx at most twice its size and the mean of
    # abs(xhat) * abs(xhat), which is at most the root of n, and n times to the sums.
    rounding = tolerance(dy.dtype, float(abs(dy).max() * 2))
    scale = abs(p.spread_out(p.d.gamma * reference.invstd(reference.mean_var(x, p.axis)[1], p.eps)))
    n = reference.count(x, p.axis)
    slack = (rounding * scale * (2 + np.sqrt(n)), rounding * n, rounding * n)
    for found, a, b, m, s, name in zip(both, one, two, most, slack, NAMES[1:], strict=True):
        assert_within(found, a.astype(WIDE) + b, 2 * m + s, name)


@holds(problems())
def test_the_backward_can_be_called_again(p):
    with p.built():
        saved = fastbn.batch_norm_train(p.d.x, *p.d.affine, **p.options)[1]
        before = saved.mean, saved.var
        first = fastbn.batch_norm_backward(p.d.dy, saved)
        fastbn.batch_norm_backward(-p.d.dy, saved)
        assert_same_bits(fastbn.batch_norm_backward(p.d.dy, saved), first)
    assert_same_bits((saved.mean, saved.var), before)


# ------------------------------------------------------------------------------------------------------------- the bits


@holds(problems(), st.sampled_from(["serial", "parallel"]), st.integers(1, 8))
def test_the_bits_depend_neither_on_the_build_nor_on_the_threads(p, build, threads):
    with p.built():
        expected = every_result(p)
    with p.built(build=build, threads=threads):
        assert_same_bits(every_result(p), expected)


@holds(problems())
def test_in_place_is_out_of_place_bit_by_bit(p):
    with p.built():
        y, dx, _, _ = all_results(p)
        saved = fastbn.batch_norm_train(p.d.x, *p.d.affine, **p.options)[1]
        given = (saved.mean, saved.var, *p.d.affine)
        z = fastbn.batch_norm(p.d.x, *given, **p.options)
        dy, x, again = (a.copy("K") for a in (p.d.dy, p.d.x, p.d.x))
        assert fastbn.batch_norm_backward(dy, saved, out=dy)[0] is dy
        assert fastbn.batch_norm_train(x, *p.d.affine, out=x, **p.options)[0] is x
        assert fastbn.batch_norm(again, *given, out=again, **p.options) is again
    assert_same_bits((dy, x, again), (dx, y, z))


@holds(problems(), st.integers(0, 64), st.data())
def test_results_are_the_same_in_any_memory(p, offset, data):
    """Any alignment, whole elements or not, and any order; nothing beside it is written."""
    order = data.draw(st.none() | st.permutations(range(len(p.shape))), "memory order")
    with p.built():
        expected = all_results(p)[:2]
        shape = p.d.x.shape if order is None else [p.shape[a] for a in order]
        memory = np.full(p.d.dy.nbytes + 192, 7, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        out = np.ndarray(shape, p.d.dy.dtype, memory.data, start)
        out = out if order is None else out.transpose(np.argsort(order))
        saved = fastbn.batch_norm_train(p.d.x, *p.d.affine, out=out, **p.options)[1]
        y = out.copy()
        fastbn.batch_norm_backward(p.d.dy, saved, out=out)
    assert_same_bits((y, out.copy()), [a.copy("C") for a in expected])
    assert (memory[:start] == 7).all()
    assert (memory[start + out.nbytes :] == 7).all()


@holds(problems(), st.sampled_from(["x", "dy"]), st.data())
def test_nan_and_inf_stay_in_their_channel(p, name, data):
    channel = tuple(data.draw(st.integers(0, n - 1), "channel") for n in p.channels)
    spots = data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=3), "values")
    d = p.d
    with p.built():
        before = every_result(p)
        d = copy.copy(d)
        poisoned = getattr(d, name).copy("K")
        by_channel = np.moveaxis(poisoned, p.axes, range(len(p.axes)))[channel]  # a view of all values of the channel
        rng = np.random.default_rng(p.seed)
        for value in spots:
            by_channel[tuple(rng.integers(0, n) for n in by_channel.shape)] = value
        setattr(d, name, poisoned)
        after = every_result(p, d)
    others = np.ones(p.channels, bool)
    others[channel] = False
    for what, a in after.items():
        by_channel, expected = (
            np.moveaxis(r, p.axes, range(len(p.axes))) if r.shape == p.shape else r for r in (a, before[what])
        )
        assert_same_bits([by_channel[others]], [expected[others]])
    changed = ("mean", "m2", "y", "dx", "dgamma") if name == "x" else ("dx", "dgamma", "dbeta", "frozen dbeta")
    for what in changed:
        a = after[what]
        own = np.moveaxis(a, p.axes, range(len(p.axes)))[channel] if a.shape == p.shape else a[channel]
        assert not np.isfinite(own).any(), what
    for what in {"x": ("dbeta", "frozen dbeta", "frozen dx"), "dy": ("mean", "m2", "y", "inference")}[name]:
        assert_same_bits([after[what]], [before[what]])


@holds(problems(), st.data())
def test_an_empty_batch_gives_empty_results(p, data):
    shape = list(p.shape)
    shape[data.draw(st.sampled_from(p.reduced), "axis")] = 0
    x = np.empty(shape, p.dtype)
    with p.built():
        y, saved = fastbn.batch_norm_train(x, *p.d.affine, **p.options)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(y, saved)
        z = fastbn.batch_norm(x, p.d.mean, p.d.var, *p.d.affine, **p.options)
        m = fastbn.moments(x, axis=p.axis)
        assert_same_bits((dgamma, dbeta), np.zeros((2, *p.channels), p.dtype))
        assert_same_bits((m.mean, m.m2), np.zeros((2, *p.channels)))
        assert (m.count, y.shape, dx.shape, z.shape) == (0, x.shape, x.shape, x.shape)
        bn = layer_of(p)
        before = bn.state_dict()
        assert bn(x).shape == x.shape
        assert bn.backward(x).shape == x.shape
    assert_same_state(bn.state_dict(), before)


# ----------------------------------------------------------------------------------------------------------- statistics


def assert_moments(found, x, axis, where=None):
    """`found`, merged of moments of parts of x, are those of x. Of a channel without weight there are none."""
    mean, var = reference.mean_var(x, axis, where)
    size = abs(mean) + np.sqrt(var)
    if where is None:
        assert found.count == reference.count(x, axis)
        known = np.full(mean.shape, True)
    else:
        total = reference.reduce(reference.weights(x, where), axis)
        assert_within(np.asarray(found.count), total, tolerance("float64", 0, total), "count")
        known = np.asarray(found.count > 0)
    assert_within(found.mean[known], mean[known], tolerance("float64", 0, 2 * size[known]), "mean")
    lost = 2 * np.finfo(float).eps * abs(mean) * size  # means are float64: delta is off by eps * mean
    assert_within(found.var()[known], var[known], (tolerance("float64", 0, 2 * var) + lost)[known], "var")
    assert np.isnan(found.var()[~known]).all()


@holds(problems(), st.data())
def test_split_and_merged_is_the_whole(p, data):
    axis = data.draw(st.sampled_from(p.reduced), "axis")
    at = data.draw(st.integers(0, p.shape[axis]), "at")
    with p.built():
        parts = [fastbn.moments(p.lay(part), axis=p.axis) for part in np.split(p.d.x, [at], axis)]
        whole = fastbn.moments(p.d.x, axis=p.axis)
    assert_moments(parts[0] + parts[1], p.d.x, p.axis)
    assert_moments(whole, p.d.x, p.axis)


@holds(problems(offsets=SMALL_OFFSETS), st.lists(st.integers(0, 20), max_size=2))
def test_moments_are_a_sum(p, ends):
    """Associative and commutative up to rounding, with `empty` as the zero to the last bit."""
    axis = p.reduced[0]
    a, b, c = (
        fastbn.moments(part, axis=p.axis)
        for part in np.split(p.d.x, sorted([0] * (2 - len(ends)) + [min(e, p.shape[axis]) for e in ends]), axis)
    )
    for order in itertools.permutations((a, b, c)):
        assert_moments(order[0] + order[1] + order[2], p.d.x, p.axis)
        assert_moments(order[0] + (order[1] + order[2]), p.d.x, p.axis)
        assert_moments(sum(order), p.d.x, p.axis)
    zero = fastbn.Moments.empty(p.channels)
    for m in (a, zero + a, a + zero, zero + (a + zero)):
        assert m.count == a.count
        assert_same_bits((m.mean, m.m2), (a.mean, a.m2))


@holds(problems(), st.floats(0, 1), st.sampled_from([0, 1]), st.sampled_from(FLOATS))
def test_update_running_is_its_formula(p, momentum, correction, kept):
    with p.built():
        m = fastbn.moments(p.d.x, axis=p.axis)
    mean, var = np.array(p.d.mean, kept), np.array(p.d.var, kept)
    news = m.mean, m.m2 / WIDE(m.count - correction)
    expected = [reference.running(old, new, momentum) for old, new in zip((mean, var), news, strict=True)]
    terms = [reference.running(abs(old), abs(new), momentum) for old, new in zip((mean, var), news, strict=True)]
    fastbn.update_running(mean, var, m, momentum=momentum, correction=correction)
    for name, a, b, size in zip(("mean", "var"), (mean, var), expected, terms, strict=True):
        assert a.dtype == kept
        assert_within(a, b, tolerance(kept, abs(b), size), name)


@holds(problems(), st.sampled_from([0, 1]), SEEDS)
def test_fit_population_is_that_of_all_samples(p, correction, seed):
    rng = np.random.default_rng(seed)
    axis = p.reduced[0]
    parts = np.split(p.d.x, np.sort(rng.integers(0, p.shape[axis] + 1, rng.integers(0, 4))), axis)
    bn = layer_of(p, correction=correction, momentum=None)
    with p.built():
        bn.fit_population(iter(parts))
    n = reference.count(p.d.x, p.axis)
    assert_moments(fastbn.Moments(n, bn.running_mean, bn.running_var * (n - correction)), p.d.x, p.axis)
    with p.built():
        bn(p.d.x)  # with momentum=None it goes on from there
    m = fastbn.Moments(2 * n, bn.running_mean, bn.running_var * (2 * n - correction))
    assert_moments(m, np.concatenate([p.d.x, p.d.x], axis), p.axis)


# ---------------------------------------------------------------------------------------------- weights, ReLU, residual


def trained(p, d=None, **changes):
    """y, its Saved, and all gradients of a problem with its parts, or of other data or options."""
    d = d or p.d
    y, saved = fastbn.batch_norm_train(d.x, *d.affine, **p.training | changes)
    return y, saved, fastbn.batch_norm_backward(d.dy, saved)


def through(relu, dy, y):
    """What of dy a ReLU lets through."""
    return np.where(y > 0, dy, dy.dtype.type(0)) if relu else dy


def broadcast(p):
    """The weights of each element."""
    return np.broadcast_to(p.d.w, p.shape)


def assert_gradients(p, found, y, **statistics):
    expected = vars(reference.backward(p.d.dy, p.d.x, p.d.gamma, y=y if p.relu else None, **p.options, **statistics))
    for name, a in zip(NAMES[1:], found, strict=False):
        assert_within(a, expected[name], expected[f"{name}_budget"], name)
    assert len(found) == 3 + p.residual
    for a in found[3:]:
        assert_same_bits([a], [through(p.relu, p.d.dy, y)])


@holds(problems(offsets=(0.0, 3.0, 100.0), parts=PARTS))
def test_the_formula_with_its_parts(p):
    """Every verb, in every precision, gives what the oracle gives, and leaves its inputs alone."""
    d = p.d
    inputs = [a for a in (d.x, d.dy, d.z, d.w, *d.affine) if a is not None]
    before = [a.tobytes() for a in inputs]
    with p.built():
        m = fastbn.moments(d.x, axis=p.axis, where=d.w)
        y, saved, found = trained(p)
        if not p.where:
            z = fastbn.batch_norm(d.x, d.mean, d.var, *d.affine, **p.given)
            fixed = fastbn.Saved.fixed(d.x, d.mean, d.var, *d.affine, **p.given)
            frozen = fastbn.batch_norm_backward(d.dy, fixed)
    assert before == [a.tobytes() for a in inputs]
    assert_moments(m, d.x, p.axis, d.w)
    assert_same_bits([saved.mean, saved.moments.m2, np.asarray(saved.count)], [m.mean, m.m2, np.asarray(m.count)])
    expected = reference.train(d.x, d.gamma, d.beta, **p.training)
    assert_within(y, expected.y, expected.budget, "y")
    assert_gradients(p, found, y, where=d.w)
    if not p.where:
        expected = reference.infer(d.x, d.mean, d.var, d.gamma, d.beta, **p.given)
        assert_within(z, expected.y, expected.budget, "inference")
        assert_gradients(p, frozen, z, fixed=(d.mean, d.var))


@holds(problems(parts=[p for p in PARTS if p[1] and p[0] in FLOATS]))
def test_residual_and_relu_are_what_they_add_to_the_plain_results(p):
    """To the last bit: y = max(plain + residual, 0), and the gradients are the plain ones of dy where y > 0."""
    plain = replace(p, relu=False, residual=False)
    with p.built():
        y, saved, found = trained(p)
        before, kept, _ = trained(plain)
        added = before if p.d.z is None else before + p.d.z
        masked = through(True, p.d.dy, y)
        expected = fastbn.batch_norm_backward(masked, kept)
    assert_same_bits([y], [np.where(added > 0, added, added.dtype.type(0))])
    assert_same_bits([saved.mean, saved.var, *found], [kept.mean, kept.var, *expected, *[masked] * p.residual])


@holds(problems(offsets=(0.0, 3.0, 100.0), parts=[(dtype, False, False, None) for dtype in HALVES]))
def test_half_precision_is_float64_rounded_once(p):
    """Whatever is computed from the same values in float64, up to its own last bits."""
    d = p.d
    wide = copy.copy(d)
    wide.x, wide.dy = d.x.astype("float64"), d.dy.astype("float64")
    x = np.float64(d.x)
    expected = (
        reference.train(x, d.gamma, d.beta, **p.options).budget,
        reference.backward(wide.dy, x, d.gamma, **p.options),
    )
    with p.built():
        y, saved, (dx, dgamma, dbeta) = trained(p)
        y64, _, (dx64, *sums64) = trained(p, wide)
    assert_moments(saved.moments, x, p.axis)
    assert_within(y, y64.astype(WIDE), 2 * expected[0], "y")
    assert_within(dx, dx64.astype(WIDE), 2 * expected[1].dx_budget, "dx")
    for name, a, b in zip(("dgamma", "dbeta"), (dgamma, dbeta), sums64, strict=True):
        assert_within(
            a, b.astype(WIDE), 2 * getattr(expected[1], f"{name}_budget") + tolerance("float32", abs(b)), name
        )


@holds(problems(INTEGERS[1:2]), st.sampled_from(["float32", *HALVES]))
def test_out_decides_the_dtype_of_integers(p, dtype):
    out = p.lay(np.full(p.shape, np.nan, dtype))
    with p.built():
        y, saved = fastbn.batch_norm_train(p.d.x, *p.d.affine, **p.options, out=out)
        m = fastbn.moments(p.d.x, axis=p.axis)
    assert y is out
    expected = reference.train(p.d.x, p.d.gamma, p.d.beta, **p.options, dtype=dtype)
    assert_within(y, expected.y, expected.budget, "y")
    assert_same_bits([saved.mean, saved.moments.m2], [m.mean, m.m2])


@holds(problems(parts=[p for p in PARTS if p[2]]))
def test_over_the_residual_is_out_of_place_bit_by_bit(p):
    over = p.d.z.copy("K")
    with p.built():
        y, _, expected = trained(p)
        again, _, found = trained(p, residual=over, out=over)
    assert again is over
    assert_same_bits([again, *found], [y, *expected])


@holds(problems(parts=[p for p in WEIGHTED if not p[1] and p[0] in FLOATS]), st.data())
def test_a_weight_of_k_is_k_repeats(p, data):
    """Each of which has its share of dy; as many repeats as a boolean can say are 0 and 1."""
    axis = data.draw(st.sampled_from([a for a in p.reduced if p.shape[a] > 1] or p.reduced), "axis")
    dtype = p.where.split()[1]
    times = np.random.default_rng(p.seed).integers(0, 2 if dtype == "bool" else 4, p.shape[axis])
    times[:2] = 1 if dtype == "bool" else 2
    shape = [-1 if a == axis else 1 for a in range(len(p.shape))]
    w = times.astype(dtype).reshape(shape)
    d = copy.copy(p.d)
    d.dy = p.lay(np.where(w > 0, p.d.dy, p.d.dy.dtype.type(0)))
    many = copy.copy(d)
    many.x, many.dy = (np.repeat(a, times, axis) for a in (d.x, d.dy / np.maximum(times, 1).reshape(shape)))
    many.dy = many.dy.astype(p.dtype)
    with p.built():
        y, saved, found = trained(p, d, where=w)
        again, all_saved, copies = trained(p, many, where=None)
    assert_moments(all_saved.moments, many.x, p.axis)
    np.testing.assert_array_equal(saved.count, all_saved.count)
    assert_moments(fastbn.Moments(all_saved.count, saved.moments.mean, saved.moments.m2), many.x, p.axis)
    first = np.cumsum(times) - times
    here = np.flatnonzero(times)
    expected = reference.train(d.x, d.gamma, d.beta, **p.options, where=w)
    assert_within(y.take(here, axis), again.take(first[here], axis), 2 * expected.budget.take(here, axis), "y")
    b = reference.backward(d.dy, d.x, d.gamma, **p.options, where=w)
    share = tolerance(p.dtype, np.max(abs(d.dy)))  # rounding dy / k, of which each sum has k
    scale = abs(p.spread_out(p.d.gamma * reference.invstd(reference.mean_var(d.x, p.axis, w)[1], p.eps)))
    n = all_saved.count
    dx = np.add.reduceat(copies[0].astype(WIDE), first[here], axis)
    slack = tolerance(p.dtype, abs(dx)) + 3 * share * scale * (2 + np.sqrt(n))
    assert_within(found[0].take(here, axis), dx, 2 * b.dx_budget.take(here, axis) + slack, "dx")
    for i, name in enumerate(("dgamma", "dbeta"), 1):
        assert_within(found[i], copies[i].astype(WIDE), 2 * getattr(b, f"{name}_budget") + share * n, name)


@holds(problems(parts=[p for p in WEIGHTED if p[3] != "bool"]), st.integers(-12, 12))
def test_weights_count_in_relation_to_each_other(p, k):
    """All of them times a power of two: the same bits, and as many times the count."""
    times = p.d.w.dtype.type(2.0**k)
    with p.built():
        y, saved, found = trained(p)
        again, scaled, same = trained(p, where=p.d.w * times)
    assert_same_bits(
        [again, scaled.mean, scaled.var, scaled.count, scaled.moments.m2, *same],
        [y, saved.mean, saved.var, saved.count * times, saved.moments.m2 * times, *found],
    )


@holds(problems(parts=[p for p in WEIGHTED if p[3] == "float64"]), st.floats(1e-6, 1e6))
def test_weights_may_have_any_unit(p, unit):
    with p.built():
        m = fastbn.moments(p.d.x, axis=p.axis, where=p.d.w * unit)
    assert_moments(fastbn.Moments(m.count / unit, m.mean, m.m2 / unit), p.d.x, p.axis, p.d.w)


@holds(problems(parts=WEIGHTED), st.data())
def test_split_and_merged_with_weights_is_the_whole(p, data):
    axis = data.draw(st.sampled_from(p.reduced), "axis")
    at = data.draw(st.integers(0, p.shape[axis]), "at")
    with p.built():
        one, two = (
            fastbn.moments(p.lay(x), axis=p.axis, where=np.ascontiguousarray(w))
            for x, w in zip(*(np.split(a, [at], axis) for a in (p.d.x, broadcast(p))), strict=True)
        )
    assert_moments(one + two, p.d.x, p.axis, p.d.w)
    assert_moments(two + one, p.d.x, p.axis, p.d.w)
    zero = fastbn.Moments.empty(p.channels)
    for m in (zero + one, one + zero):
        assert_same_bits([np.asarray(m.count), m.mean, m.m2], [np.asarray(one.count), one.mean, one.m2])


HIDDEN = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -7.0, 60000.0])


@holds(problems(parts=WEIGHTED), HIDDEN, st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0]))
def test_what_has_no_weight_and_no_gradient_does_not_matter(p, value, gradient):
    """Not to the last bit: neither to statistics and sums nor to any other element."""
    nowhere = broadcast(p) == 0
    d, other = copy.copy(p.d), copy.copy(p.d)
    d.dy = p.lay(np.where(nowhere, p.d.dy.dtype.type(0), p.d.dy))
    other.x = p.lay(np.where(nowhere, p.d.x.dtype.type(value), p.d.x))
    other.dy = p.lay(np.where(nowhere, p.d.dy.dtype.type(gradient), p.d.dy))
    with p.built():
        y, saved, (dx, *sums) = trained(p, d)
        again, found, (dx2, *sums2) = trained(p, other)
        m = fastbn.moments(other.x, axis=p.axis, where=p.d.w)
    assert_same_bits([found.mean, found.var, m.mean, m.m2], [saved.mean, saved.var, saved.mean, saved.moments.m2])
    sums, sums2 = ([*s[:2], *(a[~nowhere] for a in s[2:])] for s in (sums, sums2))
    assert_same_bits([again[~nowhere], dx2[~nowhere], *sums2], [y[~nowhere], dx[~nowhere], *sums])


@holds(problems(offsets=(0.0, 3.0, 100.0), parts=WEIGHTED))
def test_gradients_with_weights_are_orthogonal_to_what_the_forward_removes(p):
    """A shift of all x changes nothing, whatever their weights: sum(dx) = 0. Nor does a scale: sum(dx * xhat) = 0.

    But for the share of eps, and where a channel has no weight: its statistics do not depend on x.
    """
    d = p.d
    with p.built():
        y, saved, (dx, *_) = trained(p)
    expected = reference.backward(d.dy, d.x, d.gamma, **p.options, where=d.w, y=y if p.relu else None)
    mean, var = reference.mean_var(d.x, p.axis, d.w)
    invstd = reference.invstd(var, p.eps)
    xhat = (d.x.astype(WIDE) - p.spread_out(mean)) * p.spread_out(invstd)
    bears = saved.count > 0
    shift = np.where(bears, 0, d.gamma * invstd * expected.dbeta)
    scale = d.gamma * invstd * expected.dgamma * np.where(bears, 1 - var * invstd**2, 1)
    most = expected.dx_budget + rounded_once(p.dtype, dx)
    assert_within(reference.reduce(dx.astype(WIDE), p.axis), shift, reference.reduce(most, p.axis), "sum dx")
    most = reference.reduce(most * abs(xhat), p.axis) + tolerance("float64", 0)
    assert_within(reference.reduce(dx * xhat, p.axis), scale, most, "sum dx * xhat")


def rounded_once(dtype, a):
    """What the rounding to a half may be; that of others is in the budget."""
    if not reference.is_half(dtype):
        return WIDE(0)
    digits, lowest, _ = reference.HALVES[dtype]
    return abs(a.astype(WIDE)) * WIDE(2) ** -digits + WIDE(2) ** (lowest - digits)


@holds(problems(parts=WEIGHTED), st.data())
def test_layouts_agree_with_weights(p, data):
    """NCHW equals NHWC: of x and of the weights, in memory to the last roundings, by name alone to the last bit."""
    rank = len(p.shape)
    other = replace(p, order=data.draw(st.permutations(range(rank)).map(tuple), "memory order"))
    x, w = other.lay(p.d.x), np.broadcast_to(p.d.w, p.shape)
    w = other.lay(w) if data.draw(st.booleans(), "weights in that order") else w
    with p.built():
        found = fastbn.moments(x, axis=p.axis, where=w)
        assert_moments(found, p.d.x, p.axis, p.d.w)
        names = list(data.draw(st.permutations(range(rank)), "order of the axes"))
        for place, a in zip(sorted(names.index(a) for a in p.axes), p.axes, strict=True):
            names[place] = a
        axis = tuple(names.index(a) for a in p.axes)
        renamed = fastbn.moments(x.transpose(names), axis=axis, where=w.transpose(names))
    assert_same_bits([renamed.count, renamed.mean, renamed.m2], [found.count, found.mean, found.m2])


# ------------------------------------------------------------------------------------------------------------ the layer


def assert_same_state(found, expected):
    assert_same_bits({k: np.asarray(v) for k, v in found.items()}, {k: np.asarray(v) for k, v in expected.items()})


def archived(state):
    """A state that has been in an .npz file."""
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        return dict(archive)


@holds(problems(), st.sampled_from([None, 0.0, 0.5, 0.9]), st.sampled_from([0, 1]), st.booleans())
def test_the_layer_is_the_verbs(p, momentum, correction, track):
    d = p.d
    bn = layer_of(p, momentum=momentum, correction=correction, track_running_stats=track)
    with p.built():
        y, saved = fastbn.batch_norm_train(d.x, *d.affine, **p.options)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
        assert_same_bits([bn(d.x), bn.backward(d.dy)], [y, dx])
        for name, a, there in (("dgamma", dgamma, p.scale), ("dbeta", dbeta, p.center)):
            assert (getattr(bn, name) is not None) == there
            if there:
                assert_same_bits([getattr(bn, name)], [a])
        if not track:
            assert_same_bits([bn.eval()(d.x)], [y])
            return
        mean, var = np.zeros(p.channels, bn.running_mean.dtype), np.ones(p.channels, bn.running_var.dtype)
        # The first batch of a pool is all of it.
        fastbn.update_running(mean, var, saved.moments, momentum=momentum or 0.0, correction=correction)
        assert_same_bits([bn.running_mean, bn.running_var], [mean, var])
        z = fastbn.batch_norm(d.x, mean, var, *d.affine, **p.options)
        frozen = fastbn.Saved.fixed(d.x, mean, var, *d.affine, **p.options)
        assert_same_bits([bn.eval()(d.x, save=True)], [z])
        assert_same_bits([bn.backward(d.dy)], fastbn.batch_norm_backward(d.dy, frozen)[:1])


@holds(problems())
def test_folded_is_inference(p):
    bn = layer_of(p)
    with p.built():
        bn(p.d.x)
        scale, shift = (p.spread_out(a) for a in bn.fold())
        y = bn.eval()(p.d.x)
    expected = reference.infer(p.d.x, bn.running_mean, bn.running_var, p.d.gamma, p.d.beta, **p.options)
    assert_within(y, expected.y, expected.budget, "y")
    terms = abs(p.d.x * scale) + abs(shift) + abs(p.spread_out(bn.running_mean) * scale)  # digits that folding may lose
    assert_within(p.d.x * scale + shift, y.astype(WIDE), 2 * tolerance(p.d.x.dtype, terms), "folded")


@holds(problems(), st.sampled_from([None, 0.5, 0.9]), st.sampled_from([dict, archived, copy.deepcopy]))
def test_a_state_goes_round(p, momentum, through):
    """And what is trained on afterwards is the same."""
    one, two = layer_of(p, momentum=momentum), layer_of(p, momentum=momentum)
    for a in two.state_dict().values():
        np.asarray(a)[...] = 5  # a copy: it changes nothing
    with p.built():
        one(p.d.x)
        assert two.load_state_dict(through(one.state_dict())) is two
        assert_same_state(two.state_dict(), one.state_dict())
        assert_same_bits([two(p.d.dy)], [one(p.d.dy)])
        assert_same_state(two.state_dict(), one.state_dict())
        assert_same_bits([two.eval()(p.d.x)], [one.eval()(p.d.x)])


@holds(problems(), st.sampled_from([None, 0.9]), st.sampled_from(sorted(set(CLONES) - {"copy"})))
def test_copies_are_the_same_layer_and_apart(p, momentum, clone):
    one = layer_of(p, momentum=momentum)
    with p.built():
        one(p.d.x)
        state = one.state_dict()
        two = CLONES[clone](one)
        assert repr(two) == repr(one)
        assert two.training == one.training
        assert_same_state(two.state_dict(), state)
        y = two(p.d.dy)
        assert_same_state(one.state_dict(), state)
        assert_same_bits([one(p.d.dy)], [y])
    assert_same_state(two.state_dict(), one.state_dict())


@holds(problems(), st.sampled_from(sorted(CLONES)))
def test_moments_go_round(p, clone):
    with p.built():
        m = fastbn.moments(p.d.x, axis=p.axis)
    again = CLONES[clone](m)
    assert again.count == m.count
    assert_same_bits((again.mean, again.m2, again.var(), again.std()), (m.mean, m.m2, m.var(), m.std()))
    assert (m + again).count == 2 * m.count


# ------------------------------------------------------------------------------------------------------- the examples


def test_the_examples_go_every_way_through_the_kernels():
    for parts in (None, PARTS):
        seen = set()

        @settings(max_examples=1000, derandomize=True)
        @given(problems(parts=parts).map(Problem.path))
        def look(seen, path):
            seen.update(path)

        look(seen)
        assert PATHS - seen == set()


def test_a_problem_prints_the_line_that_repeats_it():
    p = Problem("drawn", (3, 2), (1,), (1, 0), "float64", seed=7, offset=100.0, threads=3, tiles="tiny")
    again = eval(repr(p), {"Problem": Problem})
    assert again == p
    assert_same_bits([again.d.x], [p.d.x])


def properties(items):
    """The names of the properties among the tests."""
    return [item.name for item in items if item.module.__name__.endswith("test_properties") and
            hasattr(item.function, "hypothesis")]  # fmt: skip


def test_all_examples_have_run(request):
    """Counted, of those properties that this run of pytest has chosen."""
    each = settings.get_profile(PROFILE).max_examples
    for name in properties(request.session.items):
        assert EXAMPLES[name] >= each, f"{name} ran {EXAMPLES[name]} of {each}"


def test_ci_runs_20_000_examples(request):
    each = settings.get_profile("ci").max_examples
    here = [name for name, a in vars(request.module).items() if name.startswith("test") and hasattr(a, "hypothesis")]
    assert each * len(here) >= 20_000, f"{len(here)} properties of {each} examples"
