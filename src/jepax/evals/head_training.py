"""What protocols share that keep no features: crops drawn on the device, steps over a stream, guesses by batches."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Real

from jepax import schedules
from jepax.distributed.sharding import shard_if_possible
from jepax.evals.eval_dataset import EvalDataset, random_subset
from jepax.evals.feature_extractor import FeatureExtractor, ViewBatch
from jepax.evals.scoring import NO_CLASS, topk_classes
from jepax.optim import weight_decay_mask
from jepax.types import ImageBatch, UserError
from jepax.views import CropConfig, center_crop, random_resized_crop

TrainViews = Literal["centre", "augmented"]
State = TypeVar("State")
ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


@runtime_checkable
class HeadTrainingConfig(Protocol):
    """The fields that every streamed protocol's config has; `check_training` says what they may hold."""

    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    warmup: float
    scale: tuple[float, float]
    flip: float


def check_field(protocol: str, config: Any, field: str, holds: bool, need: str) -> None:
    """**Raises** `UserError` with the field and its value unless it `holds`."""
    if not holds:
        raise UserError(f"{protocol}.{field}={getattr(config, field)!r} does not work: it needs {need}")


def check_head_training(protocol: str, config: HeadTrainingConfig) -> None:
    """**Raises** `UserError` at the first field of `Training` whose value cannot work."""
    ok, rates, scale = partial(check_field, protocol, config), config.learning_rates, config.scale
    ok("epochs", config.epochs >= 1, "at least 1 pass over the training split")
    ok("batch_size", config.batch_size >= 1, "at least 1 example")
    ok("learning_rates", len(rates) > 0 and min(rates) > 0, "at least one number, all above 0")
    ok("warmup", 0 <= config.warmup < 1, "a share of the steps in [0, 1); try 0.1")
    ok("scale", len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "0 < low <= high <= 1; try (0.3, 1.0)")
    ok("flip", 0 <= config.flip <= 1, "a chance between 0 and 1; try 0.5")


def batch_size_and_steps(config: HeadTrainingConfig, examples: int) -> tuple[int, int]:
    """Examples per batch, at most those there are, and steps: the passes laid end to end, less an incomplete batch."""
    size = min(config.batch_size, examples)
    return size, config.epochs * examples // size


def loader_seed(key: PRNGKeyArray) -> int:
    """The order of examples that belongs to a key."""
    return int(jr.randint(key, (), 0, 2**31 - 1))


def augment(images: ImageBatch, key: PRNGKeyArray, crop: CropConfig) -> ViewBatch:
    """Random resized crops, perhaps flipped; example i draws from `fold_in(key, images.index[i])`.

    An index is a place in the whole run's order, so the same picture is cut in another way at each pass.
    """
    keys = jax.vmap(lambda index: jr.fold_in(key, index))(images.index)
    return random_resized_crop(images, keys, crop)


def make_train_view(
    views: TrainViews, images: ImageBatch, key: PRNGKeyArray, crop: CropConfig, config: HeadTrainingConfig
) -> ViewBatch:
    """What a training step embeds: the centre view of evaluation, or a crop by the config's `scale` and `flip`."""
    if views == "centre":
        return center_crop(images, crop)
    return augment(images, key, replace(crop, scale=config.scale, flip=config.flip))


def without_labels(images: ImageBatch) -> ImageBatch:
    """The batch as an encoder may see it."""
    return replace(images, label=None)


