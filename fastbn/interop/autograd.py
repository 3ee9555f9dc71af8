"""autograd (HIPS): `batch_norm_train` and `batch_norm` as primitives with their gradients.

For autograd 1.7 and later: `autograd.extend.primitive` and rules of reverse mode. Its arrays are NumPy's: no copies.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from .. import functional as f
from ._gradients import through_inference, through_training
from ._need import need

extend = need("autograd.extend", "autograd", __name__)

Array = npt.NDArray[Any]

__all__ = ["batch_norm", "batch_norm_train"]


def batch_norm_train(
    x: Any, gamma: Any = None, beta: Any = None, *, axis: int | tuple[int, ...] = 1, eps: float = 1e-5
) -> Any:
    """Normalize with the statistics of x itself: `fastbn.batch_norm_train` for autograd.

    Parameters
    ----------
    x : (N, C, ...) array
        float16, float32 or float64. At least two values per channel. The backward refers to it.
    gamma, beta : (C,) array, optional
        Scale and shift, or a scalar for all channels; 1 and 0 when omitted.
    axis : int or tuple of ints
        The **channel** axis.
    eps : float
        Added to the variance.

    Returns
    -------
    y : array of x's shape and dtype
    mean, var : (C,) float64 array
        The statistics of x; var is divided by n. For running statistics (``momentum * old + (1 - momentum) * mean``)
        and whatever else; gradients go through them, too.

    Raises
    ------
    ValueError, TypeError
        As `fastbn.batch_norm_train`.
    NotImplementedError
        When it is differentiated twice, or forwards (`autograd.make_jvp`).

    Examples
    --------
    >>> import autograd, autograd.numpy as np, fastbn.interop.autograd as fa
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> loss = lambda x, beta: np.sum(fa.batch_norm_train(x, 1.0, beta)[0] ** 2)
    >>> autograd.grad(loss, 1)(x, np.zeros(1)).round(9) + 0.0
    array([0.])
    """
    saved: list[f.Saved] = []  # a primitive gives only what has gradients: the rest of a forward leaves by this list
    return _train(x, gamma, beta, axis=axis, eps=eps, saved=saved)


def batch_norm(
    x: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None, *,
    axis: int | tuple[int, ...] = 1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Normalize with given statistics: `fastbn.batch_norm` for autograd.

    Parameters
    ----------
    x, gamma, beta, axis, eps
        As in `batch_norm_train`; one value per channel is enough.
    mean, var : (C,) array
        Population (running) statistics; a scalar stands for all channels.

    Returns
    -------
    y : array of x's shape and dtype
        Gradients go to x, mean, var, gamma and beta.

    Raises
    ------
    ValueError, TypeError
        As `fastbn.batch_norm`.
    NotImplementedError
        As `batch_norm_train`.
    """
    return _infer(x, mean, var, gamma, beta, axis=axis, eps=eps)


def _train_primal(x: Any, gamma: Any, beta: Any, *, axis: Any, eps: Any, saved: list[f.Saved]) -> Any:
    y, of = f.batch_norm_train(x, gamma, beta, axis=axis, eps=eps)
    saved.append(of)
    return y, of.mean, of.var


def _train_vjp(argnums: tuple[int, ...], _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def vjp(gradients: Any) -> Any:
        results = _train_gradients(*gradients, *args, **kwargs)
        return tuple(results[i] for i in argnums)

    return vjp


def _train_gradients_primal(
    dy: Any, dmean: Any, dvar: Any, x: Any, gamma: Any, beta: Any, *, axis: Any, eps: Any, saved: list[f.Saved]
) -> Any:
    (of,) = saved
    axes = _check.axes("batch_norm_train", axis, of.x.shape)
    return _shaped(through_training(dy, dmean, dvar, of, axes), (x, gamma, beta))


def _infer_primal(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, *, axis: Any, eps: Any) -> Any:
    return f.batch_norm(x, mean, var, gamma, beta, axis=axis, eps=eps)


def _infer_vjp(argnums: tuple[int, ...], _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    def vjp(dy: Any) -> Any:
        results = _infer_gradients(dy, *args, **kwargs)
        return tuple(results[i] for i in argnums)

    return vjp


def _infer_gradients_primal(dy: Any, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, *, axis: Any, eps: Any) -> Any:
    saved = f.Saved.fixed(x, mean, var, gamma, beta, axis=axis, eps=eps)
    return _shaped(through_inference(dy, saved, gamma), (x, mean, var, gamma, beta))


def _shaped(gradients: Any, arguments: Any) -> tuple[Any, ...]:
    """Each gradient in the shape and dtype of its argument: a scalar's is the sum over the channels."""
    found = []
    for gradient, argument in zip(gradients, arguments, strict=True):
        if argument is not None and np.shape(argument) == () != np.shape(gradient):
            gradient = np.sum(gradient, dtype=np.float64)
        dtype = getattr(argument, "dtype", None)
        found.append(gradient if dtype is None else np.asarray(gradient).astype(dtype, copy=False))
    return tuple(found)


# The gradients are primitives, too, so that going through them a second time meets this, and not NumPy on boxes.
def _refused(*_: Any) -> Any:
    raise NotImplementedError(
        "fastbn.interop.autograd: batch norm is differentiated twice, expected once: its gradient has no gradient"
    )


_train = extend.primitive(_train_primal)
_train_gradients = extend.primitive(_train_gradients_primal)
_infer = extend.primitive(_infer_primal)
_infer_gradients = extend.primitive(_infer_gradients_primal)
extend.defvjp_argnums(_train, _train_vjp)
extend.defvjp_argnums(_infer, _infer_vjp)
extend.defvjp_argnums(_train_gradients, _refused)
extend.defvjp_argnums(_infer_gradients, _refused)
