"""Methods at a size that a test can build, shared by their tests."""

import warnings

import equinox as eqx
import jax.random as jr

from jepax.methods.base import example_keys
from jepax.nn import ProjectorConfig, ViTConfig
from jepax.views import CropConfig, MultiCropConfig
from tests.contracts.shrink import shrunk

VIEWS = MultiCropConfig(
    num_global=2,
    global_crop=CropConfig(size=(24, 24)),
    num_local=2,
    local_crop=CropConfig(size=(12, 12), scale=(0.05, 0.3)),
)
SHARED = {
    "encoder": ViTConfig(patch_size=4, width=32, depth=2, num_heads=2),
    "projector": ProjectorConfig(hidden_dims=(24,), out_dim=8),
    "views": VIEWS,
}


@eqx.filter_jit
def loss_of(method, images, key):
    return method.loss(images, key=key)


def masked_method(**settings):
    """I-JEPA, or a variant of it by the name of its recipe, at the size of the contract tests."""
    recipe = settings.pop("recipe", "ijepa_vitb16_in1k")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shrunk(recipe, **settings).method.build(total_steps=10, key=jr.key(0))


def drawn(images, seed):
    """Views and masks, which no setting of these tests changes: compiled once."""
    return drawn_by(masked_method(), images, jr.key(seed))


@eqx.filter_jit
def drawn_by(method, images, key):
    """The views of a step with this key."""
    return method.draw(images, example_keys(key, images.index))


@eqx.filter_jit
def outputs_of(method, views):
    return method.forward(views)


@eqx.filter_jit
def loss_of_views(method, views, key):
    return method.objective(method.forward(views), key=key)
