"""JAX: `batch_norm_train` and `batch_norm` of JAX arrays, on the CPU, under jit, grad and vmap.

For JAX 0.6.1 and later: `jax.custom_vjp` over `jax.experimental.buffer_callback`, which hands over XLA's own memory:
nothing is copied on the way in or out. `jax.pure_callback` makes JAX arrays of its inputs first, on XLA's threads,
which may all be waiting for callbacks then: with one thread, or with several callbacks at once, it can stand still for
good. The callbacks here call nothing of JAX.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from .. import functional as f
from ._gradients import through_inference, through_training
from ._need import need

jax = need("jax", "jax", __name__)
jnp = need("jax.numpy", "jax", __name__)
buffer_callback = need("jax.experimental.buffer_callback", "jax", __name__).buffer_callback

Array = npt.NDArray[Any]
Axes = tuple[int, ...]

__all__ = ["batch_norm", "batch_norm_train"]


def batch_norm_train(
    x: Any, gamma: Any = None, beta: Any = None, *, axis: int | tuple[int, ...] = 1, eps: float = 1e-5
) -> tuple[Any, Any, Any]:
    """Normalize with the statistics of x itself: `fastbn.batch_norm_train` for JAX.

    Parameters
    ----------
    x : (N, C, ...) jax.Array
        float16, bfloat16, float32, or float64 where JAX has it enabled; any rank. At least two values per channel.
    gamma, beta : (C,) jax.Array, optional
        Scale and shift, or a scalar for all channels; 1 and 0 when omitted.
    axis : int or tuple of ints
        The **channel** axis: 1 here, too; Flax has -1. Static.
    eps : float
        Added to the variance. Static.

    Returns
    -------
    y : jax.Array of x's shape and dtype
    mean, var : (C,) jax.Array
        The statistics of x, float32, or float64 for a float64 x; var is divided by n. For running statistics
        (``momentum * old + (1 - momentum) * mean``) and whatever else; gradients go through them, too.

    Raises
    ------
    ValueError
        Wrong shapes, axis out of range, one value per channel, negative eps: when it is called or traced.
    TypeError
        A dtype that is not listed above. When it is differentiated twice, or forwards (`jax.jvp`).

    Notes
    -----
    First-order reverse mode (`jax.grad`, `jax.vjp`) only. `jax.vmap` calls it once for each slice. On the CPU only: on
    other devices compilation or the callback fails.

    Examples
    --------
    >>> import jax.numpy as jnp, fastbn.interop.jax as fj
    >>> y, mean, var = fj.batch_norm_train(jnp.array([[1.0, 10.0], [3.0, 30.0]]), eps=0)
    >>> y.tolist(), mean.tolist(), var.tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], [2.0, 20.0], [1.0, 100.0])
    """
    fn = "fastbn.interop.jax.batch_norm_train"
    x, axes, shape, eps = _given(fn, x, axis, eps)
    if x.size and x.size == np.prod(shape, dtype=int):
        raise ValueError(
            f"{fn}: x has one value per channel, expected at least two in training; x has shape {x.shape}, axis={axis}"
        )
    gamma, beta = (_parameter(fn, name, a, shape) for name, a in (("gamma", gamma), ("beta", beta)))
    y, mean, var = _train(x, gamma, beta, axes, eps)
    return y, mean, var


def batch_norm(
    x: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None, *,
    axis: int | tuple[int, ...] = 1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Normalize with given statistics: `fastbn.batch_norm` for JAX.

    Parameters
    ----------
    x, gamma, beta, axis, eps
        As in `batch_norm_train`; one value per channel is enough.
    mean, var : (C,) jax.Array
        Population (running) statistics; a scalar stands for all channels. var must not be negative.

    Returns
    -------
    y : jax.Array of x's shape and dtype
        Gradients go to x, mean, var, gamma and beta.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm_train`. A negative var is found when it is computed: JAX then raises its own runtime error, with
        the ValueError in its text.
    """
    fn = "fastbn.interop.jax.batch_norm"
    x, axes, shape, eps = _given(fn, x, axis, eps)
    given = ("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta)
    for name, a in given[:2]:
        if a is None:
            raise TypeError(f"{fn}: {name} is None, expected an array")
    mean, var, gamma, beta = (_parameter(fn, name, a, shape) for name, a in given)
    return _infer(x, mean, var, gamma, beta, axes, eps)


# ------------------------------------------------------------------------------------------------------------- checks


def _given(fn: str, x: Any, axis: Any, eps: Any) -> tuple[Any, Axes, tuple[int, ...], float]:
    """x, the channel axes, the shape of the channels, eps."""
    x = _float(fn, "x", x)
    axes = _check.axes(fn, axis, x.shape)
    return x, axes, tuple(x.shape[a] for a in axes), _check.eps(fn, eps)


def _float(fn: str, name: str, value: Any) -> Any:
    a = _jax_array(fn, name, value)
    if a.dtype.name not in _check.FLOATS:
        raise TypeError(f"{fn}: {name} has dtype {a.dtype.name}, expected one of {', '.join(_check.FLOATS)}")
    return a


def _jax_array(fn: str, name: str, value: Any) -> Any:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{fn}: {name} is of type {type(value).__name__}, expected a JAX array: {error}") from error


def _parameter(fn: str, name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """A value for each channel, or None."""
    if value is None:
        return None
    a = _jax_array(fn, name, value)
    a = _float(fn, name, a.astype(jnp.float32) if a.dtype.kind in "biu" else a)
    if a.shape not in (shape, ()):
        raise ValueError(f"{fn}: {name} has shape {a.shape}, expected {shape}, the channels of x, or ()")
    return jnp.broadcast_to(a, shape)


# ----------------------------------------------------------------------------------------------------------- training


def _train_forward(x: Any, gamma: Any, beta: Any, axes: Axes, eps: float) -> tuple[Any, Any]:
    shape = tuple(x.shape[a] for a in axes)
    statistic = jax.ShapeDtypeStruct(shape, np.float64 if x.dtype == np.float64 else np.float32)
    state = jax.ShapeDtypeStruct((2, *shape, 2), np.uint32)  # mean and m2 in float64, which JAX may not have enabled
    results = (_like(x), statistic, statistic, state)
    y, mean, var, state = _outside(_training(axes, eps), results, x, gamma, beta)
    return (y, mean, var), (x, gamma, beta, state)


def _train_primal(x: Any, gamma: Any, beta: Any, axes: Axes, eps: float) -> Any:
    return _train_forward(x, gamma, beta, axes, eps)[0]


def _train_backward(axes: Axes, eps: float, kept: Any, gradients: Any) -> Any:
    return _outside(_training_gradients(axes, eps), _likes(kept[:3]), *kept, *gradients)


@functools.cache  # JAX compiles a call again where it meets another function
def _training(axes: Axes, eps: float) -> Callable[..., None]:
    def call(_: Any, out: Any, *given: Any) -> None:
        y, mean, var, state = _arrays(out)
        x, gamma, beta = _arrays(given)
        _, saved = f.batch_norm_train(x, gamma, beta, axis=axes, eps=eps, out=y)
        m = saved._shared_moments()
        with np.errstate(all="ignore"):
            mean[...], var[...] = saved.mean, saved.var
        state.view(np.float64)[..., 0] = m.mean, m.m2

    return call


@functools.cache
def _training_gradients(axes: Axes, eps: float) -> Callable[..., None]:
    def call(_: Any, out: Any, *given: Any) -> None:
        dx, dgamma, dbeta = _arrays(out)
        x, gamma, beta, statistics, dy, dmean, dvar = _arrays(given)
        mean, m2 = statistics.view(np.float64)[..., 0]
        saved = f.Saved._of_parts(x, mean, m2, gamma, beta, axis=axes, eps=eps)
        _, *found = through_training(dy, dmean, dvar, saved, axes, out=dx)
        _store((dgamma, dbeta), found)

    return call


# ---------------------------------------------------------------------------------------------------------- inference


def _infer_primal(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, axes: Axes, eps: float) -> Any:
    return _outside(_inference(axes, eps), _like(x), x, mean, var, gamma, beta)


def _infer_forward(*given: Any) -> tuple[Any, Any]:
    return _infer_primal(*given), given[:5]


def _infer_backward(axes: Axes, eps: float, kept: Any, dy: Any) -> Any:
    return _outside(_inference_gradients(axes, eps), _likes(kept), *kept, dy)


@functools.cache
def _inference(axes: Axes, eps: float) -> Callable[..., None]:
    def call(_: Any, out: Any, *given: Any) -> None:
        f.batch_norm(*_arrays(given), axis=axes, eps=eps, out=np.asarray(out))

    return call


@functools.cache
def _inference_gradients(axes: Axes, eps: float) -> Callable[..., None]:
    def call(_: Any, out: Any, *given: Any) -> None:
        dx, *results = _arrays(out)
        *forward, dy = _arrays(given)
        saved = f.Saved.fixed(*forward, axis=axes, eps=eps)
        _, *found = through_inference(dy, saved, forward[3], out=dx)
        _store(results, found)

    return call


# ------------------------------------------------------------------------------------------------------------- shared


def _like(a: Any) -> Any:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _likes(arrays: Any) -> tuple[Any, ...]:
    return tuple(None if a is None else _like(a) for a in arrays)


def _arrays(buffers: Any) -> tuple[Any, ...]:
    """Views of XLA's memory, None where there is none. Those of inputs are writable, too, and must not be written."""
    return tuple(None if b is None else np.asarray(b) for b in buffers)


def _store(results: Any, values: Any) -> None:
    with np.errstate(all="ignore"):
        for result, value in zip(results, values, strict=True):
            if result is not None:
                result[...] = value


def _outside_primal(callback: Callable[..., None], results: Any, *given: Any) -> Any:
    return buffer_callback(callback, results, vmap_method="sequential")(*given)


# Below what `custom_vjp` takes away for the first derivative: a second one meets this, not an error of the callback.
def _refuse(*_: Any) -> None:
    raise TypeError(
        "fastbn.interop.jax: batch norm is differentiated twice, expected once: its gradient is computed outside of JAX"
    )


_outside = jax.custom_jvp(_outside_primal, nondiff_argnums=(0, 1))
_outside.defjvp(_refuse)
_train = jax.custom_vjp(_train_primal, nondiff_argnums=(3, 4))
_train.defvjp(_train_forward, _train_backward)
_infer = jax.custom_vjp(_infer_primal, nondiff_argnums=(5, 6))
_infer.defvjp(_infer_forward, _infer_backward)
