"""A grid of bad calls: the right exception, naming function and argument; nothing written; never a word of Numba."""

import numpy as np
import pytest
from arrays import Marked
from refusals import refused

import fastbn
from fastbn import _check

SHAPE, C = (4, 3, 5), 3


class Unfloatable:
    def __repr__(self):
        return "Unfloatable()"


class Unarrayable:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("not today")


def x():
    return np.random.default_rng(1).normal(size=SHAPE).astype("float32")


def read_only(a):
    a.flags.writeable = False
    return a


# Each bad value: argument, what is wrong, exception, value (or, for `out`, a function of x and dy).
ARRAYS = [
    ("complex", TypeError, np.ones(SHAPE, "complex64")),
    ("object", TypeError, np.ones(SHAPE, object)),
    ("strings", TypeError, np.full(SHAPE, "1.0")),
    ("dates", TypeError, np.zeros(SHAPE, "datetime64[s]")),
    ("structured", TypeError, np.zeros(SHAPE, [("a", "f4")])),
    ("longdouble", TypeError, np.zeros(SHAPE, np.longdouble)),
    ("masked", TypeError, np.ma.masked_greater(np.ones(SHAPE, "float32"), 2)),
    ("ragged", ValueError, [[1.0, 2.0], [3.0]]),
    ("None", TypeError, None),
    ("a dict", TypeError, {"a": 1}),
    ("no array after all", TypeError, Unarrayable()),
]
AXES = [
    ("too high", ValueError, 3),
    ("too low", ValueError, -4),
    ("float", TypeError, 1.0),
    ("str", TypeError, "1"),
    ("bool", TypeError, True),
    ("None", TypeError, None),
    ("twice", ValueError, (1, 1)),
    ("twice, negative", ValueError, (1, -2)),
    ("tuple of float", TypeError, (0, 1.5)),
    ("tuple out of range", ValueError, (0, 7)),
]
EPS = [
    ("negative", ValueError, -1e-5),
    ("nan", ValueError, float("nan")),
    ("inf", ValueError, float("inf")),
    ("str", TypeError, "1e-5"),
    ("None", TypeError, None),
    ("complex", TypeError, 1j),
    ("list", TypeError, [1e-5]),
    ("array", TypeError, np.array([1e-5, 1e-5])),
    ("an object", TypeError, Unfloatable()),
    ("bool", TypeError, True),
    ("bytearray", TypeError, bytearray(b"1")),
    ("of text", TypeError, np.array("1e-5")),
]
PARAMETERS = [
    ("short", ValueError, np.ones(C - 1)),
    ("long", ValueError, np.ones(C + 1)),
    ("one", ValueError, np.ones(1)),
    ("broadcastable", ValueError, np.ones((1, C, 1))),
    ("x's shape", ValueError, np.ones(SHAPE)),
    ("complex", TypeError, np.ones(C, complex)),
    ("str", TypeError, "one"),
    ("object", TypeError, np.array([None] * C)),
    ("masked", TypeError, np.ma.masked_less(np.ones(C), 0)),
    ("ragged", ValueError, [[1.0, 2.0], 3.0]),
]
VARIANCES = [
    *PARAMETERS,
    ("negative", ValueError, np.array([1.0, -1e-9, 1.0])),
    ("negative scalar", ValueError, -1),
    ("None", TypeError, None),
]
OUTS = [
    ("list", TypeError, lambda a, b: np.zeros(SHAPE).tolist()),
    ("short", ValueError, lambda a, b: np.zeros((4, 3, 4), "float32")),
    ("another rank", ValueError, lambda a, b: np.zeros((1, *SHAPE), "float32")),
    ("float64", TypeError, lambda a, b: np.zeros(SHAPE)),
    ("int32", TypeError, lambda a, b: np.zeros(SHAPE, "int32")),
    ("big-endian", TypeError, lambda a, b: np.zeros(SHAPE, ">f4")),
    ("read-only", ValueError, lambda a, b: read_only(np.zeros(SHAPE, "float32"))),
    ("masked", TypeError, lambda a, b: np.ma.masked_less(np.zeros(SHAPE, "float32"), 0)),
    ("broadcast", ValueError, lambda a, b: np.lib.stride_tricks.as_strided(np.zeros(15, "float32"), SHAPE, (0, 20, 4))),
    ("windows", ValueError, lambda a, b: np.lib.stride_tricks.as_strided(np.zeros(60, "float32"), SHAPE, (20, 4, 4))),
    ("x reversed", ValueError, lambda a, b: a[::-1]),
    ("x moved", ValueError, lambda a, b: np.lib.stride_tricks.as_strided(a.base[1:], SHAPE, a.strides)),
    ("x transposed", ValueError, lambda a, b: a.base[:60].reshape(5, 3, 4).T),
]
BACKWARD_OUTS = [*OUTS, ("x", ValueError, lambda a, b: a), ("dy reversed", ValueError, lambda a, b: b[:, ::-1])]
DYS = [
    *ARRAYS,
    ("short", ValueError, np.ones((4, 3, 4), "float32")),
    ("transposed", ValueError, np.ones((5, 3, 4), "float32")),
    ("flat", ValueError, np.ones(60, "float32")),
    ("scalar", ValueError, 1.0),
    ("int", TypeError, np.ones(SHAPE, "int32")),
    ("bool", TypeError, np.ones(SHAPE, bool)),
]

