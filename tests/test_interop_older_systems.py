"""Older systems together: the how-to page, the examples of docstrings, signatures, and the conventions of the layer."""

import doctest
import inspect

import numpy as np
import pages
import pytest

import fastbn
from fastbn.interop import cs231n, keras1, paper, stepwise, tf_contrib, whole_tensor

MODULES = [cs231n, keras1, paper, stepwise, tf_contrib, whole_tensor]


def test_the_code_of_the_page_prints_what_its_comments_say():
    pages.check("how-to/older-systems.md")


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_public_names_explain_themselves_and_examples_run(module):
    finder, examples = doctest.DocTestFinder(), 0
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing):
            assert thing.__doc__, name
            for test in finder.find(thing, name, module, globs={}):
                examples += len(test.examples)
                result = doctest.DocTestRunner().run(test)
                assert not result.failed, f"{name}: {result.failed} of {result.attempted} examples fail"
    assert examples


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (cs231n.batchnorm_forward, "x gamma beta bn_param"),
        (cs231n.batchnorm_backward, "dout cache"),
        (cs231n.batchnorm_backward_alt, "dout cache"),
        (cs231n.spatial_batchnorm_forward, "x gamma beta bn_param"),
        (cs231n.spatial_batchnorm_backward, "dout cache"),
        (stepwise.batchnorm_forward, "x gamma beta eps"),
        (stepwise.batchnorm_backward, "dout cache"),
        (
            keras1.BatchNormalization,
            "epsilon mode axis momentum weights beta_init gamma_init gamma_regularizer beta_regularizer",
        ),
        (
            tf_contrib.batch_norm,
            "inputs decay center scale epsilon activation_fn param_initializers param_regularizers updates_collections "
            "is_training reuse variables_collections outputs_collections trainable batch_weights fused data_format "
            "zero_debias_moving_mean scope renorm renorm_clipping renorm_decay",
        ),
    ],
)
def test_arguments_stand_in_their_old_order(function, arguments):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] == arguments.split()


def steps(system, batches):
    """The running statistics after these batches, by the system's own words."""
    if system == "cs231n":
        bn_param = {"mode": "train"}
        for x in batches:
            cs231n.batchnorm_forward(x, np.ones(3), np.zeros(3), bn_param)
        return bn_param["running_mean"], bn_param["running_var"]
    if system == "keras1":
        bn = keras1.BatchNormalization()
        for x in batches:
            bn(x, train=True)
        return bn.running_mean, bn.running_std
    if system == "tf.contrib":
        with tf_contrib.Graph().as_default() as graph:
            for x in batches:
                tf_contrib.batch_norm(x, fused=False, scope="bn", reuse=tf_contrib.AUTO_REUSE)
                tf_contrib.run_updates()
        return graph.variables["bn/moving_mean"].value, graph.variables["bn/moving_variance"].value
    found = paper.population(batches).pooled
    return found.mean, found.var(correction=1)


@pytest.mark.parametrize("system", ["cs231n", "keras1", "tf.contrib", "paper"])
def test_the_layer_that_is_like_them_keeps_the_same_statistics(rng, system):
    batches = [rng.normal(3, 2, (n, 3)) for n in (5, 4, 6)]
    bn = fastbn.BatchNorm.like(system, 3, dtype="float64")
    for x in batches:
        bn(x)
    mean, var = steps(system, batches)
    np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-6)  # Keras 1 keeps them in float32
    np.testing.assert_allclose(bn.running_var, var, rtol=1e-6)
