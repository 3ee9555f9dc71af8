"""What test_interop_keras.py runs in a process of its own, where Keras has its NumPy backend: each function a test.

``KERAS_BACKEND=numpy python tests/keras_numpy.py [NAME ...]`` prints a JSON object: a traceback or null for each name.
"""

import json
import os
import re
import sys
import threading
import traceback

os.environ["KERAS_BACKEND"] = "numpy"  # before Keras is imported

import ml_dtypes  # noqa: F401  np.dtype("bfloat16")
import numpy as np
import pages
import pytest
import reference
from keras import Input, Model, Sequential, layers, ops
from keras.src.backend.numpy import nn

import fastbn
from fastbn.interop import keras as interop

THEIRS = nn.moments, nn.batch_normalization
HALF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def raises(kind, words, call):
    with pytest.raises(kind, match=re.escape(words)):
        call()


def current():
    return nn.moments, nn.batch_normalization


def data(shape=(8, 5, 6, 3), dtype="float32", mean=1.0, std=2.0):
    return np.random.default_rng(0).normal(mean, std, shape).astype(dtype)


def far_data_are_right():
    """Mean 1000, standard deviation 0.1, float32: the statistics are right to float32's last digit, y to the mean's."""
    x = data((64, 16, 16, 3), mean=1000, std=0.1)
    mean, var = reference.mean_var(x, -1)
    layer = layers.BatchNormalization(momentum=0.0, epsilon=1e-3)
    layer.build(x.shape)
    with interop.patched():
        found = ops.moments(x, (0, 1, 2))
        y = np.asarray(layer(x, training=True))
    for f, wide in zip(found, (mean, var), strict=True):
        assert f.dtype == np.float32
        np.testing.assert_array_equal(f, wide.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(layer.moving_variance), found[1])
    expected = reference.infer(x, *(f.astype(np.float64) for f in found), axis=-1, eps=1e-3)
    reference.assert_within(y, expected.y, expected.budget, "y")
    assert not np.isnan(y).any()


def moments_have_the_shapes_and_dtypes_of_keras():
    for dtype in ("float32", "float64", "float16", "bfloat16", "int32"):
        x = data((4, 5, 3, 2), dtype)
        for axes in ((0, 1, 2), [0, 2], (1,), 1, (-1, 0), (), None, (0, 1, 2, 3)):
            for keepdims in (False, True):
                own = THEIRS[0](x, axes, keepdims)
                with interop.patched():
                    found = ops.moments(x, axes, keepdims)
                reduced = tuple(range(4)) if axes is None else axes if isinstance(axes, int) else tuple(axes)
                wide = x.astype(np.float64)
                exact = wide.mean(reduced, keepdims=keepdims), wide.var(reduced, keepdims=keepdims)
                for a, b, e in zip(own, found, exact, strict=True):
                    assert isinstance(b, np.ndarray), (dtype, axes, keepdims, type(b))
                    assert (b.shape, b.dtype) == (a.shape, a.dtype), (dtype, axes, keepdims)
                    np.testing.assert_allclose(
                        b.astype(np.float64), e, rtol=HALF.get(dtype, 2e-7), atol=1e-14, err_msg=f"{dtype} {axes}"
                    )


def float16_moments_stay_in_range():
    x = np.array([[-60000.0, np.nan], [60000.0, 1.0]], "float16")
    with interop.patched():
        mean, var = ops.moments(x, [0])
    assert mean[0] == 0
    assert var[0] == np.finfo(np.float16).max
    assert np.isnan([mean[1], var[1]]).all()


def nothing_has_no_moments():
    with interop.patched():
        mean, var = ops.moments(np.empty((0, 3), "float32"), [0])
    assert mean.shape == var.shape == (3,)
    assert np.isnan([mean, var]).all()


def variables_are_arrays():
    import keras

    x = data((6, 3))
    with interop.patched():
        mean, _ = ops.moments(keras.Variable(x), [0])
    np.testing.assert_array_equal(mean, fastbn.moments(x).mean.astype("float32"))


def synchronized_is_refused():
    with interop.patched():
        raises(NotImplementedError, "synchronized", lambda: ops.moments(data(), [0], synchronized=True))


