"""Gradients for systems that differentiate whatever depends on their inputs: through the statistics, too."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..functional import Saved, batch_norm, batch_norm_backward

Array = npt.NDArray[Any]


def through_training(
    dy: Array, dmean: Array, dvar: Array, saved: Saved, axis: tuple[int, ...], out: Array | None = None
) -> tuple[Array, Array, Array]:
    """dx, dgamma, dbeta of a training forward whose results are y, mean and var.

    The mean adds dmean / n to dx, the variance 2 * dvar / n * (x - mean): an affine map of x, and one pass more. None
    where nothing depends on them.
    """
    dx, dgamma, dbeta = batch_norm_backward(dy, saved, out=out)
    if dx.size and (np.any(dmean) or np.any(dvar)):
        with np.errstate(all="ignore"):
            slope, shift = (np.asarray(d, np.float64) / saved.count for d in (2.0 * np.asarray(dvar), dmean))
        batch_norm(saved.x, saved.mean, 1.0, slope, shift, axis=axis, eps=0.0, residual=dx, out=dx)
    return dx, dgamma, dbeta


def through_inference(
    dy: Array, saved: Saved, gamma: Array | None, out: Array | None = None
) -> tuple[Array, Array, Array, Array, Array]:
    """dx, dmean, dvar, dgamma, dbeta of a forward with given statistics, those of the statistics in float64."""
    dx, dgamma, dbeta = batch_norm_backward(dy, saved, out=out)
    with np.errstate(all="ignore"):
        v = saved.var + saved.eps
        invstd = np.where(v == 0, 0.0, 1.0 / np.sqrt(v))
        factor = invstd if gamma is None else invstd * np.asarray(gamma, np.float64)
        dmean = -factor * np.asarray(dbeta, np.float64)
        dvar = -0.5 * factor * invstd * np.asarray(dgamma, np.float64)
    return dx, dmean, dvar, dgamma, dbeta
