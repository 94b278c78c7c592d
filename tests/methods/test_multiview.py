"""Methods that compare views: their losses are the sums they claim, of statistics over the batch they are given."""

import math
import re
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.distributed.sharding import make_mesh, replicate, shard_batch
from jepax.methods.lejepa import LeJEPAConfig
from jepax.methods.multiview import embed, explained_by_views, invariance_loss, pairwise_mse, project
from jepax.methods.rectified_lpjepa import RectifiedLpJEPAConfig
from jepax.methods.vicreg import VICRegConfig
from jepax.methods.visreg import VISRegConfig
from jepax.nn import ProjectorConfig, ViTConfig
from jepax.objectives import covariance, rdmreg, variance
from jepax.types import UserError
from jepax.views import MultiCropConfig
from tests.methods.small import SHARED, VIEWS, drawn_by, loss_of, loss_of_views

CONFIGS = {
    "lejepa": LeJEPAConfig(**SHARED, num_slices=16),
    "vicreg": VICRegConfig(**SHARED),
    "visreg": VISRegConfig(**SHARED, num_slices=16),
    "rectified_lpjepa": RectifiedLpJEPAConfig(
        **SHARED | {"projector": ProjectorConfig(hidden_dims=(24,), out_dim=8, final_relu=True)}, num_slices=16
    ),
}


def objective(config, groups, key):
    """The objective of these projections, whatever embeddings they are of."""
    method = config.build(total_steps=10, key=jr.key(0))
    embeddings = tuple(jnp.swapaxes(group, 0, 1) for group in groups)  # the batch first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "project", lambda self, embeddings: groups)
        return method.objective(embeddings, key=key)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name != "lejepa")) for name in CONFIGS]
)
def test_a_loss_reads_every_view_and_no_label(name, images):
    config = CONFIGS[name]
    method = config.build(total_steps=10, key=jr.key(0))
    loss, metrics = loss_of(method, images, jr.key(1))
    assert np.isfinite(loss) and metrics["embeddings"].shape == (8, 32)
    relabeled = eqx.tree_at(lambda i: i.label, images, images.label + 1)
    assert loss == loss_of(method, relabeled, jr.key(1))[0]
    assert loss != loss_of(method, images, jr.key(2))[0]
    fewer = replace(config, views=replace(VIEWS, num_local=0)).build(total_steps=10, key=jr.key(0))
    assert loss != loss_of(fewer, images, jr.key(1))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_of_the_same_views_only_directions_and_targets_are_drawn_anew(name, images):
    method = CONFIGS[name].build(total_steps=10, key=jr.key(0))
    views = drawn_by(method, images, jr.key(9))
    first, again, next_step = (loss_of_views(method, views, jr.key(seed))[0] for seed in (1, 1, 2))
    assert first == again
    assert (first == next_step) == (name == "vicreg")  # which draws nothing


def test_the_share_of_variance_that_is_not_disagreement(groups):
    views = np.concatenate([np.asarray(group, np.float64) for group in groups]) + 3.0
    pairs = [np.mean((views[v] - views[w]) ** 2) for v in range(5) for w in range(5) if v != w]
    strangers = 2 * np.mean((views - views.mean((0, 1))) ** 2)
    shifted = tuple(group + 3.0 for group in groups)
    np.testing.assert_allclose(explained_by_views(shifted), 1 - np.mean(pairs) / strangers, rtol=1e-4)
    alike = jnp.broadcast_to(groups[0][:1], groups[0].shape)
    assert explained_by_views((alike,)) == 1 and explained_by_views((jnp.ones((2, 4, 3)),)) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_projections_and_their_agreement_are_logged(name, images):
    metrics = loss_of(CONFIGS[name].build(total_steps=10, key=jr.key(0)), images, jr.key(1))[1]
    assert metrics["projections"].shape == (8, 8) and metrics["train/explained_variance"] < 1


