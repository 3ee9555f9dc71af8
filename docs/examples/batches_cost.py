"""What it costs to take moments batch by batch, and what would go between machines that have a part each.

A file of float32 images is read through a memory-map, as one array and in batches; after the first round it lies in the
system's cache. Below that: the moments of a thousand machines, made up, and added in their order.

    python docs/examples/batches_cost.py
"""

import tempfile
from pathlib import Path

import numpy as np
import report

import fastbn

SHAPE = (256, 64, 56, 56)
MACHINES = 1000


def batches(x, size):
    """Views of so many samples each."""
    return (x[n : n + size] for n in range(0, len(x), size))


def main(argv=None):
    """Measure and print."""
    options = report.parser(__doc__).parse_args(argv)
    shape, rounds = ((64, 4, 8, 8), 1) if options.quick else (SHAPE, 7)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        x = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        rng = np.random.default_rng(0)
        for n in range(0, len(x), 32):
            x[n : n + 32] = rng.standard_normal((32, *shape[1:]), dtype="float32")
        rows = []
        for size in (len(x), 64, 16, 4, 1):
            ms = 1e3 * report.seconds(lambda size=size, x=x: fastbn.moments(batches(x, size)), rounds)
            rows.append([str(size), str(len(x) // size), f"{x.nbytes / len(x) * size / 1e6:.1f}", f"{ms:.1f}",
                         f"{x.nbytes / ms / 1e6:.1f}"])  # fmt: skip
        print(f"Moments of {shape}, float32, {x.nbytes / 1e6:.0f} MB:\n")
        report.table(["samples a batch", "batches", "MB each", "ms", "GB/s"], rows, options.markdown)
    rows = []
    for channels in (64, 2048):
        m = fastbn.moments(rng.standard_normal((8, channels)))
        ms = 1e3 * report.seconds(lambda m=m: sum([m] * MACHINES), rounds)
        rows.append([str(channels), str(m.mean.nbytes + m.m2.nbytes + 8), f"{ms:.1f}"])
    print(f"\nMoments from {MACHINES} machines:\n")
    report.table(["channels", "bytes from each", "ms to add all"], rows, options.markdown)
    print(report.environment())


if __name__ == "__main__":
    main()
