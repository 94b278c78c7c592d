"""Networks: the vision transformer, the predictor, and what they are made of."""

from jepax.nn.predictor import Predictor, PredictorConfig
from jepax.nn.vit import SIZES, ViT, ViTConfig

__all__ = ["SIZES", "Predictor", "PredictorConfig", "ViT", "ViTConfig"]
