"""Views of images and masks over their patches, as methods of masked prediction draw them."""

import equinox as eqx
from jaxtyping import Array, Float

from jepax.types import Masks


class MaskedViews(eqx.Module):
    """One view of each image, and which of its patches are context and targets."""

    image: Float[Array, "batch height width channels"]
    masks: Masks
