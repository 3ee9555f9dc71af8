"""The layer: parameters and running statistics over steps, its state, and that a failing call leaves it as it was."""

import copy
import pickle
import weakref

import numpy as np
import pytest
import reference
from arrays import SMALL, Case
from refusals import refused

import fastbn

CASE = Case("NCHW", (4, 3, 5, 7))


def state_bytes(bn):
    arrays = {k: np.asarray(v).tobytes() for k, v in bn.state_dict().items()}
    return arrays, bn.training, bn._saved, bn._pool.count


def batches(rng, sizes=(4, 2, 7), dtype="float32"):
    return [rng.normal(3, 2, (n, 3, 5)).astype(dtype) for n in sizes]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("correction", [0, 1])
def test_training_steps_against_the_oracle(rng, dtype, correction):
    bn = fastbn.BatchNorm(3, momentum=0.8, correction=correction, eps=1e-3, dtype=dtype)
    bn.gamma[:], bn.beta[:] = rng.normal(size=(2, 3))
    mean, var = np.zeros(3), np.ones(3)
    for step, x in enumerate(batches(rng, dtype=dtype), 1):
        dy = rng.normal(size=x.shape).astype(dtype)
        y, expected = bn(x), reference.train(x, bn.gamma, bn.beta, eps=1e-3)
        reference.assert_within(y, expected.y, expected.budget, "y")
        dx, expected = bn.backward(dy), reference.backward(dy, x, bn.gamma, eps=1e-3)
        reference.assert_within(dx, expected.dx, expected.dx_budget, "dx")
        reference.assert_within(bn.dgamma, expected.dgamma, expected.dgamma_budget, "dgamma")
        reference.assert_within(bn.dbeta, expected.dbeta, expected.dbeta_budget, "dbeta")
        assert bn.dgamma.dtype == bn.dbeta.dtype == bn.running_mean.dtype == dtype
        batch_mean, batch_var = reference.mean_var(x, 1)
        n = reference.count(x, 1)
        mean = reference.running(mean, batch_mean, 0.8)
        var = reference.running(var, batch_var * n / (n - correction), 0.8)
        assert bn.num_batches_tracked == step
        rtol = 4 * step * np.finfo(dtype).eps
        np.testing.assert_allclose(bn.running_mean, mean.astype("float64"), rtol=rtol)
        np.testing.assert_allclose(bn.running_var, var.astype("float64"), rtol=rtol)
    bn.eval()
    x = batches(rng, dtype=dtype)[0]
    expected = reference.infer(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta, eps=1e-3)
    before = state_bytes(bn)[0]
    reference.assert_within(bn(x), expected.y, expected.budget, "eval y")
    assert state_bytes(bn)[0] == before


@pytest.mark.parametrize("case", [SMALL[1], SMALL[8], SMALL[15], SMALL[18], SMALL[12]], ids=str)
def test_layouts(rng, case):
    d = case.data(rng, "float32")
    channels = case.channels[0] if isinstance(case.axis, int) else case.channels
    bn = fastbn.BatchNorm(channels, axis=case.axis)
    y, saved = fastbn.batch_norm_train(d.x, axis=case.axis)
    np.testing.assert_array_equal(bn(d.x), y)
    np.testing.assert_array_equal(bn.backward(d.dy), fastbn.batch_norm_backward(d.dy, saved)[0])
    assert bn.running_var.shape == bn.dgamma.shape == case.channels
    z = fastbn.batch_norm(d.x, bn.running_mean, bn.running_var, axis=case.axis)
    np.testing.assert_array_equal(bn.eval()(d.x), z)


