"""The disk cache never lies and never hurts: no stale, damaged or foreign code runs; no fault of a folder is fatal."""

import compileall
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite
import numba
import numpy as np
import pytest
from subprocesses import ROOT, run_python, run_script

import fastbn
from fastbn import _jit, kernels

# A kernel and its leaf, of the kind that fastbn has, but compiled in a moment.
KERNEL = """
from .._jit import kernel, prange
from .tiny_leaf import scaled

@kernel
def tiny(x, y):
    for i in prange(x.size):
        y[i] = scaled(x[i])
"""
LEAF = """
from .._jit import exact

@exact
def scaled(v):
    return v * 2
"""

# Calls the given builds of it; prints y and what the caches did. `before` comes first, `between` after each call.
SCRIPT = """
import json, os, shutil, sys
arguments = json.loads(sys.argv[1])
exec(arguments["before"])
import numpy as np
import fastbn
from fastbn._config import config
from fastbn.kernels.tiny import tiny
ys = {}
for build in arguments["builds"]:
    name, _, dtype = build.partition(" ")
    x = np.arange(3, dtype=dtype or "float32")
    y = np.zeros_like(x)
    getattr(tiny, name)(x, y)
    ys[build] = y.tolist()
    exec(arguments["between"])
stats = {b: getattr(tiny, b).stats for b in ("serial", "parallel")}
count = lambda c: sum(c.values())
print(json.dumps({
    "y": ys, "file": fastbn.__file__,
    "hits": {b: count(s.cache_hits) for b, s in stats.items()},
    "misses": {b: count(s.cache_misses) for b, s in stats.items()},
    "folder": config()["cache folder"],
}))
"""
Y = [0, 2, 4]

# Root reads and writes whatever the permissions say; without its capabilities it does not.
NO_CAPABILITIES = """
import ctypes
assert not ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
"""
PERMISSIONS = pytest.mark.skipif(sys.platform != "linux", reason="takes capabilities away as Linux does it")
NOWHERE = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"), "/dev/null")


