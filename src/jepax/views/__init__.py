"""A key and a canvas become views: crops and photometric changes, on the device."""

from jepax.views.crops import (
    CropConfig,
    centre_crop,
    denormalise,
    normalise,
    random_resized_crop,
    resample,
    sample_boxes,
)

__all__ = [
    "CropConfig",
    "centre_crop",
    "denormalise",
    "normalise",
    "random_resized_crop",
    "resample",
    "sample_boxes",
]
