r"""
Train a network by hand
=======================

You will build a network that reads handwritten digits, in NumPy, with batch norm from
fastbn between its layers: forward, backward, training, saving, and the version that
you ship. On the way you see what batch norm does, check that its gradient is right,
and break it in the four ways in which it is usually broken.

You need NumPy, the chain rule and an hour; the script itself runs in seconds, the first
time in some more, because fastbn compiles. In a checkout
``pip install -e . matplotlib scikit-learn`` brings what it imports.
"""

import copy
import tempfile
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastbn

plt.rcParams.update({"font.size": 14, "figure.figsize": (6.4, 5.4)})
ORANGE, BLUE = COLORS = "#D55E00", "#0072B2"  # told apart by colour-blind eyes

# %%
# Batch norm in one call
# ----------------------
#
# Four samples of two features. The second feature is ten times the first:

a = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [6.0, 60.0]])
y, saved = fastbn.batch_norm_train(a)
print(y.round(3))

# %%
# The columns have become the same. Each had its mean subtracted and was divided by its
# standard deviation, both taken over the batch; the unit of measurement is gone. In
# NumPy:

by_hand = (a - a.mean(axis=0)) / np.sqrt(a.var(axis=0) + 1e-5)
print("largest difference", f"{abs(y - by_hand).max():.0e}")
print("mean", saved.mean, "variance", saved.var)

# %%
# The 1e-5 is ``eps``: a column that is constant has variance 0, and becomes 0 instead
# of a division by zero. A column is a *channel*: what shares one mean and one variance.
# In an array (N, D) there are D of them; in images (N, C, H, W) there are C, each
# averaged over N, H and W (:doc:`plot_images`). ``axis`` says where the channels are,
# and is 1 unless you say otherwise.
#
# A network may need another scale than 1 and another centre than 0. So two learned
# numbers for each channel follow, a factor :math:`\gamma` and a shift :math:`\beta`:
#
# .. math::
#
#    y = \gamma\,\frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \mathrm{eps}}} + \beta

y, saved = fastbn.batch_norm_train(a, gamma=[1, 2], beta=[0, 100])
print("mean", y.mean(axis=0).round(3), "std", y.std(axis=0).round(3))

# %%
# The digits
# ----------
#
# 1,797 pictures of 8 x 8 pixels come with scikit-learn. A quarter is kept for the test.

x, digit = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)  # from 0 to 1
quarter = {"test_size": 450, "stratify": digit, "random_state": 0}
x, x_test, digit, digit_test = train_test_split(x, digit, **quarter)
print("to learn", x.shape, "to test", x_test.shape)

fig, axes = plt.subplots(2, 5, figsize=(6.4, 3))
for ax, picture, label in zip(axes.flat, x, digit, strict=False):
    ax.imshow(picture.reshape(8, 8), cmap="gray_r")
    ax.set_title(label)
    ax.axis("off")
fig.tight_layout()

# %%
# The network
# -----------
#
# Two hidden layers of 100 units. Each is a matrix product, batch norm, and a ReLU; the
# last layer is a matrix product with a bias, and gives ten scores:
#
# .. math::
#
#    y_1 &= \mathrm{relu}(\mathrm{bn}_1(x\,W_1)) \\
#    y_2 &= \mathrm{relu}(\mathrm{bn}_2(y_1 W_2)) \\
#    \mathrm{scores} &= y_2 W_3 + b
#
# :class:`fastbn.BatchNorm` holds gamma and beta, keeps what the way back needs, and
# does the ReLU in the same pass over memory.


SIZES = 64, 100, 100, 10  # pixels, two layers of hidden units, digits


