"""Moments as a value: what merges, what is empty, what a pickle keeps, and how running statistics move."""

import copy
import functools
import itertools
import operator
import pickle

import numpy as np
import pytest
import reference
from arrays import BIG, FLOATS, SMALL

import fastbn


def same(a, b):
    return a.count == b.count and np.array_equal(a.mean, b.mean) and np.array_equal(a.m2, b.m2)


def close(a, b):
    """14 digits; and for m2 what the rounding of means in float64 costs: delta is a few std, and off by eps * mean."""
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-14, atol=1e-14 * b.std().max())
    lost = 2 * np.finfo(float).eps * abs(b.mean) * b.std() * b.count
    np.testing.assert_array_less(abs(a.m2 - b.m2), 1e-14 * b.m2 + lost)


def test_the_values_of_a_small_array():
    m = fastbn.moments(np.array([[1.0, -1], [2, -2], [3, -3], [4, -4]]))
    assert m.count == 4
    np.testing.assert_array_equal(m.mean, [2.5, -2.5])
    np.testing.assert_array_equal(m.m2, [5, 5])
    np.testing.assert_array_equal(m.var(), [1.25, 1.25])
    np.testing.assert_array_equal(m.var(correction=1), [5 / 3, 5 / 3])
    np.testing.assert_array_equal(m.std(), np.sqrt([1.25, 1.25]))
    np.testing.assert_array_equal(m.std(correction=1), np.sqrt([5 / 3, 5 / 3]))
    assert m.mean.dtype == m.m2.dtype == np.float64


@pytest.mark.parametrize("sizes", [(5, 1, 14), (1, 1, 1), (100, 2, 3), (0, 4, 0)])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_parts_merge_to_the_whole(rng, sizes, offset):
    x = rng.normal(offset, 1, (sum(sizes), 3, 5))
    parts = [fastbn.moments(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    whole = fastbn.moments(x)
    close(parts[0] + parts[1] + parts[2], whole)
    close(parts[0] + (parts[1] + parts[2]), whole)
    close(parts[2] + parts[0] + parts[1], whole)
    close(sum(parts), whole)
    close(parts[0].merge(parts[1]).merge(parts[2]), whole)
    close(functools.reduce(operator.add, parts, fastbn.Moments.empty(3)), whole)


def test_parts_with_other_means_merge(rng):
    parts = [rng.normal(m, s, (n, 2)) for m, s, n in ((1e6, 1, 7), (-1e6, 10, 90), (0, 1e-3, 400))]
    mean, var = reference.mean_var(np.concatenate(parts), 1)
    for order in itertools.permutations(parts):
        m = sum(fastbn.moments(p) for p in order)
        np.testing.assert_allclose(m.mean, mean.astype("float64"), rtol=1e-13)
        np.testing.assert_allclose(m.var(), var.astype("float64"), rtol=1e-14)


def test_empty_is_the_zero_of_the_sum(rng):
    m, zero = fastbn.moments(rng.normal(size=(6, 3))), fastbn.Moments.empty(3)
    assert same(zero + m, m)
    assert same(m + zero, m)
    assert same(zero + zero, zero)
    assert same(fastbn.moments(np.empty((0, 3))), zero)
    assert fastbn.Moments.empty((2, 4)).mean.shape == (2, 4)
    assert fastbn.Moments.empty(()).mean.shape == ()
    assert np.isnan(zero.var()).all()
    assert np.isnan(zero.std(correction=1)).all()


def test_one_value():
    m = fastbn.moments(np.array([[3.0, 4.0]]))
    assert m.count == 1
    np.testing.assert_array_equal(m.mean, [3, 4])
    np.testing.assert_array_equal(m.var(), [0, 0])
    assert np.isnan(m.var(correction=1)).all()


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(rng, clone):
    m = fastbn.moments(rng.normal(size=(6, 3)))
    assert same(clone(m), m)
    assert same(clone(m) + m, m + m)


def test_a_sum_leaves_its_parts_alone(rng):
    a, b = (fastbn.moments(rng.normal(size=(6, 3))) for _ in range(2))
    before = copy.deepcopy((a, b))
    c = a + b
    c.mean[:], c.m2[:], a.var()[:] = 7, 7, 7
    assert same(a, before[0])
    assert same(b, before[1])


def test_moments_of_its_own_lists():
    m = fastbn.Moments(2, [1.0, 2.0], [0.5, 0.5])
    assert isinstance(m.mean, np.ndarray)
    np.testing.assert_array_equal(m.var(), [0.25, 0.25])
    with pytest.raises(AttributeError):
        m.count = 3


def test_moments_keep_copies_of_what_they_are_given():
    mean, m2 = np.ones(2), np.ones(2)
    m = fastbn.Moments(2, mean, m2)
    mean[:], m2[:] = 7, 7
    np.testing.assert_array_equal([m.mean, m.m2], np.ones((2, 2)))


def test_values_do_not_depend_on_the_floating_point_errors_of_the_caller():
    """Underflow and overflow, NaN and infinity, and float32's signaling NaN; warnings are errors in any case."""
    x = np.array([[1e-170, 1e200, np.inf, np.nan], [0, 0, 0, 0], [0, 0, 0, 0]])
    signaling = np.array([0x7F800001], "uint32").view("float32")

    def values():
        _, saved = fastbn.batch_norm_train(x)
        fixed = fastbn.Saved.fixed(x, 0, [1e308, 5e-324, np.inf, np.nan])
        m = fastbn.Moments(3, [0.0] * 4, [5e-324, 1e308, np.inf, np.nan])
        bn = fastbn.BatchNorm(4, eps=1e308, dtype="float64")
        bn.running_var[:] = [1e308, 1.79e308, np.inf, np.nan]
        of = [saved.moments, fixed.moments, m, m + m, m + saved.moments, fastbn.Moments(1, signaling, signaling)]
        return [saved.var, fixed.var, *bn.fold(), *(v for m in of for v in (m.mean, m.m2, m.var(), m.std(1)))]

    expected = values()
    with np.errstate(all="raise"):
        found = values()
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))


