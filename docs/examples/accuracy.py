"""How many digits are right: the largest errors of fastbn's results, beside those of other systems on the same data.

Every error is in *units*: one unit is the distance between neighbouring numbers of the data's dtype (an ulp) at the
size of the exact result, or of what it is made of if that is larger:

    unit = ulp(max(abs(exact), terms))        terms = the root of the sum of the squares of the formula's terms

Without `terms` a result that happens to be near 0 would be blamed for the rounding of numbers that are not. They are

mean      the standard deviation: x, which the mean is subtracted from, differs from it by so much
var       eps, which is added to it
y         gamma * xhat and beta; of the element or r.m.s. over the channel, whichever is larger
dx        gamma * invstd times dy, sum(dy) / n and xhat * sum(dy * xhat) / n; as for y
dgamma    dy * xhat, for all of the channel
dbeta     dy, for all of the channel

and where all of these are 0, as for the dgamma of a constant channel, the unit is ulp(1).

Rounding the exact result costs half a unit. What is exact is computed from the stored values in long double, from
distances to the channel's mean: on x86 it has 11 bits more than float64, which leaves three digits of the error of a
float64 result. Where long double is float64, float64 data is left out.

It takes about a minute.

    python docs/examples/accuracy.py
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes  # np.dtype("bfloat16")
import numpy as np
import report

import fastbn

EPS = float(np.float32(1e-5))  # in float64, too, what an ONNX model can store
WIDE = np.longdouble
DTYPES = ("float32", "float64")
LAYOUTS = ("NCHW", "NHWC")
STATISTICS, OUTPUT, GRADIENTS = ("mean", "var"), ("y",), ("dx", "dgamma", "dbeta")
TRAINING = STATISTICS + OUTPUT + GRADIENTS
INFERENCE = "y, inference"


# -------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """What x looks like. `values` makes it from standard normal z of shape (channels, n), sign and index i."""

    name: str
    values: Callable
    shape: tuple[int, ...] = (32, 8, 14, 14)
    ordinary: bool = False
    dtypes: tuple[str, ...] = DTYPES
    beta: bool = True

    def small(self):
        """The same with less of it, and of one shape, for which JAX compiles once."""
        shape = (6, 3, 4, 7) if self.shape[0] > 2 else (2, 3, 1, 1)
        return replace(self, shape=shape)


def near(size, std=1.0):
    """Values whose mean is some `size`, another one in each channel."""
    return lambda z, i, dtype: size * np.linspace(1, 1.9, len(z))[:, None] + std * z


def _normal(z, i, dtype):
    return z


CASES = (
    Case("normal 56x56", _normal, (32, 8, 56, 56), True),
    Case("normal 14x14", _normal, (32, 32, 14, 14), True),
    Case("normal 7x7", _normal, (32, 64, 7, 7), True),
    Case("n = 2", _normal, (2, 64, 1, 1)),
    Case("mean 10", near(10)),
    Case("mean 1e3", near(1e3)),
    Case("mean 1e3, std 0.1", near(1e3, 0.1)),
    Case("mean 1e6", near(1e6)),
    Case("mean 1e8", near(1e8), dtypes=("float64",)),
    Case("outlier first", lambda z, i, dtype: np.where(i == 0, 1e6, z)),
    Case("step", lambda z, i, dtype: np.where(2 * i < i.size, 1e6, -1e6) + z),
    Case("ramp", lambda z, i, dtype: 1e4 * (1 + np.arange(len(z))[:, None]) + i),
    Case("constant", lambda z, i, dtype: 10 * z[:, :1] + 0 * i),
    Case("tiny var", lambda z, i, dtype: 1 + 1e-4 * z),
    Case("huge", lambda z, i, dtype: {"float32": 1e30, "float64": 1e150}[dtype] * z),
    # Their y is subnormal or nearly so, and only without a beta can it be seen.
    Case("subnormal", lambda z, i, dtype: 2.0**-10 * float(np.finfo(dtype).smallest_normal) * z, beta=False),
)


class Data:
    """A case in a dtype: x and dy by channel, (channels, n), and gamma and beta."""

    def __init__(self, case, dtype):
        samples, channels, height, width = self.shape = case.shape
        n = samples * height * width
        rng = np.random.default_rng(20150211)
        z, noise = rng.standard_normal((2, channels, n))
        values = case.values(z, np.arange(n), dtype)
        self.dtype = np.dtype(dtype)
        self.x = values.astype(dtype)
        # Gradients that both of their means take part in: not 0, and correlated with x.
        centred = values / abs(values).max() - (values / abs(values).max()).mean(axis=1, keepdims=True)
        std = np.sqrt((centred**2).mean(axis=1, keepdims=True))
        self.dy = (0.3 + noise + 0.5 * centred / np.where(std > 1e-12, std, 1)).astype(dtype)
        self.gamma = rng.uniform(0.5, 1.5, channels).astype(dtype)
        self.beta = (case.beta * rng.standard_normal(channels)).astype(dtype)
        self.exact = truth(self)
        with np.errstate(over="ignore"):  # the variance of huge values
            self.mean, self.var = (self.exact[name][0][:, 0].astype(dtype) for name in STATISTICS)  # for inference
        if np.isfinite(self.var).all():
            self.exact[INFERENCE] = inference_truth(self)

    def lay(self, by_channel, layout):
        """Values by channel as a C-contiguous NCHW or NHWC array."""
        n, c, h, w = self.shape
        return np.ascontiguousarray(
            by_channel.reshape(c, n, h, w).transpose((1, 0, 2, 3) if layout == "NCHW" else (1, 2, 3, 0))
        )

    def by_channel(self, result, layout):
        """The inverse of `lay`; of a value per channel, a column."""
        result = np.asarray(result)
        if result.size == self.x.size:
            result = np.moveaxis(result, 1 if layout == "NCHW" else -1, 0)
        return result.reshape(self.shape[1], -1)


# -------------------------------------------------------------------------------------------------------------- exact


def truth(d):
    """{result: (what is exact, a unit of its error)} of a training forward and backward, in long double."""
    n = d.x.shape[1]

    def mean_of(a):
        return a.sum(axis=1, dtype=WIDE, keepdims=True) / n

    # Distances from a value near the mean: their rounding errors are of their own size, not of the mean's.
    pivot = d.x[:, :1] + (d.x.astype(np.float64) - d.x[:, :1]).mean(axis=1, keepdims=True)
    distance = d.x.astype(WIDE) - pivot
    rest = mean_of(distance)
    centred = distance - rest
    mean, var = pivot + rest, mean_of(centred**2)
    xhat = centred / np.sqrt(var + EPS)
    g, scale = d.dy.astype(WIDE), d.gamma[:, None] / np.sqrt(var + EPS)
    products = g * xhat
    through_mean, through_var = mean_of(g), mean_of(products)
    terms = g**2 + through_mean**2 + (xhat * through_var) ** 2
    return {
        "mean": _with_unit(mean, np.sqrt(var), d.dtype),
        "var": _with_unit(var, WIDE(EPS), d.dtype),
        "y": _output(d, xhat),
        "dx": _with_unit(scale * (g - through_mean - xhat * through_var), scale * _root(terms), d.dtype),
        "dgamma": _with_unit(n * through_var, np.sqrt(n * mean_of(products**2)), d.dtype),
        "dbeta": _with_unit(n * through_mean, np.sqrt(n * mean_of(g**2)), d.dtype),
    }


def inference_truth(d):
    """The same for y from the statistics as they are given: rounded to the dtype."""
    return _output(d, (d.x.astype(WIDE) - d.mean[:, None]) / np.sqrt(d.var[:, None].astype(WIDE) + EPS))


def _output(d, xhat):
    term, beta = d.gamma[:, None] * xhat, d.beta[:, None].astype(WIDE)
    return _with_unit(term + beta, _root(term**2 + beta**2), d.dtype)


def _root(squares):
    """Of an element's terms, or r.m.s. over the channel."""
    return np.sqrt(np.maximum(squares, squares.mean(axis=1, keepdims=True)))


