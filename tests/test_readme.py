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


RELIABILITY = README.parent / "docs" / "explanation" / "reliability.md"


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"`([^`]*(?:pytest|python) [^`]*)`", RELIABILITY.read_text())))
)
def test_the_commands_behind_a_promise_find_their_tests(command):
    """Files exist, and each word of -k is in the name of a test there."""
    for path in re.findall(r"\S+\.py", command):
        assert (README.parent / path).exists(), path
    words = re.search(r' -k ("[^"]*"|\S+)', command)
    for word in re.findall(r"\w+", words[1]) if words else ():
        text = "".join((README.parent / path).read_text() for path in re.findall(r"\S+\.py", command))
        assert word in ("or", "and", "not") or re.search(rf"def test_\w*{word}", text), word
