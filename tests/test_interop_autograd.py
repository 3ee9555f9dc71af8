"""autograd's primitives over fastbn: values and gradients."""

import doctest
import importlib
import sys

import numpy as np
import pytest

import fastbn


def test_without_autograd_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "autograd", None)
    monkeypatch.delitem(sys.modules, "autograd.extend", raising=False)
    monkeypatch.delitem(sys.modules, "fastbn.interop.autograd", raising=False)
    with pytest.raises(
        ImportError, match=r'fastbn\.interop\.autograd needs autograd: pip install "fastbn\[autograd\]"'
    ):
        importlib.import_module("fastbn.interop.autograd")


@pytest.fixture(scope="module")
def autograd():
    return pytest.importorskip("autograd", reason="autograd is not installed: nothing to differentiate with")


@pytest.fixture(scope="module")
def fa(autograd):
    import fastbn.interop.autograd

    return fastbn.interop.autograd


def problem(axis=1, dtype="float64", mean=1.0):
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 2, (4, 3, 5)).astype(dtype)
    channels = tuple(x.shape[a] for a in sorted(axis)) if isinstance(axis, tuple) else x.shape[axis]
    return x, *(rng.normal(1, 0.5, channels).astype(dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_are_those_of_the_verbs(fa, dtype):
    x, gamma, beta = problem(-1, dtype)
    y, mean, var = fa.batch_norm_train(x, gamma, beta, axis=-1, eps=1e-3)
    expected, saved = fastbn.batch_norm_train(x, gamma, beta, axis=-1, eps=1e-3)
    assert y.dtype == dtype
    for a, b in ((y, expected), (mean, saved.mean), (var, saved.var)):
        np.testing.assert_array_equal(a, b)
    z = fa.batch_norm(x, mean, var, gamma, beta, axis=-1, eps=1e-3)
    np.testing.assert_array_equal(z, fastbn.batch_norm(x, mean, var, gamma, beta, axis=-1, eps=1e-3))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), ()], ids=str)
def test_gradients(autograd, fa, axis):
    """Those of y and of both statistics, in a random direction and its finite difference."""
    np.random.seed(1)  # noqa: NPY002  autograd's check draws the direction from it
    check = importlib.import_module("autograd.test_util").check_grads
    x, gamma, beta = problem(axis)
    train = lambda *a: fa.batch_norm_train(*a, axis=axis)  # noqa: E731
    infer = lambda *a: fa.batch_norm(*a, axis=axis)  # noqa: E731
    for arguments in ((x,), (x, gamma), (x, gamma, beta), (x, 1.5, beta)):
        check(train, (*range(len(arguments)),), modes=["rev"], order=1)(*arguments)
    var = gamma**2 + 0.1
    for arguments in ((x, beta, var), (x, beta, var, gamma, beta), (x, 0.5, 2.0, gamma, 0.25)):
        check(infer, (*range(len(arguments)),), modes=["rev"], order=1)(*arguments)
    check(lambda beta: fa.batch_norm_train(x, None, beta, axis=axis)[0], modes=["rev"], order=1)(beta)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gradients_of_far_data(autograd, fa, dtype):
    """Bit for bit those of the verbs, in the dtypes of the arguments."""
    x, gamma, beta = problem(1, dtype, mean=3000.0)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(dtype)
    pull, _ = autograd.make_vjp(lambda a: fa.batch_norm_train(*a)[0])((x, gamma, beta))
    _, saved = fastbn.batch_norm_train(x, gamma, beta)
    for a, b in zip(pull(dy), fastbn.batch_norm_backward(dy, saved), strict=True):
        assert a.dtype == b.dtype == dtype
        np.testing.assert_array_equal(a, b)


def test_it_is_differentiated_once_and_backwards(autograd, fa):
    x, gamma, beta = problem()
    losses = [
        lambda x: (fa.batch_norm_train(x, gamma, beta)[0] ** 2).sum(),
        lambda x: (fa.batch_norm(x, gamma, gamma**2) ** 2).sum(),
    ]
    for loss in losses:
        with pytest.raises(NotImplementedError, match="batch norm is differentiated twice, expected once"):
            autograd.grad(lambda x, loss=loss: autograd.grad(loss)(x).sum())(x)
        with pytest.raises(NotImplementedError, match="JVP"):
            autograd.make_jvp(loss)(x)(x)


def test_the_second_derivative_of_a_parameter_alone_is_refused_too(autograd, fa):
    """The gradient depends on gamma, though neither x nor dy does."""
    x, gamma, _ = problem()
    weights = np.arange(x.size).reshape(x.shape)
    inner = autograd.grad(lambda x, gamma: (fa.batch_norm_train(x, gamma)[0] * weights).sum())
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        autograd.grad(lambda gamma: (inner(x, gamma) * weights).sum())(gamma)


def test_it_trains(autograd, fa):
    """Through a layer on each side: what autograd makes of the rest fits."""
    anp = importlib.import_module("autograd.numpy")
    rng = np.random.default_rng(2)
    x, target = rng.normal(size=(64, 5)), rng.normal(size=64) > 0

    def loss(p):
        h = anp.tanh(fa.batch_norm_train(anp.dot(x, p[0]), p[1], p[2])[0])
        return anp.mean((anp.dot(h, p[3]) - target) ** 2)

    p = [rng.normal(size=(5, 8)), np.ones(8), np.zeros(8), rng.normal(size=8)]
    first = loss(p)
    for _ in range(50):
        p = [a - 0.1 * g for a, g in zip(p, autograd.grad(loss)(p), strict=True)]
    assert loss(p) < first / 4


def test_a_variance_of_0_without_eps_passes_only_betas_gradient(autograd, fa):
    anp = importlib.import_module("autograd.numpy")
    x, var = np.arange(8.0).reshape(4, 2), np.array([0.0, 4.0])

    def loss(mean, var, beta):
        return anp.sum(fa.batch_norm(x, mean, var, 3.0, beta, eps=0))

    dmean, dvar, dbeta = autograd.grad(loss, (0, 1, 2))(np.ones(2), var, np.zeros(2))
    assert (dmean[0], dvar[0], dbeta[0]) == (0.0, 0.0, 4.0)
    np.testing.assert_allclose((dmean[1], dvar[1]), (-4 * 3 / 2, -3 * (x[:, 1] - 1).sum() / 16), rtol=1e-14)


def test_errors_are_those_of_the_verbs(fa):
    with pytest.raises(ValueError, match="batch_norm_train: x has one value per channel"):
        fa.batch_norm_train(np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"batch_norm: gamma has shape \(2,\)"):
        fa.batch_norm(np.ones((4, 3)), 0, 1, np.ones(2))


def test_the_examples_run(fa):
    result = doctest.testmod(fa)
    assert result.attempted > 1
    assert not result.failed
