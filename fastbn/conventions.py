"""What other systems mean by batch normalization: the constants and rules that `BatchNorm.like` sets.

Every number is that of the version named beside it, read from its source or run; docs/reference/conventions.md has the
table for readers, and a test compares it, and the systems themselves, with this one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """One system's rules, in fastbn's words.

    Parameters
    ----------
    axis : int
        Of the channels.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the old running value; None: exact pooling.
    correction : 0 or 1
        Of the running variance.
    center, scale : bool
        Whether there is a beta, a gamma by default.
    running_mean, running_var : float
        What they start from.
    single : bool
        Whether training takes one value per channel: y is beta then, and its variance 0.
    debias : bool
        Whether the running statistics leave out what they start from: after t batches, the weight of the k-th last is
        momentum**k over the sum of all t of these.
    source : str
        Where that is written.
    """

    axis: int
    eps: float
    momentum: float | None
    correction: int
    center: bool = True
    scale: bool = True
    running_mean: float = 0.0
    running_var: float = 1.0
    single: bool = True
    debias: bool = False
    source: str = ""

    def options(self) -> dict[str, int | float | bool | None]:
        """The arguments of `BatchNorm` that make such a layer."""
        names = "axis", "eps", "momentum", "correction", "center", "scale"
        return {name: getattr(self, name) for name in names}


CONVENTIONS = {
    "torch": Convention(1, 1e-5, 0.9, 1, single=False, source="PyTorch 2.13, torch.nn.BatchNorm1d, 2d, 3d"),
    "keras": Convention(-1, 1e-3, 0.99, 0, source="Keras 3.15, keras.layers.BatchNormalization"),
    "keras1": Convention(-1, 1e-3, 0.99, 0, source="Keras 1.2.2, keras/layers/normalization.py, mode 0"),
    "tf.contrib": Convention(
        -1, 1e-3, 0.999, 0, scale=False, source="TensorFlow 1.x, tf.contrib.layers.batch_norm, fused=False"
    ),
    "onnx": Convention(1, 1e-5, 0.9, 0, source="ONNX BatchNormalization-15, training_mode=1"),
    "flax": Convention(-1, 1e-5, 0.99, 0, source="Flax 0.12, flax.linen.BatchNorm, flax.nnx.BatchNorm"),
    "chainer": Convention(1, 2e-5, 0.9, 1, source="Chainer 7, chainer.links.BatchNormalization"),
    "caffe": Convention(
        1, 1e-5, 0.999, 1, center=False, scale=False, running_var=0.0, debias=True,
        source="Caffe 1.0, batch_norm_layer.cpp; gamma and beta are a Scale layer's",
    ),
    "cs231n": Convention(1, 1e-5, 0.9, 0, running_var=0.0, source="CS231n, assignment 2, cs231n/layers.py"),
    "paper": Convention(1, 1e-5, None, 1, single=False, source="Ioffe, Szegedy 2015, Algorithms 1 and 2; no eps given"),
}  # fmt: skip
