"""Checkpoints: whole or not there, checked on the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax import checkpoint
from jepax.types import UserError


def tree(value=1.0):
    return {"a": jnp.full((4, 8), value), "b": [jnp.arange(3), "text"]}


def test_round_trip_with_dtypes(tmp_path):
    checkpoint.save(tmp_path, 3, tree(), keep=2)
    restored = checkpoint.restore(tmp_path, 3, tree(0.0))
    assert restored["b"][1] == "text"
    jax.tree.map(np.testing.assert_array_equal, (restored["a"], restored["b"][0]), (tree()["a"], tree()["b"][0]))
    assert restored["b"][0].dtype == tree()["b"][0].dtype


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tree(), keep=2)
    assert checkpoint.whole_steps(tmp_path) == [2, 3]


def test_a_checkpoint_without_its_manifest_is_none(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree(), keep=2)
    (path / checkpoint.MANIFEST).unlink()
    assert checkpoint.whole_steps(tmp_path) == []
    checkpoint.save(tmp_path, 1, tree(), keep=2)  # and is written again
    assert checkpoint.whole_steps(tmp_path) == [1]


def test_one_flipped_bit_is_found(tmp_path):
    path = checkpoint.save(tmp_path, 1, tree(), keep=2)
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.restore(tmp_path, 1, tree(0.0))


def test_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, tree(), keep=2)
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.zeros((4, 8)), "c": jnp.zeros(2)})
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.zeros((5, 8)), "b": [jnp.arange(3), "text"]})
