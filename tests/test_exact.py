"""Every result against arithmetic that rounds nothing, in ulp; and the oracle of the other tests against the same."""

import functools
from fractions import Fraction

import exact
import numpy as np
import pytest
import reference
from arrays import FLOATS, SMALL, WEIGHTS, Case
from test_numerics import KINDS, batches, normal

import fastbn

EPS = 1e-5

# How often a result is rounded in its dtype, by half an eps or one ulp at most each time. y: parameter, difference,
# product, sum; dx: two parameters and two products; dgamma and dbeta are float64 until they are done.
ROUNDINGS = {"y": 4, "dx": 6, "dgamma": 1, "dbeta": 1}
# And in float64 before that: mean, m2, var, var + eps, its root, 1 over that, gamma times that, and the shift.
BEFORE = 8

HOSTILE = [
    Case("hostile-rows", (24, len(KINDS))),
    Case("hostile-rows", (9, len(KINDS), 3)),
    Case("hostile-runs", (3, len(KINDS), 11)),
    Case("hostile-NHWC", (1, 5, 6, len(KINDS)), -1),
]
CASES = SMALL + HOSTILE


@functools.cache
def truth(case, dtype):
    """The arrays of a case, and what is true of them: training, then with given statistics."""
    d = case.data(np.random.default_rng(1), dtype)
    if case in HOSTILE:
        ((_, d.x),) = batches(case, dtype)
        d.x = normal(d.x)
        d.mean, d.var = (np.float64(v) for v in reference.mean_var(d.x, case.axis))
    x, dy = (exact.rows(a, case.axis) for a in (d.x, d.dy))
    gamma, beta = d.gamma.ravel(), d.beta.ravel()
    found = []
    for given in (None, (d.mean.ravel(), d.var.ravel())):
        found.append((exact.forward(x, gamma, beta, EPS, given), exact.backward(dy, x, gamma, EPS, given)))
    return d, *found


def check(name, found, true, budget, dtype):
    """No further off than the roundings of its formula, in ulp of the result; and within the other oracle's budget."""
    expected = getattr(true, name)
    share = float(np.finfo(np.float64).eps / np.finfo(dtype).eps)
    allowed = ROUNDINGS[name] * getattr(true, f"{name}_condition") + BEFORE * share * getattr(true, f"{name}_wide")
    errors = exact.ulps(found, expected, dtype)
    excess = exact.ratio(exact.error(found, expected), exact.rational(budget))
    at = np.unravel_index(np.argmax(np.maximum(errors / allowed, excess)), errors.shape)
    assert errors[at] <= allowed[at] and excess[at] <= 1, (  # noqa: PT018 -- one message
        f"{name}{[int(i) for i in at]} is {found[at]!r}, expected {float(expected[at])!r}: {errors[at]:.3g} ulp, "
        f"allowed are {allowed[at]:.3g}; {excess[at]:.3g} times the error budget"
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(case, dtype):
    d, (forward, backward), _ = truth(case, dtype)
    rows = functools.partial(exact.rows, axis=case.axis)
    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, axis=case.axis, eps=EPS)
    mean, var = saved.mean.ravel(), saved.var.ravel()
    assert exact.digits(mean, forward.mean, np.sqrt(var)) <= 1e-14
    assert exact.digits(var, forward.var) <= 1e-14
    check("y", rows(y), forward, rows(reference.train(d.x, d.gamma, d.beta, axis=case.axis, eps=EPS).budget), dtype)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    b = reference.backward(d.dy, d.x, d.gamma, axis=case.axis, eps=EPS)
    check("dx", rows(dx), backward, rows(b.dx_budget), dtype)
    check("dgamma", dgamma.ravel(), backward, b.dgamma_budget.ravel(), dtype)
    check("dbeta", dbeta.ravel(), backward, b.dbeta_budget.ravel(), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_given_statistics(case, dtype):
    d, _, (forward, backward) = truth(case, dtype)
    rows = functools.partial(exact.rows, axis=case.axis)
    given = d.mean, d.var, d.gamma, d.beta
    y = fastbn.batch_norm(d.x, *given, axis=case.axis, eps=EPS)
    check("y", rows(y), forward, rows(reference.infer(d.x, *given, axis=case.axis, eps=EPS).budget), dtype)
    saved = fastbn.Saved.fixed(d.x, *given, axis=case.axis, eps=EPS)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    b = reference.backward(d.dy, d.x, d.gamma, axis=case.axis, eps=EPS, fixed=(d.mean, d.var))
    check("dx", rows(dx), backward, rows(b.dx_budget), dtype)
    check("dgamma", dgamma.ravel(), backward, b.dgamma_budget.ravel(), dtype)
    check("dbeta", dbeta.ravel(), backward, b.dbeta_budget.ravel(), dtype)


def weighted(case, dtype, kind):
    """x with its weights, which hide what is no number; and the true statistics."""
    d, *_ = truth(case, dtype)
    x, w = d.x.copy("K"), case.weights(np.random.default_rng(2), kind)
    wide = np.broadcast_to(w, x.shape)
    np.put(x, np.flatnonzero(wide == 0)[::3], np.nan)
    np.put(x, np.flatnonzero(wide == 0)[1::3], -np.inf)
    return x, w, exact.weighted(exact.rows(x, case.axis), exact.rows(wide, case.axis))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("case", "dtype"), [*((c, "float64") for c in CASES), *((c, "float32") for c in HOSTILE)])
