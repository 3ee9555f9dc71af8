"""Regularizers of gamma and beta: a value that is added to the loss, and its gradient, for systems without autodiff."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check

Array = npt.NDArray[Any]


class Penalty:
    """``l1 * sum(abs(w)) + l2 * sum(w**2)``: called it is the value, `gradient` its derivative by w.

    Parameters
    ----------
    l1, l2 : float
        0 or more.
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        self.l1 = _check.number("Penalty", "l1", l1, 0.0)
        self.l2 = _check.number("Penalty", "l2", l2, 0.0)

    def __call__(self, w: Array) -> float:
        wide = w.astype(np.float64)
        return float(self.l1 * abs(wide).sum() + self.l2 * (wide * wide).sum())

    def gradient(self, w: Array) -> Array:
        """The derivative of the value by w, of w's shape, in float64; 0 where abs has none."""
        wide = w.astype(np.float64)
        return np.asarray(self.l1 * np.sign(wide) + 2.0 * self.l2 * wide)

    def __repr__(self) -> str:
        return f"Penalty(l1={self.l1!r}, l2={self.l2!r})"


def regularizer(fn: str, name: str, value: Any) -> Any:
    """What regularizes: a callable that also has the method `gradient`, without which it would not reach any weight."""
    if not callable(value) or not callable(getattr(value, "gradient", None)):
        raise TypeError(f"{fn}: {name} is {_check.shown(value)}, expected a callable with a method gradient")
    return value


def initial(fn: str, name: str, make: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...], d: Any) -> Array:
    """The first value of a variable, from a function of its shape."""
    value = _check.parameter(fn, name, make(shape), shape)
    return np.broadcast_to(value, shape).astype(d)
