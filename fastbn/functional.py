"""The verbs: `batch_norm`, `batch_norm_train`, `batch_norm_backward`."""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from . import _check, kernels
from ._layout import Layout, Weights, is_dense, layout_of, steps_in, weights_of
from ._memory import Target, source
from ._threads import run
from .moments import Moments

Array = npt.NDArray[Any]
Relu = Array | Literal[True] | None
"""No activation, one, or one that leaves the bits of y > 0 in an array."""


def batch_norm(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    residual: npt.ArrayLike | None = None,
    activation: Literal["relu"] | None = None,
    out: Array | None = None,
) -> Array:
    """Normalize with given statistics: inference.

    ``y = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual)``

    Parameters
    ----------
    x : (N, C, ...) array
        Of dtype float16, bfloat16 (of the package ml_dtypes), float32, float64, any integer or bool; of any rank and
        memory layout. Read only.
    mean, var : (C,) array
        Population (running) statistics, of any of these dtypes; a scalar stands for all channels. They are computed
        with in float64.
    gamma, beta : (C,) array, optional
        Scale and shift, as `mean`; 1 and 0 when omitted.
    axis : int or tuple of ints, default 1
        The **channel** axis of x, along which C lies: 1 for NCHW and (N, D), -1 for NHWC. (Chainer's `axis` is the
        opposite: the axes that are reduced.) A tuple: statistics for each cell of these axes; wherever (C,) is written
        their shape is then ``tuple(x.shape[a] for a in sorted(axis))``, with negative axes counted from the end.
        ``()``: one statistic, of shape ``()``, for all of x.
    eps : float, default 1e-5
        Added to var; finite, 0 or more. Where var + eps is 0, y is beta.
    residual : array of x's shape, optional
        Floating. Added before the activation. Converted to the dtype of y, and to the memory order of x.
    activation : "relu", optional
        ``"relu"`` is max(0, .), and NaN where that is NaN. None: y as it is.
    out : array of y's shape and dtype, optional
        Receives y, in whatever memory order it has. May be x itself, or `residual`; other overlap with what is read is
        refused. For an x of integers or booleans it decides the dtype of y, and so that of dx.

    Returns
    -------
    y : array of x's shape
        In the dtype of x; of integers and booleans float32, or that of `out` if it is floating. In the memory order of
        x. This is `out` if given.

    Raises
    ------
    ValueError
        Wrong shapes, axis out of range, negative var or eps, `out` read-only or overlapping. Nothing is written.
    TypeError
        A dtype or type that is not listed above. Nothing is written.

    See Also
    --------
    batch_norm_train : The statistics of x itself.
    Saved.fixed : What a backward through this function needs.
    BatchNorm : The same with parameters and running statistics kept, `BatchNorm.eval`.
    fold_conv, fold_linear : No batch norm at all: weights that do it.

    Notes
    -----
    Reads x (and the residual) once and writes y once, also from NHWC memory into an NCHW `out`. An x that is contiguous
    in no order of its axes, unaligned or in a foreign byte order is copied first. A y of 4 MiB and more without `out`
    lies in recycled memory, see `set_pool_limit`.

    Of half precision y is computed in float64 and rounded once. An empty x gives an empty y. NaN and Inf stay in their
    channel. PyTorch calls gamma and beta `weight` and `bias`; Keras's default axis is -1 and its eps 1e-3.

    References
    ----------
    Ioffe, Szegedy 2015, "Batch Normalization", arXiv:1502.03167, Algorithm 2, step 11.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_norm(np.array([[1.0, 10.0], [3.0, 30.0]]), mean=[2, 20], var=[1, 100], eps=0)
    array([[-1., -1.],
           [ 1.,  1.]])

    A picture of bytes in NHWC, its channels along the last axis, into an array of your own in NCHW:

    >>> picture = np.full((1, 4, 4, 3), 255, np.uint8)
    >>> y = np.empty((1, 3, 4, 4), np.float32)
    >>> _ = fastbn.batch_norm(picture, mean=127.5, var=127.5**2, axis=-1, eps=0, out=y.transpose(0, 2, 3, 1))
    >>> y[0, :, 0, 0]
    array([1., 1., 1.], dtype=float32)
    """
    return frozen(
        "batch_norm", x, mean, var, gamma, beta, axis=axis, eps=eps, residual=residual, activation=activation, out=out,
        keep=False,
    )[0]  # fmt: skip


