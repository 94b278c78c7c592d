"""Watches a run's log records as they are written, and raises an alarm when training goes wrong.

Every rule is a function of one record and the `History`. Its thresholds are above it, with the values of healthy and
failing runs; "measured" refers to the short runs listed in docs/log.md. The same records give the same alarms, so an
interrupted run raises those of an uninterrupted one. A metric that was not logged raises none.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from jepax.health.alerts import Alert, AlertValues

MetricsLine = dict
"""A record of metrics.jsonl: numbers, lists of numbers, and None for values that were not finite."""

MIN_WINDOW_LINES, MIN_WINDOW_STEPS = 4, 50
"""Window of recent records: at least so many, and all within so many steps."""
MIN_EPISODE_LINES, MIN_EPISODE_STEPS = 2, 10
"""Consecutive records and steps with a condition before its alarm; a spike raises one immediately."""
COOLDOWN_STEPS = 50
"""Steps without the condition that end its episode; only then can the same kind raise an alarm again."""


@dataclass
class History:
    """Statistics of the records before the current one, for the rules."""

    recent: deque[MetricsLine] = field(default_factory=deque)
    highest: AlertValues = field(default_factory=dict)
    lowest: AlertValues = field(default_factory=dict)
    first_loss: float = 0.0
    frozen_since: int | None = None
    """First step of the current period of momentum 1."""

    def add(self, line: MetricsLine) -> None:
        # The reference for a negligible loss, and the start of a period of momentum 1.
        self.first_loss = self.first_loss or finite_or_none(line, "train/loss") or 0.0
        if finite_or_none(line, "ema/momentum") != 1:
            self.frozen_since = None
        elif self.frozen_since is None:
            self.frozen_since = line["step"]

        # The level is computed before the record enters the window, or it would count twice.
        seen = line | {"loss_level": self.level(line, "train/loss")}
        self.recent.append(line)
        while len(self.recent) > MIN_WINDOW_LINES and line["step"] - self.recent[0]["step"] >= MIN_WINDOW_STEPS:
            self.recent.popleft()

        # Extremes over all records so far, which "over its highest so far" refers to.
        for name in seen:
            if (value := finite_or_none(seen, name)) is not None:
                self.highest[name] = max(value, self.highest.get(name, value))
                self.lowest[name] = min(value, self.lowest.get(name, value))

    def level(self, line: MetricsLine, name: str) -> float | None:
        """Median over a record and the recent ones before it, or None before there are `MIN_WINDOW_LINES`."""
        values = finite_values([*self.recent, line], name)
        return median(values) if len(values) > MIN_WINDOW_LINES else None


def finite_values(lines: Iterable[MetricsLine], name: str) -> list[float]:
    """Returns a metric from the records that have it."""
    return [value for line in lines if (value := finite_or_none(line, name)) is not None]


def finite_or_none(line: MetricsLine, name: str) -> float | int | None:
    """Returns a metric of a record, the largest of a list; None if it was not logged, or any of it is not finite."""
    value = line.get(name)
    if isinstance(value, list):
        return None if None in value or not value else max(value)
    return value


COLLAPSE_STD_RATIO = 0.2
"""Largest deviation of a feature over its highest so far. Measured: healthy above 0.59 (a loss on deviations may lower
them, so the threshold is well below), collapsed 0.14 to 0.01."""
COLLAPSE_COSINE_GAP, COLLAPSE_COSINE_GAP_RATIO = 0.02, 0.2
"""1 - mean cosine between images, and the same over its highest so far: an untrained ViT may start near 0. Measured:
healthy above 0.19 and 0.42; collapsed I-JEPA without teacher or regularizer 3e-5 and 1e-4."""
DEAD_MAX_COSINE = 0.5
"""Below this cosine, embeddings with dead features are near zero, not equal: a case for `dead_features`."""
COLLAPSE_RANK, HEALTHY_RANK = 1.5, 3.0
"""Largest effective rank now, and smallest highest rank so far. Measured: healthy above 3.7, collapsed 1.1; least 1."""


def detect_collapse(line: MetricsLine, past: History) -> AlertValues | None:
    """Embeddings, or the projections that the loss reads, are equal for all images, or collinear."""
    for rows in ("health/embedding", "health/projection"):
        std, cosine, rank = (
            finite_or_none(line, f"{rows}/{name}") for name in ("std_quantiles", "mean_cosine", "rankme")
        )
        # Features near zero have no direction to compare.
        if (finite_or_none(line, f"{rows}/dead_fraction") or 0) > 0 and (cosine or 0) < DEAD_MAX_COSINE:
            continue

        # Each sign compares the metric with its best value so far, since healthy levels differ between methods.
        found = []
        if std is not None:
            found.append(std < COLLAPSE_STD_RATIO * past.highest.get(f"{rows}/std_quantiles", 0.0))
        if cosine is not None:
            apart = 1 - past.lowest.get(f"{rows}/mean_cosine", 1.0)
            found.append(1 - cosine < min(COLLAPSE_COSINE_GAP, COLLAPSE_COSINE_GAP_RATIO * apart))
        if rank is not None:
            found.append(rank < COLLAPSE_RANK and past.highest.get(f"{rows}/rankme", 0.0) > HEALTHY_RANK)
        if any(found):
            return {f"{rows.removeprefix('health/')} cosine": cosine, "rank": rank, "largest deviation": std}
    return None


NEGLIGIBLE_LOSS_RATIO = 0.05
"""A loss below this fraction of the first record's is negligible: its changes are no spike and no drift."""
DRIFT_LOSS_RATIO, DRIFT_EXPLAINED_RATIO = 1.8, 0.6
"""Recent median loss over its lowest so far, and recent median explained variance over its highest so far.

An alarm needs both: a loss may rise as its targets become richer, and the explained variance then does not fall.
Measured: the loss's ratio in healthy runs at most 1.33 (a full demo: 1.16), in drifting ones 2.1 to 6.5.
"""


