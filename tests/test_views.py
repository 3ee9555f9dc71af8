"""Any memory: for every awkward array every verb gives what it gives for a plain copy, and changes no byte of it.

The plain copy is dense, native and in the same memory order, so that the bits are promised to be the same; the oracle
says whether they are right. Results are new: they share memory with no input, nor with one another.
"""

import hashlib
import itertools

import numpy as np
import pytest
import reference
from arrays import FLOATS, HALVES, ORDERS, PAIRED_VIEWS, SINGLE_VIEWS, Case, View, memory, takes_results
from refusals import refused

import fastbn

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")

CASE = Case("NCHW", (4, 3, 5, 7))
OTHERS = [
    Case("NHWC", (4, 5, 7, 3), -1),
    Case("apart", (4, 3, 5, 2), (1, 3)),
    Case("ND", (6, 5)),
    Case("CN", (5, 6), 0),
    Case("length-1", (4, 1, 3, 1)),
    Case("one-sample", (1, 3, 4, 5)),
    Case("one-pixel", (9, 3, 1, 1)),
    Case("vector", (11,), ()),
    Case("whole", (3, 4, 5), ()),
    Case("no-samples", (0, 3, 5)),
    Case("no-channels", (4, 0, 5)),
    Case("no-pixels", (4, 3, 0)),
    Case("parallel", (5, 33, 20, 21)),
    Case("parallel-rows", (5, 20, 21, 33), -1),
    Case("pooled", (4, 8, 180, 183)),
]
ONE_VALUE = [Case("scalar", (), ()), Case("each", (2, 3), (0, 1)), Case("sample", (1, 4))]  # these cannot train
CELLS = Case("cells", (4, 3, 5, 2), (1, 2))
"""Of which parameters and statistics have two axes to be awkward in."""


def cannot(view, dtype):
    """Why there is no such array of a half, if so."""
    names = {*view.steps, *view.ends}
    if dtype in HALVES and "real-part" in names:
        return "there is no complex number of two halves"
    if dtype == "bfloat16" and names & {"interface", "buffer"}:
        return "NumPy describes bfloat16 to nobody: two bytes of no type"
    return ""


# Every order of axes where it costs nothing, a few elsewhere.
FEWER_VIEWS = [v for v in SINGLE_VIEWS if not {*v.steps} & {*ORDERS}]


def views(shape, of=SINGLE_VIEWS):
    return [v for v in of if v.fits(shape)]


def table(cases, of=FEWER_VIEWS):
    slow = pytest.mark.jit("so many values take minutes as plain Python")
    return [
        pytest.param(c, v, id=f"{c}-{v}", marks=slow if c.size > 50_000 else ())
        for c in cases
        for v in views(c.shape, of)
    ]


def plain(a):
    """The same values in the same memory order, in dense native memory of their own."""
    a = np.asarray(a)
    return np.asarray(a.copy("K"), a.dtype.newbyteorder("="))


def fingerprint(*arrays):
    """Of all bytes under the arrays, those between and around their elements included."""
    return [hashlib.sha256(memory(a)).hexdigest() for a in arrays]


def steps(a):
    """Where the axes lead, as far as they lead anywhere."""
    return [s for n, s in zip(a.shape, a.strides, strict=True) if n > 1] if a.size else []


def inference(x, d, axis):
    return {"inference": fastbn.batch_norm(x, d.mean, d.var, d.gamma, d.beta, axis=axis)}


def verbs(x, dy, d, axis):
    """All that the verbs compute from x and dy, by name."""
    y, saved = fastbn.batch_norm_train(x, d.gamma, d.beta, axis=axis)
    fixed = fastbn.Saved.fixed(x, d.mean, d.var, d.gamma, axis=axis)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, saved)
    fixed_dx, fixed_dgamma, fixed_dbeta = fastbn.batch_norm_backward(dy, fixed)
    m = fastbn.moments(x, axis=axis)
    return inference(x, d, axis) | {
        "y": y, "mean": m.mean, "m2": m.m2, "saved mean": saved.mean, "saved var": saved.var,
        "saved m2": saved.moments.m2, "saved moments' mean": saved.moments.mean,
        "dx": dx, "dgamma": dgamma, "dbeta": dbeta,
        "fixed dx": fixed_dx, "fixed dgamma": fixed_dgamma, "fixed dbeta": fixed_dbeta,
    }  # fmt: skip


