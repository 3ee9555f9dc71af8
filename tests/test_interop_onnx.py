"""fastbn.interop.onnx: its operator in every opset, against the oracle and ONNX Runtime; weights; a real network."""

import importlib.util
import itertools
import re

import numpy as np
import pages
import pytest
import reference
from subprocesses import ROOT, run_python, run_script

import fastbn

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

from fastbn.interop.onnx import BatchNormalization, evaluator, from_onnx, to_onnx  # noqa: E402

NEWEST = onnx.defs.onnx_opset_version()
OPSETS = (1, 6, 7, 8, 9, 13, 14, 15, NEWEST)
IN_RUNTIME = (7, 8, 9, 13, 14, 15, 21)  # it has no older one, and the newest only later
SHAPES = [(8, 5), (4, 3, 9), (2, 3, 4, 5), (2, 2, 3, 2, 3)]
NAMES = ("x", "scale", "B", "input_mean", "input_var")
EPS, MOMENTUM = (float(np.float32(v)) for v in (1e-3, 0.8))  # not the defaults
TRAINED = ("y", "running_mean", "running_var", "saved_mean", "saved_var")


@pytest.fixture(scope="module")
def runtime():
    return pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: nothing to compare with")


FLOATS = ["float16", "float32", "float64"]
if tuple(map(int, onnx.__version__.split(".")[:2])) >= (1, 19):  # the first that has NumPy's
    FLOATS.append("bfloat16")


def dtypes(opset):
    return [d for d in FLOATS if d != "bfloat16" or opset >= 14]


def dtype_of(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16)
    return np.dtype(name)


def drawn(rng, shape, dtype="float32", *, of_scale=None, of_mean=None, parameters=None):
    """The five inputs."""
    cells = shape[1:2] if parameters is None else parameters
    x = rng.normal(1, 2, shape).astype(dtype_of(dtype))
    scale, bias = rng.normal(size=(2, *cells)).astype(dtype_of(of_scale or dtype))
    mean, var = np.stack([rng.normal(size=cells), rng.uniform(0.5, 2, cells)]).astype(dtype_of(of_mean or dtype))
    return x, scale, bias, mean, var


def info(name, array_or_dtype, shape=None):
    dtype = array_or_dtype.dtype if isinstance(array_or_dtype, np.ndarray) else array_or_dtype
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def node_of(opset, training, name="", outputs=None, **attributes):
    """The node as an opset has it."""
    attributes = {"epsilon": EPS, "momentum": MOMENTUM, **attributes}
    if outputs is None:
        outputs = TRAINED[: 1 if not training else 5 if opset < 14 else 3]
    if opset < 6:
        attributes["consumed_inputs"] = [0, 0, 0, 1, 1]
    if opset < 7:
        attributes["is_test"] = int(not training)
    if opset >= 14:
        attributes["training_mode"] = int(training)
    return helper.make_node("BatchNormalization", NAMES, outputs, name=name, **attributes)


def model_of(opset, arrays, training, **options):
    """A model of one node, all of whose inputs are fed."""
    node = node_of(opset, training, **options)
    x, _, _, mean, var = arrays
    shapes = x.shape, mean.shape, var.shape, mean.shape, var.shape
    results = [info(n, d, s) for n, d, s in zip(node.output, (x, mean, var, x, x), shapes, strict=False) if n]
    graph = helper.make_graph([node], "one", [info(n, a, a.shape) for n, a in zip(NAMES, arrays, strict=True)], results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def fed(arrays):
    return dict(zip(NAMES, arrays, strict=True))


def through_fastbn(model, arrays):
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model, new_ops=[BatchNormalization]).run(None, fed(arrays))


def session(runtime, model):
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    data = model if isinstance(model, (str, bytes)) else model.SerializeToString()
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def folded(x, mean, var, gamma):
    """What ONNX Runtime's y is off by: it is x * scale + (B - mean * scale)."""
    scale = abs(np.asarray(gamma, np.float64)) * reference.invstd(var, EPS)
    return reference.tolerance(np.float32, reference.spread(abs(np.asarray(mean, np.float64)) * scale, x, 1))


def check_inference(found, arrays, axis=1):
    x, scale, bias, mean, var = arrays
    expected = reference.infer(x, mean, var, scale, bias, axis=axis, eps=EPS)
    assert found.dtype == x.dtype
    reference.assert_within(found, expected.y, expected.budget, "y ")
    return expected


def check_training(found, arrays, axis=1):
    """All outputs: y, running_mean, running_var and, if there are any, saved_mean and saved_var."""
    x, scale, bias, mean, var = arrays
    expected = reference.train(x, scale, bias, axis=axis, eps=EPS)
    assert [a.dtype for a in found] == [x.dtype, mean.dtype, var.dtype, x.dtype, x.dtype][: len(found)]
    reference.assert_within(found[0], expected.y, expected.budget, "y ")
    batch = reference.mean_var(x, axis)
    size = abs(batch[0]) + np.sqrt(batch[1])
    for what, a, old, new, of in (("mean", found[1], mean, batch[0], size), ("var", found[2], var, batch[1], batch[1])):
        wanted = reference.running(old, new, MOMENTUM)
        terms = abs(np.asarray(old, np.float64)) + abs(new)
        reference.assert_within(a, wanted, reference.tolerance(a.dtype, terms, of), what)
    for what, a, new, of in zip(("saved mean", "saved var"), found[3:], batch, (size, batch[1]), strict=False):
        reference.assert_within(a, new, reference.tolerance(a.dtype, abs(new), of), what)
    return expected


