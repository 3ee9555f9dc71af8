"""The paper's algorithms, and the whole-tensor layer, against their formulas in float64."""

import numpy as np
import pytest
from refusals import refused
from steps import assert_gradients

import fastbn
from fastbn.interop import paper, whole_tensor


def batches(rng, sizes, drift=0.0):
    return [rng.normal(3 + drift * i, [1.0, 2.0], (n, 2)) for i, n in enumerate(sizes)]


def test_algorithm_1_and_its_gradients(rng):
    (x,), gamma, beta, dy = batches(rng, [6]), *rng.normal(size=(2, 2)), rng.normal(size=(6, 2))
    y, saved = paper.normalize(x, gamma, beta, eps=1e-3)
    np.testing.assert_allclose(saved.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(saved.var, x.var(0), rtol=1e-13)
    np.testing.assert_allclose(y, gamma * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) + beta, rtol=1e-12)
    loss = lambda *a: (paper.normalize(*a, eps=1e-3)[0] * dy).sum()  # noqa: E731
    assert_gradients(loss, (x, gamma, beta), paper.gradients(dy, saved))


@pytest.mark.parametrize("sizes", [(5, 5, 5), (3, 9, 5)])
def test_algorithm_2_as_it_is_written_and_pooled(rng, sizes):
    parts = batches(rng, sizes, drift=0.5)
    found = paper.population(iter(parts))
    means = np.mean([b.mean(0) for b in parts], axis=0)
    variances = np.mean([b.var(0) * len(b) / (len(b) - 1) for b in parts], axis=0)
    np.testing.assert_allclose(found.mean, means, rtol=1e-13)
    np.testing.assert_allclose(found.var, variances, rtol=1e-13)
    whole = np.concatenate(parts)
    np.testing.assert_allclose(found.pooled.mean, whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.pooled.var(correction=1), whole.var(0, ddof=1), rtol=1e-13)
    bn = fastbn.BatchNorm.like("paper", 2).fit_population(parts)
    np.testing.assert_array_equal(found.pooled.mean, bn.running_mean)
    np.testing.assert_array_equal(found.pooled.var(correction=1), bn.running_var)
    assert found.batches == 3
    assert found.sizes == (min(sizes), max(sizes))
    np.testing.assert_allclose(found.spread, np.var([b.mean(0) for b in parts], axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.mean_difference, means - whole.mean(0), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.var_difference, variances - whole.var(0, ddof=1), rtol=1e-10)


def test_where_all_batches_are_as_large_it_is_the_paper_s_formula(rng):
    parts = batches(rng, (4, 4, 4))
    np.testing.assert_allclose(paper.population(parts).var, 4 / 3 * np.mean([b.var(0) for b in parts], 0), rtol=1e-13)


def test_the_note_says_when_they_differ_and_by_how_much(rng):
    one = paper.population(batches(rng, [8]))
    assert one.note == ""
    assert not one.mean_difference.any()
    assert not one.var_difference.any()
    assert paper.population([np.full((n, 2), 1e6) for n in (3, 7)]).note == ""  # constant
    same = paper.population(batches(rng, (8, 8), drift=9.0))
    assert "count alike" not in same.note
    assert "the means of batches vary" in same.note
    std = np.sqrt(same.pooled.var(correction=1))
    assert f"up to {np.max(abs(same.var_difference) / std**2):.2g} of theirs" in same.note
    uneven = paper.population(batches(rng, (2, 8), drift=9.0))
    assert "batches of 2 to 8 values per channel count alike" in uneven.note
    std = np.sqrt(uneven.pooled.var(correction=1))
    assert f"up to {np.max(abs(uneven.mean_difference) / std):.2g} standard deviations" in uneven.note


def test_the_note_of_what_cannot_be_compared():
    assert "nan standard deviations" in paper.population([np.array([[np.nan], [1.0]])]).note


def test_the_note_compares_the_means_with_those_of_random_batches(rng):
    """The ratio is F of an analysis of variance: near 1 for batches of one distribution, large for those that drift."""
    near, far = (batches(rng, (50,) * 40, drift) for drift in (0.0, 3.0))
    ratio = lambda parts: float(paper.population(parts).note.split("vary ")[1].split(" ")[0])  # noqa: E731
    assert 0.3 < ratio(near) < 3
    assert ratio(far) > 1000
    worst = np.array(far)[:, :, 0]  # of two channels that drift alike the one with the smaller variance
    f = 50 * worst.mean(1).var(ddof=1) / worst.var(1, ddof=1).mean()
    assert f"{f:.2g}" in paper.population(far).note


def test_images_and_empty_batches(rng):
    parts = [rng.normal(size=(n, 3, 2, 2)).astype("float32") for n in (2, 0, 3)]
    found = paper.population(parts)
    assert (found.batches, found.sizes) == (2, (8, 12))
    wide = [p.astype("float64") for p in parts if len(p)]
    expected = np.mean([w.var((0, 2, 3), ddof=1) for w in wide], 0)
    np.testing.assert_allclose(found.var, expected, rtol=1e-12)
    assert paper.population([p.transpose(0, 2, 3, 1) for p in parts], axis=-1).mean.shape == (3,)


def test_step_11_is_one_affine(rng):
    parts = batches(rng, (4, 6))
    found, gamma, beta = paper.population(parts), *rng.normal(size=(2, 2))
    x = parts[0]
    for given, mean, var in (
        (found, found.mean, found.var),
        ((found.pooled.mean, found.pooled.var(1)), found.pooled.mean, found.pooled.var(1)),
    ):
        scale, shift = paper.inference(given, gamma, beta, eps=1e-3)
        np.testing.assert_allclose(scale, gamma / np.sqrt(var + 1e-3), rtol=1e-14)
        expected = gamma * (x - mean) / np.sqrt(var + 1e-3) + beta
        np.testing.assert_allclose(paper.transform(x, scale, shift), expected, rtol=1e-11, atol=1e-12)
    into = x.copy()
    assert paper.transform(into, scale, shift, out=into) is into
    np.testing.assert_allclose(into, expected, rtol=1e-11, atol=1e-12)
    assert [a.tolist() for a in paper.inference((np.ones(1), np.zeros(1)), 2.0, 5.0, eps=0)] == [[0.0], [5.0]]


def test_misuse_of_the_paper(rng):
    refused(lambda: paper.population(3), "population", "batches", TypeError)
    refused(lambda: paper.population([]), "population", "batches", ValueError)
    refused(lambda: paper.population([np.ones((2, 2)), np.ones((1, 2))]), "population", "batches", ValueError)
    refused(lambda: paper.population([np.ones((2, 2)), np.ones((2, 3))]), "population", "batches", ValueError)
    refused(lambda: paper.population([np.ones((2, 2), complex)]), "population", "batches", TypeError)
    refused(lambda: paper.inference(np.ones(2)), "inference", "statistics", TypeError)
    refused(lambda: paper.inference((np.ones(2), -np.ones(2))), "inference", "var", ValueError)
    refused(lambda: paper.inference((np.ones(2), np.ones(2)), gamma=np.ones(3)), "inference", "gamma", ValueError)


# -------------------------------------------------------------------------------------------------- the whole tensor


def whole(x, gamma, beta):
    return gamma * (x - x.mean()) / x.std(ddof=1) + beta


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 3, 2, 2)])
def test_the_whole_tensor_and_its_gradients(rng, shape):
    x, dy = rng.normal(3, 2, shape), rng.normal(size=shape)
    y, cache = whole_tensor.forward(x, 1.7, -0.4)
    np.testing.assert_allclose(y, whole(x, 1.7, -0.4), rtol=1e-12, atol=1e-13)
    if len(shape) > 1:  # of two values y is the same wherever they are
        np.testing.assert_allclose(y.std(ddof=1), 1.7, rtol=1e-13)
    dx, dgamma, dbeta = whole_tensor.backward(dy, cache)
    loss = lambda x, gamma, beta: (whole(x, gamma, beta) * dy).sum()  # noqa: E731
    # Of two values y is constant and dx 0: only a tolerance of its own terms is one.
    if x.size > 2:
        assert_gradients(loss, (x, np.array(1.7), np.array(-0.4)), (dx, dgamma, dbeta))
    else:
        np.testing.assert_allclose(dx, 0, atol=1e-14)
    xhat, n = (x - x.mean()) / x.std(ddof=1), x.size
    formula = 1.7 / x.std(ddof=1) * (dy - dy.mean() - xhat * (dy * xhat).sum() / (n - 1))
    np.testing.assert_allclose(dx, formula, rtol=1e-12, atol=1e-13)