def _with_unit(exact, terms, dtype):
    info = ml_dtypes.finfo(dtype)
    size = np.maximum(abs(exact), terms)
    _, exponent = np.frexp(np.where(size == 0, WIDE(1), size))
    return exact, np.ldexp(WIDE(1), np.maximum(exponent - 1, info.minexp) - info.nmant)


def error(found, exact, unit):
    """The largest error in units; NaN if any is."""
    return float((abs(found - exact) / unit).max())


# ------------------------------------------------------------------------------------------------------------ systems
# Each has `results`: {result: array} for what it offers, with x and dy in the given layout.


class FastBN:
    """What is measured."""

    name, offers = "fastbn", (*TRAINING, INFERENCE)

    def results(self, d, layout):
        """Through the verbs."""
        axis = 1 if layout == "NCHW" else -1
        x = d.lay(d.x, layout)
        y, saved = fastbn.batch_norm_train(x, d.gamma, d.beta, axis=axis, eps=EPS)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(d.lay(d.dy, layout), saved)
        inference = fastbn.batch_norm(x, d.mean, d.var, d.gamma, d.beta, axis=axis, eps=EPS)
        return named(saved.mean, saved.var, y, dx, dgamma, dbeta, inference)


class NumPy:
    """The formula as most people write it: two passes, in the dtype of the data; the backward of CS231n."""

    name, offers = "NumPy", (*TRAINING, INFERENCE)

    def results(self, d, layout):
        """Without a warning where float32 overflows."""
        axes, per_channel = ((0, 2, 3), (-1, 1, 1)) if layout == "NCHW" else ((0, 1, 2), (-1,))
        x, dy, n = d.lay(d.x, layout), d.lay(d.dy, layout), d.x.shape[1]
        gamma, beta = d.gamma.reshape(per_channel), d.beta.reshape(per_channel)
        with np.errstate(all="ignore"):
            mean, var = np.mean(x, axis=axes, keepdims=True), np.var(x, axis=axes, keepdims=True)
            invstd = 1 / np.sqrt(var + EPS)
            xhat = (x - mean) * invstd
            y = gamma * xhat + beta
            dgamma, dbeta = np.sum(dy * xhat, axis=axes, keepdims=True), np.sum(dy, axis=axes, keepdims=True)
            dx = gamma * invstd / n * (n * dy - dbeta - xhat * dgamma)
            given_mean, given_var = d.mean.reshape(per_channel), d.var.reshape(per_channel)
            inference = gamma * ((x - given_mean) / np.sqrt(given_var + EPS)) + beta
        return named(mean, var, y, dx, dgamma, dbeta, inference)


