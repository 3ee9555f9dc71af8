"""What dask costs: the tasks of a graph, and its time beside that of one call on the same array in memory.

A training forward, computed to the statistics and one number of y, so that no result is gathered; each engine has two
workers of one thread, fastbn in memory two threads.

    python docs/examples/dask_cost.py
"""

import dask
import dask.array as da
import numpy as np
import report
from distributed import Client, LocalCluster, wait

import fastbn
import fastbn.interop.dask as fd

SHAPE = (128, 64, 56, 56)


def forward(shape, samples):
    """A graph: random numbers are made in the tasks, so that no array is sent."""
    x = da.random.default_rng(0).standard_normal(shape, dtype="float32", chunks=(samples, *shape[1:]))
    return x, fd.batch_norm_train(x)


def main(argv=None):
    """Measure and print."""
    options = report.parser(__doc__).parse_args(argv)
    shape, rounds = ((32, 4, 8, 8), 1) if options.quick else (SHAPE, 5)
    fastbn.set_num_threads(2)
    rows = []
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        for parts in (2, 8, 32):
            x, (y, _) = forward(shape, -(-shape[0] // parts))
            tasks = len(y.__dask_graph__()) - len(x.__dask_graph__())
            given = x.compute(scheduler="threads")
            out = np.ones_like(given)
            held, kept = da.from_array(given, chunks=x.chunks), client.persist(x)
            wait(kept)
            both = fd.batch_norm_train(held), fd.batch_norm_train(kept)
            small = [(v.map_blocks(corner, chunks=((1,) * v.numblocks[0], 1, 1, 1)), n) for v, n in both]
            calls = [
                lambda out=out, given=given: fastbn.batch_norm_train(given, out=out),
                lambda small=small: dask.compute(*small[0], scheduler="threads", num_workers=2),
                lambda small=small: client.gather(client.compute(list(small[1]))),
            ]
            ms = [f"{1e3 * report.seconds(call, rounds):.0f}" for call in calls]
            rows.append([str(parts), f"{given.nbytes / parts / 1e6:.1f}", str(tasks), *ms])
    print(f"A training forward of {shape}, float32:\n")
    head = ["chunks", "MB each", "tasks beside x's", "in memory, ms", "threads, ms", "cluster, ms"]
    report.table(head, rows, options.markdown)
    print(report.environment("dask", "distributed"))


def corner(y):
    """One number of a chunk."""
    return y[:1, :1, :1, :1]


if __name__ == "__main__":
    main()
