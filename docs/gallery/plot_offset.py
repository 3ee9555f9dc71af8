r"""
What an offset does to a variance
=================================

:math:`E[x^2] - E[x]^2` needs one pass over the data, and so it is what many systems compute. Its two terms are nearly
equal where the mean is large beside the standard deviation, and their difference is what rounding left.

Two photographs, as float32 numbers from 0 to 255, get an offset. Their variance does not change; what is computed does.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

import fastbn

images = np.stack(load_sample_images().images).astype(np.float64)  # (2, 427, 640, 3), NHWC
truth = images.reshape(-1, 3).var(axis=0)

# %%
# The offsets are whole numbers below :math:`2^{24}`, so that float32 holds every shifted pixel exactly.

offsets = 4.0 ** np.arange(1, 12)
errors = {"E[x²] - E[x]², float32": [], "numpy.var, float32": [], "fastbn.moments, float32": []}
for offset in offsets:
    x = (images + offset).astype(np.float32)
    rows = x.reshape(-1, 3)
    with np.errstate(all="ignore"):
        found = (rows**2).mean(axis=0) - rows.mean(axis=0) ** 2, rows.var(axis=0), fastbn.moments(x, axis=-1).var()
    for name, var in zip(errors, found, strict=True):
        errors[name].append(np.max(abs(var - truth) / truth))

# %%
# A relative error of 1 is a variance without any right digit; it may be negative then, and its root NaN.

fig, ax = plt.subplots(figsize=(7, 4))
for (name, error), style in zip(errors.items(), ("o-", "s-", "^-"), strict=True):
    ax.loglog(offsets, np.maximum(error, 1e-17), style, label=name)
ax.axhline(1, color="grey", lw=0.8, ls=":")
ax.set(xlabel="offset added to every pixel", ylabel="largest relative error of the variance")
ax.legend()
fig.tight_layout()

# %%
# What comes of it when the photographs are normalized with these variances, at the largest offset:

x = (images + offsets[-1]).astype(np.float32)
y, saved = fastbn.batch_norm_train(x, axis=-1)
print("fastbn: mean of y", y.mean(axis=(0, 1, 2), dtype=float).round(6), "variance", y.var(axis=(0, 1, 2), dtype=float))
