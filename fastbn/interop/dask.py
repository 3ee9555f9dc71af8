"""dask arrays: statistics and batch normalization of arrays that lie in chunks, on threads, processes or a cluster.

After dask 2026.8 (`dask.array.Array`, `dask.delayed`): everything here is lazy, as in dask.array, and computes on
whatever scheduler is in charge. Chunks may lie along any axis, the channel axis too, be uneven or empty, and along
other axes than the channels' of unknown size.

Each chunk is one task on one thread, whatever `get_num_threads` says: dask's workers are the parallelism, and none of
Numba's threads are started. So cut large arrays into at least as many chunks as there are workers.

The bits depend on the chunks alone, not on the scheduler or the number of workers: moments of chunks merge in a tree
that their positions in the array decide.
"""

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import _check
from .._threads import one_thread
from ..functional import batch_norm as _batch_norm
from ..moments import Moments
from . import _parts
from ._need import need

dask, da = need("dask", "dask", __name__), need("dask.array", "dask", __name__)

__all__ = ["batch_norm", "batch_norm_train", "moments"]

Array = npt.NDArray[Any]

FAN_IN = 16
"""Parts that one task merges. Not dask's setting `split_every`: the bits would depend on it."""


def moments(array: Any, axis: int | tuple[int, ...] = 1, *, where: Any = None) -> Any:
    """Count, mean and centred sum of squares of each channel, lazily.

    Parameters
    ----------
    array : dask array
        Of NumPy chunks and any dtype that `fastbn.batch_norm` takes; not yet computed.
    axis : int or tuple of ints
        The **channel** axis, as in `fastbn.moments`; all others are reduced. ``()``: the whole array.
    where : dask or NumPy array that broadcasts to the shape of `array`, optional
        Weights of the values, as in `fastbn.moments`.

    Returns
    -------
    dask.delayed.Delayed
        Of a `fastbn.Moments`: ``.compute()`` gives it, and ``m.mean``, ``m.var()`` are delayed, too; `batch_norm` takes
        them as they are.

    Raises
    ------
    ValueError
        An axis out of range, an unknown chunk size along a channel axis. What only the values show (weights below 0)
        is raised when it is computed.
    TypeError
        No dask array, a dtype that is not listed, chunks that are not NumPy arrays.

    Notes
    -----
    Chunks are read once; those with a channel whose mean is 1,000 standard deviations from 0 twice. A chunk in neither
    C nor Fortran order (a transposed one, say) is copied. One task a chunk and about one for 16 chunks; a task hands on
    32 bytes a channel.

    Examples
    --------
    >>> import dask.array as da, fastbn.interop.dask as fd
    >>> x = da.arange(6, chunks=4, dtype="float64").reshape(3, 2)
    >>> m = fd.moments(x, axis=1).compute()
    >>> m.count, m.mean, m.var()
    (3, array([2., 3.]), array([2.66666667, 2.66666667]))
    """
    fn = "moments"
    axes = _axes(fn, array, axis)
    weights = _weights(fn, where, array)
    return _delayed(array, axes, weights, _statistics(array, axes, weights))


