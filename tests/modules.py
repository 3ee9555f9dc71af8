"""The modules of fastbn: their order, and what each imports, read from the sources."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fastbn"

# From the top down: a module imports only from lines below its own, or from its own line where that is a folder.
ORDER = [
    ["__main__"],
    ["__init__"],
    ["interop"],
    ["interop._need", "interop._parts"],
    ["_plot"],
    ["_measure", "_config"],
    ["_peers"],
    ["folding"],
    ["layer"],
    ["conventions"],
    ["functional"],
    ["moments"],
    ["_progress"],
    ["_memory"],
    ["_check"],
    ["_layout"],
    ["_threads"],
    ["kernels.backward"],
    ["kernels.forward", "kernels.yardsticks"],
    ["kernels.leaves"],
    ["kernels.lanes"],
    ["kernels.halves"],
    ["kernels.llvm"],
    ["kernels.plain"],
    ["kernels.grid", "kernels"],
    ["_jit"],
]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "__init__"


MODULES = {module_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# One line for all of the folder, and one for what they share: none of them knows another.
SHARED = {name: RANK["interop._need"] for name in MODULES if name.startswith("interop._")}
RANK = {name: RANK["interop"] for name in MODULES if name.startswith("interop.")} | RANK | SHARED


def imports(source, folder=()):
    """(module of fastbn, or a foreign package) of every import that runs, lazy ones too."""
    nodes = [ast.parse(source)]
    for node in nodes:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
            for a in node.names:
                inner = ".".join(p for p in (*base, a.name) if p)
                yield "fastbn." + (inner if inner in MODULES else ".".join(p for p in base if p) or "__init__")
        elif isinstance(node, ast.Attribute):  # `kernels` loads what it is asked for
            asked = ast.unparse(node)
            yield from ["fastbn." + asked] if asked in MODULES else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            asked = ast.unparse(node.args[0]).strip("'.")
            yield from ["fastbn." + asked] if asked in MODULES else []


def graph():
    """The modules of fastbn that each of them imports."""
    found = {}
    for name, path in MODULES.items():
        inside = (t.removeprefix("fastbn.") for t in imports(path.read_text(), path.parent.relative_to(PACKAGE).parts))
        found[name] = {target for target in inside if target in MODULES} - {name}
    return found