class Network:
    """Linear layers, and between any two of them batch norm and a ReLU."""

    def __init__(self, layer=fastbn.BatchNorm, dtype="float32"):
        rng, self.weights, self.norms = np.random.default_rng(0), [], []
        for m, n in pairwise(SIZES):
            width = (2 / m) ** 0.5  # keeps the scale from one ReLU to the next
            self.weights.append(rng.normal(0, width, (m, n)).astype(dtype))
        for n in SIZES[1:-1]:
            self.norms.append(layer(n, activation="relu", dtype=dtype))
        self.bias = np.zeros(SIZES[-1], dtype)

    def scores(self, x):
        """Ten numbers for each picture: the largest is the answer."""
        self.inputs = [x]  # of each linear layer: its gradient needs them
        for w, norm in zip(self.weights, self.norms, strict=False):
            self.inputs.append(norm(self.inputs[-1] @ w))
        return self.inputs[-1] @ self.weights[-1] + self.bias

    def gradients(self, dscores):
        """The gradient of each parameter, given that of the scores."""
        found = {"b": dscores.sum(axis=0)}
        dh = dscores
        for i in reversed(range(len(self.weights))):
            found[f"W{i + 1}"] = self.inputs[i].T @ dh
            if i:
                norm = self.norms[i - 1]
                dh = norm.backward(dh @ self.weights[i].T)
                found |= {f"gamma{i}": norm.dgamma, f"beta{i}": norm.dbeta}
        return found

    def parameters(self):
        """Every array that is learned, by its name."""
        found = {f"W{i}": w for i, w in enumerate(self.weights, 1)}
        found["b"] = self.bias
        for i, norm in enumerate(self.norms, 1):
            found |= {f"gamma{i}": norm.gamma, f"beta{i}": norm.beta}
        return {name: a for name, a in found.items() if a is not None}

    def train(self, mode=True):
        """Switch the batch norms to training, or with False to evaluation."""
        for norm in self.norms:
            norm.train(mode)
        return self

    def eval(self):
        """Switch them to evaluation."""
        return self.train(False)


net = Network()
print("scores", net.scores(x[:60]).shape)
for name, parameter in net.parameters().items():
    print(f"{name:7}{parameter.shape}")

# %%
# **Why have the hidden layers no bias?** Give one to the first, and look:

h = x[:60] @ net.weights[0]
y, saved = fastbn.batch_norm_train(h)
y_bias, _ = fastbn.batch_norm_train(h + 5)
print(f"h moves by 5, y by {abs(y_bias - y).max():.0e}")
dy = np.random.default_rng(0).normal(size=y.shape)
dh, _, _ = fastbn.batch_norm_backward(dy, saved)
total = abs(dh.sum(axis=0)).max()
print(f"dh is up to {abs(dh).max():.0f}, its sum {total:.0e}")

# %%
# Batch norm takes it away again: a bias moves the mean by as much as the values, and
# the mean is subtracted. So its gradient, which is the sum of dh over the batch, is
# zero, whatever the gradient of y is (here it is random). What is left of both is
# rounding. beta does the work of the bias.

# %%
# The loss, and the way back
# --------------------------
#
# The loss is the cross-entropy: softmax makes probabilities of the scores, and the loss
# is minus the logarithm of the one that the right digit got. Its gradient is known in
# closed form, the probabilities minus 1 at the right digit.


def cross_entropy(scores, digit):
    """The mean loss of a batch, and its gradient by the scores."""
    scores = scores - scores.max(axis=1, keepdims=True)  # exp stays in range
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    right = np.arange(len(digit)), digit
    dscores = np.exp(log_p)
    dscores[right] -= 1
    return -log_p[right].mean(), dscores / len(digit)


loss, dscores = cross_entropy(net.scores(x[:60]), digit[:60])
gradients = net.gradients(dscores)
print(f"loss {loss:.2f}; that of blind guessing is {np.log(10):.2f}")

# %%
# ``Network.gradients`` is the chain rule from the last layer to the first. Through a
# matrix product the way back is two matrix products. Through batch norm it is
# :meth:`fastbn.BatchNorm.backward`, which computes, with :math:`\hat x` for x
# normalized, g for the gradient behind the ReLU, n for the size of the batch, and sums
# over the batch,
#
# .. math::
#
#    d\beta &= \sum g \qquad d\gamma = \sum g\,\hat x \\
#    dx &= \frac{\gamma}{\sqrt{\mathrm{var} + \mathrm{eps}}}
#    \left(g - \frac{d\beta}{n} - \hat x\,\frac{d\gamma}{n}\right)
#
# The last two terms are what makes batch norm different from a factor and a shift.
# Every sample of the batch has a part in the mean and in the variance, and so in every
# y. (:doc:`/explanation/gradients` derives every term.)

