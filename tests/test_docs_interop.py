"""The reference of fastbn.interop: every module has its page, every public name says what it takes and gives."""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pages
import pytest

import fastbn.interop

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "interop.md"
TEMPLATE = ROOT / "docs" / "_templates" / "autosummary" / "interop.rst"
MODULES = sorted(p.stem for p in Path(fastbn.interop.__file__).parent.glob("[!_]*.py"))
ALONE = ["cs231n", "keras1", "paper", "stepwise", "tf_contrib", "whole_tensor"]


def module(name):
    """A module of fastbn.interop, where the package is installed that it needs."""
    try:
        return importlib.import_module(f"fastbn.interop.{name}")
    except ImportError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------------------------ the page


def test_its_code_prints_what_it_says():
    pages.check("reference/interop.md")


def test_every_module_has_a_page_and_no_other():
    listed = re.findall(r"^   ~fastbn\.interop\.(\w+)$", PAGE.read_text(), re.M)
    assert sorted(listed) == MODULES == fastbn.interop.__all__


def test_what_to_install_is_what_the_package_asks_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    row = r'^\| `(\w+)` \| `pip install "fastbn\[(\w+)\]"` \| (.*?) \| \[.*\]\(\.\./how-to/(.*)\.md\) \|$'
    rows = re.findall(row, PAGE.read_text(), re.M)
    assert sorted(name for name, *_ in rows) == sorted(set(MODULES) - set(ALONE))
    template = TEMPLATE.read_text()
    for name, extra, brings, page in rows:
        assert brings == ", ".join(extras[extra])
        assert f'"{name}": "{page}"' in template
        assert extra == name or f'"{name}": "{extra}"' in template
    assert re.search(r"set alone = (\[.*\])", template)[1] == str(ALONE).replace("'", '"')


# ------------------------------------------------------------------------------------------------------ the docstrings


def sections(doc):
    """{heading: [the lines at the left margin below it]} of a docstring in numpydoc's form."""
    found, lines = {}, doc.splitlines()
    here = found["Summary"] = []
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if below and set(below) == {"-"} and len(below) == len(line):
            here = found[line] = []
        elif line and not line.startswith(" ") and set(line) != {"-"}:
            here.append(line)
    return found


def parameters(lines):
    """The names that a Parameters section explains, in order: "x, gamma : array" are two."""
    return [name.strip().lstrip("*") for line in lines for name in line.split(" : ")[0].split(",")]


def takes(name, thing, found):
    """A line if what is called explains other parameters than it has; their order is free, so that alike ones group."""
    taken = sorted(p for p in inspect.signature(thing).parameters if p not in ("self", "cls"))
    explained = sorted(parameters(found.get("Parameters", [])))
    if explained != taken:
        yield f"{name}: its Parameters are {explained}, expected {taken}"


def gives(name, thing, found):
    """A line if what is called says that it returns something and does not, or the other way round."""
    result = str(inspect.signature(thing).return_annotation).replace("collections.abc.", "")
    expected = {"None": None, "Iterator[None]": None}.get(result, "Yields" if "Iterator[" in result else "Returns")
    has = next((s for s in ("Returns", "Yields") if s in found), None)
    if has != expected:
        yield f"{name}: it returns {result}, and has the section {has}, expected {expected}"


def says(name, thing):
    """What is missing, or too much, in the docstring of a public name."""
    if not thing.__doc__:
        yield f"{name} has no docstring"
        return
    found = sections(inspect.getdoc(thing))
    if not inspect.isclass(thing):
        yield from takes(name, thing, found)
        yield from gives(name, thing, found)
    elif "__init__" in vars(thing) and "Parameters" in found:
        yield from takes(name, thing, found)
    elif "__init__" in vars(thing) and "Attributes" not in found:  # what functions return has these alone
        yield f"{name}: it has neither Parameters nor Attributes"


def constants(source):
    """{name: its docstring} of what a module assigns."""
    body = ast.parse(source).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            yield node.targets[0].id, text


def faults(m):
    """A line for each public name of a module, and for each of its classes' own, that does not explain itself."""
    assigned = dict(constants(Path(m.__file__).read_text()))
    for name in m.__all__:
        thing = getattr(m, name)
        if not callable(thing):
            yield from [] if assigned.get(name) else [f"{name} has no docstring"]
            continue
        yield from says(name, thing)
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            value = getattr(value, "__func__", value)
            if member.startswith("_") and member != "__call__":
                continue
            if isinstance(value, property):
                yield from [] if value.__doc__ else [f"{name}.{member} has no docstring"]
            elif inspect.isfunction(value) and value.__module__ == m.__name__:  # others come from a foreign class
                yield from says(f"{name}.{member}", value)


@pytest.mark.parametrize("name", MODULES)
def test_every_name_says_what_it_takes_and_gives(name):
    m = module(name)
    assert m.__doc__
    assert set(m.__all__) <= set(dir(m))
    assert not list(faults(m))


def test_a_docstring_that_is_not_true_would_be_seen():
    def f(x, y=1) -> "int":
        """Sum.

        Parameters
        ----------
        x, z : int
            Numbers.
        """

    assert list(says("f", f)) == [
        "f: its Parameters are ['x', 'z'], expected ['x', 'y']",
        "f: it returns int, and has the section None, expected Returns",
    ]
    assert dict(constants('A = 1\n"""One."""\nB = 2')) == {"A": "One.", "B": False}
