"""Feature extractors: what an evaluation compares. Each turns a view of an image into vectors and tokens."""

import abc
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from jepax.evals.programs import eval_jit
from jepax.methods import Method
from jepax.nn import ViT
from jepax.nn.vit import patchify
from jepax.trees import cast
from jepax.types import AnyArray, ImageBatch, PRNGKeyArray, UserError
from jepax.views import CropConfig, center_crop, random_resized_crop

NUM_LAYERS = 4
"""Probes may read the outputs of the last four layers (Assran et al. 2023, appendix A)."""
MAX_PIXELS_SIDE = 32
"""Pixels. Larger views are downscaled, so that pixel features are about as wide as an encoder's."""
Pooling = Literal["mean", "sum"]
LayerChoice = Literal["last", "last four"]
EncoderChoice = Literal["default", "target", "context"]
TrainViews = Literal["center", "augmented"]
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
        return embed(self, _center_view(images, self.crop))

    def of_crops(self, images: ImageBatch, key: PRNGKeyArray, crop: CropConfig) -> LayerFeatures:
        """Pooled features of a random crop of each image."""
        return embed(self, _random_view(images, key, crop))


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


class PixelFeatures(FeatureExtractor):
    """The view's pixels, a baseline that an encoder must beat: all as one vector, or each patch's as a token."""

    crop: CropConfig = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)

    def pooled(self, view: View) -> Float[Array, "1 batch dim"]:
        pixels = downscale(view)
        return pixels.reshape(1, len(pixels), -1)

    def tokens(self, view: View) -> Float[Array, "batch patches dim"]:
        return patchify(view, self.patch_size)


def downscale(pixels: View) -> Float[Array, "batch rows columns channels"]:
    """Resizes to a longer side of `MAX_PIXELS_SIDE`, antialiased (triangle filter), with the aspect ratio kept.

    Smaller views are returned unchanged.
    """
    batch, height, width, channels = pixels.shape
    scale = MAX_PIXELS_SIDE / max(height, width)
    if scale >= 1:
        return pixels
    shape = (batch, max(1, round(height * scale)), max(1, round(width * scale)), channels)
    return jax.image.resize(pixels, shape, "linear", antialias=True)


def augmented(images: ImageBatch, key: PRNGKeyArray, crop: CropConfig) -> View:
    """Random resized crops with flips. Example i draws from `fold_in(key, images.index[i])`.

    The index counts over all epochs, so an image is cropped differently in each epoch.
    """
    keys = jax.vmap(lambda index: jr.fold_in(key, index))(images.index)
    return random_resized_crop(images, keys, crop)


# Views and features are separate programs: center views and random crops then share the encoder's, the larger one.
_center_view = eval_jit(center_crop, static_argnames="config")
_random_view = eval_jit(augmented, static_argnames="crop")


@eval_jit
def embed(extractor: FeatureExtractor, view: View) -> LayerFeatures:
    """Pooled features of a view. One program for all extractors of a shape."""
    return extractor.pooled(view)


def select_encoder(method: Method, choice: EncoderChoice) -> ViT:
    """Returns the method's encoder of that name, or its default one. Raises `UserError` if it does not exist."""
    encoders = method.encoders()
    if choice == "default":
        return next(iter(encoders.values()))
    if choice not in encoders:
        raise UserError(f"eval.encoder={choice}: this method has no such encoder; it has {' and '.join(encoders)}")
    return encoders[choice]
