"""A method on something that is no image: from a state and an action, predict the embedding of the next state.

z      = f(s_t),  y = f_ema(s_(t+1))
loss   = mean of (g(z, a_t) - y)^2 + mean over dimensions of max(0, 1 - std(z_j))
"""

from dataclasses import dataclass, field

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from jepax.methods import Method, MethodConfig
from jepax.methods.ema import EMAConfig, ema_update, init_ema
from jepax.nn.transformer import Linear
from jepax.objectives import explained_fraction, variance
from jepax.trees import EMA
from jepax.types import AnyArray, Metrics


class ToyBatch(eqx.Module):
    """Sequences of states, and the actions between them."""

    states: Float[AnyArray, "batch time state"]
    actions: Float[AnyArray, "batch steps action"]
    index: Int[AnyArray, "batch"]


class Transition(eqx.Module):
    """One step of each sequence."""

    state: Float[Array, "batch state"]
    action: Float[Array, "batch action"]
    next_state: Float[Array, "batch state"]


class ToyOutputs(eqx.Module):
    """Embeddings of each sequence's step."""

    embedding: Float[Array, "batch dim"]
    prediction: Float[Array, "batch dim"]
    target: Float[Array, "batch dim"]


@dataclass(frozen=True)
class ToyConfig(MethodConfig, name="toy_dynamics"):
    """Widths of states, actions and embeddings."""

    state: int = 6
    action: int = 2
    dim: int = 8
    noise: float = 0.01
    """Deviation of the noise on both states."""
    momentum: EMAConfig = field(default_factory=lambda: EMAConfig(start=0.9))

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "Toy":
        return Toy(self, total_steps=total_steps, key=key)

    def tiny(self) -> "ToyConfig":
        return self


class Toy(Method):
    """See the top of this file."""

    encoder: Linear
    target_encoder: EMA[Linear]
    predictor: Linear
    config: ToyConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)

    def __init__(self, config: ToyConfig, *, total_steps: int, key: PRNGKeyArray):
        key_encoder, key_predictor = jr.split(key)
        self.encoder = Linear(config.state, config.dim, std=None, key=key_encoder)
        self.target_encoder = init_ema(self.encoder)
        self.predictor = Linear(config.dim + config.action, config.dim, std=None, key=key_predictor)
        self.config, self.total_steps = config, total_steps

    def draw(self, batch: ToyBatch, keys: Key[Array, "batch"]) -> Transition:
        """One random step of each sequence, with noise on both of its states."""

        def one(states: Array, actions: Array, key: PRNGKeyArray) -> Transition:
            key_time, key_noise = jr.split(key)
            time = jr.randint(key_time, (), 0, len(actions))
            pair = lax.dynamic_slice_in_dim(states, time, 2)
            pair = pair + self.config.noise * jr.normal(key_noise, pair.shape)
            return pair[0], actions[time], pair[1]

        return Transition(*jax.vmap(one)(jnp.asarray(batch.states), jnp.asarray(batch.actions), keys))

    def forward(self, views: Transition) -> ToyOutputs:
        z = jnp.tanh(self.encoder(views.state))
        prediction = self.predictor(jnp.concatenate([z, views.action.astype(z.dtype)], axis=1))
        target = lax.stop_gradient(jnp.tanh(self.target_encoder.average(views.next_state)))
        return ToyOutputs(*(x.astype(jnp.float32) for x in (z, prediction, target)))

    def objective(self, outputs: ToyOutputs, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        error = jnp.mean(jnp.square(outputs.prediction - outputs.target))
        spread = variance(outputs.embedding)
        baseline = jnp.mean(jnp.square(outputs.target - jnp.mean(outputs.target, axis=0)))
        explained = explained_fraction(error, baseline)
        metrics = {"train/prediction_loss": error, "train/variance_loss": spread, "embeddings": outputs.embedding}
        return error + spread, metrics | {"train/explained_variance": explained}

    def after_update(self, step: Int[Array, ""], metrics: Metrics) -> tuple["Toy", Metrics]:
        momentum = self.config.momentum.at(step, self.total_steps)
        moved, ema_metrics = ema_update(self.target_encoder, self.encoder, momentum)
        return eqx.tree_at(lambda method: method.target_encoder, self, moved), ema_metrics


def toy_batch(count: int, *, start: int = 0, time: int = 5, config: ToyConfig | None = None) -> ToyBatch:
    """Sequences `start` to `start + count - 1` of s_(t+1) = R s_t + M a_t, R a rotation; each from its own key."""
    config = config or ToyConfig()
    rotation = jnp.linalg.qr(jr.normal(jr.key(0), (config.state, config.state)))[0]
    push = jr.normal(jr.key(1), (config.action, config.state))

    def one(index: Int[Array, ""]) -> tuple[Array, Array]:
        key_state, key_actions = jr.split(jr.fold_in(jr.key(2), index))
        actions = jr.normal(key_actions, (time - 1, config.action))
        first = jr.normal(key_state, (config.state,))
        step = lambda state, action: ((after := state @ rotation + action @ push), after)  # noqa: E731
        return jnp.concatenate([first[None], lax.scan(step, first, actions)[1]]), actions

    index = jnp.arange(start, start + count, dtype=jnp.int32)
    return ToyBatch(*jax.vmap(one)(index), index)
