"""tf.contrib.layers.batch_norm against its formulas in float64: scopes, collections, weights, batch renormalization."""

import numpy as np
import pytest
from refusals import refused
from steps import assert_gradients

from fastbn.interop import tf_contrib as tf

SHAPES = [((6, 5), "NHWC"), ((3, 2, 2, 4), "NHWC"), ((3, 4, 2, 2), "NCHW"), ((2, 3, 4), "NHWC"), ((6, 5), "NCHW")]


@pytest.fixture(autouse=True)
def _graph():
    tf.reset_default_graph()


def value(name):
    return tf.get_default_graph().variables[name].value


def parts(x, data_format, w=None):
    """Mean, variance, and what spreads a value per channel over x."""
    axis = 1 if data_format == "NCHW" else x.ndim - 1
    others = tuple(i for i in range(x.ndim) if i != axis)
    shape = [x.shape[axis] if i == axis else 1 for i in range(x.ndim)]
    w = np.ones(len(x)) if w is None else w
    w = np.broadcast_to(w.reshape(-1, *(1,) * (x.ndim - 1)), x.shape)
    mean = (w * x).sum(others) / w.sum(others)
    var = (w * (x - mean.reshape(shape)) ** 2).sum(others) / w.sum(others)
    return mean, var, lambda v: np.reshape(v, shape)


def formula(x, gamma=1.0, beta=0.0, data_format="NHWC", eps=1e-3, mean=None, var=None, w=None, r=1.0, d=0.0):
    own_mean, own_var, spread = parts(x, data_format, w)
    gamma, beta, r, d = (spread(np.broadcast_to(v, own_mean.shape)) for v in (gamma, beta, r, d))
    mean, var = (own_mean, own_var) if mean is None else (mean, var)
    return ((x - spread(mean)) / np.sqrt(spread(var) + eps) * r + d) * gamma + beta


def close(a, b, tol=1e-11):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize(("shape", "data_format"), SHAPES)
@pytest.mark.parametrize("fused", [None, True, False])
def test_training_steps_and_inference(rng, shape, data_format, fused):
    if len(shape) == 3 and fused:
        fused = None  # True is refused
    options = {"decay": 0.8, "scale": True, "fused": fused, "data_format": data_format, "scope": "bn"}
    mean, var = 0.0, 1.0
    for step in range(3):
        x = rng.normal(3, 2, shape)
        y = tf.batch_norm(x, updates_collections=None, reuse=step > 0, **options)
        close(y, formula(x, data_format=data_format))
        of_mean, of_var, _ = parts(x, data_format)
        n = x.size // of_mean.size
        if fused is not False and len(shape) in (2, 4):
            of_var = of_var * n / (n - 1)
        mean, var = 0.8 * mean + 0.2 * of_mean, 0.8 * var + 0.2 * of_var
        close(value("bn/moving_mean"), mean)
        close(value("bn/moving_variance"), var)
    value("bn/gamma")[:], value("bn/beta")[:] = rng.normal(size=(2, *mean.shape))
    y = tf.batch_norm(x, is_training=False, reuse=True, **options)
    close(y, formula(x, value("bn/gamma"), value("bn/beta"), data_format, mean=mean, var=var))
    close(value("bn/moving_mean"), mean)


def test_one_value_a_channel_and_the_least_epsilon_of_the_fused_operation(rng):
    tf.batch_norm([[5.0, 7.0]], 0.0, fused=True, scope="one", updates_collections=None)
    assert value("one/moving_variance").tolist() == [0.0, 0.0]
    x = rng.normal(0, 1e-3, (8, 2))
    close(tf.batch_norm(x, epsilon=0, scope="a"), formula(x, eps=1.001e-5))
    close(tf.batch_norm(x, epsilon=0, fused=False, scope="b"), formula(x, eps=0))


# -------------------------------------------------------------------------------------- collections and scopes


