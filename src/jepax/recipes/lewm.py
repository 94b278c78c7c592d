"""LeWorldModel (arXiv:2603.19312) in Two-Room: at 32 px for two CPU cores, and as published.

The published weight of SIGReg is 0.09 with batches of 128, and it grows with the batch: what acts at 32 px is 0.02 with
batches of 64. Too much of it folds the embedding of so small a world: distances between embeddings then say little
about distances in the room, and plans to far goals in one room fail in spite of good predictions. At these settings
some of that is left: docs/world_models.md and docs/log.md have the scores.
"""

from jepax.data import DataConfig
from jepax.evals.planning import PlanConfig
from jepax.evals.protocols import EvalConfig
from jepax.methods.lewm import LeWMConfig
from jepax.nn import CausalPredictorConfig, ViTConfig
from jepax.optim import OptimConfig
from jepax.recipes.registry import override, recipe
from jepax.training.config import Config, TrainConfig


@recipe
def lewm_two_room() -> Config:
    """LeWorldModel in Two-Room at 32 px: 2,000 episodes, 2,000 steps; a few minutes on two CPU cores.

    Success of one seed: published 98.5, same region 52.0, other region 99.0 (random policy 29, 1, 4).
    """
    encoder = {"patch_size": 16, "width": 64, "depth": 2, "num_heads": 4}
    return Config(
        method=LeWMConfig(
            encoder=ViTConfig(**encoder, class_token=True, learned_grid=(2, 2)),
            predictor=CausalPredictorConfig(width=16, depth=2, num_heads=4, head_width=16, mlp_width=128),
            embed_dim=16,
            head_dim=256,
            sigreg_weight=0.02,
            num_slices=128,
        ),
        data=DataConfig(dataset="two_room", canvas_size=32),
        optim=adamw(peak_lr=3e-4, warmup_epochs=0.08),
        train=TrainConfig(batch_size=64, steps=2000, log_every_steps=50),
        eval=EvalConfig(protocols=("plan",)),
    )


@recipe
def lewm_two_room_224() -> Config:
    """LeWorldModel in Two-Room as published: ViT-tiny at 224 px, 10,000 episodes, 10 epochs. Reported success: 87.

    Ours: whole episodes are held out, not clips.
    """
    changes = {
        "method": LeWMConfig(),
        "data.canvas_size": 224,
        "data.num_episodes": 10_000,
        "optim": adamw(peak_lr=5e-5, warmup_epochs=0.1),
        "train": TrainConfig(batch_size=128, epochs=10.0),
        "eval.plan": PlanConfig(num_samples=300, num_iterations=30, num_elites=30, window=3),
    }
    return override(lewm_two_room(), changes)


def adamw(*, peak_lr: float, warmup_epochs: float) -> OptimConfig:
    """AdamW as published: weight decay 1e-3, gradients clipped at norm 1, warm-up from 0, cosine to 0."""
    return OptimConfig(
        peak_lr=peak_lr,
        start_lr=0.0,
        final_lr=0.0,
        warmup_epochs=warmup_epochs,
        weight_decay=1e-3,
        weight_decay_schedule="constant",
        grad_clip_norm=1.0,
    )
