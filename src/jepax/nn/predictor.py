"""The predictor of I-JEPA: a narrow transformer from context tokens and target positions to target embeddings."""

from dataclasses import dataclass, replace

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.nn.pos_embed import sincos_2d
from jepax.nn.stack import BlockStack, StackConfig, init_stack
from jepax.nn.transformer import LayerNorm, Linear, init_weight
from jepax.types import Masks


@dataclass(frozen=True)
class PredictorConfig(StackConfig):
    """Sizes and execution of a predictor."""

    width: int = 384
    """Dimension of a token."""
    depth: int = 6
    """Number of blocks."""

    def tiny(self) -> "PredictorConfig":
        """The same predictor at the size that tests run."""
        return replace(self, width=16, depth=2, num_heads=2)


class Predictor(eqx.Module):
    """One pass per target block, all passes as one batch: its patches' embeddings from the context and their positions.

    Each pass sees the context's tokens and that block's mask tokens, so target blocks cannot see each other. Source:
    Assran et al. 2023, section 3.
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
        self.stack = init_stack(config, key=key_stack)
        self.norm = LayerNorm(config.width, config.norm_epsilon)
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

        With `predict_context` those at the context's positions come first. The `num_outputs` predictions of a token,
        such as those of several layers, are concatenated.
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
