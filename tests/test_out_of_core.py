"""More data than memory: batches of any sizes and memory-maps, one at a time, stopped and gone on with."""

import collections
import io
import itertools
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pages
import pytest
import reference
from arrays import ArrayLike
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from subprocesses import run_script

import fastbn

EPS = np.finfo(float).eps


def same(a, b):
    """The same bits."""
    assert type(a.count) is type(b.count)
    for v, w in ((a.count, b.count), (a.mean, b.mean), (a.m2, b.m2)):
        assert np.asarray(v).tobytes() == np.asarray(w).tobytes()


def uneven(rng, sizes=(5, 0, 1, 30, 1, 1, 0, 12), dtype="float64"):
    return [rng.normal(m, 3, (n, 4, 2)).astype(dtype) for m, n in enumerate(sizes)]


class Loader:
    """An iterable that knows its length, and is no sequence, as the loaders of other systems are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


ITERABLES = {
    "a generator": lambda batches: (batch for batch in batches),
    "an iterator": iter,
    "a map": lambda batches: map(np.negative, [-batch for batch in batches]),
    "a loader": Loader,
    "values of a dict": lambda batches: dict(enumerate(batches)).values(),
    "lists": lambda batches: (batch.reshape(-1, 4, 2).tolist() for batch in batches if len(batch)),
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_the_bits_of_batches_are_those_of_their_sum_in_order(rng, kind):
    batches = uneven(rng)
    expected = sum(fastbn.moments(batch) for batch in batches)
    same(fastbn.moments(ITERABLES[kind](batches)), expected)
    bn = fastbn.BatchNorm(4, momentum=None).fit_population(ITERABLES[kind](batches))
    np.testing.assert_array_equal(bn.running_mean, expected.mean)
    np.testing.assert_array_equal(bn.running_var, expected.var(1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_batches_of_every_axis_and_dtype(rng, dtype):
    batches = [rng.integers(0, 99, (n, 3, 4)).astype(dtype) for n in (2, 7)]
    for axis in (0, -1, (1, 2), ()):
        parts = batches if axis != 0 else [np.moveaxis(batch, 0, 1) for batch in batches]
        same(fastbn.moments(iter(parts), axis=axis), sum(fastbn.moments(part, axis=axis) for part in parts))


class Duck:
    """A sequence to NumPy, though registered as none."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def __iter__(self):
        return iter(self.rows)


class IterableArray(ArrayLike):
    def __iter__(self):
        raise AssertionError("an array is not to be iterated")


@pytest.mark.parametrize("kind", [list, tuple, collections.deque, Duck, IterableArray, memoryview])
def test_what_numpy_takes_for_an_array_is_one(rng, kind):
    x = rng.normal(size=(6, 4))
    same(fastbn.moments(kind(x)), fastbn.moments(x))


@pytest.mark.parametrize("kind", [np.asarray, ArrayLike, lambda x: x.view(np.memmap)])
def test_a_population_may_be_one_array(rng, kind):
    x = rng.normal(size=(6, 4, 4))
    one, other = (fastbn.BatchNorm(4, momentum=None) for _ in range(2))
    one.fit_population(kind(x))
    other.fit_population([x])
    assert one.running_var.tobytes() == other.running_var.tobytes()
    assert one.running_mean.tobytes() == other.running_mean.tobytes()
    same(one._pool, other._pool)


# -------------------------------------------------------------------------------------------------- whatever the split


@given(
    st.lists(st.sampled_from([0, 1, 1, 2, 3, 17, 100]), min_size=1, max_size=25),
    st.sampled_from([0.0, 1.0, -1e4, 1e8, 1e12]),
    st.sampled_from([1e-3, 1.0]),
    st.sampled_from(["float32", "float64"]),
    st.integers(0, 2**32 - 1),
)
def test_the_split_does_not_matter(sizes, offset, std, dtype, seed):
    """13 digits, of the mean in standard deviations or of itself; of m2 also beside a mean that has none left."""
    rng = np.random.default_rng(seed)
    x = (offset + std * rng.standard_normal((sum(sizes), 3))).astype(dtype)
    x[:, 0] = offset  # constant
    parts = np.split(x, np.cumsum(sizes)[:-1])
    m, whole = fastbn.moments(iter(parts)), fastbn.moments(x)
    layer = fastbn.BatchNorm(3, momentum=None, correction=0)
    if len(x):
        layer.fit_population(parts)
        np.testing.assert_array_equal(layer.running_var, m.var())
    else:
        refused(lambda: layer.fit_population(parts), "BatchNorm.fit_population", "batches", ValueError)
    assert m.count == whole.count == len(x)
    mean, var = (v.astype(float) for v in reference.mean_var(x, 1))
    for name, expected_mean, m2 in (("whole", whole.mean, whole.m2), ("exact", mean, len(x) * var)):
        budget = 1e-13 * abs(mean) + 1e-13 * np.sqrt(var)
        np.testing.assert_array_less(abs(m.mean - expected_mean), budget + 5e-324, name)
        np.testing.assert_array_less(abs(m.m2 - m2), 1e-13 * m2 + 5e-324, name)
    assert (m.mean[0], m.m2[0]) == ((x[0, 0], 0) if len(x) else (0, 0))


