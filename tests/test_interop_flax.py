"""Flax variables and modules, in and out."""

import os

import numpy as np
import pytest

import fastbn
from fastbn.interop import flax as interop

# Flax computes in float32, the normalization in another order than fastbn; y is of the size of 1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def flax():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    pytest.importorskip("flax", reason="Flax is not installed: nothing to compare with")
    import flax.core
    import flax.linen
    import flax.nnx

    return flax


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(3, 2, (16, 4, 5)).astype("float32")


def same(a, b):
    np.testing.assert_allclose(np.asarray(a), b, rtol=TOLERANCE, atol=TOLERANCE)


def started(layer, x):
    """The variables of a layer, with other numbers than those it starts from."""
    import jax

    return filled(layer.init(jax.random.key(0), x))


def filled(tree):
    if hasattr(tree, "items"):
        return {name: filled(value) for name, value in tree.items()}
    return (np.asarray(tree) + np.linspace(0, 1, tree.size).reshape(tree.shape)).astype("float32")


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_linen_layer_in_and_out(flax, x, use_scale, use_bias):
    layer = flax.linen.BatchNorm(
        use_running_average=True, use_scale=use_scale, use_bias=use_bias, axis=1, momentum=0.8, epsilon=1e-4
    )
    variables = started(layer, x)
    bn = interop.from_flax(variables, axis=1, momentum=0.8, eps=1e-4)
    assert (bn.gamma is not None, bn.beta is not None) == (use_scale, use_bias)
    assert (bn.correction, bn.training) == (0, True)
    same(layer.apply(variables, x), bn.eval()(x))
    y, moved = layer.clone(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    same(y, bn.train()(x))
    out = interop.to_flax(bn)
    assert set(out) == ({"batch_stats", "params"} if use_scale or use_bias else {"batch_stats"})
    for name in ("mean", "var"):
        same(moved["batch_stats"][name], out["batch_stats"][name])
    same(layer.apply(out, x), bn.eval()(x))


def test_a_layer_within_a_model(flax, x):
    nn = flax.linen

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)(nn.Dense(3)(x))
            return nn.BatchNorm(use_running_average=True)(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(Block()(x))

    model = Net()
    variables = started(model, x)
    frozen = flax.core.freeze(variables)
    _, state = model.apply(variables, x, capture_intermediates=True)
    (h,) = state["intermediates"]["Block_0"]["Dense_0"]["__call__"]
    for name in ("BatchNorm_0", "BatchNorm_1"):
        for given, path in ((variables, f"Block_0/{name}"), (frozen, ("Block_0", name))):
            bn = interop.from_flax(given, path=path)
            assert (bn.gamma is None) == (name == "BatchNorm_0")
            y = bn.eval()(np.asarray(h))
            (expected,) = state["intermediates"]["Block_0"][name]["__call__"]
            np.testing.assert_allclose(y, expected, rtol=TOLERANCE, atol=TOLERANCE * abs(y).max())
        h = expected


def test_an_nnx_module_in_and_out(flax, x):
    nnx = flax.nnx

    class Net(nnx.Module):
        def __init__(self, **options):
            self.bn = nnx.BatchNorm(5, momentum=0.7, epsilon=1e-2, rngs=nnx.Rngs(0), **options)

    for options in ({}, {"use_scale": False}, {"use_bias": False}):
        net = Net(**options)
        net.bn.mean[...] += 0.5
        net.bn.var[...] *= 2
        bn = interop.from_flax(net, path="bn")
        assert (bn.axis, bn.eps, bn.momentum) == (-1, 1e-2, 0.7)
        assert (bn.gamma is not None, bn.beta is not None) == ("use_scale" not in options, "use_bias" not in options)
        same(net.bn(x, use_running_average=True), bn.eval()(x))
        same(net.bn(x, use_running_average=False), bn.train()(x))
        same(net.bn.var, bn.running_var)
        of_state = {"eps": 1e-2, "momentum": 0.7}  # which a state does not tell
        for state in (nnx.state(net), nnx.to_pure_dict(nnx.state(net))):
            again = interop.from_flax(state, path="bn", **of_state)
            assert repr(again) == repr(bn)
            same(again.eval()(x), bn.eval()(x))
        same(interop.from_flax(nnx.state(net.bn), **of_state).eval()(x), bn.eval()(x))
        variables = interop.to_flax(bn)
        other = Net(**options)
        for name in ("mean", "var"):
            getattr(other.bn, name)[...] = variables["batch_stats"][name]
        same(other.bn(x, use_running_average=True), bn.eval()(x))


def test_channels_of_several_axes(flax, x):
    layer = flax.linen.BatchNorm(use_running_average=True, axis=(1, 2))
    variables = started(layer, x)
    bn = interop.from_flax(variables, axis=(1, 2))
    assert bn.channels == (4, 5)
    same(layer.apply(variables, x), bn.eval()(x))


STATS = {"mean": np.zeros(3), "var": np.ones(3)}


def test_the_dtype_and_the_defaults():
    bn = interop.from_flax({"batch_stats": STATS, "params": {"scale": np.ones(3, "float32")}})
    assert (bn.dtype, bn.axis, bn.eps, bn.momentum) == (np.float64, -1, 1e-5, 0.99)
    assert interop.to_flax(bn)["params"].keys() == {"scale"}
    assert not np.shares_memory(bn.running_mean, STATS["mean"])
    assert interop.from_flax({"batch_stats": STATS}, dtype="float32").dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "words", "variables", "path"),
    [
        (ValueError, "variables has params, expected batch_stats", {"params": {}}, ()),
        (ValueError, "path has 'b', expected one of a, in variables", {"a": STATS}, "b"),
        (ValueError, "variables has a, expected mean, var", {"a": STATS}, ()),
        (ValueError, "path has 'b', expected one of a, in batch_stats", {"batch_stats": {"a": STATS}}, "b"),
        (ValueError, "path has 'c', expected one of mean, var, in batch_stats/a", {"batch_stats": {"a": STATS}}, "a/c"),
        (ValueError, "path has 'x', expected one of no names", {"batch_stats": {"a": STATS}}, "a/mean/x"),
        (ValueError, "batch_stats/a/mean is of type ndarray", {"batch_stats": {"a": STATS}}, "a/mean"),
        (ValueError, "variables has a, expected mean, var", {"batch_stats": {"a": STATS}}, ()),
        (ValueError, "variables has mean, var, kernel", {"batch_stats": STATS, "params": {"kernel": 1}}, ()),
        (ValueError, r"scale has shape \(2,\)", {"batch_stats": STATS, "params": {"scale": np.ones(2)}}, ()),
        (ValueError, "var is -1", {"batch_stats": {"mean": 0.0 * STATS["var"], "var": -STATS["var"]}}, ()),
        (TypeError, "path is 3", {"batch_stats": STATS}, 3),
        (TypeError, "variables is of type int", 3, ()),
        (ValueError, "path has 'bn', expected an attribute of variables", object(), "bn"),
    ],
)
def test_other_variables_are_refused(kind, words, variables, path):
    with pytest.raises(kind, match=f"from_flax: .*{words}"):
        interop.from_flax(variables, path=path)


def test_only_a_layer_with_statistics_has_variables():
    with pytest.raises(ValueError, match="to_flax: the layer keeps no running statistics"):
        interop.to_flax(fastbn.BatchNorm(3, track_running_stats=False))
    with pytest.raises(TypeError, match="to_flax: layer is of type int"):
        interop.to_flax(3)
