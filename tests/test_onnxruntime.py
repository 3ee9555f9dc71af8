"""The same numbers as ONNX Runtime's BatchNormalization: inference, and training with its running statistics.

ONNX's conventions (opset 15): the channel axis is 1, `momentum` is the weight of the old value, and the running
variance moves towards that of the batch divided by n (correction 0). momentum and epsilon are float32 numbers.
"""

import numpy as np
import pytest
import reference
from arrays import FLOATS

import fastbn

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: nothing to compare with")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: it builds the graph for ONNX Runtime")

SHAPES = [(8, 5), (1000, 3), (4, 3, 9), (4, 6, 5, 7), (3, 2, 64, 65), (2, 3, 4, 3, 5), (1, 3, 4, 4)]


def run(x, gamma, beta, mean, var, *, training, **attributes):
    """What the graph of one BatchNormalization gives: [y], in training [y, running_mean, running_var]."""
    helper = onnx.helper
    element = helper.np_dtype_to_tensor_dtype(x.dtype)
    inputs = {"x": x, "scale": gamma, "bias": beta, "mean": mean, "var": var}
    outputs = ["y", "running_mean", "running_var"] if training else ["y"]
    node = helper.make_node("BatchNormalization", [*inputs], outputs, training_mode=int(training), **attributes)
    values = [helper.make_tensor_value_info(name, element, a.shape) for name, a in inputs.items()]
    results = [helper.make_tensor_value_info(name, element, None) for name in outputs]
    graph = helper.make_graph([node], "batch_norm", values, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def inputs(rng, shape, dtype):
    x = rng.normal(1, 2, shape).astype(dtype)
    gamma, beta, mean = rng.normal(size=(3, shape[1])).astype(dtype)
    return x, gamma, beta, mean, rng.uniform(0.5, 2, shape[1]).astype(dtype)


def close(found, expected, budget, what):
    """Within the budgets of both."""
    reference.assert_within(found, expected.astype(np.longdouble), 2 * budget, what)


def folded(x, mean, var, gamma, eps):
    """What ONNX Runtime's y is off by: it is x * scale + (beta - mean * scale)."""
    return reference.tolerance(x.dtype, reference.spread(abs(mean * gamma) * reference.invstd(var, eps), x, 1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference(rng, shape, eps, dtype):
    x, gamma, beta, mean, var = given = inputs(rng, shape, dtype)
    eps = float(np.float32(eps))
    (expected,) = run(*given, training=False, epsilon=eps)
    y = fastbn.batch_norm(x, mean, var, gamma, beta, eps=eps)
    budget = reference.infer(x, mean, var, gamma, beta, eps=eps).budget
    close(y, expected, budget + folded(x, mean, var, gamma, eps), "y")
    bn = fastbn.BatchNorm(shape[1], eps=eps, correction=0, dtype=dtype).eval()
    bn.load_state_dict(
        {"gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var, "num_batches_tracked": 0}
    )
    np.testing.assert_array_equal(bn(x), y)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(rng, shape, momentum, dtype):
    """Two steps: the running statistics that come out go in again."""
    x, gamma, beta, mean, var = inputs(rng, shape, dtype)
    eps, old = float(np.float32(1e-3)), float(np.float32(momentum))
    bn = fastbn.BatchNorm(shape[1], eps=eps, momentum=old, correction=0, dtype=dtype)
    bn.load_state_dict(
        {"gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var, "num_batches_tracked": 0}
    )
    running_mean, running_var = mean.copy(), var.copy()
    for scale in (1, 3):
        batch = (scale * x).astype(dtype)
        given = batch, gamma, beta, mean, var
        expected, mean, var = run(*given, training=True, epsilon=eps, momentum=old)
        y, saved = fastbn.batch_norm_train(batch, gamma, beta, eps=eps)
        budget = reference.train(batch, gamma, beta, eps=eps).budget
        close(y, expected, budget + folded(batch, saved.mean, saved.var, gamma, eps), "y")
        np.testing.assert_array_equal(bn(batch), y)
        fastbn.update_running(running_mean, running_var, saved.moments, momentum=old, correction=0)
        size = abs(saved.mean) + np.sqrt(saved.var)
        for found in ((running_mean, running_var), (bn.running_mean, bn.running_var)):
            close(found[0], mean, reference.tolerance(dtype, size + abs(mean)), "running_mean")
            close(found[1], var, reference.tolerance(dtype, saved.var + var), "running_var")
