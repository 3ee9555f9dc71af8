"""`BatchNorm.like` follows the systems: ten training steps and an inference of each, beside the system or its formula.

Everything is float64, so that rules are compared and not roundings; but Keras computes in float32, whatever it is
given. Batches differ in size from step to step, and one channel has a variance near eps. The case "one" has one value
per channel.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import pickle
import re
import tempfile
from pathlib import Path

import numpy as np
import pages
import pytest
from subprocesses import run_script

import fastbn
from fastbn.conventions import CONVENTIONS

C, STEPS = 3, 10
CASES = {"NC": (), "NCL": (5,), "NCHW": (3, 2), "one": None}
CLOSE = 1e-11


@functools.cache
def problem(case, axis):
    """The inputs of ten training steps and an inference."""
    rng = np.random.default_rng(sorted(CASES).index(case))
    batches = []
    for step in range(STEPS + 1):
        shape = (1, C) if case == "one" else (5 + 3 * (step % 3), C, *CASES[case])
        x = np.moveaxis(rng.normal(size=shape), 1, -1) * [1, 0.02, 3] + [0.5, -2, 1] * (1 + rng.normal(size=C))
        batches.append(np.ascontiguousarray(x if axis == -1 else np.moveaxis(x, -1, 1)))
    return batches


GAMMA, BETA = np.array([1.5, -0.7, 0.2]), np.array([0.3, 2.0, -1.0])


# ------------------------------------------------------------------------------------------------- systems by formula
# Each yields (y, running mean, running variance) of every step, those of the inference last.


def statistics(x, axis):
    """(n, mean, variance divided by n) over all axes but one, in plain two passes."""
    rows = np.moveaxis(x, axis, -1).reshape(-1, C)
    mean = rows.sum(0) / len(rows)
    return len(rows), mean, ((rows - mean) ** 2).sum(0) / len(rows)


def affine(x, mean, var, eps, axis, gamma=1.0, beta=0.0):
    return np.moveaxis((np.moveaxis(x, axis, -1) - mean) / np.sqrt(var + eps) * gamma + beta, -1, axis)


def averaged(batches, axis, eps, keep, var, factor, gamma, beta):
    """A moving average of the batch's mean, and of its variance times factor(n)."""
    mean, var = np.zeros(C), np.full(C, var)
    for x in batches[:-1]:
        n, m, v = statistics(x, axis)
        mean = keep * mean + (1 - keep) * m
        var = keep * var + (1 - keep) * factor(n) * v
        yield affine(x, m, v, eps, axis, gamma, beta), mean, var
    yield affine(batches[-1], mean, var, eps, axis, gamma, beta), mean, var


def chainer(batches):
    """chainer/functions/normalization/batch_normalization.py, the generic branch: adjust = m / max(m - 1., 1.).

    chainer/links/normalization/batch_normalization.py: decay=0.9, eps=2e-5, avg_var from 1 (before 5.0 from 0).
    """
    return averaged(batches, 1, 2e-5, 0.9, 1.0, lambda m: m / max(m - 1.0, 1.0), GAMMA, BETA)


def keras1(batches):
    """keras/layers/normalization.py 1.2.2, mode 0, on TensorFlow: tf.nn.moments, and `running_std` is the variance."""
    return averaged(batches, -1, 1e-3, 0.99, 1.0, lambda m: 1.0, GAMMA, BETA)


def tf_contrib(batches):
    """tensorflow/contrib/layers/python/layers/layers.py, not fused: tf.nn.moments; no gamma, since scale=False."""
    return averaged(batches, -1, 1e-3, 0.999, 1.0, lambda m: 1.0, 1.0, BETA)


def cs231n(batches):
    """Assignment 2, cs231n/layers.py: the running values are np.zeros at first, the sample variance is uncorrected.

    An array of more axes becomes rows of channels first, as in its spatial_batchnorm_forward.
    """
    return averaged(batches, 1, 1e-5, 0.9, 0.0, lambda m: 1.0, GAMMA, BETA)


