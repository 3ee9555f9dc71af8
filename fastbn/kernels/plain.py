"""Sixteen lanes in NumPy: what `lanes` compiles, for NUMBA_DISABLE_JIT=1, with every range checked.

Compiled lanes are loads and stores by address, which Numba's bounds checking (NUMBA_BOUNDSCHECK=1) does not see. So a
run with the JIT off is the bounds check of the lanes: a piece that does not lie in its array is an IndexError here,
where a NumPy slice would quietly be shorter.
"""

import numpy as np

LANES = 16

CARRIERS = {name: np.dtype([(name, np.uint16)], align=name == "bfloat16") for name in ("float16", "bfloat16")}
"""As what Numba, which has no half precision, sees an array of it: ``a.view(CARRIERS[a.dtype.name])``.

Only one is aligned, because Numba names compiled functions after that and a number of the record, which it counts anew
in every process: code of the one and of the other, from two processes by way of the disk, had the same names, and the
second that a process loaded ran the first.
"""


def _piece(a, i, n, step=1):
    """n elements of a, from i on and `step` apart, which must all be there."""
    if not (0 <= n <= LANES and 0 <= i <= a.size - (max(n - 1, 0) * step + min(n, 1))):
        raise IndexError(f"lanes {i} to {i + n * step} of an array of {a.size}")
    return a[i : i + n * step : step]


def _lanes(value):
    """A value to store: sixteen lanes, or one number for all of them."""
    if np.shape(value) not in ((LANES,), ()):
        raise IndexError(f"{np.shape(value)} lanes, expected {LANES}")
    return value


def half_of(dtype):
    """The name of a half precision dtype of an array, else None."""
    return dtype.names[0] if dtype.names else None


def _computed(x, y):
    """The dtype in which y is computed from x."""
    return np.dtype(np.float32 if y == np.float32 and np.can_cast(x, np.float32) else np.float64)


def from_half(a):
    """The values of halves in float32, and those of other arrays as they are."""
    name = half_of(a.dtype)
    if name == "float16":
        return a.view(np.float16).astype(np.float32)
    return (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if name else a


def to_half(values, name):
    """float64 as halves, rounded once."""
    values = np.asarray(values, np.float64)
    if name == "float16":
        return values.astype(np.float16).view(CARRIERS[name])
    rest = np.uint64((1 << 29) - 1)
    bits = values.view(np.uint64)
    odd = ((bits & rest) + rest) & (rest + np.uint64(1))  # see `halves`
    single = ((bits | odd) & ~rest).view(np.float64).astype(np.float32)
    bits = single.view(np.uint32)
    even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    bits = np.where(np.isnan(single), (bits >> np.uint32(16)) | np.uint32(0x40), even)
    return bits.astype(np.uint16).view(CARRIERS[name])


def _load(x, i, n, step, dtype):
    piece = from_half(_piece(x, i, n, step)).astype(dtype)
    return np.concatenate([piece, np.zeros(LANES - n, dtype)])


def load(x, i, n, y):
    """x[i : i + n], then zeros, in the dtype in which y is computed from x."""
    return None if x is None else _load(x, i, n, 1, _computed(x.dtype, y.dtype))


def transformed(x, i, step, y, j, n, centre, scale, shift, z):
    """(x - centre) * scale + shift + z of a piece of y, from the elements of x that lie `step` apart."""
    value = _load(x, i, n, 1 if step is None else step, _computed(x.dtype, y.dtype))
    value = (value - centre) * scale + shift
    return value if z is None else value + load(z, j, n, y)


def load64(x, i, n):
    """x[i : i + n], then zeros, in float64."""
    return None if x is None else _load(x, i, n, 1, np.float64)


def load_weights(w, i, n):
    """Weights in float64."""
    return load64(w, i, n)


def element(x, i):
    """x[i] in float64."""
    return np.float64(from_half(_piece(x, i, 1))[0])


def store(y, i, n, value):
    """y[i : i + n] = the first n lanes of value."""
    if y is not None:
        name, lanes = half_of(y.dtype), np.broadcast_to(_lanes(value), LANES)[:n]
        _piece(y, i, n)[:] = to_half(lanes, name) if name else lanes


def move(to, j, a, i):
    """to[j : j + 16] = a[i : i + 16]."""
    _piece(to, j, LANES)[:] = _piece(a, i, LANES)


def repeat(to, j, a, i):
    """to[j : j + 16] = a[i]."""
    _piece(to, j, LANES)[:] = a[i]


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
    return a if b is None else a * b


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


def inside(value, weight):
    """0 where the weight is 0, even if the value is NaN."""
    return value if weight is None else np.where(weight != 0, value, 0)


def guarded(value, other, weight):
    """0 where the weight is 0 and the one or the other is not finite."""
    if weight is None:
        return value
    return np.where((weight != 0) | (np.isfinite(value) & np.isfinite(other)), value, 0)


def rectified(value, relu, word, y):
    """ReLU, and the bits of what is above 0 in y's dtype."""
    if relu is None:
        return value
    new = np.where(value <= 0, value.dtype.type(0), value)
    if isinstance(relu, np.ndarray):
        name = half_of(y.dtype)
        stored = from_half(to_half(new, name)) if name else new.astype(y.dtype)
        _piece(relu, word, 1)[:] = np.packbits(stored > 0, bitorder="little").view(np.uint16)
    return new


def passed(value, relu, word):
    """The lanes whose bits are set, and 0 in the others."""
    if relu is None:
        return value
    return np.where(np.unpackbits(_piece(relu, word, 1).view(np.uint8), bitorder="little"), value, 0)


def of_channel(count, c):
    """count[c] of an array; a number is that of every channel."""
    return count if np.ndim(count) == 0 else count[c]


def row(a, t):
    """a[t]."""
    return None if a is None else a[t]


def rows_like(a, rows, columns):
    """New rows of a's dtype."""
    return None if a is None else np.empty((rows, columns), a.dtype)


def like(y):
    """A zero of the dtype in which y's coefficients are kept."""
    return np.dtype(np.float32 if y.dtype == np.float32 else np.float64).type(0)


def apart():
    """Nothing: a word to the compiler."""


def inlined():
    """Nothing: a word to the compiler."""


def compact():
    """Nothing: a word to the compiler."""