def test_weighted_statistics(case, dtype, kind):
    """As many digits as without weights. A sum of weights has them of itself, since none is negative."""
    x, w, (total, mean, var) = weighted(case, dtype, kind)
    m = fastbn.moments(x, axis=case.axis, where=w)
    count = np.broadcast_to(m.count, m.mean.shape).ravel()
    assert exact.digits(count, total) <= 1e-14
    assert exact.digits(m.mean.ravel(), mean, np.sqrt(var.astype(np.float64))) <= 1e-14
    assert exact.digits(m.m2.ravel(), var * total) <= 1e-14


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("case", [SMALL[0], *HOSTILE], ids=str)
def test_the_other_oracle_of_weighted_statistics(case, kind):
    """Within the 14 digits that it allows others, where long double has no more than they."""
    x, w, (_, mean, var) = weighted(case, "float64", kind)
    found = [a.ravel() for a in reference.mean_var(x, case.axis, w)]
    assert exact.digits(found[0], mean, np.sqrt(var.astype(np.float64))) <= 1e-14
    assert exact.digits(found[1], var) <= 1e-14


def test_exact_weights_by_hand():
    third = Fraction(1, 3)
    total, mean, var = exact.weighted([[1, 2, np.nan], [4, 5, 6]], [[1, 0.5, 0], [0, 0, 0]])
    assert [list(a) for a in (total, mean, var)] == [[Fraction(3, 2), 0], [4 * third, 0], [2 * third**2, 0]]


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 1e-18, reason="long double is float64 here: that oracle is no better than its subject"
)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_other_oracle(case, dtype):
    """Its own error is at most a hundredth of what it allows."""
    d, *modes = truth(case, dtype)

    def close(what, found, expected, budget):
        errors = exact.ratio(exact.error(found, expected), exact.rational(budget))
        assert errors.max() <= 0.01, f"{what}: {errors.max():.3g} of the budget"

    rows = functools.partial(exact.rows, axis=case.axis)
    for given, (forward, backward) in zip((None, (d.mean, d.var)), modes, strict=True):
        mean, var = (m.ravel() for m in given or reference.mean_var(d.x, case.axis))
        close("mean", mean, forward.mean, reference.tolerance("float64", 0, abs(mean) + np.sqrt(var)))
        close("var", var, forward.var, reference.tolerance("float64", 0, var))
        if given is None:
            f = reference.train(d.x, d.gamma, d.beta, axis=case.axis, eps=EPS)
        else:
            f = reference.infer(d.x, *given, d.gamma, d.beta, axis=case.axis, eps=EPS)
        close("y", rows(f.y), forward.y, rows(f.budget))
        b = reference.backward(d.dy, d.x, d.gamma, axis=case.axis, eps=EPS, fixed=given)
        close("dx", rows(b.dx), backward.dx, rows(b.dx_budget))
        close("dgamma", b.dgamma.ravel(), backward.dgamma, b.dgamma_budget.ravel())
        close("dbeta", b.dbeta.ravel(), backward.dbeta, b.dbeta_budget.ravel())


def test_the_root_is_exact_to_60_digits():
    for var in (Fraction(27, 16), Fraction(1, 3), Fraction(10) ** 76, Fraction(7, 10**90)):
        r = exact.invstd(var, 0)
        assert abs(r * r * var - 1) < Fraction(1, 10**59)
    assert exact.invstd(Fraction(27, 16), Fraction(37, 16)) == Fraction(1, 2)
    assert exact.invstd(Fraction(0), 0) == 0


def test_quick_moments_are_those_of_the_definition(rng):
    for x in (rng.normal(1e8, 1, 50), np.array([0.0, 1e-300, -1e300]), np.array([5e-324, 0.1, 2.0**53 + 1])):
        v = [Fraction(float(a)) for a in x]
        mean = sum(v) / len(v)
        assert exact.moments(x) == (mean, sum((a - mean) ** 2 for a in v) / len(v))


def test_ulp_by_hand():
    third = np.array([Fraction(1, 3)])
    assert exact.ulps(np.array([np.float32(1 / 3)]), third, "float32") == pytest.approx(1 / 3)
    assert exact.ulp(Fraction(1), "float32") == exact.ulp(Fraction(-15, 8), "float32") == Fraction(1, 2**23)
    assert exact.ulp(Fraction(2**30 - 1, 2**30), "float64") == Fraction(1, 2**53)
    assert exact.ulp(Fraction(0), "float64") == exact.ulp(Fraction(1, 2**1074), "float64") == exact.TINY
    assert exact.digits(np.array([1.0, 0.0]), exact.rational([1 + 2.0**-40, 0])) == pytest.approx(2.0**-40)


def test_a_small_array_by_hand():
    """Where 1 / sqrt(var + eps) is rational: var = 27 / 16, and eps makes that 4."""
    x = np.array([[2.0**20], [2.0**20 + 3], [2.0**20 + 3], [2.0**20 + 1]], "float32")
    f = exact.forward(x.T, [1], [0], 4 - 27 / 16)
    assert (f.mean[0], f.var[0]) == (2**20 + Fraction(7, 4), Fraction(27, 16))
    assert list(f.y[0]) == [Fraction(v, 8) for v in (-7, 5, 5, -3)]
    y, saved = fastbn.batch_norm_train(x, eps=4 - 27 / 16)
    assert (float(saved.mean[0]), float(saved.var[0])) == (f.mean[0], f.var[0])
    np.testing.assert_array_equal(y[:, 0], [-7 / 8, 5 / 8, 5 / 8, -3 / 8])
    # dx = r (dy - mean(dy) - xhat mean(dy xhat)) with dy = 1, 0, 0, 0
    b = exact.backward([[1, 0, 0, 0]], x.T, [1], 4 - 27 / 16)
    assert list(b.dx[0]) == [Fraction(v, 512) for v in (143, -29, -29, -85)]