@pytest.mark.parametrize("offset", [1e5, 1e8, -1e12])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("axis", [1, -1, (0, 1), ()])
def test_what_the_means_of_batches_lose_is_carried(offset, dtype, axis, monkeypatch):
    """Batches whose means are standard deviations apart, which Chan's formula squares with all that rounding took."""
    monkeypatch.setattr(sys.modules["fastbn.moments"], "BLOCK", 16)
    rng = np.random.default_rng(3)
    std = 1.0 if dtype != "float32" else abs(offset) * 1e-6
    parts = [(offset + std * rng.normal(3 * i, 1, (4, 3, n))).astype(dtype) for i, n in enumerate((7, 1, 30, 0, 11))]
    if axis == -1:
        parts = [np.moveaxis(part, 1, -1) for part in parts]
    whole = np.concatenate(parts, axis=1 if axis == -1 else 2)
    m, exact = fastbn.moments(iter(parts), axis=axis), fastbn.moments(whole, axis=axis)
    assert m.count == exact.count
    np.testing.assert_allclose(m.mean, exact.mean, rtol=4 * EPS)
    np.testing.assert_allclose(m.m2, exact.m2, rtol=1e-13)


def test_one_far_batch_has_its_own_bits_and_near_channels_have_those_of_the_sum(rng):
    parts = [rng.normal([0.0, 1e9], 1, (n, 2)) for n in (9, 4, 30)]
    empty = np.empty((0, 2))
    same(fastbn.moments(iter([empty, parts[0], empty])), fastbn.moments(parts[0]))
    m, plain = fastbn.moments(iter(parts)), sum(fastbn.moments(part) for part in parts)
    assert (m.mean[0], m.m2[0]) == (plain.mean[0], plain.m2[0])
    assert m.m2[1] != plain.m2[1]


# ------------------------------------------------------------------------------------------------------ stop and go on


def test_a_stop_does_not_change_a_bit(rng, tmp_path):
    batches = uneven(rng)
    whole = fastbn.moments(iter(batches))
    layer = fastbn.BatchNorm(4, momentum=None).fit_population(batches)
    for stop in range(len(batches) + 1):
        m = sum((fastbn.moments(batch) for batch in batches[:stop]), fastbn.Moments.empty(4))
        np.savez(tmp_path / "m.npz", count=m.count, mean=m.mean, m2=m.m2)
        with np.load(tmp_path / "m.npz") as saved:
            m = fastbn.Moments(**saved)
        same(fastbn.moments(iter(batches[stop:]), start=m), whole)
        other = fastbn.BatchNorm(4, momentum=None).fit_population(batches[stop:], start=m)
        same(other._pool, layer._pool)
        assert other.running_var.tobytes() == layer.running_var.tobytes()


def test_an_array_is_added_to_what_came_before(rng):
    a, b = rng.normal(size=(2, 5, 4))
    same(fastbn.moments(b, start=fastbn.moments(a)), fastbn.moments(a) + fastbn.moments(b))
    w = rng.random((5, 1))
    same(fastbn.moments(b, where=w, start=fastbn.moments(a)), fastbn.moments(a) + fastbn.moments(b, where=w))


def test_a_stop_leaves_the_layer_alone(rng):
    def stopped():
        yield from uneven(rng)
        raise KeyboardInterrupt

    bn = fastbn.BatchNorm(4).fit_population(rng.normal(size=(9, 4)))
    before = {name: np.array(v) for name, v in bn.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        bn.fit_population(stopped(), start=fastbn.moments(rng.normal(size=(9, 4))))
    for name, v in bn.state_dict().items():
        np.testing.assert_array_equal(v, before[name])


def test_weighted_batches_are_a_sum(rng):
    batches = uneven(rng)
    weights = [rng.random((len(batch), 1, 1)) for batch in batches]
    m = sum(fastbn.moments(x, where=w) for x, w in zip(batches, weights, strict=True))
    layer = fastbn.BatchNorm(4, momentum=None, correction=0).fit_population([], start=m)
    x, w = np.concatenate(batches), np.concatenate(weights)
    mean, var = (v.astype(float) for v in reference.mean_var(x, 1, w))
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)


