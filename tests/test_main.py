"""`python -m fastbn`: the table, the plot, the warm-up and the measuring behind them."""

import runpy
import subprocess
import sys

import numpy as np
import pytest

from fastbn import __main__ as cli
from fastbn import _measure, _peers, _plot, _threads

SMALL = ((8, 14, 2), (16, 7, 1))


@pytest.fixture(scope="module")
def layers():
    return list(_measure.measure(SMALL, rounds=1, peers=[_peers.NumPy(1)]))


def make_problem(layout):
    """With results that nobody has written yet."""
    rng = np.random.default_rng(1)
    x, dy, y, dx = (rng.normal(1, 2, _measure.BATCH * 8 * 14**2).astype(np.float32) for _ in range(4))
    y[:] = dx[:] = np.nan
    return _measure.problem(layout, 8, 14, x, dy, y, dx)


def test_every_operation_is_measured_and_right(layers):
    for layer in layers:
        for op in _measure.OPERATIONS:
            assert 0 <= layer.errors[op.key] <= cli.TOLERANCE
            assert all(layer.seconds[f"{who} {op.key}"] > 0 for who in ("fastbn", "fastbn fresh", "NumPy"))


@pytest.mark.parametrize("op", _measure.OPERATIONS, ids=lambda op: op.key)
def test_a_wrong_result_is_found(op):
    p = make_problem(op.layout)
    calls = dict(_measure._fastbn(p))
    for who in ("fastbn", "fastbn fresh"):
        result = calls[f"{who} {op.key}"]()
        result = result[0] if isinstance(result, tuple) else result
        assert np.shares_memory(result, p.dx if op.name == "backward" else p.y) == (who == "fastbn")
        assert _measure.error(op, p, result) <= cli.TOLERANCE
        result[0, 0, 0, 0] += 0.01
        assert _measure.error(op, p, result) > cli.TOLERANCE
    assert np.isnan(_measure.error(op, p, np.full_like(p.x, np.nan)))


@pytest.mark.parametrize("op", _measure.OPERATIONS, ids=lambda op: op.key)
def test_a_result_that_nobody_wrote_is_wrong(monkeypatch, capsys, op):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    right = _measure._fastbn
    monkeypatch.setattr(_measure, "_fastbn", lambda p: [*right(p), (f"fastbn {op.key}", lambda: None)])
    assert cli.main(["--rounds", "1", "--no-peers"]) == 1
    assert "results WRONG: largest error nan" in capsys.readouterr().out


def test_sums_and_ratios_weigh_layers_by_their_number(layers):
    a, b = layers
    assert (a.times, b.times) == (2, 1)
    assert _measure.table_sum(layers, "copy") == pytest.approx(2 * a.seconds["copy"] + b.seconds["copy"])
    op = _measure.OPERATIONS[1]
    limit = sum(_measure.table_sum(layers, name) for name in ("copy", "read"))
    assert _measure.ratio(layers, op) == pytest.approx(_measure.table_sum(layers, f"fastbn {op.key}") / limit)


def test_resnet50_has_53_layers():
    assert sum(times for _, _, times in _measure.RESNET50) == 53


@pytest.mark.parametrize("style", [[], ["--markdown"]])
def test_table(monkeypatch, capsys, style):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    assert cli.main(["--rounds", "1", "--no-peers", *style]) == 0
    out, err = capsys.readouterr()
    assert "results right" in out
    assert "train forward" in out
    assert "times NumPy" not in out
    assert "\033" not in out
    assert err == ""  # no progress line where stderr is no terminal


@pytest.mark.jit("plain Python is so slow that the times of a peer round to 0.0")
def test_table_and_plot_with_peers(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_peers, "PEERS", (_peers.NumPy, Half))
    monkeypatch.setitem(_plot.STYLES, "Half", ("black", "x"))
    path = tmp_path / "layers.svg"
    assert cli.main(["--rounds", "1", "--markdown", "--plot", str(path)]) == 0
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    head, *operations = rows[0], *rows[2:8]
    assert head[-3:] == ["times NumPy", "times Half", "error"]
    assert all(float(row[head.index("times NumPy")]) > 0 for row in operations)
    assert [row[-2] == "-" for row in operations] == [row[:2] != ["inference", "NCHW"] for row in operations]
    assert "Into given arrays: NumPy. With fresh outputs, as their users get them: Half." in out
    drawn = path.read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("limit", "fastbn", "NumPy", "Half", "backward, NHWC"))


def test_the_plot(layers, tmp_path):
    """A panel for each operation; a line for whoever can do it, the limit and fastbn first in the legend."""
    for name in ("layers.svg", "layers.png"):
        assert _plot.unable(tmp_path / name) is None
        _plot.save(layers, ["NumPy", "JAX"], tmp_path / name)  # no time of JAX's was taken
    drawn = (tmp_path / "layers.svg").read_text()
    labels = ["limit", "fastbn", "NumPy", *(f"{op.name}, {op.layout}" for op in _measure.OPERATIONS)]
    assert all(f"<!-- {label} -->" in drawn for label in [*labels, "8·14²", "16·7²"])
    assert "<!-- JAX -->" not in drawn
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_terminal_sees_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_measure, "measure", lambda layers, rounds, peers: given_layers())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(["--rounds", "1", "--no-peers"]) == 0
    lines = capsys.readouterr().err.split("\r\033[K")
    assert lines[0] == lines[-1] == ""
    assert lines[1].startswith("compiling")
    assert lines[2:-1] == ["layer 1 of 2: (32, 8, 14, 14)", "layer 2 of 2: (32, 16, 7, 7)"]


