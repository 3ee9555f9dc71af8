"""Keras 1's BatchNormalization, with its modes, its arguments and the order of its weights.

Source: Keras 1.2.2, `keras/layers/normalization.py`, on its TensorFlow backend. What is called `running_std` there
holds a variance, as `K.batch_normalization` expects it (on Theano with cuDNN it also held epsilon). Weights of Keras
1.0.0, whose `running_std` is a standard deviation that epsilon is added to outside of the root, are another thing:
``weights=[gamma, beta, mean, std]`` is taken as 1.2.2 takes it, a variance in the place of std.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import batch_norm, batch_norm_backward, frozen, trained
from ..moments import both_moved, moments
from ._penalty import Penalty, initial, regularizer

Array = npt.NDArray[Any]
INITIALIZATIONS: dict[str, Callable[[tuple[int, ...]], Array]] = {"zero": np.zeros, "one": np.ones}

__all__ = ["BatchNormalization", "l1", "l1l2", "l2"]


def l1(l: float = 0.01) -> Penalty:  # noqa: E741  its name there
    """The regularizer ``l * sum(abs(w))``.

    Parameters
    ----------
    l : float
        0 or more.

    Returns
    -------
    Penalty
        For `gamma_regularizer` or `beta_regularizer`: called with an array it is the penalty, its method ``gradient``
        the derivative.
    """
    return Penalty(l1=l)


def l2(l: float = 0.01) -> Penalty:  # noqa: E741
    """The regularizer ``l * sum(w**2)``.

    Parameters
    ----------
    l : float
        0 or more.

    Returns
    -------
    Penalty
        As of `l1`.
    """
    return Penalty(l2=l)


def l1l2(l1: float = 0.01, l2: float = 0.01) -> Penalty:
    """The regularizer ``l1 * sum(abs(w)) + l2 * sum(w**2)``.

    Parameters
    ----------
    l1, l2 : float
        0 or more.

    Returns
    -------
    Penalty
        As of `l1`.
    """
    return Penalty(l1, l2)


REGULARIZERS: dict[str, Callable[[], Penalty]] = {"l1": l1, "l2": l2, "l1l2": l1l2}


class BatchNormalization:
    """Batch normalization as a layer of Keras 1.

    Parameters
    ----------
    epsilon : float
        Added to the variance; in mode 1 also to its root.
    mode : 0, 1 or 2
        0: each feature along `axis` by the statistics of the batch in training, by running averages in test. 1: each
        sample (each row of the last axis) by its own mean and standard deviation: ``(x - m) / (s + epsilon)`` with
        ``s = sqrt(var + epsilon)``, epsilon twice. 2: the statistics of the batch in test, too; running averages never
        move.
    axis : int
        Of the features; in mode 1 it only says how many gammas there are, which then belong to the last axis.
    momentum : float
        Weight of the old running average.
    weights : list of arrays, optional
        Initial [gamma, beta, mean, std], see `set_weights`. In place of beta_init and gamma_init.
    beta_init, gamma_init : "zero", "one", or a function of the shape
    gamma_regularizer, beta_regularizer : optional
        A name ("l1", "l2", "l1l2", with factors of 0.01), what `l1`, `l2` or `l1l2` returned, its configuration, or a
        callable of your own that returns the penalty of an array and has a method ``gradient`` of that array.
    name : str, optional
    trainable : bool
        False: `trainable_weights` is empty and `backward` leaves dgamma and dbeta None. Running averages still move.
    input_shape, batch_input_shape : sequence, optional
        Of the first layer of a model, without and with the samples' axis, None where unknown: it is built at once.
    input_dtype : str, optional
        Of the first layer; kept for `get_config` alone.

    Attributes
    ----------
    gamma, beta, running_mean, running_std : (C,) float32 array or None
        None before `build`. running_std is a variance.
    dgamma, dbeta : (C,) float32 array or None
        From the last `backward`, with the gradient of the penalty.
    losses : list of float
        The penalties, gamma's first; `regularization` is their sum, to be added to the loss.

    Raises
    ------
    ValueError
        Another mode, an epsilon below 0, a momentum outside [0, 1], an unknown name.
    TypeError
        Wrong types.

    Notes
    -----
    Activations are in the dtype of x, weights in float32. In modes 0 and 2 a batch is read and written as by
    `fastbn.batch_norm_train`; mode 1 reads x twice and writes two arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import keras1
    >>> bn = keras1.BatchNormalization(mode=0, axis=1, gamma_regularizer="l2")
    >>> y = bn(np.array([[1.0], [3.0]]), train=True)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.running_mean, bn.running_std, bn.regularization, bn.dgamma
    (array([0.02], dtype=float32), array([1.], dtype=float32), 0.01, array([0.02], dtype=float32))
    """

    _names = ("gamma", "beta", "running_mean", "running_std")

    def __init__(
        self,
        epsilon: float = 1e-3,
        mode: int = 0,
        axis: int = -1,
        momentum: float = 0.99,
        weights: Sequence[npt.ArrayLike] | None = None,
        beta_init: str | Callable[[tuple[int, ...]], Any] = "zero",
        gamma_init: str | Callable[[tuple[int, ...]], Any] = "one",
        gamma_regularizer: Any = None,
        beta_regularizer: Any = None,
        *,
        name: str | None = None,
        trainable: bool = True,
        input_shape: Sequence[int | None] | None = None,
        batch_input_shape: Sequence[int | None] | None = None,
        input_dtype: str | None = None,
    ) -> None:
        fn = "BatchNormalization"
        self.epsilon = _check.number(fn, "epsilon", epsilon, 0.0)
        if isinstance(mode, bool) or mode not in (0, 1, 2):
            raise ValueError(f"{fn}: mode is {_check.shown(mode)}, expected 0, 1 or 2")
        self.mode = int(mode)
        try:
            self.axis = _check.index(axis)
        except TypeError:
            raise TypeError(f"{fn}: axis is {_check.shown(axis)}, expected an int") from None
        self.momentum = _check.number(fn, "momentum", momentum, 0.0, 1.0)
        self.beta_init = _initialization(fn, "beta_init", beta_init)
        self.gamma_init = _initialization(fn, "gamma_init", gamma_init)
        self.gamma_regularizer = _regularizer(fn, "gamma_regularizer", gamma_regularizer)
        self.beta_regularizer = _regularizer(fn, "beta_regularizer", beta_regularizer)
        self.initial_weights = weights
        self.name = "batchnormalization" if name is None else name
        self.trainable = _check.flag(fn, "trainable", trainable)
        self.built = False
        self.gamma: Array | None = None
        self.beta: Array | None = None
        self.running_mean: Array | None = None
        self.running_std: Array | None = None
        self.dgamma: Array | None = None
        self.dbeta: Array | None = None
        self._saved: Any = None
        if input_shape is not None and batch_input_shape is None:
            batch_input_shape = (None, *input_shape)
        self.input_dtype = input_dtype
        self.batch_input_shape = None if batch_input_shape is None else tuple(batch_input_shape)
        if self.batch_input_shape is not None:
            self.build(self.batch_input_shape)

    # ------------------------------------------------------------------------------------------------------- weights

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make the weights. The first call does it by itself.

        Parameters
        ----------
        input_shape : sequence of int or None
            Of the inputs; only the length of `axis` counts, others may be None.

        Raises
        ------
        ValueError
            `axis` out of range, its length unknown, initial weights of other shapes.
        """
        fn = "BatchNormalization.build"
        shape = tuple(input_shape)
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"{fn}: input_shape has {len(shape)} axes, expected one with axis {self.axis}")
        n = shape[self.axis]
        if n is None:
            raise ValueError(f"{fn}: input_shape has None along axis {self.axis}, expected the number of features")
        if self.mode == 1 and shape[-1] not in (None, n):
            raise ValueError(
                f"{fn}: input_shape is {shape} with axis={self.axis}, expected in mode 1 as many features there as "
                f"along the last axis"
            )
        own, d = (int(n),), np.float32
        if self.initial_weights is not None:
            made = _as_weights(fn, "weights", self.initial_weights, own)
        else:
            made = [
                initial(fn, "gamma_init", self.gamma_init, own, d), initial(fn, "beta_init", self.beta_init, own, d),
                np.zeros(own, d), np.ones(own, d),
            ]  # fmt: skip
        self.gamma, self.beta, self.running_mean, self.running_std = made
        self.initial_weights, self.built, self._saved = None, True, None

    def get_weights(self) -> list[Array]:
        """What the layer has learned and measured.

        Returns
        -------
        list of (C,) float32 arrays
            Copies of [gamma, beta, running_mean, running_std]; an empty list before the layer is built.
        """
        return [a.copy() for a in self._arrays()] if self.built else []

    def set_weights(self, weights: Sequence[npt.ArrayLike]) -> None:
        """Set what `get_weights` returns, in place.

        Parameters
        ----------
        weights : list of four (C,) arrays
            [gamma, beta, running_mean, running_std]. The last is a variance: see the module.

        Raises
        ------
        ValueError
            Not four arrays, other shapes, a negative running_std, a layer that is not built. Nothing is set.
        """
        fn = "BatchNormalization.set_weights"
        arrays = self._arrays(fn)
        made = _as_weights(fn, "weights", weights, arrays[0].shape)
        (arrays[0][...], arrays[1][...], arrays[2][...], arrays[3][...]) = made

    @property
    def trainable_weights(self) -> list[Array]:
        """[gamma, beta] themselves, not copies: an optimizer changes them in place."""
        return self._arrays()[:2] if self.built and self.trainable else []

    @property
    def non_trainable_weights(self) -> list[Array]:
        """[running_mean, running_std] themselves; with ``trainable=False`` all four."""
        arrays = self._arrays() if self.built else []
        return arrays[2:] if self.trainable else arrays

    @property
    def losses(self) -> list[float]:
        """The penalties of gamma and beta, as far as they have a regularizer."""
        if not self.built:
            return []
        both = (self.gamma_regularizer, self.gamma), (self.beta_regularizer, self.beta)
        return [float(penalty(w)) for penalty, w in both if penalty is not None]

    @property
    def regularization(self) -> float:
        """The sum of `losses`, to be added to the loss; `backward` has its gradient."""
        return float(sum(self.losses))

    # --------------------------------------------------------------------------------------------------------- calls

    def __call__(self, x: npt.ArrayLike, train: bool = False) -> Array:
        """Normalize x.

        Parameters
        ----------
        x : array
            With as many features along `axis` as the layer was built for.
        train : bool
            Keras's learning phase. Only mode 0 heeds it.

        Returns
        -------
        y : array of x's shape
            In the dtype of x (of integers: float32).

        Raises
        ------
        ValueError
            Another rank or number of features than before.
        TypeError
            As `fastbn.batch_norm`.
        """
        fn = "BatchNormalization"
        x = _check.array(fn, "x", x)
        train = _check.flag(fn, "train", train)
        if not self.built:
            self.build(x.shape)
        gamma, beta, mean, var = self._arrays(fn)
        axis = -1 if self.mode == 1 else self.axis
        _check.channels(fn, x, axis, gamma.shape)
        if self.mode == 1:
            y, self._saved = self._by_sample(x, gamma, beta)
        elif self.mode == 0 and not train:
            y, self._saved = frozen(fn, x, mean, var, gamma, beta, axis=axis, eps=self.epsilon, keep=True)
        else:
            y, saved = trained(x, gamma, beta, axis=axis, eps=self.epsilon, single=True, fn=fn)
            self._saved = saved
            if self.mode == 0 and x.size:
                # Both or none: no call between, where Ctrl-C could come.
                mean[...], var[...] = both_moved(mean, var, saved.moments, self.momentum, 0)
        return y

    def backward(self, dy: npt.ArrayLike) -> Array:
        """Gradient of the last call's x, given that of its y; sets dgamma and dbeta.

        dgamma and dbeta are those of the loss with `regularization` added to it. After a call of mode 0 in test the
        running averages count as constants.

        Parameters
        ----------
        dy : array of x's shape

        Returns
        -------
        dx : array of x's shape

        Raises
        ------
        ValueError
            Before a call; dy of another shape.
        TypeError
            dy not floating.
        """
        fn = "BatchNormalization.backward"
        if self._saved is None:
            raise ValueError(f"{fn}: there is no call to go back through, expected one before it")
        if self.mode == 1:
            dx, dgamma, dbeta = self._by_sample_backward(fn, dy)
        else:
            dx, dgamma, dbeta = batch_norm_backward(_check.like_x(fn, "dy", dy, self._saved.x.shape), self._saved)
        if self.trainable:
            gamma, beta = self._arrays(fn)[:2]
            self.dgamma = _with_penalty(dgamma, gamma, self.gamma_regularizer)
            self.dbeta = _with_penalty(dbeta, beta, self.beta_regularizer)
        return dx

    def _by_sample(self, x: Array, gamma: Array, beta: Array) -> tuple[Array, Any]:
        """Mode 1: each row of the last axis is a channel; gamma and beta belong to the columns."""
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        with np.errstate(all="ignore"):
            s = np.sqrt(moments(rows, axis=0).var() + self.epsilon)
            # (x - m) / (s + epsilon) is (x - m) / s times this, which a channel's gamma can be.
            ratio = np.where(s == 0, 1.0, s / (s + self.epsilon))
        xhat, saved = trained(rows, ratio, None, axis=0, eps=self.epsilon, single=True)
        y, affine = frozen("batch_norm", xhat, 0.0, 1.0, gamma, beta, axis=1, eps=0.0, keep=True)
        return y.reshape(x.shape), (x.shape, saved, affine, s)

    def _by_sample_backward(self, fn: str, dy: npt.ArrayLike) -> tuple[Array, Array, Array]:
        shape, saved, affine, s = self._saved
        flat = _check.like_x(fn, "dy", dy, shape).reshape(saved.x.shape)
        dxhat, dgamma, dbeta = batch_norm_backward(flat, affine)
        dx, dratio, _ = batch_norm_backward(dxhat, saved)
        # The ratio is no constant: by its way through s the last term of dx is smaller, s / (s + epsilon) of itself.
        n, t = max(shape[-1], 1), s + self.epsilon
        with np.errstate(all="ignore"):
            back = np.where(s == 0, 0.0, dratio * self.epsilon / (n * s * t * t))
        both: Array = batch_norm(saved.x, saved.mean, 1.0, back, axis=0, eps=0.0, residual=dx)
        return both.reshape(shape), dgamma, dbeta

    def _arrays(self, fn: str = "BatchNormalization") -> list[Array]:
        arrays = [getattr(self, name) for name in self._names]
        if not self.built or any(a is None for a in arrays):
            raise ValueError(f"{fn}: the layer is not built, expected a call or build() before")
        return arrays

    # --------------------------------------------------------------------------------------------------------- config

    def get_config(self) -> dict[str, Any]:
        """What makes such a layer again.

        Returns
        -------
        dict
            The arguments of the layer but for weights and their initialization, which Keras 1 leaves out too.
        """
        first = {"batch_input_shape": self.batch_input_shape, "input_dtype": self.input_dtype}
        return {
            **{k: v for k, v in first.items() if v is not None},
            "epsilon": self.epsilon,
            "mode": self.mode,
            "axis": self.axis,
            "gamma_regularizer": _config_of(self.gamma_regularizer),
            "beta_regularizer": _config_of(self.beta_regularizer),
            "momentum": self.momentum,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make a layer from what `get_config` returned.

        Parameters
        ----------
        config : mapping

        Returns
        -------
        BatchNormalization

        Raises
        ------
        TypeError
            Not a mapping, or one with other keys.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"BatchNormalization.from_config: config is of type {type(config).__name__}, expected a mapping"
            )
        return cls(**config)


