"""`python -m fastbn`: the table, the warm-up and the measuring behind them."""

import subprocess
import sys

import numpy as np
import pytest

from fastbn import __main__ as cli
from fastbn import _measure

SMALL = ((8, 14, 2), (16, 7, 1))


@pytest.fixture(scope="module")
def layers():
    return list(_measure.measure(SMALL, rounds=1))


def test_every_operation_is_measured_and_right(layers):
    for layer in layers:
        for op in _measure.OPERATIONS:
            assert 0 <= layer.errors[op.key] <= cli.TOLERANCE
            assert all(layer.seconds[f"{who} {op.key}"] > 0 for who in ("fastbn", "numpy"))


def test_a_wrong_result_is_found(layers):
    op = _measure.OPERATIONS[0]
    x, dy, y, dx = (np.random.default_rng(0).normal(size=layers[0].elements).astype(np.float32) for _ in range(4))
    assert _measure._check(op, lambda: None, layers[0], x, dy, y, dx) != 0  # y is NaN: nobody wrote it
    assert _measure._check(op, lambda: y.fill(0), layers[0], x, dy, y, dx) > 0.1


def test_numpy_peers_compute_batch_norm(layers):
    """The peers must do the work they are timed for."""
    rng = np.random.default_rng(1)
    for layout, shape in (("NCHW", (_measure.BATCH, 8, 14, 14)), ("NHWC", (_measure.BATCH, 14, 14, 8))):
        arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(4)]
        calls = dict(_measure._numpy(layout, *arrays))
        for op in _measure.OPERATIONS:
            if op.layout == layout:
                flat = [a.reshape(-1) for a in arrays]
                assert _measure._check(op, calls[f"numpy {op.key}"], layers[0], *flat) < 1e-5


def test_pytorch_peers_compute_batch_norm(layers):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for op in _measure.OPERATIONS:
        assert layers[0].seconds[f"torch {op.key}"] > 0
    assert torch.get_num_threads() >= 1


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


def test_wrong_results_fail_the_command(monkeypatch, capsys):
    monkeypatch.setattr(cli, "RESNET50", SMALL)
    monkeypatch.setattr(_measure, "_check", lambda *_: 1.0)
    assert cli.main(["--rounds", "1", "--no-peers"]) == 1
    assert "results WRONG" in capsys.readouterr().out


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
