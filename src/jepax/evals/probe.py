"""Linear probe of frozen features: every learning rate and weight decay is trained at once, and validation chooses."""

import itertools
import time
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax

from jepax.evals.features import Features, Scores, check_labels, rank_of_label, scores
from jepax.types import AnyArray, Array, Float, Int, PRNGKeyArray, UserError

CHUNK = 2048
"""Examples classified at once when heads are scored; bounds memory, changes no number."""


@dataclass(frozen=True)
class ProbeConfig:
    """The sweep: every learning rate with every weight decay, with and without standardisation."""

    epochs: int = 30
    """Passes over the training features; a small split wants more, since the rate falls by the number of updates."""
    batch_size: int = 256
    """Examples per update, at most the number of training examples."""
    learning_rates: tuple[float, ...] = (2e-3, 1e-2, 5e-2)
    """Peak learning rates of AdamW, each falling to zero by a cosine."""
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    """Decoupled weight decay (multiplied by the learning rate), on weights and not on biases."""

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1:
            raise UserError(f"epochs={self.epochs} and batch_size={self.batch_size} must be at least 1")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError(f"learning_rates={self.learning_rates} must hold at least one number, all above 0")
        if not self.weight_decays or min(self.weight_decays) < 0:
            raise UserError(f"weight_decays={self.weight_decays} must hold at least one number, none below 0")


@dataclass(frozen=True)
class Variant:
    """One head of the sweep and the validation top-1, in percent, that it reached."""

    layers: str
    """`last` or `last four`."""
    standardised: bool
    learning_rate: float
    weight_decay: float
    validation_top1: float

    def __str__(self) -> str:
        scaling = "standardised" if self.standardised else "as they are"
        return f"{self.layers}, {scaling}, lr {self.learning_rate:g}, wd {self.weight_decay:g}"


@dataclass(frozen=True)
class ProbeResult:
    """What validation chose, and what that one head scores on the test split."""

    chosen: Variant
    test: Scores
    grid: tuple[Variant, ...]
    """Every head that was trained."""
    seconds: float
    """Wall time of training and scoring, compilation included."""


class Frame(eqx.Module):
    """What the heads read: the training features' statistics, and which heads see features standardised by them."""

    mean: Float[Array, "dim"]
    std: Float[Array, "dim"]
    standardised: Float[Array, "heads"]
    """1 where the head reads standardised features, 0 where it reads them as they are."""


class Heads(eqx.Module):
    """Linear classifiers side by side, zero at first: the loss is convex, so no random start is needed."""

    weight: Float[Array, "dim heads classes"]
    bias: Float[Array, "heads classes"]


def frame(train: Float[AnyArray, "n dim"], standardised: Float[AnyArray, "heads"]) -> Frame:
    """The mean and sqrt(var + 1e-6) of every training feature."""
    train = jnp.asarray(train)
    return Frame(train.mean(0), jnp.sqrt(train.var(0) + 1e-6), jnp.asarray(standardised))


def standardise(frame: Frame, features: Float[AnyArray, "*n dim"]) -> Float[Array, "*n dim"]:
    """(x - mean) / sqrt(var + 1e-6): BatchNorm without parameters on frozen features, in the limit of the full batch.

    *Differs from the reference:* BatchNorm takes the batch's statistics in training, running averages in testing.
    """
    return (features - frame.mean) / frame.std


def head_logits(heads: Heads, frame: Frame, z: Float[Array, "batch dim"]) -> Float[Array, "batch heads classes"]:
    """Logits of all heads from one product of the standardised features z.

    A head on the features as they are reads x = std * z + mean, and W.x = (std * W).z + W.mean: one z serves both.
    """
    plain = 1 - frame.standardised[:, None]
    scale = 1 + plain * (frame.std - 1)[:, None, None]
    product = jnp.dot(z, (scale * heads.weight).reshape(z.shape[1], -1), precision=lax.Precision.HIGHEST)
    shift = jnp.einsum("d,dhc->hc", frame.mean, heads.weight, precision=lax.Precision.HIGHEST)
    return product.reshape(len(z), *heads.bias.shape) + plain * shift + heads.bias


