"""BYOL (Grill et al. 2020, arXiv:2006.07733): predict a moving average's projection of another view."""

from dataclasses import dataclass, field

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.methods.base import MethodConfig
from jepax.methods.momentum import MomentumConfig, follow, teacher_of
from jepax.methods.multiview import MultiView, MultiViewConfig, Projections, embed, project, refuse_rectified
from jepax.nn import Projector, ProjectorConfig, ViT
from jepax.objectives import share_explained
from jepax.trees import EMA
from jepax.types import Images, Metrics, UserError

EPS = 1e-12
"""Added to the squared length of a projection, which may be 0."""


@dataclass(frozen=True)
class BYOLConfig(MultiViewConfig, MethodConfig, name="byol"):
    """BYOL: no regulariser; a predictor and a slow teacher keep it from collapse."""

    projector: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(hidden=(4096,), width=256))
    """Head on the mean over patches."""
    predictor: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(hidden=(4096,), width=256))
    """Head on the projection, as wide at its end as the projector's."""
    momentum: MomentumConfig = field(default_factory=lambda: MomentumConfig(shape="cosine"))
    """Schedule of the teacher's momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_rectified(self.projector, self.predictor)
        if self.predictor.width != self.projector.width:
            raise UserError(
                f"method.predictor.width={self.predictor.width} must be method.projector.width={self.projector.width}"
            )

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "BYOL":
        return BYOL(self, total_steps=total_steps, key=key)


class BYOL(MultiView):
    """loss = mean over pairs of a view v and another, global view w of 2 - 2 cos(q(z_v), z'_w).

    z = projector(mean over patches of encoder(view)); z' is that of the moving averages of both; q is the predictor.
    Only the averages' global views are targets; a local view predicts those too, as in DINO's multi-crop. Differs from
    the paper: a mean over the pairs, where that sums the two, and BatchNorm reads all views of a group together.
    """

    target: EMA[tuple[ViT, Projector]]
    predictor: Projector
    config: BYOLConfig = eqx.field(static=True)
    total_steps: int = eqx.field(static=True)

    def __init__(self, config: BYOLConfig, *, total_steps: int, key: PRNGKeyArray):
        super().__init__(config, key=key)
        self.target = teacher_of((self.encoder, self.projector), config.momentum.precision)
        key_predictor = jr.split(key, 3)[2]  # the first two are the encoder's and the projector's
        self.predictor = Projector(config.predictor, config.projector.width, key=key_predictor)
        self.total_steps = total_steps

    def loss(self, images: Images, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        groups = self.config.draw_views(images, key=key)
        pooled = [embed(self.encoder, group) for group in groups]
        projections = [project(self.projector, group) for group in pooled]
        predictions = jnp.concatenate([project(self.predictor, group) for group in projections])
        encoder, projector = self.target.average
        targets = lax.stop_gradient(project(projector, embed(encoder, groups[0])))
        loss = disagreement(predictions, targets)
        rows = {"embeddings": pooled[0][0], "projections": projections[0][0]}
        return loss, rows | {
            "target_norm": jnp.mean(jnp.linalg.norm(targets, axis=2)),
            "prediction_norm": lax.stop_gradient(jnp.mean(jnp.linalg.norm(predictions, axis=2))),
            "loss_explained": share_explained(loss, disagreement_of_the_mean(targets)),
        }

    def after_update(self, step: Int[Array, ""]) -> tuple["BYOL", Metrics]:
        momentum = self.config.momentum.at(step, self.total_steps)
        moved, metrics = follow(self.target, (self.encoder, self.projector), momentum)
        return eqx.tree_at(lambda method: method.target, self, moved), metrics

    def encoders(self) -> dict[str, ViT]:
        return super().encoders() | {"target": self.target.average[0]}  # the paper probes the first


def disagreement(predictions: Projections, targets: Projections) -> Float[Array, ""]:
    """mean over pairs v != w of 2 - 2 cos(predictions[v], targets[w]); view w of both is the same. From 0 to 4."""
    predictions, targets = unit(predictions), unit(targets)
    cosines = jnp.mean(jnp.einsum("vbd,wbd->vwb", predictions, targets, precision=lax.Precision.HIGHEST), axis=2)
    other = ~jnp.eye(*cosines.shape, dtype=bool)
    return 2 - 2 * jnp.sum(jnp.where(other, cosines, 0)) / jnp.sum(other)


def disagreement_of_the_mean(targets: Projections) -> Float[Array, ""]:
    """`disagreement` of one prediction for all images: the direction of the mean over the batch of all unit targets."""
    units = unit(targets)
    return 2 - 2 * jnp.mean(jnp.sum(units * unit(jnp.mean(units, axis=(0, 1), keepdims=True)), axis=2))


def unit(x: Projections) -> Projections:
    """Each projection at length 1."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=2, keepdims=True) + EPS)