# %%
# Is the gradient right?
# ----------------------
#
# Measure it. Move a parameter a little way in a random direction, there and back: the
# loss must change by the gradient along that direction. One number checks all entries
# of an array at once. It takes float64, because a difference of two losses has few
# digits left.


def check(net, x, digit, step=1e-6):
    """Compare each gradient with a difference, along a random direction."""
    rng = np.random.default_rng(2)
    gradients = net.gradients(cross_entropy(net.scores(x), digit)[1])
    print("            gradient   difference   error")
    for name, parameter in net.parameters().items():
        kept, direction = parameter.copy(), rng.normal(size=parameter.shape)
        parameter[...] = kept + step * direction
        above = cross_entropy(net.scores(x), digit)[0]
        parameter[...] = kept - step * direction
        below = cross_entropy(net.scores(x), digit)[0]
        parameter[...] = kept
        expected = (above - below) / (2 * step)
        found = (gradients[name] * direction).sum()
        error = abs(found - expected) / abs(expected)
        print(f"{name:8}{found:12.8f} {expected:12.8f}   {error:.0e}")


def network64(layer):
    """A network in float64, gamma and beta off 1 and 0, where mistakes hide."""
    net, rng = Network(layer, dtype="float64"), np.random.default_rng(1)
    for norm in net.norms:
        norm.gamma[:] = rng.uniform(0.5, 2, 100)
        norm.beta[:] = rng.normal(size=100)
    return net


some, labels = x[:60].astype(np.float64), digit[:60]
check(network64(fastbn.BatchNorm), some, labels)

# %%
# The error is relative: six digits agree, and more. But would this check notice a
# mistake? Make one. Here is a batch norm whose dx lacks its last term, the path through
# the variance:


class Forgetful(fastbn.BatchNorm):
    """A wrong backward, which takes the variance for a constant."""

    def __call__(self, h):
        """Batch norm, and what the mistake needs."""
        self.std = np.sqrt(h.var(axis=0) + self.eps)
        self.xhat = (h - h.mean(axis=0)) / self.std
        return super().__call__(h)

    def backward(self, dy):
        """The right gradient, with the last term taken out again."""
        dh = super().backward(dy)
        return dh + self.gamma / self.std * self.xhat * self.dgamma / len(dy)


check(network64(Forgetful), some, labels)

# %%
# It does, and it says where. W3, b and the second batch norm's own gamma and beta are
# right still: the gradient gets there before it passes through the mistake. Whatever it
# reaches later is wrong in its first digit.

# %%
# Training
# --------
#
# Plain gradient descent: 300 batches of 60 pictures, a learning rate of 0.5.
# ``training`` is a generator, so that one can look at the network between two steps.


def training(net, x, digit, steps=300, rate=0.5):
    """Train the network, and yield the loss of each step."""
    rng, parameters = np.random.default_rng(0), net.parameters()
    for _ in range(steps):
        batch = rng.choice(len(x), 60, replace=False)
        loss, dscores = cross_entropy(net.scores(x[batch]), digit[batch])
        gradients = net.gradients(dscores)
        for name, parameter in parameters.items():
            parameter -= rate * gradients[name]
        yield loss


def accuracy(net, x, digit):
    """The share of pictures whose highest score is that of the right digit."""
    return np.mean(net.scores(x).argmax(axis=1) == digit)


net = Network()
losses = list(training(net, x, digit))
net.eval()
print(f"loss {losses[0]:.2f} at first, {np.mean(losses[-20:]):.3f} at last")
print(f"{accuracy(net, x_test, digit_test):.1%} of the test pictures are right")

# %%
# So training works. Would it, with the wrong gradient?

wrong = Network(Forgetful)
losses = list(training(wrong, x, digit))
print(f"{accuracy(wrong.eval(), x_test, digit_test):.1%} with a term missing")

# %%
# Accuracy does not tell a right gradient from one that is wrong in its first digit;
# that is why such mistakes live long, and why the check comes first.
#
# The call of ``eval`` before the test is the next place to go wrong.

# %%
# Training mode and evaluation mode
# ---------------------------------
#
# In training, batch norm normalizes with the mean and the variance of the batch. That
# makes an answer depend on the company in which it is asked for, and one picture alone
# has no company:

