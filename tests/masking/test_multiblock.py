"""Multi-block masks: what every draw must satisfy, how draws are distributed, and settings that are refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.masking import MultiBlock, MultiBlockConfig, block_sizes
from jepax.types import UserError

GRIDS = {(14, 14): 50, (8, 8): 12, (6, 10): 12, (16, 16): 69}


def draw(grid, count=200, seed=0, **settings):
    sampler = MultiBlock(MultiBlockConfig(num_context_patches=GRIDS[grid], **settings), grid)
    return sampler, jax.tree.map(np.asarray, jax.jit(sampler)(jr.split(jr.key(seed), count)))


@pytest.mark.parametrize(
    "grid", [pytest.param(grid, marks=[pytest.mark.long] * (grid[0] == grid[1] != 14)) for grid in GRIDS]
)
def test_every_draw(grid):
    sampler, masks = draw(grid)
    sizes = {tuple(size) for size in block_sizes(grid, (0.15, 0.2), (0.75, 1.5), 1)[0]}
    for context, targets, valid in zip(masks.context, masks.targets, masks.target_valid, strict=True):
        taken = set(targets[valid].tolist())
        assert len(set(context.tolist())) == GRIDS[grid]  # a fixed number, each once
        assert not taken & set(context.tolist())
        assert 0 <= min(context.min(), targets.min()) and max(context.max(), targets.max()) < grid[0] * grid[1]
        shapes = set()
        for block, real in zip(targets, valid, strict=True):
            rows, columns = np.divmod(block[real], grid[1])
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(set(block[real].tolist())) == real.sum() == height * width  # a whole rectangle
            shapes.add((height, width))
        assert len(shapes) == 1 and shapes <= sizes
    assert masks.targets.shape == (200, 4, sampler.largest)


def test_targets_and_context_reach_every_row_and_column():
    _, masks = draw((14, 14), 3000)
    for used in (masks.targets[masks.target_valid], masks.context.reshape(-1)):
        frequency = np.bincount(used, minlength=196).reshape(14, 14)
        assert frequency.min() > 0
    # Uniform draws, not a raster cut: up and down, left and right are alike.
    frequency = frequency / frequency.sum()
    np.testing.assert_allclose(frequency.sum(0), frequency.sum(0)[::-1], rtol=0.1)
    np.testing.assert_allclose(frequency.sum(1), frequency.sum(1)[::-1], rtol=0.1)


def test_a_key_gives_the_same_mask_in_any_batch():
    sampler = MultiBlock(MultiBlockConfig(num_context_patches=50), (14, 14))
    keys = jr.split(jr.key(3), 32)
    together, alone = jax.jit(sampler)(keys), jax.jit(sampler)(keys[7:8])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[7:8], b), together, alone)


def test_images_with_too_few_patches_draw_again():
    """At the mean of what a first draw allows, half of the images draw again, and every mask still holds."""
    sampler = MultiBlock(MultiBlockConfig(num_context_patches=23), (8, 8))
    first = np.asarray(sampler.context_sizes(jr.split(jr.key(1), 500)))
    assert 0.2 < np.mean(first < 23) < 0.8
    masks = jax.tree.map(np.asarray, jax.jit(sampler)(jr.split(jr.key(1), 500)))
    for context, targets, valid in zip(masks.context, masks.targets, masks.target_valid, strict=True):
        assert len(set(context.tolist()) - set(targets[valid].tolist())) == 23


def test_masks_drawn_at_once_are_those_drawn_one_after_the_other(monkeypatch):
    keys = jr.split(jr.key(1), 300)
    sampler = MultiBlock(MultiBlockConfig(num_context_patches=23), (8, 8))
    assert 20 < sampler.attempts < 60
    looped = jax.jit(lambda keys: sampler(keys))(keys)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda keys: sampler(keys))(keys), looped)
    assert "while[" not in str(jax.make_jaxpr(lambda keys: sampler(keys))(keys))


def test_blocks_may_fill_the_grid_without_a_margin():
    sampler = MultiBlock(
        MultiBlockConfig(num_context_patches=9, num_targets=1, context_scale=(1.0, 1.0), grid_margin=0), (4, 4)
    )
    sizes = np.asarray(sampler.context_sizes(jr.split(jr.key(0), 100)))
    assert (sizes == 16 - sampler.largest).any()


@pytest.mark.parametrize(("grid", "context"), [((8, 8), 50), ((4, 4), 12), ((14, 14), 160)])
def test_settings_that_cannot_be_met_are_refused(grid, context):
    with pytest.raises(
        UserError, match=f"masks.num_context_patches={context} cannot be met on a {grid[0]}x{grid[1]} grid"
    ):
        MultiBlock(MultiBlockConfig(num_context_patches=context), grid)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_scale": (0.3, 0.2)}, "target_scale"),
        ({"context_scale": (0.5, 1.5)}, "context_scale"),
        ({"num_targets": 0}, "num_targets=0"),
        ({"target_aspect_ratio": (0.0, 1.0)}, "target_aspect_ratio"),
    ],
)
def test_ranges_that_are_none_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        MultiBlockConfig(**settings)


def test_one_program_for_every_draw():
    sampler = MultiBlock(MultiBlockConfig(num_context_patches=12), (8, 8))
    program = jax.jit(lambda keys: sampler(keys))
    for seed in range(3):
        program(jr.split(jr.key(seed), 16))
    assert program._cache_size() == 1
    assert jnp.issubdtype(program(jr.split(jr.key(0), 16)).context.dtype, jnp.integer)
