"""Memory order: the canonical view, what is copied and what is not, what a forward saves."""

import importlib
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import reference
from arrays import BIG, CASES, EDGES, FLOATS, SMALL, Case

import fastbn
from fastbn._layout import layout

CASE = Case("NCHW", (4, 3, 5, 7))


def test_the_stride_of_an_axis_of_length_1_does_not_tell_arrays_apart(rng):
    x = rng.normal(size=(1, 3, 5))
    again = np.lib.stride_tricks.as_strided(x, x.shape, (999, *x.strides[1:]))
    expected = fastbn.batch_norm(x, 0.5, 2.0)
    assert fastbn.batch_norm(x, 0.5, 2.0, out=again) is again
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], BIG[0], BIG[8]], ids=str)
def test_backward_of_an_in_place_forward(rng, case):
    d = case.data(rng, "float32")
    d.gamma[0], d.beta[:] = 0.5, d.beta / 4
    expected = reference.backward(d.dy, d.x, d.gamma, axis=case.axis)
    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, axis=case.axis, out=d.x)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(d.dy, saved)
    # xhat comes from y: its rounding and that of the subtraction of beta, divided by gamma.
    eps = np.finfo(np.float32).eps
    scale = np.max(abs(y.astype("float64"))) / np.min(abs(d.gamma)) * 4 * eps
    np.testing.assert_allclose(dbeta, expected.dbeta.astype("float64"), rtol=eps)
    np.testing.assert_allclose(dx, expected.dx.astype("float64"), atol=scale * 10)
    sums = scale * reference.reduce(abs(d.dy), case.axis).max()
    np.testing.assert_allclose(dgamma, expected.dgamma.astype("float64"), atol=float(sums))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_canonical_view_holds_every_element_once(case):
    x = case.lay(np.arange(case.size, dtype="float32").reshape(case.shape))
    lay = layout(x.shape, x.strides, x.itemsize, reference.channel_axes(x, case.axis), 2)
    ordered = x.transpose(lay.order)
    assert lay.channel_shape == case.channels
    assert lay.channels * lay.per_channel == lay.size == x.size
    inner = lay.measured.sizes[2 if lay.measured.runs else 3]
    channel = np.arange(lay.channels).reshape(lay.channel_shape)
    expected = np.broadcast_to(reference.spread(channel, x, case.axis).astype(int), x.shape).transpose(lay.order)
    found = (np.arange(x.size) // inner % lay.channels).reshape(ordered.shape)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", SMALL + EDGES, ids=str)
def test_nothing_beside_the_arrays_is_read_or_written(rng, case, dtype):
    """Inputs lie between NaN, outputs between a value that must stay."""
    d = case.data(rng, dtype)
    order = case.order or tuple(range(d.x.ndim))

    def inside(a, around, pad=67):
        memory = np.full(a.size + 2 * pad, around, dtype)
        middle = memory[pad:-pad].reshape([a.shape[i] for i in order]).transpose(np.argsort(order))
        middle[...] = a
        return middle, lambda: (memory[:pad] == around).all() and (memory[-pad:] == around).all()

    y, saved = fastbn.batch_norm_train(d.x, d.gamma, axis=case.axis)
    expected = y, *fastbn.batch_norm_backward(d.dy, saved)
    (x, _), (dy, _) = inside(d.x, np.nan), inside(d.dy, np.nan)
    (y, y_alone), (dx, dx_alone) = inside(d.x * 0, 7.0), inside(d.x * 0, 7.0)
    _, saved = fastbn.batch_norm_train(x, d.gamma, axis=case.axis, out=y)
    found = y, *fastbn.batch_norm_backward(dy, saved, out=dx)
    fastbn.batch_norm(x, d.mean, d.var, axis=case.axis, out=np.empty_like(y))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert y_alone()
    assert dx_alone()


def nhwc_as_nchw(rng, n=8, c=16, side=64):
    return rng.normal(size=(n, side, side, c)).astype("float32").transpose(0, 3, 1, 2)


def peak(call):
    """Bytes that NumPy allocated at most during a call, made once before."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.jit("so many values take minutes as plain Python")
def test_nhwc_memory_seen_as_nchw_is_not_copied(rng):
    x = nhwc_as_nchw(rng)
    y, saved = fastbn.batch_norm_train(x)
    assert y.strides == x.strides
    out, dx = np.empty_like(x), np.empty_like(x)
    one = np.ones(x.shape[1])
    calls = [
        lambda: fastbn.batch_norm_train(x, out=out),
        lambda: fastbn.batch_norm(x, one, one, out=out),
        lambda: fastbn.batch_norm_backward(y, saved, out=dx),
        lambda: fastbn.moments(x),
    ]
    # Partial sums: at most 32 bytes in a column for each 64 rows of 4 bytes, an eighth of x.
    for i, call in enumerate(calls):
        assert peak(call) < x.nbytes / 7, i
    strided = np.empty((*x.shape[:3], 2 * x.shape[3]), "float32")[..., ::2]
    assert peak(lambda: fastbn.moments(strided)) >= x.nbytes  # such a copy would have been seen


def test_nhwc_memory_seen_as_nchw_has_the_bits_of_nhwc(rng):
    x = nhwc_as_nchw(rng, n=2)
    y, saved = fastbn.batch_norm_train(x)
    z, nhwc = fastbn.batch_norm_train(x.transpose(0, 2, 3, 1), axis=-1)
    np.testing.assert_array_equal(y.transpose(0, 2, 3, 1), z)
    np.testing.assert_array_equal(saved.var, nhwc.var)
    dx, dz = fastbn.batch_norm_backward(x, saved)[0], fastbn.batch_norm_backward(x.transpose(0, 2, 3, 1), nhwc)[0]
    np.testing.assert_array_equal(dx.transpose(0, 2, 3, 1), dz)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [SMALL[0], BIG[0], BIG[8]], ids=str)
def test_the_bits_do_not_depend_on_alignment(rng, case, dtype):
    d = case.data(rng, dtype)
    expected, saved = fastbn.batch_norm_train(d.x, d.gamma, axis=case.axis)
    gradients = fastbn.batch_norm_backward(d.dy, saved)
    for shift in (1, 3):
        memory = np.empty(2 * (d.x.size + shift), dtype)
        x, dy = (memory[i : i + d.x.size].reshape(d.x.shape) for i in (shift, d.x.size + shift))
        x[...], dy[...] = d.x, d.dy
        y, saved = fastbn.batch_norm_train(x, d.gamma, axis=case.axis)
        np.testing.assert_array_equal(y, expected)
        for a, b in zip(fastbn.batch_norm_backward(dy, saved), gradients, strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_is_saved_refers_to_x_and_is_reusable(rng):
    d = CASE.data(rng, "float32")
    _, saved = fastbn.batch_norm_train(d.x, d.gamma)
    assert saved.x is d.x
    first, second = fastbn.batch_norm_backward(d.dy, saved), fastbn.batch_norm_backward(d.dy, saved)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.shares_memory(a, b)


def test_what_is_saved_does_not_follow_the_parameters(rng):
    """An optimizer may step between forward and backward of a layer."""
    d = CASE.data(rng, "float32")
    _, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta)
    expected = fastbn.batch_norm_backward(d.dy, saved)
    d.gamma += 1
    d.beta += 1
    for a, b in zip(fastbn.batch_norm_backward(d.dy, saved), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fixed", [True, False])
def test_what_is_read_from_saved_may_be_changed(rng, fixed):
    d = CASE.data(rng, "float32")
    saved = fastbn.Saved.fixed(d.x, d.mean, d.var) if fixed else fastbn.batch_norm_train(d.x)[1]
    expected = fastbn.batch_norm_backward(d.dy, saved)
    for a in (saved.mean, saved.var, saved.moments.mean, saved.moments.m2):
        a += 1
    for a, b in zip(fastbn.batch_norm_backward(d.dy, saved), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_backward_of_a_subclass_normalized_in_place(rng):
    """What the forward saves is the plain array under the caller's matrix."""
    x, dy = rng.normal(size=(2, 301, 20))
    expected = fastbn.batch_norm_backward(dy, fastbn.batch_norm_train(x)[1])
    place = np.matrix(x)
    y, saved = fastbn.batch_norm_train(place, out=place)
    assert y is place
    assert type(saved.x) is np.ndarray
    for found, wanted in zip(fastbn.batch_norm_backward(dy, saved), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.fixture
def given(monkeypatch):
    """The arrays of every call of a kernel."""
    noted = []

    def note(kernel, size, *args):
        noted.append([a for a in args if isinstance(a, np.ndarray)])
        kernel.serial(*args)

    for name in ("functional", "moments"):  # fastbn.moments is the verb
        monkeypatch.setattr(importlib.import_module(f"fastbn.{name}"), "run", note)
    return noted


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_arrays_without_gaps_are_used_in_place(rng, given, case):
    """In any order of their axes, but where the channels would not be one ascending block."""
    d = case.data(rng, "float32")
    y, saved = fastbn.batch_norm_train(d.x, axis=case.axis)
    fastbn.batch_norm(d.x, 0, 1, axis=case.axis)
    fastbn.moments(d.x, axis=case.axis)
    dx, _, _ = fastbn.batch_norm_backward(d.dy, saved)
    train, infer, alone, back = given
    used = [(train[0], d.x), (train[1], y), (infer[0], d.x), (alone[0], d.x)]
    used += [(back[1], d.x), (back[0], d.dy), (back[2], dx)]
    in_place = case.name not in ("apart", "around", "swapped", "rank6-tuple")
    assert [np.shares_memory(a, b) for a, b in used] == [in_place] * len(used)


def unaligned(a):
    return np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "bool"])
