"""JAX functions over fastbn: values, gradients, jit, vmap, and no standstill."""

import doctest
import importlib.util
import os
import sys

import numpy as np
import pages
import pytest
import reference
from arrays import HALVES
from subprocesses import run_script

import fastbn


def test_without_jax_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "fastbn.interop.jax", raising=False)
    with pytest.raises(ImportError, match=r'fastbn\.interop\.jax needs jax: pip install "fastbn\[jax\]"'):
        importlib.import_module("fastbn.interop.jax")


@pytest.fixture(scope="module")
def jax():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return pytest.importorskip("jax", reason="JAX is not installed: nothing to call fastbn from")


@pytest.fixture(scope="module")
def fj(jax):
    import fastbn.interop.jax

    return fastbn.interop.jax


def problem(shape=(6, 3, 4), dtype="float32", axis=1, mean=1.0, seed=0):
    rng = np.random.default_rng(seed)
    channels = tuple(shape[a] for a in sorted(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))))
    parameter = np.float64 if dtype == "float64" else np.float32
    gamma, beta = (rng.normal(1, 0.5, channels).astype(parameter) for _ in range(2))
    return rng.normal(mean, 2, shape).astype(dtype), gamma, beta


CASES = [("float32", 1), ("float32", (0, -1)), ("float64", -1), *((d, -1) for d in HALVES)]


@pytest.mark.parametrize(("dtype", "axis"), CASES)
def test_values_are_those_of_the_verbs(jax, fj, dtype, axis):
    """Bit for bit; the verbs are held to the oracle elsewhere."""
    x, gamma, beta = problem(dtype=dtype, axis=axis)
    with jax.enable_x64(dtype == "float64"):
        given = [jax.numpy.asarray(a) for a in (x, gamma, beta)]
        y, mean, var = fj.batch_norm_train(*given, axis=axis, eps=1e-3)
        z = fj.batch_norm(given[0], mean, var, *given[1:], axis=axis, eps=1e-3)
    expected, saved = fastbn.batch_norm_train(x, gamma, beta, axis=axis, eps=1e-3)
    assert (y.dtype, mean.dtype, var.dtype) == (x.dtype, gamma.dtype, gamma.dtype)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(mean, saved.mean.astype(gamma.dtype))
    np.testing.assert_array_equal(var, saved.var.astype(gamma.dtype))
    infer = fastbn.batch_norm(x, np.asarray(mean), np.asarray(var), gamma, beta, axis=axis, eps=1e-3)
    np.testing.assert_array_equal(z, infer)
    np.testing.assert_array_equal(given[0], x, "x was written")


@pytest.mark.parametrize("axis", [1, (0, 2)])
def test_gradients_in_float64(jax, fj, axis):
    """Those of y and of both statistics, in one random direction and its finite difference."""
    check_grads = importlib.import_module("jax.test_util").check_grads
    x, gamma, beta = problem((4, 3, 5), "float64", axis)
    options = {"order": 1, "modes": ["rev"], "atol": 1e-6, "rtol": 1e-6}
    with jax.enable_x64(True):
        check_grads(lambda *a: fj.batch_norm_train(*a, axis=axis), (x, gamma, beta), **options)
        check_grads(lambda *a: fj.batch_norm(*a, axis=axis), (x, beta, gamma**2 + 0.1, gamma, beta), **options)


def test_a_scalar_parameter_gets_a_scalar_gradient(jax, fj):
    check_grads = importlib.import_module("jax.test_util").check_grads
    x, _, _ = problem(dtype="float64")
    options = {"order": 1, "modes": ["rev"], "atol": 1e-6, "rtol": 1e-6}
    with jax.enable_x64(True):
        check_grads(lambda x, gamma: fj.batch_norm_train(x, gamma), (x, np.float64(1.5)), **options)
        check_grads(lambda x, m, v: fj.batch_norm(x, m, v), (x, np.float64(0.5), np.float64(2)), **options)


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_gradients_of_far_data_under_jit(jax, fj, dtype):
    """Bit for bit those of the verbs: the statistics of the forward reach the backward in float64."""
    x, gamma, beta = problem((40, 3), dtype, mean=3000.0)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(dtype)

    def pulled(dy, *given):
        return jax.vjp(lambda *a: fj.batch_norm_train(*a)[0], *given)[1](dy)

    found = jax.jit(pulled)(dy, x, gamma, beta)
    _, saved = fastbn.batch_norm_train(x, gamma, beta)
    for a, b, name in zip(found, fastbn.batch_norm_backward(dy, saved), ("dx", "dgamma", "dbeta"), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, name)


