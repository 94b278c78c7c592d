"""I-JEPA with dense targets, after V-JEPA 2.1 (Mur-Labadia et al. 2026, arXiv:2603.14482).

Two additions to `ijepa.py`. The predictor guesses several layers l of the target encoder at once, and also the tokens
of the context C, each weighted by its distance, in patches, to the block B that is predicted:

    loss = mean over l of w_l [ mean over B and p in B of D(g_l(z, B)[p], h_l[p]) ]
         + c mean over l of w_l [ mean over B and p in C of D(g_l(z, B)[p], h_l[p]) / sqrt(d(p, B)) ]

Differs from the paper: g reads the context encoder's last layer alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.methods.ijepa import IJEPA, IJEPAConfig, Outputs, prediction_metrics
from jepax.methods.regularizer import regularize
from jepax.nn import pool, take_patches
from jepax.types import Masks, Metrics, UserError
from jepax.views import MaskedViews


@dataclass(frozen=True)
class IJEPADenseConfig(IJEPAConfig, name="ijepa_dense"):
    """I-JEPA, the layers that it predicts, and the weight of the loss on the context. By default it is I-JEPA."""

    target_layers: tuple[int, ...] | None = None
    """Blocks of the target encoder whose outputs are predicted, counted from 1; None: the last."""
    target_layer_weights: tuple[float, ...] | None = None
    """Weights of the losses of `target_layers`, in their order, used over their sum; None: equal ones."""
    context_loss_weight: float = 0.0
    """Weight of the loss on the context's own tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("method", self, "at least 0", "context_loss_weight")
        layers, weights, depth = self.predicted_layers, self.target_layer_weights, self.encoder.depth
        if not layers or not all(1 <= n <= depth for n in layers):
            raise UserError(f"method.target_layers={layers} must name blocks from 1 to encoder.depth={depth}")
        if len(set(layers)) < len(layers):
            raise UserError(f"method.target_layers={layers} names a block twice")
        if weights is not None and (len(weights) != len(layers) or min(weights) < 0 or not sum(weights)):
            raise UserError(
                f"method.target_layer_weights={weights} must be one weight for each of method.target_layers={layers},"
                " none below 0 and one above"
            )

    @property
    def predicted_layers(self) -> tuple[int, ...]:
        """The blocks whose outputs are predicted, counted from 1."""
        return (self.encoder.depth,) if self.target_layers is None else self.target_layers

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "IJEPADense":
        return IJEPADense(self, total_steps=total_steps, key=key, num_target_layers=len(self.predicted_layers))

    def tiny(self) -> "IJEPADenseConfig":
        # The last two layers at most, since the tiny encoder has no more.
        layers = self.target_layers and (1, 2)[-len(self.target_layers) :]
        weights = self.target_layer_weights and self.target_layer_weights[-2:]
        small = IJEPAConfig.tiny(replace(self, target_layers=None, target_layer_weights=None))
        return replace(small, target_layers=layers, target_layer_weights=weights)


class DenseOutputs(eqx.Module):
    """Outputs of the networks for each image, in float32, by predicted layer."""

    pooled: Float[Array, "batch dim"]
    predictions: Float[Array, "batch layers blocks target dim"]
    on_context: Float[Array, "batch layers blocks _context dim"] | None
    """Predictions at the context's own positions, one pass per block; None: no loss reads them."""
    embedded: Float[Array, "batch layers patches dim"]
    masks: Masks


