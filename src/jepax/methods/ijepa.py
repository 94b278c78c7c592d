"""I-JEPA (Assran et al. 2023, arXiv:2301.08243): predict a teacher's embedding of blocks from the rest of an image."""

import warnings
from dataclasses import dataclass, field
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax import schedules
from jepax.masking import MultiBlock, MultiBlockConfig
from jepax.methods.base import AbstractMethod, MethodConfig
from jepax.nn import Predictor, PredictorConfig, ViT, ViTConfig
from jepax.nn.blocks import LayerNorm, normalise
from jepax.objectives import covariance, masked_mean, smooth_l1, squared_error, variance
from jepax.trees import EMA, norm
from jepax.types import Images, Masks, Metrics, UserError
from jepax.views import CropConfig, centre_crop, random_resized_crop


@dataclass(frozen=True)
class MomentumConfig:
    """How slowly the target encoder follows: average <- momentum * average + (1 - momentum) * encoder."""

    start: float = 0.996
    """Momentum of the first step."""
    final: float = 1.0
    """Momentum that the last step reaches."""
    shape: schedules.Shape = "linear"
    """Path from start to final; constant stays at start."""
    horizon: float = 1.0
    """Steps that the path takes, over the run's steps."""

    def __post_init__(self) -> None:
        for name in ("start", "final"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"method.momentum.{name}={getattr(self, name)} is not in [0, 1]")