def test_who_forgets_the_updates_has_averages_that_never_move(rng):
    x = rng.normal(3, 2, (6, 2))
    for _ in range(3):
        tf.batch_norm(x, 0.5, scope="bn", reuse=tf.AUTO_REUSE, fused=False)
        assert value("bn/moving_mean").tolist() == [0, 0]
    waiting = tf.get_collection(tf.UPDATE_OPS)
    assert [u.name for u in waiting] == ["bn/moving_mean", "bn/moving_variance"] * 3
    assert tf.run_updates() == 6
    close(value("bn/moving_mean"), x.mean(0) * (1 - 0.5**3))
    close(value("bn/moving_variance"), 0.5**3 + x.var(0) * (1 - 0.5**3))
    assert tf.get_collection(tf.UPDATE_OPS) == []
    assert tf.run_updates() == 0
    refused(lambda: tf.run_updates(waiting), "run_updates", "updates", ValueError)
    refused(lambda: tf.run_updates([3]), "run_updates", "updates", TypeError)
    close(value("bn/moving_mean"), x.mean(0) * (1 - 0.5**3))
    waiting[0].run()  # once only
    close(value("bn/moving_mean"), x.mean(0) * (1 - 0.5**3))


def test_updates_in_a_collection_of_ones_own(rng):
    x = rng.normal(size=(6, 2))
    tf.batch_norm(x, 0.5, scope="bn", updates_collections="mine")
    assert tf.run_updates() == 0
    assert tf.run_updates(tf.get_collection("mine")) == 2
    close(value("bn/moving_mean"), 0.5 * x.mean(0))
    tf.batch_norm(x, scope="bn", updates_collections="mine", is_training=False, reuse=True)
    assert tf.get_collection("mine") == []


def test_scopes_and_reuse(rng):
    x = rng.normal(size=(4, 2))
    batch_norm, fn = tf.batch_norm, "get_variable"
    batch_norm(x)
    batch_norm(x)
    batch_norm(x, scope="bn")
    with tf.variable_scope("net"):
        batch_norm(x, scope="bn")
        batch_norm(x)
    names = sorted(tf.get_default_graph().variables)
    scopes = sorted(["BatchNorm", "BatchNorm_1", "bn", "net/bn", "net/BatchNorm"])
    assert names == sorted(f"{s}/{v}" for s in scopes for v in ("beta", "moving_mean", "moving_variance"))
    refused(lambda: batch_norm(x, scope="bn"), fn, "bn/beta already exists", ValueError)
    refused(lambda: batch_norm(x, scope="new", reuse=True), fn, "new/beta does not exist", ValueError)
    refused(lambda: batch_norm(x, reuse=True), "variable_scope", "reuse", ValueError)
    refused(lambda: batch_norm(x[:, 1:], scope="bn", reuse=True), fn, "bn/beta has shape", ValueError)
    refused(lambda: batch_norm(x.astype("f4"), scope="bn", reuse=True), fn, "dtype float64", ValueError)
    refused(lambda: batch_norm(x, scope="bn", scale=True, reuse=True), fn, "bn/gamma does not exist", ValueError)
    assert sorted(tf.get_default_graph().variables) == names
    beta = value("bn/beta")
    beta[:] = 7
    assert batch_norm(x, scope="bn", reuse=tf.AUTO_REUSE).mean() == pytest.approx(7)
    with tf.variable_scope("net", reuse=True):
        batch_norm(x, scope="bn")  # inherits it
        refused(lambda: batch_norm(x, scope="other"), fn, "net/other/beta does not exist", ValueError)


def test_a_network_that_is_called_again_finds_its_names(rng):
    x = rng.normal(size=(4, 2))
    for _ in range(3):
        with tf.variable_scope("net", reuse=tf.AUTO_REUSE):
            tf.batch_norm(tf.batch_norm(x, 0.5, updates_collections=None), updates_collections=None)
    names = [f"net/{s}/{v}" for s in ("BatchNorm", "BatchNorm_1") for v in ("beta", "moving_mean", "moving_variance")]
    assert list(tf.get_default_graph().variables) == names
    close(value("net/BatchNorm/moving_mean"), (1 - 0.5**3) * x.mean(0))