def test_the_variance_of_the_whole_array_is_an_array():
    m = fastbn.moments(np.arange(4.0), axis=())
    for a in (m.var(), m.std(), fastbn.Moments.empty(()).std(), fastbn.Saved.fixed(np.arange(4.0), 0, 1, axis=()).var):
        assert type(a) is np.ndarray


def test_the_negative_sum_of_squares_is_named_beside_nan():
    with pytest.raises(ValueError, match=r"^Moments: m2 is -1.0 at \(1,\), expected no negative value$"):
        fastbn.Moments(3, [0.0, 0.0], [np.nan, -1.0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [*SMALL[:3], SMALL[-1], BIG[0], BIG[2], BIG[6], BIG[8]], ids=str)
def test_the_bits_are_those_of_training(rng, case, dtype):
    d = case.data(rng, dtype)
    saved = fastbn.batch_norm_train(d.x, axis=case.axis)[1]
    m = fastbn.moments(d.x, axis=case.axis)
    assert same(m, saved.moments)
    np.testing.assert_array_equal(m.mean, saved.mean)
    np.testing.assert_array_equal(m.var(), saved.var)
    assert (m.mean.shape, m.count) == (case.channels, saved.count)


# ----------------------------------------------------------------------------------------------------- update_running


@pytest.mark.parametrize(("correction", "var"), [(1, 0.9 + 0.1 * 5 / 3), (0, 1.025)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_update_by_hand(correction, var, dtype):
    """x = 1, 2, 3, 4: mean 2.5, m2 5."""
    mean, running = np.zeros(1, dtype), np.ones(1, dtype)
    m = fastbn.moments(np.array([[1.0], [2], [3], [4]]))
    assert fastbn.update_running(mean, running, m, momentum=0.9, correction=correction) is None
    np.testing.assert_allclose(mean, [0.25], rtol=np.finfo(dtype).eps)
    np.testing.assert_allclose(running, [var], rtol=np.finfo(dtype).eps)


def test_the_defaults_are_the_old_value_at_nine_tenths_and_the_unbiased_variance():
    mean, var = np.zeros(1), np.ones(1)
    fastbn.update_running(mean, var, fastbn.Moments(4, [2.5], [5.0]))
    np.testing.assert_allclose([*mean, *var], [0.25, 1.0666666666666667], rtol=1e-15)


@pytest.mark.parametrize("momentum", [0, 0.5, 0.99, 1])
def test_momentum_is_the_weight_of_the_old_value(rng, momentum):
    m = fastbn.moments(rng.normal(3, 2, (9, 4)))
    mean, var = rng.normal(size=4), rng.uniform(size=4)
    expected = reference.running(mean, m.mean, momentum), reference.running(var, m.var(1), momentum)
    fastbn.update_running(mean, var, m, momentum=momentum)
    np.testing.assert_allclose(mean, expected[0].astype("float64"), rtol=1e-15)
    np.testing.assert_allclose(var, expected[1].astype("float64"), rtol=1e-15)


def test_the_ends_of_momentum_are_exact():
    m = fastbn.Moments(3, [np.inf], [np.nan])
    mean, var = np.array([1.5]), np.array([2.5])
    fastbn.update_running(mean, var, m, momentum=1)
    assert (mean[0], var[0]) == (1.5, 2.5)
    mean[:], var[:] = np.nan, np.inf
    fastbn.update_running(mean, var, fastbn.Moments(3, [1.0], [4.0]), momentum=0)
    assert (mean[0], var[0]) == (1, 2)


def test_an_empty_batch_moves_nothing():
    mean, var = np.array([1.5]), np.array([2.5])
    fastbn.update_running(mean, var, fastbn.Moments.empty(1), momentum=0)
    assert (mean[0], var[0]) == (1.5, 2.5)


@pytest.mark.parametrize("momentum", [0, 0.5, 1])
def test_running_statistics_may_be_the_arrays_of_the_moments(rng, momentum):
    """Even those of the other kind: both are computed before either is written."""
    m = fastbn.moments(rng.normal(3, 2, (9, 4)))
    mean, var = m.m2.copy(), m.mean.copy()
    fastbn.update_running(mean, var, m, momentum=momentum)
    fastbn.update_running(m.m2, m.mean, m, momentum=momentum)
    np.testing.assert_array_equal([m.m2, m.mean], [mean, var])


def test_strided_running_statistics(rng):
    block = np.zeros((3, 2))
    m = fastbn.moments(rng.normal(size=(9, 3)))
    fastbn.update_running(block[:, 0], block[::-1, 1], m, momentum=0)
    np.testing.assert_array_equal(block, np.stack([m.mean, m.var(1)[::-1]], axis=1))