net.train()
try:
    net.scores(x_test[:1])
except ValueError as error:
    print(error)

# %%
# An error is the lucky case. With two or more pictures there is none, and the answers
# are wrong. Here is the same network, on the same test pictures, told to evaluate and
# not told:


def accuracy_in_groups(net, groups):
    """Of all test pictures, which come to the network group by group."""
    right = [accuracy(net, x_test[g], digit_test[g]) * len(g) for g in groups]
    return sum(right) / len(x_test)


everyone = np.arange(450)
tens = everyone.reshape(45, 10)
alike = [np.flatnonzero(digit_test == d) for d in range(10)]
forgot = copy.deepcopy(net).train()
ways = {"all together": [everyone], "ten by ten": tens, "digit by digit": alike}
print("                evaluation  training mode")
for way, groups in ways.items():
    told = accuracy_in_groups(net.eval(), groups)
    print(f"{way:16}{told:10.1%}{accuracy_in_groups(forgot, groups):15.1%}")

for _ in range(20):
    forgot.scores(x_test[alike[1]])
late = accuracy(forgot.eval(), x_test, digit_test)
print(f"{'then, 20 x ones':16}{late:10.1%}")

# %%
# In evaluation the company does not matter. In training mode a large mixed batch hides
# the mistake, and small groups and sorted data show it: in a batch of ones, what all of
# them have in common is the mean, and is subtracted. What is left is chance.
#
# The last line is evaluation again, after 20 calls in training mode with all the ones
# of the test: the other half of the mistake. To the layers those calls were training.
# They moved the statistics that evaluation uses, and the network stays damaged.

# %%
# The running statistics
# ----------------------
#
# In evaluation the layer uses a mean and a variance of its own. Each call in training
# moves them a little towards those of its batch. Here is the first feature of the small
# array from above:

bn = fastbn.BatchNorm(2)
print("calls    mean  variance  start")
for calls in range(1, 51):
    bn(a)
    if calls in (1, 10, 50):
        mean, var = bn.running_mean[0], bn.running_var[0]
        print(f"{calls:5}{mean:8.2f}{var:10.2f}{0.9**calls:7.3f}")
print(f"batch{a[:, 0].mean():8.2f}{a[:, 0].var(ddof=1):10.2f}")

# %%
# They start from 0 and 1, and each call computes ``0.9 * old + 0.1 * new``; the last
# column is how much of the start is left. The 0.9 is ``momentum``. PyTorch gives that
# name to the weight of the *new* value, so that its 0.1 is 0.9 here; Keras and ONNX
# mean what fastbn means. (:doc:`/reference/conventions` lists many systems.) The
# running variance is divided by n - 1, because it stands for pictures that are not in
# the batch; the normalization itself divides by n.
#
# So evaluation lags behind the weights, most of all at the start:

young = Network()
print("step  evaluation  training mode")
for step, _ in enumerate(training(young, x, digit, 100), 1):
    if step in (3, 10, 30, 100):
        batch = accuracy(copy.deepcopy(young), x_test, digit_test)
        running = accuracy(young.eval(), x_test, digit_test)
        young.train()
        print(f"{step:4}{running:12.1%}{batch:15.1%}")

# %%
# A network that tests badly in its first steps may be a good one. And the lag need not
# end there. Here the pixels are around 100, not around 0, as they are when somebody
# forgets to scale the data:

bright, bright_test = x + 100, x_test + 100
late = Network()
losses = list(training(late, bright, digit))
print(f"loss {np.mean(losses[-20:]):.3f} at last")
print(f"{accuracy(late.eval(), bright_test, digit_test):.1%} in evaluation")

y = bright
for w, norm in zip(late.weights, late.norms, strict=False):
    m = fastbn.moments(y @ w)
    off = abs(norm.running_mean - m.mean) / m.std()
    print(f"running means are {np.median(off):.1f} standard deviations off")
    norm.fit_population([y @ w])
    y = norm(y @ w)
print(f"{accuracy(late, bright_test, digit_test):.1%} with exact statistics")

