"""The vision transformer of I-JEPA: no class token, fixed positions, and only the selected patches are embedded."""

from dataclasses import dataclass, replace

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.nn.pos_embed import sincos_2d
from jepax.nn.transformer import BlockStack, LayerNorm, Linear, Remat, init_stack
from jepax.types import UserError

VIT_SIZES: dict[str, dict[str, int | float]] = {
    "tiny": {"width": 192, "depth": 12, "num_heads": 3},
    "small": {"width": 384, "depth": 12, "num_heads": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12},
    "large": {"width": 1024, "depth": 24, "num_heads": 16},
    "huge": {"width": 1280, "depth": 32, "num_heads": 16},
    "giant": {"width": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
}
"""Width, depth and heads by name (Assran et al. 2023; Zhai et al. 2022 for giant)."""


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and execution of an encoder. `ViTConfig(**SIZES["base"], patch_size=16)` is ViT-B/16."""

    patch_size: int = 16
    """Side of a square patch, in pixels."""
    in_channels: int = 3
    """Color channels of the image: 1 or 3."""
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
    scan_layers: bool = False
    """Run the blocks by a scan: compiles in seconds at any depth, costs 15 to 30% per step on a CPU."""
    remat: Remat = "none"
    """What the backward pass computes again: none, all but products with weights and attention's
    result (dots), or whole blocks (full)."""
    fast: bool = True
    """Use the fast kernels (nn/kernels.py). Set fast=False to change the model in nn/transformer.py."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            near = _nearest_divisor(self)
            raise UserError(f"num_heads={self.num_heads} does not divide width={self.width}; try num_heads={near}")
        if self.in_channels not in (1, 3):
            raise UserError(f"in_channels={self.in_channels} is neither 1 (gray) nor 3 (color)")
        for field in ("patch_size", "width", "depth", "num_heads", "mlp_ratio"):
            if getattr(self, field) <= 0:
                raise UserError(f"{field}={getattr(self, field)} must be above 0")

    def tiny(self) -> "ViTConfig":
        """The same encoder at the size that tests run: 6 x 6 patches of a 24 x 24 view."""
        return replace(self, patch_size=4, width=32, depth=2, num_heads=2)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of `size` (height, width)."""
        for name, side in zip(("height", "width"), size, strict=True):
            if side % self.patch_size:
                raise UserError(
                    f"the view's {name} {side} is not a multiple of patch_size={self.patch_size};"
                    f" try a patch_size of {_patch_sizes(side, self.patch_size)}"
                )
        return size[0] // self.patch_size, size[1] // self.patch_size


def _nearest_divisor(config: ViTConfig) -> int:
    return min(
        (h for h in range(1, config.width + 1) if config.width % h == 0), key=lambda h: abs(h - config.num_heads)
    )


def _patch_sizes(side: int, patch_size: int) -> str:
    near = sorted((d for d in range(1, side + 1) if side % d == 0), key=lambda d: abs(d - patch_size))[:2]
    return " or ".join(str(d) for d in sorted(near))


def patchify(images: Float[Array, "batch height width channels"], size: int) -> Float[Array, "batch patches pixels"]:
    """Row-major patches; a patch's pixels are ordered (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size

    # (batch, row of patches, row in the patch, column of patches, column in the patch, channel)
    split = images.reshape(batch, rows, size, columns, size, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, size * size * channels)


class ViT(eqx.Module):
    """An encoder of patches: s = ViT(x), one token of `width` per patch, after the final LayerNorm.

    Source: Dosovitskiy et al. 2021, as trimmed by Assran et al. 2023 (no class token, fixed 2-D sine-cosine
    positions, truncated normal initialization).
    """

    embed: Linear
    stack: BlockStack
    norm: LayerNorm
    config: ViTConfig = eqx.field(static=True)

    def __init__(self, config: ViTConfig, *, key: PRNGKeyArray):
        key_embed, key_stack = jr.split(key)
        pixels = config.patch_size**2 * config.in_channels
        self.embed = Linear(pixels, config.width, std=config.init_std, key=key_embed)
        self.stack = init_stack(
            config.width,
            config.depth,
            config.num_heads,
            round(config.width * config.mlp_ratio),
            std=config.init_std,
            scan_layers=config.scan_layers,
            remat=config.remat,
            fast=config.fast,
            key=key_stack,
        )
        self.norm = LayerNorm(config.width)
        self.config = config

    def embed_patches(
        self,
        images: Float[Array, "batch height width channels"],
        patch_indices: Int[Array, "batch context"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """Embedded patches with their positions: all of them, or those at the row-major `patch_indices`."""
        # (batch, patches, pixels) and (patches, dim)
        grid = self.config.grid(images.shape[1:3])
        patches = patchify(images, self.config.patch_size)
        positions = jnp.asarray(sincos_2d(grid, self.config.width))

        # Select before embedding: what the context encoder does not see costs nothing.
        if patch_indices is not None:
            patches = jnp.take_along_axis(patches, patch_indices[..., None], axis=1)
            positions = positions[patch_indices]

        # (batch, tokens, dim). A class token or registers go in front of these.
        tokens = self.embed(patches, self.stack.ops)
        return tokens + positions.astype(tokens.dtype)

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        patch_indices: Int[Array, "batch context"] | None = None,
    ) -> Float[Array, "batch tokens dim"]:
        """One token per patch; only those at `patch_indices` are seen, if given."""
        tokens = self.embed_patches(images, patch_indices)
        return self.norm(self.stack(tokens)[0], self.stack.ops)

    def intermediate_layers(
        self, images: Float[Array, "batch height width channels"], n: int
    ) -> Float[Array, "layers batch patches dim"]:
        """Outputs of the last `n` layers (of all, if there are fewer), each after the final LayerNorm."""
        outputs = self.stack(self.embed_patches(images), num_outputs=min(n, self.config.depth))
        return self.norm(jnp.stack(outputs), self.stack.ops)
