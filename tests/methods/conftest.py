"""Pictures, and projections of views of them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from jepax.data import DataConfig, iter_once, open_source


@pytest.fixture(scope="module")
def images():
    batch, _ = next(iter(iter_once(open_source(DataConfig(dataset="synthetic", canvas_size=24), "train"), 8)))
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module")
def groups():
    return jr.normal(jr.key(0), (2, 16, 8)), jr.normal(jr.key(1), (3, 16, 8))
