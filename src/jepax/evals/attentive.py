"""The attentive probe: one learned query reads the frozen tokens by cross-attention, and a linear layer classifies.

Source: V-JEPA (Bardes et al. 2024, arXiv:2404.08471), src/models/attentive_pooler.py and
evals/image_classification_frozen/eval.py; V-JEPA 2 (arXiv:2506.09985) trains many such heads together.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.evals.checks import check_predictions, check_training
from jepax.evals.feature_extractor import FeatureExtractor, TrainViews, augmented
from jepax.evals.head_training import HeadHparams, HeadTask, TrainSchedule, train_on_images, warmup_schedule
from jepax.evals.scoring import FittedProbe, ProtocolData, best_trial, predict, top1_accuracy
from jepax.nn.transformer import MLP, LayerNorm, Linear, init_weight, normalize
from jepax.types import ImageBatch
from jepax.views import CropConfig, center_crop

HEAD_WIDTH = 64
"""Intended width of an attention head."""
MLP_RATIO = 4
QUERY_INIT_STD = 0.02


@dataclass(frozen=True)
class AttentiveConfig:
    """The sweep: every learning rate with every weight decay, all trained together on the same batches."""

    epochs: int = 10
    """Passes over the training split."""
    batch_size: int = 256
    """Examples per update, at most the number of training examples."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates of AdamW."""
    weight_decays: tuple[float, ...] = (0.01, 0.1)
    """Decoupled weight decay (multiplied by the learning rate), on weight matrices only."""
    warmup_fraction: float = 0.05
    """Fraction of the steps in which the learning rate rises from 0; a cosine to 0 follows."""
    train_views: TrainViews = "augmented"
    """Training views: random resized crops, or the center views that the heads are scored on."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """train_views=augmented: smallest and largest fraction of the image's area in a crop."""
    hflip_prob: float = 0.5
    """train_views=augmented: probability of a horizontal flip."""

    def __post_init__(self) -> None:
        check, decays = check_training("attentive", self), self.weight_decays
        check("warmup_fraction", 0 <= self.warmup_fraction < 1, "a fraction of the steps in [0, 1); try 0.1")
        check("weight_decays", len(decays) > 0 and min(decays) >= 0, "at least one number, none below 0")
        check("train_views", self.train_views in ("center", "augmented"), "center or augmented")


class AttentiveHead(eqx.Module):
    """logits = W s + b with s = r + mlp(norm2(r)), r = q + W_o concat_h(v_h) + b_o and, over the tokens x_p,

        v_h = sum_p softmax_p(q_h . k_hp / sqrt(channels)) v_hp,   k = W_k norm1(x),  v = W_v norm1(x) + b_v

    where q is the learned query and q_h head h's part of W_q q + b_q. Computed in another order, since there is only
    one query: q_h . W_k x = (W_k^T q_h) . x, and tokens are averaged before W_v instead of after. The keys and values
    of the tokens are never computed, so a sweep of heads costs little compared to the encoder. norm1's weight moves to
    the query's side; its bias adds the same number to every token's score, which the softmax cancels, as it would
    cancel a bias of the keys.

    *Differs from the reference:* no bias of the keys (it has no effect, but rounding and Adam would move it); weights
    are initialized with standard deviation 1 / sqrt(fan in) instead of 0.02.
    """

    query: Float[Array, "dim"]
    norm1: LayerNorm
    query_proj: Linear
    keys: Linear
    values: Linear
    project: Linear
    norm2: LayerNorm
    mlp: MLP
    classify: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, dim: int, classes: int, *, key: PRNGKeyArray):
        key_query, key_query_proj, key_keys, key_values, key_project, key_mlp, key_classify = jr.split(key, 7)
        linear = partial(Linear, dim, std=None)
        self.query = init_weight(key_query, (dim,), QUERY_INIT_STD)
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.query_proj = linear(dim, key=key_query_proj)
        self.keys = linear(dim, bias=False, key=key_keys)
        self.values = linear(dim, key=key_values)
        self.project = linear(dim, key=key_project)
        self.mlp = MLP(dim, MLP_RATIO * dim, std=None, key=key_mlp)
        self.classify = linear(classes, key=key_classify)
        self.heads = choose_num_heads(dim)

    def __call__(self, tokens: Float[Array, "batch patches dim"]) -> Float[Array, "batch classes"]:
        # The query, projected once for all images, and moved to the space of the tokens: (heads, dim).
        z, dim = normalize(tokens), tokens.shape[2]  # norm1 without weight and bias: one for all heads
        query = self.query_proj(self.query).reshape(self.heads, -1)
        toward = jnp.einsum("dhc,hc->hd", self.keys.weight.reshape(dim, *query.shape), query)

        # The weighted mean of the tokens for each head, (batch, heads, dim); norm1's weight and bias come after it.
        scores = jnp.einsum("bpd,hd->bhp", z, toward * self.norm1.weight) * query.shape[1] ** -0.5
        mixed = jnp.einsum("bhp,bpd->bhd", jax.nn.softmax(scores, axis=2), z)
        mixed = mixed * self.norm1.weight + self.norm1.bias

        # Then the values, (batch, heads, channels), the residual block, and the classes.
        values = jnp.einsum("bhd,dhc->bhc", mixed, self.values.weight.reshape(dim, *query.shape))
        read = self.query + self.project(values.reshape(-1, dim) + self.values.bias)
        return self.classify(read + self.mlp(self.norm2(read)[:, None])[:, 0])


