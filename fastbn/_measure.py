"""How fast, how accurate: the ResNet-50 table that `python -m fastbn` prints.

Every figure is a ratio from one process. The yardsticks and fastbn's operations on a layer run in turn, round after
round, and the minimum of each counts; then each peer's do, by themselves: every library has threads of its own, and
those that wait for more work would slow another. Arrays are touched before, and lie where NumPy puts them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernels
from ._peers import EPS, Peer, Problem
from ._threads import run
from .functional import batch_norm, batch_norm_backward, batch_norm_train
from .moments import moments

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
    layers: Sequence[tuple[int, int, int]] = RESNET50, rounds: int = 7, peers: Sequence[Peer] = ()
) -> Iterator[Layer]:
    """Measure and check layer after layer.

    ``seconds`` has the yardsticks, "fastbn <operation>" into given arrays, "fastbn fresh <operation>" without `out=`,
    and "<peer> <operation>" for what each peer can do.
    """
    most = max(BATCH * c * s**2 for c, s, _ in layers)
    rng = np.random.default_rng(0)
    x, dy, y, dx = (np.zeros(most, np.float32) for _ in range(4))
    rng.standard_normal(dtype=np.float32, out=x)
    rng.standard_normal(dtype=np.float32, out=dy)
    x *= 2
    x += 3
    for channels, side, times in layers:
        layer = Layer(channels, side, times)
        arrays = [a[: layer.elements] for a in (x, dy, y, dx)]
        problems = [problem(layout, channels, side, *arrays) for layout in ("NCHW", "NHWC")]
        own = dict(_yardsticks(*arrays))
        for p in problems:
            own.update(_fastbn(p))
        for op in OPERATIONS:
            p = problems[op.layout == "NHWC"]
            result = p.dx if op.name == "backward" else p.y
            result.fill(np.nan)
            own[f"fastbn {op.key}"]()
            layer.errors[op.key] = error(op, p, result)
        layer.seconds = best_of(own, rounds)
        for peer in peers:
            calls = {f"{peer.name} {name} {p.layout}": call for p in problems for name, call in peer.calls(p)}
            # In fastbn's rounds other calls on other arrays come in between; so it must be here.
            layer.seconds |= best_of(calls, max(1, rounds // 2), between=own["triad"])
        yield layer


def problem(layout: str, channels: int, side: int, *arrays: Array) -> Problem:
    """A layer's flat x, dy, y and dx in one layout, with parameters and x's statistics."""
    shape = (BATCH, channels, side, side) if layout == "NCHW" else (BATCH, side, side, channels)
    x, dy, y, dx = (a.reshape(shape) for a in arrays)
    gamma, beta = np.linspace(0.5, 1.5, channels, dtype=np.float32), np.linspace(-1, 1, channels, dtype=np.float32)
    m = moments(x, axis=1 if layout == "NCHW" else -1)
    return Problem(layout, x, dy, y, dx, gamma, beta, m.mean, m.var())


def best_of(
    calls: dict[str, Callable[[], Any]], rounds: int, between: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Seconds of each call, the minimum over rounds in which all of them take turns, after one round unmeasured.

    What happens `between` them does not count.
    """
    time.sleep(0.02)  # threads of other libraries may spin for some milliseconds after their last work
    best = dict.fromkeys(calls, float("inf"))
    for i in range(rounds + 1):
        for name, call in calls.items():
            between()
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if i:
                best[name] = min(best[name], elapsed)
    return best


def table_sum(layers: list[Layer], *names: str) -> float:
    """Seconds of these calls over the 53 layers."""
    return sum(layer.times * layer.seconds[name] for layer in layers for name in names)


def ratio(layers: list[Layer], op: Operation, who: str = "fastbn") -> float:
    """Time of an operation in units of what memory allows, over the layers."""
    return table_sum(layers, f"{who} {op.key}") / table_sum(layers, *op.limit)


def _yardsticks(x: Array, dy: Array, y: Array, dx: Array) -> Iterator[tuple[str, Callable[[], Any]]]:
    k = np.array([0.0, 1.0, 0.5], x.dtype)
    sums = np.zeros(-(-x.size // kernels.yardsticks.BLOCK))
    yield "copy", lambda: run(kernels.yardsticks.copy, x.size, x, y, k)
    yield "triad", lambda: run(kernels.yardsticks.triad, x.size, x, dy, dx, k)
    yield "read", lambda: run(kernels.yardsticks.read, x.size, x, sums)
    yield "read2", lambda: run(kernels.yardsticks.read2, x.size, x, dy, sums)


def _fastbn(p: Problem) -> Iterator[tuple[str, Callable[[], Any]]]:
    x, dy, y, dx, gamma, beta, axis = p.x, p.dy, p.y, p.dx, p.gamma, p.beta, p.axis
    _, saved = batch_norm_train(x, gamma, beta, axis=axis, out=y)
    for name, out, dout in (("fastbn", y, dx), ("fastbn fresh", None, None)):
        yield f"{name} train forward {p.layout}", partial(batch_norm_train, x, gamma, beta, axis=axis, out=out)
        yield f"{name} backward {p.layout}", partial(batch_norm_backward, dy, saved, out=dout)
        yield f"{name} inference {p.layout}", partial(batch_norm, x, p.mean, p.var, gamma, beta, axis=axis, out=out)


def error(op: Operation, p: Problem, result: Array) -> float:
    """The largest error of a result, in units of its largest value, against float64 NumPy on eight of the channels."""
    cut = slice(None, None, max(1, p.gamma.size // 8))
    x, dy, found = (np.moveaxis(a, p.axis, 0)[cut].astype(np.float64) for a in (p.x, p.dy, result))
    gamma, beta = (a[cut, None, None, None].astype(np.float64) for a in (p.gamma, p.beta))

    def mean(a: Array) -> Array:
        return np.asarray(a.mean(axis=(1, 2, 3), keepdims=True))

    centred = x - mean(x)
    invstd = 1 / np.sqrt(mean(centred**2) + EPS)
    xhat = centred * invstd
    expected = xhat * gamma + beta
    if op.name == "backward":
        expected = gamma * invstd * (dy - mean(dy) - xhat * mean(dy * xhat))
    return float(np.abs(found - expected).max() / np.abs(expected).max())
