"""What a call may have besides x: residual, ReLU, weights, parameters, halves and integers, in combination.

What takes time is to compile, two to three seconds for each kernel: each dtype with each set of parts is code of its
own, in runs and in rows, forward and backward. float32 has all 12 sets, of which four (weights with a residual or with
ReLU) in runs or in rows alone. float64, the halves and uint8 have residual and ReLU, with booleans as weights in runs,
with numbers in rows; without any part `test_verbs` has them. That makes 14 sets. Layouts and parameters cost nothing:
every set has them all. Weights are booleans and float64, but for one test. Large arrays run parallel, which takes three
times as long to compile: there are two sets.
"""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import reference
from arrays import HALVES, WEIGHTS, Case
from builds import built
from reference import assert_within
from refusals import refused

import fastbn

# Every way through the kernels, by (long runs?, fused?): small, so that calls are serial.
LAYOUTS = {
    Case("runs-fused", (1, 3, 800)): (True, True),
    Case("runs-grouped", (5, 21, 49)): (True, True),
    Case("runs-split", (3, 2, 100)): (True, False),
    Case("all", (3, 40), ()): (True, True),
    Case("rows-fused", (8, 5, 3)): (False, True),
    Case("ND", (40, 300)): (False, True),
    Case("rows-split-folded", (601, 3)): (False, False),
    Case("NHWC-as-NCHW", (9, 24, 7, 11), 1, (0, 2, 3, 1)): (False, False),
    Case("apart", (4, 3, 5, 2), (1, 3)): (False, True),
}
LARGE = [Case("runs-grouped", (16, 64, 14, 14)), Case("runs-split", (8, 3, 64, 64)), Case("NHWC", (8, 40, 41, 16), -1)]

AFFINE = [("gamma", "beta"), (), ("gamma",), ("beta",)]


@dataclass(frozen=True)
class Parts:
    """What a call has besides x. `where` is the kind of its weights: bool or float."""

    dtype: str
    relu: bool
    residual: bool
    where: str | None

    def __str__(self):
        names = [n for n in ("relu", "residual") if getattr(self, n)] + ([self.where] if self.where else [])
        return "-".join([self.dtype, *names])

    @property
    def activation(self):
        return "relu" if self.relu else None


WHERE = (None, "bool", "float")
OTHERS = ("float64", *HALVES, "uint8")
ALL_PARTS = [
    *(Parts("float32", *p) for p in itertools.product((False, True), (False, True), WHERE)),
    *(Parts(dtype, True, True, where) for dtype in OTHERS for where in ("bool", "float")),
]


def reaches(parts, case):
    """Whether the code of these parts is compiled for the kernel of this case."""
    runs, _ = LAYOUTS[case]
    if parts.dtype != "float32":
        return runs is (parts.where == "bool")
    return not parts.where or parts.relu is parts.residual or runs is (parts.relu is (parts.where == "bool"))


GRID = [(parts, case) for parts in ALL_PARTS for case in LAYOUTS if reaches(parts, case)]


def problem(case, parts, affine=AFFINE[0], kind=None):
    """The arrays of a call, and its options: `given` are those that an inference has too."""
    rng = np.random.default_rng(5)
    d = case.data(rng, parts.dtype)
    d.case, d.parts, d.axis, d.dtype = case, parts, case.axis, reference.result_dtype(d.x.dtype)
    d.residual = case.residual(rng, d.dtype) if parts.residual else None
    if parts.where and kind is None:
        kinds = [k for k in WEIGHTS if k.endswith("bool" if parts.where == "bool" else ("float64", "uint8"))]
        kind = kinds[[*LAYOUTS, *LARGE].index(case) % len(kinds)]
    d.where = case.weights(rng, kind) if kind else None
    d.gamma = np.where(d.gamma == 0, d.gamma.dtype.type(-0.7), d.gamma) if kind and "without" in kind else d.gamma
    d.gamma, d.beta = (getattr(d, name) if name in affine else None for name in ("gamma", "beta"))
    d.oracle = [1.0 if d.gamma is None else d.gamma, 0.0 if d.beta is None else d.beta]
    d.given = {"axis": d.axis, "residual": d.residual, "activation": parts.activation}
    d.options = d.given | {"where": d.where}
    return d


