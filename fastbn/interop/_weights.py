"""The weights of a batch norm under the names of another system, into a layer and out of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..layer import BatchNorm

Array = npt.NDArray[Any]


def layer_of(fn: str, system: str, weights: Mapping[str, Any], names: Mapping[str, str], **options: Any) -> BatchNorm:
    """A layer by the rules of `system`, with copies of its `weights`; `names` says what they are called here.

    It has a gamma and a beta where there are weights for them, and is float64 where one of them is.
    """
    mean = next(name for name, own in names.items() if own == "running_mean")
    shape = np.shape(weights[mean])
    state: dict[str, Any] = {}
    for name, value in weights.items():
        check = _check.variance if names[name] == "running_var" else _check.parameter
        state[names[name]] = check(fn, name, value, shape, f", the shape of {mean}")
    wide = any(a.dtype == np.float64 for a in state.values())
    given = {"dtype": "float64" if wide else "float32", "center": "beta" in state, "scale": "gamma" in state}
    layer = BatchNorm.like(system, shape, **{**given, **options})
    return layer.load_state_dict({**state, "num_batches_tracked": 0})


def weights_of(fn: str, layer: Any) -> dict[str, Array]:
    """gamma, beta, running_mean and running_var, as far as the layer has them: copies in its dtype, in this order."""
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"{fn}: layer is of type {type(layer).__name__}, expected a fastbn.BatchNorm")
    if not layer.track_running_stats:
        raise ValueError(f"{fn}: the layer keeps no running statistics; expected track_running_stats=True")
    state = layer.state_dict()
    names = ("gamma", "beta", "running_mean", "running_var")
    return {name: state[name].astype(layer.dtype, copy=False) for name in names if name in state}
