"""Any recipe at a size that a test can train: the same method and settings, tiny networks, generated pictures."""

from dataclasses import replace

from jepax.data import DataConfig
from jepax.io import config_yaml as configs
from jepax.io.checkpointer import CheckpointConfig
from jepax.nn import PredictorConfig
from jepax.recipes import RECIPES
from jepax.training.config import Config, TrainConfig
from jepax.views import ColorConfig, CropConfig, MultiCropConfig

SIDE, PATCH, BATCH = 24, 4, 16


def shrunk(name: str, **method: object) -> Config:
    """A recipe on 24x24 pictures cut into 6x6 patches. Precision is float32, as on every CPU."""
    config = RECIPES[name]()
    encoder = replace(config.method.encoder, patch_size=PATCH, width=32, depth=2, heads=2)
    changes = {"encoder": encoder}
    if hasattr(config.method, "views"):
        changes["encoder"] = encoder = replace(encoder, channels=3)
        changes["views"] = MultiCropConfig(
            globals=2,
            global_crop=CropConfig(size=(SIDE, SIDE), flip=0.5),
            locals=min(config.method.views.locals, 2),
            local_crop=CropConfig(size=(SIDE // 2, SIDE // 2), scale=(0.05, 0.3)),
            photometric=ColorConfig(jitter=0.8),
        )
        changes["projector"] = replace(config.method.projector, hidden=(24,), width=8)
    else:
        changes["crop"] = replace(config.method.crop, size=(SIDE, SIDE))
    if hasattr(config.method, "directions"):
        changes["directions"] = 16
    if isinstance(getattr(config.method, "predictor", None), PredictorConfig):
        changes["predictor"] = replace(config.method.predictor, width=16, depth=2, heads=2)
    elif hasattr(config.method, "predictor"):
        changes["predictor"] = replace(config.method.predictor, hidden=(24,), width=8)
    if getattr(config.method, "layers", None):
        changes |= {"layers": (1, 2), "layer_weights": config.method.layer_weights[-2:]}
    if hasattr(config.method, "regulariser") and config.method.regulariser.kind in ("sigreg", "rdmreg", "visreg"):
        changes["regulariser"] = replace(config.method.regulariser, directions=16)
    if hasattr(config.method, "masks"):
        changes["masks"] = replace(config.method.masks, context=6)
    data = DataConfig(source="synthetic", canvas=SIDE, channels=encoder.channels, synthetic_images=80, validation=0.2)
    return replace(
        config,
        method=replace(config.method, **changes | method),
        data=data,
        optim=replace(config.optim, warmup_epochs=0.1),
        train=TrainConfig(batch_size=BATCH, steps=6, log_every=2, save=CheckpointConfig(every=4)),
    )


def structure(config: Config) -> frozenset:
    """The shrunk method without its numbers: recipes that share it run the same program."""
    flat = configs.flatten(config.method)
    kept = {path: value for path, value in flat.items() if not path.endswith("init_std")}
    return frozenset((path, value != 0 if isinstance(value, float) else str(value)) for path, value in kept.items())


def distinct() -> dict[str, Config]:
    """The shrunk recipes, one of each structure, under the names of all the recipes that share it."""
    found: dict[frozenset, list[str]] = {}
    for name in sorted(RECIPES):
        found.setdefault(structure(shrunk(name)), []).append(name)
    return {"+".join(names): shrunk(names[0]) for names in found.values()}
