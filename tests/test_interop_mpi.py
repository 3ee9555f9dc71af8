"""Ranks of a real MPI: the same result as one process, the same bits on every rank, and no error that hangs."""

import os
import re
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


COST = ROOT / "docs" / "examples" / "mpi_cost.py"
PAGE = ROOT / "docs" / "how-to" / "mpi.md"


@pytest.mark.jit("two processes would take minutes as plain Python")
def test_the_script_of_the_page_prints_its_tables():
    status, out, err = started(2, str(COST), "--quick", "--markdown", timeout=100)
    assert status == 0, err
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^\n]*) \|$", out, re.M))
    assert rows["forward"].startswith("53 | ")
    # Of 8 channels: 3C + 2 and 2C + 1 float64, from one other rank.
    assert re.search(r"^\| 8 x 4², forward \| 1 \| 0\.2 \| 0\.2 \|$", out, re.M), out
    assert re.search(r"^\| 8 x 4², backward \| 1 \| 0\.1 \| 0\.1 \|$", out, re.M), out
    assert "2 ranks. Measured on" in out


@pytest.mark.jit("two processes would take minutes as plain Python")
def test_the_code_of_the_page_prints_what_its_comments_say(tmp_path):
    """On two ranks, each block as a program."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert blocks
    for code in blocks:
        script = tmp_path / "script.py"
        script.write_text(code)
        status, out, err = started(2, str(script), timeout=100)
        assert status == 0, err
        assert out.splitlines() == [line[2:] for line in code.splitlines() if line.startswith("# ")] != []


def test_the_commands_and_links_of_the_page_lead_somewhere():
    text = PAGE.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r"docs/examples/\S+\.py", text):
        assert (ROOT / target if target.startswith("docs/") else PAGE.parent / target).exists(), target
