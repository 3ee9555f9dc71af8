"""Flax: the variables of `flax.linen.BatchNorm`, and `flax.nnx.BatchNorm` modules, in and out.

After flax/linen/normalization.py and flax/nnx/nn/normalization.py of Flax 0.12. Flax calls gamma and beta scale and
bias and keeps them under "params", and the running mean and (plain) variance as mean and var under "batch_stats";
momentum is the weight of the old value, the channels are the last axis. Flax is not imported: a mapping is enough.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..layer import BatchNorm
from ._weights import layer_of, weights_of

Array = npt.NDArray[Any]

__all__ = ["from_flax", "to_flax"]


def from_flax(variables: Any, *, path: str | tuple[str, ...] = (), **options: Any) -> BatchNorm:
    """Make a `fastbn.BatchNorm` of the variables of a Flax model, or of an nnx module.

    Parameters
    ----------
    variables : mapping, or flax.nnx.Module
        A linen model's ``{"params": {...}, "batch_stats": {...}}`` (a dict or a FrozenDict); an nnx module; or the
        state of one, ``nnx.state(module)``, also as a pure dict.
    path : str or tuple of str
        Where in them the layer is: "Block_0/BatchNorm_1", or ("Block_0", "BatchNorm_1"). Of an nnx model the names of
        its attributes.
    **options
        Arguments of `fastbn.BatchNorm`. By default those of the nnx module; of variables and states, which do not tell,
        Flax's defaults: axis -1, eps 1e-5, momentum 0.99. With two axes and more `axis` must be given.

    Returns
    -------
    BatchNorm
        With Flax's rules, as of ``BatchNorm.like("flax", ...)``, in training. It has a gamma where there is a scale and
        a beta where there is a bias. It holds copies, in float32, or in float64 where a value is float64.

    Raises
    ------
    ValueError
        There is no such path, no mean or var there, or something else; different shapes; a negative variance.
    TypeError
        Neither a mapping nor a module.
    """
    fn = "from_flax"
    if not isinstance(path, str) and not (isinstance(path, tuple) and all(isinstance(p, str) for p in path)):
        raise TypeError(f"{fn}: path is {_check.shown(path)}, expected a str or a tuple of them")
    steps = tuple(p for p in path.split("/") if p) if isinstance(path, str) else path
    if isinstance(variables, Mapping) and not {"batch_stats", "params"} & variables.keys():
        found = dict(_at(fn, variables, steps, "variables"))  # the state of an nnx module has no groups
    elif isinstance(variables, Mapping):
        if "batch_stats" not in variables:
            raise ValueError(
                f"{fn}: variables has {_names(variables)}, expected batch_stats and, with scale or bias, params"
            )
        found = dict(_at(fn, variables["batch_stats"], steps, "batch_stats"))
        if "params" in variables:
            # A layer without scale and bias has no params, and no place there.
            found.update(_at(fn, variables["params"], steps, "params", missing_ok=True))
    else:
        module = variables
        for i, step in enumerate(steps):
            if not hasattr(module, step):
                raise ValueError(
                    f"{fn}: path has {step!r}, expected an attribute of {'.'.join(steps[:i]) or 'variables'}"
                )
            module = getattr(module, step)
        if not all(hasattr(module, name) for name in ("mean", "var", "scale", "bias", "epsilon")):
            raise TypeError(
                f"{fn}: variables is of type {type(module).__name__}, expected a mapping or an nnx.BatchNorm"
            )
        found = {name: getattr(module, name) for name in ("mean", "var", "scale", "bias")}
        found = {name: value for name, value in found.items() if value is not None}
        options = {"axis": module.axis, "eps": module.epsilon, "momentum": module.momentum, **options}
    where = "/".join(steps) or "variables"
    if not {"mean", "var"} <= found.keys() <= {"mean", "var", "scale", "bias"}:
        raise ValueError(f"{fn}: {where} has {_names(found)}, expected mean, var and, if it has them, scale and bias")
    arrays = {name: np.asarray(value) for name, value in found.items()}  # of JAX's arrays, or nnx's variables
    return layer_of(fn, "flax", arrays, _NAMES, **options)


def to_flax(layer: BatchNorm) -> dict[str, dict[str, Array]]:
    """The variables of a `flax.linen.BatchNorm` that does what a `fastbn.BatchNorm` does.

    Parameters
    ----------
    layer : BatchNorm

    Returns
    -------
    dict
        ``{"params": {"scale": gamma, "bias": beta}, "batch_stats": {"mean": ..., "var": ...}}``: NumPy arrays, copies
        in the layer's dtype, without the parameters that it has not; where it has none, without "params".

    Raises
    ------
    TypeError
        It is no `BatchNorm`.
    ValueError
        It keeps no running statistics.

    Notes
    -----
    The Flax layer needs use_scale and use_bias as the layer has gamma and beta, and for the same results its axis,
    epsilon and momentum. Flax stores the plain variance: a layer with ``correction=1`` goes on with another rule there.
    An nnx module takes the same arrays one by one: ``module.mean[...] = variables["batch_stats"]["mean"]``.
    """
    arrays = weights_of("to_flax", layer)
    found: dict[str, dict[str, Array]] = {}
    for name, own in _NAMES.items():
        if own in arrays:
            found.setdefault("batch_stats" if name in ("mean", "var") else "params", {})[name] = arrays[own]
    return found


_NAMES = {"scale": "gamma", "bias": "beta", "mean": "running_mean", "var": "running_var"}


def _at(fn: str, tree: Any, steps: tuple[str, ...], group: str, *, missing_ok: bool = False) -> Mapping[str, Any]:
    """The mapping at the end of a path."""
    walked = group
    for step in steps:
        if isinstance(tree, Mapping) and step not in tree and missing_ok:
            return {}
        if not isinstance(tree, Mapping) or step not in tree:
            has = _names(tree) if isinstance(tree, Mapping) else "no names"
            raise ValueError(f"{fn}: path has {step!r}, expected one of {has}, in {walked}")
        tree, walked = tree[step], f"{walked}/{step}"
    if not isinstance(tree, Mapping):
        raise ValueError(f"{fn}: {walked} is {_check.shown(tree)}, expected a mapping of names to arrays")
    return tree


def _names(tree: Mapping[str, Any]) -> str:
    """The names in a mapping, the first ten."""
    return ", ".join(str(name) for name in list(tree)[:10]) or "nothing"
