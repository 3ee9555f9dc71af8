"""dask arrays: any chunks, any scheduler, the same result as in memory and the same bits."""

import re

import numpy as np
import pages
import pytest
from reference import assert_within, train
from subprocesses import ROOT, run_python, run_script

import fastbn

da = pytest.importorskip("dask.array", reason="dask is not installed")
dask = pytest.importorskip("dask")

import fastbn.interop.dask as fd  # noqa: E402  it needs dask

pytestmark = pytest.mark.jit("so many chunks take minutes as plain Python")

SHAPE = (11, 6, 5, 4)
CHUNKS = {
    "one": SHAPE,
    "batch": (3, 6, 5, 4),
    "channels": (11, 4, 5, 4),
    "all, uneven": ((4, 1, 6), (5, 1), (2, 3), (1, 3)),
    "empty ones": ((0, 5, 0, 6), (0, 6), 5, (4, 0)),
    "single values": (4, 1, 1, 1),
}


@pytest.fixture(autouse=True)
def _one_thread_of_dask():
    with dask.config.set(scheduler="synchronous"):
        yield


def close(found, expected):
    assert found.count == expected.count
    assert type(found.count) is type(expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8])
@pytest.mark.parametrize("axis", [1, -1, (1, 3), (3, -3), (), (0, 1, 2, 3)])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_moments_are_those_in_memory(rng, chunks, axis, offset):
    x = rng.normal(offset, 1, SHAPE)
    m = fd.moments(da.from_array(x, chunks=CHUNKS[chunks]), axis=axis)
    close(m.compute(), fastbn.moments(x, axis=axis))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("axis", "dtype"), [(1, "float64"), (-1, "float32"), ((), "float16"), ((1, 2), "uint8")])
def test_training_is_that_in_memory(rng, chunks, axis, dtype):
    x = rng.normal(20, 3, SHAPE).astype(dtype)
    shape = fastbn.moments(x, axis=axis).mean.shape
    gamma, beta, z = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=SHAPE)
    array = da.from_array(x, chunks=CHUNKS[chunks])
    more = {"axis": axis, "eps": 1e-3, "activation": "relu"}
    lazy, m = fd.batch_norm_train(array, gamma, da.from_array(beta), residual=z, **more)
    y, m = dask.compute(lazy, m)
    z = z.astype(y.dtype)
    expected = train(x, gamma, beta, residual=z, **more)
    assert_within(y, expected.y, expected.budget, "y")
    close(m, fastbn.moments(x, axis=axis))
    assert lazy.chunks == array.chunks
    assert lazy.dtype == lazy._meta.dtype == y.dtype == fastbn.batch_norm(x, 0, 1, axis=axis).dtype
    inferred = fd.batch_norm(array, m.mean, m.var(), gamma, beta, residual=da.from_array(z, chunks=2), **more)
    np.testing.assert_array_equal(
        inferred.compute(), fastbn.batch_norm(x, m.mean, m.var(), gamma, beta, residual=z, **more), strict=True
    )
    assert inferred.chunks == array.chunks


@pytest.mark.parametrize(
    "where",
    [
        np.arange(44).reshape(11, 1, 1, 4) % 3 > 0,
        np.linspace(0, 2, 120).reshape(6, 5, 4),
        np.float32(0.5),
        da.arange(5, chunks=2).reshape(5, 1) < 3,
    ],
    ids=["mask", "weights", "scalar", "dask"],
)
def test_weights(rng, where):
    x = rng.normal(1e6, 1, SHAPE)
    array = da.from_array(x, chunks=CHUNKS["all, uneven"])
    w = np.asarray(where)
    y, m = dask.compute(*fd.batch_norm_train(array, where=where))
    close_to = fastbn.moments(x, where=w)
    np.testing.assert_allclose(m.count, close_to.count, rtol=1e-14)
    np.testing.assert_allclose(m.m2, close_to.m2, rtol=1e-12)
    expected = train(x, where=w)
    assert_within(y, expected.y, expected.budget, "y")


def test_a_channel_without_weight_is_as_in_memory(rng):
    x = rng.normal(3, 1, (6, 2))
    where = np.array([True, False])
    y, _ = fd.batch_norm_train(da.from_array(x, chunks=2), where=where)
    np.testing.assert_allclose(y.compute(), fastbn.batch_norm_train(x, where=where)[0], rtol=1e-12)


