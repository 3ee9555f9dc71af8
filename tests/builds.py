"""Which code a call runs: the build of its kernel, and the tiles that its array is cut into."""

import contextlib
import importlib
import importlib.util

VERBS = [importlib.import_module(f"fastbn.{name}") for name in ("functional", "moments")]


def force(patch, call):
    """Every call of a kernel becomes call(kernel, *args)."""
    for module in VERBS:
        patch.setattr(module, "run", lambda kernel, size, *args: call(kernel, *args))


def another(name, **constants):
    """A second instance of a module, with other constants; the first one stays as it is."""
    found = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, found.origin))
    module.__spec__.loader.exec_module(module)
    assert constants.keys() <= vars(module).keys()
    vars(module).update(constants)
    return module


# Tiles so small that an array of a few hundred elements has many, of every kind.
tiny = another(
    "fastbn.kernels.grid",
    RUN=6, FEW=2, FEW_RUN=3, FUSED_RUNS_BYTES=1 << 9, FUSED_ROWS_BYTES=1 << 8, FUSED_ROWS=8, AHEAD=12,
    GROUP_BYTES=1 << 8, TILE_BYTES=1 << 6, TILES=8, STRIP=4, FOLD=4,
)  # fmt: skip
LAYOUTS = {
    "real": another("fastbn._layout"),
    "tiny": another("fastbn._layout", fused_grid=tiny.fused_grid, split_grid=tiny.split_grid),
}


@contextlib.contextmanager
def built(build, threads=1, tiles="real"):
    """Every call runs this build of a kernel, over the tiles for so many threads."""
    layouts = LAYOUTS[tiles]
    before = [(module, module.run, module.layout_of) for module in VERBS]
    layouts.planned_threads = lambda size: threads
    for module in VERBS:
        module.run = lambda kernel, size, *args: getattr(kernel, build)(*args)
        module.layout_of = layouts.layout_of
    try:
        yield
    finally:
        for module, run, layout_of in before:
            module.run, module.layout_of = run, layout_of
