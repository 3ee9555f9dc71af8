"""Figures that mean much the same on any machine: fastbn's time over a copy's, a triad's and PyTorch's.

They come from where those of `python -m fastbn` do. One process measures all of them; each benchmark looks one up.
"""

import contextlib
import ctypes

import fastbn

LAYERS = ((64, 56, 1), (1024, 14, 1), (256, 14, 1), (2048, 7, 1))
SHAPES = ((32, 64, 56, 56), (32, 1024, 14, 14), (32, 256, 14, 14), (32, 2048, 7, 7))
ONE_READ = ("train forward NCHW", "train forward NHWC", "inference NCHW", "inference NHWC")
TWO_READS = ("backward NCHW", "backward NHWC")
ROUNDS = 50


def keep_freed_memory():
    """Have malloc use again what PyTorch's results were in.

    Whether they cost page faults would depend on what was freed before: its times varied up to threefold.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its most
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class _Figures:
    def setup_cache(self):
        """The seconds of every call, by shape."""
        from fastbn import _measure, _peers  # private: without them these benchmarks fail, not the suite

        keep_freed_memory()
        peers = [p for p in _peers.present(fastbn.get_num_threads()) if p.name == "PyTorch"]
        layers = _measure.measure(LAYERS, ROUNDS, peers)
        return {shape: layer.seconds for shape, layer in zip(SHAPES, layers, strict=True)}


class InCopies(_Figures):
    """Of what could read one tensor and write one."""

    params = (ONE_READ, SHAPES)
    param_names = ("operation", "shape")
    unit = "copies"

    def track_time(self, seconds, operation, shape):
        return seconds[shape][f"fastbn {operation}"] / seconds[shape]["copy"]


class InTriads(_Figures):
    """Of what could read two and write one."""

    params = (TWO_READS, SHAPES)
    param_names = ("operation", "shape")
    unit = "triads"

    def track_time(self, seconds, operation, shape):
        return seconds[shape][f"fastbn {operation}"] / seconds[shape]["triad"]


class FreshOverGiven(_Figures):
    """Without `out=` over with it: 1 as long as outputs are recycled."""

    params = ((*ONE_READ, *TWO_READS),)
    param_names = ("operation",)
    unit = "times out="

    def track_time(self, seconds, operation):
        own, given = (sum(s[f"{who} {operation}"] for s in seconds.values()) for who in ("fastbn fresh", "fastbn"))
        return own / given


class InPyTorch(_Figures):
    """fastbn into given arrays, PyTorch with fresh outputs; the same number of threads.

    Over all the shapes: where PyTorch's outputs happen to lie moves one of them by a fifth.
    """

    params = ((*ONE_READ, *TWO_READS),)
    param_names = ("operation",)
    unit = "PyTorch's time"

    def setup(self, seconds, operation):
        if any(f"PyTorch {operation}" not in s for s in seconds.values()):
            raise NotImplementedError("PyTorch is not installed")

    def track_time(self, seconds, operation):
        own, other = (sum(s[f"{who} {operation}"] for s in seconds.values()) for who in ("fastbn", "PyTorch"))
        return own / other
