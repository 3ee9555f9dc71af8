"""batch_norm_train: the training forward, plain and with its parts."""

from functools import lru_cache

import numpy as np

import fastbn

from .common import FEW, HALVES, LAYOUTS, OverFew, OverLayers, arrays, ready

MASKS = ("per sample", "per position")


@lru_cache(maxsize=1)
def case(layout, shape, dtype):
    c = arrays(layout, shape, dtype)
    return ready(c, lambda: fastbn.batch_norm_train(c.x, c.gamma, c.beta, axis=c.axis, out=c.out))


@lru_cache(maxsize=1)
def fused_case(layout, shape, dtype):
    c = arrays(layout, shape, dtype)
    c.residual = np.random.default_rng(2).standard_normal(c.x.shape, dtype=dtype)
    return ready(
        c,
        lambda: fastbn.batch_norm_train(
            c.x, c.gamma, c.beta, axis=c.axis, residual=c.residual, activation="relu", out=c.out
        ),
    )


@lru_cache(maxsize=1)
def masked_case(layout, shape, dtype, mask):
    c = arrays(layout, shape, dtype)
    n, *rest = c.x.shape
    rest[c.axis if c.axis < 0 else c.axis - 1] = 1
    shape = (n, *(rest if mask == "per position" else [1] * len(rest)))
    c.where = np.arange(np.prod(shape)).reshape(shape) % 4 != 1
    return ready(c, lambda: fastbn.batch_norm_train(c.x, c.gamma, c.beta, axis=c.axis, where=c.where, out=c.out))


class TrainForward(OverLayers):
    def time_batch_norm_train(self, layout, shape, dtype):
        return case(layout, shape, dtype).run()


class HalfForward(OverLayers):
    params = (LAYOUTS, FEW, HALVES)

    def time_batch_norm_train(self, layout, shape, dtype):
        return case(layout, shape, dtype).run()


class FusedForward(OverFew):
    def time_residual_and_relu(self, layout, shape, dtype):
        return fused_case(layout, shape, dtype).run()


class MaskedForward(OverFew):
    params = (*OverFew.params, MASKS)
    param_names = (*OverFew.param_names, "mask")

    def time_where(self, layout, shape, dtype, mask):
        return masked_case(layout, shape, dtype, mask).run()