def parts(x, dy, d, axis, z, w):
    """All that is computed with a residual, ReLU and weights, by name; last in a layer."""
    options = {"residual": z, "activation": "relu"}
    y, saved = fastbn.batch_norm_train(x, d.gamma, d.beta, axis=axis, where=w, **options)
    fixed = fastbn.Saved.fixed(x, d.mean, d.var, d.gamma, d.beta, axis=axis, **options)
    m = fastbn.moments(x, axis=axis, where=w)
    found = {
        "inference": fastbn.batch_norm(x, d.mean, d.var, d.gamma, d.beta, axis=axis, **options), "y": y,
        "count": m.count, "mean": m.mean, "m2": m.m2,
        "saved count": saved.count, "saved mean": saved.mean, "saved var": saved.var, "saved m2": saved.moments.m2,
    }  # fmt: skip
    gradients = ("dx", "dgamma", "dbeta", "dresidual")
    for kind, s in (("", saved), ("fixed ", fixed)):
        results = fastbn.batch_norm_backward(dy, s)
        found |= {f"{kind}{name}": a for name, a in zip(gradients, results, strict=True)}
    if 0 in d.mean.shape:
        return found
    bn = fastbn.BatchNorm(
        d.mean.shape, axis=axis if isinstance(axis, tuple) else (axis,), activation="relu", dtype=d.mean.dtype
    )
    for way in ("layer", "eval"):
        found[f"{way} y"] = bn.train(way == "layer")(x, residual=z, where=w, save=True)
        found[f"{way} dx"] = bn.backward(dy)
        found |= {f"{way} {name}": getattr(bn, name) for name in gradients[1:]}
    return found | {"running mean": bn.running_mean, "running var": bn.running_var}


def layer(x, dy, d, axis):
    """All that a layer computes, by name."""
    bn = fastbn.BatchNorm(d.mean.shape, axis=axis if isinstance(axis, tuple) else (axis,), dtype=d.mean.dtype)
    bn.gamma[...], bn.beta[...] = d.gamma, d.beta
    found = {"layer y": bn(x), "layer dx": bn.backward(dy), "layer dgamma": bn.dgamma, "layer dbeta": bn.dbeta}
    found |= {"running mean": bn.running_mean.copy(), "running var": bn.running_var.copy(), "eval y": bn.eval()(x)}
    if np.size(x):
        bn.fit_population([x, x])
    return found | {"population mean": bn.running_mean, "population var": bn.running_var}


def assert_same(found, expected, x, *others):
    """The same bits in new memory, in the memory order of x."""
    inputs = [memory(a) for a in (x, *others)]
    like = np.empty_like(np.asarray(x), dtype=reference.result_dtype(plain(x).dtype), subok=False)
    for name, a in found.items():
        np.testing.assert_array_equal(a, expected[name], err_msg=name)
        assert type(a) is np.ndarray, name
        assert a.dtype == expected[name].dtype, name
        assert a.dtype.isnative, name
        assert a.flags.writeable, name
        assert not any(np.shares_memory(a, i) for i in inputs), name
        if name.split()[-1] in ("y", "dx", "inference", "dresidual"):
            assert a.dtype == like.dtype, name
            assert steps(a) == steps(like), name
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert not np.shares_memory(a, b), (one, other)


def check(compute, x, dy, d, axis, *more):
    """Run over x, dy and what else there is, over plain copies, and twice: inputs as they were, results the same."""
    before = fingerprint(x, dy, *more)
    found = compute(x, dy, d, axis, *more)
    expected = compute(plain(x), plain(dy), d, axis, *map(plain, more))
    assert_same(found, expected, x, dy, *more)
    again = compute(x, dy, d, axis, *more)
    for name, a in again.items():
        assert not np.shares_memory(a, found[name]), name
        np.testing.assert_array_equal(a, expected[name], err_msg=name)
    assert fingerprint(x, dy, *more) == before
    return found