MEANS = [*PARAMETERS, ("None", TypeError, None)]
INFERENCE = {"x": ARRAYS, "axis": AXES, "eps": EPS, "mean": MEANS, "var": VARIANCES}
INFERENCE |= {"gamma": PARAMETERS, "beta": PARAMETERS}
VERBS = {
    "batch_norm": INFERENCE | {"out": OUTS},
    "batch_norm_train": {"x": ARRAYS, "axis": AXES, "eps": EPS, "gamma": PARAMETERS, "beta": PARAMETERS, "out": OUTS},
    "moments": {"x": ARRAYS, "axis": AXES},
    "Saved.fixed": INFERENCE,
    "batch_norm_backward": {"dy": DYS, "out": BACKWARD_OUTS},
}
GRID = [
    pytest.param(fn, argument, error, value, id=f"{fn}-{argument}-{what}")
    for fn, arguments in VERBS.items()
    for argument, values in arguments.items()
    for what, error, value in values
]


@pytest.mark.parametrize(("fn", "argument", "error", "value"), GRID)
def test_a_bad_argument_is_refused(fn, argument, error, value):
    memory = np.random.default_rng(1).normal(size=64).astype("float32")
    a, dy = memory[:60].reshape(SHAPE), np.ones(SHAPE, "float32")
    arguments = {"x": a, "mean": np.zeros(C), "var": np.ones(C), "gamma": np.ones(C), "beta": np.zeros(C)}
    _, saved = fastbn.batch_norm_train(a)
    if fn == "batch_norm_backward":
        arguments = {"dy": dy, "saved": saved}
    else:
        arguments = {k: v for k, v in arguments.items() if k == "x" or k in VERBS[fn]}
    if argument == "out":
        value = value(a, dy)
    arguments[argument] = value
    out = arguments.setdefault("out", np.full(SHAPE, 7, "float32")) if "out" in VERBS[fn] else None
    before = np.array(out).tobytes(), memory.tobytes(), dy.tobytes()
    verb = fastbn.Saved.fixed if fn == "Saved.fixed" else getattr(fastbn, fn)
    refused(lambda: verb(**arguments), fn, argument, error)
    assert (np.array(out).tobytes(), memory.tobytes(), dy.tobytes()) == before


def test_the_message_says_what_it_has_and_what_was_expected():
    with pytest.raises(ValueError, match=r"batch_norm_train: gamma has shape \(2,\), expected \(3,\).*\(4, 3, 5\)"):
        fastbn.batch_norm_train(x(), np.ones(2))
    with pytest.raises(TypeError, match=r"moments: x has dtype complex64, expected float32"):
        fastbn.moments(np.ones(3, "complex64"))
    with pytest.raises(ValueError, match=r"batch_norm: var is -2 at \(1,\)"):
        fastbn.batch_norm(x(), 0, [1, -2, 1])
    with pytest.raises(
        ValueError, match=r"^batch_norm: axis 5 is out of range for x of shape \(4, 3, 5\), expected -3 to 2$"
    ):
        fastbn.batch_norm(x(), 0, 1, axis=5)


