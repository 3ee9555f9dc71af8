"""MPI: training statistics and gradients over the batches of all ranks, whatever their sizes.

After mpi4py 4.1, `mpi4py.MPI.Intracomm`. Every function here is collective: all ranks of `comm` call it, with the same
channels, eps and parameters; sizes, memory layouts, dtypes and the number of the axis may differ, a batch may be empty.
The result is that of one process with all batches in one array.

What the ranks send is gathered to all of them and merged in the order of the ranks, so every rank has the same bits of
statistics and parameter gradients, and so of the running statistics. Gathering, not reducing: the order in which an MPI
adds up is its own affair.

A rank in trouble (a wrong shape, say) says so in the message that the others wait for: then every rank raises, none
waits forever. That holds for all that is checked or computed before the message, not for a rank that dies, is
interrupted or runs out of memory behind it: start programs by ``python -m mpi4py script.py``, which ends all ranks when
one fails.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt

from .. import _check, layer
from .._progress import bar
from ..conventions import CONVENTIONS
from ..functional import Saved as _Fixed
from ..functional import _dtype_of, frozen
from ..functional import batch_norm as _batch_norm
from ..functional import batch_norm_backward as _backward
from ..moments import Moments, seen, to_go_on_from
from . import _parts
from ._need import need

MPI = need("mpi4py.MPI", "mpi", __name__)

__all__ = ["BatchNorm", "Saved", "batch_norm_backward", "batch_norm_train", "moments"]

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


def moments(x: npt.ArrayLike, *, comm: Any = None, axis: int | tuple[int, ...] = 1) -> Moments:
    """Count, mean and centred sum of squares of each channel over the arrays of all ranks.

    Parameters
    ----------
    x : (N, C, ...) array
        Of this rank; N may differ, and be 0. See `fastbn.moments`.
    comm : mpi4py.MPI.Intracomm, optional
        ``MPI.COMM_WORLD`` if omitted.
    axis : int or tuple of ints
        The **channel** axis of x.

    Returns
    -------
    Moments
        The same bits on every rank.

    Raises
    ------
    ValueError, TypeError
        On every rank if x is wrong on one, or if the ranks have different channels.

    Notes
    -----
    Reads x once (far from 0 three times, and copies it as float64: see `batch_norm_train`). Two messages: the channels,
    and 3C + 2 float64.
    """
    fn = "moments"
    comm = _comm(fn, comm)

    def measured() -> tuple[Shape, Array, int]:
        a, shape, _ = _channels(fn, x, axis)
        return shape, *_measured(a, axis)

    return _exchanged(fn, comm, None, measured)


def batch_norm_train(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    comm: Any = None,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    residual: npt.ArrayLike | None = None,
    activation: Literal["relu"] | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalize with the statistics of the arrays of all ranks: the training forward of a synchronized layer.

    Parameters
    ----------
    x, gamma, beta, axis, eps, residual, activation, out
        As in `fastbn.batch_norm_train`, of this rank. `out` must not be x. All ranks together need at least two values
        per channel, or none.
    comm : mpi4py.MPI.Intracomm, optional
        ``MPI.COMM_WORLD`` if omitted.

    Returns
    -------
    y : array of x's shape
        As in `fastbn.batch_norm`.
    saved : Saved
        For `batch_norm_backward`; it refers to x. The statistics of all ranks are in ``saved.moments``.

    Raises
    ------
    ValueError, TypeError
        On every rank if an argument is wrong on one, or if the ranks have different channels. No rank has written.

    Notes
    -----
    Reads x twice and writes y once: all x must be measured before any y can be written. Where the mean of a channel is
    1,000 standard deviations from 0, x is read once more and copied as float64 block by block, for the digits that its
    mean lost: the variance of all ranks has 12 digits for any offset.

    Two messages: the channels, and 3C + 2 float64; a `BatchNorm` knows the channels and sends one. Each rank receives
    the second from all, 8 * (3C + 2) bytes from each.
    """
    return _trained("batch_norm_train", x, gamma, beta, _comm("batch_norm_train", comm), axis=axis, eps=eps,
                    residual=residual, activation=activation, out=out)  # fmt: skip


