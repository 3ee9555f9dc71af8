"""Every verb against the oracle, for every layout and dtype, within the one error budget."""

import numpy as np
import pytest
import reference
from arrays import BIG, CASES, EDGES, FLOATS, HALVES, INTEGERS, SMALL, Case
from reference import assert_within

import fastbn

TABLE = [
    *(pytest.param(c, d, id=f"{'small' if c in SMALL else 'large'}-{c}-{d}") for c in CASES for d in FLOATS),
    *(pytest.param(c, d, id=f"small-{c}-{d}") for c in (SMALL[0], SMALL[-1]) for d in INTEGERS),
    *(pytest.param(c, d, id=f"small-{c}-{d}") for c in SMALL for d in HALVES),
    *(pytest.param(c, d, id=f"large-{c}-{d}") for c in EDGES[::2] for d in HALVES),
    *(pytest.param(c, "int8", id=f"large-{c}-int8") for c in (BIG[0], BIG[8])),
]


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_every_verb(rng, case, dtype):
    d = case.data(rng, dtype)
    r = reference.result_dtype(d.x.dtype)
    mean, var = reference.mean_var(d.x, case.axis)

    m = fastbn.moments(d.x, axis=case.axis)
    assert m.count == reference.count(d.x, case.axis)
    assert_within(m.mean, mean, reference.tolerance("float64", 0, abs(mean) + np.sqrt(var)), "mean")
    assert_within(m.var(), var, reference.tolerance("float64", 0, var), "var")

    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, axis=case.axis)
    assert y.dtype == r
    assert y.strides == np.empty_like(d.x, dtype=r).strides
    expected = reference.train(d.x, d.gamma, d.beta, axis=case.axis)
    assert_within(y, expected.y, expected.budget, "train y")
    np.testing.assert_array_equal(saved.mean, m.mean)
    np.testing.assert_array_equal(saved.moments.m2, m.m2)

    dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    assert (dx.dtype, dgamma.dtype, dbeta.dtype) == (r, *[reference.parameter_dtype(r)] * 2)
    assert dx.strides == y.strides
    expected = reference.backward(d.dy, d.x, d.gamma, axis=case.axis)
    assert_within(dgamma, expected.dgamma, expected.dgamma_budget, "dgamma")
    assert_within(dbeta, expected.dbeta, expected.dbeta_budget, "dbeta")
    assert_within(dx, expected.dx, expected.dx_budget, "dx")

    y = fastbn.batch_norm(d.x, d.mean, d.var, d.gamma, d.beta, axis=case.axis)
    assert y.dtype == r
    expected = reference.infer(d.x, d.mean, d.var, d.gamma, d.beta, axis=case.axis)
    assert_within(y, expected.y, expected.budget, "y")

    saved = fastbn.Saved.fixed(d.x, d.mean, d.var, d.gamma, d.beta, axis=case.axis)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    expected = reference.backward(d.dy, d.x, d.gamma, axis=case.axis, fixed=(d.mean, d.var))
    assert_within(dgamma, expected.dgamma, expected.dgamma_budget, "frozen dgamma")
    assert_within(dbeta, expected.dbeta, expected.dbeta_budget, "frozen dbeta")
    assert_within(dx, expected.dx, expected.dx_budget, "frozen dx")


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_table_reaches_every_grid(dtype):
    assert {c.grid(dtype) for c in EDGES + SMALL} >= {(r, f, False) for r in (True, False) for f in (True, False)}
    assert {c.grid(dtype) for c in BIG} == {(r, f, True) for r in (True, False) for f in (True, False)}


@pytest.mark.parametrize("dtype", FLOATS)
def test_train_statistics_fed_to_inference_give_the_training_output(rng, dtype):
    case = SMALL[0]
    d = case.data(rng, dtype)
    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta)
    z = fastbn.batch_norm(d.x, saved.mean, saved.var, d.gamma, d.beta)
    np.testing.assert_array_max_ulp(y, z, 1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True), (False, False)])
