"""batch_norm of images as they come, NHWC bytes, to floats in either layout."""

from functools import lru_cache

import numpy as np

import fastbn

from .common import LAYOUTS, Case, OverLayers, ready


@lru_cache(maxsize=1)
def case(layout, shape, dtype):
    """x and y have the shape of NHWC; the memory of y is in the order of `layout`."""
    n, c, *space = shape
    x = np.random.default_rng(0).integers(256, size=(n, *space, c), dtype=np.uint8)
    y = np.zeros(shape if layout == "NCHW" else x.shape, dtype)
    out = np.moveaxis(y, 1, -1) if layout == "NCHW" else y
    # As ImageNet's are: one mean and deviation per colour.
    mean, var = np.array([123.7, 116.3, 103.5]), np.array([58.4, 57.1, 57.4]) ** 2
    found = Case(None, -1, x, np.ones(c), np.zeros(c), out, mean=mean, var=var)
    return ready(found, lambda: fastbn.batch_norm(x, mean, var, axis=-1, out=out))


class Images(OverLayers):
    params = (LAYOUTS, ((32, 3, 224, 224),), ("float32", "float16"))

    def time_of_bytes(self, layout, shape, dtype):
        return case(layout, shape, dtype).run()
