"""Folding: one convolution or linear layer with the folded weights does what it and the batch norm behind it did.

The two steps are computed in long double, by loops that know nothing of folding, and by PyTorch, Keras and JAX.
"""

import importlib.util
import itertools

import numpy as np
import pages
import pytest
import reference
from arrays import FLOATS, SINGLE_VIEWS, memory
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from reference import EPS64, WIDE, assert_within
from subprocesses import run_script

import fastbn
from fastbn import fold_conv, fold_linear

HALVES = ["float16", "bfloat16"]
# Of each dtype half the distance from 1 to the next number; NumPy's cast to bfloat16 rounds to float32 before.
UNITS = {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8 + 2**-24}
# What rounding costs where numbers are small: what is subnormal becomes 0; float16 keeps steps of 2**-24.
LEAST = {"float64": 2**-1022, "float32": 2**-126, "float16": 2**-25, "bfloat16": 2**-126}

# The axes of the weight that a name stands for, in a plain and in a transposed convolution.
PLAIN = {name: name for name in ("OIHW", "HWIO", "OIW", "WIO", "OIDHW", "DHWIO")}
TRANSPOSED = {
    "OIHW": "IOHW", "HWIO": "HWOI", "OIW": "IOW", "WIO": "WOI", "OIDHW": "IODHW", "DHWIO": "DHWOI",
    **{axes: axes for axes in ("IOHW", "HWOI", "IOW", "WOI", "IODHW", "DHWOI")},
}  # fmt: skip
LAYOUTS = [*((name, False) for name in PLAIN), *((name, True) for name in TRANSPOSED)]
CHANNELS = [(5, 3, 1), (6, 4, 2), (6, 3, 3), (4, 4, 4)]  # outputs, inputs, groups: the last two are depthwise


def dtype_of(name):
    if name != "bfloat16":
        return np.dtype(name)
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")
    return np.dtype(ml_dtypes.bfloat16)


def layer(rng, channels, **options):
    """A layer whose parameters and running statistics are all different."""
    bn = fastbn.BatchNorm(channels, **options)
    for name, values in (("gamma", rng.normal(size=channels)), ("beta", rng.normal(size=channels)),
                         ("running_mean", rng.normal(0, 3, channels)),
                         ("running_var", rng.uniform(0.1, 9, channels))):  # fmt: skip
        if getattr(bn, name) is not None:
            getattr(bn, name)[:] = values
    return bn


def parameters(bn):
    """mean, scale, beta of y = (x - mean) * scale + beta, in long double."""
    scale = reference.invstd(bn.running_var, bn.eps) * (1 if bn.gamma is None else bn.gamma.astype(WIDE))
    return bn.running_mean.astype(WIDE), scale, 0 * scale if bn.beta is None else bn.beta.astype(WIDE)


def arranged(a, axes, to):
    """Another order of the axes, each of which is a letter."""
    return a.transpose([axes.index(letter) for letter in to])


def grouped(a, groups, axis):
    return np.split(a, groups, axis=axis)


def conv(x, weight, groups):
    """x (N, inputs, ...) with weight (outputs, inputs / groups, ...), without padding, in long double."""
    spatial = list(range(2, x.ndim))
    x, weight = x.astype(WIDE), weight.astype(WIDE)
    y = []
    for part, w in zip(grouped(x, groups, 1), grouped(weight, groups, 0), strict=True):
        windows = sliding_window_view(part, w.shape[2:], spatial)
        behind = range(x.ndim, windows.ndim)
        y.append(np.moveaxis(np.tensordot(windows, w, ([1, *behind], [1, *spatial])), -1, 1))
    return np.concatenate(y, axis=1)


