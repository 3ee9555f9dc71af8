"""`python -m fastbn`: what this machine gets; `python -m fastbn warmup`: compile ahead."""

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from . import __version__, _measure, _peers, _plot, get_num_threads, set_num_threads, warmup
from ._config import config
from ._measure import BATCH, OPERATIONS, RESNET50, YARDSTICKS, Layer, Operation, measured, ratio, table_sum
from ._peers import Peer
from ._progress import terminal

#: Larger errors than this, in units of the largest value of the result, are a bug: four roundings of float32.
TOLERANCE = 4 * 2**-23


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if every result was right."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbn",
        description="Normalize the batch-norm layers of ResNet-50, check them and print how fast that was.",
    )
    parser.add_argument("--threads", type=int, help="use at most this many threads (default: all that may be used)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which the fastest counts (default: 7)")
    parser.add_argument("--no-peers", action="store_true", help="fastbn and the yardsticks alone")
    parser.add_argument("--no-parts", action="store_true", help="without residual, ReLU, half precision, masks, images")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw every layer against the peers: .png or .svg")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    commands = parser.add_subparsers(dest="command", metavar="command")
    ahead = commands.add_parser("warmup", help="compile every verb and fill the disk cache")
    ahead.add_argument("--dtypes", nargs="+", default=["float32"], help="default: float32")
    ahead.add_argument("--axes", nargs="+", type=int, default=[1, -1], help="channel axes, default: 1 -1")
    ahead.add_argument(
        "--parts", nargs="+", default=[], help="with these, too: activation, residual, where, residual+activation, ..."
    )
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    if options.plot and (problem := _plot.unable(options.plot)):
        parser.error(f"--plot {options.plot}: {problem}")
    start = time.perf_counter()
    try:
        if options.threads is not None:
            set_num_threads(options.threads)
        if options.command == "warmup":
            warmup(options.dtypes, options.axes, parts=options.parts, progress=terminal())
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if options.command == "warmup":
        also = f", also with {', '.join(options.parts)}" if options.parts else ""
        print(f"compiled for {', '.join(options.dtypes)}{also} in {time.perf_counter() - start:.1f} s")
        print(f"cache folder: {config()['cache folder']}")
        return 0
    peers = [] if options.no_peers else _peers.present(get_num_threads())
    layers, images = _measured_layers(options, peers)
    _print_tables(options, layers, images, peers)
    _print_legend(options, layers, peers)
    worst = np.max([e for layer in (*layers, *images) for e in layer.errors.values()])  # NaN if one is
    right = worst <= TOLERANCE
    took = time.perf_counter() - start
    print(f"results {'right' if right else 'WRONG'}: largest error {worst:.1e}; took {took:.0f} s")
    if options.plot:
        _plot.save(layers, [p.name for p in peers], options.plot)
    return 0 if right else 1


def _measured_layers(options: argparse.Namespace, peers: list[Peer]) -> tuple[list[Layer], list[Layer]]:
    """The layers of ResNet-50, and the images if there are to be any."""
    _progress("compiling (the first time on a machine takes a minute at most)")
    images = [] if options.no_parts else [_measure.measure_images(options.rounds)]
    layers: list[Layer] = []
    measuring = _measure.measure(RESNET50, options.rounds, peers, parts=not options.no_parts)
    for channels, side, _ in RESNET50:
        _progress(f"layer {len(layers) + 1} of {len(RESNET50)}: ({BATCH}, {channels}, {side}, {side})")
        layers.append(next(measuring))
    _progress("")
    return layers, images


def _print_tables(options: argparse.Namespace, layers: list[Layer], images: list[Layer], peers: list[Peer]) -> None:
    show = _markdown if options.markdown else _plain
    print(f"fastbn {__version__}: ResNet-50's 53 batch-norm layers, batch {BATCH}, float32, out= given")
    print(_environment(peers))
    print()
    show(*_rows(layers, OPERATIONS, peers, fresh=True))
    print()
    if not options.no_parts:
        print("What can be asked for besides, into given arrays:")
        print()
        show(*_rows([*layers, *images], (*_measure.PARTS, *_measure.OF_IMAGES), peers))
        print()
    print("Every operation per layer, in units of copy:")
    print()
    show(*_per_layer(layers))
    print()