def train(d, **changes):
    return fastbn.batch_norm_train(d.x, d.gamma, d.beta, **d.options | changes)


def infer(d, **changes):
    return fastbn.batch_norm(d.x, d.mean, d.var, d.gamma, d.beta, **d.given | changes)


def fixed(d):
    return fastbn.Saved.fixed(d.x, d.mean, d.var, d.gamma, d.beta, **d.given)


def numbers(a):
    """The same values in a dtype of NumPy's own."""
    return np.asarray(a).astype(np.float64)


def check_forward(d, y, expected, what="y", at=...):
    """y, and that few are so near to 0 that their gradient is a matter of rounding."""
    assert y.dtype == d.dtype
    assert y.strides == np.empty_like(d.x, dtype=d.dtype).strides
    assert_within(y[at], expected.y[at], np.broadcast_to(expected.budget, y.shape)[at], what)
    if d.parts.relu:
        near = reference.near_zero(expected) & (expected.before != 0) & np.isfinite(expected.before)
        assert near.mean() <= 0.01
        decided = ~reference.near_zero(expected)
        np.testing.assert_array_equal((numbers(y) > 0)[decided], (expected.y > 0)[decided], what)


def check_backward(d, found, y, what="", at=..., **statistics):
    """All gradients, with the mask of the y that was returned."""
    masked = y if d.parts.relu else None
    with np.errstate(invalid="ignore"):  # NaN in halves
        b = reference.backward(d.dy, d.x, d.oracle[0], axis=d.axis, y=masked, **statistics)
    assert len(found) == (4 if d.parts.residual else 3)
    dx, dgamma, dbeta = found[:3]
    assert (dx.dtype, dgamma.dtype, dbeta.dtype) == (d.dtype, *[reference.parameter_dtype(d.dtype)] * 2)
    assert dx.strides == np.empty_like(d.x, dtype=d.dtype).strides
    assert_within(dgamma, b.dgamma, b.dgamma_budget, f"{what}dgamma")
    assert_within(dbeta, b.dbeta, b.dbeta_budget, f"{what}dbeta")
    assert_within(dx[at], b.dx[at], b.dx_budget[at], f"{what}dx")
    if d.parts.residual:
        assert found[3].dtype == d.dtype
        np.testing.assert_array_equal(numbers(found[3])[at], b.dresidual[at].astype(np.float64), f"{what}dresidual")


def check_moments(d, m, what="moments"):
    mean, var = reference.mean_var(d.x, d.axis, d.where)
    total = reference.reduce(reference.weights(d.x, d.where), d.axis)
    assert_within(m.mean, mean, reference.tolerance("float64", 0, abs(mean) + np.sqrt(var)), f"{what}.mean")
    assert_within(m.m2, var * total, reference.tolerance("float64", 0, var * total), f"{what}.m2")
    assert_within(np.broadcast_to(m.count, total.shape), total, reference.tolerance("float64", 0, total), "count")


def check_training(d, at=...):
    y, saved = train(d)
    expected = reference.train(d.x, *d.oracle, **d.options)
    check_forward(d, y, expected, "train y", at)
    check_moments(d, saved.moments)
    check_backward(d, fastbn.batch_norm_backward(d.dy, saved), y, at=at, where=d.where)


@pytest.mark.parametrize(("parts", "case"), GRID, ids=str)
def test_combination(parts, case):
    """Training and its backward; without weights inference and its backward too."""
    d = problem(case, parts, AFFINE[GRID.index((parts, case)) % len(AFFINE)])
    check_training(d)
    check_moments(d, fastbn.moments(d.x, axis=d.axis, where=d.where))
    if not parts.where:
        y = infer(d)
        check_forward(d, y, reference.infer(d.x, d.mean, d.var, *d.oracle, **d.given))
        check_backward(d, fastbn.batch_norm_backward(d.dy, fixed(d)), y, "frozen ", fixed=(d.mean, d.var))


def test_the_grid_is_what_it_says():
    for case, way in LAYOUTS.items():
        assert case.grid("float32") == (*way, False)
    assert {case.grid("float32") for case in LARGE} == {(True, True, True), (True, False, True), (False, False, True)}
    sets = {(p.relu, p.residual, p.where) for p in ALL_PARTS if p.dtype == "float32"}
    assert len(sets) == 12
    for dtype in OTHERS:
        assert {LAYOUTS[c][0] for p, c in GRID if p.dtype == dtype} == {True, False}


