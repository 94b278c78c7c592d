"""The contract of a method: three verbs and a teacher.

    views   = draw(batch, keys)            per example: crops, colors, masks; all randomness of an example
    outputs = forward(views)               per example: the networks; the trainer may run it in micro-batches
    loss    = objective(outputs, key)      the global batch: distances, regularizers, heads with batch statistics
    method  = after_update(step, metrics)  what gradients do not change: move the EMA teacher

A method is one file. Devices, precision and micro-batches are not its concern: the trainer composes the verbs.
"""

import abc
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree, UInt8

from jepax.nn import ViT, ViTConfig
from jepax.types import AnyArray, Metrics, UserError
from jepax.views import CropConfig


@dataclass(frozen=True)
class MethodConfig(abc.ABC):
    """Settings of a method. `class MineConfig(MethodConfig, name="mine")` registers it by name."""

    registry: ClassVar[dict[str, type["MethodConfig"]]] = {}
    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # config.yaml refers to the method by this name.
        if name is not None:  # a base of several methods has none
            cls.name = name
            MethodConfig.registry[name] = cls

    @abc.abstractmethod
    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "Method":
        """Make the method before its first step; its own schedules run over `total_steps`."""

    def tiny(self) -> "MethodConfig":
        """Shrink every size and keep every choice: the method as the contract tests run it, on 24 x 24 images.

        By default every part by its own `tiny()`, and the number of projection directions.
        """
        # Networks, crops and masks have a `tiny` of their own; choices such as the loss do not, and stay.
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        small = {name: part.tiny() for name, part in parts.items() if hasattr(part, "tiny")}
        return replace(self, **small | ({"num_slices": 16} if "num_slices" in parts else {}))

    def check_data(self, source: Any) -> None:  # noqa: B027 - not every method has to
        """Raise `UserError` if the method cannot read examples of this source. By default anything is accepted."""


class Method(eqx.Module):
    """One method. Its parameters are trained unless they are beneath an `EMA`: the type is the rule.

    Arrays that `draw` and `forward` return have the batch as their first axis.
    """

    @abc.abstractmethod
    def draw(self, batch: Any, keys: Key[Array, "batch"]) -> PyTree:
        """Draw what is random about each example from its own key: views, masks. Uses no network."""

    @abc.abstractmethod
    def forward(self, views: PyTree) -> PyTree:
        """Run the networks on each example. No example sees another one."""

    @abc.abstractmethod
    def objective(self, outputs: PyTree, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        """Compute the loss over the global batch, and what to log.

        `key` is the step's own, for what the batch shares (directions of projection). `Metrics` are scalars to log,
        and two optional matrices read for collapse: "embeddings" (batch, dim), one vector per example, and
        "projections" (batch, dim), a head's output for one view. The watchdog reads "train/explained_variance",
        "health/target_norm" and "health/prediction_norm". Arrays named "state/..." are for `after_update`, not logged.
        """

    @abc.abstractmethod
    def after_update(self, step: Int[Array, ""], metrics: Metrics) -> tuple["Method", Metrics]:
        """Change what gradients do not, after the update of `step`: move the teacher, or `return self, {}`.

        `metrics` are those that `objective` returned at this step, such as the statistics of the batch.
        """

    def loss(self, batch: Any, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        """draw -> forward -> objective: what a notebook differentiates. `batch.index` seeds each example's key."""
        # Other keys for `objective` than for any example. The trainer does the same: `loss_and_grads` in step.py.
        views = self.draw(batch, example_keys(key, batch.index))
        return self.objective(self.forward(views), key=objective_key(key))


def example_keys(key: PRNGKeyArray, index: Int[AnyArray, "batch"]) -> Key[Array, "batch"]:
    """One key per example, from its position in the run's order: the same on any number of devices or workers."""
    # `fold_in`, not `split`: an example's key does not depend on the size or the order of the batch.
    return jax.vmap(lambda i: jr.fold_in(key, i))(index)


def objective_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """The key of what the global batch shares."""
    return jr.fold_in(key, 2**32 - 1)  # an index that no example has


class ImageMethodConfig(MethodConfig):
    """Settings of a method on images. Evaluation, figures and export read these two fields."""

    encoder: ViTConfig
    """Settings of the encoder that is evaluated."""
    crop: CropConfig
    """The view that probes see: size, and the normalization of pixels."""

    def check_data(self, source: Any) -> None:
        """Raise `UserError` if the images' channels differ from those of the encoder or of the normalization."""
        # Here, so that the error names the field: the networks would raise one about shapes.
        if not hasattr(source, "canvas_shape"):
            raise UserError(f"method {self.name} reads images, but the data has {source.describe()}; see data.dataset")
        found = source.canvas_shape[2]
        for name, channels in (("encoder.in_channels", self.encoder.in_channels), ("crop.mean", len(self.crop.mean))):
            if channels != found:
                raise UserError(
                    f"method.{name} expects {channels} channels, but the images have {found};\n"
                    f"set method.{name} for {found} channels, or data.channels={channels}"
                )


class ImageMethod(Method):
    """A method on images, with an encoder to probe and export."""

    encoder: eqx.AbstractVar[ViT]

    @abc.abstractmethod
    def encoders(self) -> dict[str, ViT]:
        """Encoders that probes may read, named "target" and "context"; the first is the default."""


class WorldModel(Method):
    """A method that predicts what actions do to the embeddings of images, so that a planner can use it."""

    @abc.abstractmethod
    def embed(self, frames: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch dim"]:
        """The embedding of each frame, as planning sees it: nothing random, no statistics of the batch."""

    @abc.abstractmethod
    def rollout(
        self,
        context: Float[Array, "context dim"],
        past: Float[Array, "past action"],
        candidates: Float[Array, "candidates horizon action"],
        window: int | None = None,
    ) -> Float[Array, "candidates frames dim"]:
        """The embeddings that follow each candidate's blocks of actions: `context`, then `horizon` predictions.

        `past` are the blocks between the frames of `context`, one fewer than these. A prediction sees the last `window`
        frames; None: as many as in training.
        """
