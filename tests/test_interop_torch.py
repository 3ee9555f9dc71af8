"""fastbn.interop.torch: converted modules are PyTorch's in all but who computes; weights in and out; page and script.

The error budget: y, dx, dgamma and dbeta are within that of tests/reference.py, whose oracle is given the parameters of
the step. From them PyTorch's may be 16 roundings of their terms away, in the dtype that it computes in (that of the
parameters: also a half), and two roundings of the result.
"""

import contextlib
import copy
import importlib
import io
import itertools
import pickle
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pages
import pytest
import reference
from subprocesses import run_python, run_script

import fastbn

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: no bfloat16 in NumPy")

from torch.autograd import forward_ad  # noqa: E402

from fastbn.interop import torch as ours  # noqa: E402

nn = torch.nn
ROOT = Path(__file__).parents[1]
SHAPES = {"N,C": (8, 5), "N,C,L": (4, 5, 9), "N,C,H,W": (4, 5, 6, 7), "N,C,D,H,W": (2, 5, 3, 4, 5)}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
FORMATS = [
    *((name, False) for name in SHAPES),
    ("N,C,H,W", True),
    ("N,C,D,H,W", True),
]
# Of x, and of parameters and running statistics.
DTYPES = [
    ("float32", "float32"), ("float64", "float64"), ("float16", "float32"), ("float16", "float16"),
    ("bfloat16", "float32"), ("bfloat16", "bfloat16"),
]  # fmt: skip


def theirs(rank, *args, dtype="float32", **kwargs):
    """PyTorch's module for tensors of this rank."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]
    module = kind(*args, dtype=getattr(torch, dtype), **kwargs)
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():  # not 1 and 0, which would hide what is mixed up
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def both(*args, **kwargs):
    """PyTorch's module, and a converted copy."""
    module = theirs(*args, **kwargs)
    return module, ours.convert(copy.deepcopy(module))


def tensor(rng, shape, dtype="float32", last=False, mean=1.0):
    t = torch.from_numpy(rng.normal(mean, 2, shape)).to(getattr(torch, dtype))
    return t.contiguous(memory_format=LAST[len(shape)]) if last else t


def array(t):
    """A tensor's values, those of bfloat16 too."""
    t = t.detach()
    if t.dtype == torch.bfloat16:
        return t.view(torch.uint16).numpy().view(np.dtype("bfloat16"))
    return t.numpy()


def pointer(a):
    return a.__array_interface__["data"][0]


def same_state(a, b):
    assert list(a) == list(b)
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert torch.equal(a[key], b[key]), key


# ------------------------------------------------------------------------------------------------ ten steps of training


def eps_of(dtype):
    return torch.finfo(getattr(torch, dtype)).eps


def near(found, other, budget, name):
    """PyTorch's result within its own budget of ours."""
    found, other = (v.astype(np.longdouble) for v in (found, array(other)))
    excess = np.abs(found - other) / budget
    assert (excess <= 1).all(), f"{name}: PyTorch is {float(np.max(excess)):.3g} times its budget away"


def check_step(x, dy, a, b, xs, ys, *, training, stats):
    """One step of PyTorch's module `a` and ours `b` against the oracle, and against each other."""
    wide, dtype = array(x), str(x.dtype)[6:]
    kept = str(b.running_mean.dtype)[6:]
    gamma, beta = (1.0, 0.0) if b.weight is None else (array(m).astype(np.longdouble) for m in (b.weight, b.bias))
    if training:
        mean, var = reference.mean_var(wide, 1)
        f, g = reference.train(wide, gamma, beta, eps=a.eps), reference.backward(array(dy), wide, gamma, eps=a.eps)
    else:
        mean, var = stats
        f = reference.infer(wide, *stats, gamma, beta, eps=a.eps)
        g = reference.backward(array(dy), wide, gamma, eps=a.eps, fixed=stats)
    found = {"y": array(ys[1]), "dx": array(xs[1].grad)}
    other = {"y": ys[0], "dx": xs[0].grad}
    expected = {"y": (f.y, f.budget), "dx": (g.dx, g.dx_budget)}
    if b.weight is not None:
        found |= {"dgamma": array(b.weight.grad), "dbeta": array(b.bias.grad)}
        other |= {"dgamma": a.weight.grad, "dbeta": a.bias.grad}
        expected |= {"dgamma": (g.dgamma, g.dgamma_budget), "dbeta": (g.dbeta, g.dbeta_budget)}
    for name, (value, budget) in expected.items():
        if name in ("dgamma", "dbeta") and reference.is_half(kept):  # from float64, by way of float32 perhaps
            budget = budget + eps_of(kept) * abs(value)
            np.testing.assert_array_less(abs(found[name].astype(np.longdouble) - value), budget + 1e-30, name)
        else:
            reference.assert_within(found[name], value, budget, name)

    # PyTorch: y = x * scale + shift, sums in float32, everything else in the dtype of the parameters.
    invstd = reference.invstd(var, a.eps)
    scale, moved = abs(reference.spread(gamma * invstd, wide, 1)), reference.spread(abs(mean) * invstd, wide, 1)
    xhat = abs(wide.astype(np.longdouble) - reference.spread(mean, wide, 1)) * reference.spread(invstd, wide, 1)
    size = abs(array(dy).astype(np.longdouble))
    sums = {"dbeta": reference.reduce(size, 1), "dgamma": reference.reduce(size * (xhat + moved), 1)}
    share = 1 / reference.count(wide, 1) if training else 0
    terms = {
        "y": abs(reference.spread(gamma, wide, 1)) * (xhat + moved) + abs(reference.spread(beta, wide, 1)),
        "dx": scale * (size + share * (reference.spread(sums["dbeta"], wide, 1)
                                       + (xhat + moved) * reference.spread(sums["dgamma"], wide, 1))),
        **sums,
    }  # fmt: skip
    coarse = eps_of("float64" if dtype == "float64" else "float32" if kept == "float32" else kept)
    for name, budget in terms.items():
        if name in found:
            result = eps_of(dtype if name in ("y", "dx") else kept)
            near(found[name], other[name], 16 * coarse * budget + 2 * result * abs(expected[name][0]), name)


