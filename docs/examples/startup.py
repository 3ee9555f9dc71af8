"""How long a user waits before there is a result: imports, the first call ever, and the first call of a new process.

Every figure is the median over processes of their own, which take turns, from the start of the process to the result
(or to the end of the import). *Cold* is with an empty disk cache: Numba compiles. *Warm* is the same program again,
with the cache that the cold one has filled. Calls are on (8, 64, 28, 28) float32, large enough to run parallel; the
backward is that of a `Saved.fixed`, so that no forward is compiled for it.

It takes about a minute; compiling is most of it, and is done once unless told otherwise.

    python docs/examples/startup.py
    python docs/examples/startup.py --cold-rounds 3
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


def measure(rounds, cold_rounds, calls):
    """Median seconds: {what is imported: s}, {(verb, layout): cold s}, {(verb, layout): warm s}."""
    imports = dict(IMPORTS)
    if importlib.util.find_spec("torch"):
        imports["import torch, F.batch_norm"] = TORCH
    imported, cold, warm = {what: [] for what in imports}, {key: [] for key in calls}, {key: [] for key in calls}
    with tempfile.TemporaryDirectory() as folder:
        for program in imports.values():  # unmeasured: files that are not in memory yet, .pyc files to be written
            seconds(program, folder)
        caches = {}
        for _ in range(cold_rounds):
            for key in calls:
                caches[key] = tempfile.mkdtemp(dir=folder)
                cold[key].append(seconds(call(*key), caches[key]))
        for _ in range(rounds):
            for what, program in imports.items():
                imported[what].append(seconds(program, folder))
            for key in calls:
                warm[key].append(seconds(call(*key), caches[key]))
    return [{key: median(s) for key, s in found.items()} for found in (imported, cold, warm)]


def main(argv=None):
    """Measure and print."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind (%(default)s)")
    parser.add_argument("--cold-rounds", type=int, default=1, help="of those that compile (%(default)s)")
    options = parser.parse_args(argv)
    if min(options.rounds, options.cold_rounds) < 1:
        parser.error("--rounds and --cold-rounds must be at least 1")
    calls = [(verb, layout) for verb in VERBS for layout in SHAPES]
    if options.quick:
        options.rounds, calls = 1, calls[:1]
    imported, cold, warm = measure(options.rounds, options.cold_rounds, calls)
    torch = imported.get("import torch, F.batch_norm")

    print(f"From the start of a process to the end of (median of {options.rounds}):\n")
    rows = [[what, f"{s:.3f}", ""] for what, s in imported.items()]
    above = imported["import fastbn"] - imported["import numpy"]
    rows.append(["import fastbn above NumPy", f"{above:.3f}", f"{IMPORT_GOAL:.3f}"])
    report.table(["", "s", "goal"], rows, options.markdown)

    print(f"To the result of the first call, cold (median of {options.cold_rounds}) and warm ({options.rounds}):\n")
    head = ["verb", "layout", "cold, s", "goal", "warm, s", "warm / PyTorch", "goal"]
    rows = []
    for verb, layout in calls:
        c, w = cold[verb, layout], warm[verb, layout]
        ratio = f"{w / torch:.2f}" if torch else "not installed"
        rows.append([verb, layout, f"{c:.2f}", f"{COLD_GOAL:.2f}", f"{w:.2f}", ratio, f"{WARM_GOAL:.2f}"])
    report.table(head, rows, options.markdown)
    print(report.environment())


if __name__ == "__main__":
    main()
