"""Recycled outputs: never handed out twice, bounded, aligned, in the memory order of x, gone when asked."""

import collections
import gc
import importlib.util
import sys
import threading

import numpy as np
import pytest

import fastbn
from fastbn import _memory

SHAPE = (16, 64, 40, 40)  # 6.5 MB of float32


@pytest.fixture(autouse=True)
def pool():
    before = _memory._limit
    fastbn.empty_pool()
    yield _memory._free
    fastbn.set_pool_limit(before)
    fastbn.empty_pool()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(3).standard_normal(SHAPE, dtype=np.float32)


def infer(x, **kwargs):
    return fastbn.batch_norm(x, np.zeros(x.shape[1]), np.ones(x.shape[1]), **kwargs)


def address(a):
    return a.__array_interface__["data"][0]


def test_an_output_is_recycled_when_it_is_gone(x, pool):
    y = infer(x)
    first = address(y)
    assert first % _memory.ALIGNMENT == 0
    del y
    assert len(pool) == 1
    y = infer(x)
    assert address(y) == first
    assert not pool


@pytest.mark.parametrize("view", [lambda y: y[3, :, ::2], lambda y: y.reshape(-1)[7:], lambda y: memoryview(y)])
def test_a_view_keeps_the_buffer(x, pool, view):
    y = infer(x)
    expected = np.asarray(view(y)).copy()
    kept = view(y)
    del y
    gc.collect()
    assert not pool
    other = infer(x + 1)
    np.testing.assert_array_equal(np.asarray(kept), expected)
    assert not np.shares_memory(np.asarray(kept), other)


def test_living_outputs_share_nothing(x):
    ys = [infer(x) for _ in range(5)]
    assert len({address(y) for y in ys}) == 5


def test_idle_memory_is_bounded(x, pool):
    fastbn.set_pool_limit(2 * x.nbytes)
    ys = [infer(x) for _ in range(5)]
    del ys
    assert sum(b.memory.size for b in pool) <= 2 * x.nbytes
    fastbn.set_pool_limit(x.nbytes)
    assert len(pool) == 1
    fastbn.empty_pool()
    assert not pool


def test_off_by_a_switch(x, pool):
    fastbn.set_pool_limit(0)
    y = infer(x)
    assert y.base is None
    del y
    assert not pool


def test_an_output_leased_before_the_switch_is_let_go(x, pool):
    y = infer(x)
    fastbn.set_pool_limit(0)
    del y
    assert not pool


def test_small_outputs_and_out_do_not_touch_the_pool(x, pool):
    infer(x[:1])
    infer(x, out=np.empty_like(x))
    assert not pool


def test_a_buffer_much_too_large_is_not_taken(x, pool):
    del_me = infer(x)
    del del_me
    infer(x[:11])
    assert len(pool) == 2


def test_memory_order_and_dtype(x):
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    y = infer(nhwc)
    assert y.strides == nhwc.strides
    np.testing.assert_array_equal(y, infer(x))
    assert infer(x.astype("float64")).dtype == np.float64
    assert infer((x * 10).astype("int8")).dtype == np.float32


@pytest.mark.jit("so many values take minutes as plain Python")
def test_a_mean_pool_does_not_leak_into_results(x):
    """A recycled buffer holds old values: every element must be overwritten."""
    y, saved = fastbn.batch_norm_train(x)
    expected = y.copy()
    y.fill(np.nan)
    del y
    again, _ = fastbn.batch_norm_train(x)
    np.testing.assert_array_equal(again, expected)
    dx = fastbn.batch_norm_backward(x, saved)[0]
    expected = dx.copy()
    dx.fill(np.nan)
    del dx
    np.testing.assert_array_equal(fastbn.batch_norm_backward(x, saved)[0], expected)


@pytest.mark.jit("so many values take minutes as plain Python")
def test_threads_never_get_one_buffer_twice(x):
    wrong = []

    def work(value):
        for _ in range(30):
            a = np.full((8, 4, 200, 200), value, np.float32)
            y = infer(a)
            y += 1
            if not (y == y.flat[0]).all() or abs(y.flat[0] - (value / np.sqrt(1 + 1e-5) + 1)) > 1e-4:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(v,)) for v in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_garbage_collection_during_a_lease(pool):
    """It may return the buffer of an output that lay in a cycle, while the idle ones are looked through."""
    thresholds = gc.get_threshold()
    try:
        for allocations in range(20):
            gc.disable()
            gc.collect()
            fastbn.empty_pool()
            leased = [_memory._lease(1000) for _ in range(25)]
            cycle = [leased.pop()]
            cycle.append(cycle)
            del cycle, leased
            assert len(pool) == 24
            gc.set_threshold(gc.get_count()[0] + allocations)  # the collection comes after so many
            gc.enable()
            _memory._lease(9)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


class Raced(collections.deque):
    """Whatever one looks for, another thread has just taken it."""

    def pop(self):
        self.clear()
        return super().pop()

    def remove(self, buffer):
        self.clear()
        super().remove(buffer)


