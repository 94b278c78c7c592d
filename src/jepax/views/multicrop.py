"""Several random views of each image: a few global ones of a large share of it, and perhaps local ones, smaller."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.types import Images, UserError
from jepax.views.crops import CropConfig, normalise, random_pixels
from jepax.views.photometric import PhotometricConfig, photometric

Group = Float[Array, "views batch height width channels"]


@dataclass(frozen=True)
class MultiCropConfig:
    """How many views of which kinds; global and local ones may differ in size."""

    globals: int = 2
    """Global views of each image."""
    global_crop: CropConfig = field(default_factory=CropConfig)
    """Crop of a global view, and of the centre view that probes read."""
    locals: int = 0
    """Local views of each image."""
    local_crop: CropConfig = field(default_factory=lambda: CropConfig(size=(96, 96), scale=(0.05, 0.3)))
    """Crop of a local view; its mean and std are to be the global one's."""
    photometric: PhotometricConfig = field(default_factory=PhotometricConfig)
    """Changes of colour, focus and tone, drawn for every view by itself."""

    def __post_init__(self) -> None:
        if self.globals < 1 or self.locals < 0:
            raise UserError(f"views.globals={self.globals} must be above 0, views.locals={self.locals} not below it")
        large, small = ((crop.mean, crop.std) for crop in (self.global_crop, self.local_crop))
        if self.locals and large != small:
            raise UserError(
                f"views.local_crop has mean and std {small}, where views.global_crop has {large}; give both the same"
            )


def multicrop(images: Images, config: MultiCropConfig, *, key: PRNGKeyArray) -> tuple[Group, ...]:
    """The group of global views and, where there are any, that of local ones, normalised.

    View v of example i draws from `fold_in(fold_in(key, images.index[i]), v)`, global views counted first.
    """
    keys = jax.vmap(lambda index: jr.fold_in(key, index))(images.index)

    def view(number: Int[Array, ""], crop: CropConfig) -> Float[Array, "batch height width channels"]:
        own = jax.vmap(lambda k: jr.split(jr.fold_in(k, number)))(keys)
        key_crop, key_colour = own[:, 0], own[:, 1]
        return normalise(photometric(random_pixels(images, key_crop, crop), key_colour, config.photometric), crop)

    def group(first: int, count: int, crop: CropConfig) -> Group:
        return jax.vmap(lambda number: view(number, crop))(first + jnp.arange(count))  # one program for all of them

    kinds = ((0, config.globals, config.global_crop), (config.globals, config.locals, config.local_crop))
    return tuple(group(*kind) for kind in kinds if kind[1])