class Package:
    """A copy of fastbn to edit, and a way to run it with a cache of its own."""

    def __init__(self, folder):
        self.folder, self.cache, self.cwd = folder / "site" / "fastbn", folder / "cache", folder
        shutil.copytree(ROOT / "fastbn", self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        (self.folder / "kernels" / "tiny.py").write_text(KERNEL)
        self.leaf = self.folder / "kernels" / "tiny_leaf.py"
        self.leaf.write_text(LEAF)

    def command(self, *builds, before="", between=""):
        return SCRIPT, json.dumps({"builds": builds, "before": before, "between": between})

    def variables(self, **env):
        return {"NUMBA_CACHE_DIR": str(self.cache), "PYTHONPATH": str(self.folder.parent)} | env

    def __call__(self, *builds, y=Y, before="", between="", **env):
        command = self.command(*builds, before=before, between=between)
        found = json.loads(run_script(*command, cwd=self.cwd, **self.variables(**env)))
        assert Path(found["file"]).is_relative_to(self.cwd)
        assert found["y"] == dict.fromkeys(builds, y)
        return found

    def files(self, folder=None):
        return sorted(p for p in Path(folder or self.cache).rglob("*") if p.is_file())


pytestmark = pytest.mark.jit("there is nothing to cache")


@pytest.fixture
def package(tmp_path):
    return Package(tmp_path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache that holds the serial build for float32, to be copied."""
    package = Package(tmp_path_factory.mktemp("compiled"))
    assert package("serial")["misses"] == {"serial": 1, "parallel": 0}
    return package.cache


@pytest.fixture
def warm(package, compiled):
    shutil.copytree(compiled, package.cache)
    return package


def hits(found):
    return found["hits"]["serial"], found["misses"]["serial"]


# ------------------------------------------------------------------------------------------------------- stale code


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_leaf_edited_in_another_file_is_compiled_anew(warm):
    assert hits(warm("serial")) == (1, 0)

    functional = warm.folder / "functional.py"
    functional.write_text(functional.read_text() + "\n")
    version = fastbn.__version__
    edit(warm.folder / "__init__.py", f'__version__ = "{version}"', '__version__ = "99.0"')
    assert hits(warm("serial")) == (1, 0)  # no kernel was edited

    edit(warm.leaf, "v * 2", "v * 3")
    assert hits(warm("serial", y=[0, 3, 6])) == (0, 1)
    edit(warm.leaf, "v * 3", "v * 2")
    assert hits(warm("serial")) == (1, 0)


def test_edited_flags_are_compiled_anew(warm):
    edit(warm.folder / "_jit.py", '"nogil": True', '"nogil": False')
    assert hits(warm("serial")) == (0, 1)


def test_two_checkouts_share_a_folder(warm, tmp_path):
    """Of equal sources they share the code; of others each finds its own."""
    (tmp_path / "other").mkdir()
    other = Package(tmp_path / "other")
    other.cache = warm.cache
    assert hits(other("serial")) == (1, 0)
    edit(other.leaf, "v * 2", "v * 3")
    assert hits(other("serial", y=[0, 3, 6])) == (0, 1)
    assert hits(warm("serial")) == (1, 0)
    assert hits(other("serial", y=[0, 3, 6])) == (1, 0)


def test_serial_and_parallel_never_load_each_other(warm):
    parallel = warm("parallel")
    assert (parallel["hits"]["parallel"], parallel["misses"]["parallel"]) == (0, 1)
    assert len(warm.files()) == 2
    both = warm("serial", "parallel")
    assert both["hits"] == {"serial": 1, "parallel": 1}
    assert both["misses"] == {"serial": 0, "parallel": 0}


class Target:
    """What a cache file's name needs to know of the compiler: the CPU."""

    def __init__(self, cpu="here"):
        self.cpu = cpu

    def magic_tuple(self):
        return "triple", self.cpu, "features"


def test_a_file_is_named_by_all_that_decides_its_code(monkeypatch):
    """Another Numba, NumPy or Python, another CPU, other settings: another file."""

    def name(kernel="kernels.forward.rows_serial_0123", types=("float32",), cpu="here"):
        return _jit._Cache(kernel).file_name(types, Target(cpu))

    names = [name(), name("kernels.forward.rows_parallel_0123"), name("kernels.backward.rows_serial_0123"),
             name(types=("float64",)), name(cpu="there")]  # fmt: skip
    for where, attribute, value in [(numba, "__version__", "99"), (llvmlite, "__version__", "99"),
                                    (np, "__version__", "99"),
                                    (sys, "abiflags", "d"), (numba.config, "OPT", 0),
                                    (numba.config, "BOUNDSCHECK", 1)]:  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, value)
            names.append(name())
    assert len(set(names)) == len(names)
    assert name() == names[0]


# ----------------------------------------------------------------------------------------------------- damaged files


def test_a_damaged_file_is_compiled_and_stored_anew(warm):
    (path,) = warm.files()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert hits(warm("serial")) == (0, 1)
    assert hits(warm("serial")) == (1, 0)


def test_machine_code_whose_bits_flipped_is_never_run(warm):
    """Such a file unpickles as well as ever: it is the hash that finds it."""
    between = """
from pathlib import Path
dispatcher = tiny.serial
(path,), signature = Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nbc"), dispatcher.signatures[0]
load = lambda: dispatcher._cache.load_overload(signature, dispatcher.targetctx)
good = path.read_bytes()
code = good.index(b"ELF") if b"ELF" in good else len(good) // 2
places = [0, 31, 32, len(good) - 1, *range(code, len(good), len(good) // 200)]
assert len(places) > 50
flipped = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:] for i in places]
for bad in [*flipped, b"", good[:32], good[:-1], good + b".", b"." * len(good), good[:32] + b"N."]:
    path.write_bytes(bad)
    assert load() is None
path.write_bytes(good)
assert load() is not None
"""
    warm("serial", between=between)


# ----------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("cache_dir", [None, "/dev/null/cache"])
def test_without_a_writable_folder_it_works_uncached(package, cache_dir):
    """Where folders would be made lie plain files: that stops root too."""
    for folder in (package.folder, package.folder / "kernels"):
        (folder / "__pycache__").write_text("a file")
    before = package.files(package.folder)
    found = package("serial", NUMBA_CACHE_DIR=cache_dir, **NOWHERE)
    assert hits(found) == (0, 1)
    assert found["folder"].startswith("none is writable")
    assert package.files(package.folder) == before


def test_a_user_without_a_home(package):
    """Neither in the environment nor in the system's list: no folder named ~ is made in the current one."""
    (package.folder / "kernels" / "__pycache__").write_text("a file")
    before = "import os, pwd\ndef getpwuid(user): raise KeyError(user)\npwd.getpwuid = getpwuid"
    nobody = dict.fromkeys((*NOWHERE, "NUMBA_CACHE_DIR"))
    found = package("serial", before=before, **nobody)
    assert hits(found) == (0, 1)
    assert found["folder"].startswith("none is writable")
    assert [p.name for p in package.cwd.iterdir()] == ["site"]


def forbid(folder, mode=0o500):
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        if path.is_dir():
            path.chmod(mode)


@pytest.fixture
def permit(tmp_path):
    """Folders that pytest can remove again."""
    yield
    for path in [tmp_path, *tmp_path.rglob("*")]:
        if path.is_dir():
            path.chmod(0o700)


@PERMISSIONS
@pytest.mark.usefixtures("permit")
def test_a_warm_folder_that_is_read_only_is_used(warm):
    forbid(warm.cache)
    found = warm("serial", "serial float64", before=NO_CAPABILITIES)
    assert hits(found) == (1, 1)
    assert len(warm.files()) == 1
    assert found["folder"].startswith("none is writable")


@PERMISSIONS
@pytest.mark.usefixtures("permit")
def test_a_folder_that_may_not_be_entered_is_no_fault(warm):
    forbid(warm.cache, 0)
    found = warm("serial", before=NO_CAPABILITIES)
    assert hits(found) == (0, 1)


@PERMISSIONS
@pytest.mark.usefixtures("permit")
def test_a_read_only_installation(package, tmp_path):
    """What was compiled when it was installed is used; what is new goes to the user's own folder, if there is one."""
    nowhere = NOWHERE | {"NUMBA_CACHE_DIR": None}
    at_home = nowhere | {"XDG_CACHE_HOME": str(tmp_path / "home")}
    installed = package("serial", **nowhere)
    assert Path(installed["folder"]) == package.folder / "kernels" / "__pycache__"
    forbid(package.folder)
    assert hits(package("serial", before=NO_CAPABILITIES, **nowhere)) == (1, 0)
    assert hits(package("serial", "serial float64", before=NO_CAPABILITIES, **at_home)) == (1, 1)
    found = package("serial", "serial float64", before=NO_CAPABILITIES, **at_home)
    assert hits(found) == (2, 0)
    assert Path(found["folder"]).is_relative_to(tmp_path / "home")
    assert len(package.files(tmp_path / "home")) == 1


def test_bytecode_alone(package):
    """Without sources nothing tells whether a stored kernel is stale, so none is."""
    compileall.compile_dir(package.folder, quiet=1, legacy=True)
    for path in package.folder.rglob("*.py"):
        path.unlink()
    assert hits(package("serial")) == (0, 1)
    assert not package.cache.exists()


def test_a_write_that_fails_half_way_leaves_nothing(package):
    """As on a full disk; with room again the next process stores what it compiles."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))"
    pytest.importorskip("resource", reason="this system has no limit of file sizes")
    found = package("serial", before=limit)
    assert hits(found) == (0, 1)
    assert not package.files()
    assert hits(package("serial")) == (0, 1)
    assert hits(package("serial")) == (1, 0)


FULL = """
import ctypes, json, os, subprocess, sys
folder, script, arguments = sys.argv[1:]
libc, new_mounts, new_user = ctypes.CDLL(None, use_errno=True), 0x20000, 0x10000000
mount = lambda flags, size: libc.mount(b"none", folder.encode(), b"tmpfs", flags, b"size=%d" % size)
if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user) or mount(0, 16384):
    print(json.dumps(os.strerror(ctypes.get_errno())))
    sys.exit()