def caffe(batches, fraction=0.999):
    """src/caffe/layers/batch_norm_layer.cpp: blobs[0] and [1] are sums, which blobs[2] divides; no gamma, no beta."""
    mean, var, scale = np.zeros(C), np.zeros(C), 0.0
    for x in batches[:-1]:
        n, m, v = statistics(x, 1)
        scale = scale * fraction + 1
        mean = mean * fraction + m
        var = var * fraction + (n / (n - 1) if n > 1 else 1) * v
        yield affine(x, m, v, 1e-5, 1), mean / scale, var / scale
    yield affine(batches[-1], mean / scale, var / scale, 1e-5, 1), mean / scale, var / scale


def paper(batches):
    """Algorithm 1, and the population's statistics that Algorithm 2 estimates: here those of all samples, m / (m - 1).

    Algorithm 2 averages the batches' variances, which leaves out how far their means are apart.
    """
    for i, x in enumerate(batches):
        seen = batches[: i + 1] if i < STEPS else batches[:-1]
        n, mean, var = statistics(np.concatenate(seen), 1)
        _, m, v = statistics(x, 1) if i < STEPS else (n, mean, var * n / (n - 1))
        yield affine(x, m, v, 1e-5, 1, GAMMA, BETA), mean, var * n / (n - 1)


# -------------------------------------------------------------------------------------------------- installed systems


def torch_module(x):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[x.ndim]
    return torch, kind(C)


def pytorch(batches):
    torch, bn = torch_module(batches[0])
    bn.double()
    with torch.no_grad():
        bn.weight[:], bn.bias[:] = torch.from_numpy(GAMMA), torch.from_numpy(BETA)
        for i, x in enumerate(batches):
            y = bn.train(i < STEPS)(torch.from_numpy(x))
            yield y.numpy(), bn.running_mean.numpy().copy(), bn.running_var.numpy().copy()


