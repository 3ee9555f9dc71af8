"""What the benchmarks share: parameters, arrays, and how asv is to sample.

Each module has a `case` that builds the arrays, calls once, so that everything is compiled, loaded and touched, and
returns a `Case`; it is cached, so that asv's samples are of `Case.run` alone. There is no `setup`: asv would call it
before every single call, and each would find the arrays it timed before gone from the caches.

Importing this compiles nothing. Parameters are part of a benchmark's name in asv's results: leave them as they are.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float64")
# Batch, channels, height, width. Four of ResNet-50's layers at batch 32, from long runs to short ones, and a small one.
SHAPES = ((32, 64, 56, 56), (32, 512, 28, 28), (32, 256, 14, 14), (32, 2048, 7, 7), (2, 64, 28, 28))
# For what is a variant of another benchmark: one layer beyond the caches, one within them.
FEW = ((32, 64, 56, 56), (32, 256, 14, 14))
# bfloat16 comes with a package of its own; where that is missing, so is the parameter.
HALVES = ("float16", "bfloat16") if importlib.util.find_spec("ml_dtypes") else ("float16",)


class OverLayers:
    """Parameters and sampling of the benchmarks that run over the layers."""

    params = (LAYOUTS, SHAPES, DTYPES)
    param_names = ("layout", "shape", "dtype")
    # Asv chooses `number` by what it times first, and the first call builds the case: it would always be 1.
    number = 4
    repeat = (3, 30, 1.0)


class OverFew(OverLayers):
    """The same over fewer layers, in float32."""

    params = (LAYOUTS, FEW, ("float32",))


@dataclass
class Case:
    """One call to time, and what a test needs to check it."""

    run: Callable[[], Any]
    axis: int
    x: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    out: np.ndarray
    dy: np.ndarray | None = None
    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    residual: np.ndarray | None = None
    where: np.ndarray | None = None


def arrays(layout, shape, dtype):
    """A `Case` that has x, gamma, beta, out, axis, and nothing to run yet; of half precision, parameters in float32."""
    n, c, *space = shape
    axis = 1 if layout == "NCHW" else -1
    rng = np.random.default_rng(0)
    wide = "float32" if dtype in HALVES else dtype
    x = rng.standard_normal((n, c, *space) if axis == 1 else (n, *space, c), dtype=wide)
    x += 1
    gamma, beta = (rng.uniform(0.5, 1.5, c).astype(wide) for _ in range(2))
    x = x.astype(half(dtype)) if dtype in HALVES else x
    return Case(None, axis, x, gamma, beta, np.zeros_like(x))


def half(name):
    """A dtype of half precision; NumPy knows the other one only from its package."""
    return np.dtype(getattr(importlib.import_module("ml_dtypes"), name)) if name == "bfloat16" else np.dtype(name)


def ready(case, run):
    """The case, with `run` called once."""
    case.run = run
    run()
    return case
