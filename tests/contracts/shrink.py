"""Any recipe at a size that a test can train: the same method and settings, tiny networks, generated pictures."""

from dataclasses import replace

from jepax.data import DataConfig
from jepax.recipes import RECIPES
from jepax.train import Config, TrainConfig

SIDE, PATCH, BATCH = 24, 4, 16


def shrunk(name: str, **method: object) -> Config:
    """A recipe on 24x24 pictures cut into 6x6 patches. Precision is float32, as on every CPU."""
    config = RECIPES[name]()
    encoder = replace(config.method.encoder, patch_size=PATCH, width=32, depth=2, heads=2)
    changes = {"encoder": encoder, "crop": replace(config.method.crop, size=(SIDE, SIDE))}
    if hasattr(config.method, "predictor"):
        changes["predictor"] = replace(config.method.predictor, width=16, depth=2, heads=2)
    if hasattr(config.method, "masks"):
        changes["masks"] = replace(config.method.masks, context=6)
    data = DataConfig(source="synthetic", canvas=SIDE, channels=encoder.channels, synthetic_images=80, validation=0.2)
    return replace(
        config,
        method=replace(config.method, **changes | method),
        data=data,
        optim=replace(config.optim, warmup_epochs=0.1),
        train=TrainConfig(batch_size=BATCH, steps=6, log_every=2, save_every=4),
    )


def distinct() -> dict[str, Config]:
    """The shrunk recipes, each setting once, under the names of all the recipes that shrink to it."""
    configs: dict[Config, list[str]] = {}
    for name in sorted(RECIPES):
        configs.setdefault(replace(shrunk(name), recipe="shrunk"), []).append(name)
    return {"+".join(names): config for config, names in configs.items()}