def test_invariance_and_pairwise_mse(groups):
    large, small = (np.asarray(group, np.float64) for group in groups)
    every = np.concatenate([large, small])
    np.testing.assert_allclose(invariance_loss(groups), ((every - large.mean(0)) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(invariance_loss(groups[:1]), ((large[0] - large[1]) ** 2).mean() / 4, rtol=1e-5)
    np.testing.assert_allclose(pairwise_mse(groups[0]), ((large[0] - large[1]) ** 2).mean(), rtol=1e-5)
    pairs = [((every[i] - every[j]) ** 2).mean() for i in range(5) for j in range(i)]
    np.testing.assert_allclose(pairwise_mse(jnp.concatenate(groups)), np.mean(pairs), rtol=1e-5)


def test_lejepa_weighs_its_two_terms(groups):
    config = replace(CONFIGS["lejepa"], sigreg_weight=0.2)
    loss, metrics = objective(config, groups, jr.key(2))
    np.testing.assert_allclose(
        loss, 0.8 * metrics["train/invariance_loss"] + 0.2 * metrics["train/sigreg_loss"], rtol=1e-6
    )
    assert objective(config, groups, jr.key(3))[1]["train/sigreg_loss"] != metrics["train/sigreg_loss"]


def test_vicreg_of_two_views_is_the_released_codes(groups):
    first, second = groups[0]
    expected = (
        25 * jnp.mean(jnp.square(first - second))
        + 25 * (variance(first) + variance(second)) / 2
        + covariance(first)
        + covariance(second)
    )
    np.testing.assert_allclose(objective(CONFIGS["vicreg"], groups[:1], jr.key(0))[0], expected, rtol=1e-5)


def test_visreg_weighs_its_terms(groups):
    config = replace(CONFIGS["visreg"], visreg_weight=0.7, scale_weight=2.0, center_weight=4.0, shape_weight=3.0)
    loss, m = objective(config, groups, jr.key(2))
    regularizer = 2 * m["train/scale_loss"] + 4 * m["train/center_loss"] + 3 * m["train/shape_loss"]
    np.testing.assert_allclose(loss, 0.3 * m["train/invariance_loss"] + 0.7 * regularizer, rtol=1e-6)
    views = jnp.concatenate(groups)
    np.testing.assert_allclose(m["train/center_loss"], np.square(np.mean(views, axis=1)).mean(), rtol=1e-5)


def test_each_view_is_embedded_and_projected_as_by_itself(images):
    """Embeddings keep the batch first, projections the views; the projector without its BatchNorm sees rows alone."""
    config = replace(CONFIGS["lejepa"], projector=ProjectorConfig(hidden_dims=(), out_dim=8))
    method = config.build(total_steps=10, key=jr.key(0))
    group = drawn_by(method, images, jr.key(1)).local_views
    embeddings = eqx.filter_jit(embed)(method.encoder, group)
    projections = project(method.projector, embeddings)
    assert embeddings.shape == (8, 2, 32) and projections.shape == (2, 8, 8)
    for view in range(2):
        alone = jnp.mean(eqx.filter_jit(method.encoder)(group[:, view]), axis=1)
        np.testing.assert_allclose(embeddings[:, view], alone, atol=1e-5)
        np.testing.assert_allclose(projections[view], method.projector(alone), atol=1e-5)


def test_devices_share_the_images_of_every_view(images):
    """No device gathers the others' views: what it gathers is smaller than one view of the batch."""
    method = CONFIGS["lejepa"].build(total_steps=10, key=jr.key(0))
    mesh = make_mesh()
    arrays, rest = eqx.partition(replicate(method, mesh), eqx.is_array)

    def loss(arrays, images):
        return eqx.combine(arrays, rest).loss(images, key=jr.key(1))[0]

    compiled = jax.jit(jax.grad(loss, allow_int=True)).lower(arrays, shard_batch(images, mesh)).compile().as_text()
    gathers = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-(?:gather|to-all)\(", compiled)
    sizes = [math.prod(int(side) for side in shape.split(",")) for shape in gathers if shape]
    assert max(sizes, default=0) < 8 * 24 * 24 * 3, gathers


@pytest.mark.parametrize("sigma", ["before_relu", "after_relu"])
def test_rectified_lpjepa_tells_the_share_of_nonzeros(groups, sigma):
    config = replace(CONFIGS["rectified_lpjepa"], mu=-0.5, unit_variance=sigma)
    groups = tuple(jnp.maximum(group, 0) for group in groups)
    loss, metrics = objective(config, groups, jr.key(2))
    np.testing.assert_allclose(
        loss, 25 * metrics["train/invariance_loss"] + 125 * metrics["train/rdmreg_loss"], rtol=1e-6
    )
    np.testing.assert_allclose(metrics["health/nonzero_fraction"], 0.5, atol=0.05)
    scale = rdmreg.sigma_before_relu(1.0) if sigma == "before_relu" else rdmreg.sigma_after_relu(1.0, -0.5)
    expected = 0.5 * np.exp(-0.5 / scale)
    np.testing.assert_allclose(metrics["health/nonzero_fraction_expected"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replace(CONFIGS["lejepa"], sigreg_weight=1.5), "method.sigreg_weight=1.5"),
        (lambda: replace(CONFIGS["lejepa"], num_slices=0), "method.num_slices=0"),
        (lambda: replace(CONFIGS["vicreg"], cov_coeff=-1.0), "method.cov_coeff=-1.0"),
        (lambda: replace(CONFIGS["visreg"], shape_weight=-1.0), "method.shape_weight=-1.0"),
        (lambda: replace(CONFIGS["visreg"], visreg_weight=1.5), "method.visreg_weight=1.5"),
        (lambda: replace(CONFIGS["visreg"], num_slices=0), "method.num_slices=0"),
        (lambda: replace(CONFIGS["rectified_lpjepa"], num_slices=0), "method.num_slices=0"),
        (lambda: replace(CONFIGS["vicreg"], views=MultiCropConfig(num_global=1)), "method.views.num_global=1"),
        (lambda: replace(CONFIGS["lejepa"], views=MultiCropConfig(num_global=1)), "method.views.num_global=1"),
        (lambda: replace(CONFIGS["rectified_lpjepa"], p=0.0), "method.p=0.0"),
        (lambda: RectifiedLpJEPAConfig(**SHARED), "method.projector.final_relu=False"),
        (lambda: replace(CONFIGS["lejepa"], projector=ProjectorConfig(final_relu=True)), "projector.final_relu=True"),
        (lambda: replace(CONFIGS["visreg"], projector=ProjectorConfig(final_relu=True)), "projector.final_relu=True"),
        (lambda: replace(CONFIGS["lejepa"], encoder=ViTConfig(patch_size=5)), "patch_size=5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value)


def test_all_methods_begin_with_the_same_encoder():
    first, *others = (config.build(total_steps=10, key=jr.key(0)).encoder for config in CONFIGS.values())
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, *(eqx.filter(tree, eqx.is_array) for tree in (first, other)))
