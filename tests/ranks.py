"""What every rank runs in test_interop_mpi: `mpiexec -n 4 python -m mpi4py tests/ranks.py`.

Each case runs on the first 1, 2, 3 and 4 ranks. All ranks know all data, so each compares its own part of the result
with that of one process; rank 0 prints the name of a case that is done. A case that fails anywhere ends all ranks.
"""

import contextlib
import io
import sys
import time

import numpy as np
import pytest
import reference
from mpi4py import MPI

import fastbn
import fastbn.interop.mpi as fm

WORLD = MPI.COMM_WORLD
SIZES = (5, 0, 8, 3)  # of the batches of the ranks
SPREAD = np.array([0.5, 1.0, 3.0]).reshape(3, 1, 1)


class Counting(MPI.Intracomm):
    """A communicator that notes what it sends: the bytes of every message."""

    def __init__(self, comm):
        super().__init__()
        self.sent = []

    def Allgather(self, send, recv):
        self.sent.append(send[0].nbytes)
        super().Allgather(send, recv)

    def allgather(self, value):
        self.sent.append(value)
        return super().allgather(value)


def batches(sizes, dtype="float64", offset=0.0, seed=0):
    """The batches of all ranks, and all of them in one array; and as many gradients and residuals."""
    rng = np.random.default_rng(seed)
    arrays = []
    for around in (offset, 0.0, 0.0):
        whole = (around + SPREAD * rng.normal(size=(sum(sizes), 3, 4, 5))).astype(dtype)
        arrays.append((np.split(whole, np.cumsum(sizes)[:-1]), whole))
    return arrays


def laid_out(x, rank):
    """NCHW on even ranks, an NCHW view of NHWC memory on odd ones."""
    return x if rank % 2 == 0 else np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2)


def part_of(whole, sizes, rank):
    return np.split(whole, np.cumsum(sizes)[:-1])[rank]


def same_on_all(comm, *arrays):
    bits = comm.allgather(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
    assert len(set(bits)) == 1, "the ranks have other bits"


def close(found, expected, scale=None):
    """12 digits of what is added up; `scale` is the size of its terms."""
    scale = abs(expected).max(initial=0.0) if scale is None else scale
    error = abs(found - expected)
    assert (error <= 1e-12 * scale).all(), f"{error.max()} of {scale}"


def moments_are_those_of_one_process(comm):
    for offset in (0.0, 1e8, -1e8):
        sizes = SIZES[: comm.size]
        (parts, whole), _, _ = batches(sizes, offset=offset)
        expected = fastbn.moments(whole)
        for axis in (1, (1, 3), ()):
            expected = fastbn.moments(whole, axis=axis)
            m = fm.moments(laid_out(parts[comm.rank], comm.rank), comm=comm, axis=axis)
            assert m.count == expected.count
            assert type(m.count) is int
            np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(m.m2, expected.m2, rtol=1e-12)
            same_on_all(comm, m.mean, m.m2)


def float64_has_twelve_digits_of_one_process(comm):
    gamma, beta = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 2.0])
    sizes = SIZES[: comm.size]
    (parts, whole), (dys, dy), (zs, z) = batches(sizes, offset=3.0)
    for residual, activation in ((False, None), (True, None), (False, "relu"), (True, "relu")):
        more = {"activation": activation, "eps": 1e-3}
        y0, saved0 = fastbn.batch_norm_train(whole, gamma, beta, residual=z if residual else None, **more)
        dx0, dgamma0, dbeta0, *dz0 = fastbn.batch_norm_backward(dy, saved0)
        own = laid_out(parts[comm.rank], comm.rank)
        y, saved = fm.batch_norm_train(
            own, gamma, beta, comm=comm, residual=zs[comm.rank] if residual else None, **more
        )
        dx, dgamma, dbeta, *dz = fm.batch_norm_backward(dys[comm.rank], saved)
        close(y, part_of(y0, sizes, comm.rank), abs(y0).max())
        close(dx, part_of(dx0, sizes, comm.rank), abs(dx0).max())
        close(dgamma, dgamma0, abs(dy).sum())
        close(dbeta, dbeta0, abs(dy).sum())
        assert len(dz) == len(dz0)
        for a, b in zip(dz, dz0, strict=True):
            np.testing.assert_array_equal(a, part_of(b, sizes, comm.rank))
        assert saved.count == saved0.count
        assert saved.x is own
        same_on_all(comm, dgamma, dbeta, saved.mean, saved.var)