def batch_normalization_is_that_of_keras():
    rng = np.random.default_rng(1)
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        for axis in (-1, 1, 0):
            x = data((4, 5, 3), dtype)
            c = x.shape[axis]
            mean, offset, scale = (rng.normal(size=c).astype(dtype) for _ in range(3))
            var = rng.uniform(0.5, 2, c).astype(dtype)
            for o, s in ((offset, scale), (None, scale), (offset, None), (None, None)):
                own = THEIRS[1](x, mean, var, axis, o, s, 1e-3)
                with interop.patched():
                    y = ops.batch_normalization(x, mean, var, axis, offset=o, scale=s, epsilon=1e-3)
                assert (y.shape, y.dtype) == (own.shape, own.dtype), (dtype, axis)
                parameters = {"gamma": 1.0 if s is None else s, "beta": 0.0 if o is None else o}
                expected = reference.infer(x, mean, var, **parameters, axis=axis, eps=1e-3, dtype=y.dtype)
                # var + epsilon is rounded to float64 once more than in the verb
                budget = expected.budget + 1e-15 * (abs(expected.y) + 1)
                reference.assert_within(y, expected.y, budget, f"{dtype} {axis}")


def dtypes_that_differ_promote_as_in_keras():
    statistics = np.ones(3, "float32"), np.ones(3, "float32")
    for dtype in ("float16", "bfloat16", "float64", "int32", "uint8", "bool"):
        x = np.ones((4, 3), dtype)
        own = THEIRS[1](x, *statistics, -1)
        with interop.patched():
            y = ops.batch_normalization(x, *statistics, -1)
        assert y.dtype == own.dtype, dtype
        np.testing.assert_array_equal(y, np.zeros_like(own))


def variances_that_keras_stored_below_0_are_taken():
    x = data((4, 3))
    statistics = np.zeros(3, "float32"), np.array([-1e-4, -1.0, 1.0], "float32")
    with np.errstate(invalid="ignore"):
        own = THEIRS[1](x, *statistics, -1)
    with interop.patched():
        y = ops.batch_normalization(x, *statistics, -1)
    np.testing.assert_allclose(y, own, rtol=1e-6)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()


def what_is_wrong_is_named():
    x = data((4, 3))
    with interop.patched():
        raises(TypeError, "keras.ops.moments: x has dtype complex128", lambda: ops.moments(x + np.complex128(1j), [0]))
        raises(ValueError, "out of bounds", lambda: ops.moments(x, [2]))
        raises(ValueError, "mean has shape (2,)", lambda: ops.batch_normalization(x, np.ones(2), np.ones(3), -1))


