"""Multi-block masks: large target blocks to predict, and a fixed number of context patches drawn from the rest.

Source: Assran et al. 2023, section 3 and appendix A. The block sizes are those of the released sampler. What differs,
on purpose, is said at `MultiBlock`.
"""

import math
from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from jepax.types import Masks, UserError

_NUM_TRIAL_MASKS = 512  # images simulated to learn how many context patches the settings allow
_MAX_FAILURE_PROB = 1e-9  # chance of an image that is given up on, where all attempts are drawn at once
_MIN_ACCEPTANCE_RATE = 0.02  # below this share of first draws accepted, redrawing would dominate the step


@dataclass(frozen=True)
class MultiBlockConfig:
    """Sizes of target and context blocks, as shares of the grid of patches."""

    num_targets: int = 4
    """Target blocks per image."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Least and greatest share of the grid that a target block covers."""
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    """Least and greatest height over width of a target block."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Least and greatest share of the grid that the context block (a square, where it fits) covers."""
    num_context_patches: int = 50
    """Context patches per image, drawn uniformly from the context block less the targets."""
    grid_margin: int = 1
    """Rows and columns by which a block is at least smaller than the grid (1 as published; 0: it may fill the grid)."""

    def __post_init__(self) -> None:
        for name in ("target_scale", "target_aspect_ratio", "context_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name.endswith("scale") and high > 1):
                raise UserError(
                    f"masks.{name}={low, high} is not a range: give least <= greatest"
                    f"{', both in (0, 1]' if name.endswith('scale') else ', above 0'}"
                )
        for name, least in (("num_targets", 1), ("num_context_patches", 1), ("grid_margin", 0)):
            if getattr(self, name) < least:
                raise UserError(f"masks.{name}={getattr(self, name)} must be at least {least}")

    def tiny(self) -> "MultiBlockConfig":
        """The same blocks on the 6 x 6 patches of tests, which leave few to the context."""
        return replace(self, num_context_patches=6)


def block_sizes(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], margin: int
) -> tuple[Int[np.ndarray, "sizes 2"], Float[np.ndarray, "sizes"]]:
    """Every (height, width) that the published rule can give, in patches, and its probability.

    One number r, uniform in [0, 1], drives scale s and aspect a together (as in the released sampler):
    n = floor(s H W), h = round(sqrt(n a)), w = round(sqrt(n / a)), each from 1 to the grid's less `margin`.
    """
    r = (np.arange(200_000) + 0.5) / 200_000
    patches = np.floor(grid[0] * grid[1] * (scale[0] + r * (scale[1] - scale[0])))
    ratio = aspect[0] + r * (aspect[1] - aspect[0])
    height = np.clip(np.rint(np.sqrt(patches * ratio)), 1, max(grid[0] - margin, 1))
    width = np.clip(np.rint(np.sqrt(patches / ratio)), 1, max(grid[1] - margin, 1))
    sizes, counts = np.unique(np.stack([height, width], axis=1).astype(np.int32), axis=0, return_counts=True)
    return sizes, counts / counts.sum()


