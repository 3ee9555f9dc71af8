"""Batch normalization folded into the weights before it: fold_conv, fold_linear."""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from typing import Any

import numpy as np
import numpy.typing as npt

from . import _check
from .layer import BatchNorm

Array = npt.NDArray[Any]

FLOATING = "float32, float64, float16 or bfloat16"

# The names that `layout` may have, and the axes of the weight that each stands for. O and I: outputs and inputs.
LINEAR = {name: name for name in ("OI", "IO")}
CONV = {name: name for name in ("OIHW", "HWIO", "OIW", "WIO", "OIDHW", "DHWIO")}
_SWAPPED = {name: name.translate(str.maketrans("OI", "IO")) for name in CONV}
TRANSPOSED = _SWAPPED | {axes: axes for axes in _SWAPPED.values()}


def fold_conv(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    bn: BatchNorm,
    *,
    layout: str = "OIHW",
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Weight and bias of the convolution that does both: a convolution, then `bn` in evaluation.

    Parameters
    ----------
    weight : array
        Of the convolution: float32, float64, float16 or bfloat16.
    bias : (C,) array, a number, or None
        Of the convolution; None: it has none.
    bn : BatchNorm
        The layer behind it, with running statistics, which are used whatever its mode is. An activation or a residual
        is not folded: it stays to be applied.
    layout : str, default "OIHW"
        The axes of a plain convolution's weight. "OIHW", as in PyTorch and ONNX: (C, inputs / groups, H, W); "HWIO", as
        in Keras, TensorFlow and JAX: (H, W, inputs / groups, C). With one or three spatial axes "OIW", "WIO", "OIDHW",
        "DHWIO".
    groups : int, default 1
        Of the convolution, which divides C.
    transposed : bool, default False
        Whether it is a transposed one, whose weight has **O and I swapped, under the same name**, as the systems
        above have it: "OIHW" stands for (inputs, C / groups, H, W), "HWIO" for (H, W, C / groups, inputs). "IOHW" and
        "HWOI" say so themselves, and mean the same. Leave it out if the weight of a transposed convolution has its axes
        where a plain one has them, as in Flax.

    Returns
    -------
    weight, bias : array
        New arrays in the dtype of the weight, computed in float64; the weight in its shape and memory order.

    Raises
    ------
    ValueError
        Other channels than the layer's, another number of axes than the layout's, groups that do not divide them, an
        unknown layout; a layer without running statistics or with several channel axes.
    TypeError
        A weight that is not floating, a bias that is not numeric, a `bn` that is no BatchNorm.

    See Also
    --------
    fold_linear : The same for a linear layer.
    BatchNorm.fold : Scale and shift alone.

    Notes
    -----
    The arguments are read only. With ``scale = gamma / sqrt(running_var + eps)`` of its channel each weight becomes
    ``weight * scale``, and the bias ``(bias - running_mean) * scale + beta``. Of a channel whose running_var and eps
    are both 0, the scale is 0.

    **No result is subnormal**: where one would be below the smallest normal number of its dtype, it is 0. Channels that
    training has switched off, with weights or a gamma near 1e-40, else make every product with them many times slower
    on most CPUs; what is lost is less than 1.2e-38 (2.3e-308 in float64). float16 keeps its own subnormals: they begin
    at 6e-5, where many a good weight is, and are normal numbers in float32, in which float16 is computed. A value
    beyond the range of the dtype becomes infinite, as in NumPy's casts.

    Keras's depthwise kernel (H, W, I, M) is ``kernel.reshape(H, W, 1, I * M)`` with ``groups=I``.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2, eps=0)
    >>> bn.gamma[:], bn.running_mean[:], bn.running_var[:] = [6, 5], [1, 0], [4, 25]
    >>> weight, bias = fastbn.fold_conv(np.ones((2, 1, 1, 1), "float32"), None, bn)
    >>> weight.ravel(), bias
    (array([3., 1.], dtype=float32), array([-3.,  0.], dtype=float32))
    """
    fn = "fold_conv"
    swapped = _check.flag(fn, "transposed", transposed)
    names = TRANSPOSED if swapped else CONV
    axes = _axes(fn, layout, names)
    channels = _channels(fn, bn)
    n = _divisor(fn, groups, channels)
    return _folded(fn, weight, bias, bn, axes, names, f"layout={layout!r}", n if swapped else 1)


def fold_linear(
    weight: npt.ArrayLike, bias: npt.ArrayLike | None, bn: BatchNorm, *, layout: str = "OI"
) -> tuple[Array, Array]:
    """Weight and bias of the linear layer that does both: a linear layer, then `bn` in evaluation.

    Parameters
    ----------
    weight : array
        Of the linear layer: float32, float64, float16 or bfloat16.
    bias : (C,) array, a number, or None
        Of the linear layer; None: it has none.
    bn : BatchNorm
        The layer behind it; see `fold_conv`.
    layout : "OI" or "IO", default "OI"
        "OI", as in PyTorch, where y = x @ weight.T: (C, inputs); "IO", as in Keras and JAX, where y = x @ weight.

    Returns
    -------
    weight, bias : array
        As from `fold_conv`, whose notes hold here too.

    Raises
    ------
    ValueError, TypeError
        As from `fold_conv`.

    See Also
    --------
    fold_conv : The same for a convolution.
    BatchNorm.fold : Scale and shift alone.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> rng = np.random.default_rng(0)
    >>> bn, x, weight = fastbn.BatchNorm(4), rng.normal(size=(10, 3)), rng.normal(size=(3, 4))
    >>> y = bn(x @ weight)
    >>> w, b = fastbn.fold_linear(weight, None, bn, layout="IO")
    >>> np.allclose(x @ w + b, bn.eval()(x @ weight))
    True
    """
    fn = "fold_linear"
    axes = _axes(fn, layout, LINEAR)
    _channels(fn, bn)
    return _folded(fn, weight, bias, bn, axes, LINEAR, f"layout={layout!r}", 1)


def _folded(
    fn: str, weight: Any, bias: Any, bn: BatchNorm, axes: str, names: dict[str, str], layout: str, shared: int
) -> tuple[Array, Array]:
    """Folded weight and bias; `shared` groups of outputs share the places on the weight's O axis.

    `names` are the layouts that there are, for the message where `layout`, with these `axes`, does not fit.
    """
    w = _check.plain_array(fn, "weight", weight, FLOATING)
    if not _check.floating(w.dtype):
        raise TypeError(f"{fn}: weight has dtype {w.dtype}, expected {FLOATING}")
    if w.ndim != len(axes):
        raise ValueError(f"{fn}: weight has shape {w.shape}, expected {len(axes)} axes, those of {layout}")
    first, second = axes.index("O"), axes.index("I")
    outputs, inputs = w.shape[first], w.shape[second]
    (channels,) = bn.channels
    has = f"{fn}: weight has shape {w.shape}, {layout}: "
    if outputs * shared != channels:
        of = f"the {channels} channels of bn" + (f" / groups={shared}" if shared > 1 else "")
        fits = [name for name, a in names.items() if len(a) == w.ndim and w.shape[a.index("O")] * shared == channels]
        hint = f"; layout={fits[0]!r} has them" if fits else ""
        raise ValueError(f"{has}{outputs} outputs, expected {channels // shared}, {of}{hint}")
    if inputs % shared:
        raise ValueError(f"{has}{inputs} inputs, expected a multiple of groups={shared}")
    b = _check.parameter(fn, "bias", 0.0 if bias is None else bias, bn.channels, ", the channels of bn")
    mean, scale, beta = bn._affine(fn)

    dtype = np.dtype(w.dtype.type)  # in the byte order of the machine
    with np.errstate(all="ignore"):
        factor = scale.reshape(shared, outputs)
        if shared > 1:
            factor = factor.repeat(inputs // shared, axis=0)  # the inputs of a group stand together
        factor = factor.T if first < second else factor
        w = w.astype(np.float64, order="K")
        w *= np.expand_dims(factor, [i for i, letter in enumerate(axes) if letter not in "OI"])
        return _rounded(w, dtype), _rounded((b.astype(np.float64) - mean) * scale + beta, dtype)


def _rounded(a: Array, dtype: np.dtype[Any]) -> Array:
    """`a`, which is overwritten, in another dtype, and nothing subnormal in it: see the notes of `fold_conv`."""
    computed = np.float64 if dtype == np.float64 else np.float32
    a[np.abs(a) < np.finfo(computed).smallest_normal] = 0.0
    return a.astype(dtype, order="K", copy=False)


def _axes(fn: str, layout: Any, names: dict[str, str]) -> str:
    """The axes of the weight, a letter each."""
    expected = f"one of {', '.join(names)}"
    if not isinstance(layout, str):
        raise TypeError(f"{fn}: layout is {_check.shown(layout)}, expected {expected}")
    if layout not in names:
        raise ValueError(f"{fn}: layout is {_check.shown(layout)}, expected {expected}")
    return names[layout]


def _channels(fn: str, bn: Any) -> int:
    """The channels of a layer that can be folded."""
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"{fn}: bn is of type {type(bn).__name__}, expected a BatchNorm")
    if len(bn.channels) != 1:
        raise ValueError(f"{fn}: bn has channels {bn.channels}, expected a layer with one channel axis")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"{fn}: bn keeps no running statistics, expected a layer with track_running_stats=True")
    return bn.channels[0]


def _divisor(fn: str, groups: Any, channels: int) -> int:
    """groups: an int that divides the channels."""
    try:
        n = _check.index(groups)
    except TypeError:
        raise TypeError(f"{fn}: groups is {_check.shown(groups)}, expected an int") from None
    if n < 1 or channels % n:
        raise ValueError(
            f"{fn}: groups is {_check.shown(n)}, expected a divisor of the number of channels of bn, {channels}"
        )
    return n
