"""The tutorials: what their text says of the numbers that they print."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import fastbn

pytest.importorskip("sklearn")
matplotlib = pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[1] / "docs" / "tutorial"

pytestmark = pytest.mark.jit("2,000 steps of training take long as plain Python")


def run(script):
    """The names of a script, and the lines that it printed."""
    from matplotlib import pyplot

    before = pyplot.get_backend()
    pyplot.switch_backend("Agg")
    printed = io.StringIO()
    with matplotlib.rc_context(), contextlib.redirect_stdout(printed):
        names = runpy.run_path(str(FOLDER / script))
    pyplot.close("all")
    pyplot.switch_backend(before)
    return names, printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def tutorial():
    return run("plot_first_network.py")


def checked(names, layer):
    """The relative errors that the tutorial's gradient check prints, by parameter."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names["check"](names["network64"](layer), names["some"], names["labels"])
    rows = [line.split() for line in printed.getvalue().splitlines()[1:]]
    return {name: float(error) for name, _, _, error in rows}


def shares(lines, start):
    """The percentages in the one line that begins so."""
    (line,) = [line for line in lines if line.strip().startswith(start)]
    return [float(share) for share in re.findall(r"([\d.]+)%", line)]


def test_the_right_gradient_agrees_to_six_digits(tutorial):
    names, _ = tutorial
    errors = checked(names, fastbn.BatchNorm)
    assert errors.keys() == names["net"].parameters().keys()
    assert max(errors.values()) < 1e-6


def test_the_wrong_one_is_seen_where_the_text_says(tutorial):
    names, _ = tutorial
    errors = checked(names, names["Forgetful"])
    right = {"W3", "b", "gamma2", "beta2"}
    assert max(errors[name] for name in right) < 1e-6
    assert min(error for name, error in errors.items() if name not in right) > 0.1


def test_it_trains_all_the_same(tutorial):
    names, lines = tutorial
    (line,) = [line for line in lines if "term missing" in line]
    assert float(line.split("%")[0]) > 95
    weights = zip(names["wrong"].weights, names["net"].weights, strict=True)
    assert not any(np.array_equal(a, b) for a, b in weights)


def test_a_bias_is_taken_away_again(tutorial):
    _, lines = tutorial
    (moved,) = [line for line in lines if line.startswith("h moves by 5")]
    assert float(moved.split()[-1]) < 1e-5
    (gradient,) = [line for line in lines if line.startswith("dh is up to")]
    largest, total = re.fullmatch(r"dh is up to (\S+), its sum (\S+)", gradient).groups()
    assert float(total) < 1e-5 < 1 < float(largest)


def test_the_company_matters_in_training_mode_only(tutorial):
    _, lines = tutorial
    together, tens, alike = (shares(lines, way) for way in ("all together", "ten by ten", "digit by digit"))
    assert together[0] == tens[0] == alike[0] > 95
    assert together[1] > tens[1] + 2 > alike[1]
    assert alike[1] < 20  # chance
    (damaged,) = shares(lines, "then, 20 x ones")
    assert damaged < together[0] - 5


def test_evaluation_lags_at_first_and_not_at_last(tutorial):
    _, lines = tutorial
    start = lines.index("step  evaluation  training mode")
    steps = lines[start + 1 : start + 5]
    first, last = shares(steps, "3 "), shares(steps, "100 ")
    assert first[0] < first[1] - 10
    assert abs(last[0] - last[1]) < 1


def test_late_statistics_fail_and_exact_ones_mend_it(tutorial):
    _, lines = tutorial
    start = next(i for i, line in enumerate(lines) if "standard deviations off" in line)
    losses, evaluated, first, second, exact = lines[start - 2 : start + 3]
    assert float(losses.split()[1]) < 0.05
    assert float(evaluated.split("%")[0]) < 80 < 95 < float(exact.split("%")[0])
    assert float(first.split()[3]) > 0.5 > 0.1 > float(second.split()[3])


def test_batch_norm_is_there_sooner_and_does_not_fall_back(tutorial):
    names, lines = tutorial
    last = lines[lines.index("after steps            30    300") :]
    (without, at_last), (with_it, as_well) = (shares(last, name) for name in ("without batch norm", "with batch norm"))
    assert without < with_it - 10
    assert abs(at_last - as_well) < 1
    assert min(names["right"]["with batch norm"][30:]) > 0.9 > min(names["right"]["without batch norm"][30:])
    start = lines.index("a step moves the median of a unit by")
    without, with_it = (float(line.split()[0]) for line in lines[start + 1 : start + 3])
    assert without > 5 * with_it
    assert [int(line.split()[0]) > 0 for line in lines if "units cut off" in line] == [True, False]


def test_a_file_without_the_running_statistics_is_a_worse_network(tutorial):
    _, lines = tutorial
    assert "the same bits: True" in lines
    (kept,), (lost,) = (
        [float(li.split("%")[0]) for li in lines if li.endswith(end)] for end in ("running statistics", "% without")
    )
    assert lost < kept - 10


def test_what_is_shipped_computes_the_same(tutorial):
    names, _ = tutorial
    expected, found = names["expected"], names["predict"](names["x_test"])
    assert abs(found - expected).max() < 1e-5 * abs(expected).max()


def test_the_page_on_images():
    names, lines = run("plot_images.py")
    assert [line.rsplit(": ", 1)[1] for line in lines if ("same" in line or "copy" in line)] == [
        "True",
        "False",
        "True",
    ]
    assert abs(names["before"].mean(axis=(0, 1, 2), dtype=float)).max() < 1e-6  # forgotten eval: normalized by itself
    assert names["after"].mean(axis=(0, 1, 2)).min() > 0.3
    assert "statistics (3,) and wrong (427,)" in lines
    assert any(line.startswith("BatchNorm: x has channels (427,)") for line in lines)
    assert lines[-1] == "bytes from channel to channel: 1 4"