@partial(jax.jit, static_argnames=("classes", "config"))
def train_heads(
    z: Float[Array, "n dim"],
    labels: Int[AnyArray, "n"],
    frame: Frame,
    learning_rate: Float[AnyArray, "heads"],
    weight_decay: Float[AnyArray, "heads"],
    *,
    classes: int,
    config: ProbeConfig,
    key: PRNGKeyArray,
) -> Heads:
    """Train every head on the same minibatches: AdamW, softmax cross entropy, the rate falling to zero by a cosine.

    No term of the summed loss holds two heads, so each is trained as if alone. `z` is standardised. Every epoch has its
    own order and leaves out the examples of its last, incomplete batch.

    *Differs from the reference:* AdamW, which reaches logistic regression's accuracy in few epochs; I-JEPA's probe used
    LARS with batches of 16384 and 50 epochs.
    """
    size = min(config.batch_size, len(z))
    per_epoch = len(z) // size
    adam = optax.scale_by_adam()
    rate = optax.cosine_decay_schedule(1.0, config.epochs * per_epoch)

    def loss(heads, batch):
        logits = head_logits(heads, frame, z[batch])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch][:, None])
        return losses.mean(0).sum()

    def step(carry, batch):
        heads, state, done = carry
        update, state = adam.update(jax.grad(loss)(heads, batch), state)
        lr = (rate(done) * learning_rate)[:, None]
        weight = heads.weight - lr * (update.weight + weight_decay[:, None] * heads.weight)
        return (Heads(weight, heads.bias - lr * update.bias), state, done + 1), None

    def epoch(carry, key):
        order = jr.permutation(key, len(z))[: per_epoch * size]
        return lax.scan(step, carry, order.reshape(per_epoch, size))

    count = len(learning_rate)
    zero = Heads(jnp.zeros((z.shape[1], count, classes)), jnp.zeros((count, classes)))
    start = (zero, adam.init(zero), jnp.zeros((), jnp.int32))
    (heads, _, _), _ = lax.scan(epoch, start, jr.split(key, config.epochs))
    return heads


@jax.jit
def head_ranks(
    heads: Heads, frame: Frame, features: Float[AnyArray, "n dim"], labels: Int[AnyArray, "n"]
) -> Int[Array, "n heads"]:
    """For every example and head, how many classes come before the right one."""

    def ranks(example):
        features, label = example
        logits = head_logits(heads, frame, standardise(frame, features)[None])[0]
        return rank_of_label(logits, jnp.full(len(logits), label))

    return lax.map(ranks, (jnp.asarray(features), jnp.asarray(labels)), batch_size=CHUNK)


def linear_probe(
    train: Features,
    validation: Features,
    test: Features,
    classes: int,
    config: ProbeConfig | None = None,
    *,
    key: PRNGKeyArray,
) -> ProbeResult:
    """Train every head on `train`, choose one by validation top-1 (the first of equals), and read `test` once.

    The heads are {last layer, last four side by side} x {standardised, as they are} x learning rates x weight decays.
    After the choice nothing is trained again on both splits.

    **Raises** `UserError` if a split is empty or has a label out of range.
    """
    config = ProbeConfig() if config is None else config
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        check_labels(split.labels, classes, name)
    start = time.perf_counter()
    names = ("last", "last four") if len(train.layers) > 1 else ("last",)
    sweeps = [
        _sweep(name, train, validation, classes, config, name_key)
        for name, name_key in zip(names, jr.split(key, len(names)), strict=True)
    ]
    grid = [(variant, head) for sweep in sweeps for variant, head in sweep]
    chosen, (heads, frame) = max(grid, key=lambda entry: entry[0].validation_top1)
    ranks = head_ranks(heads, frame, _select(test, chosen.layers), test.labels)
    return ProbeResult(chosen, scores(ranks[:, 0]), tuple(variant for variant, _ in grid), time.perf_counter() - start)


def _select(split: Features, name: str) -> Float[np.ndarray, "n _"]:
    return split.last if name == "last" else split.concatenated


def _sweep(
    name: str, train: Features, validation: Features, classes: int, config: ProbeConfig, key: PRNGKeyArray
) -> list[tuple[Variant, tuple[Heads, Frame]]]:
    """Train all heads on one choice of layers; each comes back by itself, beside its validation top-1."""
    combinations = list(itertools.product((True, False), config.learning_rates, config.weight_decays))
    standardised, rates, decays = np.asarray(combinations, np.float32).T
    features = jnp.asarray(_select(train, name))
    basis = frame(features, standardised)
    z = standardise(basis, features)
    heads = train_heads(z, train.labels, basis, rates, decays, classes=classes, config=config, key=key)
    ranks = np.asarray(head_ranks(heads, basis, _select(validation, name), validation.labels))
    variants = [Variant(name, *made, scores(rank).top1) for made, rank in zip(combinations, ranks.T, strict=True)]
    return [(variant, _alone(heads, basis, head)) for head, variant in enumerate(variants)]


def _alone(heads: Heads, frame: Frame, head: int) -> tuple[Heads, Frame]:
    one = slice(head, head + 1)
    return Heads(heads.weight[:, one], heads.bias[one]), Frame(frame.mean, frame.std, frame.standardised[one])