# -------------------------------------------------------------------------------------------------------- the operator


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference(rng, opset, shape):
    for dtype in dtypes(opset):
        arrays = drawn(rng, shape, dtype)
        (y,) = through_fastbn(model_of(opset, arrays, False), arrays)
        check_inference(y, arrays)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(rng, opset, shape):
    for dtype in dtypes(opset):
        arrays = drawn(rng, shape, dtype)
        before = [a.copy() for a in arrays]
        found = through_fastbn(model_of(opset, arrays, True), arrays)
        assert len(found) == (3 if opset >= 14 else 5)
        check_training(found, arrays)
        for a, b in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("opset", IN_RUNTIME)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_as_in_onnx_runtime(rng, runtime, opset, shape):
    for dtype in ("float32", "float64"):
        x, scale, _, mean, var = arrays = drawn(rng, shape, dtype)
        model = model_of(opset, arrays, False)
        (y,), (theirs,) = through_fastbn(model, arrays), session(runtime, model).run(None, fed(arrays))
        budget = check_inference(y, arrays).budget
        reference.assert_within(y, theirs.astype(reference.WIDE), 2 * budget + folded(x, mean, var, scale), "y ")


@pytest.mark.parametrize("opset", IN_RUNTIME)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_as_in_onnx_runtime(rng, runtime, opset, shape):
    """All but saved_var: ONNX says variance, ONNX Runtime puts 1 / sqrt(var + epsilon) there."""
    for dtype in ("float32", "float64"):
        x, scale, *_ = arrays = drawn(rng, shape, dtype)
        model = model_of(opset, arrays, True)
        found, theirs = through_fastbn(model, arrays), session(runtime, model).run(None, fed(arrays))
        expected = check_training(found, arrays)
        batch = reference.mean_var(x, 1)
        budget = 2 * expected.budget + folded(x, *batch, scale)
        reference.assert_within(found[0], theirs[0].astype(reference.WIDE), budget, "y ")
        size = 2 * (abs(batch[0]) + np.sqrt(batch[1])), 2 * (batch[1] + arrays[4]), 2 * (abs(batch[0]) + 1)
        for name, a, b, of in zip(TRAINED[1:4], found[1:4], theirs[1:4], size, strict=False):
            reference.assert_within(a, b.astype(reference.WIDE), reference.tolerance(dtype, of + abs(b)), name)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_float16_as_in_onnx_runtime(rng, runtime, training):
    """ONNX Runtime computes in float32: of the values that lie between two halves it may take the other one."""
    for kinds in ({}, {"of_scale": "float32", "of_mean": "float32"}):
        arrays = drawn(rng, (4, 3, 5), "float16", **kinds)
        model = model_of(15, arrays, training)
        found, theirs = through_fastbn(model, arrays), session(runtime, model).run(None, fed(arrays))
        for a, b in zip(found, theirs, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_max_ulp(a, b, maxulp=1 if a.dtype == np.float16 else 8)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("opset", [14, 15])
def test_dtypes_of_their_own(rng, opset, training):
    """From opset 14 on that of mean and variance may differ from that of x, from 15 on that of scale and B, too."""
    for of_x, of_scale, of_mean in itertools.product(FLOATS, FLOATS if opset >= 15 else [None], FLOATS):
        arrays = drawn(rng, (3, 2, 4), of_x, of_scale=of_scale, of_mean=of_mean)
        found = through_fastbn(model_of(opset, arrays, training), arrays)
        if training:
            check_training(found, arrays)
        else:
            check_inference(found[0], arrays)


@pytest.mark.parametrize("opset", OPSETS[:-1])
def test_a_sample_does_not_depend_on_its_batch_in_inference(rng, opset):
    """onnx's own evaluator (1.23) mixes the statistics of the batch into those given, in opset 9 to 13."""
    x, *parameters = drawn(rng, (6, 3, 4))
    (together,) = through_fastbn(model_of(opset, (x, *parameters), False), (x, *parameters))
    for i in range(len(x)):
        one = (x[i : i + 1], *parameters)
        (y,) = through_fastbn(model_of(opset, one, False), one)
        np.testing.assert_array_equal(y[0], together[i])


@pytest.mark.parametrize("opset", OPSETS[:-1])
def test_defaults(rng, opset):
    """Of epsilon and momentum: 1e-5 and 0.9 in every opset; of the mode: training up to 6, inference from 7 on."""
    arrays = drawn(rng, (5, 3))
    node = helper.make_node("BatchNormalization", NAMES, TRAINED[:1])
    if opset == 1:
        node.attribute.append(helper.make_attribute("consumed_inputs", [0, 0, 0, 1, 1]))
    model = model_of(opset, arrays, False)
    model.graph.node[0].CopyFrom(node)
    (y, *_) = through_fastbn(model, arrays)
    x, scale, bias, mean, var = arrays
    eps = float(np.float32(1e-5))
    if opset < 7:
        expected = reference.train(x, scale, bias, eps=eps)
    else:
        expected = reference.infer(x, mean, var, scale, bias, eps=eps)
    reference.assert_within(y, expected.y, expected.budget, "y ")
    if opset < 14:
        model.graph.node[0].output.extend(TRAINED[1:])
        model.graph.output.extend(info(n, np.float32, (3,)) for n in TRAINED[1:])
        _, running_mean, *_ = through_fastbn(model, arrays)
        wanted = reference.running(mean, reference.mean_var(x, 1)[0], np.float32(0.9))
        reference.assert_within(running_mean, wanted, reference.tolerance(np.float32, abs(mean) + abs(wanted)), "mean")


@pytest.mark.parametrize("opset", [1, 6, 7, 8])
@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4, 2)], ids=str)
def test_statistics_for_each_cell(rng, runtime, opset, shape):
    """spatial=0, where scale has the shape C x H x W."""
    for dtype in ("float16", "float32", "float64"):
        _, scale, _, mean, var = arrays = drawn(rng, shape, dtype, parameters=shape[1:])
        axis = tuple(range(1, len(shape)))
        model = model_of(opset, arrays, False, spatial=0)
        (y,) = through_fastbn(model, arrays)
        budget = check_inference(y, arrays, axis).budget
        if opset in IN_RUNTIME and dtype == "float32":
            (theirs,) = session(runtime, model).run(None, fed(arrays))
            scaled = abs(mean * scale) * reference.invstd(var, EPS)
            budget = 2 * budget + reference.tolerance(np.float32, scaled)
            reference.assert_within(y, theirs.astype(reference.WIDE), budget, "y ")
        check_training(through_fastbn(model_of(opset, arrays, True, spatial=0), arrays), arrays, axis)


