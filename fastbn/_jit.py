"""The only place with Numba flags and the disk cache.

Two kinds of function exist below this line. *Leaves* are small serial loops over contiguous runs, decorated with
`reduction`, `elementwise` or `exact`; they are compiled into their callers and never cached by themselves.
*Kernels* are the loops over the block grid that the Python side calls; `kernel` builds each of them twice, serial and
parallel, from one body, with a disk cache.

That cache is not Numba's, which stamps one source file, so that a leaf edited in another one leaves stale machine code;
keeps an index in which two processes that store at once can swap their entries; runs code whose bits have flipped on
the disk; and sees a folder only if it may write there. Here each build of a kernel for one signature is one file, named
by all that decides its code and checked by its hash. As with Numba's, and with .pyc files, whoever may write to the
folder decides what runs.
"""

import contextlib
import hashlib
import os
import pickle
import sys
import tempfile
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

try:
    import numba
except ValueError:  # Numba says that a number of threads is wrong, but not where it comes from
    threads = os.environ.get("NUMBA_NUM_THREADS", "1")
    if threads.strip().lstrip("-").isdigit() and int(threads) < 1:
        raise ValueError(f"the environment variable NUMBA_NUM_THREADS is {threads!r}, expected at least 1") from None
    raise
import llvmlite
from numba import config, njit, prange
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

__all__ = ["Kernel", "elementwise", "exact", "kernel", "prange", "reduction"]

# No flag that changes what NaN and Inf mean. `error_model="numpy"`: a division has no branch that raises, which would
# stop vectorization; `nogil`: other Python threads go on.
_common: dict[str, Any] = {"error_model": "numpy", "nogil": True}

# Leaves are called by kernels alone: what Python would need to call them is not compiled.
_leaf: dict[str, Any] = {**_common, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# The innermost allocate nothing, so nothing counts references there; it would once per run, at the cost of a short one.
_innermost: dict[str, Any] = {**_leaf, "_nrt": False}

#: For a sum whose last bits do not matter (the yardsticks). Those that do are spelled out in lanes: `kernels.lanes`.
reduction = njit(fastmath={"reassoc", "nsz", "contract"}, **_innermost)
#: For innermost loops: multiply and add in one rounding, no other freedom.
elementwise = njit(fastmath={"contract"}, **_innermost)
#: For merges and everything else whose order of operations is part of the result.
exact = njit(**_leaf)

# Only `prange` becomes parallel. Numba would also split, fuse and reorder whole-array expressions.
_prange_only = {
    "prange": True,
    "comprehension": False,
    "numpy": False,
    "reduction": False,
    "setitem": False,
    "stencil": False,
    "fusion": False,
}


_here = Path(__file__).parent


@cache
def source_stamp() -> str:
    """Hash of the sources that decide the machine code: every kernel file and this one. Empty if there are none."""
    digest = hashlib.sha256()
    try:
        for path in [_here / "_jit.py", *sorted((_here / "kernels").glob("*.py"))]:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    except OSError:  # only bytecode is installed
        return ""
    return digest.hexdigest()[:12]


def _build(body: Callable[..., Any], build: str, **flags: Any) -> Callable[..., Any]:
    clone = FunctionType(
        body.__code__,
        body.__globals__,
        f"{body.__name__}_{build}_{source_stamp()}",
    )
    clone.__qualname__ = clone.__name__
    if config.DISABLE_JIT:
        return np.errstate(all="ignore")(clone)  # compiled code warns of no number either
    dispatcher = njit(**_common, no_cfunc_wrapper=True, **flags)(clone)
    if source_stamp():
        dispatcher._cache = _Cache(f"{body.__module__}.{clone.__name__}")
    return dispatcher  # type: ignore[no-any-return]


def _folders() -> list[Path]:
    """Where compiled kernels may lie: ``NUMBA_CACHE_DIR`` alone if it is set, else beside the sources, else at home."""
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR, "fastbn")]
    home = Path(AppDirs(appname="numba", appauthor=False).user_cache_dir, "fastbn")
    return [_here / "kernels" / "__pycache__", *([home] if home.is_absolute() else [])]


def _store(path: Path, content: bytes) -> bool:
    """Whether the file could be written. Nobody ever sees a part of it."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                file.write(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError:  # read-only, full, gone
        return False
    return True


class _Cache(NullCache):  # type: ignore[misc]
    """One build of one kernel on disk, for Numba's dispatcher. No fault of it is worth an exception."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def cache_path(self) -> str | None:
        """The folder that new files go to."""
        for folder in _folders():
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                return str(folder)
        return None

    def file_name(self, signature: Any, codegen: Any) -> str:
        """Named by what decides the machine code: source, build, types, CPU, versions, and what Numba was told."""
        python = sys.implementation.cache_tag, getattr(sys, "abiflags", "")
        told = config.OPT, config.BOUNDSCHECK
        key = repr(
            (signature, codegen.magic_tuple(), numba.__version__, llvmlite.__version__, np.__version__, python, told)
        )
        return f"{self.name.rpartition('.')[2]}.{hashlib.sha256((self.name + key).encode()).hexdigest()[:16]}.nbc"

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled kernel, or None."""
        context.refresh()
        name = self.file_name(signature, context.codegen())
        for folder in _folders():
            with contextlib.suppress(Exception):  # not there, not readable
                content = (folder / name).read_bytes()
                data = content[_DIGEST:]
                if hashlib.sha256(data).digest() == content[:_DIGEST]:
                    return CompileResult._rebuild(context, *pickle.loads(data))
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Store a compiled kernel in the first folder that takes it."""
        if result.library.has_dynamic_globals:  # addresses, which hold in this run alone
            return
        with contextlib.suppress(Exception):
            data = dumps(result._reduce())
            content = hashlib.sha256(data).digest() + data
            name = self.file_name(signature, result.codegen)
            any(_store(folder / name, content) for folder in _folders())


_DIGEST = hashlib.sha256().digest_size


class Kernel:
    """One loop over the block grid, built serial and parallel; both give the same bits.

    Attributes
    ----------
    body : function
        The plain Python function, for tests and debugging.
    serial, parallel : callable
        The two builds. Each compiles on its first call for a dtype.
    """

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body
        self.serial = _build(body, "serial")
        self.parallel = _build(body, "parallel", parallel=_prange_only)

    def __repr__(self) -> str:
        return f"<kernel {self.body.__name__}>"


def kernel(body: Callable[..., Any]) -> Kernel:
    """Make a `Kernel` of a function whose only parallel loop is a `prange`."""
    return Kernel(body)
