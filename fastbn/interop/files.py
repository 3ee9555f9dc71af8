"""Layers and moments in files: NumPy's .npz and Hugging Face's .safetensors (safetensors 0.4 and later).

A file has the arrays of `BatchNorm.state_dict`, and beside them, as JSON, the options that make the layer: in .npz an
array of one string named "fastbn", in .safetensors metadata of that name. Arrays of layers with names are called
"name.gamma" and so on. Nothing is ever unpickled, and no more memory is taken than the file has bytes times a small
constant, whatever it claims.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..layer import BatchNorm
from ..moments import Moments
from ._need import need

Array = npt.NDArray[Any]
Thing = BatchNorm | Moments

__all__ = ["load", "save"]

SUFFIXES = (".npz", ".safetensors")
KEY = "fastbn"  # of the JSON text
DIGEST = "sha256"  # of text and tensors; an .npz has checksums of its own
FORMAT = 1
OPTIONS = ("axis", "eps", "momentum", "correction", "center", "scale", "track_running_stats", "activation", "dtype")
NAME = re.compile(r"[\w\-]+([./][\w\-]+)*")
LONGEST = 1 << 24  # characters of the JSON text
SMALL = 1 << 20  # channels that a layer may have whatever the size of its file: it may keep no array


def save(what: Thing | Mapping[str, Thing], path: str | os.PathLike[str]) -> None:
    """Write a layer, moments, or several of them to a file.

    Parameters
    ----------
    what : BatchNorm, Moments, or mapping of names to them
        Of a layer: parameters, running statistics, the pool behind them, and options (`BatchNorm.like`'s system among
        them). Not gradients, and not whether it is in training. Names are words joined by "." or "/".
    path : str or path
        Ends in ".npz" or ".safetensors". A file there is replaced as a whole: what fails leaves it as it was, and
        readers see the one or the other. Directories must exist.

    Raises
    ------
    ValueError
        Another suffix, a name that is none.
    TypeError
        Something that is no layer and no moments.
    ImportError
        A .safetensors file without that package.
    OSError
        The file cannot be written.

    Notes
    -----
    The bytes go to a neighbour of the file ("path.<random>.tmp") that then takes its name. A process that is killed
    may leave one behind.

    Examples
    --------
    >>> import os, tempfile, fastbn
    >>> from fastbn.interop import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.save({"stem": fastbn.BatchNorm(3, eps=1e-3)}, os.path.join(folder, "net.npz"))
    ...     files.load(os.path.join(folder, "net.npz"))
    {'stem': BatchNorm(3, eps=0.001)}
    """
    fn = "files.save"
    suffix = _suffix(fn, path)
    one = isinstance(what, (BatchNorm, Moments))
    things = {"": what} if one else what
    if not isinstance(things, Mapping):
        raise TypeError(f"{fn}: what is {_check.shown(what)}, expected a BatchNorm, a Moments, or a mapping to them")
    entries: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name, thing in things.items():
        if not one:
            _name(fn, name)
        entries[name], own = _taken_apart(fn, name, thing)
        arrays.update({_key(name, k): a for k, a in own.items()})
    text = json.dumps({"format": FORMAT, "one" if one else "many": entries[""] if one else entries})
    if len(text) > LONGEST:
        raise ValueError(f"{fn}: what has {len(text)} characters of names and options, expected at most {LONGEST}")
    if suffix == ".npz":
        arrays[KEY] = np.array(text)
        _write(path, lambda file: np.savez(file, **arrays))
    else:
        numpy = need("safetensors.numpy", "safetensors", f"fastbn.interop.{fn}")
        content = numpy.save(arrays, metadata={KEY: text, DIGEST: _digest(text, arrays)})
        _write(path, lambda file: file.write(content))


def load(path: str | os.PathLike[str]) -> Thing | dict[str, Thing]:
    """What `save` wrote: a layer, moments, or a dict of them.

    Parameters
    ----------
    path : str or path
        Ends in ".npz" or ".safetensors". The file may come from a stranger: nothing is unpickled, and sizes are checked
        before memory is taken.

    Returns
    -------
    BatchNorm, Moments or dict
        New ones, bit for bit what was saved; layers are in training.

    Raises
    ------
    ValueError
        Another suffix; a file that is damaged, or not `save`'s.
    ImportError
        A .safetensors file without that package.
    OSError
        The file cannot be opened.

    Notes
    -----
    Damage is noticed: .npz has a checksum of each array, and `save` puts one into .safetensors. They are no proof
    against intent. The state of a layer that is there already is read by ``layer.load_state_dict(np.load(path))`` from
    an .npz file that ``np.savez(path, **layer.state_dict())`` wrote.
    """
    fn = "files.load"
    text, arrays = (_read_npz if _suffix(fn, path) == ".npz" else _read_safetensors)(fn, path)
    entries, one = _entries(fn, path, text)
    bound = max(os.path.getsize(path), SMALL)
    if sum(math.prod(e["channels"]) for e in entries.values() if "channels" in e) > bound:
        raise ValueError(f"{_file(fn, path)} has layers of more channels than it has bytes, expected their arrays")
    own: dict[str, dict[str, Array]] = {name: {} for name in entries}
    for key, a in arrays.items():
        name, _, field = key.rpartition(".")
        if name not in own:
            raise ValueError(f"{_file(fn, path)} has {_check.shown(key)}, expected arrays of its layers only")
        own[name][field] = a
    found = {}
    for name, entry in entries.items():
        with _told(fn, path, f"has {name or 'a state'} that cannot be loaded"):
            found[name] = _put_together(entry, own[name])
    return found[""] if one else found


# ---------------------------------------------------------------------------------------------------- things as entries


def _taken_apart(fn: str, name: Any, thing: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """What stands in the JSON text for a layer or moments, and its arrays."""
    if isinstance(thing, Moments):
        return {"kind": "Moments"}, {k: _plain(fn, k, getattr(thing, k)) for k in ("count", "mean", "m2")}
    if not isinstance(thing, BatchNorm):
        raise TypeError(f"{fn}: what[{_check.shown(name)}] is {_check.shown(thing)}, expected a BatchNorm or a Moments")
    options = {
        "axis": thing.axis, "eps": _check.eps(fn, thing.eps), "momentum": thing.momentum,
        "correction": _check.correction(fn, thing.correction), "center": thing.beta is not None,
        "scale": thing.gamma is not None, "track_running_stats": thing.track_running_stats,
        "activation": thing.activation, "dtype": thing.dtype.name,
    }  # fmt: skip
    if thing.momentum is not None:
        options["momentum"] = _check.number(fn, "momentum", thing.momentum, 0.0, 1.0)
    entry = {"kind": "BatchNorm", "like": thing._like, "channels": thing.channels, "options": options}
    return entry, {k: _plain(fn, k, v) for k, v in thing.state_dict().items()}


def _plain(fn: str, name: str, value: Any) -> Array:
    """An array of its own, with its axes in order; a count becomes one of int64."""
    return np.array(_check.count(fn, name, value), np.int64) if isinstance(value, int) else np.array(value, order="C")


def _put_together(entry: dict[str, Any], arrays: dict[str, Array]) -> Thing:
    if entry["kind"] == "Moments":
        _keys("the arrays of Moments", arrays, ("count", "mean", "m2"))
        return Moments(arrays["count"], arrays["mean"], arrays["m2"])
    options = dict(entry["options"])
    if isinstance(options["axis"], list):
        options["axis"] = tuple(options["axis"])
    channels = tuple(entry["channels"])
    layer = BatchNorm.like(entry["like"], channels, **options) if entry["like"] else BatchNorm(channels, **options)
    state = layer.state_dict()
    _keys("the arrays of a layer", arrays, tuple(state))
    for name, a in arrays.items():
        own = np.asarray(state[name])
        if name == "running_count" and a.dtype == np.float64:  # of weights: one for each channel
            own = np.empty(channels)
        if (a.dtype, a.shape) != (own.dtype, own.shape):
            raise ValueError(f"{name} has dtype {a.dtype}, shape {a.shape}; expected {own.dtype}, {own.shape}")
    return layer.load_state_dict(arrays)


def _entries(fn: str, path: Any, text: str) -> tuple[dict[str, dict[str, Any]], bool]:
    """The JSON text as {name: entry}, of the right form; and whether it is one thing without a name."""
    with _told(fn, path, "has options that cannot be read"):
        if len(text) > LONGEST:
            raise ValueError(f"they have {len(text)} characters, expected at most {LONGEST}")
        document = json.loads(text)
        _dictionary("the document", document)
        if document.get("format") != FORMAT or isinstance(document["format"], bool):
            raise ValueError(f"format is {_check.shown(document.get('format'))}, expected {FORMAT}")
        one = "one" in document
        _keys("the document", document, ("format", "one" if one else "many"))
        entries = {"": document["one"]} if one else document["many"]
        _dictionary("many", entries)
        for name, entry in entries.items():
            if not one:
                _name(fn, name)
            _dictionary("an entry", entry)
            if entry.get("kind") == "Moments":
                _keys("an entry", entry, ("kind",))
                continue
            _keys("an entry", entry, ("kind", "like", "channels", "options"))
            if entry["kind"] != "BatchNorm":
                raise ValueError(f"kind is {_check.shown(entry['kind'])}, expected 'BatchNorm' or 'Moments'")
            if entry["like"] == "" or not isinstance(entry["like"], str | None):
                raise ValueError(f"like is {_check.shown(entry['like'])}, expected a system or null")
            if not isinstance(entry["channels"], list):
                raise ValueError(f"channels is {_check.shown(entry['channels'])}, expected a list of ints")
            entry["channels"] = list(_check.channel_shape(fn, entry["channels"]))
            _dictionary("options", entry["options"])
            _keys("options", entry["options"], OPTIONS)
    return entries, one


def _dictionary(what: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {_check.shown(value)}, expected an object")


def _keys(what: str, found: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    if set(found) != set(expected):
        shown = ", ".join(_check.shown(k) for k in [*found][:12]) or "nothing"
        raise ValueError(f"{what} has {shown}; expected {', '.join(expected)}")


def _name(fn: str, name: Any) -> None:
    """A name that is also one of a file in an archive, wherever that is unpacked."""
    if not isinstance(name, str) or len(name) > 200 or not NAME.fullmatch(name):
        raise ValueError(
            f"{fn}: a name is {_check.shown(name)}, expected up to 200 letters, digits, '_' and '-', in parts joined "
            "by '.' or '/'"
        )


def _key(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field


def _digest(text: str, arrays: Mapping[str, Array]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        a = arrays[name]
        found.update(f"\n{name} {a.dtype.str} {a.shape}\n".encode())
        found.update(a.tobytes())
    return found.hexdigest()


# ----------------------------------------------------------------------------------------------------------- the files


def _suffix(fn: str, path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{fn}: path is {_check.shown(path)}, expected a str or a path")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{fn}: path ends in {suffix!r}, expected {' or '.join(SUFFIXES)}")
    return suffix


def _file(fn: str, path: Any) -> str:
    return f"{fn}: {os.fspath(path)}"


@contextlib.contextmanager
def _told(fn: str, path: Any, what: str) -> Iterator[None]:
    """What a damaged or foreign file makes others raise becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if _machine(error):
            raise
        raise ValueError(f"{_file(fn, path)} {what}: {error}") from error


