"""The lanes in NumPy: what each computes, and that a piece out of its array is an IndexError, not a shorter piece."""

import numpy as np
import pytest

from fastbn.kernels import plain
from fastbn.kernels.plain import LANES

X = np.arange(40, dtype="float32")


@pytest.mark.parametrize("i", [0, 3, 40 - LANES])
def test_whole_pieces(i):
    expected = np.arange(i, i + LANES)
    np.testing.assert_array_equal(plain.load(X, i, LANES, X), expected)
    np.testing.assert_array_equal(plain.load64(X, i, LANES), expected)
    assert (plain.load(X, i, LANES, X).dtype, plain.load64(X, i, LANES).dtype) == (np.float32, np.float64)
    y = X.copy()
    plain.store(y, i, LANES, -plain.load64(X, i, LANES))
    np.testing.assert_array_equal(y, np.where((i <= X) & (i + LANES > X), -X, X))
    plain.store(y, i, LANES, np.float64(7))
    np.testing.assert_array_equal(y, np.where((i <= X) & (i + LANES > X), 7, X))


@pytest.mark.parametrize(("i", "n"), [(0, 1), (5, 15), (39, 1), (30, 10), (8, 16), (40, 0)])
def test_last_pieces(i, n):
    expected = np.zeros(LANES)
    expected[:n] = np.arange(i, i + n)
    np.testing.assert_array_equal(plain.load(X, i, n, X), expected)
    np.testing.assert_array_equal(plain.load64(X, i, n), expected)
    assert (plain.load(X, i, n, X).dtype, plain.load64(X, i, n).dtype) == (np.float32, np.float64)
    y = X.copy()
    plain.store(y, i, n, np.full(LANES, -1.0))
    np.testing.assert_array_equal(y, np.where((i <= X) & (i + n > X), -1, X))


@pytest.mark.parametrize("i", [-1, -16, 40 - LANES + 1, 39, 40, 1000])
def test_a_piece_that_is_not_whole_is_refused(i):
    y = X.copy()
    for call in (lambda x, i: plain.load(x, i, LANES, x), lambda x, i: plain.load64(x, i, LANES)):
        with pytest.raises(IndexError, match=f"^lanes {i} to {i + LANES} of an array of 40$"):
            call(X, i)
    with pytest.raises(IndexError, match="of an array of 40"):
        plain.store(y, i, LANES, np.zeros(LANES))
    np.testing.assert_array_equal(y, X)


@pytest.mark.parametrize(("i", "n"), [(-1, 3), (38, 3), (40, 1), (0, 17), (0, -1), (41, 0), (25, 16)])
def test_a_last_piece_that_is_not_all_there_is_refused(i, n):
    y = X.copy()
    for call in (lambda x, i, n: plain.load(x, i, n, x), plain.load64):
        with pytest.raises(IndexError, match="of an array of 40"):
            call(X, i, n)
    with pytest.raises(IndexError, match="of an array of 40"):
        plain.store(y, i, n, np.zeros(LANES))
    np.testing.assert_array_equal(y, X)


@pytest.mark.parametrize("lanes", [np.zeros(15), np.zeros(17), np.zeros(1), np.zeros((1, LANES))])
def test_a_value_of_other_than_sixteen_lanes_is_refused(lanes):
    y = X.copy()
    for call in (
        lambda y, i, v: plain.store(y, i, LANES, v),
        lambda y, i, v: plain.store(y, i, 1, v),
        lambda y, i, v: plain.only(v, 1),
    ):
        with pytest.raises(IndexError, match=r"^\(.*\) lanes, expected 16$"):
            call(y, 0, lanes)
    np.testing.assert_array_equal(y, X)


@pytest.mark.parametrize("n", [0, 1, 15, 16])
def test_only_the_first_lanes(n):
    """Also where the others are infinite, of which 0 times would not be 0."""
    value = np.full(LANES, np.inf)
    value[:n] = 3
    np.testing.assert_array_equal(plain.only(value, n), np.where(np.arange(LANES) < n, 3, 0))


def test_arithmetic():
    a, b, c = np.arange(LANES) + 1.0, np.arange(LANES) + 20.0, np.float64(3)
    np.testing.assert_array_equal(plain.minus(a, c), a - 3)
    np.testing.assert_array_equal(plain.plus(a, b), a + b)
    np.testing.assert_array_equal(plain.times(a, b), a * b)
    np.testing.assert_array_equal(plain.muladd(a, b, c), a * b + 3)
    np.testing.assert_array_equal(plain.zeros(), [0.0] * LANES)
    assert plain.zeros().dtype == np.float64


def test_the_total_is_that_of_halves_upon_halves():
    """2**53 + 1 is not a float64: another order of the same sum gives another result."""
    a = np.zeros(LANES)
    a[0], a[8], a[1], a[9] = 2.0**53, -(2.0**53), 1.0, 1.0
    assert plain.total(a) == 2
    a[0], a[1], a[8], a[9] = 2.0**53, -(2.0**53), 1.0, 1.0
    assert plain.total(a) == 1
    assert plain.total(np.arange(LANES) + 1.0) == 136
