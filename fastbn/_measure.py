"""How fast, how accurate: the ResNet-50 tables that `python -m fastbn` prints.

Every figure is a ratio from one process. The yardsticks and fastbn's operations on a layer run in turn, round after
round, and the minimum of each counts; then each peer's do, by themselves: every library has threads of its own, and
those that wait for more work would slow another. Arrays are touched before, and lie where NumPy puts them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from . import kernels
from ._peers import EPS, RELU, Peer, Problem
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
    """One row of a table: what is done, in which layout, the calls that are its unit, and the goal in units of those.

    `moved` are the bytes read and written for each element of x, every array once; `part` is what the plain operation
    does not have.
    """

    name: str
    layout: str
    limit: tuple[str, ...]
    goal: float | None
    moved: int
    part: str = ""

    @property
    def title(self) -> str:
        """Name and part."""
        return f"{self.name}, {self.part}" if self.part else self.name

    @property
    def key(self) -> str:
        """Name, part and layout."""
        return f"{self.title} {self.layout}"


HALVES = ("float16", "bfloat16")
MASKS = ("mask per sample", "mask per position")
#: Half precision is measured where float32 has so many bytes: what fits in the caches gains less.
LARGE = 25_000_000
#: Batch, height, width, channels.
IMAGES = (BATCH, 224, 224, 3)

OPERATIONS = (
    Operation("train forward", "NCHW", ("copy",), 1.10, 8),
    Operation("train forward", "NHWC", ("copy", "read"), 1.05, 8),
    Operation("backward", "NCHW", ("triad",), 1.20, 12),
    Operation("backward", "NHWC", ("triad", "read2"), 1.05, 12),
    Operation("inference", "NCHW", ("copy",), 1.05, 8),
    Operation("inference", "NHWC", ("copy",), 1.05, 8),
)
# A backward with a residual writes two gradients: two reads, two writes. A pair is a forward and its backward.
PARTS = (
    Operation("train forward", "NCHW", ("triad",), 1.15, 12, RELU),
    Operation("train forward", "NHWC", ("triad", "read"), None, 12, RELU),
    Operation("backward", "NCHW", ("copy", "copy"), None, 16, RELU),
    Operation("backward", "NHWC", ("copy", "copy", "read2"), None, 16, RELU),
    Operation("pair", "NCHW", ("triad", "copy", "copy"), None, 28, RELU),
    Operation("pair", "NHWC", ("triad", "read", "copy", "copy", "read2"), None, 28, RELU),
    *(Operation("train forward", "NCHW", ("fastbn train forward NCHW",), 0.60, 4, half) for half in HALVES),
    *(
        Operation("train forward", layout, (f"fastbn train forward {layout}",), 1.30, 8, mask)
        for mask in MASKS
        for layout in ("NCHW", "NHWC")
    ),
)
#: Of NHWC images of bytes; the layout is that of y.
OF_IMAGES = (
    Operation("inference", "NCHW", ("copy",), None, 5, "uint8"),
    Operation("inference", "NHWC", ("copy",), None, 5, "uint8"),
)
#: How many times faster than PyTorch's three operations and their backward the pair is to be.
PAIR_GOAL = 3.0
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
    layers: Sequence[tuple[int, int, int]] = RESNET50, rounds: int = 7, peers: Sequence[Peer] = (), parts: bool = False
) -> Iterator[Layer]:
    """Measure and check layer after layer.

    ``seconds`` has the yardsticks, "fastbn <operation>" into given arrays, "fastbn fresh <operation>" without `out=`,
    and "<peer> <operation>" for what each peer can do. With `parts` PARTS are among the operations, into given arrays.
    """
    most = max(BATCH * c * s**2 for c, s, _ in layers)
    rng = np.random.default_rng(0)
    x, dy, y, dx, *z = (np.zeros(most, np.float32) for _ in range(4 + parts))
    for a in (x, dy, *z):
        rng.standard_normal(dtype=np.float32, out=a)
    x *= 2
    x += 3
    halves = {d.name: x.astype(d) for d in _halves()} if parts and x.nbytes >= LARGE else {}
    for channels, side, times in layers:
        layer = Layer(channels, side, times)
        n = layer.elements
        arrays = [a[:n] for a in (x, dy, y, dx, *z)]
        problems = {layout: problem(layout, channels, side, *arrays) for layout in ("NCHW", "NHWC")}
        own = dict(_yardsticks(*arrays[:4]))
        for p in problems.values():
            own.update(_fastbn(p))
            own.update(_parts(p))
        for half, a in halves.items() if arrays[0].nbytes >= LARGE else ():
            p = problems[half] = halved(problems["NCHW"], a[:n])
            own[f"fastbn train forward, {half} NCHW"] = partial(batch_norm_train, p.x, p.gamma, p.beta, out=p.y)
        for op in (*OPERATIONS, *PARTS):
            if f"fastbn {op.key}" in own:
                p = problems.get(op.part, problems[op.layout])
                layer.errors[op.key] = _checked(op, p, own[f"fastbn {op.key}"])
        layer.seconds = best_of(own, rounds)
        for peer in peers:
            calls = {
                f"{peer.name} {name} {layout}": call
                for layout in ("NCHW", "NHWC")
                for name, call in peer.calls(problems[layout])
            }
            # In fastbn's rounds other calls on other arrays come in between; so it must be here.
            layer.seconds |= best_of(calls, max(1, rounds // 2), between=own["triad"])
        yield layer


def measure_images(rounds: int = 7) -> Layer:
    """Measure and check OF_IMAGES, in arrays of their own; the yardsticks' are of float32."""
    x = np.random.default_rng(0).integers(256, size=IMAGES, dtype=np.uint8)
    _, _, side, channels = IMAGES
    layer = Layer(channels, side, 1)
    y = np.zeros(x.shape, np.float32)
    outs = {"NHWC": y, "NCHW": np.moveaxis(np.zeros_like(np.moveaxis(y, -1, 1), order="C"), 1, -1)}
    m = moments(x, axis=-1)
    gamma, beta = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    floats = x.astype(np.float32).reshape(-1)
    own = {"copy": dict(_yardsticks(floats, floats, y.reshape(-1), y.reshape(-1)))["copy"]}
    for op in OF_IMAGES:
        p = Problem("NHWC", x, y, outs[op.layout], y, gamma, beta, m.mean, m.var())
        call = own[f"fastbn {op.key}"] = partial(batch_norm, x, p.mean, p.var, gamma, beta, axis=-1, out=p.y)
        layer.errors[op.key] = _checked(op, p, call)
    layer.seconds = best_of(own, rounds)
    return layer