STEPS = [(*f, *d, 0.1, True) for f in FORMATS for d in DTYPES]
STEPS += [(*f, *d, None, False) for f in FORMATS for d in (DTYPES[0], DTYPES[-1])]


@pytest.mark.parametrize(("name", "last", "dtype", "kept", "momentum", "affine"), STEPS)
def test_ten_steps_of_training_and_two_of_evaluation(rng, name, last, dtype, kept, momentum, affine):
    """Before each step one of the two is given the state of the other, in turns; the other steps are its own."""
    shape = SHAPES[name]
    a, b = both(len(shape), 5, momentum=momentum, affine=affine, eps=1e-3, dtype=kept)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (a, b) if affine]
    digits = 16 * eps_of(kept)
    for step in range(12):
        training = step < 10
        source, target = (a, b) if step % 2 else (b, a)
        target.load_state_dict(source.state_dict())
        same_state(a.state_dict(), b.state_dict())
        stats = [array(t).astype(np.longdouble) for t in (b.running_mean, b.running_var)]
        x, dy = tensor(rng, shape, dtype, last, mean=step / 3), tensor(rng, shape, dtype, last, mean=0.3)
        xs = [x.clone().requires_grad_() for _ in (a, b)]
        ys = [m.train(training)(t) for m, t in zip((a, b), xs, strict=True)]
        for y in ys:
            y.backward(dy)
        assert ys[1].dtype == xs[1].grad.dtype == x.dtype
        assert ys[1].stride() == xs[1].grad.stride() == x.stride()
        check_step(x, dy, a, b, xs, ys, training=training, stats=stats)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for key in ("running_mean", "running_var"):
            found, other = (array(getattr(m, key)).astype(float) for m in (b, a))
            np.testing.assert_allclose(found, other, rtol=digits, atol=digits, err_msg=key)
        assert int(a.num_batches_tracked) == int(b.num_batches_tracked) == min(step + 1, 10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ten_steps_on_their_own(rng, dtype):
    """Nothing is exchanged: ten times the rounding of a step."""
    a, b = both(4, 5, dtype=dtype)
    x = tensor(rng, SHAPES["N,C,H,W"], dtype)
    for _ in range(10):
        for m in (a, b):
            m.zero_grad()
            (m(x) - x.roll(1, 0)).square().mean().backward()
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.1 * p.grad
    digits = 10 * 16 * eps_of(dtype)
    for key, t in a.state_dict().items():
        np.testing.assert_allclose(b.state_dict()[key].numpy(), t.numpy(), rtol=digits, atol=digits, err_msg=key)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_gradcheck(rng, name, training, affine):
    shape = {"N,C": (4, 3), "N,C,L": (2, 3, 3), "N,C,H,W": (2, 3, 2, 2), "N,C,D,H,W": (2, 2, 2, 1, 2)}[name]
    module = ours.convert(theirs(len(shape), shape[1], affine=affine, dtype="float64")).train(training)
    module.running_mean.fill_(0.5)
    module.running_var.fill_(2.0)
    x = tensor(rng, shape, "float64").requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()), check_undefined_grad=True)


# ------------------------------------------------------------------------------------------------------------- no copy


@pytest.fixture
def calls(monkeypatch):
    """What fastbn's verbs are given and give, by name."""
    found = {}

    def spy(name):
        inner = getattr(ours, name)

        def call(*args, **kwargs):
            result = inner(*args, **kwargs)
            found[name] = args, result[0]
            return result

        monkeypatch.setattr(ours, name, call)

    for name in ("trained", "frozen", "batch_norm_backward"):
        spy(name)
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("name", "last"), FORMATS)
def test_no_tensor_is_copied(rng, calls, name, last, dtype, training):
    shape = SHAPES[name]
    module = ours.convert(theirs(len(shape), 5, dtype=dtype)).train(training)
    x, dy = (tensor(rng, shape, dtype, last) for _ in range(2))
    leaf = x.requires_grad_()
    y = module(leaf)
    args, result = calls["trained" if training else "frozen"]
    given = args[0] if training else args[1]
    assert pointer(given) == x.data_ptr()
    assert np.shares_memory(given, array(x))
    assert np.shares_memory(args[1] if training else args[4], array(module.weight))
    assert pointer(result) == y.data_ptr()
    y.backward(dy)
    (of_dy, saved), dx = calls["batch_norm_backward"]
    assert pointer(of_dy) == dy.data_ptr()
    assert pointer(saved.x) == x.data_ptr()
    assert pointer(dx) == leaf.grad.data_ptr()


