"""I-JEPA without a teacher: whether it learns from its targets, and which embedding is regularized."""

import warnings
from dataclasses import fields

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.ijepa_no_teacher import IJEPANoTeacherConfig
from jepax.methods.regularizer import RegularizerConfig
from jepax.objectives import variance
from jepax.trees import EMA
from jepax.types import UserError
from tests.contracts.shrink import shrunk
from tests.methods.small import drawn, loss_of_views, masked_method, outputs_of


def no_teacher(**settings):
    """The settings of `masked_method()`, of another class."""
    shared = {name: value for name, value in vars(shrunk("ijepa_vitb16_in1k").method).items() if name != "ema"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return IJEPANoTeacherConfig(**shared | settings).build(total_steps=10, key=jr.key(0))


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_the_encoder_learns_from_its_targets_where_the_gradient_flows(images, stop_gradient):
    method, views = no_teacher(stop_gradient=stop_gradient), drawn(images, 0)
    target = eqx.filter_grad(lambda m: jnp.sum(jnp.square(m.forward(views).embedded[..., :3])))
    grads = eqx.filter_jit(target)(method)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads)) != stop_gradient


def test_there_is_no_teacher_and_no_setting_of_one():
    method = no_teacher()
    assert not any(isinstance(node, EMA) for node in jax.tree.leaves(method, is_leaf=lambda n: isinstance(n, EMA)))
    assert "momentum" not in {field.name for field in fields(IJEPANoTeacherConfig)}
    moved, metrics = method.after_update(jnp.int32(0), {})
    assert moved is method and metrics == {}
    assert list(method.encoders()) == ["context"]


def test_the_targets_can_be_regularized_instead(images):
    chosen = {"stop_gradient": False, "target_norm": "none", "regularizer": RegularizerConfig("vicreg")}
    method, views = no_teacher(**chosen, regularize_on="targets"), drawn(images, 0)
    _, metrics = loss_of_views(method, views, jr.key(0))
    pooled = jnp.mean(eqx.filter_jit(method.encoder)(views.image), axis=1)
    np.testing.assert_allclose(metrics["train/variance_loss"], variance(pooled), rtol=1e-4)
    assert (
        metrics["train/variance_loss"]
        != loss_of_views(no_teacher(**chosen), views, jr.key(0))[1]["train/variance_loss"]
    )


def test_it_begins_as_ijepa_does(images):
    ours, theirs = (outputs_of(method, drawn(images, 0)) for method in (no_teacher(), masked_method()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"method\.regularize_on=targets has no effect with method\.stop_gradient=True"):
        IJEPANoTeacherConfig(regularize_on="targets")
    with pytest.warns(UserWarning, match="collapse"):
        IJEPANoTeacherConfig(stop_gradient=False)