def assert_right(found, x, dy, d, axis, z=None, w=None):
    """What the verbs gave, or `parts` did, is within the error budget of the oracle."""
    x, dy, z, w = (None if a is None else plain(a) for a in (x, dy, z, w))
    options = {"axis": axis} if z is None else {"axis": axis, "residual": z.astype(x.dtype), "activation": "relu"}
    for name, expected in {
        "y": reference.train(x, d.gamma, d.beta, where=w, **options),
        "inference": reference.infer(x, d.mean, d.var, d.gamma, d.beta, **options),
    }.items():
        reference.assert_within(found[name], expected.y, expected.budget, name)
    for kind, fixed, y in (("", None, "y"), ("fixed ", (d.mean, d.var), "inference")):
        y = None if z is None else found[y]
        expected = reference.backward(dy.astype(x.dtype), x, d.gamma, axis=axis, fixed=fixed, where=w, y=y)
        if z is not None:
            np.testing.assert_array_equal(found[f"{kind}dresidual"], expected.dresidual.astype(x.dtype))
        for name in ("dx", "dgamma", "dbeta"):
            a, wanted, budget = found[kind + name], getattr(expected, name), getattr(expected, f"{name}_budget")
            if a.dtype != x.dtype:  # gradients have their parameter's dtype, and lists are float64
                budget = np.maximum(budget, reference.tolerance(a.dtype, abs(wanted)))
            reference.assert_within(a, wanted, budget, kind + name)


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES])
@pytest.mark.parametrize(("case", "view"), table([CASE], SINGLE_VIEWS))
def test_x_and_dy(rng, case, view, dtype):
    if reason := cannot(view, dtype):
        pytest.skip(reason)
    d = case.data(rng, dtype)
    for x, dy in ((view(d.x), d.dy), (d.x, view(d.dy)), (view(d.x), view(d.dy))):
        found = check(verbs, x, dy, d, case.axis)
        assert_right(found, x, dy, d, case.axis)
        check(layer, x, dy, d, case.axis)


@pytest.mark.parametrize(("case", "view"), table([CASE], PAIRED_VIEWS) + [
    pytest.param(c, v, id=f"{c}-{v}") for c in OTHERS[2:3] for v in views(c.shape, PAIRED_VIEWS) if "matrix" in v.ends
])  # fmt: skip
def test_x_and_dy_in_two_ways_at_once(rng, case, view):
    d = case.data(rng, "float32")
    x, dy = view(d.x), view(d.dy)
    found = check(verbs, x, dy, d, case.axis)
    assert_right(found, x, dy, d, case.axis)


@pytest.mark.parametrize(("case", "view"), table(OTHERS))
def test_other_shapes(rng, case, view):
    d = case.data(rng, "float32")
    x, dy = view(d.x), view(d.dy)
    found = check(verbs, x, dy, d, case.axis)
    if 0 < case.size < 1000:
        assert_right(found, x, dy, d, case.axis)
    if 0 not in case.channels:  # a layer has some
        check(layer, x, dy, d, case.axis)


@pytest.mark.parametrize(("case", "view"), table([CASE], SINGLE_VIEWS))
def test_residual_and_weights(rng, case, view):
    d = case.data(rng, "float32")
    z, w = case.residual(rng, "float32"), case.weights(rng, "full float32")
    for given in ((d.x, d.dy, view(z), w), (d.x, d.dy, z, view(w)), (view(d.x), view(d.dy), view(z), view(w))):
        x, dy, *more = given
        found = check(parts, x, dy, d, case.axis, *more)
        assert_right(found, x, dy, d, case.axis, *more)


@pytest.mark.parametrize(("case", "view"), table(OTHERS[:-3]))  # the large ones: `test_parts`
def test_residual_and_weights_of_other_shapes(rng, case, view):
    d = case.data(rng, "float32")
    z, w = (
        case.residual(rng, "float32"),
        case.weights(rng, "full float32" if "real-part" in view.steps else "full bool"),
    )
    found = check(parts, view(d.x), d.dy, d, case.axis, view(z), view(w))
    if 0 < case.size < 1000:
        assert_right(found, view(d.x), d.dy, d, case.axis, view(z), view(w))


# Weights of fewer axes than x has, or of length 1 in some: what broadcasts is looked at in many ways, too.
NARROW = [(4, 1, 1, 1), (4, 1, 5, 7), (1, 1, 5, 7), (3, 1, 1), (5, 1), (7,), (1, 1, 1, 1), (1,), ()]