def detect_drift(line: MetricsLine, past: History) -> AlertValues | None:
    """The loss fell and then rises steadily, and predictions explain less of the targets than before."""
    loss, lowest = past.level(line, "train/loss"), past.lowest.get("loss_level")
    level, highest = past.level(line, "train/explained_variance"), past.highest.get("train/explained_variance")
    if loss is None or not lowest or loss <= max(DRIFT_LOSS_RATIO * lowest, NEGLIGIBLE_LOSS_RATIO * past.first_loss):
        return None

    # Richer targets raise the loss too, but are still explained.
    if level is not None and level >= DRIFT_EXPLAINED_RATIO * highest:
        return None
    explained, norm = (finite_or_none(line, name) for name in ("train/explained_variance", "health/target_norm"))
    return {"loss": loss, "once": lowest, "share explained": explained, "target norm": norm}


SPIKE_RATIO, SPIKE_RATIO_EARLY = 2.5, 4.0
"""Highest loss since the last record over the highest of the recent records; and the same while those are few.
Measured: healthy at most 1.1, and 2.2 in the first records (RDMReg, redrawn each step); a huge rate 14 to 2e4."""


def detect_spike(line: MetricsLine, past: History) -> AlertValues | None:
    """One step's loss is far above those of the recent records."""
    now, before = finite_or_none(line, "train/loss_max"), finite_values(past.recent, "train/loss_max")
    if now is None or not before or now <= NEGLIGIBLE_LOSS_RATIO * past.first_loss:
        return None
    if now <= (SPIKE_RATIO if len(before) >= MIN_WINDOW_LINES else SPIKE_RATIO_EARLY) * max(before):
        return None
    return {"loss": now, "before at most": max(before), "gradient norm": finite_or_none(line, "optim/grad_norm_max")}


STALL_RATIO = 0.75
"""Length of the teacher's update over the expected one, or its inverse. Measured: float32 1.00, bfloat16 with a
momentum from 0.998 at most 0.52. 1 - 0.996 is about bfloat16's epsilon."""
FLOAT32_ROUNDING = 1e-6
"""An update below this fraction of the parameters is lost to float32's rounding (6e-8 of each), as at the end of a
schedule towards 1."""
MIN_FROZEN_STEPS, MIN_FROZEN_FRACTION = 20, 0.02
"""Least steps, and least fraction of all steps so far, with momentum 1. Schedules end there, and a cosine from 0.996 is
1 in float32 over the last 0.2% of a run."""


