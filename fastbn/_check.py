"""Every argument check and error message.

A message names the function, the argument, what it is and what was expected. Checks come before any write.
"""

import contextlib
import math
import operator
import reprlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ._layout import Layout

Array = npt.NDArray[Any]
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def array(fn: str, name: str, value: Any) -> Array:
    """`value` as a plain array of a dtype that can be normalized: float32, float64, integers, booleans."""
    if type(value) is np.ndarray and value.dtype.char in "fd":  # the usual case, quickly
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{fn}: {name} is a masked array, whose mask would be ignored; expected a plain array")
    try:
        a = np.asarray(value)
    except ValueError as error:  # ragged
        raise ValueError(f"{fn}: {name} cannot be made an array: {error}") from None
    except TypeError as error:
        raise TypeError(f"{fn}: {name} cannot be made an array: {error}") from None
    _numeric(fn, name, a.dtype)
    return a


def _numeric(fn: str, name: str, found: np.dtype[Any]) -> None:
    if not _supported(found):
        raise TypeError(f"{fn}: {name} has dtype {found}, expected float32, float64, an integer dtype or bool")


def _supported(d: np.dtype[Any]) -> bool:
    return d.kind in "biu" or (d.kind == "f" and d.itemsize in (4, 8))


def dtype(fn: str, value: Any) -> np.dtype[Any]:
    """A dtype that can be normalized."""
    d: np.dtype[Any] | None
    try:
        d = np.dtype(value)
    except TypeError:
        d = None
    if d is None or not _supported(d):
        raise TypeError(f"{fn}: dtype is {value!r}, expected float32, float64, an integer dtype or bool")
    return d


def result_dtype(x: Array) -> np.dtype[Any]:
    """The dtype of y: that of a floating x, else float32."""
    return FLOAT64 if x.dtype.kind == "f" and x.dtype.itemsize == 8 else FLOAT32


