"""Which build of a kernel runs, on how many threads, and what a fork leaves: every decision, without any thread."""

import builtins
import ctypes
import importlib.util
import os
import site
import sys
import threading
from types import SimpleNamespace

import pytest

from fastbn import _threads
from fastbn._threads import SERIAL_SIZE

HERE = threading.get_ident
# Without their caches.
MOST_THREADS, LOAD_TBB = (f.__wrapped__ for f in (_threads._most_threads, _threads.load_tbb))


class Numba:
    """As much of Numba as `_threads` asks: four threads, a setting, a layer that starts when it is first asked for."""

    def __init__(self):
        priority = ["tbb", "omp", "workqueue"]
        self.config = SimpleNamespace(NUMBA_NUM_THREADS=4, THREADING_LAYER="default", THREADING_LAYER_PRIORITY=priority)
        self.threads, self.layer, self.starts, self.set = 4, None, "tbb", []

    def get_num_threads(self):
        if self.starts is None:
            raise ValueError("No threading layer could be loaded.")
        self.layer = self.layer or self.starts
        return self.threads

    def set_num_threads(self, n):
        self.set.append(n)
        self.threads = n

    def threading_layer(self):
        if self.layer is None:
            raise ValueError("Threading layer is not initialized.")
        return self.layer


class Kernel:
    """Says which of its builds ran."""

    def __init__(self, numba):
        self.ran, self.numba, self.during = [], numba, lambda: None

    def serial(self, *args):
        self.ran.append(("serial", *args))

    def parallel(self, *args):
        assert HERE() in _threads._inside
        self.ran.append((f"parallel on {self.numba.threads}", *args))
        self.during()


@pytest.fixture
def numba(monkeypatch):
    """Nothing has run yet, and nothing is set."""
    fake = Numba()
    monkeypatch.setitem(sys.modules, "numba", fake)
    start = {"_limit": None, "_loaded": False, "_layer": None, "_starter": None, "_serial_only": False}
    for name, value in start.items():
        monkeypatch.setattr(_threads, name, value)
    monkeypatch.setattr(_threads, "_inside", set())
    monkeypatch.setattr(_threads, "_region", threading.Lock())
    monkeypatch.setattr(_threads, "_most_threads", lambda: 4)
    monkeypatch.setattr(_threads, "default_threads", lambda: 4)
    fake.loads = []
    monkeypatch.setattr(_threads, "load_tbb", lambda: fake.loads.append(1))
    return fake


@pytest.fixture
def kernel(numba):
    return Kernel(numba)


def run(kernel, size=SERIAL_SIZE):
    kernel.ran.clear()
    _threads.run(kernel, size, "x", 3)
    (ran,) = kernel.ran
    assert ran[1:] == ("x", 3)
    assert not _threads._inside
    return ran[0]


def test_small_calls_run_serial(kernel, numba):
    assert run(kernel, SERIAL_SIZE - 1) == "serial"
    assert numba.layer is None
    assert run(kernel, SERIAL_SIZE) == "parallel on 4"


def test_calls_with_one_thread_start_none(kernel, numba):
    _threads.set_num_threads(1)
    assert run(kernel) == "serial"
    assert (_threads._layer, numba.layer) == (None, None)


def test_the_first_call_loads_tbb_and_the_first_region_starts_it(kernel, numba):
    run(kernel, SERIAL_SIZE - 1)
    assert (_threads._layer, _threads._starter, numba.loads) == (None, None, [1])
    assert run(kernel) == "parallel on 4"
    assert (_threads._layer, _threads._starter, numba.loads) == ("tbb", HERE(), [1])
    assert run(kernel) == "parallel on 4"
    assert numba.loads == [1]
    assert not _threads._region.locked()


@pytest.mark.parametrize("layer", ["workqueue", "tbb", "omp"])
def test_the_very_first_call_waits_for_no_region(kernel, numba, layer):
    """It holds the compiler's lock, which who is in the one region of workqueue may be waiting for."""
    numba.layer = layer
    assert run(kernel) == ("serial" if layer == "workqueue" else "parallel on 4")
    assert run(kernel) == "parallel on 4"


@pytest.mark.parametrize("layer", ["workqueue", "tbb", "omp"])
def test_threads_that_others_have_started(kernel, numba, layer):
    """It is not known by which thread."""
    numba.layer = layer
    run(kernel)
    assert run(kernel) == "parallel on 4"
    assert (_threads._layer, _threads._starter) == (layer, None)


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("THREADING_LAYER", "nonsense", "NUMBA_THREADING_LAYER is 'nonsense', which is unknown or not installed"),
        ("THREADING_LAYER_PRIORITY", ["a", "b"],
         "NUMBA_THREADING_LAYER_PRIORITY is 'a b', expected 'tbb omp workqueue'"),
    ],
)  # fmt: skip
def test_no_layer_can_be_started(kernel, numba, setting, value, told):
    """Said once, before anything ran; from then on all is serial."""
    numba.starts = None
    setattr(numba.config, setting, value)
    with pytest.raises(RuntimeWarning, match=rf"^{told}: fastbn uses one thread$"):
        _threads.run(kernel, SERIAL_SIZE)
    assert not kernel.ran
    assert run(kernel) == "serial"
    assert _threads.get_num_threads() == 1


