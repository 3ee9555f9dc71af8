"""Set before anything imports Numba: a kernel cache that is warm the second time and never wrong; and the seeds."""

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastbn"


def _cache_folder() -> Path:
    """Named by all that decides the machine code: sources, Numba's version and settings, Python's version."""
    digest = hashlib.sha256(f"{version('numba')} {version('llvmlite')} {sys.version}".encode())
    for path in [PACKAGE / "_jit.py", *sorted((PACKAGE / "kernels").glob("*.py"))]:
        digest.update(path.read_bytes())
    for name in sorted(os.environ):
        if name.startswith("NUMBA_") and name != "NUMBA_CACHE_DIR":
            digest.update(f"{name}={os.environ[name]}".encode())
    return Path(tempfile.gettempdir(), f"fastbn-test-cache-{digest.hexdigest()[:12]}")


if os.environ.get("NUMBA_BOUNDSCHECK"):
    # A warm cache would bring code that checks nothing; and code that checks is of no use to anybody else.
    folder = tempfile.mkdtemp(prefix="fastbn-bounds-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
else:
    folder = _cache_folder()
os.environ["NUMBA_CACHE_DIR"] = str(folder)

import numpy as np  # noqa: E402
from hypothesis import settings  # noqa: E402
from hypothesis.configuration import set_hypothesis_home_dir  # noqa: E402
from strategies import EXAMPLES, PROFILE  # noqa: E402

JIT = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"


def pytest_collection_modifyitems(items):
    for item in items if not JIT else ():
        for mark in item.iter_markers("jit"):
            item.add_marker(pytest.mark.skip(reason=f"without the JIT: {mark.args[0]}"))


# No database: a failure prints the example and the line that repeats it; nothing is written beside the project.
set_hypothesis_home_dir(tempfile.gettempdir() + "/fastbn-test-hypothesis")
EVERY = settings(deadline=None, database=None, print_blob=True)
settings.register_profile("default", EVERY, max_examples=25, derandomize=True)
settings.register_profile("ci", EVERY, max_examples=750, derandomize=True)
# New examples every time. How many: FASTBN_EXAMPLES=100000 pytest ...
settings.register_profile("soak", EVERY, max_examples=int(os.environ.get("FASTBN_EXAMPLES", "10000")))
settings.load_profile(PROFILE)


def pytest_terminal_summary(terminalreporter):
    if EXAMPLES:
        terminalreporter.write_line(f"{EXAMPLES.total():,} examples of {len(EXAMPLES)} properties")


@pytest.fixture
def rng():
    """The same numbers in every test, whatever ran before it."""
    return np.random.default_rng(20150211)