def axes(fn: str, axis: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The channel axes, ascending and not negative."""
    if type(axis) is int and 0 <= axis < len(shape):  # the usual case, quickly
        return (axis,)
    given = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    found = []
    for a in given:
        if isinstance(a, (bool, np.bool_)):
            raise TypeError(f"{fn}: axis is {axis!r}, expected an int or a tuple of ints")
        try:
            i = operator.index(a)
        except TypeError:
            raise TypeError(f"{fn}: axis is {axis!r}, expected an int or a tuple of ints") from None
        if not -len(shape) <= i < len(shape):
            raise ValueError(
                f"{fn}: axis {i} is out of range for x of shape {shape}; the channel axis is axis={axis!r}"
            )
        found.append(i % len(shape))
    if len(set(found)) < len(found):
        raise ValueError(f"{fn}: axis={axis!r} names an axis of x of shape {shape} twice")
    return tuple(sorted(found))


def number(fn: str, name: str, value: Any, low: float, high: float | None = None) -> float:
    """A finite real number from `low` to `high`."""
    if type(value) is float and low <= value <= (math.inf if high is None else high) and value != math.inf:
        return value
    expected = f"a number from {low:g} to {high:g}" if high is not None else f"a finite number of at least {low:g}"
    if isinstance(value, (str, bytes, complex, np.complexfloating)):
        raise TypeError(f"{fn}: {name} is {value!r}, expected {expected}")
    try:
        v = float(value)
    except OverflowError:
        raise ValueError(f"{fn}: {name} is beyond float64, expected {expected}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{fn}: {name} is {value!r}, expected {expected}") from None
    if not (low <= v <= high if high is not None else low <= v < float("inf")):
        raise ValueError(f"{fn}: {name} is {value!r}, expected {expected}")
    return v


def eps(fn: str, value: Any) -> float:
    """eps: a finite number, 0 or more."""
    return number(fn, "eps", value, 0.0)


def correction(fn: str, value: Any) -> int:
    """correction: 0 or 1."""
    if type(value) is int and 0 <= value <= 1:
        return value
    if isinstance(value, (bool, str)) or np.ndim(value) or value not in (0, 1):
        raise ValueError(f"{fn}: correction is {value!r}, expected 0 (divide by n) or 1 (divide by n - 1)")
    return int(value)


Of = tuple[Array, Any] | str
"""What the shape of a parameter comes from, for its error message: x and axis, or the words themselves."""


def _origin(of: Of) -> str:
    return of if isinstance(of, str) else f", the channels of x; x has shape {of[0].shape}, axis={of[1]!r}"


def parameter(fn: str, name: str, value: Any, shape: tuple[int, ...], of: Of = "") -> Array:
    """A parameter or statistic of `shape`, or a scalar for all channels."""
    a = array(fn, name, value)
    _shape(fn, name, a.shape, shape, of)
    return a


def _shape(fn: str, name: str, found: tuple[int, ...], shape: tuple[int, ...], of: Of) -> None:
    if found not in (shape, ()):
        raise ValueError(f"{fn}: {name} has shape {found}, expected {shape}{_origin(of)}")


def variance(fn: str, name: str, value: Any, shape: tuple[int, ...], of: Of = "") -> Array:
    """A variance: as `parameter`, and nowhere negative."""
    a = parameter(fn, name, value, shape, of)
    if np.count_nonzero(a < 0):  # quicker than any()
        where = np.unravel_index(int(np.argmax(a < 0)), a.shape)
        at = f" at {tuple(int(i) for i in where)}" if a.ndim else ""
        raise ValueError(f"{fn}: {name} is {a[where]}{at}, expected no negative variance")
    return a


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
            f"{fn}: x has one value per channel, expected at least two in training; "
            f"x has shape {x.shape}, axis={axis!r}"
        )


def out(fn: str, value: Any, shape: tuple[int, ...], expected: np.dtype[Any], same: str, reads: dict[str, Any]) -> bool:
    """The caller's output array: right shape and dtype, writable, and sharing memory with nothing but `same` itself.

    `reads` is all that the call reads, by name; the one named `same` may be overwritten in place. Returns whether it
    is.
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{fn}: out is of type {type(value).__name__}, expected a NumPy array")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{fn}: out is a masked array, expected a plain array")
    if value.shape != shape:
        raise ValueError(f"{fn}: out has shape {value.shape}, expected {shape}")
    if value.dtype != expected:
        raise TypeError(f"{fn}: out has dtype {value.dtype}, expected {expected}")
    if not value.flags.writeable:
        raise ValueError(f"{fn}: out is read-only, expected a writable array")
    if _overlaps_itself(value):
        raise ValueError(f"{fn}: out has strides {value.strides}: its elements overlap, expected distinct ones")
    in_place = False
    for name, a in reads.items():
        if not isinstance(a, np.ndarray) or not np.may_share_memory(value, a):
            continue
        if name == same and _identical(value, a):
            in_place = True
        elif _overlap(value, a):
            raise ValueError(f"{fn}: out shares memory with {name} without being the same array; expected no overlap")
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
    return here["data"][0] == there["data"][0] and a.strides == b.strides and a.dtype == b.dtype


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


def gradient(fn: str, value: Any, shape: tuple[int, ...]) -> Array:
    """dy: the shape of y, floating."""
    dy = array(fn, "dy", value)
    if dy.dtype.kind != "f":
        raise TypeError(f"{fn}: dy has dtype {dy.dtype}, expected float32 or float64")
    if dy.shape != shape:
        raise ValueError(f"{fn}: dy has shape {dy.shape}, expected {shape}, the shape of x")
    return dy


