"""jepax: Joint-Embedding Predictive Architectures in JAX and Equinox.

    train           run a `Config` in a folder, or resume it there
    Config          everything that a run depends on; `recipes.RECIPES` has those of named experiments
    recipes         the named experiments: functions that return a `Config`
    load_encoder    a trained encoder, exported by `jepax export` or by others in the same format
    Method          the contract of a method, and MethodConfig that of its settings;
                    ImageMethod and ImageMethodConfig: those whose encoder can be evaluated, drawn and exported
    ImageBatch      a batch of images, as methods read it
    IJEPAConfig, LeJEPAConfig, ...
                    the methods of `jepax.methods`, by their settings: `IJEPAConfig().build(total_steps=1000, key=key)`

`import jepax` loads nothing else: each name is imported when it is first used. To read the code, start at
`training/step.py` and `methods/ijepa.py`.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "Config": "training.config",
    "ImageBatch": "types",
    "ImageMethod": "methods",
    "ImageMethodConfig": "methods",
    "Method": "methods",
    "MethodConfig": "methods",
    "load_encoder": "export.weights",
    "recipes": "recipes",
    "train": "training.loop",
}
"""Module of each public name."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        return getattr(module, name, module)  # `recipes` is a module itself
    if name.endswith("Config"):  # a method's, which its file registers: a new method needs no change here
        registry = importlib.import_module(f"{__name__}.methods").MethodConfig.registry
        for config in registry.values():
            if config.__name__ == name:
                return config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
