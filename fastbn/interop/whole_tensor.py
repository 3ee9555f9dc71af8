"""The whole-tensor layer: one mean and one standard deviation over all elements, as teaching notebooks write it.

``y = gamma * (x - x.mean()) / x.std() + beta`` with PyTorch's `std`, which divides by n - 1; gamma and beta are
numbers, and there is no eps. No axis is a channel axis: it is batch normalization with ``axis=()``.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import Saved, batch_norm_backward, batch_norm_train

Array = npt.NDArray[Any]
Cache = tuple[Saved, float]

__all__ = ["backward", "forward"]


def forward(x: npt.ArrayLike, gamma: float = 1.0, beta: float = 0.0) -> tuple[Array, Cache]:
    """Normalize a whole array to mean beta and unbiased standard deviation gamma.

    Parameters
    ----------
    x : array
        Of any rank and memory layout, with at least two elements.
    gamma, beta : float

    Returns
    -------
    y : array of x's shape
        In the dtype of x (of integers: float32).
    cache : tuple
        What `backward` needs. It refers to x, not to a copy.

    Raises
    ------
    ValueError
        Fewer than two elements.
    TypeError
        gamma or beta that are no numbers; a dtype that is not numeric.

    Notes
    -----
    Of an x whose elements are all equal y is beta, where the notebook divides 0 by 0.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import whole_tensor
    >>> y, cache = whole_tensor.forward(np.arange(6.0).reshape(2, 3))
    >>> bool(abs(y.std(ddof=1) - 1) < 1e-15), y.shape
    (True, (2, 3))
    """
    fn = "whole_tensor.forward"
    x = _check.array(fn, "x", x)
    low = -np.finfo(np.float64).max
    gamma = _check.number(fn, "gamma", gamma, low, expected="a finite number")
    beta = _check.number(fn, "beta", beta, low, expected="a finite number")
    if x.size < 2:
        raise ValueError(f"{fn}: x has shape {x.shape}, expected at least two elements")
    # The deviation that divides by n is smaller by this factor, which is a constant to the backward too.
    unbiased = float(np.sqrt((x.size - 1) / x.size))
    y, saved = batch_norm_train(x, gamma * unbiased, beta, axis=(), eps=0.0)
    return y, (saved, unbiased)


def backward(dy: npt.ArrayLike, cache: Cache) -> tuple[Array, float, float]:
    """Gradients of `forward`, through the mean and the unbiased standard deviation.

    ``dx = gamma / std * (dy - mean(dy) - xhat * sum(dy * xhat) / (n - 1))`` with ``xhat = (x - mean) / std``.

    Parameters
    ----------
    dy : array of x's shape
        Floating.
    cache : tuple
        From `forward`. It can be used again.

    Returns
    -------
    dx : array of x's shape
    dgamma, dbeta : float

    Raises
    ------
    ValueError
        dy of another shape than x.
    TypeError
        dy not floating, or another cache.
    """
    fn = "whole_tensor.backward"
    if not isinstance(cache, tuple) or len(cache) != 2 or not isinstance(cache[0], Saved):
        raise TypeError(f"{fn}: cache is of type {type(cache).__name__}, expected what forward returned")
    saved, unbiased = cache
    dx, dgamma, dbeta = batch_norm_backward(_check.like_x(fn, "dy", dy, saved.x.shape), saved)
    return dx, float(dgamma) * unbiased, float(dbeta)