@functools.cache
def onnx_session(training):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: nothing to compare with")
    helper = pytest.importorskip("onnx", reason="onnx is not installed: it builds the graph").helper
    inputs, outputs = ["X", "scale", "B", "input_mean", "input_var"], ["Y", "running_mean", "running_var"]
    node = helper.make_node("BatchNormalization", inputs, outputs[: 3 if training else 1], training_mode=int(training))
    values = [[helper.make_tensor_value_info(n, 11, None) for n in names] for names in (inputs, node.output)]
    graph = helper.make_graph([node], "batch_norm", *values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def onnx(batches):
    mean, var = np.zeros(C), np.ones(C)
    for i, x in enumerate(batches):
        given = {"X": x, "scale": GAMMA, "B": BETA, "input_mean": mean, "input_var": var}
        y, *moved = onnx_session(i < STEPS).run(None, given)
        mean, var = moved or (mean, var)
        yield y, mean, var


BEGIN = """
import json, sys
import numpy as np
given, found, facts = np.load(sys.argv[1]), {}, {}
gamma, beta, steps = given["gamma"], given["beta"], int(given["steps"])
cases = sorted({k.split(".")[0] for k in given if "." in k})
def keep(system, case, i, *values):
    found.update({f"{system}.{case}.{i}.{j}": np.asarray(v, np.float64) for j, v in enumerate(values)})
"""
END = """
np.savez(sys.argv[2], **found)
print(json.dumps(facts))
"""
KERAS = """
import keras
first = keras.layers.BatchNormalization()
first.build((None, 3))
facts["keras"] = {
    "axis": first.axis, "eps": first.epsilon, "momentum": first.momentum, "center": first.center, "scale": first.scale,
    "running_mean": np.unique(first.moving_mean.numpy()).item(),
    "running_var": np.unique(first.moving_variance.numpy()).item(), "weights": [w.name for w in first.weights],
}
for case in cases:
    bn = keras.layers.BatchNormalization(dtype="float64")
    bn.build((None,) * (given[f"{case}.0"].ndim - 1) + (3,))
    bn.gamma.assign(gamma)
    bn.beta.assign(beta)
    for i in range(steps + 1):
        y = bn(given[f"{case}.{i}"], training=i < steps)
        keep("keras", case, i, y, bn.moving_mean.numpy(), bn.moving_variance.numpy())
"""
FLAX = """
import dataclasses, inspect
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import flax
from flax import linen, nnx
wide = dict(dtype=jnp.float64, param_dtype=jnp.float64)
defaults = {f.name: f.default for f in dataclasses.fields(linen.BatchNorm)}
signature = {k: p.default for k, p in inspect.signature(nnx.BatchNorm.__init__).parameters.items()}
variables = linen.BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((2, 3)))
module = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
for system, names, mean, var in (
    ("linen", defaults, *(variables["batch_stats"][k] for k in ("mean", "var"))),
    ("nnx", signature, module.mean[...], module.var[...]),
):
    facts[system] = {
        "axis": names["axis"], "eps": names["epsilon"], "momentum": names["momentum"], "center": names["use_bias"],
        "scale": names["use_scale"], "running_mean": np.unique(mean).item(), "running_var": np.unique(var).item(),
    }
facts["linen"]["weights"] = {k: sorted(v) for k, v in variables.items()}
facts["nnx"]["weights"] = [k for k in ("scale", "bias", "mean", "var") if hasattr(module, k)]
for case in cases:
    bn = linen.BatchNorm(force_float32_reductions=False, **wide)
    state = {"params": {"scale": gamma, "bias": beta}, "batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}
    other = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **wide)
    other.scale, other.bias = nnx.Param(jnp.asarray(gamma)), nnx.Param(jnp.asarray(beta))
    other.mean, other.var = nnx.BatchStat(jnp.zeros(3)), nnx.BatchStat(jnp.ones(3))
    for i in range(steps + 1):
        x, fixed = jnp.asarray(given[f"{case}.{i}"]), i == steps
        y, moved = bn.apply(state, x, use_running_average=fixed, mutable=["batch_stats"])
        state = {**state, **moved}
        keep("linen", case, i, y, *(moved["batch_stats"][k] for k in ("mean", "var")))
        keep("nnx", case, i, other(x, use_running_average=fixed), other.mean[...], other.var[...])
"""


@functools.cache
def elsewhere(package):
    """What a script says of its systems, which live in another process: their threads do not survive a fork."""
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed: nothing to compare with")
    script = {"keras": KERAS, "flax": FLAX}[package]
    with tempfile.TemporaryDirectory() as folder:
        given = {f"{case}.{i}": x for case in CASES for i, x in enumerate(problem(case, -1))}
        np.savez(f"{folder}/in.npz", gamma=GAMMA, beta=BETA, steps=STEPS, **given)
        env = {"KERAS_BACKEND": "numpy", "KERAS_HOME": folder, "JAX_PLATFORMS": "cpu"}
        printed = run_script(BEGIN + script + END, f"{folder}/in.npz", f"{folder}/out.npz", **env)
        with np.load(f"{folder}/out.npz") as found:
            return json.loads(printed.splitlines()[-1]), dict(found)


def far(system, package):
    def trace(batches):
        case = next(case for case in CASES if problem(case, -1) is batches)
        found = elsewhere(package)[1]
        return [[found[f"{system}.{case}.{i}.{j}"] for j in range(3)] for i in range(STEPS + 1)]

    return trace


# System: the convention it has, and what it computes.
SYSTEMS = {
    "torch": ("torch", pytorch),
    "keras": ("keras", far("keras", "keras")),
    "keras1": ("keras1", keras1),
    "tf.contrib": ("tf.contrib", tf_contrib),
    "onnx": ("onnx", onnx),
    "flax linen": ("flax", far("linen", "flax")),
    "flax nnx": ("flax", far("nnx", "flax")),
    "chainer": ("chainer", chainer),
    "caffe": ("caffe", caffe),
    "cs231n": ("cs231n", cs231n),
    "paper": ("paper", paper),
}
# epsilon and momentum are float32 numbers there.
ROUNDED = {"onnx": {name: float(np.float32(getattr(CONVENTIONS["onnx"], name))) for name in ("eps", "momentum")}}
# How close y and the running statistics come, else CLOSE. Keras has E[x**2] - E[x]**2 in float32: of a variance near
# 4e-4 beside a mean of 2 three digits are left.
WITHIN = {"keras": (1e-3, 1e-6)}


@functools.cache
def traced(system, case):
    """[(y, running mean, running variance)] of the system; those of the inference last."""
    name, run = SYSTEMS[system]
    batches = problem(case, CONVENTIONS[name].axis)
    return [tuple(np.array(a, np.float64) for a in step) for step in run(batches)]


def like(system, **options):
    bn = fastbn.BatchNorm.like(SYSTEMS[system][0], C, dtype="float64", **options)
    if bn.gamma is not None:
        bn.gamma[:] = GAMMA
    if bn.beta is not None:
        bn.beta[:] = BETA
    return bn


def compare(bn, system, case, close=None):
    of_y, of_statistics = close or WITHIN.get(system, (CLOSE, CLOSE))
    for i, (x, step) in enumerate(zip(problem(case, bn.axis), traced(system, case), strict=True)):
        y = bn.train(i < STEPS)(x)
        step_is = f"{'step' if i < STEPS else 'inference'} {i}"
        for what, found, expected in zip(("y", "mean", "var"), (y, bn.running_mean, bn.running_var), step, strict=True):
            tolerance = of_y if what == "y" else of_statistics
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=f"{what} of {step_is}")


