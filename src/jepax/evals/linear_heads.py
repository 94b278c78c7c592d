"""Linear heads on frozen features: their inputs, standardization, and all heads of a sweep in one product."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jepax.evals.feature_extractor import LayerChoice, LayerFeatures
from jepax.evals.head_training import HeadHparams, HeadTask, TrainSchedule
from jepax.evals.programs import eval_jit
from jepax.evals.scoring import MAX_K, NO_CLASS
from jepax.types import AnyArray

LARS_INIT_STD = 0.01
"""Standard deviation of the initial weights for LARS, whose steps scale with their norm; AdamW starts at 0."""
EPSILON = 1e-6
"""Added to the variance of a feature (He et al. 2022, whose linear probe has a BatchNorm without parameters too)."""


class ProbeInput(NamedTuple):
    """Input of a head. It is a control if its width is not that of its source: a fixed random map projects it."""

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
ProbeInputs = dict[str, Float[AnyArray, "batch _inputs"]]
"""Inputs by name."""


def random_projections(names: tuple[str, ...], widths: dict[LayerChoice, int], key: PRNGKeyArray) -> Projections:
    """The controls' random matrices, of unit gain: normal with variance 1 / inputs."""
    controls = {name: INPUTS[name] for name in names if name in CONTROLS}
    shapes = tuple((widths[control.source], widths[control.width]) for control in controls.values())
    normals = _normals(key, shapes) if shapes else ()
    return {name: np.asarray(x) / np.float32(np.sqrt(len(x))) for name, x in zip(controls, normals, strict=True)}


@partial(eval_jit, static_argnames="shapes")
def _normals(key: PRNGKeyArray, shapes: tuple[tuple[int, int], ...]) -> list[Array]:
    return [jr.normal(jr.fold_in(key, number), shape) for number, shape in enumerate(shapes)]


def select_inputs(
    layers: LayerFeatures, names: tuple[str, ...], projections: Projections, cached: ProbeInputs | None = None
) -> ProbeInputs:
    """The named inputs of a batch, computed unless they are cached."""
    sources = {"last": layers[-1], "last four": jnp.moveaxis(layers, 0, 1).reshape(layers.shape[1], -1)}

    def select(name: str) -> Array:
        x = sources[INPUTS[name].source]
        if name in CONTROLS:
            x = jnp.dot(x, projections[name], precision=lax.Precision.HIGHEST)
        return jnp.maximum(x, 0) if INPUTS[name].rectified else x

    cached = cached or {}
    return {name: cached[name] if name in cached else select(name) for name in names}


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
        return cls(np.zeros((), np.float32), np.zeros(dim, np.float32), np.zeros(dim, np.float32))

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


@eval_jit
def add_moments(
    moments: dict[str, RunningMoments], layers: LayerFeatures, valid: Bool[AnyArray, "batch"], projections: Projections
) -> tuple[dict[str, RunningMoments], ProbeInputs]:
    """Adds a batch to the moments of every input. Returns them, and the batch's inputs that are projections."""
    inputs = select_inputs(layers, tuple(moments), projections)
    moments = {name: moments[name].add(inputs[name], valid) for name in moments}
    return moments, {name: inputs[name] for name in projections}


class LinearHeads(NamedTuple):
    """logits = W x + b for each head."""

    weight: Float[AnyArray, "heads dim classes"]
    bias: Float[AnyArray, "heads classes"]


Params = dict[str, LinearHeads]
"""The heads of each input."""


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
    shift = jnp.sum(moments.mean[:, None] * heads.weight, axis=1)
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

    def init(self, key: PRNGKeyArray) -> Params:
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

    def inputs(self, batch: tuple[LayerFeatures, ProbeInputs], key: PRNGKeyArray) -> ProbeInputs:
        layers, cached = batch
        return select_inputs(layers, tuple(self.moments), self.projections, cached)

    def logits(self, params: Params, inputs: ProbeInputs) -> dict[str, Float[Array, "batch heads classes"]]:
        return {
            name: logits(heads, self.standardized, self.moments[name], inputs[name]) for name, heads in params.items()
        }

    def losses(self, params: Params, inputs: ProbeInputs, labels: Int[Array, "batch"]) -> Float[Array, "heads"]:
        """Softmax cross-entropy, summed over the inputs, which share no parameter."""
        values = self.logits(params, inputs).values()
        losses = [optax.softmax_cross_entropy_with_integer_labels(each, labels[:, None]).mean(0) for each in values]
        return sum(losses[1:], start=losses[0])


@eval_jit
def predict_all(task: LinearTask, params: Params, layers: LayerFeatures) -> dict[str, Int[Array, "batch heads k"]]:
    """The classes of greatest logit by every head, ties by class number; `NO_CLASS` by a head that has diverged.

    One program for the choice on validation and for the test split.
    """
    values = task.logits(params, select_inputs(layers, tuple(params), task.projections))
    return {
        name: jnp.where(jnp.isnan(x).any(axis=2, keepdims=True), NO_CLASS, lax.top_k(x, min(MAX_K, x.shape[2]))[1])
        for name, x in values.items()
    }