def batch_norm_train(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    where: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: Literal["relu"] | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalize with the statistics of x itself: the training forward.

    ``y = activation((x - mean) / sqrt(var + eps) * gamma + beta + residual)``, with the mean and the variance (divided
    by n) of each channel.

    Parameters
    ----------
    x : (N, C, ...) array
        As in `batch_norm`, with at least two values per channel (or none at all).
    gamma, beta : (C,) array, optional
        As in `batch_norm`.
    axis : int or tuple of ints, default 1
        As in `batch_norm`.
    eps : float, default 1e-5
        As in `batch_norm`. A constant channel gives exactly beta.
    where : array that broadcasts to x's shape, optional
        Weights of the values in the statistics: booleans, or finite numbers of at least 0. The mean is sum(where * x) /
        sum(where), and so on. A value of weight 0 moves no statistic, whatever it is. It is normalized, too, and so its
        dy counts in the gradients (give it 0 if it is padding), unless its x or its dy is not finite. A channel without
        weight has mean 0 and variance 0. Weights of samples have the shape (N, 1, ...).
    residual : array of x's shape, optional
        As in `batch_norm`. The backward returns its gradient.
    activation : "relu", optional
        As in `batch_norm`.
    out : array of y's shape and dtype, optional
        As in `batch_norm`, but with a residual or an activation it must not be x, which the backward could not recover.

    Returns
    -------
    y : array of x's shape
        As in `batch_norm`.
    saved : Saved
        What `batch_norm_backward` needs, with the statistics in ``saved.mean``, ``saved.var`` and ``saved.moments``.
        It refers to x and `where`, not to copies: leave them as they are until the backward is done. With ``out=x`` it
        refers to y, from which the backward recovers x: that costs digits where abs(beta) >> abs(gamma), and is refused
        where gamma is 0. Of an activation it keeps one bit for each element, whether y > 0, not y.

    Raises
    ------
    ValueError
        As `batch_norm`; also one value per channel. Nothing is written.
    TypeError
        As `batch_norm`. Nothing is written.

    See Also
    --------
    batch_norm_backward : The gradients.
    update_running : Running statistics, from ``saved.moments``.
    moments : The statistics alone.
    BatchNorm : All of this in a layer.

    Notes
    -----
    The statistics are float64, accurate whatever the offset of the data, and their bits do not depend on the number of
    threads. An empty x gives an empty y. NaN and Inf stay in their channel.

    Where a channel's values fit in the cache (NCHW from 8 channels on, up to 2 MB each; (N, D) with N up to 512, less
    in float64 and above D = 2048) x is read once and y written once; else (NHWC images, larger batches, images of three
    channels) x is read twice. Once more, if a channel's first values lie far from its mean: see `moments`. The residual
    is read once. What is copied first, and where y lies, is as in `batch_norm`.

    References
    ----------
    Ioffe, Szegedy 2015, "Batch Normalization", arXiv:1502.03167, Algorithm 1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, saved = fastbn.batch_norm_train(np.array([[1.0, 10.0], [3.0, 30.0]]), eps=0)
    >>> y
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> saved.mean, saved.var
    (array([ 2., 20.]), array([  1., 100.]))

    Sequences of different lengths, (N, D, T): the padding, even of NaN, has weight 0.

    >>> x = np.array([[[1.0, 2.0, 3.0]], [[5.0, np.nan, np.nan]]])
    >>> real = np.arange(3) < np.array([3, 1])[:, None, None]
    >>> y, saved = fastbn.batch_norm_train(x, where=real)
    >>> saved.mean, saved.count
    (array([2.75]), array([4.]))
    """
    return trained(x, gamma, beta, axis=axis, eps=eps, where=where, residual=residual, activation=activation, out=out)


def batch_norm_backward(dy: npt.ArrayLike, saved: Saved, *, out: Array | None = None) -> tuple[Array, ...]:
    """Gradients of a `batch_norm_train`, given the gradient `dy` of its y.

    With xhat = (x - mean) / sqrt(var + eps), g = dy (with an activation 0 where y is not above 0), and sums over the
    values of a channel, n in number::

        dbeta     = sum(g)
        dgamma    = sum(g * xhat)
        dx        = gamma / sqrt(var + eps) * (g - dbeta / n - xhat * dgamma / n)
        dresidual = g

    and ``dx = gamma / sqrt(var + eps) * g`` if the statistics were held fixed (`Saved.fixed`). With weights n is their
    sum, and the two terms that come from the statistics bear the weight of their element::

        dx = gamma / sqrt(var + eps) * (g - where * (dbeta / n + xhat * dgamma / n))

    An element of weight 0 whose x or dy is not finite is left out of the sums.

    Parameters
    ----------
    dy : array of x's shape
        Floating; converted to the dtype of y. Read only, unless it is `out`.
    saved : Saved
        From `batch_norm_train`, or from `Saved.fixed`. It can be used again.
    out : array of y's shape and dtype, optional
        Receives dx. May be dy itself; other overlap with dy, x or `where` is refused.

    Returns
    -------
    dx : array of x's shape
        In the dtype of y and the memory order of x. This is `out` if given.
    dgamma, dbeta : (C,) array
        In the dtypes of gamma and beta; where they were omitted or are integers, in that of y, but float32 at least.
    dresidual : array of x's shape
        As dx. Only if the forward had a residual: four values are returned then, else three.

    Raises
    ------
    ValueError
        dy of another shape than x; `out` of another shape, read-only or overlapping; x overwritten by y where gamma is
        0. Nothing is written.
    TypeError
        dy not floating; `saved` not a `Saved`; `out` of another dtype. Nothing is written.

    See Also
    --------
    batch_norm_train : The forward.
    BatchNorm.backward : The same of a layer.

    Notes
    -----
    Sums are float64. dy and x are read once where `batch_norm_train` reads x once, else twice; with fixed statistics
    once always. dx is written once. dy in another memory order than x is copied first.

    References
    ----------
    Ioffe, Szegedy 2015, "Batch Normalization", arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = fastbn.batch_norm_train(x)
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), saved)
    >>> dbeta
    array([1.])

    y does not change when all of a channel moves, nor (but for eps) when it grows; so neither way lies a gradient:

    >>> bool(abs(dx.sum()) < 1e-15), bool(abs((dx * x).sum()) < 1e-5)
    (True, True)
    """
    return gradients("batch_norm_backward", dy, saved, out)


class Saved:
    """What the backward needs of a forward: x and weights (by reference), statistics and parameters, signs of y.

    `batch_norm_train` returns one, and `Saved.fixed` makes one for a forward whose statistics were given; its own
    constructor is not for callers. It can be read, and be used by any number of `batch_norm_backward`; nothing in it
    can be replaced. x and the weights are referred to: as long as it lives they do.

    See Also
    --------
    batch_norm_train, batch_norm_backward : Where it comes from, and what it is for.
    """

    __slots__ = (
        "_bits", "_dtypes", "_eps", "_frozen", "_layout", "_overwritten", "_residual", "_seen", "_state", "_weights",
        "_x",
    )  # fmt: skip

    def __init__(
        self, x: Array, lay: Layout, state: Array, eps: float, *, dtypes: tuple[np.dtype[Any], ...], frozen: bool,
        overwritten: bool, residual: bool, bits: Array | None, weights: Weights | None,
    ) -> None:  # fmt: skip
        self._x, self._layout, self._state, self._eps = x, lay, state, eps
        self._seen = _form(x)
        self._dtypes, self._frozen, self._overwritten = dtypes, frozen, overwritten  # of y, dgamma and dbeta
        self._residual, self._bits, self._weights = residual, bits, weights

    @classmethod
    def fixed(
        cls,
        x: npt.ArrayLike,
        mean: npt.ArrayLike,
        var: npt.ArrayLike,
        gamma: npt.ArrayLike | None = None,
        beta: npt.ArrayLike | None = None,
        *,
        axis: int | tuple[int, ...] = 1,
        eps: float = 1e-5,
        residual: npt.ArrayLike | None = None,
        activation: Literal["relu"] | None = None,
    ) -> Saved:
        """Make what the backward of ``batch_norm(x, mean, var, gamma, beta)`` needs: a frozen layer.

        An inference call by itself keeps nothing alive; this refers to x.

        Parameters
        ----------
        x : (N, C, ...) array
            As in `batch_norm`, and so the others. Leave it as it is until the backward is done.
        mean, var : (C,) array
            The statistics, which the gradients treat as constants.
        gamma, beta : (C,) array, optional
            Scale and shift; 1 and 0 when omitted.
        axis : int or tuple of ints, default 1
            The **channel** axis of x.
        eps : float, default 1e-5
            Added to var.
        residual : array of x's shape, optional
            Added before the activation; the backward returns its gradient.
        activation : "relu", optional
            With it y is computed here, for its signs (one bit for each element), and dropped.

        Returns
        -------
        Saved
            For `batch_norm_backward`.

        Raises
        ------
        ValueError, TypeError
            As `batch_norm`.

        See Also
        --------
        BatchNorm.__call__ : In evaluation with ``save=True`` computes y and keeps this in one pass.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> saved = fastbn.Saved.fixed(np.ones((4, 2)), mean=[0, 0], var=[1, 4], eps=0)
        >>> fastbn.batch_norm_backward(np.ones((4, 2)), saved)[0][0]
        array([1. , 0.5])
        """
        saved = frozen(
            "Saved.fixed", x, mean, var, gamma, beta, axis=axis, eps=eps, residual=residual, activation=activation,
            out=None, keep=True, write=activation is not None,
        )[1]  # fmt: skip
        assert saved is not None  # because of keep=True
        return saved

    @classmethod
    def _of_parts(
        cls, x: Array, mean: Array, m2: Array, gamma: Array | None, beta: Array | None, *, axis: tuple[int, ...],
        eps: float, dtypes: tuple[np.dtype[Any], ...] | None = None, frozen: bool = False,
    ) -> Self:  # fmt: skip
        """What a forward of x saved, for a caller who had to keep the parts elsewhere meanwhile; nothing is checked.

        The parts have a value for each channel, or one for all; with `frozen` m2 is the variance. `dtypes`, of y,
        dgamma and dbeta, are by default those of the verb.
        """
        lay = layout_of(x, axis)
        if dtypes is None:
            y = _check.result_dtype(x)
            dtypes = _dtypes(y, gamma, beta)
        return cls(
            x, lay, _state(lay, gamma, beta, mean, m2), eps, dtypes=dtypes, frozen=frozen, overwritten=False,
            residual=False, bits=None, weights=None,
        )  # fmt: skip

    @property
    def x(self) -> Array:
        """The input, not a copy; the output if it was computed in place (``out=x``)."""
        return self._x

    @property
    def count(self) -> int | Array:
        """Values per channel, an int; with weights the sum of each channel's, a (C,) float64 array."""
        if self._weights is None:
            return self._layout.per_channel
        return self._weights.given(self._weights.totals).reshape(self._layout.channel_shape).copy()

    @property
    def mean(self) -> Array:
        """The means that normalized x, a new (C,) float64 array."""
        mean: Array = self._state[0].reshape(self._layout.channel_shape).copy()
        return mean

    @property
    def var(self) -> Array:
        """The variances that normalized x, divided by n and without eps, a new (C,) float64 array."""
        n = self._divisor
        with np.errstate(all="ignore"):  # whatever the caller's: a subnormal variance is no error
            var = self._state[1] / (n if self._weights is None else np.where(n == 0, 1.0, n))
        return np.asarray(var.reshape(self._layout.channel_shape))

    @property
    def moments(self) -> Moments:
        """Count, mean and centred sum of squares as `Moments`, for `update_running` and merging; a copy."""
        m = self._shared_moments()
        with np.errstate(all="ignore"):
            m2 = np.asarray(m.m2 * self.count) if self.frozen else m.m2.copy()
        return Moments._trusted(m.count, m.mean.copy(), m2)

    @property
    def eps(self) -> float:
        """What was added to the variances."""
        return self._eps

    @property
    def frozen(self) -> bool:
        """Whether the statistics were given (`Saved.fixed`), not taken from x: to the gradients they are constants."""
        return self._frozen

    def _shared_moments(self) -> Moments:
        """`moments` of a forward that took them from x, without a copy."""
        mean, m2, _, _ = self._state
        if self._weights is not None:
            with np.errstate(all="ignore"):
                m2 = self._weights.given(m2)
        if len(self._layout.channel_shape) != 1:
            mean, m2 = (a.reshape(self._layout.channel_shape) for a in (mean, m2))
        return Moments._trusted(self.count, mean, m2)

    def __repr__(self) -> str:
        return f"Saved(x={self.x.dtype}{self.x.shape}, channels={self._layout.channel_shape}, frozen={self.frozen})"

    @property
    def _divisor(self) -> float | Array:
        # A forward leaves m2 in the second row of the state; where the statistics were given it is the variance.
        if self._weights is not None:
            return self._weights.totals
        return 1.0 if self.frozen else float(max(self.count, 1))