PEAK = """
import torch
from pathlib import Path
from fastbn.interop.torch import BatchNorm2d

def peak():
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)

def step(m, x, dy):
    x.grad = None
    y = m(x)
    y.backward(dy)
    return y

for dtype, last in ((torch.float32, False), (torch.bfloat16, True)):
    form = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(16, 32, 112, 112, dtype=dtype).contiguous(memory_format=form) for _ in range(2))
    size = x.nbytes
    for training in (True, False):
        m = BatchNorm2d(32).train(training)
        step(m, x[:4].detach().requires_grad_(), dy[:4])  # compiled and loaded
        import fastbn
        fastbn.empty_pool()
        leaf = x.detach().requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        y = step(m, leaf, dy)
        print((peak() - before) / size)
        del y, leaf
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from Linux's /proc")
@pytest.mark.jit("so many values take minutes as plain Python")
def test_a_step_takes_the_memory_of_its_two_results():
    """13 to 26 MB each; a copy of any tensor would make it three."""
    # What is freed goes back to the system at once, and is not there already when it is taken again.
    found = [float(line) for line in run_script(PEAK, MALLOC_MMAP_THRESHOLD_="1000000").split()]
    assert len(found) == 4
    for tensors in found:
        assert 1.8 < tensors < 2.3, found


SIZES = [
    *((4, 8, 1, 1), (4, 1, 5, 5), (1, 8, 5, 5), (4, 8, 3, 1), (4, 8, 1, 3)),
    pytest.param((16, 64, 40, 40), marks=pytest.mark.jit("so many values take minutes as plain Python")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_next_convolution_sees_the_same_memory_format(shape, dtype):
    """Axes of length 1 leave the strides open, which is what PyTorch goes by; the last shape has a recycled output."""
    if shape[0] == 16:
        ours.BatchNorm2d(64)(torch.rand(shape))  # so that there is one
    for last in (False, True):
        x = torch.rand(shape, dtype=dtype)
        x = x.contiguous(memory_format=LAST[4]) if last else x
        a, b = both(4, shape[1])
        expected, found = a(x), b(x)
        assert found.stride() == expected.stride() == x.stride()
        assert not found._is_view()


VIEWS = {
    "sliced": lambda t: t[:, :, ::2, 1:],
    "every other channel": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(4, -1, -1, -1),
    "transposed": lambda t: t.transpose(2, 3),
    "samples last": lambda t: t.permute(3, 1, 2, 0),
    "offset": lambda t: t[1:],
    "negated bit": lambda t: torch.complex(t, t).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("training", [True, False])
def test_strided_tensors(rng, view, training):
    """Copied at most once, as its page says, and right; so are gradients in another order than x."""
    base = tensor(rng, (4, 6, 8, 8))
    x = VIEWS[view](base)
    if view == "negated bit":
        assert x.is_neg()
    a, b = (m.train(training) for m in both(4, x.shape[1]))
    for weights in (tensor(rng, x.shape), tensor(rng, (x.shape[3], *x.shape[1:3], x.shape[0])).permute(3, 1, 2, 0)):
        found = []
        for m in (a, b):
            leaf = base.clone().requires_grad_()
            y = m(VIEWS[view](leaf))
            y.backward(weights)
            found.append((y.detach(), leaf.grad))
            leaf.grad = None
        for expected, actual in zip(*found, strict=True):
            np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    y = b(x)
    y.sum().backward()  # a gradient that is one number, expanded


# ------------------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needed", [(), ("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")], ids=str)
def test_gradients_of_what_needs_them(rng, needed, training):
    a, b = (m.train(training) for m in both(4, 5))
    x = tensor(rng, SHAPES["N,C,H,W"])
    grads = []
    for m in (a, b):
        leaf = x.clone().requires_grad_("x" in needed)
        m.weight.requires_grad_("weight" in needed)
        m.bias.requires_grad_("bias" in needed)
        y = m(leaf)
        assert y.requires_grad is bool(needed)
        if needed:
            (y * x).sum().backward()
        grads.append([leaf.grad, m.weight.grad, m.bias.grad])
    for name, expected, found in zip(("x", "weight", "bias"), *grads, strict=True):
        assert (found is not None) is (expected is not None) is (name in needed)
        if name in needed:
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_refused(rng):
    module = ours.convert(theirs(2, 3, dtype="float64"))
    x = tensor(rng, (4, 3), "float64").requires_grad_()
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_batched_gradients_are_refused(rng):
    module = ours.convert(theirs(2, 3))
    x = tensor(rng, (4, 3)).requires_grad_()
    y = module(x)
    several = torch.stack([torch.ones_like(y), y.detach()])
    words = "BatchNorm1d: the gradient of the output has no memory of its own, expected one gradient, .*revert"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=words):
        torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(several)


def test_a_graph_can_be_kept_or_used_once(rng):
    module = ours.convert(theirs(2, 3))
    x = tensor(rng, (4, 3)).requires_grad_()
    y = module(x).square().sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_change_in_place_is_noticed(rng):
    module = ours.convert(theirs(2, 3))
    x = tensor(rng, (4, 3)).requires_grad_()
    hidden = x * 1
    y = module(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_change_of_the_weight_before_the_backward_does_no_harm(rng):
    """The graph has the weight of the forward."""
    module = ours.convert(theirs(2, 3))
    x = tensor(rng, (4, 3)).requires_grad_()
    dy = tensor(rng, (4, 3))
    (expected,) = torch.autograd.grad(module(x), x, dy)
    y = module(x)
    with torch.no_grad():
        module.weight.mul_(3)
    (found,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(found, expected)


def test_what_is_saved_goes_through_hooks(rng):
    """Those that keep it elsewhere, too, in another memory order."""
    module = ours.convert(theirs(4, 5))
    x, dy = (tensor(rng, SHAPES["N,C,H,W"]) for _ in range(2))
    results = []
    for hooks in (False, True):
        seen = []

        def pack(t, seen=seen):
            seen.append(t.data_ptr())
            return t.numpy().copy()

        def unpack(a):
            return torch.from_numpy(a).contiguous(memory_format=torch.channels_last)

        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack) if hooks else contextlib.nullcontext():
            y = module(leaf)
        y.backward(dy)
        results.append(leaf.grad)
        assert seen == [leaf.data_ptr()] * hooks
    np.testing.assert_allclose(results[1].numpy(), results[0].numpy(), rtol=1e-5, atol=1e-6)


def kept(module, x, after=lambda y: None):
    """Whether the memory of x lives on when only y is left."""
    memory = np.array(x)
    alive = weakref.ref(memory)
    t = torch.from_numpy(memory).requires_grad_(torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
    y = module(t * 1 if t.requires_grad else t)
    if t.requires_grad:  # what is kept is the tensor behind t * 1
        t = torch.from_numpy(memory)
        y = module(t)
    after(y)
    del t, memory
    return alive() is not None


@pytest.mark.parametrize("training", [True, False])
def test_memory_is_kept_for_the_backward_alone(rng, training):
    module = ours.convert(theirs(2, 3)).train(training)
    x = rng.normal(size=(4, 3)).astype("float32")
    assert kept(module, x)
    assert not kept(module, x, lambda y: y.sum().backward())
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert not kept(module, x)
            y = module(torch.from_numpy(x))
        assert y.grad_fn is None
        assert not y.requires_grad
    module.requires_grad_(False)
    assert not kept(module, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_may_be_changed_in_place(rng, dtype):
    """As ReLU(inplace=True) does behind most batch norms."""
    x = tensor(rng, SHAPES["N,C,H,W"]).to(dtype)
    grads = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        module = ours.convert(theirs(4, 5))
        nn.ReLU(inplace=inplace)(module(leaf)).float().square().sum().backward()
        grads.append((leaf.grad, module.weight.grad))
    for expected, found in zip(*grads, strict=True):
        assert torch.equal(found, expected)


def test_autocast(rng):
    """Convolutions then give bfloat16, and parameters stay float32."""
    a = nn.Sequential(nn.Conv2d(3, 4, 3), theirs(4, 4))
    b = ours.convert(copy.deepcopy(a))
    x = tensor(rng, (2, 3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = a(x), b(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    for y in (expected, found):
        y.float().square().mean().backward()
    np.testing.assert_allclose(array(found.float()), array(expected.float()), rtol=0.02, atol=0.02)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        np.testing.assert_allclose(q.grad.numpy(), p.grad.numpy(), rtol=0.05, atol=0.05)


def test_accumulated_gradients(rng):
    """Two backwards into the same .grad, and the same module twice in one graph."""
    a, b = both(2, 3, dtype="float64")
    x = tensor(rng, (6, 3), "float64")
    for m in (a, b):
        for part in (x[:4], x[2:]):
            m(m(part)).square().sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        np.testing.assert_allclose(q.grad.numpy(), p.grad.numpy(), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- modules


class Own(nn.BatchNorm2d):
    """A user's class."""


