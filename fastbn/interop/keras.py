"""Keras 3: its `moments` and `batch_normalization` replaced on the NumPy backend, and weights in and out.

After keras/src/backend/numpy/nn.py, keras/src/ops/nn.py and keras/src/layers/normalization/batch_normalization.py of
Keras 3.15. `keras.ops` and the layers, models made before included, look the two functions up in one place,
``keras.src.backend.nn``, each time they are called: there they are replaced. The NumPy backend has E[x^2] - E[x]^2 in
the dtype of x, which loses every digit, and gives NaN, where abs(mean) is large beside the standard deviation.

With a `mask` the layer takes its statistics by other functions (two passes, sums in float32), which stay as they are.
"""

import contextlib
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import batch_norm
from ..layer import BatchNorm
from ..moments import moments
from ._need import need
from ._weights import layer_of, weights_of

Array = npt.NDArray[Any]

__all__ = ["disable", "enable", "from_keras", "patched", "to_keras"]

_lock = threading.Lock()
_users = 0
_theirs: dict[str, Any] = {}


def enable() -> None:
    """Let Keras, on its NumPy backend, compute moments and batch normalization by fastbn until `disable`.

    In all threads of the process. Calls count: as many calls of `disable` put Keras's own functions back.

    Raises
    ------
    ImportError
        Keras 3 is not installed.
    ValueError
        Keras has another backend than NumPy, which is chosen before its first import: ``KERAS_BACKEND=numpy``.
    """
    global _users
    module = _module("enable")
    with _lock:
        if not _users:
            _theirs.update({name: getattr(module, name) for name in _OURS})
            vars(module).update(_OURS)
        _users += 1


def disable() -> None:
    """Undo one `enable`; the last one puts Keras's own functions back.

    Raises
    ------
    ValueError
        There is no `enable` to undo.
    """
    global _users
    with _lock:
        if not _users:
            raise ValueError("fastbn.interop.keras.disable: it is not enabled; expected a call of enable before it")
        _users -= 1
        if not _users:
            vars(_module("disable")).update(_theirs)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """`enable`, and `disable` at the end of a with block (or of a function that it decorates), whatever happens there.

    Blocks may be nested, and may overlap in several threads: Keras's own functions are back when the last one ends.

    Raises
    ------
    ImportError, ValueError
        As `enable`.

    Notes
    -----
    ``keras.ops.moments``, ``keras.ops.batch_normalization``, ``keras.layers.BatchNormalization``, and the layers that
    take moments (GroupNormalization) then use fastbn. Mean and variance are computed in float64 and given back in x's
    dtype, as Keras has it: of float32 data with mean 1000 and standard deviation 0.1 the mean then has three digits of
    a standard deviation, and so has y. Of float16 they are held within its range; of integers and booleans they are
    float64.
    """
    enable()
    try:
        yield
    finally:
        disable()


def _module(name: str) -> ModuleType:
    """Where Keras looks the functions of its backend up."""
    fn = f"fastbn.interop.keras.{name}"
    keras = need("keras", "keras", fn)
    version = str(getattr(keras, "__version__", "unknown"))
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 3:
        raise ValueError(f"{fn}: Keras has version {version}, expected 3 or later")
    backend = keras.backend.backend()
    if backend != "numpy":
        raise ValueError(
            f"{fn}: Keras has backend {backend!r}, expected 'numpy': set KERAS_BACKEND=numpy before Keras is imported"
        )
    module: ModuleType = need("keras.src.backend", "keras", fn).nn
    return module


def _moments(x: Any, axes: Any, keepdims: bool = False, synchronized: bool = False) -> tuple[Array, Array]:
    """Mean and variance over `axes`, in the dtype that NumPy's mean has: that of x, of integers float64."""
    fn = "keras.ops.moments"
    if synchronized:
        raise NotImplementedError(f"{fn}: synchronized is True, expected False: there is one device")
    x = _check.array(fn, "x", x)
    every = range(x.ndim)
    reduced = every if axes is None else np.lib.array_utils.normalize_axis_tuple(axes, x.ndim, "axes")
    m = moments(x, axis=tuple(a for a in every if a not in reduced))
    dtype = x.dtype if _check.floating(x.dtype) else np.dtype(np.float64)
    shape = tuple(1 if a in reduced else n for a, n in enumerate(x.shape)) if keepdims else m.mean.shape
    found = []
    for a in m.mean if m.count else np.full_like(m.mean, np.nan), m.var():
        if dtype == np.float16:  # Keras's bounds; NaN stays
            a = np.asarray(np.clip(a, -65504.0, 65504.0))
        with np.errstate(all="ignore"):
            found.append(a.astype(dtype).reshape(shape))
    return found[0], found[1]


def _batch_normalization(
    x: Any, mean: Any, variance: Any, axis: int, offset: Any = None, scale: Any = None, epsilon: float = 1e-3
) -> Array:
    """y in the dtype that x, the statistics and the parameters have together."""
    fn = "keras.ops.batch_normalization"
    given = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    arrays = {name: _check.array(fn, name, a) for name, a in given.items() if a is not None}
    x = _check.array(fn, "x", x)
    dtype = _promoted(x, **arrays)
    # One value stands for all channels in Keras, too, and a vector may lie in any axis.
    arrays = {name: a.reshape(() if a.size == 1 else -1) for name, a in arrays.items()}
    with np.errstate(all="ignore"):
        # Keras takes a variance below 0 and, below -epsilon, has NaN.
        v = arrays["variance"].astype(np.float64) + epsilon
        v = np.where(v < 0, np.nan, v)
        x = x.astype(dtype, copy=False)
    return batch_norm(x, arrays["mean"], v, arrays.get("scale"), arrays.get("offset"), axis=axis, eps=0.0)


