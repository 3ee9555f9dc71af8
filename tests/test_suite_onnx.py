"""ONNX's own tests of BatchNormalization, from its wheel: single nodes, stored tensors, and whole light networks.

fastbn takes the place of the operator in ONNX's reference evaluator. Every node that it runs is held to the oracle on
the inputs that it gets there, and the outputs of a model to what ONNX has stored, with ONNX's tolerance.
"""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import reference

onnx = pytest.importorskip("onnx", reason="ONNX is not installed: its tests come with it")
runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: it runs the other operators")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

from fastbn.interop import onnx as ours  # noqa: E402


def nodes(model):
    return [n for n in model.graph.node if n.op_type == "BatchNormalization"]


def load(case):
    """The model of a test case, or None where it would have to be downloaded."""
    if case.model is not None:
        return case.model
    if case.model_dir is not None:
        return onnx.load(Path(case.model_dir, "model.onnx"))
    path = light(case)
    return onnx.load(path) if path.exists() else None


def light(case):
    """The file of a network whose weights are constants; its address is that in ONNX's sources."""
    return Path(onnx.__file__).parents[1] / case.url


def skipped(reason, name="none"):
    return pytest.param(None, None, id=name, marks=pytest.mark.skip(reason=reason))


def cases(*kinds):
    """Those of ONNX's cases that normalize; the light networks that do not are shown as skipped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the data of other operators overflows as it is made
            from onnx.backend.test.loader import load_model_tests

            found = [(case, load(case)) for kind in kinds for case in load_model_tests(kind=kind)]
    except Exception as error:  # the loader is nobody's promise: it may move, or its data may not be there
        return [skipped(f"ONNX's tests cannot be loaded: {error!r}")]
    params = []
    for case, model in sorted(found, key=lambda pair: pair[0].name):
        if model is not None and nodes(model):
            params.append(pytest.param(case, model, id=case.name))
        elif case.kind == "real":
            params.append(skipped("is not in the wheel" if model is None else "does not normalize", case.name))
    return params or [skipped("none of ONNX's tests normalizes")]


def through_fastbn():
    """The operator, which checks every result; and the names of the outputs that it has computed."""
    names = []

    class BatchNormalization(ours.BatchNormalization):
        def _run(self, x, scale, bias, mean, var, **attributes):
            results = super()._run(x, scale, bias, mean, var, **attributes)
            axis = 1 if attributes.get("spatial", 1) else tuple(range(1, x.ndim))
            given = {"axis": axis, "eps": attributes["epsilon"]}
            if len(results) == 1:
                expected = reference.infer(x, mean, var, scale, bias, **given)
            else:
                expected = reference.train(x, scale, bias, **given)
            for a, b in zip(results[3:], reference.mean_var(x, axis), strict=False):
                reference.assert_within(a, b, reference.tolerance(x.dtype, abs(b)), "saved ")
            assert {a.dtype for a in results} == {x.dtype}
            reference.assert_within(results[0], expected.y, expected.budget, f"{self.output[0]} ")
            names.append(self.output[0])
            return results

    return BatchNormalization, names


def through_runtime(op_type):
    """An operator run by ONNX Runtime, a node at a time: in the evaluator's Python it would take minutes."""

    def _run(self, *inputs, **attributes):
        ends = [
            [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names]
            for names in (self.input, self.output)
        ]
        graph = onnx.helper.make_graph([self.onnx_node], op_type, *ends)
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", self.run_params["opsets"][""])], ir_version=8
        )
        return tuple(session(model).run(None, dict(zip(self.input, inputs, strict=True))))

    return type(op_type, (OpRun,), {"op_domain": "", "_run": _run})


def session(model):
    """ONNX Runtime on a model as it stands: nothing folded, nothing fused."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # not that old models list their weights among the inputs
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, inputs):
    """The outputs of a model, all of whose BatchNormalization nodes have run through fastbn."""
    batch_normalization, names = through_fastbn()
    others = [through_runtime(op) for op in ("Conv", "MaxPool", "AveragePool")]
    weights = {w.name for w in model.graph.initializer}
    fed = [i.name for i in model.graph.input if i.name not in weights]
    outputs = ReferenceEvaluator(model, new_ops=[batch_normalization, *others]).run(
        None, dict(zip(fed, inputs, strict=True))
    )
    assert names == [n.output[0] for n in nodes(model)], "these are the nodes that ran through fastbn"
    return outputs


def assert_similar(found, expected, case):
    """As ONNX's own runner compares."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=case.rtol, atol=case.atol, strict=True)