def every_dtype_is_within_the_error_budget(comm):
    gamma, beta = np.array([1.0, -2.0, 0.5], "float32"), np.array([0.0, 1.0, 2.0], "float32")
    sizes = SIZES[: comm.size]
    for dtype, offset in (("float64", 1e8), ("float32", 0.0), ("float32", 1e4), ("int16", 100.0)):
        (parts, whole), _, _ = batches(sizes, dtype, offset)
        _, (dys, dy), _ = batches(sizes, "float64" if dtype == "float64" else "float32")
        y, saved = fm.batch_norm_train(laid_out(parts[comm.rank], comm.rank), gamma, beta, comm=comm)
        dx, dgamma, dbeta = fm.batch_norm_backward(dys[comm.rank], saved)
        forward = reference.train(whole, gamma, beta)
        gradients = reference.backward(dy, whole, gamma)
        assert y.dtype == dx.dtype == reference.result_dtype(dtype)
        assert dgamma.dtype == dbeta.dtype == np.float32
        at = (sizes, comm.rank)
        reference.assert_within(y, part_of(forward.y, *at), part_of(forward.budget, *at), f"y {dtype}")
        reference.assert_within(dx, part_of(gradients.dx, *at), part_of(gradients.dx_budget, *at), f"dx {dtype}")
        # Rounded to float32, as gamma is, whatever the budget's dtype.
        for name, a in (("dgamma", dgamma), ("dbeta", dbeta)):
            expected, budget = getattr(gradients, name), getattr(gradients, name + "_budget")
            reference.assert_within(a, expected, budget + np.finfo("float32").eps * abs(expected), f"{name} {dtype}")


def out_takes_the_results(comm):
    (parts, _), (dys, _), _ = batches(SIZES[: comm.size])
    x, dy = parts[comm.rank], dys[comm.rank]
    y, saved = fm.batch_norm_train(x, comm=comm)
    dx = fm.batch_norm_backward(dy, saved)[0]
    out, dout = np.empty_like(x), dy.copy()
    assert fm.batch_norm_train(x, comm=comm, out=out)[0] is out
    assert fm.batch_norm_backward(dout, saved, out=dout)[0] is dout
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(dout, dx)


def layers_stay_equal_and_follow_one_process(comm):
    sizes = SIZES[: comm.size]
    for options in ({}, {"momentum": None}, {"correction": 0, "activation": "relu"}, {"scale": False}):
        bn, alone = (
            fm.BatchNorm(3, comm=comm, dtype="float64", **options),
            fastbn.BatchNorm(3, dtype="float64", **options),
        )
        for seed in range(3):
            (parts, whole), (dys, dy), _ = batches(sizes, offset=2.0, seed=seed)
            y, dx = bn(laid_out(parts[comm.rank], comm.rank)), bn.backward(dys[comm.rank])
            y0, dx0 = alone(whole), alone.backward(dy)
            close(y, part_of(y0, sizes, comm.rank), abs(y0).max())
            close(dx, part_of(dx0, sizes, comm.rank), abs(dx0).max())
            for b in (bn, alone):
                for p, d in ((b.gamma, b.dgamma), (b.beta, b.dbeta)):
                    if p is not None:
                        p -= 0.01 * d
            assert (bn.dgamma is None) == (alone.dgamma is None)
        for name, value in alone.state_dict().items():
            np.testing.assert_allclose(bn.state_dict()[name], value, rtol=1e-11, err_msg=name)
        same_on_all(comm, *bn.state_dict().values())
        x = np.ones((2, 3, 4, 5)) + comm.rank
        np.testing.assert_array_equal(  # by itself, on one rank
            bn.eval()(x), fastbn.batch_norm(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta,
                                            activation=bn.activation)
        )  # fmt: skip
    keras = fm.BatchNorm.like("keras", 3, comm=comm)
    keras(np.ones((int(comm.rank == 0), 3)))  # Keras takes one value per channel
    np.testing.assert_allclose(keras.running_var, 0.99)


def no_batch_anywhere(comm):
    x = np.empty((0, 3, 4, 5))
    bn = fm.BatchNorm(3, comm=comm)
    y = bn(x)
    assert y.shape == bn.backward(y).shape == x.shape
    np.testing.assert_array_equal([bn.dgamma, bn.dbeta], np.zeros((2, 3)))
    np.testing.assert_array_equal([bn.running_mean, bn.running_var], [[0] * 3, [1] * 3])
    assert bn.num_batches_tracked == 0
    assert fm.moments(x, comm=comm).count == 0


