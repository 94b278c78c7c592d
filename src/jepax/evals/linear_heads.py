"""Linear heads on frozen features: their inputs, standardization, and all heads of a sweep in one product."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.evals.feature_extractor import LayerChoice, LayerFeatures
from jepax.evals.head_training import HeadHparams, HeadTask, TrainSchedule
from jepax.types import AnyArray

LARS_INIT_STD = 0.01
"""Standard deviation of the initial weights for LARS, whose steps scale with their norm; AdamW starts at 0."""
EPSILON = 1e-6
"""Added to the variance of a feature (He et al. 2022, whose linear probe has a BatchNorm without parameters too)."""


class ProbeInput(NamedTuple):
    """What a head reads. It is a control if its width is not that of its source: a fixed random map projects it."""

    source: LayerChoice
    width: LayerChoice
    rectified: bool = False
    """If max(0, x) follows the projection: a linear head on the result is then no longer linear in the source."""


INPUTS = {
    "last": ProbeInput("last", "last"),
    "last four": ProbeInput("last four", "last four"),
    "last four, projected": ProbeInput("last four", "last"),
    "last, expanded": ProbeInput("last", "last four"),
    "last, expanded and rectified": ProbeInput("last", "last four", rectified=True),
}
CANDIDATES = ("last", "last four")
CONTROLS = tuple(name for name in INPUTS if name not in CANDIDATES)
Projections = dict[str, Float[AnyArray, "inputs outputs"]]


def random_projections(names: tuple[str, ...], widths: dict[LayerChoice, int], key: PRNGKeyArray) -> Projections:
    """The controls' random matrices, of unit gain: normal with variance 1 / inputs."""
    controls = {name: INPUTS[name] for name in names if name in CONTROLS}
    shapes = [(widths[control.source], widths[control.width]) for control in controls.values()]
    return {
        name: jr.normal(jr.fold_in(key, number), shape) / np.sqrt(shape[0])
        for number, (name, shape) in enumerate(zip(controls, shapes, strict=True))
    }


def select_inputs(
    layers: LayerFeatures, names: tuple[str, ...], projections: Projections
) -> dict[str, Float[Array, "batch _inputs"]]:
    """The named inputs of a batch."""
    sources = {"last": layers[-1], "last four": jnp.moveaxis(layers, 0, 1).reshape(layers.shape[1], -1)}

    def select(name: str) -> Array:
        x = sources[INPUTS[name].source]
        if name in CONTROLS:
            x = jnp.dot(x, projections[name], precision=lax.Precision.HIGHEST)
        return jnp.maximum(x, 0) if INPUTS[name].rectified else x

    return {name: select(name) for name in names}


class RunningMoments(NamedTuple):
    """Count, mean and squared deviations of the features seen so far."""

    count: Float[AnyArray, ""]
    mean: Float[AnyArray, "dim"]
    squares: Float[AnyArray, "dim"]
    """Sum of squared distances to the mean."""

    @property
    def std(self) -> Float[AnyArray, "dim"]:
        """Population standard deviation as in BatchNorm, sqrt(variance + epsilon): a constant feature stays one."""
        return jnp.sqrt(self.squares / jnp.maximum(self.count, 1) + EPSILON)

    @classmethod
    def zeros(cls, dim: int) -> "RunningMoments":
        return cls(jnp.zeros(()), jnp.zeros(dim), jnp.zeros(dim))

    def add(self, x: Float[Array, "batch dim"], valid: Bool[Array, "batch"]) -> "RunningMoments":
        """Adds the valid rows of a batch (Chan et al. 1979): accurate also if the mean is large."""
        weight = valid.astype(x.dtype)[:, None]
        count = jnp.sum(weight)
        mean = jnp.sum(weight * x, axis=0) / jnp.maximum(count, 1)
        squares = jnp.sum(weight * jnp.square(x - mean), axis=0)
        total = jnp.maximum(self.count + count, 1)
        shift = mean - self.mean
        return RunningMoments(
            self.count + count,
            self.mean + shift * count / total,
            self.squares + squares + jnp.square(shift) * self.count * count / total,
        )


@jax.jit
def add_moments(
    moments: dict[str, RunningMoments], layers: LayerFeatures, valid: Bool[AnyArray, "batch"], projections: Projections
) -> dict[str, RunningMoments]:
    """Adds a batch to the moments of every input."""
    inputs = select_inputs(layers, tuple(moments), projections)
    return {name: moments[name].add(inputs[name], valid) for name in moments}


