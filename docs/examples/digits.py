"""Batch norm speeds up a network: the paper's first experiment, on handwritten digits, in NumPy and fastbn.

Two networks of three hidden layers of 100 sigmoids learn the 1,797 digits that scikit-learn ships (8 x 8 pixels), from
the same weights, on the same batches of 60, at the same learning rate. One has batch norm before each sigmoid. The
program prints the test accuracy of both while they learn and draws the paper's Figure 1 to a PNG. It takes about ten
seconds, and ten more the first time, when fastbn compiles. At a higher rate (``--rate 0.5``) the plain network comes
close sooner, and still does not catch up.

Source: Ioffe, Szegedy 2015, "Batch Normalization", arXiv:1502.03167, section 4.1 and Figure 1. There it was MNIST with
60,000 images, and 50,000 steps.

    pip install -e ".[examples]"
    python docs/examples/digits.py                        # draws digits.png
    python docs/examples/digits.py figure.png --steps 3000
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits  # comes with scikit-learn

import fastbn

SIZES = (64, 100, 100, 100, 10)  # pixels, three hidden layers, digits
BATCH = 60
PERCENTILES = (15, 50, 85)
PLAIN, NORMED = "#D55E00", "#0072B2"  # a pair that colour-blind readers tell apart


def sigmoid(s):
    """1 / (1 + exp(-s)), without overflow."""
    return np.tanh(s / 2) / 2 + 0.5


class Network:
    """Linear layers with sigmoids between them, and batch norm before each sigmoid if `batch_norm` is true."""

    def __init__(self, batch_norm, rng, sizes=SIZES, dtype="float32"):
        self.batch_norm = batch_norm
        self.hidden = len(sizes) - 2
        self.weights = [rng.normal(0, 0.1, shape).astype(dtype) for shape in pairwise(sizes)]
        # beta is what is added after W @ x in both networks: the shift of batch norm takes the place of the bias.
        self.betas = [np.zeros(n, dtype) for n in sizes[1:]]
        self.gammas = [np.ones(n, dtype) for n in sizes[1:-1]]
        self.running = [(np.zeros(n, dtype), np.ones(n, dtype)) for n in sizes[1:-1]]  # mean and variance

    def infer(self, x):
        """The scores of the ten digits, with the running statistics, and the inputs of the last sigmoids."""
        for i in range(self.hidden):
            s = x @ self.weights[i]
            if self.batch_norm:
                mean, var = self.running[i]
                s = fastbn.batch_norm(s, mean, var, self.gammas[i], self.betas[i])
            else:
                s = s + self.betas[i]
            x = sigmoid(s)
        return x @ self.weights[-1] + self.betas[-1], s

    def gradients(self, x, digit):
        """The cross-entropy of one batch, and a list of (parameter, its gradient)."""
        inputs, saved = [x], []  # of each layer, for the way back
        for i in range(self.hidden):
            s = inputs[i] @ self.weights[i]
            if self.batch_norm:
                s, kept = fastbn.batch_norm_train(s, self.gammas[i], self.betas[i])
                fastbn.update_running(*self.running[i], kept.moments)
                saved.append(kept)
            else:
                s = s + self.betas[i]
            inputs.append(sigmoid(s))
        scores = inputs[-1] @ self.weights[-1] + self.betas[-1]

        scores = scores - scores.max(axis=1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        right = np.arange(len(x)), digit
        loss = -log_p[right].mean()
        ds = np.exp(log_p)
        ds[right] -= 1
        ds /= len(x)

        grads = [(self.betas[-1], ds.sum(axis=0)), (self.weights[-1], inputs[-1].T @ ds)]
        for i in reversed(range(self.hidden)):
            y = inputs[i + 1]
            ds = ds @ self.weights[i + 1].T * y * (1 - y)
            if self.batch_norm:
                ds, dgamma, dbeta = fastbn.batch_norm_backward(ds, saved[i])
                grads += [(self.gammas[i], dgamma), (self.betas[i], dbeta)]
            else:
                grads += [(self.betas[i], ds.sum(axis=0))]
            grads += [(self.weights[i], inputs[i].T @ ds)]
        return loss, grads


def load(seed):
    """Pixels from 0 to 1 and digits, to train on and (450 of them) to test on."""
    x, digit = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    return train_test_split(x, digit, test_size=450, stratify=digit, random_state=seed)


def train(steps, rate, seed):
    """Train both networks, printing; return the steps at which they were tested and, for each, what was found.

    That is, without and with batch norm: accuracy, of shape (tests,), and percentiles of the inputs of the last
    sigmoids over the test images, of shape (tests, 3, 100).
    """
    x, x_test, digit, digit_test = load(seed)
    nets = [Network(batch_norm, np.random.default_rng(seed)) for batch_norm in (False, True)]
    rng = np.random.default_rng(seed)
    tests = sorted({k * steps // 120 for k in range(121)})
    rows = {k * steps // 12 for k in range(13)}
    accuracy, spread = ([], []), ([], [])

    print(
        f"Test accuracy, {len(x):,} images to train on, {len(x_test)} to test; learning rate {rate:g}, seed {seed}.\n"
    )
    print("  step   without BN   with BN", flush=True)
    for step in range(steps + 1):
        if step in tests:
            for net, a, q in zip(nets, accuracy, spread, strict=True):
                scores, s = net.infer(x_test)
                a.append(np.mean(scores.argmax(axis=1) == digit_test))
                q.append(np.percentile(s, PERCENTILES, axis=0))
        if step in rows:
            print(f"{step:6d}   {accuracy[0][-1]:9.1%}   {accuracy[1][-1]:8.1%}", flush=True)
        batch = rng.choice(len(x), BATCH, replace=False)
        for net in nets:
            for parameter, gradient in net.gradients(x[batch], digit[batch])[1]:
                parameter -= rate * gradient
    return np.array(tests), np.array(accuracy), np.array(spread)


def typical(spread):
    """The percentiles, (tests, 3), of the sigmoid whose median input wanders further than half of the others."""
    wandered = np.ptp(spread[:, 1], axis=0)
    return spread[:, :, np.argsort(wandered)[wandered.size // 2]]


def draw(path, tests, accuracy, spread, setting):
    """Figure 1 of the paper: (a) test accuracy, (b, c) percentiles of one typical input to the last sigmoid."""
    fig = Figure(figsize=(11, 4.7), dpi=200)
    a, b, c = (fig.add_axes((left, 0.2, width, 0.61)) for left, width in ((0.045, 0.36), (0.475, 0.2), (0.71, 0.2)))
    steps, third = tests[-1], np.searchsorted(tests, tests[-1] // 3)

    labels = (0.21, PLAIN, "without"), (0.27, NORMED, "with batch norm")  # in the corner that stays free
    for curve, (height, colour, name) in zip(100 * accuracy, labels, strict=True):
        a.plot(tests, curve, color=colour, linewidth=1.8)
        a.plot(tests[third], curve[third], "o", color=colour, markersize=6, markeredgecolor="white")
        label = f"{curve[third]:.0f}% {name}"
        a.text(0.57, height, label, color=colour, weight="bold", transform=a.transAxes)
    a.text(0.57, 0.33, f"after {tests[third]:,} steps", color="0.35", transform=a.transAxes)
    a.set_ylim(0, 102)
    a.set_title("a   Test accuracy, %", loc="left")

    titles = "b   Without batch norm", "c   With batch norm"
    for ax, values, colour, title in zip((b, c), spread, (PLAIN, NORMED), titles, strict=True):
        quantiles = typical(values)
        ax.fill_between(tests, *quantiles[:, [0, 2]].T, color=colour, alpha=0.15, linewidth=0)
        ax.plot(tests, quantiles[:, [0, 2]], color=colour, linewidth=0.8)
        ax.plot(tests, quantiles[:, 1], color=colour, linewidth=1.8)
        ax.set_title(title, loc="left")
    for value, name in zip(quantiles[-1], PERCENTILES, strict=True):
        c.text(steps * 1.02, value, "median" if name == 50 else f"{name}th\npercentile", color=NORMED, va="center")
    c.sharey(b)
    b.set_ylim(*np.array((-1.08, 1.08)) * max(np.abs(ax.dataLim.intervaly).max() for ax in (b, c)))
    b.set_ylabel("input to one sigmoid of the last layer")
    c.tick_params(labelleft=False)

    for ax in (a, b, c):
        ax.set_xlim(0, steps)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.set_xlabel("training step")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    fig.text(0.045, 0.915, "The same network learns sooner with batch norm", fontsize=15, weight="bold")
    fig.text(0.045, 0.03, setting, fontsize=8.5, color="0.35", linespacing=1.4)
    fig.savefig(path)


def main(argv=None):
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path("digits.png"), help="where to draw (%(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="training steps (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of both networks (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    if not args.path.absolute().parent.is_dir():
        parser.error(f"there is no folder {args.path.parent}")

    start = time.perf_counter()
    with threadpool_limits(1, user_api="blas"):  # a second thread would slow down products as small as these
        tests, accuracy, spread = train(args.steps, args.rate, args.seed)
    setting = (
        f"scikit-learn's 8 x 8 digits, 1,347 to train on and 450 to test. Three hidden layers of 100 sigmoids, SGD, "
        f"batches of {BATCH}, learning rate {args.rate:g}, {args.steps:,} steps, seed {args.seed}.\n"
        "b, c: percentiles over the test images, for the sigmoid whose median wanders a middling distance. "
        "After Ioffe & Szegedy 2015, Figure 1."
    )
    draw(args.path, tests, accuracy, spread, setting)
    print(f"\nDrawn to {args.path} after {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
