"""Sixteen lanes in NumPy: what `lanes` compiles, for NUMBA_DISABLE_JIT=1, with every range checked.

Compiled lanes are loads and stores by address, which Numba's bounds checking (NUMBA_BOUNDSCHECK=1) does not see. So a
run with the JIT off is the bounds check of the lanes: a piece that does not lie in its array is an IndexError here,
where a NumPy slice would quietly be shorter.
"""

import numpy as np

LANES = 16


def _piece(a, i, n):
    """a[i : i + n], which must all be there."""
    if not (0 <= n <= LANES and 0 <= i <= a.size - n):
        raise IndexError(f"lanes {i} to {i + n} of an array of {a.size}")
    return a[i : i + n]


def _lanes(value):
    """A value to store: sixteen lanes, or one number for all of them."""
    if np.shape(value) not in ((LANES,), ()):
        raise IndexError(f"{np.shape(value)} lanes, expected {LANES}")
    return value


def load(x, i):
    """x[i : i + 16]."""
    return _piece(x, i, LANES)


def load64(x, i):
    """x[i : i + 16] in float64."""
    return load(x, i).astype(np.float64)


def load_part(x, i, n):
    """x[i : i + n], then zeros."""
    return np.concatenate([_piece(x, i, n), np.zeros(LANES - n, x.dtype)])


def load64_part(x, i, n):
    """x[i : i + n] in float64, then zeros."""
    return load_part(x, i, n).astype(np.float64)


def store(y, i, value):
    """y[i : i + 16] = value."""
    _piece(y, i, LANES)[:] = _lanes(value)


def store_part(y, i, n, value):
    """y[i : i + n] = the first n lanes of value."""
    _piece(y, i, n)[:] = _lanes(value)[:n]


def only(value, n):
    """The first n lanes, and 0 in the others."""
    return np.where(np.arange(LANES) < n, _lanes(value), 0)


def prefetch(x, i):
    """Nothing: any i will do."""


def minus(a, b):
    """a - b."""
    return a - b


def plus(a, b):
    """a + b."""
    return a + b


def times(a, b):
    """a * b."""
    return a * b


def muladd(a, b, c):
    """a * b + c."""
    return a * b + c


def zeros():
    """Sixteen float64 zeros."""
    return np.zeros(LANES)


def total(a):
    """The sum of the lanes, halves upon halves."""
    while a.size > 1:
        a = a[: a.size // 2] + a[a.size // 2 :]
    return a[0]


def apart():
    """Nothing: a word to the compiler."""


def compact():
    """Nothing: a word to the compiler."""
