"""Multi-block masks: large target blocks to predict, and a fixed number of context patches drawn from the rest.

Source: Assran et al. 2023, section 3 and appendix A. The block sizes are those of the released sampler; `MultiBlock`
lists the intended differences.
"""

import math
from dataclasses import dataclass, replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from jepax.errors import check_fields
from jepax.types import Masks, UserError

NUM_TRIAL_MASKS = 512  # images simulated to estimate the acceptance rate of the settings
MAX_FAILURE_PROB = 1e-9  # per image, where all attempts are drawn together
MIN_ACCEPTANCE_RATE = 0.02  # below it, redrawing would dominate the step

Blocks = Int[Array, "blocks 4"]
"""Top, left, height and width of each block, in patches."""
PatchSet = Bool[Array, "patches"]
"""One boolean per patch of the grid."""


@dataclass(frozen=True)
class MultiBlockConfig:
    """Sizes of target and context blocks, as fractions of the grid of patches."""

    num_targets: int = 4
    """Target blocks per image."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Smallest and largest area of a target block, as a fraction of the grid."""
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    """Smallest and largest height over width of a target block."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Smallest and largest area of the context block (square if it fits), as a fraction of the grid."""
    num_context_patches: int = 50
    """Context patches per image, drawn uniformly from the context block without the targets."""
    grid_margin: int = 1
    """Rows and columns of the grid that a block leaves free at least (published: 1; 0: a block may fill the grid)."""

    def __post_init__(self) -> None:
        check_fields("masks", self, "at least 1", "num_targets", "num_context_patches")
        check_fields("masks", self, "at least 0", "grid_margin")
        for name in ("target_scale", "context_scale", "target_aspect_ratio"):
            low, high = getattr(self, name)
            bound = " <= 1" if name.endswith("scale") else ""
            if not 0 < low <= high or (bound and high > 1):
                raise UserError(f"masks.{name}={low, high} is not a range: it needs 0 < low <= high{bound}")

    def tiny(self) -> "MultiBlockConfig":
        """The same blocks on the 6 x 6 patches of tests, where few patches remain for the context."""
        return replace(self, num_context_patches=6)


def block_sizes(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], margin: int
) -> tuple[Int[np.ndarray, "sizes 2"], Float[np.ndarray, "sizes"]]:
    """Every (height, width) that the published rule can produce, in patches, and its probability.

    One number r, uniform in [0, 1], sets scale s and aspect a together (as in the released sampler):
    n = floor(s H W), h = round(sqrt(n a)), w = round(sqrt(n / a)), each clipped to [1, grid - margin].
    """
    # r on a fine grid instead of at random: the table is deterministic, and a block's size is one draw from it.
    r = (np.arange(200_000) + 0.5) / 200_000
    patches = np.floor(grid[0] * grid[1] * (scale[0] + r * (scale[1] - scale[0])))
    ratio = aspect[0] + r * (aspect[1] - aspect[0])
    height = np.clip(np.rint(np.sqrt(patches * ratio)), 1, max(grid[0] - margin, 1))
    width = np.clip(np.rint(np.sqrt(patches / ratio)), 1, max(grid[1] - margin, 1))
    # Each pair as one integer, which orders them by height, then width: counting them needs no sort.
    counts = np.bincount((height * (grid[1] + 1) + width).astype(np.int64))
    found = np.flatnonzero(counts)
    sizes = np.stack(np.divmod(found, grid[1] + 1), axis=1).astype(np.int32)
    return sizes, counts[found] / counts.sum()


