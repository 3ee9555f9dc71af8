"""Keras 1's layer against its formulas in float64: three modes, weights, configuration, regularizers."""

import numpy as np
import pytest
from refusals import refused
from steps import assert_gradients

from fastbn.interop import keras1

FLOAT32 = 2e-6  # of the weights


def batch(rng, shape=(6, 5), axis=-1):
    return rng.normal(3, 2, shape), rng.normal(size=shape), *rng.normal(size=(2, shape[axis]))


def layer(gamma, beta, **options):
    """Built, with these parameters."""
    bn = keras1.BatchNormalization(weights=[gamma, beta, 0 * gamma + 0.5, 0 * gamma + 2.0], **options)
    return bn


def by_feature(x, gamma, beta, axis, eps=1e-3, mean=None, var=None):
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    shape = [n if i == axis % x.ndim else 1 for i, n in enumerate(x.shape)]
    mean = x.mean(others) if mean is None else mean
    var = x.var(others) if var is None else var
    mean, var, gamma, beta = (np.reshape(np.asarray(a, "float64"), shape) for a in (mean, var, gamma, beta))
    return gamma * (x - mean) / np.sqrt(var + eps) + beta


def by_sample(x, gamma, beta, eps=1e-3):
    m, s = x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + eps)
    return gamma * (x - m) / (s + eps) + beta


def float32s(*arrays):
    """Values that float32 weights hold exactly."""
    return [a.astype("float32").astype("float64") for a in arrays]


def test_defaults_are_those_of_1_2_2():
    bn = keras1.BatchNormalization()
    assert (bn.epsilon, bn.mode, bn.axis, bn.momentum) == (1e-3, 0, -1, 0.99)
    bn.build((None, 3))
    assert [w.tolist() for w in bn.get_weights()] == [[1.0] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3]
    assert all(w.dtype == "float32" for w in bn.get_weights())


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((3, 4, 2, 2), 1), ((3, 2, 2, 4), -1), ((2, 3, 4), 2)])
def test_mode_0_trains_by_the_batch_and_tests_by_running_averages(rng, shape, axis):
    x, _, gamma, beta = batch(rng, shape, axis)
    gamma, beta = float32s(gamma, beta)
    bn = layer(gamma, beta, axis=axis, momentum=0.8)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean, var = 0.5, 2.0
    for _ in range(3):
        np.testing.assert_allclose(bn(x, train=True), by_feature(x, gamma, beta, axis), rtol=1e-11, atol=1e-11)
        mean, var = 0.8 * mean + 0.2 * x.mean(others), 0.8 * var + 0.2 * x.var(others)  # a variance, divided by n
        np.testing.assert_allclose(bn.running_mean, mean, rtol=FLOAT32)
        np.testing.assert_allclose(bn.running_std, var, rtol=FLOAT32)
        x = x + 0.5
    before = bn.get_weights()
    expected = by_feature(x, gamma, beta, axis, mean=bn.running_mean, var=bn.running_std)
    np.testing.assert_allclose(bn(x), expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_array_equal(bn.get_weights(), before)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4)])
@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_mode_1_is_each_sample_with_epsilon_twice(rng, shape, eps):
    x, dy, gamma, beta = batch(rng, shape)
    gamma, beta = float32s(gamma, beta)
    bn = layer(gamma, beta, mode=1, epsilon=eps)
    for train in (True, False):
        y = bn(x, train=train)
        np.testing.assert_allclose(y, by_sample(x, gamma, beta, eps), rtol=1e-11, atol=1e-11)
    assert bn.running_mean.tolist() == [0.5] * shape[-1]
    dx = bn.backward(dy)
    loss = lambda *a: (by_sample(*a, eps) * dy).sum()  # noqa: E731
    assert_gradients(loss, (x, gamma, beta), (dx, bn.dgamma, bn.dbeta))