def test_every_convention_has_its_system():
    assert {name for name, _ in SYSTEMS.values()} == set(CONVENTIONS)


@pytest.mark.parametrize("case", [case for case in CASES if case != "one"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_ten_steps_and_an_inference(system, case):
    compare(like(system, **ROUNDED.get(system, {})), system, case)
    if system in ROUNDED:
        compare(like(system), system, case, close=(1e-6, 1e-6))


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_value_per_channel(system):
    """y is beta and the variance 0 where a system takes it; a ValueError where it does not."""
    name, _ = SYSTEMS[system]
    if CONVENTIONS[name].single:
        compare(like(system, **ROUNDED.get(system, {})), system, "one")
        y, tolerance = traced(system, "one")[0][0][0], WITHIN.get(system, (CLOSE,))[0]
        np.testing.assert_allclose(y, BETA if CONVENTIONS[name].center else np.zeros(C), atol=tolerance)
        return
    bn = like(system)
    before = {k: np.asarray(v).tobytes() for k, v in bn.state_dict().items()}
    with pytest.raises(ValueError, match="one value per channel"):
        bn(problem("one", bn.axis)[0])
    assert {k: np.asarray(v).tobytes() for k, v in bn.state_dict().items()} == before
    if system == "torch":
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            traced(system, "one")


WRONG = {
    "eps": lambda c: {"eps": 1.5 * c.eps},
    "momentum": lambda c: {"momentum": 0.5 if c.momentum is None else 1 - c.momentum},
    "correction": lambda c: {"correction": 1 - c.correction},
    "center": lambda c: {"center": not c.center},
    "scale": lambda c: {"scale": not c.scale},
    "running_mean": None,
    "running_var": None,
}


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_wrong_rule_would_be_noticed(system, field):
    convention = CONVENTIONS[SYSTEMS[system][0]]
    if WRONG[field]:
        bn = like(system, **{**ROUNDED.get(system, {}), **WRONG[field](convention)})
    else:
        bn = like(system, **ROUNDED.get(system, {}))
        getattr(bn, field)[:] += 1e-3
        if convention.momentum is None or convention.debias:  # nothing remains of what they start from
            compare(bn, system, "NCHW")
            return
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(bn, system, "NCHW")


# ------------------------------------------------------------------------------------------------ defaults and weights


def torch_facts():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    bn = torch.nn.BatchNorm2d(C)
    return {
        "eps": bn.eps, "momentum": 1 - bn.momentum, "center": bn.bias is not None, "scale": bn.weight is not None,
        "running_mean": bn.running_mean.unique().item(), "running_var": bn.running_var.unique().item(),
        "weights": list(bn.state_dict()),
    }  # fmt: skip


def onnx_facts():
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: nothing to compare with")
    schema = onnx.defs.get_schema("BatchNormalization", 15)
    found = {name: schema.attributes[name].default_value.f for name in ("epsilon", "momentum")}
    assert found == {name: np.float32(found[name]) for name in found}
    return {
        "eps": float(f"{found['epsilon']:.6g}"), "momentum": float(f"{found['momentum']:.6g}"),
        "weights": [i.name for i in schema.inputs[1:]],
    }  # fmt: skip


FACTS = {
    "torch": torch_facts,
    "onnx": onnx_facts,
    "keras": lambda: elsewhere("keras")[0]["keras"],
    "flax linen": lambda: elsewhere("flax")[0]["linen"],
    "flax nnx": lambda: elsewhere("flax")[0]["nnx"],
}


@pytest.mark.parametrize("system", FACTS)
def test_defaults_are_those_of_the_installed_system(system):
    found = {k: v for k, v in FACTS[system]().items() if k != "weights"}
    assert {"eps", "momentum"} <= found.keys()
    convention = dataclasses.asdict(CONVENTIONS[SYSTEMS[system][0]])
    assert found == {k: convention[k] for k in found}


# ------------------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_layer_has_the_options_of_its_convention(name):
    convention, bn = CONVENTIONS[name], fastbn.BatchNorm.like(name, C)
    for option in ("axis", "eps", "momentum", "correction"):
        assert getattr(bn, option) == getattr(convention, option), option
    assert (bn.beta is not None, bn.gamma is not None) == (convention.center, convention.scale)
    np.testing.assert_array_equal(bn.running_mean, [convention.running_mean] * C)
    np.testing.assert_array_equal(bn.running_var, [convention.running_var] * C)
    assert bn.training
    assert bn.dtype == np.float32
    assert repr(bn) == f"BatchNorm.like({name!r}, {C})"


@pytest.mark.parametrize("name", CONVENTIONS)
def test_options_override(name):
    options = {"axis": -2, "eps": 0.25, "momentum": 0.75, "correction": 0, "center": False, "scale": True}
    bn = fastbn.BatchNorm.like(name, (C,), activation="relu", dtype="float64", **options)
    assert {k: getattr(bn, k) for k in ("axis", "eps", "momentum", "correction")} == {
        k: options[k] for k in ("axis", "eps", "momentum", "correction")
    }
    assert (bn.beta, bn.activation, bn.dtype, bn.gamma.shape) == (None, "relu", np.float64, (C,))
    assert fastbn.BatchNorm.like(name, C, track_running_stats=False).running_var is None


def test_an_override_counts_in_training():
    bn, x = fastbn.BatchNorm.like("torch", C, momentum=0.99), problem("NC", 1)[0]
    bn(x)
    np.testing.assert_allclose(bn.running_mean, 0.01 * x.mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("Torch", C), {}, ValueError, ["BatchNorm.like", "system", "'Torch'", "'torch'", "'paper'"]),
        ((None, C), {}, TypeError, ["BatchNorm.like", "system", "None", "'torch'"]),
        (("keras", C), {"epsilon": 1e-3}, TypeError, ["epsilon"]),
        (("torch", C), {"momentum": 1.5}, ValueError, ["BatchNorm", "momentum", "1.5"]),
        (("torch", 0), {}, ValueError, ["BatchNorm", "channels", "0"]),
    ],
)
def test_what_is_unknown_is_refused(arguments, options, error, words):
    with pytest.raises(error) as caught:
        fastbn.BatchNorm.like(*arguments, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def again(bn):
    return eval(repr(bn), {"BatchNorm": fastbn.BatchNorm})


def from_state(bn):
    return again(bn).load_state_dict(bn.state_dict())


def same_bits(a, b):
    one, other = (bn.state_dict() for bn in (a, b))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.asarray(value).tobytes() == np.asarray(other[name]).tobytes(), name


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn)), from_state])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_copy_goes_on_with_the_same_bits(name, clone):
    """Whatever it was copied by, it follows the same rules: that for one value per channel and Caffe's among them."""
    bn = fastbn.BatchNorm.like(name, C, eps=1e-4)
    xs = problem("NCL", bn.axis)
    for x in xs[:4]:
        bn(x)
    other = clone(bn)
    same_bits(other, bn)
    rest = [*xs[4:], *(problem("one", bn.axis) if CONVENTIONS[name].single else ())]
    for x in rest:
        np.testing.assert_array_equal(other(x), bn(x))
        same_bits(other, bn)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5, "scale": True, "center": False}, {"axis": 0, "correction": 0}]
)
@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_repr_makes_an_equal_layer(name, options):
    bn = fastbn.BatchNorm.like(name, C, dtype="float64", activation="relu", **options)
    other = again(bn)
    assert repr(other) == repr(bn)
    same_bits(other, bn)
    own = {k: v for k, v in vars(bn).items() if not isinstance(v, (np.ndarray, fastbn.Moments))}
    assert {k: vars(other)[k] for k in own} == own


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.999, 1.0])
def test_caffe_goes_on_after_a_state_is_loaded(fraction):
    """The number of batches is all that the sums need: with fraction 1 they are plain averages of the batches."""
    batches, bn = problem("NCHW", 1), fastbn.BatchNorm.like("caffe", C, momentum=fraction, dtype="float64")
    for i, (x, (_, mean, var)) in enumerate(zip(batches[:-1], caffe(batches, fraction), strict=False)):
        if i == 5:
            bn = fastbn.BatchNorm.like("caffe", C, momentum=fraction, dtype="float64").load_state_dict(bn.state_dict())
        bn(x)
        np.testing.assert_allclose(bn.running_mean, mean, rtol=CLOSE)
        np.testing.assert_allclose(bn.running_var, var, rtol=CLOSE)


