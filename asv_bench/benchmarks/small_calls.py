"""What a call costs beside its arithmetic: checks, layout, dispatch; and waking up the threads."""

import statistics
import time
from functools import lru_cache

import numpy as np

import fastbn

from . import backward, forward, inference
from .common import arrays, ready


@lru_cache(maxsize=1)
def layer_case(mode, shape):
    c = arrays("NCHW", shape, "float32")
    bn = fastbn.BatchNorm(shape[1]).train(mode != "inference")
    c.gamma, c.beta, c.mean, c.var = bn.gamma, bn.beta, bn.running_mean, bn.running_var
    c.dy = np.random.default_rng(1).standard_normal(shape, dtype="float32")

    def run():
        y = bn(c.x, out=c.out)
        return (y, bn.backward(c.dy)) if mode == "forward and backward" else y

    return ready(c, run)


class Small:
    params = (((1, 64, 4, 4), (32, 128)),)
    param_names = ("shape",)
    number = 500
    repeat = (3, 30, 1.0)

    def time_batch_norm_train(self, shape):
        return forward.case("NCHW", shape, "float32").run()

    def time_batch_norm_backward(self, shape):
        return backward.case("NCHW", shape, "float32").run()

    def time_batch_norm(self, shape):
        return inference.case("NCHW", shape, "float32").run()

    def time_layer_forward(self, shape):
        return layer_case("forward", shape).run()

    def time_layer_forward_and_backward(self, shape):
        return layer_case("forward and backward", shape).run()

    def time_layer_inference(self, shape):
        return layer_case("inference", shape).run()


class AfterIdle:
    """A call that runs parallel, 20 ms after the last one: the threads have gone to sleep."""

    params = (((8, 64, 28, 28),),)
    param_names = ("shape",)
    unit = "µs"

    def track_above_a_hot_call(self, shape):
        run = forward.case("NCHW", shape, "float32").run
        idle, hot = [], []
        for _ in range(100):
            time.sleep(0.02)
            for times in (idle, hot):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        return (statistics.median(idle) - statistics.median(hot)) * 1e6
