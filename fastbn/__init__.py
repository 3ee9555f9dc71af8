"""Batch normalization of NumPy arrays on CPUs, at about the cost of a copy.

`BatchNorm` is the layer; `batch_norm`, `batch_norm_train` and `batch_norm_backward` are functions of arrays, and
`moments` takes statistics, of data larger than memory, too. Importing it compiles nothing; the first call does.
"""

from ._config import show_config, warmup
from ._memory import empty_pool, set_pool_limit
from ._threads import get_num_threads, set_num_threads
from .folding import fold_conv, fold_linear
from .functional import Saved, batch_norm, batch_norm_backward, batch_norm_train
from .layer import BatchNorm
from .moments import Moments, moments, update_running

__version__ = "0.1.0"
__all__ = [
    "BatchNorm",
    "Moments",
    "Saved",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_train",
    "empty_pool",
    "fold_conv",
    "fold_linear",
    "get_num_threads",
    "moments",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
    "update_running",
    "warmup",
]
