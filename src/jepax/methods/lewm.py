"""LeWorldModel (Maes et al. 2026, arXiv:2603.19312): predict the next frame's embedding from frames and actions.

    z_t   = projector(f(x_t))                    f(x): the class token; BatchNorm over all frames of the global batch
    c_t   = action_encoder(a_t)                  a_t: the block of actions between frames t and t + 1
    p_t+1 = head(predictor(z_1..t, c_1..t))      causal; row t predicts frame t + 1
    loss  = mean over t and dimensions of (p_t+1 - z_t+1)^2 + w mean over t of SIGReg(z_t)

The gradient flows into the target z_t+1, too: no teacher, no stop-gradient. SIGReg, over the batch for each frame, is
what keeps the embeddings from collapsing. The predictor has dropout in training. For planning, `embed` and `rollout`
have none, and their BatchNorms read running statistics.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt8

from jepax.errors import check_fields
from jepax.methods.base import MethodConfig, WorldModel
from jepax.nn import VIT_SIZES, ActionEncoder, CausalPredictor, CausalPredictorConfig, Head, ViT, ViTConfig
from jepax.nn.projector import Statistics
from jepax.nn.transformer import Ops, widen
from jepax.objectives import explained_fraction
from jepax.objectives.sigreg import NUM_KNOTS, sigreg_by_group
from jepax.objectives.slicing import random_unit_directions
from jepax.trees import EMA
from jepax.types import ClipBatch, Metrics, UserError

STATISTICS_MOMENTUM = 0.9
"""running <- 0.9 running + 0.1 of the batch."""
Clip = Float[Array, "batch _clip _dim"]


def _encoder() -> ViTConfig:
    options = {"class_token": True, "learned_grid": (16, 16), "norm_epsilon": 1e-12}
    return ViTConfig(**VIT_SIZES["tiny"], patch_size=14, **options)


@dataclass(frozen=True)
class LeWMConfig(MethodConfig, name="lewm"):
    """LeWorldModel as published, on images of 224 x 224 and blocks of five actions of two numbers."""

    encoder: ViTConfig = field(default_factory=_encoder)
    """Encoder of each frame, with a class token."""
    predictor: CausalPredictorConfig = field(default_factory=CausalPredictorConfig)
    """Predictor of the next embedding; a clip has one frame more than its `history`."""
    action_dim: int = 10
    """Numbers in a block of actions: actions between two frames times numbers in an action."""
    embed_dim: int = 192
    """Dimension of an embedding."""
    head_dim: int = 2048
    """Hidden width of the projector and of the head on predictions."""
    sigreg_weight: float = 0.09
    """Weight w of SIGReg, which grows with the global batch."""
    num_slices: int = 1024
    """Directions of SIGReg, redrawn at each step."""
    knots: int = NUM_KNOTS
    """Points of SIGReg's integral."""
    detach_target: bool = False
    """Stop the gradient into the target."""
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of the pixel values in [0, 1], one per channel; ImageNet's by default."""
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of the pixel values in [0, 1], one per channel; ImageNet's by default."""

    def __post_init__(self) -> None:
        check_fields("method", self, "at least 1", "action_dim", "embed_dim", "head_dim", "num_slices")
        check_fields("method", self, "at least 0", "sigreg_weight")
        if self.knots < 2:
            raise UserError(f"method.knots={self.knots} must be at least 2; try {NUM_KNOTS}")
        if not self.encoder.class_token:
            raise UserError("method.encoder.class_token=False, but it is the frame's embedding; set it True")
        if {len(self.pixel_mean), len(self.pixel_std)} != {self.encoder.in_channels} or min(self.pixel_std) <= 0:
            raise UserError(
                f"method.pixel_mean={self.pixel_mean} and pixel_std={self.pixel_std} need one number for each of"
                f" {self.encoder.in_channels} channels, deviations above 0"
            )

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "LeWM":
        return LeWM(self, key=key)

    def tiny(self) -> "LeWMConfig":
        """The same method on clips of 32 x 32 images, the smallest that Two-Room draws."""
        small = super().tiny()
        encoder = replace(small.encoder, patch_size=8, learned_grid=small.encoder.learned_grid and (4, 4))
        return replace(small, encoder=encoder, embed_dim=16, head_dim=24)

    def check_data(self, source: Any) -> None:
        """Raise `UserError` if the data has no clips, or clips that the settings do not fit."""
        if not hasattr(source, "clip_frames"):
            raise UserError(
                f"method {self.name} reads clips with actions, but the data has {source.describe()}; see data.dataset"
            )
        self.check_clips((source.clip_frames, *source.frame_shape), source.block_dim)

    def check_clips(self, shape: tuple[int, ...], block: int) -> None:
        """Raise `UserError` if the settings do not fit clips of this shape (frames, height, width, channels), with so
        many numbers in a block of actions."""
        # Here, so that the error names the field: the networks would raise one about shapes.
        clip, *size, channels = shape
        for name, setting, found, meaning in (
            ("predictor.history", self.predictor.history, clip - 1, "data.clip_frames - 1"),
            ("action_dim", self.action_dim, block, "data.frame_skip times the numbers in an action"),
            ("encoder.in_channels", self.encoder.in_channels, channels, "the channels of a frame"),
        ):
            if setting != found:
                raise UserError(f"method.{name}={setting}, but the clips need {found}, {meaning}; set one as the other")
        try:
            self.encoder.grid(tuple(size))
        except UserError as error:
            raise UserError(f"method.encoder: {error}") from error


