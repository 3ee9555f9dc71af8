"""PyTorch's own samples of batch norm, from its wheel: OpInfo's of the operators, ModuleInfo's of the layers.

Each sample goes through PyTorch in float64 and through fastbn in the sample's dtype: outputs, statistics and gradients
differ by no more than fastbn's error budget (twice that for float64, in which PyTorch errs too).
"""

import warnings
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import reference
from arrays import FLOATS, HALVES
from hypothesis import settings
from strategies import PROFILE

import fastbn

torch = pytest.importorskip("torch", reason="PyTorch is not installed: its samples come with it")

# The arguments after the input, as each operator orders them.
STATISTICS, PARAMETERS = ("running_mean", "running_var"), ("weight", "bias")
NATIVE = (*PARAMETERS, *STATISTICS, "training", "momentum", "eps")
ARGUMENTS = {
    "nn.functional.batch_norm": (*STATISTICS, *PARAMETERS, "training", "momentum", "eps"),
    "native_batch_norm": NATIVE,
    "_native_batch_norm_legit": NATIVE,
    "_batch_norm_with_update": tuple(name for name in NATIVE if name != "training"),
}
# PyTorch's names of a layer's arrays.
NAMES = {"weight": "gamma", "bias": "beta"}


def skipped(reason, **name):
    return pytest.param(None, None, marks=pytest.mark.skip(reason=reason), **name)


def cases(listed):
    """What a function lists; one skipped case where it cannot."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(20150211)
            found = list(listed())
    except Exception as error:  # these modules are private: they may move, or need what is not installed (expecttest)
        return [skipped(f"PyTorch's samples cannot be had: {error!r}", id="none")]
    finally:
        settings.load_profile(PROFILE)  # these modules load one of their own, another one where CI is set
    return found or [skipped("PyTorch has no such samples", id="none")]


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def operators():
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if "batch_norm" in op.name]


def modules():
    from torch.testing._internal.common_modules import module_db

    layers = torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d
    return [m for m in module_db if m.module_cls in layers]


def operator_samples():
    for op in operators():
        if op.name not in ARGUMENTS:
            yield skipped("an operator whose arguments are not known here", id=op.full_name)
        elif not op.dtypes:
            yield skipped("is for other devices than the CPU", id=op.full_name)
        for dtype in sorted(op.dtypes, key=str):
            if dtype_name(dtype) not in FLOATS + HALVES:
                yield skipped(f"fastbn has no {dtype_name(dtype)}", id=f"{op.full_name}-{dtype_name(dtype)}")
                continue
            for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
                yield pytest.param(op, sample, id=f"{op.full_name}-{dtype_name(dtype)}-{i}")


def module_samples():
    for info in modules():
        for dtype in sorted(info.dtypes, key=str):
            if dtype_name(dtype) not in FLOATS + HALVES:
                yield skipped(f"fastbn has no {dtype_name(dtype)}", id=f"{info.name}-{dtype_name(dtype)}")
                continue
            for training in (True, False):
                inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
                for i, sample in enumerate(inputs):
                    mode = "train" if training else "eval"
                    name = f"{info.name}-{dtype_name(dtype)}-{mode}-{sample.desc or i}"
                    yield pytest.param((info.module_cls, training), sample, id=name)


def module_errors():
    for info in modules():
        if info.module_error_inputs_func is None:
            yield skipped("PyTorch lists no errors of this module", id=info.name)
            continue
        errors = info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=True)
        for i, error in enumerate(errors):
            yield pytest.param(info.module_cls, error, id=f"{info.name}-{i}")


def array(tensor):
    """A copy; NumPy has bfloat16 by way of ml_dtypes alone."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.detach().numpy().copy()


def double(a):
    """A tensor in float64."""
    return torch.from_numpy(a.astype(np.float64))


def kept(a):
    """A running statistic, which is float32 at least."""
    return a.astype(reference.parameter_dtype(a.dtype))


