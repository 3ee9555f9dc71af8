"""Python in a process of its own: for faults, environments and caches that would harm the process of the tests."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def run_python(*args, cwd=None, timeout=120, quiet=False, **env):
    """The output of ``python *args``; fails with all that it printed. A value None takes a variable away.

    With `quiet` it must print nothing on stderr.
    """
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(TESTS)))}
    for name, value in env.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    done = subprocess.run(
        [sys.executable, *args], env=variables, cwd=cwd or TESTS, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert not (quiet and done.stderr), f"printed on stderr:\n{done.stderr[-6000:]}"
    return done.stdout


def run_script(source, *args, **env):
    """The output of a script given as text."""
    return run_python("-c", source, *args, **env)
