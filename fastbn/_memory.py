"""Arrays in and out of the kernels: which memory is used in place, what is copied, what is new."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ._layout import Layout, flat, is_dense

Array = npt.NDArray[Any]


def source(x: Array, lay: Layout) -> Array:
    """The elements of x in memory order; a copy only if x is contiguous in no order of its axes."""
    if is_dense(x, lay):
        return flat(x, lay)
    return np.ascontiguousarray(x.transpose(lay.order), dtype=x.dtype.newbyteorder("=")).reshape(-1)


class Target:
    """An output, and the dense memory `flat` in which the kernels compute it.

    That memory is the output's own unless the caller's `out` lies in another order; then `finish` copies it over.
    """

    def __init__(self, like: Array, dtype: np.dtype[Any], lay: Layout, out: Array | None) -> None:
        self.array = np.empty_like(like, dtype=dtype, subok=False) if out is None else out
        if is_dense(self.array, lay):
            self._dense, self.flat = self.array, flat(self.array, lay)
        else:
            ordered = np.empty([like.shape[a] for a in lay.order], dtype)
            self._dense, self.flat = ordered.transpose(np.argsort(lay.order)), ordered.reshape(-1)

    def source(self, x: Array, lay: Layout, *, convert: bool = False) -> Array:
        """As `source`, but where a copy is needed it is made in this target, which may then be computed in place.

        x may keep a dtype other than the target's, unless `convert`.
        """
        same = x.dtype.newbyteorder("=") == self.flat.dtype
        if is_dense(x, lay) and (same or not convert):
            return flat(x, lay)
        if same or convert:
            np.copyto(self._dense, x, casting="same_kind")
            return self.flat
        return source(x, lay)

    def finish(self) -> Array:
        """The output, complete."""
        if self._dense is not self.array:
            np.copyto(self.array, self._dense)
        return self.array