def lr_scale(config: HeadTrainingConfig, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """Share of the peak learning rate at a step counted from 0: a linear rise, then a cosine that ends near 0."""
    warmup = round(config.warmup * steps)
    return schedules.warmup_cosine(step + 1, start=0.0, peak=1.0, final=0.0, warmup=warmup, total=steps + 1)


def adamw_update(
    grads: PyTree, moments: optax.OptState, params: PyTree, rates: PyTree, weight_decay: Real[Array, ""] | float
) -> tuple[PyTree, optax.OptState]:
    """The parameters after p <- p - rate (adam(g) + weight_decay p), where biases and norms are not decayed.

    `rates`: a number or an array for each array of `params`, which it broadcasts to.
    """
    directions, moments = ADAM.update(grads, moments)

    def moved(param: Array, direction: Array, rate: Array | float, is_decayed: bool) -> Array:
        return param - rate * (direction + weight_decay * param if is_decayed else direction)

    return jax.tree.map(moved, params, directions, rates, weight_decay_mask(params)), moments


def run_head_training(
    step: Callable[[State, ImageBatch], tuple[State, Array]],
    state: State,
    batches: Iterable[ImageBatch],
    done: Callable[[int], None],
) -> State:
    """The state after one step for each batch. The host is never more than one step ahead of the device."""
    previous = None
    for count, images in enumerate(batches, 1):
        state, loss = step(state, shard_if_possible(images))
        if previous is not None:
            jax.block_until_ready(previous)
        previous = loss
        done(count)
    return state


@partial(jax.jit, static_argnames=("rest",))
def _predict_batch(arrays: PyTree, images: ImageBatch, *, rest: PyTree) -> Float[Array, "*_ batch classes"]:
    return eqx.combine(arrays, rest)(images)


def predict(function: Callable[[ImageBatch], Float[Array, "*_ batch classes"]], split: EvalDataset) -> np.ndarray:
    """The guesses of every example of a split, in order; leading axes, such as one of heads, stay: `*_ n guesses`.

    `function` gives each class's value for the pictures of a batch and does not see the labels. It is compiled once for
    all splits; give it as an Equinox module or `eqx.Partial`: the arrays of a plain closure would be compiled in.

    **Raises** `UserError` if the split is empty.
    """
    arrays, rest = eqx.partition(function, eqx.is_array)
    parts, waiting = [], None
    for images, valid in split.pictures():
        ahead = _predict_batch(arrays, shard_if_possible(without_labels(images)), rest=rest), valid
        if waiting is not None:  # fetched one batch late, so that the device works while the host sorts
            parts.append(_topk_valid(*waiting))
        waiting = ahead
    if waiting is None:
        raise UserError("no batches to classify: the split is empty; choose another split or source")
    return np.concatenate([*parts, _topk_valid(*waiting)], axis=-2)


def _topk_valid(values: Float[Array, "*_ batch classes"], valid: int) -> np.ndarray:
    values = np.asarray(values, np.float32)[..., :valid, :]
    return topk_classes(values.reshape(-1, values.shape[-1])).reshape(*values.shape[:-1], -1)


@eqx.filter_jit
def embed_augmented(
    row: FeatureExtractor, images: ImageBatch, crop: CropConfig, key: PRNGKeyArray
) -> Float[Array, "layers batch dim"]:
    """Pooled features of random crops."""
    return row.pooled(augment(images, key, crop))


def crop_features(
    split: EvalDataset, pictures: int, crops: int, key: PRNGKeyArray
) -> Float[np.ndarray, "pictures crops dim"]:
    """The last layer's features of several random crops, by the row's own settings, of some pictures or of all."""
    few = EvalDataset(split.row, random_subset(split.source, pictures), split.batch_size, **split.reading)
    drawn = []
    for images, valid in few.pictures():
        layers = [
            embed_augmented(few.row, shard_if_possible(without_labels(images)), few.row.crop, k)
            for k in jr.split(key, crops)
        ]
        drawn.append(np.stack([np.asarray(each[-1])[:valid] for each in layers], axis=1))
    return np.concatenate(drawn)


def check_any_prediction(guesses: np.ndarray, protocol: str) -> None:
    """**Raises** `UserError` where no class was named for any example: accuracies of that would be meaningless."""
    if np.all(guesses == NO_CLASS):
        raise UserError(
            f"{protocol}: no value of any class is finite; the encoder has diverged, its input holds NaN,\n"
            f"or every one of {protocol}.learning_rates is too high. Look at the loss in metrics.jsonl."
        )
