"""I-JEPA (Assran et al. 2023, arXiv:2301.08243).

The context encoder f sees a few patches of an image. From them a predictor g guesses what a slowly moving copy of f,
the target encoder, computes for the blocks that were hidden. No pixels, no negatives, no augmentation but a crop.

    z    = f(x[context])                          trained
    h    = LN(f_ema(x))                           moving average of f; sees the full view, gets no gradient
    loss = mean over blocks B and their patches p of D(g(z, positions of B)[p], h[p])

After each update f_ema <- m f_ema + (1 - m) f. A regularizer of the mean of z over patches may be added; VICReg's makes
it C-JEPA (Mo & Tong 2024, arXiv:2410.19560).
"""

from dataclasses import dataclass, field
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from jepax.errors import check_fields
from jepax.masking import MultiBlock, MultiBlockConfig
from jepax.methods.base import ImageMethod, ImageMethodConfig
from jepax.methods.ema import EMAConfig, ema_update, init_ema
from jepax.methods.regularizer import RegularizerConfig, regularize
from jepax.nn import Predictor, PredictorConfig, ViT, ViTConfig, pool, take_patches
from jepax.nn.transformer import LayerNorm, normalize
from jepax.objectives import explained_fraction, masked_mean, smooth_l1
from jepax.trees import EMA
from jepax.types import ImageBatch, Masks, Metrics
from jepax.views import CropConfig, MaskedViews, random_resized_crop


@dataclass(frozen=True)
class IJEPAConfig(ImageMethodConfig, name="ijepa"):
    """I-JEPA as published, and choices on loss, norms and regularizer."""

    encoder: ViTConfig = field(default_factory=ViTConfig)
    """Context encoder, and the target encoder's shape."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    """Predictor."""
    masks: MultiBlockConfig = field(default_factory=MultiBlockConfig)
    """Target blocks and context."""
    crop: CropConfig = field(default_factory=CropConfig)
    """The one view of an image that both encoders see."""
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    """Distance of predictions to targets: smooth L1 (the released code) or squared error (the paper)."""
    smooth_l1_beta: float = 1.0
    """Distance at which smooth L1 turns from quadratic to linear; loss=l2 does not read it."""
    target_norm: Literal["layer", "none"] = "layer"
    """Parameter-free LayerNorm on the targets, or none. Without it they drift: docs/failures/drift.md."""
    prediction_norm: Literal["none", "affine", "no_affine"] = "none"
    """LayerNorm on the predictions: none (as published), affine, or no_affine (parameter-free)."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Schedule of the moving average's momentum."""
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    """Regularizer of the context's embedding; none as published."""

    def __post_init__(self) -> None:
        check_fields("method", self, "above 0", "smooth_l1_beta")
        self.encoder.grid(self.crop.size)  # raises if the patch does not divide the view

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "IJEPA":
        return IJEPA(self, total_steps=total_steps, key=key)


class Outputs(eqx.Module):
    """Outputs of the networks for each image, in float32."""

    pooled: Float[Array, "batch dim"]
    """Mean over patches of the embedding that the regularizer reads."""
    predictions: Float[Array, "batch blocks target dim"]
    """g(z, positions of B), padded to the largest block B."""
    embedded: Float[Array, "batch patches dim"]
    """h, the targets: every patch as the target encoder embeds it, also those in no block."""
    masks: Masks