class LinearHeads(NamedTuple):
    """logits = W x + b for each head."""

    weight: Float[AnyArray, "heads dim classes"]
    bias: Float[AnyArray, "heads classes"]


def logits(
    heads: LinearHeads,
    standardized: Float[AnyArray, "heads"],
    moments: RunningMoments,
    x: Float[Array, "batch dim"],
) -> Float[Array, "batch heads classes"]:
    """Logits of all heads from one product with the standardized features z.

    A head on raw features reads x = std * z + mean, and W x = (std * W) z + W mean: one z serves both.
    """
    z = (x - moments.mean) / moments.std
    raw = 1 - standardized[:, None]
    scale = 1 + raw * (moments.std - 1)
    weight = jnp.swapaxes(scale[..., None] * heads.weight, 0, 1).reshape(z.shape[1], -1)
    product = jnp.dot(z, weight, precision=lax.Precision.HIGHEST).reshape(len(z), *heads.bias.shape)
    shift = jnp.einsum("d,hdc->hc", moments.mean, heads.weight, precision=lax.Precision.HIGHEST)
    return product + raw * shift + heads.bias


class LinearTask(HeadTask):
    """Trains every head on every input: parameters are a dictionary of `LinearHeads` by input."""

    hparams: HeadHparams
    standardized: Float[AnyArray, "heads"]
    """1 if the head reads features standardized over the training split, 0 if it reads raw features."""
    moments: dict[str, RunningMoments]
    projections: Projections
    schedule: TrainSchedule = eqx.field(static=True)
    classes: int = eqx.field(static=True)

    def init(self, key: PRNGKeyArray) -> dict[str, LinearHeads]:
        """All heads of an input start equal: at zero for AdamW, small and random for LARS."""
        return {
            name: self._init_input(len(moments.mean), jr.fold_in(key, number))
            for number, (name, moments) in enumerate(self.moments.items())
        }

    def _init_input(self, dim: int, key: PRNGKeyArray) -> LinearHeads:
        shape, heads = (dim, self.classes), len(self.standardized)
        is_adamw = self.schedule.optimizer == "adamw"
        weight = jnp.zeros(shape) if is_adamw else LARS_INIT_STD * jr.normal(key, shape)
        return LinearHeads(jnp.broadcast_to(weight, (heads, *shape)), jnp.zeros((heads, self.classes)))

    def inputs(self, batch: LayerFeatures, key: PRNGKeyArray) -> dict[str, Float[Array, "batch _inputs"]]:
        return select_inputs(batch, tuple(self.moments), self.projections)

    def logits(
        self, params: dict[str, LinearHeads], inputs: dict[str, Float[Array, "batch _inputs"]]
    ) -> dict[str, Float[Array, "batch heads classes"]]:
        return {
            name: logits(heads, self.standardized, self.moments[name], inputs[name]) for name, heads in params.items()
        }

    def losses(
        self, params: dict[str, LinearHeads], inputs: dict[str, Float[Array, "batch _inputs"]], labels: Int[Array, "b"]
    ) -> Float[Array, "heads"]:
        """Softmax cross-entropy, summed over the inputs, which share no parameter."""
        values = self.logits(params, inputs).values()
        losses = [optax.softmax_cross_entropy_with_integer_labels(each, labels[:, None]).mean(0) for each in values]
        return sum(losses[1:], start=losses[0])


@jax.jit
def predict_all(
    task: LinearTask, params: dict[str, LinearHeads], layers: LayerFeatures
) -> dict[str, Int[Array, "batch heads"]]:
    """The class of greatest logit by every head; -1 by a head that has diverged, which is never correct."""
    values = task.logits(params, select_inputs(layers, tuple(params), task.projections))
    return {name: jnp.where(jnp.isnan(x).any(axis=2), -1, jnp.argmax(x, axis=2)) for name, x in values.items()}


@jax.jit
def chosen_logits(
    task: LinearTask, params: dict[str, LinearHeads], layers: LayerFeatures, chosen: dict[str, Int[AnyArray, ""]]
) -> dict[str, Float[Array, "batch classes"]]:
    """Logits of one head of each input, by its number."""
    inputs = select_inputs(layers, tuple(params), task.projections)

    def of_head(name: str, number: Int[AnyArray, ""]) -> Float[Array, "batch classes"]:
        one = (params[name], jnp.asarray(task.standardized))
        heads, standardized = jax.tree.map(lambda leaf: leaf[number][None], one)
        return logits(heads, standardized, task.moments[name], inputs[name])[:, 0]

    return {name: of_head(name, number) for name, number in chosen.items()}
