"""Health of a world model, without planning: does it predict, do actions matter, and is its space the world's?

A model may predict well and still be useless to a planner, if distances between embeddings have nothing to do with
those in the world: the rank correlation shows that in a second, the prediction loss does not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy.stats import spearmanr

from jepax.envs import Environment
from jepax.evals.programs import eval_jit
from jepax.health.metrics import rankme
from jepax.methods.base import WorldModel
from jepax.types import ClipBatch

BATCH = 256
RIDGE = 1e-3
"""Of the probe, in units of the features' mean variance: it only keeps the solution finite."""


def diagnose(
    model: WorldModel, env: Environment, clips: ClipBatch, states: Float[np.ndarray, "clips state"]
) -> dict[str, Any]:
    """Measures on held-out clips, in their order. `states`: the state at each first frame."""
    z = embed_clips(model, np.asarray(clips.frames))
    first = z[:, 0]
    return {
        "prediction_error": prediction_errors(model, z, np.asarray(clips.actions)),
        "position_probe": probe_states(first, states),
        "effective_rank": rankme(first - first.mean(axis=0)),
        "embedding_variance": float(first.var(axis=0).mean()),
        "rank_correlation": rank_correlation(env, first, states),
    }


@eval_jit
def _embed(model: WorldModel, frames: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch dim"]:
    return model.embed(frames)


def embed_frames(model: WorldModel, frames: UInt8[np.ndarray, "n height width channels"]) -> Float[np.ndarray, "n dim"]:
    """Embeddings of any number of frames, in batches of one size."""
    rows = np.minimum(np.arange(-(-len(frames) // BATCH) * BATCH), len(frames) - 1)
    parts = [np.asarray(_embed(model, frames[part])) for part in rows.reshape(-1, BATCH)]
    return np.concatenate(parts)[: len(frames)]


def embed_clips(
    model: WorldModel, frames: UInt8[np.ndarray, "clips clip height width channels"]
) -> Float[np.ndarray, "clips clip dim"]:
    """Embeddings of every frame of every clip."""
    return embed_frames(model, frames.reshape(-1, *frames.shape[2:])).reshape(*frames.shape[:2], -1)


@eval_jit
def _predict(
    model: WorldModel, z: Float[Array, "clips dim"], actions: Float[Array, "clips horizon block"]
) -> Float[Array, "clips horizon dim"]:
    """Predictions of the frames after the first one, from it and its clip's actions alone."""

    def rollout(z: Float[Array, "dim"], actions: Float[Array, "horizon block"]) -> Float[Array, "horizon dim"]:
        return model.rollout(z[None], actions[:0], actions[None])[0, 1:]

    return jax.vmap(rollout)(z, actions)


def prediction_errors(
    model: WorldModel, z: Float[np.ndarray, "clips clip dim"], actions: Float[np.ndarray, "clips clip block"]
) -> dict[str, list[float]]:
    """Mean squared error after 1, 2, ... blocks of actions: of the model, of the last frame as the prediction, and of
    the model with the actions of a clip half of them further on: those of the next may be of the same episode."""
    actions, future = actions[:, : z.shape[1] - 1], z[:, 1:]
    predicted = {
        "model": _predict(model, z[:, 0], actions),
        "copy": np.broadcast_to(z[:, :1], future.shape),
        "shuffled_actions": _predict(model, z[:, 0], np.roll(actions, len(actions) // 2, axis=0)),
    }
    return {name: np.square(x - future).mean(axis=(0, 2)).tolist() for name, x in predicted.items()}


def probe_states(
    features: Float[np.ndarray, "n dim"], states: Float[np.ndarray, "n state"]
) -> dict[str, list[float] | float]:
    """Linear regression of the state, fitted on the first half and measured on the second: R2 per number of the state,
    and the mean distance between true and estimated states, in the state's unit."""
    half = len(features) // 2
    mean, target_mean = features[:half].mean(axis=0), states[:half].mean(axis=0)
    x, y = features[:half] - mean, states[:half] - target_mean
    gram = x.T @ x
    weights = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)

    error = (features[half:] - mean) @ weights + target_mean - states[half:]
    spread = np.maximum(states[half:].var(axis=0), 1e-12)
    return {
        "r2": (1 - np.square(error).mean(axis=0) / spread).tolist(),
        "error": float(np.linalg.norm(error, axis=1).mean()),
    }


def rank_correlation(env: Environment, z: Float[np.ndarray, "n dim"], states: Float[np.ndarray, "n state"]) -> float:
    """Spearman correlation of distances between embeddings and between states, over pairs of one region.

    Each row of the first half is paired with one of the second: neighbors may be of one episode, and close together.
    """
    half = len(z) // 2
    one, other = jnp.asarray(states[:half]), jnp.asarray(states[half : 2 * half])
    alike = np.asarray(jax.vmap(env.region)(one)) == np.asarray(jax.vmap(env.region)(other))
    true = np.asarray(jax.vmap(env.distance)(one, other))[alike]
    ours = np.linalg.norm(z[:half] - z[half : 2 * half], axis=1)[alike]
    return float(spearmanr(ours, true).statistic)
