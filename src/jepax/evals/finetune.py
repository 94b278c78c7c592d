"""Fine-tuning: trains the encoder on the labels, with a linear head on the mean of its tokens.

Source: MAE (He et al. 2022, arXiv:2111.06377), main_finetune.py and util/lr_decay.py, after BEiT (Bao et al. 2022,
arXiv:2106.08254).
"""

from dataclasses import dataclass, replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.evals.checks import check_predictions, check_training
from jepax.evals.feature_extractor import View, ViTFeatures, augmented
from jepax.evals.head_training import HeadHparams, HeadTask, TrainSchedule, train_on_images, warmup_schedule
from jepax.evals.scoring import FittedProbe, ProtocolData, best_trial, predict, top1_accuracy
from jepax.nn import ViT
from jepax.nn.transformer import Linear
from jepax.trees import cast
from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig, center_crop

HEAD_INIT_STD = 2e-5
"""Standard deviation of the head's initial weights, as published: all classes start equally likely."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of fine-tuning, one training per learning rate; validation chooses."""

    epochs: int = 20
    """Passes over the training split, in each training."""
    batch_size: int = 256
    """Examples per update, at most the number of training examples."""
    learning_rates: tuple[float, ...] = (5e-4, 2e-3)
    """Peak learning rates of AdamW for the head; lower layers have lower ones."""
    layer_decay: float = 0.75
    """Learning rate of a layer divided by that of the layer above it; 1 trains all layers equally."""
    weight_decay: float = 0.05
    """Decoupled weight decay (multiplied by the learning rate), on weight matrices only."""
    warmup_fraction: float = 0.1
    """Fraction of the steps in which the learning rate rises from 0; a cosine to 0 follows."""
    label_smoothing: float = 0.1
    """Fraction of the target probability that is distributed evenly over all classes."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest fraction of the image's area in a random crop."""
    hflip_prob: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        check = check_training("finetune", self)
        check("warmup_fraction", 0 <= self.warmup_fraction < 1, "a fraction of the steps in [0, 1); try 0.1")
        check("layer_decay", 0 < self.layer_decay <= 1, "a factor in (0, 1]; try 0.75")
        check("weight_decay", self.weight_decay >= 0, "a number not below 0; try 0.05")
        check("label_smoothing", 0 <= self.label_smoothing < 1, "a fraction in [0, 1); try 0.1")


class Classifier(eqx.Module):
    """logits = W mean_p(f(x)_p) + b. Called on images, it reads their center views."""

    encoder: ViT
    head: Linear
    crop: CropConfig = eqx.field(static=True)

    def logits(self, view: View) -> Float[Array, "batch classes"]:
        return self.head(jnp.mean(self.encoder(view), axis=1))

    def __call__(self, images: ImageBatch) -> Float[Array, "batch classes"]:
        return self.logits(center_crop(images, self.crop))


class FinetuneTask(HeadTask):
    """Trains a copy of an extractor's encoder, and a head on it."""

    hparams: HeadHparams
    extractor: ViTFeatures
    schedule: TrainSchedule = eqx.field(static=True)
    classes: int = eqx.field(static=True)
    config: FinetuneConfig = eqx.field(static=True)

    def init(self, key: PRNGKeyArray) -> Classifier:
        """Copies the encoder: an update donates its parameters' arrays, and the extractor still needs its own."""
        # Trained in float32, also if the extractor's encoder is in another type.
        encoder = cast(jax.tree.map(jnp.copy, self.extractor.encoder), jnp.float32)
        head = Linear(encoder.config.width, self.classes, std=HEAD_INIT_STD, key=key)
        return Classifier(encoder, head, self.extractor.crop)

    def inputs(self, batch: ImageBatch, key: PRNGKeyArray) -> View:
        # Crops alone: the encoder is trained, so nothing of it can be computed before `losses`.
        return augmented(
            batch, key, replace(self.extractor.crop, scale=self.config.crop_scale, hflip_prob=self.config.hflip_prob)
        )

    def losses(self, params: Classifier, inputs: View, labels: Int[Array, "batch"]) -> Float[Array, ""]:
        logits = params.logits(inputs)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1]), self.config.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def lr_scale(self, params: Classifier) -> Classifier:
        """layer_decay^(depth + 1 - i) with i = 0 for the patch embedding and 1 .. depth for the blocks.

        It is 1 for the final norm and the head. The blocks' arrays are stacked, so theirs is a vector over layers.
        """
        depth, decay = params.encoder.config.depth, self.config.layer_decay
        # A factor for each block, from decay^depth for the first to decay for the last.
        by_layer = decay ** (depth + 1.0 - jnp.arange(1, depth + 1))

        def lower_layers(classifier: Classifier) -> tuple:
            return classifier.encoder.embed, classifier.encoder.stack.blocks

        # (depth, 1, ..., 1) for the stacked arrays of the blocks.
        embed, blocks = lower_layers(params)
        embed = jax.tree.map(lambda _: jnp.asarray(decay ** (depth + 1)), embed)
        blocks = jax.tree.map(lambda array: by_layer.reshape(-1, *(array.ndim - 1) * (1,)), blocks)
        return eqx.tree_at(lower_layers, super().lr_scale(params), (embed, blocks))


def finetune(data: ProtocolData, config: FinetuneConfig) -> list[FittedProbe]:
    """Returns the fine-tuned encoder with the greatest validation top-1, the first if several are equal.

    Every learning rate starts from the same head and sees the same batches and crops. The extractor's encoder does not
    change. On an untrained encoder this is training from scratch, the baseline that a trained one must beat.

    *Differs from the reference:* crops and flips only, not RandAugment, mixup, cutmix and random erasing; no drop path;
    the encoder's final norm is before the mean over tokens, not after it.

    **Raises** `UserError` if the extractor has no encoder to train, or if every training diverges.
    """
    # Raw pixels have no encoder.
    extractor, labels = data.train.extractor, data.validation.labels
    if not isinstance(extractor, ViTFeatures):
        raise UserError(f"finetune needs an encoder, and {type(extractor).__name__} has none; leave it out")

    # Train once for each setting, each time from a copy of the encoder.
    tried, best = [], None
    for rate in config.learning_rates:
        classifier = train_on_images(make_task(data, rate, config), data, f"fine-tuning, lr {rate:g}")
        predictions = predict(classifier, data.validation)
        tried.append({"learning_rate": rate, "validation_top1": top1_accuracy(predictions, labels)})
        # Only the best encoder is kept in memory.
        if best_trial(tried) is tried[-1]:
            best = classifier, predictions
    classifier, predictions = best
    check_predictions(predictions, "finetune")
    settings = best_trial(tried)
    variant = f"lr {settings['learning_rate']:g}"
    return [FittedProbe("finetune", partial(predict, classifier), settings, variant, tried)]


def make_task(data: ProtocolData, learning_rate: float, config: FinetuneConfig) -> FinetuneTask:
    hparams = HeadHparams(np.asarray(learning_rate, np.float32), np.asarray(config.weight_decay, np.float32))
    schedule = warmup_schedule(config.epochs, config.batch_size, config.warmup_fraction, len(data.train))
    return FinetuneTask(hparams, data.train.extractor, schedule, data.classes, config)