def test_chunks_of_unknown_size(rng):
    x = rng.normal(1e8, 1, (40, 3, 5))
    keep = np.arange(40) % 5 > 1
    keep[10:20] = False
    array = da.from_array(x, chunks=(10, 2, 5))[da.from_array(keep, chunks=10)]
    assert np.isnan(array.shape[0])
    y, m = fd.batch_norm_train(array, residual=array, where=array > 0)
    expected, saved = fastbn.batch_norm_train(x[keep], residual=x[keep])
    np.testing.assert_allclose(y.compute(), expected, rtol=1e-12)
    np.testing.assert_allclose(m.compute().m2, saved.moments.m2, rtol=1e-12)
    close(fd.moments(array).compute(), saved.moments)
    one = da.from_array(x, chunks=(10, 3, 5))[da.from_array(np.arange(40) == 3, chunks=10)][:, :, 0]
    with pytest.raises(ValueError, match="array has one value per channel, expected at least two"):
        fd.batch_norm_train(one)[0].compute()
    with pytest.raises(ValueError, match="unknown size along axis 0, a channel axis"):
        fd.moments(array, axis=0)


def test_empty_arrays():
    y, m = fd.batch_norm_train(da.zeros((0, 3, 4)))
    assert y.compute().shape == (0, 3, 4)
    assert m.compute().count == 0
    for shape in ((4, 0, 3), (0, 0)):
        assert fd.moments(da.zeros(shape)).compute().count == fastbn.moments(np.zeros(shape)).count


def test_results_are_lazy_and_delayed_statistics_normalize(rng):
    def block():
        raise AssertionError("computed")

    lazy = da.from_delayed(dask.delayed(block)(), (4, 2), float)
    m = fd.moments(lazy)
    fd.batch_norm(lazy, m.mean, m.var())
    fd.batch_norm_train(lazy)
    x = rng.normal(5, 2, (8, 3))
    m = fd.moments(da.from_array(x, chunks=(3, 2)))
    found = fd.batch_norm(da.from_array(x, chunks=2), m.mean, m.var(), eps=0).compute()
    np.testing.assert_allclose(found, (x - x.mean(0)) / x.std(0), rtol=1e-12)


def test_bits_do_not_depend_on_how_a_chunk_lies_in_memory(rng):
    """A transposed view comes out of another process as an array of its own."""
    x = rng.normal(3, 1, (9, 7, 11, 13)).astype("float32")
    view = np.transpose(x, (0, 3, 1, 2))
    here, there = (fd.moments(da.from_array(a, chunks=-1)).compute() for a in (view, view.copy()))
    lazy = fd.moments(da.from_array(x, chunks=-1).transpose(0, 3, 1, 2)).compute()
    assert here.m2.tobytes() == there.m2.tobytes() == lazy.m2.tobytes()


def test_parameters_are_copied(rng):
    x, gamma = rng.normal(size=(6, 4)), np.ones(4)
    y = fd.batch_norm(da.from_array(x, chunks=2), 0, 1, gamma)
    gamma[:] = 7
    np.testing.assert_array_equal(y, fastbn.batch_norm(x, 0, 1))


def test_nan_stays_in_its_channel(rng):
    x = rng.normal(size=(9, 3))
    x[4, 1] = np.nan
    y, m = dask.compute(*fd.batch_norm_train(da.from_array(x, chunks=(2, 3))))
    np.testing.assert_array_equal(np.isnan(m.mean), [False, True, False])
    np.testing.assert_array_equal(np.isnan(y).all(0), [False, True, False])
    assert np.isfinite(y[:, ::2]).all()


