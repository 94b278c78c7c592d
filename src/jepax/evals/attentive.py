"""The attentive probe: one learned query reads the frozen tokens by cross-attention, and a linear layer classifies.

Source: V-JEPA (Bardes et al. 2024, arXiv:2404.08471), src/models/attentive_pooler.py and
evals/image_classification_frozen/eval.py; V-JEPA 2 (arXiv:2506.09985) trains many such heads beside each other.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.feature_extractor import FeatureExtractor
from jepax.evals.head_training import (
    ADAM,
    TrainViews,
    adamw_update,
    batch_size_and_steps,
    check_any_prediction,
    check_field,
    check_head_training,
    loader_seed,
    lr_scale,
    make_train_view,
    predict,
    run_head_training,
    without_labels,
)
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.evals.scoring import FittedProbe, check_labels, top1_accuracy
from jepax.nn.transformer import MLP, LayerNorm, Linear, init_weight, normalize
from jepax.types import ImageBatch
from jepax.views import center_crop

TARGET_HEAD_DIM = 64
"""Width of an attention head that is aimed at."""
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
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0; a cosine to 0 follows."""
    views: TrainViews = "augmented"
    """What the heads are trained on: random resized crops, or the centre views that they are scored on."""
    scale: tuple[float, float] = (0.3, 1.0)
    """Read by views=augmented: smallest and largest share of the picture's area that a crop takes."""
    flip: float = 0.5
    """Read by views=augmented: chance of a horizontal flip."""

    def __post_init__(self) -> None:
        check_head_training("attentive", self)
        decays = self.weight_decays
        check_field(
            "attentive", self, "weight_decays", len(decays) > 0 and min(decays) >= 0, "one number, none below 0"
        )
        check_field("attentive", self, "views", self.views in ("centre", "augmented"), "centre or augmented")


class AttentiveHead(eqx.Module):
    """logits = W s + b of s = r + mlp(norm2(r)), where r = q + W_o concat_h(v_h) + b_o and, over the tokens x_p,

        v_h = sum_p softmax_p(q_h . k_hp / sqrt(channels)) v_hp,   k = W_k norm1(x),  v = W_v norm1(x) + b_v

    with q the learned query and q_h head h's part of W_q q + b_q. Computed in another order, since there is one query:
    q_h . W_k x = (W_k^T q_h) . x, and the tokens are mixed before W_v instead of after. Keys and values of every token
    are never made, so a sweep of heads costs little beside the encoder. norm1's weight moves to the query's side; its
    bias adds the same to every token's score, which the softmax drops, as it would a bias of the keys.

    *Differs from the reference:* no bias of the keys (it has no effect, but rounding and Adam would move it); weights
    begin at deviation 1 / sqrt(fan in) instead of 0.02.
    """

    query: Float[Array, "dim"]
    norm1: LayerNorm
    ask: Linear
    keys: Linear
    values: Linear
    project: Linear
    norm2: LayerNorm
    mlp: MLP
    classify: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, dim: int, classes: int, *, key: PRNGKeyArray):
        key_query, key_ask, key_keys, key_values, key_project, key_mlp, key_classify = jr.split(key, 7)
        linear = partial(Linear, dim, std=None)
        self.query = init_weight(key_query, (dim,), QUERY_INIT_STD)
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.ask = linear(dim, key=key_ask)
        self.keys = linear(dim, bias=False, key=key_keys)
        self.values = linear(dim, key=key_values)
        self.project = linear(dim, key=key_project)
        self.mlp = MLP(dim, MLP_RATIO * dim, std=None, key=key_mlp)
        self.classify = linear(classes, key=key_classify)
        self.heads = choose_num_heads(dim)

    def __call__(self, tokens: Float[Array, "batch patches dim"]) -> Float[Array, "batch classes"]:
        z, dim = normalize(tokens), tokens.shape[2]  # norm1 without its weight and bias: the same for a whole sweep
        query = self.ask(self.query).reshape(self.heads, -1)
        toward = jnp.einsum("dhc,hc->hd", self.keys.weight.reshape(dim, *query.shape), query)
        scores = jnp.einsum("bpd,hd->bhp", z, toward * self.norm1.weight) * query.shape[1] ** -0.5
        mixed = jnp.einsum("bhp,bpd->bhd", jax.nn.softmax(scores, axis=2), z)
        mixed = mixed * self.norm1.weight + self.norm1.bias
        values = jnp.einsum("bhd,dhc->bhc", mixed, self.values.weight.reshape(dim, *query.shape))
        read = self.query + self.project(values.reshape(-1, dim) + self.values.bias)
        return self.classify(read + self.mlp(self.norm2(read)[:, None])[:, 0])


