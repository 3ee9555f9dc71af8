"""Arrays in and out of the kernels: which memory is used in place, what is copied, what is new.

The system clears every page of new memory when it is first touched; for a 100 MB output that costs more than computing
it. So large outputs lie in recycled buffers: each is leased to one array and comes back when that array and all views
of it are gone.
"""

import os
import warnings
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _check
from ._layout import Layout, flat, is_dense

Array = npt.NDArray[Any]

POOLED = 1 << 22
"""Bytes from which an output is pooled; smaller ones the allocator recycles itself."""

ALIGNMENT = 64

# Idle buffers, the latest first. Its own operations are atomic, and so is list(_free); tuple(_free) is not, because
# Python 3.11 may collect garbage within it, which appends what it finds.
_free: deque["_Buffer"] = deque()
_limit = 1 << 29


class _Buffer:
    """Aligned memory of a fixed size."""

    __slots__ = ("memory",)

    def __init__(self, size: int) -> None:
        raw = np.empty(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self.memory = raw[start : start + size]


class _Lease:
    """What keeps a buffer from being handed out again: the base of the one array that it is leased to."""

    __slots__ = ("__array_interface__", "buffer")

    def __init__(self, buffer: _Buffer) -> None:
        self.buffer = buffer
        self.__array_interface__ = buffer.memory.__array_interface__

    def __del__(self) -> None:
        if _limit:
            _free.appendleft(self.buffer)
            _trim(_limit)


def _trim(limit: int) -> None:
    """Let idle buffers go, the oldest first, until those that stay have at most `limit` bytes."""
    while sum(b.memory.size for b in list(_free)) > limit:
        try:
            _free.pop()
        except IndexError:  # another thread was quicker
            return


def _lease(size: int) -> Array:
    """`size` bytes that belong to nobody else."""
    for buffer in list(_free):
        if size <= buffer.memory.size <= size + size // 4:
            try:
                _free.remove(buffer)  # by identity
            except ValueError:  # another thread was quicker
                continue
            return np.asarray(_Lease(buffer))[:size]
    return np.asarray(_Lease(_Buffer(size)))[:size]


def set_pool_limit(nbytes: int) -> None:
    """Bound the memory that idle output buffers may keep; 0 turns their recycling off.

    Outputs of 4 MiB and more (y, dx and dresidual, where no `out=` is given) lie in buffers that are used again when
    the array and all views of it are gone; a fresh 100 MB array costs more in page faults than the whole computation.
    Buffers in use do not count. What is idle beyond the new limit goes back to the system at once, the oldest first.

    Parameters
    ----------
    nbytes : int
        Bytes, 0 or more. At first 512 MiB, or the environment variable ``FASTBN_POOL_LIMIT``.

    Raises
    ------
    TypeError, ValueError
        If nbytes is not an int, or negative.

    See Also
    --------
    empty_pool : Returns the idle buffers once, and leaves the limit.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_pool_limit(2**30)
    """
    global _limit
    _limit = _check.count("set_pool_limit", "nbytes", nbytes)
    _trim(_limit)


def empty_pool() -> None:
    """Return the memory of all idle output buffers to the system.

    Arrays in use are not touched, and later outputs are recycled again.

    See Also
    --------
    set_pool_limit : Which outputs are recycled, and how much may stay.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.empty_pool()
    """
    _trim(0)


if "FASTBN_POOL_LIMIT" in os.environ:
    try:
        set_pool_limit(int(os.environ["FASTBN_POOL_LIMIT"]))
    except ValueError:
        warnings.warn(
            f"FASTBN_POOL_LIMIT is {os.environ['FASTBN_POOL_LIMIT']!r}, expected a number of bytes; it is ignored",
            stacklevel=2,
        )


def new(like: Array, dtype: np.dtype[Any], lay: Layout) -> Array:
    """An uninitialized array of the shape and memory order of `like`."""
    size = like.size * dtype.itemsize
    if size < POOLED or not _limit or not lay.keeps_order:
        return np.empty_like(like, dtype=dtype, subok=False)
    ordered = _lease(size).view(dtype).reshape([like.shape[a] for a in lay.order])
    return ordered if lay.in_order else ordered.transpose(np.argsort(lay.order))


def source(x: Array, lay: Layout, dtype: np.dtype[Any] | None = None) -> Array:
    """The elements of x in memory order, in `dtype` or its own.

    A copy only where they are in another, or x is not dense: in no order of its axes, or unaligned.
    """
    wanted = dtype or x.dtype.newbyteorder("=")
    if is_dense(x, lay) and x.dtype == wanted:
        return flat(x, lay)
    copy = _in_order(x.shape, wanted, lay)
    _copy(copy, x)
    return flat(copy, lay)


def _in_order(shape: tuple[int, ...], dtype: np.dtype[Any], lay: Layout) -> Array:
    """An uninitialized array that is dense in the layout's order."""
    return np.empty([shape[a] for a in lay.order], dtype).transpose(np.argsort(lay.order))


def _copy(to: Array, x: Array) -> None:
    with np.errstate(all="ignore"):  # what the dtype cannot hold is infinite or 0, as in the kernels
        np.copyto(to, x, casting="unsafe")


class Target:
    """An output, and the dense memory `flat` in which the kernels compute it.

    That memory is the output's own unless the caller's `out` lies in another order; then `finish` copies it over.
    """

    __slots__ = ("_dense", "_elsewhere", "array", "flat")

    def __init__(self, like: Array, dtype: np.dtype[Any], lay: Layout, out: Array | None) -> None:
        self.array = new(like, dtype, lay) if out is None else out
        self._dense = np.asarray(self.array)  # of a subclass: np.matrix cannot be made 1-d
        self._elsewhere = not is_dense(self._dense, lay)
        if self._elsewhere:
            self._dense = _in_order(like.shape, dtype, lay)
        self.flat = flat(self._dense, lay)

    def source(self, x: Array, lay: Layout, *, convert: bool = False) -> Array:
        """As `source`, but where a copy is needed it is made in this target, which may then be computed in place.

        x may keep a dtype other than the target's, unless `convert`.
        """
        same = x.dtype.newbyteorder("=") == self._dense.dtype
        if is_dense(x, lay) and (same or not convert):
            return flat(x, lay)
        if same or convert:
            _copy(self._dense, x)
            return self.flat
        return source(x, lay)

    def finish(self) -> Array:
        """The output, complete."""
        if self._elsewhere:
            np.copyto(np.asarray(self.array), self._dense)
        return self.array
