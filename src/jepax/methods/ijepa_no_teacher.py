"""I-JEPA without a teacher: the encoder embeds its own targets, and a regularizer prevents their collapse.

    z    = f(x[context])
    h    = LN(f(x))                               gradient stopped, or flowing into the targets too
    loss = mean over blocks B and their patches p of D(g(z, positions of B)[p], h[p]) + R(mean over patches of z or h)

Everything else is as in `ijepa.py`.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import equinox as eqx
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from jepax.methods.ijepa import IJEPA, IJEPAConfig, Outputs
from jepax.nn import ViT, pool
from jepax.types import Metrics, UserError
from jepax.views import MaskedViews


@dataclass(frozen=True)
class IJEPANoTeacherConfig(IJEPAConfig, name="ijepa_no_teacher"):
    """I-JEPA whose targets come from the encoder itself."""

    ema: ClassVar[None] = None  # no setting: there is no teacher
    stop_gradient: bool = True
    """Targets are constants to the gradient; False makes it flow into them."""
    regularize_on: Literal["context", "targets"] = "context"
    """The regularizer reads the mean over patches of the context or, with stop_gradient=False, of the targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regularize_on == "targets" and self.stop_gradient:
            raise UserError(
                "method.regularize_on=targets has no effect with method.stop_gradient=True, which cuts their gradient;"
                " set method.stop_gradient=False or method.regularize_on=context"
            )
        if not self.stop_gradient and self.regularizer.name == "none":
            given = "method.stop_gradient=False with method.regularizer.name=none"
            warnings.warn(f"{given}: nothing prevents collapse", stacklevel=2)

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "IJEPANoTeacher":
        return IJEPANoTeacher(self, total_steps=total_steps, key=key)


class IJEPANoTeacher(IJEPA):
    """I-JEPA whose targets come from the encoder itself."""

    target_encoder: None
    config: IJEPANoTeacherConfig = eqx.field(static=True)

    @staticmethod
    def init_teacher(encoder: ViT, config: IJEPAConfig) -> None:
        return None

    def forward(self, views: MaskedViews) -> Outputs:
        x, masks = views.image, views.masks
        z = self.encoder(x, masks.context)  # (B, K, D)
        predictions = self.predictor(z, masks, self.masks.grid)  # (B, M, T, D)
        h = self.encoder(x)  # (B, N, D)     no second encoder: that is its point
        h = self.normalize_targets(lax.stop_gradient(h) if self.config.stop_gradient else h)
        # The regularizer reads what gets a gradient: z always does, h only if it is not stopped.
        regularized = z if self.config.regularize_on == "context" else h
        return Outputs(pool(regularized), self.normalize_predictions(predictions), h, masks)

    def after_update(self, step: Int[Array, ""], metrics: Metrics) -> tuple["IJEPANoTeacher", Metrics]:
        return self, {}  # no teacher moves

    def encoders(self) -> dict[str, ViT]:
        return {"context": self.encoder}
