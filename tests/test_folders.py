"""Where compiled kernels are kept: which folders, what is written, and that no fault of theirs is an exception."""

import builtins
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numba import prange

from fastbn import _jit

HERE = Path(_jit.__file__).parent


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(_jit, "config", SimpleNamespace(CACHE_DIR=str(tmp_path), OPT=3, BOUNDSCHECK=None))
    return tmp_path / "fastbn"


def test_the_users_folder_alone(folder):
    assert _jit._folders() == [folder]


@pytest.mark.parametrize("home", ["/home/somebody/.cache/numba", "no/home"])
def test_beside_the_sources_and_then_at_home(monkeypatch, home):
    monkeypatch.setattr(_jit, "config", SimpleNamespace(CACHE_DIR=""))
    monkeypatch.setattr(_jit, "AppDirs", lambda appname, appauthor: SimpleNamespace(user_cache_dir=home))
    beside = HERE / "kernels" / "__pycache__"
    assert _jit._folders() == ([beside, Path(home, "fastbn")] if home.startswith("/") else [beside])


def test_a_file_is_there_as_a_whole_or_not_at_all(folder):
    path = folder / "kernel.nbc"
    assert _jit._store(path, b"code")
    assert _jit._store(path, b"newer code")
    assert path.read_bytes() == b"newer code"
    assert list(folder.iterdir()) == [path]
    assert not _jit._store(path / "below a file", b"code")
    assert list(folder.iterdir()) == [path]


def test_the_first_folder_that_can_be_written_to_is_named(folder, monkeypatch):
    cache = _jit._Cache("fastbn.kernels.forward.forward_runs")
    assert cache.cache_path == str(folder)
    blocked = folder / "a file"
    blocked.touch()
    monkeypatch.setattr(_jit, "_folders", lambda: [blocked, folder])
    assert cache.cache_path == str(folder)
    monkeypatch.setattr(_jit, "_folders", lambda: [blocked])
    assert cache.cache_path is None


def test_without_sources_there_is_no_stamp(monkeypatch, tmp_path):
    stamp = _jit.source_stamp.__wrapped__
    assert len(stamp()) == 12
    monkeypatch.setattr(_jit, "_here", tmp_path)
    assert stamp() == ""


def test_a_kernel_names_itself():
    assert repr(_jit.kernel(lambda: None)) == "<kernel <lambda>>"


def test_code_with_addresses_of_this_process_is_not_kept(folder):
    cache = _jit._Cache("fastbn.kernels.forward.forward_runs")
    cache.save_overload((), SimpleNamespace(library=SimpleNamespace(has_dynamic_globals=True)))
    assert not folder.exists()


def count_up(x):
    for i in prange(x.size):
        x[i] = i


@pytest.mark.jit("nothing is kept")
def test_what_was_kept_is_loaded(monkeypatch, tmp_path):
    folder = tmp_path / "kept"
    monkeypatch.setattr(_jit, "_folders", lambda: [folder])
    for hits, damaged in ((0, False), (1, False), (0, True)):
        if damaged:
            for path in folder.iterdir():
                path.write_bytes(path.read_bytes()[:-1])
        made, x = _jit.kernel(count_up), np.zeros(5)
        made.serial(x)
        np.testing.assert_array_equal(x, np.arange(5))
        assert sum(made.serial.stats.cache_hits.values()) == hits


@pytest.mark.parametrize(
    ("threads", "message"),
    [("0", "^the environment variable NUMBA_NUM_THREADS is '0', expected at least 1$"), ("4", "^something else$")],
)
def test_numbas_complaint_about_threads_is_put_into_words(monkeypatch, threads, message):
    right = builtins.__import__

    def fail(name, *args):
        if name == "numba":
            raise ValueError("something else")
        return right(name, *args)

    spec = importlib.util.spec_from_file_location("fastbn._jit_again", _jit.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("NUMBA_NUM_THREADS", threads)
    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ValueError, match=message):
        spec.loader.exec_module(module)
