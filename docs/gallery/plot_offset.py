r"""
What an offset does to a variance
=================================

:math:`E[x^2] - E[x]^2` needs one pass and two sums; that is why many systems compute
it. Where the mean is large beside the standard deviation the two terms agree in
nearly all of their digits, and what float32 keeps of the difference is what rounding
left. It may be negative.

Here two photographs get an offset. Their variance does not change. What is computed
does, and so does the picture that is normalized with it.
"""

from fractions import Fraction

import matplotlib.pyplot as plt
import numba
import numpy as np
from sklearn.datasets import load_sample_images

import fastbn

photographs = np.stack(load_sample_images().images)  # (2, 427, 640, 3), bytes, NHWC

# %%
# The truth
# ---------
#
# Pixels are whole numbers, so that the variance of a channel is a fraction of whole
# numbers. It is rounded once, here:

pixels = photographs.reshape(-1, 3).astype(np.int64)
n, total, squares = len(pixels), pixels.sum(axis=0), (pixels**2).sum(axis=0)
sums = zip(total.tolist(), squares.tolist(), strict=True)
truth = np.array([float(Fraction(n * q - s * s, n * n)) for s, q in sums])
print("mean", (total / n).round(3), "std", np.sqrt(truth).round(3))

# %%
# Offsets that occur
# ------------------
#
# The same picture as a thermal camera, a sensor, a barometer and a clock would give
# it. Every value is a whole number of grey levels times a power of two, and float32
# holds it exactly: **nothing is lost in the data**, all that goes wrong goes wrong in
# the variance.

units = {  # the value of a pixel is (offset + pixel) * scale
    "bytes, 0 to 255": (0, 1),
    "sensor counts, black level 2048": (2048, 1),
    "temperature, 280 to 312 K": (280 * 8, 1 / 8),
    "air pressure, 100 800 to 101 820 Pa": (100_800 // 4, 4),
    "Unix time, 18 hours from 1.7e9 s": (1_700_000_000 // 256, 256),
}


def shifted(offset, scale=1):
    """The photographs in float32; each of their values is exact."""
    x = ((offset + photographs.astype(np.float64)) * scale).astype(np.float32)
    assert np.array_equal(x / np.float64(scale) - offset, photographs)
    return x


# %%
# Ways to a variance
# ------------------
#
# The order of a sum counts, too. NumPy adds pairwise along contiguous memory, and one
# after another across it; in NHWC, as the photographs lie, the values of a channel
# are not contiguous. So the formula and ``numpy.var`` get both: NHWC, and a copy with
# a channel in one piece.
#
# Welford's update, the textbook's remedy, divides once for each value, and rounds its
# running mean as often: here to float32.


def textbook(x, axis=(0, 1, 2)):
    """E[x²] - E[x]², in the dtype of x."""
    return (x * x).mean(axis=axis) - x.mean(axis=axis) ** 2


@numba.njit
def updated(values):
    """Welford's update, one value at a time, in float32."""
    count = mean = m2 = np.float32(0)
    for value in values:
        count += np.float32(1)
        delta = value - mean
        mean += delta / count
        m2 += delta * (value - mean)
    return m2 / count


def channels(x):
    """A copy in which each channel is in one piece."""
    return np.ascontiguousarray(x.reshape(-1, 3).T)


ways = {
    "E[x²] - E[x]²": textbook,
    "E[x²] - E[x]², contiguous": lambda x: textbook(channels(x), axis=1),
    "Welford": lambda x: np.array([updated(values) for values in channels(x)]),
    "numpy.var": lambda x: x.var(axis=(0, 1, 2)),
    "numpy.var, contiguous": lambda x: channels(x).var(axis=1),
    "E[x²] - E[x]² in float64": lambda x: textbook(channels(x.astype(float)), axis=1),
    "fastbn.moments": lambda x: fastbn.moments(x, axis=-1).var(),
}

# %%
# From no offset to the largest
# -----------------------------
#
# Whole offsets up to :math:`2^{24}`: beyond, float32 does not have every whole number.
# The error is that of the worst of the three channels, relative to the variance. At
# 100 %, the dotted line, no digit is right. An error of less than half a digit of
# float64 is drawn as just that.

occur = {name.split(",")[0]: offset for name, (offset, _) in units.items()}
offsets = np.union1d(np.geomspace(1, 2**24 - 256, 25).round(), [*occur.values()][1:])
errors = {name: [] for name in ways}
for offset in offsets:
    x = shifted(offset)
    for name, way in ways.items():
        errors[name].append(np.max(abs(way(x) / truth - 1)))

looks = {
    "E[x²] - E[x]²": ("#D55E00", "o-"),
    "E[x²] - E[x]², contiguous": ("#D55E00", "o:"),
    "Welford": ("#CC79A7", "s-"),
    "numpy.var": ("#E69F00", "^-"),
    "numpy.var, contiguous": ("#E69F00", "^:"),
    "E[x²] - E[x]² in float64": ("#56B4E9", "v-"),
    "fastbn.moments": ("#0072B2", "D-"),
}
fig, ax = plt.subplots(figsize=(5.6, 6.4))
for name, (color, style) in looks.items():
    shown = np.maximum(errors[name], np.finfo(float).eps / 2)
    ax.loglog(offsets, shown, style, color=color, label=name, ms=4.5, lw=1.5)
ax.axhline(1, color="black", lw=1, ls=":")
for name, offset in [*occur.items()][1:]:
    ax.axvline(offset, color="grey", lw=0.8, zorder=0)
    side = "right" if "sensor" in name else "left"
    ax.text(offset, 1e-9, f" {name} ", rotation=90, ha=side, va="center", color="0.3")
ax.set(xlabel="offset, in grey levels", ylabel="relative error of the variance")
ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.43, 1), frameon=False)
fig.tight_layout()

