r"""
Higher learning rates
=====================

Section 4.2 of the paper (Ioffe & Szegedy 2015, arXiv:1502.03167) raises the learning
rate of Inception 5 and 30 times; without batch norm, 5 times was too much. Section 3.3
says why that may work: batch norm does not see how large the weights before it are.

Here a network of two hidden layers of 100 ReLUs learns scikit-learn's digits for 300
steps at rates from 0.01 to 30, with and without batch norm. Then comes what section 3.3
says, in numbers; then rates up to 100,000.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits  # comes with scikit-learn

import fastbn

# %%
# The network
# -----------
#
# Plain gradient descent on batches of 60, from the same weights and on the same batches
# with and without batch norm. The two hidden layers and the rest may have rates of
# their own; that is for later.

x, digit = load_digits(return_X_y=True)
x, x_test, digit, digit_test = train_test_split(
    (x / 16).astype(np.float32), digit, test_size=450, stratify=digit, random_state=0
)


class BiasRelu:
    """What the plain network has instead: ``max(0, s + beta)``."""

    def __init__(self, channels):
        self.beta = np.zeros(channels, np.float32)

    def __call__(self, s):
        """What the next layer gets."""
        self.y = np.maximum(s + self.beta, 0)
        return self.y

    def backward(self, dy):
        """The gradient of s; that of beta is kept."""
        ds = dy * (self.y > 0)
        self.dbeta = ds.sum(axis=0)
        return ds

    def eval(self):
        """As in training."""
        return self


def train(rate, batch_norm, seed=0, other_rate=None, steps=300):
    """Test accuracy; how much longer the first weights are; how far a step turns them.

    `rate` is that of the weights of the two hidden layers; all else (gamma and beta, or
    the bias; the last weights) takes the other rate, if there is one.
    """
    other_rate = rate if other_rate is None else other_rate
    rng = np.random.default_rng(seed)
    shapes = (64, 100), (100, 100), (100, 10)
    w = [rng.normal(0, 0.1, shape).astype(np.float32) for shape in shapes]
    if batch_norm:
        layers = [fastbn.BatchNorm(100, activation="relu") for _ in range(2)]
    else:
        layers = [BiasRelu(100) for _ in range(2)]
    start = w[0].copy()
    for step in range(steps):
        batch = rng.choice(len(x), 60, replace=False)
        inputs = [x[batch]]
        for weights, layer in zip(w, layers, strict=False):
            inputs.append(layer(inputs[-1] @ weights))
        ds = softmax(inputs[2] @ w[2])
        ds[np.arange(60), digit[batch]] -= 1
        ds /= 60
        if step == steps - 1:
            before = w[0].copy()
        for i in (2, 1, 0):
            dw = inputs[i].T @ ds
            if i:
                layer = layers[i - 1]
                ds = layer.backward(ds @ w[i].T)
                layer.beta -= other_rate * layer.dbeta
                if batch_norm:
                    layer.gamma -= other_rate * layer.dgamma
            w[i] -= (rate if i < 2 else other_rate) * dw
    y = x_test
    for weights, layer in zip(w, layers, strict=False):
        y = layer.eval()(y @ weights)
    right = np.mean((y @ w[2]).argmax(axis=1) == digit_test)
    growth = np.linalg.norm(w[0]) / np.linalg.norm(start)
    return right, growth, angle(before, w[0])


def softmax(scores):
    """Probabilities; NaN of scores that have left the range of float32."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def angle(a, b):
    """Between the weights of a unit before and after, in degrees; the units' mean."""
    a, b = (v / np.linalg.norm(v, axis=0) for v in (a.astype(float), b.astype(float)))
    return np.degrees(2 * np.arcsin(np.linalg.norm(a - b, axis=0) / 2)).mean()


def sweep(rates, **options):
    """`train` without and with batch norm, (2, rates, seeds, 3), from five seeds."""
    found = np.empty((2, len(rates), 5, 3))
    with threadpool_limits(1, "blas"), np.errstate(all="ignore"):
        for bn, i, seed in np.ndindex(found.shape[:3]):
            found[bn, i, seed] = train(rates[i], bool(bn), seed, **options)
    return found


# %%
# One rate for everything
# -----------------------
#
# Five runs for each rate, from other weights and with other batches. The line is the
# middle one, the band goes from the worst to the best.

PLAIN, NORMED = "#D55E00", "#0072B2"  # told apart by color-blind readers, too


