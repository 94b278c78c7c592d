"""Views drawn on the device from a key and a canvas: crops and color distortion."""

from jepax.views.color import LEJEPA_COLOR, ColorConfig, distort_color
from jepax.views.crops import (
    CropConfig,
    center_crop,
    denormalize,
    normalize,
    random_crop_unnormalized,
    random_resized_crop,
    resize_crop,
    sample_boxes,
)
from jepax.views.masked import MaskedViews
from jepax.views.multicrop import MultiCropConfig, MultiCropViews, ViewGroup, multicrop

__all__ = [
    "LEJEPA_COLOR",
    "ColorConfig",
    "CropConfig",
    "MaskedViews",
    "MultiCropConfig",
    "MultiCropViews",
    "ViewGroup",
    "center_crop",
    "denormalize",
    "distort_color",
    "multicrop",
    "normalize",
    "random_crop_unnormalized",
    "random_resized_crop",
    "resize_crop",
    "sample_boxes",
]
