"""The predictor: one pass per target block, and padding that changes nothing."""

from dataclasses import replace

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.nn import Predictor, PredictorConfig
from jepax.types import Masks

GRID = (4, 4)


@pytest.fixture
def predictor():
    return Predictor(PredictorConfig(width=8, depth=2, num_heads=2, init_std=None), 16, key=jr.key(0))


@pytest.fixture
def masks():
    context = jnp.array([[0, 1, 2], [5, 6, 7]])
    targets = jnp.array([[[8, 9, 12, 13], [10, 11, 10, 10]], [[0, 1, 0, 0], [3, 2, 1, 0]]])
    valid = jnp.array([[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 1]]], bool)
    return Masks(context, targets, valid)


@pytest.fixture
def context():
    return jr.normal(jr.key(1), (2, 3, 16))


def test_blocks_do_not_see_each_other(predictor, masks, context):
    together = predictor(context, masks, GRID)
    for block in range(2):
        alone = Masks(masks.context, masks.targets[:, block : block + 1], masks.target_valid[:, block : block + 1])
        np.testing.assert_allclose(together[:, block : block + 1], predictor(context, alone, GRID), atol=1e-5)


def test_padding_changes_no_valid_prediction(predictor, masks, context):
    padded = predictor(context, masks, GRID)[0, 1, :2]
    short = Masks(masks.context[:1], masks.targets[:1, 1:, :2], masks.target_valid[:1, 1:, :2])
    np.testing.assert_allclose(padded, predictor(context[:1], short, GRID)[0, 0], atol=1e-5)


def test_a_prediction_depends_on_its_position_and_on_the_context(predictor, masks, context):
    predictions = predictor(context, masks, GRID)
    assert jnp.abs(predictions[0, 0, 0] - predictions[0, 0, 1]).max() > 1e-3
    changed = predictor(context.at[0, 0].add(1.0), masks, GRID)
    assert jnp.abs(changed[0] - predictions[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1], predictions[1])


def test_predictions_at_the_contexts_places_come_first_and_change_no_others(predictor, masks, context):
    both = predictor(context, masks, GRID, predict_context=True)
    assert both.shape == (2, 2, 3 + 4, 16)
    np.testing.assert_allclose(both[:, :, 3:], predictor(context, masks, GRID), atol=1e-5)
    assert jnp.abs(both[:, :, 0] - both[:, :, 1]).max() > 1e-3


@pytest.mark.parametrize("predict_context", [False, True])
def test_the_plain_form_of_a_predictor_is_the_same_predictor(predictor, masks, context, predict_context):
    plain, given = Predictor(replace(predictor.config, fast=False), 16, key=jr.key(0)), (context, masks, GRID)
    found, wanted = (each(*given, predict_context=predict_context) for each in (plain, predictor))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_several_outputs_lie_side_by_side(masks, context):
    twice = Predictor(PredictorConfig(width=8, depth=2, num_heads=2, init_std=None), 16, num_outputs=2, key=jr.key(0))
    assert twice(context, masks, GRID).shape == (2, 2, 4, 32)