def detect_stalled_teacher(line: MetricsLine, past: History) -> AlertValues | None:
    """The teacher's update does not match its momentum, or the momentum is 1."""
    names = ("update_norm", "expected_update_norm", "momentum", "relative_distance")
    moved, expected, momentum, distance = (finite_or_none(line, f"ema/{name}") for name in names)
    if None in (moved, expected, momentum, distance):
        return None

    # A momentum of 1 is normal at the end of a schedule, not for long before it. Otherwise an update within float32's
    # rounding proves nothing.
    if momentum == 1:
        steps = 0 if past.frozen_since is None else line["step"] - past.frozen_since
        is_stalled = steps >= max(MIN_FROZEN_STEPS, MIN_FROZEN_FRACTION * line["step"])
    else:
        is_negligible = (1 - momentum) * distance < FLOAT32_ROUNDING
        is_stalled = not is_negligible and not STALL_RATIO <= moved / expected <= 1 / STALL_RATIO
    return {"moved": moved, "expected": expected, "momentum": momentum, "distance": distance} if is_stalled else None


DEAD_FEATURE_FRACTION = 0.25
"""Fraction of the features that are constant over the batch. Measured: healthy 0, but one of eight rectified
projections in some records (0.125); with a mean of -3 or -4 before the rectification 0.375 to 1."""


def detect_dead_features(line: MetricsLine, past: History) -> AlertValues | None:
    """Features of the embeddings, or of the projections that the loss reads, are equal for every image."""
    for rows in ("health/projection", "health/embedding"):
        fraction = finite_or_none(line, f"{rows}/dead_fraction")
        if fraction is not None and fraction >= DEAD_FEATURE_FRACTION:
            return {f"share of {rows.removeprefix('health/')}s' features": fraction}
    return None


RULES: dict[str, Callable[[MetricsLine, History], AlertValues | None]] = {
    "spike": detect_spike,
    "teacher_stalled": detect_stalled_teacher,
    "dead_features": detect_dead_features,
    "collapse": detect_collapse,
    "loss_divergence": detect_drift,
}
"""Rule of each kind, in the order of the alarms of one record. It returns the measured numbers, or None."""
ADVICE = {
    "spike": "a lower optim.peak_lr, a longer optim.warmup_epochs, or optim.grad_clip_norm=1.0; with"
    " method.loss=l2, smooth_l1",
    "teacher_stalled": "method.ema.dtype=float32; method.ema.start below 1, end=1 only at the end",
    "dead_features": "a lower optim.peak_lr; where projections are rectified a higher method.mu; or a variance term",
    "collapse": "a teacher (method ijepa) with a higher method.ema.start, or a higher weight of the regularizer",
    "loss_divergence": "method.target_norm=layer, method.loss=smooth_l1, a higher method.ema.start, a lower"
    " optim.peak_lr",
}
"""Suggested remedy for each kind."""
IMMEDIATE = {"spike"}
"""Kinds that raise an alarm at the first record."""


@dataclass
class Episode:
    """A period with a condition: first and last step, number of records, and if it raised an alarm."""

    first: int
    last: int = 0
    lines: int = 0
    raised: bool = False


class Watchdog:
    """Sees every record of a run in order; `alarms` are all that were raised."""

    def __init__(self, lines: Iterable[MetricsLine] = ()):
        self.past, self.episodes, self.alarms = History(), {}, []
        for line in lines:
            self.update(line)

    def update(self, line: MetricsLine) -> list[Alert]:
        """Adds a record, and returns the alarms that it raises."""
        new = []
        for kind, rule in RULES.items():
            numbers = rule(line, self.past)
            if self._is_new(kind, numbers is not None, line["step"]):
                logged = {name: value for name, value in numbers.items() if value is not None}
                new.append(Alert(kind, line["step"], logged, ADVICE[kind]))

        # Rules compare the record with the ones before it, so it joins the history after they ran.
        self.past.add(line)
        self.alarms += new
        return new

    def _is_new(self, kind: str, is_found: bool, step: int) -> bool:
        """True if the condition has lasted long enough and raised no alarm in this episode."""
        # Without the condition, an episode that raised no alarm ends, another one after the cooldown.
        if not is_found:
            episode = self.episodes.get(kind)
            if episode and (not episode.raised or step - episode.last >= COOLDOWN_STEPS):
                del self.episodes[kind]
            return False

        # With it, the episode starts or goes on.
        episode = self.episodes.setdefault(kind, Episode(first=step))
        episode.last, episode.lines = step, episode.lines + 1
        lasted = episode.lines >= MIN_EPISODE_LINES and step - episode.first >= MIN_EPISODE_STEPS
        if episode.raised or not (lasted or kind in IMMEDIATE):
            return False
        episode.raised = True
        return True
