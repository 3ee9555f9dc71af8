"""The map of fastbn, drawn from its imports: `python docs/house.py` writes docs/house.svg.

A box is a file, with the first line of its docstring. An arrow leads into a file from those that import it, in one
colour; what is reached by way of others has no arrow of its own, so that the others can be followed.
"""

import ast
import sys
import textwrap
from html import escape
from itertools import groupby, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from modules import MODULES, RANK, graph  # the order and the reader of imports that the tests use

PICTURE = Path(__file__).with_suffix(".svg")
FOLDERS = ("interop", "kernels")
LINE, GAP, LANE, NAMES, IDEAS, LETTERS = 17, 15, 12, 138, 425, 64  # pixels; letters in a line of an idea
STYLE = """
svg { font: 12.5px system-ui, -apple-system, "Segoe UI", "Liberation Sans", Helvetica, Arial, sans-serif }
text { fill: #24292f } .file { font: 600 12.5px ui-monospace, Menlo, "Liberation Mono", Consolas, monospace }
rect { fill: #fff; stroke: #8c959f } .folder { fill: #e9eef4; stroke: none } .paper { fill: #fbfcfd; stroke: none }
.n { --c: #57606a } .a { --c: #0969da } .b { --c: #bc4c00 } .c { --c: #1a7f37 } .d { --c: #8250df } .e { --c: #cf222e }
path { fill: none; stroke: var(--c); stroke-width: 1.4 } .tip { fill: var(--c); stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } rect { fill: #1c2128; stroke: #6e7681 }
.folder { fill: #2b3440; stroke: none } .paper { fill: #14181e; stroke: none }
.n { --c: #adbac7 } .a { --c: #58a6ff } .b { --c: #f0883e } .c { --c: #56d364 } .d { --c: #bc8cff } .e { --c: #ff7b72 }
}"""


def box_of(module):
    """The modules of interop share a box, because none of them imports another."""
    return "interop" if module.startswith("interop.") and not module.startswith("interop._") else module


def arrows():
    """{box: the boxes it imports, without those that another of these leads to}."""
    needs = {}
    for module, targets in graph().items():
        needs.setdefault(box_of(module), set()).update({box_of(t) for t in targets} - {box_of(module), *FOLDERS})

    def below(box):
        return needs[box].union(*map(below, needs[box]))

    return {box: {t for t in ts if not any(t in below(other) for other in ts)} for box, ts in needs.items()}


def words(module, x, y):
    """The SVG of a file's name and of its idea, and the height of both."""
    source = ast.get_docstring(ast.parse(MODULES[module].read_text()))
    idea = source.splitlines()[0].replace("`", "")
    high = len(textwrap.wrap(idea, LETTERS))
    # Into so many lines, as equal as can be.
    cut = (textwrap.wrap(idea, letters) for letters in range(LETTERS // 2, LETTERS + 1))
    idea = next(lines for lines in cut if len(lines) == high)
    name = f"{module}/" if module in FOLDERS else MODULES[module].name
    lines = [f'<text x="{x + 10}" y="{y + 13}" class="file">{name}</text>']
    lines += [f'<text x="{x + NAMES}" y="{y + 13 + LINE * i}">{escape(line)}</text>' for i, line in enumerate(idea)]
    return lines, LINE * len(idea)


def layout(x):
    """{box: (top, bottom)}, the SVG of boxes and folders, and the height of it all."""
    modules = sorted((m for m in MODULES if m not in FOLDERS), key=lambda m: (RANK[m], m))
    place, back, front, y = {}, [], [], GAP
    for around, boxes in groupby(dict.fromkeys(map(box_of, modules)), lambda box: box.partition(".")[0]):
        top, y = y, y + 8 * (around in FOLDERS)
        if around in FOLDERS:
            lines, high = words(around, x, y)
            front, y = front + lines, y + high + 5
        for box in boxes:
            start, y = y, y + 1
            for module in (m for m in modules if box_of(m) == box):
                lines, high = words(module, x, y + 3)
                front, y = front + lines, y + 4 + high
            place[box] = start, y + 5
            back.append(f'<rect x="{x}" y="{start}" width="{NAMES + IDEAS}" height="{y + 5 - start}" rx="5"/>')
            y += 5 + GAP
        if around in FOLDERS:
            size = f'width="{NAMES + IDEAS + 16}" height="{y - GAP + 8 - top}"'
            back.insert(0, f'<rect x="{x - 8}" y="{top}" {size} rx="8" class="folder"/>')
            y += 8
    return place, back + front, y


def lanes_of(sources, place):
    """{box: how far left the line into it runs}: short lines nearest to the boxes, none over another."""
    lanes, span = {}, {b: (place[sources[b][0]][0], place[b][1]) for b in sources if sources[b]}
    for b in sorted(span, key=lambda b: span[b][1] - span[b][0]):
        taken = {lanes[o] for o in lanes if span[o][0] <= span[b][1] and span[b][0] <= span[o][1]}
        lanes[b] = min(set(range(len(place))) - taken)
    return lanes


def ports_of(top, bottom, ends):
    """Where lines meet the left side of a box."""
    return {end: round(top + (bottom - top) * i / (len(ends) + 1)) for i, end in enumerate(ends, 1)}


def picture():
    """The SVG, as text."""
    to, (place, _, _) = arrows(), layout(0)
    above = {b: a for a, b in pairwise(place) if b in to[a]}  # neighbours: a short arrow, straight down
    sources = {b: [a for a in place if b in to[a] and a != above.get(b)] for b in place}
    lanes = lanes_of(sources, place)
    x = (max(lanes.values()) + 1) * LANE + 30
    place, drawing, height = layout(x)
    ports = {}  # a line comes in above those that leave, the far ones first: so they cross least
    for box in place:
        leave = sorted((b for b in lanes if box in sources[b]), key=lambda b: -lanes[b])
        ports[box] = ports_of(*place[box], [box] * (box in lanes) + leave)
    for b in place:
        colour = "abcde"[lanes[b] % 5] if b in lanes else "n"
        for a in sources[b]:
            left, start, end = x - 18 - lanes[b] * LANE, ports[a][b], ports[b][b]
            drawing.append(f'<path class="{colour}" d="M{x} {start}H{left + 5}q-5 0 -5 5V{end - 5}q0 5 5 5H{x - 5}"/>')
        if b in lanes:
            drawing.append(f'<path class="{colour} tip" d="M{x} {ports[b][b]}l-8 -4v8z"/>')
        if b in above:
            middle, start, end = x + NAMES - 20, place[above[b]][1], place[b][0]
            drawing.append(f'<path class="{colour}" d="M{middle} {start}V{end - 5}"/>')
            drawing.append(f'<path class="{colour} tip" d="M{middle} {end}l-4 -8h8z"/>')
    width = x + NAMES + IDEAS + 18
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    paper = f'<rect width="{width}" height="{height}" rx="8" class="paper"/>'
    title = "<title>The files of fastbn, and which of them imports which</title>"
    return "\n".join([head, title, f"<style>{STYLE}\n</style>", paper, *drawing, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(PICTURE)
