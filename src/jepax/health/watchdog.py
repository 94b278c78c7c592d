"""The watchdog: reads the log's lines as they come, and names what goes wrong.

Every rule is a function of one line and of the `Past`, with its thresholds beside it: where they come from, and how far
healthy and failing runs lie from them. "Measured" is the set of short runs that docs/log.md lists. The same lines give
the same alarms, so a run that was interrupted raises those of one that was not. What was not logged raises none.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from jepax.health.alerts import Alert, AlertValues

MetricsLine = dict
"""A line of metrics.jsonl: numbers, lists of numbers, and None for what was not finite."""

MIN_WINDOW_LINES, MIN_WINDOW_STEPS = 4, 50
"""The recent lines: so many at least, and all of so many steps back."""
MIN_EPISODE_LINES, MIN_EPISODE_STEPS = 2, 10
"""A condition is said once it has held on that many lines in a row and for that many steps; a spike at once."""
COOLDOWN_STEPS = 50
"""An episode ends when its condition has not held for that long; only then is the same kind said again."""


@dataclass
class History:
    """What the rules remember of the lines before the one that they judge."""

    recent: deque[MetricsLine] = field(default_factory=deque)
    highest: AlertValues = field(default_factory=dict)
    lowest: AlertValues = field(default_factory=dict)
    first_loss: float = 0.0
    still: int | None = None
    """Since which step the momentum has been 1."""

    def values(self, name: str) -> list[float]:
        """The metric on the recent lines that hold it."""
        return [value for line in self.recent if (value := finite_or_none(line, name)) is not None]

    def add(self, line: MetricsLine) -> None:
        self.first_loss = self.first_loss or finite_or_none(line, "train/loss") or 0.0
        self.still = (
            (line["step"] if self.still is None else self.still) if finite_or_none(line, "ema/momentum") == 1 else None
        )
        seen = line | {"loss_level": self.level(line, "train/loss")}
        self.recent.append(line)
        while len(self.recent) > MIN_WINDOW_LINES and line["step"] - self.recent[0]["step"] >= MIN_WINDOW_STEPS:
            self.recent.popleft()
        for name, value in seen.items():
            value = max_if_finite(value)
            if value is not None:
                self.highest[name] = max(value, self.highest.get(name, value))
                self.lowest[name] = min(value, self.lowest.get(name, value))

    def level(self, line: MetricsLine, name: str) -> float | None:
        """Median over a line and the recent ones before it, once those are `WINDOW_LINES`."""
        values = [*self.values(name), *([line[name]] if finite_or_none(line, name) is not None else [])]
        return median(values) if len(values) > MIN_WINDOW_LINES else None


def finite_or_none(line: MetricsLine, name: str) -> float | None:
    """A metric of a line; None where it was not logged, or not finite."""
    return max_if_finite(line.get(name))


def max_if_finite(value: float | int | list | None) -> float | int | None:
    """Of a list: its largest, if all are finite."""
    if isinstance(value, list):
        return None if None in value or not value else max(value)
    return value


COLLAPSE_STD_RATIO = 0.2
"""Largest deviation of a feature over its highest so far. Measured: healthy runs stay above 0.59 (a loss that weighs
deviations may lower them, so not nearer), collapsed ones reach 0.14 to 0.01."""
COLLAPSE_COSINE_GAP, COLLAPSE_COSINE_GAP_RATIO = 0.02, 0.2
"""1 - mean cosine between images, and the same over its highest so far: an untrained ViT may begin near 0. Measured:
healthy above 0.19 and 0.42; collapsed I-JEPA without teacher or regularizer 3e-5 and 1e-4."""
DEAD_MAX_COSINE = 0.5
"""Below this cosine, embeddings with dead features are near zero, not alike: `dead_features` names them."""
COLLAPSE_RANK, HEALTHY_RANK = 1.5, 3.0
"""Effective rank now, and its highest so far at least. Measured: healthy above 3.7, collapsed 1.1; its least is 1."""


def detect_collapse(line: MetricsLine, past: History) -> AlertValues | None:
    """Embeddings, or the projections that the loss reads, are the same whatever the image, or lie on a line."""
    for rows in ("health/embedding", "health/projection"):
        std, cosine, rank = (
            finite_or_none(line, f"{rows}/{name}") for name in ("std_quantiles", "mean_cosine", "rankme")
        )
        if (finite_or_none(line, f"{rows}/dead_fraction") or 0) > 0 and (cosine or 0) < DEAD_MAX_COSINE:
            continue
        found = []
        if std is not None:
            found.append(std < COLLAPSE_STD_RATIO * past.highest.get(f"{rows}/std_quantiles", 0.0))
        if cosine is not None:
            apart = 1 - past.lowest.get(f"{rows}/mean_cosine", 1.0)
            found.append(1 - cosine < min(COLLAPSE_COSINE_GAP, COLLAPSE_COSINE_GAP_RATIO * apart))
        if rank is not None:
            found.append(rank < COLLAPSE_RANK and past.highest.get(f"{rows}/rankme", 0.0) > HEALTHY_RANK)
        if any(found):
            numbers = {f"{rows.removeprefix('health/')} cosine": cosine, "rank": rank, "largest deviation": std}
            return {name: value for name, value in numbers.items() if value is not None}
    return None


NEGLIGIBLE_LOSS_RATIO = 0.05
"""A loss below this share of the first line's is as good as none: its ups and downs are no spike and no drift."""
DRIFT_LOSS_RATIO, DRIFT_EXPLAINED_RATIO = 1.8, 0.6
"""Median loss of the recent lines over its lowest so far, and that of the share explained over the highest so far.

Both, because a loss may rise as its targets become richer, which the share explained does not hold against it.
Measured: the loss's ratio in healthy runs at most 1.33 (a whole demo: 1.16), in drifting ones 2.1 to 6.5.
"""


