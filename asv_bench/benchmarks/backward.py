"""batch_norm_backward: all three gradients, or four."""

from functools import lru_cache

import numpy as np

import fastbn

from .common import OverFew, OverLayers, arrays, ready


@lru_cache(maxsize=1)
def case(layout, shape, dtype):
    c = arrays(layout, shape, dtype)
    c.dy = np.random.default_rng(1).standard_normal(c.x.shape, dtype=dtype)
    _, saved = fastbn.batch_norm_train(c.x, c.gamma, c.beta, axis=c.axis)
    return ready(c, lambda: fastbn.batch_norm_backward(c.dy, saved, out=c.out))


@lru_cache(maxsize=1)
def fused_case(layout, shape, dtype):
    c = arrays(layout, shape, dtype)
    rng = np.random.default_rng(1)
    c.dy, c.residual = (rng.standard_normal(c.x.shape, dtype=dtype) for _ in range(2))
    _, saved = fastbn.batch_norm_train(
        c.x, c.gamma, c.beta, axis=c.axis, residual=c.residual, activation="relu", out=c.out
    )
    return ready(c, lambda: fastbn.batch_norm_backward(c.dy, saved, out=c.out))


class Backward(OverLayers):
    def time_batch_norm_backward(self, layout, shape, dtype):
        return case(layout, shape, dtype).run()


class FusedBackward(OverFew):
    def time_residual_and_relu(self, layout, shape, dtype):
        return fused_case(layout, shape, dtype).run()
