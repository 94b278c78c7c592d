"""Linear probe of a frozen encoder: every setting is trained at once, and validation chooses."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jepax.distributed.sharding import shard_if_possible
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.features import Features
from jepax.evals.head_training import TrainViews, embed_augmented, loader_seed, without_labels
from jepax.evals.linear_heads import (
    CANDIDATE_INPUTS,
    LARS_BASE_BATCH,
    HeadHparams,
    LayerFeatures,
    LinearHeads,
    OptimizerName,
    ProbeInputs,
    RunningMoments,
    init_heads,
    init_moments,
    init_opt_states,
)
from jepax.evals.probe_sweep import (
    EXAMPLES_PER_CHUNK,
    SweepConstants,
    TrainSchedule,
    count_correct,
    head_logits,
    split_into_chunks,
    train_all_inputs_step,
    train_cached_epoch,
    update_input_moments,
)
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.evals.scoring import FittedProbe, TopKPredictions, check_labels, topk_classes
from jepax.types import UserError

BEST = "chosen"


@dataclass(frozen=True)
class ProbeConfig:
    """The sweep: every learning rate with every weight decay, with and without standardisation, on every input.

    The defaults reach logistic regression's accuracy in few passes over cached features; `PUBLISHED` is I-JEPA's.
    """

    rule: OptimizerName = "adamw"
    """Rule of the updates."""
    layers: tuple[Literal["last", "last four"], ...] = CANDIDATE_INPUTS
    """What the heads read: the last layer, or the last four side by side."""
    standardised: tuple[bool, ...] = (True, False)
    """Whether they read it standardised over the training split, as a BatchNorm without parameters would."""
    epochs: int = 30
    """Passes over the training split; a small split wants more, since the rate falls by the number of updates."""
    batch_size: int = 256
    """Examples per update, at most the number of training examples."""
    learning_rates: tuple[float, ...] = (2e-3, 1e-2, 5e-2)
    """First learning rates. adamw: as they are; lars: for 256 examples, and growing with the batch."""
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    """Weight decay, on weights and not on biases. adamw: decoupled, times the rate; lars: added to the gradient."""
    schedule: Literal["cosine", "step"] = "cosine"
    """The rate falls to zero by a cosine, or is divided by 10 after every 15 passes."""
    views: TrainViews = "centre"
    """Training views: cached centre crops, or crops drawn anew in each pass, which runs the encoder in each pass."""
    scale: tuple[float, float] = (0.08, 1.0)
    """views=augmented: smallest and largest share of the picture's area."""
    flip: float = 0.5
    """views=augmented: chance of a horizontal flip."""
    controls: bool = True
    """Whether the concatenation at one layer's width, and one layer at the concatenation's, are probed beside."""

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not (0 < self.scale[0] <= self.scale[1] <= 1):
            raise UserError(f"scale={self.scale} does not work: it needs 0 < low <= high <= 1; try (0.08, 1.0)")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip={self.flip} is no chance between 0 and 1; try 0.5")
        for name in ("layers", "standardised"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)} must hold at least one choice, and none twice")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError(f"learning_rates={self.learning_rates} must hold at least one number, all above 0")
        if not self.weight_decays or min(self.weight_decays) < 0:
            raise UserError(f"weight_decays={self.weight_decays} must hold at least one number, none below 0")


VISSL_PROBE = ProbeConfig(
    rule="lars",
    epochs=50,
    batch_size=16384,
    learning_rates=(0.01, 0.05, 0.001),
    weight_decays=(5e-4, 0.0),
    schedule="step",
    views="augmented",
)
"""I-JEPA's linear probe (Assran et al. 2023, appendix A).

Read into it, where the paper is silent: rates are for 256 images and grow with the batch, and crops take 8% of the area
at least, both as in VISSL, whose protocol it names. *Differs:* BatchNorm's statistics are those of the whole training
split, as a first pass of crops shows it, and not running averages. Batches are whole multiples of `eval.batch_size`,
which the encoder takes at once, and the examples of a pass's last, incomplete batch are left out.
"""


