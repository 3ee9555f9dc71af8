"""The peers: batch normalization as the users of other systems would call it, one class each.

All are given the same `Problem`, and the threads that fastbn uses. A peer whose packages are not installed is simply
not there. Which outputs a peer writes is part of its price: PyTorch, oneDNN and JAX allocate theirs, NumPy and ONNX
Runtime are given arrays as fastbn is.
"""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Calls = Iterator[tuple[str, Callable[[], Any]]]

EPS = 1e-5
#: What some operations have besides: relu(batch norm of x + residual).
RELU = "residual, ReLU"


@dataclass(frozen=True)
class Problem:
    """One layer in one layout: what is normalized, with which parameters, and arrays for results.

    `mean` and `var` are the statistics of x, for inference; float64. Without a residual `z` no peer has operations with
    one.
    """

    layout: str
    x: Array
    dy: Array
    y: Array
    dx: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    z: Array | None = None

    @property
    def axis(self) -> int:
        """The channel axis."""
        return 1 if self.layout == "NCHW" else -1

    @property
    def per_channel(self) -> tuple[int, ...]:
        """The shape in which a value per channel broadcasts against x."""
        return (-1, 1, 1) if self.layout == "NCHW" else (-1,)

    @property
    def parameters(self) -> tuple[Array, Array, Array, Array]:
        """gamma, beta, mean and var in float32, as the peers take them."""
        return self.gamma, self.beta, self.mean.astype(np.float32), self.var.astype(np.float32)


class Peer(ABC):
    """One other way to normalize.

    Attributes
    ----------
    name : str
        What it is called in tables.
    package : str
        The distribution that brings it.
    fresh : bool
        Whether its outputs are new arrays, or those of the problem.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    fresh: ClassVar[bool]

    def __init__(self, threads: int) -> None:
        """Load the packages, or raise ImportError; use so many threads from now on. Here: none to load, one thread."""
        del threads

    @abstractmethod
    def calls(self, p: Problem) -> Calls:
        """(operation, call) for what this peer can do in this layout.

        A call returns y or dx, or of a pair of both y, dx and the residual's gradient; everything else is done before.
        """

    def array(self, p: Problem, result: Any) -> Array:
        """A call's result as an array of the problem's shape."""
        return np.asarray(result)


class NumPy(Peer):
    """NumPy written well: no temporary of x's size, sums by einsum, float32 throughout. One thread."""

    name, package, fresh = "NumPy", "numpy", False

    def calls(self, p: Problem) -> Calls:
        """All three operations, both layouts."""
        x, dy, y, dx, shape = p.x, p.dy, p.y, p.dx, p.per_channel
        gamma, beta, mean, var = p.parameters
        add = "nchw->c" if p.layout == "NCHW" else "nhwc->c"
        dot = f"{add[:4]},{add}"
        n = x.size // gamma.size
        eps = np.float32(EPS)
        invstd = 1 / np.sqrt(var + eps)

        def forward() -> Array:
            mean = np.einsum(add, x) / n
            np.subtract(x, mean.reshape(shape), out=y)
            invstd = 1 / np.sqrt(np.einsum(dot, y, y) / n + eps)
            np.multiply(y, (gamma * invstd).reshape(shape), out=y)
            return np.add(y, beta.reshape(shape), out=y)

        def backward() -> Array:
            np.subtract(x, mean.reshape(shape), out=dx)
            dgamma = np.einsum(dot, dy, dx) * invstd
            dbeta = np.einsum(add, dy)
            np.multiply(dx, (-invstd * dgamma / n).reshape(shape), out=dx)
            np.add(dx, dy, out=dx)
            np.subtract(dx, (dbeta / n).reshape(shape), out=dx)
            return np.multiply(dx, (gamma * invstd).reshape(shape), out=dx)

        def inference() -> Array:
            scale = gamma / np.sqrt(var + eps)
            np.multiply(x, scale.reshape(shape), out=y)
            return np.add(y, (beta - mean * scale).reshape(shape), out=y)

        yield "train forward", forward
        yield "backward", backward
        yield "inference", inference


class PyTorch(Peer):
    """PyTorch as its users call it; NHWC is its channels_last memory format."""

    name, package, fresh = "PyTorch", "torch", True

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    def calls(self, p: Problem) -> Calls:
        """All three operations and the pair, both layouts."""
        x, dy = self._tensor(p, p.x), self._tensor(p, p.dy)
        gamma, beta, mean, var = (self.torch.from_numpy(a) for a in p.parameters)
        batch_norm, aten = self.torch.nn.functional.batch_norm, self.torch.ops.aten
        _, *saved = aten.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
        rest = (None, None, *saved, True, EPS, [True] * 3)
        yield "train forward", lambda: batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
        yield "backward", lambda: aten.native_batch_norm_backward(dy, x, gamma, *rest)[0]
        yield "inference", lambda: batch_norm(x, mean, var, gamma, beta, eps=EPS)
        if p.z is None:
            return
        leaves = [a.detach().requires_grad_() for a in (x, self._tensor(p, p.z), gamma, beta)]

        def pair() -> tuple[Any, Any, Any]:
            x, z, gamma, beta = leaves
            y = self.torch.nn.functional.relu(batch_norm(x, None, None, gamma, beta, training=True, eps=EPS) + z)
            y.backward(dy)
            found = y.detach(), x.grad, z.grad
            for a in leaves:  # else the next backward would add to it
                a.grad = None
            return found

        yield f"pair, {RELU}", pair

    def array(self, p: Problem, result: Any) -> Array:
        """In the problem's order of axes."""
        return np.asarray(result if p.layout == "NCHW" else result.permute(0, 2, 3, 1))

    def _tensor(self, p: Problem, a: Array) -> Any:
        tensor = self.torch.from_numpy(a)
        return tensor if p.layout == "NCHW" else tensor.permute(0, 3, 1, 2)


