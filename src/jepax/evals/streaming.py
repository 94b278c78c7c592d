"""What protocols share that pass over pictures and not over cached features."""

import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.types import Images
from jepax.views import CropConfig, random_resized_crop


def augmented(images: Images, key: PRNGKeyArray, crop: CropConfig) -> Float[Array, "batch height width channels"]:
    """A random crop of each picture, from its own key `fold_in(key, index)`."""
    keys = jax.vmap(lambda index: jr.fold_in(key, index))(images.index)
    return random_resized_crop(images, keys, crop)
