"""Any history of a layer: calls in training and evaluation, backwards, states and copies, beside a plain model."""

import copy
import pickle

import numpy as np
import pytest
import reference
from arrays import FLOATS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import WIDE, assert_within, tolerance
from strategies import SEEDS

import fastbn

EPS = 1e-3
OPTIONS = st.fixed_dictionaries(
    {
        "channels": st.integers(1, 3),
        "momentum": st.sampled_from([0.9, None, 0.5, 0.0, 1.0]),
        "correction": st.sampled_from([1, 0]),
        "center": st.booleans(),
        "scale": st.booleans(),
        "track_running_stats": st.sampled_from([True, True, True, False]),
        "dtype": st.sampled_from(FLOATS),
    }
)
SIZES = st.tuples(st.integers(0, 4), st.sampled_from([1, 3, 17]))


class Model:
    """What a layer is: parameters, running statistics, and what the last forward left for the backward."""

    def __init__(self, channels, momentum, correction, track_running_stats, dtype, **_):
        self.momentum, self.correction, self.track = momentum, correction, track_running_stats
        self.gamma, self.beta = np.ones(channels, dtype), np.zeros(channels, dtype)
        self.mean, self.var = np.zeros(channels), np.ones(channels)
        self.mean_budget = self.var_budget = np.zeros(channels)
        self.kept = "float64" if momentum is None else dtype
        self.seen = np.empty((0, channels))  # momentum=None: every value behind the running statistics
        self.batches, self.training = 0, True
        self.saved = None

    def pool(self, values):
        """The statistics of all of these values."""
        self.mean, var = reference.mean_var(values, 1)
        n = len(values)
        self.var = var * n / (n - self.correction)
        size = abs(self.mean) + np.sqrt(var)
        lost = 2 * np.finfo(float).eps * abs(self.mean) * size  # as in test_properties: delta is off by eps * mean
        self.mean_budget = tolerance(self.kept, abs(self.mean), 2 * size)
        self.var_budget = tolerance(self.kept, self.var, 2 * self.var) + 2 * lost

    def move(self, x):
        """A training call."""
        if not self.track:
            return
        self.batches += 1
        if self.momentum is None:
            self.seen = np.concatenate([self.seen, by_channel(x)])
            self.pool(self.seen)
            return
        mean, var = reference.mean_var(x, 1)
        n = reference.count(x, 1)
        for name, new in (("mean", mean), ("var", var * n / (n - self.correction))):
            old = getattr(self, name)
            expected, size = (reference.running(f(old), f(new), self.momentum) for f in (WIDE, abs))
            setattr(self, name, expected)
            setattr(self, f"{name}_budget", tolerance(self.kept, abs(expected), size))


def by_channel(x):
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype("float64")


