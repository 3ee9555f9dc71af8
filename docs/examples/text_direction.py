"""Which way up is a line of text? A real network in NumPy, its 35 batch norms run by fastbn, beside ONNX Runtime.

The network is the text-direction classifier of PP-OCR (opset 11) from the package rapidocr-onnxruntime. The pictures
are matplotlib's logo, which comes with it as a PNG file, and a line of text that matplotlib draws; each of them as it
is, and turned by 180 degrees.

    pip install "fastbn[onnx]" rapidocr-onnxruntime matplotlib
    python docs/examples/text_direction.py
"""

import importlib.util
import io
import math
from pathlib import Path

import matplotlib.cbook
import numpy as np
import onnx
import onnxruntime
from matplotlib.figure import Figure
from onnx.reference import ReferenceEvaluator
from PIL import Image

import fastbn
from fastbn.interop.onnx import evaluator, from_onnx

MODEL = Path(
    *importlib.util.find_spec("rapidocr_onnxruntime").submodule_search_locations,
    "models",
    "ch_ppocr_mobile_v2.0_cls_infer.onnx",
)
HEIGHT, WIDTH = 48, 192
ANSWERS = 0, 180  # degrees, of the two outputs


def logo():
    """matplotlib's logo, on white."""
    picture = Image.open(matplotlib.cbook.get_sample_data("logo2.png", asfileobj=False)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def line_of_text(text):
    """A line of text, cut out with a margin."""
    figure, file = Figure(figsize=(8, 2), dpi=100), io.BytesIO()
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=45, family="serif")
    figure.savefig(file, format="png")
    picture = Image.open(file).convert("RGB")
    rows, columns = np.nonzero(np.asarray(picture).min(-1) < 128)
    return picture.crop((columns.min() - 8, rows.min() - 8, columns.max() + 9, rows.max() + 9))


def prepared(picture):
    """As the classifier wants it: 48 x 192, filled up with 0 on the right; from -1 to 1; blue, green, red."""
    width = min(WIDTH, math.ceil(HEIGHT * picture.width / picture.height))
    pixels = np.asarray(picture.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    x = np.zeros((3, HEIGHT, WIDTH), np.float32)
    x[:, :, :width] = ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[::-1]
    return x


def with_logits(model):
    """The model with a second output: what its last operators make probabilities of."""
    (softmax,) = [n for n in model.graph.node if n.op_type == "Softmax"]
    model.graph.output.append(onnx.helper.make_tensor_value_info(softmax.input[0], onnx.TensorProto.FLOAT, None))
    return model


def folded(model, layers):
    """The same network without batch norm: each is folded into the convolution before it."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    constants = {
        n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"
    }
    convolutions = {n.output[0]: n for n in graph.node if n.op_type == "Conv"}
    for node in [n for n in graph.node if n.op_type == "BatchNormalization"]:
        (name,) = [i for n in graph.node for i in n.input if i == node.input[0]]  # nobody else reads it
        conv = convolutions[name]
        groups = {a.name: a.i for a in conv.attribute}.get("group", 1)
        bias = constants[conv.input[2]] if len(conv.input) > 2 else None
        new = fastbn.fold_conv(constants[conv.input[1]], bias, layers[node.name], groups=groups)
        names = [f"{node.name}.weight", f"{node.name}.bias"]
        graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for a, n in zip(new, names, strict=True))
        conv.input[1:], conv.output[0] = names, node.output[0]
        graph.node.remove(node)
    return result


def run_in_runtime(model, x):
    """What ONNX Runtime gives."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def main():
    """Print the answers and how far the two are apart."""
    upright = {"matplotlib's logo": logo(), "a line of text": line_of_text("exact for any offset")}
    shown = [(name, turn, picture.rotate(turn)) for name, picture in upright.items() for turn in ANSWERS]
    x = np.stack([prepared(picture) for *_, picture in shown])

    model = with_logits(onnx.load(MODEL))
    layers = from_onnx(model)
    found, logits = evaluator(model).run(None, {"x": x})
    expected, expected_logits = run_in_runtime(model, x)
    alone = ReferenceEvaluator(model).run(None, {"x": x})[0]

    print(f"{MODEL.name}: {len(layers)} batch norms. The probability that the picture is turned:\n")
    print(f"{'picture':20}{'turned by':>10}{'fastbn':>12}{'ONNX Runtime':>16}{'onnx by itself':>18}{'answer':>10}")
    for i, (name, turn, _) in enumerate(shown):
        answer = ANSWERS[int(found[i].argmax())]
        print(f"{name:20}{turn:>10}{found[i, 1]:12.7f}{expected[i, 1]:16.7f}{alone[i, 1]:18.7f}{answer:>10}")
    print()
    plain, plain_logits = evaluator(folded(model, layers)).run(None, {"x": x})
    size = abs(expected_logits).max()
    for what, p, z in ("fastbn", found, logits), ("fastbn, batch norms folded", plain, plain_logits):
        print(
            f"{what}: at most {abs(p - expected).max():.1e} from ONNX Runtime; before the softmax "
            f"{abs(z - expected_logits).max() / size:.1e} of the largest value, {size:.1f}"
        )


if __name__ == "__main__":
    main()
