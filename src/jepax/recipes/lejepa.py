"""LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544): on Fashion-MNIST for two CPU cores, and as published.

Sources: [paper], or [code] for its public repository and minimal example.

- Loss: weight of SIGReg 0.05 [paper], 0.02 on Imagenette [code]; 17 knots on [0, 3]; 1024 directions [code].
- Multi-crop: 2 global views of 224 px (0.3-1) and 6 local ones of 98 px (0.05-0.3); flip 0.5, jitter 0.8 (0.4, 0.4,
  0.2, 0.1), gray 0.2, blur 0.5, solarize 0.2. [code]
- AdamW 5e-4, weight decay 5e-2, warm-up, then cosine to a thousandth. [paper, code]
- Imagenette: 4 views of 128 px (0.08-1), jitter 0.8 (0.8, 0.8, 0.8, 0.2), gray 0.2, blur 0.5, solarize 0.2, flip
  0.5; projector 2048-2048-16; 256 directions; batch 256; an epoch of warm-up from a hundredth of 2e-3, cosine to
  1e-3. [code] Differs from [code], which has a class token through a linear map to 512, stochastic depth 0.1 and a blur
  of 7 taps: the mean over patches, no stochastic depth, a blur of 3 deviations.
"""

from dataclasses import replace

from jepax.data import DataConfig
from jepax.methods.lejepa import LeJEPAConfig
from jepax.nn import VIT_SIZES, ProjectorConfig, ViTConfig
from jepax.optim import OptimConfig
from jepax.recipes.fashion_mnist import CROP, ENCODER, on_fashion_mnist
from jepax.recipes.registry import override, recipe
from jepax.training.config import Config, TrainConfig
from jepax.views import LEJEPA_COLOR, ColorConfig, CropConfig, MultiCropConfig


@recipe
def lejepa_fashion_mnist() -> Config:
    """LeJEPA on Fashion-MNIST with the demo's encoder and two views; seven minutes of training on one CPU core.

    Test top-1: linear 86.8, kNN 81.9, means of three seeds (untrained 82.5, 75.4; raw pixels 84.6, 85.3).
    """
    method = LeJEPAConfig(
        encoder=ENCODER,
        projector=ProjectorConfig(hidden_dims=(512,), out_dim=64),
        views=MultiCropConfig(global_crop=replace(CROP, hflip_prob=0.5), color=ColorConfig(jitter_prob=0.8)),
        num_slices=256,
    )
    return on_fashion_mnist(method, epochs=2.0, peak_lr=3e-3, warmup_epochs=0.2)


@recipe
def lejepa_vits8_imagenette() -> Config:
    """LeJEPA ViT-S/8 on Imagenette at 128 px, 800 epochs. Reported linear top-1: 90.7 (public minimal example).

    `jepax train lejepa_vits8_imagenette --data.root PATH`, where PATH has train/CLASS/*.JPEG and val/CLASS/*.JPEG.
    """
    views = MultiCropConfig(
        num_global=4,
        global_crop=CropConfig(size=(128, 128), scale=(0.08, 1.0), hflip_prob=0.5, eval_resize_ratio=1.0),
        color=ColorConfig(**LEJEPA_COLOR, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    )
    return Config(
        method=LeJEPAConfig(
            encoder=ViTConfig(patch_size=8, **VIT_SIZES["small"]),
            projector=ProjectorConfig(hidden_dims=(2048, 2048), out_dim=16),
            views=views,
            sigreg_weight=0.02,
            num_slices=256,
        ),
        data=DataConfig(dataset="image_folder", canvas_size=256, val_fraction=0.1, num_threads=16),
        optim=adamw(peak_lr=2e-3, start_lr=2e-5, final_lr=1e-3, warmup_epochs=1.0),
        train=TrainConfig(batch_size=256, epochs=800.0),
    )


@recipe
def lejepa_vitl14_in1k() -> Config:
    """LeJEPA ViT-L/14 on ImageNet-1k, 100 epochs, 2 global and 6 local views. Reported: on transfer tasks only.

    Ours: the batch (512; SIGReg's weight depends on it), the projector's widths, the 10 epochs of warm-up from a
    hundredth of the peak, fixed positions counted from a local view's own corner, no weight decay on biases and norms.
    """
    crop = CropConfig(hflip_prob=0.5)
    views = MultiCropConfig(
        global_crop=crop,
        num_local=6,
        local_crop=replace(crop, size=(98, 98), scale=(0.05, 0.3)),
        color=ColorConfig(**LEJEPA_COLOR),
    )
    changes = {
        "method": LeJEPAConfig(
            encoder=ViTConfig(patch_size=14, scan_layers=True, remat="dots", **VIT_SIZES["large"]), views=views
        ),
        "data.canvas_size": 512,
        "data.val_fraction": 0.01,
        "optim": adamw(peak_lr=5e-4, start_lr=5e-6, final_lr=5e-7, warmup_epochs=10.0),
        "train": TrainConfig(batch_size=512, epochs=100.0),
    }
    return override(lejepa_vits8_imagenette(), changes)


def adamw(*, weight_decay: float = 5e-2, **settings: float) -> OptimConfig:
    """AdamW with a constant weight decay, by default LeJEPA's."""
    return OptimConfig(weight_decay=weight_decay, weight_decay_schedule="constant", **settings)
