"""KerJEPA (Zimmermann et al. 2025, arXiv:2512.19605) on Fashion-MNIST, to compare with LeJEPA.

The paper reports 91.9 linear top-1 on Imagenette with an inverse multiquadric kernel; here only the loss differs.
"""

from dataclasses import fields, replace

from jepax.methods.kerjepa import KerJEPAConfig
from jepax.methods.multiview import MultiViewConfig
from jepax.recipes.lejepa import lejepa_fashion_mnist
from jepax.recipes.registry import recipe
from jepax.training.config import Config


@recipe
def kerjepa_fashion_mnist() -> Config:
    """KerJEPA (MMD, Gaussian kernel) on Fashion-MNIST, as `lejepa_fashion_mnist` except for the loss."""
    base = lejepa_fashion_mnist()
    shared = {field.name: getattr(base.method, field.name) for field in fields(MultiViewConfig)}
    return replace(base, recipe="kerjepa_fashion_mnist", method=KerJEPAConfig(**shared))


@recipe
def kerjepa_imq_fashion_mnist() -> Config:
    """KerJEPA (KSD, inverse multiquadric kernel) on Fashion-MNIST, as `lejepa_fashion_mnist` except for the loss."""
    base = kerjepa_fashion_mnist()
    return replace(
        base, recipe="kerjepa_imq_fashion_mnist", method=replace(base.method, discrepancy="ksd", kernel="imq")
    )
