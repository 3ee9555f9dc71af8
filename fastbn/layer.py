"""BatchNorm: parameters and running statistics over the verbs."""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from . import _check
from .conventions import CONVENTIONS
from .functional import Saved, frozen, gradients, trained
from .moments import Moments, both_moved, one_batch, pooled, seen, to_go_on_from

Array = npt.NDArray[Any]


class BatchNorm:
    """A batch-normalization layer: learned scale and shift, running statistics, and the backward.

    In training (the default, `train`) a call normalizes with the statistics of its input and moves the running ones;
    in evaluation (`eval`) it normalizes with the running ones.

    Parameters
    ----------
    channels : int or tuple of ints
        Number of channels C; a tuple where `axis` is one, in the order of x's axes: wherever (C,) is written, the
        shape is then that tuple.
    axis : int or tuple of ints, default 1
        The **channel** axis: NCHW 1, NHWC -1. See `batch_norm`.
    eps : float, default 1e-5
        Added to the variance.
    momentum : float or None, default 0.9
        Weight of the **old** running value, from 0 to 1 (PyTorch's 0.1 is 0.9 here). None: the running statistics are
        those of all samples seen since the layer was made, pooled exactly, whatever the sizes of the batches.
        Where samples have weights, a channel without any stays as it was, and running_var also where the weight is not
        above `correction`.
    correction : 0 or 1, default 1
        Of the running variance: 1 keeps the unbiased estimate (PyTorch), which takes weights as frequencies; 0 the
        plain one (Keras, ONNX). The normalization itself always divides by n.
    center, scale : bool, default True
        Whether there is a beta, a gamma.
    track_running_stats : bool, default True
        False: no running statistics; evaluation uses those of its input too.
    activation : "relu", optional
        Applied to y, and to its gradient.
    dtype : "float32" or "float64", default "float32"
        Of parameters and running statistics. x may be of any dtype that `batch_norm` takes.

    Attributes
    ----------
    gamma, beta : (C,) array or None
        1 and 0 at first. Change them in place: ``bn.gamma -= rate * bn.dgamma``.
    running_mean, running_var : (C,) array or None
        0 and 1 at first. float64 with ``momentum=None``.
    num_batches_tracked : int
        Training calls that have moved the running statistics; an empty batch does not.
    dgamma, dbeta : (C,) array or None
        From the last `backward`, which replaces them.
    dresidual : array or None
        From the last `backward`, if the call before it had a residual.
    training : bool
        See `train` and `eval`.
    channels : tuple of ints
        The shape of the parameters, also where an int was given.
    axis, eps, momentum, correction, track_running_stats, activation, dtype
        As given.

    See Also
    --------
    batch_norm, batch_norm_train, batch_norm_backward : What it calls.
    fold_conv, fold_linear : The layer in evaluation, put into the weights before it.

    References
    ----------
    Ioffe, Szegedy 2015, "Batch Normalization", arXiv:1502.03167, Algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype("float32")
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> y.shape, dx.shape, bn.dgamma.shape
    ((8, 3, 4, 4), (8, 3, 4, 4), (3,))
    >>> bn.eval()(x[:1]).shape
    (1, 3, 4, 4)
    """

    _names = ("gamma", "beta", "running_mean", "running_var")
    _like: str | None = None  # the convention whose rules go beyond the arguments

    def __init__(
        self,
        channels: int | tuple[int, ...],
        *,
        axis: int | tuple[int, ...] = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        correction: int = 1,
        center: bool = True,
        scale: bool = True,
        track_running_stats: bool = True,
        activation: Literal["relu"] | None = None,
        dtype: npt.DTypeLike = "float32",
    ) -> None:
        fn = "BatchNorm"
        self.channels = shape = _check.channel_shape(fn, channels)
        self.axis = _check.layer_axis(fn, axis, shape)
        self.eps = _check.eps(fn, eps)
        self.momentum = None if momentum is None else _check.number(fn, "momentum", momentum, 0.0, 1.0)
        self.correction = _check.correction(fn, correction)
        self.track_running_stats = _check.flag(fn, "track_running_stats", track_running_stats)
        _check.activation(fn, activation)
        self.activation = activation
        self.dtype = _check.parameter_dtype(fn, dtype)
        scale, center = _check.flag(fn, "scale", scale), _check.flag(fn, "center", center)
        self.gamma = np.ones(shape, self.dtype) if scale else None
        self.beta = np.zeros(shape, self.dtype) if center else None
        self.running_mean: Array | None = None
        self.running_var: Array | None = None
        if self.track_running_stats:
            kept = np.dtype(np.float64) if momentum is None else self.dtype  # a pool in float32 would forget
            self.running_mean, self.running_var = np.zeros(shape, kept), np.ones(shape, kept)
        self.num_batches_tracked = 0
        self.training = True
        self.dgamma: Array | None = None
        self.dbeta: Array | None = None
        self.dresidual: Array | None = None
        self._pool = Moments.empty(shape)
        self._saved: Saved | None = None

    @classmethod
    def like(cls, system: str, channels: int | tuple[int, ...], **options: Any) -> Self:
        """Make a layer that follows the rules of another system.

        Parameters
        ----------
        system : str
            "torch", "keras", "keras1", "tf.contrib", "onnx", "flax", "chainer", "caffe", "cs231n" or "paper".
        channels : int or tuple of ints
            As in `BatchNorm`.
        **options
            Arguments of `BatchNorm` that differ from that system's defaults, in fastbn's words: PyTorch's momentum 0.1
            is 0.9 here, Keras's epsilon is `eps`.

        Returns
        -------
        BatchNorm
            With the system's axis, eps, momentum, correction, center, scale and first running values; and its rules
            whether training takes one value per channel, and whether the running statistics leave out what they start
            from (Caffe).

        Raises
        ------
        ValueError
            An unknown system.
        TypeError
            An option that `BatchNorm` has not.

        Notes
        -----
        The page "What other systems mean by batch normalization" (docs/reference/conventions.md) has all values and
        their sources.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm.like("keras", 64).momentum
        0.99
        """
        convention = _check.choice("BatchNorm.like", "system", system, CONVENTIONS)
        layer = cls(channels, **{**convention.options(), **options})
        layer._like = system
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean[...], layer.running_var[...] = convention.running_mean, convention.running_var
        return layer

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or with False to evaluation.

        Parameters
        ----------
        mode : bool, default True
            True for training.

        Returns
        -------
        BatchNorm
            The layer.
        """
        self.training = _check.flag("BatchNorm.train", "mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation.

        Returns
        -------
        BatchNorm
            The layer: ``y = bn.eval()(x)``.
        """
        return self.train(False)

    def __call__(
        self,
        x: npt.ArrayLike,
        *,
        residual: npt.ArrayLike | None = None,
        where: npt.ArrayLike | None = None,
        save: bool | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize x: in training with its own statistics, in evaluation with the running ones.

        Parameters
        ----------
        x : array
            With C channels along `axis`; see `batch_norm`. In training at least two values per channel, or none at all,
            which changes nothing.
        residual : array of x's shape, optional
            Added before the activation.
        where : array that broadcasts to x's shape, optional
            Weights of the values in the statistics, as in `batch_norm_train`; their sum takes the place of n. In
            evaluation they are checked, and not used unless ``track_running_stats=False``. With ``correction=1`` the
            running variance moves in channels where that sum is above 1.
        save : bool, optional
            Keep what `backward` needs (a reference to x) until the next call. By default in training only.
        out : array of y's shape and dtype, optional
            Receives y; may be x itself (in training without residual and activation, in evaluation without
            ``save=True``), or `residual`.

        Returns
        -------
        y : array of x's shape
            In the dtype of x, of integers and booleans in float32 or that of `out`; `out` if given.

        Raises
        ------
        ValueError
            Other channels than the layer has; in training, one value per channel; else as `batch_norm_train`. Layer and
            `out` stay as they were.
        TypeError
            As `batch_norm`. Layer and `out` stay as they were.

        See Also
        --------
        BatchNorm.backward : The gradients of this call.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1)
        >>> bn(np.array([[1.0], [2.0], [6.0]])).round(2).ravel()
        array([-0.93, -0.46,  1.39])
        >>> bn.running_mean, bn.running_var
        (array([0.3], dtype=float32), array([1.6], dtype=float32))
        """
        fn = "BatchNorm"
        x = _check.array(fn, "x", x)
        _check.channels(fn, x, self.axis, self.channels)
        save = self.training if save is None else _check.flag(fn, "save", save)
        if self.training or not self.track_running_stats:
            tracks = self.training and self.track_running_stats
            if tracks:
                mean, var = self._writable(fn)
                if isinstance(out, np.ndarray):
                    _check.apart(fn, "out", out, "running_mean", mean)
                    _check.apart(fn, "out", out, "running_var", var)
            y, saved = trained(
                x, self.gamma, self.beta, axis=self.axis, eps=self.eps, where=where, residual=residual,
                activation=self.activation, out=out, fn=fn,
                single=self._like is not None and CONVENTIONS[self._like].single,
            )  # fmt: skip
            kept = saved if save else None
            if tracks and seen(saved.count):
                after, pool = self._after(mean, var, saved)
                batches = self.num_batches_tracked + 1
                # All or none: from here on no call, where Ctrl-C could come between (see `update_running`).
                mean[...], var[...] = after
                self.num_batches_tracked, self._pool = batches, pool
            self._saved = kept
            return y
        mean, var = self._running(fn)
        if save and out is not None:
            _check.not_in_place(fn, out, x)
        if where is not None:
            _check.weights(fn, where, x.shape)
        y, self._saved = frozen(
            fn, x, mean, var, self.gamma, self.beta, axis=self.axis, eps=self.eps, residual=residual,
            activation=self.activation, out=out, keep=save, names=self._names[2:],
        )  # fmt: skip
        return y

    def backward(self, dy: npt.ArrayLike, *, out: Array | None = None) -> Array:
        """Gradient of the last call's x, given that of its y; sets `dgamma`, `dbeta` and `dresidual`.

        After an evaluation call with ``save=True`` the running statistics count as constants.

        Parameters
        ----------
        dy : array of x's shape
            Floating; see `batch_norm_backward`.
        out : array of y's shape and dtype, optional
            Receives dx; may be dy itself.

        Returns
        -------
        dx : array of x's shape
            In the dtype of y and the memory order of x; `out` if given.

        Raises
        ------
        ValueError
            Before a training call, or after an evaluation call without ``save=True``; else as `batch_norm_backward`.
        TypeError
            As `batch_norm_backward`.

        See Also
        --------
        batch_norm_backward : The formulas, and what is read and written.
        """
        if self._saved is None:
            raise ValueError(
                "BatchNorm.backward: there is no forward to go back through; expected a call in training, or one with "
                "save=True in evaluation, before it"
            )
        dx, dgamma, dbeta, *more = gradients("BatchNorm.backward", dy, self._saved, out)
        self.dgamma = dgamma if self.gamma is not None else None
        self.dbeta = dbeta if self.beta is not None else None
        self.dresidual = more[0] if more else None
        return dx

    def fit_population(
        self,
        batches: Iterable[npt.ArrayLike] | npt.ArrayLike,
        *,
        start: Moments | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Set the running statistics to those of a whole data set, exact whatever the sizes of its batches.

        Parameters
        ----------
        batches : iterable of arrays
            Inputs of this layer, one batch at a time; each is let go before the next is asked for. A
            list or tuple too holds batches. A single array, such as a memory-map, is one batch (`moments` says what is
            copied of it: nothing as a rule).
        start : Moments, optional
            Of what came before, to which the batches are added: to go on after a stop, or in place of batches (which
            may be empty), with weights too.
        progress : bool, optional
            A progress bar on stderr, of tqdm. True: always; False: never; None: where stderr is a terminal and tqdm is
            installed. A single array has none.

        Returns
        -------
        BatchNorm
            The layer, with `running_mean` and `running_var` set. If a batch is refused or the iteration fails, they
            stay as they were; num_batches_tracked does always.

        Raises
        ------
        ValueError
            A batch, or `start`, with other channels than the layer; fewer samples than the variance needs; a layer that
            keeps no running statistics.
        TypeError
            `start` that is no Moments; batches that are no arrays.
        ImportError
            ``progress=True`` without tqdm.

        Notes
        -----
        Reads what `moments` of the batches reads, and gives its bits. An earlier layer must normalize with its own
        population statistics meanwhile, so fit a network's layers from the first to the last.

        References
        ----------
        Ioffe, Szegedy 2015, arXiv:1502.03167, Algorithm 2, steps 8 to 10, where the variance is m / (m - 1) times the
        mean over batches of the variance; here it is that of all samples.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> batches = (np.full((n, 1), float(n)) for n in (1, 3))
        >>> bn = fastbn.BatchNorm(1).fit_population(batches)
        >>> bn.running_mean, bn.running_var
        (array([2.5], dtype=float32), array([1.], dtype=float32))
        """
        fn = "BatchNorm.fit_population"
        mean, var = self._writable(fn)
        start = Moments.empty(self.channels) if start is None else to_go_on_from(fn, start, self.channels)
        if progress is not None:
            _check.flag(fn, "progress", progress)
        if _check.is_array(batches):
            pool = start + one_batch(fn, batches, self.axis, start)[2]
        elif isinstance(batches, Iterable):
            pool = pooled(fn, batches, self.axis, start, progress)
        else:
            raise TypeError(f"{fn}: batches is of type {type(batches).__name__}, expected an iterable of arrays")
        _check.population(fn, pool.count, self.correction)
        after = self._statistics_of(pool, mean, var)
        # All or none: no call between, where Ctrl-C could come (see `update_running`).
        mean[...], var[...] = after
        self._pool = pool
        return self

    def fold(self) -> tuple[Array, Array]:
        """Return the affine map that the layer is in evaluation: ``y = x * scale + shift``.

        Returns
        -------
        scale, shift : (C,) array
            Computed in float64, rounded to the layer's dtype. Reshape them to broadcast over x.

        Raises
        ------
        ValueError
            If the layer keeps no running statistics.

        See Also
        --------
        fold_conv, fold_linear : Weight and bias that do the layer before, too.

        Notes
        -----
        The activation stays to be applied. Digits are lost where abs(mean) is large beside the standard deviation,
        because ``x * scale`` and ``shift`` cancel then; a call of the layer does not lose them.

        Examples
        --------
        >>> import fastbn
        >>> bn = fastbn.BatchNorm(1, eps=0)
        >>> bn.running_mean[:], bn.running_var[:] = 3, 4
        >>> bn.fold()
        (array([0.5], dtype=float32), array([-1.5], dtype=float32))
        """
        mean, scale, beta = self._affine("BatchNorm.fold")
        with np.errstate(all="ignore"):
            return np.asarray(scale, self.dtype), np.asarray(-mean * scale + beta, self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Copy what the layer has learned, by name.

        Returns
        -------
        dict
            Of gamma, beta, running_mean, running_var (arrays) and num_batches_tracked (int), as far as the layer has
            them. With ``momentum=None`` also running_count and running_m2: the number of values per channel behind the
            running statistics (with weights an array, the total of each channel) and their centred sum of squares.

        See Also
        --------
        BatchNorm.load_state_dict : The way back.

        Examples
        --------
        >>> import fastbn
        >>> sorted(fastbn.BatchNorm(3).state_dict())
        ['beta', 'gamma', 'num_batches_tracked', 'running_mean', 'running_var']
        """
        state: dict[str, Any] = {name: a.copy() for name, a in self._arrays().items()}
        if self.track_running_stats:
            state["num_batches_tracked"] = self.num_batches_tracked
            if self.momentum is None:
                n = self._pool.count
                state["running_count"] = n if isinstance(n, int) else n.copy()
                state["running_m2"] = self._pool.m2.copy()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Set everything that `state_dict` returns, in place.

        It drops what a forward has saved for `backward`. Without both running_count and running_m2, a layer with
        ``momentum=None`` starts a new pool at its next training call; a layer of another momentum ignores them.

        The state may come from a stranger: each value is read once, its size and dtype before it, and nothing is ever
        unpickled.

        Parameters
        ----------
        state : mapping
            The keys of `state_dict`, with arrays of the layer's channels, or one number for all of them, of any dtype
            that `batch_norm` takes. The open file of ``np.load("state.npz")`` is one, too.

        Returns
        -------
        BatchNorm
            The layer.

        Raises
        ------
        ValueError
            A key missing or unknown, a wrong shape, a negative running_var, a damaged file. The layer stays as it was.
        TypeError
            A value that is not numeric. The layer stays as it was.

        Examples
        --------
        >>> import fastbn
        >>> bn = fastbn.BatchNorm(3)
        >>> bn.gamma[:] = 2
        >>> fastbn.BatchNorm(3).load_state_dict(bn.state_dict()).gamma
        array([2., 2., 2.], dtype=float32)
        """
        fn = "BatchNorm.load_state_dict"
        arrays, own, of = self._arrays(), self.channels, ", the layer's channels"
        counters = ["num_batches_tracked"] if self.track_running_stats else []
        pooled = ["running_count", "running_m2"] if self.track_running_stats else []
        found = _check.keys(fn, state, [*arrays, *counters], pooled)
        after = {}
        for name, a in arrays.items():
            _check.statistic(fn, name, a, own)
            check = _check.variance if name == "running_var" else _check.parameter
            value = check(fn, name, _check.entry(fn, state, name, own, of), own, of)
            with np.errstate(all="ignore"):
                after[name] = np.array(np.broadcast_to(value, own), a.dtype)  # a copy: it may be an array of the layer
        one = (1,), ", one number"
        batches = _check.count(fn, counters[0], _check.entry(fn, state, counters[0], *one)) if counters else 0
        pool = Moments.empty(own)
        if self.momentum is None and found.issuperset(pooled) and pooled:
            entry = _check.entry(fn, state, pooled[0], own, of, (1,))
            n = _check.count_or_weights(fn, pooled[0], entry, own, of)
            m2 = _check.variance(fn, pooled[1], _check.entry(fn, state, pooled[1], own, of), own, of)
            pool = Moments(n, after["running_mean"].astype(np.float64), np.array(np.broadcast_to(m2, own), np.float64))
        if self.track_running_stats:
            self._writable(fn)
        # What the layer has not is a scratch array here.
        gamma, beta, mean, var = (arrays.get(name, np.empty(own)) for name in self._names)
        values = [after.get(name, 0.0) for name in self._names]
        # All or none: no call between, where Ctrl-C could come (see `update_running`).
        gamma[...], beta[...], mean[...], var[...] = values
        self.num_batches_tracked, self._pool, self._saved = batches, pool, None
        return self

    def __repr__(self) -> str:
        own = {
            "axis": self.axis, "eps": self.eps, "momentum": self.momentum, "correction": self.correction,
            "center": self.beta is not None, "scale": self.gamma is not None,
            "track_running_stats": self.track_running_stats, "activation": self.activation, "dtype": self.dtype.name,
        }  # fmt: skip
        usual = dict(BatchNorm.__init__.__kwdefaults__ or {})
        name, shown = "BatchNorm", []
        if self._like is not None:
            name, shown = "BatchNorm.like", [repr(self._like)]
            usual.update(CONVENTIONS[self._like].options())
        shown.append(repr(self.channels[0] if len(self.channels) == 1 else self.channels))
        shown += [f"{k}={v!r}" for k, v in own.items() if v != usual[k]]
        return f"{name}({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_saved": None}  # a pickled or copied layer leaves the last batch behind

    def _arrays(self) -> dict[str, Array]:
        return {name: a for name in self._names if (a := getattr(self, name)) is not None}

    def _running(self, fn: str) -> tuple[Array, Array]:
        if self.running_mean is None or self.running_var is None:
            raise ValueError(f"{fn}: the layer keeps no running statistics; expected track_running_stats=True")
        return self.running_mean, self.running_var

    def _affine(self, fn: str) -> tuple[Array, Array, Array]:
        """(mean, scale, beta) of ``y = (x - mean) * scale + beta``, the layer in evaluation, in float64."""
        self._running(fn)
        eps = _check.eps(fn, self.eps)
        given: dict[str, Array] = {"gamma": np.ones(self.channels), "beta": np.zeros(self.channels)}
        for name, a in self._arrays().items():
            check = _check.variance if name == "running_var" else _check.parameter
            value = check(fn, name, a, self.channels, ", the layer's channels")
            given[name] = np.broadcast_to(value, self.channels).astype(np.float64)
        with np.errstate(all="ignore"):
            v = given["running_var"] + eps
            scale = np.where(v == 0, 0.0, 1.0 / np.sqrt(v)) * given["gamma"]
        return given["running_mean"], scale, given["beta"]

    def _writable(self, fn: str) -> tuple[Array, Array]:
        """The running statistics, after every check that an update of them could fail."""
        if not self.track_running_stats:
            self._running(fn)  # which raises, and says why
        if self.momentum is not None:
            _check.number(fn, "momentum", self.momentum, 0.0, 1.0)
        _check.correction(fn, self.correction)
        mean = _check.statistic(fn, "running_mean", self.running_mean, self.channels)
        var = _check.statistic(fn, "running_var", self.running_var, self.channels)
        _check.apart(fn, "running_mean", mean, "running_var", var)
        _check.count(fn, "num_batches_tracked", self.num_batches_tracked)
        return mean, var

    def _after(self, mean: Array, var: Array, saved: Saved) -> tuple[tuple[Array, Array], Moments]:
        """The running statistics and the pool after a batch; nothing is written."""
        if self.momentum is None:
            pool = self._pool + saved.moments
            return self._statistics_of(pool, mean, var), pool
        m, momentum, correction = saved._shared_moments(), self.momentum, self.correction
        if self._like is not None:
            if CONVENTIONS[self._like].debias:
                t = self.num_batches_tracked + 1
                momentum *= (1.0 - momentum ** (t - 1)) / (1.0 - momentum**t) if momentum < 1.0 else (t - 1) / t
            if isinstance(m.count, int):
                correction = min(correction, m.count - 1)  # m / max(m - 1, 1)
        return both_moved(mean, var, m, momentum, correction), self._pool

    def _statistics_of(self, pool: Moments, mean: Array, var: Array) -> tuple[Array, Array]:
        """The running statistics of a pool, in the dtypes of `mean` and `var`, which stay where it has none."""
        with np.errstate(all="ignore"):
            of = pool.mean.astype(mean.dtype), pool.var(self.correction).astype(var.dtype)
        n = pool.count
        return of if isinstance(n, int) else (np.where(n > 0, of[0], mean), np.where(n > self.correction, of[1], var))
