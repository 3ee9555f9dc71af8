"""tf.contrib.layers.batch_norm, eager on NumPy arrays: its arguments, scopes, collections and batch renormalization.

Source: TensorFlow 1.4, `tensorflow/contrib/layers/python/layers/layers.py` and
`tensorflow/python/layers/normalization.py`. What is a graph there is a registry here: variables live under scoped names
in a `Graph`, and updates wait in its collections until `run_updates` runs them: who forgets it has moving averages that
never move, as there. Each call is a step, so calls after the first say ``reuse=True`` (or AUTO_REUSE always), with a
scope.
"""

from __future__ import annotations  # help() says ArrayLike, not all that it stands for

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import _check
from ..functional import Saved, batch_norm_backward, frozen, trained
from ..moments import Moments, moments, moved, seen
from ._penalty import Penalty, initial, regularizer

Array = npt.NDArray[Any]

UPDATE_OPS = "update_ops"
"""The collection of each `Update` that waits."""
GLOBAL_VARIABLES = "variables"
"""The collection of every `Variable`."""
MODEL_VARIABLES = "model_variables"
"""The collection of the variables that `batch_norm` makes."""
TRAINABLE_VARIABLES = "trainable_variables"
"""The collection of the variables that an optimizer moves: every beta and gamma, unless ``trainable=False``."""
REGULARIZATION_LOSSES = "regularization_losses"
"""The collection of each `Loss`."""
AUTO_REUSE = "auto_reuse"
"""For `reuse`: variables are made if they do not exist, and shared if they do."""
FUSED_EPSILON = 1.001e-5  # the least that the fused operation takes; it raises smaller ones to it
AXES = {"NHWC": -1, "NCHW": 1}

__all__ = [
    "AUTO_REUSE",
    "GLOBAL_VARIABLES",
    "MODEL_VARIABLES",
    "REGULARIZATION_LOSSES",
    "TRAINABLE_VARIABLES",
    "UPDATE_OPS",
    "Graph",
    "Loss",
    "Update",
    "Variable",
    "batch_norm",
    "get_collection",
    "get_default_graph",
    "get_variable",
    "gradients",
    "l1_regularizer",
    "l2_regularizer",
    "reset_default_graph",
    "run_updates",
    "variable_scope",
]


# ------------------------------------------------------------------------------------------------------------ the graph


class Variable:
    """A named array that calls change in place.

    Attributes
    ----------
    name : str
        With the scopes, as "bn/moving_mean".
    value : array
    trainable : bool
    """

    def __init__(self, name: str, value: Array, trainable: bool) -> None:
        self.name, self.value, self.trainable = name, value, trainable

    def __repr__(self) -> str:
        return f"Variable({self.name!r}, {self.value.dtype}{self.value.shape}, trainable={self.trainable})"


class Update:
    """A move of one moving average that waits in a collection; `run_updates` runs it, once.

    Attributes
    ----------
    name : str
        Of the variable that moves.
    """

    def __init__(self, name: str, step: Callable[[], None]) -> None:
        self.name = name
        self.step: Callable[[], None] | None = step

    def run(self) -> None:
        """Move; a second time nothing."""
        step, self.step = self.step, None
        if step is not None:
            step()

    def __repr__(self) -> str:
        return f"Update({self.name!r})"


class Loss:
    """The penalty of a variable, as it is now: ``float(loss)``, with `gradient`.

    Attributes
    ----------
    name : str
        Of the variable.
    """

    def __init__(self, variable: Variable, penalty: Any) -> None:
        self.name, self._variable, self._penalty = variable.name, variable, penalty

    def __float__(self) -> float:
        return float(self._penalty(self._variable.value))

    def gradient(self) -> Array:
        """The derivative of the penalty by the variable.

        Returns
        -------
        array
            In the shape and dtype of the variable.
        """
        return np.asarray(self._penalty.gradient(self._variable.value), self._variable.value.dtype)

    def __repr__(self) -> str:
        return f"Loss({self.name!r})"


