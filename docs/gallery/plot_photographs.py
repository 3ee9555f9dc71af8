"""
Normalizing photographs that do not fit in memory
=================================================

A set of photographs is normalized channel by channel before a network sees it: red, green and blue get mean 0 and
variance 1 over *all* of the pictures. The statistics come batch by batch (:func:`fastbn.moments`), the pictures go from
bytes to normalized float32 in one pass, straight from one file into another.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

import fastbn

# %%
# A file of pictures, NHWC bytes: patches of the two photographs that scikit-learn brings.

folder = tempfile.TemporaryDirectory()
rng = np.random.default_rng(0)
sources = load_sample_images().images
patches = np.lib.format.open_memmap(Path(folder.name, "patches.npy"), "w+", np.uint8, (2000, 64, 64, 3))
for patch in patches:
    image = sources[rng.integers(len(sources))]
    top, left = (rng.integers(n - 64) for n in image.shape[:2])
    patch[:] = image[top : top + 64, left : left + 64]

# %%
# Population statistics, one batch of uneven size at a time. They are those of all pixels, whatever the batches.


def batches(size=300):
    """Views of the file."""
    for start in range(0, len(patches), size):
        yield patches[start : start + size]


m = fastbn.moments(batches(), axis=-1)
print("pixels", m.count, "mean", m.mean.round(2), "standard deviation", m.std().round(2))

# %%
# Bytes to normalized floats, written where they belong.

normalized = np.lib.format.open_memmap(Path(folder.name, "normalized.npy"), "w+", np.float32, patches.shape)
for start in range(0, len(patches), 300):
    part = slice(start, start + 300)
    fastbn.batch_norm(patches[part], m.mean, m.var(), axis=-1, eps=0, out=normalized[part])

after = fastbn.moments(normalized, axis=-1)
print("mean", after.mean.round(6) + 0.0, "standard deviation", after.std().round(6))

# %%
# Before and after: the same patches, and how the values of each channel are spread.

fig, axes = plt.subplots(2, 6, figsize=(10, 4.6), gridspec_kw={"width_ratios": [1] * 4 + [0.25, 3.2]})
for column, patch in enumerate((11, 3, 8, 21)):
    low, high = normalized[patch].min(), normalized[patch].max()
    axes[0, column].imshow(patches[patch])
    axes[1, column].imshow((normalized[patch] - low) / (high - low))
for ax in axes[:, :5].flat:
    ax.set_axis_off()
for ax, values, title in ((axes[0, 5], patches, "bytes"), (axes[1, 5], normalized, "normalized")):
    sample = np.asarray(values[::20]).reshape(-1, 3)
    for channel, color in enumerate(("tab:red", "tab:green", "tab:blue")):
        ax.hist(sample[:, channel], bins=60, histtype="step", density=True, color=color)
    ax.set(title=title, yticks=[])
fig.tight_layout()

folder.cleanup()