def statistic(fn: str, name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """A running statistic that is updated in place: a writable float32 or float64 array of `shape`."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{fn}: {name} is of type {type(value).__name__}, expected a NumPy array (updated in place)")
    if value.dtype not in (FLOAT32, FLOAT64):
        raise TypeError(f"{fn}: {name} has dtype {value.dtype}, expected float32 or float64")
    if value.shape != shape:
        raise ValueError(f"{fn}: {name} has shape {value.shape}, expected {shape}, the shape of the moments")
    if not value.flags.writeable:
        raise ValueError(f"{fn}: {name} is read-only, expected a writable array (updated in place)")
    return value


# ---------------------------------------------------------------------------------------------------------- the layer


def channel_shape(fn: str, value: Any, least: int = 1) -> tuple[int, ...]:
    """The channels of a layer: an int, or a tuple of ints, at least `least` each."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    shape = []
    for n in given:
        try:
            if isinstance(n, (bool, np.bool_)):
                raise TypeError
            shape.append(operator.index(n))
        except TypeError:
            raise TypeError(f"{fn}: channels is {value!r}, expected an int or a tuple of ints") from None
    if any(n < least for n in shape):
        raise ValueError(f"{fn}: channels is {value!r}, expected at least {least}")
    return tuple(shape)


def layer_axis(fn: str, axis: Any, shape: tuple[int, ...]) -> int | tuple[int, ...]:
    """The channel axes of a layer, as many as its channels have; their range is checked when x is known."""
    given = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    found = []
    for a in given:
        try:
            if isinstance(a, (bool, np.bool_)):
                raise TypeError
            found.append(operator.index(a))
        except TypeError:
            raise TypeError(f"{fn}: axis is {axis!r}, expected an int or a tuple of ints") from None
    if len(found) != len(shape):
        raise ValueError(f"{fn}: axis={axis!r} has {len(found)} channel axes, expected {len(shape)}: channels={shape}")
    return tuple(found) if isinstance(axis, (tuple, list)) else found[0]


def parameter_dtype(fn: str, value: Any) -> np.dtype[Any]:
    """The dtype of parameters and running statistics."""
    d: np.dtype[Any] | None
    try:
        d = np.dtype(value)
    except TypeError:
        d = None
    if d is None or value is None or d not in (FLOAT32, FLOAT64):
        raise TypeError(f"{fn}: dtype is {value!r}, expected float32 or float64")
    return d


def channels(fn: str, x: Array, axis: Any, shape: tuple[int, ...]) -> None:
    """x has the channels of the layer."""
    found = tuple(x.shape[a] for a in axes(fn, axis, x.shape))
    if found != shape:
        raise ValueError(f"{fn}: x has channels {found}, expected {shape}; x has shape {x.shape}, axis={axis!r}")


def not_in_place(fn: str, out: Array, x: Array) -> None:
    """A forward in evaluation that is kept for the backward cannot overwrite its x."""
    if _overlap(out, x):
        raise ValueError(f"{fn}: out is x, which save=True in evaluation must keep; expected another array")


def keys(fn: str, state: Any, required: list[str], optional: list[str]) -> set[str]:
    """The keys of a state: all the required ones, and no other but the optional ones."""
    if not hasattr(state, "keys"):
        raise TypeError(f"{fn}: state is of type {type(state).__name__}, expected a mapping like state_dict()'s")
    found = list(state.keys())
    missing = [k for k in required if k not in found]
    unknown = [k for k in found if k not in required and k not in optional]
    if missing or unknown:
        raise ValueError(f"{fn}: state lacks {missing} and has unknown {reprlib.repr(unknown)}; expected {required}")
    return set(found)


def entry(fn: str, state: Any, name: str, shape: tuple[int, ...], of: Of) -> Any:
    """One value of a state, whose shape, as far as it is known without reading it, is `shape` or ()."""
    if isinstance(state, np.lib.npyio.NpzFile):
        return _unpacked(fn, state.zip, name, shape, of)
    try:
        value = state[name]
    except KeyError:
        raise ValueError(f"{fn}: state has no {name}, though it is among its keys") from None
    if isinstance(claimed := getattr(value, "shape", None), tuple):
        _shape(fn, name, claimed, shape, of)
    return value


def _unpacked(fn: str, archive: Any, name: str, shape: tuple[int, ...], of: Of) -> Array:
    """An array of an .npz file. Its header comes first: it may claim any size, or objects to be unpickled."""
    form = np.lib.format
    with _readable(fn, name):
        file = archive.open(f"{name}.npy")
    with file:
        with _readable(fn, name):
            if form.read_magic(file) != (1, 0):  # the later ones are for structured dtypes, and for longer headers
                raise ValueError("it is not in version 1.0 of the .npy format")
            found, _, dtype = form.read_array_header_1_0(file)
        _shape(fn, name, found, shape, of)
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


def count(fn: str, name: str, value: Any) -> int:
    """A count: an integer from 0 to what int64 holds (an array of one element counts as its element)."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        n = operator.index(value.item() if isinstance(value, (np.ndarray, np.generic)) else value)
    except (TypeError, ValueError):
        raise TypeError(f"{fn}: {name} is {value!r}, expected an int") from None
    if abs(n) > sys.maxsize:  # float(n) may overflow, and the digits of n fill a page
        raise ValueError(f"{fn}: {name} is a number of {n.bit_length()} bits, expected at most {sys.maxsize}")
    if n < 0:
        raise ValueError(f"{fn}: {name} is {n}, expected at least 0")
    return n
