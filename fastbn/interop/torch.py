"""PyTorch: its batch-norm modules on fastbn and back, and layers to and from its modules and state dicts.

Semantics are those of PyTorch 2.13, torch/nn/modules/batchnorm.py and torch/nn/functional.py; the oldest version that
is supported is 2.4. Only tensors on the CPU.

A converted module is PyTorch's own in everything but its class: `convert` and `revert` set `__class__`, as PyTorch's
lazy modules do when they become what they stand for. So parameters, buffers, hooks and references stay.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..functional import Saved, batch_norm_backward, frozen, trained
from ..layer import BatchNorm
from ..moments import both_moved, seen
from ._need import need

need("torch", "torch", __name__)  # says what to install
import torch  # noqa: E402  by name: a variable is no base class to mypy

Array = npt.NDArray[Any]
Tensor = Any
Module = Any

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "from_torch", "revert", "to_torch"]


# ------------------------------------------------------------------------------------------------------------- tensors


def _array(fn: str, name: str, t: Tensor) -> Array:
    """The memory of a tensor on the CPU as an array, not a copy."""
    if not t.is_cpu:
        raise ValueError(
            f"{fn}: {name} is on {t.device}, expected cpu; fastbn.interop.torch.revert(model) brings PyTorch's own back"
        )
    t = t.detach().resolve_neg()
    if t.dtype is torch.bfloat16:  # which NumPy has not
        bits: Array = t.view(torch.uint16).numpy()
        return bits.view(_bfloat16())
    a: Array = t.numpy()
    return a


def _tensor(a: Array) -> Tensor:
    """An array as a tensor, not a copy."""
    if a.dtype.char in "efd":
        return torch.from_numpy(a)
    return torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16)


def _bfloat16() -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(need("ml_dtypes", "torch", "a tensor of bfloat16").bfloat16)
    return found


class _Recorded(torch.autograd.Function):  # type: ignore[misc]
    """The node of a forward in autograd's graph: it keeps x by reference, as a tensor, and a few numbers a channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, fn: str, y: Array, saved: Saved) -> Tensor:
        """Y as a tensor: it is computed already, before autograd is asked."""
        ctx.save_for_backward(x)  # so hooks see it, a change of it in place is noticed, and the backward lets it go
        ctx.fn, ctx.state, ctx.eps = fn, saved._state, saved.eps
        ctx.dtypes, ctx.frozen = saved._dtypes, saved.frozen
        return _tensor(y)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias, as far as they are needed."""
        try:
            dy = _array(ctx.fn, "the gradient of the output", dy)
        except RuntimeError as error:
            raise RuntimeError(
                f"{ctx.fn}: the gradient of the output has no memory of its own, expected one gradient, not a batch of "
                "them (is_grads_batched, vectorize, vmap); fastbn.interop.torch.revert(model) brings PyTorch's own back"
            ) from error
        x = _array(ctx.fn, "input", *ctx.saved_tensors)
        saved = Saved._of_parts(x, *ctx.state, axis=(1,), eps=ctx.eps, dtypes=ctx.dtypes, frozen=ctx.frozen)
        found = batch_norm_backward(dy, saved)
        grads = (_tensor(g) if n else None for g, n in zip(found, ctx.needs_input_grad[:3], strict=True))
        return (*grads, None, None, None)


# ------------------------------------------------------------------------------------------------------------- modules


class _OnFastbn:
    """The forward of PyTorch's module, computed by fastbn."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """Normalize; in training also move the running statistics.

        Parameters
        ----------
        input : tensor
            On the CPU, of the module's rank, with the channels at axis 1.

        Returns
        -------
        tensor
            Of input's shape and dtype, in its memory format.

        Raises
        ------
        ValueError
            Another rank or number of channels; one value per channel in training; a tensor on another device.
            Everything is as it was then.
        TypeError
            Integers, and a complex or 8-bit floating dtype.
        """
        if torch.compiler.is_compiling() or _transformed(input):
            return super().forward(input)  # type: ignore[misc]
        self._check_input_dim(input)
        fn = type(self).__name__
        if not input.is_floating_point():
            raise TypeError(f"{fn}: input has dtype {input.dtype}, expected a floating one")
        x = _array(fn, "input", input)
        gamma, beta, mean, var = (
            None if (t := getattr(self, name)) is None else _array(fn, name, t)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        for a in (gamma, beta, mean, var):
            if a is not None and a.shape != x.shape[1:2]:
                raise ValueError(f"{fn}: input has {x.shape[1]} channels, expected {a.size}; its shape is {x.shape}")
        records = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (input, self.weight, self.bias)
        )
        if self.training or (mean is None and var is None):
            y, found = trained(x, gamma, beta, axis=1, eps=self.eps, fn=fn)
            if self.training and self.track_running_stats:
                self._track(fn, mean, var, found)
            saved: Saved | None = found
        else:
            y, saved = frozen(fn, x, mean, var, gamma, beta, axis=1, eps=self.eps, keep=records)
        return _Recorded.apply(input, self.weight, self.bias, fn, y, saved) if records else _tensor(y)

    def _track(self: Any, fn: str, mean: Array | None, var: Array | None, saved: Saved) -> None:
        """Move the running statistics, where there are any; an empty batch only counts, as in PyTorch."""
        counter, weight = self.num_batches_tracked, self.momentum
        batches = np.empty((), np.int64) if counter is None else _array(fn, "num_batches_tracked", counter)
        after = batches + 1
        if weight is None:  # the average over batches
            weight = 0.0 if counter is None else 1.0 / float(after)
        old = [a if a is not None else np.empty(0) for a in (mean, var)]
        new = old
        if mean is not None and var is not None and seen(saved.count):
            new = list(both_moved(mean, var, saved._shared_moments(), 1.0 - weight, 1))
        (to_mean, to_var), (new_mean, new_var) = old, new
        # All or none: no call between, where Ctrl-C could come.
        to_mean[...], to_var[...], batches[...] = new_mean, new_var, after
        for t in (self.running_mean, self.running_var, counter):  # autograd is to know that they have changed
            if t is not None and not t.is_inference():
                torch.autograd.graph.increment_version(t)

    def _get_name(self: Any) -> str:
        return f"fastbn.{type(self).__name__}"

    def __prepare_scriptable__(self: Any) -> Module:
        """Refuse `torch.jit.script`, which would put what is given here in this module's place in the model."""
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it; expected PyTorch's own, which "
            "fastbn.interop.torch.revert(model) brings back"
        )


