"""I-JEPA whose loss, activations or gradient are spoilt at steps of our choice: what the guard is there for."""

from dataclasses import dataclass, fields, replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jepax.methods.ijepa import IJEPA, IJEPAConfig


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
    """See `SpoiltConfig`. Views and outputs carry the index of each example, which says what batch it is of."""

    def draw(self, batch, keys):
        return super().draw(batch, keys), batch.index

    def forward(self, views):
        views, index = views
        config = self.config
        bias = self.encoder.embed.bias * times(index, config, config.nan_activations, jnp.nan)
        gradient = times(index, config, config.inf_gradient, jnp.inf) * times(
            index, config, config.nan_gradient, jnp.nan
        )
        gradient *= times(index, config, config.large_gradient, 1000.0)
        encoder = eqx.tree_at(lambda e: e.embed.bias, self.encoder, bias)
        encoder = jax.tree.map(lambda x: backward_times(x, gradient) if eqx.is_inexact_array(x) else x, encoder)
        return IJEPA.forward(eqx.tree_at(lambda m: m.encoder, self, encoder), views), index

    def objective(self, outputs, *, key):
        outputs, index = outputs
        loss, metrics = super().objective(outputs, key=key)
        nan = times(index, self.config, self.config.nan_activations, jnp.nan)
        metrics["embeddings"] *= nan  # a teacher of our own would not have them
        return loss * times(index, self.config, self.config.inf_loss, jnp.inf), metrics


def times(index: Array, config: SpoiltConfig, batches: tuple[int, ...], factor: float) -> Float[Array, ""]:
    """The factor in these batches, else 1."""
    batch = index[0] // config.batch_size
    return jnp.where(jnp.isin(batch, jnp.array(batches or (-1,))), jnp.float32(factor), jnp.float32(1))


@jax.custom_vjp
def backward_times(x: Array, factor: Array) -> Array:
    """x itself, whose gradient is multiplied by the factor."""
    return x


backward_times.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


def spoilt(config: Config, **batches: tuple[int, ...]) -> Config:
    """The config with its I-JEPA spoilt in these batches."""
    method = {field.name: getattr(config.method, field.name) for field in fields(config.method)}
    return replace(config, method=SpoiltConfig(**method, batch_size=config.train.batch_size, **batches))
