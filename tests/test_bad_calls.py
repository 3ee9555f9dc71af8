"""A generated grid of bad calls: callable x argument x kind of badness, and pairs of bad arguments.

The rule of which exception it is: **TypeError** where no value of that type would do (text for a number, a bool for an
axis, a complex array, a list for `out`, a dtype that is not listed), **ValueError** where another value of the type
would (out of range, another shape, ragged, read-only, overlapping, one value per channel). A stranger's object that
raises when it is asked for its array gives a ValueError if that is what it raises, else a TypeError; asked for its
number it gives a TypeError. Of two bad arguments either is reported.

Every refusal reads as `refusals.refused` says, and no array, layer or setting has changed by it.
"""

import datetime
import decimal
import fractions
import hashlib
import itertools
import os
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from arrays import HALVES, ArrayLike
from numpy.lib.stride_tricks import as_strided
from refusals import refused

import fastbn
from fastbn import _memory

SHAPE, C = (4, 3, 5), 3
T, V = TypeError, ValueError


class Raises:
    """An object that raises whatever it is asked for, its own name too."""

    def __init__(self, error):
        self.error = error

    def _fail(self, *args, **kwargs):
        raise self.error

    __array__ = __index__ = __float__ = __repr__ = __str__ = _fail


def numbers():
    yield from range(3)


def cyclic():
    ring = []
    ring.append(ring)
    return ring


def deep():
    inner = 1.0
    for _ in range(70):
        inner = [inner]
    return inner


def without(bads, *names):
    return [bad for bad in bads if bad[0] not in names]


# What is wrong, the exception, and the value. No value is changed by a call, as every test asserts.
OBJECTS = [
    ("object", T, object()),
    ("module", T, os),
    ("NumPy's class", T, np.ndarray),
    ("function", T, len),
    ("generator", T, numbers()),
    ("ellipsis", T, ...),
    ("slice", T, slice(1)),
    ("dict", T, {1: 1}),
    ("empty dict", T, {}),
    ("set", T, {1}),
    ("empty string", T, ""),
    ("text", T, "one"),
    ("digits", T, "1"),
    ("bytes", T, b"1"),
    ("complex", T, 1j),
    ("real complex", T, complex(1)),
    ("NumPy's complex", T, np.complex64(1)),
    ("NumPy's text", T, np.str_("1")),
    ("date", T, datetime.date(2015, 2, 11)),
    ("datetime64", T, np.datetime64("2015-02-11")),
    ("timedelta64", T, np.timedelta64(1, "s")),
    ("layer", T, fastbn.BatchNorm(C)),
    ("moments", T, fastbn.Moments.empty(C)),
    ("raises RuntimeError", T, Raises(RuntimeError("no value"))),
    ("raises KeyError", T, Raises(KeyError("no value"))),
    ("raises TypeError", T, Raises(TypeError("no value"))),
]
NONE = [("None", T, None)]
BOOLS = [("True", T, True), ("False", T, False), ("NumPy's True", T, np.True_), ("array of bool", T, np.array(True))]
SEQUENCES = [("list", T, [0.5]), ("tuple", T, (0.5,)), ("empty list", T, []), ("array", T, np.array([0.5])),
             ("long array", T, np.ones(1000)), ("range", T, range(1))]  # fmt: skip
BUFFERS = [("bytearray", T, bytearray(b"1")), ("memoryview", T, memoryview(b"1"))]


def of_dtypes(shape, dtypes):
    return [(f"dtype {d if d in HALVES else np.dtype(d).str}", T, np.ones(shape, d)) for d in dtypes]


def unusable(shape):
    """What is no array that can be normalized."""
    return [
        *without(OBJECTS, "raises RuntimeError", "raises KeyError", "raises TypeError"),
        *of_dtypes(shape, ["c8", "c16", "O", "U3", "S3", "m8[s]", "V2", "V4", np.longdouble]),
        *((f"dtype {d}", T, np.ones(shape, getattr(ml_dtypes, d))) for d in ("float8_e4m3fn", "float8_e5m2", "int4")),
        ("records", T, np.zeros(shape, [("a", "f4")])),
        ("dates", T, np.zeros(shape, "M8[s]")),
        ("masked", T, np.ma.masked_less(np.ones(shape, "f4"), 0)),
        ("masked constant", T, np.ma.masked),
        ("list of text", T, ["a", "b"]),
        ("list of None", T, [None, None]),
        ("huge int", T, 10**30),
        ("list of huge ints", T, [10**30, 1]),
        ("int of 5000 digits", T, 10**5000),
        ("ragged", V, [[1.0, 2.0], [3.0]]),
        ("ragged deeper", V, [[[1.0], [2.0]], [[3.0], 4.0]]),
        ("cyclic", V, cyclic()),
        ("deep", V, deep()),
        ("__array__ raises RuntimeError", T, Raises(RuntimeError("no value"))),
        ("__array__ raises TypeError", T, Raises(TypeError("no value"))),
        ("__array__ raises ValueError", V, Raises(ValueError("no value"))),
        ("__array__ gives a list", V, ArrayLike([1.0])),
        ("__array__ gives complex", T, ArrayLike(np.ones(shape, complex))),
    ]


XS = [
    *unusable(SHAPE),
    *NONE,
    ("scalar", V, 1.0),
    ("NumPy scalar", V, np.float32(1)),
    ("0-d", V, np.array(1.0)),
    ("vector", V, np.ones(3)),
    ("empty list", V, []),
]
ONE_EACH = [("one value per channel", V, np.ones((1, C), "f4")), ("one value in 5-d", V, np.ones((1, C, 1, 1, 1)))]
OTHER_CHANNELS = [("other channels", V, np.ones((4, C + 1))), ("channels last", V, np.ones((4, 5, C)))]