@pytest.mark.parametrize(("shape", "view"), [
    pytest.param(s, v, id=f"{'x'.join(map(str, s)) or 'scalar'}-{v}") for s in NARROW for v in views(s, FEWER_VIEWS)
])  # fmt: skip
def test_weights_that_broadcast(rng, shape, view):
    d = CASE.data(rng, "float32")
    w = view(rng.uniform(0.5, 2, shape).astype("float64") * (rng.random(shape) < 0.8) if shape else np.float64(0.7))
    z = CASE.residual(rng, "float32")
    found = check(parts, d.x, d.dy, d, CASE.axis, z, w)
    assert_right(found, d.x, d.dy, d, CASE.axis, z, w)


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), CASE.shape], ids=str)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", ">i2", "uint64", *HALVES, ">f2", ">f4", ">f8"])
def test_weights_of_every_dtype(rng, dtype, shape):
    d = CASE.data(rng, "float32")
    w = rng.integers(0, 2 if dtype == "bool" else 90, shape).astype(dtype)
    z = CASE.residual(rng, "float32")
    found = check(parts, d.x, d.dy, d, CASE.axis, z, w)
    assert_right(found, d.x, d.dy, d, CASE.axis, z, w)


@pytest.mark.parametrize("dtype", [*HALVES, ">f2", ">f4", "float64", ">f8"])
def test_residuals_of_every_dtype(rng, dtype):
    """Converted to that of y, with the copy that reads them."""
    d = CASE.data(rng, "float32")
    z, w = CASE.residual(rng, dtype), np.True_
    found = check(parts, d.x, d.dy, d, CASE.axis, z, w)
    assert_right(found, d.x, d.dy, d, CASE.axis, z, w)


@pytest.mark.parametrize(("case", "view"), table(ONE_VALUE))
def test_inference_of_one_value_per_channel(rng, case, view):
    d = case.data(rng, "float32")
    check(lambda x, dy, d, axis: inference(x, d, axis), view(d.x), d.dy, d, case.axis)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
@pytest.mark.parametrize("view", views(CASE.shape, FEWER_VIEWS), ids=str)
def test_integers(rng, view, dtype):
    if "real-part" in view.steps:
        pytest.skip("integers are no part of a complex number")
    d = CASE.data(rng, dtype)
    check(verbs, view(d.x), d.dy, d, CASE.axis)


# ----------------------------------------------------------------------------------------------------------- outputs


def calls(d, x, dy, axis):
    """Each call that takes an `out`, and what it reads that may be it."""
    saved, given = fastbn.batch_norm_train(x, d.gamma, d.beta, axis=axis)[1], (d.mean, d.var, d.gamma, d.beta)
    bn = fastbn.BatchNorm(d.mean.shape, axis=axis if isinstance(axis, tuple) else (axis,), dtype=d.mean.dtype)
    bn(x)
    more = {"activation": "relu", "axis": axis}
    full = fastbn.batch_norm_train(x, d.gamma, d.beta, residual=dy, **more)[1]
    return {
        "batch_norm of a residual": (lambda z, out: fastbn.batch_norm(x, *given, residual=z, **more, out=out), dy),
        "batch_norm_train of a residual": (
            lambda z, out: fastbn.batch_norm_train(x, *given[2:], residual=z, **more, out=out)[0],
            dy,
        ),
        "batch_norm_backward of a residual": (
            lambda dy, out: fastbn.batch_norm_backward(dy, full, out=out)[0],
            dy,
        ),
        "batch_norm": (lambda x, out: fastbn.batch_norm(x, *given, axis=axis, out=out), x),
        "batch_norm_train": (lambda x, out: fastbn.batch_norm_train(x, *given[2:], axis=axis, out=out)[0], x),
        "batch_norm_backward": (lambda dy, out: fastbn.batch_norm_backward(dy, saved, out=out)[0], dy),
        "BatchNorm": (lambda x, out: bn(x, save=False, out=out), x),
        "BatchNorm.backward": (
            lambda dy, out: (bn.train()(x), bn.backward(dy, out=out))[1],
            dy,
        ),
    }


