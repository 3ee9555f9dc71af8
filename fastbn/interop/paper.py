"""The paper's two algorithms under their own words, and how far its population statistics are from the exact ones.

Source: Ioffe, Szegedy 2015, "Batch Normalization", arXiv:1502.03167. Algorithm 1 normalizes a mini-batch. Algorithm 2,
step 10, takes E[x] as the mean over mini-batches of their means, and Var[x] as m / (m - 1) times the mean over
mini-batches of their variances; step 11 makes one affine map of it. All samples pooled give other numbers.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import Saved, batch_norm, batch_norm_backward, batch_norm_train
from ..moments import Moments, joined, lost, moments

Array = npt.NDArray[Any]

__all__ = ["Population", "gradients", "inference", "normalize", "population", "transform"]


def normalize(
    x: npt.ArrayLike,
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
) -> tuple[Array, Saved]:
    """Algorithm 1: the batch normalizing transform of a mini-batch; `fastbn.batch_norm_train`, whose errors these are.

    Parameters
    ----------
    x : (N, C, ...) array
    gamma, beta : (C,) array, optional
        1 and 0 when omitted.
    axis : int or tuple of ints
        The channel axis.
    eps : float
        The paper gives none.

    Returns
    -------
    y : array of x's shape
    saved : Saved
        The mini-batch mean and variance are ``saved.mean`` and ``saved.var`` (divided by m); for `gradients`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import paper
    >>> y, saved = paper.normalize(np.array([[1.0], [3.0]]), eps=0)
    >>> y.tolist(), saved.mean, saved.var
    ([[-1.0], [1.0]], array([2.]), array([1.]))
    """
    return batch_norm_train(x, gamma, beta, axis=axis, eps=eps)


def gradients(dy: npt.ArrayLike, saved: Saved) -> tuple[Array, Array, Array]:
    """Section 3: the gradients of `normalize`; `fastbn.batch_norm_backward`, whose errors these are.

    Parameters
    ----------
    dy : array of x's shape
    saved : Saved
        From `normalize`.

    Returns
    -------
    dx : array of x's shape
    dgamma, dbeta : (C,) array
    """
    dx, dgamma, dbeta = batch_norm_backward(dy, saved)
    return dx, dgamma, dbeta


@dataclass(frozen=True, eq=False)
class Population:
    """Population statistics as Algorithm 2 writes them, beside those of all samples.

    Attributes
    ----------
    mean, var : (C,) float64 array
        Step 10: the mean over batches of their means, and of m / (m - 1) times their variances.
    pooled : Moments
        Of all samples: ``pooled.mean`` and ``pooled.var(correction=1)`` are exact, whatever the batches, and what
        `fastbn.BatchNorm.fit_population` takes.
    batches : int
        How many there were, empty ones left out.
    sizes : (int, int)
        The fewest and the most values per channel of a batch.
    spread : (C,) float64 array
        Variance of the batch means around their mean, divided by the number of batches.
    """

    mean: Array
    var: Array
    pooled: Moments
    batches: int
    sizes: tuple[int, int]
    spread: Array

    @property
    def mean_difference(self) -> Array:
        """The paper's mean minus the pooled one, (C,)."""
        return np.asarray(self.mean - self.pooled.mean)

    @property
    def var_difference(self) -> Array:
        """The paper's variance minus the pooled unbiased one, (C,)."""
        return np.asarray(self.var - self.pooled.var(correction=1))

    @property
    def note(self) -> str:
        """Why and by how much the two differ in the worst channel; "" where they are the same, as of one batch."""
        mean, var = abs(self.mean_difference), abs(self.var_difference)
        exact = self.pooled.var(correction=1)
        std = np.sqrt(exact)
        if not mean.any() and not var.any():
            return ""
        low, high = self.sizes
        why = [f"batches of {low} to {high} values per channel count alike"] if low != high else []
        if self.batches > 1:
            with np.errstate(all="ignore"):  # how it is tested whether means are equal: F of an analysis of variance
                between = self.spread * self.batches / (self.batches - 1) * self.pooled.count / self.batches
                ratio = np.where(between == 0, 0.0, between / self.var).flat[np.argmax(_share(var, exact))]
            why.append(f"the means of batches vary {ratio:.2g} times as much as those of random batches do")
        return (
            f"the paper's mean is up to {np.max(_share(mean, std)):.2g} standard deviations from that of all samples, "
            f"its variance up to {np.max(_share(var, exact)):.2g} of theirs: {'; '.join(why)}"
        )


def _share(difference: Array, of: Array) -> Array:
    """A difference as a share; 0 where there is none."""
    with np.errstate(all="ignore"):
        return np.where(difference == 0, 0.0, difference / of)


