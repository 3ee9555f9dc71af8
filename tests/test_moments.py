"""Moments as a value: what merges, what is empty, what a pickle keeps, and how running statistics move."""

import copy
import functools
import itertools
import operator
import pickle
from fractions import Fraction

import exact
import numpy as np
import pytest
import reference
from arrays import BIG, FLOATS, SMALL
from refusals import refused

import fastbn


def same(a, b):
    """The same bits, and a count of the same type."""
    types = type(a.count), np.asarray(a.count).dtype
    parts = ((np.asarray(m.count), m.mean, m.m2) for m in (a, b))
    return types == (type(b.count), np.asarray(b.count).dtype) and all(
        v.shape == w.shape and v.tobytes() == w.tobytes() for v, w in zip(*parts, strict=True)
    )


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
        weights = fastbn.Moments(
            np.array([5e-324, 1e308, 0, 0.5]), [1e308, -1e308, np.inf, np.nan], [5e-324, 1e308, 0, 1]
        )
        of = [saved.moments, fixed.moments, m, m + m, m + saved.moments, fastbn.Moments(1, signaling, signaling)]
        of += [weights, weights + m, m + weights, weights + saved.moments]
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


# ------------------------------------------------------------------------------------------------------------- weights


def total(x, w):
    """Weight, mean and m2 of each column, without rounding; 0 where there is no weight."""
    x, w = exact.rational(x), exact.rational(w)
    n = w.sum(0)
    mean = (w * x).sum(0) / np.where(n == 0, Fraction(1), n)
    return n, mean, (w * (x - mean) ** 2).sum(0)


def weighted(x, w):
    """The same as a value, each rounded once."""
    return fastbn.Moments(*(a.astype(float) for a in total(x, w)))


def close_to_exact(m, x, w):
    """14 digits, and what `close` allows m2."""
    n, mean, m2 = total(x, w)
    size = m2.astype(float)
    std = np.sqrt(size / np.where(n == 0, 1, n).astype(float))
    lost = 2 * np.finfo(float).eps * abs(mean.astype(float)) * std * n.astype(float)
    for name, found, expected, scale in (
        ("count", m.count, n, 0),
        ("mean", m.mean, mean, std),
        ("m2", m.m2, m2, size + lost / 1e-14),
    ):
        assert exact.digits(found, expected, scale) <= 1e-14, name


