"""The first page, the changelog and the citation: figures and versions are those of the README and of the package."""

import re
import tomllib
from pathlib import Path

import fastbn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def table(text):
    """The first table with a column `ratio`: a dict for each row."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    start = next(i for i, cells in enumerate(lines) if "ratio" in cells)
    rows = [dict(zip(lines[start], cells, strict=True)) for cells in lines[start + 2 : start + 8]]
    assert len(rows) == 6
    return rows


def test_the_figures_of_the_first_page_are_those_of_the_readme():
    rows, page = table((ROOT / "README.md").read_text()), (DOCS / "index.md").read_text()
    columns = re.search(r"^\| (operation .*) \|$", page, re.M)[1].split(" | ")
    expected = "".join(f"| {' | '.join(row[c] for c in columns)} |\n" for row in rows)
    assert f"--- |\n{expected}\n" in page, f"docs/index.md, the rows of README.md:\n{expected}"


def test_the_figures_of_the_readme_are_those_of_the_page_that_explains_them():
    assert table((ROOT / "README.md").read_text()) == table((DOCS / "explanation" / "performance.md").read_text())


def test_the_changelog_begins_with_this_version():
    assert re.search(r"^## (\S+)", (DOCS / "changelog.md").read_text(), re.M)[1] == fastbn.__version__


def test_the_version_to_cite_is_this_one():
    assert re.search(r"^version: (.*)$", (DOCS / "CITATION.cff").read_text(), re.M)[1] == fastbn.__version__
    assert re.search(r"Version ([\d.]+)", (DOCS / "citation.md").read_text())[1] == fastbn.__version__


def test_the_citation_file_and_the_page_name_the_same_paper():
    said, page = ((DOCS / name).read_text() for name in ("CITATION.cff", "citation.md"))
    for pattern in (r"Batch Normalization: Accelerating[\w ]+", r"1502\.03167", r"Proceedings of the 32nd[\w ]+"):
        assert re.search(pattern, said)[0] == re.search(pattern, page)[0]
    for word in ("Ioffe", "Sergey", "Szegedy", "Christian", "448", "456", "The fastbn developers"):
        assert word in said
        assert word in page


def test_contributing_names_every_command_of_hatch():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]["default"]["scripts"]
    page = (DOCS / "contributing.md").read_text()
    assert set(re.findall(r"`hatch run (\w+)`", page)) == set(scripts)


def test_contributing_names_files_that_exist():
    page = (DOCS / "contributing.md").read_text()
    paths = re.findall(r"(?<![\w/])((?:docs|tests|asv_bench|fastbn)/[\w/.]*\.\w+)", page)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists() or "NAME" in path, path
