"""I-JEPA whose loss, activations or gradient are spoilt at steps of our choice: what the guard is there for."""

from dataclasses import dataclass, fields, replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.ijepa import IJEPA, IJEPAConfig
from jepax.training.config import Config
from jepax.types import ImageBatch, Metrics


@dataclass(frozen=True)
class SpoiltConfig(IJEPAConfig, name="spoilt_ijepa"):
    """I-JEPA, and what happens to it. Importing this file makes configs of it readable."""

    batch_size: int = 16
    nan_activations: tuple[int, ...] = ()
    """Batches, counted in the order of the examples, whose first activations are not numbers."""
    inf_loss: tuple[int, ...] = ()
    inf_gradient: tuple[int, ...] = ()
    nan_gradient: tuple[int, ...] = ()
    large_gradient: tuple[int, ...] = ()
    """Batches whose gradient is 1000 times what it should be."""

    def build(self, *, total_steps: int, key: PRNGKeyArray) -> "Spoilt":
        return Spoilt(self, total_steps=total_steps, key=key)


class Spoilt(IJEPA):
    """See `SpoiltConfig`."""

    def loss(self, images: ImageBatch, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        config, batch = self.config, images.index[0] // self.config.batch_size

        def times(batches: tuple[int, ...], factor: float) -> Float[Array, ""]:
            return jnp.where(jnp.isin(batch, jnp.array(batches or (-1,))), jnp.float32(factor), jnp.float32(1))

        bias = self.encoder.embed.bias * times(config.nan_activations, jnp.nan)
        gradient = times(config.inf_gradient, jnp.inf) * times(config.nan_gradient, jnp.nan)
        gradient *= times(config.large_gradient, 1000.0)
        encoder = eqx.tree_at(lambda e: e.embed.bias, self.encoder, bias)
        encoder = jax.tree.map(lambda x: backward_times(x, gradient) if eqx.is_inexact_array(x) else x, encoder)
        loss, metrics = IJEPA.loss(eqx.tree_at(lambda m: m.encoder, self, encoder), images, key=key)
        metrics["embeddings"] *= times(config.nan_activations, jnp.nan)  # a teacher of our own would not have them
        return loss * times(config.inf_loss, jnp.inf), metrics


@jax.custom_vjp
def backward_times(x: Array, factor: Array) -> Array:
    """x itself, whose gradient is multiplied by the factor."""
    return x


backward_times.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


def spoilt(config: Config, **batches: tuple[int, ...]) -> Config:
    """The config with its I-JEPA spoilt in these batches."""
    method = {field.name: getattr(config.method, field.name) for field in fields(config.method)}
    return replace(config, method=SpoiltConfig(**method, batch_size=config.train.batch_size, **batches))
