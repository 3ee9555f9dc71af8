"""The gallery's pages on photographs: what their prose claims of their figures, and pictures that a phone can show."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
PHONE = 6.5, 9  # inches of width at most, points of a letter at least: 390 pixels of a screen then show it at half size

pytestmark = pytest.mark.jit("half a million pixels take minutes as plain Python")


def drawn(name, capsys):
    """A script's names, its figures, and what it has printed."""
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: it draws the pages")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: it brings the photographs")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close("all")
    names = runpy.run_path(str(GALLERY / f"{name}.py"))
    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    return SimpleNamespace(names=names, figures=figures, printed=capsys.readouterr().out)


def check_legible(figures, count):
    """Narrow enough, and every letter large enough, for a phone."""
    text = pytest.importorskip("matplotlib.text")
    assert len(figures) == count
    for figure in figures:
        assert figure.get_size_inches()[0] <= PHONE[0]
        shown = [t for t in figure.findobj(text.Text) if t.get_text().strip()]
        assert shown
        assert min(t.get_fontsize() for t in shown) >= PHONE[1]


def test_offset(capsys):
    page = drawn("plot_offset", capsys)
    names = page.names
    check_legible(page.figures, 2)

    pixels = names["photographs"].astype(np.longdouble)
    np.testing.assert_allclose(names["truth"], pixels.var(axis=(0, 1, 2)).astype(float), rtol=1e-13)
    errors = {name: np.array(error) for name, error in names["errors"].items()}
    assert errors.keys() == names["looks"].keys() == names["ways"].keys()
    occurring = np.isin(names["offsets"], [*names["occur"].values()][1:])
    assert occurring.sum() == 4
    assert errors["fastbn.moments"].max() < 4e-16
    assert (errors["E[x²] - E[x]²"][occurring] > 1).all()
    assert (errors["E[x²] - E[x]² in float64"][names["offsets"] > 1e6] > 1e-8).all()
    assert errors["numpy.var, contiguous"].max() < 1e-3 < 1 < errors["numpy.var"].max()

    # Two of the textbook's panels have no picture and say so; those of fastbn are all the same picture.
    axes = np.array(page.figures[1].axes).reshape(len(names["units"]), len(names["columns"]))
    lost = {(i, j) for (i, j), ax in np.ndenumerate(axes) if any("NaN" in t.get_text() for t in ax.texts)}
    assert lost == {(2, 0), (3, 0)}
    assert all(bool(ax.images) != ((i, j) in lost) for (i, j), ax in np.ndenumerate(axes))
    first, *others = (np.asarray(ax.images[0].get_array()) for ax in axes[:, -1])
    assert np.ptp(first) > 0.5
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-12)
    assert "batch_norm: var is -" in page.printed


def test_photographs(capsys, monkeypatch):
    import tempfile

    kept = []
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: kept.append(self))
    page = drawn("plot_photographs", capsys)
    monkeypatch.undo()
    (folder,) = kept
    try:
        check_legible(page.figures, 2)
        pictures = np.load(Path(folder.name, "pictures.npy"))
        normalized = np.load(Path(folder.name, "normalized.npy"))
    finally:
        folder.cleanup()

    planes = [np.ascontiguousarray(pictures[..., c]) for c in range(3)]  # of which NumPy adds up pairwise
    mean, std = (np.array([getattr(p, what)(dtype=float) for p in planes]) for what in ("mean", "std"))
    np.testing.assert_allclose(page.names["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(page.names["var"], std**2, rtol=1e-12)
    for m in page.names["found"].values():  # of batches of 1, 7, 64, and of all at once
        np.testing.assert_allclose(m.mean, page.names["mean"], rtol=2e-15)
        np.testing.assert_allclose(m.var(), page.names["var"], rtol=2e-15)
    wanted = ((pictures[::20] - mean) / std).transpose(0, 3, 1, 2)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(normalized[::20], wanted, rtol=0, atol=2.5e-7)

    assert page.printed.count(": 100.0000% same bits") == 4
    assert 0 < page.names["peak"] < pictures.nbytes / 10  # of all at once
    shares = [[patch.get_data().values.sum() for patch in ax.patches] for ax in page.figures[1].axes]
    np.testing.assert_allclose(shares, 1, atol=1e-12)  # no pixel is outside of a histogram
