"""One training step of a ResNet-18 in PyTorch on the CPU, with PyTorch's batch norm and with fastbn's.

The network is that of He et al. 2015, arXiv:1512.03385, with random weights, on random images. Two copies of it take
turns, one of them converted by `fastbn.interop.torch.convert`; a step is forward, loss, backward and SGD. Printed are
medians: of the step, of the time within its batch norms (by hooks on the modules and on their nodes in the graph), and
of the ratios of neighbouring steps, with the least and the largest. Both must find the same losses.

    python docs/examples/torch_resnet18.py
    OMP_WAIT_POLICY=passive python docs/examples/torch_resnet18.py --batch 16 --channels-last

PyTorch's OpenMP threads spin for a while after each of its operations, and hold the processors that fastbn's threads
want; OMP_WAIT_POLICY=passive has them sleep.
"""

import copy
import os
import sys
import time
from statistics import median

import report
import torch
from torch import nn
from torch.nn import functional as F

import fastbn
from fastbn.interop.torch import convert

CLASSES = 1000


class Block(nn.Module):
    """Two convolutions and what goes around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        """A tensor of the outputs."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.around(x), inplace=True)


def resnet18(width=64):
    """The network; 20 of its modules are batch norms."""
    blocks, inputs = [], width
    for stage in range(4):
        for stride in (2 if stage else 1, 1):
            blocks.append(Block(inputs, width << stage, stride))
            inputs = width << stage
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES),
    )  # fmt: skip


class Trained:
    """A model and its optimizer on one batch, with a watch on its batch norms: the seconds in them, there and back."""

    def __init__(self, model, x, labels):
        self.model, self.x, self.labels = model, x, labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.forward = self.backward = self.since = 0.0
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self._begin)
                module.register_forward_hook(self._forward_done)

    def step(self):
        """The loss before the step, and the seconds of the step, in batch norm's forward and in its backward."""
        self.forward = self.backward = 0.0
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item(), (time.perf_counter() - start, self.forward, self.backward)

    def _begin(self, *_):
        self.since = time.perf_counter()

    def _forward_done(self, module, given, y):
        self.forward += time.perf_counter() - self.since
        y.grad_fn.register_prehook(self._begin)
        y.grad_fn.register_hook(self._backward_done)

    def _backward_done(self, *_):
        self.backward += time.perf_counter() - self.since


def measure(batch, side, width, rounds, channels_last):
    """{which: [losses]}, {which: [(seconds of a step, of the forward of its batch norms, of their backward)]}.

    The seconds are without those of a first step.
    """
    torch.manual_seed(0)
    model, x = resnet18(width), torch.randn(batch, 3, side, side)
    if channels_last:
        model, x = (a.to(memory_format=torch.channels_last) for a in (model, x))
    labels = torch.randint(CLASSES, (batch,))
    converted = convert(copy.deepcopy(model))
    trained = {"PyTorch": Trained(model, x, labels), "fastbn": Trained(converted, x, labels)}
    losses, seconds = {which: [] for which in trained}, {which: [] for which in trained}
    for i in range(rounds + 1):
        for which, t in trained.items():
            loss, s = t.step()
            losses[which].append(loss)
            if i:
                seconds[which].append(s)
    return losses, seconds


def differences(losses):
    """How far apart the two are, of the loss, at each step."""
    pairs = zip(losses["PyTorch"], losses["fastbn"], strict=True)
    return [abs(a - b) / abs(a) for a, b in pairs]


def main(argv=None):
    """Measure and print."""
    parser = report.parser(__doc__)
    parser.add_argument("--batch", type=int, default=32, help="images a step (%(default)s)")
    parser.add_argument("--side", type=int, default=224, help="of the images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that are measured (%(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="in PyTorch's memory format of that name")
    options = parser.parse_args(argv)
    width = 64
    if options.quick:
        options.batch, options.side, options.rounds, width = 4, 32, 2, 8
    if min(options.batch, options.rounds) < 1 or options.side < 32:
        parser.error("--batch and --rounds must be at least 1, --side at least 32")
    torch.set_num_threads(fastbn.get_num_threads())
    losses, seconds = measure(options.batch, options.side, width, options.rounds, options.channels_last)

    head = ["batch norm", "step, s", "its forward, ms", "its backward, ms", "share", "its time / PyTorch's"]
    head += ["step / PyTorch's", "from", "to"]
    rows = []
    for which, found in seconds.items():
        whole, forward, backward = (median(s) for s in zip(*found, strict=True))
        pairs = list(zip(found, seconds["PyTorch"], strict=True))
        steps = [own[0] / other[0] for own, other in pairs]
        parts = [(own[1] + own[2]) / (other[1] + other[2]) for own, other in pairs]
        row = [which, f"{whole:.3f}", f"{forward * 1e3:.1f}", f"{backward * 1e3:.1f}"]
        row += [f"{median((f + b) / s for s, f, b in found):.0%}", f"{median(parts):.2f}"]
        rows.append([*row, *(f"{r:.2f}" for r in (median(steps), min(steps), max(steps)))])
    shape = f"{options.batch} x 3 x {options.side} x {options.side}"
    order = "channels_last" if options.channels_last else "contiguous"
    wait = os.environ.get("OMP_WAIT_POLICY", "not set")
    print(f"A training step of ResNet-18, {shape} float32, {order} (median of {options.rounds}; ", end="")
    print(f"OMP_WAIT_POLICY {wait}):\n")
    report.table(head, rows, options.markdown)
    apart = differences(losses)
    print(f"Losses differ by {apart[0]:.0e} of themselves at the first step, {max(apart):.0e} at most.")
    print(report.environment("torch"))
    if not apart[0] < 1e-4:  # later ones drift: each step begins from the roundings of the one before
        sys.exit("the losses do not agree")


if __name__ == "__main__":
    main()