def test_gradients_have_the_dtypes_of_the_arguments(jax, fj):
    x, gamma, _ = problem()
    bfloat16 = jax.numpy.asarray(gamma, "bfloat16")

    def loss(x, mean, var, gamma, beta):
        return fj.batch_norm(x, mean, var, gamma, beta).sum() + fj.batch_norm_train(x, gamma, beta)[0].sum()

    given = x, bfloat16, gamma**2, bfloat16, gamma
    for a, b in zip(jax.grad(loss, range(5))(*given), given, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_vmap_calls_each_slice(jax, fj):
    _, gamma, beta = problem()
    x = np.random.default_rng(3).normal(size=(2, 6, 3, 4)).astype("float32")

    def loss(x, gamma):
        y, mean, var = fj.batch_norm_train(x, gamma, beta)
        return (y**3).sum() + (mean * var).sum()

    one = jax.value_and_grad(loss, (0, 1))
    found = jax.jit(jax.vmap(one, (0, None)))(x, gamma)
    expected = [one(a, gamma) for a in x]
    for i, b in enumerate(expected):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5), found, b)


def test_shapes_are_known_without_computing(jax, fj):
    shapes = jax.eval_shape(fj.batch_norm_train, jax.ShapeDtypeStruct((8, 3, 5), "bfloat16"))
    assert [(s.shape, s.dtype.name) for s in shapes] == [((8, 3, 5), "bfloat16"), *[((3,), "float32")] * 2]
    y, mean, var = fj.batch_norm_train(np.empty((0, 3), "float32"))
    assert (y.shape, mean.tolist(), var.tolist()) == ((0, 3), [0.0] * 3, [0.0] * 3)


def test_it_is_differentiated_once_and_backwards(jax, fj):
    x, gamma, beta = problem()
    first = jax.grad(lambda x: (fj.batch_norm_train(x, gamma, beta)[0] ** 2).sum())
    frozen = jax.grad(lambda x: (fj.batch_norm(x, gamma, gamma**2) ** 2).sum())
    for f in (first, frozen, jax.jit(first)):
        with pytest.raises(TypeError, match="batch norm is differentiated twice, expected once"):
            jax.grad(lambda x, f=f: f(x).sum())(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(fj.batch_norm_train, (x,), (x,))


X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("kind", "words", "name", "arguments", "options"),
    [
        (TypeError, "x has dtype int32, expected one of float16", "batch_norm_train", (X.astype("int32"),), {}),
        (TypeError, "x is of type str", "batch_norm_train", ("x",), {}),
        (ValueError, "axis 2 is out of range", "batch_norm_train", (X,), {"axis": 2}),
        (ValueError, "eps is -1", "batch_norm_train", (X,), {"eps": -1}),
        (ValueError, "x has one value per channel", "batch_norm_train", (X[:1],), {}),
        (ValueError, r"gamma has shape \(2,\), expected \(3,\)", "batch_norm_train", (X, X[0, :2]), {}),
        (TypeError, "gamma is of type str", "batch_norm_train", (X, "x"), {}),
        (TypeError, "beta has dtype complex64", "batch_norm_train", (X, None, X[0] + 1j), {}),
        (TypeError, "var is None", "batch_norm", (X, X[0], None), {}),
        (ValueError, r"mean has shape \(4,\)", "batch_norm", (X, X[:, 0], X[0]), {}),
    ],
)
def test_bad_calls_are_named_before_anything_runs(jax, fj, kind, words, name, arguments, options):
    with pytest.raises(kind, match=rf"fastbn\.interop\.jax\.{name}: {words}"):
        getattr(fj, name)(*arguments, **options)


def test_a_negative_variance_is_found_when_it_is_computed(jax, fj):
    with pytest.raises(jax.errors.JaxRuntimeError, match="var is -1"):
        jax.block_until_ready(fj.batch_norm(X, 0.0, -1.0))


