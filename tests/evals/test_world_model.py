"""Health of a world model: of models whose errors, and whose space, are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax.envs import TwoRoom
from jepax.evals import world_model
from jepax.evals.world_model import diagnose, embed_frames, prediction_errors, probe_states, rank_correlation
from jepax.methods.base import WorldModel
from jepax.types import ClipBatch

ENV = TwoRoom(image_size=32)
CLIPS, FRAMES, BIAS = 128, 4, 0.5


class Biased(WorldModel):
    """Reads a position off two pixels, and predicts where an action leads, always a little beside it."""

    def embed(self, frames):
        return frames[:, 0, :, 0].astype(jnp.float32)

    def rollout(self, context, past, candidates, window=None):
        def step(z, action):
            return z + action + BIAS, z + action + BIAS

        _, predicted = jax.lax.scan(step, context[-1], candidates[0])
        return jnp.concatenate([context, predicted])[None]

    draw = forward = objective = after_update = eqx.Module.__init__


@pytest.fixture(scope="module")
def positions():
    """Of an agent that starts anywhere in the left room, (clips, frames, 2), and its actions."""
    rng = np.random.default_rng(0)
    start = rng.integers(30, 90, (CLIPS, 1, 2))
    actions = rng.integers(-4, 5, (CLIPS, FRAMES, 2))
    return start + np.cumsum(np.concatenate([0 * start, actions[:, :-1]], axis=1), axis=1), actions


@pytest.fixture(scope="module")
def clips(positions):
    states, actions = positions
    frames = states.astype(np.uint8)[:, :, None, :, None]
    return ClipBatch(frames, actions.astype(np.float32), np.arange(CLIPS, dtype=np.int32))


def test_known_errors_are_measured(positions, clips):
    states, _ = positions
    errors = prediction_errors(Biased(), states.astype(np.float32), clips.actions)
    ahead = np.arange(1, FRAMES)
    np.testing.assert_allclose(errors["model"], (BIAS * ahead) ** 2, rtol=1e-5)
    moved = states[:, 1:] - states[:, :1]
    np.testing.assert_allclose(errors["copy"], np.square(moved).mean(axis=(0, 2)), rtol=1e-5)
    wrong = np.roll(moved, len(moved) // 2, axis=0) - moved + BIAS * ahead[:, None]
    np.testing.assert_allclose(errors["shuffled_actions"], np.square(wrong).mean(axis=(0, 2)), rtol=1e-5)


def test_a_space_that_is_the_worlds_is_recognized(positions, clips):
    first = positions[0][:, 0].astype(np.float32)
    found = diagnose(Biased(), ENV, clips, first)
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["position_probe"]["r2"] == pytest.approx([1, 1], abs=1e-4) and found["position_probe"]["error"] < 0.1
    assert found["embedding_variance"] == pytest.approx(first.var(axis=0).mean(), rel=1e-5)
    assert 1.9 < found["effective_rank"] <= 2
    assert found["prediction_error"]["model"][0] == pytest.approx(BIAS**2)


def test_a_space_without_the_positions_is_recognized(positions):
    states = positions[0][:, 0].astype(np.float32)
    noise = np.random.default_rng(1).normal(size=states.shape).astype(np.float32)
    assert abs(rank_correlation(ENV, noise, states)) < 0.4
    probe = probe_states(noise, states)
    assert max(probe["r2"]) < 0.1 and probe["error"] > 10


def test_distances_are_compared_within_a_room(positions):
    """The other room may be anywhere in the space: a way there leads through the door."""
    left = positions[0][:, 0].astype(np.float32)
    states = np.where(np.arange(CLIPS)[:, None] % 3 == 0, left + np.float32([120, 0]), left)
    z = np.where(states[:, :1] > 112, states - np.float32([5000, 0]), states)
    assert rank_correlation(ENV, z, states) == pytest.approx(1)


def test_frames_are_embedded_in_batches_of_one_size(clips, monkeypatch):
    monkeypatch.setattr(world_model, "BATCH", 4)
    frames = clips.frames[:10, 0]
    np.testing.assert_array_equal(embed_frames(Biased(), frames), frames[:, 0, :, 0])