def _form(x: Array) -> tuple[Any, ...]:
    return x.shape, x.dtype.str


def _parameters(fn: str, gamma: Any, beta: Any, lay: Layout, of: _check.Of) -> tuple[Array | None, Array | None]:
    """Gamma and beta as arrays, as far as they are given: what an object gives as its array is asked for once."""
    return (
        None if gamma is None else _check.parameter(fn, "gamma", gamma, lay.channel_shape, of),
        None if beta is None else _check.parameter(fn, "beta", beta, lay.channel_shape, of),
    )


def _state(
    lay: Layout, gamma: Array | None, beta: Array | None, mean: Array | None = None, var: Array | None = None
) -> Array:
    """What the kernels know of each channel: the rows mean, m2 (both 0 so far), gamma and beta, in float64.

    With given statistics var takes the place of m2, and the count is 1.
    """
    state = np.zeros((4, lay.channels))
    if mean is not None and var is not None:
        state[0], state[1] = _row(mean), _row(var)
    state[2] = 1.0 if gamma is None else _row(gamma)
    if beta is not None:
        state[3] = _row(beta)
    return state


def _row(parameter: Array) -> Array:
    return parameter if parameter.ndim < 2 else parameter.reshape(-1)


def _dtype_of(parameter: Array | None, y: np.dtype[Any]) -> np.dtype[Any]:
    """That of a parameter's gradient."""
    default = y if y.itemsize > 2 else np.dtype(np.float32)
    if parameter is None:
        return default
    dtype = parameter.dtype
    return default if not _check.floating(dtype) else dtype if dtype.isnative else dtype.newbyteorder("=")