def model():
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), shared, nn.Sequential(nn.ReLU(), shared), Own(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm2d(),
        nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.BatchNorm1d(36),
    )  # fmt: skip


def test_convert_and_revert():
    m = model()
    before, everything = [type(x) for x in m.modules()], list(m.modules())
    parameters = [id(p) for p in m.parameters()]
    assert ours.convert(m) is m
    found = [type(x) for x in m.modules()]
    swaps = {nn.BatchNorm2d: ours.BatchNorm2d, nn.BatchNorm1d: ours.BatchNorm1d}
    assert found == [swaps.get(t, t) for t in before]
    assert found.count(ours.BatchNorm2d) == 1  # the shared one
    assert m[1] is m[2][1]
    assert [id(x) for x in m.modules()] == [id(x) for x in everything]
    assert [id(p) for p in m.parameters()] == parameters
    assert isinstance(m[1], nn.BatchNorm2d)
    ours.convert(m)
    assert [type(x) for x in m.modules()] == found
    assert ours.revert(m) is m
    assert [type(x) for x in m.modules()] == before
    assert [id(p) for p in m.parameters()] == parameters


@pytest.mark.parametrize("rank", [2, 4, 5])
def test_a_module_itself(rank):
    module = theirs(rank, 3)
    kind = type(module)
    assert ours.convert(module) is module
    assert type(module) is getattr(ours, kind.__name__)
    assert type(ours.revert(module)) is kind
    assert type(getattr(ours, kind.__name__)(3)) is getattr(ours, kind.__name__)


def test_lazy_modules_can_be_converted_after_their_first_call():
    m = ours.convert(nn.Sequential(nn.LazyBatchNorm2d()))
    assert type(m[0]) is nn.LazyBatchNorm2d
    m(torch.rand(2, 3, 4, 4))
    assert type(m[0]) is nn.BatchNorm2d
    assert type(ours.convert(m)[0]) is ours.BatchNorm2d


def test_parametrized_modules_are_left_alone():
    module = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
    kind = type(module)
    assert type(ours.convert(module)) is kind is not nn.BatchNorm2d


@pytest.mark.parametrize("turn", ["convert", "revert"])
def test_only_modules_can_be_turned(turn):
    with pytest.raises(TypeError, match=rf"{turn}: model is of type dict, expected a torch.nn.Module"):
        getattr(ours, turn)({})


