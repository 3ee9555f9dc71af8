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
    """A parallel call after 20 ms without one, when the threads have gone to sleep.

    In units of a copy of its array while they are awake: in microseconds, and above a hot call, the same code gave
    figures a factor of two apart, as the machine's speed went up and down.
    """

    params = (((8, 64, 28, 28),),)
    param_names = ("shape",)
    unit = "copies"

    def track_call(self, shape):
        from fastbn import _measure  # private: without it this benchmark fails, not the suite

        c = forward.case("NCHW", shape, "float32")
        spare = np.zeros_like(c.x)
        copy = dict(_measure._yardsticks(*(a.reshape(-1) for a in (c.x, c.x, spare, spare))))["copy"]
        copy()
        idle, awake = [], []
        for _ in range(100):
            time.sleep(0.02)
            for times, call in ((idle, c.run), (awake, copy)):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        idle, copy = (statistics.quantiles(times, n=4)[0] for times in (idle, awake))
        return idle / copy
