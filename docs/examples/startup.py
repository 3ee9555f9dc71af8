"""How long a user waits before there is a result: imports, the first call ever, and the first call of a new process.

Every figure is the median over processes of their own, which take turns, from the start of the process to the result
(or to the end of the import). *Cold* is with an empty disk cache: Numba compiles. *Warm* is the same program once more,
with the cache that the cold one has filled. Calls are on (8, 64, 28, 28) float32, large enough to run parallel; the
backward is that of a `Saved.fixed`, so that no forward is compiled for it.

It takes about a minute and a half, three quarters of it in compiling.

    python docs/examples/startup.py
    python docs/examples/startup.py --rounds 1
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import report

import fastbn

SHAPES = {"NCHW": (8, 64, 28, 28), "NHWC": (8, 28, 28, 64)}
VERBS = {
    "batch_norm_train": "fastbn.batch_norm_train(x, axis=axis)",
    "batch_norm_backward": "fastbn.batch_norm_backward(x, fastbn.Saved.fixed(x, 0, 1, axis=axis))",
    "batch_norm": "fastbn.batch_norm(x, 0, 1, axis=axis)",
}
IMPORTS = {"python, no import": "", "import numpy": "import numpy", "import fastbn": "import fastbn"}
TORCH = """
import torch
torch.nn.functional.batch_norm(torch.ones(8, 64, 28, 28), None, None, training=True)
"""
IMPORT_GOAL, COLD_GOAL, WARM_GOAL = 0.05, 3.0, 0.5  # seconds above NumPy; seconds; times PyTorch


def call(verb, layout):
    """A program that calls a verb once."""
    axis = 1 if layout == "NCHW" else -1
    return f"import numpy as np, fastbn\nx, axis = np.ones({SHAPES[layout]}, 'float32'), {axis}\n{VERBS[verb]}\n"


def seconds(program, cache):
    """From the start of a new process to the end of the program; `cache` is the folder of Numba's disk cache."""
    paths = [str(Path(fastbn.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "NUMBA_CACHE_DIR": str(cache)}
    start = time.perf_counter()  # one clock for all processes
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport time\nprint(time.perf_counter())"],
        env=env, cwd=cache, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout) - start


def cold_and_warm(verb, layout):
    """Seconds of the first call ever, and of the first call of the next process."""
    with tempfile.TemporaryDirectory() as cache:
        return seconds(call(verb, layout), cache), seconds(call(verb, layout), cache)


def measure(rounds, calls):
    """({what is imported: seconds}, {(verb, layout): (cold, warm) seconds}), medians."""
    programs = dict(IMPORTS)
    if importlib.util.find_spec("torch"):
        programs["import torch, F.batch_norm"] = TORCH
    imported, called = {what: [] for what in programs}, {key: [] for key in calls}
    with tempfile.TemporaryDirectory() as cache:
        for program in programs.values():  # unmeasured: files that are not in memory yet, .pyc files to be written
            seconds(program, cache)
        for _ in range(rounds):
            for what, program in programs.items():
                imported[what].append(seconds(program, cache))
            for key in calls:
                called[key].append(cold_and_warm(*key))
    return (
        {what: median(s) for what, s in imported.items()},
        {key: tuple(map(median, zip(*s, strict=True))) for key, s in called.items()},
    )


def main(argv=None):
    """Measure and print."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (%(default)s)")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    calls = [(verb, layout) for verb in VERBS for layout in SHAPES]
    if options.quick:
        options.rounds, calls = 1, calls[:1]
    imported, called = measure(options.rounds, calls)
    torch = imported.get("import torch, F.batch_norm")

    print("From the start of a process to the end of:\n")
    rows = [[what, f"{s:.3f}", ""] for what, s in imported.items()]
    above = imported["import fastbn"] - imported["import numpy"]
    rows.append(["import fastbn above NumPy", f"{above:.3f}", f"{IMPORT_GOAL:.3f}"])
    report.table(["", "s", "goal"], rows, options.markdown)

    print("From the start of a process to the result of its first call:\n")
    head = ["verb", "layout", "cold, s", "goal", "warm, s", "warm / PyTorch", "goal"]
    rows = []
    for (verb, layout), (cold, warm) in called.items():
        ratio = f"{warm / torch:.2f}" if torch else "not installed"
        rows.append([verb, layout, f"{cold:.2f}", f"{COLD_GOAL:.2f}", f"{warm:.2f}", ratio, f"{WARM_GOAL:.2f}"])
    report.table(head, rows, options.markdown)
    print(report.environment())


if __name__ == "__main__":
    main()
