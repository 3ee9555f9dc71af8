"""What the tests of older systems share: derivatives by central differences."""

import numpy as np


def numeric_gradient(f, a, h=1e-6):
    """The gradient of the number f(a) by the float64 array a."""
    found = np.empty(a.shape)
    for i in np.ndindex(a.shape):
        up, down = a.copy(), a.copy()
        up[i] += h
        down[i] -= h
        found[i] = (f(up) - f(down)) / (2 * h)
    return found


def assert_gradients(f, arrays, found, rtol=1e-6):
    """`found` are the gradients of the number f(*arrays), one by each array, to `rtol` of the largest."""
    for i, (a, g) in enumerate(zip(arrays, found, strict=True)):
        a = np.asarray(a, np.float64)
        expected = numeric_gradient(lambda v, i=i: f(*arrays[:i], v, *arrays[i + 1 :]), a)
        np.testing.assert_allclose(g, expected, rtol=rtol, atol=rtol * abs(expected).max(), err_msg=f"of argument {i}")
