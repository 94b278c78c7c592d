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
from jepax.views.multicrop import Group, MultiCropConfig, multicrop
from jepax.views.photometric import LEJEPA, PhotometricConfig, photometric

__all__ = [
    "LEJEPA",
    "CropConfig",
    "Group",
    "MultiCropConfig",
    "PhotometricConfig",
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
