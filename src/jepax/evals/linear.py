"""Linear probe of a frozen encoder: all settings are trained together, and validation chooses among them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np

from jepax.evals.checks import check_training
from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.feature_extractor import LayerChoice, TrainViews
from jepax.evals.features import Features, chunks, empty_aligned, extract_features, map_chunks
from jepax.evals.head_training import HeadHparams, OptimizerName, TrainSchedule, init_heads, train_cached_epoch
from jepax.evals.linear_heads import (
    CANDIDATES,
    CONTROLS,
    INPUTS,
    LinearTask,
    ProbeInputs,
    RunningMoments,
    add_moments,
    predict_all,
    random_projections,
)
from jepax.evals.scoring import FittedProbe, ProtocolData, TopKPredictions, best_trial
from jepax.types import Int

BASE_BATCH = 256
"""LARS's learning rates are for this batch size and scale linearly with it (Goyal et al. 2017, arXiv:1706.02677)."""
MAX_CACHED_BYTES = 4 * 2**30
"""The controls' projections of cached features are computed once if they fit in this memory, else in every step."""


@dataclass(frozen=True)
class LinearConfig:
    """The sweep: every learning rate with every weight decay, with and without standardization, on every input.

    The defaults reach the accuracy of logistic regression in few passes over cached features; `PUBLISHED` is I-JEPA's.
    """

    optimizer: OptimizerName = "adamw"
    """Optimizer."""
    layers: tuple[LayerChoice, ...] = CANDIDATES
    """Input of the heads: the last layer, or the concatenation of the last four."""
    standardize: tuple[bool, ...] = (True, False)
    """Standardizes the input over the training split, as a BatchNorm without parameters would."""
    epochs: int = 30
    """Passes over the training split; a small split needs more, since the schedule counts updates."""
    batch_size: int = 256
    """Examples per update, at most the number of training examples."""
    learning_rates: tuple[float, ...] = (2e-3, 1e-2, 5e-2)
    """Initial learning rates. lars: for 256 examples, and scaled linearly with the batch size."""
    weight_decays: tuple[float, ...] = (0.0, 0.1)
    """Weight decay, on weights and not on biases. adamw: decoupled, times the rate; lars: added to the gradient."""
    schedule: Literal["cosine", "step"] = "cosine"
    """The learning rate falls to 0 by a cosine, or is divided by 10 after every 15 epochs."""
    train_views: TrainViews = "center"
    """Training views: center crops, embedded once, or new random crops, embedded in each epoch."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """train_views=augmented: smallest and largest fraction of the image's area that a crop takes."""
    hflip_prob: float = 0.5
    """train_views=augmented: probability of a horizontal flip."""
    width_controls: bool = True
    """Also probes the last four layers at the width of one, and the last layer at the width of four."""

    def __post_init__(self):
        check, decays = check_training("linear", self), self.weight_decays
        for name in ("layers", "standardize"):
            values = getattr(self, name)
            check(name, 0 < len(values) == len(set(values)), "at least one choice, and none twice")
        check("weight_decays", len(decays) > 0 and min(decays) >= 0, "at least one number, none below 0")


PUBLISHED = LinearConfig(
    optimizer="lars",
    epochs=50,
    batch_size=16384,
    learning_rates=(0.01, 0.05, 0.001),
    weight_decays=(5e-4, 0.0),
    schedule="step",
    train_views="augmented",
)
"""I-JEPA's linear probe (Assran et al. 2023, appendix A).

Where the paper is silent we follow VISSL, whose protocol it names: learning rates are for 256 images and scale with the
batch, and crops take at least 8% of the area. *Differs:* BatchNorm's statistics are those of one pass of crops over the
training split, not running averages. The examples of an epoch's last, incomplete batch are left out.
"""


def linear(data: ProtocolData, config: LinearConfig) -> list[FittedProbe]:
    """Trains every head. Returns the best by validation top-1, named "best", and then the best for each input.

    The heads are inputs x {standardized, raw} x learning rates x weight decays. "best" is the best on {last layer,
    last four layers}. The other inputs are controls: they test whether four layers win by their width alone. Nothing
    is trained again on both splits after the choice.
    """
    examples = len(data.train)
    if config.train_views == "center":
        # Features are computed at the first access and cached: here, so that their progress bar comes first.
        data.train.features  # noqa: B018
    with data.progress.bar("linear probe", config.epochs * examples) as update:
        sweep = LinearProbeSweep(data, config, update)
        for epoch in range(config.epochs):
            sweep.train_epoch(epoch)
            update((epoch + 1) * examples)
    return sweep.choose(data.validation)


