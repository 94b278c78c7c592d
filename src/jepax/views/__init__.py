"""A key and a canvas become views: crops and photometric changes, on the device."""

from jepax.views.crops import (
    CropConfig,
    centre_crop,
    denormalise,
    normalise,
    random_pixels,
    random_resized_crop,
    resample,
    sample_boxes,
)
from jepax.views.masked import MaskedViews
from jepax.views.multicrop import MultiCropConfig, MultiCropViews, ViewGroup, multicrop
from jepax.views.photometric import LEJEPA, PhotometricConfig, photometric

__all__ = [
    "LEJEPA",
    "CropConfig",
    "MaskedViews",
    "MultiCropConfig",
    "MultiCropViews",
    "PhotometricConfig",
    "ViewGroup",
    "centre_crop",
    "denormalise",
    "multicrop",
    "normalise",
    "photometric",
    "random_pixels",
    "random_resized_crop",
    "resample",
    "sample_boxes",
]
