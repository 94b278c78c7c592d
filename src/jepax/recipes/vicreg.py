"""VICReg (Bardes et al. 2022, arXiv:2105.04906): on Fashion-MNIST for two CPU cores, and on ImageNet-100.

The ImageNet-100 settings are those of the baseline with a ViT in the public configs of Rectified LpJEPA (Kuang et al.
2026): ViT-S/16, two views of 224 px (0.2-1, bicubic) with jitter 0.8, gray 0.2, blur 0.5, solarize 0.1, flip 0.5;
projector 2048-2048-2048; weights 25, 25, 1, with the variance term summed over the two views (50 here); AdamW 5e-4,
weight decay 1e-4, batch 128, 1000 epochs. Its warm-up (10 epochs) is that code's default. Ours: the mean over patches
as the embedding (there a class token), fixed positions (there learned), no weight decay on biases and norms, BatchNorm
over both views together. VICReg's own paper trains a ResNet-50 with LARS, which this library does not have.
"""

from jepax.data import DataConfig
from jepax.methods.vicreg import VICRegConfig
from jepax.nn import VIT_SIZES, ProjectorConfig, ViTConfig
from jepax.recipes.lejepa import adamw, lejepa_fashion_mnist
from jepax.recipes.registry import recipe, with_method
from jepax.training.config import Config, TrainConfig
from jepax.views import ColorConfig, CropConfig, MultiCropConfig


@recipe
def vicreg_fashion_mnist() -> Config:
    """VICReg on Fashion-MNIST, as `lejepa_fashion_mnist` except for the loss. Linear 87.5, kNN 82.5."""
    return with_method(lejepa_fashion_mnist(), VICRegConfig)


@recipe
def vicreg_vits16_in100() -> Config:
    """VICReg ViT-S/16 on ImageNet-100, 1000 epochs.

    `jepax train vicreg_vits16_in100 --data.root PATH`, where PATH has train/CLASS/*.JPEG and val/CLASS/*.JPEG.
    """
    views = MultiCropConfig(
        global_crop=CropConfig(size=(224, 224), scale=(0.2, 1.0), hflip_prob=0.5, interpolation="bicubic"),
        color=ColorConfig(jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.1),
    )
    return Config(
        method=VICRegConfig(
            encoder=ViTConfig(patch_size=16, **VIT_SIZES["small"]),
            projector=ProjectorConfig(hidden_dims=(2048, 2048), out_dim=2048),
            views=views,
            std_coeff=50.0,
        ),
        data=DataConfig(dataset="image_folder", canvas_size=512, val_fraction=0.05, num_threads=16),
        optim=adamw(peak_lr=5e-4, start_lr=3e-5, final_lr=0.0, warmup_epochs=10.0, weight_decay=1e-4),
        train=TrainConfig(batch_size=128, epochs=1000.0),
    )
