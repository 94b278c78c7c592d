"""I-JEPA whose loss, activations or gradient are spoilt at steps of our choice: a case for the guard."""

from dataclasses import dataclass, fields, replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from jepax.methods.ijepa import IJEPA, IJEPAConfig, Outputs
from jepax.training.config import Config
from jepax.types import ImageBatch, Metrics
from jepax.views import MaskedViews


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


class Numbered(eqx.Module):
    """Views or outputs of examples, and the number of the batch that each example belongs to."""

    content: MaskedViews | Outputs
    batch: Int[Array, "batch"]


class Spoilt(IJEPA):
    """See `SpoiltConfig`."""

    def draw(self, batch: ImageBatch, keys: Key[Array, "batch"]) -> Numbered:
        return Numbered(IJEPA.draw(self, batch, keys), jnp.asarray(batch.index) // self.config.batch_size)

    def forward(self, views: Numbered) -> Numbered:
        config, batch = self.config, views.batch[0]
        bias = self.encoder.embed.bias * factor(batch, config.nan_activations, jnp.nan)
        gradient = factor(batch, config.inf_gradient, jnp.inf) * factor(batch, config.nan_gradient, jnp.nan)
        gradient *= factor(batch, config.large_gradient, 1000.0)
        encoder = eqx.tree_at(lambda e: e.embed.bias, self.encoder, bias)
        encoder = jax.tree.map(lambda x: backward_times(x, gradient) if eqx.is_inexact_array(x) else x, encoder)
        method = eqx.tree_at(lambda m: m.encoder, self, encoder)
        return Numbered(IJEPA.forward(method, views.content), views.batch)

    def objective(self, outputs: Numbered, *, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        config, batch = self.config, outputs.batch[0]
        loss, metrics = IJEPA.objective(self, outputs.content, key=key)
        metrics["embeddings"] *= factor(batch, config.nan_activations, jnp.nan)  # the teacher's would not have them
        return loss * factor(batch, config.inf_loss, jnp.inf), metrics


def factor(batch: Int[Array, ""], batches: tuple[int, ...], value: float) -> Float[Array, ""]:
    """`value` in these batches, 1 in the others."""
    return jnp.where(jnp.isin(batch, jnp.array(batches or (-1,))), jnp.float32(value), jnp.float32(1))


@jax.custom_vjp
def backward_times(x: Array, factor: Array) -> Array:
    """x itself, whose gradient is multiplied by the factor."""
    return x


backward_times.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


def spoilt(config: Config, **batches: tuple[int, ...]) -> Config:
    """The config with its I-JEPA spoilt in these batches."""
    method = {field.name: getattr(config.method, field.name) for field in fields(config.method)}
    return replace(config, method=SpoiltConfig(**method, batch_size=config.train.batch_size, **batches))