def test_threads(monkeypatch, capsys):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_measure, "measure", lambda layers, rounds, peers: given_layers())
    before = _threads._limit
    try:
        assert cli.main(["--threads", "1", "--rounds", "1", "--no-peers"]) == 0
        assert _threads._limit == 1
    finally:
        _threads.set_num_threads(before)
    out = capsys.readouterr().out
    assert ", 1 threads, " in out
    (row,) = (line for line in out.splitlines() if line.startswith("backward       NHWC"))
    assert row.split()[2:] == ["9900.0", "0.0", "triad", "+", "read2", "1.10", "1.05", "1.20", "2e-07"]


def test_warmup_says_what_it_did(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "warmup", lambda *given, progress: asked.append((*given, progress)))
    assert cli.main(["warmup", "--dtypes", "float64", "int8", "--axes", "1"]) == 0
    assert asked == [(["float64", "int8"], [1], False)]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("compiled for float64, int8 in ")
    assert second.startswith("cache folder: ")


def test_as_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastbn", "--rounds", "0"])
    monkeypatch.delitem(sys.modules, "fastbn.__main__")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("fastbn", run_name="__main__")
    assert "--rounds must be at least 1" in capsys.readouterr().err


def given_layers():
    """Two layers whose copy takes 1 and 2 s; fastbn a tenth more than the limit, fresh a fifth; NumPy 5 times that."""
    for channels, side, times, copy in ((8, 14, 2, 1.0), (16, 7, 1, 2.0)):
        seconds = {"copy": copy, "triad": 1.5 * copy, "read": 0.5 * copy, "read2": 0.75 * copy}
        layer = _measure.Layer(channels, side, times, seconds)
        for op in _measure.OPERATIONS:
            limit = sum(seconds[name] for name in op.limit)
            layer.seconds |= {f"fastbn {op.key}": 1.1 * limit, f"fastbn fresh {op.key}": 1.2 * limit}
            layer.seconds[f"NumPy {op.key}"] = 5.5 * limit
            layer.errors[op.key] = 1e-7 * copy
        layer.seconds["Half inference NCHW"] = 2.2 * copy
        yield layer


def test_the_figures_of_given_times(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_measure, "measure", lambda layers, rounds, peers: given_layers())
    monkeypatch.setattr(_peers, "PEERS", (_peers.NumPy, Half))
    monkeypatch.setitem(_plot.STYLES, "Half", ("black", "x"))
    path = tmp_path / "layers.svg"
    assert cli.main(["--markdown", "--plot", str(path)]) == 0
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    # 4 s of copies; 2 * 32 * 8 * 14**2 + 32 * 16 * 7**2 = 125,440 elements, two or three times 4 bytes.
    limits = {"copy": 4.0, "copy + read": 6.0, "triad": 6.0, "triad + read2": 9.0}
    head = [
        "operation",
        "layout",
        "ms",
        "GB/s",
        "limit",
        "ratio",
        "goal",
        "fresh",
        "times NumPy",
        "times Half",
        "error",
    ]
    assert rows[0] == head
    for row, op in zip(rows[2:8], _measure.OPERATIONS, strict=True):
        limit = " + ".join(op.limit)
        seconds = 1.1 * limits[limit]
        half = "2.0" if op.key == "inference NCHW" else "-"
        figures = [f"{1e3 * seconds:.1f}", "0.0", limit, "1.10", f"{op.goal:.2f}", "1.20", "5.0", half, "2e-07"]
        assert row == [op.name, op.layout, *figures]
    assert rows[10:] == [["8", "14", "2", "1000.00", "1.10", "1.65", "1.65", "2.48", "1.10", "1.10"],
                         ["16", "7", "1", "2000.00", "1.10", "1.65", "1.65", "2.48", "1.10", "1.10"]]  # fmt: skip
    assert "(in units of copy: copy 1.00, triad 1.50, read 0.50, read2 0.75)" in out
    assert "Into given arrays: NumPy. With fresh outputs, as their users get them: Half." in out
    assert "results right: largest error 2.0e-07" in out
    drawn = path.read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("limit", "fastbn", "NumPy", "Half", "backward, NHWC"))


class Half(_peers.Peer):
    """One operation in one layout."""

    name, package, fresh = "Half", "numpy", True

    def calls(self, p):
        if p.layout == "NCHW":
            yield "inference", lambda: p.x * 1.0


@pytest.mark.parametrize(
    ("path", "says"), [("layers.pdf", ".png or .svg"), ("nowhere/layers.png", "no folder nowhere"), ("a.png", "bench")]
)
def test_a_plot_that_cannot_be_is_refused_at_once(monkeypatch, capsys, path, says):
    if says == "bench":
        monkeypatch.setattr(_plot, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["--plot", path])
    assert says in capsys.readouterr().err


@pytest.mark.jit("nothing is compiled")
def test_warmup_compiles_everything_it_names():
    code = (
        "import numpy as np, fastbn\n"
        "from fastbn.__main__ import main\n"
        "assert main(['warmup', '--dtypes', 'float32', '--axes', '1']) == 0\n"
        "from fastbn import kernels\n"
        "ks = [kernels.forward.forward_runs, kernels.forward.forward_rows,\n"
        "      kernels.backward.backward_runs, kernels.backward.backward_rows]\n"
        "count = lambda: [len(b.signatures) for k in ks for b in (k.serial, k.parallel)]\n"
        "before = count()\n"
        "assert before == [1] * 8, before\n"
        "for shape in ((4, 3, 5, 5), (4, 3, 50, 50), (64, 64, 30, 30), (1000, 100, 2)):\n"
        "    y, saved = fastbn.batch_norm_train(np.ones(shape, np.float32))\n"
        "    fastbn.batch_norm_backward(y, saved)\n"
        "    fastbn.moments(y)\n"
        "assert count() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "compiled for float32" in done.stdout
