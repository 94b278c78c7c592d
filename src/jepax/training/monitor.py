"""Inspection of a run while it trains: the guard's actions, per-step metrics, collapse metrics, online scores."""

import math
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jepax.data import Source, open_source
from jepax.distributed import sharding
from jepax.evals.feature_extractor import FeatureExtractor, ViTFeatures, select_encoder
from jepax.evals.features import NonFiniteFeaturesError
from jepax.evals.online import OnlineEval
from jepax.health.metrics import collapse_metrics
from jepax.io.events import Events
from jepax.io.logger import MetricValues, to_json_value
from jepax.methods import Method
from jepax.training.config import Config, can_evaluate_online
from jepax.training.grad_guard import Action, was_applied
from jepax.trees import global_norm, trainable
from jepax.types import Metrics, UserError

NOT_LOGGED = {"guard/action", "guard/consecutive_nonfinite", "guard/grad_norm_limit"}
PER_IMAGE_METRICS = {"embeddings": "health/embedding", "projections": "health/projection"}
"""Metrics with one row per example, and the prefix of the collapse metrics computed from them at logged steps."""
STATE_PREFIX = "state/"
"""Metrics that `after_update` reads, and nobody else."""
ADVICE = "try a lower optim.peak_lr, a longer optim.warmup_epochs, or optim.grad_clip_norm=1.0"


class DivergedError(UserError):
    """Training diverged: a loss, an update or a feature is not finite."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class NonFiniteError(Exception):
    """Too many consecutive steps were not finite. None of them changed the state."""

    def __init__(self, step: int, batch: object, numbers: dict[str, float | str]):
        super().__init__(step)
        self.step, self.batch, self.numbers = step, batch, numbers


class StepInspector:
    """Inspects every step one step late, so that the device never waits for the host.

    Records the guard's actions in events.jsonl, and the largest loss and gradient norm since the last log step.
    """

    def __init__(self, config: Config, events: Events, print: Callable[[str], None], peaks: dict[str, float]):
        self.guard, self.events, self.print, self.peaks = config.train.grad_guard, events, print, dict(peaks)
        self._pending: tuple[int, Metrics, object] | None = None

    def push(self, step: int, metrics: Metrics, batch: object) -> None:
        """Inspect the step before this one, and keep this one for the next call. Raises as `flush` does."""
        self.flush()
        self._pending = step, metrics, batch

    def flush(self) -> None:
        """Inspect the pending step. Raises `NonFiniteError` or `DivergedError` if training must stop."""
        if self._pending is None:
            return
        (step, metrics, batch), self._pending = self._pending, None
        action = Action(int(metrics["guard/action"]))
        if action != Action.APPLIED:
            self._report(step, action, metrics, batch)
        if action in (Action.APPLIED, Action.CLIPPED) and not np.isfinite(metrics.get("optim/update_norm", 0.0)):
            raise diverged(step, f"the update's norm of step {step} is {float(metrics['optim/update_norm'])}")
        for name in ("train/loss", "optim/grad_norm"):
            value, peak = float(metrics[name]), f"{name}_max"
            if math.isfinite(value):
                self.peaks[peak] = max(value, self.peaks.get(peak, value))

    def take_peaks(self) -> MetricValues:
        """The peaks since the last call; they start again from here."""
        peaks, self.peaks = self.peaks, {}
        return peaks

    def _report(self, step: int, action: Action, metrics: Metrics, batch: object) -> None:
        """Record and print what the guard did. Raises `NonFiniteError` if its patience is exhausted."""
        numbers = {name: float(metrics[name]) for name in ("train/loss", "optim/grad_norm", "guard/grad_norm_limit")}
        loss, norm, limit_norm = numbers.values()
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        if action == Action.OFF:  # a resumed run may have less patience than before
            raise NonFiniteError(step, batch, numbers)
        examples = {} if action == Action.CLIPPED else {"examples": np.asarray(batch.index).tolist()}
        self.events.add(action.name.lower(), step, step_bound=True, **numbers, **examples)
        if action != Action.NONFINITE:
            self.print(
                f"warning: gradient spike at step {step}: norm {norm:.3g} is above {limit_norm:.3g},"
                f" {self.guard.spike_threshold:g} times the usual one: {action.name.lower()}"
            )
            return
        count, limit = int(metrics["guard/consecutive_nonfinite"]), self.guard.max_consecutive_nonfinite
        self.print(
            f"warning: step {step} is not finite (loss {loss}, gradient norm {norm}): skipped; {count} consecutive,"
            f" {limit} stop the run"
        )
        if count >= limit:
            raise NonFiniteError(step, batch, numbers)


def diverged(step: int, what: str) -> DivergedError:
    """The error for a run that stops because something is not finite."""
    return DivergedError(step, f"{what}: training stopped, nothing was saved after it;\n{ADVICE}")


def log_values(metrics: Metrics) -> MetricValues:
    """A step's metrics as they are logged, with collapse metrics of its embeddings and projections."""
    hidden = NOT_LOGGED.union(PER_IMAGE_METRICS, (name for name in metrics if name.startswith(STATE_PREFIX)))
    values = {name: to_json_value(x) for name, x in metrics.items() if name not in hidden}
    for name, prefix in PER_IMAGE_METRICS.items():
        rows = sharding.to_host(metrics[name]) if name in metrics else None
        if rows is not None and np.isfinite(rows).all():
            values |= collapse_metrics(rows, prefix)
    return values


