"""What synchronizing costs: messages and bytes of a training step over MPI, and their time beside that of computing.

messages  counted: what one layer's forward and backward send, and what a rank receives
time      measured, for two layers of ResNet-50 with 16 samples a rank: fastbn by itself, fastbn.interop.mpi, and the
          messages alone; the threads of the machine are divided among the ranks
model     calculated, for all 53 layers on 1,000 ranks, from the assumptions that it prints; only the merging of a
          thousand parts, which needs no network, is measured

    mpiexec -n 2 python -m mpi4py docs/examples/mpi_cost.py
"""

import math
from functools import partial
from time import perf_counter

import numpy as np
import report
from mpi4py import MPI

import fastbn
import fastbn.interop.mpi
from fastbn._measure import RESNET50
from fastbn.interop._parts import PART, merged

WORLD = MPI.COMM_WORLD
LAYERS = ((64, 56), (2048, 7))
SAMPLES = 16
RANKS = 1000
LATENCY, BANDWIDTH = 2e-6, 10e9  # seconds a hop, bytes a second: a fast cluster network


class Counting(MPI.Intracomm):
    """A communicator that notes the bytes of each message."""

    def __init__(self, comm):
        super().__init__()
        self.sent = []

    def Allgather(self, send, recv):
        """As that of mpi4py."""
        self.sent.append(send[0].nbytes)
        super().Allgather(send, recv)


def slowest(call, rounds):
    """Seconds of a call on the slowest rank, which all begin at once: the best of so many rounds."""
    best = math.inf
    for _ in range(rounds):
        WORLD.Barrier()
        start = perf_counter()
        call()
        best = min(best, WORLD.allreduce(perf_counter() - start, MPI.MAX))
    return best


def sent(channels):
    """The bytes of each message of a forward and a backward."""
    counting = Counting(WORLD)
    layer = fastbn.interop.mpi.BatchNorm(channels, comm=counting)
    y = layer(np.ones((2, channels), "float32"))
    forward, counting.sent = counting.sent, []
    layer.backward(y)
    return forward, counting.sent


def gather(nbytes):
    """A call that only sends such a message."""
    own, all_ = np.zeros(nbytes // 8), np.empty((WORLD.size, nbytes // 8))
    return lambda: WORLD.Allgather([own, MPI.DOUBLE], [all_, MPI.DOUBLE])


def print_messages(layers, markdown):
    """Counted, not timed."""
    rows = []
    for c, side in layers:
        for what, nbytes in zip(("forward", "backward"), sent(c), strict=True):
            kb = sum(nbytes) / 1e3
            rows.append([f"{c} x {side}², {what}", str(len(nbytes)), f"{kb:.1f}", f"{kb * (WORLD.size - 1):.1f}"])
    if WORLD.rank == 0:
        print(f"Messages of one layer, on {WORLD.size} ranks:\n")
        report.table(["layer", "messages", "kB sent", "kB received"], rows, markdown)


def print_times(layers, samples, rounds, markdown):
    """Of one layer: by itself, synchronized, and the messages alone."""
    rows = []
    rng = np.random.default_rng(WORLD.rank)
    for c, side in layers:
        x, dy = (rng.standard_normal((samples, c, side, side), dtype="float32") for _ in range(2))
        y, dx = np.ones_like(x), np.ones_like(x)
        alone, together = fastbn.BatchNorm(c), fastbn.interop.mpi.BatchNorm(c)
        for what, nbytes in zip(("forward", "backward"), sent(c), strict=True):
            calls = [
                partial(b, x, out=y) if what == "forward" else partial(b.backward, dy, out=dx)
                for b in (alone, together)
            ]
            if what == "backward":
                alone(x, out=y), together(x, out=y)
            ms = [1e3 * slowest(call, rounds) for call in (*calls, gather(sum(nbytes)))]
            cells = [f"{ms[0]:.2f}", f"{ms[1]:.2f}", f"{ms[1] / ms[0]:.2f}", f"{ms[2]:.3f}"]
            rows.append([f"{c} x {side}², {what}", *cells])
    if WORLD.rank == 0:
        print(f"Time of one layer, {samples} samples a rank, float32, NCHW, out= given, on {WORLD.size} ranks:\n")
        report.table(["layer", "alone, ms", "synchronized, ms", "ratio", "message alone, ms"], rows, markdown)


def transfer(nbytes, ranks):
    """Seconds of a gathering to all in the model: hops, and what arrives from all others."""
    return LATENCY * math.ceil(math.log2(ranks)) + (ranks - 1) * nbytes / BANDWIDTH


def model(ranks, layers=RESNET50):
    """(forward, backward) of all layers: (bytes received, seconds of the network)."""
    found = []
    for width, more in ((3, 2), (2, 1)):
        nbytes = [(8 * (width * c + more), times) for c, _, times in layers]
        received = sum(times * (ranks - 1) * n for n, times in nbytes)
        found.append((received, sum(times * transfer(n, ranks) for n, times in nbytes)))
    return found


def merging(ranks, layers=RESNET50):
    """Measured: seconds of merging the statistics of so many ranks, for all layers."""
    total = 0.0
    for c in {c for c, _, _ in layers}:
        parts = np.zeros((ranks, c), PART)
        parts["count"], parts["m2"] = 2.0, 1.0
        seconds = []
        for _ in range(3):
            start = perf_counter()
            merged(parts)
            seconds.append(perf_counter() - start)
        total += min(seconds) * sum(times for d, _, times in layers if d == c)
    return total


def print_model(ranks, markdown):
    """The calculation."""
    rows = []
    for (received, seconds), what, merge in zip(
        model(ranks), ("forward", "backward"), (merging(ranks), None), strict=True
    ):
        rest = "-" if merge is None else f"{1e3 * merge:.0f}"
        rows.append([what, str(sum(t for _, _, t in RESNET50)), f"{received / 1e6:.0f}", f"{1e3 * seconds:.1f}", rest])
    hops = math.ceil(math.log2(ranks))
    print(
        f"Model, not measured: all layers of ResNet-50 on {ranks} ranks. A message takes {LATENCY * 1e6:g} µs x log2 "
        f"of the ranks ({hops})\nplus what arrives over {BANDWIDTH / 1e9:g} GB/s. Measured is the merging:\n"
    )
    report.table(["pass", "messages", "MB received", "network, ms", "merging, ms"], rows, markdown)


def main(argv=None):
    """Measure, calculate and print; rank 0 prints."""
    options = report.parser(__doc__).parse_args(argv)
    fastbn.set_num_threads(max(1, fastbn.get_num_threads() // WORLD.size))
    layers, samples, rounds = (((8, 4),), 2, 2) if options.quick else (LAYERS, SAMPLES, 30)
    print_messages(layers, options.markdown)
    print_times(layers, samples, rounds, options.markdown)
    if WORLD.rank == 0:
        print_model(20 if options.quick else RANKS, options.markdown)
        print(f"{WORLD.size} ranks. {report.environment('mpi4py', 'mpich')}", flush=True)


if __name__ == "__main__":
    main()