def _transformed(input: Tensor) -> bool:
    """Whether PyTorch is about to record or transform what is computed, and not to compute it."""
    return (
        type(input) not in _TENSORS
        or input.layout is not torch.strided
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0  # x or a parameter may bear a tangent
    )


_TENSORS = (torch.Tensor, torch.nn.Parameter)


class BatchNorm1d(_OnFastbn, torch.nn.BatchNorm1d):  # type: ignore[misc]
    """`torch.nn.BatchNorm1d` on fastbn, for (N, C) and (N, C, L): see `convert`."""


class BatchNorm2d(_OnFastbn, torch.nn.BatchNorm2d):  # type: ignore[misc]
    """`torch.nn.BatchNorm2d` on fastbn, for (N, C, H, W): see `convert`."""


class BatchNorm3d(_OnFastbn, torch.nn.BatchNorm3d):  # type: ignore[misc]
    """`torch.nn.BatchNorm3d` on fastbn, for (N, C, D, H, W): see `convert`."""


_OURS = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Module) -> Module:
    """Have fastbn compute the batch norms of a PyTorch model.

    Every `torch.nn.BatchNorm1d`, `2d` and `3d` in the model, and the model itself if it is one, becomes the module of
    the same name here. Only its class changes, **in place**: parameters, buffers, hooks, mode, state dict and all
    references to it stay, so that optimizers made before go on. It is an instance of PyTorch's class, too.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If model is not a module.

    Notes
    -----
    **Left alone**: subclasses (also those that `torch.nn.utils.parametrize` makes), SyncBatchNorm, and lazy modules,
    which turn into PyTorch's at their first call: convert after it.

    **Tensors** are on the CPU, float32, float64, float16 or bfloat16 (with the package ml_dtypes), with parameters of
    x's dtype or, beside halves, float32. None is copied: the output and the gradient of the input are new, in the
    memory format of the input (contiguous, channels_last, channels_last_3d, or any order of the axes), and x is kept
    for the backward by reference. Copied are, once each, an input that is contiguous in no order of its axes (a slice,
    an expanded tensor), and in the backward a gradient in another memory format than the input.

    **Gradients** come from a `torch.autograd.Function`: first derivatives only, also in evaluation; a second one
    raises RuntimeError, and so do several at once (``is_grads_batched``, ``vectorize``). The kernel computes those of
    input, weight and bias together, whichever are needed.

    **Where PyTorch transforms the program** (`torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func` with
    vmap, forward mode in a dual level), and for subclasses of tensors and other layouts than strided, PyTorch's own
    batch norm computes.
    `torch.jit.script` and `torch.fx.symbolic_trace` fail: revert before.

    Statistics are float64 and so results differ from PyTorch's by the rounding of its own. Unlike PyTorch's a module
    that raises has not counted the batch, and a change of weight in place before the backward does no harm.
    Threads are fastbn's (`fastbn.set_num_threads`), not those of `torch.set_num_threads`.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import convert, revert
    >>> model = convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
    >>> model[1].__class__.__module__
    'fastbn.interop.torch'
    >>> model(torch.rand(2, 3, 8, 8)).sum().backward()
    >>> type(revert(model)[1]) is torch.nn.BatchNorm2d
    True
    """
    return _become("convert", model, _OURS)


