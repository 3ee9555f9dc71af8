"""Runs the code blocks of a page: each goes on where the one before ended, and prints what its comments say."""

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def check(name):
    """The code and the links of a page in docs/, as "how-to/onnx.md"; returns what its code has defined."""
    page = DOCS / name
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    names = {}
    for code in blocks:
        expected = [line[2:] for line in code.splitlines() if line.startswith("# ")]
        assert expected
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), names)
        lines = printed.getvalue().splitlines()
        assert lines == expected, f"docs/{name} prints {lines}, and says {expected}"
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\((?!http)([^)#]+)", prose):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"docs/examples/\w+\.py", text):
        assert (DOCS.parent / script).exists(), script
    return names
