"""ONNX: its reference evaluator with a batch norm that is right in every opset, and weights out of and into models.

The operator is BatchNormalization of the opsets 1, 6, 7, 9, 14 and 15, as onnx/defs/nn/defs.cc and old.cc in onnx 1.23
define it. The evaluator's own (op_batch_normalization.py there) cannot run opset 7 and 8, and mixes
the statistics of the batch into an inference of the opsets 9 to 13.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import frozen, trained
from ..layer import BatchNorm
from ..moments import update_running
from ._need import need

onnx = need("onnx", "onnx", __name__)
OpRun: Any = need("onnx.reference.op_run", "onnx", __name__).OpRun
ReferenceEvaluator: Any = need("onnx.reference", "onnx", __name__).ReferenceEvaluator

Array = npt.NDArray[Any]

__all__ = ["BatchNormalization", "evaluator", "from_onnx", "to_onnx"]

STANDARD = ("", "ai.onnx")  # two names of one domain
PARAMETERS = ("scale", "B", "input_mean", "input_var")  # as the operator calls them, in its order


# -------------------------------------------------------------------------------------------------------- the operator


class BatchNormalization(OpRun):  # type: ignore[misc]
    """The operator for ``onnx.reference.ReferenceEvaluator(model, new_ops=[BatchNormalization])``.

    Its name is the operator's: by it the evaluator finds what to replace. All opsets, with their attributes and
    outputs:

    ======= ============================== =============================================
    opset   in training                    outputs of training
    ======= ============================== =============================================
    1, 6    unless is_test                 Y, mean, var, saved_mean, saved_var
    7 to 13 if it has more than one output Y, mean, var, saved_mean, saved_var
    14, 15  if training_mode               Y, running_mean, running_var
    ======= ============================== =============================================

    Notes
    -----
    The running statistics that come out are ``momentum * old + (1 - momentum) * batch``, with the variance divided by
    n, in the dtype in which they came in. saved_mean and saved_var are those of the batch, in the dtype of X; ONNX
    Runtime 1.31 puts 1 / sqrt(var + epsilon) in the place of saved_var.

    ``spatial=0``, up to opset 8: statistics for each cell, parameters of the shape C x D1 x ... x Dn. An X of one axis
    is one channel. X and the parameters may be of different dtypes. One value per channel is no error: Y is B then. An
    empty batch leaves the running statistics as they were.

    Outputs are new arrays, those that opset 1 and 6 want "in place" too.
    """

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, epsilon: float = 1e-5,
        momentum: float = 0.9, training_mode: int = 0, is_test: int = 0, spatial: int = 1, consumed_inputs: Any = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        fn = "BatchNormalization"
        opset = self.run_params["opsets"][self.domain]
        if opset >= 14:
            training = bool(training_mode)
        elif opset >= 7:
            training = any(self.output[1:])  # an output without a name is left out
        else:
            training = not is_test
        shape = x.shape
        if x.ndim == 1:
            x = x.reshape(-1, 1)
        axis = 1 if spatial else tuple(range(1, x.ndim))
        if not training:
            if opset >= 14 and any(self.output[1:]):
                raise ValueError(
                    f"{fn}: the node {self.onnx_node.name!r} has outputs {list(self.output)}, expected "
                    f"one: it is not in training"
                )
            y, _ = frozen(fn, x, mean, var, scale, bias, axis=axis, eps=epsilon, keep=False)
            return (y.reshape(shape),)
        y, saved = trained(x, scale, bias, axis=axis, eps=epsilon, single=True, fn=fn)
        new_mean, new_var = (a.astype(np.float64) for a in (mean, var))
        update_running(new_mean, new_var, saved.moments, momentum=momentum, correction=0)
        with np.errstate(all="ignore"):  # beyond float16 is infinite
            running = new_mean.astype(mean.dtype), new_var.astype(var.dtype)
            if opset >= 14:
                return (y.reshape(shape), *running)
            return (y.reshape(shape), *running, saved.mean.astype(x.dtype), saved.var.astype(x.dtype))


def evaluator(model: Any, *, new_ops: Any = (), **options: Any) -> Any:
    """ONNX's reference evaluator with fastbn's batch norm, in subgraphs and model-local functions too.

    Parameters
    ----------
    model : path, bytes, ModelProto or whatever else onnx.reference.ReferenceEvaluator takes
        Of a path, tensors in external files are read as well, from its folder.
    new_ops : iterable of classes
        More operators.
    **options
        Of ReferenceEvaluator.

    Returns
    -------
    onnx.reference.ReferenceEvaluator
        ``evaluator(model).run(None, {"x": x})`` gives the outputs of the model.

    Raises
    ------
    ValueError
        A file or bytes that are no model.
    FileNotFoundError
        No such file.

    Notes
    -----
    ``ReferenceEvaluator(model, new_ops=[BatchNormalization])`` is the same but for the functions of a model, to which
    the evaluator of onnx 1.23 does not hand its `new_ops` down.
    """
    if isinstance(model, (str, os.PathLike, bytes, bytearray, memoryview)):
        model = _loaded("evaluator", model, external=True)
    return _Evaluator(model, new_ops=[*new_ops, BatchNormalization], **options)


class _Evaluator(ReferenceEvaluator):  # type: ignore[misc]
    """Has the operator from itself: an evaluator makes another one of its class for each function of a model."""

    def __init__(self, proto: Any, *, new_ops: Any = None, **options: Any) -> None:
        super().__init__(proto, new_ops=new_ops or [BatchNormalization], **options)


# --------------------------------------------------------------------------------------------------------- weights out


def from_onnx(
    model: Any, name: str | None = None, *, weights: Mapping[str, npt.ArrayLike] | None = None, folder: Any = None
) -> dict[str, BatchNorm]:
    """The batch norms of a model, as layers.

    Parameters
    ----------
    model : path, bytes, ModelProto, GraphProto or NodeProto
        Of a path only the parameters of batch norms are read from external files, however large these are.
    name : str, optional
        Of the one node that is wanted: its name, or that of its first output. Without it all of them, those in
        subgraphs and model-local functions too.
    weights : mapping of names to arrays, optional
        Values of names that are no constants in the model, such as a NodeProto's inputs.
    folder : path, optional
        Where the external files are of a model that is not given as a path. The working directory by default.

    Returns
    -------
    dict of str to BatchNorm
        In the order of the nodes. The key is the node's name, or that of its first output where it has none or shares
        it. Every layer has copies of scale, B, mean and var as gamma, beta, running_mean and running_var, the node's
        epsilon and momentum (float32 numbers), axis 1 (``spatial=0``: all axes but the first), `correction` 0, and is
        in evaluation unless the node is in training. Its dtype is float32, or float64 if that of a parameter is:
        float16 and bfloat16 are widened, which is exact.

    Raises
    ------
    ValueError
        A parameter that is not a constant, such as the result of a network, or of a wrong shape; a negative variance;
        no node of that name; a file or bytes that are no model; an external file that cannot be read.
    TypeError
        Another type of model.
    FileNotFoundError
        No such file.

    Notes
    -----
    Constants are initializers, of which a model may say that they can be fed, and Constant nodes; also what Identity,
    Cast, ConstantOfShape, Reshape, Squeeze and Unsqueeze make of constants, as exporters write shared or converted
    weights.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.interop.onnx import from_onnx, to_onnx
    >>> from_onnx(to_onnx(fastbn.BatchNorm(3), (None, 3), name="bn1"))
    {'bn1': BatchNorm.like('onnx', 3, eps=9.999999747378752e-06, momentum=0.8999999761581421)}
    """
    fn = "from_onnx"
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{fn}: name is {_check.shown(name)}, expected the name of a node")
    if folder is None:
        folder = os.path.dirname(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else ""
    if isinstance(model, (str, os.PathLike, bytes, bytearray, memoryview)):
        model = _loaded(fn, model, external=False)
    opset = onnx.defs.onnx_opset_version()
    if isinstance(model, onnx.ModelProto):
        if model.functions:
            model = need("onnx.inliner", "onnx", __name__).inline_local_functions(model)
        opset = max((o.version for o in model.opset_import if o.domain in STANDARD), default=opset)
        model = model.graph
    if isinstance(model, onnx.NodeProto):
        model = onnx.helper.make_graph([model], "node", [], [])
    if not isinstance(model, onnx.GraphProto):
        raise TypeError(
            f"{fn}: model is of type {type(model).__name__}, expected a path, bytes, a ModelProto, GraphProto or "
            f"NodeProto"
        )
    given = {key: np.asarray(value) for key, value in (weights or {}).items()}
    found = list(_nodes(model, _Constants(given, os.fspath(folder), opset)))
    names = [node.name for node, _ in found]
    keys = [node.name if node.name and names.count(node.name) == 1 else node.output[0] for node, _ in found]
    layers = {}
    for key, (node, constants) in zip(keys, found, strict=True):
        if name in (None, key, node.output[0]):
            layers[key] = _layer(fn, key, node, constants)
    if name is not None and not layers:
        known = ", ".join(map(repr, keys[:10])) + (", ..." if len(keys) > 10 else "")
        raise ValueError(f"{fn}: name is {name!r}, expected one of the {len(keys)} batch norms of the model: {known}")
    return layers


class _Constants:
    """What the names of a graph, and of those around it, stand for, as far as they are constants."""

    # Operators that only pass a constant on in another form.
    passing = frozenset({"Cast", "Constant", "ConstantOfShape", "Identity", "Reshape", "Squeeze", "Unsqueeze"})

    def __init__(self, known: Mapping[str, Any], folder: str, opset: int) -> None:
        self.known, self.folder, self.opset = known, folder, opset

    def inside(self, graph: Any) -> _Constants:
        """The same with the names of a graph."""
        own = {tensor.name: tensor for tensor in graph.initializer}
        own |= {n.output[0]: n for n in graph.node if n.op_type in self.passing and n.domain in STANDARD}
        return _Constants({**self.known, **own}, self.folder, self.opset)

    def __call__(self, name: str) -> Array | None:
        """The value of a name, or None if it is no constant."""
        found = self.known.get(name)
        if isinstance(found, onnx.TensorProto):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(found)  # older versions read an external file into it
            try:
                return np.asarray(onnx.numpy_helper.to_array(tensor, self.folder))
            except Exception as error:  # what, depends on the version
                raise ValueError(f"from_onnx: the values of {name!r} cannot be read: {error}") from error
        if not isinstance(found, onnx.NodeProto):
            return found
        values = [self(n) for n in found.input]
        if any(v is None for v in values):
            return None
        node = onnx.NodeProto()
        node.CopyFrom(found)
        node.domain = ""
        infos = [[onnx.helper.make_empty_tensor_value_info(n) for n in ends] for ends in (node.input, node.output)]
        run = ReferenceEvaluator(onnx.helper.make_graph([node], "constant", *infos), opsets={"": self.opset})
        return np.asarray(run.run(None, dict(zip(node.input, values, strict=True)))[0])


def _nodes(graph: Any, around: _Constants) -> Iterator[tuple[Any, _Constants]]:
    """The batch norms of a graph and of those in its nodes, each with the constants that it sees."""
    constants = around.inside(graph)
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.domain in STANDARD:
            yield node, constants
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inner, constants)


def _layer(fn: str, key: str, node: Any, constants: _Constants) -> BatchNorm:
    of = f"of the node {key!r}"
    if len(node.input) != 5:
        raise ValueError(f"{fn}: model has {len(node.input)} inputs {of}, expected 5")
    said = {a.name: a for a in node.attribute}
    arrays = []
    for what, name in zip(PARAMETERS, node.input[1:], strict=True):
        value = constants(name)
        if value is None:
            raise ValueError(
                f"{fn}: {what} {of} is {name!r}, which is not a constant of the model; expected an initializer or a "
                f"Constant node, or weights={{{name!r}: ...}}"
            )
        arrays.append(_check.array(fn, f"{what} {of} ({name!r})", value))
    shape = arrays[0].shape
    cells = "spatial" in said and not said["spatial"].i
    if not shape or (len(shape) > 1 and not cells):
        expected = "one for each axis of x but the first" if cells else "(C,)"
        raise ValueError(f"{fn}: {PARAMETERS[0]} {of} has shape {shape}, expected {expected}")
    for what, a in zip(PARAMETERS, arrays, strict=True):
        if a.shape != shape:
            raise ValueError(f"{fn}: {what} {of} has shape {a.shape}, expected {shape}, the shape of scale")
    _check.not_negative(fn, f"input_var {of}", arrays[3])
    options: dict[str, Any] = {}
    for option, attribute, default in (("eps", "epsilon", 1e-5), ("momentum", "momentum", 0.9)):
        options[option] = float(np.float32(said[attribute].f if attribute in said else default))
    wide = any(a.dtype == np.float64 for a in arrays)
    layer = BatchNorm.like(
        "onnx", shape, axis=tuple(range(1, 1 + len(shape))) if len(shape) > 1 else 1,
        dtype=np.float64 if wide else np.float32, **options,
    )  # fmt: skip
    own = ("gamma", "beta", "running_mean", "running_var")
    layer.load_state_dict({**dict(zip(own, arrays, strict=True)), "num_batches_tracked": 0})
    if constants.opset >= 14:
        training = "training_mode" in said and bool(said["training_mode"].i)
    elif constants.opset >= 7:
        training = any(node.output[1:])
    else:
        training = not ("is_test" in said and said["is_test"].i)
    return layer.train(training)


def _loaded(fn: str, model: Any, external: bool) -> Any:
    """The ModelProto of a path or of bytes."""
    try:
        if isinstance(model, (str, os.PathLike)):
            found = onnx.load(os.fspath(model), load_external_data=external)
        else:
            found = onnx.load_model_from_string(bytes(model))
    except OSError:
        raise
    except Exception as error:  # of protobuf, of which there are several implementations; of the check of a path
        raise ValueError(f"{fn}: model cannot be read as an ONNX model: {error}") from error
    if not found.HasField("graph"):  # to protobuf no bytes at all are a message of defaults
        raise ValueError(f"{fn}: model cannot be read as an ONNX model: it has no graph")
    return found


# ---------------------------------------------------------------------------------------------------------- weights in


def to_onnx(
    layer: BatchNorm,
    shape: tuple[int | str | None, ...],
    *,
    name: str = "batch_norm",
    opset: int = 15,
    dtype: npt.DTypeLike | None = None,
    training: bool = False,
) -> Any:
    """A model of one layer: an input x, the node, its initializers, an output y.

    Parameters
    ----------
    layer : BatchNorm
        With running statistics. Its activation becomes a node of its own.
    shape : tuple
        Of x; None or a str for a length that is not known: ``(None, 64, None, None)``.
    name : str
        Of the node, and what the names of its initializers begin with.
    opset : int
        6 or higher; ONNX Runtime starts at 7.
    dtype : dtype, optional
        Of x and y: float16, bfloat16 (from opset 14 and onnx 1.19 on), float32 or float64. By default that of the
        layer. The parameters are in the layer's dtype where the opset lets them differ from x (mean and variance from
        14, the others from 15), else in this.
    training : bool
        Whether the node is in training; by default it is not, whatever the layer's mode. The running statistics
        are outputs then, `name` + ".running_mean" and ".running_var" (up to opset 13 also ".saved_mean" and
        ".saved_var").

    Returns
    -------
    onnx.ModelProto
        To be saved with ``onnx.save``, or to take ``model.graph.node`` and ``model.graph.initializer`` from: these are
        copies. ONNX has its channels on axis 1: where the layer's axis is another, Transpose nodes stand before and
        behind. Statistics for each cell (an axis of several, all but the first) become ``spatial=0``, which opset 9
        ended.

    Raises
    ------
    ValueError
        A layer without running statistics; another shape than it takes; axes that ONNX does not have; an unknown opset
        or dtype for it; a value beyond the dtype; in training, ``momentum=None`` or ``correction=1``, which ONNX does
        not have.
    TypeError
        `layer` is no BatchNorm; a dtype that is not floating; an argument of another type.

    Notes
    -----
    ONNX keeps eps and momentum as float32. An exact pool (``momentum=None``) becomes the statistics that it stands at.
    """
    fn = "to_onnx"
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"{fn}: layer is of type {type(layer).__name__}, expected a BatchNorm")
    if not isinstance(name, str):
        raise TypeError(f"{fn}: name is {_check.shown(name)}, expected a str")
    newest = onnx.defs.onnx_opset_version()
    if not 6 <= _check.count(fn, "opset", opset) <= newest:
        raise ValueError(f"{fn}: opset is {_check.shown(opset)}, expected 6 to {newest}")
    of_x = layer.dtype if dtype is None else _check.dtype(fn, "dtype", dtype)
    if not _check.floating(of_x):
        raise TypeError(f"{fn}: dtype is {of_x}, expected one of {', '.join(_check.FLOATS)}")
    if of_x.name == "bfloat16" and opset < 14:
        raise ValueError(f"{fn}: dtype is bfloat16 with opset={opset}, expected another, or opset 14 or higher")
    try:
        onnx.helper.np_dtype_to_tensor_dtype(of_x)
    except Exception as error:  # a KeyError or a ValueError
        raise ValueError(
            f"{fn}: dtype is {of_x}, expected another, or onnx 1.19; this is {onnx.__version__}"
        ) from error
    training = _check.flag(fn, "training", training)
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{fn}: layer keeps no running statistics, expected a layer with track_running_stats=True")
    attributes: dict[str, Any] = {"epsilon": _float32(fn, "eps", layer.eps)}
    if training and layer.momentum is None:
        raise ValueError(f"{fn}: layer has momentum=None, expected a number: ONNX does not pool")
    if training and layer.correction:
        raise ValueError(f"{fn}: layer has correction=1, expected 0: ONNX's running variance divides by n")
    if layer.momentum is not None:
        attributes["momentum"] = _float32(fn, "momentum", layer.momentum)
    outputs = ["running_mean", "running_var", "saved_mean", "saved_var"][: (2 if opset >= 14 else 4) * training]
    if training and opset >= 14:
        attributes["training_mode"] = 1
    if opset < 7:
        attributes["is_test"] = int(not training)
    order = _order(fn, layer, opset, shape)
    if len(layer.channels) > 1:
        attributes["spatial"] = 0

    helper = onnx.helper
    of_scale, of_mean = (layer.dtype if opset >= first else of_x for first in (15, 14))
    values: list[Array] = [
        np.ones(layer.channels) if layer.gamma is None else layer.gamma,
        np.zeros(layer.channels) if layer.beta is None else layer.beta,
        layer.running_mean,
        layer.running_var,
    ]
    initializers = [
        onnx.numpy_helper.from_array(_narrowed(fn, what, value, to), f"{name}.{what}")
        for what, value, to in zip(PARAMETERS, values, (of_scale, of_scale, of_mean, of_mean), strict=True)
    ]
    # The steps on the way from x to y, each with the names of its other inputs and outputs.
    steps: list[tuple[str, str, list[str], list[str], dict[str, Any]]] = [
        ("BatchNormalization", name, [t.name for t in initializers], [f"{name}.{o}" for o in outputs], attributes)
    ]
    if layer.activation == "relu":
        steps.append(("Relu", f"{name}.relu", [], [], {}))
    if order is not None:
        back = [order.index(i) for i in range(len(order))]
        steps.insert(0, ("Transpose", f"{name}.channels_second", [], [], {"perm": order}))
        steps.append(("Transpose", f"{name}.channels_back", [], [], {"perm": back}))
    nodes, last = [], "x"
    for i, (op, own, inputs, more, attribute) in enumerate(steps):
        result = "y" if i == len(steps) - 1 else f"{own}.y"
        nodes.append(helper.make_node(op, [last, *inputs], [result, *more], name=own, **attribute))
        last = result

    def info(which: str, dtype: np.dtype[Any], shape: Any) -> Any:
        return helper.make_tensor_value_info(which, helper.np_dtype_to_tensor_dtype(dtype), shape)

    results = [info("y", of_x, shape)]
    results += [info(f"{name}.{o}", of_x if "saved" in o else of_mean, layer.channels) for o in outputs]
    graph = helper.make_graph(nodes, name or "batch_norm", [info("x", of_x, shape)], results, initializers)
    opsets = [helper.make_opsetid("", opset)]
    # From version 4 on initializers need not be inputs.
    version = max(4, helper.find_min_ir_version_for(opsets))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="fastbn")
    onnx.checker.check_model(model)
    return model


def _order(fn: str, layer: BatchNorm, opset: int, shape: Any) -> list[int] | None:
    """The order of x's axes that brings the channels to axis 1; None if they are there."""
    expected = "a tuple of lengths: ints, or None or a str where one is not known"
    if not isinstance(shape, (tuple, list)) or not all(n is None or isinstance(n, (str, int)) for n in shape):
        raise TypeError(f"{fn}: shape is {_check.shown(shape)}, expected {expected}")
    if any(isinstance(n, int) and n < 0 for n in shape):
        raise ValueError(f"{fn}: shape is {_check.shown(shape)}, expected {expected}")
    axis = _check.axes(fn, layer.axis, tuple(shape))
    if any(isinstance(shape[a], int) and shape[a] != n for a, n in zip(axis, layer.channels, strict=True)):
        raise ValueError(f"{fn}: shape is {_check.shown(shape)}, expected the layer's channels {layer.channels}")
    if len(axis) == 1 and len(shape) > 1:
        order = [a for a in range(len(shape)) if a != axis[0]]
        order.insert(1, axis[0])
        return order if axis[0] != 1 else None
    if not axis or axis != tuple(range(1, len(shape))):
        raise ValueError(
            f"{fn}: layer has axis={layer.axis} for a shape of {len(shape)} axes, expected one of two axes or more, or "
            f"all but the first"
        )
    if opset >= 9:
        raise ValueError(
            f"{fn}: layer has axis={layer.axis} with opset={opset}, expected one axis, or opset 8 or lower: "
            f"statistics for each cell ended there"
        )
    return None


def _float32(fn: str, name: str, value: float) -> float:
    """A number that ONNX keeps as float32."""
    with np.errstate(all="ignore"):
        kept = float(np.float32(value))
    if (kept == 0) != (value == 0) or not np.isfinite(kept):
        raise ValueError(f"{fn}: layer has {name}={value!r}, expected a number that float32 can hold")
    return kept


def _narrowed(fn: str, name: str, value: Array, dtype: np.dtype[Any]) -> Array:
    """A parameter in another dtype, in which it must not become infinite."""
    with np.errstate(all="ignore"):
        narrow = value.astype(dtype)
        beyond = np.isfinite(value) & ~np.isfinite(narrow.astype(np.float64))
    if beyond.any():
        at = np.unravel_index(np.argmax(beyond), beyond.shape)
        raise ValueError(f"{fn}: {name} of the layer has {value[at]!s}, expected values that {dtype} can hold")
    return narrow
