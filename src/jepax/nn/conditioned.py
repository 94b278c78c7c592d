"""A causal transformer over time, each frame conditioned on what happens after it: the predictor of a world model.

Blocks are modulated by the condition (AdaLN-zero, Peebles & Xie 2023), as in LeWorldModel (arXiv:2603.19312):

    m = U silu(c) + u, which is split into shift_a, scale_a, gate_a, shift_m, scale_m, gate_m
    x <- x + gate_a Attention(norm1(n(x) (1 + scale_a) + shift_a))
    x <- x + gate_m MLP(norm2(n(x) (1 + scale_m) + shift_m))

n is LayerNorm without parameters. U and u start at zero: each block starts as the identity. That norm1 and norm2 come
after the modulation, and take away a part of it, is as published.
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.errors import check_fields
from jepax.nn.transformer import MLP, PLAIN, LayerNorm, Linear, Ops, attention, dropout, normalize, split_key

Frames = Float[Array, "batch frames dim"]
NORM_EPSILON = 1e-5
"""Of every LayerNorm with parameters; the one without has the usual 1e-6."""


@dataclass(frozen=True)
class CausalPredictorConfig:
    """Sizes of a predictor over time."""

    history: int = 3
    """Most frames that a prediction sees."""
    width: int = 192
    """Dimension of a token; linear maps to it and back exist if embeddings have another one."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads."""
    head_width: int = 64
    """Dimension of a head; all heads together may be wider than a token."""
    mlp_width: int = 2048
    """Hidden width of the MLP."""
    dropout: float = 0.1
    """Fraction dropped, in training, of attention's weights and of what attention and MLP return."""

    def __post_init__(self) -> None:
        sizes = ("history", "width", "depth", "num_heads", "head_width", "mlp_width")
        check_fields("predictor", self, "at least 1", *sizes)
        check_fields("predictor", self, "in [0, 1)", "dropout")

    def tiny(self) -> "CausalPredictorConfig":
        """The same predictor at the size that tests run."""
        return replace(self, width=16, depth=2, num_heads=2, head_width=4, mlp_width=24)


class CausalAttention(eqx.Module):
    """Multi-head attention of each frame to itself and to earlier ones; queries, keys and values have no bias.

    Fast or not, it is the plain `attention`: so few frames take no time there.
    """

    qkv: Linear  # (dim, 3 heads head_width)
    proj: Linear
    num_heads: int = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(self, config: CausalPredictorConfig, *, key: PRNGKeyArray):
        key_qkv, key_proj = jr.split(key)
        inner = config.num_heads * config.head_width
        self.qkv = Linear(config.width, 3 * inner, std=None, bias=False, key=key_qkv)
        self.proj = Linear(inner, config.width, std=None, key=key_proj)
        self.num_heads, self.dropout = config.num_heads, config.dropout

    def __call__(self, x: Frames, *, key: PRNGKeyArray | None = None, ops: Ops = PLAIN) -> Frames:
        key_weights, key_out = split_key(key, 2)
        # (batch, frames, dim) -> three of (batch, frames, heads, channels)
        q, k, v = jnp.moveaxis(self.qkv(x, ops).reshape(*x.shape[:2], 3, self.num_heads, -1), 2, 0)
        attended = attention(q, k, v, causal=True, dropout_rate=self.dropout, key=key_weights)
        return dropout(self.proj(attended.reshape(*x.shape[:2], -1), ops), self.dropout, key_out)


