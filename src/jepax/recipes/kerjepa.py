"""KerJEPA (Zimmermann et al. 2025, arXiv:2512.19605) on Fashion-MNIST, to compare with LeJEPA.

The paper reports 91.9 linear top-1 on Imagenette with an inverse multiquadric kernel; here only the loss differs.
"""

from jepax.methods.kerjepa import KerJEPAConfig
from jepax.recipes.lejepa import lejepa_fashion_mnist
from jepax.recipes.registry import override, recipe, with_method
from jepax.training.config import Config


@recipe
def kerjepa_fashion_mnist() -> Config:
    """KerJEPA (MMD, Gaussian kernel) on Fashion-MNIST, as `lejepa_fashion_mnist` except for the loss."""
    return with_method(lejepa_fashion_mnist(), KerJEPAConfig)


@recipe
def kerjepa_imq_fashion_mnist() -> Config:
    """KerJEPA (KSD, inverse multiquadric kernel) on Fashion-MNIST, as `lejepa_fashion_mnist` except for the loss."""
    return override(kerjepa_fashion_mnist(), {"method.discrepancy": "ksd", "method.kernel": "imq"})
