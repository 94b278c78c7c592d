"""I-JEPA (Assran et al. 2023, arXiv:2301.08243).

The context encoder f sees a few patches of an image. From them a predictor g guesses what a slowly moving copy of f,
the target encoder, computes for the blocks that were hidden. No pixels, no negatives, no augmentation but a crop.

    z    = f(x[context])                          trained
    h    = LN(f_ema(x))                           moving average of f; sees the whole view, gets no gradient
    loss = mean over blocks B and their patches p of D(g(z, positions of B)[p], h[p])

After each update f_ema <- m f_ema + (1 - m) f. A regularizer of the mean of z over patches may be added; VICReg's makes
it C-JEPA (Mo & Tong 2024, arXiv:2410.19560).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from jepax.masking import MultiBlock, MultiBlockConfig
from jepax.methods.base import ImageMethod, ImageMethodConfig
from jepax.methods.ema import EMAConfig, ema_update, init_ema
from jepax.methods.regularizer import RegularizerConfig, regularize
from jepax.nn import Predictor, PredictorConfig, ViT, ViTConfig
from jepax.nn.transformer import LayerNorm, normalize
from jepax.objectives import explained_fraction, masked_mean, smooth_l1, squared_error
from jepax.trees import EMA
from jepax.types import ImageBatch, Masks, Metrics, UserError
from jepax.views import CropConfig, MaskedViews, random_resized_crop


@dataclass(frozen=True)
class IJEPAConfig(ImageMethodConfig, name="ijepa"):
    """I-JEPA, and the choices that its users ask about."""

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
    """Read by loss=smooth_l1 alone: the distance at which its square becomes linear."""
    target_norm: Literal["layer", "none"] = "layer"
    """Parameter-free LayerNorm on the targets, or none. Without it they drift: docs/failures/drift.md."""
    prediction_norm: Literal["none", "affine", "no_affine"] = "none"
    """LayerNorm on the predictions: none (as published), affine, or no_affine (parameter-free)."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Schedule of the moving average's momentum."""
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    """Regularizer of the context's embedding; none as published."""

    def __post_init__(self) -> None:
        if self.smooth_l1_beta <= 0:
            raise UserError(
                f"method.smooth_l1_beta={self.smooth_l1_beta} must be above 0; for squared error take method.loss=l2"
            )
        self.encoder.grid(self.crop.size)  # refuses a patch that does not divide the view

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "IJEPA":
        return IJEPA(self, total_steps=total_steps, key=key)

    def tiny(self) -> "IJEPAConfig":
        networks = {"encoder": self.encoder.tiny(), "predictor": self.predictor.tiny()}
        views = {"masks": self.masks.tiny(), "crop": self.crop.tiny()}
        return replace(self, **networks, **views, regularizer=self.regularizer.tiny())


class Outputs(eqx.Module):
    """Outputs of the networks for each image, in float32."""

    pooled: Float[Array, "batch dim"]
    """Mean over patches of the embedding that the regularizer reads."""
    predictions: Float[Array, "batch blocks target dim"]
    embedded: Float[Array, "batch patches dim"]
    """The targets: every patch as the target encoder sees it."""
    masks: Masks


