"""The projector: an MLP with batch normalization between an encoder's embedding and a loss on it."""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.nn.transformer import FAST, PLAIN, Linear, Ops, widen
from jepax.types import UserError

BATCH_NORM_EPSILON = 1e-5


Statistics = Float[Array, "2 dim"]
"""Mean and variance of each dimension, over rows."""


class BatchNorm(eqx.Module):
    """Scales each dimension to mean 0 and variance 1 over the global batch, then by weight and bias; float32 inside.

    It has no running averages: most heads are dropped after training, so they never see a single example. Others keep
    theirs where nothing is trained, and give them as `statistics`: `Head`.
    """

    weight: Float[Array, "dim"]
    bias: Float[Array, "dim"]

    def __init__(self, dim: int):
        self.weight, self.bias = jnp.ones((dim,)), jnp.zeros((dim,))

    def __call__(self, x: Float[Array, "batch dim"], statistics: Statistics | None = None) -> Float[Array, "batch dim"]:
        x, dtype = widen(x), x.dtype
        centered = x - (jnp.mean(x, axis=0) if statistics is None else statistics[0])
        variance = jnp.mean(jnp.square(centered), axis=0) if statistics is None else statistics[1]
        normal = centered * lax.rsqrt(variance + BATCH_NORM_EPSILON)
        return (normal * self.weight + self.bias).astype(dtype)


@dataclass(frozen=True)
class ProjectorConfig:
    """Widths of a projector."""

    hidden_dims: tuple[int, ...] = (2048, 2048)
    """Widths of the hidden layers, each a linear layer, a BatchNorm over the global batch and a ReLU."""
    out_dim: int = 512
    """Dimension of the projection."""
    final_relu: bool = False
    """End with a ReLU."""

    def __post_init__(self) -> None:
        if min((self.out_dim, *self.hidden_dims)) < 1:
            raise UserError(f"projector.out_dim={self.out_dim} and hidden_dims={self.hidden_dims} must be above 0")

    def tiny(self) -> "ProjectorConfig":
        """The same head at the size that tests run."""
        return replace(self, hidden_dims=(24,), out_dim=8)


class Projector(eqx.Module):
    """z = W_k relu(BN(W_(k-1) ... relu(BN(W_1 x)))), optionally with a last ReLU, for one group of views."""

    linears: tuple[Linear, ...]
    norms: tuple[BatchNorm, ...]
    final_relu: bool = eqx.field(static=True)

    def __init__(self, config: ProjectorConfig, inputs: int, *, key: PRNGKeyArray):
        widths = (inputs, *config.hidden_dims, config.out_dim)
        keys, last = jr.split(key, len(widths) - 1), len(config.hidden_dims)
        # BatchNorm subtracts any bias before it, so only the last layer has one.
        self.linears = tuple(
            Linear(a, b, std=None, bias=layer == last, key=k)
            for layer, (a, b, k) in enumerate(zip(widths[:-1], widths[1:], keys, strict=True))
        )
        self.norms = tuple(BatchNorm(width) for width in config.hidden_dims)
        self.final_relu = config.final_relu

    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch dim"]:
        # Hidden layers: (batch, inputs) -> (batch, hidden)
        for linear, norm in zip(self.linears[:-1], self.norms, strict=True):
            x = jax.nn.relu(norm(linear(x, FAST)))

        # The projection, in float32 for the loss: (batch, dim)
        x = self.linears[-1](x, FAST).astype(jnp.float32)
        return jax.nn.relu(x) if self.final_relu else x


class Head(eqx.Module):
    """z = W_2 gelu(BN(W_1 x + b_1)) + b_2: a head that is used after training too, on any number of rows.

    In training, BatchNorm reads the rows of the global batch. Later it reads running means of their statistics, which
    the method keeps in an `EMA`: `initial_statistics`, moved towards those that each call returns.
    """

    fc1: Linear
    norm: BatchNorm
    fc2: Linear

    def __init__(self, inputs: int, hidden_dim: int, outputs: int, *, key: PRNGKeyArray):
        key_fc1, key_fc2 = jr.split(key)
        self.fc1 = Linear(inputs, hidden_dim, std=None, key=key_fc1)
        self.norm = BatchNorm(hidden_dim)
        self.fc2 = Linear(hidden_dim, outputs, std=None, key=key_fc2)

    def initial_statistics(self) -> Statistics:
        """Mean 0 and variance 1."""
        return jnp.stack([jnp.zeros_like(self.norm.bias), jnp.ones_like(self.norm.weight)])

    def __call__(
        self, x: Float[Array, "rows inputs"], statistics: Statistics | None = None, ops: Ops = PLAIN
    ) -> tuple[Float[Array, "rows outputs"], Statistics]:
        """z in float32, and the rows' own mean and unbiased variance. Normalizes by `statistics`, if given."""
        hidden = self.fc1(x, ops)
        own = jnp.stack([jnp.mean(widen(hidden), axis=0), jnp.var(widen(hidden), axis=0, ddof=min(1, len(x) - 1))])
        return widen(self.fc2(ops.gelu(self.norm(hidden, statistics)), ops)), own
