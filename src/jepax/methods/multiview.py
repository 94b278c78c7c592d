"""The common part of methods that compare views of an image: draw, forward, and terms of their objectives.

    x_v = view v of an image: a crop with its own color changes      draw
    y_v = mean over patches of f(x_v)                                forward
    z_v = projector(y_v), BatchNorm over the global batch            objective

A method of this kind adds its loss on the z_v.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from jepax.methods.base import ImageMethod, ImageMethodConfig
from jepax.nn import Projector, ProjectorConfig, ViT, ViTConfig, pool
from jepax.objectives import explained_fraction
from jepax.types import ImageBatch, Metrics, UserError
from jepax.views import CropConfig, MultiCropConfig, MultiCropViews, ViewGroup, multicrop

Embeddings = tuple[Float[Array, "batch _views width"], ...]
"""One array for the global views and, if there are any, one for the local views; `width` is the encoder's."""
Projections = Float[Array, "_views batch dim"]
"""One group of views; groups differ in their number of views."""


@dataclass(frozen=True)
class MultiViewConfig(ImageMethodConfig):
    """Networks and views; a method's own config adds its weights."""

    allows_final_relu: ClassVar[bool] = False
    """True if the loss does not need projections of both signs."""
    encoder: ViTConfig = field(default_factory=ViTConfig)
    """Encoder of every view."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Head on the mean over patches, which the loss reads and the probes do not."""
    views: MultiCropConfig = field(default_factory=MultiCropConfig)
    """Views of each image."""

    def __post_init__(self) -> None:
        # One view alone has nothing to agree with. Grids are checked here, before anything is built.
        if self.views.num_global + self.views.num_local < 2:
            raise UserError(f"method.views.num_global={self.views.num_global} leaves nothing to compare; try 2")
        self.encoder.grid(self.views.global_crop.size)  # raises if the patch does not divide a view
        if self.views.num_local:
            self.encoder.grid(self.views.local_crop.size)
        if self.projector.final_relu and not self.allows_final_relu:
            raise UserError(
                "projector.final_relu=True leaves no projection below 0, which the loss needs; set it False"
            )

    @property
    def crop(self) -> CropConfig:
        """The crop of probes and figures."""
        return self.views.global_crop


class MultiView(ImageMethod):
    """A method that compares views of an image. It has no teacher; a subclass adds the objective."""

    encoder: ViT  # f
    projector: Projector
    config: MultiViewConfig = eqx.field(static=True)

    def __init__(self, config: MultiViewConfig, *, key: PRNGKeyArray):
        key_encoder, key_projector = jr.split(key)
        self.encoder = ViT(config.encoder, key=key_encoder)
        self.projector = Projector(config.projector, config.encoder.width, key=key_projector)
        self.config = config

    def draw(self, batch: ImageBatch, keys: Key[Array, "batch"]) -> MultiCropViews:
        """All views of each image, from the image's own key."""
        return multicrop(batch, keys, self.config.views)

    def forward(self, views: MultiCropViews) -> PyTree:
        """Every view's `Embeddings`; a subclass may add what else its objective reads."""
        return tuple(embed(self.encoder, group) for group in views.groups)

    def after_update(self, step: Int[Array, ""], metrics: Metrics) -> tuple["MultiView", Metrics]:
        return self, {}  # no teacher

    def encoders(self) -> dict[str, ViT]:
        return {"context": self.encoder}  # the only one, which embeds the targets too

    def project(self, embeddings: Embeddings) -> tuple[Projections, ...]:
        """Each group's projections, views first; BatchNorm reads all views of a group together."""
        return tuple(project(self.projector, group) for group in embeddings)


def embed(encoder: ViT, group: ViewGroup) -> Float[Array, "batch views width"]:
    """Mean over patches of each view's embedding, in float32; all views go through the encoder as one batch."""
    tokens = encoder(group.reshape(-1, *group.shape[2:]))  # (B * V, N, D)
    return pool(tokens).reshape(*group.shape[:2], -1)


def project(projector: Projector, group: Float[Array, "batch views _inputs"]) -> Projections:
    """Projections of a group, views first, so that z[v] is the batch of view v."""
    z = projector(group.reshape(-1, group.shape[2]))  # (B * V, D)
    return jnp.swapaxes(z.reshape(*group.shape[:2], -1), 0, 1)


def invariance_loss(groups: tuple[Projections, ...]) -> Float[Array, ""]:
    """Mean squared distance of every view's projection to the mean over the image's global views.

    Scale: per dimension and view. With two global views alone it is a quarter of the mean of (z_1 - z_2)^2.
    Source: Balestriero & LeCun 2025 (arXiv:2511.08544), the prediction loss of multi-crop LeJEPA.
    """
    # groups[0] are the global views: local ones are compared with the center, but are not part of it.
    center = jnp.mean(groups[0], axis=0)
    return jnp.mean(jnp.square(jnp.concatenate(groups) - center))


def pairwise_mse(views: Projections) -> Float[Array, ""]:
    """Mean over pairs of views and dimensions of (z_v - z_w)^2: twice the variance over an image's views.

    Scale: per dimension; with two views the plain mean squared distance. Needs two views at least.
    """
    # With ddof=1 this equals the mean over all pairs v != w, without computing V^2 differences.
    return 2 * jnp.mean(jnp.var(views, axis=0, ddof=1))


def explained_by_views(groups: tuple[Projections, ...]) -> Float[Array, ""]:
    """1 - `pairwise_mse` / that of views of different images, which is twice the variance about the mean over all.

    The fraction of the projections' variance that is not disagreement between the views of an image.
    """
    # The baseline is the distance of views of different images: 0 is no agreement, 1 is full agreement.
    z = jnp.concatenate(groups)
    return explained_fraction(pairwise_mse(z), 2 * jnp.mean(jnp.square(z - jnp.mean(z, axis=(0, 1)))))


def view_metrics(embeddings: Embeddings, groups: tuple[Projections, ...]) -> Metrics:
    """The first view's embeddings and projections, which are read for collapse, and the agreement of all views."""
    rows = {"embeddings": embeddings[0][:, 0], "projections": groups[0][0]}
    return rows | {"train/explained_variance": explained_by_views(groups)}
