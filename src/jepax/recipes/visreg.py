"""VISReg (Wu et al. 2026, arXiv:2606.02572): on Fashion-MNIST for two CPU cores, and on ImageNet-100.

The weights of its terms, all 1, are ours. On ImageNet-100 the rest is as `vicreg_vits16_in100` has it.
"""

from dataclasses import replace

from jepax.methods.visreg import VISRegConfig
from jepax.recipes.lejepa import lejepa_fashion_mnist
from jepax.recipes.registry import recipe
from jepax.recipes.vicreg import vicreg_vits16_in100
from jepax.train import Config


@recipe
def visreg_fashion_mnist() -> Config:
    """VISReg on Fashion-MNIST in about seven minutes on two CPU cores, as `lejepa_fashion_mnist` but for the loss."""
    return _with_visreg(lejepa_fashion_mnist(), "visreg_fashion_mnist", directions=256)


@recipe
def visreg_vits16_in100() -> Config:
    """VISReg ViT-S/16 on ImageNet-100, 1000 epochs, as `vicreg_vits16_in100` but for the loss."""
    return _with_visreg(vicreg_vits16_in100(), "visreg_vits16_in100", directions=1024)


def _with_visreg(base: Config, name: str, *, directions: int) -> Config:
    shared = {"encoder": base.method.encoder, "projector": base.method.projector, "views": base.method.views}
    return replace(base, recipe=name, method=VISRegConfig(**shared, directions=directions))