def linear_probe(
    train: EvalDataset,
    validation: EvalDataset,
    classes: int,
    config: ProbeConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> list[FittedProbe]:
    """Train every head, and choose by validation top-1 (the first of equals) over all, and for each input alone.

    The heads are inputs x {standardised, as they are} x learning rates x weight decays. The overall choice, which comes
    first, is among {last layer, last four side by side}. The other inputs are controls that tell whether four layers
    win by their width alone: the four brought to one layer's width by a random map, and the last layer brought to the
    width of four. After the choice nothing is trained again on both splits.

    **Raises** `UserError` if a split is empty or has a label out of range.
    """
    check_labels(train.labels, classes, "train")
    check_labels(validation.labels, classes, "validation")
    if config.views == "centre":
        train.features, validation.features  # noqa: B018 (embedded before the bar of the passes begins)
    with say.counting("linear probe", count_updates(train, config)) as done:
        sweep = LinearProbeSweep(train, classes, config, key, done)
        for epoch in range(config.epochs):
            sweep.train_pass(epoch)
    return sweep.fitted(validation)


def count_updates(train: EvalDataset, config: ProbeConfig) -> int:
    """Batches of all passes, and of the one before them that measures the statistics of augmented crops."""
    return (len(train) // batch_sizes(train, config)[0]) * (config.epochs + (config.views == "augmented"))


def batch_sizes(train: EvalDataset, config: ProbeConfig) -> tuple[int, int]:
    """Examples per update, and per batch that is read: augmented crops are embedded in pieces of the split's size."""
    size = min(config.batch_size, len(train))
    if config.views == "centre" or size <= train.batch_size:
        return size, size
    return size // train.batch_size * train.batch_size, train.batch_size


class LinearProbeSweep:
    """All heads of one encoder, and what trains them pass by pass."""

    def __init__(
        self,
        train: EvalDataset,
        classes: int,
        config: ProbeConfig,
        key: PRNGKeyArray,
        done: Callable[[int], None] = lambda batches: None,
    ):
        self.train, self.config, self.done, self.batches = train, config, done, 0
        key_maps, key_heads, self.key_order = jr.split(key, 3)
        size, self.piece = batch_sizes(train, config)
        self.course = TrainSchedule(config.rule, config.schedule, config.epochs, len(train) // size, size)
        self.grid = [
            {"standardised": flag, "learning_rate": rate, "weight_decay": decay}
            for flag, rate, decay in itertools.product(config.standardised, config.learning_rates, config.weight_decays)
        ]
        layers, _, dim = self._shape()
        self.inputs = ProbeInputs(layers, dim, config.layers, config.controls)
        self.basis = SweepConstants(self._settings(), self._moments(maps := self.inputs.maps(key_maps)), maps)
        self.state = {
            name: self._first(len(moments.mean), classes, jr.fold_in(key_heads, place))
            for place, (name, moments) in enumerate(self.basis.moments.items())
        }

    def _shape(self) -> tuple[int, int, int]:
        if self.config.views == "centre":
            return self.train.features.layers.shape
        images, _ = next(iter(self.train.pictures()))
        return eqx.filter_eval_shape(self.train.row, without_labels(images)).shape

    def _settings(self) -> HeadHparams:
        columns = zip(*(setting.values() for setting in self.grid), strict=True)
        standardised, rates, decays = (np.asarray(column, np.float32) for column in columns)
        grown = self.course.batch_size / LARS_BASE_BATCH if self.config.rule == "lars" else 1.0
        return HeadHparams(standardised, np.float32(grown) * rates, decays)

    def _first(self, dim: int, classes: int, key: PRNGKeyArray) -> tuple[LinearHeads, optax.OptState]:
        heads = init_heads(self.config.rule, len(self.grid), dim, classes, key)
        return heads, init_opt_states(self.config.rule, heads, self.basis.settings)

    def _moments(self, maps: dict[str, Array]) -> dict[str, RunningMoments]:
        """Of every input over the training split: of the cached features, or of crops as the first pass draws them."""
        moments = {name: init_moments(self.inputs.width(name)) for name in self.inputs.names}
        if self.config.views == "centre":
            parts = (
                (part, np.arange(part.shape[1]) < valid)
                for part, valid in split_into_chunks(self.train.features.layers)
            )
        else:
            parts = ((layers, np.ones(layers.shape[1], bool)) for layers, _ in self._crops(0))
        for layers, valid in parts:
            moments = update_input_moments(moments, layers, valid, maps)
            jax.block_until_ready(moments)  # or copies of every part would wait in line
        return moments

    def _crops(self, epoch: int) -> Iterator[tuple[LayerFeatures, Int[np.ndarray, "batch"]]]:
        """Features and labels of one pass's batches, in an order and of crops of its own; embedded piece by piece."""
        key_order, key_crops = jr.split(jr.fold_in(self.key_order, epoch))
        crop = replace(self.train.row.crop, scale=self.config.scale, flip=self.config.flip)
        pieces = self.course.batch_size // self.piece
        images = self.train.shuffled(self.piece, self.course.steps * pieces, loader_seed(key_order))
        for _ in range(self.course.steps):
            parts = [
                (embed_augmented(self.train.row, shard_if_possible(without_labels(part)), crop, key_crops), part.label)
                for part in itertools.islice(images, pieces)
            ]
            layers, labels = zip(*parts, strict=True)
            yield jnp.concatenate(layers, axis=1), np.concatenate(labels)
            self._told(1)

    def _told(self, batches: int) -> None:
        self.batches += batches
        self.done(self.batches)

    def train_pass(self, epoch: int) -> None:
        """Every head sees every example once, but for the last, incomplete batch; each pass has an order of its own."""
        if self.config.views == "centre":
            features, key = self.train.features, jr.fold_in(self.key_order, epoch)
            arrays = (features.on_device, features.labels, key)
            self.state = train_cached_epoch(self.state, *arrays, self.basis, course=self.course)
            jax.block_until_ready(self.state)
            self._told(self.course.steps)
            return
        for layers, labels in self._crops(epoch):
            self.state = train_all_inputs_step(self.state, layers, labels, self.basis, course=self.course)

    def fitted(self, validation: EvalDataset) -> list[FittedProbe]:
        """The best head of all candidates, and the best of each input."""
        tried = self._tried(validation.features)
        every = [setting for name in self.inputs.candidates for setting in tried[name]]
        answers = [self._answer(BEST, every)]
        return [*answers, *(self._answer(name, tried[name]) for name in tried)] if len(tried) > 1 else answers

    def _tried(self, features: Features) -> dict[str, list[dict[str, Any]]]:
        """Every head's setting and validation top-1, by input."""
        right = {name: np.zeros(len(self.grid), int) for name in self.state}
        for start, (part, valid) in zip(
            itertools.count(0, EXAMPLES_PER_CHUNK), split_into_chunks(features.layers), strict=False
        ):
            labels = np.full(part.shape[1], -1, np.int32)
            labels[:valid] = features.labels[start : start + valid]
            found = count_correct(self.state, part, labels, self.basis)
            right = {name: right[name] + np.asarray(found[name]) for name in right}
        share = {name: 100 * hits / len(features) for name, hits in right.items()}
        return {
            name: [
                {"layers": name, "head": head, **setting, "validation_top1": float(share[name][head])}
                for head, setting in enumerate(self.grid)
            ]
            for name in share
        }

    def _answer(self, name: str, tried: list[dict[str, Any]]) -> FittedProbe:
        chosen = max(tried, key=lambda setting: setting["validation_top1"])  # the first of equals
        layers, one = chosen["layers"], slice(chosen["head"], chosen["head"] + 1)
        heads, settings = (
            jax.tree.map(lambda leaf: leaf[one], tree) for tree in (self.state[layers][0], self.basis.settings)
        )

        def guess(split: EvalDataset) -> TopKPredictions:
            values = (
                head_logits(part, heads, settings, self.basis, name=layers)[:valid]
                for part, valid in split_into_chunks(split.features.layers)
            )
            return np.concatenate([topk_classes(part) for part in values])

        return FittedProbe(name, guess, chosen, format_hparams(chosen), tried)


def format_hparams(setting: dict[str, Any]) -> str:
    scaling = "standardised" if setting["standardised"] else "as they are"
    return f"{setting['layers']}, {scaling}, lr {setting['learning_rate']:g}, wd {setting['weight_decay']:g}"
