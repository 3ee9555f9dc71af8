"""CS231n, assignment 2: the functions of `cs231n/layers.py` under their own names, computed by fastbn.

Source: the course's starter code of 2016 to 2024, whose docstrings say what students fill in. Running statistics live
in the dict `bn_param` and start at 0, the weight of the old value is 0.9, and the running variance is divided by N.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import Saved, batch_norm_backward, frozen, trained
from ..moments import moved

Array = npt.NDArray[Any]
MODES = {"train": True, "test": False}

__all__ = [
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_forward",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
]


def batchnorm_forward(
    x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, bn_param: MutableMapping[str, Any]
) -> tuple[Array, Saved]:
    """Normalize each feature of a batch.

    Parameters
    ----------
    x : (N, D) array
        Of any dtype that `fastbn.batch_norm` takes.
    gamma, beta : (D,) array
    bn_param : dict
        ``mode``: "train" or "test", required. ``eps``: 1e-5 when absent. ``momentum``: the weight of the old running
        value, 0.9 when absent. ``running_mean``, ``running_var``: (D,) arrays, zeros when absent. Both are set, in both
        modes, to new arrays; the arrays that were there are not written.

    Returns
    -------
    out : (N, D) array
        In the dtype of x (of integers: float32).
    cache : Saved
        What the backward needs. It refers to x, not to a copy. After mode "test" the statistics count as constants.

    Raises
    ------
    ValueError
        Another mode or none, wrong shapes, a momentum outside [0, 1], a negative eps or running_var; bn_param stays as
        it was.
    TypeError
        A dtype or type that is not listed above.

    Notes
    -----
    One sample gives beta, and a batch variance of 0, as there.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import cs231n
    >>> bn_param = {"mode": "train"}
    >>> out, cache = cs231n.batchnorm_forward(np.array([[1.0], [3.0]]), np.ones(1), np.zeros(1), bn_param)
    >>> out.round(3).tolist(), bn_param["running_mean"], bn_param["running_var"]
    ([[-1.0], [1.0]], array([0.2]), array([0.1]))
    """
    return _forward("batchnorm_forward", x, gamma, beta, bn_param, 2)


def batchnorm_backward(dout: npt.ArrayLike, cache: Saved) -> tuple[Array, Array, Array]:
    """Gradients of `batchnorm_forward`.

    Parameters
    ----------
    dout : (N, D) array
    cache : Saved
        From `batchnorm_forward`. It can be used again.

    Returns
    -------
    dx : (N, D) array
    dgamma, dbeta : (D,) array

    Raises
    ------
    ValueError
        dout of another shape than x.
    TypeError
        dout not floating, or another cache.
    """
    return _backward("batchnorm_backward", dout, cache)


def batchnorm_backward_alt(dout: npt.ArrayLike, cache: Saved) -> tuple[Array, Array, Array]:
    """The same as `batchnorm_backward`, bit for bit.

    Parameters
    ----------
    dout, cache
        As in `batchnorm_backward`.

    Returns
    -------
    dx, dgamma, dbeta
        As of `batchnorm_backward`.

    Notes
    -----
    In the assignment the one follows the computation graph and the other is the simplified formula; fastbn has only the
    latter, in the same two reads.
    """
    return _backward("batchnorm_backward_alt", dout, cache)


def spatial_batchnorm_forward(
    x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, bn_param: MutableMapping[str, Any]
) -> tuple[Array, Saved]:
    """Normalize each channel of a batch of images: `batchnorm_forward` of (N, C, H, W) arrays.

    No axis is moved and nothing is copied.

    Parameters
    ----------
    x : (N, C, H, W) array
    gamma, beta : (C,) array
    bn_param : dict
        As in `batchnorm_forward`, with C in place of D.

    Returns
    -------
    out : (N, C, H, W) array
    cache : Saved
        As of `batchnorm_forward`.

    Raises
    ------
    ValueError, TypeError
        As `batchnorm_forward`.
    """
    return _forward("spatial_batchnorm_forward", x, gamma, beta, bn_param, 4)


def spatial_batchnorm_backward(dout: npt.ArrayLike, cache: Saved) -> tuple[Array, Array, Array]:
    """Gradients of `spatial_batchnorm_forward`.

    Parameters
    ----------
    dout : (N, C, H, W) array
    cache : Saved
        From `spatial_batchnorm_forward`. It can be used again.

    Returns
    -------
    dx : (N, C, H, W) array
    dgamma, dbeta : (C,) array

    Raises
    ------
    ValueError, TypeError
        As `batchnorm_backward`.
    """
    return _backward("spatial_batchnorm_backward", dout, cache)


def _forward(
    fn: str, x: npt.ArrayLike, gamma: Any, beta: Any, bn_param: MutableMapping[str, Any], rank: int
) -> tuple[Array, Saved]:
    x = _check.array(fn, "x", x)
    if x.ndim != rank:
        raise ValueError(f"{fn}: x has shape {x.shape}, expected {rank} axes")
    if not isinstance(bn_param, MutableMapping):
        raise TypeError(f"{fn}: bn_param is of type {type(bn_param).__name__}, expected a dict")
    if "mode" not in bn_param:
        raise ValueError(f"{fn}: bn_param has no mode, expected 'train' or 'test'")
    train = _check.choice(fn, "bn_param['mode']", bn_param["mode"], MODES)
    eps = _check.number(fn, "bn_param['eps']", bn_param.get("eps", 1e-5), 0.0)
    momentum = _check.number(fn, "bn_param['momentum']", bn_param.get("momentum", 0.9), 0.0, 1.0)
    shape, of = x.shape[1:2], (x, 1)
    gamma, beta = _check.parameter(fn, "gamma", gamma, shape, of), _check.parameter(fn, "beta", beta, shape, of)
    kept = np.promote_types(_check.result_dtype(x), np.float32)
    mean = _running(fn, bn_param, "running_mean", kept, shape, of)
    var = _running(fn, bn_param, "running_var", kept, shape, of)
    _check.not_negative(fn, "bn_param['running_var']", var)
    if not train:
        out, cache = frozen(fn, x, mean, var, gamma, beta, axis=1, eps=eps, keep=True)
        assert cache is not None
    else:
        out, cache = trained(x, gamma, beta, axis=1, eps=eps, single=True, fn=fn)
        if x.size:
            with np.errstate(all="ignore"):
                mean, var = moved(mean, cache.mean, momentum), moved(var, cache.var, momentum)
    bn_param.update(running_mean=mean, running_var=var)  # both or none
    return out, cache


def _running(
    fn: str, bn_param: MutableMapping[str, Any], name: str, dtype: np.dtype[Any], shape: tuple[int, ...], of: Any
) -> Array:
    """A running statistic in the wider of its own dtype and that of x; zeros if there is none yet."""
    if name not in bn_param:
        return np.zeros(shape, dtype)
    given = _check.parameter(fn, f"bn_param['{name}']", bn_param[name], shape, of)
    wide = np.promote_types(given.dtype, dtype) if _check.floating(given.dtype) else dtype
    return np.broadcast_to(given, shape).astype(wide)


def _backward(fn: str, dout: npt.ArrayLike, cache: Saved) -> tuple[Array, Array, Array]:
    if not isinstance(cache, Saved):
        raise TypeError(f"{fn}: cache is of type {type(cache).__name__}, expected what the forward returned")
    dx, dgamma, dbeta = batch_norm_backward(_check.like_x(fn, "dout", dout, cache.x.shape), cache)
    return dx, dgamma, dbeta