def population(batches: Iterable[npt.ArrayLike], *, axis: int | tuple[int, ...] = 1) -> Population:
    """Algorithm 2, steps 8 to 10: population statistics over mini-batches, beside the exact ones.

    Parameters
    ----------
    batches : iterable of arrays
        Inputs of a layer, one mini-batch at a time; each is read as by `fastbn.moments`, and let go. Where their
        sizes differ, each variance bears the m of its own batch.
    axis : int or tuple of ints
        The channel axis.

    Returns
    -------
    Population

    Raises
    ------
    ValueError
        No batch with a value, a batch with one value per channel (m - 1 is 0), other channels than the first one's.
    TypeError
        `batches` not iterable, a batch that is not numeric.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import paper
    >>> found = paper.population([np.array([[0.0], [2.0]]), np.array([[4.0], [6.0]])])
    >>> found.mean, found.var, found.pooled.var(correction=1)
    (array([3.]), array([2.]), array([6.66666667]))
    """
    fn = "population"
    if not isinstance(batches, Iterable):
        raise TypeError(f"{fn}: batches is of type {type(batches).__name__}, expected an iterable of arrays")
    pooled = means = variances = Moments(0, np.zeros(0), np.zeros(0))
    rest: Array | None = None
    sizes: list[int] = []
    for i, batch in enumerate(batches):
        x = _check.array(fn, f"batches[{i}]", batch)
        axes = _check.axes(fn, axis, x.shape, f"batches[{i}]")
        m = moments(x, axis=axis)
        n = int(m.count)
        if not n:
            continue
        if n == 1:
            raise ValueError(f"{fn}: batches[{i}] has one value per channel, expected at least two (m - 1 is 0)")
        if sizes and m.mean.shape != pooled.mean.shape:
            raise ValueError(f"{fn}: batches[{i}] has channels {m.mean.shape}, expected {pooled.mean.shape} as before")
        none = np.zeros_like(m.mean)
        own = lost(x, axes, m)
        pooled, rest = joined(pooled, rest, m, own) if sizes else (m, own)
        means = _together(means, Moments._trusted(1, m.mean, none))
        variances = _together(variances, Moments._trusted(1, m.var(correction=1), none))
        sizes = [min([n, *sizes]), max([n, *sizes])]
    if not sizes:
        raise ValueError(f"{fn}: batches has no value, expected at least one batch")
    return Population(means.mean, variances.mean, pooled, int(means.count), (sizes[0], sizes[1]), means.var())


def _together(a: Moments, b: Moments) -> Moments:
    """Both together; the first of all has no shape yet."""
    return b if a.count == 0 else a + b


def inference(
    statistics: Population | tuple[npt.ArrayLike, npt.ArrayLike],
    gamma: npt.ArrayLike | None = None,
    beta: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Algorithm 2, step 11: the inference transform as one affine map, ``y = scale * x + shift``.

    Parameters
    ----------
    statistics : Population or (mean, var)
        A `Population` gives the paper's own; pass ``(p.pooled.mean, p.pooled.var(correction=1))`` for the exact ones.
    gamma, beta : (C,) array, optional
        1 and 0 when omitted.
    eps : float

    Returns
    -------
    scale, shift : (C,) float64 array
        ``gamma / sqrt(Var + eps)``, and ``beta - scale * E[x]``. Where Var + eps is 0 scale is 0 and shift is beta.

    Raises
    ------
    ValueError
        Wrong shapes, a negative variance or eps.
    TypeError
        What is not numeric.

    Notes
    -----
    `fastbn.BatchNorm.fold` does it for a layer. Where abs(mean) is large beside the standard deviation digits are lost
    when this is applied in float32; `fastbn.batch_norm` does not lose them.
    """
    fn = "inference"
    if isinstance(statistics, Population):
        statistics = statistics.mean, statistics.var
    if not isinstance(statistics, tuple) or len(statistics) != 2:
        raise TypeError(
            f"{fn}: statistics is of type {type(statistics).__name__}, expected a Population or (mean, var)"
        )
    mean = _check.array(fn, "mean", statistics[0])
    shape, of = mean.shape, ", the shape of mean"
    var = _check.variance(fn, "var", statistics[1], shape, of)
    gamma = _check.parameter(fn, "gamma", 1.0 if gamma is None else gamma, shape, of)
    beta = _check.parameter(fn, "beta", 0.0 if beta is None else beta, shape, of)
    eps = _check.eps(fn, eps)
    with np.errstate(all="ignore"):
        v = np.broadcast_to(var.astype(np.float64) + eps, shape)
        scale = np.where(v == 0, 0.0, gamma.astype(np.float64) / np.sqrt(np.where(v == 0, 1.0, v)))
        return scale, np.asarray(beta.astype(np.float64) - scale * mean.astype(np.float64))


def transform(
    x: npt.ArrayLike, scale: npt.ArrayLike, shift: npt.ArrayLike, *, axis: int | tuple[int, ...] = 1,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Apply what `inference` returned: ``y = scale * x + shift``, in one pass; errors as `fastbn.batch_norm`.

    Parameters
    ----------
    x : array
    scale, shift : (C,) array
    axis : int or tuple of ints
        The channel axis.
    out : array of y's shape and dtype, optional
        Receives y; may be x itself.

    Returns
    -------
    y : array of x's shape
    """
    return batch_norm(x, 0.0, 1.0, scale, shift, axis=axis, eps=0.0, out=out)