def problem(layout: str, channels: int, side: int, *arrays: Array) -> Problem:
    """A layer's flat x, dy, y, dx and maybe z in one layout, with parameters and x's statistics."""
    shape = (BATCH, channels, side, side) if layout == "NCHW" else (BATCH, side, side, channels)
    x, dy, y, dx, *z = (a.reshape(shape) for a in arrays)
    gamma, beta = np.linspace(0.5, 1.5, channels, dtype=np.float32), np.linspace(-1, 1, channels, dtype=np.float32)
    m = moments(x, axis=1 if layout == "NCHW" else -1)
    return Problem(layout, x, dy, y, dx, gamma, beta, m.mean, m.var(), *z)


def halved(p: Problem, x: Array) -> Problem:
    """The same with its x in half precision, given flat; y lies in the memory of the other."""
    y = p.y.reshape(-1).view(x.dtype)[: x.size]
    return replace(p, x=x.reshape(p.x.shape), y=y.reshape(p.x.shape))


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
    """Time of an operation in its unit, over the layers that have it."""
    having = measured(layers, op)
    return table_sum(having, f"{who} {op.key}") / table_sum(having, *op.limit)


def measured(layers: list[Layer], op: Operation) -> list[Layer]:
    """The layers on which an operation was measured."""
    return [layer for layer in layers if f"fastbn {op.key}" in layer.seconds]


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