@pytest.mark.parametrize(("shape", "axis"), [((1, 3), 1), ((3,), 0), ((1, 3, 1, 1), 1), ((2, 3), (0, 1)), ((1,), ())])
def test_one_value_per_channel_cannot_train(shape, axis):
    out = np.full(shape, 7.0)
    call = lambda: fastbn.batch_norm_train(np.ones(shape), axis=axis, out=out)  # noqa: E731
    assert "one value per channel" in refused(call, "batch_norm_train", "x", ValueError)
    assert (out == 7).all()


@pytest.mark.parametrize("saved", [None, 3, "saved", (1, 2), fastbn.Moments.empty(3)], ids=repr)
def test_saved_must_be_saved(saved):
    refused(lambda: fastbn.batch_norm_backward(x(), saved), "batch_norm_backward", "saved", TypeError)


def test_gamma_0_in_place_has_no_backward():
    a, out = x(), np.full(SHAPE, 7, "float32")
    _, saved = fastbn.batch_norm_train(a, [1, 0, 2], out=a)
    refused(lambda: fastbn.batch_norm_backward(a, saved, out=out), "batch_norm_backward", "gamma", ValueError)
    assert (out == 7).all()


def test_a_subclass_is_a_plain_array_to_out():
    out = np.empty(SHAPE, "float32").view(Marked)
    assert fastbn.batch_norm(x(), 0, 1, out=out) is out


# ------------------------------------------------------------------------------------ moments and running statistics

MOMENTS = fastbn.moments(x())
RUNNING = [
    ("list", TypeError, [0.0] * C),
    ("int", TypeError, np.zeros(C, int)),
    ("short", ValueError, np.zeros(C - 1)),
    ("broadcastable", ValueError, np.zeros((1, C))),
    ("read-only", ValueError, read_only(np.zeros(C))),
    ("None", TypeError, None),
    ("masked", TypeError, np.ma.masked_less(np.zeros(C), -1)),
    ("overlapping", ValueError, np.lib.stride_tricks.as_strided(np.zeros(1), (C,), (0,))),
]
MOMENTUM = [
    ("negative", ValueError, -0.1),
    ("above one", ValueError, 1.1),
    ("nan", ValueError, float("nan")),
    ("str", TypeError, "0.9"),
    ("complex", TypeError, 1j),
    ("bool", TypeError, True),
]
CORRECTION = [
    ("complex", TypeError, complex(1)),
    ("2", ValueError, 2),
    ("half", ValueError, 0.5),
    ("bool", TypeError, True),
    ("str", TypeError, "1"),
    ("None", TypeError, None),
]
UPDATES = {
    "running_mean": RUNNING,
    "running_var": RUNNING,
    "m": [
        ("None", TypeError, None),
        ("a tuple", TypeError, (1, 0, 1)),
        ("one value", ValueError, fastbn.moments(x()[:1, :, :1])),
    ],
    "momentum": [*MOMENTUM, ("None", TypeError, None)],
    "correction": CORRECTION,
}


@pytest.mark.parametrize(
    ("argument", "error", "value"),
    [pytest.param(k, e, v, id=f"{k}-{what}") for k, values in UPDATES.items() for what, e, v in values],
)
def test_bad_updates_write_nothing(argument, error, value):
    mean, var = np.zeros(C), np.ones(C)
    arguments = {"running_mean": mean, "running_var": var, "m": MOMENTS} | {argument: value}
    refused(lambda: fastbn.update_running(**arguments), "update_running", argument, error)
    assert not mean.any()
    assert (var == 1).all()


@pytest.mark.parametrize(
    ("arguments", "argument", "error"),
    [
        ((-1, [0.0], [0.0]), "count", ValueError),
        ((1.5, [0.0], [0.0]), "count", TypeError),
        ((True, [0.0], [0.0]), "count", TypeError),
        ((2, [0.0], [0.0, 1.0]), "m2", ValueError),
        ((2, [0.0], [-1.0]), "m2", ValueError),
        ((2, ["a"], [1.0]), "mean", TypeError),
        ((2, [0.0], [1j]), "m2", TypeError),
    ],
)
def test_bad_moments(arguments, argument, error):
    refused(lambda: fastbn.Moments(*arguments), "Moments", argument, error)