def batch_norm(
    array: Any,
    mean: Any,
    var: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    residual: Any = None,
    activation: Literal["relu"] | None = None,
) -> Any:
    """Normalize with given statistics, lazily: inference.

    Parameters
    ----------
    array : dask array
        As in `moments`.
    mean, var, gamma, beta : (C,) NumPy array, dask array or dask.delayed.Delayed
        As in `fastbn.batch_norm`; NumPy arrays and scalars are copied. A Delayed must give the shape of the channels.
    axis, eps, activation
        As in `fastbn.batch_norm`.
    residual : dask or NumPy array of the shape of `array`, optional
        Added before the activation; rechunked to the chunks of `array`.

    Returns
    -------
    dask array
        y: shape and chunks of `array`, dtype as in `fastbn.batch_norm`.

    Raises
    ------
    ValueError, TypeError
        As `moments`; and wrong shapes, negative eps, negative var (of a dask array when it is computed).

    Notes
    -----
    One task a chunk, which reads it once. The backward of a batch is `fastbn.batch_norm_backward`, chunk by chunk, with
    `fastbn.Saved.fixed`.

    Examples
    --------
    >>> import dask.array as da, fastbn.interop.dask as fd
    >>> x = da.from_array([[1.0, 10.0], [3.0, 30.0]], chunks=1)
    >>> fd.batch_norm(x, [2, 20], [1, 100], eps=0).compute()
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    fn = "batch_norm"
    axes = _axes(fn, array, axis)
    eps, _ = _check.eps(fn, eps), _check.activation(fn, activation)
    given = [
        _parameter(fn, name, value, array, axis, axes)
        for name, value in (("mean", mean), ("var", var), ("gamma", gamma), ("beta", beta))
    ]
    residual = None if residual is None else _like(fn, "residual", residual, array)
    whole = range(array.ndim)
    return da.blockwise(
        _normalized, whole, array, whole, *_arguments(axes, *given), *_arguments(whole, residual), axes=axes, eps=eps,
        activation=activation, **_result(array),
    )  # fmt: skip


def batch_norm_train(
    array: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    where: Any = None,
    residual: Any = None,
    activation: Literal["relu"] | None = None,
) -> tuple[Any, Any]:
    """Normalize with the statistics of the array itself, lazily: the training forward.

    Parameters
    ----------
    array, gamma, beta, axis, eps, residual, activation
        As in `batch_norm`. Each channel needs at least two values.
    where : dask or NumPy array that broadcasts to the shape of `array`, optional
        As in `moments`.

    Returns
    -------
    y : dask array
        As in `batch_norm`.
    m : dask.delayed.Delayed
        The moments that normalize it, as of `moments`, for `fastbn.update_running`. ``dask.compute(y, m)`` measures
        once for both.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`; one value per channel (of unknown chunk sizes when it is computed).

    Notes
    -----
    Every chunk is read twice, by `moments` and by the normalization, which waits for all chunks of its channels. dask
    keeps the chunks in memory meanwhile, or reads them again if `array` is persisted or spilled by the cluster.

    Examples
    --------
    >>> import dask, dask.array as da, fastbn.interop.dask as fd
    >>> x = da.from_array([[1.0, 10.0], [3.0, 30.0]], chunks=1)
    >>> y, m = dask.compute(*fd.batch_norm_train(x, eps=0))
    >>> y, m.mean
    (array([[-1., -1.],
           [ 1.,  1.]]), array([ 2., 20.]))
    """
    fn = "batch_norm_train"
    axes = _axes(fn, array, axis)
    eps, _ = _check.eps(fn, eps), _check.activation(fn, activation)
    gamma = _parameter(fn, "gamma", gamma, array, axis, axes)
    beta = _parameter(fn, "beta", beta, array, axis, axes)
    residual = None if residual is None else _like(fn, "residual", residual, array)
    weights = _weights(fn, where, array)
    if _per_channel(array, axes) == 1 and array.size:
        raise ValueError(_one_value(f"array has shape {array.shape}, axis={_check.shown(axis)}"))
    statistics = _statistics(array, axes, weights)
    whole = range(array.ndim)
    y = da.blockwise(
        _trained, whole, array, whole, *_arguments(axes, statistics, gamma, beta), *_arguments(whole, residual),
        axes=axes, eps=eps, activation=activation, weighted=weights is not None, **_result(array),
    )  # fmt: skip
    return y, _delayed(array, axes, weights, statistics)


# ------------------------------------------------------------------------------------------------------------ the graph


def _axes(fn: str, array: Any, axis: Any) -> tuple[int, ...]:
    """The channel axes of a dask array that can be normalized."""
    if not isinstance(array, da.Array):
        raise TypeError(f"{fn}: array is of type {type(array).__name__}, expected a dask array")
    meta = array._meta
    if not isinstance(meta, np.ndarray) or isinstance(meta, np.ma.MaskedArray):
        raise TypeError(f"{fn}: array has chunks of type {type(meta).__name__}, expected NumPy arrays")
    _check.dtype(fn, "array", array.dtype)
    axes = _check.axes(fn, axis, array.shape, "array")
    for a in axes:
        if math.isnan(array.shape[a]):
            raise ValueError(
                f"{fn}: array has chunks of unknown size along axis {a}, a channel axis; expected known ones "
                "(array.compute_chunk_sizes() finds them)"
            )
    return axes


def _parameter(fn: str, name: str, value: Any, array: Any, axis: Any, axes: tuple[int, ...]) -> Any:
    """A parameter as a dask array with the chunks of the channels."""
    if value is None and name in ("gamma", "beta"):
        return None
    shape = tuple(array.shape[a] for a in axes)
    chunks = tuple(array.chunks[a] for a in axes)
    if dask.is_dask_collection(value) and not isinstance(value, da.Array):
        value = da.from_delayed(value, shape, np.float64)
    if isinstance(value, da.Array):
        if value.shape not in (shape, ()):
            raise ValueError(f"{fn}: {name} has shape {value.shape}, expected {shape}, the channels of array")
        return da.broadcast_to(value, shape).rechunk(chunks)
    check = _check.variance if name == "var" else _check.parameter
    a = check(fn, name, value, shape, (array, axis))
    return da.from_array(np.array(np.broadcast_to(a, shape)), chunks=chunks)


def _like(fn: str, name: str, value: Any, array: Any) -> Any:
    """An array of the same shape, in the same chunks."""
    a = da.asarray(value)
    _check.dtype(fn, name, a.dtype)
    known = not any(map(math.isnan, (*a.shape, *array.shape)))
    if a.shape != array.shape if known else a.numblocks != array.numblocks:
        what = f"has shape {a.shape}" if known else f"has {a.numblocks} chunks along its axes"
        expected = array.shape if known else array.numblocks
        raise ValueError(f"{fn}: {name} {what}, expected {expected}, as array has")
    return a.rechunk(array.chunks) if known else a


def _weights(fn: str, where: Any, array: Any) -> Any:
    """Weights as a dask array whose axes have either the chunks of `array` or length 1."""
    if where is None:
        return None
    w = da.asarray(where)
    _check.dtype(fn, "where", w.dtype)
    shape = array.shape[array.ndim - w.ndim :] if w.ndim <= array.ndim else None
    if shape is None or any(
        own != 1 and own != n and not (math.isnan(own) or math.isnan(n)) for own, n in zip(w.shape, shape, strict=True)
    ):
        raise ValueError(
            f"{fn}: where has shape {w.shape}, expected one that broadcasts to that of array, {array.shape}"
        )
    chunks = array.chunks[array.ndim - w.ndim :]
    unknown = [n != 1 and (math.isnan(n) or math.isnan(m)) for n, m in zip(w.shape, shape, strict=True)]
    for u, own, theirs in zip(unknown, w.chunks, chunks, strict=True):
        if u and len(own) != len(theirs):
            raise ValueError(f"{fn}: where has {len(own)} chunks along an axis of unknown size, expected {len(theirs)}")
    wanted = {a: c for a, (c, n, u) in enumerate(zip(chunks, w.shape, unknown, strict=True)) if n != 1 and not u}
    return w.rechunk(wanted)


def _arguments(axes: Any, *arrays: Any) -> list[Any]:
    """What blockwise wants: an array and its axes; None and None."""
    return [v for a in arrays for v in ((a, None) if a is None else (a, tuple(axes)))]


def _result(array: Any) -> dict[str, Any]:
    """Of y; and that chunks are taken as they are: those of unknown size cannot be compared."""
    dtype = _check.result_dtype(array)
    return {"dtype": dtype, "meta": np.empty((0,) * array.ndim, dtype), "align_arrays": False, "concatenate": True}


def _statistics(array: Any, axes: tuple[int, ...], weights: Any) -> Any:
    """A dask array of the parts of the channels, with the chunks of the channel axes."""
    reduced = tuple(a for a in range(array.ndim) if a not in axes)
    whole = range(array.ndim)
    of_weights = () if weights is None else tuple(whole)[array.ndim - weights.ndim :]
    parts = da.blockwise(
        _measured, whole, array, whole, *_arguments(of_weights, weights), axes=axes,
        adjust_chunks=dict.fromkeys(reduced, 1), dtype=_parts.PART, meta=np.empty((0,) * array.ndim, _parts.PART),
        align_arrays=False, concatenate=True,
    )  # fmt: skip
    if not reduced:
        return parts
    fan_in = max(2, int(FAN_IN ** (1 / len(reduced))))
    return da.reduction(
        parts, chunk=_same, combine=_merged, aggregate=_merged, axis=reduced, dtype=_parts.PART,
        split_every=dict.fromkeys(reduced, fan_in), meta=np.empty((0,) * len(axes), _parts.PART),
    )  # fmt: skip


def _per_channel(array: Any, axes: tuple[int, ...]) -> float:
    """Values of each channel; NaN if that is unknown."""
    return float(math.prod(n for a, n in enumerate(array.shape) if a not in axes))


def _delayed(array: Any, axes: tuple[int, ...], weights: Any, statistics: Any) -> Any:
    n = _per_channel(array, axes)
    return dask.delayed(_moments, pure=True)(statistics, None if math.isnan(n) else int(n), weights is not None)


# ------------------------------------------------------------------------------------------------------------ the tasks


def _measured(x: Array, w: Array | None, *, axes: tuple[int, ...]) -> Array:
    """The part of each channel that a chunk is, of length 1 along the other axes."""
    if not x.flags.forc:
        x = np.ascontiguousarray(x)  # as it would be sent to another process: the bits depend on the memory order
    with one_thread():
        part = _parts.measured(x, axes, w)
    return part.reshape([n if a in axes else 1 for a, n in enumerate(x.shape)])


def _same(parts: Array, axis: Any, keepdims: bool) -> Array:
    return parts


def _merged(parts: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    first = np.moveaxis(parts, axis, range(len(axis)))
    number, channels = math.prod(first.shape[: len(axis)]), first.shape[len(axis) :]
    part = _parts.merged(first.reshape(number, *channels))
    return np.expand_dims(part, axis) if keepdims else part


def _normalized(
    x: Array, mean: Array, var: Array, gamma: Array | None, beta: Array | None, residual: Array | None, *,
    axes: tuple[int, ...], eps: float, activation: Literal["relu"] | None,
) -> Array:  # fmt: skip
    with one_thread():
        return _batch_norm(x, mean, var, gamma, beta, axis=axes, eps=eps, residual=residual, activation=activation)


def _trained(
    x: Array, part: Array, gamma: Array | None, beta: Array | None, residual: Array | None, *, axes: tuple[int, ...],
    eps: float, activation: Literal["relu"] | None, weighted: bool,
) -> Array:  # fmt: skip
    n = part["count"]
    if not weighted and (n == 1).any():
        raise ValueError(_one_value("array has chunks of unknown size"))
    seen = n > 0  # else the mean means nothing
    with np.errstate(all="ignore"):
        mean, var = np.where(seen, part["mean"], 0.0), np.where(seen, part["m2"] / n, 0.0)
    return _normalized(x, mean, var, gamma, beta, residual, axes=axes, eps=eps, activation=activation)


def _moments(part: Array, count: int | None, weighted: bool) -> Moments:
    if not weighted and count is None:
        count = int(part["count"].flat[0]) if part.size else 0
    return _parts.moments_of(part, None if weighted else count)


def _one_value(of: str) -> str:
    return f"batch_norm_train: array has one value per channel, expected at least two in training; {of}"
