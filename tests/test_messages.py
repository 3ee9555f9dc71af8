"""Every error message, word for word: function, argument, what it was, what was expected."""

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import (
    BatchNorm,
    Moments,
    Saved,
    batch_norm,
    batch_norm_backward,
    batch_norm_train,
    fold_conv,
    fold_linear,
    moments,
    update_running,
)


def x():
    return np.ones((4, 3, 5), "float32")


def saved(x=None, **options):
    return batch_norm_train(np.arange(60.0, dtype="float32").reshape(4, 3, 5) if x is None else x, **options)[1]


def read_only(a):
    a.flags.writeable = False
    return a


def overwritten():
    a = np.arange(12.0).reshape(4, 3)
    return batch_norm_train(a, [1, 0, 2], out=a)[1]


def layer(**options):
    return BatchNorm(3, **options)


def spoiled(**arrays):
    bn = layer()
    for name, values in arrays.items():
        getattr(bn, name)[:] = values
    return bn


def called():
    bn = layer()
    bn(x())
    return bn


def state(**changes):
    return layer().state_dict() | changes


A, M = x(), moments(np.arange(12.0).reshape(4, 3))
K = np.ones((3, 1, 2, 2), "float32")
NUMBERS = "expected float16, bfloat16, float32, float64, an integer dtype or bool"
COUNTED = {"running_count": 3, "running_m2": np.ones(3)}