def wide(value):
    """A tensor in float64, with a gradient of its own; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(torch.float64, copy=True).requires_grad_(value.requires_grad)


def bound(op, sample):
    """What a sample gives to each argument of its operator, by name."""
    names = ARGUMENTS[op.name]
    if len(sample.args) == len(names) - 2 and op.name == "_native_batch_norm_legit":  # the form without statistics
        names = tuple(n for n in names if n not in STATISTICS)
    defaults = {**dict.fromkeys((*STATISTICS, *PARAMETERS)), "momentum": 0.1, "eps": 1e-5}
    defaults["training"] = op.name == "_batch_norm_with_update"
    return SimpleNamespace(**{**defaults, **dict(zip(names, sample.args, strict=False)), **sample.kwargs})


def budgets(dy, x, gamma, beta, *, axis=1, eps, fixed=None):
    """The error budget of each result; `fixed`: the mean and variance that were given."""
    if not x.size:
        exact = reference.tolerance(x.dtype, 0)
        return SimpleNamespace(y=exact, dx=exact, weight=exact, bias=exact)
    gamma, beta = 1.0 if gamma is None else gamma, 0.0 if beta is None else beta
    if fixed is None:
        forward = reference.train(x, gamma, beta, axis=axis, eps=eps)
    else:
        forward = reference.infer(x, *fixed, gamma, beta, axis=axis, eps=eps)
    back = reference.backward(dy, x, gamma, axis=axis, eps=eps, fixed=fixed)
    return SimpleNamespace(y=forward.budget, dx=back.dx_budget, weight=back.dgamma_budget, bias=back.dbeta_budget)


def assert_within(found, expected, budget, what):
    """`expected` is PyTorch's in float64, which counts as exact where fastbn's is in float32."""
    share = 2 if found.dtype == np.float64 else 1
    reference.assert_within(found, array(expected), share * budget, what)


def assert_moved(found, expected, old, x, axis, momentum):
    """The running statistics: two terms with 14 digits, and one rounding of their sum."""
    mean, var = reference.mean_var(x, axis)
    n = reference.count(x, axis)
    batch = abs(mean) + np.sqrt(var), var * n / (n - 1)
    for name, a, b, t, new in zip(STATISTICS, found, old, expected, batch, strict=True):
        budget = reference.tolerance(a.dtype, abs(array(t)), abs(momentum * b) + (1 - momentum) * new)
        assert_within(a, t, budget, name)


@pytest.mark.parametrize(("op", "sample"), cases(operator_samples))
def test_operators(rng, op, sample):
    given = bound(op, sample)
    x, gamma, beta = array(sample.input), array(given.weight), array(given.bias)
    old = [array(given.running_mean), array(given.running_var)]
    dy = rng.normal(size=x.shape).astype(x.dtype)
    axis = min(1, x.ndim - 1)  # one sample has no channel axis: 0 channels

    tx, *targs = (wide(t) for t in (sample.input, *sample.args))
    outputs = op(tx, *targs, **sample.kwargs)
    ty = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    ty.backward(double(dy))
    theirs = bound(op, SimpleNamespace(args=targs, kwargs=sample.kwargs))

    if given.training:
        y, saved = fastbn.batch_norm_train(x, gamma, beta, axis=axis, eps=given.eps)
    else:
        y = fastbn.batch_norm(x, *old, gamma, beta, axis=axis, eps=given.eps)
        saved = fastbn.Saved.fixed(x, *old, gamma, beta, axis=axis, eps=given.eps)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, saved)
    budget = budgets(dy, x, gamma, beta, axis=axis, eps=given.eps, fixed=None if given.training else old)
    assert y.dtype == dx.dtype == x.dtype
    assert_within(y, ty, budget.y, "y")
    assert_within(dx, tx.grad, budget.dx, "dx")
    if gamma is not None:
        assert_within(dgamma, theirs.weight.grad, budget.weight, "dgamma")
    if beta is not None:
        assert_within(dbeta, theirs.bias.grad, budget.bias, "dbeta")

    if not given.training:
        np.testing.assert_array_equal([array(theirs.running_mean), array(theirs.running_var)], old)
        return
    if not isinstance(outputs, torch.Tensor):
        digits = reference.tolerance(np.float64, 0, abs(saved.mean) + np.sqrt(saved.var))
        assert_within(saved.mean, outputs[1], digits, "mean")
        invstd = np.float64(reference.invstd(saved.var, given.eps))
        assert_within(invstd, outputs[2], reference.tolerance(np.float64, invstd, invstd), "invstd")
    if given.running_mean is None or not x.size:
        return
    old = [kept(a) for a in old]
    moved, momentum = [a.copy() for a in old], 1 - given.momentum
    if 0 <= momentum <= 1:
        fastbn.update_running(*moved, saved.moments, momentum=momentum)
        assert_moved(moved, [theirs.running_mean, theirs.running_var], old, x, axis, momentum)
    else:  # an average in which the batch has a negative weight
        with pytest.raises(ValueError, match="update_running: momentum"):
            fastbn.update_running(*moved, saved.moments, momentum=momentum)
        np.testing.assert_array_equal(moved, old)


def layer_like(module, dtype):
    return fastbn.BatchNorm(
        module.num_features,
        eps=module.eps,
        momentum=None if module.momentum is None else 1 - module.momentum,
        center=module.bias is not None,
        scale=module.weight is not None,
        track_running_stats=module.track_running_stats,
        dtype=dtype,
    )


def made(module_cls, sample):
    return module_cls(*sample.constructor_input.args, **sample.constructor_input.kwargs)


@pytest.mark.parametrize(("module", "sample"), cases(module_samples))
def test_modules(rng, module, sample):
    """From a state of PyTorch's: a call and its backward; then fastbn's state goes back into PyTorch."""
    (module_cls, training), (tx,) = module, sample.forward_input.args
    x = array(tx)
    dy = rng.normal(size=x.shape).astype(x.dtype)
    theirs = made(module_cls, sample).double().train(training)
    with torch.no_grad():
        for name, t in theirs.state_dict().items():
            if t.ndim:
                drawn = rng.uniform(0.5, 2, t.shape) if name == "running_var" else rng.normal(size=t.shape)
                t.copy_(double(drawn.astype(x.dtype)))
    old = {name: array(t) for name, t in theirs.state_dict().items()}
    bn = layer_like(theirs, reference.parameter_dtype(x.dtype)).train(training)
    bn.load_state_dict({NAMES.get(name, name): a for name, a in old.items()})

    tx = wide(tx)
    ty = theirs(tx)
    ty.backward(double(dy))
    y = bn(x, save=True)
    dx = bn.backward(dy)
    gamma, beta = old.get("weight"), old.get("bias")
    frozen = theirs.track_running_stats and not training
    fixed = (old["running_mean"], old["running_var"]) if frozen else None
    budget = budgets(dy, x, gamma, beta, eps=bn.eps, fixed=fixed)
    assert y.dtype == dx.dtype == x.dtype
    assert_within(y, ty, budget.y, "y")
    assert_within(dx, tx.grad, budget.dx, "dx")
    for name, found in (("weight", bn.dgamma), ("bias", bn.dbeta)):
        assert (found is None) == (getattr(theirs, name) is None)
        if found is not None:
            assert_within(found, getattr(theirs, name).grad, getattr(budget, name), name)

    state = bn.state_dict()
    if not theirs.track_running_stats:
        assert not {*STATISTICS, "num_batches_tracked"} & {*state, *theirs.state_dict()}
        return
    found, before = ([each[name] for name in STATISTICS] for each in (state, old))
    expected = [theirs.running_mean, theirs.running_var]
    if training and x.size:  # a simple average starts with the first batch
        assert_moved(found, expected, before, x, 1, 0.0 if bn.momentum is None else bn.momentum)
    else:
        np.testing.assert_array_equal(found, before)
        np.testing.assert_array_equal([array(t) for t in expected], before)
    # fastbn counts the batches that moved the statistics; PyTorch an empty one, too.
    assert state["num_batches_tracked"] == int(theirs.num_batches_tracked) - (training and not x.size)

    other = made(module_cls, sample).to(tx.dtype).eval()
    names = {ours: name for name, ours in NAMES.items()}
    taken = {names.get(name, name): torch.as_tensor(a) for name, a in state.items()}
    other.load_state_dict({name: t for name, t in taken.items() if name in old})
    budget = budgets(dy, x, gamma, beta, eps=bn.eps, fixed=(bn.running_mean, bn.running_var))
    assert_within(bn.eval()(x), other(tx), budget.y, "y in evaluation, of the state that went back")


@pytest.mark.parametrize(("module_cls", "error"), cases(module_errors))
def test_errors_of_modules(module_cls, error):
    sample = error.module_error_input
    with pytest.raises(error.error_type, match=error.error_regex):
        made(module_cls, sample)(*sample.forward_input.args)
    theirs = made(module_cls, sample)
    if theirs.eps == 0:
        pytest.skip("eps may be 0 here: where the variance is 0, too, y is beta")
    with pytest.raises(error.error_type, match="BatchNorm: eps"):
        layer_like(theirs, "float32")(array(sample.forward_input.args[0]))