@pytest.mark.parametrize("awkward", [unaligned, lambda a: a.astype(a.dtype.newbyteorder(">")), lambda a: a[:, ::-1]])
def test_what_kernels_are_given(rng, given, dtype, awkward):
    """Flat, contiguous, aligned, native and writable arrays: the compiler counts on it, and compiles one type once."""
    x = awkward((9 * rng.normal(size=(4, 3, 5))).astype(dtype))
    dy = awkward(rng.normal(size=x.shape).astype("float64"))
    y, saved = fastbn.batch_norm_train(x)
    fastbn.batch_norm_backward(dy, saved)
    fastbn.batch_norm(x, 0.0, 1.0)
    fastbn.moments(x)
    assert [len(arrays) for arrays in given] == [4, 6, 4, 4]
    for a in (a for arrays in given for a in arrays):
        assert (a.dtype.isnative, a.flags.c_contiguous, a.flags.aligned, a.flags.writeable) == (True,) * 4
        assert type(a) is np.ndarray
    assert y.dtype == reference.result_dtype(dtype)


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (4, 0, 5), (99, 3, 0)])
@pytest.mark.parametrize("axes", [(), (0,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_weights_of_an_empty_array(shape, axes):
    """Whichever axes they vary along: no channel has any weight."""
    x, w = np.empty(shape, "float32"), np.ones([n if a in axes else 1 for a, n in enumerate(shape)])
    m = fastbn.moments(x, where=w)
    y, saved = fastbn.batch_norm_train(x, where=w)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, saved)
    assert (y.shape, dx.shape) == (shape, shape)
    for a in (m.count, m.mean, m.m2, saved.count, dgamma, dbeta):
        np.testing.assert_array_equal(a, np.zeros(shape[1]))
    bn = fastbn.BatchNorm(max(shape[1], 1))
    if shape[1]:
        assert bn(x, where=w).shape == shape
        assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(200_003, 2), (1, 2, 200_003), (70_001, 2, 3)])
def test_the_sum_of_many_equal_weights_has_14_digits(shape):
    """Which all round the same way."""
    n = int(np.prod(shape)) // 2
    m = fastbn.moments(np.zeros(shape, "float32"), where=np.full(shape, 0.7))
    assert abs(float(Fraction(m.count[0]) / (Fraction(0.7) * n) - 1)) < 1e-14
    np.testing.assert_array_equal(m.count, m.count[0])


def test_an_x_without_fixed_steps_goes_through_memory_of_its_own(rng):
    """Rows of pictures lie between those of other pictures: no one step leads along a channel."""
    x = rng.integers(0, 256, (4, 2, 5, 3), "uint8").transpose(1, 0, 2, 3)
    out = np.empty((2, 3, 4, 5), "float32")
    fastbn.batch_norm(x, 100, 50, axis=-1, out=out.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(out.transpose(0, 2, 3, 1), fastbn.batch_norm(x.copy(), 100, 50, axis=-1))