class Clips(eqx.Module):
    """Normalized frames of each example, and the block of actions that leaves each frame."""

    frames: Float[Array, "batch clip height width channels"]
    actions: Float[Array, "batch clip action"]


class Outputs(eqx.Module):
    """The encoder's class token of each frame, in float32, and the actions."""

    tokens: Clip
    actions: Float[Array, "batch clip action"]


class RunningStatistics(eqx.Module):
    """What the two BatchNorms normalize by after training."""

    projector: Statistics
    head: Statistics


class LeWM(WorldModel):
    """LeWorldModel, with the equations at the top of this file.

    *Differs from the reference:* weights outside the encoder are drawn with deviation 1 / sqrt(fan in).
    """

    encoder: ViT  # f
    projector: Head
    action_encoder: ActionEncoder
    predictor: CausalPredictor
    head: Head
    statistics: EMA[RunningStatistics]  # Nothing beneath an EMA is trained: the type is the rule.
    config: LeWMConfig = eqx.field(static=True)

    def __init__(self, config: LeWMConfig, *, key: PRNGKeyArray):
        key_encoder, key_projector, key_action, key_predictor, key_head = jr.split(key, 5)
        dim, hidden = config.embed_dim, config.head_dim
        self.encoder = ViT(config.encoder, key=key_encoder)
        self.projector = Head(config.encoder.width, hidden, dim, key=key_projector)
        self.action_encoder = ActionEncoder(config.action_dim, dim, key=key_action)
        self.predictor = CausalPredictor(config.predictor, dim, key=key_predictor)
        self.head = Head(dim, hidden, dim, key=key_head)
        initial = (head.initial_statistics() for head in (self.projector, self.head))
        self.statistics = EMA(RunningStatistics(*initial))
        self.config = config

    # ---- Training ----

    def draw(self, batch: ClipBatch, keys: Key[Array, "batch"]) -> Clips:
        """Normalized frames. Nothing is random about an example."""
        self.config.check_clips(batch.frames.shape[1:], batch.actions.shape[-1])
        return Clips(self.normalize_pixels(jnp.asarray(batch.frames)), jnp.asarray(batch.actions))

    def forward(self, views: Clips) -> Outputs:
        # Every frame is an image of its own: (B T, H, W, C) -> (B T, W) -> (B, T, W)
        tokens = self.encoder.embed_images(views.frames.reshape(-1, *views.frames.shape[2:]))
        return Outputs(widen(tokens).reshape(*views.frames.shape[:2], -1), views.actions)

    def objective(self, outputs: Outputs, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        key_directions, key_dropout = jr.split(key)
        history = self.config.predictor.history

        # Embeddings of all frames, and predictions of all but the first. (B, T, D) and (B, T - 1, D)
        z, projector_statistics = self.project(outputs.tokens)
        c = self.action_encoder(outputs.actions, self.ops)
        predictions = self.predictor(z[:, :history], c[:, :history], key=key_dropout, ops=self.ops)
        predictions, head_statistics = apply_to_rows(self.head, predictions, None, self.ops)

        # The distance to the next frame's embedding.
        targets = lax.stop_gradient(z[:, 1:]) if self.config.detach_target else z[:, 1:]
        prediction_loss = jnp.mean(jnp.square(predictions - targets))

        # Each frame's embeddings, along any direction, are a standard normal.
        directions = random_unit_directions(key_directions, z.shape[2], self.config.num_slices)
        sigreg_loss = sigreg_by_group(jnp.swapaxes(z, 0, 1), directions, self.config.knots)

        metrics = clip_metrics(z, predictions, prediction_loss) | {
            "train/sigreg_loss": sigreg_loss,
            "embeddings": z[:, 0],
            "state/projector": projector_statistics,
            "state/head": head_statistics,
        }
        return prediction_loss + self.config.sigreg_weight * sigreg_loss, lax.stop_gradient(metrics)

    def after_update(self, step: Int[Array, ""], metrics: Metrics) -> tuple["LeWM", Metrics]:
        batch = RunningStatistics(metrics["state/projector"], metrics["state/head"])
        moved = self.statistics.update(batch, STATISTICS_MOMENTUM)
        return eqx.tree_at(lambda method: method.statistics, self, moved), {}

    # ---- Planning ----

    def embed(self, frames: UInt8[Array, "batch height width channels"]) -> Float[Array, "batch dim"]:
        """z of each frame, with the running statistics."""
        tokens = widen(self.encoder.embed_images(self.normalize_pixels(frames)))
        return self.projector(tokens, self.statistics.average.projector, self.ops)[0]

    def rollout(
        self,
        context: Float[Array, "context dim"],
        past: Float[Array, "past action"],
        candidates: Float[Array, "candidates horizon action"],
        window: int | None = None,
    ) -> Float[Array, "candidates frames dim"]:
        """`WorldModel.rollout`; a window has at most `history` frames."""
        count, horizon, _ = candidates.shape
        known, frames = len(context), len(context) + horizon
        assert len(past) == known - 1, "one block of actions between two frames of the context"
        window = min(window or self.config.predictor.history, frames - 1)

        # Every candidate starts with the same frames and blocks; predictions are filled in below.
        blocks = jnp.concatenate([jnp.broadcast_to(past, (count, *past.shape)), candidates], axis=1)
        c = self.action_encoder(blocks, self.ops)  # (N, frames - 1, D)
        z = jnp.zeros((count, frames, context.shape[1]), context.dtype).at[:, :known].set(context)

        def predict_next(z: Array, last: Array) -> tuple[Array, None]:
            # The window ends at the last known frame. Near the start it reaches beyond: no row sees later ones.
            start = jnp.maximum(last + 1 - window, 0)
            recent = (lax.dynamic_slice_in_dim(x, start, window, axis=1) for x in (z, c))
            rows = self.predictor(*recent, ops=self.ops)[:, last - start]
            prediction, _ = self.head(rows, self.statistics.average.head, self.ops)
            return z.at[:, last + 1].set(prediction), None

        return lax.scan(predict_next, z, jnp.arange(known - 1, frames - 1))[0]

    # ---- Parts of both ----

    @property
    def ops(self) -> Ops:
        """The functions of all networks: `encoder.fast` chooses them."""
        return self.encoder.stack.ops

    def normalize_pixels(self, frames: UInt8[Array, "*shape channels"]) -> Float[Array, "*shape channels"]:
        """(pixels / 255 - mean) / std."""
        return (frames / 255.0 - jnp.array(self.config.pixel_mean)) / jnp.array(self.config.pixel_std)

    def project(self, tokens: Clip, statistics: Statistics | None = None) -> tuple[Clip, Statistics]:
        """z of each frame, normalized over all of them or by given statistics, and the frames' own statistics."""
        return apply_to_rows(self.projector, tokens, statistics, self.ops)


def apply_to_rows(head: Head, x: Clip, statistics: Statistics | None, ops: Ops) -> tuple[Clip, Statistics]:
    """The head on each frame of each clip: its BatchNorm reads all of them together."""
    y, own = head(x.reshape(-1, x.shape[-1]), statistics, ops)
    return y.reshape(*x.shape[:2], -1), own


def clip_metrics(z: Clip, predictions: Clip, prediction_loss: Float[Array, ""]) -> Metrics:
    """What predictions explain of the next embeddings, next to copying the last frame; and norms for the watchdog."""
    targets = z[:, 1:]
    of_the_mean = jnp.mean(jnp.square(targets - jnp.mean(targets, axis=0)))
    return {
        "train/prediction_loss": prediction_loss,
        "train/copy_loss": jnp.mean(jnp.square(targets - z[:, :-1])),
        "train/explained_variance": explained_fraction(prediction_loss, of_the_mean),
        "health/target_norm": jnp.mean(jnp.linalg.norm(targets, axis=-1)),
        "health/prediction_norm": jnp.mean(jnp.linalg.norm(predictions, axis=-1)),
    }