@dataclass(frozen=True)
class IJEPAConfig(MethodConfig, name="ijepa"):
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
    beta: float = 1.0
    """Smooth L1 only: the distance at which its square becomes linear."""
    target_norm: Literal["layer", "none"] = "layer"
    """Parameter-free LayerNorm on the targets, or none."""
    prediction_norm: Literal["none", "trainable", "plain", "both"] = "none"
    """LayerNorm on the predictions: none (as published), trainable, plain (parameter-free), or both (unstable)."""
    variance: float = 0.0
    """Weight of VICReg's variance term on each image's mean context embedding, as in C-JEPA; 0 as published."""
    covariance: float = 0.0
    """Weight of VICReg's covariance term on the same embeddings; 0 as published."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """Schedule of the target encoder's momentum."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"method.beta={self.beta} must be above 0; for squared error take method.loss=l2")
        for name in ("variance", "covariance"):
            if getattr(self, name) < 0:
                raise UserError(f"method.{name}={getattr(self, name)} must not be negative")
        self.encoder.grid(self.crop.size)  # refuses a patch that does not divide the view
        if self.prediction_norm == "both":
            warnings.warn(
                "method.prediction_norm=both puts two LayerNorms on the predictions, which is known to be"
                " unstable: take trainable or plain",
                stacklevel=2,
            )

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "IJEPA":
        return IJEPA(self, total_steps=total_steps, key=key)

    def sampler(self) -> MultiBlock:
        """The sampler of masks on the view's grid of patches."""
        return MultiBlock(self.masks, self.encoder.grid(self.crop.size))

    def views_and_masks(
        self, images: Images, sampler: MultiBlock, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch height width channels"], Masks]:
        """All that is random in a step: example i draws its view and its masks from `fold_in(key, images.index[i])`."""
        keys = jax.vmap(lambda index: jr.split(jr.fold_in(key, index)))(images.index)
        key_crop, key_mask = keys[:, 0], keys[:, 1]
        return random_resized_crop(images, key_crop, self.crop), sampler(key_mask)


class IJEPA(AbstractMethod):
    """loss = mean over target patches y of D(g_phi(f_theta(x), positions of y), LN(f_theta_bar(image))[y]).

    The target encoder f_theta_bar sees the whole view; the context encoder f_theta only the context patches x; the
    predictor g_phi makes one pass per target block. Both encoders start equal. Beside it, by choice, VICReg's
    regularisers on the mean of f_theta(x) over its patches, which C-JEPA (Mo & Tong 2024, arXiv:2410.19560) adds.
    """

    encoder: ViT
    target_encoder: EMA[ViT]
    predictor: Predictor
    prediction_norm: LayerNorm | None
    masks: MultiBlock
    config: IJEPAConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)

    def __init__(self, config: IJEPAConfig, *, total_steps: int, key: PRNGKeyArray):
        key_encoder, key_predictor = jr.split(key)
        width = config.encoder.width
        self.encoder = ViT(config.encoder, key=key_encoder)
        # A copy: buffers are donated to the step, and one buffer cannot be donated twice.
        self.target_encoder = EMA(jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, self.encoder))
        self.predictor = Predictor(config.predictor, width, key=key_predictor)
        self.prediction_norm = LayerNorm(width) if config.prediction_norm in ("trainable", "both") else None
        self.masks = config.sampler()
        self.config, self.total_steps = config, total_steps

    def loss(self, images: Images, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        return self.loss_of(*self.config.views_and_masks(images, self.masks, key=key))

    def loss_of(
        self, view: Float[Array, "batch height width channels"], masks: Masks
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of given views and masks; no randomness."""
        embedded = self.targets(view)
        targets = jax.vmap(lambda tokens, indices: tokens[indices])(embedded, masks.targets)
        context = self.encoder(view, masks.context)
        predictions = self.predictions(context, masks)
        loss = masked_mean(self._distance(predictions, targets), masks.target_valid)
        added, metrics = self._regularisation(context)
        return loss + added, {"embeddings": jnp.mean(embedded, axis=1), "prediction_loss": loss} | metrics

    def targets(self, view: Float[Array, "batch height width channels"]) -> Float[Array, "batch patches dim"]:
        """The teacher's embedding of every patch of the view, in float32; no gradient flows to it."""
        embedded = lax.stop_gradient(self.target_encoder.average(view)).astype(jnp.float32)
        return normalise(embedded) if self.config.target_norm == "layer" else embedded

    def predictions(
        self, context: Float[Array, "batch context dim"], masks: Masks
    ) -> Float[Array, "batch blocks target dim"]:
        """What the predictor makes of the embedded context, in float32."""
        predicted = self.predictor(context, masks, self.masks.grid).astype(jnp.float32)
        if self.config.prediction_norm in ("plain", "both"):
            predicted = normalise(predicted)
        return predicted if self.prediction_norm is None else self.prediction_norm(predicted)

    def _regularisation(self, context: Float[Array, "batch context dim"]) -> tuple[Float[Array, ""], Metrics]:
        """The weighted regularisers over the global batch, and each of those that are on, unweighted."""
        pooled = jnp.mean(context.astype(jnp.float32), axis=1)
        weights = {variance: self.config.variance, covariance: self.config.covariance}
        values = {term: term(pooled) for term, weight in weights.items() if weight}
        added = sum((weights[term] * value for term, value in values.items()), jnp.float32(0))
        return added, {f"{term.__name__}_loss": value for term, value in values.items()}

    def _distance(self, prediction: Array, target: Array) -> Array:
        if self.config.loss == "l2":
            return squared_error(prediction, target)
        return smooth_l1(prediction, target, self.config.beta)

    def momentum(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Momentum applied after the update of `step`, counted from 0."""
        c = self.config.momentum
        total = max(round(c.horizon * self.total_steps), 1)
        return schedules.ramp(c.shape, step, start=c.start, final=c.final, total=total)

    def after_update(self, step: Int[Array, ""]) -> tuple["IJEPA", Metrics]:
        momentum = self.momentum(step)
        moved = self.target_encoder.towards(self.encoder, momentum)
        change = jax.tree.map(
            jnp.subtract, *(eqx.filter(t, eqx.is_inexact_array) for t in (moved, self.target_encoder))
        )
        metrics = {"momentum": momentum, "ema_step_norm": norm(change)}
        return eqx.tree_at(lambda method: method.target_encoder, self, moved), metrics

    def features(self, images: Images, layers: int) -> Float[Array, "layers batch dim"]:
        view = centre_crop(images, self.config.crop)
        return jnp.mean(self.target_encoder.average.layers(view, layers), axis=2).astype(jnp.float32)
