"""CS231n's functions, and the step-by-step version, against their formulas in float64."""

import copy

import numpy as np
import pytest
from refusals import refused
from steps import assert_gradients

from fastbn.interop import cs231n, stepwise

CLOSE = {"float64": 1e-12, "float32": 1e-5}


def formula(x, gamma, beta, mean, var, eps=1e-5):
    return gamma * (x - mean) / np.sqrt(var + eps) + beta


def data(rng, shape=(7, 5), dtype="float64"):
    d = shape[1]
    return rng.normal(3, 2, shape).astype(dtype), *rng.normal(size=(2, d)), rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", CLOSE)
def test_steps_of_training_and_a_test_follow_the_formulas(rng, dtype):
    _, gamma, beta, _ = data(rng)
    bn_param = {"mode": "train", "eps": 1e-3, "momentum": 0.8}
    mean, var = np.zeros(5), np.zeros(5)
    for n in (7, 4, 9):
        x = data(rng, (n, 5), dtype)[0]
        own = copy.copy(bn_param.get("running_mean"))
        before = bn_param.get("running_mean")
        out, _ = cs231n.batchnorm_forward(x, gamma, beta, bn_param)
        wide = x.astype("float64")
        expected = formula(wide, gamma, beta, wide.mean(0), wide.var(0), 1e-3)
        np.testing.assert_allclose(out, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        mean, var = 0.8 * mean + 0.2 * wide.mean(0), 0.8 * var + 0.2 * wide.var(0)
        np.testing.assert_allclose(bn_param["running_mean"], mean, rtol=CLOSE[dtype])
        np.testing.assert_allclose(bn_param["running_var"], var, rtol=CLOSE[dtype])
        assert out.dtype == bn_param["running_mean"].dtype == dtype
        np.testing.assert_array_equal(before, own)  # a new array each time, as there
    bn_param["mode"] = "test"
    out, _ = cs231n.batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(out, formula(wide, gamma, beta, mean, var, 1e-3), rtol=CLOSE[dtype], atol=CLOSE[dtype])
    np.testing.assert_allclose(bn_param["running_mean"], mean, rtol=CLOSE[dtype])


def test_running_statistics_are_as_wide_as_they_and_x(rng):
    x, gamma, beta, _ = data(rng, dtype="float32")
    for given, expected in ([0] * 5, "float32"), (np.zeros(5, "float32"), "float32"), (np.zeros(5), "float64"):
        bn_param = {"mode": "train", "running_mean": given}
        cs231n.batchnorm_forward(x, gamma, beta, bn_param)
        assert bn_param["running_mean"].dtype == expected
        np.testing.assert_allclose(bn_param["running_mean"], 0.1 * x.mean(0, dtype="float64"), rtol=1e-6)
    bn_param = {"mode": "train", "running_var": np.zeros(5, "float32")}
    cs231n.batchnorm_forward(x.astype("float64"), gamma, beta, bn_param)
    assert bn_param["running_var"].dtype == "float64"


def test_the_first_test_finds_zeros(rng):
    x, gamma, beta, _ = data(rng)
    bn_param = {"mode": "test"}
    out, _ = cs231n.batchnorm_forward(x, gamma, beta, bn_param)
    np.testing.assert_allclose(out, formula(x, gamma, beta, 0, 0), rtol=1e-12)
    assert not bn_param["running_mean"].any()
    assert not bn_param["running_var"].any()


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 2, 3)])
def test_gradients(rng, mode, shape):
    x, gamma, beta, dout = data(rng, shape)
    spatial = len(shape) == 4
    forward = cs231n.spatial_batchnorm_forward if spatial else cs231n.batchnorm_forward
    backward = cs231n.spatial_batchnorm_backward if spatial else cs231n.batchnorm_backward
    bn_param = {"mode": mode, "running_mean": rng.normal(size=shape[1]), "running_var": rng.uniform(1, 2, shape[1])}
    _, cache = forward(x, gamma, beta, dict(bn_param))
    loss = lambda *a: (forward(*a, dict(bn_param))[0] * dout).sum()  # noqa: E731
    assert_gradients(loss, (x, gamma, beta), backward(dout, cache))