def test_the_papers_population_is_that_of_all_samples():
    """Algorithm 2 as it is printed has the same mean, of equal batches, and a smaller variance."""
    rng = np.random.default_rng(0)
    batches, bn = rng.normal([0, 1, 2], size=(6, 4, C)), fastbn.BatchNorm.like("paper", C)
    for x in batches:
        bn(x)
    np.testing.assert_allclose(bn.running_mean, batches.mean((0, 1)), rtol=CLOSE)
    np.testing.assert_allclose(bn.running_var, batches.reshape(-1, C).var(0, ddof=1), rtol=CLOSE)
    printed, between = batches.var(1).mean(0) * 4 / 3, batches.mean(1).var(0)
    np.testing.assert_allclose(bn.running_var, (printed * 3 / 4 + between) * 24 / 23, rtol=CLOSE)


# ------------------------------------------------------------------------------------------------------------- the page

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "conventions.md"


def tables():
    """The page's tables: {first cell, without quotes: {column: cell}}."""
    for block in re.findall(r"((?:^\|.*\|\n)+)", PAGE.read_text(), re.M):
        head, _, *rows = ([cell.strip() for cell in line[1:-2].split("|")] for line in block.splitlines(keepends=True))
        yield {row[0].strip('`"'): dict(zip(head, row, strict=True)) for row in rows}