def test_a_graph_of_ones_own(rng):
    x = rng.normal(size=(4, 2))
    graph = tf.Graph()
    with graph.as_default():
        tf.batch_norm(x, scope="bn")
        refused(tf.reset_default_graph, "reset_default_graph", "default", ValueError)
    assert tf.get_default_graph().variables == {}
    assert len(graph.get_collection(tf.UPDATE_OPS)) == 2
    tf.batch_norm(x, scope="bn")
    assert tf.gradients(x, "bn", graph=graph)[0].shape == x.shape


def test_which_variables_are_in_which_collection(rng):
    x = rng.normal(size=(4, 2))
    tf.batch_norm(x, scope="a", scale=True, variables_collections={"beta": ["betas"]}, outputs_collections="out")
    y = tf.batch_norm(x, scope="b", trainable=False, variables_collections=["all"], outputs_collections=["out"])
    names = lambda key: [v.name for v in tf.get_collection(key)]  # noqa: E731
    assert names(tf.TRAINABLE_VARIABLES) == ["a/beta", "a/gamma"]
    assert names(tf.MODEL_VARIABLES) == names(tf.GLOBAL_VARIABLES)
    assert len(names(tf.GLOBAL_VARIABLES)) == 7
    assert names("betas") == ["a/beta"]
    assert repr(tf.get_collection("betas")) == "[Variable('a/beta', float64(2,), trainable=True)]"
    assert names("all") == ["b/beta", "b/moving_mean", "b/moving_variance"]
    assert tf.get_collection("out")[1] is y


def test_first_values_and_dtypes(rng):
    x = rng.normal(size=(4, 2)).astype("float32")
    first = {"beta": lambda shape: np.full(shape, 2.0), "moving_variance": lambda shape: np.full(shape, 9.0)}
    y = tf.batch_norm(x, scope="bn", param_initializers=first, epsilon=0.0, fused=False, is_training=False)
    np.testing.assert_allclose(y, x / 3 + 2, rtol=1e-6)
    assert y.dtype == value("bn/beta").dtype == "float32"


# ------------------------------------------------------------------------------------------------- what else there is


@pytest.mark.parametrize(("shape", "data_format"), SHAPES)
def test_batch_weights(rng, shape, data_format):
    x, w = rng.normal(3, 2, shape), rng.uniform(0.5, 2, shape[0])
    y = tf.batch_norm(x, 0.5, batch_weights=w, data_format=data_format, scope="bn", updates_collections=None)
    close(y, formula(x, data_format=data_format, w=w))
    mean, var, _ = parts(x, data_format, w)
    close(value("bn/moving_mean"), 0.5 * mean)
    close(value("bn/moving_variance"), 0.5 + 0.5 * var)
    x[1], w[1] = np.nan, 0
    tf.batch_norm(x, 0.5, batch_weights=w, data_format=data_format, scope="pad", updates_collections=None)
    kept = np.delete(x, 1, 0)
    close(value("pad/moving_mean"), 0.5 * parts(kept, data_format, np.delete(w, 1))[0])
    tf.batch_norm(x, batch_weights=0 * w, data_format=data_format, scope="none", updates_collections=None)
    assert not value("none/moving_mean").any()


def test_zero_debias_is_for_the_mean_only(rng):
    total = weight = 0.0
    var = 1.0
    for step in range(4):
        x = rng.normal(3, 2, (6, 2))
        tf.batch_norm(
            x, 0.9, zero_debias_moving_mean=True, scope="bn", reuse=step > 0, updates_collections=None, fused=False
        )
        total, weight = 0.9 * total + 0.1 * x.mean(0), 0.9 * weight + 0.1
        var = 0.9 * var + 0.1 * x.var(0)
        close(value("bn/moving_mean"), total / weight)
        close(value("bn/moving_mean/biased"), total)
        close(value("bn/moving_variance"), var)
    assert value("bn/moving_mean/local_step") == 4
    tf.batch_norm(x, is_training=False, scope="bn", reuse=True, zero_debias_moving_mean=True)
    assert value("bn/moving_mean/local_step") == 4