def choose_num_heads(dim: int) -> int:
    """How many attention heads: the divisor of the width whose heads are nearest to `CHANNELS` wide, by ratio."""
    divisors = [heads for heads in range(1, dim + 1) if dim % heads == 0]
    return min(divisors, key=lambda heads: max(dim // heads / TARGET_HEAD_DIM, TARGET_HEAD_DIM / (dim // heads)))


class HeadsState(eqx.Module):
    """All that a step changes: heads whose arrays carry a leading axis, one entry for each setting."""

    heads: AttentiveHead
    moments: optax.OptState
    step: Int[Array, ""]


@partial(jax.jit, static_argnames=("count", "dim", "classes"))
def init_heads_state(count: int, dim: int, classes: int, *, key: PRNGKeyArray) -> HeadsState:
    """`count` heads that all begin alike."""
    head = AttentiveHead(dim, classes, key=key)
    heads = jax.tree.map(lambda array: jnp.tile(array, (count,) + array.ndim * (1,)), head)
    return HeadsState(heads, jax.vmap(ADAM.init)(heads), jnp.int32(0))


@partial(jax.jit, static_argnames=("config", "steps"), donate_argnames=("sweep",))
def attentive_step(
    sweep: HeadsState,
    row: FeatureExtractor,
    images: ImageBatch,
    labels: Int[Array, "batch"],
    key: PRNGKeyArray,
    settings: Float[Array, "settings 2"],
    *,
    config: AttentiveConfig,
    steps: int,
) -> tuple[HeadsState, Float[Array, "settings"]]:
    """One update of every head, and their losses. The row's forward pass is computed once, without a gradient.

    `settings`: learning rate and weight decay of each head. No head's arithmetic holds another's numbers.
    """
    tokens = row.tokens(make_train_view(config.views, images, key, row.crop, config))

    def loss_of(head: AttentiveHead) -> Float[Array, ""]:
        return optax.softmax_cross_entropy_with_integer_labels(head(tokens), labels).mean()

    def update(head: AttentiveHead, moments: optax.OptState, setting: Float[Array, "2"]):
        loss, grads = jax.value_and_grad(loss_of)(head)
        rates = jax.tree.map(lambda _: setting[0] * lr_scale(config, sweep.step, steps), head)
        return *adamw_update(grads, moments, head, rates, setting[1]), loss

    heads, moments, losses = jax.vmap(update)(sweep.heads, sweep.moments, settings)
    return HeadsState(heads, moments, sweep.step + 1), losses


class AttentiveProbe(eqx.Module):
    """What the heads answer for pictures: values of the classes from the centre view's tokens."""

    row: FeatureExtractor
    heads: AttentiveHead

    def __call__(self, images: ImageBatch) -> Float[Array, "settings batch classes"]:
        tokens = self.row.tokens(center_crop(images, self.row.crop))
        return jax.vmap(lambda head: head(tokens))(self.heads)


def train_heads(
    train: EvalDataset,
    settings: Float[np.ndarray, "settings 2"],
    classes: int,
    config: AttentiveConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> AttentiveHead:
    """The heads of all settings, trained side by side on the same batches from the same start."""
    key_head, key_order, key_views = jr.split(key, 3)
    size, steps = batch_size_and_steps(config, len(train))
    shape = jax.eval_shape(lambda row: row.tokens(jnp.zeros((1, *row.crop.size, len(row.crop.mean)))), train.row)

    def step(sweep: HeadsState, images: ImageBatch) -> tuple[HeadsState, Array]:
        inputs = train.row, without_labels(images), images.label, key_views, settings
        return attentive_step(sweep, *inputs, config=config, steps=steps)

    sweep = init_heads_state(len(settings), shape.shape[2], classes, key=key_head)
    with say.counting("attentive probe", steps) as done:
        return run_head_training(step, sweep, train.shuffled(size, steps, loader_seed(key_order)), done).heads


def attentive(
    train: EvalDataset,
    validation: EvalDataset,
    classes: int,
    config: AttentiveConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> list[FittedProbe]:
    """The head of the sweep with the greatest validation top-1, the first of equals.

    Tokens are never kept: each step embeds its batch, once for all heads.

    *Differs from the reference:* one cross-attention block as V-JEPA has it (V-JEPA 2 puts three of self-attention
    before it); crops and flips, not AutoAugment and random erasing; a constant weight decay, not on the query; no
    clipping of the gradient.

    **Raises** `UserError` if a split is empty or has a label out of range, or if every head diverges.
    """
    for name, split in (("train", train), ("validation", validation)):
        check_labels(split.labels, classes, name)
    settings = list(itertools.product(config.learning_rates, config.weight_decays))
    heads = train_heads(train, np.asarray(settings, np.float32), classes, config, key=key, say=say)
    guesses = predict(AttentiveProbe(train.row, heads), validation)
    check_any_prediction(guesses, "attentive")
    tried = [
        {"learning_rate": lr, "weight_decay": decay, "validation_top1": top1_accuracy(of_head, validation.labels)}
        for (lr, decay), of_head in zip(settings, guesses, strict=True)
    ]
    best = max(range(len(tried)), key=lambda head: tried[head]["validation_top1"])
    alone = AttentiveProbe(train.row, jax.tree.map(lambda array: array[best : best + 1], heads))
    variant = "lr {learning_rate:g}, wd {weight_decay:g}".format(**tried[best])
    return [FittedProbe("attentive", lambda split: predict(alone, split)[0], tried[best], variant, tried)]
