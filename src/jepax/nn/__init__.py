"""Networks: the vision transformer, the predictors, the projector, and what they are made of."""

from jepax.nn.conditioned import ActionEncoder, CausalPredictor, CausalPredictorConfig
from jepax.nn.predictor import Predictor, PredictorConfig
from jepax.nn.projector import Head, Projector, ProjectorConfig
from jepax.nn.vit import VIT_SIZES, ViT, ViTConfig, pool, take_patches

__all__ = [
    "VIT_SIZES",
    "ActionEncoder",
    "CausalPredictor",
    "CausalPredictorConfig",
    "Head",
    "Predictor",
    "PredictorConfig",
    "Projector",
    "ProjectorConfig",
    "ViT",
    "ViTConfig",
    "pool",
    "take_patches",
]