# %%
# The loss is as small as before, since training never looks at the running statistics:
# the network is good, and its evaluation is not. With such pixels each step of the
# first weights moves the means of its layer far, and the average over the last steps
# comes too late. (The second layer is on time: what it gets is normalized, and stands
# still.) :meth:`fastbn.BatchNorm.fit_population` sets the exact statistics of all that
# it is given, layer by layer, because each needs what the one before it hands on. (It
# takes batches: :doc:`/how-to/larger-than-memory`.)

# %%
# What batch norm does to the activations
# ---------------------------------------
#
# The first hidden layer of the trained network: for each of its 100 units the range
# from the 5th to the 95th percentile over the test pictures, and the median.

h = x_test @ net.weights[0]
bn = net.norms[0]
after = fastbn.batch_norm(h, bn.running_mean, bn.running_var, bn.gamma, bn.beta)
order = np.argsort(h.mean(axis=0))
shown = {"before batch norm": h, "after it, before the ReLU": after}
fig, axes = plt.subplots(2, 1, sharex=True, sharey=True)
for ax, title, color in zip(axes, shown, COLORS, strict=True):
    ranges = np.percentile(shown[title], (5, 50, 95), axis=0)
    low, middle, high = ranges[:, order]
    ax.vlines(np.arange(100), low, high, color=color, alpha=0.45, lw=2)
    ax.plot(middle, ".", color=color, ms=5)
    ax.axhline(0, color="black", lw=0.8)
    ax.set(title=title, ylabel="value")
    print(f"{np.sum(high < 0):2} units cut off {title}")
axes[1].set_xlabel("hidden unit, in the order of its mean before")
fig.tight_layout()

# %%
# Before, a unit sits wherever its 64 weights put it. One whose range lies below zero is
# cut off: the ReLU makes 0 of it for at least 95 % of the pictures, so that it says
# little, and its weights get little gradient. After batch norm every unit has mean beta
# and standard deviation gamma. Two numbers say where it sits, and no step of the
# weights before it can move it from there.

# %%
# The same network without it
# ---------------------------
#
# The layer is exchangeable. In its place comes what a network without batch norm has, a
# bias and the ReLU; weights, batches and learning rate stay the same.


class Bias:
    """What batch norm replaces: a bias, then the ReLU."""

    def __init__(self, n, activation, dtype):
        self.gamma, self.dgamma, self.beta = None, None, np.zeros(n, dtype)

    def __call__(self, h):
        """The forward, as of a layer of batch norm."""
        self.y = np.maximum(h + self.beta, 0)
        return self.y

    def backward(self, dy):
        """The gradient of h; sets dbeta."""
        dh = dy * (self.y > 0)
        self.dbeta = dh.sum(axis=0)
        return dh

    def train(self, mode):
        """There is one mode only: no statistics."""


# %%
# Train both, and look after each step at what enters the ReLU of the second hidden
# layer.


def into_relu(net):
    """What enters the ReLUs of the second layer, for the test pictures."""
    net = copy.deepcopy(net)  # a look moves no running statistics
    net.scores(x_test)
    h, norm = net.inputs[1] @ net.weights[1], net.norms[1]
    if norm.gamma is None:
        return h + norm.beta
    return fastbn.batch_norm_train(h, norm.gamma, norm.beta)[0]


nets = {"without batch norm": Network(Bias), "with batch norm": Network()}
drift, right = {}, {}
for name, each in nets.items():
    seen, right[name] = [], []
    for _ in training(each, x, digit):
        seen.append(np.percentile(into_relu(each), (15, 50, 85), axis=0))
        right[name].append(accuracy(each.eval(), x_test, digit_test))
        each.train()
    drift[name] = np.array(seen)  # (steps, percentiles, units)

fig, axes = plt.subplots(2, 1, sharex=True, sharey=True)
for ax, name, color in zip(axes, drift, COLORS, strict=True):
    low, middle, high = drift[name][:, :, 0].T
    ax.fill_between(np.arange(300), low, high, color=color, alpha=0.3, lw=0)
    ax.plot(middle, color=color)
    ax.axhline(0, color="black", lw=0.8)
    ax.set(title=f"into the ReLU of one unit, {name}", ylabel="value")
axes[1].set_xlabel("step of training")
fig.tight_layout()

