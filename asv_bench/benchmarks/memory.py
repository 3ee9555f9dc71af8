"""The most memory that a call needs beside its arrays: next to nothing with `out=`, else the output.

Linux keeps the highest resident size of a process; writing 5 to clear_refs lowers that mark to the size of now.
The peaks of compiling and of building the arrays are forgotten so, as they are not in `ru_maxrss`.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

import fastbn

from .common import LAYOUTS, arrays

SHAPE = (32, 64, 112, 112)  # 103 MB of float32: malloc may have kept up to 64 MB that was freed before
PROC = Path("/proc/self")
MIB = 1 << 20


def high_water():
    """The highest resident size since the mark was lowered, in bytes."""
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak(call):
    """Bytes by which the process grew at most during a call; to whole MiB, for Linux's count is not exact."""
    (PROC / "clear_refs").write_text("5")
    before = high_water()
    call()
    return round((high_water() - before) / MIB) * MIB


@lru_cache(maxsize=1)
def case(layout, shape):
    """Arrays all of whose pages are there, and the `Saved` of a forward."""
    c = arrays(layout, shape, "float32")
    c.out.fill(0)
    c.dy = np.ones_like(c.x)
    c.mean, c.var = np.zeros_like(c.gamma), np.ones_like(c.gamma)
    return c, fastbn.batch_norm_train(c.x, c.gamma, c.beta, axis=c.axis, out=c.out)[1]


CALLS = {
    "train forward, out=": lambda c, saved: fastbn.batch_norm_train(c.x, c.gamma, c.beta, axis=c.axis, out=c.out),
    "train forward, fresh": lambda c, saved: fastbn.batch_norm_train(c.x, c.gamma, c.beta, axis=c.axis),
    "backward, out=": lambda c, saved: fastbn.batch_norm_backward(c.dy, saved, out=c.out),
    "inference, out=": lambda c, saved: fastbn.batch_norm(c.x, c.mean, c.var, c.gamma, c.beta, axis=c.axis, out=c.out),
}


class Peak:
    params = (tuple(CALLS), LAYOUTS)
    param_names = ("call", "layout")
    unit = "bytes"

    def setup(self, call, layout):
        if not (PROC / "clear_refs").exists():
            raise NotImplementedError("needs Linux")

    def track_above_the_arrays(self, call, layout):
        CALLS[call](*case(layout, (8, *SHAPE[1:])))  # compiles, starts the threads
        given = case(layout, SHAPE)
        fastbn.empty_pool()
        return peak(lambda: CALLS[call](*given))