def test_threads_that_start_the_layer_at_once(kernel, numba, monkeypatch):
    """The one that comes second finds it started."""
    monkeypatch.setattr(_threads, "_layer", "omp")
    assert _threads._start() == "omp"
    assert numba.layer is None


@pytest.mark.parametrize("layer", ["workqueue", "tbb", "omp"])
def test_while_another_thread_is_in_a_region(kernel, monkeypatch, layer):
    """Under workqueue a second region would abort the process."""
    monkeypatch.setattr(_threads, "_layer", layer)
    with _threads._region:
        assert run(kernel) == ("serial" if layer == "workqueue" else "parallel on 4")
    assert run(kernel) == "parallel on 4"


@pytest.mark.parametrize("layer", [None, "workqueue", "tbb"])
@pytest.mark.parametrize("limit", [None, 2])
def test_an_exception_in_a_region_leaves_nothing_behind(kernel, numba, monkeypatch, layer, limit):
    monkeypatch.setattr(_threads, "_layer", layer)
    monkeypatch.setattr(_threads, "_loaded", True)
    _threads.set_num_threads(limit)

    def interrupt():
        raise KeyboardInterrupt

    kernel.during = interrupt
    with pytest.raises(KeyboardInterrupt):
        _threads.run(kernel, SERIAL_SIZE)
    assert not _threads._region.locked()
    assert not _threads._inside
    assert numba.threads == 4


def test_a_limit_is_set_for_the_region_alone(kernel, numba):
    _threads.set_num_threads(2)
    assert run(kernel) == "parallel on 2"
    assert numba.set == [2, 4]
    _threads.set_num_threads(4)
    assert run(kernel) == "parallel on 4"
    assert numba.set == [2, 4]
    _threads.set_num_threads(99)
    assert run(kernel) == "parallel on 4"
    assert numba.set == [2, 4]
    _threads.set_num_threads(1)
    assert run(kernel) == "serial"
    assert numba.set == [2, 4]


@pytest.mark.parametrize(
    ("user", "limit", "expected"), [(1, 3, "serial"), (2, 3, "parallel on 2"), (3, 2, "parallel on 2")]
)
def test_the_users_own_limit_holds_and_stays(kernel, numba, user, limit, expected):
    numba.threads = user
    _threads.set_num_threads(limit)
    assert run(kernel) == expected
    assert numba.threads == user


def test_a_child_that_must_stay_serial(kernel, monkeypatch):
    monkeypatch.setattr(_threads, "_serial_only", True)
    assert run(kernel) == "serial"
    assert _threads.get_num_threads() == 1
    assert _threads.planned_threads(SERIAL_SIZE) == 1


def test_planned_threads(numba):
    assert _threads.planned_threads(SERIAL_SIZE - 1) == 1
    assert _threads.planned_threads(SERIAL_SIZE) == 4
    _threads.set_num_threads(3)
    assert _threads.planned_threads(SERIAL_SIZE) == _threads.get_num_threads() == 3
    _threads.set_num_threads(5)
    assert _threads.get_num_threads() == 4
    _threads.set_num_threads(None)
    assert _threads.get_num_threads() == 4


# -------------------------------------------------------------------------------------------- what the machine gives


def test_numba_says_how_many_threads_there_are(numba):
    numba.config.NUMBA_NUM_THREADS = 7
    assert MOST_THREADS() == 7


@pytest.mark.parametrize(
    ("platform", "name"), [("linux", "lib/libtbb.so.12"), ("win32", "Library/bin/tbb12.dll"), ("darwin", None)]
)
def test_tbb_is_loaded_from_where_pip_puts_it(monkeypatch, tmp_path, platform, name):
    """From the environment, else the user's folder, else the environment that this one was made of."""
    loaded, folders, broken = [], [], set()

    def load(path, mode):
        assert mode == ctypes.RTLD_GLOBAL
        if path in broken:
            raise OSError("not for this machine")
        loaded.append(path)

    prefixes = [tmp_path / "venv", tmp_path / "user", tmp_path / "base"]
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "prefix", str(prefixes[0]))
    monkeypatch.setattr(sys, "base_prefix", str(prefixes[2]))
    monkeypatch.setattr(site, "getuserbase", lambda: str(prefixes[1]))
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(os, "add_dll_directory", folders.append, raising=False)
    monkeypatch.delenv("NUMBA_THREADING_LAYER", raising=False)
    assert LOAD_TBB() is None
    for prefix in reversed(prefixes):
        path = prefix / (name or "lib/libtbb.so.12")
        path.parent.mkdir(parents=True)
        path.touch()
        assert LOAD_TBB() == (str(path) if name else None)
        assert loaded == ([str(path)] if name else [])
        assert folders == ([str(path.parent)] if platform == "win32" else [])
        loaded.clear(), folders.clear()
    for layer in ("omp", "workqueue"):
        monkeypatch.setenv("NUMBA_THREADING_LAYER", layer)
        assert LOAD_TBB() is None
    for layer in ("default", "tbb", "threadsafe"):
        monkeypatch.setenv("NUMBA_THREADING_LAYER", layer)
        assert (LOAD_TBB() is not None) == (name is not None)
    if name:
        broken.add(str(prefixes[0] / name))
        assert LOAD_TBB() == str(prefixes[1] / name)
        monkeypatch.setattr(site, "getuserbase", lambda: None)  # a system without homes
        assert LOAD_TBB() == str(prefixes[2] / name)


