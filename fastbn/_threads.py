"""Serial or parallel: thread counts, the threading layer, and what must never happen in threads and forks.

Numba's threading layers fail in ways that end a process: under workqueue two threads that enter a parallel region at
once abort it; under GNU OpenMP a region in a forked child kills the child, and one in a grandchild hangs. TBB has
neither fault (in a child forked by the thread that started it, while no other is in a region), so fastbn depends on TBB
where its wheel exists and loads it from where pip puts it, which Numba does not search in a virtual environment.
Elsewhere the serial build of the same kernel, which gives the same bits, takes over: in a forked child under OpenMP and
where TBB may not have survived, and under workqueue while another thread is in a region.

Numba's own settings are the user's and stay as they are.
"""

import contextlib
import ctypes
import importlib
import logging  # noqa: F401  its fork handler must be registered before ours: see _before_fork
import math
import operator
import os
import site
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._jit import Kernel

SERIAL_SIZE = 1 << 16
"""Calls on fewer elements than this run serial: a parallel region would cost more than it saves."""

_limit: int | None = None  # set_num_threads
_loaded = False  # whether a call has ended in this process
_layer: str | None = None  # known when Numba's threads were started
_starter: int | None = None  # the thread that started Numba's, if it is known
_serial_only = False  # in a forked child whose parent's threads did not survive, and where no layer can be started
_inside: set[int] = set()  # the Python threads that are in a parallel region
_region = threading.Lock()  # held during a region under workqueue


def run(kernel: "Kernel", size: int, *args: Any) -> None:
    """Call one build of `kernel` on arrays of `size` elements."""
    global _loaded
    if _loaded:
        _run(kernel, size, args)
    else:
        with _compiler_lock():  # NumPy and Numba import more modules on the way, and a fork must wait for that
            load_tbb()  # in time for the user's own parallel loops, too
            _run(kernel, size, args, first=True)
        _loaded = True


def _run(kernel: "Kernel", size: int, args: tuple[Any, ...], first: bool = False) -> None:
    wanted = planned_threads(size)
    layer = None if wanted == 1 else _layer or _start()
    if layer is None:
        kernel.serial(*args)
    elif layer != "workqueue":
        _parallel(kernel, args, wanted)
    elif first or _region.locked():  # it bears one region at a time; who holds the compiler's lock waits for none
        kernel.serial(*args)
    else:
        with _region:  # not acquire() and try: Ctrl-C between the two would leave it locked
            _parallel(kernel, args, wanted)


def planned_threads(size: int) -> int:
    """How many threads a call on `size` elements will use, as far as is known before it."""
    return 1 if size < SERIAL_SIZE or _serial_only or _own.alone else get_num_threads()


class _Own(threading.local):
    alone = False


_own = _Own()  # of each Python thread


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Calls of this Python thread run serial meanwhile: it is one of many that share the processors."""
    before, _own.alone = _own.alone, True
    try:
        yield
    finally:
        _own.alone = before


def _parallel(kernel: "Kernel", args: tuple[Any, ...], wanted: int) -> None:
    allowed = wanted
    if wanted < _most_threads():  # else Numba's own count, which the user may have lowered, is the limit anyway
        allowed = _numba().get_num_threads()
        wanted = min(wanted, allowed)
    if wanted == 1:
        kernel.serial(*args)
        return
    thread = threading.get_ident()
    try:
        _inside.add(thread)
        if wanted < allowed:
            _numba().set_num_threads(wanted)  # of this thread alone
        kernel.parallel(*args)
    finally:
        try:
            if wanted < allowed:
                _numba().set_num_threads(allowed)
        except BaseException:  # Ctrl-C, just here: a second time it does not come
            _numba().set_num_threads(allowed)
            raise
        finally:
            _inside.discard(thread)


def _start() -> str | None:
    """Start Numba's threads, unless they run; the name of the threading layer, or None where there is none."""
    global _layer, _starter, _serial_only
    with _compiler_lock():  # a fork waits for it
        if _layer is None and not _serial_only:
            # Who started them before is unknown, and so is what a fork does to them.
            starter = threading.get_ident() if threading_layer() is None else None
            try:
                _numba().get_num_threads()
            except (ImportError, ValueError):
                _serial_only = True  # before the warning, which may be an exception
                config = _numba().config
                what = f"NUMBA_THREADING_LAYER is {config.THREADING_LAYER!r}, which is unknown or not installed"
                priority = config.THREADING_LAYER_PRIORITY
                if sorted(priority) != ["omp", "tbb", "workqueue"]:
                    what = f"NUMBA_THREADING_LAYER_PRIORITY is {' '.join(priority)!r}, expected 'tbb omp workqueue'"
                warnings.warn(f"{what}: fastbn uses one thread", RuntimeWarning, stacklevel=2)
            else:
                _layer, _starter = threading_layer(), starter
    return _layer


def threading_layer() -> str | None:
    """Name of Numba's threading layer, or None before any parallel region of this process."""
    numba = sys.modules.get("numba")
    if numba is None:
        return None
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


