"""
Normalizing photographs that do not fit in memory
=================================================

Before a network sees a set of photographs, red, green and blue get mean 0 and variance
1 over *all* of them. Two passes do it: one takes the statistics, batch by batch; one
brings the pictures from bytes to normalized float32, straight from one file into
another. Neither holds more than a batch.
"""

import tempfile
import tracemalloc
from fractions import Fraction
from pathlib import Path

import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images

import fastbn

# %%
# A file of pictures
# ------------------
#
# Three photographs that come with scikit-learn and matplotlib, and 400 pieces of them,
# 160 pixels wide and high, as bytes in NHWC. The file is a memory-map: what is read of
# it, the system brings from the disk, and may forget again.

sources = load_sample_images().images
hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
sources.append(plt.imread(hopper))

folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
rng = np.random.default_rng(0)
path = Path(folder.name, "pictures.npy")
pictures = np.lib.format.open_memmap(path, "w+", np.uint8, (400, 160, 160, 3))
for picture in pictures:
    source = sources[rng.integers(len(sources))]
    top, left = (rng.integers(length - 160) for length in source.shape[:2])
    picture[:] = source[top : top + 160, left : left + 160]
print(pictures.shape, pictures.dtype, f"{pictures.nbytes / 1e6:.1f} MB")

# %%
# The first pass: statistics
# --------------------------
#
# An object with a length that gives batches. In a terminal :func:`fastbn.moments` shows
# a progress bar, if tqdm is installed, and the length is where the bar ends.


class Batches:
    """Views of the file, so many pictures each; the last one may be smaller."""

    def __init__(self, pictures, size):
        self.pictures, self.size = pictures, size

    def __len__(self):
        return -(-len(self.pictures) // self.size)

    def __iter__(self):
        for start in range(0, len(self.pictures), self.size):
            yield self.pictures[start : start + self.size]


m = fastbn.moments(Batches(pictures, 64), axis=-1)
print("pixels", m.count)
print("mean", m.mean.round(3), "std", m.std().round(3))

# %%
# Does the size of a batch matter? The exact mean and variance of bytes are fractions
# of whole numbers, and a count of the 256 values of each channel gives them.

counts = np.zeros((3, 256), np.int64)
for batch in Batches(pictures, 64):
    for c in range(3):
        counts[c] += np.bincount(batch[..., c].ravel(), minlength=256)
value, n = np.arange(256), m.count
sums = zip((counts @ value).tolist(), (counts @ value**2).tolist(), strict=True)
exact = [(Fraction(s, n), Fraction(n * q - s * s, n * n)) for s, q in sums]
mean, var = np.array(exact, dtype=float).T

print("batch of  error of mean   of var")
found = {}
for size in (1, 7, 64, 400):
    found[size] = fastbn.moments(Batches(pictures, size), axis=-1)
    of_mean = abs(found[size].mean / mean - 1).max()
    of_var = abs(found[size].var() / var - 1).max()
    print(f"{size:8}  {of_mean:13.1e}  {of_var:7.1e}")

# %%
# The second pass: from bytes to floats
# -------------------------------------
#
# The new file is NCHW, as PyTorch and ONNX want it; ``out`` is an NHWC view of it. Each
# byte is read once, each float written once, where it belongs. eps is 0, since no
# channel is constant: the variance becomes 1, not nearly 1.

path = Path(folder.name, "normalized.npy")
normalized = np.lib.format.open_memmap(path, "w+", np.float32, (400, 3, 160, 160))


def normalize(pictures, m, out, size):
    """From NHWC bytes to NCHW floats, so many pictures at a time."""
    targets = Batches(out.transpose(0, 2, 3, 1), size)
    for batch, target in zip(Batches(pictures, size), targets, strict=True):
        fastbn.batch_norm(batch, m.mean, m.var(), axis=-1, eps=0, out=target)


normalize(pictures, m, normalized, 64)
after = fastbn.moments(Batches(normalized, 64))
print("mean", after.mean.round(7) + 0.0, "std", after.std().round(7))

# %%
# The last digits of a float64 in which the statistics of other batches differ are far
# below the last of a float32. Of the floats of the first 50 pictures:

part = np.empty_like(normalized[:50])
for size, other in found.items():
    normalize(pictures[:50], other, part, size)
    same = np.mean(part.view(np.uint32) == normalized[:50].view(np.uint32))
    print(f"batches of {size:3}: {same:.4%} same bits")

# %%
# The memory that it takes
# ------------------------
#
# The batches are views of the files, and no batch is copied: not as floats, not in
# another order. What both passes allocate, at its peak, is the room for the sums of a
# batch, which has a limit however large the batch is:

print(f"files of {pictures.nbytes / 1e6:.1f} and {normalized.nbytes / 1e6:.1f} MB")
for size in (1, 64, 400):
    tracemalloc.start()
    m = fastbn.moments(Batches(pictures, size), axis=-1)
    normalize(pictures, m, normalized, size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"batches of {size:3}: {peak / 1e6:.3f} MB")

# %%
# Before and after
# ----------------
#
# The right ones are normalized, shown so that grey is 0, the mean of all pictures, and
# black and white are -2 and 2. The warm cast of the set is gone.

fig, axes = plt.subplots(4, 2, figsize=(4.8, 9.2), layout="constrained")
for (before, after), i in zip(axes, (36, 23, 2, 35), strict=True):
    before.imshow(pictures[i])
    after.imshow(np.clip(normalized[i].transpose(1, 2, 0) / 4 + 0.5, 0, 1))
    for ax in (before, after):
        ax.set_axis_off()
for ax, title in zip(axes[0], ("bytes", "normalized"), strict=True):
    ax.set_title(title)

# %%
# How the values of each channel are spread, over all of the pictures. The peak on the
# left is the navy uniform and the dark behind the flower.

edges = np.arange(0, 257, 8) - 0.5
fig, (top, bottom) = plt.subplots(2, 1, figsize=(4.8, 5.4), layout="constrained")
looks = {"red": ("#C00000", "-"), "green": ("#00A000", "--"), "blue": ("#2060FF", ":")}
for c, (name, (color, style)) in enumerate(looks.items()):
    look = {"color": color, "ls": style, "lw": 2, "label": name}
    top.stairs(counts[c].reshape(-1, 8).sum(axis=1) / n, edges, **look)
    scaled = (edges - m.mean[c]) / m.std()[c]
    batches = (batch[:, c] for batch in Batches(normalized, 64))
    share = sum(np.histogram(batch, scaled)[0] for batch in batches) / n
    bottom.stairs(share, scaled, **look)
    top.axvline(m.mean[c], color=color, ls=style, lw=1)
bottom.axvline(0, color="black", lw=1)
top.legend(loc="upper right")
for ax, title in (top, "bytes, and their means"), (bottom, "normalized"):
    ax.set(title=title, yticks=[])

# %%
# :doc:`/how-to/larger-than-memory` goes on from here: a run that is stopped and goes on
# later, masks, several machines.

del pictures, normalized, picture
folder.cleanup()