class OneDNN(PyTorch):
    """oneDNN, which no wheel offers by itself, through the opaque tensors of PyTorch's wheel."""

    name, package, fresh = "oneDNN", "torch", True

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if not self.torch.backends.mkldnn.is_available():
            raise ImportError("this build of PyTorch has no oneDNN")

    def calls(self, p: Problem) -> Calls:
        """All three operations; NCHW alone: `to_mkldnn` brings channels_last tensors into NCHW, too.

        Not the pair: its opaque tensors are not for autograd.
        """
        return super().calls(replace(p, z=None)) if p.layout == "NCHW" else iter(())

    def array(self, p: Problem, result: Any) -> Array:
        """Out of oneDNN's memory."""
        return super().array(p, result.to_dense())

    def _tensor(self, p: Problem, a: Array) -> Any:
        return super()._tensor(p, a).to_mkldnn()


class OnnxRuntime(Peer):
    """ONNX Runtime on a model of one BatchNormalization node; inputs and output are bound to the problem's arrays."""

    name, package, fresh = "ONNX Runtime", "onnxruntime", False

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.runtime = onnx, onnxruntime
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        # Waiting threads would take the processors from whatever is measured next.
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def calls(self, p: Problem) -> Calls:
        """Inference; NCHW alone: its operator has the channels at axis 1. Training is not in the inference package."""
        if p.layout != "NCHW":
            return
        inputs = dict(zip(("x", "gamma", "beta", "mean", "var"), (p.x, *p.parameters), strict=True))
        session = self.runtime.InferenceSession(
            self._model(list(inputs)), self.options, providers=["CPUExecutionProvider"]
        )
        value = self.runtime.OrtValue.ortvalue_from_numpy  # on CPUs it refers to the array
        binding = session.io_binding()
        for name, a in inputs.items():
            binding.bind_ortvalue_input(name, value(a))
        binding.bind_ortvalue_output("y", value(p.y))

        def inference() -> Array:
            session.run_with_iobinding(binding)
            return p.y

        yield "inference", inference

    def _model(self, inputs: list[str]) -> bytes:
        helper, floats = self.onnx.helper, self.onnx.TensorProto.FLOAT
        node = helper.make_node("BatchNormalization", inputs, ["y"], epsilon=EPS)
        ends = [[helper.make_tensor_value_info(n, floats, None) for n in names] for names in (inputs, ["y"])]
        # Old enough versions for any runtime.
        model = helper.make_model(
            helper.make_graph([node], "batch_norm", *ends), opset_imports=[helper.make_opsetid("", 15)], ir_version=8
        )
        return bytes(model.SerializeToString())


class Jax(Peer):
    """JAX, compiled, on arrays that are on its device. Its variance is max(0, E[x²] - E[x]²), as Flax has it."""

    name, package, fresh = "JAX", "jax", True

    def __init__(self, threads: int) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("PJRT_NPROC", str(threads))  # XLA's only setting of threads; read when JAX first runs
        import jax

        self.jax = jax

    def calls(self, p: Problem) -> Calls:
        """All three operations, both layouts; the backward is what `jax.vjp` left to do, compiled."""
        jax = self.jax
        axes = tuple(a for a in range(p.x.ndim) if a != p.axis % p.x.ndim)

        def train(x: Any, gamma: Any, beta: Any) -> Any:
            mean = x.mean(axes, keepdims=True)
            var = jax.numpy.maximum((x * x).mean(axes, keepdims=True) - mean * mean, 0)
            return infer(x, gamma, beta, mean, var)

        def infer(x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
            return (x - mean) * (gamma * jax.lax.rsqrt(var + EPS)) + beta

        x, dy = jax.device_put(p.x), jax.device_put(p.dy)
        gamma, beta, mean, var = (jax.device_put(a.reshape(p.per_channel)) for a in p.parameters)
        train, infer = jax.jit(train), jax.jit(infer)
        _, pullback = jax.vjp(train, x, gamma, beta)
        backward = jax.jit(lambda pullback, dy: pullback(dy))
        ready = jax.block_until_ready
        yield "train forward", lambda: ready(train(x, gamma, beta))
        yield "backward", lambda: ready(backward(pullback, dy))[0]
        yield "inference", lambda: ready(infer(x, gamma, beta, mean, var))


PEERS = (NumPy, PyTorch, OneDNN, OnnxRuntime, Jax)


def present(threads: int) -> list[Peer]:
    """The peers whose packages are installed, with so many threads each."""
    found: list[Peer] = []
    for peer in PEERS:
        with contextlib.suppress(ImportError):
            found.append(peer(threads))
    return found
