"""Views and patch masks for methods of masked prediction."""

import equinox as eqx
from jaxtyping import Array, Float

from jepax.types import Masks


class MaskedViews(eqx.Module):
    """One view of each image, and the indices of its context and target patches."""

    image: Float[Array, "batch height width channels"]
    masks: Masks
