"""Figures that mean much the same on any machine: fastbn's time over a copy's, a triad's and PyTorch's.

They come from where those of `python -m fastbn` do. One process measures all of them; each benchmark looks one up.
"""

import fastbn

LAYERS = ((64, 56, 1), (256, 14, 1), (2048, 7, 1))
SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (32, 2048, 7, 7))
ONE_READ = ("train forward NCHW", "train forward NHWC", "inference NCHW", "inference NHWC")
TWO_READS = ("backward NCHW", "backward NHWC")
ROUNDS = 50


class _Figures:
    param_names = ("operation", "shape")

    def setup_cache(self):
        """The seconds of every call, by shape."""
        from fastbn import _measure, _peers  # private: without them these benchmarks fail, not the suite

        peers = [p for p in _peers.present(fastbn.get_num_threads()) if p.name == "PyTorch"]
        layers = _measure.measure(LAYERS, ROUNDS, peers)
        return {shape: layer.seconds for shape, layer in zip(SHAPES, layers, strict=True)}

    def setup(self, seconds, operation, shape):
        if self.yardstick(operation) not in seconds[shape]:
            raise NotImplementedError("PyTorch is not installed")

    def track_time(self, seconds, operation, shape):
        return seconds[shape][f"fastbn {operation}"] / seconds[shape][self.yardstick(operation)]


class InCopies(_Figures):
    """Of what could read one tensor and write one."""

    params = (ONE_READ, SHAPES)
    unit = "copies"

    def yardstick(self, operation):
        return "copy"


class InTriads(_Figures):
    """Of what could read two and write one."""

    params = (TWO_READS, SHAPES)
    unit = "triads"

    def yardstick(self, operation):
        return "triad"


class InPyTorch(_Figures):
    """fastbn into given arrays, PyTorch with fresh outputs; the same number of threads."""

    params = ((*ONE_READ, *TWO_READS), SHAPES)
    unit = "PyTorch's time"

    def yardstick(self, operation):
        return f"PyTorch {operation}"
