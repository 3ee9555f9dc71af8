"""The pages: their code prints what they say."""

import re
import tomllib
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from subprocesses import run_python, run_script

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGES = [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md")) if "generated" not in page.parts]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
JIT = pytest.mark.jit("pages are of full size")

# What only these tests run, and the packages that it needs.
HERE = {
    "how-to/channels-last.md": ["torch"],
    "how-to/debugging.md": [],
    "how-to/inference-script.md": ["torch", "keras", "jax", "scipy", "onnx", "safetensors"],
    "how-to/start-fast.md": [],
    "how-to/threads.md": [],
}


def text_of(page):
    return (DOCS / page).read_text()


@JIT
@pytest.mark.parametrize("page", HERE)
def test_the_code_of_a_page_prints_what_its_comments_say(page, tmp_path):
    """In a process of its own: pages set the environment, start processes, write files."""
    if absent := [package for package in HERE[page] if find_spec(package) is None]:
        pytest.skip(f"{', '.join(absent)} not installed: docs/{page} cannot be run")
    run_script("import pages, sys; pages.check(sys.argv[1])", page, cwd=tmp_path)


def test_no_page_is_forgotten():
    """Every page with code is run by a test, which names it in one of three ways."""
    tests = [path.read_text() for path in TESTS.glob("*.py")]
    for page in (page for page in PAGES if BLOCK.search(text_of(page))):
        ways = (
            ("pages.check(", f'"{page}"'),
            ('pages.check(f"', f'"{Path(page).stem}"'),
            ("```python", f'"{Path(page).name}"'),  # its blocks are started in another way
        )
        assert any(all(word in text for word in way) for way in ways for text in tests), f"no test runs docs/{page}"


@pytest.mark.parametrize("folder", ["how-to"])
def test_the_index_has_a_line_on_each_page(folder):
    listed = re.findall(r"^- \[[^]]+\]\(([\w-]+)\.md\): \S", text_of(f"{folder}/index.md"), re.M)
    in_tree = [line for block in re.findall(r"```{toctree}\n(.*?)```", text_of(f"{folder}/index.md"), re.S)
               for line in block.splitlines() if not line.startswith(":")]  # fmt: skip
    assert listed == in_tree
    assert sorted(listed) == sorted(p.stem for p in (DOCS / folder).glob("*.md") if p.stem != "index")


def test_every_extra_that_is_to_be_installed_exists():
    """pip only warns of one that does not, and installs less."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    scripts = [*DOCS.glob("tutorial/*.py"), *DOCS.glob("gallery/*.py"), *DOCS.glob("examples/*.py")]
    pages = [DOCS / page for page in PAGES] + [TESTS.parent / "README.md"]
    named = {(path.name, extra) for path in scripts + pages
             for extras in re.findall(r"""["'`](?:fastbn|\.)\[([\w,]+)\]""", path.read_text())
             for extra in extras.split(",")}  # fmt: skip
    assert len(named) > 10
    assert {extra for _, extra in named} <= set(project["optional-dependencies"]), named


# ------------------------------------------------------------------------------------------------- the inference script


@JIT
def test_the_inference_script_needs_numpy_and_fastbn_alone(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed: it makes the script's weights")
    weights, script = BLOCK.findall(text_of("how-to/inference-script.md"))[:2]
    run_script(weights, cwd=tmp_path)
    before = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'keras', 'onnx', 'jax', 'scipy')))\n"
    assert run_script(before + script, cwd=tmp_path) == "(8, 10) True\n"


# --------------------------------------------------------------------------------------------------- the debugging page


def test_a_kernel_is_stepped_through_as_the_page_says(tmp_path):
    """The commands to pdb are those of the page, and so is what it answers."""
    page = text_of("how-to/debugging.md")
    shell = re.search(r"^\$ NUMBA_DISABLE_JIT=1 python (.*?)^```", page, re.M | re.S)[1]
    command, *session = shell.replace("\\\n", " ").splitlines()
    script = next(code for code in BLOCK.findall(page) if "1536" in code)
    (tmp_path / "normalize.py").write_text(script)
    arguments = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', command)]
    assert arguments.pop() == "normalize.py"
    asked = [line.removeprefix("(Pdb) ") for line in session if line.startswith("(Pdb) ")]
    answers = [line for line in session if not line.startswith("(Pdb) ")]
    assert asked
    assert answers
    given = [word for line in [*asked, "quit"] for word in ("-c", line)]
    printed = run_python(*arguments, *given, "normalize.py", cwd=tmp_path, NUMBA_DISABLE_JIT="1")
    for answer in answers:
        assert answer in printed


# -------------------------------------------------------------------------------------------------- how they are built


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    """By docs/build.py, in pages that are built."""
    spec = spec_from_file_location("build", DOCS / "build.py")
    build = module_from_spec(spec)
    spec.loader.exec_module(build)
    (tmp_path / "a b.png").touch()
    (tmp_path / "other.html").write_text('<h1 id="title">')
    page = tmp_path / "page.html"
    page.write_text(
        '<a name="here"><a href="#here"><a href="other.html#title"><a href="https://example.org">'
        '<img src="a%20b.png" srcset="a%20b.png, a%20b.png 2.00x"><img src="data:image/png;base64,">'
    )
    assert list(build.faults(tmp_path)) == []
    page.write_text(
        '<a href="#there"><a href="other.html#text"><a href="gone.html">'
        '<script src="https://example.org/x.js"></script><img src="a%20b.png" srcset="c.png 2.00x">'
    )
    assert list(build.faults(tmp_path)) == [
        "page.html has #there, and that page no such place",
        "page.html has other.html#text, and that page no such place",
        "page.html has no gone.html",
        "page.html loads https://example.org/x.js",
        "page.html has no c.png",
    ]