def conv_transpose(x, weight, groups):
    """x (N, inputs, ...) with weight (inputs, outputs / groups, ...): each pixel of x adds a kernel to y."""
    size = [n + k - 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    x, weight = x.astype(WIDE), weight.astype(WIDE)
    y = []
    for part, w in zip(grouped(x, groups, 1), grouped(weight, groups, 0), strict=True):
        y.append(np.zeros((len(x), w.shape[1], *size), WIDE))
        for pixel in np.ndindex(*x.shape[2:]):
            there = tuple(slice(i, i + k) for i, k in zip(pixel, w.shape[2:], strict=True))
            y[-1][(..., *there)] += np.tensordot(part[(..., *pixel)], w, (1, 0))
    return np.concatenate(y, axis=1)


def spread(v, y):
    return v.reshape(-1, *[1] * (y.ndim - 2))


def drawn_conv(rng, axes, channels, transposed, dtype="float64"):
    """(x, weight, weight as `conv` and `conv_transpose` take it, that function)."""
    outputs, inputs, groups = channels
    kernel = (3, 2, 2)[: len(axes) - 2]
    canonical = ("IO" if transposed else "OI") + "".join(letter for letter in axes if letter not in "OI")
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    plain = rng.normal(size=(*shape, *kernel)).astype(dtype)
    weight = arranged(plain, canonical, axes).copy()
    x = rng.normal(size=(2, inputs, *(4, 3, 3)[: len(kernel)]))
    return x, weight, lambda w: arranged(w, axes, canonical), conv_transpose if transposed else conv


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize(("layout", "transposed"), LAYOUTS)
def test_one_convolution_does_both_steps(rng, layout, transposed, channels, dtype):
    outputs, _, groups = channels
    axes = (TRANSPOSED if transposed else PLAIN)[layout]
    x, weight, plain, convolved = drawn_conv(rng, axes, channels, transposed, dtype_of(dtype))
    for bias, options in [
        (None, {"dtype": "float64"}),
        (rng.normal(size=outputs).astype(weight.dtype), {}),
        (rng.normal(size=outputs), {"center": False, "scale": False, "momentum": None}),
    ]:
        bn = layer(rng, outputs, **options)
        w, b = fold_conv(weight, bias, bn, layout=layout, groups=groups, transposed=transposed)
        assert (w.shape, w.dtype, b.shape, b.dtype) == (weight.shape, weight.dtype, (outputs,), weight.dtype)
        before = convolved(x, plain(weight), groups)
        mean, scale, beta = (spread(v, before) for v in parameters(bn))
        start = 0 * mean if bias is None else spread(bias.astype(WIDE), before)
        expected = (before + start - mean) * scale + beta
        # Of each weight and bias: one rounding of the result; before it, four of the scale and one or two more.
        terms = abs(scale) * (convolved(abs(x), abs(plain(weight)), groups) + abs(start - mean)) + abs(beta)
        least = LEAST[dtype] * (convolved(abs(x), np.ones(plain(weight).shape), groups) + 1)
        budget = (UNITS[dtype] + 4 * EPS64) * terms + least
        assert_within(convolved(x, plain(w), groups) + spread(b.astype(WIDE), before), expected, budget, "y")


def test_a_name_with_o_and_i_swapped_says_itself_what_it_means(rng):
    for name, axes in TRANSPOSED.items():
        _, weight, _, _ = drawn_conv(rng, axes, (6, 4, 2), True)
        bn = layer(rng, 6)
        for a, b in zip(*(fold_conv(weight, None, bn, layout=n, groups=2, transposed=True) for n in (name, axes)),
                        strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("transposed", [False, True])
def test_other_layouts_are_the_same_numbers_elsewhere(rng, transposed):
    of = TRANSPOSED if transposed else PLAIN
    for one, other in (("OIHW", "HWIO"), ("OIW", "WIO"), ("OIDHW", "DHWIO")):
        for channels in CHANNELS:
            _, weight, _, _ = drawn_conv(rng, of[one], channels, transposed, "float32")
            bn, options = layer(rng, channels[0]), {"groups": channels[2], "transposed": transposed}
            w, b = fold_conv(weight, 1.5, bn, layout=one, **options)
            v, c = fold_conv(arranged(weight, of[one], of[other]), 1.5, bn, layout=other, **options)
            np.testing.assert_array_equal(arranged(v, of[other], of[one]), w)
            np.testing.assert_array_equal(c, b)


@given(
    st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([*FLOATS, "float16"]),
    st.sampled_from(["OI", "IO"]),
    st.sampled_from([None, "float32", "float64"]),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 1e3]),
)
def test_one_linear_layer_does_both_steps(size, seed, dtype, layout, bias, affine, offset):
    """The statistics are those of a training call, at means of up to many standard deviations."""
    n, inputs, outputs = size
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(outputs, inputs)).astype(dtype)
    start = np.zeros(outputs) if bias is None else rng.normal(offset, 1, outputs).astype(bias)
    x = rng.normal(offset, 1, (n + 1, inputs))
    bn = layer(rng, outputs, momentum=None, dtype="float64", center=affine, scale=affine, eps=1e-3)
    z = x @ weight.astype("float64").T + start
    bn(z)
    w, b = fold_linear(weight if layout == "OI" else weight.T, None if bias is None else start, bn, layout=layout)
    assert w.dtype == b.dtype == weight.dtype
    found = x.astype(WIDE) @ (w.T if layout == "OI" else w).astype(WIDE) + b.astype(WIDE)

    mean, scale, beta = parameters(bn)
    terms = abs(scale) * (abs(x) @ abs(weight.astype(WIDE)).T + abs(start - mean)) + abs(beta)
    # As above; and z, in float64, has a rounding for each of its products and sums.
    least = LEAST[dtype] * (abs(x).sum(1, keepdims=True) + 1)
    sums = (inputs + 1) * EPS64 * abs(scale) * (abs(x) @ abs(weight.astype(WIDE)).T + abs(start))
    budget = (UNITS[dtype] + 4 * EPS64) * terms + least + sums
    inference = reference.infer(z, bn.running_mean, bn.running_var, *(1.0, 0.0) if not affine else (bn.gamma, bn.beta),
                                eps=bn.eps)  # fmt: skip
    assert_within(found, inference.y, budget, "against the formula")
    assert_within(found, bn.eval()(z).astype(WIDE), budget + inference.budget, "against the layer")