def tensor(path):
    return onnx.numpy_helper.to_array(onnx.load_tensor(path))


def image(model):
    """What ONNX feeds its light networks with: a ramp."""
    weights = {w.name for w in model.graph.initializer}
    (given,) = [i for i in model.graph.input if i.name not in weights]
    shape = [d.dim_value for d in given.type.tensor_type.shape.dim]
    return (np.arange(np.prod(shape)).reshape(shape) / np.prod(shape)).astype(np.float32)


def in_opset(model, version):
    """The same model in the words of another version of the operator."""
    model = copy.deepcopy(model)
    (opset,) = model.opset_import
    opset.version = version
    (node,) = model.graph.node
    said = [a for a in node.attribute if a.name == "training_mode"]
    if version < 14 and said:
        node.attribute.remove(said[0])
        node.output.extend(["saved_mean", "saved_var"])
    if version < 7 and not said:
        node.attribute.append(onnx.helper.make_attribute("is_test", 1))
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("opset", [None, 6, 7, 8, 9, 14, 15], ids=lambda v: f"opset{v}" if v else "as-it-is")
@pytest.mark.parametrize(("case", "model"), cases("node"))
def test_single_nodes(case, model, opset):
    for inputs, outputs in case.data_sets:
        assert_similar(run(in_opset(model, opset) if opset else model, inputs), outputs, case)


@pytest.mark.parametrize(("case", "model"), cases("simple", "pytorch-converted", "pytorch-operator"))
def test_stored_tensors(case, model):
    folders = sorted(Path(case.model_dir).glob("test_data_set_*"))
    assert folders
    for folder in folders:
        inputs, outputs = (
            [tensor(folder / f"{what}_{i}.pb") for i in range(len(list(folder.glob(f"{what}_*.pb"))))]
            for what in ("input", "output")
        )
        assert_similar(run(model, inputs), outputs, case)


@pytest.mark.parametrize(("case", "model"), cases("real"))
def test_light_networks(case, model):
    """As they come, every weight 0.02: the outputs are stored."""
    outputs = [tensor(light(case).with_name(f"{light(case).stem}_output_0.pb"))]
    assert_similar(run(model, [image(model)]), outputs, case)


@pytest.mark.parametrize(("case", "model"), cases("real"))
def test_light_networks_with_drawn_weights(rng, case, model):
    """The activations are those of a network before training; ONNX Runtime runs the same model.

    The last values before the softmax are compared. The two differ by the nodes that fastbn has run: a rounding each.
    """
    model = copy.deepcopy(model)
    draw_weights(rng, model)
    if model.graph.node[-1].op_type == "Softmax":
        model.graph.output[0].name = model.graph.node.pop().input[0]
    x = rng.normal(size=image(model).shape).astype(np.float32)
    (found,) = run(model, [x])
    runs = session(model)
    (expected,) = runs.run(None, {runs.get_inputs()[0].name: x})
    assert found.shape == expected.shape
    assert np.ptp(expected) > 0.1 * abs(expected).max(), "these weights tell the outputs apart"
    roundings = len(nodes(model)) * np.finfo(np.float32).eps
    np.testing.assert_allclose(found, expected, rtol=0, atol=roundings * abs(expected).max())


def draw_weights(rng, model):
    """Numbers in the place of the constants: filters that keep the size of what passes, and all else around 1."""
    shapes = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        shape = shapes[node.input[0]]
        inputs = np.prod(shape[1:])
        drawn = rng.normal(0, np.sqrt(2 / inputs), shape) if len(shape) > 1 else rng.uniform(0.5, 1.5, shape)
        model.graph.initializer.append(onnx.numpy_helper.from_array(drawn.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)


@pytest.mark.parametrize("opset", [7, 8])
def test_statistics_for_each_activation(rng, opset):
    """``spatial=0``, which ended with version 8 and of which ONNX has no test: as ONNX Runtime."""
    x = rng.normal(3, 2, (5, 3, 4, 2)).astype(np.float32)
    scale, bias, mean = rng.normal(size=(3, *x.shape[1:])).astype(np.float32)
    var = rng.uniform(0.5, 2, mean.shape).astype(np.float32)
    given = {"x": x, "scale": scale, "bias": bias, "mean": mean, "var": var}
    node = onnx.helper.make_node("BatchNormalization", list(given), ["y"], spatial=0)
    ends = [
        [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape) for n, a in arrays.items()]
        for arrays in (given, {"y": x})
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "each", *ends), opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8
    )
    (found,), (expected,) = run(model, list(given.values())), session(model).run(None, given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