def parameters(shape=(C,)):
    other = [(C - 1,), (C + 1,), (1,), (0,), (1, C), (C, 1), (1, C, 1), SHAPE]
    return [*unusable(shape), *((f"shape {s}", V, np.ones(s)) for s in other), ("short list", V, [1.0, 2.0])]


NEGATIVE = [
    ("negative", V, np.array([1.0, -1.0, 1.0])),
    ("negative and NaN", V, np.array([np.nan, 1.0, -1.0])),
    ("hardly negative", V, np.array([-5e-324, 1.0, 1.0])),
    ("negative infinity", V, np.array([1.0, 1.0, -np.inf], "f4")),
    ("negative int", V, np.array([1, -1, 1])),
    ("negative in a list", V, [1, 1, -1]),
    ("negative big-endian", V, np.array([1, -1, 1], ">f4")),
]
NEGATIVE_SCALAR = [("negative scalar", V, -1), ("negative 0-d", V, np.array(-0.5))]
MEANS = [*parameters(), *NONE]
VARS = [*parameters(), *NONE, *NEGATIVE, *NEGATIVE_SCALAR]

NO_AXES = [
    *OBJECTS, *BOOLS, *NONE, *BUFFERS,
    ("float", T, 1.0),
    ("NaN", T, float("nan")),
    ("NumPy's float", T, np.float32(1)),
    ("decimal", T, decimal.Decimal(1)),
    ("array", T, np.array([1])),
    ("array of two", T, np.array([0, 1])),
    ("0-d float", T, np.array(1.0)),
    ("range", T, range(1, 2)),
    ("tuple of float", T, (0, 1.5)),
    ("tuple of bool", T, (True,)),
    ("tuple of None", T, (None,)),
    ("tuple of text", T, ("1",)),
    ("nested", T, ((1,),)),
    ("list of module", T, [os]),
]  # fmt: skip
FAR = [("2**31", V, 2**31), ("2**63", V, 2**63), ("-10**30", V, -(10**30)), ("int of 5000 digits", V, 10**5000),
       ("negative int of 5000 digits", V, -(10**5000))]  # fmt: skip
AXES = [
    *NO_AXES, *FAR,
    ("too high", V, 3),
    ("too low", V, -4),
    ("NumPy int too high", V, np.int8(3)),
    ("0-d too high", V, np.array(7)),
    ("twice", V, (1, 1)),
    ("twice, negative", V, (1, -2)),
    ("twice of three", V, [0, 1, 1]),
    ("one too high", V, (0, 7)),
    ("many", V, tuple(range(100))),
]  # fmt: skip
LAYER_AXES = [*NO_AXES, *FAR, ("two", V, (1, 2)), ("none", V, ()), ("64", V, 64), ("-65", V, (-65,))]

NO_NUMBERS = [
    *OBJECTS, *BOOLS, *SEQUENCES, *BUFFERS,
    ("array of text", T, np.array("1")),
    ("array of objects", T, np.array(1.0, object)),
    ("array of complex", T, np.array(1j)),
    ("array of dates", T, np.array("2015-02-11", "M8[D]")),
    ("masked constant", T, np.ma.masked),
    ("raises ValueError", T, Raises(ValueError("no value"))),
]  # fmt: skip
NOT_FINITE = [
    ("NaN", V, float("nan")),
    ("infinity", V, float("inf")),
    ("negative infinity", V, -float("inf")),
    ("NumPy's NaN", V, np.float32("nan")),
    ("10**400", V, 10**400),
    ("-10**400", V, -(10**400)),
    ("int of 5000 digits", V, 10**5000),
    ("decimal NaN", V, decimal.Decimal("nan")),
    ("too large a fraction", V, fractions.Fraction(10**400, 3)),
    ("raises OverflowError", V, Raises(OverflowError("no value"))),
]
SIGNED = [
    ("negative", V, -1e-5),
    ("hardly negative", V, -5e-324),
    ("negative int", V, -1),
    ("negative fraction", V, fractions.Fraction(-1, 3)),
    ("negative decimal", V, decimal.Decimal("-0.1")),
    ("negative 0-d", V, np.array(-1.0)),
    ("negative float16", V, np.float16(-1)),
]
EPS = [*NO_NUMBERS, *NONE, *NOT_FINITE, *SIGNED]
MOMENTUM = [*NO_NUMBERS, *NOT_FINITE, *SIGNED, ("above one", V, 1.1), ("two", V, 2), ("hardly above", V, 1 + 2**-52)]
CORRECTION = [*NO_NUMBERS, *NONE, *NOT_FINITE, *SIGNED, ("two", V, 2), ("a half", V, 0.5),
              ("NumPy's 3", V, np.int64(3)), ("hardly above", V, 5e-324)]  # fmt: skip
FLAGS = [*OBJECTS, *SEQUENCES, *BUFFERS, ("one", T, 1), ("zero", T, 0), ("float", T, 1.0), ("0-d", T, np.array(True))]
NO_COUNTS = [*OBJECTS, *BOOLS, *SEQUENCES, *BUFFERS, ("float", T, 3.0), ("NaN", T, float("nan")),
             ("array of two", T, np.array([3, 4])), ("decimal", T, decimal.Decimal(3))]  # fmt: skip