class PyTorch:
    """`torch.nn.functional.batch_norm` and autograd; NHWC is its channels_last memory format."""

    name, offers = "PyTorch", (*TRAINING, INFERENCE)

    def __init__(self):
        import torch

        self.torch = torch

    def results(self, d, layout):
        """The statistics are those it would keep running; their variance is divided by n - 1."""
        torch, n = self.torch, d.x.shape[1]
        batch_norm = torch.nn.functional.batch_norm
        x, dy = (self._tensor(d.lay(a, layout), layout) for a in (d.x, d.dy))
        given = [torch.tensor(a) for a in (d.mean, d.var, d.gamma, d.beta)]
        inference = batch_norm(x, *given, eps=EPS)
        gamma, beta = (t.clone().requires_grad_() for t in given[2:])
        mean, var = torch.zeros_like(given[0]), torch.zeros_like(given[1])
        x.requires_grad_()
        y = batch_norm(x, mean, var, gamma, beta, training=True, momentum=1.0, eps=EPS)
        y.backward(dy)
        y, dx, inference = (self._array(t, layout) for t in (y, x.grad, inference))
        mean, var, dgamma, dbeta = map(np.asarray, (mean, var, gamma.grad, beta.grad))
        return named(mean, var.astype(WIDE) * (n - 1) / n, y, dx, dgamma, dbeta, inference)

    def _tensor(self, a, layout):
        tensor = self.torch.from_numpy(a)
        return tensor if layout == "NCHW" else tensor.permute(0, 3, 1, 2)

    def _array(self, tensor, layout):
        return np.asarray((tensor if layout == "NCHW" else tensor.permute(0, 2, 3, 1)).detach())