def test_a_population_needs_weight_in_every_channel():
    few = fastbn.Moments(np.array([5.0, 1.0, 3.0]), np.zeros(3), np.ones(3))
    for correction in (0, 1):
        bn = fastbn.BatchNorm(3, correction=correction)
        none = fastbn.Moments(np.array([5.0, 3.0, 0.0]), np.zeros(3), np.ones(3))
        refused(lambda bn=bn, m=none: bn.fit_population([], start=m), "BatchNorm.fit_population", "start", ValueError)
    says = refused(lambda: bn.fit_population([], start=few), "BatchNorm.fit_population", "start", ValueError)
    assert "1.0 at (1,), expected more than 1" in says
    assert fastbn.BatchNorm(3, correction=0).fit_population([], start=few).running_var[1] == 1


# --------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_pooled_is_refused(rng):
    x = rng.normal(size=(5, 3))
    mixed = [x, x[:, :2]]
    says = refused(lambda: fastbn.moments(iter(mixed)), "moments", "batch", ValueError)
    assert says == "moments: batch has channels (2,), expected (3,); it has shape (5, 2), axis=1"
    says = refused(lambda: fastbn.moments(iter([x]), where=x > 0), "moments", "where", ValueError)
    assert "sum(moments(x, where=w) for x, w in batches)" in says
    refused(lambda: fastbn.moments(iter([x]), start=fastbn.Moments.empty(2)), "moments", "batch", ValueError)
    refused(lambda: fastbn.moments(iter([]), start=3), "moments", "start", TypeError)
    says = refused(lambda: fastbn.moments(x, start=fastbn.Moments.empty(2)), "moments", "start", ValueError)
    assert says == "moments: start has channels of shape (2,), expected (3,)"
    refused(lambda: fastbn.BatchNorm(3).fit_population(3), "BatchNorm.fit_population", "batches", TypeError)
    refused(lambda: fastbn.moments(iter([(y for y in x)])), "moments", "batch", TypeError)
    refused(lambda: fastbn.moments({0: x}), "moments", "x", TypeError)  # would be its keys
    says = refused(lambda: fastbn.moments(iter([])), "moments", "x", ValueError)
    assert says == "moments: x has no batches, expected at least one, or start"
    m = fastbn.moments(x)
    same(fastbn.moments(iter([]), start=m), m)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("progress", [False, True])
def test_one_batch_is_in_memory_at_a_time(rng, progress, monkeypatch):
    if progress:
        pytest.importorskip("tqdm", reason="tqdm is not installed: no bar that could keep a batch")
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    alive = []

    class Batches:
        """An iterator whose own frame keeps nothing."""

        def __init__(self):
            self.left = 5

        def __iter__(self):
            return self

        def __next__(self):
            assert not any(ref() is not None for ref in alive), "the batch before is kept"
            self.left -= 1
            if not self.left:
                raise StopIteration
            x = rng.normal(size=(6, 3))
            alive.append(weakref.ref(x))
            return x

    fastbn.moments(Batches(), progress=progress)
    fastbn.BatchNorm(3).fit_population(Batches(), progress=progress)
    assert len(alive) == 8