COUNTS = [*NO_COUNTS, *NONE, ("negative", V, -1), ("2**63", V, 2**63), ("10**400", V, 10**400),
          ("int of 5000 digits", V, 10**5000), ("NumPy's -1", V, np.int8(-1)),
          ("array of -1", V, np.array([-1]))]  # fmt: skip
# In a state the shape is checked before the value is read.
STATE_COUNTS = [(what, V if isinstance(v, np.ndarray) and v.size > 1 else error, v) for what, error, v in COUNTS]
# A count may be an array, too: the total weights of the channels.
WEIGHTS = [
    *((what, V if isinstance(v, np.ndarray) and v.dtype.kind in "iuf" else error, v) for what, error, v in COUNTS),
    *of_dtypes(C, ["?", "c16", "O", "U3", "S3", "m8[s]", "V2", np.longdouble]),
    *((f"weights of shape {s}", V, np.ones(s)) for s in ((), (C + 1,), (0,), (1, C), (C, 1))),
    *((f"whole weights of shape {s}", V, np.ones(s, int)) for s in ((C + 1,), (1, C), (C, 1))),
    *((f"a weight of {v}", V, np.array([1.0, 0.0, v])) for v in (np.nan, np.inf, -np.inf, -1.0, -5e-324)),
    ("a weight of float32's NaN", V, np.array([0x7F800001, 0, 0], "uint32").view("float32")),
    ("a negative whole weight", V, np.array([1, -1, 1])),
    ("masked", T, np.ma.masked_less(np.ones(C), 0)),
    ("masked constant", T, np.ma.masked),
    ("NumPy's float", V, np.float64(3)),
    ("NumPy's float16", V, np.float16(3)),
    ("float16's infinity", V, np.array([1, 0, np.inf], "f2")),
    ("bfloat16's NaN", V, np.array([1, 0, np.nan], "bfloat16")),
    ("list of weights", T, [1.0, 2.0, 3.0]),
]
CHANNELS = [
    *NO_AXES,
    ("negative", V, -1),
    ("one negative", V, (3, -1)),
    ("2**62", V, 2**62),
    ("10**30", V, 10**30),
    ("int of 5000 digits", V, 10**5000),
    ("too many together", V, (2**31, 2**31)),
    ("65 axes", V, (1,) * 65),
]
NO_DTYPES = [
    *without(OBJECTS, "NumPy's class", "layer"), *without(BOOLS, "NumPy's True"), *NONE,  # these two have a dtype
    *((f"dtype {d}", T, d) for d in ("c8", "O", "U3", "M8", "V2", "g", "float8_e4m3fn", "f4,f4", "f4,,", "(2,)f4")),
    ("no dtype", T, "no dtype"),
    ("complex class", T, complex),
    ("fields", T, [("a", "f4")]),
    ("half a field", T, [("a",)]),
    ("negative subarray", T, ("f4", -1)),
    ("number", T, 3.5),
    ("array", T, np.ones(2)),
]  # fmt: skip
PARAMETER_DTYPES = [
    *NO_DTYPES,
    *((f"dtype {d}", T, d) for d in (*HALVES, "i4", "u1", "?", ">f4")),
    ("int class", T, int),
]


def read_only(a):
    a.flags.writeable = False
    return a


def outs(other):
    """Bad outputs; those that share memory are functions of what the call has. `other` shares memory with it."""
    return [
        *without(OBJECTS, "raises RuntimeError", "raises KeyError", "raises TypeError"),
        ("list", T, np.zeros(SHAPE).tolist()),
        ("NumPy scalar", T, np.float32(0)),
        ("memoryview", T, memoryview(np.zeros(SHAPE, "f4"))),
        ("array-like", T, ArrayLike(np.zeros(SHAPE, "f4"))),
        *of_dtypes(SHAPE, ["f8", ">f4", *HALVES, np.longdouble, "i4", "u2", "?", "c8", "O", "U3", "V4"]),
        ("masked", T, np.ma.masked_less(np.zeros(SHAPE, "f4"), -1)),
        *((f"shape {s}", V, np.zeros(s, "f4")) for s in ((4, 3, 4), (5, 3, 4), (1, *SHAPE), (60,), (), (0, 3, 5))),
        ("read-only", V, read_only(np.zeros(SHAPE, "f4"))),
        ("broadcast", V, np.broadcast_to(np.zeros((4, 3, 1), "f4"), SHAPE)),
        ("broadcast, writable", V, as_strided(np.zeros(15, "f4"), SHAPE, (0, 20, 4))),
        ("windows", V, as_strided(np.zeros(60, "f4"), SHAPE, (20, 4, 4))),
        ("reversed", V, lambda w: getattr(w, other)[::-1]),
        ("moved on", V, lambda w: as_strided(w.memory[other][1:], SHAPE, getattr(w, other).strides)),
        ("transposed", V, lambda w: w.memory[other][:60].reshape(5, 3, 4).T),
        ("partly", V, lambda w: w.memory[other][30:90].reshape(SHAPE)),
    ]


