"""Linear heads on frozen features, every setting of one kind of input trained side by side in one program."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.types import AnyArray

LARS_BASE_BATCH = 256
"""Images that LARS's reference rates are given for; the rate grows with the batch (Goyal et al. 2017)."""
LARS_TRUST_COEFFICIENT = 1e-3
"""LARS's trust coefficient (You et al. 2017, arXiv:1708.03888)."""
LARS_MOMENTUM = 0.9
LARS_INIT_STD = 0.01
"""Deviation of LARS's initial weights, whose step is proportional to their norm; AdamW begins at zero."""

VARIANCE_EPS = 1e-6
"""Added to the variance of a feature (He et al. 2022, whose linear probe has a BatchNorm without parameters too)."""

OptimizerName = Literal["adamw", "lars"]
LayerFeatures = Float[Array, "layers batch dim"]


class RandomProjectionControl(NamedTuple):
    """An input made of another by a fixed random map to another width."""

    source: str
    rectified: bool = False
    """Whether max(0, x) follows, so that a linear head on it is no longer linear in the source."""


CANDIDATE_INPUTS = ("last", "last four")
CONTROL_INPUTS = {
    "last four, projected": RandomProjectionControl("last four"),
    "last, expanded": RandomProjectionControl("last"),
    "last, expanded and rectified": RandomProjectionControl("last", rectified=True),
}
"""The four at the width of one layer, and one layer at the width of four."""


@dataclass(frozen=True)
class ProbeInputs:
    """What heads may read of an encoder's layers."""

    layers: int
    dim: int
    wanted: tuple[str, ...] = CANDIDATE_INPUTS
    controls: bool = True

    @property
    def candidates(self) -> tuple[str, ...]:
        """Those that are wanted; of an encoder of one layer the last."""
        return self.wanted if self.layers > 1 else CANDIDATE_INPUTS[:1]

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they are trained and told."""
        return (*self.candidates, *(CONTROL_INPUTS if self.controls and self.layers > 1 else ()))

    def width(self, name: str) -> int:
        return self.dim if name in ("last", "last four, projected") else self.layers * self.dim

    def maps(self, key: PRNGKeyArray) -> dict[str, Float[Array, "inputs outputs"]]:
        """The controls' random maps, of unit gain: normal of variance 1 / inputs."""
        controls = {name: CONTROL_INPUTS[name] for name in self.names if name in CONTROL_INPUTS}
        shapes = {name: (self.width(control.source), self.width(name)) for name, control in controls.items()}
        return {
            name: jr.normal(jr.fold_in(key, place), shape) / np.sqrt(shape[0])
            for place, (name, shape) in enumerate(shapes.items())
        }


def build_inputs(
    layers: LayerFeatures, names: tuple[str, ...], maps: dict[str, Float[Array, "inputs outputs"]]
) -> dict[str, Float[Array, "batch _inputs"]]:
    """Each named input of a batch."""
    read = {"last": layers[-1], "last four": jnp.moveaxis(layers, 0, 1).reshape(layers.shape[1], -1)}

    def made(name: str) -> Array:
        if name in read:
            return read[name]
        mapped = jnp.dot(read[CONTROL_INPUTS[name].source], maps[name], precision=lax.Precision.HIGHEST)
        return jnp.maximum(mapped, 0) if CONTROL_INPUTS[name].rectified else mapped

    return {name: made(name) for name in names}


class RunningMoments(NamedTuple):
    """Of the features seen so far."""

    count: Float[AnyArray, ""]
    mean: Float[AnyArray, "dim"]
    squares: Float[AnyArray, "dim"]
    """Sum of squared distances to the mean."""

    @property
    def std(self) -> Float[AnyArray, "dim"]:
        """Over the population, as a BatchNorm takes it, sqrt(variance + epsilon): a constant stays one."""
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1) + VARIANCE_EPS)


def init_moments(dim: int) -> RunningMoments:
    return RunningMoments(jnp.zeros(()), jnp.zeros(dim), jnp.zeros(dim))


def update_moments(
    moments: RunningMoments, x: Float[Array, "batch dim"], valid: Bool[Array, "batch"]
) -> RunningMoments:
    """With the valid rows of a batch, by the update of Chan et al. 1979, which loses no digits to a large mean."""
    weight = valid.astype(x.dtype)[:, None]
    count = jnp.sum(weight)
    mean = jnp.sum(weight * x, axis=0) / jnp.maximum(count, 1)
    squares = jnp.sum(weight * jnp.square(x - mean), axis=0)
    total = jnp.maximum(moments.count + count, 1)
    apart = mean - moments.mean
    return RunningMoments(
        moments.count + count,
        moments.mean + apart * count / total,
        moments.squares + squares + jnp.square(apart) * moments.count * count / total,
    )


