r"""
Train a network by hand
=======================

Everything between an array of digits and a trained network, in NumPy: two linear layers, batch norm and a ReLU between
them, the loss, the gradients. Batch norm comes from fastbn; all else is a line or two. By the end you will have trained
it, checked its gradient against differences, and seen what batch norm does to what flows through.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import fastbn

# %%
# The data: 1,797 handwritten digits, 8 x 8 pixels. The first 1,347 are to learn from.

x, digit = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
x_test, digit_test, x, digit = x[1347:], digit[1347:], x[:1347], digit[:1347]
print(x.shape, x_test.shape)

# %%
# The network
# -----------
#
# .. math:: h = x\,W_1 \qquad y = \mathrm{relu}(\mathrm{bn}(h)) \qquad \mathrm{scores} = y\,W_2 + b
#
# The first linear layer has no bias: batch norm subtracts the mean, and would take it away again; its own shift
# :math:`\beta` is what a bias would be. The ReLU is done by the layer of batch norm, in the same pass over memory.

rng = np.random.default_rng(0)
w1 = rng.normal(0, 0.1, (64, 100)).astype(np.float32)
w2 = rng.normal(0, 0.1, (100, 10)).astype(np.float32)
b = np.zeros(10, np.float32)
bn = fastbn.BatchNorm(100, activation="relu")


def forward(x):
    """The scores of the ten digits, and what the way back needs."""
    y = bn(x @ w1)
    return y @ w2 + b, y


# %%
# The loss and its gradients
# --------------------------
#
# The cross-entropy of the right digit, and what follows from it by the chain rule, from the end to the beginning.
# :meth:`fastbn.BatchNorm.backward` takes the gradient of y and returns that of h; it also goes back through the mean and
# the variance, which depend on every sample of the batch.


def loss_of(scores, digit):
    """The mean cross-entropy, and its gradient by the scores."""
    scores = scores - scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    right = np.arange(len(digit)), digit
    ds = np.exp(log_p)
    ds[right] -= 1
    return -log_p[right].mean(dtype=float), ds / len(digit)


def gradients(x, digit):
    """The loss of a batch, and each parameter with its gradient."""
    scores, y = forward(x)
    loss, ds = loss_of(scores, digit)
    dh = bn.backward(ds @ w2.T)
    return loss, [(w1, x.T @ dh), (bn.gamma, bn.dgamma), (bn.beta, bn.dbeta), (w2, y.T @ ds), (b, ds.sum(axis=0))]


# %%
# Is that gradient right?
# -----------------------
#
# Move one parameter a little, up and down: the loss changes by the gradient times the distance. In float64 six digits
# agree; a wrong term in the backward would show at once.

w1, w2, b = (a.astype(np.float64) for a in (w1, w2, b))
bn = fastbn.BatchNorm(100, activation="relu", dtype="float64")
bn.gamma[:], bn.beta[:] = rng.uniform(0.5, 2, 100), rng.normal(size=100)
batch, labels = x[:60].astype(np.float64), digit[:60]
for name, (parameter, gradient) in zip(("W1", "gamma", "beta", "W2", "b"), gradients(batch, labels)[1], strict=True):
    at = np.unravel_index(np.argmax(abs(gradient)), gradient.shape)
    kept, step = parameter[at], 1e-5
    ends = []
    for parameter[at] in (kept + step, kept - step):
        ends.append(loss_of(forward(batch)[0], labels)[0])
    parameter[at] = kept
    print(f"{name:6} {gradient[at]: .8f} by the backward, {(ends[0] - ends[1]) / (2 * step): .8f} by differences")

# %%
# Training
# --------
#
# Plain gradient descent: batches of 60, a learning rate of 0.5. Before each test the layer is switched to evaluation,
# where it uses the running statistics that training calls have gathered; a single picture is then judged as it would be
# in any batch.

w1, w2, b = (a.astype(np.float32) for a in (w1, w2, b))
bn = fastbn.BatchNorm(100, activation="relu")
steps, losses, right = 300, [], []
for step in range(steps):
    some = rng.choice(len(x), 60, replace=False)
    loss, found = gradients(x[some], digit[some])
    for parameter, gradient in found:
        parameter -= 0.5 * gradient
    losses.append(loss)
    bn.eval()
    right.append(np.mean(forward(x_test)[0].argmax(axis=1) == digit_test))
    bn.train()
print(f"{right[-1]:.1%} of the test images are right")

fig, (a, c) = plt.subplots(1, 2, figsize=(9, 3.2))
a.plot(losses, lw=1)
a.set(xlabel="step", ylabel="loss of the batch")
c.plot(right, lw=1)
c.set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
fig.tight_layout()

# %%
# What batch norm does
# --------------------
#
# On the left what the first layer hands on, for every hidden unit its 5th to 95th percentile over the test images: means
# and widths are whatever the weights make them. On the right the same after batch norm in training, before the ReLU: each
# has mean beta and standard deviation gamma, which start from 0 and 1 and are learned.

h = x_test @ w1
normalized, _ = fastbn.batch_norm_train(h, bn.gamma, bn.beta)
order = np.argsort(h.mean(axis=0))
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
for ax, values, title in zip(axes, (h, normalized), ("before batch norm", "after it"), strict=True):
    low, middle, high = np.percentile(values, (5, 50, 95), axis=0)[:, order]
    ax.fill_between(np.arange(100), low, high, alpha=0.3)
    ax.plot(middle, lw=1)
    ax.set(title=title, xlabel="hidden unit, by its mean")
fig.tight_layout()

# %%
# Without batch norm
# ------------------
#
# In evaluation batch norm is one factor and one summand for each unit, and they fit into the weights before it. The
# network that you would ship has none:

bn.eval()
expected = forward(x_test)[0]
w, shift = fastbn.fold_linear(w1, None, bn, layout="IO")
scores = np.maximum(x_test @ w + shift, 0) @ w2 + b
print("largest difference", f"{np.max(abs(scores - expected)):.1e}", "of scores up to", f"{np.max(abs(expected)):.0f}")