def test_activations(rng):
    x = rng.normal(size=(4, 2))
    y = tf.batch_norm(x, activation_fn="relu", scope="a")
    close(y, np.maximum(formula(x), 0))
    close(tf.batch_norm(x, activation_fn=np.tanh, scope="b"), np.tanh(formula(x)))

    def broken(y):
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        tf.batch_norm(x, activation_fn=broken, scope="c", updates_collections=None)
    assert "c/beta" not in tf.get_default_graph().variables
    assert "c/beta" not in [v.name for v in tf.get_collection(tf.GLOBAL_VARIABLES)]
    with pytest.raises(OSError, match="no"):
        tf.batch_norm(x, activation_fn=broken, scope="b", reuse=True, updates_collections=None)
    assert not value("b/moving_mean").any()


def test_regularizers(rng):
    x = rng.normal(size=(4, 2))
    penalties = {"beta": tf.l2_regularizer(0.5), "gamma": tf.l1_regularizer(0.1)}
    for reuse in (False, True):
        tf.batch_norm(x, scale=True, param_regularizers=penalties, scope="bn", reuse=reuse)
    beta, gamma = tf.get_collection(tf.REGULARIZATION_LOSSES)
    value("bn/beta")[:], value("bn/gamma")[:] = [3, 4], [-2, 5]
    assert (float(beta), float(gamma)) == (pytest.approx(0.25 * 25), pytest.approx(0.7))
    assert repr(beta) == "Loss('bn/beta')"
    close(beta.gradient(), [1.5, 2.0])
    close(gamma.gradient(), [-0.1, 0.1])


# ------------------------------------------------------------------------------------------------------------- renorm


def renorm_steps(batches, decay, renorm_decay, clipping, eps=1e-3, data_format="NHWC"):
    """r and d of each batch, and the averages after it."""
    mean = stddev = weight = moving_mean = 0.0
    moving_var = 1.0
    for x in batches:
        m, v, _ = parts(x, data_format)
        s = np.sqrt(v + eps)
        to_mean, to_stddev = mean + (1 - weight) * m, stddev + (1 - weight) * s
        r = np.clip(s / to_stddev, clipping.get("rmin", 0), clipping.get("rmax", np.inf))
        d = np.clip((m - to_mean) / to_stddev, -clipping.get("dmax", np.inf), clipping.get("dmax", np.inf))
        mean, stddev = renorm_decay * mean + (1 - renorm_decay) * m, renorm_decay * stddev + (1 - renorm_decay) * s
        weight = renorm_decay * weight + 1 - renorm_decay
        moving_mean = decay * moving_mean + (1 - decay) * mean / weight
        moving_var = decay * moving_var + (1 - decay) * ((stddev / weight) ** 2 - eps)
        yield r, d, mean, stddev, weight, moving_mean, moving_var


@pytest.mark.parametrize(("shape", "data_format"), SHAPES)
@pytest.mark.parametrize("clipping", [{}, {"rmax": 1.1, "rmin": 0.95, "dmax": 0.05}])
def test_renorm(rng, shape, data_format, clipping):
    batches = [rng.normal(3 + i, 2 + i, shape) for i in range(4)]
    c = shape[1 if data_format == "NCHW" else -1]
    gamma, beta = rng.normal(size=(2, c))
    first = {"gamma": lambda _: gamma, "beta": lambda _: beta}
    found = renorm_steps(batches, 0.9, 0.8, clipping, data_format=data_format)
    for i, (x, expected) in enumerate(zip(batches, found, strict=True)):
        r, d, *averages = expected
        y = tf.batch_norm(
            x, 0.9, scale=True, renorm=True, renorm_clipping=clipping, renorm_decay=0.8, scope="bn", reuse=i > 0,
            data_format=data_format, param_initializers=first,
        )  # fmt: skip
        close(y, formula(x, gamma, beta, data_format, r=r, d=d), 1e-10)
        if i == 0 and not clipping:
            close(r, 1)
        tf.run_updates()
        names = "renorm_mean", "renorm_stddev", "renorm_mean_weight", "moving_mean", "moving_variance"
        for name, a in zip(names, averages, strict=True):
            close(value(f"bn/{name}"), a)
        close(value("bn/renorm_stddev_weight"), averages[2])
    assert clipping or abs(r - 1).max() > 0.01
    y = tf.batch_norm(x, scale=True, renorm=True, is_training=False, scope="bn", reuse=True, data_format=data_format)
    close(y, formula(x, gamma, beta, data_format, mean=averages[3], var=averages[4]))


