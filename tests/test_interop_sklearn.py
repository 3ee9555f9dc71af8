"""The transformer: scikit-learn's own checks, its StandardScaler, batches, images, weights, names, pipelines."""

import pickle
import sys
from collections import Counter

import numpy as np
import pytest
import reference
from refusals import refused
from subprocesses import run_script

import fastbn

pytest.importorskip("sklearn", reason="scikit-learn is not installed: its transformer cannot be made")

from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from fastbn.interop.sklearn import BatchNormTransformer

DATA = {"digits": load_digits, "breast cancer": load_breast_cancer}
OPTIONS = [{}, {"eps": 0}, {"correction": 1}, {"with_mean": False}, {"with_std": False}, {"axis": -1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_checks_of_scikit_learn_pass(options):
    found = check_estimator(BatchNormTransformer(**options), on_fail=None, on_skip=None)
    failed = [(r["check_name"], r["exception"]) for r in found if r["status"] == "failed"]
    assert not failed
    left_out = [str(r["exception"]) for r in found if r["status"] != "passed"]
    reasons = ("pandas is not installed", "SCIPY_ARRAY_API is not set")  # scikit-learn's own
    assert all(reason.startswith(reasons) for reason in left_out), left_out
    assert Counter(r["status"] for r in found)["passed"] >= 40


# ------------------------------------------------------------------------------------------------------ StandardScaler


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
def test_without_eps_it_is_the_standard_scaler(name, with_mean, with_std):
    """But for a feature that is constant: their scale is then 1."""
    x = DATA[name]().data
    ours = BatchNormTransformer(eps=0, with_mean=with_mean, with_std=with_std).fit(x)
    theirs = StandardScaler(with_mean=with_mean, with_std=with_std).fit(x)
    varies = x.std(0) > 0
    y = ours.transform(x)
    np.testing.assert_allclose(y[:, varies], theirs.transform(x)[:, varies], rtol=1e-12, atol=1e-12)
    if with_mean:
        assert not y[:, ~varies].any()
    back = theirs.inverse_transform(theirs.transform(x))
    reference.assert_within(ours.inverse_transform(y), back, 1e-14 * abs(x).max(0) + 5e-324)
    assert ours.n_samples_seen_ == theirs.n_samples_seen_ == len(x)
    assert ours.n_features_in_ == theirs.n_features_in_
    np.testing.assert_array_equal(ours.get_feature_names_out(), theirs.get_feature_names_out())


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_digits_stay_at_any_offset(name, offset):
    """Of values rounded beside the offset: the exact mean and variance of what is stored."""
    x = DATA[name]().data + offset
    norm = BatchNormTransformer(eps=0).fit(x)
    mean, var = (v.astype(float) for v in reference.mean_var(x, 1))
    np.testing.assert_allclose(norm.mean_, mean, rtol=1e-14)
    np.testing.assert_allclose(norm.var_, var, rtol=1e-14)
    theirs = StandardScaler().fit(x)
    lost = 4 * np.finfo(float).eps * abs(mean) * np.sqrt(var) + 1e-12 * var  # and theirs lose what a mean rounds
    np.testing.assert_array_less(abs(norm.var_ - theirs.var_), lost + 5e-324)
    expected = reference.train(x, eps=0.0)
    reference.assert_within(norm.transform(x), expected.y, expected.budget)


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("correction", [0, 1])
def test_batches_pool_to_the_whole(rng, correction):
    x = rng.normal(3, 2, (40, 5))
    whole = BatchNormTransformer(correction=correction).fit(x)
    parts = BatchNormTransformer(correction=correction)
    expected = fastbn.Moments.empty(5)
    for part in (x[:1], x[1:2], x[2:33], x[33:]):
        assert parts.partial_fit(part) is parts
        expected += fastbn.moments(part)
        assert parts.var_.tobytes() == expected.var(correction).tobytes()
        assert parts.mean_.tobytes() == expected.mean.tobytes()
    assert (parts.n_samples_seen_, type(parts.n_samples_seen_)) == (40, int)
    np.testing.assert_allclose(parts.mean_, whole.mean_, rtol=1e-14)
    np.testing.assert_allclose(parts.var_, whole.var_, rtol=1e-13)
    assert parts.fit(x[:9]).n_samples_seen_ == 9  # it starts again
    np.testing.assert_allclose(parts.var_, x[:9].var(0, ddof=correction), rtol=1e-13)


def test_a_batch_that_fails_changes_nothing(rng):
    norm = BatchNormTransformer().fit(rng.normal(size=(6, 3)))
    before = pickle.dumps(norm)
    bads = (np.ones((2, 4)), None), (np.full((2, 3), np.nan), None), (np.ones((2, 3)), [1, -1]), (np.ones((2, 3)), [1])
    for x, w in bads:
        with pytest.raises(ValueError):  # noqa: PT011  scikit-learn's words, or ours
            norm.partial_fit(x, sample_weight=w)
        assert pickle.dumps(norm) == before


def test_weights_are_repeated_samples(rng):
    x, w = rng.normal(size=(30, 3)), rng.integers(0, 4, 30)
    for correction in (0, 1):
        weighted = BatchNormTransformer(correction=correction).fit(x, sample_weight=w)
        repeated = BatchNormTransformer(correction=correction).fit(np.repeat(x, w, axis=0))
        np.testing.assert_allclose(weighted.mean_, repeated.mean_, rtol=1e-13)
        np.testing.assert_allclose(weighted.var_, repeated.var_, rtol=1e-13)
        assert weighted.n_samples_seen_ == repeated.n_samples_seen_ == w.sum()
    images = rng.normal(size=(30, 3, 2, 2))
    norm = BatchNormTransformer().partial_fit(images[:7], sample_weight=w[:7]).partial_fit(images[7:], None, w[7:])
    np.testing.assert_allclose(norm.var_, np.repeat(images, w, axis=0).var((0, 2, 3)), rtol=1e-13)
    norm.partial_fit(images[:2], sample_weight=[0, 0])
    assert norm.n_samples_seen_ == w.sum()


# ------------------------------------------------------------------------------------------------ arrays in, arrays out


@pytest.mark.parametrize("axis", [1, -1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_images(rng, axis, dtype):
    x = rng.normal(3, 2, (6, 4, 5, 3)).astype(dtype)
    c = x.shape[axis]
    norm = BatchNormTransformer(axis=axis).fit(x)
    y = norm.transform(x)
    expected = fastbn.batch_norm_train(x, axis=axis)[0]
    assert (y.shape, y.dtype, norm.n_features_in_, norm.n_samples_seen_) == (x.shape, x.dtype, c, 6)
    np.testing.assert_array_equal(y, expected)
    assert y.flags.c_contiguous  # in the memory order of x
    back = reference.infer(y, 0, 1, np.sqrt(norm.var_ + norm.eps), norm.mean_, axis=axis, eps=0.0)
    reference.assert_within(norm.inverse_transform(y), back.y, back.budget)
    assert norm.transform(np.ones((2, c))).shape == (2, c)
    with pytest.raises(ValueError, match="expecting"):
        norm.transform(np.ones((2, c + 1)))


def test_axes_that_are_no_channels(rng):
    x = rng.normal(size=(6, 4, 5))
    fn = "BatchNormTransformer.fit"
    for axis, error in ((0, ValueError), (-3, ValueError), (3, ValueError), (1.0, TypeError), (True, TypeError)):
        refused(lambda axis=axis: BatchNormTransformer(axis=axis).fit(x), fn, "axis", error)
    refused(lambda: BatchNormTransformer(eps=-1).fit(x), fn, "eps", ValueError)
    refused(lambda: BatchNormTransformer(correction=2).fit(x), fn, "correction", ValueError)
    refused(lambda: BatchNormTransformer(with_mean=1).fit(x), fn, "with_mean", TypeError)
    refused(lambda: BatchNormTransformer().fit(x, sample_weight=np.zeros(6)), fn, "sample_weight", ValueError)
    refused(lambda: BatchNormTransformer().fit(x, sample_weight=np.ones(5)), fn, "sample_weight", ValueError)
    refused(lambda: BatchNormTransformer().fit(x, sample_weight=-np.ones(6)), fn, "sample_weight", ValueError)
    one = BatchNormTransformer(correction=1).partial_fit(np.ones((1, 4)))
    assert np.isnan(one.var_).all()
    refused(lambda: one.transform(np.ones((1, 4))), "BatchNormTransformer.transform", "sample", ValueError)
    refused(lambda: BatchNormTransformer(correction=1).fit(np.ones((1, 4))), fn, "sample", ValueError)
    norm = BatchNormTransformer().fit(x)
    refused(lambda: norm.inverse_transform(np.ones((2, 3))), "BatchNormTransformer.inverse_transform", "X", ValueError)


def test_before_fit():
    for verb in ("transform", "inverse_transform", "get_feature_names_out"):
        with pytest.raises(NotFittedError):
            getattr(BatchNormTransformer(), verb)(np.ones((2, 2)))


@pytest.mark.parametrize("verb", ["transform", "inverse_transform"])
def test_the_input_is_written_only_where_that_is_asked(rng, verb):
    x = rng.normal(size=(6, 4, 5))
    norm = BatchNormTransformer(axis=-1).fit(x)
    before, expected = x.copy(), getattr(norm, verb)(x)
    np.testing.assert_array_equal(x, before)
    norm.set_params(copy=False).fit(x)
    np.testing.assert_array_equal(x, before)
    x.flags.writeable = False
    assert not np.shares_memory(getattr(norm, verb)(x), x)
    x.flags.writeable = True
    y = getattr(norm, verb)(x)
    assert np.shares_memory(y, x)
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(y, expected)


def test_integers_become_float64(rng):
    tags = BatchNormTransformer().__sklearn_tags__()
    assert sorted(tags.transformer_tags.preserves_dtype) == ["float16", "float32", "float64"]
    assert tags.input_tags.three_d_array
    assert not tags.input_tags.allow_nan
    x = rng.integers(0, 255, (9, 3)).astype("uint8")
    norm = BatchNormTransformer().fit(x)
    assert norm.transform(x).dtype == norm.inverse_transform(x).dtype == np.float64
    np.testing.assert_array_equal(norm.transform(x), norm.transform(x.astype("float64")))


# ---------------------------------------------------------------------------------------------------- among estimators


def test_clones_and_pickles(rng):
    x = rng.normal(size=(9, 3)).astype("float32")
    norm = BatchNormTransformer(eps=1e-3, correction=1, with_mean=False).fit(x)
    again = pickle.loads(pickle.dumps(norm))
    np.testing.assert_array_equal(again.transform(x), norm.transform(x))
    assert again.partial_fit(x).n_samples_seen_ == 18
    assert clone(norm).get_params() == norm.get_params()
    assert not hasattr(clone(norm), "mean_")


def test_in_a_pipeline_under_a_search():
    x, y = load_digits(return_X_y=True)
    x, y = x[:500].astype("float32"), y[:500]
    steps = make_pipeline(BatchNormTransformer(), LogisticRegression(max_iter=200))
    search = GridSearchCV(steps, {"batchnormtransformer__eps": [1e-5, 10.0]}, cv=2, error_score="raise").fit(x, y)
    assert search.score(x, y) > 0.95
    norm = search.best_estimator_[0]
    assert norm.eps == search.best_params_["batchnormtransformer__eps"]
    np.testing.assert_allclose(norm.mean_, x.mean(0, dtype=float), rtol=1e-12)
    assert search.best_estimator_[:-1].transform(x).dtype == np.float32


def test_on_some_columns():
    x = load_breast_cancer().data
    both = ColumnTransformer([("norm", BatchNormTransformer(eps=0), [0, 3]), ("rest", "passthrough", [1])])
    y = both.fit_transform(x)
    np.testing.assert_allclose(y[:, :2], StandardScaler().fit_transform(x[:, [0, 3]]), rtol=1e-12, atol=1e-12)
    assert list(both.get_feature_names_out()) == ["norm__x0", "norm__x3", "rest__x1"]


def test_beside_a_classifier_that_learns_in_batches():
    x, y = load_digits(return_X_y=True)
    scores = []
    for norm in (BatchNormTransformer(), StandardScaler()):
        model = SGDClassifier(random_state=0)
        for rows in np.array_split(np.arange(len(x)), 20):
            norm.partial_fit(x[rows])
        for rows in np.array_split(np.arange(len(x)), 20):
            model.partial_fit(norm.transform(x[rows]), y[rows], classes=range(10))
        np.testing.assert_allclose(norm.var_, x.var(0), rtol=1e-12, atol=1e-30)
        scores.append(model.score(norm.transform(x), y))
    assert abs(scores[0] - scores[1]) < 0.02, scores


def test_names_of_a_frame(rng):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: no DataFrame with names of features")
    x = pandas.DataFrame(rng.normal(size=(9, 2)), columns=["width", "height"])
    before = x.copy()
    norm = BatchNormTransformer().fit(x)
    assert list(norm.feature_names_in_) == list(norm.get_feature_names_out()) == ["width", "height"]
    y = norm.set_output(transform="pandas").transform(x)
    assert (list(y.columns), list(y.index)) == (["width", "height"], list(x.index))
    np.testing.assert_array_equal(y, norm.set_output(transform="default").transform(x))
    np.testing.assert_allclose(norm.inverse_transform(y), x, rtol=1e-12)
    with pytest.raises(ValueError, match="feature names"):
        norm.transform(x[["height", "width"]])
    pandas.testing.assert_frame_equal(x, before)


def test_without_scikit_learn():
    script = """
import sys
sys.modules["sklearn"] = None
import fastbn.interop
try:
    fastbn.interop.sklearn
except ImportError as error:
    print(error)
"""
    assert run_script(script) == 'fastbn.interop.sklearn needs sklearn: pip install "fastbn[sklearn]"\n'


def test_the_example_of_the_class_runs():
    import doctest

    module = sys.modules[BatchNormTransformer.__module__]
    (example,) = doctest.DocTestFinder(recurse=False).find(BatchNormTransformer, module=module)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert example.examples
