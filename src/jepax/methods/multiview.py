"""What methods that compare views of an image share: encoder, projector, views, and the probes' features."""

import abc
from dataclasses import dataclass, field

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.methods.base import Method
from jepax.nn import Projector, ProjectorConfig, ViT, ViTConfig
from jepax.objectives import share_explained
from jepax.sharding import in_pieces
from jepax.types import Images, Metrics, UserError
from jepax.views import CropConfig, Group, MultiCropConfig, multicrop

VIEWS, OBJECTIVE = 0, 1
"""Folded into a step's key for the views, and for what the objective draws."""
Projections = Float[Array, "_views batch dim"]  # groups differ in their number of views


@dataclass(frozen=True)
class MultiViewConfig:
    """Networks and views; a method's own config adds its weights."""

    encoder: ViTConfig = field(default_factory=ViTConfig)
    """Encoder of every view."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Head on the mean over patches, which the loss reads and the probes do not."""
    views: MultiCropConfig = field(default_factory=MultiCropConfig)
    """Views of each image."""

    def __post_init__(self) -> None:
        if self.views.globals + self.views.locals < 2:
            raise UserError(f"method.views.globals={self.views.globals} leaves nothing to compare; try 2")
        self.encoder.grid(self.views.global_crop.size)  # refuses a patch that does not divide a view
        if self.views.locals:
            self.encoder.grid(self.views.local_crop.size)

    @property
    def crop(self) -> CropConfig:
        """The crop that probes and figures take their views by."""
        return self.views.global_crop

    def draw_views(self, images: Images, *, key: PRNGKeyArray) -> tuple[Group, ...]:
        """The views of the step with this key: the group of global ones and, where there are any, of local ones."""
        return multicrop(images, self.views, key=jr.fold_in(key, VIEWS))


class MultiView(Method):
    """z_v = projector(mean over patches of encoder(view v)); a method's loss says what is asked of the z_v."""

    encoder: ViT
    projector: Projector
    config: MultiViewConfig = eqx.field(static=True)

    def __init__(self, config: MultiViewConfig, *, key: PRNGKeyArray):
        key_encoder, key_projector = jr.split(key)
        self.encoder = ViT(config.encoder, key=key_encoder)
        self.projector = Projector(config.projector, config.encoder.width, key=key_projector)
        self.config = config

    def after_update(self, step: Int[Array, ""]) -> tuple["MultiView", Metrics]:
        return self, {}  # no teacher

    def encoders(self) -> dict[str, ViT]:
        return {"context": self.encoder}  # there is but one, and it embeds the targets too


class JointEmbedding(MultiView):
    """A method whose loss is an objective on all projections, the gradient flowing through every view alike."""

    @abc.abstractmethod
    def objective(self, groups: tuple[Projections, ...], *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        """The loss of the projections of global and, where there are any, local views of the global batch."""

    def loss(self, images: Images, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        pooled = [embed(self.encoder, group) for group in self.config.draw_views(images, key=key)]
        groups = tuple(project(self.projector, group) for group in pooled)
        loss, metrics = self.objective(groups, key=jr.fold_in(key, OBJECTIVE))
        rows = {"embeddings": pooled[0][0], "projections": groups[0][0]}
        return loss, rows | {"loss_explained": agreement_explained(groups)} | metrics


def embed(encoder: ViT, group: Group) -> Float[Array, "views batch dim"]:
    """Mean over patches of each view's embedding, in float32; all views go through the encoder as one batch."""

    def pooled(encoder: ViT, views: Float[Array, "batch height width channels"]) -> Float[Array, "batch dim"]:
        return jnp.mean(encoder(views).astype(jnp.float32), axis=1)

    return split(in_pieces(pooled, encoder, merged(group)), len(group))


def project(projector: Projector, group: Float[Array, "_views batch _dim"]) -> Projections:
    """Projections of a group; BatchNorm reads all of its views together."""
    return split(projector(merged(group)), len(group))


def merged(group: Float[Array, "views batch *shape"]) -> Float[Array, "batch_views *shape"]:
    """The views of a group as one batch, an image's side by side: so it stays shared out over the devices by images."""
    return jnp.swapaxes(group, 0, 1).reshape(-1, *group.shape[2:])


def split(batch: Float[Array, "batch_views dim"], views: int) -> Float[Array, "views batch dim"]:
    """What was `merged`, by views again."""
    return jnp.swapaxes(batch.reshape(-1, views, batch.shape[1]), 0, 1)


def invariance(groups: tuple[Projections, ...]) -> Float[Array, ""]:
    """Mean squared distance of every view's projection to the mean over the image's global views.

    Scale: per dimension and view. With two global views alone it is a quarter of the mean of (z_1 - z_2)^2.
    Source: Balestriero & LeCun 2025 (arXiv:2511.08544), the prediction loss of multi-crop LeJEPA.
    """
    centre = jnp.mean(groups[0], axis=0)
    return jnp.mean(jnp.square(jnp.concatenate(groups) - centre))


def spread(views: Projections) -> Float[Array, ""]:
    """Mean over pairs of views and dimensions of (z_v - z_w)^2: twice the variance over an image's views.

    Scale: per dimension; with two views the plain mean squared distance. Needs two views at least.
    """
    return 2 * jnp.mean(jnp.var(views, axis=0, ddof=1))


def agreement_explained(groups: tuple[Projections, ...]) -> Float[Array, ""]:
    """Share of the projections' variance that is not disagreement between the views of an image.

    1 - `spread` / that of views of different images, which is twice the variance about the mean over the batch.
    """
    views = jnp.concatenate(groups)
    return share_explained(spread(views), 2 * jnp.mean(jnp.square(views - jnp.mean(views, axis=(0, 1)))))


def refuse_below_one(config: object, *names: str) -> None:
    """Raises `UserError` at the first count below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"method.{name}={getattr(config, name)} must be at least 1")


def refuse_rectified(*heads: ProjectorConfig) -> None:
    """Raises `UserError` where a ReLU ends a head whose output is to lie on both sides of 0."""
    if any(head.rectified for head in heads):
        raise UserError("projector.rectified=True leaves no projection below 0, but the loss wants some; set it False")


def refuse_negative(config: object, *names: str) -> None:
    """Raises `UserError` at the first weight below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"method.{name}={getattr(config, name)} must not be negative")
