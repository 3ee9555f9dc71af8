"""The peers compute batch normalization: none is timed for anything else."""

import numpy as np
import pytest

from fastbn import _measure, _peers, _plot

# They sum in float32; fastbn's own results are held to a twentieth of this.
TOLERANCE = 1e-5
# What each has to offer, so that none loses an operation unnoticed.
PAIRS = {op.key for op in _measure.PARTS if op.name == "pair"}
OFFERS = {
    "NumPy": {op.key for op in _measure.OPERATIONS},
    "PyTorch": {op.key for op in _measure.OPERATIONS} | PAIRS,
    "oneDNN": {op.key for op in _measure.OPERATIONS if op.layout == "NCHW"},
    "ONNX Runtime": {"inference NCHW"},
    "JAX": {op.key for op in _measure.OPERATIONS},
}
ALL = (*_measure.OPERATIONS, *_measure.PARTS)
CASES = [(name, op) for name, offers in OFFERS.items() for op in ALL if op.key in offers]


@pytest.fixture(scope="module")
def peers():
    return {p.name: p for p in _peers.present(2)}


@pytest.fixture(params=[(8, 14), (65, 5)], ids=str)
def problem_of(request):
    def build(layout, residual=True):
        channels, side = request.param
        rng = np.random.default_rng(1)
        x, dy, *z = (
            rng.normal(1, 2, _measure.BATCH * channels * side**2).astype(np.float32) for _ in range(2 + residual)
        )
        return _measure.problem(layout, channels, side, x, dy, np.full_like(x, np.nan), np.full_like(x, np.nan), *z)

    return build


@pytest.mark.parametrize(("name", "op"), CASES, ids=lambda v: getattr(v, "key", v))
def test_a_peer_computes_what_it_is_timed_for(peers, problem_of, name, op):
    if name not in peers:
        pytest.skip(f"{name} is not installed")
    p = problem_of(op.layout)
    x, dy, z = p.x.copy(), p.dy.copy(), p.z.copy()
    calls = dict(peers[name].calls(p))
    for _ in range(2):  # the second call finds what the first one left
        p.y.fill(np.nan)
        p.dx.fill(np.nan)
        found = [peers[name].array(p, result) for result in _measure.results(op, calls[op.title]())]
        assert {result.dtype for result in found} == {np.dtype(np.float32)}
        assert _measure.error(op, p, found) < TOLERANCE
    shared = [np.shares_memory(result, p.dx if op.name == "backward" else p.y) for result in found]
    assert set(shared) == {not peers[name].fresh}, "its outputs are not what the table says"
    np.testing.assert_array_equal(p.x, x)
    np.testing.assert_array_equal(p.dy, dy)
    np.testing.assert_array_equal(p.z, z)


@pytest.mark.parametrize("name", OFFERS)
def test_a_peer_offers_what_is_tested_and_no_more(peers, problem_of, name):
    if name not in peers:
        pytest.skip(f"{name} is not installed")
    for residual in (True, False):
        offered = {
            f"{operation} {layout}"
            for layout in ("NCHW", "NHWC")
            for operation, _ in peers[name].calls(problem_of(layout, residual))
        }
        assert offered == (OFFERS[name] if residual else OFFERS[name] - PAIRS)


def test_every_peer_is_tested_and_drawn():
    assert [peer.name for peer in _peers.PEERS] == list(OFFERS)
    assert list(_plot.STYLES) == ["fastbn", *OFFERS]


def test_an_absent_peer_is_not_there(monkeypatch):
    class Absent(_peers.Peer):
        def __init__(self, threads):
            import a_module_that_nobody_has  # noqa: F401

        def calls(self, p):
            raise AssertionError("it is not there")

    monkeypatch.setattr(_peers, "PEERS", (Absent, _peers.NumPy))
    assert [p.name for p in _peers.present(1)] == ["NumPy"]


def test_a_pytorch_without_onednn_offers_none(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "oneDNN" not in [p.name for p in _peers.present(1)]