def test_no_sample_moves_nothing():
    bn_param = {"mode": "train", "running_mean": np.ones(2), "running_var": np.ones(2)}
    out, cache = cs231n.batchnorm_forward(np.empty((0, 2)), np.ones(2), np.zeros(2), bn_param)
    assert out.shape == cs231n.batchnorm_backward(out, cache)[0].shape == (0, 2)
    assert bn_param["running_mean"].tolist() == bn_param["running_var"].tolist() == [1, 1]


def test_alt_is_the_same(rng):
    x, gamma, beta, dout = data(rng)
    _, cache = cs231n.batchnorm_forward(x, gamma, beta, {"mode": "train"})
    for a, b in zip(cs231n.batchnorm_backward(dout, cache), cs231n.batchnorm_backward_alt(dout, cache), strict=True):
        np.testing.assert_array_equal(a, b)


def test_images_are_their_pixels(rng):
    x, gamma, beta, dout = data(rng, (4, 3, 5, 6))
    spatial, flat = {"mode": "train"}, {"mode": "train"}
    out, cache = cs231n.spatial_batchnorm_forward(x, gamma, beta, spatial)
    rows = lambda a: a.transpose(0, 2, 3, 1).reshape(-1, 3)  # noqa: E731
    expected, other = cs231n.batchnorm_forward(rows(x), gamma, beta, flat)
    np.testing.assert_allclose(rows(out), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(spatial["running_var"], flat["running_var"], rtol=1e-12)
    dx = cs231n.spatial_batchnorm_backward(dout, cache)[0]
    np.testing.assert_allclose(rows(dx), cs231n.batchnorm_backward(rows(dout), other)[0], rtol=1e-11, atol=1e-12)


def test_one_sample_gives_beta(rng):
    bn_param = {"mode": "train"}
    out, _ = cs231n.batchnorm_forward(np.full((1, 2), 5.0), np.ones(2), np.array([3.0, 4.0]), bn_param)
    assert out.tolist() == [[3.0, 4.0]]
    assert bn_param["running_var"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "argument", "error"),
    [
        ({"mode": "eval"}, "mode", ValueError),
        ({"mode": None}, "mode", TypeError),
        ({"eps": -1.0}, "eps", ValueError),
        ({"momentum": 1.5}, "momentum", ValueError),
        ({"running_mean": np.zeros(4)}, "running_mean", ValueError),
        ({"running_var": -np.ones(5)}, "running_var", ValueError),
    ],
)
def test_misuse_changes_nothing(rng, change, argument, error):
    x, gamma, beta, _ = data(rng)
    bn_param = {"mode": "train", **change}
    before = dict(bn_param)
    refused(lambda: cs231n.batchnorm_forward(x, gamma, beta, bn_param), "batchnorm_forward", argument, error)
    assert bn_param.keys() == before.keys()
    assert all(bn_param[k] is before[k] for k in before)


def test_other_misuse(rng):
    x, gamma, beta, dout = data(rng)
    train = {"mode": "train"}
    fn = "batchnorm_forward"
    refused(lambda: cs231n.batchnorm_forward(x, gamma, beta, {}), fn, "bn_param has no mode", ValueError)
    refused(lambda: cs231n.batchnorm_forward(x, gamma, beta, None), fn, "bn_param", TypeError)
    refused(lambda: cs231n.batchnorm_forward(x[0], gamma, beta, train), fn, "x", ValueError)
    refused(lambda: cs231n.batchnorm_forward(x, gamma[1:], beta, train), fn, "gamma", ValueError)
    refused(lambda: cs231n.spatial_batchnorm_forward(x, gamma, beta, train), f"spatial_{fn}", "x", ValueError)
    _, cache = cs231n.batchnorm_forward(x, gamma, beta, train)
    refused(lambda: cs231n.batchnorm_backward(dout[1:], cache), "batchnorm_backward", "dout", ValueError)
    refused(lambda: cs231n.batchnorm_backward(dout, (x,)), "batchnorm_backward", "cache", TypeError)
    refused(lambda: cs231n.batchnorm_backward_alt(dout, None), "batchnorm_backward_alt", "cache", TypeError)


