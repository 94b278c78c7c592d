"""The causal, conditioned predictor: what each frame sees, its start as the identity, and dropout."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.nn.conditioned import ActionEncoder, CausalPredictor, CausalPredictorConfig, ConditionedBlock
from jepax.nn.transformer import FAST, attention, dropout
from jepax.types import UserError

CONFIG = CausalPredictorConfig().tiny()
EMBED_DIM = 12


def moved(module):
    """Every parameter away from its start, at which the blocks are the identity."""
    return jax.tree.map(lambda x: x + 0.3 * jr.normal(jr.key(x.size), x.shape), module)


@pytest.fixture(scope="module")
def given():
    return jr.normal(jr.key(1), (2, 3, EMBED_DIM)), jr.normal(jr.key(2), (2, 3, EMBED_DIM))


@pytest.fixture(scope="module")
def predictor():
    return moved(CausalPredictor(CONFIG, EMBED_DIM, key=jr.key(0)))


def test_a_block_starts_as_the_identity(given):
    block = ConditionedBlock(replace(CONFIG, width=EMBED_DIM), key=jr.key(0))
    np.testing.assert_array_equal(block(*given, key=jr.key(3)), given[0])


@pytest.mark.parametrize("which", [0, 1])
def test_later_frames_and_conditions_change_no_earlier_row(predictor, given, which):
    changed = [x.at[:, 2].add(1.0) if i == which else x for i, x in enumerate(given)]
    before, after = predictor(*given), predictor(*changed)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2] - after[:, 2]).max() > 1e-3


def test_the_fast_form_is_the_plain_form(predictor, given):
    for key in (None, jr.key(3)):
        np.testing.assert_allclose(predictor(*given, key=key, ops=FAST), predictor(*given, key=key), atol=1e-5)


def test_dropout_needs_a_key(predictor, given):
    assert np.abs(predictor(*given, key=jr.key(3)) - predictor(*given)).max() > 1e-3
    none = CausalPredictor(replace(CONFIG, dropout=0.0), EMBED_DIM, key=jr.key(0))
    np.testing.assert_array_equal(none(*given, key=jr.key(3)), none(*given))


def test_dropout_keeps_the_mean():
    dropped = dropout(jnp.ones(10_000), 0.1, jr.key(0))
    np.testing.assert_allclose(np.unique(dropped), [0.0, 1 / 0.9], rtol=1e-6)
    assert abs(float(dropped.mean()) - 1) < 0.02


def test_causal_attention_is_attention_to_the_tokens_so_far():
    q, k, v = (jr.normal(jr.key(i), (2, 5, 3, 4)) for i in range(3))
    causal = attention(q, k, v, causal=True)
    for t in range(5):
        alone = attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1])
        np.testing.assert_allclose(causal[:, t : t + 1], alone, atol=1e-6)
    np.testing.assert_allclose(attention(q[:, 3:], k, v, causal=True), causal[:, 3:], atol=1e-6)


def test_actions_are_encoded_frame_by_frame():
    encoder, actions = ActionEncoder(4, EMBED_DIM, key=jr.key(0)), jr.normal(jr.key(1), (2, 3, 4))
    np.testing.assert_allclose(encoder(actions)[:, 1:2], encoder(actions[:, 1:2]), atol=1e-6)


def test_sizes_are_checked():
    with pytest.raises(UserError, match=r"predictor\.dropout=1\.0"):
        CausalPredictorConfig(dropout=1.0)
