"""fastbn.interop as a whole: modules come when they are asked for, and a missing package says how to get it."""

import pytest
from subprocesses import run_script

import fastbn.interop
from fastbn.interop import _need


def test_a_module_is_imported_when_it_is_asked_for():
    script = """
import sys
import fastbn.interop
assert not [m for m in sys.modules if m.startswith("fastbn.interop.")]
print(fastbn.interop.cs231n.__name__)
assert [m for m in sys.modules if m.startswith("fastbn.interop.") and not m.split(".")[-1].startswith("_")] == [
    "fastbn.interop.cs231n"
]
"""
    assert run_script(script).strip() == "fastbn.interop.cs231n"


def test_the_folder_lists_what_it_has():
    assert {"torch", "onnx", "cs231n", "mpi"} <= set(fastbn.interop.__all__)
    assert not [name for name in fastbn.interop.__all__ if name.startswith("_")]
    with pytest.raises(AttributeError, match=r"has no attribute 'theano'; expected one of autograd, cs231n"):
        _ = fastbn.interop.theano


def test_help_lists_the_modules_and_imports_none():
    script = """
import pydoc, sys
import fastbn.interop
text = pydoc.plaintext.document(fastbn.interop)
assert not [m for m in sys.modules if m.startswith("fastbn.interop.")]
contents = text.split("PACKAGE CONTENTS")[1].split("DATA")[0].split()
print(set(fastbn.interop.__all__) - set(contents))
"""
    assert run_script(script).strip() == "set()"


def test_a_missing_package_says_how_to_get_it():
    with pytest.raises(ImportError, match=r'^fastbn\.x needs no_such_package: pip install "fastbn\[extra\]"$') as info:
        _need.need("no_such_package.helper", "extra", "fastbn.x")
    assert info.value.name == "no_such_package"


def test_a_package_that_lacks_one_itself_is_not_said_to_be_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        _need.need("half_there", "x", "fastbn.x")