class MultiBlock(eqx.Module):
    """Draws `Masks` of static shapes from one key per image, on the device.

    Differs from the reference: every image draws its own block size, the batch does not share one; positions reach
    the last row and column; the context is a fixed number of patches drawn uniformly, where the released code cuts
    every context to the batch's shortest in raster order and so loses the bottom of the picture; an image with too
    few context patches draws its blocks again.

    Raises `UserError` on a grid where hardly any draw leaves `config.context` patches.
    """

    config: MultiBlockConfig = eqx.field(static=True)
    grid: tuple[int, int] = eqx.field(static=True)
    largest: int = eqx.field(static=True)
    """Patches of the largest target block: the static size that shorter ones are padded to."""
    attempts: int = eqx.field(static=True)
    """Draws after which 1 in 10^9 images has none that leaves its context enough patches, as far as `_TRIES` tell."""

    def __init__(self, config: MultiBlockConfig, grid: tuple[int, int]):
        self.config, self.grid = config, grid
        self.largest = int(self._table(target=True)[0].prod(axis=1).max())
        refused = min(
            1 - self._accepted() + 3 / _NUM_TRIAL_MASKS, 1 - _MIN_ACCEPTANCE_RATE
        )  # 3: with 95% certainty no more, of none
        self.attempts = math.ceil(math.log(_MAX_FAILURE_PROB) / math.log(refused))

    def _table(self, *, target: bool) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        scale, aspect = (c.target_scale, c.target_aspect_ratio) if target else (c.context_scale, (1.0, 1.0))
        return block_sizes(self.grid, scale, aspect, c.grid_margin)

    def _accepted(self) -> float:
        """Share of first draws that leave the context enough patches; raises where hardly any does."""
        with jax.ensure_compile_time_eval():  # also where the method is built from abstract shapes
            counts = np.asarray(self.context_sizes(jr.split(jr.key(0), _NUM_TRIAL_MASKS)))
        accepted = np.mean(counts >= self.config.num_context_patches)
        if accepted < _MIN_ACCEPTANCE_RATE:
            raise UserError(
                f"masks.num_context_patches={self.config.num_context_patches} cannot be met on a"
                f" {self.grid[0]}x{self.grid[1]} grid:"
                f" {self.config.num_targets} targets of masks.target_scale={self.config.target_scale} leave"
                f" {counts.mean():.0f} patches on average, {counts.max()} at most;\n"
                f"try masks.num_context_patches={max(int(np.percentile(counts, 5)), 1)}, or fewer or smaller targets"
            )
        return float(accepted)

    def _block(self, key: tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray], *, target: bool) -> Int[Array, "4"]:
        """Top, left, height and width of one block; the size comes from a key of its own, shared by the targets."""
        sizes, chance = self._table(target=target)
        key_size, key_top, key_left = key[0], key[1], key[2]
        edges = jnp.asarray(np.cumsum(chance)[:-1], jnp.float32)
        pick = jnp.searchsorted(edges, jr.uniform(key_size), method="compare_all")
        height, width = jnp.asarray(sizes)[pick]
        top = jr.randint(key_top, (), 0, self.grid[0] - height + 1)
        left = jr.randint(key_left, (), 0, self.grid[1] - width + 1)
        return jnp.stack([top, left, height, width])

    def _draw(self, key: PRNGKeyArray) -> tuple[Int[Array, "blocks 4"], Bool[Array, "patches"]]:
        """Target blocks of one image, and which patches its context may use."""
        key_size, key_targets, key_context = jr.split(key, 3)
        places = jr.split(key_targets, (self.config.num_targets, 2))
        targets = jax.vmap(lambda k: self._block((key_size, k[0], k[1]), target=True))(places)
        context = self._block(tuple(jr.split(key_context, 3)[i] for i in range(3)), target=False)
        taken = jnp.any(jax.vmap(self._covers)(targets), axis=0)
        return targets, self._covers(context) & ~taken

    def _covers(self, block: Int[Array, "4"]) -> Bool[Array, "patches"]:
        top, left, height, width = block
        rows, columns = jnp.arange(self.grid[0])[:, None], jnp.arange(self.grid[1])[None, :]
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        return inside.reshape(-1)

    def _patches(self, block: Int[Array, "4"]) -> tuple[Int[Array, "target"], Bool[Array, "target"]]:
        """A block's row-major patch indices; padding repeats its first patch and is not valid."""
        top, left, height, width = block
        entry = jnp.arange(self.largest)
        valid = entry < height * width
        entry = jnp.where(valid, entry, 0)
        return (top + entry // width) * self.grid[1] + left + entry % width, valid

    def _one(self, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        """One image's context, target blocks, and which of their entries are real."""
        key_context, key_blocks = jr.split(key)
        targets, allowed = self._enough(key_blocks)
        rank = jnp.where(allowed, jr.uniform(key_context, allowed.shape), 2.0)
        context = jnp.sort(jnp.argsort(rank)[: self.config.num_context_patches])
        indices, valid = jax.vmap(self._patches)(targets)
        return context.astype(jnp.int32), indices, valid

    def _enough(self, key: PRNGKeyArray) -> tuple[Int[Array, "blocks 4"], Bool[Array, "patches"]]:
        """The first draw that leaves the context enough patches.

        On a CPU one after the other. Elsewhere so many at once that one in 10^9 images finds none, and takes the best:
        before a loop that ends when the device says so, the host would wait for all steps under way.
        """

        def draw(attempt: Int[Array, ""]) -> tuple[Int[Array, "blocks 4"], Bool[Array, "patches"]]:
            return self._draw(jr.fold_in(key, attempt))

        if jax.default_backend() == "cpu":  # what ends the loop is carried: in its condition a draw would be made twice
            none = jnp.zeros((self.config.num_targets, 4), jnp.int32), jnp.zeros(self.grid[0] * self.grid[1], bool)
            _, targets, allowed = lax.while_loop(
                lambda drawn: jnp.sum(drawn[2]) < self.config.num_context_patches,
                lambda drawn: (drawn[0] + 1, *draw(drawn[0])),
                (jnp.int32(0), *none),
            )
            return targets, allowed
        targets, allowed = jax.vmap(draw)(jnp.arange(self.attempts))
        counts = jnp.sum(allowed, axis=1)
        enough = counts >= self.config.num_context_patches
        best = jnp.where(jnp.any(enough), jnp.argmax(enough), jnp.argmax(counts))
        return targets[best], allowed[best]

    def __call__(self, keys: Key[Array, "batch"]) -> Masks:
        """One mask per key of the batch."""
        return Masks(*jax.vmap(self._one)(keys))

    @eqx.filter_jit
    def context_sizes(self, keys: Key[Array, "batch"]) -> Int[Array, "batch"]:
        """Patches that each image's first draw allows its context, before the choice of a fixed number."""
        return jax.vmap(lambda key: jnp.sum(self._draw(key)[1]))(keys)
