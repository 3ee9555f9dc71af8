"""
Which way up is this text?
==========================

Whoever reads text from pictures must know first which way up it is. PP-OCR has a
network for that, 35 of whose layers are batch norms; the package rapidocr-onnxruntime
brings it as an ONNX file of opset 11. Here it runs in NumPy, with onnx's reference
evaluator and fastbn's batch norm, on three pictures::

    pip install "fastbn[onnx]" rapidocr-onnxruntime matplotlib
"""

import importlib.util
import io
import math
from collections import Counter
from pathlib import Path

import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator
from PIL import Image

import fastbn
from fastbn.interop.onnx import evaluator, from_onnx

# %%
# The pictures
# ------------
#
# A logo, a printed line, and the name tag of Grace Hopper, who wrote one of the first
# compilers. matplotlib brings the logo and the photograph, and prints the line.


def logo():
    """matplotlib's logo, on white."""
    file = matplotlib.cbook.get_sample_data("logo2.png", asfileobj=False)
    picture = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def line_of_text(text):
    """A line of text, cut out with a margin."""
    figure, file = plt.figure(figsize=(8, 2), dpi=100), io.BytesIO()
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=45, family="serif")
    figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
    picture = Image.open(file).convert("RGB")
    rows, columns = np.nonzero(np.asarray(picture).min(axis=-1) < 128)
    left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
    return picture.crop((left - 8, top - 8, right + 9, bottom + 9))


file = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
hopper = Image.open(file)
TAG = (104, 488, 166, 511)  # left, top, right, bottom

fig, ax = plt.subplots(figsize=(3, 3.6), layout="constrained")
ax.imshow(hopper)
ax.add_patch(plt.Rectangle(TAG[:2], 62, 23, fill=False, ec="#F0E442", lw=2))
ax.set_axis_off()

# %%
# What is cut out of the photograph is 62 pixels wide, with letters a few pixels high:
# COMO HOPPER, for commodore.
#
# The network wants 48 x 192 pixels from -1 to 1, blue first; a shorter picture is
# filled up with 0 on the right. It answers with two probabilities: upright, or turned
# by 180 degrees. So it sees each picture both ways.

HEIGHT, WIDTH = 48, 192
ANSWERS = 0, 180  # degrees, of its two outputs


def prepared(picture):
    """As the classifier wants it, (3, 48, 192)."""
    width = min(WIDTH, math.ceil(HEIGHT * picture.width / picture.height))
    picture = picture.resize((width, HEIGHT), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.float32) / 127.5 - 1
    x = np.zeros((3, HEIGHT, WIDTH), np.float32)
    x[:, :, :width] = pixels.transpose(2, 0, 1)[::-1]
    return x


upright = {
    "the logo": logo(),
    "a line of text": line_of_text("exact for any offset"),
    "the name tag": hopper.crop(TAG),
}
pairs = [(name, turn) for name in upright for turn in ANSWERS]
shown = [(name, turn, upright[name].rotate(turn)) for name, turn in pairs]
x = np.stack([prepared(picture) for *_, picture in shown])
print(x.shape, x.dtype)

# %%
# Its answers
# -----------
#
# fastbn's ``evaluator`` is onnx's ReferenceEvaluator with another batch norm. The model
# gets a second output, the logits, of which its softmax makes probabilities: they show
# differences that a probability of 0.9999999 hides.

folder = importlib.util.find_spec("rapidocr_onnxruntime").submodule_search_locations[0]
file = Path(folder, "models", "ch_ppocr_mobile_v2.0_cls_infer.onnx")