def _promoted(x: Array, mean: Array, variance: Array, offset: Array | None = None, scale: Array | None = None) -> Any:
    """The dtype of Keras's result: bfloat16 is promoted by its own rules, operation by operation."""
    found = [a.dtype for a in (x, mean, variance, offset, scale) if a is not None]
    if found[0].char in "efd" and len(set(found)) == 1:
        return found[0].newbyteorder("=")
    inv = 1.0 / np.sqrt(np.ones(1, variance.dtype) + 1e-3)
    if scale is not None:
        inv = inv * np.ones(1, scale.dtype)
    shift = np.ones(1, mean.dtype) * inv
    if offset is not None:
        shift = shift + np.ones(1, offset.dtype)
    return (np.ones(1, x.dtype) * inv + shift).dtype


_OURS = {"moments": _moments, "batch_normalization": _batch_normalization}


def from_keras(
    layer_or_weights: Any, *, center: bool | None = None, scale: bool | None = None, **options: Any
) -> BatchNorm:
    """Make a `fastbn.BatchNorm` of a Keras layer, or of its weights.

    Parameters
    ----------
    layer_or_weights : keras.layers.BatchNormalization, or list of (C,) arrays
        A built layer, or what its get_weights() returns: gamma, beta, moving_mean,
        moving_variance, without gamma where it has ``scale=False``, without beta where it has ``center=False``.
    center, scale : bool, optional
        Whether a list has a beta, a gamma; needed for three arrays only. A layer knows.
    **options
        Arguments of `fastbn.BatchNorm`. By default axis, eps (Keras's epsilon), momentum and dtype are those of the
        layer; of a list Keras's defaults, -1, 1e-3 and 0.99.

    Returns
    -------
    BatchNorm
        With Keras's rules, as of ``BatchNorm.like("keras", ...)``, in training. It holds copies, in float32, or in
        float64 where a weight is float64.

    Raises
    ------
    ValueError
        A layer that is not built, or has ``renorm=True``; weights in another number or of different shapes; a negative
        variance.
    TypeError
        Neither a layer nor a list of arrays.

    Notes
    -----
    Keras's own NumPy and JAX formulas can leave a moving_variance slightly below 0: set it to 0 first.
    """
    fn = "from_keras"
    weights = layer_or_weights
    if hasattr(weights, "moving_mean") and hasattr(weights, "moving_variance"):
        layer = weights
        if layer.moving_mean is None:
            raise ValueError(f"{fn}: the layer has no weights yet, expected a built one: layer.build(x.shape)")
        if getattr(layer, "renorm", False):
            raise ValueError(
                f"{fn}: the layer has renorm=True, expected False; its inference alone is that of its weights"
            )
        axis = layer.axis if isinstance(layer.axis, int) else tuple(layer.axis)
        axis = axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis  # Keras 2 has a list
        options = {"axis": axis, "eps": layer.epsilon, "momentum": layer.momentum, **options}
        for name, of_layer in (("center", center), ("scale", scale)):
            if of_layer is not None and of_layer != getattr(layer, name):
                raise ValueError(f"{fn}: {name} is {of_layer}, expected {getattr(layer, name)}, as the layer has it")
        center, scale = layer.center, layer.scale
        kept = (
            layer.gamma if scale else None,
            layer.beta if center else None,
            layer.moving_mean,
            layer.moving_variance,
        )
        weights = [np.asarray(w) for w in kept if w is not None]
    if not isinstance(weights, (list, tuple)):
        kind = type(weights).__name__
        raise TypeError(
            f"{fn}: layer_or_weights is of type {kind}, expected a batch-norm layer or a list of its weights"
        )
    both = [(c, s) for c in (True, False) for s in (True, False) if center in (None, c) and scale in (None, s)]
    fitting = [(c, s) for c, s in both if 2 + c + s == len(weights)]
    if len(fitting) != 1:
        raise ValueError(
            f"{fn}: layer_or_weights has {len(weights)} arrays, with center={center}, scale={scale}; expected gamma, "
            "beta, moving_mean and moving_variance, or less with center=False or scale=False to tell which"
        )
    ((center, scale),) = fitting
    names = [name for name in _NAMES if (name != "gamma" or scale) and (name != "beta" or center)]
    return layer_of(fn, "keras", dict(zip(names, weights, strict=True)), _NAMES, **options)


# In the order of Keras's lists; and here.
_NAMES = {"gamma": "gamma", "beta": "beta", "moving_mean": "running_mean", "moving_variance": "running_var"}


def to_keras(layer: BatchNorm) -> list[Array]:
    """The weights of a `fastbn.BatchNorm` in Keras's order: for ``keras_layer.set_weights``.

    Parameters
    ----------
    layer : BatchNorm

    Returns
    -------
    list of (C,) arrays
        gamma, beta, moving_mean, moving_variance, as far as the layer has them; copies in its dtype.

    Raises
    ------
    TypeError
        It is no `BatchNorm`.
    ValueError
        It keeps no running statistics.

    Notes
    -----
    The Keras layer needs the same center and scale, and for the same results axis, epsilon and momentum: a
    ``keras.layers.BatchNormalization(axis=layer.axis, epsilon=layer.eps, momentum=layer.momentum)``. Keras stores the
    plain variance: a layer with ``correction=1`` goes on with another rule there.
    """
    return list(weights_of("to_keras", layer).values())