def test_the_name_of_the_layer(numba, monkeypatch):
    assert _threads.threading_layer() is None
    numba.layer = "omp"
    assert _threads.threading_layer() == "omp"
    monkeypatch.delitem(sys.modules, "numba")
    assert _threads.threading_layer() is None


# ------------------------------------------------------------------------------------------------------------ forks

OTHER = HERE() + 1


@pytest.mark.parametrize(
    ("layer", "starter", "inside", "serial_only"),
    [
        ("omp", HERE(), set(), True),
        ("workqueue", OTHER, {OTHER}, False),
        ("tbb", HERE(), set(), False),
        ("tbb", HERE(), {HERE()}, False),
        ("tbb", OTHER, set(), True),
        ("tbb", HERE(), {HERE(), OTHER}, True),
        (None, None, set(), False),
    ],
)
@pytest.mark.parametrize("noted", [True, False])
def test_what_a_forked_child_may_do(numba, monkeypatch, layer, starter, inside, serial_only, noted):
    """`noted` by fastbn, or started by other Numba code alone: then nobody knows by which thread."""
    numba.layer = layer
    if noted:
        monkeypatch.setattr(_threads, "_layer", layer)
        monkeypatch.setattr(_threads, "_starter", starter)
    monkeypatch.setattr(_threads, "_inside", inside := set(inside))
    region = _threads._region
    with region:  # in the parent, another thread holds it
        _threads._after_fork()
        assert _threads._region is not region
        assert not _threads._region.locked()
    assert not inside
    assert _threads._serial_only == (serial_only or (layer == "tbb" and not noted))


def test_a_fork_waits_for_the_compiler(monkeypatch):
    lock = threading.RLock()
    monkeypatch.setitem(sys.modules, "numba.core.compiler_lock", SimpleNamespace(global_compiler_lock=lock))
    entered = []

    def try_it():
        if lock.acquire(blocking=False):
            entered.append(1)
            lock.release()

    def is_free():
        entered.clear()
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        return bool(entered)

    _threads._before_fork()
    assert not is_free()
    _threads._fork_done()
    assert is_free()
    assert not _threads._forking
    monkeypatch.delitem(sys.modules, "numba.core.compiler_lock")
    _threads._before_fork()  # without Numba there is nothing to wait for
    assert is_free()
    _threads._fork_done()
    assert not _threads._forking


@pytest.mark.parametrize("forks", [True, False])
def test_forks_are_watched_where_there_are_any(monkeypatch, forks):
    watched = []
    if forks:
        monkeypatch.setattr(os, "register_at_fork", lambda **hooks: watched.append(hooks), raising=False)
    else:
        monkeypatch.delattr(os, "register_at_fork", raising=False)
    spec = importlib.util.spec_from_file_location("fastbn._threads_again", _threads.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    hooks = [{"before": "_before_fork", "after_in_parent": "_fork_done", "after_in_child": "_fork_done"},
             {"after_in_child": "_after_fork"}]  # fmt: skip
    expected = [{when: getattr(module, name) for when, name in group.items()} for group in hooks]
    assert watched == (expected if forks else [])


def test_an_interrupt_while_the_users_count_is_set_again(kernel, numba, monkeypatch):
    """Ctrl-C comes once: the second attempt succeeds."""
    right, asked = numba.set_num_threads, []

    def interrupted(n):
        asked.append(n)
        if asked == [2, 4]:
            raise KeyboardInterrupt
        right(n)

    monkeypatch.setattr(numba, "set_num_threads", interrupted)
    monkeypatch.setattr(_threads, "_layer", "tbb")
    _threads.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        _threads.run(kernel, SERIAL_SIZE)
    assert asked == [2, 4, 4]
    assert numba.threads == 4
    assert not _threads._inside


def test_an_import_of_numba_that_fails_is_told_in_its_own_words(monkeypatch):
    """If `_jit`, which knows better, has nothing to say about it."""
    right = builtins.__import__

    def fail(name, *args):
        if name == "numba":
            raise ValueError("the settings are wrong")
        return right(name, *args)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ValueError, match=r"^the settings are wrong$"):
        _threads._numba()


def test_a_fork_that_ctrl_c_cut_short_has_no_lock_to_give_back():
    before = dict(_threads._forking)
    _threads._fork_done()
    assert _threads._forking == before
