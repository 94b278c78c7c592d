"""jepax: Joint-Embedding Predictive Architectures in JAX and Equinox.

    train           run a `Config` in a folder, or resume it there
    Config          everything that a run depends on; `recipes.RECIPES` has those of named experiments
    recipes         the named experiments: functions that return a `Config`
    load_encoder    a trained encoder, exported by `jepax export` or by others in the same format
    Method          the contract of a method, and MethodConfig that of its settings;
                    ImageMethod and ImageMethodConfig: those whose encoder can be evaluated, drawn and exported
    ImageBatch      a batch of images, as methods read it
    IJEPAConfig, IJEPADenseConfig, IJEPANoTeacherConfig, LeJEPAConfig, KerJEPAConfig, RectifiedLpJEPAConfig,
    VICRegConfig, VISRegConfig, BYOLConfig
                    the methods, by their settings: `IJEPAConfig().build(total_steps=1000, key=key)`

`import jepax` loads nothing else: each name is imported when it is first used. To read the code, start at
`training/step.py` and `methods/ijepa.py`.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "BYOLConfig": "methods.byol",
    "Config": "training.config",
    "IJEPAConfig": "methods.ijepa",
    "IJEPADenseConfig": "methods.ijepa_dense",
    "IJEPANoTeacherConfig": "methods.ijepa_no_teacher",
    "ImageBatch": "types",
    "ImageMethod": "methods",
    "ImageMethodConfig": "methods",
    "KerJEPAConfig": "methods.kerjepa",
    "LeJEPAConfig": "methods.lejepa",
    "Method": "methods",
    "MethodConfig": "methods",
    "RectifiedLpJEPAConfig": "methods.rectified_lpjepa",
    "VICRegConfig": "methods.vicreg",
    "VISRegConfig": "methods.visreg",
    "load_encoder": "export.weights",
    "recipes": "recipes",
    "train": "training.loop",
}
"""Module of each public name."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name, module)  # `recipes` is a module itself


def __dir__() -> list[str]:
    return [*globals(), *__all__]