def rules(convention):
    """The cells of a row of the page's first table."""
    yes = {True: "yes", False: "no"}
    return {
        "axis": str(convention.axis),
        "eps": f"{convention.eps:g}",
        "momentum here": str(convention.momentum),
        "running variance": ("biased", "unbiased")[convention.correction],
        "starts from": f"{convention.running_mean:g}, {convention.running_var:g}",
        "center": yes[convention.center],
        "scale": yes[convention.scale],
        "one value per channel": "y is beta" if convention.single else "ValueError",
        "leaves the start out": yes[convention.debias],
    }


def test_the_table_of_rules_is_that_of_the_module():
    page, _ = tables()
    assert list(page) == list(CONVENTIONS)
    for name, convention in CONVENTIONS.items():
        cells = page[name]
        assert {k: cells[k] for k in rules(convention)} == rules(convention), name
        assert set(cells) == {"system", "momentum there", *rules(convention)}


def test_momentum_in_the_words_of_the_system_is_the_same_number():
    page, _ = tables()
    for name, convention in CONVENTIONS.items():
        found = re.fullmatch(r"`[a-z_]+` ([0-9.]+), of the (old|new)", page[name]["momentum there"])
        if convention.momentum is None:
            assert page[name]["momentum there"] == "none"
        else:
            assert convention.momentum == (float(found[1]) if found[2] == "old" else 1 - float(found[1])), name


def test_the_table_of_weights_names_every_source():
    _, page = tables()
    assert list(page) == list(CONVENTIONS)
    assert {name: page[name]["read in"] for name in page} == {name: c.source for name, c in CONVENTIONS.items()}
    assert all(len(row["mind"]) > 20 for row in page.values())


@pytest.mark.parametrize("system", FACTS)
def test_weights_are_named_as_in_the_installed_system(system):
    _, page = tables()
    cell = page[SYSTEMS[system][0]]["weights, in its order"]
    weights = FACTS[system]()["weights"]
    if isinstance(weights, dict):  # in two collections
        found = {k: sorted(re.findall(r"`(\w+)`", cell.split(f"`{k}`: ")[1].split(";")[0])) for k in weights}
        assert found == weights
    else:
        names = re.findall(r"`(\w+)`", cell)
        assert [n for n in names if n in weights] == weights
        assert set(names) - set(weights) <= {"params", "batch_stats"}


def test_the_code_of_the_page_prints_what_its_comments_say():
    pages.check("reference/conventions.md")