# -------------------------------------------------------------------------------------------------- dtypes and memory


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
def test_results_are_in_the_dtype_of_the_weight(rng, dtype):
    weight, bn = rng.normal(size=(3, 4)).astype(dtype_of(dtype)), layer(rng, 3, dtype="float64")
    first, (mean, scale, beta) = fold_linear(weight, None, bn)[0], parameters(bn)
    for bias in (None, 0, 2, [1, 2, 3], np.float16(0.5), np.array([1, 2, 3], "f2"), np.arange(3.0), weight[:, 0]):
        w, b = fold_linear(weight, bias, bn)
        assert w.dtype == b.dtype == weight.dtype
        np.testing.assert_array_equal(w, first)
        start = np.zeros(3, WIDE) if bias is None else np.asarray(bias).astype(WIDE)
        budget = (UNITS[dtype] + 4 * EPS64) * (abs((start - mean) * scale) + abs(beta)) + LEAST[dtype]
        assert_within(b, (start - mean) * scale + beta, budget, "bias")
    assert fold_linear(weight.tolist(), None, bn)[0].dtype == np.float64


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("view", [v for v in SINGLE_VIEWS if v.fits((4, 3, 2, 5))], ids=str)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_any_memory(rng, view, transposed):
    """The same as for a plain copy; the inputs stay, the results are their own."""
    bn = layer(rng, 6 if transposed else 4)
    weight = view(rng.normal(size=(4, 3, 2, 5)).astype("float32"))
    bias = rng.normal(size=bn.channels)
    options = {"transposed": transposed, "groups": 2}
    arrays = [np.asarray(weight), bias]
    before = [bytes(memory(a)) for a in arrays], bn.state_dict()
    results = fold_conv(weight, bias, bn, **options)
    plain = np.array(weight, arrays[0].dtype.newbyteorder("="), order="C", subok=False)
    for found, expected in zip(results, fold_conv(plain, bias.copy(), bn, **options), strict=True):
        assert type(found) is np.ndarray
        assert found.dtype == plain.dtype
        np.testing.assert_array_equal(found, expected)
    assert [bytes(memory(a)) for a in arrays] == before[0]
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[1][name])
    for one, other in itertools.product(results, [*arrays, *bn._arrays().values()]):
        assert not np.may_share_memory(one, other)
    assert not np.may_share_memory(*results)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_the_memory_order_stays(rng, order, dtype):
    weight = rng.normal(size=(4, 2, 3, 5)).astype(dtype).transpose(order)
    bn = layer(rng, weight.shape[0])
    w, _ = fold_conv(weight, None, bn)
    assert w.strides == weight.strides
    back, _ = fold_conv(weight[::-1, ..., ::-1], None, bn)
    assert back.strides == weight.strides
    np.testing.assert_array_equal(back[::-1, ..., ::-1], fold_conv(weight, None, reversed_layer(bn))[0])