def test_moments_of_other_channels_do_not_merge():
    refused(lambda: MOMENTS.merge(fastbn.Moments.empty(2)), "Moments.merge", "other", ValueError)
    refused(lambda: MOMENTS.merge(3), "Moments.merge", "other", TypeError)
    refused(lambda: MOMENTS.var(2), "Moments.var", "correction", ValueError)
    with pytest.raises(TypeError):
        MOMENTS + 1
    with pytest.raises(TypeError):
        1 + MOMENTS


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_numbers_of_threads(n, error):
    before = fastbn.get_num_threads()
    refused(lambda: fastbn.set_num_threads(n), "set_num_threads", "n", error)
    assert fastbn.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "argument", "error"),
    [
        ({"dtypes": ["complex64"]}, "dtypes", TypeError),
        ({"dtypes": "no dtype"}, "dtypes", TypeError),
        ({"axes": [7]}, "axes", ValueError),
        ({"axes": ["1"]}, "axes", TypeError),
    ],
)
def test_bad_warmups(arguments, argument, error):
    refused(lambda: fastbn.warmup(**arguments), "warmup", argument, error)


def test_dx_over_the_saved_x_is_refused(rng):
    """Even where dy is x itself, which dx may overwrite: the next backward would need x."""
    x = rng.normal(size=(6, 3))
    _, saved = fastbn.batch_norm_train(x)
    before = x.copy()
    with pytest.raises(ValueError, match="batch_norm_backward: out shares memory with x"):
        fastbn.batch_norm_backward(x, saved, out=x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("name", ["mean", "var", "gamma", "beta"])
def test_an_out_over_a_parameter_is_refused(rng, name):
    out = np.ones((6, 3))
    parameters = dict.fromkeys(("mean", "var", "gamma", "beta"), 1.0) | {name: out[2]}
    with pytest.raises(ValueError, match=f"out shares memory with {name}"):
        fastbn.batch_norm(rng.normal(size=(6, 3)), **parameters, out=out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastbn.batch_norm(np.ones((2, 1)), 0, 1, eps=10**400), ValueError, "batch_norm: eps"),
        (lambda: fastbn.Moments.empty(3).var(np.array([0, 1])), TypeError, "Moments.var: correction"),
        (lambda: fastbn.set_num_threads(np.array([1, 2])), TypeError, "set_num_threads: n"),
        (lambda: fastbn.Moments(np.array([1, 2]), [0], [0]), TypeError, "Moments: count"),
        (lambda: fastbn.Moments.empty(-1), ValueError, "Moments.empty: channels"),
        (lambda: fastbn.Moments.empty(2.5), TypeError, "Moments.empty: channels"),
        (lambda: fastbn.BatchNorm(3).fit_population(3), TypeError, "fit_population: batches"),
        (lambda: fastbn.warmup(None, [7]), TypeError, "warmup: dtypes has None"),
        (lambda: fastbn.warmup(axes=[7]), ValueError, "warmup: axes has 7, expected -4 to 3"),
        (lambda: fastbn.warmup(axes=((1, 2),)), TypeError, "warmup: axes"),
    ],
)
def test_messages_name_function_and_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("arguments", [["warmup", "--dtypes", "foo"], ["warmup", "--axes", "9"], ["--threads", "0"]])
def test_the_command_line_refuses_without_a_traceback(capsys, arguments):
    from fastbn.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "error: " in capsys.readouterr().err


def test_an_overlap_that_is_too_hard_to_decide_counts_as_one(monkeypatch):
    def undecided(*arrays, max_work):
        assert max_work == 100_000
        raise np.exceptions.TooHardError

    memory = np.ones((12, 3))
    a, out = memory[::2], memory[1::2]
    assert fastbn.batch_norm(a, 0, 1, out=out) is out  # they interleave, and share nothing
    monkeypatch.setattr(np, "shares_memory", undecided)
    with pytest.raises(ValueError, match="batch_norm: out shares memory with x"):
        fastbn.batch_norm(a, 0, 1, out=out)


@pytest.mark.parametrize("one", [1, 1.0, np.int64(1), np.float32(1), np.array(1)])
def test_a_correction_may_be_any_number_that_is_0_or_1(one):
    found = _check.correction("fn", one)
    assert (found, type(found)) == (1, int)
    found = _check.correction("fn", one - 1)
    assert (found, type(found)) == (0, int)