@cache
def load_tbb() -> str | None:
    """Load the TBB library that pip installed, so that Numba finds it by name; its path, or None."""
    names = {"linux": "lib/libtbb.so.12", "win32": "Library/bin/tbb12.dll"}
    name = names.get(sys.platform)
    if name is None or os.environ.get("NUMBA_THREADING_LAYER", "default") in ("omp", "workqueue"):
        return None
    for prefix in (sys.prefix, site.getuserbase() or sys.prefix, sys.base_prefix):
        path = Path(prefix, name)
        if path.exists():
            with contextlib.suppress(OSError):
                if sys.platform == "win32":
                    os.add_dll_directory(str(path.parent))
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                return str(path)
    return None


@cache
def default_threads() -> int:
    """Numba's count (the CPUs of this process's affinity, or NUMBA_NUM_THREADS), capped by the cgroups' CPU quota."""
    threads = _most_threads()
    quota = math.inf if "NUMBA_NUM_THREADS" in os.environ else cpu_quota()
    return max(1, math.ceil(min(threads, quota)))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs' worth of time that this process may use: the least quota of its cgroup and of those above it (Linux)."""
    quotas = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                mounts = ["sys/fs/cgroup"]
            elif "cpu" in controllers.split(","):
                mounts = ["sys/fs/cgroup/cpu", f"sys/fs/cgroup/{controllers}"]
            else:
                continue
            # In a container the path may be that of the host, which is not there: its own cgroup is then the top.
            group = PurePosixPath(path.lstrip("/"))
            quotas += [_quota(Path(root, mount, g)) for mount in mounts for g in (group, *group.parents)]
    return min(quotas)


def _quota(cgroup: Path) -> float:
    """That of one cgroup; version 2 keeps it in one file, version 1 in two."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            quota, period = (int(v) for name in names for v in (cgroup / name).read_text().split())
            if quota > 0 and period > 0:  # -1: none
                return quota / period
    return math.inf


def get_num_threads() -> int:
    """Number of threads that a large call may use.

    Returns
    -------
    int
        What `set_num_threads` set, else Numba's count: the CPUs this process may run on, or ``NUMBA_NUM_THREADS``,
        and, unless that is set, no more than the CPU quota of its cgroups (Linux). 1 in a forked child that must stay
        serial, and where no threading layer can be started. Calls on fewer than 65,536 elements always use one.

    See Also
    --------
    set_num_threads : Sets it.
    show_config : Prints it, with the threading layer.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(1)
    >>> fastbn.get_num_threads()
    1
    >>> fastbn.set_num_threads(None)
    """
    if _serial_only:
        return 1
    return min(_limit, _most_threads()) if _limit else default_threads()


def set_num_threads(n: int | None) -> None:
    """Limit the threads of fastbn's calls, in the whole process; Numba's own setting stays as it is.

    The results do not depend on it, to the last bit.

    Parameters
    ----------
    n : int or None
        At least 1. More than Numba has threads (``NUMBA_NUM_THREADS``, read when Numba is imported) means all of
        them. None: back to the default.

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is below 1.

    See Also
    --------
    get_num_threads : What is in force, and the default.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(2)
    >>> fastbn.set_num_threads(None)
    """
    global _limit
    if n is not None:
        try:
            if isinstance(n, bool):
                raise TypeError
            n = operator.index(n)
        except Exception:  # of a stranger's __index__
            raise TypeError(f"set_num_threads: n is of type {type(n).__name__}, expected an int or None") from None
        if n < 1:
            what = n if n > -1_000_000 else "negative"  # of an int that is too long Python prints nothing
            raise ValueError(f"set_num_threads: n is {what}, expected at least 1, or None for the default")
    _limit = n


def _numba() -> Any:
    try:
        import numba  # not before it is needed: it takes most of a second
    except ValueError:
        importlib.import_module("._jit", __package__)  # which says what is wrong with Numba's settings
        raise
    return numba


@cache
def _most_threads() -> int:
    return int(_numba().config.NUMBA_NUM_THREADS)


def _after_fork() -> None:
    """In a forked child: a lock that nobody holds, and no parallel region where the threads are gone for good."""
    global _region, _serial_only
    _region = threading.Lock()
    layer = _layer or threading_layer()
    thread = threading.get_ident()
    if layer == "omp" or (layer == "tbb" and (_starter != thread or _inside - {thread})):
        _serial_only = True
    _inside.clear()


def _compiler_lock() -> Any:
    numba = sys.modules.get("numba.core.compiler_lock")
    return numba.global_compiler_lock if numba else contextlib.nullcontext()


def _before_fork() -> None:
    """Wait for what another thread imports or compiles: those locks would stay locked in the child for good.

    That thread may want a lock of `logging` meanwhile, which logging's own handler takes for the time of the fork:
    handlers run in reverse order, so that ours comes before it.
    """
    _wait_for_imports()  # may be that of Numba, which brings the lock
    lock = _compiler_lock()
    lock.__enter__()
    _forking[threading.get_ident()] = lock
    _wait_for_imports()  # that have begun since


def _wait_for_imports() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in _IMPORTED_LATE:
            with contextlib.suppress(ImportError, ValueError):  # the thread that imports it sees them
                importlib.import_module(name)  # returns at once where nobody is importing it


def _fork_done() -> None:
    if lock := _forking.pop(threading.get_ident(), None):  # none if Ctrl-C came before it
        lock.__exit__(None, None, None)


_IMPORTED_LATE = {__package__, "numba", "llvmlite", "numpy"}  # by the first call
_forking: dict[int, Any] = {}  # the lock that a thread holds during its fork

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_fork_done, after_in_child=_fork_done)
    os.register_at_fork(after_in_child=_after_fork)
