"""scikit-learn, 1.6 and later: batch normalization as a transformer, for pipelines.

It is `sklearn.preprocessing.StandardScaler` with an eps, with channels along any axis of arrays of more than two, and
with statistics that keep their digits at any offset. Interface: scikit-learn 1.9, "Developing scikit-learn estimators"
and `sklearn.utils.estimator_checks.check_estimator`.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import batch_norm
from ..moments import Moments, moments
from ._need import need

_base = need("sklearn.base", "sklearn", __name__)
_validation = need("sklearn.utils.validation", "sklearn", __name__)

Array = npt.NDArray[Any]

__all__ = ["BatchNormTransformer"]

FLOATS = (np.float64, np.float32, np.float16)
"""What stays as it is; all else becomes the first."""


class BatchNormTransformer(_base.OneToOneFeatureMixin, _base.TransformerMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    """Normalize features (channels) with the statistics of the data that was fitted.

    ``y = (x - mean_) / sqrt(var_ + eps)``

    Parameters
    ----------
    axis : int
        The **channel** axis of arrays of more than two axes: images NCHW 1, NHWC -1. Not 0, which has the samples. Two
        axes are (samples, features) always.
    eps : float
        Added to the variance.
    correction : 0 or 1
        Of the variance: 0 divides by n, 1 by n - 1.
    with_mean, with_std : bool
        Whether the mean is taken off; whether it is divided by the standard deviation.
    copy : bool
        False: `transform` and `inverse_transform` write into their X where that is a writable array of floats. `fit`
        never does.

    Attributes
    ----------
    mean_, var_ : (C,) float64 array
        Of all samples seen. `var_` is NaN before there is one more than `correction`.
    moments_ : Moments
        Of all samples seen: adds up with those of other processes or machines.
    n_samples_seen_ : int or float
        With weights their sum.
    n_features_in_ : int
        C.
    feature_names_in_ : (C,) array of str
        If X had such names, as a DataFrame has.

    See Also
    --------
    fastbn.BatchNorm : With learned scale and shift, running statistics, and a backward.

    Notes
    -----
    ``eps=0`` is `StandardScaler` but for a feature that is constant: it becomes 0 whatever is transformed, where
    `StandardScaler` takes the mean off and divides by 1. NaN and Inf are refused. float16, float32 and float64 stay as
    they are, all else becomes float64.

    A DataFrame from `set_output` has two axes, and so has X then.

    References
    ----------
    Ioffe, Szegedy 2015, "Batch Normalization", arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop.sklearn import BatchNormTransformer
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> norm = BatchNormTransformer(eps=0).fit(x)
    >>> norm.transform(x)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> norm.inverse_transform([[0.0, 2.0]])
    array([[ 2., 40.]])
    >>> norm.partial_fit([[5.0, 50.0]]).mean_, norm.n_samples_seen_
    (array([ 3., 30.]), 3)
    """

    mean_: Array
    var_: Array
    moments_: Moments
    n_samples_seen_: float

    def __init__(
        self,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        correction: int = 0,
        with_mean: bool = True,
        with_std: bool = True,
        copy: bool = True,
    ) -> None:
        self.axis = axis
        self.eps = eps
        self.correction = correction
        self.with_mean = with_mean
        self.with_std = with_std
        self.copy = copy

    def fit(self, X: Any, y: Any = None, sample_weight: npt.ArrayLike | None = None) -> Self:
        """Take the statistics of X, and of nothing before.

        Parameters
        ----------
        X : (samples, features) array-like or DataFrame, or array of more axes
            With channels along `axis`.
        y : None
            Ignored.
        sample_weight : (samples,) array-like, optional
            Weight of each sample in the statistics: finite, not negative. 3 is three samples, 0 none.

        Returns
        -------
        BatchNormTransformer
            Itself.

        Raises
        ------
        ValueError
            NaN, Inf, no sample, one axis only; not more samples than `correction`; no weight.
        TypeError
            A sparse matrix; an option of the wrong type.
        """
        return self._fitted("fit", X, sample_weight, None)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: npt.ArrayLike | None = None) -> Self:
        """Add the samples of X to those seen: exact whatever the sizes of the batches.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`; the channels of the batches before.

        Returns
        -------
        BatchNormTransformer
            Itself.

        Raises
        ------
        ValueError, TypeError
            As `fit`, but that few samples, or none with weight, are no error before `transform`. Nothing changes then.
        """
        return self._fitted("partial_fit", X, sample_weight, getattr(self, "moments_", None))

    def transform(self, X: Any) -> Any:
        """Normalize X with the statistics that were fitted.

        Parameters
        ----------
        X : array-like
            With the channels of `fit`, of whatever rank.

        Returns
        -------
        array of X's shape
            In the dtype of X if that is floating, else float64; or what `set_output` says.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            Before `fit`.
        ValueError
            Other channels or names than in `fit`; not more samples seen than `correction`.
        """
        fn = "BatchNormTransformer.transform"
        mean, var, eps = self._statistics(fn)
        x, back = self._checked(fn, X, reset=False)
        return back(batch_norm(x, mean, var, eps=eps, out=self._out(fn, x)))

    def inverse_transform(self, X: Any) -> Array:
        """Undo `transform`: ``X * sqrt(var_ + eps) + mean_``.

        Parameters
        ----------
        X : array-like
            As `transform` returns it.

        Returns
        -------
        array of X's shape
            In the dtype of X if that is floating, else float64.

        Raises
        ------
        sklearn.exceptions.NotFittedError, ValueError
            As `transform`.
        """
        fn = "BatchNormTransformer.inverse_transform"
        mean, var, eps = self._statistics(fn)
        x, back = self._checked(fn, X, reset=False, names=False)
        return np.asarray(back(batch_norm(x, 0, 1, np.sqrt(var + eps), mean, eps=0, out=self._out(fn, x))))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = [np.dtype(d).name for d in FLOATS]
        tags.input_tags.three_d_array = True
        return tags

    def _fitted(self, verb: str, X: Any, sample_weight: Any, before: Moments | None) -> Self:
        fn = f"BatchNormTransformer.{verb}"
        correction = _check.correction(fn, self.correction)
        self._options(fn)
        x, _ = self._checked(fn, X, reset=before is None)
        where = None
        n: float = len(x)
        if sample_weight is not None:
            w = _validation.check_array(sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight")
            if w.shape != (len(x),):
                raise ValueError(f"{fn}: sample_weight has shape {w.shape}, expected {(len(x),)}, one for each sample")
            _check.not_negative(fn, "sample_weight", w)
            where, n = w.reshape(-1, *[1] * (x.ndim - 1)), float(w.sum())
        m = moments(x, where=where, start=before)
        n += 0 if before is None else self.n_samples_seen_
        if verb == "fit":
            _enough(fn, m, correction, n)
        self.moments_, self.n_samples_seen_ = m, n
        self.mean_, self.var_ = m.mean.copy(), m.var(correction)
        return self

    def _statistics(self, fn: str) -> tuple[Any, Any, float]:
        """The mean, variance and eps that normalize."""
        _validation.check_is_fitted(self)
        eps = self._options(fn)
        _enough(fn, self.moments_, _check.correction(fn, self.correction), self.n_samples_seen_)
        mean = self.mean_ if self.with_mean else np.zeros_like(self.mean_)
        return (mean, self.var_, eps) if self.with_std else (mean, np.ones_like(self.var_), 0.0)

    def _options(self, fn: str) -> float:
        for name in ("with_mean", "with_std", "copy"):
            _check.flag(fn, name, getattr(self, name))
        return _check.eps(fn, self.eps)

    def _checked(self, fn: str, X: Any, *, reset: bool, names: bool = True) -> tuple[Array, Any]:
        """X as an array with its channels along axis 1, and what brings a result back to X's axes."""
        axis = 1
        if getattr(X, "ndim", 2) > 2:
            try:
                axis = _check.index(self.axis)
            except TypeError:
                raise TypeError(f"{fn}: axis is {_check.shown(self.axis)}, expected an int") from None
            if not -X.ndim <= axis < X.ndim or not axis % X.ndim:
                raise ValueError(f"{fn}: axis is {axis}, expected that of the channels of X, of shape {tuple(X.shape)}")
            X = np.moveaxis(np.asarray(X), axis, 1)  # a view
        rules = {"dtype": FLOATS, "allow_nd": True}
        if names:
            x = _validation.validate_data(self, X, reset=reset, **rules)
        else:  # what transform returns has no names
            x = _validation.check_array(X, estimator=self, **rules)
            _check.channels(fn, x, 1, (self.n_features_in_,), "X")
        return x, lambda y: np.moveaxis(y, 1, axis)

    def _out(self, fn: str, x: Array) -> Array | None:
        return None if self.copy or not x.flags.writeable else x


def _enough(fn: str, m: Moments, correction: int, n: float) -> None:
    """Statistics need weight, and the variance with correction=1 more than that of one value."""
    if not np.any(m.count):
        raise ValueError(f"{fn}: sample_weight is zero for all samples, expected one above zero")
    if not np.all(m.count > correction):
        raise ValueError(
            f"{fn}: {n} sample{'' if n == 1 else 's'} seen, expected more than {correction} with "
            f"correction={correction}"
        )
