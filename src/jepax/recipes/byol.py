"""BYOL (Grill et al. 2020, arXiv:2006.07733): on Fashion-MNIST for two CPU cores, and on ImageNet-100.

On ImageNet-100: projector and predictor 4096-256, momentum 0.996 -> 1 on a cosine (paper, section 3.2); encoder, views
and optimizer are those of `vicreg_vits16_in100`, with its differences; the paper trains a ResNet-50 with LARS at batch
4096.
"""

from jepax.methods.byol import BYOLConfig
from jepax.methods.ema import EMAConfig
from jepax.recipes.lejepa import lejepa_fashion_mnist
from jepax.recipes.registry import recipe, with_method
from jepax.recipes.vicreg import vicreg_vits16_in100
from jepax.training.config import Config


@recipe
def byol_fashion_mnist() -> Config:
    """BYOL on Fashion-MNIST, as `lejepa_fashion_mnist` except for the loss."""
    base = lejepa_fashion_mnist()
    ema = EMAConfig(start=0.99, schedule="cosine")
    return with_method(base, BYOLConfig, predictor=base.method.projector, ema=ema)


@recipe
def byol_vits16_in100() -> Config:
    """BYOL ViT-S/16 on ImageNet-100, 1000 epochs."""
    return with_method(vicreg_vits16_in100(), BYOLConfig, projector=BYOLConfig().projector)