def reversed_layer(bn):
    other = fastbn.BatchNorm(bn.channels)
    return other.load_state_dict({name: v[::-1] if np.ndim(v) else v for name, v in bn.state_dict().items()})


def test_the_mode_of_the_layer_does_not_matter(rng):
    bn, weight = layer(rng, 3), rng.normal(size=(3, 2))
    for a, b in zip(fold_linear(weight, None, bn.eval()), fold_linear(weight, None, bn.train()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_without_inputs_leave_the_bias(rng):
    bn = layer(rng, 4, dtype="float64")
    _, shift = bn.fold()
    for weight, fold in [
        (np.ones((4, 0, 3, 3)), lambda w: fold_conv(w, None, bn)),
        (np.ones((0, 2, 3, 3)), lambda w: fold_conv(w, None, bn, groups=2, transposed=True)),
        (np.ones((4, 0)), lambda w: fold_linear(w, None, bn)),
        (np.ones((4, 2, 0, 3)), lambda w: fold_conv(w, None, bn)),
    ]:
        w, b = fold(weight)
        assert w.shape == weight.shape
        np.testing.assert_allclose(b, shift, rtol=4 * EPS64, atol=8 * EPS64)


# ------------------------------------------------------------------------------------------------------ dead channels

DEAD = {  # gamma, running_var, eps, weights: each of a channel that training has switched off
    "var 0": (1.0, 0.0, 1e-5, 0.5),
    "subnormal var": (1.0, 1e-41, 1e-5, 0.5),
    "var 0, small weights": (1.0, 0.0, 1e-5, 1e-25),
    "var 0, weights near the end": (1.0, 0.0, 1e-5, 3e-41),
    "subnormal var, subnormal weights": (1.0, 1e-41, 1e-5, 2e-42),
    "gamma subnormal": (1e-40, 1.0, 1e-5, 0.5),
    "gamma small, weights small": (1e-20, 1e-12, 1e-5, 1e-22),
    "large var": (1e-30, 1e30, 1e-5, 1e-3),
    "tiny eps": (1.0, 0.0, 1e-38, 1e-30),
    "subnormal eps": (1.0, 0.0, 1e-310, 1e-200),
    "subnormal var and eps": (1.0, 1e-41, 1e-42, 1e-20),
    "no eps": (1.0, 1e-41, 0.0, 1e-30),
    "nothing": (1.0, 0.0, 0.0, 0.5),
    "float64 subnormal gamma": (1e-310, 1.0, 1e-5, 0.5),
    "float64 subnormal product": (1e-160, 1.0, 1e-5, 1e-160),
}


@pytest.mark.parametrize("dtype", [*FLOATS, "bfloat16"])
@pytest.mark.parametrize("case", DEAD)
def test_a_dead_channel_gives_no_subnormal_number(case, dtype):
    """What is not flushed is right, and the channel beside it too."""
    gamma, var, eps, size = DEAD[case]
    bn = fastbn.BatchNorm(2, eps=eps, dtype="float64" if dtype == "float64" else "float32")
    bn.gamma[:], bn.running_var[:], bn.beta[:], bn.running_mean[:] = [gamma, 2], [var, 4], [1e-42, 3], [0, 1]
    weight = np.array([size * np.linspace(-3, 3, 13), np.linspace(-1, 1, 13)]).astype(dtype_of(dtype))
    normal = LEAST[dtype]
    folded = [fold_linear(weight, None, bn), fold_conv(weight.T[..., None], None, bn, layout="IOW", transposed=True)]
    np.testing.assert_array_equal(folded[0][0], folded[1][0][..., 0].T)
    mean, scale, beta = parameters(bn)
    for w, b in folded:
        w = w if w.ndim == 2 else w[..., 0].T
        for a in (w.astype("float64"), b.astype("float64")):
            assert np.isfinite(a).all()
            assert not ((a != 0) & (abs(a) < normal)).any(), a
        expected, part = weight.astype(WIDE) * scale[:, None], UNITS[dtype] + 4 * EPS64
        assert_within(w, expected, part * abs(expected) + normal, "weight")
        assert_within(b, beta - mean * scale, part * (abs(beta) + abs(mean * scale)) + normal, "bias")
        assert (w[1] != 0).sum() == 12


def test_the_dead_channels_are_dangerous():
    """With a plain product most of these cases have subnormal weights: else the test above would prove nothing."""
    dangerous = []
    for case, (gamma, var, eps, size) in DEAD.items():
        for dtype in FLOATS:
            scale = np.float64(gamma) * reference.invstd(np.float64(var), eps).astype("float64")
            w = (np.linspace(-3, 3, 13) * size).astype(dtype).astype("float64") * scale
            w = abs(w.astype(dtype).astype("float64"))
            dangerous += [(case, dtype)] if ((w > 0) & (w < LEAST[dtype])).any() else []
    assert {dtype for _, dtype in dangerous} == set(FLOATS)
    assert len({case for case, _ in dangerous}) >= 5, dangerous


def test_float16_keeps_its_own_subnormals():
    """They are normal numbers in float32, in which it is computed; a weight of 5e-5 is nothing unusual."""
    bn = fastbn.BatchNorm(1, eps=0)
    weight = np.array([[5e-5, 1e-6, 6e-8, 1e-3]], "float16")
    np.testing.assert_array_equal(fold_linear(weight, None, bn)[0], weight)


def test_nan_and_infinity_stay_in_their_channel(rng):
    bn, weight = layer(rng, 4), rng.normal(size=(4, 3)).astype("float32")
    good = fold_linear(weight, None, bn)
    bn.running_mean[0], bn.running_var[1], bn.gamma[2] = np.nan, np.nan, np.inf
    w, b = fold_linear(weight, None, bn)
    np.testing.assert_array_equal(w[[0, 3]], good[0][[0, 3]])  # the mean is in the bias alone
    assert np.isnan(w[1]).all()
    assert np.isinf(w[2]).all()
    assert list(np.isfinite(b)) == [False, False, False, True]
    assert b[3] == good[1][3]


def test_what_the_dtype_cannot_hold_is_infinite_without_a_warning():
    bn = fastbn.BatchNorm(1)
    bn.running_var[:] = 0
    w, b = fold_linear(np.array([[300, -300, 1]], "float16"), 300, bn)
    assert list(w[0]) == [np.inf, -np.inf, np.float16(1 / np.sqrt(1e-5))]
    assert b[0] == np.inf


# -------------------------------------------------------------------------------------------------------- real systems


def torch_modules():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    found = []
    for n, (outputs, inputs, groups) in itertools.product((1, 2, 3), CHANNELS):
        for kind, options in (("Conv", {"dilation": 2}), ("ConvTranspose", {"output_padding": 1})):
            found.append((getattr(torch.nn, f"{kind}{n}d"), getattr(torch.nn, f"BatchNorm{n}d"), inputs, outputs,
                          {"groups": groups, "kernel_size": 3, "stride": 2, "padding": 1, **options}))  # fmt: skip
    return torch, found


def like(torch_bn):
    """The layer of a PyTorch one."""
    bn = fastbn.BatchNorm(torch_bn.num_features, eps=torch_bn.eps, momentum=0.9, dtype="float64")
    bn.gamma[:], bn.beta[:] = torch_bn.weight.detach().numpy(), torch_bn.bias.detach().numpy()
    bn.running_mean[:], bn.running_var[:] = torch_bn.running_mean.numpy(), torch_bn.running_var.numpy()
    return bn


def randomized(torch, rng, bn):
    for a in (bn.weight, bn.bias, bn.running_mean):
        a.data = torch.from_numpy(rng.normal(size=a.shape))
    bn.running_var.data = torch.from_numpy(rng.uniform(0.1, 9, bn.running_var.shape))
    return bn.eval()


@pytest.mark.parametrize("with_bias", [True, False])
def test_pytorch(rng, with_bias):
    """Its modules as they are, with the folded weights put into them: stride, padding, dilation, output padding."""
    torch, modules = torch_modules()
    for make, norm, inputs, outputs, options in modules:
        module = make(inputs, outputs, bias=with_bias, dtype=torch.float64, **options)
        for a in module.parameters():
            a.data = torch.from_numpy(rng.normal(size=a.shape))
        bn = randomized(torch, rng, norm(outputs, dtype=torch.float64))
        x = torch.from_numpy(rng.normal(size=(2, inputs, *[7] * (module.weight.ndim - 2))))
        weight = module.weight.detach().numpy()
        bias = module.bias.detach().numpy() if with_bias else None
        transposed = "Transpose" in make.__name__
        layout = {3: "OIW", 4: "OIHW", 5: "OIDHW"}[weight.ndim]
        w, b = fold_conv(weight, bias, like(bn), layout=layout, groups=options["groups"], transposed=transposed)
        with torch.no_grad():
            expected = bn(module(x)).numpy()
            module.weight.data, module.bias = torch.from_numpy(w), torch.nn.Parameter(torch.from_numpy(b))
            found = module(x).numpy()
            # Each product and sum of either way bears a rounding, and the norm eight more.
            module.weight.data, module.bias.data = module.weight.data.abs(), 0 * module.bias.data
            terms = module(abs(x)).numpy()
        mean, scale, beta = (spread(abs(v), terms) for v in parameters(like(bn)))
        terms = terms + scale * (mean + (0 if bias is None else spread(abs(bias), terms))) + beta
        count = inputs // options["groups"] * w[0, 0].size
        assert_within(found, expected.astype(WIDE), 2 * (count + 8) * EPS64 * terms, f"{make.__name__} {options}")


def test_pytorchs_own_folding_where_it_is_right(rng):
    """It scales the wrong weights of a transposed convolution with groups, or fails."""
    torch, modules = torch_modules()
    from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

    def tensors(bn):
        return bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias

    compared = 0
    for make, norm, inputs, outputs, options in modules:
        transposed = "Transpose" in make.__name__
        if transposed and options["groups"] > 1:
            continue
        module = make(inputs, outputs, dtype=torch.float64, **options)
        bn = randomized(torch, rng, norm(outputs, dtype=torch.float64))
        expected = fuse_conv_bn_weights(module.weight, module.bias, *tensors(bn), transpose=transposed)
        weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
        layout = {3: "OIW", 4: "OIHW", 5: "OIDHW"}[weight.ndim]
        found = fold_conv(weight, bias, like(bn), layout=layout, groups=options["groups"], transposed=transposed)
        for a, t in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, t.detach().numpy(), rtol=8 * EPS64, atol=32 * EPS64)
        compared += 1
    assert compared == 15
    linear, bn = torch.nn.Linear(3, 5, dtype=torch.float64), torch.nn.BatchNorm1d(5, dtype=torch.float64)
    expected = fuse_linear_bn_weights(linear.weight, linear.bias, *tensors(randomized(torch, rng, bn)))
    found = fold_linear(linear.weight.detach().numpy(), linear.bias.detach().numpy(), like(bn))
    for a, t in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, t.detach().numpy(), rtol=8 * EPS64, atol=32 * EPS64)