OUTS = [c for c in (CASE, *OTHERS[2:13]) if 0 not in c.channels]  # a layer has some


@pytest.mark.parametrize(("case", "view"), table(OUTS) + table([CASE], PAIRED_VIEWS))
def test_out_and_in_place(rng, case, view):
    """The memory between and around its elements stays as it was; what cannot be an `out` is refused untouched."""
    d = case.data(rng, "float32")
    for name, (call, given) in calls(d, d.x, d.dy, case.axis).items():
        out, place = view(np.full_like(d.x, 99)), view(given)
        if not takes_results(out):
            before = fingerprint(out)
            fn = "batch_norm_backward|BatchNorm.backward" if "backward" in name else "batch_norm(_train)?|BatchNorm"
            refused(lambda: call(given, out), fn, "out", (TypeError, ValueError))  # noqa: B023
            assert fingerprint(out) == before, name
            continue
        for of, to in ((given, out), (place, place)):
            expected, wanted = call(of, None), view(np.full_like(d.x, 99))
            assert call(of, to) is to, name
            wanted[...] = expected
            np.testing.assert_array_equal(np.asarray(to), expected, err_msg=name)
            np.testing.assert_array_equal(memory(to), memory(wanted), err_msg=f"{name}: memory that is not out's")


@pytest.mark.parametrize(("case", "view"), table([CASE], SINGLE_VIEWS))
def test_all_gradients_where_dx_overwrites_dy(rng, case, view):
    d = case.data(rng, "float32")
    place = view(d.dy)
    if not takes_results(place):
        pytest.skip("such an array receives no result")
    z, w = case.residual(rng, "float32"), case.weights(rng, "full float32")
    _, saved = fastbn.batch_norm_train(d.x, d.gamma, d.beta, residual=z, activation="relu", where=w)
    expected = fastbn.batch_norm_backward(d.dy, saved)
    found = fastbn.batch_norm_backward(place, saved, out=place)
    assert found[0] is place
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    assert not np.shares_memory(found[3], memory(place))


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("order", ORDERS)
def test_out_in_another_order_than_x_and_residual(rng, order, dtype):
    """One pass over memory, as from uint8 images in NHWC to NCHW, or with a copy: the values are the same."""
    d = CASE.data(rng, dtype)
    z = CASE.residual(rng, reference.result_dtype(dtype))
    given, options = (d.gamma, d.beta), {"residual": z, "activation": "relu"}
    inference = fastbn.batch_norm(d.x, d.mean, d.var, *given, **options, out=np.empty_like(z))
    train, saved = fastbn.batch_norm_train(d.x, *given, **options, out=np.empty_like(z))
    gradients = fastbn.batch_norm_backward(d.dy, saved)
    for other, third in zip(ORDERS, itertools.islice(itertools.cycle(ORDERS), 7, None)):  # noqa: B905
        x, z, out = View(steps=(other,))(d.x), View(steps=(third,))(z), View(steps=(order,))(np.full_like(z, np.nan))
        options["residual"] = z
        assert fastbn.batch_norm(x, d.mean, d.var, *given, **options, out=out) is out
        np.testing.assert_array_equal(out, inference, err_msg=f"x {other}, residual {third}")
        out.fill(np.nan)
        y, saved = fastbn.batch_norm_train(x, *given, **options, out=out)
        assert y is out
        # Sums go the way of the memory, and end in other bits of a double.
        np.testing.assert_allclose(out, train, rtol=1e-5, atol=1e-5, err_msg=f"x {other}, residual {third}")
        for a, b in zip(fastbn.batch_norm_backward(d.dy, saved), gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"x {other}, residual {third}")


# ------------------------------------------------------------------------------------------ parameters and statistics


CELL_VIEWS = [
    *(pytest.param(v, d, id=f"{v}-{d}") for d in FLOATS for v in views(CELLS.channels)),
    *(pytest.param(v, "float32", id=f"{v}-float32") for v in views(CELLS.channels, PAIRED_VIEWS)),
]