def a_model():
    inputs = Input((12, 12, 3))
    h = layers.BatchNormalization(axis=1)(inputs)
    h = layers.Conv2D(6, 3)(h)
    h = layers.BatchNormalization(scale=False)(h)
    h = layers.Activation("relu")(h)
    h = layers.GroupNormalization(2)(h)
    h = layers.GlobalAveragePooling2D()(h)
    model = Model(inputs, layers.BatchNormalization(center=False)(layers.Dense(4)(h)))
    rng = np.random.default_rng(2)
    model.set_weights([w + rng.uniform(0.1, 0.5, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def a_model_predicts_the_same():
    """Made and traced outside, used inside: what replaces the functions is found all the same."""
    model, x = a_model(), data((4, 12, 12, 3))
    own = model.predict(x, verbose=0)
    calls = []
    true = interop._OURS["batch_normalization"]
    try:
        interop._OURS["batch_normalization"] = lambda *args, **kwargs: calls.append(1) or true(*args, **kwargs)
        with interop.patched():
            y = model.predict(x, verbose=0)
    finally:
        interop._OURS["batch_normalization"] = true
    assert len(calls) == 3, "not every layer came here"
    np.testing.assert_allclose(y, own, rtol=1e-5, atol=1e-5 * abs(own).max())


def a_layer_trains_the_same():
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        results = []
        for ours in (False, True):
            layer = layers.BatchNormalization(dtype=dtype)
            x = data((16, 5), dtype)
            if ours:
                with interop.patched():
                    y = [np.asarray(layer(x, training=True)) for _ in range(3)][-1]
            else:
                y = [np.asarray(layer(x, training=True)) for _ in range(3)][-1]
            assert y.dtype == dtype
            results.append([y, *map(np.asarray, layer.weights)])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            unit = HALF.get(dtype, 1e-5)
            a, b = a.astype(np.float64), b.astype(np.float64)
            np.testing.assert_allclose(b, a, rtol=2 * unit, atol=2 * unit, err_msg=dtype)


def the_mask_of_the_layer_goes_its_own_way():
    """Its statistics are Keras's, as they are without the patch; the normalization is ours."""
    x, mask = data((6, 4, 3)), np.arange(24).reshape(6, 4) % 3 > 0
    found = []
    for ours in (False, True):
        layer = layers.BatchNormalization(momentum=0.0)
        if ours:
            with interop.patched():
                y = np.asarray(layer(x, training=True, mask=mask))
        else:
            y = np.asarray(layer(x, training=True, mask=mask))
        found.append([np.asarray(layer.moving_mean), np.asarray(layer.moving_variance), y])
    np.testing.assert_array_equal(found[0][:2], found[1][:2])
    np.testing.assert_allclose(found[1][2], found[0][2], rtol=1e-5, atol=1e-6)


def theirs_are_back_at_the_end():
    assert current() == THEIRS
    with interop.patched():
        inside = current()
        assert not set(inside) & set(THEIRS)
        with interop.patched():
            assert current() == inside
        assert current() == inside, "the inner end put Keras's back"
    assert current() == THEIRS
    raises(ZeroDivisionError, "", failing)
    assert current() == THEIRS
    interop.enable()
    interop.enable()
    interop.disable()
    assert current() == inside
    interop.disable()
    assert current() == THEIRS
    raises(ValueError, "disable: it is not enabled", interop.disable)
    assert current() == THEIRS


@interop.patched()
def failing():
    assert current() != THEIRS
    return 1 / 0


def threads_share_it():
    x = data((64, 4), mean=1000, std=0.1)
    wanted = fastbn.moments(x).var().astype("float32")
    wrong, start = [], threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(200):
            with interop.patched():
                if not np.array_equal(ops.moments(x, [0])[1], wanted):
                    wrong.append(1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert current() == THEIRS


def weights_go_in_and_out():
    for center, scale in ((True, True), (False, True), (True, False), (False, False)):
        layer = layers.BatchNormalization(axis=1, epsilon=1e-4, momentum=0.7, center=center, scale=scale)
        x = data((6, 5, 4))
        layer.build(x.shape)
        layer.set_weights([w + np.arange(1, 6, dtype="float32") / 7 for w in layer.get_weights()])
        bn = interop.from_keras(layer)
        assert (bn.axis, bn.eps, bn.momentum, bn.correction) == (1, 1e-4, 0.7, 0)
        assert (bn.beta is not None, bn.gamma is not None) == (center, scale)
        for a, b in zip(interop.to_keras(bn), layer.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
            assert not np.shares_memory(a, b)
        y, own = bn(x), np.asarray(layer(x, training=True))
        np.testing.assert_allclose(y, own, rtol=1e-5, atol=1e-5)
        other = layers.BatchNormalization(axis=1, epsilon=1e-4, center=center, scale=scale)
        other.build(x.shape)
        other.set_weights(interop.to_keras(bn))
        np.testing.assert_allclose(other(x), layer(x), rtol=1e-5, atol=1e-5)
        given = {"center": center, "scale": scale, "axis": 1, "eps": 1e-4}
        again = interop.from_keras(layer.get_weights(), **given)
        np.testing.assert_allclose(again.eval()(x), layer(x), rtol=1e-5, atol=1e-5)


def a_layer_that_is_no_source_is_refused():
    raises(ValueError, "no weights yet", lambda: interop.from_keras(layers.BatchNormalization()))
    renorm = Sequential([Input((3,)), layers.BatchNormalization(renorm=True)]).layers[0]
    raises(ValueError, "renorm=True", lambda: interop.from_keras(renorm))
    built = Sequential([Input((3,)), layers.BatchNormalization(center=False)]).layers[0]
    raises(ValueError, "center is True, expected False", lambda: interop.from_keras(built, center=True))
    raises(TypeError, "of type Dense", lambda: interop.from_keras(layers.Dense(3)))


def the_page_prints_what_it_says():
    pages.check("how-to/keras.md")


TESTS = [
    far_data_are_right,
    moments_have_the_shapes_and_dtypes_of_keras,
    float16_moments_stay_in_range,
    nothing_has_no_moments,
    variables_are_arrays,
    synchronized_is_refused,
    batch_normalization_is_that_of_keras,
    dtypes_that_differ_promote_as_in_keras,
    variances_that_keras_stored_below_0_are_taken,
    what_is_wrong_is_named,
    a_model_predicts_the_same,
    a_layer_trains_the_same,
    the_mask_of_the_layer_goes_its_own_way,
    theirs_are_back_at_the_end,
    threads_share_it,
    weights_go_in_and_out,
    a_layer_that_is_no_source_is_refused,
    the_page_prints_what_it_says,
]


def main(names):
    found = {}
    for test in TESTS:
        if not names or test.__name__ in names:
            try:
                test()
                found[test.__name__] = None
            except Exception:
                found[test.__name__] = traceback.format_exc()
    return found


if __name__ == "__main__":
    results = main(sys.argv[1:])
    sys.stdout.write(json.dumps(results) + "\n")
