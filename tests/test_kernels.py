"""One body, three ways to run it: plain Python, serial, parallel; and what may be compiled for it."""

import inspect

import numpy as np
import pytest
from arrays import SMALL
from builds import force
from subprocesses import TESTS, run_python, run_script

import fastbn
from fastbn import kernels
from fastbn.kernels import backward, forward

ALL = forward.forward_runs, forward.forward_rows, backward.backward_runs, backward.backward_rows
KERNELS = {k.body.__name__: k for k in ALL}
OUTPUTS = {"y", "state", "dx", "grads"}


def test_every_kernel_runs_as_plain_python():
    script = "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_verbs.py"), "-k", "small"
    printed = run_python(*script, cwd=TESTS.parent, NUMBA_DISABLE_JIT="1")
    assert " passed" in printed


def test_no_jit_means_no_jit():
    printed = run_script("from fastbn.kernels import forward; print(type(forward.forward_runs.serial).__name__)",
                         NUMBA_DISABLE_JIT="1")  # fmt: skip
    assert printed == "function\n"


def read_only(a):
    if isinstance(a, np.ndarray):
        a = a.view()
        a.flags.writeable = False
    return a


def results(d, axis):
    """Of every verb."""
    y, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, axis=axis)
    z = fastbn.batch_norm(d.x, d.mean, d.var, d.gamma, d.beta, axis=axis)
    frozen = fastbn.Saved.fixed(d.x, d.mean, d.var, d.gamma, axis=axis)
    gradients = (*fastbn.batch_norm_backward(d.dy, saved), *fastbn.batch_norm_backward(d.dy, frozen))
    return y, z, fastbn.moments(d.x, axis=axis).m2, *gradients


@pytest.mark.parametrize("case", [SMALL[0], SMALL[-1]], ids=str)
def test_kernels_compile_with_read_only_inputs(monkeypatch, rng, case):
    """A kernel that wrote to an input would not compile."""
    used = set()

    def call(kernel, *args):
        used.add(kernel.body.__name__)
        names = inspect.signature(kernel.body).parameters
        assert OUTPUTS & set(names)
        kernel.serial(*(a if name in OUTPUTS else read_only(a) for name, a in zip(names, args, strict=True)))

    d = case.data(rng, "float32")
    plain = results(d, case.axis)
    force(monkeypatch, call)
    for a, b in zip(results(d, case.axis), plain, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(used) == 2


@pytest.mark.jit("there are no signatures")
@pytest.mark.parametrize("name", KERNELS)
def test_a_dtype_is_compiled_once(rng, name):
    """Views, read-only arrays, omitted and foreign parameters bring no signature of their own."""
    kernel, case = KERNELS[name], SMALL[-1] if name.endswith("runs") else SMALL[0]
    d = case.data(rng, "float32")

    def every_verb(x, dy, gamma, beta):
        y, saved = fastbn.batch_norm_train(x, gamma, beta)
        fastbn.batch_norm(x, 0, 1, gamma, beta, out=y)
        fastbn.batch_norm_backward(dy, saved)
        fastbn.batch_norm_backward(dy, fastbn.Saved.fixed(x, 0, 1, gamma))
        fastbn.moments(x)

    every_verb(d.x, d.dy, None, None)
    before = len(kernel.serial.signatures)
    frozen = d.x.copy(), d.dy.copy()
    for a in frozen:
        a.flags.writeable = False
    every_verb(*frozen, d.gamma.astype("float64"), 1)
    every_verb(d.x[:, ::-1], d.dy[::-1], d.gamma, [1] * d.beta.size)
    every_verb(d.x.astype(">f4"), d.dy.astype(">f4"), d.gamma, d.beta)
    assert len(kernel.serial.signatures) == before


@pytest.mark.jit("there are no signatures")
def test_dy_of_the_other_dtype_is_converted_not_compiled(rng):
    d = SMALL[0].data(rng, "float32")
    _, saved = fastbn.batch_norm_train(d.x)
    expected = fastbn.batch_norm_backward(d.dy, saved)
    before = len(backward.backward_rows.serial.signatures)
    found = fastbn.batch_norm_backward(d.dy.astype("float64"), saved)
    assert len(backward.backward_rows.serial.signatures) == before
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.jit("both builds are the body")
@pytest.mark.parametrize("name", KERNELS)
def test_the_two_builds_have_names_of_their_own(name):
    kernel = KERNELS[name]
    names = {kernel.serial.py_func.__qualname__, kernel.parallel.py_func.__qualname__, kernel.body.__qualname__}
    assert len(names) == 3
    assert repr(kernel) == f"<kernel {name}>"


def test_a_kernel_that_does_not_exist():
    with pytest.raises(AttributeError, match=r"^module 'fastbn.kernels' has no attribute 'sideward'$"):
        kernels.sideward  # noqa: B018


def test_plain_kernels_warn_of_no_number():
    """As compiled ones."""
    script = """
import warnings
warnings.simplefilter("error")
import numpy as np, fastbn
y, saved = fastbn.batch_norm_train(np.array([[np.inf, 1e30], [1, 3e38], [2, -3e38]], "float32"))
fastbn.batch_norm_backward(y, saved)
print(np.isfinite(y).all(axis=0))
"""
    assert run_script(script, NUMBA_DISABLE_JIT="1") == "[False  True]\n"
