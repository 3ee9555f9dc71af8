"""Runs the code blocks of a how-to page: each goes on where the one before ended, and prints what its comments say."""

import contextlib
import io
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "how-to"


def check(name):
    page = FOLDER / name
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks
    names = {}
    for code in blocks:
        expected = [line[2:] for line in code.splitlines() if line.startswith("# ")]
        assert expected
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), names)
        lines = printed.getvalue().splitlines()
        assert lines == expected, f"docs/how-to/{name} prints {lines}, and says {expected}"
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (FOLDER / target).exists(), target