class HeadHparams(NamedTuple):
    """Of each head of a sweep."""

    standardised: Float[AnyArray, "heads"]
    """1: reads features standardised over the training split; 0: reads them as they are."""
    learning_rate: Float[AnyArray, "heads"]
    weight_decay: Float[AnyArray, "heads"]


class LinearHeads(NamedTuple):
    """logits = W.x + b of each head."""

    weight: Float[AnyArray, "heads dim classes"]
    bias: Float[AnyArray, "heads classes"]


def compute_logits(
    heads: LinearHeads, settings: HeadHparams, moments: RunningMoments, x: Float[Array, "batch dim"]
) -> Float[Array, "batch heads classes"]:
    """Logits of all heads from one product with the standardised features z.

    A head on the features as they are reads x = std * z + mean, and W.x = (std * W).z + W.mean: one z serves both.
    """
    z = (x - moments.mean) / moments.std
    plain = 1 - settings.standardised[:, None]
    scale = 1 + plain * (moments.std - 1)
    weight = jnp.swapaxes(scale[..., None] * heads.weight, 0, 1).reshape(z.shape[1], -1)
    product = jnp.dot(z, weight, precision=lax.Precision.HIGHEST).reshape(len(z), *heads.bias.shape)
    shift = jnp.einsum("d,hdc->hc", moments.mean, heads.weight, precision=lax.Precision.HIGHEST)
    return product + plain * shift + heads.bias


def is_correct(values: Float[Array, "batch heads classes"], labels: Int[Array, "batch"]) -> Bool[Array, "batch heads"]:
    """Whether the greatest value is the right class's; a head that has diverged is never right."""
    sound = ~jnp.any(jnp.isnan(values), axis=2)
    return sound & (jnp.argmax(values, axis=2) == labels[:, None])


def init_heads(rule: OptimizerName, heads: int, dim: int, classes: int, key: PRNGKeyArray) -> LinearHeads:
    """All alike: zero for AdamW, small and random for LARS."""
    one = jnp.zeros((dim, classes)) if rule == "adamw" else LARS_INIT_STD * jr.normal(key, (dim, classes))
    return LinearHeads(jnp.broadcast_to(one, (heads, dim, classes)), jnp.zeros((heads, classes)))


def make_head_optimizer(
    rule: OptimizerName, learning_rate: Float[AnyArray, ""], weight_decay: Float[AnyArray, ""], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Of one head. Weight decay and LARS's trust ratio are for the weight alone, as SimCLR has it for LARS.

    `schedule` gives the share of the learning rate at each update.
    """
    weights = LinearHeads(True, False)
    decay = optax.add_decayed_weights(weight_decay, weights)
    rate = optax.scale_by_schedule(lambda count: -learning_rate * schedule(count))
    if rule == "adamw":
        return optax.chain(optax.scale_by_adam(), decay, rate)
    trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=LARS_TRUST_COEFFICIENT), weights)
    return optax.chain(decay, trust, rate, optax.trace(LARS_MOMENTUM))


def init_opt_states(rule: OptimizerName, heads: LinearHeads, settings: HeadHparams) -> optax.OptState:
    """The optimiser's, one for each head."""
    return jax.vmap(lambda head, lr, wd: make_head_optimizer(rule, lr, wd, lambda count: 1.0).init(head))(
        heads, settings.learning_rate, settings.weight_decay
    )


def train_heads_step(
    rule: OptimizerName,
    schedule: optax.Schedule,
    carry: tuple[LinearHeads, optax.OptState],
    settings: HeadHparams,
    moments: RunningMoments,
    x: Float[Array, "batch dim"],
    labels: Int[Array, "batch"],
) -> tuple[LinearHeads, optax.OptState]:
    """One update of every head by the mean softmax cross entropy of the batch.

    No term of the summed loss holds two heads, so each is trained as if alone.
    """
    heads, states = carry

    def loss(heads: LinearHeads) -> Float[Array, ""]:
        values = compute_logits(heads, settings, moments, x)
        return optax.softmax_cross_entropy_with_integer_labels(values, labels[:, None]).mean(0).sum()

    def one(
        head: LinearHeads, grad: LinearHeads, state: optax.OptState, lr: Array, wd: Array
    ) -> tuple[LinearHeads, optax.OptState]:
        updates, state = make_head_optimizer(rule, lr, wd, schedule).update(grad, state, head)
        return optax.apply_updates(head, updates), state

    return jax.vmap(one)(heads, jax.grad(loss)(heads), states, settings.learning_rate, settings.weight_decay)