def _initialization(fn: str, name: str, value: Any) -> Callable[[tuple[int, ...]], Any]:
    if callable(value):
        found: Callable[[tuple[int, ...]], Any] = value
    else:
        found = _check.choice(fn, name, value, INITIALIZATIONS)
    return found


def _regularizer(fn: str, name: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str):
        return _check.choice(fn, name, value, REGULARIZERS)()
    if isinstance(value, Mapping):
        if set(value) - {"name", "l1", "l2"}:
            raise ValueError(f"{fn}: {name} has the keys {sorted(map(str, value))}, expected name, l1 and l2")
        return Penalty(*(_check.number(fn, f"{name}['{k}']", value.get(k, 0.0), 0.0) for k in ("l1", "l2")))
    return regularizer(fn, name, value)


def _config_of(penalty: Any) -> Any:
    """As Keras 1.2.2 writes a regularizer; one of your own is passed on as it is."""
    if isinstance(penalty, Penalty):
        return {"name": "L1L2Regularizer", "l1": penalty.l1, "l2": penalty.l2}
    return penalty


def _as_weights(fn: str, name: str, weights: Any, shape: tuple[int, ...]) -> list[Array]:
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise TypeError(f"{fn}: {name} is of type {type(weights).__name__}, expected [gamma, beta, mean, std]")
    if len(weights) != 4:
        raise ValueError(f"{fn}: {name} has {len(weights)} arrays, expected 4: [gamma, beta, mean, std]")
    made = []
    for part, value in zip(("gamma", "beta", "mean", "std"), weights, strict=True):
        check = _check.variance if part == "std" else _check.parameter
        a = check(fn, f"{name}' {part}", value, shape, ", the features of the layer")
        with np.errstate(all="ignore"):
            made.append(np.broadcast_to(a, shape).astype(np.float32))
    return made


def _with_penalty(gradient: Array, w: Array, penalty: Any) -> Array:
    return gradient if penalty is None else np.asarray(gradient + penalty.gradient(w), gradient.dtype)