def batch_norm_backward(dy: npt.ArrayLike, saved: Saved, *, out: Array | None = None) -> tuple[Array, ...]:
    """Gradients of a `batch_norm_train` of this module, of the sum over all ranks of what `dy` is the gradient of.

    Parameters
    ----------
    dy : array of x's shape
        Of this rank.
    saved : Saved
        From `batch_norm_train`, of this rank.
    out : array of y's shape and dtype, optional
        Receives dx. May be dy itself.

    Returns
    -------
    dx : array of x's shape
        Of this rank.
    dgamma, dbeta : (C,) array
        Of all ranks, the same bits on each: they are not to be summed over the ranks again.
    dresidual : array of x's shape
        If the forward had a residual.

    Raises
    ------
    ValueError, TypeError
        On every rank if dy or `out` is wrong on one. The other ranks may have written `out`.

    Notes
    -----
    One message of 2C + 1 float64. dx is ``gamma * invstd * dy`` minus ``gamma * invstd * (dbeta + xhat * dgamma) / n``.
    The first term is computed with the sums of this rank (dy and x are read, dx is written), the second is added when
    those of all ranks are known (x and dx are read, dx is written). That is six passes over memory, where one process,
    which need not wait, has three (a channel's values fit in the cache) or five. dx is rounded to its dtype twice.
    """
    fn = "batch_norm_backward"
    if not isinstance(saved, Saved):
        raise TypeError(
            f"{fn}: saved is of type {type(saved).__name__}, expected the Saved that fastbn.interop.mpi's "
            "batch_norm_train returned"
        )
    fixed, m = saved._fixed, saved.moments
    shape = m.mean.shape
    found: list[Array] = []

    def summed() -> Array:
        found.extend(_backward(dy, fixed, out=out))
        return np.concatenate([found[1].reshape(-1), found[2].reshape(-1)])

    sums = _tree_sum(_gather(fn, saved.comm, 2 * m.mean.size, summed))
    dgamma, dbeta = (s.reshape(shape) for s in np.split(sums, 2))
    dx = found[0]
    if seen(m.count) and dx.size:
        with np.errstate(all="ignore"):
            v = saved.var + saved.eps
            weight = -saved._gamma * np.where(v == 0, 0.0, 1.0 / np.sqrt(v)) / m.count
            slope, shift = weight * dgamma, weight * dbeta
        dx = _batch_norm(
            fixed.x, m.mean, saved.var, slope, shift, axis=saved._axis, eps=saved.eps, residual=dx, out=dx
        )  # fmt: skip
    with np.errstate(all="ignore"):
        grads = (s.astype(d) for s, d in zip((dgamma, dbeta), saved._dtypes, strict=True))
        return (dx, *grads, *found[3:])


class Saved:
    """What `batch_norm_backward` needs of a forward on this rank.

    `batch_norm_train` returns one; its own constructor is not for callers.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        As given.
    moments : Moments
        Of all ranks.
    mean, var : (C,) float64 array
        Of all ranks; var is divided by n.
    eps : float
        What was added to the variances.
    """

    __slots__ = ("_axis", "_dtypes", "_fixed", "_gamma", "comm", "eps", "mean", "moments", "var")

    def __init__(
        self, comm: Any, m: Moments, var: Array, fixed: _Fixed, gamma: Array, dtypes: tuple[np.dtype[Any], ...],
        axis: Any,
    ) -> None:  # fmt: skip
        self.comm, self.moments, self.mean, self.var, self.eps = comm, m, m.mean, var, fixed.eps
        self._fixed, self._gamma, self._dtypes, self._axis = fixed, gamma, dtypes, axis

    @property
    def x(self) -> Array:
        """The input of this rank, not a copy."""
        return self._fixed.x

    @property
    def count(self) -> Any:
        """Values per channel of all ranks."""
        return self.moments.count

    def _shared_moments(self) -> Moments:
        return self.moments  # under the name by which a layer asks `fastbn.Saved` for them

    def __repr__(self) -> str:
        return f"Saved(x={self.x.dtype}{self.x.shape}, count={self.count}, rank {self.comm.rank} of {self.comm.size})"


