"""How the speed of fastbn scales: with the size of the array, and with the number of threads.

growth    time per byte of x from 1 MB to 1 GB, the worst over the best of it past the caches, and the same in units of
          a copy of that size
threads   how much faster all threads are than one, from 1 MB to 100 MB; a copy shows what memory allows
outputs   what a fresh output costs beside a given one, at 25 and 100 MB, when it is dropped and when ten are kept
balance   no measurement: how evenly the tiles of ResNet-50's 53 layers fall to 1, 2, 4, 16 and 64 threads, counted in
          elements, so that what two channels share a pipeline for is not seen

It takes about a minute and 4.2 GB of memory.

    python docs/examples/scaling.py
    python docs/examples/scaling.py --only balance --markdown
"""

from collections import deque
from itertools import cycle
from time import perf_counter

import numpy as np
import report

import fastbn
from fastbn import kernels
from fastbn._layout import layout
from fastbn._measure import BATCH, RESNET50, best_of
from fastbn._threads import run
from fastbn.kernels.grid import SEGMENT

CHANNELS, SIDE = 64, 56
SAMPLE_BYTES = 4 * CHANNELS * SIDE**2
GROWTH_MB = (1, 4, 16, 64, 256, 1024)
THREADS_MB = (1, 3, 10, 30, 100)
OUTPUTS_MB = (25, 100)
KEPT = 10  # outputs that a loop may keep alive
GROWTH_GOAL = 1.3  # worst over best time per byte, from the size on where a copy's own are that close
ROUND_BYTES = 10_000_000  # smaller arrays are repeated until one timing has read this much
TOTAL_BYTES = 2_000_000_000  # larger arrays get fewer rounds

AXES = {"NCHW": 1, "NHWC": 3}
OPERATIONS = tuple((name, layout) for name in ("train forward", "backward", "inference") for layout in AXES)
BALANCE_THREADS = (1, 2, 4, 16, 64)


# ------------------------------------------------------------------------------------------------- growth and threads


def buffers(mb):
    """x, dy, y, dx: flat arrays of about this many MB, all of it touched."""
    size = samples(mb) * SAMPLE_BYTES // 4
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, dtype="float32") for _ in range(2)] + [np.ones(size, "float32") for _ in range(2)]


def samples(mb):
    """The batch size that comes next to this many MB."""
    return max(1, round(mb * 1e6 / SAMPLE_BYTES))


