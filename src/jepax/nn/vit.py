"""The vision transformer of I-JEPA: no class token, fixed positions, and only the selected patches are embedded.

A class token and learned positions are options.
"""

import math
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jepax.errors import check_fields
from jepax.nn.pos_embed import sincos_2d
from jepax.nn.stack import BlockStack, StackConfig, init_stack
from jepax.nn.transformer import LayerNorm, Linear, init_weight
from jepax.types import UserError

Images = Float[Array, "batch height width channels"]
Tokens = Float[Array, "batch tokens dim"]
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
class ViTConfig(StackConfig):
    """Sizes and execution of an encoder. `ViTConfig(**VIT_SIZES["base"], patch_size=16)` is ViT-B/16."""

    patch_size: int = 16
    """Side of a square patch, in pixels."""
    in_channels: int = 3
    """Color channels of the image: 1 or 3."""
    class_token: bool = False
    """Add a learned token that sees all patches: `ViT.embed_images` returns it, one vector per image."""
    learned_grid: tuple[int, int] | None = None
    """Learn the positions, for images of so many rows and columns of patches; None: fixed sine-cosine positions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields("", self, "above 0", "patch_size")
        if self.in_channels not in (1, 3):
            raise UserError(f"in_channels={self.in_channels} is neither 1 (gray) nor 3 (color)")

    def tiny(self) -> "ViTConfig":
        """The same encoder at the size that tests run: 6 x 6 patches of a 24 x 24 view."""
        grid = self.learned_grid and (6, 6)
        return replace(self, patch_size=4, width=32, depth=2, num_heads=2, learned_grid=grid)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image of `size` (height, width)."""
        for name, side in zip(("height", "width"), size, strict=True):
            if side % self.patch_size:
                divisors = [d for d in range(1, side + 1) if side % d == 0]
                near = sorted(sorted(divisors, key=lambda d: abs(d - self.patch_size))[:2])
                raise UserError(
                    f"the view's {name} {side} is not a multiple of patch_size={self.patch_size};"
                    f" try a patch_size of {' or '.join(map(str, near))}"
                )
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        if self.learned_grid not in (None, grid):
            raise UserError(f"learned_grid={self.learned_grid}, but images of {size} have {grid} patches; set that")
        return grid


def patchify(images: Images, size: int) -> Float[Array, "batch patches pixels"]:
    """Row-major patches; a patch's pixels are ordered (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size

    # (batch, row of patches, row in the patch, column of patches, column in the patch, channel)
    split = images.reshape(batch, rows, size, columns, size, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, size * size * channels)


def take_patches(
    patches: Float[Array, "batch patches dim"], indices: Int[Array, "batch *shape"]
) -> Float[Array, "batch *shape dim"]:
    """Each image's patches at its own indices."""
    return jax.vmap(lambda rows, index: rows[index])(patches, indices)


def pool(tokens: Float[Array, "batch tokens dim"]) -> Float[Array, "batch dim"]:
    """Mean over an image's tokens, in float32."""
    return jnp.mean(tokens.astype(jnp.float32), axis=1)


class ViT(eqx.Module):
    """An encoder of patches: one token of `width` per patch, after the final LayerNorm.

    Source: Dosovitskiy et al. 2021, as trimmed by Assran et al. 2023 (no class token, fixed 2-D sine-cosine
    positions, truncated normal initialization). The class token and learned positions are those of the former.
    """

    embed: Linear
    stack: BlockStack
    norm: LayerNorm
    class_token: Float[Array, "1 dim"] | None
    positions: Float[Array, "tokens dim"] | None
    """Learned: one for each patch, then the class token's, if there is one."""
    config: ViTConfig = eqx.field(static=True)

    def __init__(self, config: ViTConfig, *, key: PRNGKeyArray):
        key_embed, key_stack = jr.split(key)
        pixels = config.patch_size**2 * config.in_channels
        self.embed = Linear(pixels, config.width, std=config.init_std, key=key_embed)
        self.stack = init_stack(config, key=key_stack)
        self.norm = LayerNorm(config.width, config.norm_epsilon)
        self.config = config

        # Optional parameters, from keys of their own: without them, the other parameters are the same.
        std = 0.02 if config.init_std is None else config.init_std
        key_class, key_positions = jr.split(jr.fold_in(key, 2))
        self.class_token = init_weight(key_class, (1, config.width), std) if config.class_token else None
        count = math.prod(config.learned_grid or ()) + config.class_token
        self.positions = init_weight(key_positions, (count, config.width), std) if config.learned_grid else None

    def embed_patches(self, images: Images, patch_indices: Int[Array, "batch context"] | None = None) -> Tokens:
        """Embedded patches with their positions: all of them, or those at the row-major `patch_indices`."""
        # (batch, patches, pixels) and (patches, dim)
        grid = self.config.grid(images.shape[1:3])
        patches = patchify(images, self.config.patch_size)
        learned = self.positions
        positions = jnp.asarray(sincos_2d(grid, self.config.width)) if learned is None else learned[: patches.shape[1]]

        # Select before embedding: what the context encoder does not see costs nothing.
        if patch_indices is not None:
            patches = take_patches(patches, patch_indices)
            positions = positions[patch_indices]

        # (batch, tokens, dim)
        tokens = self.embed(patches, self.stack.ops)
        return tokens + positions.astype(tokens.dtype)

    def add_class_token(self, tokens: Tokens) -> Float[Array, "batch _ dim"]:
        """The tokens with the class token as the last one, if there is one."""
        if self.class_token is None:
            return tokens
        token = self.class_token if self.positions is None else self.class_token + self.positions[-1:]
        token = jnp.broadcast_to(token, (len(tokens), *token.shape)).astype(tokens.dtype)
        return jnp.concatenate([tokens, token], axis=1)

    def __call__(self, images: Images, patch_indices: Int[Array, "batch context"] | None = None) -> Tokens:
        """One token per patch; only those at `patch_indices` are seen, if given."""
        tokens = self.embed_patches(images, patch_indices)
        outputs = self.stack(self.add_class_token(tokens))[0][:, : tokens.shape[1]]
        return self.norm(outputs, self.stack.ops)

    def embed_images(self, images: Images) -> Float[Array, "batch dim"]:
        """The class token of each image. Requires `class_token`."""
        assert self.class_token is not None
        # It is last, so that the last layer computes nothing else.
        outputs = self.stack(self.add_class_token(self.embed_patches(images)), num_queries=1)[0]
        return self.norm(outputs[:, 0], self.stack.ops)

    def intermediate_layers(self, images: Images, n: int) -> Float[Array, "layers batch patches dim"]:
        """Outputs of the last `n` layers (of all, if there are fewer), each after the final LayerNorm."""
        tokens = self.embed_patches(images)
        outputs = self.stack(self.add_class_token(tokens), num_outputs=min(n, self.config.depth))
        return self.norm(jnp.stack(outputs)[:, :, : tokens.shape[1]], self.stack.ops)