def with_outputs(model, *names):
    """A copy of a model, with more of its values among its outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    float32 = onnx.TensorProto.FLOAT
    new = [onnx.helper.make_tensor_value_info(name, float32, None) for name in names]
    result.graph.output.extend(new)
    return result


model = onnx.load(file)
(softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
model = with_outputs(model, softmax.input[0])
found, logits = evaluator(model).run(None, {"x": x})

fig = plt.figure(figsize=(5.6, 3.9), layout="constrained")
ratios = [picture.height / picture.width for picture in upright.values()]
axes = fig.subplots(3, 2, height_ratios=np.add(ratios, 0.2))
for ax, (_, turn, picture), p in zip(axes.flat, shown, found, strict=True):
    answer = int(p.argmax())
    words = f"{('upright', 'turned')[answer]}, {p[answer]:.2%}"
    right = ANSWERS[answer] == turn
    ax.imshow(picture)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(words if right else f"wrong: {words}", fontsize=12)
for ax, title in zip(axes[0], ("as it is", "turned by 180 degrees"), strict=True):
    ax.set_title(title)
# sphinx_gallery_thumbnail_number = 2

# %%
# All are right, and of the letters that are a few pixels high it says that it is less
# sure. How they are cut out decides: with the emblem to their left, that is the whole
# tag, it takes the one for the other.

whole_tag = hopper.crop((76, 482, 168, 518))
for turn in ANSWERS:
    p = evaluator(model).run(None, {"x": prepared(whole_tag.rotate(turn))[None]})[0]
    print(f"the whole tag, turned by {turn:3}: turned, {p[0, 1]:.1%}")

# %%
# Are these its numbers?
# ----------------------
#
# ONNX Runtime computes the same in compiled code of its own. The last column is the
# reference evaluator with the batch norm that it brings: in the opsets 9 to 13 that one
# (of onnx 1.23) mixes the statistics of the batch into an inference, and the answer to
# one picture depends on the pictures beside it.


def run_in_runtime(model, x):
    """What ONNX Runtime gives."""
    data, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(data, providers=providers).run(None, {"x": x})


expected, expected_logits = run_in_runtime(model, x)
alone = ReferenceEvaluator(model).run(None, {"x": x})[0]

print("the probability that the picture is turned\n")
print("{:14}{:>4}{:>10}{:>10}{:>7}".format("", "by", "fastbn", "Runtime", "onnx"))
for (name, turn, _), p, q, r in zip(shown, found, expected, alone, strict=True):
    print(f"{name:14}{turn:4}{p[1]:10.7f}{q[1]:10.7f}{r[1]:7.3f}")


def compare(what, found, logits):
    """Print how far the results are from those of ONNX Runtime."""
    size = abs(expected_logits).max()
    print(f"\n{what}, beside ONNX Runtime:")
    print(f"probabilities differ by {abs(found - expected).max():.1e},")
    off = abs(logits - expected_logits).max() / size
    print(f"logits by {off:.1e} of the largest, {size:.1f}")


compare("fastbn", found, logits)

# %%
# A look into one of them
# -----------------------
#
# The second batch norm has eight channels. Its input comes from a convolution of
# 1 x 1, which mixes eight others, with whatever scale and offset training has left
# there. Here are the eight for the logo, before and after, in one scale of colours:
# blue is below 0, red above, white 0.

node = [n for n in model.graph.node if n.op_type == "BatchNormalization"][1]
layer = from_onnx(model)[node.name]
inside = with_outputs(model, node.input[0], node.output[0])
before, after = evaluator(inside).run(None, {"x": x})[-2:]

fig, axes = plt.subplots(8, 2, figsize=(5.6, 6.6), layout="constrained")
for channel, row in enumerate(axes):
    for ax, values in zip(row, (before, after), strict=True):
        ax.imshow(values[0, channel], cmap="RdBu_r", vmin=-4, vmax=4)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(channel, rotation=0, ha="right", va="center", fontsize=12)
for ax, title in zip(axes[0], ("before", "after"), strict=True):
    ax.set_title(title)

# %%
# The same in figures, over all six pictures. A bar holds the middle 90 % of a channel's
# values, a dot is their mean. Lines are what the layer knows: before, the running mean
# and one running standard deviation to each side, gathered in training from other
# pictures; after, beta and gamma, which training has chosen.

fig, (left, right) = plt.subplots(1, 2, figsize=(5.6, 4.6), layout="constrained")
left.set_ylabel("channel")
std = np.sqrt(layer.running_var)
sides = (
    (left, "before", before, layer.running_mean, std, "running mean ± std"),
    (right, "after", after, layer.beta, abs(layer.gamma), "beta ± |gamma|"),
)
for ax, title, values, middle, spread, known in sides:
    low, high = np.percentile(values, (5, 95), axis=(0, 2, 3))
    y = np.arange(layer.channels[0])
    ax.barh(y, high - low, left=low, height=0.7, color="#9ECAE9", label="middle 90 %")
    ax.plot(values.mean(axis=(0, 2, 3)), y, "o", color="#0072B2", label="mean")
    ax.errorbar(middle, y, xerr=spread, fmt="|", color="#D55E00", ms=12, mew=2, lw=2,
                label=known)  # fmt: skip
    ax.axvline(0, color="black", lw=0.8, zorder=0)
    ax.set(title=title, yticks=y)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    ax.invert_yaxis()

# %%
# Taking all 35 out
# -----------------
#
# In evaluation a batch norm is one factor and one summand per channel. Each of the 35
# has a convolution before it, and :func:`fastbn.fold_conv` puts them into its weights.
# What is left is the same network, without batch norm.


def folded(model, layers):
    """The model with each batch norm in the convolution before it."""
    result = with_outputs(model)
    graph = result.graph
    nodes = [n for n in graph.node if n.op_type == "Constant"]
    tensors = {n.output[0]: n.attribute[0].t for n in nodes}
    constants = {name: onnx.numpy_helper.to_array(t) for name, t in tensors.items()}
    convolutions = {n.output[0]: n for n in graph.node if n.op_type == "Conv"}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in [n for n in graph.node if n.op_type == "BatchNormalization"]:
        conv = convolutions[node.input[0]]
        assert readers[conv.output[0]] == 1  # nobody else wants what is folded away
        groups = {a.name: a.i for a in conv.attribute}.get("group", 1)
        bias = constants[conv.input[2]] if len(conv.input) > 2 else None
        layer = layers[node.name]
        new = fastbn.fold_conv(constants[conv.input[1]], bias, layer, groups=groups)
        names = [f"{node.name}.weight", f"{node.name}.bias"]
        for array, name in zip(new, names, strict=True):
            graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        conv.input[1:], conv.output[0] = names, node.output[0]
        graph.node.remove(node)
    return result


plain = folded(model, from_onnx(model))
for what, m in ("as it came", model), ("folded", plain):
    count = Counter(node.op_type for node in m.graph.node)
    print(f"{what}:", *(f"{count[op]} {op}" for op in ("Conv", "BatchNormalization")))

compare("folded", *evaluator(plain).run(None, {"x": x}))

# %%
# :doc:`/how-to/onnx` is the how-to of all this: running models, weights out of and into
# them.