def test_an_optimizer_made_before_goes_on(rng):
    a = nn.Sequential(nn.Linear(4, 3), theirs(2, 3))
    b = copy.deepcopy(a)
    x = tensor(rng, (6, 4))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (a, b)]
    for step in range(6):
        if step == 2:
            ours.convert(b)
        if step == 4:
            ours.revert(b)
        for m, optimizer in zip((a, b), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        np.testing.assert_allclose(q.detach().numpy(), p.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_hooks_stay(rng):
    module = theirs(2, 3)
    met = []
    module.register_forward_pre_hook(lambda *_: met.append("before"))
    module.register_forward_hook(lambda *_: met.append("after"))
    module.register_full_backward_hook(lambda *_: met.append("backward"))
    ours.convert(module)(tensor(rng, (4, 3)).requires_grad_()).sum().backward()
    assert met == ["before", "after", "backward"]


def copies(module):
    """The ways to make a second one."""
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    yield torch.load(saved, weights_only=False)


def test_copies(rng):
    module = ours.convert(theirs(4, 3, eps=1e-2, momentum=None)).eval()
    module.weight.requires_grad_(False)
    module.train()(tensor(rng, (2, 3, 4, 4)))
    module.eval()
    x = tensor(rng, (2, 3, 4, 4))
    for other in copies(module):
        assert type(other) is ours.BatchNorm2d
        assert (other.eps, other.momentum, other.training) == (1e-2, None, False)
        assert [p.requires_grad for p in other.parameters()] == [False, True]
        same_state(other.state_dict(), module.state_dict())
        assert torch.equal(other(x), module(x))
        other.train()(x)
        assert int(module.num_batches_tracked) == 1  # they share nothing


def test_representation():
    module = nn.BatchNorm2d(3, eps=1e-2)
    assert repr(ours.convert(copy.deepcopy(module))) == f"fastbn.{module!r}"


def test_moves_between_dtypes_and_devices(rng):
    a, b = both(4, 5)
    for m in (a, b):
        m.double()
    same_state(a.state_dict(), b.state_dict())
    x = tensor(rng, SHAPES["N,C,H,W"], "float64")
    np.testing.assert_allclose(b(x).detach().numpy(), a(x).detach().numpy(), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"BatchNorm2d: input is on meta, expected cpu; .*revert"):
        b(x.to("meta"))
    b.to("meta")
    with pytest.raises(ValueError, match="BatchNorm2d: weight is on meta, expected cpu"):
        b(x)


@pytest.mark.parametrize(("rank", "wrong"), [(2, (3,)), (2, (2, 3, 4, 5)), (4, (2, 3, 4)), (5, (2, 3, 4, 4))])
def test_ranks_are_refused_as_pytorch_does(rank, wrong):
    a, b = both(rank, 3)
    with pytest.raises(ValueError, match=r"expected .*D input") as expected:
        a(torch.rand(wrong))
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        b(torch.rand(wrong))


@pytest.mark.parametrize(
    ("module", "x", "error", "match"),
    [
        (nn.BatchNorm1d(3), torch.rand(1, 3), ValueError, "BatchNorm1d: x has one value per channel"),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), torch.rand(1, 3, 1, 1), ValueError, "one value per"),
        (nn.BatchNorm2d(3), torch.rand(2, 4, 5, 5), ValueError, "BatchNorm2d: input has 4 channels, expected 3"),
        (nn.BatchNorm2d(1), torch.rand(2, 4, 5, 5), ValueError, "BatchNorm2d: input has 4 channels, expected 1"),
        (nn.BatchNorm1d(3, affine=False), torch.rand(2, 4), ValueError, "BatchNorm1d: input has 4 channels"),
        (nn.BatchNorm1d(3), torch.ones(2, 3, dtype=torch.complex64), TypeError, r"dtype torch\.complex64, expected"),
        (nn.BatchNorm1d(3), torch.ones(2, 3, dtype=torch.int32), TypeError, r"dtype torch\.int32, expected a floating"),
    ],
)
def test_a_call_that_is_refused_changes_nothing(module, x, error, match):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=match):
        ours.convert(module)(x)
    same_state(module.state_dict(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0}, {"momentum": 1.0}, {"momentum": 1.5}, {"momentum": None}, {"track_running_stats": False},
        {"affine": False, "track_running_stats": False}, {"eps": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_options(rng, options):
    a, b = both(4, 5, dtype="float64", **options)
    for training in (True, True, False):
        x = tensor(rng, SHAPES["N,C,H,W"], "float64")
        found, expected = (m.train(training)(x).detach().numpy() for m in (b, a))
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    assert list(a.state_dict()) == list(b.state_dict())
    for key, t in a.state_dict().items():
        np.testing.assert_allclose(b.state_dict()[key].numpy(), t.numpy(), rtol=1e-12, atol=1e-12, err_msg=key)


def test_batches_of_several_sizes_are_averaged_as_pytorch_does(rng):
    """momentum=None, which in fastbn's own layer pools samples."""
    a, b = both(2, 3, momentum=None, dtype="float64")
    for n in (10, 2, 5):
        x = tensor(rng, (n, 3), "float64")
        a(x)
        b(x)
    np.testing.assert_allclose(b.running_var.numpy(), a.running_var.numpy(), rtol=1e-12)
    np.testing.assert_allclose(b.running_mean.numpy(), a.running_mean.numpy(), rtol=1e-12)


def test_buffers_that_are_taken_away(rng):
    """What PyTorch does with a module that has no counter, or none of the statistics."""
    for names, momentum in ((["num_batches_tracked"], 0.1), (["num_batches_tracked"], None),
                            (["running_mean", "running_var"], 0.1)):  # fmt: skip
        a, b = both(2, 3, momentum=momentum, dtype="float64")
        for m in (a, b):
            for name in names:
                setattr(m, name, None)
        for training in (True, False):
            x = tensor(rng, (4, 3), "float64")
            found, expected = (m.train(training)(x).detach().numpy() for m in (b, a))
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
        for key, t in a.state_dict().items():
            np.testing.assert_allclose(b.state_dict()[key].numpy(), t.numpy(), rtol=1e-12)


def test_a_module_without_a_bias(rng):
    a, b = both(2, 3, dtype="float64")
    x = tensor(rng, (4, 3), "float64")
    for m in (a, b):
        m.bias = None
        m(x).square().sum().backward()
    np.testing.assert_allclose(b.weight.grad.numpy(), a.weight.grad.numpy(), rtol=1e-9)
    assert ours.from_torch(b).beta is None


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_an_empty_batch(shape):
    a, b = both(4, 3)
    for m in (a, b):
        y = m(torch.rand(shape).requires_grad_())
        y.sum().backward()
        assert y.shape == shape
    same_state(a.state_dict(), b.state_dict())
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_running_statistics_tell_autograd_that_they_have_changed(rng):
    module = ours.convert(theirs(2, 3))
    buffers = [module.running_mean, module.running_var, module.num_batches_tracked]
    before = [t._version for t in buffers]
    module(tensor(rng, (4, 3)))
    assert [t._version for t in buffers] == [v + 1 for v in before]
    pointers = [t.data_ptr() for t in buffers]
    assert [t.data_ptr() for t in (module.running_mean, module.running_var, module.num_batches_tracked)] == pointers


def test_a_module_made_in_inference_mode(rng):
    with torch.inference_mode():
        module = ours.BatchNorm1d(3)
        module(tensor(rng, (4, 3)))
    with torch.no_grad():
        module(tensor(rng, (4, 3)))
    assert int(module.num_batches_tracked) == 2


def test_update_bn(rng):
    """PyTorch's own way to measure the statistics anew knows converted modules."""
    a, b = both(2, 3, dtype="float64")
    batches = [tensor(rng, (n, 3), "float64") for n in (4, 6)]
    for m in (a, b):
        torch.optim.swa_utils.update_bn(batches, m)
    np.testing.assert_allclose(b.running_var.numpy(), a.running_var.numpy(), rtol=1e-12)
    assert b.momentum == 0.1


# ---------------------------------------------------------------------------------------- where PyTorch transforms code


@pytest.fixture
def pair(rng):
    """A model in evaluation, a converted copy, an input and the right answer."""
    a = nn.Sequential(nn.Conv2d(3, 4, 3), theirs(4, 4), nn.ReLU(inplace=True)).eval()
    a[1].running_mean.fill_(0.3)
    x = tensor(rng, (2, 3, 6, 6))
    return ours.convert(copy.deepcopy(a)), x, a(x).detach()


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_compile_takes_pytorchs_own(pair, calls):
    b, x, expected = pair
    close(torch.compile(b, backend="eager", fullgraph=True)(x), expected)
    assert not calls
    b(x)
    assert calls


# torch.jit is deprecated: a DeprecationWarning up to 2.13, a FutureWarning from 2.14 on.
JIT_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.torch.jit:FutureWarning")


@JIT_WARNS
def test_traces_take_pytorchs_own(pair, calls):
    b, x, expected = pair
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(b, x, check_trace=False), file)  # the check runs b itself
    assert not calls
    file.seek(0)
    close(torch.jit.load(file)(x), expected)


@JIT_WARNS
def test_scripts_need_a_reverted_model(pair):
    b, x, expected = pair
    kinds = [type(m) for m in b.modules()]
    with pytest.raises(
        RuntimeError, match=r"BatchNorm2d: torch.jit.script cannot compile it; expected .*revert\(model\)"
    ):
        torch.jit.script(b)
    assert [type(m) for m in b.modules()] == kinds
    close(torch.jit.script(ours.revert(b))(x), expected)


def test_export_takes_pytorchs_own(pair):
    b, x, expected = pair
    program = torch.export.export(b, (x,))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)
    close(program.module()(x), expected)