class LinearProbeSweep:
    """All heads on one extractor, and their training epoch by epoch."""

    def __init__(
        self, data: ProtocolData, config: LinearConfig, on_example: Callable[[int], None] = lambda count: None
    ):
        self.dataset, self.config, self.on_example = data.train, config, on_example
        key_projections, key_heads, self.key_order = jr.split(data.key, 3)
        self.grid = [
            {"standardize": flag, "learning_rate": rate, "weight_decay": decay}
            for flag, rate, decay in itertools.product(config.standardize, config.learning_rates, config.weight_decays)
        ]

        # Inputs: an extractor of one layer has only the last one, and no controls. The moments of every input, for its
        # standardization, take one pass over the features.
        self.features = self._embed(0)
        layers, examples, dim = self.features.layers.shape
        self.candidates = config.layers if layers > 1 else CANDIDATES[:1]
        names = (*self.candidates, *(CONTROLS if config.width_controls and layers > 1 else ()))
        widths = {"last": dim, "last four": layers * dim}
        projections = random_projections(names, widths, key_projections)
        moments = {name: RunningMoments.zeros(widths[INPUTS[name].width]) for name in names}
        moments, self.cached = self._pass(moments, projections)

        # Hyper-parameters of the heads, one array for each column of the grid: the heads are one axis of every array.
        size = min(config.batch_size, examples)
        steps = examples // size
        schedule = TrainSchedule(config.optimizer, config.schedule, size, steps, config.epochs * steps)
        columns = zip(*(setting.values() for setting in self.grid), strict=True)
        standardized, rates, decays = (np.asarray(column, np.float32) for column in columns)
        scale = np.float32(size / BASE_BATCH if config.optimizer == "lars" else 1.0)
        hparams = HeadHparams(scale * rates, decays)
        self.task = LinearTask(hparams, standardized, moments, projections, schedule, data.classes)
        self.state = init_heads(self.task, key_heads)

    def _embed(self, epoch: int) -> Features:
        """Cached features of the center views, or the features of new crops for each epoch."""
        dataset, config, done = self.dataset, self.config, epoch * len(self.dataset)
        if config.train_views == "center":
            return dataset.features
        crop = replace(dataset.extractor.crop, scale=config.crop_scale, hflip_prob=config.hflip_prob)

        # New crops in each epoch, by another key than the epoch's order has (`train_epoch`).
        key = jr.fold_in(jr.fold_in(self.key_order, epoch), 1)
        embed = partial(dataset.extractor.of_crops, key=key, crop=crop)
        return extract_features(embed, dataset.images(), dataset.labels, lambda count: self.on_example(done + count))

    def _pass(
        self, moments: dict[str, RunningMoments], projections: dict[str, Any]
    ) -> tuple[dict[str, RunningMoments], ProbeInputs]:
        """One pass over the features: the moments of every input, and the controls' inputs if they can be cached."""
        # Features of crops change in each epoch, so only those of center views are worth a cache. 4 bytes per number.
        shapes = {name: (len(self.features), projection.shape[1]) for name, projection in projections.items()}
        size = sum(4 * rows * width for rows, width in shapes.values())
        can_cache = self.config.train_views == "center" and size <= MAX_CACHED_BYTES
        cached = {name: empty_aligned(shape) for name, shape in shapes.items()} if can_cache else {}

        # The last chunk is padded to the size of the others; its padding counts in no moment.
        for part, rows in chunks(self.features.layers):
            valid = rows.stop - rows.start
            moments, projected = add_moments(moments, part, np.arange(part.shape[1]) < valid, projections)
            for name, values in cached.items():
                values[rows] = np.asarray(projected[name])[:valid]
            jax.block_until_ready(moments)  # otherwise copies of every part would wait in memory
        return moments, jax.device_put(cached, may_alias=True)

    def train_epoch(self, epoch: int) -> None:
        """Shows every head every example once, except the last, incomplete batch; each epoch has its own order."""
        if epoch and self.config.train_views == "augmented":
            self.features = None  # frees the crops of the epoch before
            self.features = self._embed(epoch)
        inputs, key = (self.features.on_device, self.cached), jr.fold_in(self.key_order, epoch)
        self.state = train_cached_epoch(self.state, self.task, inputs, self.features.labels, key)
        jax.block_until_ready(self.state)

    def choose(self, validation: EvalDataset) -> list[FittedProbe]:
        """The best head of all candidates, then the best of each input, if there are several."""
        # Validation top-1 of every head, and the best head of every input.
        predict_heads = partial(predict_all, self.task, self.state.params)
        trials = self._trials(map_chunks(predict_heads, validation.features.layers), validation.labels)
        chosen = {name: best_trial(trials[name])["head"] for name in trials}

        @lru_cache(maxsize=1)  # one pass over a dataset serves the predictions of all inputs
        def predict(dataset: EvalDataset) -> dict[str, TopKPredictions]:
            predictions = map_chunks(predict_heads, dataset.features.layers)
            return {name: predictions[name][:, head] for name, head in chosen.items()}

        def fitted(name: str, trials: list[dict[str, Any]]) -> FittedProbe:
            trial = best_trial(trials)
            return FittedProbe(name, lambda data: predict(data)[trial["layers"]], trial, describe(trial), trials)

        # "best" is chosen among the candidates only: controls explain a score, they never are one.
        overall = fitted("best", [trial for name in self.candidates for trial in trials[name]])
        return [overall, *(fitted(name, trials[name]) for name in trials)] if len(trials) > 1 else [overall]

    def _trials(
        self, predictions: dict[str, Int[np.ndarray, "n heads k"]], labels: Int[np.ndarray, "n"]
    ) -> dict[str, list[dict[str, Any]]]:
        """Every head's settings and validation top-1, by input."""
        correct = {name: np.sum(predictions[name][:, :, 0] == labels[:, None], axis=0) for name in self.task.moments}
        return {
            name: [
                {"layers": name, "head": head, **setting, "validation_top1": 100 * int(hits[head]) / len(labels)}
                for head, setting in enumerate(self.grid)
            ]
            for name, hits in correct.items()
        }


def describe(setting: dict[str, Any]) -> str:
    scaling = "standardized" if setting["standardize"] else "raw"
    return f"{setting['layers']}, {scaling}, lr {setting['learning_rate']:g}, wd {setting['weight_decay']:g}"