class BatchNorm(layer.BatchNorm):
    """`fastbn.BatchNorm`, synchronized: in training it normalizes with the statistics of the batches of all ranks.

    Making one, calls in training, `backward` after them and `fit_population` are collective; calls in evaluation are
    not (but for a layer without running statistics). Running statistics, `dgamma` and `dbeta` have the same bits on all
    ranks, so that layers that start equal stay equal.

    Parameters
    ----------
    channels, **options
        As of `fastbn.BatchNorm`; all but `axis` the same on all ranks. ``BatchNorm.like(system, channels, comm=comm)``
        works, too.
    comm : mpi4py.MPI.Intracomm, optional
        ``MPI.COMM_WORLD`` if omitted.

    Raises
    ------
    ValueError, TypeError
        On every rank if an argument is wrong on one, or if they differ.

    Notes
    -----
    A training call sends one message of 3C + 2 float64, `backward` one of 2C + 1. Calls in training take no `where` and
    no ``out=x``. Pickles and copies keep `comm` if it can be pickled, as ``MPI.COMM_WORLD`` can.
    """

    comm: Any

    def __init__(self, channels: int | Shape, *, comm: Any = None, **options: Any) -> None:
        fn = "BatchNorm"
        self.comm = comm = _comm(fn, comm)
        error, own = None, None
        try:
            super().__init__(channels, **options)
            own = repr([v for k, v in sorted(options.items()) if k != "axis"] + [self.channels])
        except Exception as e:
            error = e
        # Pickled: it is only here that the ranks know nothing of each other.
        _agree(fn, comm, error)
        theirs = comm.allgather(own)
        if len(set(theirs)) > 1:
            raise ValueError(f"{fn}: channels and options are {' | '.join(theirs)} on the ranks, expected the same")

    def __call__(
        self,
        x: npt.ArrayLike,
        *,
        residual: npt.ArrayLike | None = None,
        where: npt.ArrayLike | None = None,
        save: bool | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize x; in training with the statistics of all ranks.

        Parameters
        ----------
        x, residual, save, out
            As in a call of `fastbn.BatchNorm`, of this rank. In training `out` must not be x.
        where
            Refused in training: weights are not synchronized.

        Returns
        -------
        y : array of x's shape

        Raises
        ------
        ValueError, TypeError
            On every rank if an argument is wrong on one; the running statistics stay as they were.
        """
        if not self.training and self.track_running_stats:
            return super().__call__(x, residual=residual, where=where, save=save, out=out)
        fn = "BatchNorm"
        tracks = self.training and self.track_running_stats
        kept: list[Any] = []

        def checked(a: Array) -> None:
            _check.channels(fn, a, self.axis, self.channels)
            kept.append(self.training if save is None else _check.flag(fn, "save", save))
            if where is not None:
                raise TypeError(f"{fn}: where is given, expected none: weights are not synchronized")
            if tracks:
                kept.extend(self._writable(fn))
                if isinstance(out, np.ndarray):
                    _check.apart(fn, "out", out, "running_mean", kept[1])
                    _check.apart(fn, "out", out, "running_var", kept[2])

        single = self._like is not None and CONVENTIONS[self._like].single
        y, saved = _trained(
            fn, x, self.gamma, self.beta, self.comm, axis=self.axis, eps=self.eps, residual=residual,
            activation=self.activation, out=out, channels=self.channels, checked=checked, single=single,
        )  # fmt: skip
        if tracks and seen(saved.count):
            mean, var = kept[1:]
            after, pool = self._after(mean, var, saved)  # type: ignore[arg-type]  # it has what that asks for
            batches = self.num_batches_tracked + 1
            mean[...], var[...] = after
            self.num_batches_tracked, self._pool = batches, pool
        self._saved = saved if kept[0] else None  # type: ignore[assignment]
        return y

    def backward(self, dy: npt.ArrayLike, *, out: Array | None = None) -> Array:
        """Gradient of the last call's x; sets `dgamma` and `dbeta`, those of all ranks, and `dresidual`.

        Parameters
        ----------
        dy, out
            As in `fastbn.BatchNorm.backward`, of this rank.

        Returns
        -------
        dx : array of x's shape

        Raises
        ------
        ValueError, TypeError
            As `batch_norm_backward`; ValueError before a call in training.
        """
        saved: Any = self._saved
        if not isinstance(saved, Saved):
            return super().backward(dy, out=out)
        dx, dgamma, dbeta, *more = batch_norm_backward(dy, saved, out=out)
        self.dgamma = dgamma if self.gamma is not None else None
        self.dbeta = dbeta if self.beta is not None else None
        self.dresidual = more[0] if more else None
        return dx

    def fit_population(
        self,
        batches: Iterable[npt.ArrayLike] | npt.ArrayLike,
        *,
        start: Moments | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Set the running statistics to those of the batches of all ranks, as many as each has.

        Parameters
        ----------
        batches
            As in `fastbn.BatchNorm.fit_population`, of this rank.
        start : Moments, optional
            Of what came before, the same on all ranks; it counts once.
        progress : bool, optional
            A bar for the batches of this rank.

        Returns
        -------
        BatchNorm
            The layer.

        Raises
        ------
        ValueError, TypeError
            On every rank if a batch is wrong on one, or too few samples in all. Nothing changes.

        Notes
        -----
        One message, after the last batch.
        """
        fn = "BatchNorm.fit_population"
        kept: list[Any] = []

        def measured() -> tuple[Shape, Array, int]:
            kept.extend(self._writable(fn))
            if start is not None:
                to_go_on_from(fn, start, self.channels)
            if progress is not None:
                _check.flag(fn, "progress", progress)
            one = _check.is_array(batches)
            given = (batches,) if one else batches
            if not isinstance(given, Iterable):
                raise TypeError(f"{fn}: batches is of type {type(batches).__name__}, expected an iterable of arrays")
            pool, count = _parts.measured(np.empty((0, *self.channels)), tuple(range(1, len(self.channels) + 1))), 0
            with bar(fn, given, False if one else progress) as shown:
                for batch in given:
                    x = _check.array(fn, "batch", batch)
                    _check.channels(fn, x, self.axis, self.channels, "batch")
                    part, n = _measured(x, self.axis)
                    pool, count = _parts.merged(np.stack([pool, part])), count + n
                    if shown is not None:
                        shown.update()
            return self.channels, pool, count

        pool = _exchanged(fn, self.comm, self.channels, measured)
        if start is not None:
            pool = start + pool
        _check.population(fn, pool.count, self.correction)
        mean, var = kept
        after = self._statistics_of(pool, mean, var)
        mean[...], var[...] = after
        self._pool = pool
        return self


# ----------------------------------------------------------------------------------------------------------- a forward


def _trained(
    fn: str, x: Any, gamma: Any, beta: Any, comm: Any, *, axis: Any, eps: Any, residual: Any, activation: Any, out: Any,
    channels: Shape | None = None, checked: Callable[[Array], None] | None = None, single: bool = False,
) -> tuple[Array, Saved]:  # fmt: skip
    own: list[_Own] = []

    def measured() -> tuple[Shape, Array, int]:
        a, shape, axes = _channels(fn, x, axis)
        if checked is not None:
            checked(a)
        own.append(_own(fn, a, gamma, beta, shape, axis, axes, eps, residual, activation, out))
        return shape, *_measured(a, axis)

    m = _exchanged(fn, comm, channels, measured)
    if m.count == 1 and not single:
        raise ValueError(f"{fn}: the ranks have one value per channel in all, expected at least two in training")
    var = np.zeros_like(m.mean)
    if m.count:
        var = m.var()
    a, g, b, dtypes = own[0]
    y, fixed = frozen(
        fn, a, m.mean, var, g, b, axis=axis, eps=eps, residual=residual, activation=activation, out=out, keep=True
    )  # fmt: skip
    assert fixed is not None
    return y, Saved(comm, m, var, fixed, g, dtypes, axis)


class _Own(NamedTuple):
    """What a rank brings to a forward, checked: gamma and beta in float64, which is what the sums are wanted in."""

    x: Array
    gamma: Array
    beta: Array
    dtypes: tuple[np.dtype[Any], ...]


def _own(
    fn: str, x: Array, gamma: Any, beta: Any, shape: Shape, axis: Any, axes: Shape, eps: Any, residual: Any,
    activation: Any, out: Any,
) -> _Own:  # fmt: skip
    """Every check of a forward: behind the message it is too late for one."""
    _check.eps(fn, eps)
    g = None if gamma is None else _check.parameter(fn, "gamma", gamma, shape, (x, axis))
    b = None if beta is None else _check.parameter(fn, "beta", beta, shape, (x, axis))
    dtype = _check.result_dtype(x, out)
    _check.activation(fn, activation)
    z = None if residual is None else _check.like_x(fn, "residual", residual, x.shape)
    if out is not None:
        reads = {"x": x, "gamma": g, "beta": b, "residual": z}
        _check.out(fn, out, x.shape, dtype, ("residual",), reads)
    return _Own(x, _wide(g, 1.0, shape), _wide(b, 0.0, shape), (_dtype_of(g, dtype), _dtype_of(b, dtype)))


def _wide(parameter: Array | None, default: float, shape: Shape) -> Array:
    with np.errstate(all="ignore"):
        return np.array(np.broadcast_to(default if parameter is None else parameter, shape), np.float64)


def _channels(fn: str, x: Any, axis: Any) -> tuple[Array, Shape, Shape]:
    a = _check.array(fn, "x", x)
    axes = _check.axes(fn, axis, a.shape)
    return a, tuple(a.shape[i] for i in axes), axes


def _measured(x: Array, axis: Any) -> tuple[Array, int]:
    """The part that x is, and its count: a part without channels has none."""
    part = _parts.measured(x, axis)
    return part, int(part["count"].flat[0]) if part.size else 0


# ---------------------------------------------------------------------------------------------------------- messages


def _comm(fn: str, comm: Any) -> Any:
    comm = MPI.COMM_WORLD if comm is None else comm
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise TypeError(f"{fn}: comm is of type {type(comm).__name__}, expected an mpi4py.MPI.Intracomm")
    return comm


def _exchanged(fn: str, comm: Any, channels: Shape | None, measured: Callable[[], tuple[Shape, Array, int]]) -> Moments:
    """The moments of all ranks; `measured` gives (shape of the channels, part, count) of this one.

    Where the `channels` are not known to all ranks, a rank that fails does not know how much the others send: then a
    message with the number of channels comes first.
    """
    own: list[tuple[Shape, Array, int]] = []
    error = None
    try:
        own.append(measured())
    except Exception as e:
        error = e

    def message() -> Array:
        if error is not None:
            raise error
        _, part, n = own[0]
        return np.concatenate([[n], *(part[f].reshape(-1) for f in ("mean", "rest", "m2"))])

    if channels is None:
        shapes = _gather(fn, comm, 1, lambda: np.array([float(message()[1:].size // 3)]))[:, 0]
        if (shapes != shapes[0]).any():
            raise ValueError(
                f"{fn}: x has {', '.join(f'{n:.0f}' for n in shapes)} channels on the ranks, expected the same number"
            )
        channels, size = own[0][0], int(shapes[0])
    else:
        size = int(np.prod(channels, dtype=int))
    got = _gather(fn, comm, 1 + 3 * size, message)
    counts = [int(n) for n in got[:, 0]]
    mean, rest, m2 = (got[:, 1 + i * size : 1 + (i + 1) * size] for i in range(3))
    parts = _parts.part(got[:, :1], mean, rest, m2)
    return _parts.moments_of(_parts.merged(parts).reshape(channels), sum(counts))


def _gather(fn: str, comm: Any, size: int, message: Callable[[], Array]) -> Array:
    """The messages of all ranks, `size` float64 each, in rows; or the error of any, on all."""
    send = np.zeros(1 + size)
    error = None
    try:
        send[1:] = message()
    except Exception as e:
        error = e
        send[0] = 1.0
    got = np.empty((comm.size, 1 + size))
    comm.Allgather([send, MPI.DOUBLE], [got, MPI.DOUBLE])
    if got[:, 0].any():
        _agree(fn, comm, error)
    return got[:, 1:]


def _agree(fn: str, comm: Any, error: Exception | None) -> None:
    """Raise, on every rank, if any has an error: its own, or the first that another has."""
    said = None if error is None else (type(error).__name__, str(error))
    all_said = comm.allgather(said)
    if error is not None:
        raise error
    for rank, theirs in enumerate(all_said):
        if theirs is not None:
            _raise_for(fn, rank, comm.size, *theirs)


def _raise_for(fn: str, rank: int, size: int, kind: str, text: str) -> NoReturn:
    of = {"ValueError": ValueError, "TypeError": TypeError, "MemoryError": MemoryError}.get(kind, RuntimeError)
    raise of(f"{fn}: rank {rank} of {size} failed with {kind}: {text}")


def _tree_sum(rows: Array) -> Array:
    """Their sum, neighbours first: of P rows each number goes through log2(P) roundings."""
    with np.errstate(all="ignore"):
        while len(rows) > 1:
            even = len(rows) // 2 * 2
            rows = np.concatenate([rows[0:even:2] + rows[1:even:2], rows[even:]])
    return np.asarray(rows[0])
