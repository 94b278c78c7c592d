"""The protocols by name, and the settings of an evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from jepax.evals.attentive import AttentiveConfig, attentive
from jepax.evals.feature_extractor import EncoderChoice, FeatureExtractor, Pooling, ViTFeatures
from jepax.evals.finetune import FinetuneConfig, finetune
from jepax.evals.knn import KnnConfig, knn
from jepax.evals.linear import PUBLISHED, LinearConfig, linear
from jepax.evals.logistic import LogisticConfig, logistic
from jepax.evals.low_shot import LowShotConfig, low_shot
from jepax.evals.online import OnlineConfig
from jepax.evals.planning import PlanConfig
from jepax.evals.scoring import FittedProbe
from jepax.types import UserError

ProtocolName = Literal["linear", "linear_vissl", "knn", "logistic", "low_shot", "attentive", "finetune", "plan"]
PROTOCOLS: dict[str, Callable[..., list[FittedProbe]]] = {
    "linear": linear,
    "linear_vissl": linear,
    "knn": knn,
    "logistic": logistic,
    "low_shot": low_shot,
    "attentive": attentive,
    "finetune": finetune,
}
"""Probes of images: each is called with a `ProtocolData` and its settings. `plan` is for world models."""


@dataclass(frozen=True)
class EvalConfig:
    """Protocols of an evaluation. Each protocol's settings are under its own name."""

    protocols: tuple[ProtocolName, ...] = ("linear", "knn")
    """Protocols, in the table's order; none: the run is not evaluated when it ends."""
    encoder: EncoderChoice = "default"
    """Encoder that is evaluated; default: the one that the method's paper evaluates."""
    pool: Pooling = "mean"
    """Pools an image's patches into one vector; attentive and finetune pool in their own way."""
    batch_size: int = 256
    """Images per batch when features are extracted."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    """Quick linear probe."""
    linear_vissl: LinearConfig = PUBLISHED
    """Linear probe as in I-JEPA's paper."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Nearest neighbors."""
    logistic: LogisticConfig = field(default_factory=LogisticConfig)
    """Logistic regression to convergence, for small data."""
    low_shot: LowShotConfig = field(default_factory=LowShotConfig)
    """Logistic regression on few labels."""
    attentive: AttentiveConfig = field(default_factory=AttentiveConfig)
    """Attentive probe."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Fine-tuning."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Planning with a world model."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """Evaluation during training."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        if len(set(self.protocols)) < len(self.protocols):
            raise UserError(f"protocols={self.protocols} must name none twice")
        if "plan" in self.protocols and len(self.protocols) > 1:
            raise UserError(
                f"protocols={self.protocols}: plan is for world models, the others probe images; name it alone"
            )

    @property
    def is_planning(self) -> bool:
        """True if a world model is evaluated by planning, not images by probes."""
        return self.protocols == ("plan",)


def supports(protocol: str, extractor: FeatureExtractor) -> bool:
    """False for fine-tuning of pixels, which have no encoder."""
    return protocol != "finetune" or isinstance(extractor, ViTFeatures)
