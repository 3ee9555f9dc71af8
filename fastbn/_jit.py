"""The only place with Numba flags and the disk cache.

Two kinds of function exist below this line. *Leaves* are small serial loops over contiguous runs, decorated with
`reduction`, `elementwise` or `exact`; they are compiled into their callers and never cached by themselves.
*Kernels* are the loops over the block grid that the Python side calls; `kernel` builds each of them twice, serial and
parallel, from one body, with a disk cache.

Numba keys that cache on the signature, the CPU and the bytecode of the one function, and stamps one source file: a
leaf edited in another file, other flags, or the serial build in place of the parallel one would load stale machine
code. So a kernel's ``__qualname__``, which names its cache file, carries the build and a hash of every kernel source
and of this file.
"""

import contextlib
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from numba import config, njit, prange
from numba.core.caching import FunctionCache

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


@cache
def source_stamp() -> str:
    """Hash of the sources that decide the machine code: every kernel file and this one."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [here / "_jit.py", *sorted((here / "kernels").glob("*.py"))]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
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
    with contextlib.suppress(RuntimeError, OSError):  # no folder that may be written to: compiled in every process
        dispatcher._cache = _Cache(clone)
    return dispatcher  # type: ignore[no-any-return]


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's disk cache, of which no fault is worth an exception: a kernel that cannot be loaded is compiled."""

    def load_overload(self, *args: Any) -> Any:
        try:
            return super().load_overload(*args)
        except Exception:  # truncated, unreadable, of another version
            return None

    def save_overload(self, *args: Any) -> None:
        with contextlib.suppress(Exception):  # full, read-only, gone
            super().save_overload(*args)


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
