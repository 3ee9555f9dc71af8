"""The backward is the gradient of the forward: by differences of the forward itself, and by PyTorch's gradcheck."""

import numpy as np
import pytest
import reference
from arrays import SMALL, Case
from test_reference import difference

import fastbn

EPS = 0.1


def arrays(case):
    """Data in float64; no gamma is 0, so that a forward in place has a backward."""
    d = case.data(np.random.default_rng(3), "float64")
    d.gamma, d.beta, d.mean, d.var = (np.asarray(a) for a in (d.gamma, d.beta, d.mean, d.var))
    d.gamma[d.gamma == 0] = -0.7
    return d


# Each is (forward, backward): y of x, gamma and beta; and dx, dgamma, dbeta of dy. `d` has the given statistics.


def training(d, axis):
    options = {"axis": axis, "eps": EPS}

    def forward(x, gamma, beta):
        return fastbn.batch_norm_train(x, gamma, beta, **options)[0]

    def backward(dy, x, gamma, beta):
        return fastbn.batch_norm_backward(dy, fastbn.batch_norm_train(x, gamma, beta, **options)[1])

    return forward, backward


def training_in_place(d, axis):
    """y over x, and dx over dy."""
    options = {"axis": axis, "eps": EPS}

    def forward(x, gamma, beta):
        y = x.copy("K")
        return fastbn.batch_norm_train(y, gamma, beta, **options, out=y)[0]

    def backward(dy, x, gamma, beta):
        y, dx = x.copy("K"), dy.copy("K")
        _, saved = fastbn.batch_norm_train(y, gamma, beta, **options, out=y)
        return fastbn.batch_norm_backward(dx, saved, out=dx)

    return forward, backward


def inference(d, axis):
    options = {"axis": axis, "eps": EPS}

    def forward(x, gamma, beta):
        return fastbn.batch_norm(x, d.mean, d.var, gamma, beta, **options)

    def backward(dy, x, gamma, beta):
        return fastbn.batch_norm_backward(dy, fastbn.Saved.fixed(x, d.mean, d.var, gamma, beta, **options))

    return forward, backward


def inference_in_place(d, axis):
    """y over x, and dx over dy; the backward needs x, not y."""
    options = {"axis": axis, "eps": EPS}

    def forward(x, gamma, beta):
        y = x.copy("K")
        return fastbn.batch_norm(y, d.mean, d.var, gamma, beta, **options, out=y)

    def backward(dy, x, gamma, beta):
        dx = dy.copy("K")
        saved = fastbn.Saved.fixed(x, d.mean, d.var, gamma, beta, **options)
        return fastbn.batch_norm_backward(dx, saved, out=dx)

    return forward, backward


def layer(d, axis, train):
    bn = fastbn.BatchNorm(d.gamma.shape, axis=axis if isinstance(axis, tuple) else (axis,), eps=EPS, dtype="float64")
    bn.running_mean[...], bn.running_var[...] = d.mean, d.var

    def forward(x, gamma, beta):
        bn.train(train)
        bn.gamma[...], bn.beta[...] = gamma, beta
        return bn(x, save=True)

    def backward(dy, x, gamma, beta):
        forward(x, gamma, beta)
        return bn.backward(dy), bn.dgamma, bn.dbeta

    return forward, backward


def layer_in_training(d, axis):
    return layer(d, axis, train=True)


def layer_in_evaluation(d, axis):
    return layer(d, axis, train=False)


VERBS = [training, training_in_place, inference, inference_in_place]
MODES = [*VERBS, layer_in_training, layer_in_evaluation]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_by_differences(case, mode):
    """The loss is a sum with random weights dy. The differences have ten digits; a wrong formula has two."""
    d = arrays(case)
    forward, backward = mode(d, case.axis)

    def loss(x=d.x, gamma=d.gamma, beta=d.beta):
        return float((forward(x, gamma, beta) * d.dy).sum())

    found = backward(d.dy, d.x, d.gamma, d.beta)
    for i, (name, a) in enumerate((("x", d.x), ("gamma", d.gamma), ("beta", d.beta))):
        expected = difference(lambda a, name=name: loss(**{name: a}), a)
        np.testing.assert_allclose(found[i], expected, rtol=1e-9, atol=1e-9, err_msg=f"d{name}")


