"""The README: its commands are those that CI runs, its code prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)


@pytest.mark.jit("so many values take minutes as plain Python")
def test_code_prints_what_its_comments_say():
    for code in blocks("python"):
        expected = [line[2:] for line in code.splitlines() if line.startswith("# ")]
        assert expected
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), {})
        assert printed.getvalue().splitlines() == expected


@pytest.mark.parametrize("command", ["pip install -e . && python -m fastbn", 'pip install -e ".[test]" && pytest'])
def test_commands_are_the_ones_ci_runs(command):
    assert command + "\n" in blocks("")
    script = (README.parent / ".ci" / "run").read_text()
    assert command in re.sub(r"-q -e", "-e", script)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README.read_text()):
        assert (README.parent / target).exists(), target