command = [sys.executable, "-c", script, arguments]
run = lambda: json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
found = [run(), os.listdir(folder + "/fastbn")]
assert not mount(0x20, 1 << 26)  # the same again, with room
print(json.dumps([*found, run(), run()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system as Linux does it")
def test_a_folder_that_is_full(package):
    package.cache.mkdir()
    found = json.loads(
        run_script(FULL, str(package.cache), *package.command("serial"), cwd=package.cwd, **package.variables())
    )
    if isinstance(found, str):
        pytest.skip(f"a small file system cannot be mounted here: {found}")
    full, files, stored, loaded = found
    assert [r["y"]["serial"] for r in (full, stored, loaded)] == [Y] * 3
    assert files == []
    assert [hits(r) for r in (full, stored, loaded)] == [(0, 1), (0, 1), (1, 0)]


def test_a_folder_deleted_while_the_process_runs(warm):
    found = warm("serial", "serial float64", between="if not dtype: shutil.rmtree(os.environ['NUMBA_CACHE_DIR'])")
    assert hits(found) == (1, 1)
    assert len(warm.files()) == 1  # the second call has made the folder anew
    assert hits(warm("serial float64")) == (1, 0)


# --------------------------------------------------------------------------------------------------------- processes


def test_eight_processes_start_at_once_on_an_empty_cache(package):
    """Of three dtypes: each gets its own code, and all of it is stored."""
    wait = "import numba\nprint('ready', file=sys.stderr, flush=True)\nsys.stdin.readline()"
    dtypes = ["float32", "float64", "int32", "float32", "float64", "int32", "float32", "float64"]
    environment = os.environ | package.variables()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", *package.command(f"serial {dtype}", before=wait)], env=environment, cwd=package.cwd,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for dtype in dtypes
    ]  # fmt: skip
    try:
        for p in processes:
            assert p.stderr.readline() == "ready\n"
        for p in processes:
            p.stdin.write("go\n")
            p.stdin.flush()
        for p, dtype in zip(processes, dtypes, strict=True):
            printed, errors = p.communicate(timeout=120)
            assert p.returncode == 0, errors
            assert json.loads(printed)["y"] == {f"serial {dtype}": Y}
    finally:
        for p in processes:
            p.kill()
            p.communicate()
    assert len(package.files()) == 3  # no part of a file is left
    assert hits(package("serial float32", "serial float64", "serial int32")) == (3, 0)


def test_kernels_with_addresses_of_this_process_are_not_stored(tmp_path, monkeypatch):
    """None of ours has any; Numba would not store one either."""

    class Library:
        has_dynamic_globals = True

    class Result:
        library, codegen = Library(), Target()

        def _reduce(self):
            return ()

    monkeypatch.setattr(_jit, "_folders", lambda: [tmp_path])
    cache = _jit._Cache("kernels.forward.rows_serial_0123")
    cache.save_overload((), Result())
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Library, "has_dynamic_globals", False)
    cache.save_overload((), Result())
    assert len(list(tmp_path.iterdir())) == 1


def test_every_kernel_is_in_a_file_that_names_the_cache():
    """`source_stamp` hashes the folder `kernels`: a kernel elsewhere could be stale."""
    folder = Path(fastbn.__file__).parent / "kernels"
    for module in (kernels.forward, kernels.backward):
        found = [k for k in vars(module).values() if isinstance(k, _jit.Kernel)]
        assert found
        assert all(Path(k.body.__code__.co_filename).parent == folder for k in found)


@pytest.mark.jit("nothing is compiled")
def test_halves_of_two_processes_are_not_mixed_up(tmp_path):
    """Each dtype is compiled in a process of its own, for large arrays, and then one process loads both."""
    script = """
import ml_dtypes, numpy as np, sys
import fastbn
v = np.random.default_rng(0).normal(3, 2, (4, 16, 50, 50))
for name in sys.argv[1:]:
    x = v.astype(name)
    y = fastbn.batch_norm_train(x)[0].astype("float64")
    x = x.astype("float64")
    exact = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    print(name, bool((abs(y - exact) <= abs(exact) * 2**-8).all()))
"""
    for names in (["float16"], ["bfloat16"], ["float16", "bfloat16"]):
        printed = run_python("-c", script, *names, NUMBA_CACHE_DIR=str(tmp_path))
        assert printed.splitlines() == [f"{name} True" for name in names]
