"""The multi-block sampler against recorded draws of the public one, on every grid that was recorded."""

import jax
import jax.random as jr
import numpy as np
import pytest

from jepax.masking import MultiBlock, MultiBlockConfig
from tests.parity.reference import GOLDEN

FILES = sorted(GOLDEN.glob("mask_reference_*.npz"))
DRAWS = 20_000


@pytest.fixture(scope="module", params=FILES or [None], ids=lambda file: file.stem if file else "none")
def recorded(request):
    if request.param is None:
        pytest.skip("no mask_reference_*.npz in the folder of recorded numbers")
    with np.load(request.param) as file:
        return dict(file)


@pytest.fixture(scope="module")
def sampler(recorded):
    side = round(len(recorded["target_frequency"]) ** 0.5)
    return MultiBlock(MultiBlockConfig(num_context_patches=1), (side, side))


def within(ours, theirs, tolerance, name):
    assert abs(ours - theirs) <= tolerance * abs(theirs), f"{name}: {ours:.3f} against {theirs:.3f}"


def test_target_sizes(recorded, sampler):
    """Each size's share differs by less than 5% of all draws, and the mean by less than 5%."""
    masks = jax.jit(sampler)(jr.split(jr.key(0), 4000))
    ours, theirs = np.asarray(masks.target_valid[:, 0].sum(-1)), recorded["n_target"]
    sizes = np.union1d(ours, theirs)
    shares = [np.array([(values == size).mean() for size in sizes]) for values in (ours, theirs)]
    assert np.abs(shares[0] - shares[1]).max() < 0.05
    assert set(theirs) <= set(ours)
    within(ours.mean(), theirs.mean(), 0.05, "mean target size")


def test_context_sizes_before_any_cut(recorded, sampler):
    ours = np.asarray(sampler.context_sizes(jr.split(jr.key(0), DRAWS)))
    theirs = recorded["n_context_per_image"]
    within(ours.mean(), theirs.mean(), 0.05, "mean")
    within(ours.std(), theirs.std(), 0.05, "std")
    for percent in (5, 25, 50, 75, 95):
        within(np.percentile(ours, percent), np.percentile(theirs, percent), 0.05, f"percentile {percent}")
