"""Networks: the vision transformer, the predictor, the projector, and what they are made of."""

from jepax.nn.predictor import Predictor, PredictorConfig
from jepax.nn.projector import Projector, ProjectorConfig
from jepax.nn.vit import VIT_SIZES, ViT, ViTConfig, pool, take_patches

__all__ = [
    "VIT_SIZES",
    "Predictor",
    "PredictorConfig",
    "Projector",
    "ProjectorConfig",
    "ViT",
    "ViTConfig",
    "pool",
    "take_patches",
]
