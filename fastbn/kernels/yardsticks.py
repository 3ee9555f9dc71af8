"""What memory allows: the loops that every speed is given in units of.

copy = one read, one write; triad = two reads, one write; read and read2 = one and two reads. Each runs over contiguous
blocks of float32 or float64 arrays, in parallel, vectorized, without a second pass.
"""

import numpy as np

from .._jit import elementwise, kernel, prange, reduction

BLOCK = 1 << 15


@reduction
def run_sum(x):
    """sum(x)."""
    s = np.float64(0.0)
    for i in range(x.size):
        s += x[i]
    return s


@reduction
def run_sum2(x, dy):
    """sum(x) + sum(dy)."""
    s = np.float64(0.0)
    t = np.float64(0.0)
    for i in range(x.size):
        s += x[i]
        t += dy[i]
    return s + t


@elementwise
def run_copy(x, y, a, b, c):
    """y = (x - a) * b + c."""
    for i in range(x.size):
        y[i] = (x[i] - a) * b + c


@elementwise
def run_triad(x, dy, z, a, b, c):
    """z = x * a + dy * b + c."""
    for i in range(x.size):
        z[i] = x[i] * a + dy[i] * b + c


@kernel
def copy(x, y, k):
    """y = (x - k[0]) * k[1] + k[2], with k = (0, 1, 0.5)."""
    for t in prange(-(-x.size // BLOCK)):
        i = np.intp(t) * BLOCK
        run_copy(x[i : i + BLOCK], y[i : i + BLOCK], k[0], k[1], k[2])


@kernel
def triad(x, dy, z, k):
    """z = x * k[0] + dy * k[1] + k[2]."""
    for t in prange(-(-x.size // BLOCK)):
        i = np.intp(t) * BLOCK
        run_triad(x[i : i + BLOCK], dy[i : i + BLOCK], z[i : i + BLOCK], k[0], k[1], k[2])


@kernel
def read(x, sums):
    """The sum of each block of x."""
    for t in prange(-(-x.size // BLOCK)):
        i = np.intp(t) * BLOCK
        sums[np.intp(t)] = run_sum(x[i : i + BLOCK])


@kernel
def read2(x, dy, sums):
    """The sum of each block of x and of dy."""
    for t in prange(-(-x.size // BLOCK)):
        i = np.intp(t) * BLOCK
        sums[np.intp(t)] = run_sum2(x[i : i + BLOCK], dy[i : i + BLOCK])