def test_vmap_and_func_take_pytorchs_own(pair, calls):
    b, x, expected = pair
    close(torch.vmap(lambda v: b(v[None])[0])(x), expected)
    gradient = torch.func.grad(lambda v: b(v).sum())(x)
    assert not calls
    leaf = x.clone().requires_grad_()
    b(leaf).sum().backward()
    close(gradient, leaf.grad)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_other_layouts_take_pytorchs_own(pair, calls):
    b, x, expected = pair
    found = b[1](b[0](x).to_mkldnn())
    assert not calls
    assert found.layout is torch._mkldnn
    close(found.to_dense().relu(), expected)


@JIT_WARNS  # PyTorch's own forward mode scripts itself
@pytest.mark.parametrize("of", ["input", "weight"])
@pytest.mark.parametrize("records", [True, False])
def test_forward_mode_takes_pytorchs_own(pair, calls, of, records):
    b, x, _ = pair
    tangents = []
    for turned in (b, ours.revert(copy.deepcopy(b))):
        turned.requires_grad_(records)
        with forward_ad.dual_level():
            t = forward_ad.make_dual(x, x.cos()) if of == "input" else x
            w = turned[1].weight.detach()
            parameters = {"1.weight": forward_ad.make_dual(w, w + 2.0)} if of == "weight" else {}
            y = torch.func.functional_call(turned, parameters, (t,))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert not calls
    assert tangents[0] is not None
    assert torch.equal(*tangents)


def test_symbolic_traces_need_a_reverted_model(pair):
    b, x, expected = pair
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(b)
    close(torch.fx.symbolic_trace(ours.revert(b))(x), expected)


def test_subclasses_of_tensors_take_pytorchs_own(pair, calls):
    class Marked(torch.Tensor):
        pass

    b, x, expected = pair
    found = b[1](b[0](x).as_subclass(Marked))
    assert not calls
    assert type(found) is Marked
    close(found.as_subclass(torch.Tensor).relu(), expected)