@pytest.mark.parametrize("opset", [9, 13, 14, 15])
def test_one_axis_is_one_channel(rng, runtime, opset):
    arrays = drawn(rng, (7,), parameters=(1,))
    for training in (False, True):
        model = model_of(opset, arrays, training)
        found, theirs = through_fastbn(model, arrays), session(runtime, model).run(None, fed(arrays))
        as_column = arrays[0][:, None], *arrays[1:]
        assert found[0].shape == (7,)
        if training:
            check_training([found[0][:, None], *found[1:]], as_column)
        else:
            check_inference(found[0][:, None], as_column)
        for a, b in zip(found[:3], theirs, strict=False):
            np.testing.assert_allclose(a, b, rtol=0, atol=16 * np.finfo(np.float32).eps * (1 + abs(b).max()))


def test_one_value_per_channel_in_training_gives_b(rng, runtime):
    x, scale, bias, _, var = arrays = drawn(rng, (1, 3, 1))
    model = model_of(15, arrays, True)
    found = through_fastbn(model, arrays)
    np.testing.assert_array_equal(found[0].ravel(), bias)
    budget = 2 * check_training(found, arrays).budget + folded(x, x.ravel(), 0 * var, scale)
    y, *running = session(runtime, model).run(None, fed(arrays))
    reference.assert_within(found[0], y.astype(reference.WIDE), budget, "y ")
    for a, b in zip(found[1:], running, strict=True):
        np.testing.assert_array_max_ulp(a, b, maxulp=4)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_an_empty_batch(rng, training):
    arrays = drawn(rng, (0, 3, 5))
    y, *running = through_fastbn(model_of(15, arrays, training), arrays)
    assert (y.shape, y.dtype) == ((0, 3, 5), np.float32)
    for a, b in zip(running, arrays[3:], strict=False):
        np.testing.assert_array_equal(a, b)


def test_float16_statistics_beyond_it_are_infinite(rng):
    x, scale, bias, mean, var = drawn(rng, (6, 2), "float16")
    arrays = x * np.float16(20000), scale, bias, mean, var
    y, _, running_var = through_fastbn(model_of(15, arrays, True), arrays)
    assert np.isinf(running_var).all()
    assert np.isfinite(y).all()


@pytest.mark.parametrize("opset", [7, 9, 13])
def test_outputs_without_a_name_are_left_out(rng, opset):
    arrays = drawn(rng, (4, 3, 5))
    (y,) = through_fastbn(model_of(opset, arrays, False, outputs=["y", "", "", "", ""]), arrays)
    check_inference(y, arrays)


@pytest.mark.parametrize("opset", [14, 15])
def test_the_attribute_decides_from_opset_14_on(rng, opset):
    """Not the number of outputs: the evaluator takes a node in training whose running statistics nobody wants."""
    arrays = drawn(rng, (4, 3, 5))
    model = model_of(opset, arrays, True, outputs=["y"])
    (y,) = ReferenceEvaluator(model, new_ops=[BatchNormalization]).run(None, fed(arrays))
    expected = reference.train(*arrays[:3], eps=EPS)
    reference.assert_within(y, expected.y, expected.budget, "y ")
    (layer,) = from_onnx(model, weights=dict(zip(NAMES[1:], arrays[1:], strict=True))).values()
    assert layer.training


def test_outputs_of_training_without_training(rng):
    arrays = drawn(rng, (4, 3, 5))
    model = model_of(15, arrays, False, outputs=TRAINED[:3], name="bn1")
    with pytest.raises(ValueError, match=r"BatchNormalization: the node 'bn1' has outputs .*, expected one"):
        ReferenceEvaluator(model, new_ops=[BatchNormalization]).run(None, fed(arrays))


