"""Every line and branch of fastbn that tests run, in two runs; fails below 100 % of the lines or 98 % of the branches.

    python tests/covered.py

The first run is plain Python (NUMBA_DISABLE_JIT=1): kernels count as any other code, and lanes check that they lie in
their arrays. The second is compiled with Numba's bounds checks in every index (NUMBA_BOUNDSCHECK=1, an empty cache); it
runs what only runs while kernels are compiled, such as the code that emits the lanes. Compiled code itself does not
count there. What runs in other processes (dask's workers, the ranks of MPI) counts in a run of its own. Tests of large
arrays or many examples are left out: they find no other lines. The extras `test`, `peers` and `interop` must be
installed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES, BRANCHES = 100, 98  # per cent

PLAIN = [
    "config",
    "dispatch",
    "errors",
    "folding",
    "grid",
    "kernels",
    "layer",
    "layout",
    "main",
    "memory",
    "messages",
    "moments",
    "out_of_core",
    "parts",
    "peers",
]
INTEROP = sorted(path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_interop_*.py"))
RUNS = [
    (
        {"NUMBA_DISABLE_JIT": "1"},
        [*PLAIN, "folders", "plain", "quota", "strangers", "tiles", "verbs"],
        "not (large or group-narrow or idle_memory or share_nothing or keeps_the_buffer or order_and_dtype or nobody"
        " or wrong_result or test_table or do_not_depend or keras)",
    ),
    ({"NUMBA_DISABLE_JIT": "1"}, ["conventions", "interop", *INTEROP], ""),
    ({"COVERAGE_RCFILE": "tests/processes.coveragerc"}, ["interop_dask", "interop_mpi"], ""),
    (
        {"NUMBA_BOUNDSCHECK": "1"},
        ["bounds", "folders", "kernels", "parts", "tiles", "verbs"],
        "bounds or folders or tiles or small and not float16 or read_only_inputs or half_is_rounded or images_to"
        " or channel_without or layer_is_the_verbs and float32 or bfloat16-relu-residual-bool-runs-fused"
        " or bfloat16-relu-residual-float-rows-fused",
    ),
    # How halves are converted depends on the processor: one without instructions for them, one without AVX-512.
    *(
        (
            {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features},
            ["halves"],
            "float16-runs-forward",
        )
        for name, features in (("generic", ""), ("haswell", "+avx,+avx2,+f16c,+fma"))
    ),
]


def main():
    with tempfile.TemporaryDirectory() as folder:
        settings = {"COVERAGE_FILE": str(Path(folder, "coverage")), "MPLBACKEND": "Agg"}

        def coverage(*arguments, **variables):
            command = [sys.executable, "-m", "coverage", *arguments]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | settings | variables)
            if done.returncode:
                sys.exit(done.returncode)

        for variables, tests, select in RUNS:
            files = [f"tests/test_{name}.py" for name in tests]
            told = " ".join(f"{name}='{value}'" for name, value in variables.items())
            print(f"{told} pytest {' '.join(files)} -k '{select}'", flush=True)
            coverage("run", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", select, **variables)
        coverage("combine", "-q")
        coverage("report")
        coverage("json", "-q", "-o", str(Path(folder, "all.json")))
        totals = json.loads(Path(folder, "all.json").read_text())["totals"]
    lines = 100 * totals["covered_lines"] / totals["num_statements"]
    branches = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"{lines:.2f} % of the lines, {branches:.2f} % of the branches; expected {LINES} and {BRANCHES}")
    sys.exit(lines < LINES or branches < BRANCHES)


if __name__ == "__main__":
    main()
