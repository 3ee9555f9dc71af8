"""The compiled loops: `forward` (statistics and normalization) and `backward`, over the tiles of `grid`.

`leaves`, `lanes` and `halves` are what they are made of, `yardsticks` what they are measured by.

The contract of every kernel:

1. It takes arrays and plain numbers, and None for each part of the formula that a call has not. `x`, `y`, `dy`, `dx`
   are flat, contiguous and in the memory order of the canonical view (outer, channel, inner); statistics and
   parameters are float64, packed as rows of one array.
2. It writes its outputs and nothing else, and allocates nothing larger than a few numbers per channel and tile.
3. A `prange` body holds index arithmetic and calls to serial leaves, nothing else: the same loop inside the `prange`
   body ran at half the speed. Nothing below it allocates: Numba loses an exception that is raised there.
4. Leaves walk flat arrays by positions, sixteen explicit lanes at a time, with a masked last piece (`lanes`): neither
   vectors nor the order of a sum are left to LLVM. Only the yardsticks loop as ``for i in range(run.size)`` over
   slices.
5. Which numbers are summed together depends on the shape alone; partial sums, and the sixteen lanes of each (`lanes`),
   are added in a fixed order: the bits do not depend on the number of threads, nor on serial or parallel. Some TERMS
   numbers at a time are added one after another (`grid`): that bounds the rounding error.
6. Sums start at ``np.float64(0.0)``, so that the plain Python function computes the same.

Names, the same in every file:

- n, c, k: a sample, a channel, an element of a run; i, j: positions in flat arrays; low to high: a range of them
- state: the rows mean, m2, gamma, beta; count: values of a channel, or the sum of its weights; sizes: see `grid.Grid`
- part: sums of tiles that are not added up yet; slot: where in it those of a segment or block start
- k as an array, k3, k5: the coefficients of the affine map, one row after another; k_columns: the same by column
- w, step: weights, and their steps in samples, channels and elements; w_room: those of one piece or some rows, side by
  side; at_w: a position in it
- relu: see `forward`; word: a position in its bits; words: how many a run or row has, or by how many rows are apart
- room: where a tile writes what it needs meanwhile; number: of channels; first: the first of them

The submodules load on first use, because they import Numba.
"""

import importlib
from types import ModuleType

__all__ = ["backward", "forward", "grid", "yardsticks"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