@pytest.mark.parametrize("training", [False, True])
def test_what_it_refuses_is_said_in_its_name(rng, training):
    x, scale, *more = drawn(rng, (4, 3, 5))
    with pytest.raises(ValueError, match=r"^BatchNormalization: gamma has shape \(2,\), expected \(3,\)"):
        BatchNormalization.eval(x, scale[:2], *more, training_mode=int(training))


def test_the_operator_by_itself(rng):
    """As every operator of the evaluator."""
    arrays = drawn(rng, (4, 3, 5))
    check_inference(BatchNormalization.eval(*arrays, epsilon=EPS), arrays)
    node = node_of(NEWEST, False)
    check_inference(ReferenceEvaluator(node, new_ops=[BatchNormalization]).run(None, fed(arrays))[0], arrays)


# ------------------------------------------------------------------------------------------------------- the evaluator


def in_a_function(opset, arrays):
    """The node in a model-local function, whose attribute it takes its epsilon from."""
    node = node_of(opset, False)
    (epsilon,) = [a for a in node.attribute if a.name == "epsilon"]
    node.attribute.remove(epsilon)
    reference_to = onnx.AttributeProto(name="epsilon", ref_attr_name="slack", type=onnx.AttributeProto.FLOAT)
    node.attribute.append(reference_to)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Normalize", NAMES, ["y"], [node], opsets[:1], ["slack"])
    call = helper.make_node("Normalize", NAMES, ["y"], domain="own", slack=EPS)
    inputs = [info(n, a, a.shape) for n, a in zip(NAMES, arrays, strict=True)]
    graph = helper.make_graph([call], "calls", inputs, [info("y", arrays[0], arrays[0].shape)])
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)


