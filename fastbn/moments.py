"""Statistics on their own: `moments`, the mergeable value `Moments`, `update_running`."""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from . import _check, kernels
from ._layout import layout_of, weights_of
from ._memory import source
from ._progress import bar
from ._threads import run

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and centred sum of squares of each channel: a value that merges.

    ``m1 + m2`` are the moments of both sets of values together, so that statistics can be taken over batches, files,
    processes or machines, whatever their sizes. `empty` is the zero of that sum; up to the last rounding it is
    associative and commutative. ``sum(list_of_moments)`` works, too.

    With weights w the count is sum(w), for each channel its own. Moments with and without weights add up too: a value
    without one has the weight 1.

    Parameters
    ----------
    count : int or (C,) float64 array
        Values per channel; with weights the total weight of each channel, finite and not negative.
    mean : (C,) float64 array
        Mean per channel: sum(w * x) / sum(w).
    m2 : (C,) float64 array
        Sum of w * (x - mean)**2 per channel; not negative, or NaN where it is unknown.

    Attributes
    ----------
    count, mean, m2
        As given, in float64: copies. They cannot be replaced.

    Raises
    ------
    ValueError
        Shapes that differ, a negative count or m2.
    TypeError
        What is no number.

    See Also
    --------
    moments : Takes them, of an array or of batches.
    update_running : Running statistics from them.
    Saved.moments : Those of a training forward.

    Notes
    -----
    The mean and m2 of a channel whose count is 0 mean nothing: in a sum it takes those of the other, bit for bit.

    References
    ----------
    Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1. With weights: West 1979,
    "Updating mean and variance estimates: an improved method", whose steps these are where one side is a single value.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> a, b = np.array([[1.0], [2.0]]), np.array([[6.0]])
    >>> m = fastbn.moments(a) + fastbn.moments(b)
    >>> m.count, m.mean, m.var()
    (3, array([3.]), array([4.66666667]))

    The values 1 and 2 with weights 2 and 0.5 in the first channel, and none in the second:

    >>> a = fastbn.Moments(np.array([2.0, 0.0]), mean=[1.0, 0.0], m2=[0.0, 0.0])
    >>> b = fastbn.Moments(np.array([0.5, 0.0]), mean=[2.0, 0.0], m2=[0.0, 0.0])
    >>> m = a + b
    >>> m.count, m.mean, m.var()
    (array([2.5, 0. ]), array([1.2, 0. ]), array([0.16,  nan]))
    """

    count: int | Array
    mean: Array
    m2: Array

    def __post_init__(self) -> None:
        fn = "Moments"
        for name in ("mean", "m2"):
            given = _check.array(fn, name, getattr(self, name))
            with np.errstate(all="ignore"):
                object.__setattr__(self, name, np.array(given, np.float64))
        if self.mean.shape != self.m2.shape:
            raise ValueError(f"{fn}: m2 has shape {self.m2.shape}, expected {self.mean.shape}, the shape of mean")
        _check.not_negative(fn, "m2", self.m2)
        count = _check.count_or_weights(fn, "count", self.count, self.mean.shape, ", the shape of mean")
        object.__setattr__(self, "count", count)

    @classmethod
    def _trusted(cls, count: int | Array, mean: Array, m2: Array) -> Self:
        """Moments of values that need no check, because fastbn has computed them."""
        self = object.__new__(cls)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "m2", m2)
        return self

    @classmethod
    def empty(cls, channels: int | tuple[int, ...]) -> Self:
        """The moments of no values: ``Moments.empty(c) + m`` is m.

        Parameters
        ----------
        channels : int or tuple of ints
            C, the number of channels; a tuple where `axis` is one; ``()`` for one statistic over whole arrays.

        Returns
        -------
        Moments
            Of count 0.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> total = fastbn.Moments.empty(2)
        >>> for n in (3, 5):
        ...     total += fastbn.moments(np.ones((n, 2)))
        >>> total.count
        8
        """
        shape = _check.channel_shape("Moments.empty", channels, least=0)
        return cls(0, np.zeros(shape), np.zeros(shape))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together; the same as ``self + other``.

        Parameters
        ----------
        other : Moments
            Of as many channels.

        Returns
        -------
        Moments
            New, or one of the two where the other has no values; neither is changed.

        Raises
        ------
        ValueError
            Other channels.
        TypeError
            No Moments.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"Moments.merge: other is of type {type(other).__name__}, expected Moments")
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"Moments.merge: other has channels of shape {other.mean.shape}, expected {self.mean.shape}"
            )
        a, b = self.count, other.count
        if isinstance(a, int) and not a:
            return other
        if isinstance(b, int) and not b:
            return self
        with np.errstate(all="ignore"):
            count = a + b
            share = b / count
            delta = np.asarray(other.mean - self.mean)
            # Not delta * delta: of far values with little weight it would overflow where m2 does not.
            m2 = np.asarray(self.m2 + other.m2 + delta * (a * share) * delta)
            mean = np.asarray(self.mean + delta * share)
        if not isinstance(count, int):
            count, theirs, own = np.asarray(count), np.equal(a, 0), np.equal(b, 0)
            mean = np.where(theirs, other.mean, np.where(own, self.mean, mean))
            m2 = np.where(theirs, other.m2, np.where(own, self.m2, m2))
        return Moments._trusted(count, mean, m2)

    def __add__(self, other: object) -> Moments:
        """The moments of both sets of values together: `merge`.

        Parameters
        ----------
        other : Moments
            Of as many channels.

        Returns
        -------
        Moments
            That of `merge`.
        """
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> Moments:
        # sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def var(self, correction: int = 0) -> Array:
        """Variance per channel: m2 / (count - correction).

        Parameters
        ----------
        correction : 0 or 1, default 0
            0 for the variance that normalizes, 1 for the unbiased estimate. That takes weights as frequencies: a value
            of weight 3 is three values. Of weights on another scale it is no estimate.

        Returns
        -------
        (C,) float64 array
            NaN where the count is not above `correction`.
        """
        return self._var("Moments.var", correction)

    def std(self, correction: int = 0) -> Array:
        """Standard deviation per channel: the square root of `var`.

        Parameters
        ----------
        correction : 0 or 1, default 0
            As in `var`.

        Returns
        -------
        (C,) float64 array
            NaN where the count is not above `correction`.
        """
        return np.asarray(np.sqrt(self._var("Moments.std", correction)))

    def _var(self, fn: str, correction: int) -> Array:
        n = self.count - _check.correction(fn, correction)
        if isinstance(n, int) and n <= 0:
            return np.full_like(self.m2, np.nan)
        with np.errstate(all="ignore"):  # whatever the caller's: a subnormal variance is no error
            var = np.asarray(self.m2 / n)
        return var if isinstance(n, int) else np.where(n > 0, var, np.nan)


def moments(
    x: npt.ArrayLike | Iterable[npt.ArrayLike],
    *,
    axis: int | tuple[int, ...] = 1,
    where: npt.ArrayLike | None = None,
    start: Moments | None = None,
    progress: bool | None = None,
) -> Moments:
    """Count, mean and centred sum of squares of each channel, of an array or of batches.

    Parameters
    ----------
    x : (N, C, ...) array, or iterable of such arrays
        Of any dtype that `batch_norm` takes; any rank and memory layout. Read only. A generator, an iterator or another
        iterable that is no sequence gives batches, of whatever sizes: each is read once and let go before the next is
        asked for. A list or tuple is an array, as elsewhere in NumPy: ``iter(batches)`` makes batches of it.
    axis : int or tuple of ints, default 1
        The **channel** axis, as in `batch_norm`; all others are reduced. ``()``: the whole array, shape ``()``.
    where : array that broadcasts to x's shape, optional
        Weights of the values: booleans, or finite numbers of at least 0. What has weight 0 may be NaN. Refused with
        batches, each of which has its own: ``sum(fastbn.moments(x, where=w) for x, w in batches)``.
    start : Moments, optional
        Of what came before, to which x is added: to go on after a stop.
    progress : bool, optional
        A progress bar over batches on stderr, of tqdm. True: always; False: never; None: where stderr is a terminal and
        tqdm is installed.

    Returns
    -------
    Moments
        In float64. Of an empty x: count 0. With weights the count is their sum in each channel.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`; also no batch and no `start`, or batches whose channels differ.
    ImportError
        ``progress=True`` without tqdm.

    See Also
    --------
    batch_norm_train : Normalizes with them, too, and has them in ``saved.moments``.
    BatchNorm.fit_population : A layer's running statistics from batches.

    Notes
    -----
    Reads x once, and once more if the mean of a channel's first values is more than 1.7 standard deviations off. The
    bits are those of `batch_norm_train`, and do not depend on threads.

    Of batches they are those of ``start + moments(batch) + moments(batch) + ...``, in that order, in channels whose
    means lie within 1,000 standard deviations of 0. Beyond, that sum would lose digits of the variance to the rounding
    of the means; so what it takes off the mean of each batch is measured, too, and carried along. Such batches are read
    twice, and copied as float64 block by block. `start` is taken as it is: exact, if it has lost nothing.

    A memory-map is read where it lies, whatever its size. Only one that is in a foreign byte order, unaligned, or
    contiguous in no order of its axes is copied, as any such array: read it in batches.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> m = fastbn.moments(np.arange(6.0).reshape(3, 2))
    >>> m.count, m.mean, m.std()
    (3, array([2., 3.]), array([1.63299316, 1.63299316]))

    Batches, and going on from there:

    >>> m = fastbn.moments(np.full((n, 2), float(n)) for n in (1, 3))
    >>> m = fastbn.moments(iter([np.zeros((4, 2))]), start=m)
    >>> m.count, m.mean
    (8, array([1.25, 1.25]))
    """
    fn = "moments"
    if progress is not None:
        _check.flag(fn, "progress", progress)
    if _check.is_batches(x):
        if where is not None:
            raise ValueError(
                f"{fn}: where with batches, expected none; weigh each: sum(moments(x, where=w) for x, w in batches)"
            )
        if start is not None:
            to_go_on_from(fn, start)
        return pooled(fn, x, axis, start, progress)
    x = _check.array(fn, "x", x)
    axes = _check.axes(fn, axis, x.shape)
    if start is not None:
        to_go_on_from(fn, start, tuple(x.shape[a] for a in axes))
    m = _moments(fn, x, axes, where)
    return m if start is None else start + m


def to_go_on_from(fn: str, start: Any, shape: tuple[int, ...] | None = None) -> Moments:
    """The argument `start`: Moments, with channels of `shape` if that is known."""
    if not isinstance(start, Moments):
        raise TypeError(f"{fn}: start is of type {type(start).__name__}, expected Moments")
    if shape is not None and start.mean.shape != shape:
        raise ValueError(f"{fn}: start has channels of shape {start.mean.shape}, expected {shape}")
    return start


def pooled(
    fn: str, batches: Iterable[Any], axis: int | tuple[int, ...], start: Moments | None, progress: bool | None
) -> Moments:
    """`start`, if any, and the moments of each batch, added in order, with what the rounding of their means lost."""
    pool, rest = start, None if start is None or not far(start).any() else np.zeros_like(start.mean)
    with bar(fn, batches, progress) as shown:
        for batch in batches:
            x, axes, m = one_batch(fn, batch, axis, pool)
            own = lost(x, axes, m)
            pool, rest = (m, own) if pool is None else joined(pool, rest, m, own)
            del batch, x  # before the next is made: one in memory, not two
            if shown is not None:
                shown.update()
    if pool is None:
        raise ValueError(f"{fn}: x has no batches, expected at least one, or start")
    return pool


def one_batch(
    fn: str, batch: Any, axis: int | tuple[int, ...], pool: Moments | None
) -> tuple[Array, tuple[int, ...], Moments]:
    """A batch as an array with the channels of `pool`, its channel axes, and its moments."""
    x = _check.array(fn, "batch", batch)
    axes = _check.axes(fn, axis, x.shape, "batch")
    if pool is not None:
        _check.channels(fn, x, axis, pool.mean.shape, "batch")
    return x, axes, _moments(fn, x, axes, None)


# ------------------------------------------------------------------------------------ what the rounding of a mean loses

# Chan's formula needs the differences of means. A mean rounded to float64 has lost what is below its last digit: with a
# mean of 1e8 and a standard deviation of 1 that is 1e-8, and of two batches whose means are a standard deviation apart
# the variance would have eight digits. So of means that are far from 0 what they lost is measured, and carried along.

FAR = 1000.0
"""Standard deviations between a mean and 0 from which that is done: nearer, the sum has 13 digits without."""

BLOCK = 1 << 17
"""Values that are copied as float64 at once."""


def far(m: Moments) -> Array:
    """In which channels the mean is FAR from 0; not where it is NaN."""
    with np.errstate(all="ignore"):
        return np.asarray(abs(m.mean) * np.sqrt(m.count) > FAR * np.sqrt(m.m2))


def lost(x: Array, axes: tuple[int, ...], m: Moments, where: Array | None = None) -> Array | None:
    """The true means of x are ``m.mean + lost``; None where no mean is far from 0.

    Where there is a far one, x is read again, and copied block by block.
    """
    wanted = far(m)
    if not wanted.any():
        return None
    wanted &= m.m2 > 0  # the mean of a constant is exact
    if not wanted.any():
        return np.zeros_like(m.mean)
    centre = np.where(wanted, m.mean, 0.0).reshape([n if a in axes else 1 for a, n in enumerate(x.shape)])
    cut = max((a for a in range(x.ndim) if a not in axes), key=lambda a: x.shape[a])
    step = max(1, BLOCK * x.shape[cut] // x.size)
    w = None if where is None else np.broadcast_to(where, x.shape)
    rest, copy = Moments.empty(m.mean.shape), None
    for i in range(0, x.shape[cut], step):
        block = (slice(None),) * cut + (slice(i, i + step),)
        part = x[block]
        if copy is None or copy.shape != part.shape:
            copy = np.empty_like(part, np.float64)  # in the memory order of x
        with np.errstate(all="ignore"):
            np.subtract(part, centre, out=copy)
        rest = rest + _moments("moments", copy, axes, None if w is None else w[block])
    return np.where(wanted, rest.mean, 0.0)


def joined(a: Moments, a_lost: Array | None, b: Moments, b_lost: Array | None) -> tuple[Moments, Array | None]:
    """The sum of moments whose means have lost something, and what its own have lost.

    In channels without a far mean it has the bits of ``a + b``.
    """
    if a_lost is None and b_lost is None:
        return a + b, None
    if isinstance(a.count, int) and not a.count:
        return b, b_lost
    if isinstance(b.count, int) and not b.count:
        return a, a_lost
    with np.errstate(all="ignore"):
        pivot = np.where(a.count > 0, a.mean, b.mean)
        # One far mean is enough: the other may be of a constant.
        pivot = np.where((far(a) | far(b)) & np.isfinite(pivot), pivot, 0.0)
        sides = []
        for m, rest in ((a, a_lost), (b, b_lost)):
            high, low = two_sum(m.mean, -pivot)
            sides.append(Moments._trusted(m.count, high + (low if rest is None else low + rest), m.m2))
        m = sides[0] + sides[1]
        mean, low = two_sum(pivot, m.mean)
    return Moments._trusted(m.count, mean, m.m2), low


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum, and what rounding it lost (Knuth); of what is not finite, nothing."""
    s = a + b
    t = s - a
    low = (a - (s - t)) + (b - t)
    return s, np.where(np.isfinite(low), low, 0.0)


def _moments(fn: str, x: Array, axes: tuple[int, ...], where: npt.ArrayLike | None) -> Moments:
    """The moments of a checked array."""
    lay = layout_of(x, axes)
    w = None if where is None else weights_of(_check.weights(fn, where, x.shape), x.shape, axes, lay)
    if w is not None:
        _check.total_weights(fn, w.totals)
    stats = np.zeros((2, lay.channels))
    count = float(lay.per_channel) if w is None else w.totals
    if lay.size:
        given = source(x, lay)
        # Typed as a y would be: this runs the code that is compiled for `batch_norm_train`.
        no_y = given[:0] if _check.floating(x.dtype) else np.empty(0, np.float32)
        flat, step = (None, None) if w is None else (w.flat, w.step)
        grid = lay.measured
        arguments = given, no_y, stats, 0.0, count, True, *grid.kind, False, grid.sizes, None, None, flat, step
        if grid.runs:
            run(kernels.forward.forward_runs, lay.size, *arguments, None)
        else:
            run(kernels.forward.forward_rows, lay.size, *arguments)
    if w is not None:
        with np.errstate(all="ignore"):
            stats[1] = w.given(stats[1])
    mean, m2 = (s.reshape(lay.channel_shape) for s in stats)
    total = lay.per_channel if w is None else w.given(w.totals).reshape(lay.channel_shape)
    return Moments._trusted(total, mean, m2)


def update_running(
    running_mean: Array, running_var: Array, m: Moments, *, momentum: float = 0.9, correction: int = 1
) -> None:
    """Move running statistics towards those of a batch, in place.

    ``running = momentum * running + (1 - momentum) * batch``, computed in float64.

    Parameters
    ----------
    running_mean, running_var : (C,) float32 or float64 array
        Overwritten, both or none; NumPy arrays that share no memory.
    m : Moments
        Of the batch, as ``saved.moments``. A channel of count 0 stays as it was.
    momentum : float, default 0.9
        From 0 to 1, the weight of the **old** value, as in CS231n, Keras, TensorFlow and ONNX (PyTorch's 0.1 is 0.9
        here). To pool all batches exactly, add their `Moments` instead.
    correction : 0 or 1, default 1
        Of the batch variance: 1 for the unbiased estimate (PyTorch), 0 for the plain one (Keras, ONNX, CS231n). 1
        takes weights as frequencies, as `Moments.var` does.

    Raises
    ------
    ValueError
        Wrong shapes, read-only arrays, momentum outside [0, 1]; with correction 1 a count of 1, or a weight above 0 but
        not above 1. Nothing is written.
    TypeError
        Wrong types or dtypes. Nothing is written.

    See Also
    --------
    BatchNorm : Does it at every call in training.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> mean, var = np.zeros(1), np.ones(1)
    >>> fastbn.update_running(mean, var, fastbn.moments(np.array([[1.0], [2.0], [3.0], [4.0]])))
    >>> mean, var
    (array([0.25]), array([1.06666667]))
    """
    fn = "update_running"
    if not isinstance(m, Moments):
        raise TypeError(f"{fn}: m is of type {type(m).__name__}, expected Moments")
    running_mean = _check.statistic(fn, "running_mean", running_mean, m.mean.shape)
    running_var = _check.statistic(fn, "running_var", running_var, m.mean.shape)
    momentum = _check.number(fn, "momentum", momentum, 0.0, 1.0)
    correction = _check.correction(fn, correction)
    if not seen(m.count):
        return
    _check.enough(fn, "m.count", m.count, correction)
    _check.apart(fn, "running_mean", running_mean, "running_var", running_var)
    mean, var = both_moved(running_mean, running_var, m, momentum, correction)
    # Both or none. Python delivers a signal (Ctrl-C) at a call, a jump backwards or a function's start, and there is
    # none between these stores; nor can they fail, since all that needs memory or a check is done.
    running_mean[...], running_var[...] = mean, var


def seen(count: int | Array) -> bool:
    """Whether any channel has a value."""
    return count > 0 if isinstance(count, int) else bool(np.any(count))


def both_moved(mean: Array, var: Array, m: Moments, momentum: float, correction: int) -> tuple[Array, Array]:
    """What running statistics become after a batch, each in its dtype; they are not written.

    A mean stays where the batch has no weight, a variance also where it has none to estimate one from.
    """
    n = m.count - correction
    with np.errstate(all="ignore"):  # one for both: each costs as much as an operation
        new = moved(mean, m.mean, momentum), moved(var, m.m2 / n, momentum)
    return new if isinstance(n, int) else (np.where(m.count > 0, new[0], mean), np.where(n > 0, new[1], var))


def moved(running: Array, batch: Array, momentum: float) -> Array:
    """What `running` becomes, in its dtype; it is not written."""
    # Ends exactly at the one or the other: 0 * inf would be NaN.
    if momentum == 0.0:
        new = batch
    elif momentum == 1.0:
        new = running
    else:
        new = running * np.float64(momentum)  # in float64, also where running is float32
        new += batch * (1.0 - momentum)
    return new.astype(running.dtype, copy=False)
