"""What the measuring scripts share: their options, their tables, and the line that says what was measured on."""

import argparse
import contextlib
import datetime
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter

import fastbn
from fastbn._config import config
from fastbn._threads import threading_layer


def parser(doc):
    """An argument parser with the options that every script has; `doc` is the docstring of the script."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    p.add_argument("--quick", action="store_true", help="a few small runs: that it works, not how fast it is")
    return p


def seconds(call, rounds):
    """The best of so many calls."""
    best = float("inf")
    for _ in range(rounds):
        start = perf_counter()
        call()
        best = min(best, perf_counter() - start)
    return best


def table(head, rows, markdown):
    """Print rows of strings under a head; all but the first column belongs to the right."""
    if markdown:
        for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]:
            print(f"| {' | '.join(row)} |")
    else:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for first, *rest in [head, *rows]:
            cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
            print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    print(flush=True)


def environment(*peers):
    """CPU, threads, versions and the date, in one line; of the packages of `peers`, those that are installed."""
    c = config()
    layer = threading_layer()
    threads = f"{fastbn.get_num_threads()} threads{f', {layer}' if layer else ''}"
    versions = f"fastbn {c['fastbn']}, numba {c['numba']}, numpy {c['numpy']}"
    for peer in peers or ("torch",):
        with contextlib.suppress(PackageNotFoundError):
            versions += f", {peer} {version(peer)}"
    versions += f", python {c['python']}"
    return f"Measured on {c['cpu']}, {threads}; {versions}; {datetime.datetime.now(datetime.UTC).date()}."