def detect_drift(line: MetricsLine, past: History) -> AlertValues | None:
    """The loss fell and then rises for good, and predictions explain less of the targets than they did."""
    loss, lowest = past.level(line, "train/loss"), past.lowest.get("loss_level")
    share, highest = past.level(line, "train/explained_variance"), past.highest.get("train/explained_variance")
    if loss is None or not lowest or loss <= max(DRIFT_LOSS_RATIO * lowest, NEGLIGIBLE_LOSS_RATIO * past.first_loss):
        return None
    if share is not None and share >= DRIFT_EXPLAINED_RATIO * highest:
        return None
    return {"loss": loss, "once": lowest} | {
        shown: value
        for shown, name in (("share explained", "train/explained_variance"), ("target norm", "health/target_norm"))
        if (value := finite_or_none(line, name)) is not None
    }


SPIKE_RATIO, SPIKE_RATIO_EARLY = 2.5, 4.0
"""Highest loss of a step since the last line over the highest of the recent lines; and while those are still few.
Measured: healthy at most 1.1, and 2.2 among the first lines (RDMReg's, drawn anew each step); a huge rate 14 to 2e4."""


def detect_spike(line: MetricsLine, past: History) -> AlertValues | None:
    """One step's loss leaps out of what the recent lines held."""
    now, before = finite_or_none(line, "train/loss_max"), past.values("train/loss_max")
    if now is None or not before or now <= NEGLIGIBLE_LOSS_RATIO * past.first_loss:
        return None
    if now <= (SPIKE_RATIO if len(before) >= MIN_WINDOW_LINES else SPIKE_RATIO_EARLY) * max(before):
        return None
    numbers = {"loss": now, "before at most": max(before), "gradient norm": finite_or_none(line, "optim/grad_norm_max")}
    return {name: value for name, value in numbers.items() if value is not None}


STALL_RATIO = 0.75
"""Length of the teacher's move over what it should have been; or the other way round. Measured: float32 1.00, bfloat16
with a momentum from 0.998 at most 0.52. 1 - 0.996 is about bfloat16's epsilon."""
FLOAT32_ROUNDING = 1e-6
"""A move below this share of the parameters is lost to float32's own rounding (6e-8 of each), as at the end of a
schedule towards 1."""
MIN_FROZEN_STEPS, MIN_FROZEN_FRACTION = 20, 0.02
"""Steps, and share of all steps so far, for which the momentum must have been 1. Schedules end there, and a cosine from
0.996 is 1 in float32 over the last 0.2% of a run."""


