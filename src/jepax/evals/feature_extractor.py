"""What the rows of an evaluation are made of: something frozen that turns a view into tokens."""

import abc
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jepax.methods import Method
from jepax.nn import ViT
from jepax.trees import cast
from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig, center_crop

NUM_LAYERS = 4
"""Layers whose outputs the probes may read: the last four, as published."""
Pooling = Literal["mean", "sum"]
EncoderChoice = Literal["default", "target", "context"]
ViewBatch = Float[Array, "batch height width channels"]


class FeatureExtractor(eqx.Module):
    """A row of the evaluation. Nothing of it is trained, but by `finetune`, which trains a copy."""

    crop: eqx.AbstractVar[CropConfig]
    """How a picture becomes the view that is embedded."""

    @abc.abstractmethod
    def pooled(self, view: ViewBatch) -> Float[Array, "layers batch dim"]:
        """One vector per image from each of the last layers, the very last one at the end; in float32."""

    @abc.abstractmethod
    def tokens(self, view: ViewBatch) -> Float[Array, "batch patches dim"]:
        """The last layer's tokens, in float32."""

    def __call__(self, images: ImageBatch) -> Float[Array, "layers batch dim"]:
        """`pooled` of the centre view."""
        return self.pooled(center_crop(images, self.crop))


class ViTFeatures(FeatureExtractor):
    """An encoder whose patches are pooled by their mean, as published, or by their sum."""

    encoder: ViT
    crop: CropConfig = eqx.field(static=True)
    pool: Pooling = eqx.field(static=True, default="mean")

    def pooled(self, view: ViewBatch) -> Float[Array, "layers batch dim"]:
        pool = jnp.mean if self.pool == "mean" else jnp.sum
        return pool(cast(self.encoder, jnp.float32).intermediate_layers(view, NUM_LAYERS), axis=2)

    def tokens(self, view: ViewBatch) -> Float[Array, "batch patches dim"]:
        return cast(self.encoder, jnp.float32)(view)


def select_encoder(method: Method, choice: EncoderChoice) -> ViT:
    """The method's encoder of that name, or its default. Raises `UserError` where there is none."""
    encoders = method.encoders()
    if choice == "default":
        return next(iter(encoders.values()))
    if choice not in encoders:
        raise UserError(f"eval.encoder={choice}: this method has no such encoder; it has {' and '.join(encoders)}")
    return encoders[choice]