def in_a_branch(opset, arrays):
    """The node in the branch of an If that is taken."""
    branches = [
        helper.make_graph([node], "branch", [], [info(node.output[0], arrays[0], arrays[0].shape)])
        for node in (node_of(opset, False, outputs=["y1"]), helper.make_node("Identity", ["x"], ["y2"]))
    ]
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    inputs = [info(n, a, a.shape) for n, a in zip(NAMES, arrays, strict=True)]
    graph = helper.make_graph(nodes, "chooses", inputs, [info("y", arrays[0], arrays[0].shape)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("build", [in_a_function, in_a_branch])
def test_evaluator_reaches_every_node(rng, build):
    arrays = drawn(rng, (4, 3, 5))
    model = build(13, arrays)
    onnx.checker.check_model(model)
    check_inference(evaluator(model).run(None, fed(arrays))[0], arrays)


def test_evaluator_takes_paths_bytes_models_and_more_operators(rng, tmp_path):
    class Relu(OpRun):
        op_domain = ""

        def _run(self, x):
            return (x + 100,)

    layer = filled(rng, 3, activation="relu")
    model, x = to_onnx(layer, (None, 3)), rng.normal(size=(4, 3)).astype(np.float32)
    onnx.save(model, tmp_path / "plain.onnx")
    onnx.save_model(onnx.ModelProto.FromString(model.SerializeToString()), tmp_path / "outside.onnx",
                    save_as_external_data=True, location="weights.bin", size_threshold=0)  # fmt: skip
    assert (tmp_path / "weights.bin").stat().st_size
    expected = layer.eval()(x)
    for what in (model, model.SerializeToString(), tmp_path / "plain.onnx", str(tmp_path / "outside.onnx")):
        np.testing.assert_array_equal(evaluator(what).run(None, {"x": x})[0], expected)
    layer.activation = None
    np.testing.assert_array_equal(evaluator(model, new_ops=[Relu]).run(None, {"x": x})[0], layer(x) + 100)
    with pytest.raises(FileNotFoundError):
        evaluator(tmp_path / "nowhere.onnx")
    with pytest.raises(ValueError, match="evaluator: model cannot be read as an ONNX model"):
        evaluator(b"no model")
    with pytest.raises(ValueError, match="evaluator: model cannot be read as an ONNX model: it has no graph"):
        evaluator(b"")


# ------------------------------------------------------------------------------------------------------------- weights


def filled(rng, channels, **options):
    """A layer whose every number is drawn."""
    layer = fastbn.BatchNorm(channels, **{"eps": EPS, "momentum": MOMENTUM, "correction": 0, **options})
    for a in (layer.gamma, layer.beta, layer.running_mean):
        if a is not None:
            a[...] = rng.normal(size=a.shape)
    layer.running_var[...] = rng.uniform(0.5, 2, layer.channels)
    return layer


def assert_same_layer(found, expected):
    for name in ("gamma", "beta", "running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert (found.eps, found.momentum, found.correction) == (expected.eps, expected.momentum, 0)
    assert (found.axis, found.channels, found.dtype) == (expected.axis, expected.channels, expected.dtype)


@pytest.mark.parametrize("opset", range(6, NEWEST + 1))
def test_out_and_in_again(rng, opset):
    for dtype in ("float32", "float64"):
        layer = filled(rng, 3, dtype=dtype)
        ((key, found),) = from_onnx(to_onnx(layer, (None, 3, None), opset=opset, name="bn1")).items()
        assert key == "bn1"
        assert not found.training
        assert_same_layer(found, layer)
        assert found.gamma is not layer.gamma


EXPORTS = {
    "plain": ({}, (None, 3, None), (4, 3, 5)),
    "two axes": ({}, (None, 3), (4, 3)),
    "float64": ({"dtype": "float64"}, (None, 3, None), (4, 3, 5)),
    "no gamma, no beta": ({"center": False, "scale": False}, (None, 3, None), (4, 3, 5)),
    "relu": ({"activation": "relu"}, (None, 3, None), (4, 3, 5)),
    "pooled": ({"momentum": None}, (None, 3, None), (4, 3, 5)),
    "of the other correction": ({"correction": 1}, (None, 3, None), (4, 3, 5)),
    "channels last": ({"axis": -1, "activation": "relu"}, ("n", None, 4, 3), (2, 5, 4, 3)),
    "channels first of all": ({"axis": 0}, (3, None, 4), (3, 5, 4)),
    "the last of two axes": ({"axis": -1}, (None, 3), (4, 3)),
}


@pytest.mark.parametrize("opset", [7, 9, 14, 15, 21])
@pytest.mark.parametrize("case", EXPORTS)
def test_onnx_runtime_computes_what_the_layer_does(rng, runtime, case, opset):
    options, known, shape = EXPORTS[case]
    layer = filled(rng, 3, **options)
    x = rng.normal(1, 2, shape).astype(layer.dtype)
    model = to_onnx(layer, known, opset=opset)
    turned = "axis" in options and case != "the last of two axes"
    wanted = ["Transpose"] * turned + ["BatchNormalization"] + ["Relu"] * ("activation" in options)
    assert [n.op_type for n in model.graph.node] == wanted + ["Transpose"] * turned
    y, (theirs,) = layer.eval()(x), session(runtime, model).run(None, {"x": x})
    parameters = layer.running_mean, layer.running_var, *(1 if a is None else a for a in (layer.gamma, layer.beta))
    moved = [abs(reference.spread(p, x, layer.axis)) for p in parameters]
    size = (abs(x) + moved[0]) * moved[2] * reference.spread(reference.invstd(layer.running_var, EPS), x, layer.axis)
    budget = 2 * reference.tolerance(layer.dtype, size + moved[3])
    reference.assert_within(y, theirs.astype(reference.WIDE), budget)
    (ours,) = evaluator(model).run(None, {"x": x})
    if case == "pooled":  # whose statistics are float64, and float32 in the model
        reference.assert_within(ours, y.astype(reference.WIDE), budget)
    else:
        np.testing.assert_array_equal(ours, y)


@pytest.mark.parametrize("opset", [7, 13, 14, 15])
def test_training_goes_on_in_onnx_runtime(rng, runtime, opset):
    layer = filled(rng, 3)
    model = to_onnx(layer, (4, 3, 5), opset=opset, training=True, name="bn")
    (again,) = from_onnx(model).values()
    assert again.training
    x = rng.normal(1, 2, (4, 3, 5)).astype(np.float32)
    runs = session(runtime, model)
    names = ["y", "bn.running_mean", "bn.running_var"]
    expected = dict(zip(names, runs.run(names, {"x": x}), strict=True))
    ours = dict(zip(names, evaluator(model).run(names, {"x": x}), strict=True))
    for trained in (layer, again):
        y = trained(x)
        for name, a in zip(names, (y, trained.running_mean, trained.running_var), strict=True):
            np.testing.assert_allclose(a, expected[name], rtol=0, atol=1e-6 * (1 + abs(expected[name]).max()))
            np.testing.assert_array_max_ulp(a, ours[name], maxulp=1)


@pytest.mark.parametrize("opset", [7, 8])
def test_a_layer_with_statistics_for_each_cell(rng, runtime, opset):
    layer = filled(rng, (3, 4, 2), axis=(1, 2, 3))
    x = rng.normal(1, 2, (5, 3, 4, 2)).astype(np.float32)
    model = to_onnx(layer, (None, 3, 4, 2), opset=opset)
    (theirs,) = session(runtime, model).run(None, {"x": x})
    np.testing.assert_allclose(layer.eval()(x), theirs, rtol=1e-5, atol=1e-5)
    (found,) = from_onnx(model).values()
    assert_same_layer(found, layer)


@pytest.mark.parametrize("opset", [9, 13, 14, 15])
def test_halves(rng, runtime, opset):
    """The parameters are halves where the opset has one dtype for all; out of them come their exact values."""
    for dtype in dtypes(opset):
        if dtype not in ("float16", "bfloat16"):
            continue
        layer = filled(rng, 3)
        model = to_onnx(layer, (None, 3, 5), opset=opset, dtype=dtype_of(dtype))
        kept = {t.name.split(".")[1]: numpy_helper.to_array(t) for t in model.graph.initializer}
        wide = {"scale": 15, "B": 15, "input_mean": 14, "input_var": 14}
        assert {n: a.dtype.name for n, a in kept.items()} == {
            n: "float32" if opset >= at else dtype for n, at in wide.items()
        }
        (found,) = from_onnx(model).values()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.gamma, kept["scale"].astype(np.float32))
        np.testing.assert_array_equal(found.running_var, kept["input_var"].astype(np.float32))
        x = rng.normal(1, 2, (4, 3, 5)).astype(dtype_of(dtype))
        (y,) = evaluator(model).run(None, {"x": x})
        np.testing.assert_array_equal(y, found(x))
        if dtype == "float16" and opset != 14:  # it has no kernel for the mixture of 14
            np.testing.assert_array_max_ulp(y, session(runtime, model).run(None, {"x": x})[0], maxulp=1)


def with_parameters(layer, how, name="bn1"):
    """A model whose four parameters are given as `how` says, nodes and initializers."""
    arrays = [layer.gamma, layer.beta, layer.running_mean, layer.running_var]
    nodes, initializers = [], []
    for parameter, a in zip(NAMES[1:], arrays, strict=True):
        extra, tensors = how(parameter, a)
        nodes += extra
        initializers += tensors
    nodes.append(node_of(13, False, name=name))
    graph = helper.make_graph(
        nodes, "one", [info("x", np.float32, (4, 3))], [info("y", np.float32, (4, 3))], initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("wide", NAMES[1:])
def test_one_parameter_in_float64_makes_the_layer_float64(rng, wide):
    layer = filled(rng, 3)
    (found,) = from_onnx(
        with_parameters(layer, lambda n, a: ([], [numpy_helper.from_array(a.astype("f8" if n == wide else "f4"), n)]))
    ).values()
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found.running_mean, layer.running_mean)


def constant(name, a):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(a))


HOWS = {
    "initializers": lambda n, a: ([], [numpy_helper.from_array(a, n)]),
    "Constant nodes": lambda n, a: ([constant(n, a)], []),
    "value_floats": lambda n, a: ([helper.make_node("Constant", [], [n], value_floats=a.tolist())], []),
    "shared": lambda n, a: ([helper.make_node("Identity", [n + "0"], [n])], [numpy_helper.from_array(a, n + "0")]),
    "converted": lambda n, a: (
        [helper.make_node("Cast", [n + "0"], [n], to=onnx.TensorProto.FLOAT)],
        [numpy_helper.from_array(a.astype(np.float64), n + "0")],
    ),
    "reshaped": lambda n, a: (
        [constant(n + "1", np.array([-1])), helper.make_node("Reshape", [n + "0", n + "1"], [n])],
        [numpy_helper.from_array(a[None, :, None], n + "0")],
    ),
}


@pytest.mark.parametrize("how", HOWS)
def test_every_kind_of_constant(rng, how):
    layer = filled(rng, 3)
    model = with_parameters(layer, HOWS[how])
    onnx.checker.check_model(model)
    ((key, found),) = from_onnx(model).items()
    assert key == "bn1"
    assert_same_layer(found, layer)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_array_equal(found(x), evaluator(model).run(None, {"x": x})[0])


def test_filled_with_one_number():
    fill = numpy_helper.from_array(np.array([0.5], np.float32))
    model = with_parameters(
        fastbn.BatchNorm(3),
        lambda n, a: (
            [constant(n + "0", np.array([3])), helper.make_node("ConstantOfShape", [n + "0"], [n], value=fill)], []
        ),
    )  # fmt: skip
    (layer,) = from_onnx(model).values()
    np.testing.assert_array_equal(layer.running_var, np.full(3, 0.5))


def test_in_subgraphs_and_functions(rng):
    arrays = drawn(rng, (4, 3, 5))
    for build, name in ((in_a_function, None), (in_a_branch, "y1")):
        model = build(13, arrays)
        for which, a in zip(NAMES[1:], arrays[1:], strict=True):
            model.graph.initializer.append(numpy_helper.from_array(a, which))
        ((key, layer),) = from_onnx(model).items()
        assert name in (None, key)
        assert layer.eps == EPS
        check_inference(layer(arrays[0]), arrays)


def test_names_of_nodes(rng):
    """A name that two nodes share, or none: that of the output."""
    layers = [filled(rng, 3) for _ in range(4)]
    tensors, nodes = [], []
    for i, (layer, name) in enumerate(zip(layers, ("a", "a", "", "b"), strict=True)):
        values = layer.gamma, layer.beta, layer.running_mean, layer.running_var
        names = [f"{n}{i}" for n in NAMES[1:]]
        tensors += [numpy_helper.from_array(a, n) for n, a in zip(names, values, strict=True)]
        nodes.append(helper.make_node("BatchNormalization", [f"y{i - 1}" if i else "x", *names], [f"y{i}"], name=name))
    graph = helper.make_graph(nodes, "four", [info("x", np.float32)], [info("y3", np.float32)], tensors)
    for found in (from_onnx(graph), from_onnx(helper.make_model(graph))):
        assert list(found) == ["y0", "y1", "y2", "b"]
        for a, b in zip(found.values(), layers, strict=True):
            np.testing.assert_array_equal(a.running_mean, b.running_mean)
    assert list(from_onnx(graph, "b")) == list(from_onnx(graph, "y3")) == ["b"]
    np.testing.assert_array_equal(from_onnx(graph, "y2")["y2"].beta, layers[2].beta)


def test_a_node_by_itself(rng):
    x, *parameters = arrays = drawn(rng, (4, 3, 5))
    weights = dict(zip(NAMES[1:], parameters, strict=True))
    (layer,) = from_onnx(node_of(15, False), weights=weights).values()
    check_inference(layer(x), arrays)


def test_paths_bytes_and_external_files(rng, tmp_path, monkeypatch):
    """Only the files that batch norms are in need be there."""
    layer = filled(rng, 3)
    model = to_onnx(layer, (None, 3, None, None), name="bn1")
    assert_same_layer(from_onnx(model.SerializeToString())["bn1"], layer)
    big = numpy_helper.from_array(rng.normal(size=(3, 3, 1, 1)).astype(np.float32), "weight")
    model.graph.initializer.append(big)
    model.graph.node[0].input[0] = "convolved"
    model.graph.node.insert(0, helper.make_node("Conv", ["x", "weight"], ["convolved"]))
    onnx.save_model(
        model, tmp_path / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    (tmp_path / "weight").unlink()
    for path in (tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        assert_same_layer(from_onnx(path)["bn1"], layer)
    without = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    before = without.SerializeToString()
    assert_same_layer(from_onnx(without, folder=tmp_path)["bn1"], layer)
    assert without.SerializeToString() == before
    monkeypatch.chdir(tmp_path)
    for given in (without, "m.onnx"):
        assert_same_layer(from_onnx(given)["bn1"], layer)
    (tmp_path / "bn1.scale").unlink()
    with pytest.raises(ValueError, match=r"from_onnx: the values of 'bn1.scale' cannot be read"):
        from_onnx(tmp_path / "m.onnx")
    with pytest.raises(FileNotFoundError):
        from_onnx(tmp_path / "nowhere.onnx")


def computed(name, a):
    """A parameter that depends on the input."""
    return [helper.make_node("Identity", ["x"], [name])], []


def changed(**other):
    """Initializers, one of them another value."""
    return lambda n, a: ([], [numpy_helper.from_array(np.asarray(other.get(n, a)), n)])


BAD = {
    "computed": (computed, r"scale of the node 'bn1' is 'scale', which is not a constant of the model; expected an in"),
    "fed": (lambda n, a: ([], []), r"scale of the node 'bn1' is 'scale', which is not a constant"),
    "no axis": (changed(scale=np.float32(1)), r"scale of the node 'bn1' has shape \(\), expected \(C,\)"),
    "two axes": (changed(scale=np.ones((3, 1), np.float32)), r"scale of the node 'bn1' has shape \(3, 1\), exp"),
    "another length": (
        changed(input_mean=np.ones(2, np.float32)),
        r"input_mean of .* has shape \(2,\), expected \(3,\)",
    ),
    "negative": (changed(input_var=np.float32([1, 1, -1])), r"input_var of the node 'bn1' .*-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_batch_norm_of_constants(case):
    how, message = BAD[case]
    with pytest.raises(ValueError, match="from_onnx: " + message):
        from_onnx(with_parameters(fastbn.BatchNorm(3), how))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((b"no model",), ValueError, "model cannot be read as an ONNX model"),
        ((b"",), ValueError, "model cannot be read as an ONNX model: it has no graph"),
        ((3,), TypeError, "model is of type int, expected a path, bytes, a ModelProto, GraphProto or NodeProto"),
        ((b"", 3), TypeError, "name is 3, expected the name of a node"),
    ],
)
def test_bad_calls_of_from_onnx(arguments, error, message):
    with pytest.raises(error, match="from_onnx: " + message):
        from_onnx(*arguments)


def test_a_name_that_is_not_there():
    with pytest.raises(
        ValueError, match="from_onnx: name is 'bn2', expected one of the 1 batch norms of the model: 'bn1'"
    ):
        from_onnx(to_onnx(fastbn.BatchNorm(3), (None, 3), name="bn1"), "bn2")


def test_too_few_inputs():
    node = helper.make_node("BatchNormalization", ["x", "scale", "B"], ["y"])
    with pytest.raises(ValueError, match="from_onnx: model has 3 inputs of the node 'y', expected 5"):
        from_onnx(node)


def test_a_model_without_batch_norm():
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "none", [], [])
    assert from_onnx(graph) == {}


def layer_of(channels=3, *, at=None, **options):
    layer = fastbn.BatchNorm(channels, **options)
    if at is not None:
        layer.running_mean[...] = at
    return layer


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (None, {}, TypeError, "layer is of type NoneType, expected a BatchNorm"),
        (layer_of(), {"name": 3}, TypeError, "name is 3, expected a str"),
        (layer_of(), {"opset": 5}, ValueError, f"opset is 5, expected 6 to {NEWEST}"),
        (layer_of(), {"opset": "15"}, TypeError, "opset is '15', expected an int"),
        (layer_of(), {"dtype": "int32"}, TypeError, "dtype is int32, expected one of float16"),
        (layer_of(), {"training": 1}, TypeError, "training is 1, expected True or False"),
        (layer_of(track_running_stats=False), {}, ValueError, "layer keeps no running statistics"),
        (layer_of(momentum=None), {"training": True}, ValueError, "layer has momentum=None"),
        (layer_of(), {"training": True}, ValueError, "layer has correction=1, expected 0"),
        (layer_of(eps=1e-300), {}, ValueError, "layer has eps=1e-300, expected a number that float32 can hold"),
        (layer_of(eps=1e300), {}, ValueError, r"layer has eps=1e\+300, expected a number that float32 can hold"),
        (
            layer_of(at=1e6),
            {"dtype": "float16", "opset": 9},
            ValueError,
            r"input_mean of the layer has 1e\+06, expected",
        ),
        (layer_of(axis=0), {"shape": (3,)}, ValueError, "layer has axis=0 for a shape of 1 axes, expected one of two"),
        (layer_of(axis=2), {"shape": (3, 3)}, ValueError, r"axis 2 is out of range for x of shape \(3, 3\)"),
        (layer_of(), {"shape": (8, 4)}, ValueError, r"shape is \(8, 4\), expected the layer's channels \(3,\)"),
        (layer_of(), {"shape": (-1, 3)}, ValueError, r"shape is \(-1, 3\), expected a tuple of lengths"),
        (layer_of(), {"shape": 8}, TypeError, "shape is 8, expected a tuple of lengths"),
        (layer_of(), {"shape": (1.5, 3)}, TypeError, r"shape is \(1.5, 3\), expected a tuple of lengths"),
        (layer_of((3, 2), axis=(1, 2)), {"shape": (8, 3, 2)}, ValueError, r"layer has axis=\(1, 2\) with opset=15"),
        (layer_of((3, 2), axis=(0, 2)), {"shape": (3, 8, 2)}, ValueError, r"layer has axis=\(0, 2\) for a shape of 3"),
        (
            layer_of((3, 2), axis=(1, 2)),
            {"shape": (8, 3, 2, 4)},
            ValueError,
            r"layer has axis=\(1, 2\) for a shape of 4",
        ),
        (layer_of((), axis=()), {"shape": (8,)}, ValueError, r"layer has axis=\(\) for a shape of 1 axes"),
    ],
)
def test_bad_calls_of_to_onnx(layer, options, error, message):
    with pytest.raises(error, match="to_onnx: " + message):
        to_onnx(layer, **{"shape": (None, 3), **options})


