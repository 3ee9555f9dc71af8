"""float16 and bfloat16, exhaustively: every one of them is read as what it is, and every result is rounded once.

With values between all neighbours, and with all 65,536 halves through an affine map, against fractions. The conversions
differ by processor and build: plain Python's are tested beside the compiled ones, and the same tests run again on an
x86-64 without any instruction for halves.
"""

import itertools
import os
import platform
from fractions import Fraction

import numpy as np
import pytest
import reference
from arrays import HALVES
from reference import WIDE
from subprocesses import TESTS, run_python

import fastbn
from fastbn.kernels import halves, plain

# Shapes in which M channels go through the kernels of short and of long runs; their channels are axis 1.
SHAPES = {"rows": lambda m: (1, m), "runs": lambda m: (1, m, 35)}
WAYS = [*itertools.product(SHAPES, ("forward", "backward")), (None, "plain")]


def bits_of(a):
    return a.view(np.uint16)


def of_bits(bits, dtype):
    return np.asarray(bits, np.uint16).view(dtype)


def every(dtype):
    return of_bits(np.arange(1 << 16), dtype)


def infinity(dtype):
    """Its bits: those of the first number that is too large."""
    return int(bits_of(np.array(np.inf, dtype)))


def neighbours(dtype):
    """All numbers from 0 on in float64; after the largest comes what would be the next if there were one."""
    found = of_bits(np.arange(infinity(dtype)), dtype).astype(np.float64)
    return np.append(found, 2 * found[-1] - found[-2])


def between(dtype):
    """{kind: (float64 values, the bits of the half that each is rounded to)}."""
    low = neighbours(dtype)
    high, bits = low[1:], np.arange(low.size - 1)
    low = low[:-1]
    middle = (low + high) / 2
    assert (middle - low == high - middle).all()
    single = middle.astype(np.float32)
    return {
        "themselves": (low, bits),
        "the middle": (middle, bits + bits % 2),
        "below": (np.nextafter(middle, 0), bits),
        "above": (np.nextafter(middle, np.inf), bits + 1),
        "below in float32": (np.nextafter(single, np.float32(0)).astype(np.float64), bits),
        "above in float32": (np.nextafter(single, np.float32(np.inf)).astype(np.float64), bits + 1),
        "beyond": (2.0 ** np.linspace(130, 1000, 9) * [1.5], np.full(9, infinity(dtype))),
        "vanishing": (2.0 ** -np.linspace(160, 1074, 9), np.zeros(9, int)),
        "infinite": (np.array([np.inf]), np.array([infinity(dtype)])),
    }


def stored(values, dtype, shape, verb):
    """float64 values as a verb stores them: as betas of x = 0, or as gammas of dy = 1; or as plain Python does."""
    if verb == "plain":
        with np.errstate(over="ignore"):  # as kernels have it
            return plain.to_half(values, dtype).view(np.uint16)
    x = np.zeros(shape(values.size), dtype)
    if verb == "forward":
        y = fastbn.batch_norm(x, 0.0, 1.0, None, values, eps=0)
    else:
        saved = fastbn.Saved.fixed(x, 0.0, 1.0, values, eps=0)
        y = fastbn.batch_norm_backward(np.ones_like(x), saved)[0]
    found = bits_of(y.reshape(values.size, -1))
    assert (found == found[:, :1]).all()
    return found[:, 0]


def tied(values, dtype):
    """Where two halves are too near to tell: below the normal numbers a bfloat16 is rounded in float32 first."""
    middle = reference.to_half(values, dtype)
    beside = [reference.to_half(values.astype(WIDE) + d, dtype) for d in (-(WIDE(2) ** -150), WIDE(2) ** -150)]
    near = (beside[0] != middle) | (beside[1] != middle)
    return near & (abs(values) < 2.0**-126) if dtype == "bfloat16" else np.zeros(values.size, bool)


