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

from jepax.masking import MultiBlock, MultiBlockConfig, distance_to_nearest
from jepax.methods.base import Method, MethodConfig
from jepax.methods.momentum import MomentumConfig, follow, teacher_of
from jepax.methods.regulariser import RegulariserConfig, regularise
from jepax.nn import Predictor, PredictorConfig, ViT, ViTConfig
from jepax.nn.blocks import LayerNorm
from jepax.nn.operations import normalise
from jepax.objectives import masked_mean, share_explained, smooth_l1, squared_error
from jepax.sharding import in_pieces
from jepax.trees import EMA
from jepax.types import Images, Masks, Metrics, UserError
from jepax.views import CropConfig, random_resized_crop

NO_EXAMPLE = 2**32 - 1
"""Folded into a step's key for what belongs to the batch: an index that no example has."""


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
    """Read by loss=smooth_l1 alone: the distance at which its square becomes linear."""
    layers: tuple[int, ...] | None = None
    """Blocks of the target encoder whose outputs are predicted, counted from 1; None (as published): the last."""
    layer_weights: tuple[float, ...] | None = None
    """Weights of the losses of `layers`, in their order, used over their sum; None: all alike."""
    context_weight: float = 0.0
    """Weight of the loss on the context's own tokens, after V-JEPA 2.1; 0 as published."""
    target_norm: Literal["layer", "none"] = "layer"
    """Parameter-free LayerNorm on the targets, or none."""
    prediction_norm: Literal["none", "trainable", "plain", "both"] = "none"
    """LayerNorm on the predictions: none (as published), trainable, plain (parameter-free), or both (unstable)."""
    teacher: Literal["ema", "stopped", "shared"] = "ema"
    """Who embeds the targets: a moving average (as published), or the encoder itself, gradient stopped or not."""
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    """Schedule of the moving average's momentum; read by teacher=ema alone."""
    regulariser: RegulariserConfig = field(default_factory=RegulariserConfig)
    """Beside the teacher or in its place; none as published."""
    regularised: Literal["context", "targets"] = "context"
    """Whose mean over patches the regulariser reads: the context's embedding, or a shared encoder's targets, normed."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"method.beta={self.beta} must be above 0; for squared error take method.loss=l2")
        if self.context_weight < 0:
            raise UserError(f"method.context_weight={self.context_weight} must not be negative")
        self._check_layers()
        self.encoder.grid(self.crop.size)  # refuses a patch that does not divide the view
        if self.prediction_norm == "both":
            warnings.warn(
                "method.prediction_norm=both puts two LayerNorms on the predictions, which is known to be"
                " unstable: take trainable or plain",
                stacklevel=2,
            )
        if self.regularised == "targets" and self.teacher != "shared":
            raise UserError(
                f"method.regularised=targets has no effect with method.teacher={self.teacher}, which gets no gradient;"
                " take method.teacher=shared or method.regularised=context"
            )
        if self.teacher == "shared" and self.regulariser.kind == "none":
            warnings.warn(
                "method.teacher=shared with no method.regulariser.kind: nothing keeps the embeddings from collapse",
                stacklevel=2,
            )

    def _check_layers(self) -> None:
        layers, weights = self.layers, self.layer_weights
        if layers is not None and not (layers and all(1 <= n <= self.encoder.depth for n in layers)):
            raise UserError(f"method.layers={layers} must name blocks from 1 to encoder.depth={self.encoder.depth}")
        if layers is not None and len(set(layers)) < len(layers):
            raise UserError(f"method.layers={layers} names a block twice")
        if weights is not None and (len(weights) != len(self.predicted) or min(weights) < 0 or not sum(weights)):
            raise UserError(
                f"method.layer_weights={weights} must be one weight for each of method.layers={self.predicted},"
                " none below 0 and one above"
            )

    @property
    def predicted(self) -> tuple[int, ...]:
        """The blocks whose outputs are predicted, counted from 1."""
        return (self.encoder.depth,) if self.layers is None else self.layers

    @property
    def deepest(self) -> int:
        """The place of the last of the blocks within `predicted`."""
        return self.predicted.index(max(self.predicted))

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "IJEPA":
        return IJEPA(self, total_steps=total_steps, key=key)

    def sampler(self) -> MultiBlock:
        """The sampler of masks on the view's grid of patches."""
        return MultiBlock(self.masks, self.encoder.grid(self.crop.size))

    def views_and_masks(
        self, images: Images, sampler: MultiBlock, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch height width channels"], Masks]:
        """What is random about an example: example i draws view and masks from `fold_in(key, images.index[i])`."""
        keys = jax.vmap(lambda index: jr.split(jr.fold_in(key, index)))(images.index)
        key_crop, key_mask = keys[:, 0], keys[:, 1]
        return random_resized_crop(images, key_crop, self.crop), sampler(key_mask)


class IJEPA(Method):
    """loss = mean over target patches y of D(g_phi(f_theta(x), positions of y), LN(f_theta_bar(image))[y]).

    The target encoder f_theta_bar sees the whole view; the context encoder f_theta only the context patches x; the
    predictor g_phi makes one pass per target block. Both encoders start equal. Beside it, by choice:

    - the same loss of several layers of f_theta_bar, which g_phi predicts side by side, as a weighted mean;
    - that on the context's tokens, each weighted by lambda / sqrt(distance to the block that is predicted), as V-JEPA
      2.1 (Mur-Labadia et al. 2026, arXiv:2603.14482) has it. Differs from it: g_phi reads the last layer alone;
    - a regulariser of the mean of f_theta(x) over its patches: VICReg's is that of C-JEPA (Mo & Tong 2024,
      arXiv:2410.19560). With teacher=shared it stands in the moving average's place, and f_theta embeds the targets,
      whose mean it may read instead.
    """

    encoder: ViT
    target_encoder: EMA[ViT] | None
    predictor: Predictor
    prediction_norm: LayerNorm | None
    masks: MultiBlock
    config: IJEPAConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)

    def __init__(self, config: IJEPAConfig, *, total_steps: int, key: PRNGKeyArray):
        key_encoder, key_predictor = jr.split(key)
        width = config.encoder.width
        self.encoder = ViT(config.encoder, key=key_encoder)
        self.target_encoder = teacher_of(self.encoder, config.momentum.precision) if config.teacher == "ema" else None
        self.predictor = Predictor(config.predictor, width, outputs=len(config.predicted), key=key_predictor)
        self.prediction_norm = LayerNorm(width) if config.prediction_norm in ("trainable", "both") else None
        self.masks = config.sampler()
        self.config, self.total_steps = config, total_steps

    def loss(self, images: Images, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        view, masks = self.config.views_and_masks(images, self.masks, key=key)
        return self.loss_of(view, masks, key=jr.fold_in(key, NO_EXAMPLE))

    def loss_of(
        self, view: Float[Array, "batch height width channels"], masks: Masks, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of given views and masks; only a regulariser's directions are drawn, from `key`."""
        passed = in_pieces(IJEPA.passes, self, view, masks)
        context, (embedded, predictions, on_context) = passed[0], (jnp.moveaxis(x, 0, 1) for x in passed[1:])
        loss = self._prediction_loss(predictions, gather(embedded, masks.targets), masks)
        metrics = {"embeddings": jnp.mean(embedded[self.config.deepest], axis=1), "prediction_loss": loss}
        metrics |= self._health(loss, predictions, embedded, masks)
        if self.config.context_weight:
            dense = self._context_loss(on_context, gather(embedded, masks.context), masks)
            loss, metrics["context_loss"] = loss + self.config.context_weight * dense, dense
        tokens = context if self.config.regularised == "context" else embedded[self.config.deepest]
        pooled = jnp.mean(tokens.astype(jnp.float32), axis=1)
        added, terms = regularise(self.config.regulariser, pooled, key=key)
        return loss + added, metrics | terms

    def passes(
        self, view: Float[Array, "batch height width channels"], masks: Masks
    ) -> tuple[
        Float[Array, "batch context dim"],
        Float[Array, "batch layers patches dim"],
        Float[Array, "batch layers blocks target dim"],
        Float[Array, "batch layers blocks _seen dim"],
    ]:
        """All that the networks do, image by image: the embedded context, the targets, and the predictions."""
        context = self.encoder(view, masks.context)
        return context, *(jnp.moveaxis(x, 1, 0) for x in (self.targets(view), *self.predictions(context, masks)))

    @property
    def teacher(self) -> ViT:
        """Who embeds the targets."""
        return self.encoder if self.target_encoder is None else self.target_encoder.average

    def targets(self, view: Float[Array, "batch height width channels"]) -> Float[Array, "layers batch patches dim"]:
        """Each predicted layer's embedding of every patch, in float32; only a shared encoder gets a gradient."""
        depth, wanted = self.config.encoder.depth, self.config.predicted
        outputs = self.teacher.layers(view, depth - min(wanted) + 1)
        chosen = outputs[jnp.array([layer - min(wanted) for layer in wanted])] if len(wanted) > 1 else outputs[:1]
        chosen = chosen.astype(jnp.float32)
        chosen = chosen if self.config.teacher == "shared" else lax.stop_gradient(chosen)
        return normalise(chosen) if self.config.target_norm == "layer" else chosen

    def predictions(
        self, context: Float[Array, "batch context dim"], masks: Masks
    ) -> tuple[Float[Array, "layers batch blocks target dim"], Float[Array, "layers batch blocks _seen dim"]]:
        """What the predictor makes of the embedded context at the targets and, if wanted, at the context's own places.

        In float32; where the latter are not wanted there are none: size 0.
        """
        wanted, dim = bool(self.config.context_weight), context.shape[2]
        predicted = self.predictor(context, masks, self.masks.grid, also_context=wanted).astype(jnp.float32)
        predicted = jnp.moveaxis(predicted.reshape(*predicted.shape[:3], -1, dim), 3, 0)
        if self.config.prediction_norm in ("plain", "both"):
            predicted = normalise(predicted)
        predicted = predicted if self.prediction_norm is None else self.prediction_norm(predicted)
        split = predicted.shape[3] - masks.targets.shape[2]
        return predicted[..., split:, :], predicted[..., :split, :]

    def _prediction_loss(self, predictions: Array, targets: Array, masks: Masks) -> Float[Array, ""]:
        pairs = zip(predictions, targets, strict=True)
        return self._over_layers([masked_mean(self._distance(*pair), masks.target_valid) for pair in pairs])

    def _health(self, loss: Array, predictions: Array, embedded: Array, masks: Masks) -> Metrics:
        """Mean L2 norms of a target's and a prediction's token at the deepest predicted layer, and the share of the
        loss that is explained beyond predicting, at each position, the mean over the batch of its target."""
        targets = gather(embedded, masks.targets)
        mean = jnp.broadcast_to(jnp.mean(embedded, axis=1, keepdims=True), embedded.shape)
        of_the_mean = self._prediction_loss(gather(mean, masks.targets), targets, masks)

        def length(tokens: Array) -> Float[Array, ""]:
            norms = jnp.linalg.norm(tokens[self.config.deepest], axis=-1, keepdims=True)
            return masked_mean(norms, masks.target_valid)

        metrics = {"target_norm": length(targets), "prediction_norm": length(predictions)}
        return lax.stop_gradient(metrics | {"loss_explained": share_explained(loss, of_the_mean)})

    def _context_loss(self, predictions: Array, targets: Array, masks: Masks) -> Float[Array, ""]:
        """mean over context tokens i and blocks M of D_i / sqrt(d(i, M)), d in patches to the nearest of the block."""
        near = 1 / jnp.sqrt(distance_to_nearest(masks, self.masks.grid))
        targets = jnp.broadcast_to(targets[:, :, None], predictions.shape)  # one pass per block, of the same context
        pairs = zip(predictions, targets, strict=True)
        return self._over_layers([jnp.mean(jnp.mean(self._distance(*pair), axis=-1) * near) for pair in pairs])

    def _over_layers(self, losses: list[Float[Array, ""]]) -> Float[Array, ""]:
        """The mean over the predicted layers, by their weights."""
        weights = self.config.layer_weights or (1.0,) * len(losses)
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)

    def _distance(self, prediction: Array, target: Array) -> Array:
        if self.config.loss == "l2":
            return squared_error(prediction, target)
        return smooth_l1(prediction, target, self.config.beta)

    def momentum(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """Momentum applied after the update of `step`, counted from 0."""
        return self.config.momentum.at(step, self.total_steps)

    def after_update(self, step: Int[Array, ""]) -> tuple["IJEPA", Metrics]:
        if self.target_encoder is None:
            return self, {}  # no teacher moves: the encoder embeds the targets itself
        moved, metrics = follow(self.target_encoder, self.encoder, self.momentum(step))
        return eqx.tree_at(lambda method: method.target_encoder, self, moved), metrics

    def encoders(self) -> dict[str, ViT]:
        moving = {} if self.target_encoder is None else {"target": self.target_encoder.average}
        return moving | {"context": self.encoder}


def gather(
    embedded: Float[Array, "layers batch patches dim"], indices: Int[Array, "batch *shape"]
) -> Float[Array, "layers batch *shape dim"]:
    """Each image's tokens at its own indices."""
    return jax.vmap(lambda tokens, index: tokens[:, index], in_axes=(1, 0), out_axes=1)(embedded, indices)
