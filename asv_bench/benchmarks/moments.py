"""moments: the statistics alone, and their merging."""

from functools import lru_cache

import numpy as np

import fastbn

from .common import OverFew, OverLayers, arrays, ready


@lru_cache(maxsize=1)
def case(layout, shape, dtype):
    c = arrays(layout, shape, dtype)
    return ready(c, lambda: fastbn.moments(c.x, axis=c.axis))


@lru_cache(maxsize=1)
def weighted_case(layout, shape, dtype):
    """With a weight for each position."""
    c = arrays(layout, shape, dtype)
    c.where = np.random.default_rng(2).uniform(0, 2, np.take(c.x, [0], c.axis).shape).astype(dtype)
    return ready(c, lambda: fastbn.moments(c.x, axis=c.axis, where=c.where))


@lru_cache(maxsize=1)
def merge_case(channels):
    c = arrays("NCHW", (8, channels), "float64")
    a, b = fastbn.moments(c.x[:3]), fastbn.moments(c.x[3:])
    return ready(c, lambda: a + b)


@lru_cache(maxsize=1)
def batches_case(channels):
    """A hundred batches of 64 samples, each a part of x."""
    c = arrays("NCHW", (6400, channels), "float32")
    return ready(c, lambda: fastbn.moments((c.x[i : i + 64] for i in range(0, 6400, 64)), progress=False))


class OfLayers(OverLayers):
    def time_moments(self, layout, shape, dtype):
        return case(layout, shape, dtype).run()


class Weighted(OverFew):
    def time_moments(self, layout, shape, dtype):
        return weighted_case(layout, shape, dtype).run()


class Merge:
    params = ((64, 2048),)
    param_names = ("channels",)
    number = 1000
    repeat = (3, 30, 1.0)

    def time_merge(self, channels):
        return merge_case(channels).run()


class Batches:
    params = ((64, 2048),)
    param_names = ("channels",)
    number = 4
    repeat = (3, 30, 1.0)

    def time_a_hundred_batches(self, channels):
        return batches_case(channels).run()
