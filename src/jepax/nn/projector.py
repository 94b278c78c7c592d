"""The projector: an MLP with batch normalisation between an encoder's embedding and a loss on it."""

from dataclasses import dataclass, replace
from typing import Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.nn.blocks import Linear
from jepax.types import UserError

EPSILON = 1e-5


class BatchNorm(eqx.Module):
    """Each dimension to mean 0 and variance 1 over the global batch, then weight and bias; statistics in float32.

    No running averages: a projector is dropped after training, so it never meets a single example.
    """

    weight: Float[Array, "dim"]
    bias: Float[Array, "dim"]

    def __init__(self, dim: int):
        self.weight, self.bias = jnp.ones((dim,)), jnp.zeros((dim,))

    def __call__(self, x: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
        centred = x.astype(jnp.float32) - jnp.mean(x, axis=0, dtype=jnp.float32)
        normal = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=0) + EPSILON)
        return (normal * self.weight + self.bias).astype(x.dtype)


@dataclass(frozen=True)
class ProjectorConfig:
    """Widths of a projector."""

    hidden: tuple[int, ...] = (2048, 2048)
    """Widths of the hidden layers, each a linear map, a BatchNorm over the global batch and a ReLU."""
    width: int = 512
    """Dimension of the projection."""
    rectified: bool = False
    """Whether a ReLU ends it."""

    def __post_init__(self) -> None:
        if min((self.width, *self.hidden)) < 1:
            raise UserError(f"projector.width={self.width} and projector.hidden={self.hidden} must be above 0")

    def tiny(self) -> Self:
        """The same head at the size that tests run."""
        return replace(self, hidden=(24,), width=8)


class Projector(eqx.Module):
    """z = W_k relu(BN(W_(k-1) ... relu(BN(W_1 x)))), perhaps through a last ReLU; for one group of views at a time."""

    linears: tuple[Linear, ...]
    norms: tuple[BatchNorm, ...]
    rectified: bool = eqx.field(static=True)

    def __init__(self, config: ProjectorConfig, inputs: int, *, key: PRNGKeyArray):
        widths = (inputs, *config.hidden, config.width)
        keys, last = jr.split(key, len(widths) - 1), len(config.hidden)
        self.linears = tuple(  # BatchNorm takes a bias before it away again, so only the last has one
            Linear(a, b, std=None, bias=layer == last, key=k)
            for layer, (a, b, k) in enumerate(zip(widths[:-1], widths[1:], keys, strict=True))
        )
        self.norms = tuple(BatchNorm(width) for width in config.hidden)
        self.rectified = config.rectified

    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch dim"]:
        for linear, norm in zip(self.linears, self.norms, strict=False):
            x = jax.nn.relu(norm(linear(x)))
        x = self.linears[-1](x).astype(jnp.float32)
        return jax.nn.relu(x) if self.rectified else x