def test_omitted_parameters_are_one_and_zero(rng, dtype, gamma, beta):
    d = SMALL[0].data(rng, dtype)
    given = (d.gamma if gamma else None, d.beta if beta else None)
    full = (d.gamma if gamma else np.ones_like(d.gamma), d.beta if beta else np.zeros_like(d.beta))
    (y, saved), (z, full_saved) = fastbn.batch_norm_train(d.x, *given), fastbn.batch_norm_train(d.x, *full)
    np.testing.assert_array_equal(y, z)
    for a, b in zip(fastbn.batch_norm_backward(d.dy, saved), fastbn.batch_norm_backward(d.dy, full_saved), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        fastbn.batch_norm(d.x, d.mean, d.var, *given), fastbn.batch_norm(d.x, d.mean, d.var, *full)
    )


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "float32"), ("int8", "float32"), ("float64", "float64")])
def test_gradients_of_omitted_and_integer_parameters_have_the_dtype_of_y(rng, dtype, expected):
    x = (rng.normal(size=(9, 3)) * 9).astype(dtype)
    ones, wide = np.ones(3, "int16"), np.ones(3, ">f8")
    for gamma, beta in ((None, None), (ones, ones), (None, ones), (ones, None), (wide, None), (None, wide)):
        given = [np.dtype("float64" if p is wide else expected) for p in (gamma, beta)]
        for saved in (fastbn.batch_norm_train(x, gamma, beta)[1], fastbn.Saved.fixed(x, 0, 1, gamma, beta)):
            dx, *grads = fastbn.batch_norm_backward(np.ones((9, 3)), saved)
            assert dx.dtype == expected
            assert [g.dtype for g in grads] == given


def test_parameters_may_be_scalars_lists_and_of_another_dtype(rng):
    d = SMALL[0].data(rng, "float32")
    y = fastbn.batch_norm(d.x, 0.5, 2, 3.0, -1)
    np.testing.assert_array_equal(
        y, fastbn.batch_norm(d.x, [0.5] * 3, [2] * 3, np.full(3, 3.0), np.full(3, -1, "int8"))
    )
    y, saved = fastbn.batch_norm_train(d.x, d.gamma.astype("float64"), d.beta)
    _, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    assert (y.dtype, dgamma.dtype, dbeta.dtype) == (np.float32, np.float64, np.float32)


def test_lists_are_taken_as_numpy_would():
    y, saved = fastbn.batch_norm_train([[1.0, 10.0], [3.0, 30.0]], [1, 1], eps=0)
    np.testing.assert_array_equal(y, [[-1, -1], [1, 1]])
    assert y.dtype == np.float64
    dx, _, dbeta = fastbn.batch_norm_backward([[1.0, 2.0], [3.0, 4.0]], saved)
    np.testing.assert_array_equal(dbeta, [4, 6])
    assert dx.shape == (2, 2)
    assert fastbn.moments([[1], [3]]).mean == 2


def test_one_value_per_channel_can_be_inferred():
    y = fastbn.batch_norm(np.arange(6.0).reshape(2, 3), np.zeros((2, 3)), np.ones((2, 3)), axis=(0, 1), eps=0)
    np.testing.assert_array_equal(y, np.arange(6.0).reshape(2, 3))
    y = fastbn.batch_norm(np.arange(3.0), [0, 1, 2], [1, 1, 1], axis=0, eps=0)
    np.testing.assert_array_equal(y, [0, 0, 0])


def test_a_parameter_is_asked_for_its_array_once(rng):
    """The second time may give another, or fail after y is written."""

    class Once:
        def __init__(self, a):
            self.a = [a]

        def __array__(self, dtype=None, copy=None):
            return self.a.pop()

    d = SMALL[0].data(rng, "float32")
    y, saved = fastbn.batch_norm_train(Once(d.x), Once(d.gamma), Once(d.beta))
    np.testing.assert_array_equal(y, fastbn.batch_norm_train(d.x, d.gamma, d.beta)[0])
    dx = fastbn.batch_norm_backward(Once(d.dy), saved)[0]
    assert dx.shape == d.x.shape
    given = (d.mean, d.var, d.gamma, d.beta)
    np.testing.assert_array_equal(fastbn.batch_norm(d.x, *map(Once, given)), fastbn.batch_norm(d.x, *given))
    assert fastbn.Saved.fixed(d.x, *map(Once, given)).frozen


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0,), (0, 3)])
def test_an_empty_batch_gives_an_empty_result(shape):
    axis = 1 if len(shape) > 1 else ()
    x = np.zeros(shape, "float32")
    y, saved = fastbn.batch_norm_train(x, axis=axis)
    assert y.shape == shape
    assert saved.count == saved.moments.count == 0
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, saved)
    assert dx.shape == shape
    assert not dgamma.any()
    assert not dbeta.any()
    assert fastbn.moments(x, axis=axis).count == 0
    zeros = np.zeros(saved.mean.shape)
    assert fastbn.batch_norm(x, zeros, zeros + 1, axis=axis).shape == shape


