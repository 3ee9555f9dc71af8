"""How fast, how accurate: the ResNet-50 table that `python -m fastbn` prints.

Every figure is a ratio from one process: the candidates of a layer run in turn, round after round, and the minimum of
each counts. Arrays are touched before; fastbn writes into `out=`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernels
from ._threads import get_num_threads, run
from .functional import batch_norm, batch_norm_backward, batch_norm_train

Array = npt.NDArray[Any]

BATCH = 32
#: channels, side, how often: the 53 batch-norm layers of ResNet-50 (He et al. 2015, arXiv:1512.03385, table 1).
RESNET50 = (
    (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5),
    (256, 28, 1), (256, 14, 11), (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One row of the table: what is done, in which layout, what memory allows, and the goal in units of that."""

    name: str
    layout: str
    limit: tuple[str, ...]
    goal: float
    tensors: int

    @property
    def key(self) -> str:
        """Name and layout."""
        return f"{self.name} {self.layout}"


OPERATIONS = (
    Operation("train forward", "NCHW", ("copy",), 1.10, 2),
    Operation("train forward", "NHWC", ("copy", "read"), 1.05, 2),
    Operation("backward", "NCHW", ("triad",), 1.20, 3),
    Operation("backward", "NHWC", ("triad", "read2"), 1.05, 3),
    Operation("inference", "NCHW", ("copy",), 1.05, 2),
    Operation("inference", "NHWC", ("copy",), 1.05, 2),
)
YARDSTICKS = ("copy", "triad", "read", "read2")


@dataclass
class Layer:
    """The measured times of one layer, in seconds, and the errors of fastbn's results."""

    channels: int
    side: int
    times: int
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Elements of the layer's input."""
        return BATCH * self.channels * self.side**2