DYS = [
    *unusable(SHAPE),
    *NONE,
    *of_dtypes(SHAPE, ["i4", "u1", "?"]),
    *((f"shape {s}", V, np.ones(s, "f4")) for s in ((4, 3, 4), (5, 3, 4), (60,), (1, *SHAPE), (4, 3, 1), (0, 3, 5))),
    ("scalar", V, 1.0),
    ("list", V, [1.0, 2.0]),
]
# The shapes that would broadcast to x's are no shapes of a residual.
RESIDUALS = [*without(DYS, "None"), ("per channel", V, np.ones((1, C, 1), "f4")), ("0-d", V, np.array(1.0))]
MASKS = [
    *unusable(SHAPE),
    *((f"shape {s}", V, np.ones(s)) for s in ((4,), (C,), (4, C), (2, C, 5), (4, C, 4), (0, C, 5), (0,), (1, *SHAPE))),
    *((f"a weight of {v}", V, np.array([[1, 0, 1, v, 1]])) for v in (np.nan, np.inf, -np.inf, -1.0, -5e-324)),
    *((f"{d} weight of {v}", V, np.array([[1], [0], [v]], d)) for d in (*HALVES, ">f4") for v in (np.nan, np.inf, -1)),
    ("float32's NaN", V, np.array([0x7F800001, 0, 0, 0, 0], "uint32").view("f4")),
    ("NaN on a False", V, np.where(np.arange(60).reshape(SHAPE) == 59, np.nan, 0)),
    ("negative int", V, np.array([1, 0, 1, 1, -1], "i1")),
    ("negative scalar", V, -0.5),
    ("NaN", V, float("nan")),
    ("bfloat16's signalling NaN", V, np.array([0x7F81, 0, 0, 0, 0], "uint16").view("bfloat16")),
    ("negative in a list", V, [1, 1, 1, 1, -1]),
    ("empty list", V, []),
]
ACTIVATIONS = [
    *without(OBJECTS, "empty string", "text", "digits", "NumPy's text"), *BOOLS, *SEQUENCES, *BUFFERS,
    ("bytes of relu", T, b"relu"), ("list of relu", T, ["relu"]), ("array of relu", T, np.array("relu")),
    ("zero", T, 0), ("NaN", T, float("nan")),
    *((repr(text), V, text) for text in ("", "ReLU", "RELU", " relu", "relu6", "leaky_relu", "none", "linear")),
    ("long text", V, "relu" * 10**4),
    ("NumPy's text", V, np.str_("gelu")),
]  # fmt: skip
SAVED = [*OBJECTS, *NONE, ("array", T, np.ones(SHAPE, "f4")), ("class", T, fastbn.Saved), ("tuple", T, (1, 2, 3)),
         ("float", T, 0.5)]  # fmt: skip
NO_MOMENTS = [*without(OBJECTS, "moments"), *NONE, ("tuple", T, (1, 0.0, 1.0)),
              ("class", T, fastbn.Moments), ("zero", T, 0)]  # fmt: skip
OTHER_MOMENTS = [("of 4", V, fastbn.Moments.empty(C + 1)), ("of no axes", V, fastbn.Moments.empty(())),
                 ("weights of 4", V, fastbn.Moments(np.ones(C + 1), np.zeros(C + 1), np.ones(C + 1)))]  # fmt: skip