# ---------------------------------------------------------------------------------------------------------- gradients


def frozen_corrections(x, clipping):
    """r and d as the next call will find them."""
    m, v, _ = parts(x, "NHWC")
    s = np.sqrt(v + 1e-3)
    to_mean = value("bn/renorm_mean") + (1 - value("bn/renorm_mean_weight")) * m
    to_stddev = value("bn/renorm_stddev") + (1 - value("bn/renorm_stddev_weight")) * s
    r = np.clip(s / to_stddev, clipping.get("rmin", 0), clipping.get("rmax", np.inf))
    return r, np.clip((m - to_mean) / to_stddev, -clipping.get("dmax", np.inf), clipping.get("dmax", np.inf))


@pytest.mark.parametrize("clipping", [{}, {"rmax": 1.05, "dmax": 0.1}])
@pytest.mark.parametrize("relu", [None, "relu"])
def test_gradients_through_renorm_hold_r_and_d(rng, clipping, relu):
    x, dy = rng.normal(3, 2, (2, 5, 3))
    gamma, beta = rng.normal(size=(2, 3))
    first = {"gamma": lambda _: gamma, "beta": lambda _: beta}
    options = {
        "scale": True, "renorm": True, "renorm_clipping": clipping, "scope": "bn", "reuse": tf.AUTO_REUSE,
        "param_initializers": first, "activation_fn": relu,
    }  # fmt: skip
    tf.batch_norm(x * 2 + 1, **options)
    tf.run_updates()
    r, d = frozen_corrections(x, clipping)
    assert abs(d).max() > 1e-3
    y = tf.batch_norm(x, **options)
    act = (lambda v: np.maximum(v, 0)) if relu else (lambda v: v)
    loss = lambda x, gamma, beta: (act(formula(x, gamma, beta, r=r, d=d)) * dy).sum()  # noqa: E731
    close((y * dy).sum(), loss(x, gamma, beta))
    dx, found = tf.gradients(dy, "bn")
    assert_gradients(loss, (x, gamma, beta), (dx, found["bn/gamma"], found["bn/beta"]))


@pytest.mark.parametrize(("shape", "data_format"), SHAPES)
@pytest.mark.parametrize("case", ["training", "weights", "inference", "no gamma"])
def test_gradients(rng, shape, data_format, case):
    x, dy = rng.normal(3, 2, (2, *shape))
    gamma, beta = rng.normal(size=(2, shape[1 if data_format == "NCHW" else -1]))
    w = rng.uniform(0.5, 2, shape[0]) if case == "weights" else None
    first = {"gamma": lambda _: gamma, "beta": lambda _: beta}
    scale = case != "no gamma"
    tf.batch_norm(
        x, scale=scale, param_initializers=first, scope="bn", data_format=data_format, batch_weights=w,
        is_training=case != "inference",
    )  # fmt: skip
    fixed = {"mean": 0 * gamma, "var": 0 * gamma + 1} if case == "inference" else {"w": w}
    dx, found = tf.gradients(dy, "bn")
    if scale:
        loss = lambda x, gamma, beta: (formula(x, gamma, beta, data_format, **fixed) * dy).sum()  # noqa: E731
        assert_gradients(loss, (x, gamma, beta), (dx, found["bn/gamma"], found["bn/beta"]))
    else:
        loss = lambda x, beta: (formula(x, 1.0, beta, data_format) * dy).sum()  # noqa: E731
        assert_gradients(loss, (x, beta), (dx, found["bn/beta"]))
        assert list(found) == ["bn/beta"]


