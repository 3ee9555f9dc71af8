"""What a call costs when there is next to nothing to compute: checks, layout, dispatch."""

from functools import lru_cache

import numpy as np

import fastbn

from . import backward, forward, inference
from .common import arrays, ready


@lru_cache(maxsize=1)
def layer_case(training, shape):
    c = arrays("NCHW", shape, "float32")
    bn = fastbn.BatchNorm(shape[1]).train(training)
    c.gamma, c.beta, c.mean, c.var = bn.gamma, bn.beta, bn.running_mean, bn.running_var
    c.dy = np.random.default_rng(1).standard_normal(shape, dtype="float32")

    def run():
        y = bn(c.x, out=c.out)
        return (y, bn.backward(c.dy)) if training else y

    return ready(c, run)


class Small:
    params = (((1, 64, 4, 4), (64, 100)),)
    param_names = ("shape",)
    number = 500
    repeat = (3, 30, 1.0)

    def time_batch_norm_train(self, shape):
        return forward.case("NCHW", shape, "float32").run()

    def time_batch_norm_backward(self, shape):
        return backward.case("NCHW", shape, "float32").run()

    def time_batch_norm(self, shape):
        return inference.case("NCHW", shape, "float32").run()

    def time_layer_forward_and_backward(self, shape):
        return layer_case(True, shape).run()

    def time_layer_inference(self, shape):
        return layer_case(False, shape).run()