def test_momentum_none_pools_every_sample_exactly(rng):
    bn = fastbn.BatchNorm(3, momentum=None)
    parts = batches(rng, (4, 2, 7, 1))
    for x in parts:
        bn(x)
    whole = fastbn.moments(np.concatenate(parts))
    assert bn.running_mean.dtype == np.float64
    np.testing.assert_allclose(bn.running_mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(bn.running_var, whole.var(correction=1), rtol=1e-14)
    assert bn.num_batches_tracked == 4


def test_a_pool_goes_on_after_a_state_is_loaded(rng):
    parts = batches(rng, (4, 2, 7))
    first, second = fastbn.BatchNorm(3, momentum=None), fastbn.BatchNorm(3, momentum=None)
    first(parts[0])
    first(parts[1])
    second.load_state_dict(first.state_dict())
    second(parts[2])
    whole = fastbn.moments(np.concatenate(parts))
    np.testing.assert_allclose(second.running_mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(second.running_var, whole.var(correction=1), rtol=1e-14)


@pytest.mark.parametrize("correction", [0, 1])
def test_fit_population_is_that_of_all_samples(rng, correction):
    parts = batches(rng, (4, 1, 7))
    bn = fastbn.BatchNorm(3, correction=correction, dtype="float64").eval()
    assert bn.fit_population(iter(parts)) is bn
    whole = fastbn.moments(np.concatenate(parts))
    np.testing.assert_allclose(bn.running_mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(bn.running_var, whole.var(correction), rtol=1e-14)
    assert not bn.training


def test_fit_population_that_fails_changes_nothing(rng):
    def broken():
        yield batches(rng)[0]
        raise OSError("no more")

    bn = fastbn.BatchNorm(3)
    before = state_bytes(bn)
    with pytest.raises(OSError, match="no more"):
        bn.fit_population(broken())
    fn = "BatchNorm.fit_population"
    refused(lambda: bn.fit_population([]), fn, "batches", ValueError)
    refused(lambda: bn.fit_population([np.ones((1, 3))]), fn, "batches", ValueError)
    refused(lambda: bn.fit_population([np.ones((2, 3)), np.ones((2, 4))]), fn, "batch", ValueError)
    refused(lambda: bn.fit_population([np.ones((2, 3)), np.ones((2, 3), complex)]), fn, "batch", TypeError)
    assert state_bytes(bn) == before


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_center_and_scale_off(rng, center, scale):
    x = batches(rng)[0]
    bn = fastbn.BatchNorm(3, center=center, scale=scale)
    names = {"running_mean", "running_var", "num_batches_tracked"} | ({"beta"} if center else set())
    assert set(bn.state_dict()) == names | ({"gamma"} if scale else set())
    np.testing.assert_array_equal(bn(x), fastbn.batch_norm_train(x)[0])
    bn.backward(np.ones_like(x))
    assert (bn.beta is None) == (bn.dbeta is None) == (not center)
    assert (bn.gamma is None) == (bn.dgamma is None) == (not scale)
    assert bn.eval()(x).shape == x.shape


def test_without_running_statistics_evaluation_uses_those_of_x(rng):
    x = batches(rng)[0]
    bn = fastbn.BatchNorm(3, track_running_stats=False)
    assert bn.running_mean is bn.running_var is None
    assert set(bn.state_dict()) == {"gamma", "beta"}
    y = bn(x)
    np.testing.assert_array_equal(bn.eval()(x), y)
    np.testing.assert_array_equal(y, fastbn.batch_norm_train(x)[0])
    refused(bn.fold, "BatchNorm.fold", "running statistics", ValueError)
    refused(lambda: bn.fit_population([x]), "BatchNorm.fit_population", "running statistics", ValueError)
    copied = fastbn.BatchNorm(3, track_running_stats=False).load_state_dict(bn.state_dict())
    np.testing.assert_array_equal(copied(x), y)


def test_train_and_eval_return_the_layer():
    bn = fastbn.BatchNorm(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training
    assert not bn.train(False).training


def test_backward_needs_a_training_call(rng):
    x = batches(rng)[0]
    bn = fastbn.BatchNorm(3)
    refused(lambda: bn.backward(x), "BatchNorm.backward", "forward", ValueError)
    bn.eval()(x)
    refused(lambda: bn.backward(x), "BatchNorm.backward", "forward", ValueError)
    bn.train()(x)
    bn.eval()(x)
    refused(lambda: bn.backward(x), "BatchNorm.backward", "forward", ValueError)
    bn.train()(x, save=False)
    refused(lambda: bn.backward(x), "BatchNorm.backward", "forward", ValueError)


def test_a_frozen_layer_has_a_backward(rng):
    x, dy = batches(rng)[0], batches(rng)[0]
    bn = fastbn.BatchNorm(3)
    bn.gamma[:] = rng.normal(size=3)
    bn(x)
    bn.eval()(x, save=True)
    expected = reference.backward(dy, x, bn.gamma, fixed=(bn.running_mean, bn.running_var))
    reference.assert_within(bn.backward(dy), expected.dx, expected.dx_budget, "dx")
    reference.assert_within(bn.dgamma, expected.dgamma, expected.dgamma_budget, "dgamma")
    reference.assert_within(bn.dbeta, expected.dbeta, expected.dbeta_budget, "dbeta")
    refused(lambda: bn(x, save=True, out=x), "BatchNorm", "out", ValueError)
    out = np.empty_like(x)
    np.testing.assert_array_equal(bn(x, save=True, out=out), bn(x))


def test_gradients_of_a_frozen_layer_have_the_dtypes_of_its_parameters(rng):
    bn = fastbn.BatchNorm(3).eval()
    x = batches(rng, dtype="float64")[0]
    y = bn(x, save=True)
    assert (y.dtype, bn.backward(x).dtype) == (np.float64, np.float64)
    assert (bn.dgamma.dtype, bn.dbeta.dtype) == (np.float32, np.float32)


def test_evaluation_keeps_no_array_alive(rng):
    x = batches(rng)[0]
    alive = weakref.ref(x)
    bn = fastbn.BatchNorm(3)
    bn(x)
    bn.eval()(x)
    del x
    assert alive() is None


def test_out_may_be_x_and_dy(rng):
    x, dy = batches(rng)[0], batches(rng)[0]
    bn, other = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    y, dx = bn(x), bn.backward(dy)
    z = bn.eval()(x)
    out = np.empty_like(x)
    assert other(x, out=out) is out
    assert other.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(dy, dx)
    assert other.eval()(x, out=x) is x
    np.testing.assert_array_equal(x, z)


def test_folded_it_is_the_same_map(rng):
    x = batches(rng)[0].astype("float64")
    bn = fastbn.BatchNorm(3, dtype="float64")
    bn.gamma[:], bn.beta[:] = rng.normal(size=(2, 3))
    bn(x)
    scale, shift = bn.fold()
    np.testing.assert_allclose(x * scale[:, None] + shift[:, None], bn.eval()(x), rtol=1e-12, atol=1e-13)
    assert scale.dtype == shift.dtype == np.float64
    bare = fastbn.BatchNorm(3, center=False, scale=False)
    bare(x.astype("float32"))
    scale, shift = bare.fold()
    np.testing.assert_allclose(scale, 1 / np.sqrt(bare.running_var + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(shift, -bare.running_mean * scale, rtol=1e-6)
    assert scale.dtype == np.float32


def test_a_state_makes_the_same_layer(rng):
    x = batches(rng)[0]
    bn = fastbn.BatchNorm(3)
    bn.gamma[:], bn.beta[:] = rng.normal(size=(2, 3))
    bn(x)
    state = bn.state_dict()
    assert set(state) == {"gamma", "beta", "running_mean", "running_var", "num_batches_tracked"}
    other = fastbn.BatchNorm(3)
    gamma = other.gamma
    assert other.load_state_dict(state) is other
    assert other.gamma is gamma  # in place: an optimizer may hold it
    assert state_bytes(other)[0] == state_bytes(bn)[0]
    np.testing.assert_array_equal(other.eval()(x), bn.eval()(x))
    state["gamma"][:] = 99
    assert not (bn.gamma == 99).any()
    assert not (other.gamma == 99).any()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_copies_and_pickles(rng, clone, momentum):
    parts = batches(rng)
    bn = fastbn.BatchNorm(3, momentum=momentum, eps=1e-3)
    bn(parts[0])
    other = clone(bn)
    np.testing.assert_array_equal(other(parts[1]), bn(parts[1]))
    assert state_bytes(other)[0] == state_bytes(bn)[0]
    assert not np.shares_memory(other.running_mean, bn.running_mean)
    refused(lambda: clone(bn).backward(parts[1]), "BatchNorm.backward", "forward", ValueError)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_an_empty_batch_leaves_the_running_statistics_alone(rng, momentum):
    bn = fastbn.BatchNorm(3, momentum=momentum)
    bn(batches(rng)[0])
    before = state_bytes(bn)[0]
    y = bn(np.empty((0, 3, 5), "float32"))
    assert y.shape == (0, 3, 5)
    assert bn.backward(y).shape == y.shape
    assert state_bytes(bn)[0] == before


def test_float32_parameters_serve_float64_data(rng):
    x = batches(rng, dtype="float64")[0]
    bn = fastbn.BatchNorm(3)
    assert bn(x).dtype == np.float64
    assert bn.backward(x).dtype == np.float64
    assert bn.dgamma.dtype == bn.running_var.dtype == np.float32


def test_repr():
    assert repr(fastbn.BatchNorm(3)) == "BatchNorm(3)"
    assert repr(fastbn.BatchNorm(3, axis=-1, momentum=None, center=False)) == (
        "BatchNorm(3, axis=-1, momentum=None, center=False)"
    )
    bn = fastbn.BatchNorm((3, 4), axis=(1, 2), eps=1e-3, scale=False, track_running_stats=False, dtype="float64")
    again = eval(repr(bn), {"BatchNorm": fastbn.BatchNorm})
    assert repr(again) == repr(bn)
    assert (again.channels, again.gamma, again.dtype, again.eps) == ((3, 4), None, np.dtype("float64"), 1e-3)


def test_with_momentum_1_statistics_that_leave_the_start_out_are_plain_averages(rng):
    """Caffe's sums with a moving_average_fraction of 1; a moving average would stay where it started."""
    x = rng.normal(3, 2, (5, 8, 3))
    bn = fastbn.BatchNorm.like("caffe", 3, momentum=1.0, dtype="float64")
    for batch in x:
        bn(batch)
    np.testing.assert_allclose(bn.running_mean, x.mean((0, 1)), rtol=1e-13)
    np.testing.assert_allclose(bn.running_var, x.var(1, ddof=1).mean(0), rtol=1e-13)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_failing_backward_leaves_the_gradients(rng):
    x = batches(rng)[0]
    bn = fastbn.BatchNorm(3)
    bn(x)
    bn.backward(x)
    dgamma = bn.dgamma
    with pytest.raises(ValueError, match=r"backward: dy has shape \(2,\)"):
        bn.backward(np.ones(2))
    assert bn.dgamma is dgamma


def test_statistics_that_share_memory_are_found_before_anything_is_written(rng):
    bn = fastbn.BatchNorm(3)
    bn.running_var = bn.running_mean
    x = rng.normal(size=(4, 3))
    out, before = np.full_like(x, 7), state_bytes(bn)
    with pytest.raises(ValueError, match="BatchNorm: running_mean shares memory with running_var"):
        bn(x, out=out)
    assert (out == 7).all()
    assert state_bytes(bn) == before


@pytest.mark.parametrize(("name", "value"), [("momentum", 2), ("correction", 3)])
def test_a_spoiled_option_is_found_before_anything_is_written(rng, name, value):
    bn = fastbn.BatchNorm(3)
    x = rng.normal(size=(4, 3)).astype("float32")
    out, before = np.full_like(x, 7), state_bytes(bn)
    setattr(bn, name, value)
    refused(lambda: bn(x, out=out), "BatchNorm", name, ValueError)
    assert (out == 7).all()
    assert state_bytes(bn) == before


def test_a_state_may_be_made_of_the_layers_own_arrays(rng):
    bn = fastbn.BatchNorm(3)
    bn(batches(rng)[0])
    mean, var = bn.running_mean.copy(), bn.running_var.copy()
    arrays = {"gamma": bn.beta, "beta": bn.gamma, "running_mean": bn.running_var, "running_var": abs(bn.running_mean)}
    bn.load_state_dict(arrays | {"num_batches_tracked": 1})
    np.testing.assert_array_equal([bn.gamma, bn.beta], [[0] * 3, [1] * 3])
    np.testing.assert_array_equal([bn.running_mean, bn.running_var], [var, abs(mean)])


@pytest.mark.parametrize("name", ["beta", "running_var"])
def test_a_state_cannot_be_loaded_in_part(rng, name):
    """A read-only array would stop the loading after the first was written."""
    bn = fastbn.BatchNorm(3)
    bn(batches(rng)[0])
    state = {k: v + 1 for k, v in bn.state_dict().items()}
    getattr(bn, name).setflags(write=False)
    before = state_bytes(bn)
    refused(lambda: bn.load_state_dict(state), "BatchNorm.load_state_dict", name, ValueError)
    if name == "running_var":
        refused(lambda: bn.fit_population(batches(rng)), "BatchNorm.fit_population", name, ValueError)
    assert state_bytes(bn) == before


@pytest.mark.parametrize("spoil", [lambda a: a.setflags(write=False), lambda a: a.resize((5,), refcheck=False)])
def test_a_spoiled_statistic_is_found_before_anything_is_written(rng, spoil):
    bn = fastbn.BatchNorm(3)
    x = rng.normal(size=(4, 3)).astype("float32")
    out = np.full_like(x, 7)
    spoil(bn.running_var)
    with pytest.raises(ValueError, match="BatchNorm: running_var"):
        bn(x, out=out)
    assert (out == 7).all()
    assert bn.num_batches_tracked == 0
    assert (bn.running_mean == 0).all()


@pytest.mark.parametrize("momentum", [0.9, None])
def test_infinite_data_pass_without_warnings(momentum):
    """Warnings are errors here: one in the middle of an update would leave it half done."""
    bn = fastbn.BatchNorm(1, momentum=momentum)
    for value in (np.inf, -np.inf, 1.0):
        bn(np.array([[value], [1.0], [2.0]], np.float32))
    bn.backward(np.ones((3, 1), np.float32))
    bn.fold()
    assert np.isnan(bn.running_mean).all()
    assert bn.num_batches_tracked == 3


def test_a_pool_resumes_with_the_same_bits(rng):
    for seed in range(50):
        batches = [np.random.default_rng(seed).normal(3, 2, (n, 2)) for n in (5, 8, 3)]
        bn = fastbn.BatchNorm(2, momentum=None, dtype="float64")
        bn(batches[0])
        bn(batches[1])
        other = fastbn.BatchNorm(2, momentum=None, dtype="float64").load_state_dict(bn.state_dict())
        for layer in (bn, other):
            layer(batches[2])
        np.testing.assert_array_equal(bn.running_var, other.running_var)
        np.testing.assert_array_equal(bn.running_mean, other.running_mean)


def test_a_pooled_state_serves_a_layer_of_another_momentum(rng):
    bn = fastbn.BatchNorm(2, momentum=None)
    bn(rng.normal(size=(9, 2)))
    plain = fastbn.BatchNorm(2).load_state_dict(bn.state_dict())
    np.testing.assert_allclose(plain.running_var, bn.running_var, rtol=1e-7)


# ------------------------------------------------------------------------------------------------------------- weights


class Weighted:
    """What a forward with weights leaves, as far as the layer reads it."""

    def __init__(self, m):
        self.moments, self.count = m, m.count

    def _shared_moments(self):
        return self.moments


@pytest.fixture
def weigh(monkeypatch):
    """A training call of a layer whose batch has these moments."""

    def call(bn, count, mean, m2):
        m = fastbn.Moments(count, mean, m2)
        monkeypatch.setattr("fastbn.layer.trained", lambda x, *_, **__: (x, Weighted(m)))
        bn(np.empty((0, *bn.channels)))
        monkeypatch.undo()
        return m

    return call


def weighted_batches(rng, steps=5):
    """Weight, mean and m2 for each of six channels: always; at times; up to the first; too little; never; once one."""
    for i in range(steps):
        w = np.array([rng.uniform(1.5, 9), rng.uniform(2, 3) * (i % 2), 4.0 * (i == 0), 1e-3, 0, 1.0 * (i == 3)])
        yield w, rng.normal(3, 2, 6), np.where(w == 0, np.nan, rng.uniform(1, 2, 6))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_weighted_step_moves_the_channels_that_it_has(rng, weigh, correction, dtype):
    bn = fastbn.BatchNorm(6, momentum=0.8, correction=correction, dtype=dtype)
    for step, (w, mean, m2) in enumerate(weighted_batches(rng), 1):
        expected = [bn.running_mean.copy(), bn.running_var.copy()]
        weigh(bn, w, mean, m2)
        for c in range(6):
            if w[c] > 0:
                expected[0][c] = reference.running(expected[0][c], mean[c], 0.8)
            if w[c] > correction:
                expected[1][c] = reference.running(expected[1][c], m2[c] / (w[c] - correction), 0.8)
        rtol = 4 * np.finfo(dtype).eps
        np.testing.assert_allclose(bn.running_mean, expected[0], rtol=rtol)
        np.testing.assert_allclose(bn.running_var, expected[1], rtol=rtol)
        assert bn.num_batches_tracked == step
    assert (bn.running_mean[4], bn.running_var[4]) == (0, 1)
    assert (bn.running_var[3] == 1) == (correction == 1)
    assert bn.running_mean.dtype == bn.running_var.dtype == dtype


@pytest.mark.parametrize("correction", [0, 1])
def test_a_pool_of_weighted_batches(rng, weigh, correction):
    """The exact statistics of each channel; 0 and 1 where there was none, a variance of 1 until there is enough."""
    bn = fastbn.BatchNorm(6, momentum=None, correction=correction)
    whole = sum(weigh(bn, *batch) for batch in weighted_batches(rng))
    some, enough = whole.count > 0, whole.count > correction
    np.testing.assert_array_equal(some, [True, True, True, True, False, True])
    np.testing.assert_array_equal(enough, some & [True, True, True, correction == 0, True, correction == 0])
    np.testing.assert_array_equal(bn.running_mean, np.where(some, whole.mean, 0))
    np.testing.assert_array_equal(bn.running_var, np.where(enough, whole.var(correction), 1))
    weigh(bn, np.full(6, 2.0), np.full(6, 3.0), np.full(6, 4.0))
    assert (bn.running_mean[4], bn.running_var[4]) == (3, 4 / (2 - correction))


@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_batch_of_weight_zero_leaves_the_layer_alone(rng, weigh, momentum):
    bn = fastbn.BatchNorm(3, momentum=momentum)
    bn(batches(rng)[0])
    before = state_bytes(bn)[0]
    weigh(bn, np.zeros(3), np.full(3, np.nan), np.full(3, np.nan))
    assert state_bytes(bn)[0] == before


def archived(state, path):
    """The state as a file of NumPy keeps it."""
    np.savez(path, **state)
    with np.load(path) as kept:
        return dict(kept)


@pytest.mark.parametrize("correction", [0, 1])
def test_a_weighted_pool_resumes_with_the_same_bits(rng, weigh, correction, tmp_path):
    """From a state, from a file, as an open file, from a copy and a pickle: in channels not seen yet, too."""
    options = {"momentum": None, "correction": correction}
    steps = list(weighted_batches(rng))
    bn = fastbn.BatchNorm(6, **options)
    for step in steps[:3]:
        weigh(bn, *step)
    state = bn.state_dict()
    assert state["running_count"].dtype == np.float64
    file = tmp_path / "state.npz"
    others = [fastbn.BatchNorm(6, **options).load_state_dict(s) for s in (state, archived(state, file))]
    with np.load(file) as opened:
        others.append(fastbn.BatchNorm(6, **options).load_state_dict(opened))
    others += [copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))]
    state["running_count"][:] = 99  # it was a copy
    for step in steps[3:]:
        for layer in (bn, *others):
            weigh(layer, *step)
    x = rng.normal(size=(9, 6))
    for layer in (bn, *others):
        layer(x)
        assert state_bytes(layer)[0] == state_bytes(bn)[0]


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "int16"])
def test_a_state_may_count_each_channel(rng, tmp_path, shape, dtype):
    """Of equal weights the pool is that of the count, to the bit."""
    axis = tuple(range(1, 1 + len(shape)))
    layers = [fastbn.BatchNorm(shape, axis=axis, momentum=None) for _ in range(3)]
    layers[0](rng.normal(size=(7, *shape)))
    state = layers[0].state_dict()
    counts = state | {"running_count": np.full(shape, 7, dtype)}
    layers[1].load_state_dict(counts)
    layers[2].load_state_dict(archived(counts, tmp_path / "state.npz"))
    x = rng.normal(size=(5, *shape))
    for bn in layers:
        bn(x)
        assert np.all(bn.state_dict()["running_count"] == 12)
        for name in ("running_mean", "running_var"):
            assert getattr(bn, name).tobytes() == getattr(layers[0], name).tobytes()
    # An integer array of one element has always been a plain count.
    assert isinstance(layers[1].state_dict()["running_count"], int) == (shape == () and dtype == "int16")


@pytest.mark.parametrize("count", [np.array([3]), np.array(3), np.int8(3), 3])
def test_a_plain_count_may_be_an_array_of_one_integer(rng, count):
    bn = fastbn.BatchNorm(2, momentum=None)
    bn(rng.normal(size=(3, 2)))
    other = fastbn.BatchNorm(2, momentum=None).load_state_dict(bn.state_dict() | {"running_count": count})
    assert other.state_dict()["running_count"] == 3
    assert type(other.state_dict()["running_count"]) is int


def test_a_population_follows_a_weighted_pool(rng, weigh):
    """fit_population takes batches without weights, whatever the pool was before."""
    bn = fastbn.BatchNorm(6, momentum=None)
    for step in weighted_batches(rng):
        weigh(bn, *step)
    x = rng.normal(size=(9, 6))
    bn.fit_population([x])
    np.testing.assert_array_equal(bn.running_var, fastbn.moments(x).var(1))
    assert bn.state_dict()["running_count"] == 9


def test_a_count_that_is_no_weight_leaves_the_layer(rng):
    bn = fastbn.BatchNorm(3, momentum=None)
    bn(batches(rng)[0])
    state, before = bn.state_dict(), state_bytes(bn)
    for bad in (
        np.array([1, -1.0, 1]),
        np.array([1, np.nan, 1]),
        np.ones(4),
        np.ones((3, 1)),
        np.ones(1),
        np.float64(1),
    ):
        refused(lambda: bn.load_state_dict(state | {"gamma": np.full(3, 7), "running_count": bad}),  # noqa: B023
                "BatchNorm.load_state_dict", "running_count", ValueError)  # fmt: skip
        assert state_bytes(bn) == before