KERAS = """
import numpy as np, keras, fastbn

keras.config.set_floatx("float64")
L, rng = keras.layers, np.random.default_rng(0)
for make, shape, options in [
    (lambda: L.Conv2D(6, 3, groups=2), (7, 7, 4), {"layout": "HWIO", "groups": 2}),
    (lambda: L.Conv2D(5, 3, use_bias=False), (7, 7, 4), {"layout": "HWIO"}),
    (lambda: L.Conv1D(5, 3), (7, 4), {"layout": "WIO"}),
    (lambda: L.Conv3D(5, 2), (4, 4, 4, 3), {"layout": "DHWIO"}),
    (lambda: L.Conv2DTranspose(5, 3, strides=2), (4, 4, 3), {"layout": "HWIO", "transposed": True}),
    (lambda: L.Conv2DTranspose(3, 3), (4, 4, 3), {"layout": "HWOI", "transposed": True}),
    (lambda: L.Conv1DTranspose(5, 3), (4, 3), {"layout": "WIO", "transposed": True}),
    (lambda: L.Conv3DTranspose(5, 2), (3, 3, 3, 2), {"layout": "DHWIO", "transposed": True}),
    (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 4), {"layout": "HWIO", "groups": 4}),
]:
    layer, x = make(), rng.normal(size=(2, *shape))
    channels = layer(x).shape[-1]
    if layer.use_bias:
        layer.bias.assign(rng.normal(size=channels))
    bn = fastbn.BatchNorm(channels, axis=-1, eps=1e-3, dtype="float64").eval()
    bn.gamma[:], bn.beta[:], bn.running_mean[:] = rng.normal(size=(3, channels))
    bn.running_var[:] = rng.uniform(0.1, 9, channels)
    y = bn(keras.ops.convert_to_numpy(layer(x)))
    kernel, *bias = layer.get_weights()
    depthwise = isinstance(layer, L.DepthwiseConv2D)
    weight = kernel.reshape(3, 3, 1, channels) if depthwise else kernel
    w, b = fastbn.fold_conv(weight, bias[0] if bias else None, bn, **options)
    layer.set_weights([w.reshape(kernel.shape), b] if bias else [w])
    found = keras.ops.convert_to_numpy(layer(x)) + (0 if bias else b)
    # At most 36 products of numbers near 1 with scales of at most 10: what is wrong is wrong in the first digit.
    assert abs(found - y).max() < 1e-11, (type(layer).__name__, options, abs(found - y).max())
    print(type(layer).__name__)
"""


