"""`python -m fastbn`: the table, the plot, the warm-up and the measuring behind them."""

import runpy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from fastbn import __main__ as cli
from fastbn import _measure, _peers, _plot, _threads, batch_norm_backward, batch_norm_train

SMALL = ((8, 14, 2), (16, 7, 1))
TINY = ((8, 7, 2), (16, 3, 1))
HALVES = [d.name for d in _measure._halves()]
# bfloat16 is there only with the package that brings it.
PARTS = [op for op in _measure.PARTS if op.part not in set(_measure.HALVES) - set(HALVES)]
ALL = [*_measure.OPERATIONS, *PARTS]


@pytest.fixture(scope="module", autouse=True)
def little_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_measure, "IMAGES", (_measure.BATCH, 6, 6, 3))
        yield


@pytest.fixture(scope="module")
def layers():
    """The second is too small for half precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_measure, "LARGE", 4 * _measure.BATCH * 8 * 7**2)
        return list(_measure.measure(TINY, rounds=1, peers=[_peers.NumPy(1)], parts=True))


def make_problem(op):
    """With results that nobody has written yet, and the calls for it."""
    rng = np.random.default_rng(1)
    x, dy, y, dx, z = (rng.normal(1, 2, _measure.BATCH * 8 * 5**2).astype(np.float32) for _ in range(5))
    p = _measure.problem(op.layout, 8, 5, x, dy, y, dx, z)
    calls = dict([*_measure._fastbn(p), *_measure._parts(p)])
    if op.part in _measure.HALVES:
        (dtype,) = (d for d in _measure._halves() if d.name == op.part)
        p = _measure.halved(p, x.astype(dtype))
        calls[f"fastbn {op.key}"] = partial(batch_norm_train, p.x, p.gamma, p.beta, out=p.y)
    p.y.fill(np.nan)
    p.dx.fill(np.nan)
    return p, calls


def test_every_operation_is_measured_and_right(layers):
    for layer in layers:
        for op in _measure.OPERATIONS:
            assert 0 <= layer.errors[op.key] <= cli.TOLERANCE
            assert all(layer.seconds[f"{who} {op.key}"] > 0 for who in ("fastbn", "fastbn fresh", "NumPy"))
        for op in PARTS:
            if op.part in HALVES and layer is layers[1]:
                assert f"fastbn {op.key}" not in layer.seconds
                continue
            assert 0 <= layer.errors[op.key] <= cli.TOLERANCE
            assert layer.seconds[f"fastbn {op.key}"] > 0


def test_images_are_measured_and_right():
    layer = _measure.measure_images(rounds=1)
    assert layer.elements == np.prod(_measure.IMAGES)
    assert layer.seconds.keys() == {"copy", *(f"fastbn {op.key}" for op in _measure.OF_IMAGES)}
    assert min(layer.seconds.values()) > 0
    assert layer.errors.keys() == {op.key for op in _measure.OF_IMAGES}
    assert 0 < min(layer.errors.values()) <= max(layer.errors.values()) <= cli.TOLERANCE


def test_images_are_normalized_into_both_layouts(monkeypatch):
    asked = []
    monkeypatch.setattr(_measure, "batch_norm", lambda x, *_, out, **__: asked.append((x, out)) or out)
    layer = _measure.measure_images(rounds=1)
    assert np.isnan([*layer.errors.values()]).all(), "nothing was written"
    for op, (x, y) in zip(_measure.OF_IMAGES, asked[:2], strict=True):
        assert (x.dtype, y.dtype, x.shape, y.shape) == (np.uint8, np.float32, _measure.IMAGES, _measure.IMAGES)
        assert x.flags.c_contiguous
        assert (y if op.layout == "NHWC" else np.moveaxis(y, -1, 1)).flags.c_contiguous


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.key)
def test_a_wrong_result_is_found(op):
    p, calls = make_problem(op)
    for who in ("fastbn", "fastbn fresh") if op in _measure.OPERATIONS else ("fastbn",):
        found = _measure.results(op, calls[f"{who} {op.key}"]())
        given = {"backward": [p.dx], "pair": [p.y, p.dx]}.get(op.name, [p.y])
        for result, out in zip(found, given, strict=False):
            assert np.shares_memory(result, out) == (who == "fastbn")
        assert len(found) == len(given) + (op.part == _peers.RELU and op.name != "train forward")
        assert 0 <= _measure.error(op, p, found) <= cli.TOLERANCE
        for result in found:
            right = result[1, 2, 3, 1]
            result[1, 2, 3, 1] += 0.2 if op.part in HALVES else 0.01
            assert _measure.error(op, p, found) > cli.TOLERANCE
            result[1, 2, 3, 1] = np.nan
            assert np.isnan(_measure.error(op, p, found))
            result[1, 2, 3, 1] = right


@pytest.mark.parametrize("op", [op for op in PARTS if op.part not in HALVES], ids=lambda op: op.key)
def test_a_part_that_was_left_out_is_found(op):
    p, _ = make_problem(op)
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, axis=p.axis)
    dx = batch_norm_backward(p.dy, saved)[0]
    plain = {"backward": [dx, p.dy], "pair": [y, dx, p.dy]}.get(op.name, [y])
    assert _measure.error(op, p, plain) > 1e3 * cli.TOLERANCE


def test_half_precision_is_held_to_its_one_rounding():
    for op in (op for op in PARTS if op.part in HALVES):
        p, calls = make_problem(op)
        (y,) = _measure.results(op, calls[f"fastbn {op.key}"]())
        assert y.dtype == op.part
        twice = y.astype(np.float32) * np.float32(1 + 2**-6)  # more than an ulp of either
        assert _measure.error(op, p, [twice.astype(y.dtype)]) > 1e3 * cli.TOLERANCE


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_masks_take_three_of_four_samples_or_positions(layout):
    p, _ = make_problem(_measure.OPERATIONS[layout == "NHWC"])
    sample, position = (_measure.mask(part, p) for part in _measure.MASKS)
    assert sample.shape == (32, 1, 1, 1)
    assert position.shape == ((32, 1, 5, 5) if layout == "NCHW" else (32, 5, 5, 1))
    assert (sample.dtype, position.dtype) == (bool, bool)
    assert (sample.sum(), position.sum()) == (24, 24 * 5**2)


def test_without_its_package_there_is_no_bfloat16(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # importing it fails
    monkeypatch.setattr(_measure, "LARGE", 0)
    (layer,) = _measure.measure(((1, 3, 1),), rounds=1, parts=True)
    assert {op.part for op in _measure.PARTS if f"fastbn {op.key}" not in layer.seconds} == {"bfloat16"}
    _, rows = cli._rows([layer], _measure.PARTS, [])
    assert [row[0] for row in rows] == [op.title for op in _measure.PARTS if op.part != "bfloat16"]


def test_without_parts_there_are_none():
    (layer,) = _measure.measure(((1, 3, 1),), rounds=1)
    assert layer.errors.keys() == {op.key for op in _measure.OPERATIONS}


@pytest.mark.parametrize("op", _measure.OPERATIONS, ids=lambda op: op.key)
def test_a_result_that_nobody_wrote_is_wrong(monkeypatch, capsys, op):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    right = _measure._fastbn

    def operations(p):
        unwritten = [(f"fastbn {op.key}", lambda: p.dx if op.name == "backward" else p.y)]
        return [*right(p), *(unwritten if p.layout == op.layout else [])]

    monkeypatch.setattr(_measure, "_fastbn", operations)
    assert cli.main(["--rounds", "1", "--no-peers", "--no-parts"]) == 1
    assert "results WRONG: largest error nan" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["_parts", "measure_images"])
def test_a_part_that_nobody_wrote_is_wrong(monkeypatch, capsys, module):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    right = getattr(_measure, module)

    def parts(p):
        return [*right(p), (f"fastbn pair, residual, ReLU {p.layout}", lambda: (p.y, p.dx, p.dx))]

    def images(rounds):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_measure, "batch_norm", lambda *_, out, **__: out)
            return right(rounds)

    monkeypatch.setattr(_measure, module, parts if module == "_parts" else images)
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


@pytest.mark.parametrize("style", [[], ["--markdown"], ["--no-parts"]])
def test_table(monkeypatch, capsys, style):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    assert cli.main(["--rounds", "1", "--no-peers", *style]) == 0
    out, err = capsys.readouterr()
    assert "results right" in out
    assert "train forward" in out
    for part in ("residual", "mask", "uint8"):
        assert (part in out) == ("--no-parts" not in style)
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
    pairs = [f"{op.title}, {op.layout}" for op in PARTS if op.name == "pair"]
    assert all(f"<!-- {label} -->" in drawn for label in [*labels, *pairs, "8·7²", "16·3²"])
    assert "<!-- JAX -->" not in drawn
    assert "mask" not in drawn
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_terminal_sees_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_measure, "measure", lambda layers, rounds, peers, parts: given_layers(parts))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert cli.main(["--rounds", "1", "--no-peers", "--no-parts"]) == 0
    lines = capsys.readouterr().err.split("\r\033[K")
    assert lines[0] == lines[-1] == ""
    assert lines[1].startswith("compiling")
    assert lines[2:-1] == ["layer 1 of 2: (32, 8, 14, 14)", "layer 2 of 2: (32, 16, 7, 7)"]


def test_threads(monkeypatch, capsys):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_measure, "measure", lambda layers, rounds, peers, parts: given_layers(parts))
    before = _threads._limit
    try:
        assert cli.main(["--threads", "1", "--rounds", "1", "--no-peers", "--no-parts"]) == 0
        assert _threads._limit == 1
    finally:
        _threads.set_num_threads(before)
    out = capsys.readouterr().out
    assert ", 1 threads, " in out
    (row,) = (line for line in out.splitlines() if line.startswith("backward       NHWC"))
    assert row.split()[2:] == ["9900.0", "0.0", "triad", "+", "read2", "1.10", "1.05", "1.20", "2e-07"]


def test_warmup_says_what_it_did(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "warmup", lambda *given, parts, progress: asked.append((*given, parts, progress)))
    assert cli.main(["warmup", "--dtypes", "float64", "int8", "--axes", "1"]) == 0
    assert cli.main(["warmup", "--parts", "where", "residual+activation"]) == 0
    assert asked == [
        (["float64", "int8"], [1], [], False),
        (["float32"], [1, -1], ["where", "residual+activation"], False),
    ]
    first, second, third, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("compiled for float64, int8 in ")
    assert second.startswith("cache folder: ")
    assert third.startswith("compiled for float32, also with where, residual+activation in ")


def test_as_a_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastbn", "--rounds", "0"])
    monkeypatch.delitem(sys.modules, "fastbn.__main__")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("fastbn", run_name="__main__")
    assert "--rounds is 0, expected at least 1" in capsys.readouterr().err


def given_layers(parts=False):
    """Two layers whose copy takes 1 and 2 s; fastbn a tenth more than the limit, fresh a fifth; NumPy 5 times that.

    Parts take twice their unit, those of half precision half; only the second layer has them.
    """
    for channels, side, times, copy in ((8, 14, 2, 1.0), (16, 7, 1, 2.0)):
        seconds = {"copy": copy, "triad": 1.5 * copy, "read": 0.5 * copy, "read2": 0.75 * copy}
        layer = _measure.Layer(channels, side, times, seconds)
        for op in _measure.OPERATIONS:
            limit = sum(seconds[name] for name in op.limit)
            layer.seconds |= {f"fastbn {op.key}": 1.1 * limit, f"fastbn fresh {op.key}": 1.2 * limit}
            layer.seconds[f"NumPy {op.key}"] = 5.5 * limit
            layer.errors[op.key] = 1e-7 * copy
        layer.seconds["Half inference NCHW"] = 2.2 * copy
        for op in _measure.PARTS if parts else ():
            if op.part not in _measure.HALVES or copy == 2.0:
                factor = 0.5 if op.part in _measure.HALVES else 2.0
                layer.seconds[f"fastbn {op.key}"] = factor * sum(layer.seconds[name] for name in op.limit)
                layer.errors[op.key] = 1e-8
                if op.name == "pair":
                    layer.seconds[f"Half {op.key}"] = 3.2 * layer.seconds[f"fastbn {op.key}"]
        yield layer


def given_images(rounds):
    """A copy takes a second, the NCHW result a half, the NHWC one a quarter."""
    keys = [op.key for op in _measure.OF_IMAGES]
    seconds = {"copy": 1.0, f"fastbn {keys[0]}": 0.5, f"fastbn {keys[1]}": 0.25}
    return _measure.Layer(3, 6, 1, seconds, dict.fromkeys(keys, 1e-8))


def test_the_figures_of_given_times(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_measure, "measure", lambda layers, rounds, peers, parts: given_layers(parts))
    monkeypatch.setattr(_measure, "measure_images", given_images)
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
    head = ["operation", "layout", "ms", "GB/s", "limit", "ratio", "goal", "times Half", "error"]
    assert rows[8] == head
    fused, halves, masked, images = rows[10:16], rows[16:18], rows[18:22], rows[22:24]
    # Of the six, in copies: triad 1.5, read 0.5, read2 0.75, and two copies.
    units = [1.5, 2.0, 2.0, 2.75, 3.5, 4.75]
    names = ["train forward", "train forward", "backward", "backward", "pair", "pair"]
    for i, (row, unit) in enumerate(zip(fused, units, strict=True)):
        limit = ["triad", "triad + read", "copy + copy", "copy + copy + read2", "triad + copy + copy",
                 "triad + read + copy + copy + read2"][i]  # fmt: skip
        figures = [f"{2 * 4 * unit * 1e3:.1f}", "0.0", limit, "2.00", "-" if i else "1.15", "3.2" if i > 3 else "-"]
        assert row == [f"{names[i]}, residual, ReLU", ["NCHW", "NHWC"][i % 2], *figures, "1e-08"]
    for row, half in zip(halves, ("float16", "bfloat16"), strict=True):  # of 2.2 s; the other layer is too small
        figures = ["1100.0", "0.0", "train forward", "0.50", "0.60", "-", "1e-08"]
        assert row == [f"train forward, {half}", "NCHW", *figures]
    for i, row in enumerate(masked):
        name = ["mask per sample", "mask per position"][i // 2]
        ms = ["8800.0", "13200.0"][i % 2]
        figures = [ms, "0.0", "train forward", "2.00", "1.30", "-", "1e-08"]
        assert row == [f"train forward, {name}", ["NCHW", "NHWC"][i % 2], *figures]
    assert images == [["inference, uint8", "NCHW", "500.0", "0.0", "copy", "0.50", "-", "-", "1e-08"],
                      ["inference, uint8", "NHWC", "250.0", "0.0", "copy", "0.25", "-", "-", "1e-08"]]  # fmt: skip
    assert rows[26:] == [["8", "14", "2", "1000.00", "1.10", "1.65", "1.65", "2.48", "1.10", "1.10"],
                         ["16", "7", "1", "2000.00", "1.10", "1.65", "1.65", "2.48", "1.10", "1.10"]]  # fmt: skip
    assert "(in units of copy: copy 1.00, triad 1.50, read 0.50, read2 0.75)" in out
    assert "Into given arrays: NumPy. With fresh outputs, as their users get them: Half." in out
    assert "results right: largest error 2.0e-07" in out
    drawn = path.read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("limit", "fastbn", "NumPy", "Half", "backward, NHWC"))


class Half(_peers.Peer):
    """One operation in one layout (and a pair in both, where the times are given)."""

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


# What a call may have besides, as warmup names it, and how many kinds of argument each kernel then meets: fused tiles,
# split ones, given statistics; an inference keeps no bits of the signs of y, but a frozen forward does.
KINDS = {
    "": [3, 3],
    "residual+activation": [7, 6],
    "where": [5, 5],
}


@pytest.mark.jit("nothing is compiled")
@pytest.mark.parametrize("parts", KINDS)
def test_warmup_compiles_everything_it_names(parts):
    forward, backward = KINDS[parts]
    code = (
        "import numpy as np, fastbn\n"
        "from fastbn.__main__ import main\n"
        f"parts = {parts!r}\n"
        "assert main(['warmup', '--dtypes', 'float32', '--axes', '1', *(['--parts', parts] if parts else [])]) == 0\n"
        "from fastbn import kernels\n"
        "ks = [kernels.forward.forward_runs, kernels.forward.forward_rows,\n"
        "      kernels.backward.backward_runs, kernels.backward.backward_rows]\n"
        "count = lambda: [len(b.signatures) for k in ks for b in (k.serial, k.parallel)]\n"
        "before = count()\n"
        f"assert before == [{forward}] * 4 + [{backward}] * 4, before\n"
        "for shape in ((4, 3, 5, 5), (4, 3, 50, 50), (64, 64, 30, 30), (1000, 100, 2), (1000, 9, 2), (90, 3, 99, 9)):\n"
        "    x = np.ones(shape, np.float32)\n"
        "    for given in ({}, {'residual': x, 'activation': 'relu', 'where': np.arange(shape[-1]) > 0}):\n"
        "        given = {name: v for name, v in given.items() if name in parts}\n"
        "        where = {'where': given.pop('where')} if 'where' in given else {}\n"
        "        y, saved = fastbn.batch_norm_train(x, **where, **given)\n"
        "        fastbn.batch_norm_backward(y, saved)\n"
        "        fastbn.batch_norm_backward(y, fastbn.Saved.fixed(y, 0, 1, **given))\n"
        "        fastbn.batch_norm(y, 0, 1, **given)\n"
        "        fastbn.moments(y, **where)\n"
        "        bn = fastbn.BatchNorm(shape[1], activation=given.pop('activation', None))\n"
        "        for layer in (bn, bn.eval()):\n"
        "            layer(x, save=True, **where, **given)\n"
        "            layer.backward(x)\n"
        "assert count() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "compiled for float32" in done.stdout
