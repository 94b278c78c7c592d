"""The predictor of I-JEPA: a narrow transformer from context tokens and target positions to target embeddings."""

from dataclasses import dataclass, replace

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.nn.pos_embed import sincos_2d
from jepax.nn.transformer import BlockStack, LayerNorm, Linear, Remat, init_stack, init_weight
from jepax.types import Masks, UserError


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes and execution of a predictor."""

    width: int = 384
    """Dimension of a token."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    init_std: float | None = 0.02
    """Standard deviation of the initial weights (0.02 as published); None means 1 / sqrt(fan in)."""
    scan_layers: bool = False
    """Run the blocks by a scan."""
    remat: Remat = "none"
    """What the backward pass computes again: none, all but products with weights and attention's
    result (dots), or whole blocks (full)."""
    fast: bool = True
    """Use the fast kernels (nn/kernels.py). Set fast=False to change the model in nn/transformer.py."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise UserError(f"predictor: num_heads={self.num_heads} does not divide width={self.width}")
        for field in ("width", "depth", "num_heads", "mlp_ratio"):
            if getattr(self, field) <= 0:
                raise UserError(f"predictor: {field}={getattr(self, field)} must be above 0")

    def tiny(self) -> "PredictorConfig":
        """The same predictor at the size that tests run."""
        return replace(self, width=16, depth=2, num_heads=2)


class Predictor(eqx.Module):
    """s_hat_y = g_phi(s_x, positions of y): one pass per target block, all blocks as one batch.

    Each pass sees the context's tokens and that block's mask tokens, so blocks cannot see each other. Source:
    Assran et al. 2023, section 3. The last block computes only the tokens whose predictions are returned.
    """

    embed: Linear
    mask_token: Float[Array, "1 dim"]
    stack: BlockStack
    norm: LayerNorm
    proj: Linear
    config: PredictorConfig = eqx.field(static=True)

    def __init__(self, config: PredictorConfig, encoder_width: int, *, num_outputs: int = 1, key: PRNGKeyArray):
        key_embed, key_mask, key_stack, key_proj = jr.split(key, 4)
        std = config.init_std
        self.embed = Linear(encoder_width, config.width, std=std, key=key_embed)
        self.mask_token = init_weight(key_mask, (1, config.width), 0.02 if std is None else std)
        self.stack = init_stack(
            config.width,
            config.depth,
            config.num_heads,
            round(config.width * config.mlp_ratio),
            std=std,
            scan_layers=config.scan_layers,
            remat=config.remat,
            fast=config.fast,
            key=key_stack,
        )
        self.norm = LayerNorm(config.width)
        self.proj = Linear(config.width, num_outputs * encoder_width, std=std, key=key_proj)
        self.config = config

    def __call__(
        self,
        context: Float[Array, "batch context width"],
        masks: Masks,
        grid: tuple[int, int],
        *,
        predict_context: bool = False,
    ) -> Float[Array, "batch blocks tokens width_by_outputs"]:
        """Predictions at every target position, also at padding (which the loss must leave out).

        With `predict_context` those at the context's positions come before them. A token has `num_outputs`
        predictions, such as those of several layers, side by side.
        """
        batch, blocks, target = masks.targets.shape
        num_context, ops = context.shape[1], self.stack.ops

        # Context tokens and mask tokens, each with its position: (batch, context, dim), (batch, blocks, target, dim)
        positions = jnp.asarray(sincos_2d(grid, self.config.width)).astype(self.mask_token.dtype)
        context = self.embed(context, ops) + positions[masks.context]
        queries = self.mask_token + positions[masks.targets]

        # One sequence for each target block, the context first: (batch * blocks, context + target, dim)
        repeated = jnp.broadcast_to(context[:, None], (batch, blocks, *context.shape[1:]))
        tokens = jnp.concatenate([repeated, queries], axis=2).reshape(batch * blocks, num_context + target, -1)

        # Padding at the end of a target block is not attended to.
        lengths = num_context + jnp.sum(masks.target_valid, axis=2, dtype=jnp.int32)

        # The last tokens are the targets; nothing else leaves the last block.
        num_queries = num_context + target if predict_context else target
        tokens = self.stack(tokens, lengths.reshape(-1), num_queries=num_queries)[0]
        return self.proj(self.norm(tokens, ops), ops).reshape(batch, blocks, num_queries, -1)