class Jax:
    """The formula compiled by JAX, with the variance as Flax has it, max(0, E[x²] - E[x]²); gradients by `jax.vjp`."""

    name, offers = "JAX", (*TRAINING, INFERENCE)

    def __init__(self):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax

        jax.config.update("jax_enable_x64", True)  # else float64 becomes float32

        def infer(x, mean, var, gamma, beta):
            return (x - mean) * (gamma * jax.lax.rsqrt(var + EPS)) + beta

        def train(x, dy, gamma, beta):
            axes = tuple(i for i in range(4) if i != gamma.shape.index(gamma.size))

            def forward(x, gamma, beta):
                mean = x.mean(axes, keepdims=True)
                var = jax.numpy.maximum(0, (x * x).mean(axes, keepdims=True) - mean * mean)
                return infer(x, mean, var, gamma, beta), (mean, var)

            y, pullback, statistics = jax.vjp(forward, x, gamma, beta, has_aux=True)
            return (*statistics, y, *pullback(dy))

        self.train, self.infer = jax.jit(train), jax.jit(infer)

    def results(self, d, layout):
        """Forward and backward in one compiled function, as in a training step."""
        per_channel = (1, -1, 1, 1) if layout == "NCHW" else (1, 1, 1, -1)
        mean, var, gamma, beta = (a.reshape(per_channel) for a in (d.mean, d.var, d.gamma, d.beta))
        x = d.lay(d.x, layout)
        return named(*self.train(x, d.lay(d.dy, layout), gamma, beta), self.infer(x, mean, var, gamma, beta))


class Keras:
    """Keras 3 on its NumPy backend: the operations that its layer calls. It has no gradients.

    The layer itself would bring float64 data to float32 first.
    """

    name, offers = "Keras", (*STATISTICS, *OUTPUT, INFERENCE)

    def __init__(self):
        os.environ["KERAS_BACKEND"] = "numpy"
        import keras

        if keras.backend.backend() != "numpy":
            raise ImportError(f"it was imported with the backend {keras.backend.backend()} before")
        self.ops = keras.ops

    def results(self, d, layout):
        """Without NumPy's warnings of overflow."""
        x, axis = d.lay(d.x, layout), 1 if layout == "NCHW" else -1

        def normalize(mean, var):
            return self.ops.batch_normalization(x, mean, var, axis, offset=d.beta, scale=d.gamma, epsilon=EPS)

        with np.errstate(all="ignore"):
            mean, var = self.ops.moments(x, axes=(0, 2, 3) if layout == "NCHW" else (0, 1, 2))
            return {"mean": mean, "var": var, "y": normalize(mean, var), INFERENCE: normalize(d.mean, d.var)}


class OnnxRuntime:
    """ONNX Runtime on a model of one BatchNormalization node: inference, channels at axis 1."""

    name, offers = "ONNX Runtime", (INFERENCE,)

    def __init__(self):
        import onnx
        import onnxruntime

        helper, self.sessions = onnx.helper, {}
        inputs = ("x", "gamma", "beta", "mean", "var")
        for dtype, kind in zip(DTYPES, (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE), strict=True):
            node = helper.make_node("BatchNormalization", inputs, ["y"], epsilon=EPS)
            ends = [[helper.make_tensor_value_info(name, kind, None) for name in names] for names in (inputs, ["y"])]
            graph = helper.make_graph([node], "batch_norm", *ends)
            # Old enough versions for any runtime.
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
            self.sessions[dtype] = onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )

    def results(self, d, layout):
        """NCHW alone."""
        if layout != "NCHW":
            return {}
        inputs = {"x": d.lay(d.x, layout), "gamma": d.gamma, "beta": d.beta, "mean": d.mean, "var": d.var}
        return {INFERENCE: self.sessions[d.dtype.name].run(None, inputs)[0]}


def named(*results):
    """{result: array} of all of them, in order."""
    return dict(zip((*TRAINING, INFERENCE), map(np.asarray, results), strict=True))


SYSTEMS = (FastBN, NumPy, PyTorch, Jax, Keras, OnnxRuntime)


def present(systems):
    """Those of the systems that are installed; why others are not is printed."""
    found = []
    for system in systems:
        try:
            found.append(system())
        except ImportError as reason:
            print(f"{system.name}: {reason}", file=sys.stderr)
    return found


# ------------------------------------------------------------------------------------------------------------ measure