class History(RuleBasedStateMachine):
    states = Bundle("states")

    @initialize(options=OPTIONS)
    def begin(self, options):
        self.options = options
        self.bn, self.model = fastbn.BatchNorm(eps=EPS, **options), Model(**options)

    def data(self, sizes, seed, dtype):
        """x, and more of its shape."""
        n, inner = sizes
        rng = np.random.default_rng(seed)
        shape = (n, self.options["channels"], inner)
        return [rng.normal(rng.choice([0, 5]), 2, shape).astype(dtype) for _ in range(2)]

    def refused(self, error, call, match):
        with pytest.raises(error, match=match):
            call()

    @rule(sizes=SIZES, seed=SEEDS, dtype=st.sampled_from(FLOATS), save=st.sampled_from([None, True, False]),
          into=st.booleans())  # fmt: skip
    def call(self, sizes, seed, dtype, save, into):
        m, bn = self.model, self.bn
        x, _ = self.data(sizes, seed, dtype)
        out = np.full_like(x, 9) if into else None
        own = m.training or not m.track
        if own and sizes[0] * sizes[1] == 1:
            self.refused(ValueError, lambda: bn(x, save=save, out=out), "one value per channel")
            assert out is None or (out == 9).all()
            return
        gamma, beta, before = m.gamma.copy(), m.beta.copy(), x.copy()
        fixed = None if own else (np.array(bn.running_mean), np.array(bn.running_var))
        y = bn(x, save=save, out=out)
        assert out is None or y is out
        np.testing.assert_array_equal(x, before)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        keep = m.training if save is None else save
        m.saved = (x, gamma, fixed) if keep else None
        if x.size:
            train = reference.train(x, gamma, beta, eps=EPS) if own else None
            expected = train or reference.infer(x, *fixed, gamma, beta, eps=EPS)
            assert_within(y, expected.y, expected.budget, "y")
            if m.training:
                m.move(x)

    @rule(seed=SEEDS, into=st.booleans())
    def backward(self, seed, into):
        m, bn = self.model, self.bn
        if m.saved is None:
            self.refused(ValueError, lambda: bn.backward(np.ones((2, 2, 2))), "no forward")
            return
        x, gamma, fixed = m.saved
        _, dy = self.data((x.shape[0], x.shape[2]), seed, x.dtype)
        expected = reference.backward(dy, x, gamma, eps=EPS, fixed=fixed) if x.size else None
        dx = bn.backward(dy, out=dy if into else None)
        assert dx is dy or not into
        assert dx.shape == x.shape
        assert (bn.dgamma is None) == (bn.gamma is None)
        assert (bn.dbeta is None) == (bn.beta is None)
        if expected:
            assert_within(dx, expected.dx, expected.dx_budget, "dx")
            for name in ("dgamma", "dbeta"):
                if getattr(bn, name) is not None:
                    # Of float64 x they are rounded to the layer's dtype.
                    value = getattr(expected, name)
                    budget = getattr(expected, f"{name}_budget") + tolerance(self.options["dtype"], abs(value))
                    assert_within(getattr(bn, name), value, budget, name)

    @rule()
    def train(self):
        assert self.bn.train() is self.bn
        self.model.training = True

    @rule()
    def eval(self):
        assert self.bn.eval() is self.bn
        self.model.training = False

    @rule(seed=SEEDS)
    def learn(self, seed):
        """What an optimizer does: parameters change in place."""
        for name, a in zip(
            ("gamma", "beta"), np.random.default_rng(seed).normal(size=(2, self.model.gamma.size)), strict=True
        ):
            if getattr(self.bn, name) is not None:
                getattr(self.bn, name)[...] = a
                getattr(self.model, name)[...] = a

    @rule(target=states)
    def state(self):
        m = copy.deepcopy(self.model)
        m.saved = None
        return self.bn.state_dict(), m

    @rule(stored=states, anew=st.booleans(), weights=st.booleans())
    def load(self, stored, anew, weights):
        """A state of another time; without the two entries that only fastbn knows, a pool begins anew.

        Its count may be the weight of each channel: all are the same here, so the pool is too.
        """
        state, m = stored
        training, pools = self.model.training, "running_count" in state
        if weights and pools:
            count = np.broadcast_to(state["running_count"], self.bn.channels)
            state = {**state, "running_count": count.astype("float64")}
        if anew:
            state = {k: v for k, v in state.items() if k not in ("running_count", "running_m2")}
        assert self.bn.load_state_dict(state) is self.bn
        self.model = copy.deepcopy(m)
        self.model.training = training
        if anew and pools:
            self.model.seen = self.model.seen[:0]

    @rule(stored=states, name=st.sampled_from(["gamma", "running_mean", "running_var", "num_batches_tracked"]))
    def load_in_vain(self, stored, name):
        if name in stored[0]:
            bad = -1 if name == "num_batches_tracked" else [1.0] * 9
            self.refused(ValueError, lambda: self.bn.load_state_dict({**stored[0], name: bad}), name)
            self.refused(ValueError, lambda: self.bn.load_state_dict({**stored[0], "other": 1}), "other")

    @rule(clone=st.sampled_from([copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))]))
    def clone(self, clone):
        """Goes on with the copy; the original changes no more."""
        self.bn, original = clone(self.bn), self.bn
        self.model.saved = None
        for a in original.state_dict():
            if isinstance(getattr(original, a, None), np.ndarray):
                getattr(original, a)[...] = 77

    @rule(sizes=st.lists(SIZES, max_size=3), seed=SEEDS, dtype=st.sampled_from(FLOATS))
    def fit_population(self, sizes, seed, dtype):
        batches = [self.data(s, seed + i, dtype)[0] for i, s in enumerate(sizes)]
        values = np.concatenate([self.model.seen[:0], *map(by_channel, batches)])
        if not self.model.track:
            self.refused(ValueError, lambda: self.bn.fit_population(batches), "running statistics")
        elif len(values) <= self.options["correction"]:
            self.refused(ValueError, lambda: self.bn.fit_population(batches), "batches have")
        else:
            self.bn.fit_population(iter(batches))
            self.model.seen = values
            self.model.pool(values)

    @rule()
    def a_bad_call(self):
        self.refused(ValueError, lambda: self.bn(np.ones((4, self.options["channels"] + 1))), "channels")
        self.refused(TypeError, lambda: self.bn(np.ones((4, self.options["channels"]), complex)), "dtype")

    @precondition(lambda self: self.model.track)
    @rule()
    def fold(self):
        m, bn = self.model, self.bn
        scale, shift = bn.fold()
        invstd = reference.invstd(bn.running_var, EPS)
        assert_within(scale, m.gamma * invstd, tolerance(bn.dtype, abs(m.gamma * invstd)), "scale")
        moved = bn.running_mean * (m.gamma * invstd)  # the product of two float32 would be rounded
        assert_within(
            shift, m.beta - moved, tolerance(bn.dtype, abs(m.beta - moved), abs(m.beta) + abs(moved)), "shift"
        )

    @invariant()
    def the_layer_is_its_model(self):
        m, bn = self.model, self.bn
        assert bn.training == m.training
        for name in ("gamma", "beta"):
            if getattr(bn, name) is not None:
                np.testing.assert_array_equal(getattr(bn, name), getattr(m, name))
        if not m.track:
            assert bn.running_mean is bn.running_var is None
            return
        assert bn.num_batches_tracked == m.batches
        for name in ("mean", "var"):
            a = getattr(bn, f"running_{name}")
            assert a.dtype == m.kept
            assert_within(a, WIDE(getattr(m, name)), getattr(m, f"{name}_budget") + tolerance("float64", 0), name)
            if m.momentum is not None:  # the next step begins at what this one was rounded to
                setattr(m, name, a.astype(WIDE))
                setattr(m, f"{name}_budget", 0 * a)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=max(20, settings().max_examples // 10), stateful_step_count=40)
