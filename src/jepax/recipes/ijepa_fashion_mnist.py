"""I-JEPA on Fashion-MNIST, for two CPU cores."""

from jepax.data import DataConfig
from jepax.masking import MultiBlockConfig
from jepax.methods import IJEPAConfig, MomentumConfig
from jepax.nn import PredictorConfig, ViTConfig
from jepax.optim import OptimConfig
from jepax.recipes.registry import recipe
from jepax.train import Config, TrainConfig
from jepax.views import CropConfig


@recipe
def ijepa_fashion_mnist() -> Config:
    """I-JEPA on Fashion-MNIST in minutes."""
    return Config(
        recipe="ijepa_fashion_mnist",
        method=IJEPAConfig(
            encoder=ViTConfig(patch_size=7, channels=1, width=192, depth=3, heads=3, init_std=None),
            predictor=PredictorConfig(width=96, depth=2, heads=3, init_std=None),
            masks=MultiBlockConfig(context=5, target_scale=(0.2, 0.35), context_scale=(1.0, 1.0), margin=0),
            crop=CropConfig(
                size=(28, 28), scale=(1.0, 1.0), ratio=(1.0, 1.0), mean=(0.2860,), std=(0.3530,), centre_resize=1.0
            ),
            momentum=MomentumConfig(start=0.998),
        ),
        data=DataConfig(source="fashion_mnist"),
        optim=OptimConfig(
            peak_lr=1e-3,
            start_lr=1e-4,
            final_lr=1e-5,
            warmup_epochs=0.2,
            weight_decay=0.05,
            decay_shape="constant",
            beta2=0.95,
        ),
        train=TrainConfig(batch_size=128, epochs=2.0, log_every=10, save_every=500),
    )