def test_a_whole_tensor_of_float32_and_a_constant_one(rng):
    x = rng.normal(100, 1e-2, (20, 30)).astype("float32")
    y, _ = whole_tensor.forward(x)
    assert y.dtype == "float32"
    np.testing.assert_allclose(y, whole(x.astype("float64"), 1, 0), rtol=1e-6, atol=1e-6)
    assert whole_tensor.forward(np.full((2, 2), 7.0), 3.0, 5.0)[0].tolist() == [[5.0, 5.0], [5.0, 5.0]]


def test_misuse_of_the_whole_tensor(rng):
    fn = r"whole_tensor\.forward"
    refused(lambda: whole_tensor.forward([1.0]), fn, "x", ValueError)
    refused(lambda: whole_tensor.forward([1.0, 2.0], gamma=np.ones(2)), fn, "gamma", TypeError)
    refused(lambda: whole_tensor.forward([1.0, 2.0], beta=np.inf), fn, "beta", ValueError)
    _, cache = whole_tensor.forward(rng.normal(size=(2, 3)))
    fn = r"whole_tensor\.backward"
    refused(lambda: whole_tensor.backward(np.ones(6), cache), fn, "dy", ValueError)
    refused(lambda: whole_tensor.backward(np.ones((2, 3)), cache[0]), fn, "cache", TypeError)
