"""Every argument check and error message.

A message names the function, the argument, what it is and what was expected. Checks come before any write.
"""

import contextlib
import math
import operator
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from ._layout import Layout

Array = npt.NDArray[Any]
T = TypeVar("T")
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
EXPECTED = "float16, bfloat16, float32, float64, an integer dtype or bool"
FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST_AXES = 64  # of a NumPy array
MOST = 2**63 - 1  # of a count, which is saved as int64


def shown(value: Any) -> str:
    """A value as a message shows it: plain ones as they are, in one line, of others the type.

    What a stranger's object prints may be megabytes, a path, or an exception.
    """
    plain = (bool, int, float, complex, str, bytes, type(None), type, np.generic, np.dtype)
    if not all(isinstance(v, plain) for v in (value if type(value) in (tuple, list) else (value,))):
        return f"of type {type(value).__name__}"
    try:
        text = repr(value)
    except Exception:  # an int of more than 4300 digits, too
        return f"an int of {value.bit_length()} bits" if type(value) is int else f"of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def array(fn: str, name: str, value: Any) -> Array:
    """`value` as a plain array of a dtype that can be normalized: floats of 16 to 64 bits, integers, booleans."""
    if type(value) is np.ndarray and value.dtype.char in "efd":  # the usual case, quickly
        return value
    a = plain_array(fn, name, value)
    _numeric(fn, name, a.dtype)
    return a


def is_array(value: Any) -> bool:
    """Whether a value says of itself that it is an array; a list does not, though it can be made one."""
    return any(hasattr(value, name) for name in ("__array__", "__array_interface__", "__array_struct__"))


def is_batches(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether a value is an iterable of batches: neither an array nor what NumPy would make one of, a sequence.

    What has a length and items is a sequence to NumPy, registered as one or not. The elements of a set have no order,
    and those of a mapping are keys.
    """
    if isinstance(value, (np.ndarray, Sequence, Mapping, Set)) or not isinstance(value, Iterable):
        return False
    return not is_array(value) and not (hasattr(value, "__len__") and hasattr(value, "__getitem__"))


def plain_array(fn: str, name: str, value: Any, expected: str = EXPECTED) -> Array:
    """`value` as a plain array of whatever dtype; `expected` is what a message names."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{fn}: {name} is a masked array, whose mask would be ignored; expected a plain array")
    try:
        return np.asarray(value)
    except MemoryError:
        raise
    except ValueError as error:  # ragged
        raise ValueError(f"{fn}: {name} cannot be made an array: {error}; expected {expected}") from None
    except TypeError as error:
        raise TypeError(f"{fn}: {name} cannot be made an array: {error}; expected {expected}") from None
    except Exception as error:  # of an object's own __array__
        raise TypeError(f"{fn}: {name} cannot be made an array: {error!r}; expected {expected}") from error


def _numeric(fn: str, name: str, found: np.dtype[Any]) -> None:
    if not _supported(found):
        raise TypeError(f"{fn}: {name} has dtype {found}, expected {EXPECTED}")


def _supported(d: np.dtype[Any]) -> bool:
    return d.kind in "biu" or floating(d)


def floating(d: np.dtype[Any]) -> bool:
    """Whether it is one of the floating dtypes; bfloat16 is none of NumPy's, and known by its name."""
    return d.char in "efd" or (d.kind == "V" and d.name == "bfloat16")


def dtype(fn: str, name: str, value: Any) -> np.dtype[Any]:
    """A dtype that can be normalized."""
    d = _dtype(value)
    if d is None or not _supported(d):
        raise TypeError(f"{fn}: {name} has {shown(value)}, expected {EXPECTED}")
    return d


def _dtype(value: Any) -> np.dtype[Any] | None:
    """The dtype that a value names, if any; None, which names float64 to NumPy, names none here."""
    try:
        return None if value is None else np.dtype(value)
    except Exception:  # a SyntaxError, even
        return None


def result_dtype(x: Array, out: Any = None) -> np.dtype[Any]:
    """The dtype of y: that of a floating x; of other x that of `out`, if it is floating, else float32."""
    found = x.dtype
    if found.char in "efd" and found.isnative:  # the usual case, quickly
        return found
    if floating(found):
        return found.newbyteorder("=")
    return out.dtype if isinstance(out, np.ndarray) and floating(out.dtype) and out.dtype.isnative else FLOAT32


