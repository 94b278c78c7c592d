"""SIGReg, RDMReg and the rectified generalized Gaussian against recorded values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax.objectives.rdmreg import moments, rdmreg, sigma_after_relu, sigma_before_relu
from jepax.objectives.sigreg import epps_pulley, sigreg
from tests.parity.reference import GOLDEN


def recorded(name):
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no {path.name} in the folder of recorded numbers")
    with np.load(path) as file:
        return dict(file)


def close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


def test_sigreg():
    golden = recorded("sigreg_reference")
    embeddings, directions = jnp.asarray(golden["embeddings"]), jnp.asarray(golden["directions"])
    close(epps_pulley(embeddings @ directions), golden["statistic_per_direction"], 1e-4)
    loss, grad = jax.value_and_grad(sigreg)(embeddings, directions)
    close(loss, golden["loss"], 1e-4)
    close(grad, golden["grad"], 1e-4)


def test_rdmreg():
    golden = recorded("rdmreg_reference")
    directions = jnp.asarray(golden["directions"]).T
    loss, grad = jax.value_and_grad(rdmreg)(
        jnp.asarray(golden["features"]), jnp.asarray(golden["target_samples"]), directions
    )
    close(loss, golden["loss"], 1e-4)
    close(grad, golden["grad"], 1e-4)
    close(sigma_before_relu(float(golden["p"])), golden["sigma_unit_variance_before_rectification"], 1e-6)


def test_rectified_moments():
    golden = recorded("rgg_moments")
    for row in golden["table"]:
        values = dict(zip(golden["columns"], row, strict=True))
        p, mu, before = values["p"], values["mu"], values["sigma_unit_variance_before_rectification"]
        close(sigma_before_relu(p), before, 1e-6)
        close(sigma_after_relu(p, mu), values["sigma_unit_variance_after_rectification"], 1e-6)
        mean, variance = moments(p, mu, before)
        close(mean, values["mean_after_rectification"], 1e-6)
        close(variance, values["variance_after_rectification"], 1e-6)
