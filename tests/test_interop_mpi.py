"""Ranks of a real MPI: the same result as one process, the same bits on every rank, and no error that hangs."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import ROOT, TESTS, run_script

RANKS = 4
SCRIPT = TESTS / "ranks.py"
NAMES = [
    line.strip(" ,\n") for line in SCRIPT.read_text().split("CASES = [")[1].split("]")[0].splitlines() if line.strip()
]


def mpiexec():
    """The one beside Python, where pip puts it, else that of the system."""
    beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    return beside or shutil.which("mpiexec")


def started(ranks, *args, timeout, **env):
    """(exit status, stdout, stderr) of a program on so many ranks; after `timeout` seconds all of it is ended."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    if mpiexec() is None:
        pytest.skip("there is no mpiexec, beside Python or on the PATH")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS))), "NUMBA_NUM_THREADS": "1", **env}
    command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "mpi4py", *args]
    process = subprocess.Popen(
        command, env=variables, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        err += f"\nno end after {timeout} s"
    return process.returncode, out, f"{' '.join(command)}\n{err[-6000:]}"


@pytest.fixture(scope="module")
def launch():
    return started(RANKS, str(SCRIPT), timeout=150)


@pytest.mark.jit("four processes would take minutes as plain Python")
@pytest.mark.parametrize("size", range(1, RANKS + 1))
@pytest.mark.parametrize("name", NAMES)
def test_ranks(launch, name, size):
    _, out, err = launch
    assert f"ok {name} {size}\n" in out, err


@pytest.mark.jit("four processes would take minutes as plain Python")
def test_all_ranks_end_well(launch):
    status, out, err = launch
    assert status == 0, err
    assert len(out.splitlines()) == RANKS * len(NAMES), out + err


def test_without_mpi4py_the_error_says_what_to_install():
    script = """
import sys
sys.modules["mpi4py"] = None
import fastbn
try:
    import fastbn.interop.mpi
except ImportError as error:
    print(error)
"""
    assert run_script(script) == 'fastbn.interop.mpi needs mpi4py: pip install "fastbn[mpi]"\n'
