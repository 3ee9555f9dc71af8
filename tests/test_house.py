"""The house rules: imports go down, importing is cheap, every public name explains itself and runs its examples."""

import ast
import doctest
import importlib.util
import inspect
import subprocess
import sys

import numpy as np
import pytest
from modules import MODULES, PACKAGE, RANK, imports
from subprocesses import run_script

import fastbn

# What a module may import from outside. Everything above the kernels gets Numba only when a call needs it.
FOREIGN = {"numpy", "numba", *sys.stdlib_module_names}


def misplaced(name, source, folder=()):
    """The imports of a module that do not go down."""
    found = []
    for target in imports(source, folder):
        inside, _, module = target.partition(".")
        if inside != "fastbn" or not module:
            found += [target] if target not in FOREIGN | {"fastbn"} else []
        elif RANK[module] <= RANK[name]:
            found.append(module)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    assert name in RANK, f"{name} has no place in ORDER"
    path = MODULES[name]
    allowed = {"_peers": {"torch", "onnx", "onnxruntime", "jax"}, "_measure": {"ml_dtypes"}, "_plot": {"matplotlib"}}
    allowed["interop"] = {
        "autograd", "dask", "flax", "jax", "keras", "mpi4py", "onnx", "safetensors", "sklearn", "torch", "ml_dtypes"
    }  # fmt: skip
    allowed = allowed.get("interop" if name.startswith("interop.") else name, set())
    allowed |= {"llvmlite"} if name.startswith("kernels.") or name == "_jit" else set()
    assert set(misplaced(name, path.read_text(), path.parent.relative_to(PACKAGE).parts)) <= allowed


def test_an_upward_import_would_be_seen():
    source = """
import os, numpy as np, torch
from . import kernels, layer
from ._layout import layout
from .functional import batch_norm
if TYPE_CHECKING:
    from .layer import BatchNorm
def f():
    from .layer import BatchNorm
"""
    assert misplaced("moments", source) == ["torch", "layer", "functional", "layer"]
    assert misplaced("kernels.grid", "from .._jit import kernel\nfrom ..layer import x", ("kernels",)) == ["layer"]
    assert misplaced("kernels.leaves", "from .forward import gather", ("kernels",)) == ["kernels.forward"]
    assert misplaced("_layout", "kernels.forward.sums(x)\nself.kernels") == []
    assert misplaced("kernels.lanes", "def f():\n    kernels.forward.sums(x)") == ["kernels.forward"]
    assert misplaced("_jit", "importlib.import_module('._threads', __package__)") == ["_threads"]


def test_the_picture_shows_the_imports():
    spec = importlib.util.spec_from_file_location("house", PACKAGE.parent / "docs" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert house.PICTURE.read_text() == house.picture(), "drawn anew by: python docs/house.py"


def test_importing_compiles_nothing_and_starts_no_thread():
    script = """
import os, sys, threading, time
import numpy as np
task = "/proc/self/task"
count = lambda: (threading.active_count(), len(os.listdir(task)) if os.path.exists(task) else 0)
before = count()
import fastbn
assert count() == before
heavy = [m for m in sys.modules if m.split(".")[0] in ("numba", "llvmlite", "torch", "scipy", "matplotlib")]
assert not heavy, heavy
fastbn.BatchNorm(3)
fastbn.Moments.empty(3) + fastbn.Moments.empty(3)
fastbn.set_num_threads(1)
assert "numba" not in sys.modules
for bad in (lambda: fastbn.batch_norm(np.ones((2, 2)), 0, -1), lambda: fastbn.moments([[1j]])):
    try:
        bad()
    except (ValueError, TypeError):
        pass
assert "numba" not in sys.modules
print(fastbn.__version__)
"""
    assert run_script(script).strip() == fastbn.__version__


def test_the_public_names():
    assert sorted(fastbn.__all__) == fastbn.__all__
    assert {n for n in dir(fastbn) if not n.startswith("_")} - set(fastbn.__all__) <= {
        "functional", "layer", "kernels", "moments", "folding", "conventions", "interop",
    }  # fmt: skip
    for name in fastbn.__all__:
        assert hasattr(fastbn, name)


def public_objects():
    """Public names, and the public methods and properties of the classes among them."""
    for name in fastbn.__all__:
        thing = getattr(fastbn, name)
        yield name, thing
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if not member.startswith("_") and (callable(value) or isinstance(value, (property, classmethod))):
                    yield f"{name}.{member}", value


@pytest.mark.parametrize(("name", "thing"), [pytest.param(n, t, id=n) for n, t in public_objects()])
def test_every_public_name_explains_itself(name, thing):
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert doc.splitlines()[0].rstrip().endswith((".", ":", "``")), f"{name}: {doc.splitlines()[0]}"


@pytest.mark.parametrize(("name", "thing"), [pytest.param(n, t, id=n) for n, t in public_objects() if callable(t)])
def test_help_begins_with_a_signature_that_can_be_read(name, thing):
    assert "_typing" not in str(inspect.signature(thing)), f"{name}: all that ArrayLike stands for"


@pytest.mark.parametrize("name", fastbn.__all__)
def test_the_examples_run(name):
    thing = getattr(fastbn, name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with np.printoptions():
        for test in doctest.DocTestFinder(recurse=True).find(thing, name, module=False, globs={}):
            result = runner.run(test)
            assert not result.failed, f"{test.name}: {result.failed} of {result.attempted} examples fail"


def test_the_verbs_have_examples():
    finder = doctest.DocTestFinder(recurse=False)
    for name in ("batch_norm", "batch_norm_train", "batch_norm_backward", "moments", "update_running", "BatchNorm",
                 "fold_conv", "fold_linear"):  # fmt: skip
        (found,) = finder.find(getattr(fastbn, name), name, module=False)
        assert found.examples, f"{name} has no example"


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("batch_norm", ["x", "mean", "var", "gamma", "beta"]),
        ("batch_norm_train", ["x", "gamma", "beta"]),
        ("batch_norm_backward", ["dy", "saved"]),
        ("moments", ["x"]),
        ("update_running", ["running_mean", "running_var", "m"]),
        ("BatchNorm", ["channels"]),
        ("fold_conv", ["weight", "bias", "bn"]),
        ("fold_linear", ["weight", "bias", "bn"]),
    ],
)
def test_everything_after_the_arrays_is_keyword_only(name, arrays):
    parameters = inspect.signature(getattr(fastbn, name)).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == arrays
    assert all(p.kind == p.KEYWORD_ONLY for p in list(parameters)[len(arrays) :])


def test_no_tracked_file_is_ignored():
    """Such as compiled kernels."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"], cwd=root, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout == ""


ALLOCATE = {"empty", "zeros", "ones", "full", "empty_like", "zeros_like", "array", "arange", "copy", "concatenate"}


@pytest.mark.parametrize("name", ["backward", "forward", "lanes", "leaves"])
def test_leaves_allocate_nothing(name):
    """Numba loses a MemoryError that is raised below a prange, and goes on with wrong values, or the process ends.

    `points` is called before the prange.
    """
    tree = ast.parse((PACKAGE / "kernels" / f"{name}.py").read_text())
    for f in tree.body:
        if isinstance(f, ast.FunctionDef) and f.decorator_list:
            leaf = {d.id for d in f.decorator_list if isinstance(d, ast.Name)} & {"exact", "elementwise", "reduction"}
            called = {n.func.attr for n in ast.walk(f) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
            assert not leaf or f.name == "points" or not called & ALLOCATE, f.name