class IJEPA(ImageMethod):
    """I-JEPA: the equations are at the top of this file. Both encoders start equal."""

    encoder: ViT  # f
    target_encoder: EMA[ViT]  # f_ema. Nothing beneath an EMA is trained: the type is the rule.
    predictor: Predictor  # g
    prediction_norm: LayerNorm | None
    masks: MultiBlock
    config: IJEPAConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)

    def __init__(self, config: IJEPAConfig, *, total_steps: int, key: PRNGKeyArray, predicted_layers: int = 1):
        key_encoder, key_predictor = jr.split(key)
        width = config.encoder.width
        self.encoder = ViT(config.encoder, key=key_encoder)
        self.target_encoder = init_ema(self.encoder, config.ema.dtype)
        self.predictor = Predictor(config.predictor, width, num_outputs=predicted_layers, key=key_predictor)
        self.prediction_norm = LayerNorm(width) if config.prediction_norm == "affine" else None
        self.masks = MultiBlock(config.masks, config.encoder.grid(config.crop.size))
        self.config, self.total_steps = config, total_steps

    def draw(self, batch: ImageBatch, keys: Key[Array, "batch"]) -> MaskedViews:
        """One crop and one mask per image, each from the image's own key."""
        key_crop, key_mask = jnp.moveaxis(jax.vmap(jr.split)(keys), 1, 0)
        return MaskedViews(random_resized_crop(batch, key_crop, self.config.crop), self.masks(key_mask))

    def forward(self, views: MaskedViews) -> Outputs:
        x, masks = views.image, views.masks  # (B, H, W, C); context (B, K), targets (B, M, T)
        z = self.encoder(x, masks.context)  # (B, K, D)     only visible patches are embedded
        predictions = self.predict(z, masks)  # (B, M, T, D)  one pass per target block
        h = lax.stop_gradient(self.target_encoder.average(x))  # (B, N, D)     the teacher sees everything
        return Outputs(pool(z), predictions, self.normalize_targets(h), masks)

    def objective(self, outputs: Outputs, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        # The distance of predictions to targets, and that of the best constant prediction.
        loss, baseline = self.distances(outputs.predictions, outputs.embedded, outputs.masks)
        metrics = health_metrics(loss, baseline, outputs.predictions, outputs.embedded, outputs.masks)

        # What the regularizer adds, if there is one.
        penalty, terms = regularize(self.config.regularizer, outputs.pooled, key=key)
        return loss + penalty, metrics | terms

    def after_update(self, step: Int[Array, ""]) -> tuple["IJEPA", Metrics]:
        momentum = self.config.ema.at(step, self.total_steps)
        moved, metrics = ema_update(self.target_encoder, self.encoder, momentum)
        return eqx.tree_at(lambda method: method.target_encoder, self, moved), metrics

    def encoders(self) -> dict[str, ViT]:
        return {"target": self.target_encoder.average, "context": self.encoder}

    def predict(self, z: Float[Array, "batch context dim"], masks: Masks) -> Float[Array, "batch blocks target dim"]:
        """g at every target position, through the norm of `config.prediction_norm`."""
        return self.normalize_predictions(self.predictor(z, masks, self.masks.grid))

    def normalize_predictions(self, predictions: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        predictions = predictions.astype(jnp.float32)
        if self.config.prediction_norm == "none":
            return predictions
        return normalize(predictions) if self.prediction_norm is None else self.prediction_norm(predictions)

    def normalize_targets(self, h: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        return normalize(h.astype(jnp.float32)) if self.config.target_norm == "layer" else h.astype(jnp.float32)

    def distances(
        self,
        predictions: Float[Array, "batch blocks target dim"],
        embedded: Float[Array, "batch patches dim"],
        masks: Masks,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Mean of D over all target tokens: of the predictions, and of each position's mean target over the batch."""
        targets = take_patches(embedded, masks.targets)
        mean = jnp.broadcast_to(jnp.mean(embedded, axis=0, keepdims=True), embedded.shape)
        guesses = (predictions, take_patches(mean, masks.targets))
        loss, baseline = (masked_mean(self.distance(guess, targets), masks.target_valid) for guess in guesses)
        return loss, baseline

    def distance(
        self, prediction: Float[Array, "*shape dim"], target: Float[Array, "*shape dim"]
    ) -> Float[Array, "*shape dim"]:
        """D, elementwise."""
        if self.config.loss == "l2":
            return squared_error(prediction, target)
        return smooth_l1(prediction, target, self.config.smooth_l1_beta)


def pool(tokens: Float[Array, "batch tokens dim"]) -> Float[Array, "batch dim"]:
    """Mean over an image's tokens, in float32."""
    return jnp.mean(tokens.astype(jnp.float32), axis=1)


def take_patches(
    embedded: Float[Array, "batch patches dim"], indices: Int[Array, "batch *shape"]
) -> Float[Array, "batch *shape dim"]:
    """Each image's tokens at its own indices."""
    return jax.vmap(lambda tokens, index: tokens[index])(embedded, indices)


def health_metrics(
    loss: Float[Array, ""],
    baseline: Float[Array, ""],
    predictions: Float[Array, "batch blocks target dim"],
    embedded: Float[Array, "batch patches dim"],
    masks: Masks,
) -> Metrics:
    """Metrics for the watchdog: the fraction of `baseline` that is explained, and mean L2 norms of tokens."""

    def mean_norm(tokens: Float[Array, "batch blocks target dim"]) -> Float[Array, ""]:
        return masked_mean(jnp.linalg.norm(tokens, axis=-1, keepdims=True), masks.target_valid)

    norms = {
        "health/target_norm": mean_norm(take_patches(embedded, masks.targets)),
        "health/prediction_norm": mean_norm(predictions),
    }
    explained = {"train/prediction_loss": loss, "train/explained_variance": explained_fraction(loss, baseline)}
    return lax.stop_gradient(explained | norms | {"embeddings": pool(embedded)})
