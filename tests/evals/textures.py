"""Pictures of four textures, which neither crops nor mirrors confuse, before an untrained little encoder."""

import functools

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

from jepax.data.sources import ArraySource
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.feature_extractor import ViTFeatures
from jepax.nn import ViT, ViTConfig
from jepax.views import CropConfig

CLASSES, SIDE, BATCH = 4, 24, 32
CROP = CropConfig(size=(SIDE, SIDE), mean=(0.5,), std=(0.25,), eval_resize_ratio=1.0)


def source(examples: int, seed: int) -> ArraySource:
    """Stripes along either side, squares, or none, in noise; classes are about equally frequent."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, examples).astype(np.int32)
    y, x = (axis // 3 % 2 for axis in np.mgrid[:SIDE, :SIDE])
    textures = 255 * np.stack([y, x, y ^ x, np.zeros_like(y)])
    noisy = textures[labels] * 0.5 + rng.integers(0, 100, (examples, SIDE, SIDE))
    names = tuple(str(label) for label in range(CLASSES))
    return ArraySource((SIDE, SIDE, 1), names, labels, noisy.astype(np.uint8)[..., None])


@functools.lru_cache
def row(seed: int = 0) -> ViTFeatures:
    config = ViTConfig(patch_size=4, in_channels=1, width=32, depth=2, num_heads=2, init_std=None)
    return ViTFeatures(eqx.filter_jit(lambda key: ViT(config, key=key))(jr.key(seed)), CROP)


def split(frozen, examples: int, seed: int) -> EvalDataset:
    return EvalDataset(frozen, source(examples, seed), BATCH)


def majority(labels: np.ndarray) -> float:
    return 100 * np.bincount(labels).max() / len(labels)


def arrays(tree) -> list[np.ndarray]:
    """Copies that no donation can reach."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]