def _parts(p: Problem) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Those of PARTS that are float32, if the problem has a residual."""
    if p.z is None:
        return
    train = partial(batch_norm_train, p.x, p.gamma, p.beta, axis=p.axis, out=p.y)
    forward = partial(train, residual=p.z, activation="relu")
    _, saved = forward()

    def pair() -> tuple[Array, ...]:
        y, saved = forward()
        return y, *batch_norm_backward(p.dy, saved, out=p.dx)

    yield f"fastbn train forward, {RELU} {p.layout}", forward
    yield f"fastbn backward, {RELU} {p.layout}", partial(batch_norm_backward, p.dy, saved, out=p.dx)
    yield f"fastbn pair, {RELU} {p.layout}", pair
    for part in MASKS:
        yield f"fastbn train forward, {part} {p.layout}", partial(train, where=mask(part, p))


def _halves() -> Iterator[np.dtype[Any]]:
    """The dtypes of half precision that there are: bfloat16 comes with a package of its own."""
    yield np.dtype(np.float16)
    with contextlib.suppress(ImportError):
        import ml_dtypes  # type: ignore[import-not-found, unused-ignore]

        yield np.dtype(ml_dtypes.bfloat16)


def mask(part: str, p: Problem) -> Array:
    """Three of four samples, or positions, as booleans that broadcast to x."""
    shape = [1 if a == p.axis % 4 or (a and part == MASKS[0]) else n for a, n in enumerate(p.x.shape)]
    return np.asarray(np.arange(np.prod(shape)).reshape(shape) % 4 != 3)


def _checked(op: Operation, p: Problem, call: Callable[[], Any]) -> float:
    """The error of what a call returns."""
    p.y.fill(np.nan)
    p.dx.fill(np.nan)
    return error(op, p, results(op, call()))


def results(op: Operation, returned: Any) -> list[Array]:
    """What is checked of what fastbn returned: y, dx, and with a residual the gradient of that."""
    arrays = returned if isinstance(returned, tuple) else (returned,)
    with_residual = [arrays[-1]] if op.part == RELU and op.name != "train forward" else []
    return [*arrays[: 2 if op.name == "pair" else 1], *with_residual]


def error(op: Operation, p: Problem, found: Sequence[Array]) -> float:
    """The largest error of `results`, in units of their largest values, against float64 NumPy on eight of the channels.

    Of half precision only what is above the one rounding of the result.
    """
    # Where y is next to 0 its sign is a matter of rounding, but a single sign that differs is seen in every dx.
    y = found[0] if op.name == "pair" else _fused(p) if op.part == RELU and op.name == "backward" else p.y
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}.get(op.part, 0.0)
    differences, sizes = [], []
    for c in range(0, p.gamma.size, max(1, p.gamma.size // 8)):
        expected = _expected(op, p, c, y)
        pairs = [(_channel(f, p, c), e) for f, e in zip(found, expected, strict=True)]
        differences.append([np.maximum(abs(f - e) - rounding * abs(e), 0).max() for f, e in pairs])
        sizes.append([abs(e).max() for e in expected])
    return float((np.max(differences, axis=0) / np.max(sizes, axis=0)).max())  # NaN if one is


def _expected(op: Operation, p: Problem, c: int, y: Array) -> list[Array]:
    """What `results` are to be in one channel; the backward of a ReLU takes the signs of y."""
    weights = _channel(np.broadcast_to(mask(op.part, p), p.x.shape), p, c) if op.part in MASKS else None
    gamma, beta = float(p.gamma[c]), float(p.beta[c])
    centred = _channel(p.x, p, c)
    centred -= np.average(centred, weights=weights)
    invstd = 1 / np.sqrt(np.average(centred**2, weights=weights) + EPS)
    xhat = centred * invstd
    expected = []
    if op.name != "backward":
        normalized = xhat * gamma + beta
        expected.append(normalized if op.part != RELU else np.maximum(normalized + _channel(p.z, p, c), 0))
    if op.name in ("backward", "pair"):
        dy = _channel(p.dy, p, c)
        if op.part == RELU:
            dy *= _channel(y, p, c) > 0
        expected.append(gamma * invstd * (dy - dy.mean() - xhat * (dy * xhat).mean()))
        if op.part == RELU:
            expected.append(dy)
    return expected


def _channel(a: Array | None, p: Problem, c: int) -> Array:
    """One channel in float64."""
    assert a is not None
    return np.asarray(np.moveaxis(a, p.axis, 0)[c], dtype=np.float64, copy=True)


def _fused(p: Problem) -> Array:
    """The y whose signs a backward with a ReLU takes; in p.y, where a backward has nothing."""
    return batch_norm_train(p.x, p.gamma, p.beta, axis=p.axis, residual=p.z, activation="relu", out=p.y)[0]