def _print_legend(options: argparse.Namespace, layers: list[Layer], peers: list[Peer]) -> None:
    """What the words in the tables mean."""
    copy = table_sum(layers, "copy")
    sums = ", ".join(f"{name} {table_sum(layers, name) / copy:.2f}" for name in YARDSTICKS)
    print(f"ratio = time / limit. limit: what memory allows (in units of copy: {sums}).")
    print("fresh: the ratio without out=; outputs then lie in recycled memory that starts on a cache line.")
    print("copy: y = x*1 + 0.5, in parallel. error: of 8 channels a layer against float64, over the largest value.")
    if not options.no_parts:
        goal = f"{_measure.PAIR_GOAL:g} times PyTorch's three operations and autograd"
        print(f"pair: a forward and its backward; goal: {goal}.")
        large = f"{_measure.LARGE / 1e6:.0f} MB"
        print(f"float16, bfloat16: in layers of {large} and more in float32; error: what is above one rounding.")
        print("mask: booleans, one in four False.")
        print(f"uint8: NHWC images {_measure.IMAGES}, to float32 in the layout named; limit: a copy of as many floats.")
    if peers:
        given, fresh = (", ".join(p.name for p in peers if p.fresh == f) or "none" for f in (False, True))
        over = "its time over fastbn's with out=, the threads allowed are the same"
        print(f"times a peer: {over}; -: it has no such call.")
        print(f"Into given arrays: {given}. With fresh outputs, as their users get them: {fresh}.")


def _rows(
    layers: list[Layer], operations: Sequence[Operation], peers: list[Peer], fresh: bool = False
) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table: the operations that were measured, the peers that have any of them."""
    operations = [op for op in operations if measured(layers, op)]
    keys = {name for layer in layers for name in layer.seconds}
    peers = [p for p in peers if fresh or any(f"{p.name} {op.key}" in keys for op in operations)]
    against = [f"times {p.name}" for p in peers]
    figures = ["ms", "GB/s", "limit", "ratio", "goal", *(["fresh"] if fresh else [])]
    head = ["operation", "layout", *figures, *against, "error"]
    return head, [_row(measured(layers, op), op, peers, fresh) for op in operations]


def _row(layers: list[Layer], op: Operation, peers: list[Peer], fresh: bool) -> list[str]:
    seconds = table_sum(layers, f"fastbn {op.key}")
    moved = sum(layer.times * layer.elements * op.moved for layer in layers)
    names = [f"{p.name} {op.key}" for p in peers]
    against = [f"{table_sum(layers, n) / seconds:.1f}" if n in layers[0].seconds else "-" for n in names]
    error = np.max([layer.errors[op.key] for layer in layers])
    without_out = [f"{ratio(layers, op, 'fastbn fresh'):.2f}"] if fresh else []
    limit = " + ".join(name.removeprefix("fastbn ").removesuffix(f" {op.layout}") for name in op.limit)
    return [
        op.title, op.layout, f"{seconds * 1e3:.1f}", f"{moved / seconds / 1e9:.1f}", limit, f"{ratio(layers, op):.2f}",
        "-" if op.goal is None else f"{op.goal:.2f}", *without_out, *against, f"{error:.0e}",
    ]  # fmt: skip


def _per_layer(layers: list[Layer]) -> tuple[list[str], list[list[str]]]:
    short = {"train forward": "fwd", "backward": "bwd", "inference": "inf"}
    head = ["channels", "side", "times", "copy ms", *(f"{short[op.name]} {op.layout}" for op in OPERATIONS)]
    rows = []
    for layer in layers:
        copy = layer.seconds["copy"]
        ratios = [f"{layer.seconds[f'fastbn {op.key}'] / copy:.2f}" for op in OPERATIONS]
        rows.append([str(layer.channels), str(layer.side), str(layer.times), f"{copy * 1e3:.2f}", *ratios])
    return head, rows


def _environment(peers: list[Peer]) -> str:
    c = config()
    threads = f"{get_num_threads()} threads, {c['threading layer']}"
    versions = {"numba": c["numba"], **{p.package: version(p.package) for p in peers}, "numpy": c["numpy"]}
    listed = ", ".join(f"{name} {v}" for name, v in versions.items())
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{c['cpu']}, {threads}; {listed}, python {c['python']}; {today}"


def _plain(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for r in [head, *rows]:
        cells = (
            f"{c:<{w}}" if i < 2 and not c.isdigit() else f"{c:>{w}}"
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def _markdown(head: list[str], rows: list[list[str]]) -> None:
    for r in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(r)} |")


def _progress(message: str) -> None:
    """One line that replaces itself on a terminal; nothing where stderr is none."""
    if terminal():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
