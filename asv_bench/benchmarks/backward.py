"""batch_norm_backward: all three gradients."""

from functools import lru_cache

import numpy as np

import fastbn

from .common import OverLayers, arrays, ready


@lru_cache(maxsize=1)
def case(layout, shape, dtype):
    c = arrays(layout, shape, dtype)
    c.dy = np.random.default_rng(1).standard_normal(c.x.shape, dtype=dtype)
    _, saved = fastbn.batch_norm_train(c.x, c.gamma, c.beta, axis=c.axis)
    return ready(c, lambda: fastbn.batch_norm_backward(c.dy, saved, out=c.out))


class Backward(OverLayers):
    def time_batch_norm_backward(self, layout, shape, dtype):
        return case(layout, shape, dtype).run()
