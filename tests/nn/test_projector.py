"""The projector and its batch normalization over the global batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jepax.distributed.sharding import make_mesh
from jepax.nn.projector import BatchNorm, Head, Projector, ProjectorConfig
from jepax.types import UserError


def test_batch_norm_is_by_its_definition():
    x = 3 + 2 * jr.normal(jr.key(0), (64, 5))
    y = BatchNorm(5)(x)
    expected = (np.asarray(x) - np.asarray(x).mean(0)) / np.sqrt(np.asarray(x, np.float64).var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_statistics_are_of_the_global_batch():
    projector = Projector(ProjectorConfig(hidden_dims=(16, 16), out_dim=8), 6, key=jr.key(1))
    x = jr.normal(jr.key(2), (32, 6)) * jnp.arange(32)[:, None]
    split = jax.device_put(x, NamedSharding(make_mesh(), PartitionSpec("data")))
    assert len(split.addressable_shards) == jax.device_count() > 1
    np.testing.assert_allclose(eqx.filter_jit(projector)(split), projector(x), rtol=1e-4, atol=1e-5)


def test_a_rectified_projector_ends_at_zero():
    plain, rectified = (
        Projector(ProjectorConfig(hidden_dims=(16,), out_dim=8, final_relu=ends), 6, key=jr.key(1))
        for ends in (False, True)
    )
    x = jr.normal(jr.key(2), (32, 6))
    np.testing.assert_array_equal(rectified(x), jnp.maximum(plain(x), 0))
    assert float(plain(x).min()) < 0


def test_only_the_last_linear_map_has_a_bias():
    projector = Projector(ProjectorConfig(hidden_dims=(16, 16), out_dim=8), 6, key=jr.key(1))
    assert [linear.bias is not None for linear in projector.linears] == [False, False, True]


def test_widths_are_checked():
    with pytest.raises(UserError, match=r"projector\.out_dim=0"):
        ProjectorConfig(out_dim=0)


def test_a_head_reads_given_statistics_and_returns_those_of_the_batch():
    head = Head(6, 16, 4, key=jr.key(0))
    x = 2 * jr.normal(jr.key(1), (32, 6)) + 1
    z, (mean, variance) = head(x)
    hidden = np.asarray(head.fc1(x), np.float64)
    np.testing.assert_allclose(mean, hidden.mean(0), atol=1e-5)
    np.testing.assert_allclose(variance, hidden.var(0, ddof=1), rtol=1e-4)

    # With the batch's own statistics nothing changes; then a row no longer depends on the others.
    own = jnp.stack([mean, variance * 31 / 32])
    np.testing.assert_allclose(head(x, own)[0], z, atol=1e-5)
    np.testing.assert_allclose(head(x[:1], own)[0], z[:1], atol=1e-5)
    np.testing.assert_array_equal(head.initial_statistics(), [[0.0] * 16, [1.0] * 16])