MeasureFn = Callable[[Method, Metrics], Metrics]


def track_update_norms(method: Method, step: int) -> MeasureFn:
    """Measure how far a step moves parameters and teacher. Call it before the step; call the result after it.

    Logs `optim/update_norm`, |parameters after - before|, and the metrics of `after_update`; NaN if the guard skipped
    the step. A program of its own for logged steps alone: each norm reads as much memory as the update itself (a tenth
    of the step, ViT-B/16, four images, two CPU cores).
    """
    before = _copy_arrays(method)
    return lambda after, metrics: _update_norms(before, after, jnp.int32(step), metrics)


@eqx.filter_jit
def _copy_arrays(method: Method) -> Method:
    return jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, method)


@eqx.filter_jit
def _update_norms(before: Method, after: Method, step: Int[Array, ""], metrics: Metrics) -> Metrics:
    old, frozen = eqx.partition(before, trainable(before))
    new = eqx.filter(after, trainable(after))
    # The teacher moves once more from where it was, to measure its step.
    _, moves = eqx.combine(new, frozen).after_update(step, metrics)
    moves |= {"optim/update_norm": global_norm(jax.tree.map(jnp.subtract, new, old))}
    applied = was_applied(metrics["guard/action"])
    return {name: jnp.where(applied, value, jnp.nan) for name, value in moves.items()}


class OnlineScores:
    """Scores of the encoder on held-out examples every `eval.online.every_steps` steps, at the next log step."""

    def __init__(self, config: Config, evaluate: Callable[[FeatureExtractor], MetricValues] | None, last_logged: int):
        self.config, self.evaluate, self.every = config, evaluate, config.eval.online.every_steps
        self.done = (last_logged + 1) // max(self.every, 1)

    def is_due(self, step: int) -> bool:
        """True if an evaluation is due at this log step; call it once per log step."""
        if self.evaluate is None or (step + 1) // self.every <= self.done:
            return False
        self.done = (step + 1) // self.every
        return True

    def __call__(self, step: int, method: Method) -> MetricValues:
        """Scores in percent, and the seconds they took. Raises `DivergedError` if features are not finite."""
        assert self.evaluate is not None  # `is_due` was true
        start = time.perf_counter()
        try:
            scores = self.evaluate(make_feature_extractor(self.config, method))
        except NonFiniteFeaturesError as error:
            raise DivergedError(step, f"after step {step} {error}") from error
        return scores | {"val/seconds": time.perf_counter() - start}


def make_online_eval(config: Config, train: Source, steps: int) -> OnlineEval | None:
    """Make the evaluation during training; None if it is never due, or if the run is not on labeled images.

    It does not open the test split.
    """
    if not can_evaluate_online(config, train) or config.eval.online.every_steps > steps:
        return None
    reading = {"num_threads": config.data.num_threads, "num_workers": config.data.num_workers}
    validation = open_source(config.data, "validation")
    return OnlineEval(config.eval.online, train, validation, config.eval.batch_size, **reading)


def make_feature_extractor(config: Config, method: Method) -> ViTFeatures:
    """The encoder that the run's evaluations read, on this process alone: each evaluates the same images."""
    encoder = sharding.to_local(select_encoder(method, config.eval.encoder))
    return ViTFeatures(encoder, config.method.crop, config.eval.pool)