@pytest.mark.parametrize(
    ("way", "verb"),
    [("rows", "forward"), ("rows", "backward"), ("runs", "forward"), ("runs", "backward"), ("", "plain")],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_what_lies_between_two_halves_goes_to_the_nearer_one(dtype, way, verb):
    """Between all neighbours, of either sign; in long runs between some of them."""
    ties = {}
    for kind, (values, expected) in between(dtype).items():
        some = slice(1, None, 61) if way == "runs" and values.size > 100 else slice(None)
        for sign in (1, -1):
            found = stored(sign * values[some], dtype, SHAPES.get(way), verb)
            wrong = found != expected[some] + (0x8000 if sign < 0 else 0)
            # A sum with 0 has no sign.
            wrong &= (found & 0x7FFF != 0) | (expected[some] != 0)
            allowed = tied(values[some], dtype)
            at = np.flatnonzero(wrong & ~allowed)[:1]
            message = f"{kind}: {values[some][at].tolist()} stored as {found[at]}, expected {expected[some][at]}"
            assert not at.size, message
            ties[kind] = ties.get(kind, 0) + int(wrong.sum())
    shown = {kind for kind, n in ties.items() if n}
    # To either side of the middle between two of the 128 subnormal bfloat16, by less than float32 can tell.
    assert shown == ({"below", "above"} if dtype == "bfloat16" else set()), ties
    assert way == "runs" or sum(ties.values()) == (256 if shown else 0), ties


@pytest.mark.parametrize(("way", "verb"), WAYS)
@pytest.mark.parametrize("dtype", HALVES)
def test_no_number_stays_none(dtype, way, verb):
    """Also one whose bits all lie beyond those of a half."""
    nan = np.array([0x7FF8000000000000, 0xFFF8000000000000, 0x7FF8000000000001, 0x7FFFFFFFFFFFFFFF], np.uint64)
    assert (stored(nan.view(np.float64), dtype, SHAPES.get(way), verb) & 0x7FFF > infinity(dtype)).all()


def channels_of(dtype, way):
    """Every half, or of long runs some, as a channel of equal values: x, and the values in float64."""
    h = every(dtype)[:: 1 if way == "rows" else 17]
    _, *inner = SHAPES[way](h.size)
    x = np.empty((2, *inner), dtype)
    np.moveaxis(x, 1, -1)[...] = h
    with np.errstate(invalid="ignore"):  # signalling NaN
        return x, h.astype(np.float64)


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_read_as_what_it_is(dtype, way):
    """The mean of equal values is the value, and y with mean 0 and variance 1 is x; NaN stays NaN."""
    x, value = channels_of(dtype, way)
    real = np.isfinite(value)
    mean = fastbn.moments(x).mean
    np.testing.assert_array_equal(mean[real], value[real])
    assert not np.isfinite(mean[~real]).any()
    y = fastbn.batch_norm(x, 0.0, 1.0, eps=0)
    same = ~np.isnan(value) & (value != 0)
    np.testing.assert_array_equal(bits_of(y)[:, same], bits_of(x)[:, same])
    assert (bits_of(y)[:, np.isnan(value)] & 0x7FFF > infinity(dtype)).all()
    assert not (bits_of(y)[:, value == 0] & 0x7FFF).any()  # of either sign


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_backward_reads_every_half_as_what_it_is(dtype, way):
    """The gradient of beta is the sum of equal values, which is exact."""
    dy, value = channels_of(dtype, way)
    saved = fastbn.Saved.fixed(np.zeros_like(dy), 0.0, 1.0, beta=np.zeros(value.size), eps=0)
    with np.errstate(invalid="ignore"):
        total = value * (dy.size // value.size)
    np.testing.assert_array_equal(fastbn.batch_norm_backward(dy, saved)[2], total)


@pytest.mark.parametrize("dtype", HALVES)
def test_plain_python_reads_every_half_as_what_it_is(dtype):
    h = every(dtype)
    with np.errstate(invalid="ignore"):
        found, value = (a.astype(np.float64) for a in (plain.from_half(h.view(plain.CARRIERS[dtype])), h))
    np.testing.assert_array_equal(found, value)


def nearest(values, dtype):
    """Fractions rounded to the nearest half, ties to even; those beyond the largest are infinite."""
    found = []
    digits, lowest, highest = reference.HALVES[dtype]
    for v in values:
        size = abs(v)
        e = size.numerator.bit_length() - size.denominator.bit_length() if v else lowest
        e -= size < Fraction(2) ** e
        unit = Fraction(2) ** (max(e, lowest) - digits)
        rounded = round(v / unit) * unit  # Python rounds to even
        found.append(float(rounded) if abs(rounded) < Fraction(2) ** (highest + 1) else np.inf * (1 if v > 0 else -1))
    return np.array(found)


# mean, var, gamma, beta with 1 / sqrt(var) a rational number, so that y is one; and the dtypes in which ties show:
# where the middle between two halves, and that plus something small, are one number in float64.
MAPS = {
    "a third": ((0.0, 1.0, 1 / 3, 0.0), ()),
    "moved": ((0.1, 0.25, 0.7, -1 / 3), ("bfloat16",)),
    "a half of a half": ((0.0, 1.0, 1.0 + 2.0**-11, 0.0), ()),
    "scaled": ((1e-3, 16.0, -3.0, 0.5), ("bfloat16",)),
    "less than float64 can add": ((0.0, 1.0, 1.0 + 2.0**-8, 2.0**-300), HALVES),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_gives_the_exact_result_rounded_once(dtype, name):
    """But where the exact value is nearer to the middle between two halves than float64 can tell: a tie."""
    (mean, var, gamma, beta), ties = MAPS[name]
    x = every(dtype)
    with np.errstate(invalid="ignore"):
        value = x.astype(np.float64)
        x, value = x[np.isfinite(value)], value[np.isfinite(value)]
    y = fastbn.batch_norm(x, mean, var, gamma, beta, axis=(), eps=0).astype(np.float64)
    root = {1.0: 1.0, 0.25: 0.5, 16.0: 4.0}[var]
    near = ((value - WIDE(mean)) * WIDE(gamma) / root + beta).astype(WIDE)
    terms = abs(value * WIDE(gamma) / root) + abs(WIDE(mean) * WIDE(gamma) / root) + abs(beta)
    slack = terms / 2**50
    if dtype == "bfloat16":
        slack += np.where(terms < 2.0**-125, WIDE(2) ** -149, 0)  # rounded as float32 first
    low, high = (reference.to_half(v, dtype) for v in (near - slack, near + slack))
    at = np.flatnonzero(~((low <= y) & (y <= high)))[:1]
    assert not at.size, f"x = {value[at[0]].hex()} gives {y[at[0]].hex()}, about {float(near[at[0]]).hex()}"
    # Whatever is not nearer to the middle than this has but one rounding; of the others the fractions are exact.
    unsure = np.flatnonzero(low != high)
    scale = Fraction(gamma) / Fraction(root)
    exact = [(Fraction(v) - Fraction(mean)) * scale + Fraction(beta) for v in value[unsure].tolist()]
    wrong = unsure[nearest(exact, dtype) != y[unsure]]
    assert bool((abs(value[wrong]) > 2.0**-100).any()) is (dtype in ties), f"{wrong.size} ties"
    assert wrong.size <= unsure.size / 2 or not ties, f"{wrong.size} of {unsure.size} ties go the wrong way"


AGAIN = "FASTBN_WITHOUT_F16C"


@pytest.mark.jit("it compiles for another processor")
@pytest.mark.skipif(AGAIN in os.environ, reason="this is that run")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 may have no such instructions")
def test_the_same_without_instructions_for_halves():
    """Forward alone, since all verbs load and store alike; bfloat16, which has no instructions anywhere, in rows."""
    run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_halves.py"),
        "-k", "not backward and not bfloat16 or bfloat16-rows-forward or converts_nothing",
        cwd=TESTS.parent, timeout=600, **{AGAIN: "1"}, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="",
    )  # fmt: skip


@pytest.mark.skipif(AGAIN not in os.environ, reason="of the run without instructions for halves")
def test_the_processor_converts_nothing():
    assert not halves._converts()
