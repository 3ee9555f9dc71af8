"""What this process runs on (`show_config`), and compiling ahead (`warmup`)."""

from __future__ import annotations  # help() says DTypeLike, not all that it stands for

import platform
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _check
from ._threads import SERIAL_SIZE, get_num_threads, load_tbb, threading_layer
from .functional import Saved, batch_norm, batch_norm_backward, batch_norm_train
from .moments import moments

Array = npt.NDArray[Any]

PARTS = ("activation", "residual", "where")
"""Arguments of the verbs of which each combination has code of its own."""


def warmup(
    dtypes: npt.DTypeLike | Collection[npt.DTypeLike] = ("float32",),
    axes: int | Collection[int] = (1, -1),
    *,
    parts: str | Collection[str] = (),
    progress: bool = False,
) -> None:
    """Compile every verb ahead of its first call, serial and parallel, and fill the disk cache.

    Parameters
    ----------
    dtypes : dtype or list of dtypes, default ("float32",)
        Of the arrays to come.
    axes : int or list of ints, default (1, -1)
        The channel axes of 4-d arrays to come: 1 is NCHW, -1 is NHWC.
    parts : str or list of str, default ()
        What calls to come have besides, by the names of the arguments: "activation", "residual", "where" (of booleans),
        or several of them in one call, with + between: "residual+activation". Calls without any are always compiled.
    progress : bool, default False
        Say on stderr what is being compiled.

    Raises
    ------
    TypeError, ValueError
        For a dtype or an axis that the verbs refuse, or an unknown part. Nothing has been compiled then.

    See Also
    --------
    show_config : Prints the cache folder.

    Notes
    -----
    Half a minute for each dtype without a disk cache, a second with it; each of the `parts` takes as long again. It
    serves arrays of any rank: (N, D) runs the code of NHWC.

    Each combination of parts is code of its own: "residual" and "activation" in one call are not compiled by either
    alone. A `where` of numbers, not booleans, an inference into an `out` in another memory order, and an `out` that
    makes integers something else than float32 are compiled at the first call that has them: make one of yours, too.

    It starts Numba's threads: under GNU OpenMP, processes forked later run serial. ``python -m fastbn warmup`` does the
    same from a shell, for the image of a container, say.

    Examples
    --------
    Before the first request of a server, for float32 images in NHWC:

    >>> import fastbn
    >>> fastbn.warmup("float32", axes=-1)  # doctest: +SKIP

    For a network of convolution, batch norm and ReLU with residual blocks:

    >>> fastbn.warmup(parts=["activation", "residual+activation"])  # doctest: +SKIP
    """
    fn = "warmup"
    checked = [_check.dtype(fn, "dtypes", d) for d in _several(dtypes)]
    channels = [_check.axis_of_four(fn, "axes", a) for a in _several(axes)]
    combinations = dict.fromkeys([frozenset[str](), *(_check.names(fn, "parts", p, PARTS) for p in _several(parts))])
    # Long inner runs and short ones, small (serial) and large (parallel), many channels (fused tiles) and few (split).
    shapes = [(2, 8, 2, 2), (1024, 3, 2, 2), (2, 8, 16, 16), (4, 2, 32, 32)]
    shapes += [(16, 512, 4, 4), (8192, 3, 2, 2), (2, 64, 32, 32), (64, 2, 32, 32)]
    xs = [(np.moveaxis(np.ones(s, d), 1, axis).copy(), axis) for d in checked for axis in channels for s in shapes]
    jobs = [(x, axis, combination) for combination in combinations for x, axis in xs]
    for i, job in enumerate(jobs):
        if progress:
            print(f"\rcompiling {i + 1}/{len(jobs)}", end="", file=sys.stderr, flush=True)
        _call_verbs(*job)
    if progress:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)


def _several(value: Any) -> Collection[Any]:
    return value if isinstance(value, (list, tuple, set, range)) else [value]


def _call_verbs(x: Array, axis: int, parts: Collection[str]) -> None:
    """Call each verb on x, with those of `parts` that it takes."""
    weights: dict[str, Any] = {"where": True} if "where" in parts else {}
    given: dict[str, Any] = {"activation": "relu"} if "activation" in parts else {}
    if "residual" in parts:
        given["residual"] = np.ones_like(x, _check.result_dtype(x))
    y, saved = batch_norm_train(x, axis=axis, **given, **weights)
    batch_norm(x, saved.mean, saved.var, axis=axis, **given)
    batch_norm_backward(y, saved)
    batch_norm_backward(y, Saved.fixed(x, saved.mean, saved.var, axis=axis, **given))
    moments(x, axis=axis, **weights)


def show_config() -> None:
    """Print versions, CPU, threads, threading layer and cache folder: what a report of a problem should contain.

    See Also
    --------
    set_num_threads, set_pool_limit, warmup : What changes them.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config()  # doctest: +ELLIPSIS
    fastbn:          ...
    numba:           ...
    numpy:           ...
    python:          ...
    cpu:             ...
    threads:         ... of ...; one below 65,536 elements
    threading layer: ...
    tbb:             ...
    cache folder:    ...
    """
    print("\n".join(f"{name + ':':<17}{value}" for name, value in config().items()))


def config() -> dict[str, str]:
    """What `show_config` prints."""
    import numba

    from .kernels import forward

    tbb = load_tbb()
    stats = getattr(forward.forward_runs.serial, "stats", None)
    layer = threading_layer()
    rows: dict[str, Any] = {
        "fastbn": _version("fastbn"),
        "numba": numba.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": f"{get_num_threads()} of {numba.config.NUMBA_NUM_THREADS}; one below {SERIAL_SIZE:,} elements",
        "threading layer": layer or f"not started yet ({numba.config.THREADING_LAYER})",
        "tbb": f"{_version('tbb')}, {tbb or 'not loaded: fastbn is safe without it, but serial in forked children'}",
        "cache folder": getattr(stats, "cache_path", None)
        or "none is writable: kernels that no folder has are compiled anew in every process",
    }
    return {name: str(value) for name, value in rows.items()}


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