# %%
# ``numpy.var`` takes two passes, and nothing cancels in it. Its weak part is the mean:
# a float32 sum that grows until each further pixel loses its last digits in it. The
# variance is then too large by the square of what the mean is off by. This is how far
# off the mean is, in standard deviations, for red:

for name, (offset, scale) in units.items():
    mean = shifted(offset, scale).mean(axis=(0, 1, 2))[0] / scale
    off = (mean - offset - total[0] / n) / np.sqrt(truth[0])
    print(f"{name.split(',')[0]:13} {off:8.3f}")

# %%
# What normalization makes of it
# ------------------------------
#
# One of the photographs in each of the units, minus the exact mean, divided by the
# root of the variance that each way has found. All panels are shown alike: black is
# two standard deviations below the mean, white two above. Too large a variance gives
# fog, too small a one glare; the root of a negative one is NaN, and no picture.

columns = ["E[x²] - E[x]²", "Welford", "numpy.var", "fastbn.moments"]
grid = len(units), len(columns)
fig, axes = plt.subplots(*grid, figsize=(6.4, 7.2), layout="constrained")
print("computed / true variance of red\n")
print("{:13}{:>9}{:>8}{:>10}{:>8}".format("", "formula", "Welford", "numpy", "fastbn"))
for row, (name, (offset, scale)) in zip(axes, units.items(), strict=True):
    x = shifted(offset, scale)
    centred = x[0, ::2, ::2] - (total / n + offset) * scale
    found = [ways[column](x) / scale**2 for column in columns]
    print(f"{name.split(',')[0]:13}", end="")
    print("{:9.3g}{:8.3g}{:10.3g}{:8.3g}".format(*(var[0] / truth[0] for var in found)))
    for ax, var in zip(row, found, strict=True):
        with np.errstate(invalid="ignore"):
            y = centred / (np.sqrt(var) * scale)
        lost = np.isnan(y).any(axis=(0, 1))
        if lost.any():
            ax.set_facecolor("0.9")
            where = "".join(c for c, gone in zip("RGB", lost, strict=True) if gone)
            ax.text(0.5, 0.5, f"NaN\nin {', '.join(where)}", ha="center", va="center",
                    fontsize=13)  # fmt: skip
            ax.set(xlim=(0, 1), ylim=(0, 1), aspect=y.shape[0] / y.shape[1])
        else:
            ax.imshow(np.clip(y / 4 + 0.5, 0, 1))
        ax.set(xticks=[], yticks=[])
    row[0].set_title(name, loc="left")
for ax, column in zip(axes[-1], columns, strict=True):
    ax.set_xlabel(column, fontsize=12)
# sphinx_gallery_thumbnail_number = 2

# %%
# fastbn sums :math:`x - p` and :math:`(x - p)^2` in float64, with a value :math:`p`
# near the mean that it takes from the first pixels: one pass, too, and nothing cancels.
# :doc:`/explanation/statistics` has the formula and its bound,
# :doc:`/explanation/accuracy` the errors of y and of the gradients beside those of
# other systems. What comes out at the largest of these offsets, in float32:

x = shifted(*units["Unix time, 18 hours from 1.7e9 s"])
y, saved = fastbn.batch_norm_train(x, axis=-1)
print("mean of y", y.mean(axis=(0, 1, 2), dtype=float).round(7) + 0.0)
print("variance of y", y.var(axis=(0, 1, 2), dtype=float).round(7))

# %%
# A negative variance that comes from elsewhere is no NaN that shows up later, but an
# error where it is handed over (:func:`fastbn.batch_norm`):

x = shifted(*units["air pressure, 100 800 to 101 820 Pa"])
try:
    fastbn.batch_norm(x, x.mean(axis=(0, 1, 2)), textbook(x), axis=-1)
except ValueError as error:
    print(error)
