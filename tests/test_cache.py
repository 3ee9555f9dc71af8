"""The disk cache never lies: new code runs after any edit, builds keep apart, and no writable folder is no fault."""

import json
import shutil
from pathlib import Path

import pytest
from subprocesses import ROOT, run_script

# Uses both builds of the kernels for (N, D); prints y and what the caches did.
SCRIPT = """
import json, sys
import numpy as np
import fastbn, fastbn.functional
from fastbn._config import config
from fastbn.kernels import forward
builds = sys.argv[1:]
ys = {}
for build in builds:
    fastbn.functional.run = lambda kernel, size, *args: getattr(kernel, build)(*args)
    ys[build] = fastbn.batch_norm_train(np.array([[1, 2], [3, 6]], "float32"), eps=0)[0].tolist()
stats = {b: getattr(getattr(forward.forward_rows, b), "stats", None) for b in ("serial", "parallel")}
count = lambda c: sum(c.values())
print(json.dumps({
    "y": ys, "file": fastbn.__file__,
    "hits": {b: count(s.cache_hits) for b, s in stats.items() if s},
    "misses": {b: count(s.cache_misses) for b, s in stats.items() if s},
    "folder": config()["cache folder"],
}))
"""
Y = [[-1, -1], [1, 1]]


pytestmark = pytest.mark.jit("there is nothing to cache")


@pytest.fixture
def package(tmp_path):
    """A copy of fastbn to edit, and a way to run it with a cache of its own."""
    shutil.copytree(ROOT / "fastbn", tmp_path / "site" / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))

    def run(*builds, **env):
        env = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} | env
        found = json.loads(run_script(SCRIPT, *builds, PYTHONPATH=str(tmp_path / "site"), cwd=tmp_path, **env))
        assert Path(found["file"]).is_relative_to(tmp_path)
        return found

    run.folder = tmp_path / "site" / "fastbn"
    run.cache = tmp_path / "cache"
    return run


def files(folder, ending):
    return {p.name for p in Path(folder).rglob(f"*.{ending}")}


def test_a_leaf_edited_in_another_file_is_compiled_anew(package):
    assert package("serial")["misses"]["serial"] == 1
    warm = package("serial")
    assert (warm["y"]["serial"], warm["hits"]["serial"], warm["misses"]["serial"]) == (Y, 1, 0)
    assert Path(warm["folder"]).is_relative_to(package.cache)

    functional = package.folder / "functional.py"
    functional.write_text(functional.read_text() + "\n")
    assert package("serial")["hits"]["serial"] == 1  # no kernel was edited

    leaves = package.folder / "kernels" / "leaves.py"
    before = leaves.read_text()
    assert "def inverse_std(var, eps):" in before
    leaves.write_text(before + "\n\n@exact\ndef inverse_std(var, eps):\n    return np.float64(2.0)\n")
    edited = package("serial")
    assert edited["y"]["serial"] == [[-2, -4], [2, 4]]
    assert edited["misses"]["serial"] == 1

    leaves.write_text(before)
    back = package("serial")
    assert (back["y"]["serial"], back["hits"]["serial"]) == (Y, 1)


def test_edited_flags_are_compiled_anew(package):
    package("serial")
    jit = package.folder / "_jit.py"
    text = jit.read_text()
    assert '"nogil": True' in text
    jit.write_text(text.replace('"nogil": True', '"nogil": False'))
    assert package("serial")["misses"]["serial"] == 1


def test_serial_and_parallel_never_load_each_other(package):
    serial = package("serial")
    assert (serial["misses"], serial["y"]) == ({"serial": 1, "parallel": 0}, {"serial": Y})
    of_serial = files(package.cache, "nbi")
    parallel = package("parallel")
    assert (parallel["hits"]["parallel"], parallel["misses"]["parallel"]) == (0, 1)
    assert len(files(package.cache, "nbi") - of_serial) == 1
    both = package("serial", "parallel")
    assert both["hits"] == {"serial": 1, "parallel": 1}
    assert both["misses"] == {"serial": 0, "parallel": 0}
    assert both["y"] == {"serial": Y, "parallel": Y}


@pytest.mark.parametrize("cache_dir", [None, "/dev/null/cache"])
def test_without_a_writable_folder_it_works_uncached(package, cache_dir):
    """Where folders would be made lie plain files: that stops root too."""
    for folder in (package.folder, package.folder / "kernels"):
        (folder / "__pycache__").write_text("a file")
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"), "/dev/null")
    found = package("serial", NUMBA_CACHE_DIR=cache_dir, **nowhere)
    assert found["y"]["serial"] == Y
    assert not found["hits"].get("serial")
    assert found["folder"].startswith("none is writable")
    assert not files(package.folder, "nbi")


@pytest.mark.parametrize("damage", ["empty", "half", "noise"])
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_cache_file_is_no_fault(package, tmp_path, kind, damage):
    assert package("serial")["misses"]["serial"] == 1
    for path in (tmp_path / "cache").rglob(f"*.{kind}"):
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "noise": b"\x07" * len(content)}[damage])
    assert package("serial")["y"] == {"serial": Y}
