"""Keras 3 on its NumPy backend with fastbn's moments and batch normalization; its weights in and out.

The backend is chosen when Keras is imported, once for a process: the tests of keras_numpy.py run in one of their own.
"""

import ast
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from subprocesses import TESTS, run_python

import fastbn
from fastbn.interop import keras as interop

KERAS = importlib.util.find_spec("keras") is not None
needs_keras = pytest.mark.skipif(not KERAS, reason="Keras is not installed: nothing to patch")

SCRIPT = TESTS / "keras_numpy.py"
(LIST,) = (
    node.value
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTS"
)
NAMES = [e.id for e in LIST.elts]


@pytest.fixture(scope="module")
def results():
    return json.loads(run_python(str(SCRIPT)).splitlines()[-1])


@needs_keras
@pytest.mark.jit("the arrays are many")
@pytest.mark.parametrize("name", NAMES)
def test_on_the_numpy_backend(results, name):
    assert results[name] is None, f"{results[name]}\nAgain: PYTHONPATH=.:tests python tests/keras_numpy.py {name}"


def test_no_function_of_the_script_is_left_out():
    functions = {n.name for n in ast.parse(SCRIPT.read_text()).body if isinstance(n, ast.FunctionDef)}
    assert functions - {*NAMES} == {"raises", "current", "data", "a_model", "failing", "main"}


def test_another_backend_is_refused(monkeypatch):
    """By a stand-in that answers as Keras does: the real one takes eight seconds to start on PyTorch."""
    backend = SimpleNamespace(backend=lambda: "torch")
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(__version__="3.15.1", backend=backend))
    words = r"fastbn\.interop\.keras\.enable: Keras has backend 'torch', expected 'numpy': set KERAS_BACKEND=numpy"
    with pytest.raises(ValueError, match=words):
        interop.enable()
    with pytest.raises(ValueError, match=words), interop.patched():
        raise AssertionError("it was patched")
    with pytest.raises(ValueError, match="disable: it is not enabled"):
        interop.disable()


def test_without_keras_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r'enable needs keras: pip install "fastbn\[keras\]"'):
        interop.enable()
    with pytest.raises(ImportError, match=r"pip install"), interop.patched():
        raise AssertionError("it was patched")


def test_an_old_keras_is_refused(monkeypatch):
    class Old:
        __version__ = "2.15.0"

    monkeypatch.setitem(sys.modules, "keras", Old)
    with pytest.raises(ValueError, match=r"Keras has version 2\.15\.0, expected 3 or later"):
        interop.enable()


@pytest.fixture
def stand_in(monkeypatch):
    """A module in the place of Keras's, with its names: what needs no Keras is tested without it."""
    nn = ModuleType("keras.src.backend.numpy.nn")
    nn.moments, nn.batch_normalization = "their moments", "their batch_normalization"
    keras = SimpleNamespace(__version__="3.15.1", backend=SimpleNamespace(backend=lambda: "numpy"))
    monkeypatch.setitem(sys.modules, "keras", keras)
    monkeypatch.setitem(sys.modules, "keras.src.backend", SimpleNamespace(nn=nn))
    return nn


