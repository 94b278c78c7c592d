"""Fine-tuning: the whole encoder is trained on the labels, under a linear head on the mean of its tokens.

Source: MAE (He et al. 2022, arXiv:2111.06377), main_finetune.py and util/lr_decay.py, after BEiT (Bao et al. 2022,
arXiv:2106.08254).
"""

from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.distributed.compile_cache import COMPILER_OPTIONS
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.feature_extractor import ViewBatch, ViTFeatures
from jepax.evals.head_training import (
    ADAM,
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
from jepax.nn import ViT
from jepax.nn.transformer import Linear
from jepax.trees import cast
from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig, center_crop

HEAD_INIT_STD = 2e-5
"""Deviation of the head's weights at the start, as published: every class is equally likely."""


@dataclass(frozen=True)
class FinetuneConfig:
    """One run for each learning rate; validation chooses."""

    epochs: int = 20
    """Passes over the training split, in each run."""
    batch_size: int = 256
    """Examples per update, at most the number of training examples."""
    learning_rates: tuple[float, ...] = (5e-4, 2e-3)
    """Peak learning rates of AdamW, at the head; layers below it have less."""
    layer_decay: float = 0.75
    """Learning rate of a layer over that of the layer above it; 1 trains all layers alike."""
    weight_decay: float = 0.05
    """Decoupled weight decay (multiplied by the learning rate), on weight matrices only."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0; a cosine to 0 follows."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes."""
    scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the picture's area that a random crop takes."""
    flip: float = 0.5
    """Chance of a horizontal flip."""

    def __post_init__(self) -> None:
        check_head_training("finetune", self)
        ok = partial(check_field, "finetune", self)
        ok("layer_decay", 0 < self.layer_decay <= 1, "a factor in (0, 1]; try 0.75")
        ok("weight_decay", self.weight_decay >= 0, "a number not below 0; try 0.05")
        ok("label_smoothing", 0 <= self.label_smoothing < 1, "a share in [0, 1); try 0.1")


class Classifier(eqx.Module):
    """logits = W mean_p(f(x)_p) + b. Called on pictures, it reads their centre views."""

    encoder: ViT
    head: Linear
    crop: CropConfig = eqx.field(static=True)

    def logits(self, view: ViewBatch) -> Float[Array, "batch classes"]:
        return self.head(jnp.mean(self.encoder(view), axis=1))

    def __call__(self, images: ImageBatch) -> Float[Array, "batch classes"]:
        return self.logits(center_crop(images, self.crop))


class FinetuneState(eqx.Module):
    """All that a step changes."""

    classifier: Classifier
    moments: optax.OptState
    step: Int[Array, ""]


def init_finetune_state(row: ViTFeatures, classes: int, *, key: PRNGKeyArray) -> FinetuneState:
    """A copy of the row's encoder under a new head: a step takes its arrays over, and may not take the row's."""
    encoder = cast(jax.tree.map(jnp.copy, row.encoder), jnp.float32)
    head = Linear(row.encoder.config.width, classes, std=HEAD_INIT_STD, key=key)
    classifier = Classifier(encoder, head, row.crop)
    return FinetuneState(classifier, ADAM.init(classifier), jnp.int32(0))


def layer_lr_scales(classifier: Classifier, decay: float) -> Classifier:
    """Each array's share of the learning rate: decay^(depth + 1 - i), i = 0 the patch embedding, 1 .. depth the blocks.

    The final norm and the head have 1. The blocks' arrays are stacked, so theirs is a vector along the layers' axis.
    """
    depth = classifier.encoder.config.depth
    by_layer = decay ** (depth + 1.0 - jnp.arange(1, depth + 1))

    def below(classifier: Classifier) -> tuple:
        return classifier.encoder.embed, classifier.encoder.stack.blocks

    embed, blocks = below(classifier)
    embed = jax.tree.map(lambda _: jnp.asarray(decay ** (depth + 1)), embed)
    blocks = jax.tree.map(lambda array: by_layer.reshape(-1, *(array.ndim - 1) * (1,)), blocks)
    return eqx.tree_at(below, jax.tree.map(lambda _: jnp.ones(()), classifier), (embed, blocks))


@partial(jax.jit, static_argnames=("config", "steps"), donate_argnames=("run",), compiler_options=COMPILER_OPTIONS)
def finetune_step(
    run: FinetuneState,
    images: ImageBatch,
    labels: Int[Array, "batch"],
    key: PRNGKeyArray,
    learning_rate: Float[Array, ""],
    *,
    config: FinetuneConfig,
    steps: int,
) -> tuple[FinetuneState, Float[Array, ""]]:
    """One update of the encoder and its head, and the loss."""
    view = make_train_view("augmented", images, key, run.classifier.crop, config)

    def loss_of(classifier: Classifier) -> Float[Array, ""]:
        logits = classifier.logits(view)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), config.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    loss, grads = jax.value_and_grad(loss_of)(run.classifier)
    now = learning_rate * lr_scale(config, run.step, steps)
    rates = jax.tree.map(lambda share: now * share, layer_lr_scales(run.classifier, config.layer_decay))
    classifier, moments = adamw_update(grads, run.moments, run.classifier, rates, config.weight_decay)
    return FinetuneState(classifier, moments, run.step + 1), loss


def finetune_once(
    train: EvalDataset,
    learning_rate: float,
    classes: int,
    config: FinetuneConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> Classifier:
    """One run. The same key gives every learning rate the same head, batches and crops."""
    key_head, key_order, key_views = jr.split(key, 3)
    size, steps = batch_size_and_steps(config, len(train))
    peak = jnp.float32(learning_rate)

    def step(run: FinetuneState, images: ImageBatch) -> tuple[FinetuneState, Array]:
        return finetune_step(run, without_labels(images), images.label, key_views, peak, config=config, steps=steps)

    run = init_finetune_state(train.row, classes, key=key_head)
    with say.counting(f"fine-tuning, lr {learning_rate:g}", steps) as done:
        return run_head_training(step, run, train.shuffled(size, steps, loader_seed(key_order)), done).classifier


def finetune(
    train: EvalDataset,
    validation: EvalDataset,
    classes: int,
    config: FinetuneConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> list[FittedProbe]:
    """The fine-tuned encoder with the greatest validation top-1, the first of equals; the row's own does not change.

    On an untrained encoder this is training from scratch, the floor that a trained one must beat.

    *Differs from the reference:* crops and flips alone, not RandAugment, mixup, cutmix and random erasing; no drop
    path; the encoder's final norm is before the mean over tokens, not after it.

    **Raises** `UserError` if the row has no encoder to train, if a split is empty or has a label out of range, or if
    every run diverges.
    """
    if not isinstance(train.row, ViTFeatures):
        raise UserError(f"finetune needs an encoder, and {type(train.row).__name__} has none to train; leave it out")
    for name, split in (("train", train), ("validation", validation)):
        check_labels(split.labels, classes, name)
    tried, best = [], None
    for learning_rate in config.learning_rates:
        classifier = finetune_once(train, learning_rate, classes, config, key=key, say=say)
        guesses = predict(classifier, validation)
        tried.append({"learning_rate": learning_rate, "validation_top1": top1_accuracy(guesses, validation.labels)})
        if best is None or tried[-1]["validation_top1"] > best[0]["validation_top1"]:
            best = tried[-1], classifier, guesses
    settings, classifier, guesses = best
    check_any_prediction(guesses, "finetune")
    variant = f"lr {settings['learning_rate']:g}"
    return [FittedProbe("finetune", partial(predict, classifier), settings, variant, tried)]