def calls(mb, threads, x, dy, y, dx):
    """A dict of what is timed at one size: a copy, and each operation in each layout, on this many threads."""
    n = samples(mb)
    size = n * SAMPLE_BYTES // 4
    number = max(1, ROUND_BYTES // (4 * size))
    fastbn.set_num_threads(threads)  # a `Saved` remembers how many threads its backward is cut for
    flat = [a[:size] for a in (x, dy, y, dx)]
    k = np.array([0.0, 1.0, 0.5], "float32")
    found = {"copy": lambda: run(kernels.yardsticks.copy, size, flat[0], flat[2], k)}
    gamma, beta = np.linspace(0.5, 1.5, CHANNELS, dtype="float32"), np.linspace(-1, 1, CHANNELS, dtype="float32")
    for name, axis in AXES.items():
        shape = (n, CHANNELS, SIDE, SIDE) if axis == 1 else (n, SIDE, SIDE, CHANNELS)
        found.update(_operations(name, axis, gamma, beta, *(a.reshape(shape) for a in flat)))

    def repeated(call):
        def calls():
            fastbn.set_num_threads(threads)
            for _ in range(number):
                call()

        return calls

    return {name: repeated(call) for name, call in found.items()}, number


def _operations(name, axis, gamma, beta, x, dy, y, dx):
    _, saved = fastbn.batch_norm_train(x, gamma, beta, axis=axis, out=y)
    mean, var = saved.mean, saved.var
    yield ("train forward", name), lambda: fastbn.batch_norm_train(x, gamma, beta, axis=axis, out=y)
    yield ("backward", name), lambda: fastbn.batch_norm_backward(dy, saved, out=dx)
    yield ("inference", name), lambda: fastbn.batch_norm(x, mean, var, gamma, beta, axis=axis, out=y)


def seconds(mb, counts, arrays, rounds=None):
    """{(what, threads): seconds of one call} at one size, all of them in turn."""
    rounds = rounds or int(np.clip(TOTAL_BYTES // (samples(mb) * SAMPLE_BYTES), 5, 50))
    timed = {}
    try:
        for threads in counts:
            found, number = calls(mb, threads, *arrays)
            timed.update({(what, threads): call for what, call in found.items()})
        return {key: s / number for key, s in best_of(timed, rounds).items()}
    finally:
        fastbn.set_num_threads(None)


def growth(sizes, rounds=None):
    """{MB: {what: seconds of one call}} with all threads."""
    arrays, threads = buffers(max(sizes)), fastbn.get_num_threads()
    return {mb: {what: s for (what, _), s in seconds(mb, (threads,), arrays, rounds).items()} for mb in sizes}


def print_growth(sizes, rounds, markdown):
    """Time per byte, and in units of copy."""
    found = growth(sizes, rounds)
    names = list(found[sizes[0]])
    per_kb = {mb: {what: s / (samples(mb) * SAMPLE_BYTES) * 1e12 for what, s in found[mb].items()} for mb in sizes}
    slowest = max(row["copy"] for row in per_kb.values())
    past = next(mb for mb in sizes if per_kb[mb]["copy"] * GROWTH_GOAL >= slowest)
    late = [per_kb[mb] for mb in sizes if mb >= past]
    growing = [max(row[what] for row in late) / min(row[what] for row in late) for what in names]

    print(f"Growth: ns per kB of x; (N, {CHANNELS}, {SIDE}, {SIDE}) float32, out= given.")
    print(f"From {past} MB on a copy no longer gains by a cache; there the goal for worst/best is {GROWTH_GOAL:.2f}.\n")
    rows = [[str(mb), *(f"{per_kb[mb][what]:.0f}" for what in names)] for mb in sizes]
    worst = [f"worst/best from {past} MB", *(f"{g:.2f}" for g in growing)]
    report.table(["MB", *map(_title, names)], [*rows, worst], markdown)

    print("The same in units of copy at that size:\n")
    rows = [[str(mb), *(f"{found[mb][what] / found[mb]['copy']:.2f}" for what in names[1:])] for mb in sizes]
    report.table(["MB", *map(_title, names[1:])], rows, markdown)


def print_threads(sizes, rounds, markdown):
    """The speed-up over one thread."""
    threads = fastbn.get_num_threads()
    if threads == 1:
        print("Threads: only one may be used here, so there is nothing to compare.\n")
        return
    arrays = buffers(max(sizes))
    rows = []
    for mb in sizes:
        s = seconds(mb, (1, threads), arrays, rounds)
        names = [what for what, t in s if t == 1]
        speed = [f"{2 * samples(mb) * SAMPLE_BYTES / s['copy', t] / 1e9:.1f}" for t in (1, threads)]
        rows.append([str(mb), *speed, *(f"{s[what, 1] / s[what, threads]:.2f}" for what in names)])
    print(f"Threads: {threads} over one, as a factor of speed; a copy's own factor is what memory allows.\n")
    report.table(["MB", "copy GB/s, 1", f"{threads}", *map(_title, names)], rows, markdown)


def print_outputs(sizes, rounds, markdown):
    """A loop of training forwards into fresh arrays beside one into given ones, with as many of them alive."""
    rows = []
    for mb in sizes:
        x = buffers(mb)[0].reshape(-1, CHANNELS, SIDE, SIDE)
        row = [str(mb)]
        for keep in (0, KEPT):
            given = cycle([np.ones_like(x) for _ in range(keep + 1)])
            kept = deque(maxlen=keep)

            def into_given(given=given):
                fastbn.batch_norm_train(x, out=next(given))  # noqa: B023 called in this pass of the loop

            def fresh(kept=kept):
                kept.append(fastbn.batch_norm_train(x)[0])  # noqa: B023

            # Loop after loop, not call by call: each is to find the caches as it leaves them itself.
            best = {into_given: np.inf, fresh: np.inf}
            for _ in range(rounds or 5):
                for call in best:
                    for _ in range(keep + 2):
                        call()
                    start = perf_counter()
                    for _ in range(keep + 1):
                        call()
                    best[call] = min(best[call], perf_counter() - start)
            row.append(f"{best[fresh] / best[into_given]:.2f}")
        rows.append(row)
    print(f"Outputs: train forward NCHW without out=, over with it; dropped at once, and with the last {KEPT} kept.\n")
    report.table(["MB", "dropped", f"{KEPT} kept"], rows, markdown)


def _title(what):
    return what if isinstance(what, str) else " ".join(what)


# ------------------------------------------------------------------------------------------------------------ balance


def tile_elements(grid):
    """Elements of each tile of a grid, in the order of the tiles."""
    if grid.runs:
        outer, channels, inner, group, tiles = grid.sizes
        if group:  # a tile is a few groups of channels
            parts = np.minimum(group, channels - np.arange(0, channels, group)) * outer * inner
        else:  # a tile is a few segments of runs
            lengths = np.diff(np.append(np.arange(0, inner, SEGMENT), inner))
            parts = np.tile(lengths, outer * channels)
        return np.add.reduceat(parts, np.arange(tiles) * parts.size // tiles)
    # A tile is a few strips of columns, or a block of rows of a strip. The last row may not be full: then there is one.
    total, width, _, inner, blocks, panel, panels, fused = grid.sizes
    rows = np.diff(np.arange(blocks + 1) * (total // width) // blocks)  # full ones
    columns = np.diff(np.append(np.arange(panels) * panel * inner, width))
    elements = np.outer(rows, columns).reshape(-1)
    elements[-1] += total % width
    return np.add.reduceat(elements, np.arange(fused) * panels // fused) if fused else elements


def busiest(elements, threads):
    """Elements of the thread that has most.

    Numba cuts the tiles into one contiguous chunk for each thread, as equal as can be, longer ones first.
    """
    return max(int(chunk.sum()) for chunk in np.array_split(elements, threads))


def grid_of(operation, name, channels, side, threads):
    """The grid that an operation on a layer of ResNet-50 has."""
    shape = (BATCH, channels, side, side) if name == "NCHW" else (BATCH, side, side, channels)
    strides = np.empty(shape, "V4").strides
    lay = layout(shape, strides, 4, (AXES[name],), threads)
    return {"train forward": lay.measured, "backward": lay.measured, "inference": lay.given}[operation]


def print_balance(markdown):
    """Mean over most work of a thread, and the number of tiles."""
    summary, details = [], {}
    for operation, name in OPERATIONS:
        mean, most = np.zeros((2, len(BALANCE_THREADS)))
        rows = []
        for channels, side, times in RESNET50:
            cells = []
            for i, threads in enumerate(BALANCE_THREADS):
                grid = grid_of(operation, name, channels, side, threads)
                elements = tile_elements(grid)
                share, top = elements.sum() / threads, busiest(elements, threads)
                mean[i] += times * share
                most[i] += times * top
                cells.append(f"{share / top:.2f} ({grid.tiles})")
            kind = f"{'fused' if grid.fused else 'split'} {'runs' if grid.runs else 'rows'}"
            rows.append([f"{channels} x {side}²", str(times), kind, *cells])
        summary.append([f"{operation} {name}", *(f"{b:.2f}" for b in mean / most)])
        details[operation, name] = rows
    print("Balance: mean over most work of a thread, in elements; simulated, from the tiles alone.")
    print(f"All 53 layers of ResNet-50 at batch {BATCH}, the sum of the means over the sum of the most:\n")
    counts = [f"{t} thread{'s' if t > 1 else ''}" for t in BALANCE_THREADS]
    report.table(["operation", *counts], summary, markdown)
    for what, rows in details.items():
        print(f"{_title(what)}, layer by layer, with the number of tiles in brackets:\n")
        report.table(["layer", "times", "tiles", *counts], rows, markdown)


def main(argv=None):
    """Measure or simulate, and print."""
    parser = report.parser(__doc__)
    parser.add_argument("--only", choices=("growth", "threads", "outputs", "balance"), help="one of the four")
    options = parser.parse_args(argv)
    sizes, rounds = {"growth": GROWTH_MB, "threads": THREADS_MB, "outputs": OUTPUTS_MB}, None
    if options.quick:
        sizes, rounds = {"growth": (1, 4), "threads": (1, 3), "outputs": (1, 5)}, 2
    if options.only in (None, "growth"):
        print_growth(sizes["growth"], rounds, options.markdown)
    if options.only in (None, "threads"):
        print_threads(sizes["threads"], rounds, options.markdown)
    if options.only in (None, "outputs"):
        print_outputs(sizes["outputs"], rounds, options.markdown)
    if options.only in (None, "balance"):
        print_balance(options.markdown)
    print(report.environment())


if __name__ == "__main__":
    main()
