"""A progress bar over batches: tqdm's, where one is wanted and can be seen."""

import contextlib
import importlib
import sys
from collections.abc import Iterable
from operator import length_hint
from typing import Any


def bar(fn: str, batches: Iterable[Any], progress: bool | None) -> contextlib.AbstractContextManager[Any]:
    """A context that gives the bar, whose ``update()`` counts a batch, or None where there is to be none.

    `progress` is None for a bar where stderr is a terminal and tqdm is installed. Batches are counted by hand because
    tqdm's own iteration would keep each alive while the next is made.
    """
    if not (terminal() if progress is None else progress):
        return contextlib.nullcontext()
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm  # of a notebook, a widget
    except ModuleNotFoundError as error:
        if error.name not in ("tqdm", "tqdm.auto"):
            raise
        if progress is None:
            return contextlib.nullcontext()
        raise ImportError(f'{fn} with progress=True needs tqdm: pip install "fastbn[progress]"', name="tqdm") from error
    shown: contextlib.AbstractContextManager[Any] = tqdm(total=length_hint(batches, 0) or None, desc=fn, unit="batch")
    return shown


def terminal() -> bool:
    """Whether stderr is one; it may be None, closed, or a stand-in that does not know."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