class IJEPADense(IJEPA):
    """I-JEPA that predicts several layers and, if `context_loss_weight` is above 0, the context too."""

    config: IJEPADenseConfig = eqx.field(static=True)

    def forward(self, views: MaskedViews) -> DenseOutputs:
        x, masks = views.image, views.masks  # (B, H, W, C); context (B, K), targets (B, M, T)
        layers, depth = self.config.predicted_layers, self.config.encoder.depth
        predict_context = self.config.context_loss_weight > 0
        z = self.encoder(x, masks.context)  # (B, K, D)

        # The predictor gives the L layers of a token as one row of L * D numbers, the K context tokens first.
        rows = self.predictor(z, masks, self.masks.grid, predict_context=predict_context)  # (B, M, K + T, L * D)
        rows = jnp.moveaxis(rows.reshape(*rows.shape[:3], len(layers), -1), 3, 0)  # (L, B, M, K + T, D)
        rows = jnp.moveaxis(self.normalize_predictions(rows), 0, 1)  # (B, L, M, K + T, D)
        on_context, predictions = jnp.split(rows, [rows.shape[3] - masks.targets.shape[2]], axis=3)

        # Of the target encoder's last layers, those that are predicted.
        h = self.target_encoder.average.intermediate_layers(x, depth - min(layers) + 1)
        h = lax.stop_gradient(h[jnp.array([layer - min(layers) for layer in layers])])  # (L, B, N, D)
        embedded = jnp.moveaxis(self.normalize_targets(h), 0, 1)  # (B, L, N, D)
        return DenseOutputs(pool(z), predictions, on_context if predict_context else None, embedded, masks)

    def objective(self, outputs: DenseOutputs, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        predictions, embedded = (jnp.moveaxis(x, 1, 0) for x in (outputs.predictions, outputs.embedded))  # L first
        masks, layers = outputs.masks, self.config.predicted_layers

        # I-JEPA's loss of every layer; the deepest one is read for collapse.
        by_layer = [Outputs(outputs.pooled, *pair, masks) for pair in zip(predictions, embedded, strict=True)]
        losses, baselines = zip(*(self.distances(layer) for layer in by_layer), strict=True)
        loss, baseline = self.mean_over_layers(losses), self.mean_over_layers(baselines)
        metrics = prediction_metrics(loss, baseline, by_layer[layers.index(max(layers))])

        # The loss on the context's own tokens.
        if outputs.on_context is not None:
            pairs = zip(jnp.moveaxis(outputs.on_context, 1, 0), embedded, strict=True)
            metrics["train/context_loss"] = self.mean_over_layers(self.context_loss(*pair, masks) for pair in pairs)
            loss = loss + self.config.context_loss_weight * metrics["train/context_loss"]

        penalty, terms = regularize(self.config.regularizer, outputs.pooled, key=key)
        return loss + penalty, metrics | terms

    def context_loss(
        self,
        predictions: Float[Array, "batch blocks context dim"],
        embedded: Float[Array, "batch patches dim"],
        masks: Masks,
    ) -> Float[Array, ""]:
        """mean over blocks B and context tokens p of D / sqrt(d(p, B)), d to the nearest patch of B."""
        near = 1 / jnp.sqrt(distance_to_nearest(masks, self.masks.grid))  # (B, M, K)
        targets = take_patches(embedded, masks.context)[:, None]  # (B, 1, K, D): the same in every block's pass
        distance = self.distance(predictions, jnp.broadcast_to(targets, predictions.shape))
        return jnp.mean(jnp.mean(distance, axis=-1) * near)

    def mean_over_layers(self, values: Iterable[Float[Array, ""]]) -> Float[Array, ""]:
        """The mean over the predicted layers, by their weights."""
        weights = self.config.target_layer_weights or (1.0,) * len(self.config.predicted_layers)
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def distance_to_nearest(masks: Masks, grid: tuple[int, int]) -> Float[Array, "batch blocks context"]:
    """d(p, B): from each context patch to the nearest patch of each target block, center to center, in patches."""

    def positions(indices: Array) -> Float[Array, "*shape 2"]:
        return jnp.stack([indices // grid[1], indices % grid[1]], axis=-1).astype(jnp.float32)

    offsets = positions(masks.context)[:, None, :, None] - positions(masks.targets)[:, :, None]  # (B, M, K, T, 2)
    distances = jnp.sqrt(jnp.sum(jnp.square(offsets), axis=-1))
    return jnp.min(jnp.where(masks.target_valid[:, :, None], distances, jnp.inf), axis=-1)