class MultiBlock(eqx.Module):
    """Draws `Masks` of static shapes from one key per image, on the device.

    Differs from the reference: block sizes are drawn per image, not per batch; positions include the last row and
    column; the context is a fixed number of patches drawn uniformly, while the released code truncates every context
    to the batch's shortest in raster order and so loses the bottom of the image; an image with too few context patches
    redraws its blocks.

    Raises `UserError` on a grid where under 2% of draws leave `config.num_context_patches` patches.
    """

    config: MultiBlockConfig = eqx.field(static=True)
    grid: tuple[int, int] = eqx.field(static=True)
    largest: int = eqx.field(static=True)
    """Patches of the largest target block: the static size that smaller blocks are padded to."""
    attempts: int = eqx.field(static=True)
    """Draws per image; the probability that none is valid is below 1e-9 (estimated from `NUM_TRIAL_MASKS` masks)."""

    def __init__(self, config: MultiBlockConfig, grid: tuple[int, int], attempts: int | None = None):
        self.config, self.grid = config, grid
        self.largest = int(self._sizes(target=True)[0].prod(axis=1).max())
        self.attempts = num_attempts(config, grid) if attempts is None else attempts

    def __call__(self, keys: Key[Array, "batch"]) -> Masks:
        """One mask per key of the batch."""
        return Masks(*jax.vmap(self._sample_mask)(keys))

    def _sample_mask(self, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        """Context indices, target indices and target validity of one image."""
        key_context, key_blocks = jr.split(key)
        targets, allowed = self._sample_valid_blocks(key_blocks)

        # A uniform choice of static size: the allowed patches with the smallest random numbers. The others get 2, which
        # is above every random number, so they come last.
        rank = jnp.where(allowed, jr.uniform(key_context, allowed.shape), 2.0)
        context = jnp.sort(jnp.argsort(rank)[: self.config.num_context_patches])

        # Blocks become lists of patches, padded to the largest block.
        indices, valid = jax.vmap(self._patch_indices)(targets)
        return context.astype(jnp.int32), indices, valid

    def _sample_valid_blocks(self, key: PRNGKeyArray) -> tuple[Blocks, PatchSet]:
        """The first draw that leaves the context enough patches.

        On a CPU, draws are sequential. Elsewhere, `attempts` draws are made together, and an image without a valid one
        uses the best: with a loop that ends on a device value, the host would wait for all steps in flight.
        """

        def draw(attempt: Int[Array, ""]) -> tuple[Blocks, PatchSet]:
            return self._sample_blocks(jr.fold_in(key, attempt))

        needed = self.config.num_context_patches
        if jax.default_backend() == "cpu":
            # The loop carries its newest draw: drawn in the condition, it would be drawn twice. It starts from a draw
            # without patches, which never suffices, and ends, since at least 2% of draws do (`__init__`).
            start = jnp.zeros((self.config.num_targets, 4), jnp.int32), jnp.zeros(self.grid[0] * self.grid[1], bool)
            _, targets, allowed = lax.while_loop(
                lambda drawn: jnp.sum(drawn[2]) < needed,
                lambda drawn: (drawn[0] + 1, *draw(drawn[0])),
                (jnp.int32(0), *start),
            )
            return targets, allowed

        # The first valid draw (`argmax` finds the first True), else the one with the most patches.
        targets, allowed = jax.vmap(draw)(jnp.arange(self.attempts))
        counts = jnp.sum(allowed, axis=1)  # (attempts,)
        best = jnp.where(jnp.any(counts >= needed), jnp.argmax(counts >= needed), jnp.argmax(counts))
        return targets[best], allowed[best]

    def _sample_blocks(self, key: PRNGKeyArray) -> tuple[Blocks, PatchSet]:
        """Target blocks of one image, and the patches allowed in its context."""
        # All targets share one size, as published; each has its own position.
        key_size, key_targets, key_context = jr.split(key, 3)
        key_places = jr.split(key_targets, (self.config.num_targets, 2))
        targets = jax.vmap(lambda key: self._sample_block(key_size, *key, target=True))(key_places)
        context = self._sample_block(*jr.split(key_context, 3), target=False)

        # Context patches are inside the context block and outside every target.
        hidden = jnp.any(jax.vmap(self._covers)(targets), axis=0)
        return targets, self._covers(context) & ~hidden

    def _sample_block(
        self, key_size: PRNGKeyArray, key_top: PRNGKeyArray, key_left: PRNGKeyArray, *, target: bool
    ) -> Int[Array, "4"]:
        """Top, left, height and width of one block."""
        # The size by inverse CDF over the table, then a uniform position inside the grid. Without the last edge, which
        # rounding may leave below 1, every number finds a row. "compare_all" runs no loop: the table has a few rows.
        sizes, probabilities = self._sizes(target=target)
        edges = jnp.asarray(np.cumsum(probabilities)[:-1], jnp.float32)
        height, width = jnp.asarray(sizes)[jnp.searchsorted(edges, jr.uniform(key_size), method="compare_all")]
        top = jr.randint(key_top, (), 0, self.grid[0] - height + 1)
        left = jr.randint(key_left, (), 0, self.grid[1] - width + 1)
        return jnp.stack([top, left, height, width])

    def _sizes(self, *, target: bool) -> tuple[np.ndarray, np.ndarray]:
        # The context block is square, as published: only its area is random.
        c = self.config
        scale, aspect = (c.target_scale, c.target_aspect_ratio) if target else (c.context_scale, (1.0, 1.0))
        return block_sizes(self.grid, scale, aspect, c.grid_margin)

    def _covers(self, block: Int[Array, "4"]) -> PatchSet:
        top, left, height, width = block
        rows, columns = jnp.arange(self.grid[0])[:, None], jnp.arange(self.grid[1])[None, :]
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        return inside.reshape(-1)

    def _patch_indices(self, block: Int[Array, "4"]) -> tuple[Int[Array, "target"], Bool[Array, "target"]]:
        """Row-major patch indices of a block; padding repeats its first patch and is marked invalid."""
        # Static size with a dynamic width: entry e of a block is at row e // width and column e % width.
        top, left, height, width = block
        entry = jnp.arange(self.largest)
        valid = entry < height * width
        entry = jnp.where(valid, entry, 0)
        return (top + entry // width) * self.grid[1] + left + entry % width, valid

    @eqx.filter_jit
    def context_sizes(self, keys: Key[Array, "batch"]) -> Int[Array, "batch"]:
        """Number of allowed context patches in each image's first draw, before a fixed number is chosen."""
        return jax.vmap(lambda key: jnp.sum(self._sample_blocks(key)[1]))(keys)


@cache
def num_attempts(config: MultiBlockConfig, grid: tuple[int, int]) -> int:
    """The draws per image after which none is valid with a probability below `MAX_FAILURE_PROB`.

    Raises `UserError` if fewer than `MIN_ACCEPTANCE_RATE` of the draws leave enough context patches.
    """
    sampler = MultiBlock(config, grid, attempts=1)
    with jax.ensure_compile_time_eval():  # the method may be built from abstract shapes
        counts = np.asarray(sampler.context_sizes(jr.split(jr.key(0), NUM_TRIAL_MASKS)))
    accepted = float(np.mean(counts >= config.num_context_patches))
    if accepted < MIN_ACCEPTANCE_RATE:
        raise UserError(
            f"masks.num_context_patches={config.num_context_patches} cannot be met on a {grid[0]}x{grid[1]}"
            f" grid: {config.num_targets} targets of masks.target_scale={config.target_scale} leave"
            f" {counts.mean():.0f} patches on average, {counts.max()} at most;\n"
            f"try masks.num_context_patches={max(int(np.percentile(counts, 5)), 1)}, or fewer or smaller targets"
        )
    # Failure rate of one draw, plus 3 / n: the 95% upper bound after 0 failures in n.
    failure_rate = min(1 - accepted + 3 / NUM_TRIAL_MASKS, 1 - MIN_ACCEPTANCE_RATE)
    # The smallest n with failure_rate^n <= MAX_FAILURE_PROB.
    return math.ceil(math.log(MAX_FAILURE_PROB) / math.log(failure_rate))
