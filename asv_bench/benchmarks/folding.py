"""fold_conv: the weights of a convolution that does the batch norm behind it, too."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import fastbn

KERNELS = ((64, 64, 3, 3), (512, 512, 3, 3))


@dataclass
class Fold:
    """One call to time, and what a test needs to check it: the weights and the scale and shift of the layer."""

    weight: np.ndarray
    bias: np.ndarray
    bn: fastbn.BatchNorm
    layout: str

    def run(self):
        return fastbn.fold_conv(self.weight, self.bias, self.bn, layout=self.layout)


@lru_cache(maxsize=1)
def case(layout, shape):
    outputs, inputs, *window = shape
    rng = np.random.default_rng(0)
    order = shape if layout == "OIHW" else (*window, inputs, outputs)
    weight, bias = rng.standard_normal(order, dtype="float32"), rng.standard_normal(outputs, dtype="float32")
    bn = fastbn.BatchNorm(outputs)
    for values in (bn.gamma, bn.beta, bn.running_mean, bn.running_var):
        values[:] = rng.uniform(0.5, 1.5, outputs)
    found = Fold(weight, bias, bn, layout)
    found.run()
    return found


class FoldConv:
    params = (("OIHW", "HWIO"), KERNELS)
    param_names = ("layout", "weight")
    number = 4
    repeat = (3, 30, 1.0)

    def time_fold_conv(self, layout, shape):
        return case(layout, shape).run()