class IJEPA(ImageMethod):
    """I-JEPA, with the equations at the top of this file. Both encoders start equal."""

    encoder: ViT  # f
    target_encoder: EMA[ViT]  # f_ema. Nothing beneath an EMA is trained: the type is the rule.
    predictor: Predictor  # g
    prediction_norm: LayerNorm | None
    masks: MultiBlock
    config: IJEPAConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)

    def __init__(self, config: IJEPAConfig, *, total_steps: int, key: PRNGKeyArray, num_target_layers: int = 1):
        key_encoder, key_predictor = jr.split(key)
        width = config.encoder.width
        self.encoder = ViT(config.encoder, key=key_encoder)
        self.target_encoder = self.init_teacher(self.encoder, config)
        self.predictor = Predictor(config.predictor, width, num_outputs=num_target_layers, key=key_predictor)
        self.prediction_norm = LayerNorm(width) if config.prediction_norm == "affine" else None
        self.masks = MultiBlock(config.masks, config.encoder.grid(config.crop.size))
        self.config, self.total_steps = config, total_steps

    @staticmethod
    def init_teacher(encoder: ViT, config: IJEPAConfig) -> EMA[ViT] | None:
        """f_ema before the first update: a copy of f. A variant without a teacher returns None."""
        return init_ema(encoder, config.ema.dtype)

    def draw(self, batch: ImageBatch, keys: Key[Array, "batch"]) -> MaskedViews:
        """One crop and one mask per image, each from the image's own key."""
        # Two keys per image: (B,) -> (B, 2) -> (2, B)
        key_crop, key_mask = jnp.moveaxis(jax.vmap(jr.split)(keys), 1, 0)
        return MaskedViews(random_resized_crop(batch, key_crop, self.config.crop), self.masks(key_mask))

    def forward(self, views: MaskedViews) -> Outputs:
        x, masks = views.image, views.masks  # (B, H, W, C); context (B, K), targets (B, M, T)
        z = self.encoder(x, masks.context)  # (B, K, D)     only visible patches are embedded
        predictions = self.predictor(z, masks, self.masks.grid)  # (B, M, T, D)  one pass per target block
        h = lax.stop_gradient(self.target_encoder.average(x))  # (B, N, D)     the teacher sees everything
        return Outputs(pool(z), self.normalize_predictions(predictions), self.normalize_targets(h), masks)

    def objective(self, outputs: Outputs, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        # The distance of predictions to targets, over the target patches of the global batch.
        loss, baseline = self.distances(outputs)
        metrics = prediction_metrics(loss, baseline, outputs)

        # The regularizer, if there is one.
        penalty, terms = regularize(self.config.regularizer, outputs.pooled, key=key)
        return loss + penalty, metrics | terms

    def after_update(self, step: Int[Array, ""], metrics: Metrics) -> tuple["IJEPA", Metrics]:
        momentum = self.config.ema.at(step, self.total_steps)
        moved, ema_metrics = ema_update(self.target_encoder, self.encoder, momentum)
        return eqx.tree_at(lambda method: method.target_encoder, self, moved), ema_metrics

    def encoders(self) -> dict[str, ViT]:
        return {"target": self.target_encoder.average, "context": self.encoder}

    def normalize_predictions(self, predictions: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        """Predictions in float32, after the LayerNorm of `prediction_norm`, if there is one."""
        predictions = predictions.astype(jnp.float32)
        if self.config.prediction_norm == "none":
            return predictions
        return normalize(predictions) if self.prediction_norm is None else self.prediction_norm(predictions)

    def normalize_targets(self, h: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        """LN(h) in float32, or h itself with target_norm=none."""
        return normalize(h) if self.config.target_norm == "layer" else h.astype(jnp.float32)

    def distance(self, prediction: Float[Array, "*shape"], target: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """D, for each number of the tokens: `distances` takes the mean."""
        squared = self.config.loss == "l2"
        return jnp.square(prediction - target) if squared else smooth_l1(prediction, target, self.config.smooth_l1_beta)

    def distances(self, outputs: Outputs) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The loss, which is the mean of D over all target patches, and the same mean for a constant prediction."""
        # The constant prediction is each position's mean target over the batch: a guess that sees no image.
        embedded, masks = outputs.embedded, outputs.masks
        means = jnp.broadcast_to(jnp.mean(embedded, axis=0, keepdims=True), embedded.shape)
        targets, means = (take_patches(x, masks.targets) for x in (embedded, means))  # (B, M, T, D)

        # Padding of blocks that are smaller than the largest one is left out.
        loss = masked_mean(self.distance(outputs.predictions, targets), masks.target_valid)
        return loss, masked_mean(self.distance(means, targets), masks.target_valid)


def prediction_metrics(loss: Float[Array, ""], baseline: Float[Array, ""], outputs: Outputs) -> Metrics:
    """Metrics for the watchdog: the fraction of `baseline` that is explained, and mean L2 norms of target tokens."""

    def mean_norm(tokens: Float[Array, "batch blocks target dim"]) -> Float[Array, ""]:
        return masked_mean(jnp.linalg.norm(tokens, axis=-1, keepdims=True), outputs.masks.target_valid)

    metrics = {
        "train/prediction_loss": loss,
        "train/explained_variance": explained_fraction(loss, baseline),
        "health/target_norm": mean_norm(take_patches(outputs.embedded, outputs.masks.targets)),
        "health/prediction_norm": mean_norm(outputs.predictions),
        "embeddings": pool(outputs.embedded),
    }
    # No derivative is computed for metrics.
    return lax.stop_gradient(metrics)