def axes(fn: str, axis: Any, shape: tuple[int, ...], name: str = "x") -> tuple[int, ...]:
    """The channel axes, ascending and not negative."""
    rank = len(shape)
    if type(axis) is int and 0 <= axis < rank:  # the usual case, quickly
        return (axis,)
    found = _ints(fn, "axis", axis)
    for i in found:
        if not -rank <= i < rank:
            expected = f"{-rank} to {rank - 1}" if rank else "(), which names none"
            raise ValueError(f"{fn}: axis {shown(i)} is out of range for {name} of shape {shape}, expected {expected}")
    ascending = sorted({i % rank for i in found})
    if len(ascending) < len(found):
        raise ValueError(
            f"{fn}: axis={shown(axis)} names an axis of {name} of shape {shape} twice, expected distinct axes"
        )
    return tuple(ascending)


def axis_of_four(fn: str, name: str, axis: Any) -> int:
    """One of the axes of a 4-d array, not negative."""
    try:
        i = index(axis)
    except TypeError:
        raise TypeError(f"{fn}: {name} has {shown(axis)}, expected ints") from None
    if not -4 <= i < 4:
        raise ValueError(f"{fn}: {name} has {shown(i)}, expected -4 to 3")
    return i % 4


def _ints(fn: str, name: str, value: Any) -> list[int]:
    """The ints of an int or of a tuple of ints. A bool is no int."""
    try:
        return [index(v) for v in (value if isinstance(value, (tuple, list)) else (value,))]
    except TypeError:
        raise TypeError(f"{fn}: {name} is {shown(value)}, expected an int or a tuple of ints") from None


def index(value: Any) -> int:
    """An int; TypeError of what is none, whatever it raises itself."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    try:
        return operator.index(value)
    except Exception:
        raise TypeError from None


def number(fn: str, name: str, value: Any, low: float, high: float | None = None, expected: str = "") -> float:
    """A finite real number from `low` to `high`. A bool is no number, and no array but one of a single number is."""
    if type(value) is float and low <= value <= (math.inf if high is None else high) and value != math.inf:
        return value
    if not expected:
        expected = f"a number from {low:g} to {high:g}" if high is not None else f"a finite number of at least {low:g}"
    if not _real(value):
        raise TypeError(f"{fn}: {name} is {shown(value)}, expected {expected}")
    try:
        v = float(value)
    except OverflowError:
        raise ValueError(f"{fn}: {name} is beyond float64, expected {expected}") from None
    except Exception:
        raise TypeError(f"{fn}: {name} is {shown(value)}, expected {expected}") from None
    if not (low <= v <= high if high is not None else low <= v < math.inf):
        raise ValueError(f"{fn}: {name} is {shown(value)}, expected {expected}")
    return v


def _real(value: Any) -> bool:
    """Whether a value is one real number, as far as its type says; float() also reads text and buffers."""
    if isinstance(value, (np.ndarray, np.generic)):
        return not value.ndim and value.dtype.kind in "iuf" and not isinstance(value, np.ma.MaskedArray)
    return not isinstance(value, bool) and (hasattr(value, "__float__") or hasattr(value, "__index__"))


def flag(fn: str, name: str, value: Any) -> bool:
    """True or False. Text would always be true, and "eval" is not meant as that."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{fn}: {name} is {shown(value)}, expected True or False")
    return bool(value)


def eps(fn: str, value: Any) -> float:
    """eps: a finite number, 0 or more."""
    return number(fn, "eps", value, 0.0)


def correction(fn: str, value: Any) -> int:
    """correction: 0 or 1."""
    if type(value) is int and 0 <= value <= 1:
        return value
    expected = "0 (divide by n) or 1 (divide by n - 1)"
    v = number(fn, "correction", value, 0.0, 1.0, expected)
    if not v.is_integer():
        raise ValueError(f"{fn}: correction is {shown(value)}, expected {expected}")
    return int(v)


Of = tuple[Array, Any] | str
"""What the shape of a parameter comes from, for its error message: x and axis, or the words themselves."""


def _origin(of: Of, found: tuple[int, ...]) -> str:
    if isinstance(of, str):
        return of
    x, axis = of
    return f", the channels of x; x has shape {x.shape}, axis={shown(axis)}{_elsewhere(x.shape, found)}"