def populations_pool_as_many_batches_as_each_rank_has(comm):
    (parts, whole), _, _ = batches(SIZES[: comm.size], offset=1e6)
    bn = fm.BatchNorm(3, comm=comm, momentum=None)
    bn.fit_population(np.split(parts[comm.rank], range(2, len(parts[comm.rank]), 2)) if len(parts[comm.rank]) else [])
    m = fastbn.moments(whole)
    np.testing.assert_allclose(bn.running_mean, m.mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, m.var(1), rtol=1e-12)
    same_on_all(comm, *bn.state_dict().values())


def a_population_goes_on_from_moments_that_all_ranks_have(comm):
    sizes = SIZES[: comm.size]
    (parts, whole), (_, before), _ = batches(sizes)
    start = fastbn.moments(before)
    alone = fastbn.BatchNorm(3, dtype="float64").fit_population([whole], start=start)
    bn = fm.BatchNorm(3, comm=comm, dtype="float64")
    own = parts[comm.rank]
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        bn.fit_population(iter([own[:1], own[1:]]), start=start, progress=True)
    assert "2/2" in shown.getvalue(), shown.getvalue()
    for layer in (bn, fm.BatchNorm(3, comm=comm, dtype="float64").fit_population(own, start=start, progress=False)):
        np.testing.assert_allclose(layer.running_mean, alone.running_mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(layer.running_var, alone.running_var, rtol=1e-12)
        same_on_all(comm, layer.running_mean, layer.running_var)
    for bad, kind, match in (
        ({"batches": 3}, TypeError, "batches is of type int"),
        ({"batches": [], "start": 3}, TypeError, "start is of type int"),
        ({"batches": [], "start": fastbn.Moments.empty(2)}, ValueError, "start has channels"),
        ({"batches": [], "progress": 3}, TypeError, "progress"),
    ):
        with pytest.raises((kind, RuntimeError), match=match):
            bn.fit_population(**bad)


def a_layer_in_evaluation_sends_nothing(comm):
    counting = Counting(comm)
    (parts, _), (dys, _), _ = batches(SIZES[: comm.size])
    x, dy = parts[comm.rank], dys[comm.rank]
    bn, alone = fm.BatchNorm(3, comm=counting), fastbn.BatchNorm(3)
    counting.sent.clear()
    for layer in (bn, alone):
        layer.eval()
    np.testing.assert_array_equal(bn(x, save=True), alone(x, save=True))
    np.testing.assert_array_equal(bn.backward(dy), alone.backward(dy))
    np.testing.assert_array_equal(bn.dgamma, alone.dgamma)
    assert counting.sent == []


def a_layer_without_running_statistics_has_those_of_its_ranks(comm):
    (parts, whole), _, _ = batches(SIZES[: comm.size])
    bn = fm.BatchNorm(3, comm=comm, track_running_stats=False)
    alone = fastbn.BatchNorm(3, track_running_stats=False)
    out = np.empty_like(parts[comm.rank])
    for _ in range(2):
        close(bn(parts[comm.rank], out=out), part_of(alone(whole), SIZES[: comm.size], comm.rank))
        bn.eval(), alone.eval()
    y, saved = fm.batch_norm_train(parts[comm.rank], comm=comm)
    assert f"count={saved.count}, rank {comm.rank} of {comm.size}" in repr(saved)
    with pytest.raises(TypeError, match=r"expected the Saved that fastbn\.interop\.mpi's"):
        fm.batch_norm_backward(y, fastbn.batch_norm_train(whole)[1])


def nan_stays_in_its_channel_on_all_ranks(comm):
    (parts, whole), (dys, _), _ = batches(SIZES[: comm.size])
    x = parts[comm.rank].copy()
    if comm.rank == 0:
        x[0, 1, 0, 0] = np.nan
        x[0, 2, 0, 0] = np.inf
    y, saved = fm.batch_norm_train(x, comm=comm)
    dx, dgamma, _ = fm.batch_norm_backward(dys[comm.rank], saved)
    assert np.isfinite(y[:, 0]).all()
    assert np.isfinite(dx[:, 0]).all()
    assert np.isnan(y[:, 1:]).all()
    assert np.isnan(dx[:, 1:]).all()
    np.testing.assert_array_equal(np.isnan(dgamma), [False, True, True])
    np.testing.assert_allclose(saved.mean[0], fastbn.moments(whole).mean[0], rtol=1e-12)


def messages_are_few_and_short(comm):
    counting = Counting(comm)
    x = batches(SIZES[: comm.size])[0][0][comm.rank]
    bn = fm.BatchNorm(3, comm=counting)
    counting.sent.clear()
    y = bn(x)
    bn.backward(y)
    assert counting.sent == [8 * (3 * 3 + 2), 8 * (2 * 3 + 1)], counting.sent
    counting.sent.clear()
    fm.batch_norm_train(x, comm=counting)
    assert counting.sent == [16, 8 * (3 * 3 + 2)], counting.sent


def an_error_on_one_rank_is_raised_on_all(comm):
    last = comm.size - 1
    x = np.arange(24.0).reshape(2, 3, 4) + comm.rank
    bn = fm.BatchNorm(3, comm=comm)
    _, saved = fm.batch_norm_train(x, comm=comm)

    def here(bad, good):
        return bad if comm.rank == last else good

    def interrupted():
        yield x
        if comm.rank == last:
            raise OSError("disk")

    before = bn.state_dict()
    calls = {
        "dtype": (TypeError, lambda: fm.batch_norm_train(here(x.astype(complex), x), comm=comm)),
        "channels": (ValueError, lambda: bn(here(x[:, :2], x))),
        "axis": (ValueError, lambda: fm.moments(x, comm=comm, axis=here(7, 1))),
        "gamma": (ValueError, lambda: fm.batch_norm_train(x, here(np.ones(4), None), comm=comm)),
        "eps": (ValueError, lambda: fm.batch_norm_train(x, comm=comm, eps=here(-1.0, 1e-5))),
        "out is x": (ValueError, lambda: fm.batch_norm_train(x, comm=comm, out=here(x, None))),
        "residual": (ValueError, lambda: bn(x, residual=here(x[:1], None))),
        "where": (TypeError, lambda: bn(x, where=here(x > 0, None))),
        "dy": (ValueError, lambda: fm.batch_norm_backward(here(x[:1], x), saved)),
        "dy dtype": (TypeError, lambda: fm.batch_norm_backward(here(x.astype(int), x), saved)),
        "a file": (RuntimeError if comm.rank != last else OSError, lambda: bn.fit_population(interrupted())),
        "options": (ValueError, lambda: fm.BatchNorm(3, comm=comm, momentum=here(2.0, 0.5))),
        "one value": (ValueError, lambda: fm.batch_norm_train(x[: here(1, 0), :, 0], comm=comm)),
    }
    if comm.size > 1:
        calls["other channels"] = ValueError, lambda: fm.batch_norm_train(here(x[:, :2], x), comm=comm)
        calls["other options"] = ValueError, lambda: fm.BatchNorm(here(4, 3), comm=comm)
    for what, (kind, call) in calls.items():
        with pytest.raises(kind) as raised:
            call()
        alone = what in ("one value", "other channels", "other options")
        if comm.rank != last and not alone:
            assert f"rank {last} of {comm.size} failed" in str(raised.value), (what, raised.value)
        # No message is left over: the next call works.
        assert comm.allreduce(1) == comm.size
    for name, value in before.items():
        np.testing.assert_array_equal(bn.state_dict()[name], value)
    bn(x)
    assert bn.num_batches_tracked == 1
    for bad in ("comm", MPI.COMM_NULL):
        with pytest.raises(TypeError, match=r"expected an mpi4py\.MPI\.Intracomm"):
            fm.moments(x, comm=bad)


CASES = [
    moments_are_those_of_one_process,
    float64_has_twelve_digits_of_one_process,
    every_dtype_is_within_the_error_budget,
    out_takes_the_results,
    layers_stay_equal_and_follow_one_process,
    no_batch_anywhere,
    populations_pool_as_many_batches_as_each_rank_has,
    a_population_goes_on_from_moments_that_all_ranks_have,
    a_layer_in_evaluation_sends_nothing,
    a_layer_without_running_statistics_has_those_of_its_ranks,
    nan_stays_in_its_channel_on_all_ranks,
    messages_are_few_and_short,
    an_error_on_one_rank_is_raised_on_all,
]


def main():
    for size in range(1, WORLD.size + 1):
        comm = WORLD.Split(WORLD.rank < size, WORLD.rank)
        for case in CASES:
            if WORLD.rank < size:
                try:
                    case(comm)
                except Exception:
                    sys.stderr.write(f"failed: {case.__name__} on rank {WORLD.rank} of {size}\n")
                    raise
            request = WORLD.Ibarrier()
            while not request.Test():  # asleep: a rank that waits in MPI keeps a processor busy
                time.sleep(0.002)
            if WORLD.rank == 0:
                sys.stdout.write(f"ok {case.__name__} {size}\n")
                sys.stdout.flush()
        comm.Free()


if __name__ == "__main__":
    main()