@pytest.mark.parametrize(("view", "dtype"), CELL_VIEWS)
def test_parameters(rng, view, dtype):
    d = CELLS.data(rng, dtype)
    names = ("mean", "var", "gamma", "beta")
    given = {name: view(getattr(d, name)) for name in names}
    before = fingerprint(*given.values())
    found = parameters(d, **given)
    expected = parameters(d, **{name: plain(a) for name, a in given.items()})
    for name, a in found.items():
        np.testing.assert_array_equal(a, expected[name], err_msg=name)
        assert a.dtype == expected[name].dtype, name
        assert not any(np.shares_memory(a, memory(g)) for g in given.values()), name
    assert fingerprint(*given.values()) == before


def parameters(d, mean, var, gamma, beta):
    """All that is computed from parameters and given statistics, by name."""
    axis = CELLS.axis
    y, saved = fastbn.batch_norm_train(d.x, gamma, beta, axis=axis)
    fixed = fastbn.Saved.fixed(d.x, mean, var, gamma, beta, axis=axis)
    m = fastbn.Moments(4, mean, var)
    bn = fastbn.BatchNorm(CELLS.channels, axis=axis, dtype=d.mean.dtype)
    state = {"gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var, "num_batches_tracked": 3}
    bn.load_state_dict(state)
    found = {"y": y, "inference": fastbn.batch_norm(d.x, mean, var, gamma, beta, axis=axis)}
    found |= dict(zip(("dx", "dgamma", "dbeta"), fastbn.batch_norm_backward(d.dy, saved), strict=True))
    names = ("fixed dx", "fixed dgamma", "fixed dbeta")
    found |= dict(zip(names, fastbn.batch_norm_backward(d.dy, fixed), strict=True))
    found |= {"m mean": m.mean, "m2": m.m2, "merged": (m + m).m2}
    found |= {"eval y": bn.eval()(d.x)} | {name: getattr(bn, name) for name in state if name[0] != "n"}
    return found


@pytest.mark.parametrize(("view", "dtype"), CELL_VIEWS)
def test_running_statistics(rng, view, dtype):
    """Moved in place, by the verb and by the layer, or refused untouched."""
    d = CELLS.data(rng, dtype)
    x, axis = d.x, CELLS.axis
    m = fastbn.moments(x, axis=axis)

    def by_verb(mean, var):
        fastbn.update_running(mean, var, m)

    def by_layer(mean, var):
        bn = fastbn.BatchNorm(CELLS.channels, axis=axis, dtype=dtype)
        bn.running_mean, bn.running_var = mean, var
        bn(x)

    for fn, move in (("update_running", by_verb), ("BatchNorm", by_layer)):
        mean, var = view(d.mean), view(d.var)
        if not takes_results(mean):
            before = fingerprint(mean, var)
            refused(lambda: move(mean, var), fn, "running_mean", (TypeError, ValueError))  # noqa: B023
            assert fingerprint(mean, var) == before
            continue
        wanted = view(d.mean), view(d.var)
        expected = plain(mean), plain(var)
        move(*expected)
        move(mean, var)
        for a, b, e in zip((mean, var), wanted, expected, strict=True):
            b[...] = e
            np.testing.assert_array_equal(memory(a), memory(b))


# -------------------------------------------------------------------------------------------------- the maker of views


def test_the_maker_makes_what_it_says():
    x = np.arange(420, dtype="float32").reshape(CASE.shape)
    of = {str(v): v(x) for v in views(CASE.shape)}
    assert not any(np.asarray(a).flags.c_contiguous for n, a in of.items() if n.startswith(("step", "neg", "broad")))
    assert sum(not np.asarray(a).flags.aligned for a in of.values()) >= 2
    assert of["big-endian"].dtype == ">f4"
    assert of["windows"].strides[-2:] == (4, 4)
    assert of["order-2031"].transpose(2, 0, 3, 1).flags.c_contiguous
    assert type(of["bytes"].base) is bytes
    assert [type(of[f"map-{mode}"]) for mode in ("read-only", "copy-on-write", "shared")] == [np.memmap] * 3
    assert not of["map-read-only"].flags.writeable
    assert View(steps=("length-1",))(np.ones((4, 1, 3))).strides == (24, 10**9 + 7, 8)
    for name, a in of.items():
        if not name.startswith(("broadcast", "windows")):
            np.testing.assert_array_equal(np.asarray(a), x, err_msg=name)
        assert (memory(a)[:64] == 0x5B).all(), name
