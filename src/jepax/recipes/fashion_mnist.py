"""The common part of all recipes on Fashion-MNIST, for two CPU cores: a small encoder, Muon, and the evaluation."""

from jepax.data import DataConfig
from jepax.evals.attentive import AttentiveConfig
from jepax.evals.online import OnlineConfig
from jepax.evals.protocols import EvalConfig
from jepax.io.checkpointer import CheckpointConfig
from jepax.methods import MethodConfig
from jepax.nn import ViTConfig
from jepax.optim import OptimConfig
from jepax.training.config import Config, TrainConfig
from jepax.views import CropConfig

ENCODER = ViTConfig(patch_size=7, in_channels=1, width=192, depth=3, num_heads=3, init_std=None)
CROP = CropConfig(size=(28, 28), scale=(0.4, 1.0), mean=(0.2860,), std=(0.3530,), eval_resize_ratio=1.0)


def on_fashion_mnist(method: MethodConfig, *, epochs: float, peak_lr: float, warmup_epochs: float) -> Config:
    """A method on Fashion-MNIST."""
    return Config(
        method=method,
        data=DataConfig(dataset="fashion_mnist"),
        optim=OptimConfig(
            name="muon",
            peak_lr=peak_lr,
            start_lr=1e-4,
            final_lr=1e-5,
            warmup_epochs=warmup_epochs,
            weight_decay=0.05,
            weight_decay_schedule="constant",
            beta2=0.95,
        ),
        train=TrainConfig(
            batch_size=128, epochs=epochs, log_every_steps=20, checkpoint=CheckpointConfig(every_steps=1000)
        ),
        eval=EvalConfig(
            attentive=AttentiveConfig(train_views="center"),  # crops and flips cost two points on these small images
            online=OnlineConfig(every_steps=200),
        ),
    )
