"""Methods: one method, one file. Importing this package registers what every file here defines."""

import importlib
import pkgutil

from jepax.methods.base import ImageMethod, ImageMethodConfig, Method, MethodConfig, WorldModel

# No list of methods to maintain: a config registers itself by its `name` when its file is imported.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["ImageMethod", "ImageMethodConfig", "Method", "MethodConfig", "WorldModel"]