def draw(ax, rates, runs, title):
    """A line and a band, without and with batch norm, of (2, rates, seeds)."""
    styles = (PLAIN, "o-", "without batch norm"), (NORMED, "s-", "with batch norm")
    for values, (color, style, name) in zip(runs, styles, strict=True):
        low, middle, high = np.sort(values, axis=1)[:, (0, 2, 4)].T
        ax.fill_between(rates, low, high, color=color, alpha=0.2, lw=0)
        ax.plot(rates, middle, style, color=color, lw=2, ms=5, label=name)
    ax.set_xscale("log")
    ax.set_title(title, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9")


rates = 10.0 ** np.arange(-2, 2, 0.5)
runs = sweep(rates)

fig, ax = plt.subplots(figsize=(5.4, 3.4), dpi=120, layout="constrained")
draw(ax, rates, 100 * runs[..., 0], "Test accuracy after 300 steps, %")
ax.set(xlabel="learning rate", ylim=(0, 102))
ax.legend(loc="lower left", frameon=False)

print("   rate   plain      BN")
for rate, (plain, normed) in zip(rates, np.median(runs[..., 0], axis=2).T, strict=True):
    print(f"{rate:7.2f} {plain:7.1%} {normed:7.1%}")

# %%
# Batch norm widens the range at both ends. At 0.01 it has learned what the plain
# network needs several times the rate for. At 1 some of the plain runs fail, at 3 all
# of them: a step too far leaves the ReLUs at 0 for every image, and no gradient comes
# back from there. One image in ten is then right by chance.
#
# But at 10 batch norm fails, too. Why it does is the more telling half of this page.

# %%
# The scale of the weights
# ------------------------
#
# Multiply all weights before a batch norm by :math:`a`: mean and standard deviation get
# the same factor, and y stays as it is. The gradient does not:
#
# .. math:: \mathrm{BN}((aW)u) = \mathrm{BN}(Wu)
#
# .. math::
#
#    \frac{\partial\,\mathrm{BN}((aW)u)}{\partial(aW)} =
#    \frac{1}{a}\,\frac{\partial\,\mathrm{BN}(Wu)}{\partial W}
#
# With :math:`\epsilon = 0` and :math:`a` a power of two, by which a product is not
# rounded, that is true to the last bit.

rng = np.random.default_rng(0)
u, dy = x[:60].astype(float), rng.normal(size=(60, 100))
w = rng.normal(0, 0.1, (64, 100))


def normalized(a, eps):
    """y and the gradient of the weights, which are a times w."""
    y, saved = fastbn.batch_norm_train(u @ (a * w), eps=eps)
    return y, u.T @ fastbn.batch_norm_backward(dy, saved)[0]


y, dw = normalized(1, eps=0)
print("        a  y          a * dw     y's std")
for a in (2.0**-10, 1.0, 2.0**10, 2.0**20):
    y_a, dw_a = normalized(a, eps=0)
    pairs = (y_a, y), (a * dw_a, dw)
    same = ["same bits" if np.array_equal(*pair) else "differs" for pair in pairs]
    std = normalized(a, eps=1e-5)[0].std(axis=0).mean()
    print(f"{a:9.4g}  {same[0]}  {same[1]}  {std:7.4f}")

# %%
# :math:`\epsilon` alone knows how large the weights are. The last column has the
# default, 1e-5: in the first line it outweighs the variance of so small an input, and
# batch norm normalizes no more.
#
# Since y does not change along :math:`W`, the gradient of a unit's weights is at a
# right angle to them, and a step can only make them longer:
#
# .. math:: |W - \eta\,dW|^2 = |W|^2 + \eta^2 |dW|^2

cosine = (w * dw).sum(axis=0) / np.linalg.norm(w, axis=0) / np.linalg.norm(dw, axis=0)
print(f"largest cosine, of 100 units: {abs(cosine).max():.0e}")

# %%
# So a rate that is too large mends itself: one step makes the weights :math:`a` times
# longer, the next gradient is :math:`a` times smaller, and a step turns the weights by
# an angle :math:`a^2` times smaller.
#
# A rate for the weights before batch norm
# ----------------------------------------
#
# This holds for the weights that batch norm follows. It does not for gamma, beta, and
# the last layer: they are what failed at 10. Let them learn at 0.1, and raise the rate
# of the others alone.

rates = 10.0 ** np.arange(-2, 6)
runs = sweep(rates, other_rate=0.1)

size = {"figsize": (5.4, 5.8), "dpi": 120, "layout": "constrained"}
fig, axes = plt.subplot_mosaic("aa;bc", gridspec_kw={"hspace": 0.1}, **size)
draw(axes["a"], rates, 100 * runs[..., 0], "a   Test accuracy after 300 steps, %")
axes["a"].set(ylim=(0, 102))
axes["a"].legend(loc="lower left", frameon=False)
turned = np.where(runs[..., 2] > 0, runs[..., 2], np.nan)  # those of the dead do not
draw(axes["b"], rates, runs[..., 1], "b   Growth of weights")
draw(axes["c"], rates, turned, "c   Last step, degrees")
axes["b"].set(yscale="log", ylim=(0.5, 1e5))
axes["c"].set(yscale="log", ylim=(1e-3, 2))
for ax in axes.values():
    ax.set(xlabel="rate of the hidden layers", xlim=(rates[0] / 2, rates[-1] * 2))

print("   rate   plain      BN  growth  degrees")
for rate, plain, normed in zip(rates, *np.median(runs, axis=2), strict=True):
    right, growth, degrees = normed
    print(f"{rate:7g} {plain[0]:7.1%} {right:7.1%} {growth:7.0f} {degrees:8.3f}")
plt.show()

# %%
# (b) is the length of the first layer's weights at the end, over that at the start; (c)
# is the angle by which the last step turned those of a unit. In (c) the plain line ends
# where no gradient comes back.
#
# From 0.01 to 1,000 the rate hardly matters. At 100,000 the network still learns, and
# what it suffers from is the opposite of what one expects: it is too *slow*. The
# weights are 20,000 times longer than they were, and a step turns them less than at
# 0.01. For the weights before it batch norm makes a rate that is too high a low one.
#
# More on this: van Laarhoven 2017, "L2 Regularization versus Batch and Weight
# Normalization", arXiv:1706.05350; Arora, Li, Lyu 2018, "Theoretical Analysis of Auto
# Rate-Tuning by Batch Normalization", arXiv:1812.03981.
