"""I-JEPA on Fashion-MNIST in plain JAX and optax: no trainer, no config files. Under three minutes on two CPU cores.

    python examples/ijepa_from_scratch.py
    python examples/ijepa_from_scratch.py --steps 3000

Trains a small vision transformer without labels, then classifies test images by their nearest neighbors among training
images, in the space of its features. Two baselines are scored the same way: raw pixels and the untrained encoder.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import islice

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jepax.data import DataConfig, ImageSource, batches, iter_once, open_source
from jepax.masking import MultiBlockConfig
from jepax.methods.ema import EMAConfig
from jepax.methods.ijepa import IJEPA, IJEPAConfig
from jepax.methods.regularizer import RegularizerConfig
from jepax.nn import PredictorConfig, ViTConfig
from jepax.optim import matrix_mask
from jepax.trees import trainable
from jepax.views import CropConfig, center_crop

# The method. Every image becomes one random crop of 28 x 28 pixels, cut into 4 x 4 patches. The context encoder sees 4
# patches. The predictor guesses what the target encoder computes for 2 hidden blocks, of 4 to 8 patches each.
CROP = CropConfig(size=(28, 28), scale=(0.4, 1.0), mean=(0.286,), std=(0.353,), eval_resize_ratio=1.0)
METHOD = IJEPAConfig(
    encoder=ViTConfig(patch_size=7, in_channels=1, width=192, depth=3, num_heads=3, init_std=None),
    predictor=PredictorConfig(width=96, depth=2, num_heads=3, init_std=None),
    masks=MultiBlockConfig(
        num_targets=2, target_scale=(0.25, 0.5), context_scale=(1.0, 1.0), num_context_patches=4, grid_margin=0
    ),
    crop=CROP,
    ema=EMAConfig(start=0.99),
    regularizer=RegularizerConfig(name="vicreg", weight=2e-3),
)
BATCH_SIZE, PEAK_LR, WEIGHT_DECAY = 64, 4e-3, 0.05
Step = Callable[..., tuple[IJEPA, optax.OptState, jax.Array]]


def make_train_step(optimizer: optax.GradientTransformation) -> Step:
    """One update as one compiled program."""

    @eqx.filter_jit(donate="all-except-first")
    def train_step(batch, method, opt_state, key, step):
        # Everything is trained except what is inside an `EMA`: here the target encoder.
        params, frozen = eqx.partition(method, trainable(method))

        # Forward and backward. `loss` draws crops and masks from `key`, runs the networks, and compares.
        def loss_fn(params):
            return eqx.combine(params, frozen).loss(batch, key=key)

        (loss, metrics), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(params)

        # The optimizer.
        updates, opt_state = optimizer.update(grads, opt_state, params)
        method = eqx.combine(eqx.apply_updates(params, updates), frozen)

        # The target encoder follows the context encoder, slowly.
        method, _ = method.after_update(step, metrics)
        return method, opt_state, loss

    return train_step


def train(source: ImageSource, steps: int, seed: int = 0) -> IJEPA:
    """Train for `steps` steps."""
    method = METHOD.build(total_steps=steps, key=jr.key(seed))

    # Muon for the blocks' matrices, stacked as (layers, in, out), and AdamW for the rest. In so few steps AdamW
    # alone, without a regularizer, scored below the untrained encoder: docs/log.md.
    def matrices(params):
        return jax.tree.map(lambda is_matrix: MuonDimensionNumbers(1, 2) if is_matrix else None, matrix_mask(params))

    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, max(steps // 10, 1), steps)
    optimizer = muon(schedule, weight_decay=WEIGHT_DECAY, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)

    # The optimizer sees the trainable part alone.
    opt_state = optimizer.init(eqx.filter(method, trainable(method)))
    train_step = make_train_step(optimizer)

    # A batch depends on the seed and the step's number alone, and so do the step's random numbers.
    for step, batch in enumerate(batches(source, batch_size=BATCH_SIZE, steps=steps, seed=seed)):
        key = jr.fold_in(jr.key(seed + 1), step)
        method, opt_state, loss = train_step(batch, method, opt_state, key, jnp.int32(step))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss:.3f}")
    return method


def extract(features: Callable[..., jax.Array], source: ImageSource, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of the first `limit` images, each cropped at its center, and their labels."""
    run = eqx.filter_jit(lambda batch: features(center_crop(batch, CROP)))
    found = [np.asarray(run(batch))[:count] for batch, count in islice(iter_once(source, 250), -(-limit // 250))]
    found = np.concatenate(found)[:limit]
    return found, source.labels[: len(found)]


def knn_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], k: int = 20) -> float:
    """Percentage of test images whose class wins the vote of the `k` nearest training images, by cosine."""
    (keys, key_labels), (queries, labels) = train, test
    keys, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (keys, queries))
    similarity, nearest = jax.lax.top_k(queries @ keys.T, k)
    votes = jax.nn.one_hot(key_labels[nearest], key_labels.max() + 1) * jnp.exp(similarity / 0.07)[..., None]
    return 100 * float(np.mean(np.argmax(votes.sum(1), axis=1) == labels))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--dataset", choices=["fashion_mnist", "synthetic"], default="fashion_mnist")
    args = parser.parse_args(argv)
    data = DataConfig(dataset=args.dataset, canvas_size=28, channels=1)
    train_source, test_source = open_source(data, "train"), open_source(data, "test")

    # Train. Labels are not read: no method's loss sees them.
    method = train(train_source, args.steps)
    untrained = METHOD.build(total_steps=args.steps, key=jr.key(0))

    # Score the frozen features: the mean over an image's patches.
    rows = {
        "trained encoder": lambda x: method.target_encoder.average(x).mean(1),
        "untrained encoder": lambda x: untrained.target_encoder.average(x).mean(1),
        "raw pixels": lambda x: x.reshape(len(x), -1),
    }
    scores = {}
    for name, features in rows.items():
        scores[name] = knn_accuracy(extract(features, train_source, 10_000), extract(features, test_source, 2_000))
    print("\nkNN, test top-1 (%)")
    for name, score in scores.items():
        print(f"  {name:<18} {score:.1f}")
    return scores


if __name__ == "__main__":
    main()
