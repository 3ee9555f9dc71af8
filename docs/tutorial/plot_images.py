"""
Images: NCHW and NHWC
=====================

In the :doc:`first tutorial <plot_first_network>` a sample was a row, and a channel a
column. A batch of images has four axes, and there are two orders for them. This page is
ten minutes on what a channel is there, how to say where it is, and what happens if that
is said wrong.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

import fastbn

plt.rcParams.update({"font.size": 14})

# %%
# Two photographs come with scikit-learn. Stacked they are a batch:

x = np.stack(load_sample_images().images)
print(x.shape, x.dtype)

fig, axes = plt.subplots(2, 1, figsize=(6.4, 8))
for ax, picture in zip(axes, x, strict=True):
    ax.imshow(picture)
    ax.axis("off")
fig.tight_layout()

# %%
# That is NHWC: two images (N), 427 rows (H), 640 columns (W), three channels (C). The
# channels are the last axis, and that is all that batch norm needs to know:

y, saved = fastbn.batch_norm_train(x, axis=-1)
print("mean", saved.mean.round(2))
print("std ", np.sqrt(saved.var).round(2))
print(y.shape, y.dtype)

# %%
# Red, green and blue have a mean and a variance each, over all pixels of both images:

mean, std = x.mean(axis=(0, 1, 2)), x.std(axis=(0, 1, 2))
print("difference", f"{abs((x - mean) / std - y).max():.0e}")

# %%
# The pictures are bytes; y is float32, made from them in the same pass.

# %%
# Every pixel is a sample
# -----------------------
#
# A convolution computes every pixel from the same weights, so that all pixels of a
# channel are one population. For batch norm an image is its pixels in a column:

flat, _ = fastbn.batch_norm_train(x.reshape(-1, 3))
print(flat.shape, "same:", np.allclose(flat.reshape(x.shape), y, atol=1e-6))

# %%
# So one image is enough for statistics, and forgetting ``eval`` is no error here, as it
# is with a single row. It goes unnoticed, and the image is normalized by itself:

bn = fastbn.BatchNorm(3, axis=-1)
for _ in range(100):
    bn(x)  # training: the running statistics become those of both images
before = bn(x[:1])
print("in training  ", before.mean(axis=(0, 1, 2)).round(2) + 0.0)
after = bn.eval()(x[:1])
print("in evaluation", after.mean(axis=(0, 1, 2)).round(2))

# %%
# In training mode the first photograph loses what made it brighter than the second.

# %%
# The wrong axis
# --------------
#
# What if one forgets ``axis=-1``? The default is 1, which is right for NCHW; here it is
# the rows of the image:

y_wrong, wrong = fastbn.batch_norm_train(x)
print("statistics", saved.mean.shape, "and wrong", wrong.mean.shape)


def shown(values):
    """From 0 to 1, for a picture; the outermost values are cut."""
    low, high = np.percentile(values, (1, 99))
    return np.clip((values - low) / (high - low), 0, 1)


fig, axes = plt.subplots(2, 2, figsize=(6.4, 5))
axes[0, 0].set_title("axis=-1")
axes[0, 1].set_title("axis=1")
for column, values in zip(axes.T, (y, y_wrong), strict=True):
    for ax, picture in zip(column, values, strict=True):
        ax.imshow(shown(picture))
        ax.axis("off")
fig.tight_layout()

# %%
# No error, and pictures that look almost right. But each row was normalized by itself:
# the sky is grey, and stripes run through the leaves. A function of arrays cannot know
# what an axis means. A layer knows how many channels it has, and does not let it pass:

try:
    fastbn.BatchNorm(3)(x)
except ValueError as error:
    print(error)

# %%
# NCHW, and a view that is both
# -----------------------------
#
# The other order has the channels behind the images, (N, C, H, W). PyTorch and ONNX use
# it, and it is why ``axis`` is 1 by default. Transposed, an NHWC batch has NCHW's
# shape:

nchw = x.transpose(0, 3, 1, 2)
y_nchw, _ = fastbn.batch_norm_train(nchw)
print(nchw.shape, "a copy:", not np.shares_memory(nchw, x))
print("the same bits:", np.array_equal(y_nchw.transpose(0, 2, 3, 1), y))
print("bytes from channel to channel:", nchw.strides[1], y_nchw.strides[1])

# %%
# A transpose moves nothing in memory: one channel is still next to the other, one byte
# further in x, four in y, which is float32. (Channels-last, says PyTorch.) fastbn reads
# the order from the strides, takes the loop that fits it, and returns y in the same
# order. ``axis`` says what an axis means; how it lies in memory is none of your
# concern, and no ``np.ascontiguousarray`` is needed.
#
# A file of photographs larger than memory: :doc:`/generated/gallery/plot_photographs`.
# What the two loops are: :doc:`/explanation/algorithm`.
