"""Views drawn on the device from a key and a canvas: crops and color distortion."""

from jepax.types import MaskedViews
from jepax.views.color import LEJEPA_COLOR, ColorConfig
from jepax.views.crops import CropConfig, center_crop, denormalize, random_resized_crop
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
    "multicrop",
    "random_resized_crop",
]