STARTS = [*without(NO_MOMENTS, "None"), *OTHER_MOMENTS]
STATISTICS = [
    *OBJECTS, *NONE, *SEQUENCES[:3],
    *of_dtypes(C, ["i8", "?", *HALVES, np.longdouble, ">f4", ">f8", "c16", "O", "U3"]),
    ("masked", T, np.ma.masked_less(np.zeros(C), -1)),
    *((f"shape {s}", V, np.zeros(s)) for s in ((C - 1,), (1,), (0,), (1, C), (C, 1), ())),
    ("read-only", V, read_only(np.zeros(C))),
    ("broadcast", V, as_strided(np.zeros(1), (C,), (0,))),
    ("windows", V, as_strided(np.zeros(2), (C,), (4,))),
]  # fmt: skip
BATCHES = [
    *without(OBJECTS, "generator", "empty string", "dict", "empty dict", "set", "bytes"), *NONE,
    *((f"{type(numbers).__name__} of numbers", V, numbers) for numbers in (b"1", {1: 1}, {1})),
    ("a number", T, 3),
    ("of letters", T, ["a"]),
    ("of a generator", T, [numbers()]),
    *((f"of {what}", error, [np.ones((4, C)), value]) for what, error, value in (*unusable(SHAPE), *OTHER_CHANNELS)),
    ("an array of other channels", V, np.ones((4, C + 1))),
    ("a single sample", V, np.ones(C)),
    ("nothing", V, []),
    ("one value", V, [np.ones((1, C))]),
    ("empty ones", V, [np.ones((0, C)), np.ones((0, C))]),
]  # fmt: skip
KERNELS = [
    *unusable((C, 2)), *NONE,
    *of_dtypes((C, 2), ["i4", "u1", "?"]),
    *((f"shape {s}", V, np.ones(s, "f4")) for s in ((), (C,), (C, 2, 2), (C + 1, 2, 2, 2), (0, 2, 2, 2), (1, C, 2, 2),
                                                    (C, 2, 2, 2, 2), (C + 1, 2), (0, 2), (1, C))),
]  # fmt: skip
TEXTS = ("empty string", "text", "digits", "NumPy's text")
NO_LAYOUTS = [
    *without(OBJECTS, *TEXTS), *BOOLS, *NONE, *SEQUENCES, ("number", T, 1), ("tuple of letters", T, ("O", "I")),
    *((what, V, value) for what, _, value in OBJECTS if what in TEXTS),
    *((text, V, text) for text in ("oihw", "NCHW", "O I", "OIHWD", "OHWI", "OI" * 1000)),
]  # fmt: skip
GROUPS = [
    *NO_COUNTS, *NONE,
    *((f"{n}", V, n) for n in (0, -1, -C, 2, C + 1, 2 * C, 2**63, -(10**30))),
    ("NumPy's 2", V, np.int8(2)), ("int of 5000 digits", V, 10**5000),
]  # fmt: skip
LAYERS = [
    *without(OBJECTS, "layer"), *NONE, ("class", T, fastbn.BatchNorm), ("number", T, 3), ("array", T, np.ones(C)),
    ("no statistics", V, fastbn.BatchNorm(C, track_running_stats=False)),
    ("more channels", V, fastbn.BatchNorm(C + 1)),
    ("one channel", V, fastbn.BatchNorm(1)),
    ("two channel axes", V, fastbn.BatchNorm((C, 2), axis=(1, 2))),
    ("no channel axis", V, fastbn.BatchNorm((), axis=())),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the good calls


def world():
    """Good arguments, anew for every call, each array in the middle of memory that must stay as it is."""
    rng = np.random.default_rng(1)
    memory = {name: rng.normal(size=100).astype("f4") for name in ("x", "dy", "out", "z", "residual")}
    memory["where"] = rng.uniform(0, 2, 100).astype("f4")
    w = SimpleNamespace(memory=memory, **{k: a[20:80].reshape(SHAPE) for k, a in memory.items()})
    w.mean, w.var, w.gamma, w.beta = np.zeros(C), np.ones(C), np.ones(C, "f4"), np.zeros(C, "f4")
    w.running_mean, w.running_var = np.zeros(C), np.ones(C)
    w.images = np.arange(60, dtype="u1").reshape(SHAPE)
    _, w.saved = fastbn.batch_norm_train(w.z)
    _, w.parts = fastbn.batch_norm_train(w.z, residual=w.residual, where=w.where, activation="relu")
    w.kernel, w.matrix, w.bias = np.ones((C, 2, 2, 2), "f4"), np.ones((C, 2), "f4"), np.ones(C)
    w.m = fastbn.moments(w.z)
    w.bn, w.pooled = fastbn.BatchNorm(C), fastbn.BatchNorm(C, momentum=None)
    w.rectified = fastbn.BatchNorm(C, activation="relu")
    for bn in (w.bn, w.pooled, w.rectified):
        bn(w.z, residual=w.residual, where=w.where)
        bn.backward(w.dy)
    return w


def given(w, *names):
    return {name: getattr(w, name) for name in names}


STATE = ("gamma", "beta", "running_mean", "running_var", "num_batches_tracked")


def load(bn):
    """load_state_dict of a state whose values are the arguments."""
    return lambda **state: bn.load_state_dict(state)


def spoiled(w, call):
    """A call after attributes of the layer were set to the arguments."""

    def run(**attributes):
        for name, value in attributes.items():
            setattr(w.bn, name, value)
        run.before = fingerprint(w.bn)
        run.others = fingerprint([attributes, SimpleNamespace(**{**vars(w), "bn": None})])
        call()

    return run


# Each call: the names that its refusals may bear, the function and its good arguments, the bad values of each.
PARAMETERS = {"gamma": parameters(), "beta": parameters()}
OPTIONS = {"axis": AXES, "eps": EPS}
PARTS = {"residual": RESIDUALS, "activation": ACTIVATIONS}
IN_PLACE = [("x", V, lambda w: w.x)]
NOT_THE_WEIGHTS = [
    ("the weights", V, lambda w: w.where),
    *((f"the weights {what}", error, value) for what, error, value in outs("where")[-4:]),
]
CALLS = {
    "batch_norm": (
        "batch_norm",
        lambda w: (fastbn.batch_norm, given(w, "x", "mean", "var", "gamma", "beta", "out")),
        {"x": XS, "mean": MEANS, "var": VARS, **PARAMETERS, **OPTIONS, **PARTS, "out": outs("x")},
    ),
    "batch_norm over a residual": (
        "batch_norm",
        lambda w: (fastbn.batch_norm, given(w, "x", "mean", "var", "residual", "out") | {"activation": "relu"}),
        {"residual": RESIDUALS, "out": outs("residual")},
    ),
    "batch_norm_train": (
        "batch_norm_train",
        lambda w: (fastbn.batch_norm_train, given(w, "x", "gamma", "beta", "out")),
        {"x": [*XS, *ONE_EACH], **PARAMETERS, **OPTIONS, "where": MASKS, **PARTS, "out": outs("x")},
    ),
    "batch_norm_train with a residual": (
        "batch_norm_train",
        lambda w: (fastbn.batch_norm_train, given(w, "x", "residual", "out")),
        {"where": MASKS, "activation": ACTIVATIONS, "out": [*outs("residual"), *IN_PLACE]},
    ),
    "batch_norm_train with ReLU and weights": (
        "batch_norm_train",
        lambda w: (fastbn.batch_norm_train, given(w, "x", "where", "out") | {"activation": "relu"}),
        {"x": [*XS, *ONE_EACH], "residual": RESIDUALS, "out": [*NOT_THE_WEIGHTS, *IN_PLACE]},
    ),
    "batch_norm_train of integers": (
        "batch_norm_train",
        lambda w: (fastbn.batch_norm_train, {"x": w.images, "out": np.zeros(SHAPE, "f8")}),
        {"out": of_dtypes(SHAPE, [">f4", ">f2", np.longdouble, "u1", "i4", "?", "c8", "O", "V2"])},
    ),
    "batch_norm_backward": (
        "batch_norm_backward",
        lambda w: (fastbn.batch_norm_backward, given(w, "dy", "saved", "out")),
        {"dy": DYS, "saved": SAVED, "out": [*outs("dy"), ("x", V, lambda w: w.z), ("of x", V, lambda w: w.z[::-1])]},
    ),
    "batch_norm_backward of all parts": (
        "batch_norm_backward",
        lambda w: (fastbn.batch_norm_backward, {**given(w, "dy", "out"), "saved": w.parts}),
        {"dy": DYS, "saved": SAVED, "out": [*outs("dy"), *NOT_THE_WEIGHTS, ("x", V, lambda w: w.z)]},
    ),
    "Saved.fixed": (
        "Saved.fixed",
        lambda w: (fastbn.Saved.fixed, given(w, "x", "mean", "var", "gamma", "beta")),
        {"x": XS, "mean": MEANS, "var": VARS, **PARAMETERS, **OPTIONS, **PARTS},
    ),
    "moments": (
        "moments",
        lambda w: (fastbn.moments, given(w, "x")),
        {
            "x": [*without(XS, "generator"), ("batches of numbers", V, lambda w: numbers()),
                  ("a batch of text", T, lambda w: iter(["a"])), ("no batches", V, lambda w: iter([]))],
            "axis": AXES, "where": MASKS, "start": STARTS, "progress": FLAGS,
        },
    ),
    "Moments": (
        "Moments",
        lambda w: (fastbn.Moments, {"count": 3, **given(w, "mean"), "m2": w.var}),
        {"count": WEIGHTS, "mean": [*unusable(C), *NONE], "m2": [*parameters(), *NONE, *NEGATIVE]},
    ),
    "Moments.empty": ("Moments.empty", lambda w: (fastbn.Moments.empty, {}), {"channels": CHANNELS}),
    "Moments.merge": (
        "Moments.merge",
        lambda w: (w.m.merge, {}),
        {"other": [*NO_MOMENTS, *OTHER_MOMENTS]},
    ),
    "Moments.var": ("Moments.var", lambda w: (w.m.var, {}), {"correction": CORRECTION}),
    "Moments.std": ("Moments.std", lambda w: (w.m.std, {}), {"correction": CORRECTION}),
    "update_running": (
        "update_running",
        lambda w: (fastbn.update_running, given(w, "running_mean", "running_var", "m")),
        {
            "running_mean": [*STATISTICS, ("running_var", V, lambda w: w.running_var)],
            "running_var": [*STATISTICS, ("running_mean reversed", V, lambda w: w.running_mean[::-1])],
            "m": [
                *NO_MOMENTS, ("one value", V, fastbn.moments(np.ones((1, C)))),
                *((f"weight {w} in a channel", V, fastbn.Moments(np.array([4, w, 0]), np.zeros(C), np.ones(C)))
                  for w in (1.0, 0.3, 5e-324)),
            ],
            "momentum": [*MOMENTUM, *NONE],
            "correction": CORRECTION,
        },
    ),
    "BatchNorm": (
        "BatchNorm",
        lambda w: (fastbn.BatchNorm, {"channels": C}),
        {
            "channels": [*CHANNELS, ("zero", V, 0), ("a zero", V, (3, 0))],
            "axis": LAYER_AXES,
            "eps": EPS,
            "momentum": MOMENTUM,
            "correction": CORRECTION,
            "center": [*FLAGS, *NONE],
            "scale": [*FLAGS, *NONE],
            "track_running_stats": [*FLAGS, *NONE],
            "activation": ACTIVATIONS,
            "dtype": PARAMETER_DTYPES,
        },
    ),
    "training": (
        "BatchNorm",
        lambda w: (w.bn, given(w, "x", "out")),
        {
            "x": [*XS, *ONE_EACH, *OTHER_CHANNELS], "residual": RESIDUALS, "where": MASKS, "save": FLAGS,
            "out": outs("x"),
        },
    ),
    "training with ReLU": (
        "BatchNorm",
        lambda w: (w.rectified, given(w, "x", "residual", "where", "out")),
        {
            "x": ONE_EACH, "residual": RESIDUALS[::5], "where": MASKS[::5],
            "out": [*outs("x")[-4:], *NOT_THE_WEIGHTS, *IN_PLACE],
        },
    ),
    "training with a pool": (
        "BatchNorm",
        lambda w: (w.pooled, given(w, "x", "out")),
        {
            "x": [*ONE_EACH, *OTHER_CHANNELS], "residual": RESIDUALS[::5], "where": MASKS[-9:], "save": FLAGS[:3],
            "out": outs("x")[-4:],
        },
    ),
    "evaluation": (
        "BatchNorm",
        lambda w: (w.bn.eval(), given(w, "x", "out")),
        {
            "x": [*XS, *OTHER_CHANNELS], "residual": RESIDUALS, "where": MASKS, "save": FLAGS, "out": outs("x"),
        },
    ),
    "backward": (
        "BatchNorm.backward",
        lambda w: (w.bn.backward, given(w, "dy", "out")),
        {"dy": DYS, "out": [*outs("dy"), ("x", V, lambda w: w.z)]},
    ),
    "train": ("BatchNorm.train", lambda w: (w.bn.train, {}), {"mode": [*FLAGS, *NONE]}),
    "fit_population": (
        "BatchNorm.fit_population",
        lambda w: (w.bn.fit_population, {"batches": [w.x]}),
        {"batches": BATCHES, "start": STARTS, "progress": FLAGS},
    ),
    "load_state_dict": (
        "BatchNorm.load_state_dict",
        lambda w: (w.bn.load_state_dict, {}),
        {
            "state": [
                *without(OBJECTS, "dict", "empty dict"), *NONE, *SEQUENCES, ("class", T, dict),
                ("empty", V, {}),
                ("a number as key", V, lambda w: w.bn.state_dict() | {1: 1}),
                ("a module as key", V, lambda w: w.bn.state_dict() | {os: 1}),
                ("many unknown", V, lambda w: w.bn.state_dict() | {f"layer{i}": 1 for i in range(1000)}),
            ],
        },
    ),
    "a state's value": (
        "BatchNorm.load_state_dict",
        lambda w: (load(w.bn), w.bn.state_dict()),
        {
            **PARAMETERS, "running_mean": MEANS, "running_var": VARS, "num_batches_tracked": STATE_COUNTS,
            "weight": [("unknown", V, np.ones(C))],
        },
    ),
    "a pool's value": (
        "BatchNorm.load_state_dict",
        lambda w: (load(w.pooled), w.pooled.state_dict()),
        {"running_count": WEIGHTS, "running_m2": VARS},
    ),
    "a spoiled layer in training": (
        "BatchNorm",
        lambda w: (spoiled(w, lambda: w.bn(w.x, out=w.out)), {}),
        {
            **PARAMETERS, **OPTIONS, "momentum": MOMENTUM, "correction": CORRECTION, "activation": ACTIVATIONS,
            "running_mean": STATISTICS, "running_var": STATISTICS,
        },
    ),
    "a spoiled layer in evaluation": (
        "BatchNorm",
        lambda w: (w.bn.eval(), (spoiled(w, lambda: w.bn(w.x, out=w.out)), {}))[1],
        {
            **PARAMETERS, **OPTIONS, "activation": ACTIVATIONS, "running_mean": parameters(),
            "running_var": [*parameters(), *NEGATIVE],
        },
    ),
    "a spoiled layer folded": (
        "BatchNorm.fold",
        lambda w: (spoiled(w, lambda: w.bn.fold()), {}),
        {**PARAMETERS, "eps": EPS, "running_mean": parameters(), "running_var": [*parameters(), *NEGATIVE]},
    ),
    "fold_conv": (
        "fold_conv",
        lambda w: (fastbn.fold_conv, {"weight": w.kernel, **given(w, "bias", "bn")}),
        {
            "weight": [*KERNELS, ("a matrix", V, np.ones((C, 2)))], "bias": parameters(), "bn": LAYERS,
            "layout": [*NO_LAYOUTS, *((name, V, name) for name in ("OI", "IO", "IOHW", "HWOI", "HWIO", "OIW"))],
            "groups": GROUPS, "transposed": [*FLAGS, *NONE],
        },
    ),
    "fold_conv of a transposed one": (
        "fold_conv",
        lambda w: (fastbn.fold_conv, {"weight": np.ones((2 * C, 1, 2, 2)), **given(w, "bias", "bn"),
                                      "groups": C, "transposed": True}),
        {
            "weight": [*KERNELS, *((f"shape {s}", V, np.ones(s)) for s in ((C, C, 2, 2), (C + 1, 1, 2, 2)))],
            "bias": parameters(), "bn": LAYERS, "layout": [*NO_LAYOUTS, ("HWOI", V, "HWOI"), ("IO", V, "IO")],
            "groups": GROUPS, "transposed": [*FLAGS, *NONE, ("not", V, False)],
        },
    ),
    "fold_linear": (
        "fold_linear",
        lambda w: (fastbn.fold_linear, {"weight": w.matrix, **given(w, "bias", "bn")}),
        {
            "weight": [*KERNELS, ("a kernel", V, np.ones((C, 2, 1, 1)))], "bias": parameters(), "bn": LAYERS,
            "layout": [*NO_LAYOUTS, ("OIHW", V, "OIHW"), ("IO", V, "IO")],
        },
    ),
    "a spoiled layer folded into weights": (
        "fold_linear",
        lambda w: (spoiled(w, lambda: fastbn.fold_linear(w.matrix, None, w.bn)), {}),
        {**PARAMETERS, "eps": EPS, "running_mean": parameters(), "running_var": [*parameters(), *NEGATIVE]},
    ),
    "set_num_threads": (
        "set_num_threads",
        lambda w: (fastbn.set_num_threads, {}),
        {"n": [*NO_COUNTS, ("zero", V, 0), ("negative", V, -1), ("far below", V, -(10**5000))]},
    ),
    "set_pool_limit": ("set_pool_limit", lambda w: (fastbn.set_pool_limit, {}), {"nbytes": COUNTS}),
    "warmup": (
        "warmup",
        lambda w: (fastbn.warmup, {}),
        {
            "dtypes": [
                *((what, error, [value]) for what, error, value in NO_DTYPES),
                ("nothing", T, None), ("a word", T, "word"),
            ],
            "axes": [
                *((what, error, [value]) for what, error, value in (*NO_AXES, *FAR)),
                ("nothing", T, None), ("a float", T, 1.0), ("too high", V, 4), ("too low", V, [1, -5]),
            ],
            "parts": [
                ("nothing", T, None), ("a number", T, 1), ("names in a tuple", T, [("residual", "activation")]),
                ("an unknown name", V, "relu"), ("no name", V, ""), ("half of two", V, ["where", "residual+"]),
            ],
        },
    ),
}  # fmt: skip

# As what an argument may be called in a message.
ALIASES = {
    "mean": "mean|running_mean",
    "running_mean": "mean|running_mean",
    "var": "var|running_var",
    "running_var": "var|running_var",
    "transposed": "transposed|weight",
    "layout": "layout|weight",
    "batches": "batch|batches",
    "x": "x|batch",
}


def grid():
    for call, (_, _, arguments) in CALLS.items():
        for argument, bads in arguments.items():
            for bad in bads:
                yield call, {argument: bad}


def pairs():
    """Two bad arguments at once: of every pair of arguments some pairs of bad values."""
    for call, (_, _, arguments) in CALLS.items():
        for (one, first), (other, second) in itertools.combinations(arguments.items(), 2):
            for i in range(3):
                yield call, {one: first[(7 * i + 3) % len(first)], other: second[(11 * i + 5) % len(second)]}


def named(call, bads):
    return pytest.param(call, bads, id=f"{call}-" + "-".join(f"{a} {what}" for a, (what, _, _) in bads.items()))


GRID = [named(*bad) for bad in (*grid(), *pairs())]


def fingerprint(thing, depth=0):
    """All that a call could change of a thing, as a value to compare."""
    if isinstance(thing, np.ma.MaskedArray):
        return fingerprint(thing.data), fingerprint(thing.mask)
    if isinstance(thing, np.ndarray):
        base = thing
        while isinstance(base.base, np.ndarray):
            base = base.base
        content = [id(o) for o in base.flat] if base.dtype.hasobject else hashlib.sha256(base.tobytes()).digest()
        return thing.shape, thing.strides, thing.dtype, thing.flags.writeable, content
    if isinstance(thing, (fastbn.Moments, fastbn.Saved)):
        if isinstance(thing, fastbn.Moments):
            return tuple(fingerprint(part) for part in (thing.count, thing.mean, thing.m2))
        return tuple(fingerprint(part) for part in (thing.x, thing._state, thing._bits, thing._weights))
    if isinstance(thing, (fastbn.BatchNorm, SimpleNamespace)):
        return fingerprint(vars(thing))
    if isinstance(thing, dict):
        return [(fingerprint(k, depth + 1), fingerprint(v, depth + 1)) for k, v in thing.items()]
    if isinstance(thing, (list, tuple)) and depth < 9:  # a list may hold itself
        return [fingerprint(v, depth + 1) for v in thing]
    return thing if isinstance(thing, (int, str, type(None))) else id(thing)


@pytest.mark.parametrize(("call", "bads"), GRID)
def test_a_bad_call_is_refused(call, bads):
    names, good, _ = CALLS[call]
    w = world()
    function, arguments = good(w)
    for argument, (_, _, value) in bads.items():
        arguments[argument] = value(w) if type(value) is type(lambda: 0) else value
    settings = fastbn.get_num_threads(), _memory._limit
    before = fingerprint([arguments, w])
    message = refused(
        lambda: function(**arguments),
        names,
        "|".join(ALIASES.get(argument, argument) for argument in bads),
        tuple(error for _, error, _ in bads.values()),
    )
    assert (fastbn.get_num_threads(), _memory._limit) == settings, message
    if call.startswith("a spoiled"):  # by the arguments themselves, before the call
        assert fingerprint(w.bn) == function.before, message
        before, w.bn = function.others, None
    assert fingerprint([arguments, w]) == before, message


def test_the_grid_is_large():
    ids = [p.id for p in GRID]
    assert len(ids) == len(set(ids))
    assert len(GRID) >= 1000
    for call, (_, good, arguments) in CALLS.items():
        function, _ = good(world())
        assert arguments, (call, function)


@pytest.mark.parametrize("call", [c for c in CALLS if c not in ("load_state_dict", "Moments.empty",
    "Moments.merge", "train", "a state's value", "a pool's value") and "spoiled" not in c])  # fmt: skip
def test_the_good_arguments_are_good(call):
    """Else the grid would prove nothing."""
    function, arguments = CALLS[call][1](world())
    if call not in ("set_num_threads", "set_pool_limit", "warmup"):
        function(**arguments)


KEYWORDS = {
    "batch_norm": ("epsilon", "weight", "training", "momentum", "data_format", "where", "z"),
    "batch_norm_train": ("mean", "running_mean", "momentum", "mask", "act"),
    "batch_norm_backward": ("x", "gamma", "axis", "eps", "residual", "where", "activation"),
    "Saved.fixed": ("out", "x_hat", "where"),
    "moments": ("eps", "out", "keepdims", "weights", "residual"),
    "update_running": ("decay", "axis"),
    "Moments": ("var", "dtype"),
    "BatchNorm": ("num_features", "affine", "epsilon", "axis_name", "residual", "where"),
    "training": ("training", "y", "mask", "activation"),
    "backward": ("x", "where"),
    "fold_conv": ("data_format", "transpose", "axis"),
    "fold_linear": ("groups", "transposed"),
    "warmup": ("dtype", "part", "verbose"),
}


@pytest.mark.parametrize(("call", "keyword"), [(c, k) for c, keywords in KEYWORDS.items() for k in keywords])
def test_python_refuses_an_unknown_keyword(call, keyword):
    w = world()
    function, arguments = CALLS[call][1](w)
    before = fingerprint(w)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        function(**arguments, **{keyword: 1})
    assert fingerprint(w) == before


@pytest.mark.parametrize("key", STATE)
def test_a_state_that_lacks_a_key(key):
    w = world()
    state = w.bn.state_dict()
    del state[key]
    before = fingerprint(w)
    refused(lambda: w.bn.load_state_dict(state), "BatchNorm.load_state_dict", key, ValueError)
    assert fingerprint(w) == before


def test_what_is_behind_a_refusal_is_the_strangers_own_exception():
    error = RuntimeError("the disk is gone")
    with pytest.raises(
        TypeError, match=r"^moments: x cannot be made an array: RuntimeError\('the disk is gone'\)"
    ) as caught:
        fastbn.moments(Raises(error))
    assert caught.value.__cause__ is error
    with pytest.raises(MemoryError, match="as it is"):
        fastbn.moments(Raises(MemoryError("as it is")))
