"""BYOL (Grill et al. 2020, arXiv:2006.07733): predict a moving average's projection of another view.

    z_v  = projector(mean over patches of f(x_v))
    z'_w = the same by the moving averages of f and projector, for global views only; no gradient
    loss = mean over pairs of a view v and a global view w != v of 2 - 2 cos(q(z_v), z'_w)

No regularizer: the predictor q and a slow teacher prevent collapse. A local view predicts global ones, as in DINO's
multi-crop. Differs from the paper: a mean over the pairs (there a sum of two), and BatchNorm over all views of a group.
"""

from dataclasses import dataclass, field

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.methods.ema import EMAConfig, ema_update, init_ema
from jepax.methods.multiview import Embeddings, MultiView, MultiViewConfig, Projections, embed, project, view_metrics
from jepax.nn import Projector, ProjectorConfig, ViT
from jepax.objectives import explained_fraction
from jepax.trees import EMA
from jepax.types import Metrics, UserError
from jepax.views import MultiCropViews

NORM_EPS = 1e-12
"""Added to the squared length of a projection, which may be 0."""


@dataclass(frozen=True)
class BYOLConfig(MultiViewConfig, name="byol"):
    """BYOL, with the heads and the momentum of the paper."""

    projector: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(hidden_dims=(4096,), out_dim=256))
    """Head on the mean over patches."""
    predictor: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(hidden_dims=(4096,), out_dim=256))
    """Head on the projection, with the projector's output width."""
    ema: EMAConfig = field(default_factory=lambda: EMAConfig(schedule="cosine"))
    """Schedule of the teacher's momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        out_dim = self.projector.out_dim
        if self.predictor.final_relu:
            raise UserError("predictor.final_relu=True leaves no prediction below 0, but targets are; set it False")
        if self.predictor.out_dim != out_dim:
            raise UserError(f"method.predictor.out_dim={self.predictor.out_dim} must be that of projector: {out_dim}")

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "BYOL":
        return BYOL(self, total_steps=total_steps, key=key)


class BYOLOutputs(eqx.Module):
    """Outputs of the networks for each image, in float32."""

    online: Embeddings
    teacher: Float[Array, "batch views width"]
    """Embeddings of the global views by the moving average."""


class BYOL(MultiView):
    """BYOL, with the equations at the top of this file. Online networks and averages are equal at step 0."""

    target: EMA[tuple[ViT, Projector]]  # Nothing beneath an EMA is trained: the type is the rule.
    predictor: Projector  # q
    config: BYOLConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)

    def __init__(self, config: BYOLConfig, *, total_steps: int, key: PRNGKeyArray):
        super().__init__(config, key=key)
        self.target = init_ema((self.encoder, self.projector), config.ema.dtype)
        key_predictor = jr.split(key, 3)[2]  # the first two are the encoder's and the projector's
        self.predictor = Projector(config.predictor, config.projector.out_dim, key=key_predictor)
        self.total_steps = total_steps

    def forward(self, views: MultiCropViews) -> BYOLOutputs:
        # The online networks see every view, the teacher the global ones alone: only those are predicted.
        teacher = lax.stop_gradient(embed(self.target.average[0], views.global_views))  # (B, V, D)
        return BYOLOutputs(super().forward(views), teacher)

    def objective(self, outputs: BYOLOutputs, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        # Predictions of every view, and targets of the global ones; the heads' BatchNorms read the global batch.
        z = self.project(outputs.online)
        predictions = jnp.concatenate([project(self.predictor, jnp.swapaxes(z_group, 0, 1)) for z_group in z])
        targets = lax.stop_gradient(project(self.target.average[1], outputs.teacher))

        loss = cosine_distance(predictions, targets)
        return loss, view_metrics(outputs.online, z) | {
            "health/target_norm": jnp.mean(jnp.linalg.norm(targets, axis=2)),
            "health/prediction_norm": lax.stop_gradient(jnp.mean(jnp.linalg.norm(predictions, axis=2))),
            "train/explained_variance": explained_fraction(loss, cosine_distance_of_mean(targets)),
        }

    def after_update(self, step: Int[Array, ""], metrics: Metrics) -> tuple["BYOL", Metrics]:
        momentum = self.config.ema.at(step, self.total_steps)
        moved, ema_metrics = ema_update(self.target, (self.encoder, self.projector), momentum)
        return eqx.tree_at(lambda method: method.target, self, moved), ema_metrics

    def encoders(self) -> dict[str, ViT]:
        return super().encoders() | {"target": self.target.average[0]}  # the paper probes the online encoder


def cosine_distance(predictions: Projections, targets: Projections) -> Float[Array, ""]:
    """mean over pairs v != w of 2 - 2 cos(predictions[v], targets[w]); index w is one view in both. From 0 to 4."""
    predictions, targets = l2_normalize(predictions), l2_normalize(targets)
    cosines = jnp.mean(jnp.einsum("vbd,wbd->vwb", predictions, targets, precision=lax.Precision.HIGHEST), axis=2)
    # A view does not predict itself. Targets are the first W of the V views, so those pairs are on the diagonal.
    other = ~jnp.eye(*cosines.shape, dtype=bool)
    return 2 - 2 * jnp.sum(jnp.where(other, cosines, 0)) / jnp.sum(other)


def cosine_distance_of_mean(targets: Projections) -> Float[Array, ""]:
    """`cosine_distance` of predicting one direction for all images: that of the batch mean of unit targets."""
    units = l2_normalize(targets)
    return 2 - 2 * jnp.mean(jnp.sum(units * l2_normalize(jnp.mean(units, axis=(0, 1), keepdims=True)), axis=2))


def l2_normalize(x: Projections) -> Projections:
    """Scale each projection to length 1."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=2, keepdims=True) + NORM_EPS)
