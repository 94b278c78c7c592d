"""The predictor of I-JEPA: a narrow transformer from context tokens and target positions to target embeddings."""

from dataclasses import dataclass, replace
from typing import Self

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.nn.blocks import LayerNorm, Linear, Remat, Stack, init_weight
from jepax.nn.position import sincos_2d
from jepax.types import Masks, UserError


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes and execution of a predictor."""

    width: int = 384
    """Dimension of a token."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 12
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    init_std: float | None = 0.02
    """Deviation of the initial weights (0.02 as published); None takes 1 / sqrt(fan in)."""
    scan: bool = False
    """Run the blocks by a scan."""
    remat: Remat = "none"
    """What the backward pass computes again: none, all but products with weights and attention's
    result (dots), or whole blocks (full)."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"predictor: heads={self.heads} does not divide width={self.width}")
        for field in ("width", "depth", "heads", "mlp_ratio"):
            if getattr(self, field) <= 0:
                raise UserError(f"predictor: {field}={getattr(self, field)} must be above 0")

    def tiny(self) -> Self:
        """The same predictor at the size that tests run."""
        return replace(self, width=16, depth=2, heads=2)


class Predictor(eqx.Module):
    """s_hat_y = g_phi(s_x, positions of y): one pass per target block, all blocks folded into one batch.

    Each pass sees the context's tokens and that block's mask tokens, so blocks cannot see each other. Source:
    Assran et al. 2023, section 3. In the last block only the tokens whose predictions are wanted are computed.
    """

    embed: Linear
    mask_token: Float[Array, "1 dim"]
    stack: Stack
    norm: LayerNorm
    project: Linear
    config: PredictorConfig = eqx.field(static=True)

    def __init__(self, config: PredictorConfig, encoder_width: int, *, outputs: int = 1, key: PRNGKeyArray):
        key_embed, key_mask, key_stack, key_project = jr.split(key, 4)
        std = config.init_std
        self.embed = Linear(encoder_width, config.width, std=std, key=key_embed)
        self.mask_token = init_weight(key_mask, (1, config.width), 0.02 if std is None else std)
        self.stack = Stack(
            config.width,
            config.depth,
            config.heads,
            round(config.width * config.mlp_ratio),
            std=std,
            scan=config.scan,
            remat=config.remat,
            key=key_stack,
        )
        self.norm = LayerNorm(config.width)
        self.project = Linear(config.width, outputs * encoder_width, std=std, key=key_project)
        self.config = config

    def __call__(
        self,
        context: Float[Array, "batch context width"],
        masks: Masks,
        grid: tuple[int, int],
        *,
        also_context: bool = False,
    ) -> Float[Array, "batch blocks tokens width_by_outputs"]:
        """Predictions at every target position, also at padding (which the loss must leave out).

        `also_context` puts those at the context's positions before them. A token holds its `outputs` predictions,
        such as those of several layers, side by side.
        """
        batch, blocks, target = masks.targets.shape
        seen = context.shape[1]
        positions = jnp.asarray(sincos_2d(grid, self.config.width)).astype(self.mask_token.dtype)
        context = self.embed(context) + positions[masks.context]
        queries = self.mask_token + positions[masks.targets]
        repeated = jnp.broadcast_to(context[:, None], (batch, blocks, *context.shape[1:]))
        tokens = jnp.concatenate([repeated, queries], axis=2).reshape(batch * blocks, seen + target, -1)
        lengths = seen + jnp.sum(masks.target_valid, axis=2, dtype=jnp.int32)
        wanted = seen + target if also_context else target
        tokens = self.stack(tokens, lengths.reshape(-1), last=wanted)[0]
        return self.project(self.norm(tokens)).reshape(batch, blocks, wanted, -1)