def choose_num_heads(dim: int) -> int:
    """Number of attention heads: the divisor of the width that makes them nearest to `HEAD_WIDTH` wide, by ratio."""
    # By ratio, so that 32 and 128 are equally far from 64.
    divisors = [heads for heads in range(1, dim + 1) if dim % heads == 0]
    return min(divisors, key=lambda heads: max(dim // heads / HEAD_WIDTH, HEAD_WIDTH / (dim // heads)))


class AttentiveTask(HeadTask):
    """Trains heads on the tokens of a frozen extractor. Every array of the heads has a leading axis of settings."""

    hparams: HeadHparams
    extractor: FeatureExtractor
    schedule: TrainSchedule = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    views: TrainViews = eqx.field(static=True)
    crop: CropConfig = eqx.field(static=True)
    """The extractor's crop, with the augmentation of the training views."""

    def init(self, key: PRNGKeyArray) -> AttentiveHead:
        """Heads that all start equal."""
        # The tokens' width, without running the extractor.
        size = (1, *self.crop.size, len(self.crop.mean))
        dim = jax.eval_shape(lambda: self.extractor.tokens(jnp.zeros(size))).shape[2]
        head, count = AttentiveHead(dim, self.classes, key=key), len(self.hparams.learning_rate)
        return jax.tree.map(lambda array: jnp.tile(array, (count,) + array.ndim * (1,)), head)

    def inputs(self, batch: ImageBatch, key: PRNGKeyArray) -> Float[Array, "batch patches dim"]:
        """Tokens of the training views, computed once for all heads."""
        # New crops at each step, from one key: the index that is folded into it counts over all epochs.
        center = self.views == "center"
        return self.extractor.tokens(center_crop(batch, self.crop) if center else augmented(batch, key, self.crop))

    def losses(
        self, params: AttentiveHead, inputs: Float[Array, "batch patches dim"], labels: Int[Array, "batch"]
    ) -> Float[Array, "heads"]:
        # (heads, batch, classes) from the same tokens
        logits = jax.vmap(lambda head: head(inputs))(params)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[None]).mean(axis=1)


class AttentiveProbe(eqx.Module):
    """Maps images to the logits of all heads, from the tokens of the center view."""

    extractor: FeatureExtractor
    heads: AttentiveHead

    def __call__(self, images: ImageBatch) -> Float[Array, "heads batch classes"]:
        tokens = self.extractor.tokens(center_crop(images, self.extractor.crop))
        return jax.vmap(lambda head: head(tokens))(self.heads)


def attentive(data: ProtocolData, config: AttentiveConfig) -> list[FittedProbe]:
    """Returns the head of the sweep with the greatest validation top-1, the first if several are equal.

    Tokens are not stored: each step embeds its batch, once for all heads.

    *Differs from the reference:* one cross-attention block as in V-JEPA (V-JEPA 2 adds three of self-attention before
    it); crops and flips, not AutoAugment and random erasing; a constant weight decay, not on the query; no gradient
    clipping.

    **Raises** `UserError` if every head diverges.
    """
    # All heads are trained together: learning rates x weight decays.
    settings = list(itertools.product(config.learning_rates, config.weight_decays))
    task = make_task(data, settings, config)
    heads = train_on_images(task, data, "attentive probe")

    # The test split is later predicted by the same program, with all heads: to drop the others would compile another.
    probe = AttentiveProbe(data.train.extractor, heads)
    predictions = predict(probe, data.validation)
    check_predictions(predictions, "attentive")
    tried = [
        {"learning_rate": lr, "weight_decay": decay, "validation_top1": top1_accuracy(of_head, data.validation.labels)}
        for (lr, decay), of_head in zip(settings, predictions, strict=True)
    ]
    best = best_trial(tried)
    number = tried.index(best)
    variant = "lr {learning_rate:g}, wd {weight_decay:g}".format(**best)
    return [FittedProbe("attentive", lambda dataset: predict(probe, dataset)[number], best, variant, tried)]


def make_task(data: ProtocolData, settings: list[tuple[float, float]], config: AttentiveConfig) -> AttentiveTask:
    """`settings`: learning rate and weight decay of each head."""
    hparams, extractor = HeadHparams(*np.asarray(settings, np.float32).T), data.train.extractor
    schedule = warmup_schedule(config.epochs, config.batch_size, config.warmup_fraction, len(data.train))
    crop = replace(extractor.crop, scale=config.crop_scale, hflip_prob=config.hflip_prob)
    return AttentiveTask(hparams, extractor, schedule, data.classes, config.train_views, crop)
