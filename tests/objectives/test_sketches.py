"""SIGReg, RDMReg and VISReg: properties of the statistics, and that pieces of directions change nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import integrate, stats

from jepax.objectives import rdmreg, sigreg, visreg
from jepax.objectives.slicing import random_unit_directions, sliced_mean


@pytest.fixture(scope="module")
def directions():
    return random_unit_directions(jr.key(0), 12, 50)


def test_directions_are_unit_and_uniform():
    drawn = random_unit_directions(jr.key(1), 6, 20_000)
    np.testing.assert_allclose(jnp.linalg.norm(drawn, axis=0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(drawn @ drawn.T / 20_000, np.eye(6) / 6, atol=0.01)
    np.testing.assert_allclose(drawn.mean(axis=1), 0.0, atol=0.02)


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_pieces_change_neither_value_nor_gradient(directions, chunk):
    z = jr.normal(jr.key(2), (32, 12))

    def whole(z):
        return jnp.mean(jnp.square(jnp.sort(z @ directions, axis=0)) * jnp.arange(32)[:, None], axis=0).mean()

    def pieces(z):
        def statistic(some):
            return jnp.mean(jnp.square(jnp.sort(z @ some, axis=0)) * jnp.arange(32)[:, None], axis=0)

        return sliced_mean(statistic, directions, chunk)

    for ours, expected in zip(jax.value_and_grad(pieces)(z), jax.value_and_grad(whole)(z), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_epps_pulley_is_the_integral():
    x = np.random.default_rng(0).normal(0.3, 1.4, 40)

    def integrand(t):
        return np.abs(np.exp(1j * t * x).mean() - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)

    exact = 40 * integrate.quad(integrand, -3, 3)[0]
    coarse, fine = (float(sigreg.epps_pulley(jnp.asarray(x, jnp.float32)[:, None], k)[0]) for k in (17, 201))
    np.testing.assert_allclose(fine, exact, rtol=1e-3)
    np.testing.assert_allclose(coarse, exact, rtol=0.02)


def test_sigreg_grows_with_the_batch_only_away_from_the_normal(directions):
    normal, wide = (
        [float(sigreg.sigreg(width * jr.normal(jr.key(n), (n, 12)), directions)) for n in (256, 1024)]
        for width in (1.0, 3.0)
    )
    assert normal[1] < 2 * normal[0] < 4
    assert wide[1] == pytest.approx(4 * wide[0], rel=0.2)


@pytest.mark.parametrize("p", [0.5, *(pytest.param(p, marks=pytest.mark.long) for p in (1.0, 2.0, 50.0))])
def test_rectified_samples_have_their_moments_and_share_of_nonzeros(p):
    for mu in (-0.5, 0.0, 0.7):
        sigma = rdmreg.sigma_before_relu(p)
        drawn = np.asarray(rdmreg.sample_target(jr.key(3), (400, 500), p=p, mu=mu), np.float64)
        mean, variance = rdmreg.moments(p, mu, sigma)
        np.testing.assert_allclose([drawn.mean(), drawn.var()], [mean, variance], rtol=0.05)
        np.testing.assert_allclose((drawn > 0).mean(), rdmreg.nonzero_fraction(p, mu, sigma), atol=0.01)


def test_sigma_after_gives_unit_variance():
    for p, mu in ((0.7, -0.4), (2.0, 0.3)):
        assert rdmreg.moments(p, mu, rdmreg.sigma_after_relu(p, mu))[1] == pytest.approx(1.0)


def test_rdmreg_is_the_one_dimensional_wasserstein_distance(directions):
    ours, theirs = jr.normal(jr.key(4), (64, 12)), jr.gamma(jr.key(5), 1.0, (64, 12))
    expected = [np.mean((np.sort(np.asarray(ours @ d)) - np.sort(np.asarray(theirs @ d))) ** 2) for d in directions.T]
    np.testing.assert_allclose(rdmreg.rdmreg(ours, theirs, directions), np.mean(expected), rtol=1e-4)
    assert rdmreg.rdmreg(ours, ours[::-1], directions) == pytest.approx(0.0, abs=1e-9)


def test_visreg_tells_scale_and_shape_apart(directions):
    normal = jr.normal(jr.key(6), (1024, 12))
    assert visreg.scale_term(normal) < 0.01 and visreg.shape_term(normal, directions) < 0.02
    assert visreg.scale_term(3 * normal) > 1 and visreg.shape_term(3 * normal, directions) < 0.02
    signs = jnp.sign(normal)
    spiky = visreg.shape_term(jnp.broadcast_to(signs[:, :1], signs.shape), directions)
    assert visreg.scale_term(signs) < 0.01 and spiky > 0.1
    quantile = stats.norm.ppf((np.arange(8) + 1) / 9)[:, None]
    one = jnp.ones((1, 1))
    exact = visreg.shape_term(jnp.asarray(quantile / quantile.std(), jnp.float32), one)
    np.testing.assert_allclose(exact, np.mean((quantile / quantile.std() - quantile) ** 2), rtol=1e-2)


def test_visregs_scale_pulls_a_collapsed_batch_apart():
    """The gradient with respect to the deviation tends to a constant, -2 / dim each."""
    z = jr.normal(jr.key(7), (256, 4))
    for width in (0.1, 1e-3):
        slope = jax.grad(lambda s: visreg.scale_term(s * z))(jnp.float32(width))
        assert float(slope) == pytest.approx(-2 * (1 - width), rel=0.1)
    assert jnp.isfinite(jax.grad(visreg.scale_term)(jnp.zeros((8, 4)))).all()


def test_visregs_centre_is_the_squared_mean():
    z = jr.normal(jr.key(8), (64, 4)) + jnp.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(visreg.center_term(z), np.square(np.asarray(z, np.float64).mean(0)).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["sigreg", "rdmreg", "visreg"])
def test_memory_at_scale_is_that_of_one_piece_of_directions(name):
    """Batch 2048, width 1024, 1024 directions: under 1 GB beyond inputs and outputs, by the compiler's own account."""
    z, directions = jax.ShapeDtypeStruct((2048, 1024), "float32"), jax.ShapeDtypeStruct((1024, 1024), "float32")
    losses = {
        "sigreg": lambda z, target, directions, **rest: sigreg.sigreg(z, directions, **rest),
        "rdmreg": rdmreg.rdmreg,
        "visreg": lambda z, target, directions, **rest: visreg.shape_term(z, directions, **rest),
    }

    def beyond(**rest):
        program = jax.jit(jax.value_and_grad(partial(losses[name], **rest))).lower(z, z, directions).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert 0 < beyond() < 1e9
    assert beyond() < 0.6 * beyond(chunk=None)
