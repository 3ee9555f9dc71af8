"""One training step of a ResNet-18 in PyTorch on the CPU, with PyTorch's batch norm and with fastbn's.

The network is that of He et al. 2015, arXiv:1512.03385, with random weights, on random images. Two copies of it take
turns, one of them converted by `fastbn.interop.torch.convert`; a step is forward, loss, backward and SGD. Printed are
the medians of each, the median of the ratio of neighbouring steps, and the share of batch norm, which is what a step
takes less when its batch norms are left out. Both must find the same losses.

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


def without_batch_norm(model):
    """The model itself, its batch norms replaced by what does nothing."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


class Trained:
    """A model and its optimizer on one batch."""

    def __init__(self, model, x, labels, lr=0.01):
        self.model, self.x, self.labels = model, x, labels
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def step(self):
        """The loss before the step, and the seconds of the step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item(), time.perf_counter() - start


def measure(batch, side, width, rounds, channels_last):
    """{which: [losses], [seconds]}, after a step that is not counted."""
    torch.manual_seed(0)
    model, x = resnet18(width), torch.randn(batch, 3, side, side)
    if channels_last:
        model, x = (a.to(memory_format=torch.channels_last) for a in (model, x))
    labels = torch.randint(CLASSES, (batch,))
    converted, bare = convert(copy.deepcopy(model)), without_batch_norm(copy.deepcopy(model))
    trained = {
        "PyTorch": Trained(model, x, labels),
        "fastbn": Trained(converted, x, labels),
        "no batch norm": Trained(bare, x, labels, lr=0.0),  # it would diverge
    }
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
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=224, help="of the images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels-last", action="store_true", help="in PyTorch's memory format of that name")
    options = parser.parse_args(argv)
    width = 64
    if options.quick:
        options.batch, options.side, options.rounds, width = 4, 32, 2, 8
    if min(options.batch, options.rounds) < 1 or options.side < 32:
        parser.error("--batch and --rounds must be at least 1, --side at least 32")
    torch.set_num_threads(fastbn.get_num_threads())
    losses, seconds = measure(options.batch, options.side, width, options.rounds, options.channels_last)

    bare = seconds["no batch norm"]
    head = ["batch norm", "step, s", "of that batch norm, s", "share", "step / PyTorch's", "batch norm / PyTorch's"]
    own = {which: median(a - b for a, b in zip(s, bare, strict=True)) for which, s in seconds.items()}
    rows = []
    for which in ("PyTorch", "fastbn"):
        whole = median(seconds[which])
        ratio = median(a / b for a, b in zip(seconds[which], seconds["PyTorch"], strict=True))
        part = own[which] / own["PyTorch"]
        rows.append(
            [which, f"{whole:.3f}", f"{own[which]:.3f}", f"{own[which] / whole:.0%}", f"{ratio:.2f}", f"{part:.2f}"]
        )
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
