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
# Three photographs that come with scikit-learn and matplotlib, and 600 pieces of them,
# 160 pixels wide and high, as bytes in NHWC. The file is a memory-map: what is read of
# it, the system brings from the disk, and may forget again.

sources = load_sample_images().images
hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
sources.append(plt.imread(hopper))

folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
rng = np.random.default_rng(0)
pictures = np.lib.format.open_memmap(
    Path(folder.name, "pictures.npy"), "w+", np.uint8, (600, 160, 160, 3)
)
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
print("pixels", m.count, "mean", m.mean.round(3), "standard deviation", m.std().round(3))

# %%
# Does the size of a batch matter? The exact mean and variance of bytes are fractions
# of whole numbers, and a count of the 256 values of each channel gives them.

counts = sum(
    np.stack([np.bincount(batch[..., c].ravel(), minlength=256) for c in range(3)])
    for batch in Batches(pictures, 64)
)
value, n = np.arange(256), m.count
exact = [
    (Fraction(int(s), n), Fraction(n * int(q) - int(s) ** 2, n**2))
    for s, q in zip(counts @ value, counts @ value**2, strict=True)
]
mean, var = np.array(exact, dtype=float).T

print("batch of   error of the mean   of the variance")
found = {}
for size in (1, 7, 64, 600):
    found[size] = fastbn.moments(Batches(pictures, size), axis=-1)
    off = [
        np.max(abs(a / b - 1))
        for a, b in ((found[size].mean, mean), (found[size].var(), var))
    ]
    print(f"{size:8}   {off[0]:17.1e}   {off[1]:15.1e}")

# %%
# The second pass: from bytes to floats
# -------------------------------------
#
# The new file is NCHW, as PyTorch and ONNX want it; ``out`` is an NHWC view of it. Each
# byte is read once, each float written once, where it belongs. eps is 0: nothing here is
# near to a division by zero, and the variance becomes 1 exactly.

normalized = np.lib.format.open_memmap(
    Path(folder.name, "normalized.npy"), "w+", np.float32, (600, 3, 160, 160)
)


def normalize(pictures, m, out, size):
    """From NHWC bytes to NCHW floats, so many pictures at a time."""
    targets = Batches(out.transpose(0, 2, 3, 1), size)
    for batch, target in zip(Batches(pictures, size), targets, strict=True):
        fastbn.batch_norm(batch, m.mean, m.var(), axis=-1, eps=0, out=target)


normalize(pictures, m, normalized, 64)
after = fastbn.moments(Batches(normalized, 64))
print("mean", after.mean.round(7) + 0.0, "standard deviation", after.std().round(7))

# %%
# Statistics over one picture at a time, over 7 or over all give the same file, bit for
# bit, if they agree in all digits that float32 has:

part = np.empty_like(normalized[:50])
for size, other in found.items():
    normalize(pictures[:50], other, part, size)
    same = np.mean(part.view(np.uint32) == normalized[:50].view(np.uint32))
    print(f"batches of {size:3}: {same:.4%} of the floats have the same bits")

# %%
# The memory that it takes
# ------------------------
#
# What NumPy allocates during both passes, at its peak. The batches are views of the
# files, so that it is the same for one picture as for all of them.

print(f"files of {pictures.nbytes / 1e6:.1f} and {normalized.nbytes / 1e6:.1f} MB")
for size in (1, 64, 600):
    tracemalloc.start()
    normalize(pictures, fastbn.moments(Batches(pictures, size), axis=-1), normalized, size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"batches of {size:3}: {peak / 1e6:.3f} MB")

# %%
# Before and after
# ----------------
#
# Seven of the pictures. The lower ones are normalized: grey is 0, the mean of all
# pictures; black is -2 and white 2, in each channel. A blue sky or a brown wall is
# what it was, but measured from there.

chosen = (1, 10, 3, 8, 23, 5, 12)
fig, axes = plt.subplots(4, 4, figsize=(6.4, 6.8), layout="constrained")
