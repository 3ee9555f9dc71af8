"""Figures that mean much the same on any machine: fastbn's time over a copy's, a triad's, PyTorch's and its own.

They come from where those of `python -m fastbn` do. One process measures all of them; each benchmark looks one up.
"""

import contextlib
import ctypes

import fastbn

LAYERS = ((64, 56, 1), (1024, 14, 1), (256, 14, 1), (2048, 7, 1))
SHAPES = ((32, 64, 56, 56), (32, 1024, 14, 14), (32, 256, 14, 14), (32, 2048, 7, 7))
ONE_READ = ("train forward NCHW", "train forward NHWC", "inference NCHW", "inference NHWC")
TWO_READS = ("backward NCHW", "backward NHWC")
PAIRS = ("pair, residual, ReLU NCHW", "pair, residual, ReLU NHWC")
PARTS = (
    "train forward, residual, ReLU NCHW", "train forward, residual, ReLU NHWC", "backward, residual, ReLU NCHW",
    "backward, residual, ReLU NHWC", *PAIRS, "train forward, float16 NCHW", "train forward, bfloat16 NCHW",
    "train forward, mask per sample NCHW", "train forward, mask per sample NHWC",
    "train forward, mask per position NCHW", "train forward, mask per position NHWC",
)  # fmt: skip
IMAGES = ("inference, uint8 NCHW", "inference, uint8 NHWC")
ROUNDS = 50
PART_ROUNDS = 10  # they are many, and summed over the shapes


def keep_freed_memory():
    """Have malloc use again what PyTorch's results were in.

    Whether they cost page faults would depend on what was freed before: its times varied up to threefold.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its most
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def seconds_by_shape(rounds, parts):
    """The seconds of every call, by shape."""
    from fastbn import _measure, _peers  # private: without them these benchmarks fail, not the suite

    keep_freed_memory()
    peers = [p for p in _peers.present(fastbn.get_num_threads()) if p.name == "PyTorch"]
    layers = _measure.measure(LAYERS, rounds, peers, parts=parts)
    return {shape: layer.seconds for shape, layer in zip(SHAPES, layers, strict=True)}


class _Figures:
    def setup_cache(self):
        return seconds_by_shape(ROUNDS, parts=False)


class _PartFigures:
    def setup_cache(self):
        return seconds_by_shape(PART_ROUNDS, parts=True)


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


class PairInPyTorch(_PartFigures, InPyTorch):
    """A forward with residual and ReLU and its backward, over PyTorch's three operations and autograd."""

    params = (PAIRS,)


class PartsInTheirUnits(_PartFigures):
    """Of what memory allows; half precision of float32's time, masks of the time without.

    Over the shapes that are measured: half precision is where the arrays are large.
    """

    params = (PARTS,)
    param_names = ("operation",)
    unit = "units"

    def setup(self, seconds, operation):
        if not any(f"fastbn {operation}" in s for s in seconds.values()):
            raise NotImplementedError("ml_dtypes is not installed")

    def track_time(self, seconds, operation):
        from fastbn import _measure

        (op,) = (op for op in _measure.PARTS if op.key == operation)
        having = [s for s in seconds.values() if f"fastbn {operation}" in s]
        return sum(s[f"fastbn {operation}"] for s in having) / sum(s[name] for s in having for name in op.limit)


class ImagesInCopies:
    """Of the floats that the images become."""

    params = (IMAGES,)
    param_names = ("operation",)
    unit = "copies"

    def setup_cache(self):
        """The seconds of every call."""
        from fastbn import _measure

        return _measure.measure_images(ROUNDS).seconds

    def track_time(self, seconds, operation):
        return seconds[f"fastbn {operation}"] / seconds["copy"]