def revert(model: Module) -> Module:
    """Undo `convert`: PyTorch computes its batch norms again.

    Parameters
    ----------
    model : torch.nn.Module
        Its batch norms become PyTorch's **in place**, with the same parameters, buffers and hooks.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If model is not a module.
    """
    return _become("revert", model, _THEIRS)


def _become(fn: str, model: Module, classes: dict[Any, Any]) -> Module:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{fn}: model is of type {type(model).__name__}, expected a torch.nn.Module")
    for module in model.modules():  # each once, however often it is used
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


# ------------------------------------------------------------------------------------------------------ layers and back


def from_torch(
    source: Any, *, axis: int = 1, eps: float | None = None, momentum: float | str | None = "of the module"
) -> BatchNorm | dict[str, BatchNorm]:
    """Make layers of fastbn from PyTorch's batch norms.

    Parameters
    ----------
    source : torch.nn.Module, or mapping of names to tensors
        A batch norm (1d, 2d, 3d, SyncBatchNorm, a subclass, a converted one); a model with batch norms in it; the state
        dict of either.
    axis : int
        The channel axis of the arrays that the layers will get; -1 for NHWC arrays.
    eps : float, optional
        That of the modules; of a state dict, which has none, 1e-5.
    momentum : float or None, optional
        Weight of the **old** value, 1 minus PyTorch's. That of the modules; of a state dict, which has none, 0.9.

    Returns
    -------
    BatchNorm, or dict of names to BatchNorm
        Of one batch norm a layer, of a model those of all its batch norms, by the names that PyTorch has for them; a
        module that is shared is one layer. Their arrays are copies, float64 if PyTorch's are and else float32, and
        their mode is that of the module (training, of a state dict).

    Raises
    ------
    ValueError
        A lazy module that has not been called yet; a state dict with unknown or missing keys for one layer, with other
        shapes, or without any batch norm.
    TypeError
        Anything else than a module or a mapping of names to tensors.

    Notes
    -----
    ``momentum=None`` is kept, and means more here: PyTorch averages the statistics of batches, whatever their sizes;
    fastbn pools all samples. The pool starts anew at the next training call, since PyTorch does not keep how many
    samples there were.

    In the state dict of a model a batch norm is what has a running_mean. One without running statistics looks like any
    other layer there, and is left out: give the model itself.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import from_torch
    >>> from_torch(torch.nn.BatchNorm2d(64, momentum=0.01))
    BatchNorm.like('torch', 64, momentum=0.99)
    """
    fn = "from_torch"
    if isinstance(source, _BATCH_NORMS):
        return _layer(fn, source, axis, eps, momentum)
    if isinstance(source, torch.nn.Module):
        made: dict[int, BatchNorm] = {}
        found = {}
        for name, module in source.named_modules(remove_duplicate=False):
            if isinstance(module, _BATCH_NORMS):
                if id(module) not in made:
                    made[id(module)] = _layer(fn, module, axis, eps, momentum)
                found[name] = made[id(module)]
        return found
    if not isinstance(source, Mapping):
        raise TypeError(f"{fn}: source is of type {type(source).__name__}, expected a torch.nn.Module or a state dict")
    old = 0.9 if momentum == "of the module" else momentum
    options = {"axis": axis, "eps": 1e-5 if eps is None else eps, "momentum": old}
    if not any("." in key for key in source):
        return _from_state(fn, source, "", options)
    prefixes = [key.removesuffix("running_mean") for key in source if key.endswith(".running_mean")]
    if not prefixes:
        raise ValueError(f"{fn}: source has no key that ends in .running_mean, expected the state dict of batch norms")
    return {
        prefix[:-1]: _from_state(
            fn, {name: source[prefix + name] for name in _KEYS if prefix + name in source}, prefix, options
        )
        for prefix in prefixes
    }


_BATCH_NORMS = torch.nn.modules.batchnorm._BatchNorm
# PyTorch's names of what a layer has.
_KEYS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}


def _other(momentum: float | None) -> float | None:
    """PyTorch's momentum of fastbn's and back: 0.1 and 0.9, not 0.09999999999999998."""
    return None if momentum is None else round(1.0 - momentum, 15)


def _layer(fn: str, module: Module, axis: int, eps: Any, momentum: Any) -> BatchNorm:
    if any(torch.nn.parameter.is_lazy(t) for t in (*module.parameters(), *module.buffers())):
        raise ValueError(f"{fn}: {type(module).__name__} has no parameters yet, expected one that has been called")
    old = _other(module.momentum)
    options = {
        "axis": axis, "eps": module.eps if eps is None else eps,
        "momentum": old if momentum == "of the module" else momentum,
    }  # fmt: skip
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return _from_state(fn, own, "", options, module.num_features).train(module.training)


