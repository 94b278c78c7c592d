"""A regularizer by name is the weighted sum of its objectives."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.regularizer import RegularizerConfig, regularize
from jepax.objectives import covariance, variance, visreg
from jepax.objectives.rdmreg import rdmreg, sample_target
from jepax.objectives.sigreg import sigreg
from jepax.objectives.slicing import random_unit_directions

KEY = jr.key(3)
Z = 2 * jr.normal(jr.key(0), (32, 6)) + 0.5


def test_none_is_nothing():
    value, metrics = regularize(RegularizerConfig(), Z, key=KEY)
    assert value == 0 and metrics == {}


def test_vicreg():
    config = RegularizerConfig("vicreg", weight=0.5, variance_weight=3.0, covariance_weight=2.0)
    value, metrics = regularize(config, Z / 3, key=KEY)
    assert set(metrics) == {"train/variance_loss", "train/covariance_loss"}
    np.testing.assert_allclose(value, 0.5 * (3 * variance(Z / 3) + 2 * covariance(Z / 3)), rtol=1e-6)


def test_visreg():
    config = RegularizerConfig(
        "visreg", weight=0.5, scale_weight=3.0, center_weight=4.0, shape_weight=2.0, num_slices=9
    )
    directions = random_unit_directions(KEY, 6, 9)
    expected = 0.5 * (3 * visreg.scale_term(Z) + 4 * visreg.center_term(Z) + 2 * visreg.shape_term(Z, directions))
    np.testing.assert_allclose(regularize(config, Z, key=KEY)[0], expected, rtol=1e-6)


def test_sigreg():
    value, metrics = regularize(RegularizerConfig("sigreg", weight=0.5, num_slices=9), Z, key=KEY)
    expected = sigreg(Z, random_unit_directions(KEY, 6, 9))
    np.testing.assert_allclose([value, metrics["train/sigreg_loss"]], [0.5 * expected, expected], rtol=1e-6)


def test_rdmreg_reads_what_is_above_zero():
    config = RegularizerConfig("rdmreg", weight=0.5, num_slices=9, p=2.0, mu=-0.3)
    key_directions, key_target = jr.split(KEY)
    target = sample_target(key_target, Z.shape, p=2.0, mu=-0.3)
    expected = 0.5 * rdmreg(jnp.maximum(Z, 0), target, random_unit_directions(key_directions, 6, 9))
    np.testing.assert_allclose(regularize(config, Z, key=KEY)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sigreg", "rdmreg", "visreg", "vicreg"])
def test_what_has_collapsed_is_pushed_apart(kind):
    """Two clouds of the same points, one shrunk to a hundredth: every regularizer prefers the wide one."""
    config = RegularizerConfig(kind)
    wide, dead = (regularize(config, scale * jr.normal(jr.key(1), (256, 6)), key=KEY)[0] for scale in (1.0, 0.01))
    assert wide < 0.5 * dead


def test_a_field_of_another_kind_is_warned_of():
    with pytest.warns(UserWarning, match=r"regularizer\.variance_weight=3\.0 is not read by regularizer\.name=sigreg"):
        RegularizerConfig("sigreg", variance_weight=3.0)
