"""Batch normalization step by step: the version of CS231n's function that keeps every intermediate in its cache.

Source: Kratzert 2016, "Understanding the backward pass through Batch Normalization Layer", and the many notebooks that
follow it. The cache is the tuple ``(xhat, gamma, xmu, ivar, sqrtvar, var, eps)``, and the backward works from it alone.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import Saved, batch_norm, batch_norm_backward, trained

Array = npt.NDArray[Any]
Cache = tuple[Array, Array, Array, Array, Array, Array, float]
NAMES = ("xhat", "gamma", "xmu", "ivar", "sqrtvar", "var", "eps")

__all__ = ["batchnorm_backward", "batchnorm_forward"]


def batchnorm_forward(x: npt.ArrayLike, gamma: npt.ArrayLike, beta: npt.ArrayLike, eps: float) -> tuple[Array, Cache]:
    """Normalize each feature of a batch, and keep the steps.

    Parameters
    ----------
    x : (N, D) array
    gamma, beta : (D,) array, or one number for all features
    eps : float
        Added to the variance, which is divided by N.

    Returns
    -------
    out : (N, D) array
        In the dtype of x (of integers: float32).
    cache : tuple
        ``(xhat, gamma, xmu, ivar, sqrtvar, var, eps)``: ``xmu = x - mean`` and ``xhat = xmu * ivar`` are (N, D) arrays
        in the dtype of out; ``sqrtvar = sqrt(var + eps)``, ``ivar = 1 / sqrtvar`` and var are (D,) in float64.

    Raises
    ------
    ValueError
        x of another rank, wrong shapes, a negative eps.
    TypeError
        A dtype or type that is not numeric.

    Notes
    -----
    The two kept arrays cost a pass over memory each; `fastbn.interop.cs231n` keeps a reference to x in their place. A
    constant feature with ``eps=0`` gives beta and an xhat of 0; there it gives NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import stepwise
    >>> out, (xhat, gamma, xmu, ivar, sqrtvar, var, eps) = stepwise.batchnorm_forward(
    ...     np.array([[1.0], [3.0]]), np.array([2.0]), np.array([5.0]), 0)
    >>> out.tolist(), xhat.tolist(), var
    ([[3.0], [7.0]], [[-1.0], [1.0]], array([1.]))
    """
    fn = "batchnorm_forward"
    x = _check.array(fn, "x", x)
    if x.ndim != 2:
        raise ValueError(f"{fn}: x has shape {x.shape}, expected (N, D)")
    gamma = _check.parameter(fn, "gamma", gamma, x.shape[1:], (x, 1))
    beta = _check.parameter(fn, "beta", beta, x.shape[1:], (x, 1))
    eps = _check.eps(fn, eps)
    xhat, saved = trained(x, None, None, axis=1, eps=eps, single=True, fn=fn)
    out = batch_norm(xhat, 0.0, 1.0, gamma, beta, eps=0.0)
    xmu = batch_norm(x, saved.mean, 1.0, eps=0.0)
    var = saved.var
    with np.errstate(all="ignore"):
        sqrtvar = np.sqrt(var + eps)
        ivar = 1.0 / sqrtvar
    return out, (xhat, gamma, xmu, ivar, sqrtvar, var, eps)


def batchnorm_backward(dout: npt.ArrayLike, cache: Cache) -> tuple[Array, Array, Array]:
    """Gradients, from the kept steps alone.

    Parameters
    ----------
    dout : (N, D) array
    cache : tuple
        ``(xhat, gamma, xmu, ivar, sqrtvar, var, eps)``, from `batchnorm_forward` or from your own code.

    Returns
    -------
    dx : (N, D) array
        In the dtype of xmu.
    dgamma, dbeta : (D,) array

    Raises
    ------
    ValueError
        Another number of entries, wrong shapes, an ivar that is not 1 / sqrt(var + eps).
    TypeError
        Entries that are not numeric, dout not floating.

    Notes
    -----
    Computed from xmu, var, eps and gamma; the others say the same, and are only checked.
    """
    fn = "batchnorm_backward"
    if not isinstance(cache, (tuple, list)) or len(cache) != len(NAMES):
        has = f"{len(cache)} entries" if isinstance(cache, (tuple, list)) else f"the type {type(cache).__name__}"
        raise ValueError(f"{fn}: cache has {has}, expected the tuple ({', '.join(NAMES)})")
    entries = dict(zip(NAMES, cache, strict=True))
    xmu = _check.array(fn, "cache's xmu", entries["xmu"])
    if xmu.ndim != 2:
        raise ValueError(f"{fn}: cache's xmu has shape {xmu.shape}, expected (N, D)")
    shape, of = xmu.shape[1:], ", the features of xmu"
    xhat = _check.array(fn, "cache's xhat", entries["xhat"])
    if xhat.shape != xmu.shape:
        raise ValueError(f"{fn}: cache's xhat has shape {xhat.shape}, expected {xmu.shape}, the shape of xmu")
    gamma = _check.parameter(fn, "cache's gamma", entries["gamma"], shape, of)
    var = _check.variance(fn, "cache's var", entries["var"], shape, of)
    ivar, sqrtvar = (_check.parameter(fn, f"cache's {name}", entries[name], shape, of) for name in ("ivar", "sqrtvar"))
    eps = _check.number(fn, "cache's eps", entries["eps"], 0.0)
    dout = _check.like_x(fn, "dout", dout, xmu.shape)
    with np.errstate(all="ignore"):
        root = np.sqrt(var + eps)
        for name, found, expected in (("sqrtvar", sqrtvar, root), ("ivar", ivar, 1.0 / root)):
            if not np.allclose(found, expected, rtol=1e-2, atol=0.0, equal_nan=True):
                formula = "sqrt(var + eps)" if name == "sqrtvar" else "1 / sqrt(var + eps)"
                raise ValueError(f"{fn}: cache's {name} is another than its var and eps say, expected {formula}")
    with np.errstate(all="ignore"):
        mean, m2 = np.zeros(shape), var.astype(np.float64) * len(xmu)  # xmu is x without its mean
    dtype = _check.result_dtype(xmu)
    wide = np.promote_types(dtype, np.float32)  # whatever gamma's: the notebooks' gradients are in that of the data
    saved = Saved._of_parts(xmu, mean, m2, gamma, None, axis=(1,), eps=eps, dtypes=(dtype, wide, wide))
    dx, dgamma, dbeta = batch_norm_backward(dout, saved)
    return dx, dgamma, dbeta