# ------------------------------------------------------------------------------------------------------ layers and back


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
@pytest.mark.parametrize("rank", [2, 4, 5])
def test_a_layer_from_a_module_goes_on_as_the_module(rng, rank, momentum):
    shape = {2: (6, 3), 4: (2, 3, 4, 4), 5: (2, 3, 2, 2, 2)}[rank]
    module = theirs(rank, 3, momentum=momentum, eps=1e-2, dtype="float64")
    x = [tensor(rng, shape, "float64") for _ in range(3)]
    module(x[0])
    layer = ours.from_torch(module)
    assert (layer.eps, layer.correction, layer.training, layer.num_batches_tracked) == (1e-2, 1, True, 1)
    assert layer.momentum == (None if momentum is None else 1 - momentum)
    np.testing.assert_array_equal(layer.running_var, module.running_var.numpy())
    if momentum is not None:
        np.testing.assert_allclose(layer(x[1].numpy()), module(x[1]).detach().numpy(), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(layer.running_var, module.running_var.numpy(), rtol=1e-12)
    close_to = module.eval()(x[2]).detach().numpy()
    np.testing.assert_allclose(layer.eval()(x[2].numpy()), close_to, rtol=1e-10, atol=1e-10)
    assert not ours.from_torch(module).training
    layer.gamma[...] = 7  # a copy
    assert not (module.weight == 7).any()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")]
)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_what_a_layer_has_is_what_the_module_has(options, dtype, expected):
    module = theirs(4, 3, dtype=dtype, **options)
    layer = ours.from_torch(module)
    assert layer.dtype == expected
    names = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
    for own, name in names.items():
        t, a = getattr(module, name), getattr(layer, own)
        assert (a is None) is (t is None)
        if t is not None:
            np.testing.assert_array_equal(a, t.detach().to(getattr(torch, expected)).numpy())
    assert layer.channels == (3,)


def test_from_a_module_with_nothing_in_it():
    layer = ours.from_torch(nn.BatchNorm2d(3, affine=False, track_running_stats=False), axis=-1, eps=0.5, momentum=0.8)
    assert (layer.channels, layer.axis, layer.eps, layer.momentum) == ((3,), -1, 0.5, 0.8)


def test_layers_of_a_model(rng):
    m = model()
    m = nn.Sequential(*[x for x in m if not isinstance(x, nn.LazyBatchNorm2d)])
    found = ours.from_torch(ours.convert(m))
    assert list(found) == ["1", "2.1", "3", "4", "8"]
    assert found["1"] is found["2.1"]
    assert found["8"].channels == (36,)
    same = ours.from_torch(m.state_dict(), eps=1e-3, momentum=0.5, axis=-1)
    assert list(same) == list(found)
    assert {(x.eps, x.momentum, x.axis) for x in same.values()} == {(1e-3, 0.5, -1)}
    state = ours.to_torch(found, dims=None)
    assert set(state) <= set(m.state_dict())
    for key, t in state.items():
        assert torch.equal(t, m.state_dict()[key])
    m.load_state_dict(state, strict=False)
    modules = ours.to_torch(found, dims=1)
    assert {type(x) for x in modules.values()} == {nn.BatchNorm1d}


def test_a_state_dict_of_one_layer():
    module = theirs(4, 3)
    layer = ours.from_torch(module.state_dict())
    assert (layer.eps, layer.momentum) == (1e-5, 0.9)
    same_state(ours.to_torch(layer, dims=None), dict(module.state_dict()))
    old = {k: t for k, t in module.state_dict().items() if k != "num_batches_tracked"}  # of PyTorch before 0.4.1
    assert ours.from_torch(old).num_batches_tracked == 0


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ({"gamma": torch.ones(3)}, ValueError, "source has the key 'gamma', expected weight, bias"),
        ({"running_mean": torch.ones(3)}, ValueError, "source has running_mean, expected running_mean and running_var"),
        ({}, ValueError, "source has no keys"),
        ({"conv.weight": torch.ones(3)}, ValueError, "no key that ends in .running_mean"),
        ([1], TypeError, "source is of type list, expected a torch.nn.Module or a state dict"),
        (nn.LazyBatchNorm2d(), ValueError, "LazyBatchNorm2d has no parameters yet"),
        (
            {"weight": torch.ones(3), "bias": torch.ones(4)},
            ValueError,
            r"from_torch: bias has shape \(4,\), expected \(3,\)",
        ),
        (
            {"weight": torch.ones(3), "bias": torch.ones(1)},
            ValueError,
            r"from_torch: bias has shape \(1,\), expected \(3,\)",
        ),
        (nn.Linear(2, 2).state_dict(), ValueError, r"from_torch: weight has shape \(2, 2\), expected \(C,\)"),
        ({"weight": np.ones(3)}, TypeError, "from_torch: weight is of type ndarray, expected a tensor"),
        ({"a.running_mean": 3}, TypeError, "from_torch: a.running_mean is of type int, expected a tensor"),
    ],
)
def test_what_is_no_batch_norm(source, error, match):
    with pytest.raises(error, match=match):
        ours.from_torch(source)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.7, None])
def test_a_module_from_a_layer(rng, dims, dtype, momentum):
    layer = fastbn.BatchNorm(3, dtype=dtype, eps=1e-2, momentum=momentum)
    layer.gamma[...], layer.beta[...] = rng.normal(size=(2, 3))
    shape = (4, 3, 2, 2, 2)[: dims + 2]
    for _ in range(2):
        layer(rng.normal(size=shape).astype(dtype))
    module = ours.to_torch(layer, dims=dims)
    assert type(module) is (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    assert {t.dtype for t in module.state_dict().values()} == {getattr(torch, dtype), torch.int64}
    assert (module.eps, module.training, int(module.num_batches_tracked)) == (1e-2, True, 2)
    assert module.momentum == (None if momentum is None else pytest.approx(0.3))
    x = rng.normal(size=shape).astype(dtype)
    digits = 16 * np.finfo(dtype).eps
    found = module.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, layer.eval()(x), rtol=digits, atol=digits)
    assert not ours.to_torch(layer).training
    with torch.no_grad():
        module.weight.fill_(7)
    assert not (layer.gamma == 7).any()


