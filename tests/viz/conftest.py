"""One small method and its data, shared so that its draw compiles once."""

import pytest

from jepax.data import DataConfig
from jepax.masking import MultiBlockConfig
from jepax.methods.ijepa import IJEPAConfig
from jepax.nn import PredictorConfig, ViTConfig
from jepax.training.config import Config
from jepax.views import CropConfig


@pytest.fixture(scope="session")
def config() -> Config:
    method = IJEPAConfig(
        encoder=ViTConfig(patch_size=4, width=12, depth=1, num_heads=1),
        predictor=PredictorConfig(width=12, depth=1, num_heads=1),
        masks=MultiBlockConfig(num_context_patches=4),
        crop=CropConfig(size=(16, 24)),
    )
    return Config(method=method, data=DataConfig(dataset="synthetic", canvas_size=32, synthetic_size=40), seed=3)