@pytest.mark.parametrize("scale", [1e-320, 1e-39, 1e45, 1e306])
def test_the_unit_of_weights_does_not_matter(rng, scale):
    """However far it is from 1: the sums stay in the range of what they are computed in."""
    x, dy = rng.normal(3, 2, (8, 4, 5)).astype("float32"), rng.normal(size=(8, 4, 5)).astype("float32")
    w = (rng.random((8, 1, 5)) < 0.7) * 1.0
    y, saved = fastbn.batch_norm_train(x, where=w)
    again, scaled = fastbn.batch_norm_train(x, where=w * scale)
    np.testing.assert_allclose(again, y, atol=1e-5)
    for a, b in zip(fastbn.batch_norm_backward(dy, scaled), fastbn.batch_norm_backward(dy, saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * abs(b).max())
    for m in (scaled.moments, fastbn.moments(x, where=w * scale)):
        np.testing.assert_allclose(m.count, saved.count * scale, rtol=1e-12)
        np.testing.assert_allclose([m.mean, m.var()], [saved.mean, saved.var], rtol=1e-3 if scale < 1e-300 else 1e-12)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_weights_of_every_shape(case, kind):
    """Also a channel without any weight: it has count 0, and is normalized as with mean 0 and variance 0."""
    d = problem(case, Parts("float32", False, False, "float"), kind=kind)
    check_training(d)
    if kind.startswith("without"):
        m = fastbn.moments(d.x, axis=d.axis, where=d.where)
        first = (0,) * m.mean.ndim
        counts = np.broadcast_to(m.count, m.mean.shape)
        assert (counts[first], m.mean[first], m.m2[first]) == (0, 0, 0)
        assert counts.ravel()[1:].all()


# ------------------------------------------------------------------------------------------------------ large arrays

EVERYTHING = [Parts("float32", True, True, "float"), Parts("bfloat16", True, True, "bool")]
IN_PARALLEL = [*((EVERYTHING[0], case) for case in LARGE), (EVERYTHING[1], LARGE[0])]


@pytest.mark.parametrize(("parts", "case"), IN_PARALLEL, ids=str)
def test_large_arrays(parts, case):
    d = problem(case, parts)
    check_training(d)


def results(d):
    """The bytes of all that comes of a step of training, by name."""
    y, saved = train(d)
    m = fastbn.moments(d.x, axis=d.axis, where=d.where)
    found = {"y": y, "count": np.asarray(m.count), "mean": m.mean, "m2": m.m2, "saved.m2": saved.moments.m2}
    found |= {f"gradient {i}": g for i, g in enumerate(fastbn.batch_norm_backward(d.dy, saved))}
    return {name: a.tobytes() for name, a in found.items()}


@pytest.mark.parametrize(("parts", "case"), IN_PARALLEL, ids=str)
def test_bits_do_not_depend_on_threads_and_builds(parts, case):
    d = problem(case, parts)
    try:
        expected = {}
        for threads in (1, 2):
            fastbn.set_num_threads(threads)
            found = results(d)
            expected = expected or found
            assert [n for n in found if found[n] != expected[n]] == [], f"{threads} threads"
    finally:
        fastbn.set_num_threads(None)
    for build, threads in (("serial", 1), ("serial", 3), ("parallel", 3)):
        with built(build, threads):
            found = results(d)
        assert [n for n in found if found[n] != expected[n]] == [], f"{build}, tiles for {threads} threads"


@pytest.mark.parametrize(("parts", "case"), [(p, c) for p, c in GRID if p in EVERYTHING], ids=str)
def test_bits_do_not_depend_on_threads_over_many_small_tiles(parts, case):
    d = problem(case, parts)
    with built("serial", 1, "tiny"):
        expected = results(d)
        check_training(d)
    with built("serial", 3, "tiny"):
        found = results(d)
    assert [n for n in found if found[n] != expected[n]] == []


# ---------------------------------------------------------------------------------------------------- what is weighed

FLOATING = Parts("float32", False, False, "float")
MASKED = Parts("float32", True, True, "bool")


HIDING = ["sample bool", "full bool", "full float64", "without float64"]
HIDDEN = [(c, k) for c in LAYOUTS for k in HIDING if c.shape[0] > 2 or k != "sample bool"]


@pytest.mark.parametrize(("case", "kind"), HIDDEN, ids=str)
def test_what_has_no_weight_may_be_no_number(case, kind):
    """NaN and infinite x and dy: nothing of them reaches any other element, a statistic or a parameter."""
    d = problem(case, FLOATING if kind.endswith("64") else MASKED, kind=kind)
    nowhere = np.broadcast_to(d.where == 0, d.x.shape)
    assert nowhere.any()
    at = np.flatnonzero(nowhere)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        np.put(d.x, at[i::4], value)
    np.put(d.dy, at[3::4], np.nan)
    np.put(d.dy, at[::5], -np.inf)
    check_training(d, at=~nowhere)


def test_what_has_no_weight_is_normalized_itself():
    x = np.array([[1.0, 4.0], [3.0, 8.0], [np.nan, 6.0], [9.0, np.inf]], "float32")
    y, saved = fastbn.batch_norm_train(x, eps=0, where=[[True], [True], [False], [False]])
    np.testing.assert_array_equal(y, [[-1, -1], [1, 1], [np.nan, 0], [7, np.inf]])
    dx, dgamma, dbeta = fastbn.batch_norm_backward(np.eye(4, 2, dtype="float32")[[0, 2, 1, 3]], saved)
    np.testing.assert_array_equal(dgamma, [-1, 0])
    np.testing.assert_array_equal(dbeta, [1, 1])
    np.testing.assert_array_equal(dx[:2], [[0, -0.25], [0, -0.25]])
    np.testing.assert_array_equal(dx[3, 0], 0)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_no_number_with_a_weight_stays_in_its_channel(case):
    d = problem(case, MASKED, kind="full bool")
    clean = train(d)
    first = (0,) * d.x.ndim
    assert d.where[first]
    d.x[first] = np.nan
    y, saved = train(d)
    channel = tuple(0 if a in reference.channel_axes(d.x, d.axis) else slice(None) for a in range(d.x.ndim))
    assert np.isnan(y[channel]).all()
    others = np.ones(d.x.shape, bool)
    others[channel] = False
    np.testing.assert_array_equal(y[others], clean[0][others])
    *found, dresidual = fastbn.batch_norm_backward(d.dy, saved)
    *expected, dclean = fastbn.batch_norm_backward(d.dy, clean[1])
    np.testing.assert_array_equal(found[0][others], expected[0][others])
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(a.ravel()[1:], b.ravel()[1:])
    assert not dresidual[channel].any()  # where y is NaN nothing passes
    np.testing.assert_array_equal(dresidual[others], dclean[others])


@pytest.mark.parametrize("where", [False, np.zeros(()), np.zeros((1, 1, 1), bool)], ids=repr)
def test_no_weight_at_all(where):
    """Every channel is one of weight 0; of statistics there are none, as of an empty batch."""
    d = problem(Case("NCL", (4, 3, 9)), FLOATING, kind="one float64")
    d.where = d.options["where"] = where
    check_training(d)
    bn = fastbn.BatchNorm(3)
    bn(d.x)
    before = bn.state_dict()
    bn(d.x, where=where)
    after = bn.state_dict()
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_channel_without_weight_keeps_its_running_statistics(rng, momentum):
    x, w = rng.normal(2, 3, (8, 3)).astype("float32"), np.array([1.0, 0.0, 0.5])
    bn = fastbn.BatchNorm(3, momentum=momentum)
    bn(x)
    before = bn.state_dict()
    bn(x + 1, where=w)
    for name in ("running_mean", "running_var"):
        moved = bn.state_dict()[name] != before[name]
        assert moved.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_integer_weights_repeat_elements(case, dtype):
    """A sample of weight k counts as k of them, each with that share of dy; the sums run in another order."""
    d = problem(case, Parts("float32", False, False, "float"), kind="sample float32")
    sample = next(a for a in range(d.x.ndim) if a not in reference.channel_axes(d.x, d.axis))
    times = np.maximum(np.ceil(d.where), 1).astype(int).ravel()
    shape = [-1 if a == sample else 1 for a in range(d.x.ndim)]
    d.where = d.options["where"] = times.reshape(shape).astype(dtype)
    many = SimpleNamespace(**vars(d))
    many.x, many.dy = (np.repeat(a, times, sample) for a in (d.x, d.dy / times.reshape(shape).astype("float32")))
    many.options = d.options | {"where": None}

    (y, saved), (many_y, many_saved) = train(d), train(many)
    expected = reference.train(d.x, *d.oracle, **d.options)
    first = np.cumsum(times) - times
    assert_within(y, many_y.take(first, sample), 2 * expected.budget, "y")
    check_moments(d, many_saved.moments)
    found, copies = fastbn.batch_norm_backward(d.dy, saved), fastbn.batch_norm_backward(many.dy, many_saved)
    b = reference.backward(d.dy, d.x, d.oracle[0], axis=d.axis, where=d.where)
    dx = np.add.reduceat(copies[0], first, sample)
    assert_within(found[0], dx, 4 * b.dx_budget, "dx")
    for i, name in enumerate(("dgamma", "dbeta"), 1):
        assert_within(found[i], copies[i], 2 * getattr(b, f"{name}_budget"), name)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_weights_of_one_change_nothing(case):
    """But the last bits of the sums, which are products now: both are within the budget of the unweighted result."""
    d = problem(case, Parts("float32", True, True, None))
    for where in (True, np.ones(d.x.shape, bool), np.ones(d.x.shape), np.ones((), "uint8")):
        y, saved = train(d, where=where)
        check_forward(d, y, reference.train(d.x, *d.oracle, **d.options))
        check_moments(d, saved.moments)
        check_backward(d, fastbn.batch_norm_backward(d.dy, saved), y)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_weights_count_in_relation_to_each_other(case):
    """Four times the weights: the same bits, for powers of two are not rounded; four times the count."""
    d = problem(case, Parts("float32", False, False, "float"), kind="full float64")
    (y, saved), (same, four) = train(d), train(d, where=d.where * 4)
    np.testing.assert_array_equal(same, y)
    np.testing.assert_array_equal(four.mean, saved.mean)
    np.testing.assert_array_equal(four.var, saved.var)
    np.testing.assert_array_equal(four.moments.count, 4 * saved.moments.count)
    for a, b in zip(*(fastbn.batch_norm_backward(d.dy, s) for s in (saved, four)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["last float64", "full float64", "without bool"])
def test_weighted_moments_merge(kind):
    case = Case("NCL", (9, 3, 40))
    d = problem(case, FLOATING, kind=kind)
    w = np.broadcast_to(d.where, d.x.shape)
    pieces = [fastbn.moments(d.x[i], axis=1, where=w[i]) for i in (slice(0, 2), slice(2, 3), slice(3, None))]
    check_moments(d, sum(pieces))
    check_moments(d, fastbn.Moments.empty(3) + pieces[0] + (pieces[1] + pieces[2]))


# -------------------------------------------------------------------------------------------------------------- dtypes


INTEGERS = [*(("uint8", out, -1) for out in ("float32", "float64", *HALVES)),
            ("int16", "float16", 1), ("int64", "float32", 1), ("bool", "bfloat16", 1)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "out", "axis"), INTEGERS)
def test_out_decides_the_dtype_of_integers(dtype, out, axis):
    case = Case("images", (4, 3, 5, 7) if axis == 1 else (4, 5, 7, 3), axis)
    d = problem(case, Parts(dtype, False, False, None))
    y = np.full_like(d.x, np.nan, dtype=out)
    returned, saved = train(d, out=y)
    assert returned is y
    assert_within(y, *(getattr(reference.train(d.x, *d.oracle, **d.given, dtype=out), n) for n in ("y", "budget")))
    check_moments(d, saved.moments)
    y = infer(d, out=np.full_like(d.x, np.nan, dtype=out))
    expected = reference.infer(d.x, d.mean, d.var, *d.oracle, **d.given, dtype=out)
    assert_within(y, expected.y, expected.budget)


@pytest.mark.parametrize("out", ["float32", "bfloat16"])
def test_images_to_channels_first_in_one_pass(out):
    """NHWC uint8 in, NCHW out: by the strides of `out`."""
    d = problem(Case("NHWC", (4, 15, 17, 3), -1), Parts("uint8", False, False, None))
    y = np.full((4, 3, 15, 17), np.nan, out)
    infer(d, out=y.transpose(0, 2, 3, 1))
    expected = reference.infer(d.x, d.mean, d.var, *d.oracle, **d.given, dtype=out)
    assert_within(y.transpose(0, 2, 3, 1), expected.y, expected.budget)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("parameters", ["float32", "float64"])
def test_halves_with_parameters_of_either_dtype(dtype, parameters):
    d = problem(Case("NCHW", (4, 3, 5, 7)), Parts(dtype, False, False, None))
    d.gamma, d.beta, d.mean, d.var = (a.astype(parameters) for a in (d.gamma, d.beta, d.mean, d.var))
    y, saved = train(d)
    expected = reference.train(d.x, *d.oracle, **d.given)
    check_forward(d, y, expected)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    assert (dx.dtype.name, dgamma.dtype, dbeta.dtype) == (dtype, parameters, parameters)
    check_forward(d, infer(d), reference.infer(d.x, d.mean, d.var, *d.oracle, **d.given))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_rounded_once(dtype):
    """All 65,536, through an affine map whose exact values lie between halves, and beyond the largest."""
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = x.astype(np.longdouble)
    for gamma, beta in ((1.0, 0.0), (1 / 3, 0.0), (1.00390625, 0.0), (3.0, 2.0**-20), (1.0, 1 / 3)):
        y = np.concatenate([fastbn.batch_norm(part, 0.0, 1.0, gamma, beta, axis=(), eps=0) for part in np.split(x, 2)])
        assert y.dtype == x.dtype
        real = np.isfinite(wide)
        expected = wide * gamma + beta
        # Below the normal numbers of float32 the last of two roundings may see another tie.
        allowed = reference.tolerance(dtype, abs(expected)) + np.where(abs(expected) < 2.0**-126, 2.0**-149, 0)
        assert_within(y[real], expected[real], allowed[real], f"x * {gamma} + {beta}")
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(y[~real].astype(np.float64), wide[~real].astype(np.float64))


def test_bfloat16_of_pytorch():
    """Its arrays come through uint16, without a copy."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to exchange with")
    t = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    out = torch.empty_like(t)
    y, saved = fastbn.batch_norm_train(x, activation="relu", out=out.view(torch.uint16).numpy().view(x.dtype))
    expected = torch.relu(torch.nn.functional.batch_norm(t.double(), None, None, training=True))
    budget = reference.train(x).budget
    assert_within(y, expected.numpy().astype(np.longdouble), 2 * budget, "y")
    np.testing.assert_array_equal(out.float().numpy(), y.astype(np.float32))
    mean = t.double().mean((0, 2, 3)).numpy()
    np.testing.assert_allclose(saved.mean, mean, rtol=1e-13)


# ------------------------------------------------------------------------------------------------------------ in place


@pytest.mark.parametrize(("parts", "case"), [(p, c) for p, c in GRID if p.residual and p.dtype != "uint8"], ids=str)
def test_out_may_be_the_residual(case, parts):
    d = problem(case, parts)
    y, saved = train(d)
    expected = fastbn.batch_norm_backward(d.dy, saved)
    over = d.residual.copy("K")
    found, saved = train(d, residual=over, out=over)
    assert found is over
    assert found.tobytes() == y.tobytes()
    for a, b in zip(fastbn.batch_norm_backward(d.dy, saved), expected, strict=True):
        assert a.tobytes() == b.tobytes()
    if not parts.where:
        over = d.residual.copy("K")
        assert infer(d, residual=over, out=over).tobytes() == infer(d).tobytes()


@pytest.mark.parametrize(("parts", "case"), [(p, c) for p, c in GRID if not p.where], ids=str)
def test_inference_over_x_and_backward_over_dy(case, parts):
    d = problem(case, parts)
    expected, saved = infer(d), fixed(d)
    over = d.x.copy("K")
    y = fastbn.batch_norm(over, d.mean, d.var, d.gamma, d.beta, **d.given, out=over)
    assert y is over
    assert y.tobytes() == expected.tobytes()
    for kept in (saved, train(d)[1]):
        gradients, dy = fastbn.batch_norm_backward(d.dy, kept), d.dy.copy("K")
        found = fastbn.batch_norm_backward(dy, kept, out=dy)
        assert found[0] is dy
        assert [a.tobytes() for a in found] == [a.tobytes() for a in gradients]


# ----------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("parts", [p for p, c in GRID if p.dtype == "float32" and c.name == "runs-fused"], ids=str)
def test_the_layer_is_the_verbs(parts):
    d = problem(
        Case("NCHW", (4, 3, 5, 7)), parts, kind={"bool": "sample bool", "float": "full float64"}.get(parts.where)
    )
    bn = fastbn.BatchNorm(3, activation=parts.activation)
    bn.gamma[...], bn.beta[...] = d.gamma, d.beta
    more = {"residual": d.residual} if parts.residual else {}
    y, saved = train(d)
    assert bn(d.x, **more, **({"where": d.where} if parts.where else {})).tobytes() == y.tobytes()
    expected = fastbn.batch_norm_backward(d.dy, saved)
    dx = bn.backward(d.dy)
    found = [dx, bn.dgamma, bn.dbeta, *([bn.dresidual] if parts.residual else [])]
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]

    mean, var = np.zeros(3, "float32"), np.ones(3, "float32")
    fastbn.update_running(mean, var, saved.moments)
    np.testing.assert_array_equal(bn.running_mean, mean)
    np.testing.assert_array_equal(bn.running_var, var)

    d.mean, d.var = bn.running_mean, bn.running_var
    assert bn.eval()(d.x, **more, save=True).tobytes() == infer(d).tobytes()
    dx = bn.backward(d.dy)
    found = [dx, bn.dgamma, bn.dbeta, *([bn.dresidual] if parts.residual else [])]
    expected = fastbn.batch_norm_backward(d.dy, fixed(d))
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]


# ---------------------------------------------------------------------------------------------------------- refusals

SHAPE = (4, 3, 5)
X = np.ones(SHAPE, "float32")
BAD_WEIGHTS = [
    ("shape", ValueError, np.ones((4, 3))),
    ("longer", ValueError, np.ones((1, *SHAPE))),
    ("negative", ValueError, np.array([[[1.0]], [[1.0]], [[-1e-30]], [[1.0]]])),
    ("negative int", ValueError, np.int8(-1)),
    ("NaN", ValueError, np.array([[[1.0]], [[np.nan]], [[1.0]], [[1.0]]], "float32")),
    ("infinite", ValueError, np.float64(np.inf)),
    ("complex", TypeError, np.ones(SHAPE, complex)),
    ("text", TypeError, "yes"),
    ("objects", TypeError, np.ones(SHAPE, object)),
    ("masked", TypeError, np.ma.masked_less(np.ones(SHAPE), 0)),
]
BAD_RESIDUALS = [
    ("shape", ValueError, np.ones((4, 3, 1), "float32")),
    ("channels", ValueError, np.ones(3, "float32")),
    ("number", ValueError, 1.0),
    ("complex", TypeError, np.ones(SHAPE, "complex64")),
    ("text", TypeError, "one"),
    ("masked", TypeError, np.ma.masked_less(X, 0)),
]
BAD_ACTIVATIONS = [
    ("unknown", ValueError, "gelu"),
    ("capital", ValueError, "ReLU"),
    ("empty", ValueError, ""),
    ("bool", TypeError, True),
    ("number", TypeError, 1),
    ("function", TypeError, len),
]


def bad(name, table):
    return [pytest.param(name, error, value, id=f"{name}-{what}") for what, error, value in table]


@pytest.mark.parametrize(
    ("name", "error", "value"),
    [*bad("where", BAD_WEIGHTS), *bad("residual", BAD_RESIDUALS), *bad("activation", BAD_ACTIVATIONS)],
)
def test_refusals(name, error, value):
    """Nothing is written, and the layer has not changed."""
    out = np.full_like(X, 7)
    bn = fastbn.BatchNorm(3)
    given = {name: value}
    refused(lambda: fastbn.batch_norm_train(X, **given, out=out), "batch_norm_train", name, error)
    if name == "where":
        refused(lambda: fastbn.moments(X, **given), "moments", name, error)
    else:
        refused(lambda: fastbn.batch_norm(X, 0, 1, **given, out=out), "batch_norm", name, error)
        refused(lambda: fastbn.Saved.fixed(X, 0, 1, **given), "Saved.fixed", name, error)
    if name == "activation":
        refused(lambda: fastbn.BatchNorm(3, **given), "BatchNorm", name, error)
    else:
        refused(lambda: bn(X, **given, out=out), "BatchNorm|batch_norm_train", name, error)
    assert (out == 7).all()
    assert bn.num_batches_tracked == 0
    assert not bn.running_mean.any()


def test_out_that_shares_memory_with_a_part_is_refused():
    memory = np.ones((5, *SHAPE[1:]), "float32")
    low, high = memory[:-1], memory[1:]
    refused(lambda: fastbn.batch_norm_train(X, residual=low, out=high), "batch_norm_train", "out", ValueError)
    refused(lambda: fastbn.batch_norm(X, 0, 1, residual=low, out=high), "batch_norm", "out", ValueError)
    refused(lambda: fastbn.batch_norm_train(X, where=low, out=high), "batch_norm_train", "out", ValueError)
    refused(lambda: fastbn.batch_norm_train(X, where=low, out=low), "batch_norm_train", "out", ValueError)
    assert (memory == 1).all()


# ------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("kind", [None, "sample bool", "position float64", "without bool"])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_pytorch_differentiates_the_formula(case, kind):
    """Masked statistics by hand, as Flax has them, then residual and ReLU: its autograd finds the same gradients."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    d = problem(case, Parts("float32", True, True, None), kind=kind)
    axes = [a for a in range(d.x.ndim) if a not in reference.channel_axes(d.x, d.axis)]
    shape = [n if a not in axes else 1 for a, n in enumerate(d.x.shape)]
    leaves = x, gamma, beta, residual = [torch.from_numpy(a.astype("float64")).requires_grad_()
                                         for a in (d.x, d.gamma, d.beta, d.residual)]  # fmt: skip
    w = torch.from_numpy(np.broadcast_to(np.ones(()) if kind is None else d.where, d.x.shape).astype("float64"))
    total = w.sum(axes, keepdim=True)
    total[total == 0] = 1
    mean = (w * x).sum(axes, keepdim=True) / total
    var = (w * (x - mean) ** 2).sum(axes, keepdim=True) / total
    xhat = (x - mean) / torch.sqrt(var + 1e-5)
    expected = torch.relu(xhat * gamma.reshape(shape) + beta.reshape(shape) + residual)
    expected.backward(torch.from_numpy(d.dy.astype("float64")))

    y, saved = train(d)
    f = reference.train(d.x, *d.oracle, **d.options)
    assert_within(y, expected.detach().numpy().astype(np.longdouble), f.budget, "y")
    b = reference.backward(d.dy, d.x, d.gamma, axis=d.axis, where=d.where, y=y)
    budgets = (b.dx_budget, b.dgamma_budget, b.dbeta_budget, reference.tolerance("float32", 0))
    for found, leaf, budget in zip(fastbn.batch_norm_backward(d.dy, saved), leaves, budgets, strict=True):
        assert_within(found, leaf.grad.numpy().astype(np.longdouble), budget)


def test_jax_differentiates_the_formula():
    jax = pytest.importorskip("jax", reason="JAX is not installed: nothing to compare with")
    d = problem(Case("NLC", (4, 9, 3), 2), Parts("float32", True, True, None), kind="position float64")
    jnp = jax.numpy

    def forward(x, gamma, beta, residual):
        total = (d.where * jnp.ones_like(x)).sum((0, 1))
        mean = (d.where * x).sum((0, 1)) / total
        var = (d.where * (x - mean) ** 2).sum((0, 1)) / total
        return jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * gamma + beta + residual)

    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True):
        given = (np.float64(a) for a in (d.x, d.gamma, d.beta, d.residual))
        expected, backward = jax.vjp(forward, *given)
        gradients = [np.asarray(g) for g in backward(jnp.asarray(d.dy, "float64"))]
        expected = np.asarray(expected)
    assert expected.dtype == np.float64
    y, saved = train(d)
    f = reference.train(d.x, *d.oracle, **d.options)
    assert_within(y, expected.astype(np.longdouble), f.budget, "y")
    b = reference.backward(d.dy, d.x, d.gamma, axis=d.axis, where=d.where, y=y)
    budgets = (b.dx_budget, b.dgamma_budget, b.dbeta_budget, reference.tolerance("float32", 0))
    for found, gradient, budget in zip(fastbn.batch_norm_backward(d.dy, saved), gradients, budgets, strict=True):
        assert_within(found, gradient.astype(np.longdouble), budget)