@pytest.mark.jit("it is another process, which takes seconds to start")
def test_keras(tmp_path):
    """The kernels of its own layers, in the order that they have there; its batch norm has not float64's digits."""
    if not importlib.util.find_spec("keras"):
        pytest.skip("Keras is not installed: nothing to compare with")
    backends = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
    if not backends:
        pytest.skip("neither PyTorch nor JAX is installed: Keras has no backend for convolutions")
    printed = run_script(KERAS, KERAS_BACKEND=backends[0], KERAS_HOME=str(tmp_path))
    assert printed.split().count("Conv2DTranspose") == 2
    assert len(printed.split()) == 9


JAX = """
import jax, numpy as np, fastbn

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
x, kernel = rng.normal(size=(2, 4, 4, 3)), rng.normal(size=(3, 3, 3, 5))
bn = fastbn.BatchNorm(5, axis=-1, dtype="float64")
bn.gamma[:], bn.running_mean[:] = [1, -2, 3, -4, 5], [5, 4, 3, 2, 1]
up = lambda kernel: np.asarray(jax.lax.conv_transpose(x, kernel, (2, 2), "SAME"))
w, b = fastbn.fold_conv(kernel, None, bn, layout="HWIO")
error = abs(up(w) + b - bn.eval()(up(kernel))).max()
assert error < 1e-11, error
"""


@pytest.mark.jit("it is another process, which takes seconds to start")
def test_jax_has_the_axes_of_a_plain_convolution_in_a_transposed_one():
    """And so has Flax."""
    if not importlib.util.find_spec("jax"):
        pytest.skip("JAX is not installed: nothing to compare with")
    run_script(JAX, JAX_PLATFORMS="cpu")


# ---------------------------------------------------------------------------------------------------------- the how-to


def test_the_code_of_the_how_to_prints_what_its_comments_say():
    pages.check("how-to/inference.md")
