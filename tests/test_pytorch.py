"""The same numbers as PyTorch: forward, backward, running statistics, and the layer over several steps."""

import numpy as np
import pytest
import reference
from arrays import FLOATS

import fastbn

torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")

SHAPES = [(8, 5), (4, 3, 9), (4, 6, 5, 7), (2, 3, 4, 3, 5), (2, 4, 16, 16), (1, 3, 4, 4)]


def tensors(*arrays):
    return [torch.from_numpy(a.copy()).requires_grad_() for a in arrays]


def close(found, expected, budget, what):
    """PyTorch rounds in float32 all the way: its error grows with the sums."""
    reference.assert_within(found, expected.detach().numpy().astype(np.longdouble), 16 * budget, what)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(rng, shape, dtype):
    x, dy = rng.normal(1, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    gamma, beta = rng.normal(size=(2, shape[1])).astype(dtype)
    tx, tgamma, tbeta = tensors(x, gamma, beta)
    running = torch.zeros(shape[1], dtype=tx.dtype), torch.ones(shape[1], dtype=tx.dtype)
    ty = torch.nn.functional.batch_norm(tx, *running, tgamma, tbeta, training=True, momentum=0.1, eps=1e-3)
    ty.backward(torch.from_numpy(dy))

    y, saved = fastbn.batch_norm_train(x, gamma, beta, eps=1e-3)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, saved)
    b = reference.backward(dy, x, gamma, eps=1e-3)
    close(y, ty, reference.train(x, gamma, beta, eps=1e-3).budget, "y")
    n = reference.count(x, 1)
    sums = reference.tolerance(dtype, reference.reduce(abs(dy), 1) * 4)
    close(dx, tx.grad, b.dx_budget + reference.spread(sums, x, 1) / n, "dx")
    close(dgamma, tgamma.grad, b.dgamma_budget + sums, "dgamma")
    close(dbeta, tbeta.grad, b.dbeta_budget + sums, "dbeta")

    mean, var = np.zeros(shape[1], dtype), np.ones(shape[1], dtype)
    fastbn.update_running(mean, var, saved.moments, momentum=0.9, correction=1)
    rtol = 16 * np.finfo(dtype).eps
    np.testing.assert_allclose(mean, running[0].numpy(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(var, running[1].numpy(), rtol=rtol)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_and_the_frozen_backward(rng, shape, dtype):
    x, dy = rng.normal(1, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    gamma, beta, mean = rng.normal(size=(3, shape[1])).astype(dtype)
    var = rng.uniform(0.5, 2, shape[1]).astype(dtype)
    tx, tgamma, tbeta = tensors(x, gamma, beta)
    ty = torch.nn.functional.batch_norm(tx, torch.from_numpy(mean), torch.from_numpy(var), tgamma, tbeta)
    ty.backward(torch.from_numpy(dy))
    close(fastbn.batch_norm(x, mean, var, gamma, beta), ty, reference.infer(x, mean, var, gamma, beta).budget, "y")
    found = fastbn.batch_norm_backward(dy, fastbn.Saved.fixed(x, mean, var, gamma, beta))
    b = reference.backward(dy, x, gamma, fixed=(mean, var))
    sums = reference.tolerance(dtype, reference.reduce(abs(dy), 1) * 8)
    close(found[0], tx.grad, b.dx_budget, "dx")
    close(found[1], tgamma.grad, b.dgamma_budget + sums, "dgamma")
    close(found[2], tbeta.grad, b.dbeta_budget + sums, "dbeta")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_the_layer_over_steps(rng, momentum, affine, dtype):
    """Training, a step of the parameters, evaluation with its backward."""
    bn = fastbn.BatchNorm(4, momentum=momentum, center=affine, scale=affine, dtype=dtype)
    other = torch.nn.BatchNorm2d(4, affine=affine, dtype=getattr(torch, dtype))
    other.momentum = None if momentum is None else 1 - momentum
    mean, var = np.zeros(4, dtype), np.ones(4, dtype)
    digits = 100 * np.finfo(dtype).eps  # PyTorch rounds each step in dtype, and the next begins from there

    def step(x, dy):
        y, dx = bn(x, save=True), bn.backward(dy)
        (tx,) = tensors(x)
        other.zero_grad()
        ty = other(tx)
        ty.backward(torch.from_numpy(dy))
        np.testing.assert_allclose(y, ty.detach().numpy(), rtol=digits, atol=digits)
        np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=digits, atol=digits)
        if affine:
            size = abs(dy).sum() / 4
            np.testing.assert_allclose(bn.dgamma, other.weight.grad.numpy(), rtol=digits, atol=digits * size)
            np.testing.assert_allclose(bn.dbeta, other.bias.grad.numpy(), rtol=digits, atol=digits * size)
        else:
            assert bn.dgamma is bn.dbeta is None

    for k in range(4):
        x = rng.normal(k, 1 + k, (6, 4, 5, 3)).astype(dtype)
        dy = rng.normal(size=x.shape).astype(dtype)
        step(x, dy)
        if affine:
            bn.gamma -= 0.1 * bn.dgamma
            bn.beta -= 0.1 * bn.dbeta
            with torch.no_grad():
                other.weight -= 0.1 * other.weight.grad
                other.bias -= 0.1 * other.bias.grad
        # PyTorch's None averages the statistics of the batches: that is a weight of the old value that grows.
        weight = 1 - 1 / (k + 1) if momentum is None else momentum
        fastbn.update_running(mean, var, fastbn.moments(x), momentum=weight)
        np.testing.assert_allclose(mean, other.running_mean.numpy(), rtol=digits, atol=digits)
        np.testing.assert_allclose(var, other.running_var.numpy(), rtol=digits)
    assert bn.num_batches_tracked == int(other.num_batches_tracked) == 4
    # Batches of one size have the mean of all samples as the average of theirs; its variance fastbn pools.
    np.testing.assert_allclose(bn.running_mean, other.running_mean.numpy(), rtol=digits, atol=digits)
    if momentum is not None:
        np.testing.assert_allclose(bn.running_var, other.running_var.numpy(), rtol=digits)
    else:
        assert (bn.running_var > other.running_var.numpy()).all()
        bn.running_var[...] = other.running_var.numpy()
    bn.eval()
    other.eval()
    step(x, dy)


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_memory(rng, training):
    """The memory order of PyTorch's images in NHWC: y and dx have it too."""
    x = rng.normal(size=(4, 6, 5, 7)).astype("float32")
    tx = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    tdy = torch.from_numpy(rng.normal(size=x.shape).astype("float32")).contiguous(memory_format=torch.channels_last)
    x, dy = tx.numpy(), tdy.numpy()
    tx.requires_grad_()
    mean, var = np.zeros(6, "float32"), np.full(6, 2, "float32")
    given = (None, None) if training else (torch.from_numpy(mean), torch.from_numpy(var))
    ty = torch.nn.functional.batch_norm(tx, *given, training=training)
    ty.backward(tdy)
    if training:
        y, saved = fastbn.batch_norm_train(x)
        f, b = reference.train(x), reference.backward(dy, x)
    else:
        y, saved = fastbn.batch_norm(x, mean, var), fastbn.Saved.fixed(x, mean, var)
        f, b = reference.infer(x, mean, var), reference.backward(dy, x, fixed=(mean, var))
    dx, _, _ = fastbn.batch_norm_backward(dy, saved)
    batch_mean, batch_var = reference.mean_var(x, 1) if training else (mean, var)
    folded = abs(reference.spread(batch_mean * reference.invstd(batch_var, 1e-5), x, 1))  # y = x * scale + shift
    close(y, ty, f.budget + np.finfo("float32").eps * folded, "y")
    close(dx, tx.grad, b.dx_budget, "dx")
    for found, expected in ((y, ty), (dx, tx.grad)):
        assert [s // 4 for s in found.strides] == list(expected.stride())