X = da.ones((4, 3), chunks=2)
REFUSED = {
    "no dask array": (TypeError, "moments: array is of type ndarray, expected a dask", lambda: fd.moments(np.ones(3))),
    "dtype": (TypeError, r"array has dtype\('complex128'\)", lambda: fd.moments(X * 1j)),
    "masked": (TypeError, "chunks of type MaskedArray", lambda: fd.moments(da.ma.masked_array(X))),
    "axis": (ValueError, "axis 2 is out of range for array of shape", lambda: fd.moments(X, axis=2)),
    "eps": (ValueError, "batch_norm: eps", lambda: fd.batch_norm(X, 0, 1, eps=-1)),
    "activation": (ValueError, "batch_norm: activation", lambda: fd.batch_norm(X, 0, 1, activation="tanh")),
    "mean": (ValueError, r"mean has shape \(4,\), expected \(3,\)", lambda: fd.batch_norm(X, np.ones(4), 1)),
    "gamma": (ValueError, r"gamma has shape \(2,\)", lambda: fd.batch_norm_train(X, da.ones(2))),
    "var": (ValueError, "var is -1.0", lambda: fd.batch_norm(X, 0, -1.0)),
    "residual": (ValueError, r"residual has shape \(3, 3\)", lambda: fd.batch_norm(X, 0, 1, residual=np.ones((3, 3)))),
    "where": (ValueError, r"where has shape \(2, 3\)", lambda: fd.moments(X, where=np.ones((2, 3)))),
    "where's rank": (ValueError, "where has shape", lambda: fd.moments(X, where=np.ones((1, 4, 3)))),
    "where's value": (ValueError, "where is -1.0", lambda: fd.moments(X, where=-np.ones(3)).compute()),
    "one value": (ValueError, "array has one value per channel", lambda: fd.batch_norm_train(X[:1])),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_said(what):
    error, text, call = REFUSED[what]
    with pytest.raises(error, match=text):
        call()


ENGINES = """
import numpy as np
import dask, dask.array as da
import fastbn, fastbn.interop.dask as fd
from distributed import Client, LocalCluster

def graph():
    rng = np.random.default_rng(1)
    x = rng.normal(1e8, 1, (60, 40, 40, 8))
    a = da.from_array(x, chunks=((7, 0, 33, 20), 40, (25, 15), (5, 3))).transpose(0, 3, 1, 2)
    b = (a + 1).astype("float32")
    y, m = fd.batch_norm_train(a, np.arange(8.0))
    return y, m, fd.moments(b, axis=()), fd.moments(b[:, 0], axis=0, where=b[:, 0] > 1e8)

def bits(results):
    y, *ms = results
    return [y.tobytes(), *(np.asarray(getattr(m, f)).tobytes() for m in ms for f in ("count", "mean", "m2"))]

def main():
    from fastbn import _threads
    found = {}
    for workers in (1, 2, 5):
        found["threads", workers] = bits(dask.compute(*graph(), scheduler="threads", num_workers=workers))
    assert _threads._layer is None, "Numba's threads were started"
    big = np.random.default_rng(0).normal(size=(60, 8, 40, 40))
    np.testing.assert_array_equal(fastbn.moments(big).mean, fd.moments(da.from_array(big, chunks=-1)).compute().mean)
    assert _threads._layer, "and outside of tasks they are used"
    found["synchronous"] = bits(dask.compute(*graph(), scheduler="synchronous"))
    found["processes"] = bits(dask.compute(*graph(), scheduler="processes", num_workers=2))
    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        with Client(cluster):
            found["cluster"] = bits(dask.compute(*graph()))
    for name, b in found.items():
        assert b == found["synchronous"], name
    print("done", len(found))

if __name__ == "__main__":
    main()
"""


def test_every_engine_gives_the_same_bits_and_no_task_starts_threads(tmp_path):
    """On threads, processes and a cluster of processes, whatever their number; blocks are large enough for threads."""
    pytest.importorskip("distributed", reason="distributed is not installed")
    script = tmp_path / "engines.py"
    script.write_text(ENGINES)
    assert run_python(str(script), NUMBA_NUM_THREADS="2", cwd=tmp_path) == "done 6\n"


def test_without_dask_the_error_says_what_to_install():
    script = """
import sys
sys.modules["dask"] = None
import fastbn
try:
    import fastbn.interop.dask
except ImportError as error:
    print(error)
"""
    assert run_script(script) == 'fastbn.interop.dask needs dask: pip install "fastbn[dask]"\n'


def test_the_code_of_the_page_prints_what_its_comments_say():
    pages.check("how-to/dask.md")


def test_the_script_of_the_page_prints_its_table():
    pytest.importorskip("distributed", reason="distributed is not installed")
    out = run_python(str(ROOT / "docs" / "examples" / "dask_cost.py"), "--quick", "--markdown")
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| (\d+) \|", out, re.M)
    assert [int(chunks) for chunks, _ in rows] == [2, 8, 32]
    assert "Measured on" in out


def test_the_axis_may_be_given_by_its_place():
    assert fd.moments(X, 0).compute().count == X.shape[1]


def test_weights_have_the_chunks_of_an_axis_of_unknown_size():
    array = X[X[:, 0] > 0]
    assert np.isnan(array.shape[0])
    with pytest.raises(ValueError, match="where has 1 chunks along an axis of unknown size, expected 2"):
        fd.moments(array, where=da.ones((4, 1), chunks=4))
