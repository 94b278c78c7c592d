"""Rectified LpJEPA (Kuang et al. 2026, arXiv:2602.01456): on Fashion-MNIST for two CPU cores, and as published.

The ImageNet-100 settings are those of its public config with a ViT, which shares views, projector widths and optimizer
with `vicreg_vits16_in100`, and its differences; p 1, mu 0, weights 25 and 125, 8192 directions.
"""

from dataclasses import replace

from jepax.methods.rectified_lpjepa import RectifiedLpJEPAConfig
from jepax.recipes.lejepa import lejepa_fashion_mnist
from jepax.recipes.registry import recipe, with_method
from jepax.recipes.vicreg import vicreg_vits16_in100
from jepax.training.config import Config


@recipe
def rectified_lpjepa_fashion_mnist() -> Config:
    """Rectified LpJEPA on Fashion-MNIST, as `lejepa_fashion_mnist` except for the loss. Linear 87.3, kNN 82.1."""
    return _rectified(lejepa_fashion_mnist(), num_slices=256)


@recipe
def rectified_lpjepa_vits16_in100() -> Config:
    """Rectified LpJEPA ViT-S/16 on ImageNet-100, 1000 epochs.

    The paper's 85.08 is for another encoder and sparser features.
    """
    return _rectified(vicreg_vits16_in100(), num_slices=8192)


def _rectified(base: Config, *, num_slices: int) -> Config:
    projector = replace(base.method.projector, final_relu=True)
    return with_method(base, RectifiedLpJEPAConfig, projector=projector, num_slices=num_slices)