def _dtypes(y: np.dtype[Any], gamma: Array | None, beta: Array | None) -> tuple[np.dtype[Any], ...]:
    """Those of y, dgamma and dbeta."""
    return y, _dtype_of(gamma, y), _dtype_of(beta, y)


def _forward(
    x: Array, y: Array, state: Array, eps: float, count: float | Array, lay: Layout, z: Array | None, relu: Relu,
    weights: Weights | None = None, *, measure: bool, far: Array | None = None,
) -> None:  # fmt: skip
    """Run the forward kernel of this layout on flat arrays; what else it takes is explained in `kernels.forward`."""
    grid = lay.measured if measure else lay.given
    flat, step = (None, None) if weights is None else (weights.flat, weights.step)
    arguments = x, y, state, eps, count, measure or None, *grid.kind, True, grid.sizes, z, relu, flat, step
    if grid.runs:
        run(kernels.forward.forward_runs, lay.size, *arguments, far)
    else:  # which have no `far`
        run(kernels.forward.forward_rows, lay.size, *arguments)


def trained(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None,
    beta: npt.ArrayLike | None,
    *,
    axis: int | tuple[int, ...],
    eps: float,
    where: npt.ArrayLike | None = None,
    residual: npt.ArrayLike | None = None,
    activation: Literal["relu"] | None = None,
    out: Array | None = None,
    single: bool = False,
    fn: str = "batch_norm_train",
) -> tuple[Array, Saved]:
    """`batch_norm_train`; with `single` also of one value per channel, whose variance is 0. Errors name `fn`."""
    x = _check.array(fn, "x", x)
    axes = _check.axes(fn, axis, x.shape)
    lay = layout_of(x, axes)
    eps = _check.eps(fn, eps)
    gamma, beta = _parameters(fn, gamma, beta, lay, (x, axis))
    state = _state(lay, gamma, beta)
    if not single:
        _check.more_than_one(fn, lay, x, axis)
    dtype = _check.result_dtype(x, out)
    relu = _check.activation(fn, activation)
    z = None if residual is None else _check.like_x(fn, "residual", residual, x.shape)
    w = None if where is None else _check.weights(fn, where, x.shape)
    overwritten = ""
    if out is not None:
        reads = {"x": x, "gamma": gamma, "beta": beta, "residual": z, "where": w}
        overwritten = _check.out(fn, out, x.shape, dtype, ("x", "residual"), reads)
        if overwritten == "x":
            _check.invertible(fn, relu, z)
    weights = None if w is None else weights_of(w, x.shape, axes, lay)
    if weights is not None:
        _check.total_weights(fn, weights.totals)
    bits = np.empty(lay.measured.words, np.uint16) if relu else None
    count = float(lay.per_channel) if weights is None else weights.totals
    target = Target(x, dtype, lay, out)
    if lay.size:
        given = source(x, lay) if overwritten == "residual" else target.source(x, lay)
        part = None if z is None else source(z, lay, dtype)
        _forward(given, target.flat, state, eps, count, lay, part, bits, weights, measure=True)
    y = target.finish()
    saved = Saved(
        np.asarray(y) if overwritten == "x" else x, lay, state, eps,
        dtypes=_dtypes(dtype, gamma, beta), frozen=False, overwritten=overwritten == "x",
        residual=z is not None, bits=bits, weights=weights,
    )  # fmt: skip
    return y, saved