def test_functions_go_in_and_out(stand_in):
    theirs = dict(vars(stand_in))
    x = np.random.default_rng(0).normal(1000, 0.1, (64, 3)).astype("float16")
    exact = x.astype("float64")
    with interop.patched(), interop.patched():
        mean, var = stand_in.moments(x, [0], keepdims=True)
        y = stand_in.batch_normalization(x, mean[0], var[0], -1, offset=np.zeros(3, "f4"), scale=np.ones(3, "f4"))
        z = stand_in.batch_normalization(y, y[0], abs(y[1]), 1)
        with pytest.raises(NotImplementedError, match="synchronized is True"):
            stand_in.moments(x, [0], synchronized=True)
    assert vars(stand_in) == theirs
    np.testing.assert_array_equal(mean, exact.mean(0, keepdims=True).astype("float16"))
    np.testing.assert_array_equal(var, exact.var(0, keepdims=True).astype("float16"))
    expected = (exact - mean.astype("f8")) / np.sqrt(var.astype("f8") + 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert y.dtype == z.dtype == np.float32


def test_functions_go_out_after_an_exception(stand_in):
    theirs = dict(vars(stand_in))

    @interop.patched()
    def fail():
        assert vars(stand_in) != theirs
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vars(stand_in) == theirs


class Layer(SimpleNamespace):
    """The attributes of a built keras.layers.BatchNormalization that has no beta."""

    def __init__(self, **others):
        parts = {"gamma": GAMMA, "beta": None, "moving_mean": MEAN, "moving_variance": VAR, "center": False}
        super().__init__(**{**parts, "scale": True, "axis": 1, "epsilon": 0.5, "momentum": 0.25, **others})


def test_a_layer_is_read_by_its_attributes():
    bn = interop.from_keras(Layer())
    assert (bn.axis, bn.eps, bn.momentum, bn.beta) == (1, 0.5, 0.25, None)
    np.testing.assert_array_equal(bn.gamma, GAMMA)
    assert interop.from_keras(Layer(axis=[3])).axis == 3, "Keras 2 has a list"
    assert interop.from_keras(Layer(), axis=-1).axis == -1
    for other, words in (({"moving_mean": None}, "no weights yet"), ({"renorm": True}, "renorm=True, expected False")):
        with pytest.raises(ValueError, match=words):
            interop.from_keras(Layer(**other))
    with pytest.raises(ValueError, match="center is True, expected False, as the layer has it"):
        interop.from_keras(Layer(), center=True)


# --------------------------------------------------------------------------------------------------- weights, by number

C = 3
GAMMA, BETA, MEAN, VAR = (np.arange(C, dtype="float32") + i for i in (1, 5, 9, 13))


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([GAMMA, BETA, MEAN, VAR], {}),
        ([GAMMA, MEAN, VAR], {"center": False}),
        ([BETA, MEAN, VAR], {"scale": False}),
        ([MEAN, VAR], {}),
        ((MEAN, VAR), {"center": False, "scale": False}),
    ],
)
def test_weights_are_told_by_their_number_and_order(weights, told):
    bn = interop.from_keras(weights, **told)
    for name, a in {"gamma": GAMMA, "beta": BETA, "running_mean": MEAN, "running_var": VAR}.items():
        found = getattr(bn, name)
        assert (found is None) == (not any(a is w for w in weights)), name
        if found is not None:
            np.testing.assert_array_equal(found, a)
            assert not np.shares_memory(found, a)
    assert (bn.axis, bn.eps, bn.momentum, bn.correction, bn.dtype) == (-1, 1e-3, 0.99, 0, np.float32)
    assert bn.training
    for a, b in zip(interop.to_keras(bn), weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_dtype_is_that_of_the_weights_and_options_come_first():
    assert interop.from_keras([MEAN, VAR.astype("float64")]).dtype == np.float64
    assert interop.from_keras([MEAN.astype("float16"), VAR.astype("float16")]).dtype == np.float32
    assert interop.from_keras([MEAN, VAR], axis=1, eps=0.5, momentum=0.25, dtype="float64").eps == 0.5


@pytest.mark.parametrize(
    ("kind", "words", "weights", "told"),
    [
        (ValueError, "has 3 arrays, with center=None, scale=None", [GAMMA, MEAN, VAR], {}),
        (ValueError, "has 4 arrays, with center=False", [GAMMA, BETA, MEAN, VAR], {"center": False}),
        (ValueError, "has 2 arrays, with center=True", [MEAN, VAR], {"center": True}),
        (ValueError, "has 1 arrays", [MEAN], {}),
        (ValueError, "has 5 arrays", [MEAN] * 5, {}),
        (ValueError, r"gamma has shape \(2,\), expected \(3,\)", [GAMMA[:2], BETA, MEAN, VAR], {}),
        (ValueError, "moving_variance is -13", [MEAN, -VAR], {}),
        (TypeError, "layer_or_weights is of type ndarray", MEAN, {}),
        (TypeError, "moving_mean has dtype complex64", [MEAN + 0j, VAR], {}),
    ],
)
def test_other_weights_are_refused(kind, words, weights, told):
    with pytest.raises(kind, match=f"from_keras: .*{words}"):
        interop.from_keras(weights, **told)


def test_only_a_layer_with_statistics_has_weights():
    with pytest.raises(ValueError, match="to_keras: the layer keeps no running statistics"):
        interop.to_keras(fastbn.BatchNorm(3, track_running_stats=False))
    with pytest.raises(TypeError, match="to_keras: layer is of type int"):
        interop.to_keras(3)
    assert {w.dtype for w in interop.to_keras(fastbn.BatchNorm(3, momentum=None))} == {np.dtype("float32")}
