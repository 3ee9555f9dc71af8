"""Refusals of good values that do not go together, and what they say; the grid of bad values: test_bad_calls."""

import warnings

import numpy as np
import pytest
from refusals import refused

import fastbn
from fastbn import _check

SHAPE, C = (4, 3, 5), 3


def x():
    return np.random.default_rng(1).normal(size=SHAPE).astype("float32")


def test_the_message_says_what_it_has_and_what_was_expected():
    with pytest.raises(ValueError, match=r"batch_norm_train: gamma has shape \(2,\), expected \(3,\).*\(4, 3, 5\)"):
        fastbn.batch_norm_train(x(), np.ones(2))
    with pytest.raises(TypeError, match=r"moments: x has dtype complex64, expected float16"):
        fastbn.moments(np.ones(3, "complex64"))
    with pytest.raises(ValueError, match=r"batch_norm: var is -2 at \(1,\)"):
        fastbn.batch_norm(x(), 0, [1, -2, 1])
    with pytest.raises(
        ValueError, match=r"^batch_norm: axis 5 is out of range for x of shape \(4, 3, 5\), expected -3 to 2$"
    ):
        fastbn.batch_norm(x(), 0, 1, axis=5)


@pytest.mark.parametrize(("shape", "axis"), [((1, 3), 1), ((3,), 0), ((1, 3, 1, 1), 1), ((2, 3), (0, 1)), ((1,), ())])
def test_one_value_per_channel_cannot_train(shape, axis):
    out = np.full(shape, 7.0)
    call = lambda: fastbn.batch_norm_train(np.ones(shape), axis=axis, out=out)  # noqa: E731
    assert "one value per channel" in refused(call, "batch_norm_train", "x", ValueError)
    assert (out == 7).all()


def test_gamma_0_in_place_has_no_backward():
    a, out = x(), np.full(SHAPE, 7, "float32")
    _, saved = fastbn.batch_norm_train(a, [1, 0, 2], out=a)
    refused(lambda: fastbn.batch_norm_backward(a, saved, out=out), "batch_norm_backward", "gamma", ValueError)
    assert (out == 7).all()


def test_moments_add_to_nothing_else():
    m = fastbn.moments(x())
    for other in (1, 1.0, None, (m,)):
        with pytest.raises(TypeError):
            m + other
        with pytest.raises(TypeError):
            other + m


def test_dx_over_the_saved_x_is_refused(rng):
    """Even where dy is x itself, which dx may overwrite: the next backward would need x."""
    x = rng.normal(size=(6, 3))
    _, saved = fastbn.batch_norm_train(x)
    before = x.copy()
    with pytest.raises(ValueError, match="batch_norm_backward: out shares memory with x"):
        fastbn.batch_norm_backward(x, saved, out=x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("name", ["mean", "var", "gamma", "beta"])
def test_an_out_over_a_parameter_is_refused(rng, name):
    out = np.ones((6, 3))
    parameters = dict.fromkeys(("mean", "var", "gamma", "beta"), 1.0) | {name: out[2]}
    with pytest.raises(ValueError, match=f"out shares memory with {name}"):
        fastbn.batch_norm(rng.normal(size=(6, 3)), **parameters, out=out)
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["warmup", "--dtypes", "foo"], "warmup: dtypes has 'foo', expected float16, "),
        (["warmup", "--axes", "9"], "warmup: axes has 9, expected -4 to 3\n"),
        (["--threads", "0"], "--threads is 0, expected at least 1\n"),
        (["--rounds", "-1"], "--rounds is -1, expected at least 1\n"),
    ],
)
def test_the_command_line_refuses_without_a_traceback(capsys, arguments, message):
    from fastbn.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"error: {message}" in capsys.readouterr().err


def test_an_overlap_that_is_too_hard_to_decide_counts_as_one(monkeypatch):
    def undecided(*arrays, max_work):
        assert max_work == 100_000
        raise np.exceptions.TooHardError

    memory = np.ones((12, 3))
    a, out = memory[::2], memory[1::2]
    assert fastbn.batch_norm(a, 0, 1, out=out) is out  # they interleave, and share nothing
    monkeypatch.setattr(np, "shares_memory", undecided)
    with pytest.raises(ValueError, match="batch_norm: out shares memory with x"):
        fastbn.batch_norm(a, 0, 1, out=out)


@pytest.mark.parametrize("one", [1, 1.0, np.int64(1), np.float32(1), np.array(1)])
def test_a_correction_may_be_any_number_that_is_0_or_1(one):
    found = _check.correction("fn", one)
    assert (found, type(found)) == (1, int)
    found = _check.correction("fn", one - 1)
    assert (found, type(found)) == (0, int)


def test_what_a_forward_saved_cannot_be_exchanged():
    """The kernels go by the sizes that x had."""
    a = x()
    _, saved = fastbn.batch_norm_train(a)
    with pytest.raises(AttributeError):
        saved.x = a[:2].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy deprecates it
        a.shape = (2, 6, 5)
    with pytest.raises(ValueError, match=r"^batch_norm_backward: saved.x has .*\(2, 6, 5\).*, expected .*\(4, 3, 5\)"):
        fastbn.batch_norm_backward(np.ones((2, 6, 5)), saved)


def test_a_layer_refuses_to_write_over_its_statistics():
    bn, memory = fastbn.BatchNorm(5), np.zeros((4, 5), "float32")
    bn.running_mean = memory[0]
    with pytest.raises(ValueError, match=r"^BatchNorm: out shares memory with running_mean, expected"):
        bn(np.ones((4, 5), "float32"), out=memory)
    bn.running_mean, bn.num_batches_tracked = np.zeros(5, "float32"), None
    with pytest.raises(TypeError, match=r"^BatchNorm: num_batches_tracked is None, expected an int"):
        bn(np.ones((4, 5), "float32"), out=memory)
    assert not memory.any()