def measure(systems, cases=CASES):
    """{(system, dtype, layout, case, result): largest error in units}; what a system does not offer is not there."""
    found = {}
    for case in cases:
        for dtype in measurable(case.dtypes):
            d = Data(case, dtype)
            for system in systems:
                for layout in LAYOUTS:
                    results = system.results(d, layout)
                    for name in results.keys() & d.exact.keys():
                        key = system.name, dtype, layout, case.name, name
                        found[key] = error(d.by_channel(results[name], layout), *d.exact[name])
    return found


def measurable(dtypes):
    """Those of which long double can say what is exact."""
    return [dtype for dtype in dtypes if np.finfo(dtype).nmant < np.finfo(WIDE).nmant]


def largest(errors, system, dtype, layouts, cases, result):
    """(error, name of the case) of the largest of these, or None. NaN is the largest."""
    keys = [(system.name, dtype, layout, case.name, result) for layout in layouts for case in cases]
    found = [(errors[key], key[3]) for key in keys if key in errors]
    return max(found, key=lambda pair: (np.isnan(pair[0]), pair[0]), default=None)


def losses(cases):
    """{what: {(result, dtype): error}} of the two things that fastbn offers and that cost digits; in NCHW."""
    found = {}
    cases = {case.name: case for case in cases}
    for dtype in measurable(DTYPES):
        d = Data(cases["normal 14x14"], dtype)
        x, dy = d.lay(d.x, "NCHW"), d.lay(d.dy, "NCHW")
        for times in (None, 1, 10, 1000):
            what = f"backward from y, beta = {times} gamma" if times else "backward from x"
            out = x.copy() if times else None
            beta = (times or 0) * d.gamma
            _, saved = fastbn.batch_norm_train(x if out is None else out, d.gamma, beta, eps=EPS, out=out)
            for name, result in zip(GRADIENTS, fastbn.batch_norm_backward(dy, saved), strict=True):
                found.setdefault(what, {})[name, dtype] = error(d.by_channel(result, "NCHW"), *d.exact[name])
        for name in ("normal 14x14", "mean 10", "mean 1e3", "mean 1e6"):
            d = Data(cases[name], dtype)
            bn = fastbn.BatchNorm(d.gamma.size, eps=EPS, dtype=dtype)
            state = {"gamma": d.gamma, "beta": d.beta, "running_mean": d.mean, "running_var": d.var}
            bn.load_state_dict(bn.state_dict() | state)
            scale, shift = bn.fold()
            y = d.x * scale[:, None] + shift[:, None]
            found.setdefault(f"folded inference, {name}", {})["y", dtype] = error(y, *d.exact[INFERENCE])
    return found


# -------------------------------------------------------------------------------------------------------------- parts
# Half precision, residual and ReLU, weights: on "normal 14x14" in NCHW, parameters in float32 at least.


@dataclass(frozen=True)
class Parts:
    """What a call has besides x."""

    name: str
    dtype: str
    after: bool = False  # a residual, then ReLU
    weighted: bool = False
    systems: tuple[str, ...] = ("fastbn", "PyTorch")


PARTS = (
    Parts("-", "float16"),
    Parts("-", "bfloat16"),
    Parts("residual, ReLU", "bfloat16", after=True),
    Parts("residual, ReLU", "float32", after=True, systems=("fastbn", "NumPy", "PyTorch")),
    Parts("weights", "float32", weighted=True, systems=("fastbn", "NumPy")),
    Parts("weights", "float64", weighted=True, systems=("fastbn", "NumPy")),
)