@pytest.mark.parametrize(("center", "scale"), [(True, False), (False, True), (False, False)])
def test_what_the_layer_has_not_is_not_trained(center, scale):
    module = ours.to_torch(fastbn.BatchNorm(3, center=center, scale=scale, track_running_stats=False))
    assert module.affine is (center or scale)
    assert not module.track_running_stats
    if module.affine:
        assert (module.weight.requires_grad, module.bias.requires_grad) == (scale, center)
        assert (module.weight == 1).all()
        assert not module.bias.any()


@pytest.mark.parametrize(
    ("layer", "dims", "error", "match"),
    [
        (fastbn.BatchNorm((3, 4), axis=(1, 2)), 2, ValueError, r"layer has channels \(3, 4\), expected one"),
        (fastbn.BatchNorm(3, activation="relu"), 2, ValueError, "activation='relu', expected none"),
        (fastbn.BatchNorm(3), 4, ValueError, "dims is 4, expected 1, 2, 3 or None"),
        (fastbn.BatchNorm(3), True, ValueError, "dims is True, expected"),
        (nn.BatchNorm2d(3), 2, TypeError, "layer is of type BatchNorm2d, expected a BatchNorm or a mapping"),
    ],
)
def test_what_pytorch_has_not(layer, dims, error, match):
    with pytest.raises(error, match=f"to_torch: .*{match}"):
        ours.to_torch(layer, dims=dims)


# ----------------------------------------------------------------------------------- packages, page, measuring script


def test_without_pytorch_the_error_says_what_to_install():
    script = """
import sys
sys.modules["torch"] = None
try:
    import fastbn.interop.torch
except ImportError as error:
    print(error)
"""
    assert run_script(script) == 'fastbn.interop.torch needs torch: pip install "fastbn[torch]"\n'


def test_without_ml_dtypes_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    module = ours.BatchNorm1d(3)
    module(torch.rand(4, 3))
    with pytest.raises(ImportError, match=r'bfloat16 needs ml_dtypes: pip install "fastbn\[torch\]"'):
        module(torch.rand(4, 3, dtype=torch.bfloat16))


def test_examples_in_docstrings():
    import doctest

    for thing in (ours.convert, ours.from_torch, ours.to_torch):
        (test,) = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, module=False, globs={})
        assert test.examples
        result = doctest.DocTestRunner().run(test)
        assert not result.failed, thing.__name__


def test_the_code_of_the_how_to_prints_what_its_comments_say():
    pages.check("how-to/pytorch.md")


EXAMPLES = ROOT / "docs" / "examples"


@pytest.mark.jit("the script measures compiled code")
def test_the_measuring_script_prints_figures():
    arguments = "--quick", "--markdown", "--channels-last"
    printed = run_python(str(EXAMPLES / "torch_resnet18.py"), *arguments, NUMBA_NUM_THREADS="1")
    rows = re.findall(r"^\| (PyTorch|fastbn) \| (.*) \|$", printed, re.M)
    assert [name for name, _ in rows] == ["PyTorch", "fastbn"]
    for _, cells in rows:
        step, forward, backward, share, _, ratio, least, most = (float(c.rstrip("%")) for c in cells.split(" | "))
        assert 0 < forward + backward < 1e3 * step
        assert 0 < share < 100
        assert 0 < least <= ratio <= most
    assert "4 x 3 x 32 x 32 float32, channels_last" in printed
    assert "Losses differ by" in printed
    assert "torch " in printed


@pytest.fixture
def script(monkeypatch):
    """The script, on one thread."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(fastbn, "get_num_threads", lambda: 1)
    threads = torch.get_num_threads()
    yield importlib.import_module("torch_resnet18")
    torch.set_num_threads(threads)
    for name in ("torch_resnet18", "report"):
        sys.modules.pop(name, None)


def test_the_network_of_the_script_is_a_resnet_18(script):
    """Its parameters are as many as the paper's network has, 11.7 million; 20 batch norms, 21 layers with weights."""
    net = script.resnet18()
    assert sum(p.numel() for p in net.parameters()) == 11_689_512
    kinds = [type(m) for m in net.modules()]
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.Conv2d) == 20
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 1000)


@pytest.mark.jit("a network takes long as plain Python")
def test_the_watch_of_the_script_is_on_all_batch_norms(script, monkeypatch):
    """By a clock that ticks once each time it is looked at: a forward or backward of each takes one tick."""
    ticks = itertools.count()
    monkeypatch.setattr(script.time, "perf_counter", lambda: float(next(ticks)))
    for turn in (ours.revert, ours.convert):
        net = turn(script.resnet18(4))
        trained = script.Trained(net, torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
        for _ in range(2):
            assert trained.step()[1] == (81, 20, 20)


@pytest.mark.jit("a network takes long as plain Python")
def test_the_script_notices_losses_that_do_not_agree(script, monkeypatch, capsys):
    def wrong(model):
        ours.convert(model)
        with torch.no_grad():
            model[1].weight.mul_(1.1)
        return model

    monkeypatch.setattr(script, "convert", wrong)
    with pytest.raises(SystemExit, match="losses do not agree"):
        script.main(["--quick"])
    capsys.readouterr()
