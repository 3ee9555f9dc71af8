"""
Higher learning rates
=====================

Section 4.2 of the paper (Ioffe, Szegedy 2015) trains with 5 and 30 times the learning rate that the plain network bears:
batch norm keeps what enters each nonlinearity at one scale, however far a step moved the weights before it.

Here a network of two hidden layers of 100 ReLUs learns scikit-learn's digits, at ten rates, with and without batch norm,
from the same weights and on the same batches.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastbn

x, digit = load_digits(return_X_y=True)
x, x_test, digit, digit_test = train_test_split((x / 16).astype(np.float32), digit, test_size=450, random_state=0)


def accuracy(rate, batch_norm, steps=300, seed=0):
    """The share of the test images that is right after so many steps of 60 images."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((64, 100), (100, 100), (100, 10))]
    betas = [np.zeros(100, np.float32) for _ in range(2)]
    layers = [fastbn.BatchNorm(100, activation="relu") for _ in range(2)]
    for _ in range(steps):
        batch = rng.choice(len(x), 60, replace=False)
        inputs = [x[batch]]
        for w, beta, layer in zip(weights, betas, layers, strict=False):
            s = inputs[-1] @ w
            inputs.append(layer(s) if batch_norm else np.maximum(s + beta, 0))
        p = softmax(inputs[-1] @ weights[2])
        p[np.arange(60), digit[batch]] -= 1
        ds = p / 60
        for i in (2, 1, 0):
            dw = inputs[i].T @ ds
            if i:
                dy = ds @ weights[i].T
                layer = layers[i - 1]
                if batch_norm:
                    ds = layer.backward(dy)
                    layer.gamma -= rate * layer.dgamma
                    layer.beta -= rate * layer.dbeta
                else:
                    ds = dy * (inputs[i] > 0)
                    betas[i - 1] -= rate * ds.sum(axis=0)
            weights[i] -= rate * dw
    y = x_test
    for w, beta, layer in zip(weights, betas, layers, strict=False):
        y = layer.eval()(y @ w) if batch_norm else np.maximum(y @ w + beta, 0)
    return np.mean((y @ weights[2]).argmax(axis=1) == digit_test)


def softmax(scores):
    """Probabilities; of scores that are beyond all bounds, NaN."""
    with np.errstate(all="ignore"):
        e = np.exp(scores - scores.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)


# %%
# Steps that are too large send the plain network to infinity; it is right by chance then, one time in ten.

rates = 10.0 ** np.linspace(-2, 1.5, 10)
with np.errstate(all="ignore"):
    plain, normed = ([accuracy(rate, batch_norm) for rate in rates] for batch_norm in (False, True))

fig, ax = plt.subplots(figsize=(7, 4))
ax.semilogx(rates, plain, "o-", color="#D55E00", label="without batch norm")
ax.semilogx(rates, normed, "s-", color="#0072B2", label="with batch norm")
ax.set(xlabel="learning rate", ylabel="test accuracy after 300 steps", ylim=(0, 1))
ax.legend(loc="lower center")
fig.tight_layout()