print("a step moves the median of a unit by")
for name, values in drift.items():
    medians = values[:, 1]
    print(f"{abs(np.diff(medians, axis=0)).mean():.3f} {name}")

# %%
# The line is the median over the test pictures, the band holds 70 % of them (the paper
# draws the same in its Figure 1). Without batch norm every step of the layers below
# throws the unit about, and it must learn while its inputs change their meaning. With
# it the unit stands still. That is no discovery: mean and width are beta and gamma now,
# whatever the layers below do. What it buys is this:

fig, ax = plt.subplots(figsize=(6.4, 3.8))
print("after steps            30    300")
for name, color in zip(right, COLORS, strict=True):
    values = right[name]
    ax.plot(values, color=color, label=name)
    print(f"{name:18}{values[29]:7.1%}{values[299]:7.1%}")
ax.set(title="test accuracy", xlabel="step of training", ylim=(0, 1))
ax.legend(loc="lower right")
fig.tight_layout()

# %%
# On a task as easy as this one both arrive at the same place; with batch norm it is
# there sooner, and does not fall back on the way. (Whether the drift is the reason is
# disputed: Santurkar et al. 2018, arXiv:1805.11604, find that batch norm makes the loss
# smoother, and that this is what helps.) At higher learning rates the two part for
# good: :doc:`/generated/gallery/plot_learning_rates`.

# %%
# Save it
# -------
#
# A trained layer is gamma, beta *and* the running statistics; ``state_dict`` has them
# all.


def save(net, path):
    """All that a trained network is, in one file of NumPy's."""
    arrays = {f"W{i}": w for i, w in enumerate(net.weights, 1)}
    arrays["b"] = net.bias
    for i, norm in enumerate(net.norms, 1):
        for key, value in norm.state_dict().items():
            arrays[f"norm{i}.{key}"] = value
    np.savez(path, **arrays)


def load(path):
    """A network from that file, ready to evaluate."""
    net = Network()
    with np.load(path) as arrays:
        for i, w in enumerate(net.weights, 1):
            w[...] = arrays[f"W{i}"]
        net.bias[...] = arrays["b"]
        for i, norm in enumerate(net.norms, 1):
            keys = norm.state_dict()
            state = {key: arrays[f"norm{i}.{key}"] for key in keys}
            norm.load_state_dict(state)
    return net.eval()


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.npz"
    save(net, path)
    again = load(path)
    print(*(name for name in np.load(path).files if "norm1" in name), sep="\n")
expected = net.eval().scores(x_test)
print("the same bits:", np.array_equal(again.scores(x_test), expected))

# %%
# Save the learned parameters alone, and nothing complains:

poor = Network()
for name, parameter in poor.parameters().items():
    parameter[...] = net.parameters()[name]
print(f"{accuracy(net, x_test, digit_test):.1%} with the running statistics")
print(f"{accuracy(poor.eval(), x_test, digit_test):.1%} without")

# %%
# (:doc:`/how-to/save-and-load` has a file format that keeps eps, axis and the rest,
# too.)

# %%
# Ship it
# -------
#
# In evaluation batch norm is one factor and one shift for each unit, and they fit into
# the weights before it. What you ship is matrix products and ReLUs, and needs NumPy
# alone. (``layout="IO"`` says that the weights have their inputs first, as in ``x @
# w``.)

pairs = zip(net.weights, net.norms, strict=False)
folded = [fastbn.fold_linear(w, None, norm, layout="IO") for w, norm in pairs]


def predict(x):
    """The scores, without batch norm."""
    for w, b in folded:
        x = np.maximum(x @ w + b, 0)
    return x @ net.weights[-1] + net.bias


difference = abs(predict(x_test) - expected).max()
print(f"scores up to {abs(expected).max():.0f}, difference {difference:.0e}")
print("one picture alone:", predict(x_test[:1]).argmax(), "is", digit_test[0])

# %%
# Where to go from here
# ---------------------
#
# Change a number and run the script again: a learning rate of 2, or batches of 4, with
# batch norm and without it. Then
#
# - images, which have four axes: :doc:`plot_images`;
# - your own pipeline: :doc:`/how-to/index`;
# - why one pass of batch norm costs about a copy of the array:
#   :doc:`/explanation/performance`;
# - every name: :doc:`/reference/api`.
