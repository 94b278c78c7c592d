"""A stack of transformer blocks: its sizes, and its execution (unrolled or scanned, rematerialized or not)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.nn.kernels import ATTN_OUT, EPSILON, Lengths, Tokens
from jepax.nn.transformer import FAST, PLAIN, Block, Ops
from jepax.types import UserError

Remat = Literal["none", "dots", "full"]
SAVE_MATMULS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(ATTN_OUT)
)
"""Saved by `remat="dots"`: products with weights, and attention's result; no scores, whose size is tokens squared."""


@dataclass(frozen=True)
class StackConfig:
    """Sizes and execution of a stack of blocks: the common part of encoder and predictor."""

    width: int = 768
    """Dimension of a token."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; must divide the width."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    init_std: float | None = 0.02
    """Standard deviation of the initial weights (0.02 as published); None means 1 / sqrt(fan in), for small widths."""
    norm_epsilon: float = EPSILON
    """Added to the variance in every LayerNorm."""
    scan_layers: bool = False
    """Run the blocks by a scan: compiles in seconds at any depth, costs 15 to 30% per step on a CPU."""
    remat: Remat = "none"
    """Recomputed by the backward pass: nothing (none), all but products with weights and attention's result (dots), or
    all of a block (full)."""
    fast: bool = True
    """Use the fast kernels (nn/kernels.py). Set fast=False to change the model in nn/transformer.py."""

    def __post_init__(self) -> None:
        check_fields("", self, "above 0", "width", "depth", "num_heads", "mlp_ratio", "norm_epsilon")
        # The error proposes the divisor of the width that is nearest to the number given.
        if self.width % self.num_heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
            near = min(divisors, key=lambda n: abs(n - self.num_heads))
            raise UserError(f"num_heads={self.num_heads} does not divide width={self.width}; try num_heads={near}")


class BlockStack(eqx.Module):
    """`depth` blocks, stored as one block whose arrays have a leading axis of layers; `init_stack` makes one.

    The static fields set how it runs, not what it computes: `dataclasses.replace(stack, fast=False)` is the same model.
    """

    blocks: Block
    depth: int = eqx.field(static=True)
    scan_layers: bool = eqx.field(static=True, default=False)
    remat: Remat = eqx.field(static=True, default="none")
    fast: bool = eqx.field(static=True, default=True)
    gather: Callable[[Block], Block] | None = eqx.field(static=True, default=None)
    """Applied to one block's parameters just before it runs: how FSDP gathers them, layer by layer."""

    @property
    def ops(self) -> Ops:
        """The functions of the blocks; the layers around the stack use them, too."""
        return FAST if self.fast else PLAIN

    def __call__(
        self, x: Tokens, lengths: Lengths = None, *, num_outputs: int = 1, num_queries: int | None = None
    ) -> tuple[Float[Array, "batch _ dim"], ...]:
        """The outputs of the last `num_outputs` layers, first to last.

        The last layer computes the last `num_queries` tokens only (default: all).
        """
        # A scan runs the layers whose outputs are not returned.
        scanned = max(self.depth - num_outputs, 0) if self.scan_layers else 0
        if scanned:
            x = self._scan(x, lengths, scanned)

        # The other layers run one after the other. Only the last one may drop tokens: each needs all tokens of the one
        # before it, as keys and values.
        outputs, layers = [], self._layers()
        for layer in range(scanned, self.depth):
            x = self._run(layers[layer], x, lengths, num_queries if layer == self.depth - 1 else None)
            outputs.append(x)
        return tuple(outputs[-num_outputs:])

    def _run(self, block: Block, x: Array, lengths: Lengths, num_queries: int | None) -> Array:
        """One block, under the policies of `remat` and `gather`."""

        def call(block: Block, x: Array, lengths: Lengths) -> Array:
            # Inside the checkpoint, so the backward pass gathers parameters again instead of storing them.
            block = block if self.gather is None else self.gather(block)
            return block(x, lengths, num_queries=num_queries, ops=self.ops)

        if self.remat == "none":
            return call(block, x, lengths)
        return eqx.filter_checkpoint(call, policy=SAVE_MATMULS if self.remat == "dots" else None)(block, x, lengths)

    def _scan(self, x: Array, lengths: Lengths, count: int) -> Array:
        """The first `count` layers as one loop, which compiles in the time of one block."""

        def step(x: Array, block: Block) -> tuple[Array, None]:
            return self._run(block, x, lengths, None), None

        # The carry is the tokens, and the loop is over the layer axis of the parameters.
        return lax.scan(step, x, jax.tree.map(lambda leaf: leaf[:count], self.blocks))[0]

    def _layers(self) -> list[Block]:
        """One block per layer, by `lax.split`: its gradient is one concatenation, that of slices a sum of pads."""

        def split(leaf: Array) -> list[Array]:
            return [jnp.squeeze(part, 0) for part in lax.split(leaf, (1,) * self.depth)]

        # From one list per array, with an element per layer, to one block per layer.
        leaves, tree = jax.tree.flatten(self.blocks)
        return [jax.tree.unflatten(tree, layer) for layer in zip(*map(split, leaves), strict=True)]


def init_stack(config: StackConfig, *, key: PRNGKeyArray) -> BlockStack:
    """A stack of new blocks. In layer l = 1, 2, ... the weights of `proj` and `fc2` are divided by sqrt(2 l).

    *Differs from the reference:* the released code undoes this division by a second initialization; here it remains.
    """
    hidden_dim = round(config.width * config.mlp_ratio)

    def init_block(key: PRNGKeyArray) -> Block:
        options = {"std": config.init_std, "norm_epsilon": config.norm_epsilon}
        return Block(config.width, config.num_heads, hidden_dim, **options, key=key)

    # One key per layer; `vmap` stacks the layers' arrays on their first axis.
    blocks = eqx.filter_vmap(init_block)(jr.split(key, config.depth))

    # These two layers add to the residual stream, once per block: smaller in deeper blocks, so that it grows less.
    divisor = jnp.sqrt(2.0 * jnp.arange(1, config.depth + 1))[:, None, None]
    blocks = eqx.tree_at(
        lambda b: (b.attention.proj.weight, b.mlp.fc2.weight), blocks, replace_fn=lambda w: w / divisor
    )
    return BlockStack(blocks, config.depth, config.scan_layers, config.remat, config.fast)
