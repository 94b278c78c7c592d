"""Methods: one method, one file."""

from jepax.methods.base import AbstractMethod, MethodConfig
from jepax.methods.ijepa import IJEPA, IJEPAConfig, MomentumConfig

__all__ = ["IJEPA", "AbstractMethod", "IJEPAConfig", "MethodConfig", "MomentumConfig"]