@pytest.mark.parametrize("of", ["all", "the last axis", "nothing"])
@pytest.mark.parametrize("dtype", ["bool", "float32"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (0,), (0, 3), (4, 0, 5)])
def test_an_empty_batch_with_all_parts(shape, dtype, of):
    """Also where the weights are empty themselves."""
    axis = 1 if len(shape) > 1 else ()
    x = np.zeros(shape, "float16")
    where = np.ones({"all": shape, "the last axis": shape[-1:], "nothing": ()}[of], dtype)
    y, saved = fastbn.batch_norm_train(x, axis=axis, residual=x, activation="relu", where=where)
    assert (y.shape, y.dtype) == (shape, x.dtype)
    dx, dgamma, dbeta, dresidual = fastbn.batch_norm_backward(y, saved)
    assert (dx.shape, dresidual.shape) == (shape, shape)
    m = fastbn.moments(x, axis=axis, where=where)
    for a in (dgamma, dbeta, m.count, m.mean, m.m2, saved.count):
        np.testing.assert_array_equal(a, np.zeros(saved.mean.shape))
    if 0 in saved.mean.shape:  # a layer has some channels
        return
    bn = fastbn.BatchNorm(saved.mean.shape, axis=axis if axis == () else (axis,), activation="relu")
    assert bn(x, residual=x, where=where).shape == bn.backward(x).shape == bn.dresidual.shape == shape
    assert bn.num_batches_tracked == 0
    assert bn.running_var.all()


def test_no_channels():
    x = np.zeros((4, 0, 5), "float32")
    y, saved = fastbn.batch_norm_train(x, np.zeros(0), np.zeros(0))
    assert y.shape == x.shape
    assert [a.shape for a in fastbn.batch_norm_backward(y, saved)] == [(4, 0, 5), (0,), (0,)]
    assert fastbn.batch_norm(x, [], []).shape == x.shape
    assert fastbn.moments(x).mean.shape == (0,)


@pytest.mark.parametrize("axis", [1, (1,), -3, (-3,)])
def test_ways_to_say_the_same_axis(rng, axis):
    d = Case("NCHW", (4, 3, 5, 7)).data(rng, "float32")
    np.testing.assert_array_equal(
        fastbn.batch_norm_train(d.x, d.gamma, axis=axis)[0], fastbn.batch_norm_train(d.x, d.gamma)[0]
    )


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool", "float32"])
@pytest.mark.parametrize("step", [1, 2, -1])
def test_integers_in_any_memory(rng, dtype, step):
    """Converted in the same pass where they are dense, else with the copy."""
    x = (rng.normal(size=(24, 3, 5)) * 40).astype(dtype)[::step]
    expected = reference.train(x)
    y, saved = fastbn.batch_norm_train(x)
    assert_within(y, expected.y, expected.budget, "y")
    np.testing.assert_array_equal(fastbn.batch_norm(x, saved.mean, saved.var), y)
    dx, _, _ = fastbn.batch_norm_backward(y, saved)
    assert (y.dtype, dx.dtype) == (np.float32, np.float32)


def test_what_saved_says():
    x = np.zeros((4, 3, 2), "float32")
    _, saved = fastbn.batch_norm_train(x)
    assert repr(saved) == "Saved(x=float32(4, 3, 2), channels=(3,), frozen=False)"
    fixed = fastbn.Saved.fixed(x, np.arange(3), np.arange(3) + 1.0)
    assert repr(fixed) == "Saved(x=float32(4, 3, 2), channels=(3,), frozen=True)"
    assert (saved.count, fixed.count, fixed.frozen) == (8, 8, True)
    np.testing.assert_array_equal(fixed.var, [1, 2, 3])
    m = fixed.moments
    np.testing.assert_array_equal(m.m2, [8, 16, 24])
    np.testing.assert_array_equal(m.var(), [1, 2, 3])
    m.mean[:] = 7  # a value of its own
    np.testing.assert_array_equal(fixed.mean, [0, 1, 2])


@pytest.mark.parametrize("eps", [1e-80, float(np.finfo("float64").tiny)])
def test_a_constant_channel_whose_scale_is_beyond_float32(eps):
    x = np.full((6, 2), 3, "float32")
    np.testing.assert_array_equal(fastbn.batch_norm_train(x, [2.0, 3.0], [4.0, 5.0], eps=eps)[0], [[4, 5]] * 6)
    np.testing.assert_array_equal(fastbn.batch_norm(x, 3.0, 0.0, eps=eps), 0)
