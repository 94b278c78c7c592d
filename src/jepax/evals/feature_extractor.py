"""Feature extractors: what an evaluation compares. Each turns a view of an image into vectors and tokens."""

import abc
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jepax.methods import Method
from jepax.nn import ViT
from jepax.trees import cast
from jepax.types import AnyArray, ImageBatch, UserError
from jepax.views import CropConfig, center_crop

NUM_LAYERS = 4
"""Probes may read the outputs of the last four layers (Assran et al. 2023, appendix A)."""
Pooling = Literal["mean", "sum"]
LayerChoice = Literal["last", "last four"]
EncoderChoice = Literal["default", "target", "context"]
View = Float[Array, "batch height width channels"]
LayerFeatures = Float[AnyArray, "layers batch dim"]


class FeatureExtractor(eqx.Module):
    """One row of the results table. It is frozen: fine-tuning trains a copy."""

    crop: eqx.AbstractVar[CropConfig]
    """Turns an image into the view that is embedded."""

    @abc.abstractmethod
    def pooled(self, view: View) -> LayerFeatures:
        """One float32 vector per image from each of the last layers, the last layer at the end."""

    @abc.abstractmethod
    def tokens(self, view: View) -> Float[Array, "batch patches dim"]:
        """The last layer's tokens, in float32."""

    def __call__(self, images: ImageBatch) -> LayerFeatures:
        """Pooled features of the center view."""
        return self.pooled(center_crop(images, self.crop))


class ViTFeatures(FeatureExtractor):
    """An encoder's features: its patches pooled by their mean, as published, or by their sum."""

    encoder: ViT
    crop: CropConfig = eqx.field(static=True)
    pool: Pooling = eqx.field(static=True, default="mean")

    def pooled(self, view: View) -> LayerFeatures:
        pool = jnp.mean if self.pool == "mean" else jnp.sum
        return pool(cast(self.encoder, jnp.float32).intermediate_layers(view, NUM_LAYERS), axis=2)

    def tokens(self, view: View) -> Float[Array, "batch patches dim"]:
        return cast(self.encoder, jnp.float32)(view)


def select_encoder(method: Method, choice: EncoderChoice) -> ViT:
    """Returns the method's encoder of that name, or its default one. Raises `UserError` if it does not exist."""
    encoders = method.encoders()
    if choice == "default":
        return next(iter(encoders.values()))
    if choice not in encoders:
        raise UserError(f"eval.encoder={choice}: this method has no such encoder; it has {' and '.join(encoders)}")
    return encoders[choice]
