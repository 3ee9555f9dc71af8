"""The example docs/examples/digits.py: its gradients, and what it promises to show."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

PATH = Path(__file__).parents[1] / "docs" / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_problem(digits, batch_norm, rows=12):
    rng = np.random.default_rng(3)
    net = digits.Network(batch_norm, rng, sizes=(5, 4, 6, 4, 3), dtype="float64")
    for group, around in ((net.weights, 0.0), (net.betas, 0.0), (net.gammas, 1.0)):
        for a in group:  # large enough that every gradient is well above the error of the differences
            a[...] = rng.normal(around, 0.7, a.shape)
    return net, rng.normal(size=(rows, 5)), rng.integers(0, 3, rows)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_are_those_of_finite_differences(digits, batch_norm):
    net, x, digit = small_problem(digits, batch_norm)
    grads = net.gradients(x, digit)[1]
    parameters = net.weights + net.betas + (net.gammas if batch_norm else [])
    assert {id(p) for p, _ in grads} == {id(p) for p in parameters}
    assert len(grads) == len(parameters)
    h = 1e-5
    for parameter, gradient in grads:
        assert gradient.shape == parameter.shape
        expected = np.empty_like(parameter)
        for i in np.ndindex(parameter.shape):
            kept = parameter[i]
            parameter[i] = kept + h
            above = net.gradients(x, digit)[0]
            parameter[i] = kept - h
            below = net.gradients(x, digit)[0]
            parameter[i] = kept
            expected[i] = (above - below) / (2 * h)
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.jit("300 steps of training take long as plain Python")
def test_running_statistics_serve_the_test(digits):
    net, x, digit = small_problem(digits, True, rows=1200)
    for _ in range(300):  # one batch again and again: its statistics become the running ones
        loss = net.gradients(x, digit)[0]
    scores, s = net.infer(x)
    # Not to the last digit: the running variance is unbiased, 1200/1199 of that which normalizes in training.
    assert np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(1200), digit]) == pytest.approx(loss, rel=1e-3)
    np.testing.assert_allclose(s.mean(axis=0), net.betas[-2], atol=2e-3)
    np.testing.assert_allclose(s.std(axis=0), np.abs(net.gammas[-1]), rtol=2e-3)


@pytest.mark.jit("300 steps of training take long as plain Python")
def test_batch_norm_is_ahead_and_the_figure_is_drawn(digits, tmp_path, capsys):
    path = tmp_path / "figure.png"
    digits.main([str(path), "--steps", "300"])
    rows = re.findall(r"^ *(\d+) +([\d.]+)% +([\d.]+)%$", capsys.readouterr().out, re.MULTILINE)
    step, plain, normed = np.array(rows, dtype=float).T
    np.testing.assert_array_equal(step, np.arange(0, 301, 25))
    assert ((plain >= 0) & (plain <= 100)).all()
    assert normed[0] < 30
    third = step >= 100
    assert (normed[third] > 85).all()
    assert (normed[third] > plain[third] + 30).all()
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_figure_has_ink_in_all_three_panels(digits, tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    rng = np.random.default_rng(0)
    tests = np.arange(0, 90, 3)
    path = tmp_path / "figure.png"
    spread = np.sort(rng.normal(size=(2, 30, 3, 100)), axis=2)
    digits.draw(path, tests, rng.random((2, 30)), spread, "setting")
    image = imread(path)[:, :, :3]
    left, right = np.split(image, [int(image.shape[1] * 0.42)], axis=1)
    middle, right = np.split(right, [right.shape[1] // 2], axis=1)

    def pixels(part, colour):
        return np.count_nonzero(np.abs(part - to_rgb(colour)).max(axis=2) < 0.02)

    drawn = [[pixels(part, c) > 500 for c in (digits.PLAIN, digits.NORMED)] for part in (left, middle, right)]
    assert drawn == [[True, True], [True, False], [False, True]]


def test_typical_is_the_middling_one(digits):
    spread = np.zeros((4, 3, 5))
    spread[:, 1] = np.outer([0, 1, 3, 2], [5, 1, 4, 2, 3])  # the medians of five sigmoids
    np.testing.assert_array_equal(digits.typical(spread)[:, 1], [0, 3, 9, 6])


@pytest.mark.parametrize(("args", "message"), [(["--steps", "0"], "--steps"), (["no/such/figure.png"], "no folder")])
def test_mistakes_are_told_before_training(digits, args, message, capsys):
    with pytest.raises(SystemExit):
        digits.main(args)
    assert message in capsys.readouterr().err