LIMITED = """
import os, resource, sys, tempfile
import numpy as np
import fastbn

rows, columns = 2**21, 64  # 512 MiB: a hole in the file, but for some rows
room = 24 * 2**20

def data_of_this_process():
    "What RLIMIT_DATA limits: memory of its own, not maps of files."
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmData")) * 1024

def outcome(call):
    resource.setrlimit(resource.RLIMIT_DATA, (data_of_this_process() + room, -1))
    try:
        return call()
    except MemoryError:
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))

with tempfile.TemporaryFile() as file:
    file.truncate(rows * columns * 4)
    for swapped, axis, shape in ((False, 1, (rows, columns)), (False, -1, (rows // 64, 8, 8, columns)),
                                 (False, 1, (64, columns, rows // 64)), (True, 1, (rows, columns))):
        x = np.memmap(file, ">f4" if swapped else "<f4", "r+", shape=shape)
        x[-1] = 3
        part = np.array(x[: max(1, 2**20 // (4 * x[0].size))]).astype("f4")
        fastbn.moments(part.astype(x.dtype), axis=axis)  # compiled, threads started
        bn = fastbn.BatchNorm(columns, axis=axis, momentum=None)
        whole = outcome(lambda: fastbn.moments(x, axis=axis))
        fitted = outcome(lambda: bn.fit_population(x))
        assert outcome(lambda: np.array(x)) is None, "the limit does not limit"
        assert (whole is None) == (fitted is None) == swapped, "a foreign byte order is copied, nothing else"
        step = max(1, len(x) // 100)
        batches = lambda: (x[i : i + step] for i in range(0, len(x), step))
        m = outcome(lambda: fastbn.moments(batches(), axis=axis))
        of_batches = outcome(lambda: fastbn.BatchNorm(columns, axis=axis, momentum=None).fit_population(batches()))
        share = 1 / len(x)
        for found in [m, of_batches._pool] + ([] if swapped else [whole, fitted._pool]):
            assert found.count == x.size // columns
            np.testing.assert_allclose(found.mean, 3 * share, rtol=1e-12)
            np.testing.assert_allclose(found.var(), 9 * share * (1 - share), rtol=1e-12)
        del x
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does it")
@pytest.mark.jit("half a gigabyte takes an hour as plain Python")
def test_memory_does_not_grow_with_the_file():
    """512 MiB with room for 24: a copy of the map fails there."""
    assert run_script(LIMITED) == "done\n"


# ------------------------------------------------------------------------------------------------------- progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def printed(monkeypatch, stream, call):
    monkeypatch.setattr(sys, "stderr", stream)
    call()
    return stream.getvalue()


CALLS = {
    "moments": lambda **options: fastbn.moments(Loader([np.ones((2, 3))] * 7), **options),
    "BatchNorm.fit_population": lambda **options: fastbn.BatchNorm(3).fit_population([np.ones((2, 3))] * 7, **options),
}


@pytest.mark.parametrize("fn", CALLS)
def test_a_bar_is_shown_where_it_is_wanted(monkeypatch, fn):
    pytest.importorskip("tqdm", reason="tqdm is not installed: no progress bar")
    call = CALLS[fn]
    for stream, options in ((Terminal(), {}), (Terminal(), {"progress": True}), (io.StringIO(), {"progress": True})):
        shown = printed(monkeypatch, stream, lambda options=options: call(**options))
        assert f"{fn}: 100%" in shown, options
        assert "7/7" in shown, options
    for stream, options in ((io.StringIO(), {}), (Terminal(), {"progress": False})):
        assert printed(monkeypatch, stream, lambda options=options: call(**options)) == "", options


def test_a_generator_counts_without_a_total_and_an_array_has_no_bar(monkeypatch):
    pytest.importorskip("tqdm", reason="tqdm is not installed: no progress bar")
    x = np.ones((2, 3))
    shown = printed(monkeypatch, Terminal(), lambda: fastbn.moments(x for _ in range(3)))
    assert "3batch" in shown
    assert "%" not in shown
    assert printed(monkeypatch, Terminal(), lambda: fastbn.moments(x, progress=True)) == ""
    assert printed(monkeypatch, Terminal(), lambda: fastbn.BatchNorm(3).fit_population(x, progress=True)) == ""


def test_a_bar_is_closed_when_a_batch_fails(monkeypatch):
    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed: no progress bar").tqdm
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="channels"):
        fastbn.moments(iter([np.ones((2, 3)), np.ones((2, 4))]))
    assert not list(tqdm._instances)


class Closed(io.StringIO):
    def isatty(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [None, Closed(), object()])
def test_no_stderr_is_no_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    CALLS["moments"]()


@pytest.mark.parametrize("fn", CALLS)
@pytest.mark.parametrize("missing", ["tqdm", "tqdm.auto"])
def test_without_tqdm(monkeypatch, fn, missing):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setitem(sys.modules, missing, None)
    assert printed(monkeypatch, Terminal(), CALLS[fn]) == ""
    with pytest.raises(ImportError) as caught:
        CALLS[fn](progress=True)
    assert str(caught.value) == f'{fn} with progress=True needs tqdm: pip install "fastbn[progress]"'


def test_a_broken_tqdm_is_not_hidden(monkeypatch, tmp_path):
    """What it lacks is said, and not that it is to be installed."""
    (tmp_path / "tqdm").mkdir()
    (tmp_path / "tqdm" / "__init__.py").write_text("")
    (tmp_path / "tqdm" / "auto.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tqdm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        CALLS["moments"](progress=True)


def test_endless_batches_may_be_cut(rng):
    """An iterator is read no further than it is asked."""
    endless = (rng.normal(size=(2, 3)) for _ in itertools.count())
    m = fastbn.moments(itertools.islice(endless, 10))
    assert fastbn.moments(itertools.islice(endless, 5), start=m).count == 30


# --------------------------------------------------------------------------------------------------------- the how-tos

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to"


@pytest.mark.jit("pages are of full size")
@pytest.mark.parametrize("page", ["larger-than-memory", "scikit-learn"])
def test_the_code_of_a_how_to_prints_what_its_comments_say(page):
    if page == "scikit-learn":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed: its page cannot be run")
    names = pages.check(f"how-to/{page}.md")
    if "folder" in names:
        del names["images"]
        names["folder"].cleanup()


@pytest.mark.parametrize("page", ["larger-than-memory", "scikit-learn"])
def test_the_links_of_a_how_to_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (HOW_TO / f"{page}.md").read_text()):
        assert (HOW_TO / target).exists(), target