def _machine(error: Exception) -> bool:
    """Whether the machine is at fault and not the file, which may ask for a seek to nowhere (EINVAL)."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))


def _write(path: Any, write: Callable[[Any], Any]) -> None:
    """All of a file or none: written beside it, and then given its name."""
    target = os.path.realpath(path)
    beside = f"{target}.{secrets.token_hex(8)}.tmp"
    try:
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        if isinstance(error, OSError):  # which names the neighbour, of which nobody has heard, or nothing
            said = (f"{error}: {os.fspath(path)!r}",) if error.errno is None else (error.errno, error.strerror, path)
            raise OSError(*said) from error
        raise


def _read_npz(fn: str, path: Any) -> tuple[str, dict[str, Array]]:
    with open(path, "rb") as file, _told(fn, path, "cannot be read"), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [m.filename for m in members]
        if len(set(names)) < len(names):
            raise ValueError("it has an array twice")
        if f"{KEY}.npy" not in names:
            raise ValueError(
                f"it has no array {KEY!r}, so it is not a file of files.save; a state alone is loaded by "
                "layer.load_state_dict(np.load(path))"
            )
        if other := [n for n in names if not n.endswith(".npy")]:
            raise ValueError(f"it has {_check.shown(other[0])}, expected arrays only")
        # Then all arrays together are no larger than the file.
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise ValueError("it is compressed, expected arrays as files.save stores them")
        if sum(m.file_size for m in members) > os.fstat(file.fileno()).st_size:
            raise ValueError("its arrays are larger than the file")
        arrays = {m.filename.removesuffix(".npy"): _member(archive, m) for m in members}
    text = arrays.pop(KEY)
    if text.shape != () or text.dtype.kind != "U":
        raise ValueError(f"{_file(fn, path)} has {KEY} of shape {text.shape}, dtype {text.dtype}; expected one string")
    with _told(fn, path, "has options that cannot be read"):
        return str(text[()]), arrays


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """An array, whose header must claim exactly the bytes that follow it."""
    try:
        with archive.open(member) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is not in version 1.0 of the .npy format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            content = file.read()
        if dtype.kind not in "iufU":
            raise ValueError(f"it has dtype {str(dtype)[:100]}, expected numbers")
        if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"it has {len(content)} bytes, expected shape {_check.shown(shape)} of {dtype}")
        a = np.frombuffer(content, dtype) if content else np.empty(0, dtype)
        return np.array(a.reshape(shape, order="F" if fortran else "C"), dtype.newbyteorder("="))
    except Exception as error:
        if _machine(error):
            raise
        raise ValueError(f"{_check.shown(member.filename)}: {error}") from error


def _read_safetensors(fn: str, path: Any) -> tuple[str, dict[str, Array]]:
    safetensors = need("safetensors", "safetensors", f"fastbn.interop.{fn}")
    with open(path, "rb"):  # what cannot be opened is an OSError
        pass
    with _told(fn, path, "cannot be read"), safetensors.safe_open(os.fspath(path), framework="numpy") as file:
        metadata = file.metadata() or {}
        if KEY not in metadata or DIGEST not in metadata:
            raise ValueError(f"it has no metadata {KEY!r} and {DIGEST!r}, so it is not a file of files.save")
        arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  it is no mapping
        text = metadata[KEY]
        if _digest(text, arrays) != metadata[DIGEST]:
            raise ValueError("it is damaged: its content has another checksum")
    return text, arrays
