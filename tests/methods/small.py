"""Methods that compare views at a size that a test can build, shared by their tests."""

import equinox as eqx

from jepax.nn import ProjectorConfig, ViTConfig
from jepax.views import CropConfig, MultiCropConfig

VIEWS = MultiCropConfig(
    globals=2,
    global_crop=CropConfig(size=(24, 24)),
    locals=2,
    local_crop=CropConfig(size=(12, 12), scale=(0.05, 0.3)),
)
SHARED = {
    "encoder": ViTConfig(patch_size=4, width=32, depth=2, heads=2),
    "projector": ProjectorConfig(hidden=(24,), width=8),
    "views": VIEWS,
}


@eqx.filter_jit
def loss_of(method, images, key):
    return method.loss(images, key=key)