LAYOUTS = [
    Case("NCHW", (3, 2, 2, 2)),
    Case("NHWC", (3, 2, 2, 2), -1),
    Case("NHWC-as-NCHW", (3, 2, 2, 2), 1, (0, 2, 3, 1)),
    Case("ND", (4, 3)),
    Case("NCL", (3, 2, 3)),
    Case("NCDHW", (2, 2, 2, 1, 3)),
    Case("tuple", (3, 2, 2, 2), (1, 2)),
    Case("apart", (3, 2, 2, 2), (1, 3)),
    Case("all", (3, 4), ()),
    Case("long-runs", (2, 2, 9)),
]


@pytest.mark.parametrize("given", ["gamma, beta", ""])
@pytest.mark.parametrize("mode", VERBS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_by_gradcheck(case, mode, given):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: it brings gradcheck")
    d = arrays(case)
    forward, backward = mode(d, case.axis)

    class Function(torch.autograd.Function):
        """The verbs as an operation of PyTorch's."""

        @staticmethod
        def forward(ctx, *inputs):
            ctx.arrays = [None if t is None else t.detach().numpy() for t in inputs]
            return torch.from_numpy(forward(*ctx.arrays))

        @staticmethod
        def backward(ctx, dy):
            found = backward(dy.numpy(), *ctx.arrays)
            return tuple(
                None if a is None else torch.from_numpy(np.asarray(g)) for a, g in zip(ctx.arrays, found, strict=True)
            )

    inputs = [torch.from_numpy(d.x)] + [
        torch.from_numpy(getattr(d, name)) if name in given else None for name in ("gamma", "beta")
    ]
    for tensor in inputs:
        if tensor is not None:
            tensor.requires_grad_()
    assert torch.autograd.gradcheck(Function.apply, inputs, eps=1e-5, atol=1e-8, rtol=1e-7)


def with_parts(mode, d, axis, activation, where):
    """(forward, backward) of x, gamma, beta and residual, in one of the modes."""
    options = {"axis": axis, "eps": EPS, "activation": activation}

    def saved(x, gamma, beta, residual):
        if mode == "training":
            return fastbn.batch_norm_train(x, gamma, beta, **options, residual=residual, where=where)
        given = x, d.mean, d.var, gamma, beta
        return (
            fastbn.batch_norm(*given, **options, residual=residual),
            fastbn.Saved.fixed(*given, **options, residual=residual),
        )

    if mode in ("training", "inference"):
        return lambda *a: saved(*a)[0], lambda dy, *a: fastbn.batch_norm_backward(dy, saved(*a)[1])

    axis = axis if isinstance(axis, tuple) else (axis,)
    bn = fastbn.BatchNorm(d.gamma.shape, axis=axis, eps=EPS, dtype="float64", activation=activation)
    bn.running_mean[...], bn.running_var[...] = d.mean, d.var
    more = {"where": where} if mode == "layer in training" else {"save": True}

    def forward(x, gamma, beta, residual):
        bn.train(mode == "layer in training")
        bn.gamma[...], bn.beta[...] = gamma, beta
        return bn(x, residual=residual, **more)

    def backward(dy, *a):
        forward(*a)
        dx = bn.backward(dy)
        return dx, bn.dgamma, bn.dbeta, *([] if a[3] is None else [bn.dresidual])

    return forward, backward


# All parts at once: each set of parts is code of its own, and compiled.
PARTS = [
    ("training", "full bool"),
    ("training", "without bool"),
    ("training", "full float64"),
    ("training", "without float64"),
    ("inference", None),
    ("layer in training", "sample bool"),
    ("layer in evaluation", None),
]


@pytest.mark.parametrize(("mode", "kind"), PARTS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_parts_by_differences(case, mode, kind):
    """The gradients of elements without weight, too. No y is so near to 0 that a difference steps over the kink."""
    d, rng = arrays(case), np.random.default_rng(4)
    where = case.weights(rng, kind) if kind else None
    residual = case.residual(rng, "float64")
    options = {"axis": case.axis, "eps": EPS}
    if "training" in mode:
        before = reference.train(d.x, d.gamma, d.beta, **options, where=where).y
    else:
        before = reference.infer(d.x, d.mean, d.var, d.gamma, d.beta, **options).y
    residual += np.where(abs(before + residual) < 0.3, 1, 0)
    given = d.x, d.gamma, d.beta, residual
    forward, backward = with_parts(mode, d, case.axis, "relu", where)
    assert (forward(*given) == 0).any()
    found = backward(d.dy, *given)
    for i, name in enumerate(("dx", "dgamma", "dbeta", "dresidual")):
        expected = difference(lambda a, i=i: float((forward(*given[:i], a, *given[i + 1 :]) * d.dy).sum()), given[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-9, atol=1e-9, err_msg=name)
    assert len(found) == 4