def detect_stalled_teacher(line: MetricsLine, past: History) -> AlertValues | None:
    """The teacher does not move as its momentum says, or its momentum leaves it where it is."""
    moved, wanted = finite_or_none(line, "ema/update_norm"), finite_or_none(line, "ema/expected_update_norm")
    momentum, distance = finite_or_none(line, "ema/momentum"), finite_or_none(line, "ema/relative_distance")
    if None in (moved, wanted, momentum, distance):
        return None
    numbers = {"moved": moved, "expected": wanted, "momentum": momentum, "distance": distance}
    if momentum == 1:
        long = past.still is not None and line["step"] - past.still >= max(
            MIN_FROZEN_STEPS, MIN_FROZEN_FRACTION * line["step"]
        )
        return numbers if long else None
    if (1 - momentum) * distance < FLOAT32_ROUNDING:
        return None
    return None if STALL_RATIO <= moved / wanted <= 1 / STALL_RATIO else numbers


DEAD_FEATURE_FRACTION = 0.25
"""Share of the features that do not vary over the batch. Measured: healthy 0, but one of eight rectified projections
on a line here and there (0.125); with a mean of -3 or -4 before the rectification 0.375 to 1."""


def detect_dead_features(line: MetricsLine, past: History) -> AlertValues | None:
    """Features of the embeddings, or of the projections that the loss reads, are the same for every image."""
    for rows in ("health/projection", "health/embedding"):
        share = finite_or_none(line, f"{rows}/dead_fraction")
        if share is not None and share >= DEAD_FEATURE_FRACTION:
            return {f"share of {rows.removeprefix('health/')}s' features": share}
    return None


RULES: dict[str, Callable[[MetricsLine, History], AlertValues | None]] = {
    "spike": detect_spike,
    "teacher_stalled": detect_stalled_teacher,
    "dead_features": detect_dead_features,
    "collapse": detect_collapse,
    "loss_divergence": detect_drift,
}
"""Of each kind, in the order in which alarms of one line are named."""
ADVICE = {
    "spike": "a lower optim.peak_lr, a longer optim.warmup_epochs, or optim.grad_clip_norm=1.0; with"
    " method.loss=l2, smooth_l1",
    "teacher_stalled": "method.ema.dtype=float32; method.ema.start below 1, end=1 only at the end",
    "dead_features": "a lower optim.peak_lr; where projections are rectified a higher method.mu; or a variance term",
    "collapse": "a teacher (method ijepa) with a higher method.ema.start, or a higher weight of the regularizer",
    "loss_divergence": "method.target_norm=layer, method.loss=smooth_l1, a higher method.ema.start, a lower"
    " optim.peak_lr",
}
"""What to try."""
IMMEDIATE = {"spike"}
"""Kinds that are said at their first line."""


@dataclass
class Episode:
    """Since when a condition has held, and whether it was said."""

    first: int
    last: int = 0
    lines: int = 0
    said: bool = False


class Watchdog:
    """Sees every line of a run in order; `alarms` is all that it has said."""

    def __init__(self, lines: Iterable[MetricsLine] = ()):
        self.past, self.episodes, self.alarms = History(), {}, []
        for line in lines:
            self.see(line)

    def see(self, line: MetricsLine) -> list[Alert]:
        """The alarms that this line raises."""
        found = {kind: rule(line, self.past) for kind, rule in RULES.items()}
        new = [
            Alert(kind, line["step"], found[kind], ADVICE[kind]) for kind in found if self._is_new(kind, found, line)
        ]
        self.past.add(line)
        self.alarms += new
        return new

    def _is_new(self, kind: str, found: dict[str, AlertValues | None], line: MetricsLine) -> bool:
        """Whether the condition has held for long enough, and was not said in this episode."""
        step, episode = line["step"], self.episodes.get(kind)
        if found[kind] is None:
            if episode and (not episode.said or step - episode.last >= COOLDOWN_STEPS):
                del self.episodes[kind]
            return False
        episode = self.episodes.setdefault(kind, Episode(first=step))
        episode.last, episode.lines = step, episode.lines + 1
        held = episode.lines >= MIN_EPISODE_LINES and step - episode.first >= MIN_EPISODE_STEPS
        if episode.said or not (held or kind in IMMEDIATE):
            return False
        episode.said = True
        return True