class Graph:
    """Variables by name, and collections; `get_default_graph` is the one that functions use.

    Attributes
    ----------
    variables : dict
        Each `Variable` by its name.

    Notes
    -----
    Not for several threads at once.
    """

    def __init__(self) -> None:
        self.variables: dict[str, Variable] = {}
        self._collections: dict[str, list[Any]] = {}
        self._scopes: list[tuple[str, Any]] = [("", None)]
        self._defaults: dict[str, int] = {}
        self._calls: dict[str, tuple[Saved, Any]] = {}

    @contextlib.contextmanager
    def as_default(self) -> Iterator[Graph]:
        """Make it the default graph inside of a ``with``.

        Yields
        ------
        Graph
            Itself.
        """
        _graphs.append(self)
        try:
            yield self
        finally:
            _graphs.remove(self)

    def get_collection(self, key: str) -> list[Any]:
        """What has been added to a collection.

        Parameters
        ----------
        key : str

        Returns
        -------
        list
            A copy; empty if there is no such collection.
        """
        return list(self._collections.get(key, ()))

    def add_to_collection(self, key: str, value: Any) -> None:
        """Append a value to a collection, which is made if there is none.

        Parameters
        ----------
        key : str
        value : object
        """
        self._collections.setdefault(key, []).append(value)

    def forget_updates(self) -> None:
        """Take the updates that have run out of all collections."""
        for values in self._collections.values():
            values[:] = [v for v in values if not isinstance(v, Update) or v.step is not None]

    @contextlib.contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Whatever is registered inside is forgotten if an error comes out."""
        variables, defaults, calls = dict(self.variables), dict(self._defaults), dict(self._calls)
        lengths = {key: len(values) for key, values in self._collections.items()}
        try:
            yield
        except BaseException:
            self.variables, self._defaults, self._calls = variables, defaults, calls
            for key, values in self._collections.items():
                del values[lengths.get(key, 0) :]
            raise


_graphs = [Graph()]


def get_default_graph() -> Graph:
    """The graph that functions here use.

    Returns
    -------
    Graph
    """
    return _graphs[-1]


def reset_default_graph() -> None:
    """Start anew, with an empty default graph.

    Raises
    ------
    ValueError
        Inside of `Graph.as_default`.
    """
    if len(_graphs) > 1:
        raise ValueError(
            "reset_default_graph: another graph is the default now, expected no Graph.as_default around it"
        )
    _graphs[:] = [Graph()]


def get_collection(key: str) -> list[Any]:
    """What has been added to a collection of the default graph.

    Parameters
    ----------
    key : str

    Returns
    -------
    list
        A copy; empty if there is no such collection.
    """
    return get_default_graph().get_collection(key)


def run_updates(updates: Iterable[Update] | None = None) -> int:
    """Apply updates that wait, in their order, and take them out of all collections: `session.run(update_ops)`.

    Parameters
    ----------
    updates : iterable of Update, optional
        Such as ``get_collection("my_updates")``. By default all of UPDATE_OPS.

    Returns
    -------
    count : int
        How many there were.

    Raises
    ------
    ValueError
        One that waits no more; none is run then.
    TypeError
        What is no `Update`.
    """
    graph = get_default_graph()
    pending = graph.get_collection(UPDATE_OPS) if updates is None else list(updates)
    for u in pending:
        if not isinstance(u, Update):
            raise TypeError(f"run_updates: updates has one of type {type(u).__name__}, expected Update")
        if u.step is None:
            raise ValueError(f"run_updates: updates has {u}, which has run already, expected such that wait")
    try:
        for u in pending:
            u.run()
    finally:  # whatever came between: what has run waits no more
        graph.forget_updates()
    return len(pending)


@contextlib.contextmanager
def variable_scope(
    name_or_scope: str | None, default_name: str | None = None, reuse: bool | str | None = None
) -> Iterator[str]:
    """Open a scope of names inside of the current one.

    Parameters
    ----------
    name_or_scope : str or None
    default_name : str, optional
        Used for the name None, with "_1" and so on behind it the second time. Counting starts again when a named scope
        around it is left: opened again, with `reuse`, it has the same names.
    reuse : bool, AUTO_REUSE or None
        True: variables exist already. AUTO_REUSE: they are made if they do not. None or False: they are new, or as the
        scope around it says.

    Yields
    ------
    str
        The full name of the scope.

    Raises
    ------
    ValueError
        No name at all; ``reuse=True`` without a name.
    TypeError
        A name that is no str.
    """
    fn = "variable_scope"
    graph = get_default_graph()
    outer, inherited = graph._scopes[-1]
    if reuse not in (None, False, True, AUTO_REUSE):
        raise ValueError(f"{fn}: reuse is {_check.shown(reuse)}, expected None, False, True or AUTO_REUSE")
    if name_or_scope is None:
        if default_name is None:
            raise ValueError(f"{fn}: name_or_scope and default_name are None, expected a name")
        if reuse:
            raise ValueError(f"{fn}: reuse is {reuse!r} and name_or_scope is None, expected the scope to be reused")
        key = f"{outer}/{default_name}"
        n = graph._defaults.get(key, 0)
        graph._defaults[key] = n + 1
        name = default_name if not n else f"{default_name}_{n}"
    elif isinstance(name_or_scope, str):
        name = name_or_scope
    else:
        raise TypeError(f"{fn}: name_or_scope is {_check.shown(name_or_scope)}, expected a str or None")
    full = f"{outer}/{name}" if outer else name
    graph._scopes.append((full, reuse or inherited))
    try:
        yield full
    finally:
        graph._scopes.pop()
        for key in [k for k in graph._defaults if k.startswith(f"{full}/")]:
            del graph._defaults[key]


def get_variable(
    name: str,
    shape: tuple[int, ...] = (),
    dtype: npt.DTypeLike = "float32",
    initializer: Callable[[tuple[int, ...]], Any] = np.zeros,
    trainable: bool = True,
    collections: Iterable[str] = (GLOBAL_VARIABLES,),
) -> Variable:
    """Make or find a variable of the current scope, as its `reuse` says.

    Parameters
    ----------
    name : str
        Without the scopes.
    shape : tuple of int
    dtype : dtype
        float32 or float64.
    initializer : callable
        Function of the shape, of a variable that is made.
    trainable : bool
        Whether a variable that is made goes to TRAINABLE_VARIABLES, too.
    collections : iterable of str
        That a variable that is made is added to.

    Returns
    -------
    Variable

    Raises
    ------
    ValueError
        It exists and is not to be reused; it does not and is; it has another shape or dtype.
    """
    fn = "get_variable"
    graph, shape = get_default_graph(), tuple(shape)
    outer, reuse = graph._scopes[-1]
    full = f"{outer}/{name}" if outer else name
    found = graph.variables.get(full)
    if found is None:
        if reuse is True:
            raise ValueError(f"{fn}: variable {full} does not exist, expected one as reuse=True (or reuse=AUTO_REUSE)")
        found = Variable(full, initial(fn, name, initializer, shape, _check.parameter_dtype(fn, dtype)), trainable)
        graph.variables[full] = found
        for key in dict.fromkeys([*collections, *([TRAINABLE_VARIABLES] if trainable else [])]):
            graph.add_to_collection(key, found)
        return found
    if not reuse:
        raise ValueError(f"{fn}: variable {full} already exists, expected reuse=True or AUTO_REUSE to share it")
    if found.value.shape != shape:
        raise ValueError(f"{fn}: variable {full} has shape {found.value.shape}, expected {shape} to be shared")
    if found.value.dtype != dtype:
        raise ValueError(
            f"{fn}: variable {full} has dtype {found.value.dtype}, expected {np.dtype(dtype)} to be shared"
        )
    return found


def l1_regularizer(scale: float) -> Penalty:
    """The regularizer ``scale * sum(abs(w))``.

    Parameters
    ----------
    scale : float
        0 or more.

    Returns
    -------
    Penalty
        For `param_regularizers`: called with an array it is the penalty, its method ``gradient`` the derivative.
    """
    return Penalty(l1=scale)


def l2_regularizer(scale: float) -> Penalty:
    """The regularizer ``scale * sum(w**2) / 2``.

    Parameters
    ----------
    scale : float
        0 or more.

    Returns
    -------
    Penalty
        As of `l1_regularizer`.
    """
    return Penalty(l2=_check.number("l2_regularizer", "scale", scale, 0.0) / 2.0)


# ----------------------------------------------------------------------------------------------------------- batch_norm


def batch_norm(
    inputs: npt.ArrayLike,
    decay: float = 0.999,
    center: bool = True,
    scale: bool = False,
    epsilon: float = 0.001,
    activation_fn: Callable[[Array], Any] | Literal["relu"] | None = None,
    param_initializers: Mapping[str, Callable[[tuple[int, ...]], Any]] | None = None,
    param_regularizers: Mapping[str, Any] | None = None,
    updates_collections: str | None = UPDATE_OPS,
    is_training: bool = True,
    reuse: bool | str | None = None,
    variables_collections: Iterable[str] | Mapping[str, Iterable[str]] | None = None,
    outputs_collections: str | Iterable[str] | None = None,
    trainable: bool = True,
    batch_weights: npt.ArrayLike | None = None,
    fused: bool | None = None,
    data_format: str = "NHWC",
    zero_debias_moving_mean: bool = False,
    scope: str | None = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, float] | None = None,
    renorm_decay: float = 0.99,
) -> Array:
    """Normalize a batch with variables of a scope.

    Parameters
    ----------
    inputs : array
        Of rank 2 or more; channels along the last axis, or along axis 1 with ``data_format="NCHW"``.
    decay : float
        Weight of the old moving averages.
    center, scale : bool
        Whether there is a variable beta, a variable gamma.
    epsilon : float
        Added to the variance; the fused operation raises it to at least 1.001e-5.
    activation_fn : callable or "relu", optional
        Applied to the result; "relu" in the same pass over memory.
    param_initializers : dict, optional
        Functions of a shape for beta, gamma, moving_mean and moving_variance: 0, 1, 0 and 1 when absent.
    param_regularizers : dict, optional
        For beta and gamma: what `l1_regularizer` and `l2_regularizer` return, or a callable with a method ``gradient``.
        A new variable's `Loss` goes to REGULARIZATION_LOSSES.
    updates_collections : str or None
        Where the updates of the moving averages wait for `run_updates`; until then nothing moves, at the next call
        neither. None: at once.
    is_training : bool
        Whether the batch's statistics normalize, or the moving averages.
    reuse : bool, AUTO_REUSE or None
        See `variable_scope`; for True a scope is needed.
    variables_collections : list of str, or dict of lists by variable, optional
        Further collections of the variables.
    outputs_collections : str or list of str, optional
        Collections that the result is added to, which keep it alive.
    trainable : bool
        Whether beta and gamma go to TRAINABLE_VARIABLES.
    batch_weights : (batch,) array, optional
        Weights of the samples in the statistics; of weight 0 is padding, which may be NaN.
    fused : bool or None
        Decides what moves moving_variance: True the variance times n / max(n - 1, 1), False the plain one. None: True
        where it can be, that is for rank 2 or 4 without batch_weights, renorm and param_regularizers.
    data_format : "NHWC" or "NCHW"
    zero_debias_moving_mean : bool
        moving_mean leaves out what it started from: it is the variable moving_mean/biased over ``1 - decay**t``, with
        t in moving_mean/local_step. moving_variance is never treated so.
    scope : str, optional
        "BatchNorm", "BatchNorm_1" and so on when omitted.
    renorm : bool
        Batch renormalization: ``(xhat * r + d) * gamma + beta``, where r and d (constants to the backward) lead to
        the moving renorm_mean and renorm_stddev, each divided by its weight, renorm_mean_weight or
        renorm_stddev_weight. As long as these are small, the batch takes the rest.
    renorm_clipping : dict, optional
        rmin, rmax and dmax: r is kept in [rmin, rmax], d in [-dmax, dmax]. Absent ones do not clip.
    renorm_decay : float
        Weight of the old renorm averages.

    Returns
    -------
    outputs : array of the shape of inputs
        In their dtype (of integers: float32). Variables are float64 beside float64 inputs, else float32.

    Raises
    ------
    ValueError
        data_format, rank or another value that is not listed; variables that exist, or do not, against `reuse`;
        ``fused=True`` with batch_weights, renorm, param_regularizers or another rank than 2 or 4 (TensorFlow to 1.3
        raises, later ones turn it off); renorm with batch_weights, zero_debias_moving_mean or another
        updates_collections than UPDATE_OPS. The graph stays as it was.
    TypeError
        What is not numeric or of another type. The graph stays as it was.

    References
    ----------
    Ioffe 2017, "Batch Renormalization", arXiv:1702.03275.

    Notes
    -----
    The graph refers to the inputs of the last call of each scope, for `gradients`. A call without a scope makes a new
    one each time, and new variables, unless a named `variable_scope` around it is opened again.

    With renorm inputs are read once more: r and d need the statistics first. A batch whose weights are all 0 moves
    nothing (in TensorFlow: to NaN).

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import tf_contrib
    >>> tf_contrib.reset_default_graph()
    >>> x = np.array([[1.0], [3.0]])
    >>> y = tf_contrib.batch_norm(x, decay=0.9, fused=False, scope="bn")
    >>> moving = tf_contrib.get_default_graph().variables["bn/moving_mean"]
    >>> before = moving.value.copy()
    >>> tf_contrib.run_updates(), before, moving.value
    (2, array([0.]), array([0.2]))
    """
    fn = "batch_norm"
    graph = get_default_graph()
    x = _check.array(fn, "inputs", inputs)
    axis = _check.choice(fn, "data_format", data_format, AXES)
    if x.ndim < 2:
        raise ValueError(f"{fn}: inputs has shape {x.shape}, expected at least 2 axes")
    decay = _check.number(fn, "decay", decay, 0.0, 1.0)
    renorm_decay = _check.number(fn, "renorm_decay", renorm_decay, 0.0, 1.0)
    eps = _check.number(fn, "epsilon", epsilon, 0.0)
    flags = {
        "center": center, "scale": scale, "is_training": is_training, "trainable": trainable,
        "zero_debias_moving_mean": zero_debias_moving_mean, "renorm": renorm,
    }  # fmt: skip
    for name, value in flags.items():
        _check.flag(fn, name, value)
    if activation_fn is not None and not callable(activation_fn) and activation_fn != "relu":
        error = ValueError if isinstance(activation_fn, str) else TypeError
        raise error(f"{fn}: activation_fn is {_check.shown(activation_fn)}, expected a callable, 'relu' or None")
    initializers = _mapping(fn, "param_initializers", param_initializers, ("beta", "gamma", *MOVING))
    regularizers = _mapping(fn, "param_regularizers", param_regularizers, ("beta", "gamma"))
    regularizers = {k: regularizer(fn, f"param_regularizers['{k}']", v) for k, v in regularizers.items()}
    clipping = _clipping(fn, renorm_clipping)
    where = None if batch_weights is None else _batch_weights(fn, batch_weights, x)
    fuse = _fuses(fn, fused, x.ndim in (2, 4), batch_weights is not None, renorm, bool(regularizers))
    if renorm and (batch_weights is not None or zero_debias_moving_mean or updates_collections != UPDATE_OPS):
        raise ValueError(
            f"{fn}: renorm is True with batch_weights, zero_debias_moving_mean or other updates_collections, expected "
            f"none of these, and UPDATE_OPS"
        )
    if updates_collections is not None and not isinstance(updates_collections, str):
        raise TypeError(f"{fn}: updates_collections is {_check.shown(updates_collections)}, expected a str or None")
    if fuse:
        eps = max(eps, FUSED_EPSILON)
    shape = (x.shape[axis],)
    dtype = np.promote_types(_check.result_dtype(x), np.float32)
    relu: Literal["relu"] | None = "relu" if not callable(activation_fn) and activation_fn is not None else None

    with graph._unchanged_on_error(), variable_scope(scope, "BatchNorm", reuse) as full:

        def variable(
            name: str, first: Callable[[tuple[int, ...]], Any], *, learned: bool = False, shape: Any = shape
        ) -> Variable:
            more = _collections_of(fn, variables_collections, name)
            before = len(graph.variables)
            made = get_variable(
                name, shape, dtype, initializers.get(name, first), learned and trainable,
                (GLOBAL_VARIABLES, MODEL_VARIABLES, *more),
            )  # fmt: skip
            if name in regularizers and len(graph.variables) > before:  # a shared one has its loss already
                graph.add_to_collection(REGULARIZATION_LOSSES, Loss(made, regularizers[name]))
            return made

        beta = variable("beta", np.zeros, learned=True) if center else None
        gamma = variable("gamma", np.ones, learned=True) if scale else None
        moving = [variable(name, first) for name, first in zip(MOVING, (np.zeros, np.ones), strict=True)]
        averages = [*moving]
        if renorm:
            shapes = [() if name.endswith("_weight") else shape for name in RENORM]
            averages += [variable(name, np.zeros, shape=s) for name, s in zip(RENORM, shapes, strict=True)]
        if zero_debias_moving_mean and is_training:
            averages += [
                variable("moving_mean/biased", np.zeros),
                variable("moving_mean/local_step", np.zeros, shape=()),
            ]
        for v in moving[1:]:
            _check.not_negative(fn, v.name, v.value)
        g, b = (None if v is None else v.value for v in (gamma, beta))
        corrections, updates = None, []
        if not is_training:
            y, saved = frozen(
                fn, x, moving[0].value, moving[1].value, g, b, axis=axis, eps=eps, activation=relu, keep=True
            )
            assert saved is not None
        else:
            if renorm:
                r, d = corrections = _corrections(moments(x, axis=axis), eps, averages[2:], clipping)
                one = np.ones(shape) if g is None else g.astype(np.float64)
                g, b = r * one, d * one + (0.0 if b is None else b)
            y, saved = trained(x, g, b, axis=axis, eps=eps, where=where, activation=relu, single=True, fn=fn)
            if seen(saved.count):
                steps = _steps(saved.moments, averages, decay, renorm, renorm_decay, eps, fuse)
                updates = [Update(v.name, step) for v, step in zip(moving, steps, strict=True)]
        outputs = np.asarray(activation_fn(y)) if callable(activation_fn) else y
        keys = [outputs_collections] if isinstance(outputs_collections, str) else outputs_collections or ()
        for key in keys:
            graph.add_to_collection(key, outputs)
        graph._calls[full] = saved, (beta, gamma, corrections)
        for u in updates:
            if updates_collections is not None:
                graph.add_to_collection(updates_collections, u)
            else:
                u.run()
    return outputs


MOVING = ("moving_mean", "moving_variance")
RENORM = ("renorm_mean", "renorm_mean_weight", "renorm_stddev", "renorm_stddev_weight")


def gradients(dy: npt.ArrayLike, scope: str, *, graph: Graph | None = None) -> tuple[Array, dict[str, Array]]:
    """Gradients of the last `batch_norm` of a scope.

    Parameters
    ----------
    dy : array of the shape of inputs
        The gradient of the outputs; where activation_fn was a callable, that of what it was given.
    scope : str
        The full name of the scope.
    graph : Graph, optional
        By default the default graph.

    Returns
    -------
    dx : array of the shape of inputs
    parameters : dict
        The gradients of beta and gamma, as far as there are such variables, by their full names and in their dtypes.
        Penalties are not in them: `Loss.gradient` has theirs.

    Raises
    ------
    ValueError
        No call in that scope, dy of another shape.
    TypeError
        dy not floating.
    """
    fn = "gradients"
    calls = (get_default_graph() if graph is None else graph)._calls
    if scope not in calls:
        raise ValueError(f"{fn}: scope is {_check.shown(scope)}, expected one of {sorted(calls)}")
    saved, (beta, gamma, corrections) = calls[scope]
    dx, dgamma, dbeta = batch_norm_backward(_check.like_x(fn, "dy", dy, saved.x.shape), saved)
    if corrections is not None:
        # (xhat * r + d) * gamma + beta: what the kernel took for gamma and beta are r * gamma and d * gamma + beta.
        r, d = corrections
        dgamma = np.asarray(r * dgamma + d * dbeta)
    found = {}
    for v, value in ((beta, dbeta), (gamma, dgamma)):
        if v is not None:
            found[v.name] = value.astype(v.value.dtype, copy=False)
    return dx, found


def _corrections(
    m: Moments, eps: float, averages: list[Variable], clipping: Mapping[str, float]
) -> tuple[Array, Array]:
    """r and d of batch renormalization, towards the averages as they are before this batch."""
    mean, mean_weight, stddev, stddev_weight = (v.value.astype(np.float64) for v in averages)
    with np.errstate(all="ignore"):
        own = np.sqrt(np.nan_to_num(m.var()) + eps)
        towards = stddev + (1.0 - stddev_weight) * own
        safe = np.where(towards == 0, 1.0, towards)
        r = np.where(towards == 0, 1.0, own / safe)
        d = np.where(towards == 0, 0.0, (m.mean - (mean + (1.0 - mean_weight) * m.mean)) / safe)
    r = np.clip(r, clipping.get("rmin", 0.0), clipping.get("rmax", np.inf))
    return r, np.clip(d, -clipping.get("dmax", np.inf), clipping.get("dmax", np.inf))


def _steps(
    m: Moments, averages: list[Variable], decay: float, renorm: bool, renorm_decay: float, eps: float, fused: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What moves moving_mean and moving_variance after a batch, whenever it is run, and what they depend on."""
    mean, variance, *rest = (v.value for v in averages)
    with np.errstate(all="ignore"):
        n = m.count
        of_mean, of_variance = m.mean, m.m2 / (max(n - 1, 1) if fused and isinstance(n, int) else n)

    def move(to: Array, value: Array, weight: float) -> None:
        with np.errstate(all="ignore"):
            to[...] = moved(to, value, weight)

    def renormed(average: Array, weight: Array, value: Array) -> Array:
        """Moves a renorm average and its weight; returns the one over the other: what the batches agree on so far."""
        move(average, value, renorm_decay)
        weight[...] = moved(weight, np.asarray(1.0), renorm_decay)
        with np.errstate(all="ignore"):
            return np.where(weight == 0, value, average.astype(np.float64) / weight)

    def mean_step() -> None:
        if renorm:
            move(mean, renormed(rest[0], rest[1], of_mean), decay)
        elif rest:
            biased, t = rest
            move(biased, of_mean, decay)
            t[...] = t + 1
            left = 1.0 - decay ** float(t)
            mean[...] = biased / left if left else mean
        else:
            move(mean, of_mean, decay)

    def variance_step() -> None:
        if renorm:
            stddev = renormed(rest[2], rest[3], np.sqrt(of_variance + eps))
            move(variance, np.maximum(stddev * stddev - eps, 0.0), decay)
        else:
            move(variance, of_variance, decay)

    return mean_step, variance_step