def test_another_thread_may_be_quicker(monkeypatch):
    taken, other = _memory._Buffer(1000), _memory._Buffer(1000)
    monkeypatch.setattr(_memory, "_free", Raced([taken, other]))
    leased = _memory._lease(1000)
    assert not np.shares_memory(leased, taken.memory)
    assert not np.shares_memory(leased, other.memory)
    _memory._free.extend([taken, other])
    fastbn.empty_pool()
    assert not _memory._free


def test_a_buffer_of_the_right_size_is_taken_and_cut(pool):
    sizes = [1000, 1250, 1252]
    buffers = {n: _memory._Buffer(n) for n in sizes}
    pool.extend(buffers.values())
    kept = []
    for size, found in ((1001, 1250), (1000, 1000), (1001, None), (1002, 1252), (1000, None)):
        a = _memory._lease(size)
        kept.append(a)
        assert (a.shape, a.dtype) == ((size,), np.uint8)
        shared = [n for n, b in buffers.items() if np.shares_memory(a, b.memory)]
        assert shared == ([] if found is None else [found])
        buffers.pop(found, None)


def test_a_buffer_is_aligned_and_as_large_as_asked():
    for size in (1, 64, 1000):
        memory = _memory._Buffer(size).memory
        assert (memory.size, memory.dtype, memory.ctypes.data % 64) == (size, np.uint8, 0)


def test_the_latest_buffer_is_used_first_and_kept_longest(pool):
    first, second = (_memory._lease(1 << 12) for _ in range(2))
    places = address(first), address(second)
    del first
    del second
    assert [b.memory.ctypes.data for b in pool] == [places[1], places[0]]
    _memory._trim(1 << 12)
    assert [b.memory.ctypes.data for b in pool] == [places[1]]
    _memory._trim((1 << 12) - 1)
    assert not pool


@pytest.mark.parametrize(("value", "limit"), [(None, 1 << 29), ("0", 0), ("12345", 12345)])
def test_the_limit_of_the_environment(monkeypatch, value, limit):
    monkeypatch.delenv("FASTBN_POOL_LIMIT", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTBN_POOL_LIMIT", value)
    assert loaded_again()._limit == limit


@pytest.mark.parametrize("value", ["much", "-1", "1e9", ""])
def test_a_bad_limit_of_the_environment_is_told_and_ignored(monkeypatch, value):
    monkeypatch.setenv("FASTBN_POOL_LIMIT", value)
    with pytest.warns(
        UserWarning, match=f"^FASTBN_POOL_LIMIT is {value!r}, expected a number of bytes; it is ignored$"
    ):
        module = loaded_again()
    assert module._limit == 1 << 29


def loaded_again():
    """The module as it is in a new process."""
    spec = importlib.util.spec_from_file_location("fastbn._memory_again", _memory.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_beyond_the_limit_outputs_are_right_and_not_recycled(x, pool):
    """Neither one byte too small nor one too large: what may stay is counted in bytes."""
    expected = infer(x[:15], out=np.empty_like(x[:15]))
    for limit, kept in ((x[:15].nbytes - 1, 0), (x[:15].nbytes, 1), (2 * x[:15].nbytes - 1, 1)):
        fastbn.set_pool_limit(limit)
        ys = [infer(x[:15]) for _ in range(3)]
        for y in ys:
            np.testing.assert_array_equal(y, expected)
        del ys, y
        assert len(pool) == kept
        fastbn.empty_pool()


def test_emptying_while_outputs_live(x, pool):
    y = infer(x)
    expected, where = y.copy(), address(y)
    fastbn.empty_pool()
    other = infer(x + 1)
    assert not np.shares_memory(y, other)
    np.testing.assert_array_equal(y, expected)
    del y
    assert [address(b.memory) for b in pool] == [where]


def test_no_limit_is_too_large_but_for_a_machine(x, pool):
    fastbn.set_pool_limit(sys.maxsize)
    del_me = infer(x)
    del del_me
    assert len(pool) == 1
    with pytest.raises(ValueError, match="set_pool_limit: nbytes is 9223372036854775808, expected 0 to"):
        fastbn.set_pool_limit(sys.maxsize + 1)
    assert _memory._limit == sys.maxsize


def test_an_output_that_dies_in_a_finalizer_of_the_collector(x, pool):
    """Leases that end while the collector runs, in cycles of their own, one of them revived for a moment."""

    class Holder:
        def __init__(self):
            self.y, self.me = infer(x), self

        def __del__(self):
            other = infer(x)  # a lease in the middle of a collection
            seen.append(np.shares_memory(other, self.y))

    seen = []
    for _ in range(4):
        Holder()
    gc.collect()
    assert seen == [False] * 4
    assert len({address(b.memory) for b in pool}) == len(pool) >= 4


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), ("much", TypeError), (1.5, TypeError)])
def test_bad_limits(value, error):
    with pytest.raises(error, match="set_pool_limit: nbytes is"):
        fastbn.set_pool_limit(value)