# ------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("options", "argument", "error"),
    [
        ({"data_format": "NCWH"}, "data_format", ValueError),
        ({"decay": 1.5}, "decay", ValueError),
        ({"epsilon": -1.0}, "epsilon", ValueError),
        ({"center": 1}, "center", TypeError),
        ({"is_training": None}, "is_training", TypeError),
        ({"activation_fn": "tanh"}, "activation_fn", ValueError),
        ({"activation_fn": 3}, "activation_fn", TypeError),
        ({"param_initializers": {"bias": np.zeros}}, "param_initializers", ValueError),
        ({"param_initializers": {"beta": lambda s: np.zeros(7)}}, "beta", ValueError),
        ({"param_regularizers": {"beta": abs}}, "param_regularizers", TypeError),
        ({"param_regularizers": [abs]}, "param_regularizers", TypeError),
        ({"param_regularizers": {"moving_mean": tf.l1_regularizer(1)}}, "param_regularizers", ValueError),
        ({"updates_collections": ["update_ops"]}, "updates_collections", TypeError),
        ({"variables_collections": "all"}, "variables_collections", TypeError),
        ({"batch_weights": np.ones(3)}, "batch_weights", ValueError),
        ({"batch_weights": -np.ones(4)}, "batch_weights", ValueError),
        ({"fused": True, "batch_weights": np.ones(4)}, "fused", ValueError),
        ({"fused": True, "renorm": True}, "fused", ValueError),
        ({"fused": True, "param_regularizers": {"beta": tf.l2_regularizer(1)}}, "fused", ValueError),
        ({"renorm": True, "batch_weights": np.ones(4)}, "renorm", ValueError),
        ({"renorm": True, "updates_collections": None}, "renorm", ValueError),
        ({"renorm": True, "zero_debias_moving_mean": True}, "renorm", ValueError),
        ({"renorm": True, "renorm_clipping": {"max": 3}}, "renorm_clipping", ValueError),
        ({"renorm": True, "renorm_clipping": {"rmin": 3, "rmax": 2}}, "renorm_clipping", ValueError),
        ({"reuse": "yes"}, "reuse", ValueError),
        ({"scope": 3}, "name_or_scope", TypeError),
    ],
)
def test_misuse_leaves_the_graph_as_it_was(rng, options, argument, error):
    x = rng.normal(size=(4, 2))
    refused(lambda: tf.batch_norm(x, **options), "batch_norm|variable_scope|get_variable", argument, error)
    graph = tf.get_default_graph()
    assert graph.variables == {}
    assert not any(graph.get_collection(k) for k in (tf.UPDATE_OPS, tf.GLOBAL_VARIABLES, tf.TRAINABLE_VARIABLES))
    tf.batch_norm(x)
    assert "BatchNorm/beta" in graph.variables  # no number was used up


def test_other_misuse(rng):
    refused(lambda: tf.batch_norm(np.ones(3)), "batch_norm", "inputs", ValueError)
    refused(lambda: tf.batch_norm(np.ones((3, 2), complex)), "batch_norm", "inputs", TypeError)
    refused(lambda: tf.batch_norm(np.ones((3, 2, 2)), fused=True), "batch_norm", "fused", ValueError)
    refused(lambda: tf.gradients(np.ones((3, 2)), "bn"), "gradients", "scope", ValueError)
    refused(lambda: tf.l2_regularizer(-1), "l2_regularizer", "scale", ValueError)
    refused(lambda: tf.variable_scope(None).__enter__(), "variable_scope", "name_or_scope", ValueError)
    tf.batch_norm(np.ones((3, 2)), scope="bn")
    refused(lambda: tf.gradients(np.ones((2, 2)), "bn"), "gradients", "dy", ValueError)
