"""What a method is: its networks, its teacher if it has one, and its loss over the global batch."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.nn import ViT
from jepax.types import Images, Metrics


@dataclass(frozen=True)
class MethodConfig(abc.ABC):
    """Settings of a method. A subclass names itself, `class MineConfig(MethodConfig, name="mine")`, and that enrols it:
    run files name it, and the contract tests hold it to account."""

    registry: ClassVar[dict[str, type["MethodConfig"]]] = {}
    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name
        MethodConfig.registry[name] = cls

    @abc.abstractmethod
    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "AbstractMethod":
        """The method before its first step; its own schedules run over `total_steps`."""


class AbstractMethod(eqx.Module):
    """One method: parameters are trained unless they lie beneath an `EMA`."""

    encoder: eqx.AbstractVar[ViT]

    @abc.abstractmethod
    def loss(self, images: Images, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        """The objective over the global batch. What an example draws depends on `key` and `images.index[i]` alone.

        `Metrics` holds scalars to log, and "embeddings" (batch, dim): one vector per image, read for collapse; where
        the loss reads a head's output, also "projections" (batch, dim) of one view. The watchdog knows
        "loss_explained", "target_norm" and "prediction_norm" by their names.
        """

    @abc.abstractmethod
    def after_update(self, step: Int[Array, ""]) -> tuple["AbstractMethod", Metrics]:
        """What gradients do not change, after the update of `step`: move the teacher, or `return self, {}`."""

    @abc.abstractmethod
    def encoders(self) -> dict[str, ViT]:
        """What probes may read, by the names "target" and "context"; the first one where no other is asked for."""