def test_a_dtype_that_this_onnx_does_not_have(monkeypatch):
    def unknown(dtype):
        raise KeyError(dtype)

    monkeypatch.setattr(helper, "np_dtype_to_tensor_dtype", unknown)
    with pytest.raises(ValueError, match=r"to_onnx: dtype is float16, expected another, or onnx 1\.19; this is"):
        to_onnx(fastbn.BatchNorm(3), (None, 3), dtype="float16")


def test_bfloat16_before_opset_14():
    with pytest.raises(ValueError, match="to_onnx: dtype is bfloat16 with opset=13"):
        to_onnx(fastbn.BatchNorm(3), (None, 3), dtype=dtype_of("bfloat16"), opset=13)


# ------------------------------------------------------------------------------------ a real network, docs, no package


@pytest.mark.jit("a network of 35 batch norms takes minutes as plain Python")
def test_a_real_network_on_real_pictures(runtime):
    """docs/gallery/plot_text_direction.py: every picture's answer is right, and every probability ONNX Runtime's."""
    for package in ("matplotlib", "PIL"):
        pytest.importorskip(package, reason=f"{package} is not installed: it brings the pictures")
    if not importlib.util.find_spec("rapidocr_onnxruntime"):  # to import it brings OpenCV, which is not needed
        pytest.skip("rapidocr-onnxruntime is not installed: it brings the network")
    printed = run_python(str(ROOT / "docs" / "gallery" / "plot_text_direction.py"), MPLBACKEND="Agg")
    counts = re.findall(r"^(as it came|folded): 53 Conv (\d+) BatchNormalization$", printed, re.M)
    assert counts == [("as it came", "35"), ("folded", "0")], printed
    rows = re.findall(r"^(.{14})\s+(0|180)\s+([\d.]+)\s+([\d.]+)\s+[\d.]+$", printed, re.M)
    assert len(rows) == 6, printed
    for _, turned, found, expected in rows:
        assert (float(found) > 0.5) == (turned == "180"), printed
        assert abs(float(found) - float(expected)) < 1e-5, printed
    apart = re.findall(r"^probabilities differ by (\S+),\nlogits by (\S+) of the largest", printed, re.M)
    assert len(apart) == 2, printed
    # The second is folded into the weights, which are rounded then.
    assert all(float(figure) < 1e-5 for figures in apart for figure in figures), printed
    # The page says that of the whole tag both answers are wrong.
    whole = re.findall(r"^the whole tag, turned by +(0|180): turned, ([\d.]+)%$", printed, re.M)
    assert [(turned, float(p) > 50) for turned, p in whole] == [("0", True), ("180", False)], printed


@pytest.mark.jit("the page's figures are those of compiled code")
def test_the_page(runtime, tmp_path, monkeypatch):
    """Its blocks run one after the other, in a folder of their own, and print what their comments say."""
    monkeypatch.chdir(tmp_path)
    pages.check("how-to/onnx.md")


def test_examples_in_docstrings():
    import doctest

    import fastbn.interop.onnx as module

    assert doctest.testmod(module).attempted
    assert not doctest.testmod(module).failed


def test_without_the_package():
    script = """
import sys
sys.modules["onnx"] = None
import fastbn.interop
try:
    fastbn.interop.onnx
except ImportError as error:
    print(error)
"""
    assert run_script(script) == 'fastbn.interop.onnx needs onnx: pip install "fastbn[onnx]"\n'
