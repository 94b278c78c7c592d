"""Several random views of each image: global views of a large area and optional, smaller local views."""

from dataclasses import dataclass, field, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from jepax.errors import check_fields
from jepax.types import ImageBatch, UserError
from jepax.views.color import ColorConfig, distort_color
from jepax.views.crops import CropConfig, normalize, random_crop_unnormalized

ViewGroup = Float[Array, "batch _views _height _width channels"]


@dataclass(frozen=True)
class MultiCropConfig:
    """Counts, crops and color distortion of the views; global and local views may differ in size."""

    num_global: int = 2
    """Global views per image."""
    global_crop: CropConfig = field(default_factory=CropConfig)
    """Crop of a global view, and of the center view for probes."""
    num_local: int = 0
    """Local views per image."""
    local_crop: CropConfig = field(default_factory=lambda: CropConfig(size=(96, 96), scale=(0.05, 0.3)))
    """Crop of a local view; mean and std must equal those of `global_crop`."""
    color: ColorConfig = field(default_factory=ColorConfig)
    """Color distortion, drawn independently for each view."""

    def __post_init__(self) -> None:
        check_fields("views", self, "at least 1", "num_global")
        check_fields("views", self, "at least 0", "num_local")
        large, small = ((crop.mean, crop.std) for crop in (self.global_crop, self.local_crop))
        if self.num_local and large != small:
            raise UserError(f"views.local_crop has mean and std {small}, but views.global_crop has {large}: set both")

    def tiny(self) -> "MultiCropConfig":
        """At most two views of each kind, of 24 x 24 and 12 x 12 pixels, for tests."""
        counts = {"num_global": min(self.num_global, 2), "num_local": min(self.num_local, 2)}
        local_crop = replace(self.local_crop, size=(12, 12))
        return replace(self, **counts, global_crop=self.global_crop.tiny(), local_crop=local_crop)


class MultiCropViews(eqx.Module):
    """Views of each image, by kind; axis 1 indexes the views of one image."""

    global_views: ViewGroup
    """Global views, (batch, views, height, width, channels)."""
    local_views: ViewGroup | None = None
    """Local views; None if `num_local` is 0."""

    @property
    def groups(self) -> tuple[ViewGroup, ...]:
        """The groups of views that exist, global views first."""
        return (self.global_views,) if self.local_views is None else (self.global_views, self.local_views)


def multicrop(images: ImageBatch, keys: Key[Array, "batch"], config: MultiCropConfig) -> MultiCropViews:
    """Normalized global and local views. View v of image i draws from `fold_in(keys[i], v)`, global views first."""

    # One view of every image. Its number is folded into the image's key, so local views do not change the global ones.
    def view(number: Int[Array, ""], crop: CropConfig) -> Float[Array, "batch height width channels"]:
        view_keys = jax.vmap(lambda key: jr.split(jr.fold_in(key, number)))(keys)
        key_crop, key_color = view_keys[:, 0], view_keys[:, 1]
        return normalize(distort_color(random_crop_unnormalized(images, key_crop, crop), key_color, config.color), crop)

    # Views of one size are drawn by one `vmap` over their numbers: one program for all of them.
    def group(first: int, count: int, crop: CropConfig) -> ViewGroup:
        return jax.vmap(lambda number: view(number, crop), out_axes=1)(first + jnp.arange(count))

    # Local views are numbered after the global ones, so no key is used twice.
    global_views = group(0, config.num_global, config.global_crop)
    local_views = group(config.num_global, config.num_local, config.local_crop) if config.num_local else None
    return MultiCropViews(global_views, local_views)