def test_the_calls_out_of_jax_fill_their_buffers(fj):
    """As XLA makes them, but for its threads: inputs may be None, and are left alone; every result is filled."""
    x, gamma, _ = problem()
    given = x.copy(), gamma.copy(), None
    y, mean, var, state = np.empty_like(x), np.empty(3, "f4"), np.empty(3, "f4"), np.empty((2, 3, 2), np.uint32)
    fj._training((1,), 1e-5)(None, (y, mean, var, state), *given)
    expected, saved = fastbn.batch_norm_train(*given)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(state.view(np.float64)[..., 0], [saved.mean, saved.moments.m2])
    dy, zero = np.ones_like(x), np.zeros(3, "f4")
    dx, dgamma = np.empty_like(x), np.empty(3, "f4")
    fj._training_gradients((1,), 1e-5)(None, (dx, dgamma, None), *given, state, dy, zero, zero)
    for a, b in zip((dx, dgamma), fastbn.batch_norm_backward(dy, saved), strict=False):
        np.testing.assert_array_equal(a, b)
    z, dmean, dvar = np.empty_like(x), np.empty(3, "f4"), np.empty(3, "f4")
    fj._inference((1,), 1e-5)(None, z, x, mean, var, gamma, None)
    np.testing.assert_array_equal(z, fastbn.batch_norm(x, mean, var, gamma))
    fj._inference_gradients((1,), 1e-5)(None, (dx, dmean, dvar, dgamma, None), x, mean, var, gamma, None, dy)
    invstd = 1 / np.sqrt(var.astype("f8") + 1e-5)
    np.testing.assert_allclose(dmean, -gamma * invstd * x.size / 3, rtol=1e-6)
    np.testing.assert_allclose(dvar, -0.5 * gamma * invstd**2 * dgamma, rtol=1e-6)
    for a, b in zip(given[:2], (x, gamma), strict=True):
        np.testing.assert_array_equal(a, b, "an input was written")


STANDSTILL = """
import faulthandler, threading
faulthandler.dump_traceback_later(60, exit=True)
import jax, numpy as np
import fastbn, fastbn.interop.jax as fj
raw = np.random.default_rng(0).normal(3, 2, 4 * 64 * 4096 + 1).astype("float32")[1:]    # not aligned
x = raw.reshape(64, 4, 4096)
train = jax.jit(jax.value_and_grad(lambda x: (fj.batch_norm_train(x * 2)[0] ** 3).sum()))
each = jax.jit(jax.vmap(lambda x: fj.batch_norm_train(x)[1]))
plain = jax.jit(lambda x: fj.batch_norm_train(x)[0])
def work():
    for _ in range(5):
        jax.block_until_ready((train(x), plain(x), each(x.reshape(4, 16, 4, 4096))))
work()
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
np.testing.assert_array_equal(plain(x), fastbn.batch_norm_train(x)[0])
print("done")
"""


@pytest.mark.jit("so many values take minutes as plain Python")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_it_does_not_stand_still(jax, threads):
    """With as few threads of XLA's as there can be: one that runs a callback waits for nothing that another must do."""
    assert run_script(STANDSTILL, JAX_PLATFORMS="cpu", PJRT_NPROC=threads, timeout=90) == "done\n"


def test_running_statistics_of_a_training_step(jax, fj):
    """As the page says: the statistics come out, and the user moves the running ones."""
    x, gamma, beta = problem()

    @jax.jit
    def step(gamma, running, x):
        def loss(gamma):
            y, mean, var = fj.batch_norm_train(x, gamma, beta)
            return (y**2).mean(), (0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * var)

        grad, running = jax.grad(loss, has_aux=True)(gamma)
        return gamma - 0.1 * grad, running

    running = jax.numpy.zeros(3), jax.numpy.ones(3)
    for _ in range(3):
        gamma, running = step(gamma, running, x)
    layer = fastbn.BatchNorm(3, correction=0)
    for _ in range(3):
        layer(x)
    np.testing.assert_allclose(running[0], layer.running_mean, rtol=1e-6)
    np.testing.assert_allclose(running[1], layer.running_var, rtol=1e-6)
    z = fj.batch_norm(x, *running, gamma, beta)
    expected = reference.infer(x, *map(np.asarray, running), np.asarray(gamma), beta)
    reference.assert_within(np.asarray(z), expected.y, expected.budget)


def test_the_page_prints_what_it_says(jax):
    pytest.importorskip("autograd", reason="autograd is not installed: the page uses it")
    pages.check("how-to/jax.md")


def test_the_examples_run(fj):
    result = doctest.testmod(fj)
    assert result.attempted > 1
    assert not result.failed