def test_mode_1_of_constant_samples_is_beta(rng):
    for eps in (0.0, 1e-3):
        bn = keras1.BatchNormalization(mode=1, epsilon=eps, weights=[[1.0] * 3, [5.0] * 3, [0.0] * 3, [1.0] * 3])
        assert bn(np.full((2, 3), 7.0)).tolist() == [[5.0] * 3] * 2
        assert not bn.backward(np.ones((2, 3))).any()
    assert bn(np.empty((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("train", [True, False])
def test_mode_2_never_uses_the_running_averages(rng, train):
    x, dy, gamma, beta = batch(rng)
    gamma, beta = float32s(gamma, beta)
    bn = layer(gamma, beta, mode=2)
    np.testing.assert_allclose(bn(x, train=train), by_feature(x, gamma, beta, -1), rtol=1e-11, atol=1e-11)
    assert bn.running_mean.tolist() == [0.5] * 5
    assert bn.running_std.tolist() == [2.0] * 5
    loss = lambda *a: (by_feature(*a, -1) * dy).sum()  # noqa: E731
    assert_gradients(loss, (x, gamma, beta), (bn.backward(dy), bn.dgamma, bn.dbeta))


@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_mode_0(rng, train):
    x, dy, gamma, beta = batch(rng, (3, 2, 2, 4), -1)
    gamma, beta = float32s(gamma, beta)
    bn = layer(gamma, beta)
    bn(x, train=train)
    fixed = {} if train else {"mean": np.full(4, 0.5), "var": np.full(4, 2.0)}
    loss = lambda *a: (by_feature(*a, -1, **fixed) * dy).sum()  # noqa: E731
    assert_gradients(loss, (x, gamma, beta), (bn.backward(dy), bn.dgamma, bn.dbeta))


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize(
    ("regularizer", "a", "b"),
    [
        ("l1", 0.01, 0),
        ("l2", 0, 0.01),
        ("l1l2", 0.01, 0.01),
        (keras1.l2(0.3), 0, 0.3),
        (keras1.l1l2(0.1, 0.2), 0.1, 0.2),
    ],
)
def test_penalties_are_in_the_loss_and_in_its_gradient(rng, mode, regularizer, a, b):
    x, dy, gamma, beta = batch(rng)
    gamma, beta = float32s(gamma, beta)
    penalty = lambda w: a * abs(w).sum() + b * (w**2).sum()  # noqa: E731
    bn = layer(gamma, beta, mode=mode, gamma_regularizer=regularizer, beta_regularizer=keras1.l2(0.5))
    bn(x, train=True)
    np.testing.assert_allclose(bn.losses, [penalty(gamma), 0.5 * (beta**2).sum()], rtol=1e-12)
    np.testing.assert_allclose(bn.regularization, sum(bn.losses))
    formula = by_sample if mode == 1 else lambda *v: by_feature(*v, -1)

    def loss(gamma, beta):
        return (formula(x, gamma, beta) * dy).sum() + penalty(gamma) + 0.5 * (beta**2).sum()

    bn.backward(dy)
    assert_gradients(loss, (gamma, beta), (bn.dgamma, bn.dbeta))


def test_a_regularizer_of_ones_own(rng):
    class Cubes:
        def __call__(self, w):
            return (w**3).sum()

        def gradient(self, w):
            return 3 * w**2

    x, dy, gamma, beta = batch(rng)
    plain, own = layer(gamma, beta), layer(gamma, beta, gamma_regularizer=Cubes())
    for bn in (plain, own):
        bn(x, train=True)
        bn.backward(dy)
    np.testing.assert_allclose(own.dgamma - plain.dgamma, 3 * gamma**2, rtol=1e-5, atol=1e-5)
    assert type(own).from_config(own.get_config()).gamma_regularizer is own.gamma_regularizer


def test_weights_in_their_order(rng):
    weights = [rng.uniform(1, 2, 3).astype("float32") for _ in range(4)]
    first, second = keras1.BatchNormalization(weights=weights), keras1.BatchNormalization()
    assert first.get_weights() == first.losses == first.trainable_weights == []
    for bn in (first, second):
        bn.build((None, 3))
    assert (second.gamma[0], second.running_std[0]) == (1, 1)
    gamma = second.gamma
    second.set_weights(first.get_weights())
    assert second.gamma is gamma  # in place: an optimizer may hold it
    for bn in (first, second):
        for name, expected in zip(("gamma", "beta", "running_mean", "running_std"), weights, strict=True):
            np.testing.assert_array_equal(getattr(bn, name), expected)
    assert [w is a for w, a in zip(first.trainable_weights, (first.gamma, first.beta), strict=True)] == [True] * 2
    assert len(first.non_trainable_weights) == 2
    first.get_weights()[0][:] = 9
    np.testing.assert_array_equal(first.gamma, weights[0])


def test_what_is_called_std_is_a_variance(rng):
    x = rng.normal(size=(4, 1))
    bn = keras1.BatchNormalization(weights=[[1.0], [0.0], [0.0], [9.0]], epsilon=0)
    np.testing.assert_allclose(bn(x), x / 3, rtol=1e-14)


def test_configuration(rng):
    bn = keras1.BatchNormalization(0.01, 2, 1, 0.5, gamma_regularizer="l1", beta_regularizer=keras1.l1l2(0.1, 0.2))
    config = bn.get_config()
    assert config["beta_regularizer"] == {"name": "L1L2Regularizer", "l1": 0.1, "l2": 0.2}
    again = keras1.BatchNormalization.from_config(config)
    assert again.get_config() == config
    assert {k: config[k] for k in ("epsilon", "mode", "axis", "momentum")} == {
        "epsilon": 0.01, "mode": 2, "axis": 1, "momentum": 0.5
    }  # fmt: skip
    again.build((None, 2))
    assert again.regularization == pytest.approx(0.01 * 2)
    assert repr(again.beta_regularizer) == "Penalty(l1=0.1, l2=0.2)"


def test_initial_values_by_name_and_by_function():
    bn = keras1.BatchNormalization(beta_init="one", gamma_init=lambda shape: np.arange(*shape))
    bn.build((None, 3))
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([0, 1, 2], [1, 1, 1])


def test_a_layer_that_is_not_trainable(rng):
    x, dy, gamma, beta = batch(rng)
    bn = layer(gamma, beta, trainable=False)
    bn(x, train=True)
    bn.backward(dy)
    assert bn.dgamma is bn.dbeta is None
    assert bn.trainable_weights == []
    assert len(bn.non_trainable_weights) == 4
    assert bn.running_mean[0] != 0.5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": 3}, ValueError),
        ({"mode": True}, ValueError),
        ({"axis": 1.0}, TypeError),
        ({"epsilon": -1}, ValueError),
        ({"momentum": 2}, ValueError),
        ({"gamma_init": "ones"}, ValueError),
        ({"beta_init": None}, TypeError),
        ({"gamma_regularizer": "l3"}, ValueError),
        ({"gamma_regularizer": {"l3": 1}}, ValueError),
        ({"beta_regularizer": abs}, TypeError),  # no gradient
        ({"trainable": 1}, TypeError),
    ],
)
def test_misuse_when_it_is_made(options, error):
    refused(lambda: keras1.BatchNormalization(**options), "BatchNormalization", *options, error)


def test_misuse(rng):
    x, dy, gamma, beta = batch(rng)
    make = keras1.BatchNormalization
    fn = r"BatchNormalization\.build"
    refused(lambda: make(axis=3).build((None, 5)), fn, "input_shape", ValueError)
    refused(lambda: make().build((5, None)), fn, "input_shape", ValueError)
    refused(lambda: make(mode=1, axis=1).build((2, 3, 4)), fn, "input_shape", ValueError)
    refused(lambda: make(weights=[gamma, beta])(x), fn, "weights", ValueError)
    refused(lambda: make(weights=[gamma, beta, gamma, -np.ones(5)])(x), fn, "std", ValueError)
    refused(lambda: make(gamma_init=lambda shape: np.ones(7))(x), fn, "gamma_init", ValueError)
    bn = layer(gamma, beta)
    fn = r"BatchNormalization\.set_weights"
    refused(lambda: bn.set_weights([gamma] * 4), fn, "built", ValueError)
    refused(lambda: bn.backward(dy), r"BatchNormalization\.backward", "call", ValueError)
    bn(x, train=True)
    before = bn.get_weights()
    refused(lambda: bn.set_weights([gamma + 1, beta]), fn, "weights", ValueError)
    refused(lambda: bn.set_weights([gamma + 1, beta, beta, beta[1:]]), fn, "std", ValueError)
    refused(lambda: bn.set_weights(3), fn, "weights", TypeError)
    refused(lambda: bn(x[:, 1:], train=True), "BatchNormalization", "x", ValueError)
    refused(lambda: bn(x, train=1), "BatchNormalization", "train", TypeError)
    refused(lambda: bn.backward(dy[1:]), r"BatchNormalization\.backward", "dy", ValueError)
    refused(lambda: make.from_config(3), r"BatchNormalization\.from_config", "config", TypeError)
    np.testing.assert_array_equal(bn.get_weights(), before)


def test_the_first_layer_of_a_model_knows_its_input():
    """As Keras 1 writes it, and as it stands in the configuration of a model that was saved."""
    for given in ({"input_shape": (5, 3)}, {"batch_input_shape": [None, 5, 3]}):
        bn = keras1.BatchNormalization(mode=0, input_dtype="float32", **given)
        assert [w.shape for w in bn.get_weights()] == [(3,)] * 4
        config = bn.get_config()
        assert (config["batch_input_shape"], config["input_dtype"]) == ((None, 5, 3), "float32")
        again = keras1.BatchNormalization.from_config(config)
        assert again.built
        assert again.get_config() == config
    assert not {"batch_input_shape", "input_dtype"} & set(keras1.BatchNormalization().get_config())