def gradients(fn: str, dy: npt.ArrayLike, saved: Saved, out: Array | None) -> tuple[Array, ...]:
    """`batch_norm_backward`; errors name `fn`."""
    if not isinstance(saved, Saved):
        raise TypeError(
            f"{fn}: saved is of type {type(saved).__name__}, expected the Saved that batch_norm_train returns beside y"
        )
    x, lay = saved.x, saved._layout
    if _form(x) != saved._seen:  # NumPy lets shape and dtype be set
        (shape, kind), (shape_then, kind_then) = _form(x), saved._seen
        raise ValueError(
            f"{fn}: saved.x has shape {shape} and dtype {kind}, expected {shape_then} and {kind_then} as in the forward"
        )
    dtype = saved._dtypes[0]
    dy = _check.like_x(fn, "dy", dy, x.shape)
    w, bits = saved._weights, saved._bits
    if out is not None:
        reads = {"x": x, "dy": dy, "where": None if w is None else w.flat}
        _check.out(fn, out, x.shape, dtype, ("dy",), reads)
    if saved._overwritten:
        _check.no_zero(fn, saved._state[2])
    target = Target(x, dtype, lay, out)
    residual = Target(x, dtype, lay, None) if saved._residual else None
    grads = np.zeros((2, lay.channels))
    if lay.size:
        grid = lay.given if saved.frozen else lay.measured
        kernel = kernels.backward.backward_runs if grid.runs else kernels.backward.backward_rows
        given = target.source(dy, lay, convert=True)
        run(
            kernel, lay.size, given, source(x, lay), target.flat, saved._state, saved.eps, saved._divisor, grads,
            not saved.frozen or None, *grid.kind, saved._overwritten, grid.sizes,
            None if residual is None else residual.flat, bits,
            None if w is None else w.flat, None if w is None else w.step,
        )  # fmt: skip
    with np.errstate(all="ignore"):  # dx is written: a sum beyond float32 is infinite, as it is there
        dgamma, dbeta = (g.reshape(lay.channel_shape).astype(d) for g, d in zip(grads, saved._dtypes[1:], strict=True))
    dx = target.finish()
    return (dx, dgamma, dbeta) if residual is None else (dx, dgamma, dbeta, residual.finish())