def _elsewhere(shape: tuple[int, ...], found: tuple[int, ...]) -> str:
    """Where x has as many channels as were found: the wrong `axis` is the usual cause, NHWC images above all."""
    if len(found) != 1 or found[0] not in shape:
        return ""
    a = -1 if shape[-1] == found[0] else shape.index(found[0])
    return f"; with axis={a} they are {found}"


def parameter(fn: str, name: str, value: Any, shape: tuple[int, ...], of: Of = "") -> Array:
    """A parameter or statistic of `shape`, or a scalar for all channels."""
    a = array(fn, name, value)
    _shape(fn, name, a.shape, shape, of)
    return a


def _shape(fn: str, name: str, found: tuple[int, ...], shape: tuple[int, ...], of: Of, *other: tuple[int, ...]) -> None:
    if found not in (shape, (), *other):
        raise ValueError(f"{fn}: {name} has shape {found}, expected {shape}{_origin(of, found)}")


def variance(fn: str, name: str, value: Any, shape: tuple[int, ...], of: Of = "") -> Array:
    """A variance: as `parameter`, and nowhere negative."""
    a = parameter(fn, name, value, shape, of)
    not_negative(fn, name, a)
    return a


def not_negative(fn: str, name: str, a: Array) -> None:
    """A variance or a sum of squares, NaN where it is unknown."""
    if np.count_nonzero(a < 0):  # quicker than any()
        raise ValueError(f"{fn}: {name} is {_first(a, a < 0)}, expected no negative value")


def _first(a: Array, bad: Array) -> str:
    """The first bad value of an array as a message shows it, with its place."""
    where = np.unravel_index(int(np.argmax(bad)), a.shape)
    return f"{a[where]} at {tuple(int(i) for i in where)}" if a.ndim else f"{a[where]}"


def no_zero(fn: str, gamma: Array) -> None:
    """Where x was overwritten by y, the backward divides by gamma."""
    if not gamma.all():
        raise ValueError(
            f"{fn}: x was overwritten (batch_norm_train with out=x) and gamma is 0 in channel "
            f"{int(np.argmin(gamma != 0))}, so x cannot be recovered from y; expected gamma without zeros"
        )


def more_than_one(fn: str, lay: Layout, x: Array, axis: Any) -> None:
    """Training needs two values per channel: of one, the variance is 0 and y is beta whatever x is."""
    if lay.per_channel == 1 and lay.size:
        raise ValueError(
            f"{fn}: x has one value per channel, expected at least two in training (one is enough where the "
            f"statistics are given: batch_norm, a layer's eval()); x has shape {x.shape}, axis={shown(axis)}"
        )