def _from_state(
    fn: str, state: Mapping[str, Any], prefix: str, options: dict[str, Any], channels: int = 0
) -> BatchNorm:
    """A layer from PyTorch's tensors; `channels` where there may be none."""
    unknown = [key for key in state if key not in _KEYS]
    if unknown:
        raise ValueError(f"{fn}: source has the key {unknown[0]!r}, expected {', '.join(_KEYS)}")
    for key, t in state.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{fn}: {prefix}{key} is of type {type(t).__name__}, expected a tensor")
    arrays = {key: _array(fn, prefix + key, t.detach().cpu()) for key, t in state.items()}
    tracks = "running_mean" in arrays
    if tracks != ("running_var" in arrays) or not (arrays or channels):
        raise ValueError(f"{fn}: source has {', '.join(arrays) or 'no keys'}, expected running_mean and running_var")
    wide = any(a.dtype == np.float64 for a in arrays.values())
    vectors = {key: a.shape for key, a in arrays.items() if key != "num_batches_tracked"}
    shape = next(iter(vectors.values()), (channels,))
    for key, found in vectors.items():
        if len(found) != 1 or found != shape:
            expected = shape if len(shape) == 1 else "(C,)"
            raise ValueError(f"{fn}: {prefix}{key} has shape {found}, expected {expected}")
    layer = BatchNorm.like(
        "torch", shape, **options, scale="weight" in arrays, center="bias" in arrays,
        track_running_stats=tracks, dtype="float64" if wide else "float32",
    )  # fmt: skip
    given: dict[str, Any] = {_KEYS[key]: a for key, a in arrays.items()}
    if tracks:
        given["num_batches_tracked"] = int(given.get("num_batches_tracked", 0))  # version 1 had none
    return layer.load_state_dict(given)


def to_torch(layer: Any, *, dims: int | None = 2) -> Any:
    """Make PyTorch's batch norms from layers of fastbn.

    Parameters
    ----------
    layer : BatchNorm, or mapping of names to BatchNorm
    dims : 1, 2, 3 or None
        What to make: a `torch.nn.BatchNorm1d`, `2d` or `3d`; or None, a state dict.

    Returns
    -------
    torch.nn.Module, or dict of names to tensors
        In the dtype and mode of the layer; what is in it are copies. Of a mapping: a dict of modules, or with
        ``dims=None`` one state dict, for ``model.load_state_dict(state, strict=False)``.

    Raises
    ------
    ValueError
        Channels along several axes, or an activation, which PyTorch's modules do not have; other `dims`.
    TypeError
        Anything else than layers.

    Notes
    -----
    PyTorch's channels are at axis 1 always. Where the layer has only one of gamma and beta, the other one is there, 1
    or 0, and ``requires_grad=False``. In training the module moves its running statistics by PyTorch's rules: the
    variance unbiased (`correction` 1), and with ``momentum=None`` the average over batches, not over samples.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.interop.torch import to_torch
    >>> to_torch(fastbn.BatchNorm(64, eps=1e-3)).eps
    0.001
    >>> sorted(to_torch(fastbn.BatchNorm(64), dims=None))
    ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    fn = "to_torch"
    if dims is not None and (isinstance(dims, bool) or dims not in (1, 2, 3)):
        raise ValueError(f"{fn}: dims is {dims!r}, expected 1, 2, 3 or None")
    if isinstance(layer, Mapping):
        made = {name: to_torch(one, dims=dims) for name, one in layer.items()}
        if dims is not None:
            return made
        return {f"{name}.{key}": t for name, state in made.items() for key, t in state.items()}
    if not isinstance(layer, BatchNorm):
        raise TypeError(
            f"{fn}: layer is of type {type(layer).__name__}, expected a BatchNorm or a mapping of names to them"
        )
    if len(layer.channels) != 1:
        raise ValueError(f"{fn}: layer has channels {layer.channels}, expected one channel axis")
    if layer.activation is not None:
        raise ValueError(f"{fn}: layer has activation={layer.activation!r}, expected none: it is a module of its own")
    affine = layer.gamma is not None or layer.beta is not None
    kinds = torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d
    module = kinds[(dims or 2) - 1](
        layer.channels[0], eps=layer.eps, momentum=_other(layer.momentum),
        affine=affine, track_running_stats=layer.track_running_stats, dtype=getattr(torch, layer.dtype.name),
    ).train(layer.training)  # fmt: skip
    state = layer.state_dict()
    with torch.no_grad():
        for key, name in _KEYS.items():
            t = getattr(module, key)
            if name in state:
                t.copy_(torch.as_tensor(state[name]))
            elif t is not None:
                t.requires_grad_(False)
    return module if dims is not None else dict(module.state_dict())