MESSAGES = [
    # arrays
    (lambda: moments(np.ma.ones(3)),
     "moments: x is a masked array, whose mask would be ignored; expected a plain array"),
    (lambda: moments([[1j]]), f"moments: x has dtype complex128, {NUMBERS}"),
    (lambda: moments(np.ones(3, ml_dtypes.float8_e4m3fn), axis=0), f"moments: x has dtype float8_e4m3fn, {NUMBERS}"),
    (lambda: moments(np.ones(3, "V2"), axis=0), f"moments: x has dtype |V2, {NUMBERS}"),
    (lambda: batch_norm_train(x(), "a"), f"batch_norm_train: gamma has dtype <U1, {NUMBERS}"),
    (lambda: batch_norm_train(x(), 1, "a"), f"batch_norm_train: beta has dtype <U1, {NUMBERS}"),
    (lambda: batch_norm(x(), "a", 1), f"batch_norm: mean has dtype <U1, {NUMBERS}"),
    (lambda: batch_norm(x(), 0, "a"), f"batch_norm: var has dtype <U1, {NUMBERS}"),
    (lambda: Saved.fixed([1j], 0, 1), f"Saved.fixed: x has dtype complex128, {NUMBERS}"),
    (lambda: layer()([[1j] * 3]), f"BatchNorm: x has dtype complex128, {NUMBERS}"),
    (lambda: Moments(3, ["a"], [1.0]), f"Moments: mean has dtype <U1, {NUMBERS}"),
    (lambda: Moments(3, [1.0], ["a"]), f"Moments: m2 has dtype <U1, {NUMBERS}"),
    (lambda: fastbn.warmup(complex), f"warmup: dtypes has {complex!r}, {NUMBERS}"),
    (lambda: fastbn.warmup("half a float"), f"warmup: dtypes has 'half a float', {NUMBERS}"),
    # axes
    (lambda: moments(x(), axis=True), "moments: axis is True, expected an int or a tuple of ints"),
    (lambda: moments(x(), axis=(1, None)), "moments: axis is (1, None), expected an int or a tuple of ints"),
    (lambda: moments(x(), axis=-4),
     "moments: axis -4 is out of range for x of shape (4, 3, 5), expected -3 to 2"),
    (lambda: moments(x(), axis=(0, 3)),
     "moments: axis 3 is out of range for x of shape (4, 3, 5), expected -3 to 2"),
    (lambda: moments(x(), axis=(1, -2)),
     "moments: axis=(1, -2) names an axis of x of shape (4, 3, 5) twice, expected distinct axes"),
    # numbers
    (lambda: batch_norm_train(x(), eps=-1), "batch_norm_train: eps is -1, expected a finite number of at least 0"),
    (lambda: batch_norm(x(), 0, 1, eps="1"), "batch_norm: eps is '1', expected a finite number of at least 0"),
    (lambda: batch_norm(x(), 0, 1, eps=None), "batch_norm: eps is None, expected a finite number of at least 0"),
    (lambda: batch_norm(x(), 0, 1, eps=10**400),
     "batch_norm: eps is beyond float64, expected a finite number of at least 0"),
    (lambda: Saved.fixed(x(), 0, 1, eps=np.inf), "Saved.fixed: eps is inf, expected a finite number of at least 0"),
    (lambda: layer(eps=-1.0), "BatchNorm: eps is -1.0, expected a finite number of at least 0"),
    (lambda: layer(momentum=2), "BatchNorm: momentum is 2, expected a number from 0 to 1"),
    (lambda: update_running(np.ones(3), np.ones(3), M, momentum=1.5),
     "update_running: momentum is 1.5, expected a number from 0 to 1"),
    (lambda: update_running(np.ones(3), np.ones(3), M, correction=2),
     "update_running: correction is 2, expected 0 (divide by n) or 1 (divide by n - 1)"),
    (lambda: M.var(True), "Moments.var: correction is True, expected 0 (divide by n) or 1 (divide by n - 1)"),
    (lambda: layer(correction="1"), "BatchNorm: correction is '1', expected 0 (divide by n) or 1 (divide by n - 1)"),
    # parameters
    (lambda: batch_norm_train(x(), np.ones(2)),
     "batch_norm_train: gamma has shape (2,), expected (3,), the channels of x; x has shape (4, 3, 5), axis=1"),
    (lambda: batch_norm_train(x(), None, np.ones(2), axis=-1),
     "batch_norm_train: beta has shape (2,), expected (5,), the channels of x; x has shape (4, 3, 5), axis=-1"),
    (lambda: batch_norm(x(), np.ones(2), 1),
     "batch_norm: mean has shape (2,), expected (3,), the channels of x; x has shape (4, 3, 5), axis=1"),
    (lambda: batch_norm(x(), np.ones(5), 1),
     "batch_norm: mean has shape (5,), expected (3,), the channels of x; x has shape (4, 3, 5), axis=1; with axis=-1 "
     "they are (5,)"),
    (lambda: batch_norm_train(x(), None, np.ones(4), axis=-1),
     "batch_norm_train: beta has shape (4,), expected (5,), the channels of x; x has shape (4, 3, 5), axis=-1; with "
     "axis=0 they are (4,)"),
    (lambda: Saved.fixed(x(), 0, np.ones(2), axis=(1,)),
     "Saved.fixed: var has shape (2,), expected (3,), the channels of x; x has shape (4, 3, 5), axis=(1,)"),
    (lambda: batch_norm(x(), 0, [0, 2, -3]), "batch_norm: var is -3 at (2,), expected no negative value"),
    (lambda: batch_norm(x(), 0, -1), "batch_norm: var is -1, expected no negative value"),
    (lambda: batch_norm(np.ones((2, 3, 4)), 0, [[1, 1], [1, -1.5]] * np.ones((1, 1)), axis=(0, 2)),
     "batch_norm: var has shape (2, 2), expected (2, 4), the channels of x; x has shape (2, 3, 4), axis=(0, 2)"),
    (lambda: batch_norm(np.ones((2, 3, 2)), 0, [[1, 1], [-1.5, 1]], axis=(0, 2)),
     "batch_norm: var is -1.5 at (1, 0), expected no negative value"),
    (lambda: batch_norm_backward(np.ones((4, 3)), overwritten()),
     "batch_norm_backward: x was overwritten (batch_norm_train with out=x) and gamma is 0 in channel 1, so x cannot be "
     "recovered from y; expected gamma without zeros"),
    (lambda: batch_norm_train(np.ones((1, 3)), axis=(-1,)),
     "batch_norm_train: x has one value per channel, expected at least two in training (one is enough where the "
     "statistics are given: batch_norm, a layer's eval()); x has shape (1, 3), axis=(-1,)"),
    # out
    (lambda: batch_norm(x(), 0, 1, out=[1]), "batch_norm: out is of type list, expected a NumPy array"),
    (lambda: batch_norm(x(), 0, 1, out=np.ma.ones(3)), "batch_norm: out is a masked array, expected a plain array"),
    (lambda: batch_norm_train(x(), out=np.ones(3)),
     "batch_norm_train: out has shape (3,), expected (4, 3, 5), the shape of x"),
    (lambda: batch_norm_backward(x(), saved(x=x().astype("uint8")), out=x().astype("int32")),
     "batch_norm_backward: out has dtype int32, expected float32, the dtype of y"),
    (lambda: batch_norm_train(x(), out=np.ones((4, 3, 5))),
     "batch_norm_train: out has dtype float64, expected float32, the dtype of y"),
    (lambda: batch_norm_train(x(), out=read_only(x())),
     "batch_norm_train: out is read-only, expected a writable array"),
    (lambda: batch_norm_backward(x(), saved(), out=np.lib.stride_tricks.as_strided(x(), (4, 3, 5), (0, 20, 4))),
     "batch_norm_backward: out has strides (0, 20, 4): its elements overlap, expected distinct ones"),
    (lambda: batch_norm_train(A, out=A[::-1]),
     "batch_norm_train: out shares memory with x without being the same array; expected no overlap"),
    (lambda: batch_norm_train(x(), A[0, :, 0], out=A),
     "batch_norm_train: out shares memory with gamma; expected no overlap"),
    (lambda: batch_norm_train(x(), 1, A[0, :, 0], out=A),
     "batch_norm_train: out shares memory with beta; expected no overlap"),
    (lambda: batch_norm(x(), A[0, :, 0], 1, out=A),
     "batch_norm: out shares memory with mean; expected no overlap"),
    (lambda: batch_norm(x(), 0, A[0, :, 0], out=A),
     "batch_norm: out shares memory with var; expected no overlap"),
    (lambda: batch_norm_backward(A, saved(), out=A[::-1]),
     "batch_norm_backward: out shares memory with dy without being the same array; expected no overlap"),
    (lambda: batch_norm_backward(x(), saved(x=A), out=A),
     "batch_norm_backward: out shares memory with x; expected no overlap"),
    (lambda: batch_norm_train(x(), out=x().astype("float16")),
     "batch_norm_train: out has dtype float16, expected float32, the dtype of y"),
    (lambda: batch_norm(x().astype("bfloat16"), 0, 1, out=x()),
     "batch_norm: out has dtype float32, expected bfloat16, the dtype of y"),
    (lambda: batch_norm(x().astype("uint8"), 0, 1, out=x().astype("int32")),
     "batch_norm: out has dtype int32, expected one of float16, bfloat16, float32, float64"),
    (lambda: batch_norm_backward(x(), saved(x=x().astype("float16")), out=x()),
     "batch_norm_backward: out has dtype float32, expected float16, the dtype of y"),
    # residual, activation, weights
    (lambda: batch_norm_train(x(), residual=1j), f"batch_norm_train: residual has dtype complex128, {NUMBERS}"),
    (lambda: batch_norm(x(), 0, 1, residual=x().astype("uint8")),
     "batch_norm: residual has dtype uint8, expected one of float16, bfloat16, float32, float64"),
    (lambda: Saved.fixed(x(), 0, 1, residual=np.ones(5)),
     "Saved.fixed: residual has shape (5,), expected (4, 3, 5), the shape of x"),
    (lambda: batch_norm(x(), 0, 1, activation="gelu"), "batch_norm: activation is 'gelu', expected None or 'relu'"),
    (lambda: layer(activation=True), "BatchNorm: activation is True, expected None or 'relu'"),
    (lambda: batch_norm_train(x(), activation=np.maximum),
     "batch_norm_train: activation is of type ufunc, expected None or 'relu'"),
    (lambda: moments(x(), where="all"), f"moments: where has dtype <U3, {NUMBERS}"),
    (lambda: batch_norm_train(x(), where=np.ones((4, 3))),
     "batch_norm_train: where has shape (4, 3), expected one that broadcasts to that of x, (4, 3, 5); (4, 3, 1) does"),
    (lambda: moments(x(), where=np.ones(4)),
     "moments: where has shape (4,), expected one that broadcasts to that of x, (4, 3, 5); (4, 1, 1) does"),
    (lambda: moments(x(), where=np.ones(2)),
     "moments: where has shape (2,), expected one that broadcasts to that of x, (4, 3, 5)"),
    (lambda: moments(x(), where=np.ones((1, 4, 3, 5))),
     "moments: where has shape (1, 4, 3, 5), expected one that broadcasts to that of x, (4, 3, 5)"),
    (lambda: layer()(x(), where=[[1], [0], [-2]]),
     "BatchNorm: where is -2.0 at (2, 0), expected finite weights of at least 0"),
    (lambda: layer().eval()(x(), where=-2), "BatchNorm: where is -2.0, expected finite weights of at least 0"),
    (lambda: moments(x(), where=np.array([0, 1, 0, np.inf, np.nan], "float16")),
     "moments: where is inf at (3,), expected finite weights of at least 0"),
    (lambda: moments(x(), where=1e308),
     "moments: where sums to inf in a channel, expected weights whose sum is finite"),
    (lambda: batch_norm_train(x(), where=np.full((4, 3, 5), [[1], [1], [1e307]])),
     "batch_norm_train: where sums to inf in a channel, expected weights whose sum is finite"),
    (lambda: batch_norm_train(A, out=A, activation="relu"),
     "batch_norm_train: out is x, which with activation='relu' cannot be recovered from y; expected another array"),
    (lambda: batch_norm_train(A, out=A, residual=x()),
     "batch_norm_train: out is x, which with a residual cannot be recovered from y; expected another array"),
    (lambda: batch_norm(x(), 0, 1, residual=A, out=A[::-1]),
     "batch_norm: out shares memory with residual without being the same array; expected no overlap"),
    (lambda: batch_norm_train(x(), where=A, out=A),
     "batch_norm_train: out shares memory with where; expected no overlap"),
    (lambda: batch_norm_backward(x(), saved(where=A), out=A[::-1]),
     "batch_norm_backward: out shares memory with where; expected no overlap"),
    # gradients
    (lambda: batch_norm_backward(x(), None),
     "batch_norm_backward: saved is of type NoneType, expected the Saved that batch_norm_train returns beside y"),
    (lambda: batch_norm_backward(np.ones((4, 3, 5), "int8"), saved()),
     "batch_norm_backward: dy has dtype int8, expected one of float16, bfloat16, float32, float64"),
    (lambda: batch_norm_backward(np.ones((4, 3)), saved()),
     "batch_norm_backward: dy has shape (4, 3), expected (4, 3, 5), the shape of x"),
    (lambda: batch_norm_backward(1j, saved()), f"batch_norm_backward: dy has dtype complex128, {NUMBERS}"),
    # moments and running statistics
    (lambda: Moments(-1, [0.0], [0.0]), "Moments: count is -1, expected 0 to 9223372036854775807"),
    (lambda: Moments(1.5, [0.0], [0.0]),
     "Moments: count is 1.5, expected an int, or an array of the total weights of channels of shape (1,)"),
    (lambda: Moments(np.ones(2, bool), [0.0], [0.0]),
     "Moments: count has dtype bool, expected an int, or an array of the total weights of channels of shape (1,)"),
    (lambda: Moments(np.ma.ones(1), [0.0], [0.0]),
     "Moments: count is a masked array, expected an int, or an array of the total weights of channels of shape (1,)"),
    (lambda: Moments(np.ones(2, int), [0.0], [0.0]),
     "Moments: count has shape (2,), expected (1,), the shape of mean"),
    (lambda: Moments(np.array([1.0, np.nan]), [0.0, 0.0], [0.0, 0.0]),
     "Moments: count is nan at (1,), expected finite weights of at least 0"),
    (lambda: Moments(np.array(-0.5), 0.0, 0.0), "Moments: count is -0.5, expected finite weights of at least 0"),
    (lambda: Moments(3, [0.0], [0.0, 0.0]), "Moments: m2 has shape (2,), expected (1,), the shape of mean"),
    (lambda: Moments(3, [0.0, 1.0], [2.0, -1.5]), "Moments: m2 is -1.5 at (1,), expected no negative value"),
    (lambda: Moments.empty(-1), "Moments.empty: channels is -1, expected at least 0"),
    (lambda: Moments.empty("a"), "Moments.empty: channels is 'a', expected an int or a tuple of ints"),
    (lambda: M.merge(3), "Moments.merge: other is of type int, expected Moments"),
    (lambda: M.merge(Moments.empty((2, 2))), "Moments.merge: other has channels of shape (2, 2), expected (3,)"),
    (lambda: update_running(np.ones(3), np.ones(3), (3,)), "update_running: m is of type tuple, expected Moments"),
    (lambda: update_running([1.0], np.ones(3), M),
     "update_running: running_mean is of type list, expected a NumPy array (updated in place)"),
    (lambda: update_running(np.ones(3), np.ones(3, int), M),
     "update_running: running_var has dtype int64, expected float32 or float64"),
    (lambda: update_running(np.ones(2), np.ones(3), M),
     "update_running: running_mean has shape (2,), expected (3,), one value per channel"),
    (lambda: update_running(np.ones(3), read_only(np.ones(3)), M),
     "update_running: running_var is read-only, expected a writable array (updated in place)"),
    (lambda: update_running(A[0, :, 0], A[0, :, 0], M),
     "update_running: running_mean shares memory with running_var, expected two arrays of their own"),
    (lambda: update_running(np.ones(3), np.ones(3), moments(np.ones((1, 3)))),
     "update_running: m.count is 1, expected at least 2 with correction=1"),
    (lambda: update_running(np.ones(2), np.ones(2), Moments(np.array([0, 0.5]), [1.0, 1.0], [1.0, 1.0])),
     "update_running: m.count is 0.5 at (1,), expected 0 or more than 1 with correction=1"),
    # the layer
    (lambda: BatchNorm(0), "BatchNorm: channels is 0, expected at least 1"),
    (lambda: BatchNorm((3, 0)), "BatchNorm: channels is (3, 0), expected at least 1"),
    (lambda: BatchNorm(True), "BatchNorm: channels is True, expected an int or a tuple of ints"),
    (lambda: layer(axis=(1, 2)), "BatchNorm: axis=(1, 2) has 2 channel axes, expected 1: channels=(3,)"),
    (lambda: layer(axis="a"), "BatchNorm: axis is 'a', expected an int or a tuple of ints"),
    (lambda: layer(axis=True), "BatchNorm: axis is True, expected an int or a tuple of ints"),
    (lambda: layer(dtype=None), "BatchNorm: dtype is None, expected float32 or float64"),
    (lambda: layer(dtype="no"), "BatchNorm: dtype is 'no', expected float32 or float64"),
    (lambda: layer(dtype="int8"), "BatchNorm: dtype is 'int8', expected float32 or float64"),
    (lambda: layer()(np.ones((4, 2, 3))),
     "BatchNorm: x has channels (2,), expected (3,); it has shape (4, 2, 3), axis=1; with axis=-1 they are (3,)"),
    (lambda: layer()(np.ones((3, 2, 4)), residual=1.0),
     "BatchNorm: x has channels (2,), expected (3,); it has shape (3, 2, 4), axis=1; with axis=0 they are (3,)"),
    (lambda: layer()(np.ones((1, 3))),
     "BatchNorm: x has one value per channel, expected at least two in training (one is enough where the statistics "
     "are given: batch_norm, a layer's eval()); x has shape (1, 3), axis=1"),
    (lambda: spoiled(running_var=[1, -1, 1]).eval()(A), "BatchNorm: running_var is -1.0 at (1,), expected no negative "
     "value"),
    (lambda: called().backward(np.ones((4, 3))),
     "BatchNorm.backward: dy has shape (4, 3), expected (4, 3, 5), the shape of x"),
    (lambda: layer().backward(A),
     "BatchNorm.backward: there is no forward to go back through; expected a call in training, or one with save=True "
     "in evaluation, before it"),
    (lambda: layer().eval()(A, save=True, out=A),
     "BatchNorm: out is x, which save=True in evaluation must keep; expected another array"),
    (lambda: layer().fit_population(3),
     "BatchNorm.fit_population: batches is of type int, expected an iterable of arrays"),
    (lambda: layer().fit_population([]),
     "BatchNorm.fit_population: batches have 0 values per channel, expected at least 2"),
    (lambda: layer(correction=0).fit_population([]),
     "BatchNorm.fit_population: batches have 0 values per channel, expected at least 1"),
    (lambda: layer().fit_population([[[1j] * 3]]), f"BatchNorm.fit_population: batch has dtype complex128, {NUMBERS}"),
    (lambda: layer().fit_population([np.ones((4, 2))]),
     "BatchNorm.fit_population: batch has channels (2,), expected (3,); it has shape (4, 2), axis=1"),
    (lambda: layer(track_running_stats=False).fold(),
     "BatchNorm.fold: the layer keeps no running statistics; expected track_running_stats=True"),
    (lambda: layer(track_running_stats=False).fit_population([A]),
     "BatchNorm.fit_population: the layer keeps no running statistics; expected track_running_stats=True"),
    # folding
    (lambda: fold_conv(A[0], None, layer()),
     "fold_conv: weight has shape (3, 5), expected 4 axes, those of layout='OIHW'"),
    (lambda: fold_conv(K, None, layer(), layout="HWIO"),
     "fold_conv: weight has shape (3, 1, 2, 2), layout='HWIO': 2 outputs, expected 3, the 3 channels of bn; "
     "layout='OIHW' has them"),
    (lambda: fold_conv(K, None, layer(), groups=3, transposed=True, layout="HWIO"),
     "fold_conv: weight has shape (3, 1, 2, 2), layout='HWIO': 2 outputs, expected 1, the 3 channels of bn / groups=3; "
     "layout='OIHW' has them"),
    (lambda: fold_conv(np.ones((2, 2, 1, 3)), None, layer()),
     "fold_conv: weight has shape (2, 2, 1, 3), layout='OIHW': 2 outputs, expected 3, the 3 channels of bn; "
     "layout='HWIO' has them"),
    (lambda: fold_conv(np.ones((5, 1, 2, 2)), None, layer()),
     "fold_conv: weight has shape (5, 1, 2, 2), layout='OIHW': 5 outputs, expected 3, the 3 channels of bn"),
    (lambda: fold_conv(np.ones((4, 1, 2, 2)), None, layer(), groups=3, transposed=True),
     "fold_conv: weight has shape (4, 1, 2, 2), layout='OIHW': 4 inputs, expected a multiple of groups=3"),
    (lambda: fold_conv(K.astype("int8"), None, layer()),
     "fold_conv: weight has dtype int8, expected float32, float64, float16 or bfloat16"),
    (lambda: fold_linear([[1j]], None, layer()),
     "fold_linear: weight has dtype complex128, expected float32, float64, float16 or bfloat16"),
    (lambda: fold_linear(np.ma.ones((3, 2)), None, layer()),
     "fold_linear: weight is a masked array, whose mask would be ignored; expected a plain array"),
    (lambda: fold_conv(K, np.ones(2), layer()), "fold_conv: bias has shape (2,), expected (3,), the channels of bn"),
    (lambda: fold_conv(K, "a", layer()), f"fold_conv: bias has dtype <U1, {NUMBERS}"),
    (lambda: fold_conv(K, None, None), "fold_conv: bn is of type NoneType, expected a BatchNorm"),
    (lambda: fold_linear(K, None, BatchNorm((3, 2), axis=(1, 2))),
     "fold_linear: bn has channels (3, 2), expected a layer with one channel axis"),
    (lambda: fold_linear(K, None, layer(track_running_stats=False)),
     "fold_linear: bn keeps no running statistics, expected a layer with track_running_stats=True"),
    (lambda: fold_conv(K, None, layer(), layout="NCHW"),
     "fold_conv: layout is 'NCHW', expected one of OIHW, HWIO, OIW, WIO, OIDHW, DHWIO"),
    (lambda: fold_conv(K, None, layer(), layout="OI", transposed=True),
     "fold_conv: layout is 'OI', expected one of OIHW, HWIO, OIW, WIO, OIDHW, DHWIO, IOHW, HWOI, IOW, WOI, IODHW, "
     "DHWOI"),
    (lambda: fold_linear(K, None, layer(), layout=1), "fold_linear: layout is 1, expected one of OI, IO"),
    (lambda: fold_conv(K, None, layer(), transposed=1), "fold_conv: transposed is 1, expected True or False"),
    (lambda: fold_conv(K, None, layer(), groups=3.0), "fold_conv: groups is 3.0, expected an int"),
    (lambda: fold_conv(K, None, layer(), groups=2),
     "fold_conv: groups is 2, expected a divisor of the number of channels of bn, 3"),
    # its state
    (lambda: layer().load_state_dict(3),
     "BatchNorm.load_state_dict: state is of type int, expected a mapping like state_dict()'s"),
    (lambda: layer().load_state_dict({"gamma": 1, "other": 2}),
     "BatchNorm.load_state_dict: state has no beta, running_mean, running_var, num_batches_tracked, and unknown keys "
     "'other'; expected gamma, beta, running_mean, running_var, num_batches_tracked, and as an option running_count, "
     "running_m2"),
    (lambda: layer(track_running_stats=False).load_state_dict({"gamma": 1}),
     "BatchNorm.load_state_dict: state has no beta; expected gamma, beta"),
    (lambda: layer(track_running_stats=False).load_state_dict(dict.fromkeys(["gamma", "beta", *"abcdefg"], 1)),
     "BatchNorm.load_state_dict: state has unknown keys 'a', 'b', 'c', 'd', 'e' and 2 more; expected gamma, beta"),
    (lambda: layer().load_state_dict(state(gamma=np.ones(2))),
     "BatchNorm.load_state_dict: gamma has shape (2,), expected (3,), the layer's channels"),
    (lambda: layer().load_state_dict(state(running_var=[1, 1, -1])),
     "BatchNorm.load_state_dict: running_var is -1 at (2,), expected no negative value"),
    (lambda: layer().load_state_dict(state(num_batches_tracked=-1)),
     "BatchNorm.load_state_dict: num_batches_tracked is -1, expected 0 to 9223372036854775807"),
    (lambda: layer(momentum=None).load_state_dict(state(**COUNTED | {"running_m2": np.ones(2)})),
     "BatchNorm.load_state_dict: running_m2 has shape (2,), expected (3,), the layer's channels"),
    (lambda: layer(momentum=None).load_state_dict(state(**COUNTED | {"running_m2": -1.0})),
     "BatchNorm.load_state_dict: running_m2 is -1.0, expected no negative value"),
    (lambda: layer(momentum=None).load_state_dict(state(**COUNTED | {"running_count": 1.5})),
     "BatchNorm.load_state_dict: running_count is 1.5, expected an int, or an array of the total weights of channels "
     "of shape (3,)"),
    (lambda: layer(momentum=None).load_state_dict(state(**COUNTED | {"running_count": np.ones(2)})),
     "BatchNorm.load_state_dict: running_count has shape (2,), expected (3,), the layer's channels"),
    (lambda: layer(momentum=None).load_state_dict(state(**COUNTED | {"running_count": np.ones(1)})),
     "BatchNorm.load_state_dict: running_count has shape (1,), expected (3,), the layer's channels"),
    (lambda: layer(momentum=None).load_state_dict(state(**COUNTED | {"running_count": np.array([1, np.inf, 1])})),
     "BatchNorm.load_state_dict: running_count is inf at (1,), expected finite weights of at least 0"),
    # what strangers bring
    (lambda: batch_norm(x(), 0, 1, eps=10**5000),
     "batch_norm: eps is beyond float64, expected a finite number of at least 0"),
    (lambda: layer(axis=10**5000), "BatchNorm: axis is an int of 16610 bits, expected -64 to 63"),
    (lambda: layer(axis=64), "BatchNorm: axis is 64, expected -64 to 63"),
    (lambda: BatchNorm((3, 3), axis=(1, 1)), "BatchNorm: axis=(1, 1) names an axis twice, expected distinct axes"),
    (lambda: BatchNorm(2**62),
     "BatchNorm: channels is 4611686018427387904, expected the shape of an array that NumPy can make"),
    (lambda: layer(correction=0.5), "BatchNorm: correction is 0.5, expected 0 (divide by n) or 1 (divide by n - 1)"),
    (lambda: layer(center="no"), "BatchNorm: center is 'no', expected True or False"),
    (lambda: update_running(np.ma.ones(3), np.ones(3), M),
     "update_running: running_mean is a masked array, expected a plain array"),
    (lambda: update_running(np.broadcast_to(np.ones(1), 3), np.ones(3), M),
     "update_running: running_mean is read-only, expected a writable array (updated in place)"),
    (lambda: update_running(np.lib.stride_tricks.as_strided(np.ones(3), (3,), (0,)), np.ones(3), M),
     "update_running: running_mean has strides (0,): its elements overlap, expected distinct ones"),
    # the process
    (lambda: fastbn.set_num_threads(1.5), "set_num_threads: n is of type float, expected an int or None"),
    (lambda: fastbn.set_num_threads(True), "set_num_threads: n is of type bool, expected an int or None"),
    (lambda: fastbn.set_num_threads(0), "set_num_threads: n is 0, expected at least 1, or None for the default"),
    (lambda: fastbn.set_num_threads(-(10**5000)),
     "set_num_threads: n is negative, expected at least 1, or None for the default"),
    (lambda: fastbn.set_pool_limit("a"), "set_pool_limit: nbytes is 'a', expected an int"),
    (lambda: fastbn.set_pool_limit(-1), "set_pool_limit: nbytes is -1, expected 0 to 9223372036854775807"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_a_message(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == message


def test_what_is_no_array_says_why():
    """The words behind the colon are NumPy's."""
    with pytest.raises(ValueError, match=r"^moments: x cannot be made an array: .*inhomogeneous shape"):
        moments([[1.0], [1.0, 2.0]])


class Strange:
    """Raises when it is asked for its array or its number."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error

    def __float__(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (ValueError("no"), ValueError, "no"),
        (TypeError("no"), TypeError, "no"),
        (KeyError("no"), TypeError, "KeyError('no')"),
    ],
)
def test_what_a_strangers_object_raises_is_said(error, raised, says):
    with pytest.raises(raised) as caught:
        moments(Strange(error))
    assert str(caught.value) == f"moments: x cannot be made an array: {says}; {NUMBERS}"
    with pytest.raises(
        TypeError, match=r"^batch_norm: eps is of type Strange, expected a finite number of at least 0$"
    ):
        batch_norm(x(), 0, 1, eps=Strange(error))


def test_no_memory_is_no_bad_argument():
    with pytest.raises(MemoryError):
        moments(Strange(MemoryError()))