def _fuses(fn: str, fused: Any, rank_fits: bool, weights: bool, renorm: bool, regularized: bool) -> bool:
    if fused is not None:
        _check.flag(fn, "fused", fused)
    against = {"batch_weights": weights, "renorm": renorm, "param_regularizers": regularized}
    if fused and not rank_fits:
        raise ValueError(f"{fn}: fused is True and inputs have another rank than 2 or 4, expected fused=False or None")
    for name, given in against.items():
        if fused and given:
            raise ValueError(f"{fn}: fused is True with {name}, expected fused=False or None: it does not support them")
    return fused is not False and rank_fits and not any(against.values())


def _mapping(fn: str, name: str, value: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{fn}: {name} is of type {type(value).__name__}, expected a dict or None")
    if unknown := [k for k in value if k not in known]:
        raise ValueError(f"{fn}: {name} has the key {_check.shown(unknown[0])}, expected some of {', '.join(known)}")
    return {k: v for k, v in value.items() if v is not None}


def _clipping(fn: str, value: Any) -> dict[str, float]:
    given = _mapping(fn, "renorm_clipping", value, ("rmin", "rmax", "dmax"))
    found = {k: _check.number(fn, f"renorm_clipping['{k}']", v, 0.0) for k, v in given.items()}
    if found.get("rmin", 0.0) > found.get("rmax", np.inf):
        raise ValueError(f"{fn}: renorm_clipping has rmin {found['rmin']}, expected at most rmax, {found['rmax']}")
    return found


def _batch_weights(fn: str, value: npt.ArrayLike, x: Array) -> Array:
    w = _check.array(fn, "batch_weights", value)
    if w.shape != x.shape[:1]:
        raise ValueError(f"{fn}: batch_weights has shape {w.shape}, expected {x.shape[:1]}, one for each sample")
    with np.errstate(all="ignore"):
        wide = w.astype(np.float64)
        if not ((wide >= 0).all() and wide.sum() * (x.size / max(len(w), 1)) < np.inf):
            raise ValueError(f"{fn}: batch_weights has a negative or infinite one, expected finite ones of at least 0")
    return w.reshape(-1, *(1,) * (x.ndim - 1))


def _collections_of(fn: str, value: Any, name: str) -> list[str]:
    if isinstance(value, Mapping):
        value = value.get(name)
    if isinstance(value, str):
        raise TypeError(f"{fn}: variables_collections is {_check.shown(value)}, expected a list, or a dict of lists")
    return [] if value is None else list(value)