class ConditionedBlock(eqx.Module):
    """A causal transformer block that the condition modulates: the equations at the top of this file."""

    modulation: Linear  # U, u
    norm1: LayerNorm
    attention: CausalAttention
    norm2: LayerNorm
    mlp: MLP

    def __init__(self, config: CausalPredictorConfig, *, key: PRNGKeyArray):
        key_attention, key_mlp = jr.split(key)
        width = config.width
        zeros = Linear(width, 6 * width, std=None, key=key)
        self.modulation = jax.tree.map(jnp.zeros_like, zeros)
        self.norm1, self.norm2 = LayerNorm(width, NORM_EPSILON), LayerNorm(width, NORM_EPSILON)
        self.attention = CausalAttention(config, key=key_attention)
        self.mlp = MLP(width, config.mlp_width, std=None, key=key_mlp)

    def __call__(self, x: Frames, condition: Frames, *, key: PRNGKeyArray | None = None, ops: Ops = PLAIN) -> Frames:
        """The frames after the block. With a key, numbers are dropped out."""
        key_attention, key_mlp = split_key(key, 2)
        modulation = jnp.split(self.modulation(jax.nn.silu(condition), ops), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation

        # Frames exchange information, each with itself and earlier ones.
        y = self.norm1(normalize(x) * (1 + scale_a) + shift_a, ops)
        x = x + gate_a * self.attention(y, key=key_attention, ops=ops)

        # Each frame is processed on its own.
        y = self.norm2(normalize(x) * (1 + scale_m) + shift_m, ops)
        return x + gate_m * self.mlp(y, ops, dropout_rate=self.attention.dropout, key=key_mlp)


class CausalPredictor(eqx.Module):
    """From embeddings of consecutive frames, and a condition for each, one vector per frame that sees no later one.

    At most `history` frames at a time; positions count from the first of them.
    """

    positions: Float[Array, "history dim"]
    input: Linear | None
    condition: Linear | None
    blocks: tuple[ConditionedBlock, ...]
    norm: LayerNorm
    output: Linear | None

    def __init__(self, config: CausalPredictorConfig, embed_dim: int, *, key: PRNGKeyArray):
        key_positions, key_blocks, *keys = jr.split(key, 5)
        width, same = config.width, config.width == embed_dim
        self.positions = jr.normal(key_positions, (config.history, embed_dim))
        self.blocks = tuple(ConditionedBlock(config, key=k) for k in jr.split(key_blocks, config.depth))
        self.norm = LayerNorm(width, NORM_EPSILON)

        # Linear maps between the two dimensions, if they differ.
        self.input = None if same else Linear(embed_dim, width, std=None, key=keys[0])
        self.condition = None if same else Linear(embed_dim, width, std=None, key=keys[1])
        self.output = None if same else Linear(width, embed_dim, std=None, key=keys[2])

    def __call__(self, z: Frames, condition: Frames, *, key: PRNGKeyArray | None = None, ops: Ops = PLAIN) -> Frames:
        """Row t is computed from rows up to t of both. With a key, numbers are dropped out."""
        x = z + self.positions[: z.shape[1]]
        if self.input is not None and self.condition is not None:
            x, condition = self.input(x, ops), self.condition(condition, ops)
        for block, key_block in zip(self.blocks, split_key(key, len(self.blocks)), strict=True):
            x = block(x, condition, key=key_block, ops=ops)
        x = self.norm(x, ops)
        return x if self.output is None else self.output(x, ops)


class ActionEncoder(eqx.Module):
    """c = V_2 silu(V_1 (V_0 a + v_0) + v_1) + v_2, for each frame's block of actions, side by side in one vector."""

    embed: Linear
    fc1: Linear
    fc2: Linear

    def __init__(self, inputs: int, outputs: int, *, width: int = 10, expansion: int = 4, key: PRNGKeyArray):
        key_embed, key_fc1, key_fc2 = jr.split(key, 3)
        self.embed = Linear(inputs, width, std=None, key=key_embed)
        self.fc1 = Linear(width, expansion * outputs, std=None, key=key_fc1)
        self.fc2 = Linear(expansion * outputs, outputs, std=None, key=key_fc2)

    def __call__(
        self, actions: Float[Array, "batch frames action"], ops: Ops = PLAIN
    ) -> Float[Array, "batch frames dim"]:
        return self.fc2(jax.nn.silu(self.fc1(self.embed(actions, ops), ops)), ops)
