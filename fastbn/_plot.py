"""The picture of `python -m fastbn --plot`: every layer, fastbn beside its peers, in units of a copy."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ._measure import OPERATIONS, PARTS, Layer, Operation, measured

# Okabe and Ito's colours, which the colour-blind can tell apart; markers tell them apart without any colour.
STYLES = {
    "fastbn": ("#D55E00", "o"),
    "NumPy": ("#999999", "v"),
    "PyTorch": ("#0072B2", "s"),
    "oneDNN": ("#56B4E9", "D"),
    "ONNX Runtime": ("#CC79A7", "P"),
    "JAX": ("#009E73", "^"),
}


def unable(path: Path) -> str | None:
    """Why no plot can be saved there; asked before anything is measured."""
    if path.suffix not in (".png", ".svg"):
        return "expected a file name that ends in .png or .svg"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if find_spec("matplotlib") is None:
        return 'needs matplotlib: pip install "fastbn[bench]"'
    return None


def save(layers: list[Layer], peers: list[str], path: Path) -> None:
    """Small multiples: a panel for each operation and layout, a place on its axis for each layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    # Of the parts the pair alone: it is what a peer can do, too.
    operations = [*OPERATIONS, *(op for op in PARTS if op.name == "pair" and measured(layers, op))]
    titles = list(dict.fromkeys(op.title for op in operations))
    figure = Figure(figsize=(3 * len(titles), 5.6), layout="constrained")
    panels = figure.subplots(2, len(titles), sharex=True, sharey=True)
    for op in operations:
        row, column = int(op.layout == "NHWC"), titles.index(op.title)
        axes = panels[row, column]
        _panel(axes, layers, op, ["fastbn", *peers])
        axes.set_title(f"{op.title}, {op.layout}", fontsize=10)
    corner = panels[0, 0]
    corner.set_yscale("log")
    low, high = corner.get_ylim()
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    corner.yaxis.set_major_locator(FixedLocator(ticks))
    corner.yaxis.set_minor_locator(NullLocator())
    corner.yaxis.set_major_formatter("{x:g}")
    corner.set_xticks(range(len(layers)), [f"{x.channels}·{x.side}²" for x in layers])
    for axes in panels.flat:
        axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    figure.supylabel("time, in copies of the layer's tensor", fontsize=10)
    figure.supxlabel("layer: channels · side²", fontsize=10)
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    names = [name for name in ("limit", "fastbn", *peers) if name in lines]
    figure.legend([lines[n] for n in names], names, loc="outside upper center", ncols=7, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, layers: list[Layer], op: Operation, names: list[str]) -> None:
    places = range(len(layers))

    def copies(*calls: str) -> list[float]:
        return [sum(x.seconds[c] for c in calls) / x.seconds["copy"] for x in layers]

    axes.plot(places, copies(*op.limit), color="black", linestyle="--", linewidth=1.2, label="limit")
    for name in reversed(names):  # fastbn on top
        if f"{name} {op.key}" in layers[0].seconds:
            colour, marker = STYLES[name]
            width = 2 if name == "fastbn" else 1
            axes.plot(
                places,
                copies(f"{name} {op.key}"),
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=width,
                label=name,
            )
    axes.grid(axis="y", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
