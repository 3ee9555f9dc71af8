"""Compiled kernels under NUMBA_BOUNDSCHECK=1: that an index out of bounds is seen, else such a run would prove nothing.

Only those with the checks compiled in see one: a warm cache of other machine code would not. So `conftest` gives such a
run an empty folder. Lanes are loads and stores by address, which no run of compiled code checks; with the JIT off they
check themselves (`kernels.plain`).
"""

import numpy as np
import pytest
from arrays import SMALL
from numba import config

from fastbn.kernels import backward, forward
from fastbn.kernels.grid import split_grid

pytestmark = [
    pytest.mark.jit("NumPy checks every index"),
    pytest.mark.skipif(not config.BOUNDSCHECK, reason="needs NUMBA_BOUNDSCHECK=1, as the step `bounds` of .ci/run"),
]
CHANNELS = 3


@pytest.mark.parametrize("build", ["serial", "parallel"])
@pytest.mark.parametrize("inner", [64, 1])
def test_an_index_out_of_bounds_is_an_error(inner, build):
    """Parameters, and then room for gradients, of two channels for an array of three."""
    x = np.ones(8 * CHANNELS * inner, "float32")
    sizes = split_grid(8, CHANNELS, inner, 4).sizes
    short, grads = np.ones((4, CHANNELS - 1)), np.empty((2, CHANNELS - 1))
    inference = getattr(forward.forward_runs if inner > 1 else forward.forward_rows, build)
    frozen = getattr(backward.backward_runs if inner > 1 else backward.backward_rows, build)
    state, nones = np.ones((4, CHANNELS)), (None,) * (5 if inner > 1 else 4)
    with pytest.raises(IndexError, match="out of bounds"):
        inference(x, np.empty_like(x), short, 1e-5, 1.0, None, None, True, True, sizes, *nones)
    with pytest.raises(IndexError, match="out of bounds"):
        frozen(x, x, np.empty_like(x), state, 1e-5, 1.0, grads, None, None, True, False, sizes, *(None,) * 4)


def test_the_kernels_were_compiled_in_this_run(rng):
    """None came from a cache."""
    import fastbn

    for case in (SMALL[0], SMALL[-1]):
        d = case.data(rng, "float32")
        _, saved = fastbn.batch_norm_train(d.x)
        fastbn.batch_norm_backward(d.dy, saved)
    for kernel in (forward.forward_runs, forward.forward_rows, backward.backward_runs, backward.backward_rows):
        stats = kernel.serial.stats
        assert sum(stats.cache_misses.values()) > 0
        assert sum(stats.cache_hits.values()) == 0