class PartsData:
    """Arrays of a call with parts, (N, C, H, W), and what is exact of mean, var, y and dx."""

    def __init__(self, parts, shape):
        rng = np.random.default_rng(20150211)
        wide = np.dtype(parts.dtype).itemsize == 8
        self.x, self.dy, z = (rng.normal(m, 1, shape).astype(parts.dtype) for m in (0.5, 0.3, 0.2))
        self.gamma = rng.uniform(0.5, 1.5, shape[1]).astype("float64" if wide else "float32")
        self.beta = rng.standard_normal(shape[1]).astype(self.gamma.dtype)
        self.z = z if parts.after else None
        w = np.where(rng.random(shape) < 0.3, 0, rng.uniform(0.5, 2, shape)).astype(self.gamma.dtype)
        self.w = w if parts.weighted else None
        self.exact = self.truth(np.dtype(parts.dtype))

    def truth(self, dtype):
        """By channel, in long double: {result: (exact, unit)}."""

        def rows(a):
            return np.moveaxis(a.astype(WIDE), 1, 0).reshape(a.shape[1], -1)

        x, g, gamma, beta = rows(self.x), rows(self.dy), *(a.astype(WIDE)[:, None] for a in (self.gamma, self.beta))
        w = np.ones_like(x) if self.w is None else rows(self.w)
        z = 0 * x if self.z is None else rows(self.z)
        n = w.sum(1, keepdims=True)
        mean = (w * x).sum(1, keepdims=True) / n
        var = (w * (x - mean) ** 2).sum(1, keepdims=True) / n
        invstd = 1 / np.sqrt(var + EPS)
        xhat = (x - mean) * invstd
        y = gamma * xhat + beta + z
        if self.z is not None:
            y, g = np.maximum(y, 0), np.where(y > 0, g, 0)
        through_mean = w / n * g.sum(1, keepdims=True)
        through_var = w / n * xhat * (g * xhat).sum(1, keepdims=True)
        terms = _root(g**2 + through_mean**2 + through_var**2)
        return {
            "mean": _with_unit(mean, np.sqrt(var), dtype),
            "var": _with_unit(var, WIDE(EPS), dtype),
            "y": _with_unit(y, _root((gamma * xhat) ** 2 + beta**2 + z**2), dtype),
            "dx": _with_unit(gamma * invstd * (g - through_mean - through_var), gamma * invstd * terms, dtype),
        }


def fastbn_parts(d):
    """mean, var, y, dx."""
    options = {"residual": d.z, "activation": "relu" if d.z is not None else None, "where": d.w}
    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, eps=EPS, **options)
    return saved.mean, saved.var, y, fastbn.batch_norm_backward(d.dy, saved)[0]


def numpy_parts(d):
    """The formula in the dtype of the data."""
    axes, (gamma, beta) = (0, 2, 3), (a.reshape(-1, 1, 1) for a in (d.gamma, d.beta))
    w = np.ones_like(d.x) if d.w is None else d.w
    n = w.sum(axes, keepdims=True)
    mean = (w * d.x).sum(axes, keepdims=True) / n
    var = (w * (d.x - mean) ** 2).sum(axes, keepdims=True) / n
    invstd = 1 / np.sqrt(var + EPS)
    xhat = (d.x - mean) * invstd
    y, g = gamma * xhat + beta, d.dy
    if d.z is not None:
        y = np.maximum(y + d.z, 0)
        g = np.where(y > 0, g, 0).astype(g.dtype)
    sums = g.sum(axes, keepdims=True) + xhat * (g * xhat).sum(axes, keepdims=True)
    return mean, var, y, gamma * invstd * (g - w / n * sums)


def pytorch_parts(d):
    """Up to three operations, each rounded, and their autograd."""
    import torch

    def tensor(a):
        half = a.dtype.itemsize == 2
        return torch.from_numpy(a.view(np.uint16)).view(getattr(torch, a.dtype.name)) if half else torch.from_numpy(a)

    x, gamma, beta = tensor(d.x).clone().requires_grad_(), tensor(d.gamma), tensor(d.beta)
    y = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    if d.z is not None:
        y = torch.relu(y + tensor(d.z))
    y.backward(tensor(d.dy))
    return None, None, *(a.detach().double().numpy() for a in (y, x.grad))


PARTS_SYSTEMS = {"fastbn": fastbn_parts, "NumPy": numpy_parts, "PyTorch": pytorch_parts}


def measure_parts(systems, shape):
    """[(dtype, name, result, {system: figure})]: the largest error in units; of halves also what is not the nearest."""
    found = []
    for parts in PARTS:
        if parts.dtype in DTYPES and not measurable([parts.dtype]):
            continue
        d = PartsData(parts, shape)
        results = {s: dict(zip(d.exact, PARTS_SYSTEMS[s](d), strict=True)) for s in parts.systems if s in systems}
        for name in d.exact if parts.weighted else ("y", "dx"):
            errors, misses = {}, {}
            exact, unit = d.exact[name]
            for system, values in results.items():
                v = np.moveaxis(np.asarray(values[name]), 1, 0) if name in ("y", "dx") else np.asarray(values[name])
                v = v.reshape(exact.shape).astype(WIDE)
                errors[system] = error(v, exact, unit)
                # The nearest half to an exact value is no further from it than half of its own unit.
                misses[system] = float(
                    100 * (abs(v - exact) > _with_unit(exact, 0, np.dtype(parts.dtype))[1] / 2).mean()
                )
            found.append((parts.dtype, parts.name, name, errors))
            if parts.dtype not in DTYPES:
                found.append((parts.dtype, parts.name, f"{name}, % not the nearest", misses))
    return found


