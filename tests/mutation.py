"""How many small faults the tests find: mutmut over the Python layer and over the kernels as plain Python.

    python tests/mutation.py [--folder FOLDER] [--only PATTERN ...] [python] [kernels] [plain]

prints the score of each module and the mutants that no test noticed; it fails below 85 % of all. Some 7,000 mutants
take hours: ``--only '*3' '*7'`` takes every fifth, by the last digit of its number. With --folder a run that was
stopped goes on where it was, and ``cd FOLDER/kernels && mutmut show NAME`` shows a mutant.

mutmut leaves decorated functions alone, which here are all kernels, all properties and all that is cached. So it works
on a copy in which ``@f`` over ``def g`` is ``g = f(g)`` below it. That is the same program, apart from one line: a
kernel's builds are its body, because a clone of the body's code would not carry the mutants along.

Not mutated, because no result depends on it: what presents and compares (`_plot`, `_peers`, `_measure`, `__main__`,
`yardsticks`); `lanes` and `_jit`, which do their work when kernels are compiled (other tests run that); the lines of a
kernel that ask for memory ahead or say something to the compiler.
"""

import argparse
import ast
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = 85  # per cent

LAYER = ["__init__", "_check", "_config", "_layout", "_memory", "_threads", "functional", "layer", "moments"]
KERNELS = ["backward", "forward", "grid", "leaves"]
# The mutated modules of each run, and what is quick of the tests that reach them.
RUNS = {
    "python": (
        [f"fastbn/{name}.py" for name in LAYER],
        ["config", "dispatch", "errors", "layer", "layout", "memory", "messages", "moments", "verbs"],
        # The last: CPython 3.11 crashes where a collection meets the context variables of mutmut's first run.
        "not (large or garbage_collection)",
    ),
    "kernels": (
        [f"fastbn/kernels/{name}.py" for name in KERNELS],
        ["grid", "tiles", "verbs", "numerics"],
        "not (test_verbs and float64 or segments or group-narrow or strips)",
    ),
    # A run of its own: the lanes are called so often that a look-up of the mutant in each would double the time.
    "plain": (["fastbn/kernels/plain.py"], ["plain"], ""),
}
# The same tests in the order of the time they take: most mutants are seen by the first.
CONFTEST = """

class Ordered:
    def __init__(self, config):
        self.wanted = {a for a in config.args if "::" in a}
        config.args = list(dict.fromkeys(a.split("::")[0] for a in config.args))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        stats = Path("mutmut-stats.json")
        took = json.loads(stats.read_text())["duration_by_test"] if stats.exists() else {}
        items[:] = [i for i in items if i.nodeid in self.wanted] if self.wanted else items
        items.sort(key=lambda i: took.get(i.nodeid, 0))


def pytest_configure(config):
    config.pluginmanager.register(Ordered(config))
"""
SPEED_ONLY = [r"^\s*prefetch\(", r"^\s*far = ", r"^\s*(compact|apart)\(\)"]


def undecorated(source):
    """The same module with every decorator applied by an assignment below its function."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            names = [ast.unparse(d) for d in node.decorator_list]
            if names in (["classmethod"], ["staticmethod"]):  # mutmut knows these
                continue
            for d in node.decorator_list:
                lines[d.lineno - 1 : d.end_lineno] = [""] * (d.end_lineno - d.lineno + 1)
            decorated = node.name
            for name in reversed(names):
                decorated = f"{name}({decorated})"
            lines[node.end_lineno - 1] += f"\n{' ' * node.col_offset}{node.name} = {decorated}"
    return "\n".join(lines) + "\n"


def prepare(folder, modules, tests, select):
    """A copy of the project that mutmut can work on. A copy that is there is brought up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "tests", folder / "tests", dirs_exist_ok=True)
    conftest = folder / "tests" / "conftest.py"
    conftest.write_text(f"import json\n{conftest.read_text()}{CONFTEST}")
    for path in sorted((ROOT / "fastbn").rglob("*.py")):
        copied = folder / path.relative_to(ROOT)
        text = path.read_text()
        if str(path.relative_to(ROOT)) in modules:
            text = undecorated(text)
        if path.name == "_jit.py":
            text += "\n\ndef _build(body, build, **flags):\n    return np.errstate(all='ignore')(body)\n"
        if not copied.exists() or copied.read_text() != text:  # mutmut goes by the time of a change
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(text)
    options = {
        "source_paths": ["fastbn"],
        "only_mutate": modules,
        "do_not_mutate_patterns": SPEED_ONLY,
        "pytest_add_cli_args_test_selection": [
            f"tests/test_{t}.py" for t in tests if (ROOT / "tests" / f"test_{t}.py").exists()
        ],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-k", select],
        "process_isolation": "forkserver",  # each mutant in a process that has called nothing yet
        "use_git_change_detection": False,
        "timeout_constant": 8.0,  # seconds for the slowest of machines: few mutants never end
        "timeout_multiplier": 4.0,
    }
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
    project = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(f"{project}\n[tool.mutmut]\n{settings}\n")


def verdicts(folder, only):
    """Module -> {mutant: exit status of its tests}."""
    found = {}
    for path in sorted((folder / "mutants").rglob("*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        codes = {n: c for n, c in codes.items() if not only or any(fnmatch.fnmatch(n, pattern) for pattern in only)}
        if codes:
            found[str(path.relative_to(folder / "mutants")).removesuffix(".py.meta")] = codes
    return found


def report(found):
    """Print the score of each module and the survivors; the share of all mutants that tests noticed, in per cent."""
    everything = {name: code for codes in found.values() for name, code in codes.items()}
    unfinished = sum(code is None for code in everything.values())
    for module, codes in [*found.items(), ("all", everything)]:
        noticed = sum(code not in (0, 33, None) for code in codes.values())
        tested = sum(code is not None for code in codes.values())
        print(f"{module:<28}{noticed:>6} of {tested:>5} noticed {100 * noticed / max(tested, 1):>6.1f} %")
    for name, code in everything.items():
        if code in (0, 33):
            print(f"{'survived' if code == 0 else 'no test'}: {name}")
    print(f"{unfinished} mutants not tested yet" if unfinished else "every mutant was tested")
    score = 100 * sum(c not in (0, 33, None) for c in everything.values()) / max(len(everything) - unfinished, 1)
    return score, unfinished


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--folder", type=Path, help="work here, and go on with what is there")
    parser.add_argument("--children", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="mutants of these names, run anew")
    parser.add_argument("--report", action="store_true", help="no run, only what FOLDER has found so far")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fastbn-mutation-"))
    found = {}
    for name in options.runs or RUNS:
        if not options.report:
            prepare(folder / name, *RUNS[name])
            variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            variables |= {"NUMBA_DISABLE_JIT": "1", "PYTHONHASHSEED": "0"}
            command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(options.children), *options.only]
            done = subprocess.run(command, cwd=folder / name, env=variables, stdout=sys.stderr)
            if done.returncode:
                sys.exit(f"mutmut ended with {done.returncode} in {folder / name}")
        found |= verdicts(folder / name, options.only)
    score, unfinished = report(found)
    if unfinished or score < LEAST:
        sys.exit(f"{score:.1f} %, expected {LEAST} % of all; {unfinished} not tested")


if __name__ == "__main__":
    main()
