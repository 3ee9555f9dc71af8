"""The reference has every public name, and each tells what a reader needs; docs/conf.py checks the rest."""

import importlib.util
import inspect
import re
from pathlib import Path

import pages
import pytest
from subprocesses import run_script

import fastbn
from fastbn.conventions import CONVENTIONS

API = (pages.DOCS / "reference" / "api.md").read_text()


def listed(page):
    """The names that the page's autosummaries have."""
    blocks = re.findall(r"^\.\. autosummary::\n((?: +.*\n|\n)+)", page, re.M)
    return [line.strip() for block in blocks for line in block.splitlines() if re.match(r" +\w+$", line)]


def test_the_page_lists_every_public_name_once():
    assert sorted(listed(API)) == sorted(fastbn.__all__)


def test_a_missing_name_would_be_seen():
    assert "warmup" not in listed(API.replace("   warmup\n", ""))
    assert listed(API + "```{eval-rst}\n.. autosummary::\n   :toctree: x\n\n   more\n```\n")[-1] == "more"


@pytest.mark.parametrize("name", fastbn.__all__)
def test_every_name_has_an_example_and_its_neighbours(name):
    doc = inspect.getdoc(getattr(fastbn, name))
    wanted = ["See Also", "Examples"]
    if name == "Saved":  # that of batch_norm_train, which makes it
        wanted.remove("Examples")
    for section in wanted:
        assert f"\n{section}\n{'-' * len(section)}\n" in doc, f"{name} has no {section}"


@pytest.mark.parametrize("thing", [fastbn.Moments, fastbn.Saved, fastbn.BatchNorm], ids=lambda t: t.__name__)
def test_every_attribute_is_described(thing):
    """Properties have docstrings, which the build asks for; what instances have must be in the class's own."""
    made = {"Moments": lambda: fastbn.moments([[1.0]]), "BatchNorm": lambda: fastbn.BatchNorm(1)}
    one = made.get(thing.__name__, lambda: fastbn.Saved.fixed([[1.0]], 0, 1))()
    own = {n for n in (*getattr(one, "__dict__", ()), *getattr(thing, "__slots__", ())) if not n.startswith("_")}
    table = re.search(r"\nAttributes\n-+\n(.*?)\n\n", inspect.getdoc(thing), re.S)
    rows = re.findall(r"^(\w[\w, ]*?)(?: : .*)?$", table[1], re.M) if table else []
    assert {n for row in rows for n in row.split(", ")} == own


def test_like_lists_every_system():
    systems = re.findall(r'"([\w.]+)"', fastbn.BatchNorm.like.__doc__.partition("Returns")[0])
    assert systems == list(CONVENTIONS)


def defaults():
    for name in fastbn.__all__:
        thing = getattr(fastbn, name)
        members = [(name, thing)]
        if inspect.isclass(thing):
            functions = inspect.getmembers(thing, lambda m: inspect.isfunction(m) or inspect.ismethod(m))
            members += [(f"{name}.{n}", m) for n, m in functions if not n.startswith("_") or n == "__call__"]
        for full, member in members:
            if full != "Saved":
                yield pytest.param(member, id=full)


@pytest.mark.parametrize("member", list(defaults()))
def test_the_defaults_are_those_of_the_signature(member):
    """ "default 1e-5" in the table of parameters; None is "optional", or among the types."""
    doc = inspect.getdoc(member)
    for name, parameter in inspect.signature(member).parameters.items():
        row = re.search(rf"^(?:\w+, )*{name}(?:, \w+)* : (.*)$", doc, re.M)
        if parameter.default in (parameter.empty, None):
            assert row is None or "default" not in row[1], name
            assert row is None or parameter.default is parameter.empty or re.search(r"optional|None", row[1]), name
        elif row is not None:
            said = re.search(r"default (.*)$", row[1])
            assert said, f"{name}: no default"
            assert eval(said[1]) == parameter.default, name


@pytest.mark.parametrize("page", ["errors", "environment"])
def test_the_code_of_a_page(page):
    pages.check(f"reference/{page}.md")


ENVIRONMENT = (pages.DOCS / "reference" / "environment.md").read_text()


def on_the_page(text):
    """The variables that the page defines."""
    return {name for term in re.findall(r"^(`.*`)\n: ", text, re.M) for name in re.findall(r"`([A-Z_]+)`", term)}


def read_by(sources):
    """The variables that code asks the system for, and all of fastbn's own wherever they are named."""
    text = "\n".join(path.read_text() for path in sources)
    asked = re.findall(r"""environ(?:\.get|\.setdefault)?[(\[]\s*"([A-Z_]+)\"|"([A-Z_]+)" in os\.environ""", text)
    return {name for names in asked for name in names if name} | set(re.findall(r"\bFASTBN_[A-Z_]+", text))


def test_every_variable_that_the_code_reads_is_on_the_page():
    read = read_by(Path(fastbn.__file__).parent.rglob("*.py"))
    assert {"FASTBN_POOL_LIMIT", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "JAX_PLATFORMS"} <= read
    assert read <= on_the_page(ENVIRONMENT)


def test_every_variable_on_the_page_is_read():
    """fastbn's by fastbn, Numba's by Numba."""
    named = on_the_page(ENVIRONMENT)
    own = {name for name in named if name.startswith("FASTBN_")}
    assert own
    assert own <= read_by(Path(fastbn.__file__).parent.rglob("*.py"))
    config = (Path(importlib.util.find_spec("numba").origin).parent / "core" / "config.py").read_text()
    assert [name for name in sorted(named) if name.startswith("NUMBA_") and f'"{name}"' not in config] == []


def test_the_default_of_the_pool_is_that_of_the_code():
    (said,) = re.findall(r"^`FASTBN_POOL_LIMIT`\n: .*$", ENVIRONMENT, re.M)
    script = "import fastbn._memory; print(fastbn._memory._limit)"
    assert f" {run_script(script, FASTBN_POOL_LIMIT=None).strip()} (512 MiB)" in said