def print_parts(found, systems, markdown):
    """A dash where a system does not offer it."""
    rows = [
        [dtype, parts, result, *(figure(e[s]) if s in e else "-" for s in systems)] for dtype, parts, result, e in found
    ]
    report.table(["dtype", "parts", "result", *systems], rows, markdown)


# -------------------------------------------------------------------------------------------------------------- print


def figure(error):
    """Two decimals below 10, whole numbers below 10,000, above that the power of ten."""
    if not np.isfinite(error):
        return str(error)
    if error < 9.995:
        return f"{error:.2f}"
    return f"{error:.0f}" if error < 9999.5 else f"{error:.0e}".replace("e+0", "e").replace("e+", "e")


def print_largest(errors, cases, systems, markdown):
    """The largest error of each result; and on which case, if not all are of one kind."""
    one_kind = all(case.ordinary for case in cases)
    rows = []
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for result in TRAINING:
                cells = []
                for system in systems:
                    found = largest(errors, system, dtype, [layout], cases, result)
                    cells.append(f"{figure(found[0])}{'' if one_kind else f' ({found[1]})'}" if found else "-")
                rows.append([dtype, layout, result, *cells])
    report.table(["dtype", "layout", "result", *(system.name for system in systems)], rows, markdown)


def print_cases(errors, cases, systems, dtype, result, markdown):
    """The error of one result in every case, the larger of both layouts."""
    rows = []
    for case in cases:
        found = [largest(errors, system, dtype, LAYOUTS, [case], result) for system in systems]
        rows.append([case.name, *(figure(f[0]) if f else "-" for f in found)])
    report.table(["case", *(system.name for system in systems)], rows, markdown)


def print_losses(found, markdown):
    """What costs digits."""
    columns = [(name, dtype) for dtype in DTYPES for name in (*OUTPUT, *GRADIENTS[:2])]
    rows = [[what, *(figure(e[c]) if c in e else "-" for c in columns)] for what, e in found.items()]
    report.table(["", *(f"{name}, {dtype}" for name, dtype in columns)], rows, markdown)


def main(argv=None):
    """Measure and print."""
    parser = report.parser(__doc__)
    parser.add_argument("--no-peers", action="store_true", help="fastbn alone")
    options = parser.parse_args(argv)
    systems = SYSTEMS[:1] if options.no_peers else SYSTEMS
    cases = [case.small() for case in CASES] if options.quick else CASES
    for dtype in set(DTYPES) - set(measurable(DTYPES)):
        print(f"{dtype}: long double has no more digits here", file=sys.stderr)
    installed = present(systems)
    errors = measure(installed, cases)

    def offering(*results):
        return [system for system in systems if set(results) & set(system.offers)]

    print("Ordinary data, the largest error in units:\n")
    print_largest(errors, [case for case in cases if case.ordinary], offering(*TRAINING), options.markdown)
    print("All cases, the largest error in units, and where it is:\n")
    print_largest(errors, cases, offering(*TRAINING), options.markdown)
    print("What costs digits in fastbn itself, in units:\n")
    print_losses(losses(cases), options.markdown)
    print("Half precision, residual and ReLU, weights: the largest error in units, and misses of the nearest half:\n")
    shape = next(case for case in cases if case.name == "normal 14x14").shape
    measured = measure_parts({system.name for system in installed}, shape)
    print_parts(measured, [system.name for system in systems if system.name in PARTS_SYSTEMS], options.markdown)
    for dtype in DTYPES:
        for result in ("y", "dx", INFERENCE):
            print(f"{result} of {dtype}, the larger error of both layouts in units:\n")
            shown = [case for case in cases if dtype in case.dtypes]
            print_cases(errors, shown, offering(result), dtype, result, options.markdown)
    print(report.environment("torch", "jax", "keras", "onnxruntime"))


if __name__ == "__main__":
    main()