def measure(
    layers: tuple[tuple[int, int, int], ...] = RESNET50, rounds: int = 7, peers: bool = True
) -> Iterator[Layer]:
    """Measure and check layer after layer.

    ``seconds`` has the yardsticks, "fastbn <operation>", and with `peers` "numpy <operation>" and, if it can be
    imported, "torch <operation>".
    """
    most = max(BATCH * c * s**2 for c, s, _ in layers)
    rng = np.random.default_rng(0)
    x, dy, y, dx = (np.zeros(most, np.float32) for _ in range(4))
    rng.standard_normal(dtype=np.float32, out=x)
    rng.standard_normal(dtype=np.float32, out=dy)
    x *= 2
    x += 3
    torch = _torch() if peers else None
    for channels, side, times in layers:
        layer = Layer(channels, side, times)
        n = layer.elements
        arrays = x[:n], dy[:n], y[:n], dx[:n]
        fast = dict(_yardsticks(*arrays))
        slow: dict[str, Callable[[], Any]] = {}
        for layout in ("NCHW", "NHWC"):
            shape = (BATCH, channels, side, side) if layout == "NCHW" else (BATCH, side, side, channels)
            shaped = [a.reshape(shape) for a in arrays]
            fast.update(_fastbn(layout, *shaped))
            if peers:
                slow.update(_numpy(layout, *shaped))
            if torch:
                slow.update(_pytorch(torch, layout, *shaped))
        for op in OPERATIONS:
            layer.errors[op.key] = _check(op, fast[f"fastbn {op.key}"], layer, *arrays)
        layer.seconds = best_of(fast, rounds) | best_of(slow, max(1, rounds // 3))
        yield layer


def best_of(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call, the minimum over rounds in which all of them take turns, after one round unmeasured."""
    best = dict.fromkeys(calls, float("inf"))
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if i:
                best[name] = min(best[name], elapsed)
    return best


def table_sum(layers: list[Layer], *names: str) -> float:
    """Seconds of these calls over the 53 layers."""
    return sum(layer.times * layer.seconds[name] for layer in layers for name in names)


def ratio(layers: list[Layer], op: Operation) -> float:
    """Time of an operation in units of what memory allows, over the layers."""
    return table_sum(layers, f"fastbn {op.key}") / table_sum(layers, *op.limit)


def _yardsticks(x: Array, dy: Array, y: Array, dx: Array) -> Iterator[tuple[str, Callable[[], Any]]]:
    k = np.array([0.0, 1.0, 0.5], x.dtype)
    sums = np.zeros(-(-x.size // kernels.yardsticks.BLOCK))
    yield "copy", lambda: run(kernels.yardsticks.copy, x.size, x, y, k)
    yield "triad", lambda: run(kernels.yardsticks.triad, x.size, x, dy, dx, k)
    yield "read", lambda: run(kernels.yardsticks.read, x.size, x, sums)
    yield "read2", lambda: run(kernels.yardsticks.read2, x.size, x, dy, sums)


def _parameters(channels: int) -> tuple[Array, Array]:
    return np.linspace(0.5, 1.5, channels, dtype=np.float32), np.linspace(-1, 1, channels, dtype=np.float32)


def _fastbn(layout: str, x: Array, dy: Array, y: Array, dx: Array) -> Iterator[tuple[str, Callable[[], Any]]]:
    axis = 1 if layout == "NCHW" else -1
    gamma, beta = _parameters(x.shape[axis])
    _, saved = batch_norm_train(x, gamma, beta, axis=axis, out=y)
    mean, var = saved.mean, saved.var
    yield f"fastbn train forward {layout}", lambda: batch_norm_train(x, gamma, beta, axis=axis, out=y)
    yield f"fastbn backward {layout}", lambda: batch_norm_backward(dy, saved, out=dx)
    yield f"fastbn inference {layout}", lambda: batch_norm(x, mean, var, gamma, beta, axis=axis, out=y)


def _numpy(layout: str, x: Array, dy: Array, y: Array, dx: Array) -> Iterator[tuple[str, Callable[[], Any]]]:
    """NumPy written well: no temporary of x's size, sums by einsum, float32 throughout."""
    shape = (-1, 1, 1) if layout == "NCHW" else (-1,)
    dot = "nchw,nchw->c" if layout == "NCHW" else "nhwc,nhwc->c"
    add = "nchw->c" if layout == "NCHW" else "nhwc->c"
    gamma, beta = _parameters(x.shape[1] if layout == "NCHW" else x.shape[3])
    n = x.size // gamma.size
    eps = np.float32(1e-5)

    def forward() -> tuple[Array, Array]:
        mean = np.einsum(add, x) / n
        np.subtract(x, mean.reshape(shape), out=y)
        invstd = 1 / np.sqrt(np.einsum(dot, y, y) / n + eps)
        np.multiply(y, (gamma * invstd).reshape(shape), out=y)
        np.add(y, beta.reshape(shape), out=y)
        return mean, invstd

    mean, invstd = forward()

    def backward() -> None:
        np.subtract(x, mean.reshape(shape), out=dx)
        dgamma = np.einsum(dot, dy, dx) * invstd
        dbeta = np.einsum(add, dy)
        np.multiply(dx, (-invstd * dgamma / n).reshape(shape), out=dx)
        np.add(dx, dy, out=dx)
        np.subtract(dx, (dbeta / n).reshape(shape), out=dx)
        np.multiply(dx, (gamma * invstd).reshape(shape), out=dx)

    def inference() -> None:
        scale = gamma * invstd
        np.multiply(x, scale.reshape(shape), out=y)
        np.add(y, (beta - mean * scale).reshape(shape), out=y)

    yield f"numpy train forward {layout}", forward
    yield f"numpy backward {layout}", backward
    yield f"numpy inference {layout}", inference


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(get_num_threads())
    return torch


def _pytorch(torch: Any, layout: str, x: Array, dy: Array, y: Array, dx: Array) -> Iterator[tuple[str, Any]]:
    """PyTorch as its users call it: fresh outputs, channels_last for NHWC."""
    tx, tdy = torch.from_numpy(x), torch.from_numpy(dy)
    if layout == "NHWC":  # the same memory, seen as NCHW
        tx, tdy = tx.permute(0, 3, 1, 2), tdy.permute(0, 3, 1, 2)
    gamma, beta = (torch.from_numpy(p) for p in _parameters(tx.shape[1]))
    aten = torch.ops.aten
    _, mean, invstd = aten.native_batch_norm(tx, gamma, beta, None, None, True, 0.1, 1e-5)
    var = invstd**-2 - 1e-5

    def train() -> None:
        torch.nn.functional.batch_norm(tx, None, None, gamma, beta, training=True)

    def inference() -> None:
        torch.nn.functional.batch_norm(tx, mean, var, gamma, beta)

    def backward() -> None:
        aten.native_batch_norm_backward(tdy, tx, gamma, None, None, mean, invstd, True, 1e-5, [True] * 3)

    yield f"torch train forward {layout}", train
    yield f"torch backward {layout}", backward
    yield f"torch inference {layout}", inference


def _check(op: Operation, call: Callable[[], Any], layer: Layer, x: Array, dy: Array, y: Array, dx: Array) -> float:
    """The largest error of a result, in units of its largest value, against float64 NumPy on eight of the channels."""
    result = dx if op.name == "backward" else y
    result[:] = np.nan
    call()
    cut = slice(None, None, max(1, layer.channels // 8))
    inner = layer.side**2
    shape = (BATCH, layer.channels, inner) if op.layout == "NCHW" else (BATCH * inner, layer.channels, 1)
    picked = [a.reshape(shape)[:, cut].astype(np.float64) for a in (x, dy, result)]
    px, pdy, found = picked
    gamma, beta = (p[cut, None].astype(np.float64) for p in _parameters(layer.channels))

    def mean(a: Array) -> Array:
        return np.asarray(a.mean(axis=(0, 2), keepdims=True))

    centred = px - mean(px)
    invstd = 1 / np.sqrt(mean(centred**2) + 1e-5)
    xhat = centred * invstd
    expected = xhat * gamma + beta
    if op.name == "backward":
        expected = gamma * invstd * (pdy - mean(pdy) - xhat * mean(pdy * xhat))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