# ----------------------------------------------------------------------------------------------------------- stepwise


def steps(x, gamma, beta, eps):
    """The notebook's cache, from its formulas."""
    xmu = x - x.mean(0)
    var = (xmu**2).mean(0)
    sqrtvar = np.sqrt(var + eps)
    return (xmu / sqrtvar, gamma, xmu, 1 / sqrtvar, sqrtvar, var, eps), gamma * xmu / sqrtvar + beta


def test_the_cache_holds_the_steps(rng):
    x, gamma, beta, _ = data(rng)
    out, cache = stepwise.batchnorm_forward(x, gamma, beta, 1e-3)
    expected, y = steps(x, gamma, beta, 1e-3)
    np.testing.assert_allclose(out, y, rtol=1e-12, atol=1e-12)
    for name, a, b in zip(stepwise.NAMES, cache, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("own", [False, True])
def test_the_backward_works_from_the_tuple_alone(rng, own):
    x, gamma, beta, dout = data(rng)
    cache = steps(x, gamma, beta, 1e-3)[0] if own else stepwise.batchnorm_forward(x, gamma, beta, 1e-3)[1]
    cache = copy.deepcopy(cache)
    loss = lambda *a: (stepwise.batchnorm_forward(*a, 1e-3)[0] * dout).sum()  # noqa: E731
    x_before = [np.array(a) for a in cache]
    assert_gradients(loss, (x, gamma, beta), stepwise.batchnorm_backward(dout, cache))
    for a, b in zip(cache, x_before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_float32_and_numbers_for_parameters(rng):
    x, _, _, dout = data(rng, dtype="float32")
    out, cache = stepwise.batchnorm_forward(x, 1.0, 0.0, 1e-5)
    dx, dgamma, dbeta = stepwise.batchnorm_backward(dout, cache)
    assert out.dtype == dx.dtype == "float32"
    assert dgamma.shape == dbeta.shape == (5,)
    np.testing.assert_allclose(out, steps(x.astype("float64"), 1.0, 0.0, 1e-5)[1], rtol=1e-5, atol=1e-6)


def test_misuse_of_the_steps(rng):
    x, gamma, beta, dout = data(rng)
    fn = "batchnorm_forward"
    refused(lambda: stepwise.batchnorm_forward(x[0], gamma, beta, 1e-5), fn, "x", ValueError)
    refused(lambda: stepwise.batchnorm_forward(x, gamma, beta[1:], 1e-5), fn, "beta", ValueError)
    refused(lambda: stepwise.batchnorm_forward(x, gamma, beta, -1), fn, "eps", ValueError)
    cache = stepwise.batchnorm_forward(x, gamma, beta, 1e-5)[1]
    fn = "batchnorm_backward"
    refused(lambda: stepwise.batchnorm_backward(dout, cache[:6]), fn, "cache", ValueError)
    refused(lambda: stepwise.batchnorm_backward(dout, None), fn, "cache", ValueError)
    refused(lambda: stepwise.batchnorm_backward(dout[1:], cache), fn, "dout", ValueError)
    flat = (*cache[:2], cache[2][0], *cache[3:])
    refused(lambda: stepwise.batchnorm_backward(dout, flat), fn, "xmu", ValueError)
    for i, name in enumerate(stepwise.NAMES):
        bad = list(cache)
        bad[i] = -1.0 if name == "eps" else np.ones((2, 2))
        refused(lambda bad=bad: stepwise.batchnorm_backward(dout, tuple(bad)), fn, name, ValueError)
    other = (*cache[:3], cache[4], *cache[4:])  # sqrtvar in the place of ivar
    refused(lambda: stepwise.batchnorm_backward(dout, other), fn, "ivar", ValueError)