def test_the_values_of_a_small_array_with_weights():
    """1, 2, 4 with weights 2, 1, 1; 5 with weight 0.25; nothing; 7 with weight 1."""
    m = fastbn.Moments(np.array([4, 0.25, 0, 1], "float32"), [2.0, 5, 0, 7], [6.0, 0, 0, 0])
    assert (m.count.dtype, m.count.shape) == (np.float64, (4,))
    np.testing.assert_array_equal(m.var(), [1.5, 0, np.nan, 0])
    np.testing.assert_array_equal(m.var(correction=1), [2, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(m.std(), np.sqrt([1.5, 0, np.nan, 0]))
    np.testing.assert_array_equal(m.std(correction=1), np.sqrt([2, np.nan, np.nan, np.nan]))
    halves = fastbn.Moments(
        np.ones(1), [1.5], [0.25]
    )  # 1 and 2 with weights of a half: an estimate of neither 0 nor inf
    assert np.isnan(halves.var(correction=1)).all()


def test_a_merge_is_that_of_exact_arithmetic(rng):
    """Weights, means and m2 of any size. Of m2 nine roundings of half an eps are in a term, of the mean five."""
    eps, channels = np.finfo(float).eps, 400
    signs = rng.choice([-1, 1], (2, channels))
    a, b = (
        fastbn.Moments(w, mean * sign, m2)
        for (w, mean, m2), sign in zip(10 ** rng.uniform(-50, 50, (2, 3, channels)), signs, strict=True)
    )
    (n, p, s), (k, q, t) = ([exact.rational(v) for v in (m.count, m.mean, m.m2)] for m in (a, b))
    expected = n + k, (n * p + k * q) / (n + k), s + t + (q - p) ** 2 * n * k / (n + k)
    for m in (a + b, b + a):
        assert exact.digits(m.count, expected[0]) <= eps / 2
        assert exact.digits(m.mean, expected[1], abs(a.mean) + abs(b.mean)) <= 3 * eps
        assert exact.digits(m.m2, expected[2]) <= 5 * eps


@pytest.mark.parametrize("sizes", [(5, 1, 14), (1, 1, 1), (40, 2, 3), (0, 4, 0)])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_weighted_parts_merge_to_the_whole(rng, sizes, offset):
    """In any order and grouping. One channel has weight in the first part only, one in none."""
    rows = sum(sizes)
    x = rng.normal(offset, 1, (rows, 5))
    w = rng.exponential(size=x.shape) * rng.choice([1, 100], x.shape) * (rng.random(x.shape) > 0.2)
    w[:, 4] = 0
    w[sizes[0] :, 3] = 0
    cuts = np.cumsum(sizes)[:-1]
    parts = [weighted(*part) for part in zip(np.split(x, cuts), np.split(w, cuts), strict=True)]
    for a, b, c in itertools.permutations(parts):
        for m in ((a + b) + c, a + (b + c), sum([a, b, c]), fastbn.Moments.empty(5) + a.merge(b).merge(c)):
            close_to_exact(m, x, w)
            assert (m.count[4], m.m2[4]) == (0, 0)


def test_whole_weights_are_repeated_rows(rng):
    """Value by value, as West's algorithm adds them."""
    x, w = rng.normal(3, 2, (12, 4)), rng.integers(0, 4, (12, 4))
    m = sum(fastbn.Moments(w[i], x[i], np.zeros(4)) for i in range(12))
    for c in range(4):
        repeated = fastbn.moments(np.repeat(x[:, c], w[:, c]), axis=())
        close(fastbn.Moments(int(m.count[c]), m.mean[c], m.m2[c]), repeated)
        np.testing.assert_allclose(m.var(1)[c], repeated.var(1), rtol=1e-13)


def test_equal_weights_merge_to_the_bits_of_counts(rng):
    a, b = (fastbn.moments(rng.normal(3, 2, (n, 50))) for n in (7, 300))
    as_weights = [fastbn.Moments(np.full(50, float(m.count)), m.mean, m.m2) for m in (a, b)]
    plain = a + b
    expected = fastbn.Moments(np.full(50, 307.0), plain.mean, plain.m2)
    assert type(plain.count) is int
    for m in (as_weights[0] + as_weights[1], as_weights[0] + b, a + as_weights[1]):
        assert same(m, expected)
        np.testing.assert_array_equal([m.var(), m.var(1)], [plain.var(), plain.var(1)])


@pytest.mark.parametrize("junk", [0.0, np.inf, np.nan, 1e308])
def test_a_channel_without_weight_takes_the_bits_of_the_other(junk):
    """Whatever its own mean and m2 are; warnings are errors."""
    values = np.array([0.1, -1 / 3, -0.0, np.nan]), np.array([0.7, 1e-300, 0.0, np.inf])
    none = fastbn.Moments(np.array([0.0, 0.0, -0.0, 0.0]), np.full(4, junk), np.full(4, junk))
    for m in (fastbn.Moments(np.array([5e-324, 0.3, 1e9, 2.0]), *values), fastbn.Moments(3, *values)):
        for merged in (none + m, m + none):
            assert same(merged, fastbn.Moments(np.broadcast_to(m.count, 4).astype(float), *values))
    assert not (none + none).count.any()


def test_one_channel_without_weight_leaves_the_others_merged():
    a = fastbn.Moments(np.array([0.0, 2.0, 2.0]), [9.0, 1.0, 1.0], [9.0, 1.0, 1.0])
    b = fastbn.Moments(np.array([2.0, 0.0, 2.0]), [3.0, 9.0, 3.0], [1.0, 9.0, 1.0])
    assert same(a + b, fastbn.Moments(np.array([2.0, 2.0, 4.0]), [3.0, 1.0, 2.0], [1.0, 1.0, 6.0]))


def test_the_empty_value_is_the_zero_of_weighted_sums_too():
    m, zero = fastbn.Moments(np.array([0.5, 0.0]), [1.0, 2.0], [3.0, 4.0]), fastbn.Moments.empty(2)
    assert zero + m is m
    assert m + zero is m
    assert sum([m]) is m


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_weights_have_the_shape_of_the_channels(rng, shape):
    w, mean, m2 = rng.uniform(1, 2, (3, *shape))
    m = fastbn.Moments(w, mean, m2)
    for a in (m, m + m, m + fastbn.Moments(3, mean, m2), fastbn.Moments(3, mean, m2) + m):
        for part in (a.count, a.mean, a.m2, a.var(), a.std(1)):
            assert (type(part), part.dtype, part.shape) == (np.ndarray, np.float64, shape)
    np.testing.assert_array_equal((m + m).count, 2 * w)
    refused(lambda: fastbn.Moments(np.ones((4, *shape)), mean, m2), "Moments", "count", ValueError)


def test_far_values_of_little_weight_do_not_overflow():
    a, b = (fastbn.Moments(np.array([1e-250]), [mean], [0.0]) for mean in (1e200, -1e200))
    np.testing.assert_allclose((a + b).m2, [2e150], rtol=1e-15)


@pytest.mark.parametrize("count", [np.array([3, 0]), np.array([3, 0], "uint8"), np.array([3, 0], ">f4")])
def test_a_count_is_a_copy_in_float64(count):
    before = count.copy()
    m = fastbn.Moments(count, [1.0, 0.0], [1.0, 0.0])
    assert m.count.dtype == np.float64
    np.testing.assert_array_equal(m.count, before)
    m.count[:] = 7
    np.testing.assert_array_equal(count, before)
    assert "count=array([7., 7.])" in repr(m)


def test_an_array_without_axes_may_have_become_a_number():
    """As NumPy's arithmetic makes it."""
    m = fastbn.Moments(np.array(0.25) + 0.25, np.array(1.0), np.array(0.0))
    assert same(m, fastbn.Moments(np.array(0.5), np.array(1.0), np.array(0.0)))


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_with_weights(rng, clone):
    m = fastbn.Moments(*rng.uniform(0, 1, (3, 4)))
    assert same(clone(m), m)
    assert same(clone(m) + m, m + m)


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


@pytest.mark.parametrize("momentum", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_channels_move_by_their_weight_or_stay(rng, momentum, dtype):
    """Whole weights move a channel as that many values do; without any not a bit of it changes."""
    mean, var = rng.normal(size=5).astype(dtype), rng.uniform(size=5).astype(dtype)
    expected = np.array([mean, var])
    m = fastbn.Moments(np.array([0, 4, 0, 9, 1.5]), [np.nan, 1, np.inf, 2, 3], [np.nan, 5, np.inf, 6, 0.5])
    for c, count in ((1, 4), (3, 9)):
        one = fastbn.Moments(count, m.mean[c : c + 1], m.m2[c : c + 1])
        fastbn.update_running(*expected[:, c : c + 1], one, momentum=momentum)
    expected[:, 4] = reference.running(expected[:, 4], np.array([3, 1]), momentum)  # 0.5 / (1.5 - 1)
    fastbn.update_running(mean, var, m, momentum=momentum)
    np.testing.assert_array_equal([mean[:4], var[:4]], expected[:, :4])
    np.testing.assert_allclose([mean[4], var[4]], expected[:, 4], rtol=2 * np.finfo(dtype).eps)


def test_a_batch_of_weight_zero_moves_nothing():
    mean, var = np.array([1.5, np.nan]), np.array([2.5, -0.0])
    before = mean.tobytes(), var.tobytes()
    none = fastbn.Moments(np.zeros(2), [np.nan, 1.0], [np.inf, 1.0])
    for momentum, correction in itertools.product([0, 0.5, 1], [0, 1]):
        fastbn.update_running(mean, var, none, momentum=momentum, correction=correction)
    assert (mean.tobytes(), var.tobytes()) == before


@pytest.mark.parametrize("weight", [1.0, 0.5, 5e-324])
def test_a_weight_too_small_for_the_correction(weight):
    """One value has no unbiased variance. Another channel's weight does not help; without the correction it is 0."""
    mean, var = np.array([1.5, 2.5, 3.5]), np.array([4.5, 5.5, 6.5])
    before = np.array([mean, var])
    m = fastbn.Moments(np.array([0.0, 8.0, weight]), [1.0, 2.0, 3.0], [0.0, 4.0, 0.0])
    message = refused(lambda: fastbn.update_running(mean, var, m, momentum=0), "update_running", "m.count", ValueError)
    assert f"{weight} at (2,)" in message
    np.testing.assert_array_equal([mean, var], before)
    fastbn.update_running(mean, var, m, momentum=0, correction=0)
    np.testing.assert_array_equal([mean, var], [[1.5, 2, 3], [4.5, 0.5, 0]])


def test_a_weight_hardly_above_the_correction_is_enough():
    mean, var = np.zeros(1), np.ones(1)
    fastbn.update_running(mean, var, fastbn.Moments(np.array([1 + 2.0**-52]), [3.0], [2.0**-52]), momentum=0)
    assert (mean[0], var[0]) == (3, 1)