def out(
    fn: str, value: Any, shape: tuple[int, ...], expected: np.dtype[Any], same: tuple[str, ...], reads: dict[str, Any]
) -> str:
    """The caller's output array: right shape and dtype, writable, and sharing memory with nothing but one of `same`.

    `reads` is all that the call reads, by name; those named in `same` may be overwritten in place. Returns which one
    is, or "".
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{fn}: out is of type {type(value).__name__}, expected a NumPy array")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{fn}: out is a masked array, expected a plain array")
    if value.shape != shape:
        raise ValueError(f"{fn}: out has shape {value.shape}, expected {shape}, the shape of x")
    if value.dtype != expected:
        x = reads.get("x")
        decides = "dy" not in reads and isinstance(x, np.ndarray) and not floating(x.dtype)
        wanted = f"one of {', '.join(FLOATS)}" if decides else f"{expected}, the dtype of y"
        raise TypeError(f"{fn}: out has dtype {value.dtype}, expected {wanted}")
    if not value.flags.writeable:
        raise ValueError(f"{fn}: out is read-only, expected a writable array")
    if _overlaps_itself(value):
        raise ValueError(f"{fn}: out has strides {value.strides}: its elements overlap, expected distinct ones")
    in_place = ""
    for name, a in reads.items():
        if not isinstance(a, np.ndarray) or not np.may_share_memory(value, a):
            continue
        if name in same and _identical(value, a):
            in_place = in_place or name
        elif _overlap(value, a):
            but = " without being the same array" if name in same else ""
            raise ValueError(f"{fn}: out shares memory with {name}{but}; expected no overlap")
    return in_place


def apart(fn: str, name: str, a: Array, other: str, b: Array) -> None:
    """Two arrays that are both written share no memory."""
    if _overlap(a, b):
        raise ValueError(f"{fn}: {name} shares memory with {other}, expected two arrays of their own")


def _identical(a: Array, b: Array) -> bool:
    """Whether a and b are one array: element i of the one is element i of the other."""
    if a is b:
        return True
    here, there = a.__array_interface__, b.__array_interface__
    # The stride of an axis of length 1 leads nowhere.
    steps = [[s for n, s in zip(c.shape, c.strides, strict=True) if n != 1] for c in (a, b)]
    return here["data"][0] == there["data"][0] and steps[0] == steps[1] and a.dtype == b.dtype


def _overlaps_itself(a: Array) -> bool:
    """Whether two elements share memory: an axis whose step is shorter than what the axes inside it span."""
    if a.flags.forc or not a.size:
        return False
    span = a.itemsize
    for step, n in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if step < span:
            return True
        span += step * (n - 1)
    return False


def _overlap(a: Array, b: Any) -> bool:
    if not isinstance(b, np.ndarray) or not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def like_x(fn: str, name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """dy or a residual: the shape of x, floating."""
    a = array(fn, name, value)
    if not floating(a.dtype):
        raise TypeError(f"{fn}: {name} has dtype {a.dtype}, expected one of {', '.join(FLOATS)}")
    if a.shape != shape:
        raise ValueError(f"{fn}: {name} has shape {a.shape}, expected {shape}, the shape of x")
    return a


def activation(fn: str, value: Any) -> bool:
    """Whether y is rectified."""
    if value is None:
        return False
    if not isinstance(value, str):
        raise TypeError(f"{fn}: activation is {shown(value)}, expected None or 'relu'")
    if value != "relu":
        raise ValueError(f"{fn}: activation is {shown(value)}, expected None or 'relu'")
    return True


def choice(fn: str, name: str, value: Any, of: Mapping[str, T]) -> T:
    """What stands under one of the names in `of`."""
    if not isinstance(value, str):
        raise TypeError(f"{fn}: {name} is {shown(value)}, expected one of {', '.join(map(repr, of))}")
    if value not in of:
        raise ValueError(f"{fn}: {name} is {shown(value)}, expected one of {', '.join(map(repr, of))}")
    return of[value]


def names(fn: str, name: str, value: Any, of: Collection[str]) -> frozenset[str]:
    """One of the names in `of`, or several with + between."""
    expected = f"{', '.join(map(repr, of))}, or several with + between"
    if not isinstance(value, str):
        raise TypeError(f"{fn}: {name} has {shown(value)}, expected {expected}")
    found = frozenset(value.split("+"))
    if not found.issubset(of):
        raise ValueError(f"{fn}: {name} has {shown(value)}, expected {expected}")
    return found


def weights(fn: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Weights of the values of x: booleans, or finite numbers that are not negative; they broadcast to its shape."""
    w = array(fn, "where", value)
    try:
        fits = np.broadcast_shapes(w.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        hint = ""
        if w.shape == shape[: w.ndim]:  # weights of samples, of positions: NumPy broadcasts from the last axis
            hint = f"; {w.shape + (1,) * (len(shape) - w.ndim)} does"
        raise ValueError(f"{fn}: where has shape {w.shape}, expected one that broadcasts to that of x, {shape}{hint}")
    if w.dtype.kind == "b":
        return w
    with np.errstate(all="ignore"):
        own = w.dtype.newbyteorder("=")
        w = w.astype(own if own in (FLOAT32, FLOAT64) else FLOAT64, copy=False)
    _finite_weights(fn, "where", w)
    return w


def _finite_weights(fn: str, name: str, w: Array) -> None:
    with np.errstate(all="ignore"):  # whatever the caller's: NaN is refused, not warned of
        bad = ~((w >= 0) & (w < np.inf))
    if bad.any():
        raise ValueError(f"{fn}: {name} is {_first(w, bad)}, expected finite weights of at least 0")


def total_weights(fn: str, totals: Array) -> None:
    """The sum of the weights of each channel: what is divided by it would be 0 or NaN if it were infinite."""
    if not (totals < np.inf).all():
        raise ValueError(f"{fn}: where sums to inf in a channel, expected weights whose sum is finite")


def invertible(fn: str, relu: bool, z: Array | None) -> None:
    """Where y overwrites x, the backward recovers x from y."""
    if relu or z is not None:
        what = "activation='relu'" if relu else "a residual"
        raise ValueError(f"{fn}: out is x, which with {what} cannot be recovered from y; expected another array")


def statistic(fn: str, name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """A running statistic that is updated in place: a writable float32 or float64 array of `shape`."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{fn}: {name} is of type {type(value).__name__}, expected a NumPy array (updated in place)")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{fn}: {name} is a masked array, expected a plain array")
    if value.dtype not in (FLOAT32, FLOAT64):
        raise TypeError(f"{fn}: {name} has dtype {value.dtype}, expected float32 or float64")
    if value.shape != shape:
        raise ValueError(f"{fn}: {name} has shape {value.shape}, expected {shape}, one value per channel")
    if not value.flags.writeable:
        raise ValueError(f"{fn}: {name} is read-only, expected a writable array (updated in place)")
    if _overlaps_itself(value):
        raise ValueError(f"{fn}: {name} has strides {value.strides}: its elements overlap, expected distinct ones")
    return np.asarray(value)


# ---------------------------------------------------------------------------------------------------------- the layer


def channel_shape(fn: str, value: Any, least: int = 1) -> tuple[int, ...]:
    """The channels of a layer: an int, or a tuple of ints, at least `least` each."""
    shape = tuple(_ints(fn, "channels", value))
    if any(n < least for n in shape):
        raise ValueError(f"{fn}: channels is {shown(value)}, expected at least {least}")
    if len(shape) > MOST_AXES or math.prod(max(n, 1) for n in shape) > sys.maxsize // FLOAT64.itemsize:
        raise ValueError(f"{fn}: channels is {shown(value)}, expected the shape of an array that NumPy can make")
    return shape


def layer_axis(fn: str, axis: Any, shape: tuple[int, ...]) -> int | tuple[int, ...]:
    """The channel axes of a layer, as many as its channels have; their range is checked when x is known."""
    found = _ints(fn, "axis", axis)
    if len(found) != len(shape):
        raise ValueError(
            f"{fn}: axis={shown(axis)} has {len(found)} channel axes, expected {len(shape)}: channels={shape}"
        )
    if len(set(found)) < len(found):
        raise ValueError(f"{fn}: axis={shown(axis)} names an axis twice, expected distinct axes")
    if any(not -MOST_AXES <= a < MOST_AXES for a in found):
        raise ValueError(f"{fn}: axis is {shown(axis)}, expected {-MOST_AXES} to {MOST_AXES - 1}")
    return tuple(found) if isinstance(axis, (tuple, list)) else found[0]


def parameter_dtype(fn: str, value: Any) -> np.dtype[Any]:
    """The dtype of parameters and running statistics."""
    d = _dtype(value)
    if d is None or d not in (FLOAT32, FLOAT64):
        raise TypeError(f"{fn}: dtype is {shown(value)}, expected float32 or float64")
    return d


def channels(fn: str, x: Array, axis: Any, shape: tuple[int, ...], name: str = "x") -> None:
    """x has the channels of the layer."""
    found = tuple(x.shape[a] for a in axes(fn, axis, x.shape, name))
    if found != shape:
        raise ValueError(
            f"{fn}: {name} has channels {found}, expected {shape}; it has shape {x.shape}, axis={shown(axis)}"
            f"{_elsewhere(x.shape, shape)}"
        )


def not_in_place(fn: str, out: Array, x: Array) -> None:
    """A forward in evaluation that is kept for the backward cannot overwrite its x."""
    if _overlap(out, x):
        raise ValueError(f"{fn}: out is x, which save=True in evaluation must keep; expected another array")


def keys(fn: str, state: Any, required: list[str], optional: list[str]) -> set[str]:
    """The keys of a state: all the required ones, and no other but the optional ones."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{fn}: state is of type {type(state).__name__}, expected a mapping like state_dict()'s")
    found = list(state.keys())
    missing = [k for k in required if k not in found]
    unknown = [k for k in found if k not in required and k not in optional]
    if missing or unknown:
        more = ", ".join(shown(k) for k in unknown[:5])
        has = [f"no {', '.join(missing)}"] if missing else []
        has += [f"unknown keys {more}" + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")] if more else []
        also = f", and as an option {', '.join(optional)}" if optional else ""
        raise ValueError(f"{fn}: state has {', and '.join(has)}; expected {', '.join(required)}{also}")
    return set(found)


def entry(fn: str, state: Any, name: str, shape: tuple[int, ...], of: Of, *other: tuple[int, ...]) -> Any:
    """One value of a state, whose shape, as far as it is known without reading it, is `shape`, () or an `other`."""
    if isinstance(state, np.lib.npyio.NpzFile):
        return _unpacked(fn, state.zip, name, shape, of, *other)
    try:
        value = state[name]
    except KeyError:
        raise ValueError(f"{fn}: state has no {name}, though it is among its keys") from None
    if isinstance(claimed := getattr(value, "shape", None), tuple):
        _shape(fn, name, claimed, shape, of, *other)
    return value


def _unpacked(fn: str, archive: Any, name: str, shape: tuple[int, ...], of: Of, *other: tuple[int, ...]) -> Array:
    """An array of an .npz file. Its header comes first: it may claim any size, or objects to be unpickled."""
    form = np.lib.format
    with _readable(fn, name):
        file = archive.open(f"{name}.npy")
    with file:
        with _readable(fn, name):
            if form.read_magic(file) != (1, 0):  # the later ones are for structured dtypes, and for longer headers
                raise ValueError("it is not in version 1.0 of the .npy format")
            found, _, dtype = form.read_array_header_1_0(file)
        _shape(fn, name, found, shape, of, *other)
        _numeric(fn, name, dtype)
        with _readable(fn, name):
            file.seek(0)
            return np.asarray(form.read_array(file, allow_pickle=False))


@contextlib.contextmanager
def _readable(fn: str, name: str) -> Iterator[None]:
    """What zipfile, zlib and NumPy raise at a damaged file, with the names of function and argument."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{fn}: {name} cannot be read from its file: {error}") from error


def count(fn: str, name: str, value: Any, expected: str = "an int") -> int:
    """A count: an integer of 63 bits, 0 or more (an integer array of one element counts as its element)."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iu":
        value = value.item()
    try:
        n = index(value)
    except TypeError:
        raise TypeError(f"{fn}: {name} is {shown(value)}, expected {expected}") from None
    if not 0 <= n <= MOST:
        raise ValueError(f"{fn}: {name} is {shown(n)}, expected 0 to {MOST}")
    return n


def count_or_weights(fn: str, name: str, value: Any, shape: tuple[int, ...], of: Of) -> int | Array:
    """How many values the channels have: a count of all of them, or a copy of the total weight of each, in float64."""
    expected = f"an int, or an array of the total weights of channels of shape {shape}"
    if not isinstance(value, (np.ndarray, np.floating)):  # the latter is what arithmetic makes of an array without axes
        return count(fn, name, value, expected)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{fn}: {name} is a masked array, expected {expected}")
    if value.size == 1 and value.dtype.kind in "iu":
        return count(fn, name, value)
    if value.dtype.kind == "b" or not _supported(value.dtype):
        raise TypeError(f"{fn}: {name} has dtype {value.dtype}, expected {expected}")
    if value.shape != shape:
        raise ValueError(f"{fn}: {name} has shape {value.shape}, expected {shape}{_origin(of, value.shape)}")
    with np.errstate(all="ignore"):
        weights = np.array(value, np.float64)
    _finite_weights(fn, name, weights)
    return weights


def population(fn: str, n: int | Array, correction: int) -> None:
    """More values, or more weight, in every channel than the correction takes off."""
    if isinstance(n, int):
        if n <= correction:
            raise ValueError(f"{fn}: batches have {n} values per channel, expected at least {correction + 1}")
    elif (few := n <= correction).any():
        raise ValueError(f"{fn}: start and batches have a weight of {_first(n, few)}, expected more than {correction}")


def enough(fn: str, name: str, n: int | Array, correction: int) -> None:
    """More values, or more weight, than the correction takes off, in every channel that has any."""
    if isinstance(n, int):
        if n <= correction:
            raise ValueError(f"{fn}: {name} is {n}, expected at least 2 with correction=1")
    elif (few := (n > 0) & (n <= correction)).any():
        raise ValueError(f"{fn}: {name} is {_first(n, few)}, expected 0 or more than 1 with correction=1")