def frozen(
    fn: str, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, *, axis: Any, eps: Any, residual: Any = None,
    activation: Any = None, out: Any = None, keep: bool, write: bool = True, names: tuple[str, str] = ("mean", "var"),
) -> tuple[Array, Saved | None]:  # fmt: skip
    """y with given statistics, and with `keep` what the backward needs; without `write` no y is computed.

    Parameters and errors are those of `batch_norm`, in the name of `fn`, where the statistics have these `names`. What
    stands for y that is not computed means nothing.
    """
    x = _check.array(fn, "x", x)
    axes = _check.axes(fn, axis, x.shape)
    lay = layout_of(x, axes)
    eps = _check.eps(fn, eps)
    mean = _check.parameter(fn, names[0], mean, lay.channel_shape, (x, axis))
    var = _check.variance(fn, names[1], var, lay.channel_shape, (x, axis))
    gamma, beta = _parameters(fn, gamma, beta, lay, (x, axis))
    state = _state(lay, gamma, beta, mean, var)
    dtype = _check.result_dtype(x, out)
    relu = _check.activation(fn, activation)
    z = None if residual is None else _check.like_x(fn, "residual", residual, x.shape)
    if out is not None:
        reads = {"x": x, names[0]: mean, names[1]: var, "gamma": gamma, "beta": beta, "residual": z}
        _check.out(fn, out, x.shape, dtype, ("x", "residual"), reads)
    bits = np.empty(lay.given.words, np.uint16) if relu and keep else None
    y = _inference(x, axes, lay, state, eps, z, (relu or None) if bits is None else bits, dtype, out) if write else x
    if not keep:
        return y, None
    return y, Saved(
        x, lay, state, eps, dtypes=_dtypes(dtype, gamma, beta), frozen=True, overwritten=False,
        residual=z is not None, bits=bits, weights=None,
    )  # fmt: skip


def _inference(
    x: Array, axes: tuple[int, ...], lay: Layout, state: Array, eps: float, z: Array | None, relu: Relu,
    dtype: np.dtype[Any], out: Array | None,
) -> Array:  # fmt: skip
    """y with given statistics."""
    kept = isinstance(relu, np.ndarray)  # bits in the order of x
    if out is not None and lay.size and not kept and is_dense(x, lay) and not is_dense(np.asarray(out), lay):
        # In another order than x: where that has long runs, x is read in it, wherever it lies.
        other = layout_of(out, axes)
        far = steps_in(x, axes, other) if other.given.runs and is_dense(np.asarray(out), other) else None
        if far is not None:
            target, part = Target(x, dtype, other, out), None if z is None else source(z, other, dtype)
            _forward(source(x, lay), target.flat, state, eps, 1.0, other, part, relu, measure=False, far=far)
            return target.finish()
    target = Target(x, dtype, lay, out)
    if lay.size:
        safe = z is None or out is None or not np.may_share_memory(out, z)
        given = target.source(x, lay) if safe else source(x, lay)
        part = None if z is None else source(z, lay, dtype)
        _forward(given, target.flat, state, eps, 1.0, lay, part, relu, measure=False)
    return target.finish()
