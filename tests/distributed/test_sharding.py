"""Where the state of a run lies, and that its losses do not depend on it."""

import math
import re
import shutil
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jepax.distributed import sharding
from jepax.distributed.sharding import ShardingConfig, ShardingPlan, choose_layout, make_mesh
from jepax.flops import tree_bytes
from jepax.io import logger
from jepax.io.checkpointer import CheckpointConfig
from jepax.optim import Optimizer
from jepax.recipes import RECIPES
from jepax.training.config import setup_data_and_optimizer
from jepax.training.loop import train, train_batches
from jepax.training.step import (
    DEFAULT_GUARD,
    TrainContext,
    first_state,
    jit_train_step,
    loss_and_grads,
    placed_state,
    run_train_step,
)
from jepax.trees import global_norm
from jepax.types import UserError
from tests.contracts.shrink import shrunk

STEPS = 4


def wide(name):
    """A tiny recipe, wide enough that splitting its matrices is worth it."""
    config = shrunk(name)
    return replace(config, method=replace(config.method, encoder=replace(config.method.encoder, width=96, heads=4)))


def trained(config, layout):
    """State after a few steps, and loss and gradient norm of each."""
    source, optimizer = setup_data_and_optimizer(config)
    state = placed_state(config.method, optimizer, jr.key(0), layout)
    fixed = TrainContext(optimizer, sharding.replicate(jr.key(1), layout.mesh), layout=layout)
    losses, programs = [], jit_train_step._cache_size()
    for images in train_batches(config, source, STEPS, 0):
        state, metrics = run_train_step(fixed, sharding.shard_batch(images, layout.mesh), state)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    assert jit_train_step._cache_size() == programs + 1
    return state, np.array(losses)


@pytest.mark.long
def test_a_run_may_go_on_split_or_whole(tmp_path):
    """Every other part of it split: the losses and scores of a run that lies whole on each device."""
    config = wide("ijepa_fashion_mnist")
    config = replace(
        config,
        train=replace(config.train, steps=6, log_every=1, save=CheckpointConfig(every=2)),
        eval=replace(config.eval, online=replace(config.eval.online, every=3)),
    )
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/00000006")
    split = replace(config, train=replace(config.train, sharding=ShardingConfig("sharded")))
    state = train(split, tmp_path / "parts")
    assert not state.method.encoder.stack.blocks.mlp.fc1.weight.is_fully_replicated
    whole, parts = (logger.read_metrics(tmp_path / name / logger.METRICS_FILE) for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == list(range(6))
    np.testing.assert_allclose(*([line["loss"] for line in lines] for lines in (whole, parts)), rtol=1e-5)
    assert parts[5]["knn_top1"] == pytest.approx(whole[5]["knn_top1"], abs=5)
    assert sharding.to_local(state).method.encoder.stack.blocks.mlp.fc1.weight.is_fully_replicated


@pytest.fixture(
    scope="module",
    params=["ijepa_fashion_mnist", "ijepa_vith14_in1k", pytest.param("lejepa_fashion_mnist", marks=pytest.mark.long)],
)
def config(request):
    """Unrolled and with Muon; scanned, rematerialised and with AdamW, as large recipes are."""
    return wide(request.param)


@pytest.fixture(scope="module")
def alone(config):
    return trained(config, ShardingPlan(make_mesh(1)))


@pytest.mark.parametrize(
    ("parameters", "teacher"),
    [(True, True), *(pytest.param(*other, marks=pytest.mark.long) for other in ((True, False), (False, True)))],
)
def test_split_over_eight_devices_it_trains_as_on_one(config, alone, parameters, teacher):
    layout = ShardingPlan(make_mesh(), parameters, teacher)
    state, losses = trained(config, layout)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    arrays = eqx.filter(state, eqx.is_array)
    weight = state.method.encoder.stack.blocks.mlp.fc1.weight
    assert weight.addressable_shards[0].data.size == weight.size // (8 if parameters else 1)
    assert jax.tree.map(lambda x: x.sharding, arrays) == layout.shardings(arrays)  # it stays where it was


def share(layout, tree):
    """Bytes of the tree on one device, over all of its bytes."""
    return layout.bytes(tree) / tree_bytes(tree)


@pytest.mark.parametrize("recipe", ["ijepa_vitb16_in1k", "ijepa_vith14_in1k", "lejepa_vitl14_in1k"])
def test_a_device_holds_an_eighth(recipe):
    config = RECIPES[recipe]()
    state = eqx.filter_eval_shape(first_state, config.method, Optimizer(config.optim, 10, 0), jr.key(0))
    assert 1 / 8 <= share(ShardingPlan(make_mesh(), True, True), state) <= 1.15 / 8
    assert share(ShardingPlan(make_mesh()), state) == 1
    if getattr(state.method, "target_encoder", None) is not None:
        assert share(ShardingPlan(make_mesh(), True, False), state.method.target_encoder) == 1
        assert share(ShardingPlan(make_mesh(), False, True), state.method.target_encoder) <= 1.15 / 8
        assert share(ShardingPlan(make_mesh(), False, True), state.opt_state) == 1


def test_layers_are_never_split_and_small_arrays_stay_whole():
    layout = ShardingPlan(make_mesh(), True, True)
    assert layout.spec((16, 64, 256)) == PartitionSpec(None, None, "data")
    assert layout.spec((16, 512, 256)) == PartitionSpec(None, "data")
    assert layout.spec((64, 1024, 3)) == PartitionSpec(None, "data")
    assert layout.spec((8, 9, 9999)) == PartitionSpec()  # the devices can share no axis but that of the layers
    assert layout.spec((16, 256)) == PartitionSpec()


def test_auto_splits_what_would_fill_a_device(monkeypatch):
    mesh, auto = make_mesh(), ShardingConfig()
    assert not choose_layout(auto, mesh, 10**15).parameters  # devices of a CPU share its memory
    monkeypatch.setattr(sharding, "device_memory_bytes", lambda: 100e9)
    assert choose_layout(auto, mesh, 24 * 10**9) == ShardingPlan(mesh, False, False)
    assert choose_layout(auto, mesh, 26 * 10**9) == ShardingPlan(mesh, True, True)
    assert not choose_layout(auto, make_mesh(1), 26 * 10**9).parameters
    assert choose_layout(ShardingConfig("sharded", "replicated"), mesh, 1) == ShardingPlan(mesh, True, False)
    assert choose_layout(ShardingConfig("replicated", "sharded"), mesh, 1) == ShardingPlan(mesh, False, True)
    assert str(ShardingPlan(mesh, True, False)) == "parameters split over them, the teacher whole on each"


def test_gathers_move_parameters_and_no_activations():
    """The compiled step's messages between devices: about what the parameters take, thrice, and nothing else large."""
    config = wide("ijepa_fashion_mnist")
    source, optimizer = setup_data_and_optimizer(config)
    layout = ShardingPlan(make_mesh(), True, True)
    state = placed_state(config.method, optimizer, jr.key(0), layout)
    (images,) = train_batches(config, source, 1, 0)
    fixed = {"optimizer": optimizer, "compute": jnp.float32, "guard": DEFAULT_GUARD, "log_every": 1, "layout": layout}
    program = jit_train_step.lower(state, sharding.shard_batch(images, layout.mesh), jr.key(0), **fixed).compile()
    text = program.as_text()
    moving = re.findall(r" = (\S.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text)
    shapes = [shape for shapes, _ in moving for shape in re.findall(r"f32\[([\d,]+)\]", shapes)]
    moved = sum(4 * math.prod(map(int, shape.split(","))) for shape in shapes)
    assert "all-gather" in {kind for _, kind in moving} and "all-to-all" not in {kind for _, kind in moving}
    assert moved < 4 * tree_bytes(state.method), moved / tree_bytes(state.method)


def gradients(config, layout, compute=jnp.float32):
    """Loss, metrics and gradients of the first batch."""
    source, _ = setup_data_and_optimizer(config)
    method = config.method.build(total_steps=STEPS, key=jr.key(0))
    (images,) = train_batches(config, source, 1, 0)
    images = sharding.shard_batch(images, layout.mesh)

    @eqx.filter_jit
    def run(method, images):
        with layout.applied():
            return loss_and_grads(method, images, jr.key(1), compute)

    return run(method, images)


@pytest.mark.parametrize(
    "name", ["ijepa", *(pytest.param(name, marks=pytest.mark.long) for name in ("lejepa", "ijepa_multilayer", "byol"))]
)
def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(name):
    """Also where the loss reads statistics of the batch, as LeJEPA's and a head's BatchNorm do."""
    method, *variant = name.split("_")
    config, mesh = shrunk("_".join([method, "fashion_mnist", *variant])), make_mesh(2)
    loss, metrics, grads = gradients(config, ShardingPlan(mesh))
    loss_in_pieces, metrics_in_pieces, grads_in_pieces = gradients(config, ShardingPlan(mesh, pieces=4))
    np.testing.assert_allclose(loss_in_pieces, loss, rtol=1e-6)
    assert float(global_norm(jax.tree.map(jnp.subtract, grads_in_pieces, grads))) <= 2e-6 * float(global_norm(grads))
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_in_pieces[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.long
def test_gradients_of_pieces_are_summed_in_float32():
    """In bfloat16, 8 pieces are no farther from float32 than the batch at once."""
    config, mesh = shrunk("lejepa_fashion_mnist"), make_mesh(1)
    exact = gradients(config, ShardingPlan(mesh))[2]
    apart = [
        float(
            global_norm(
                jax.tree.map(jnp.subtract, gradients(config, ShardingPlan(mesh, pieces=n), jnp.bfloat16)[2], exact)
            )
        )
        for n in (1, 8)
    ]
    assert apart[1] <= 1.1 * apart[0]


@pytest.mark.long
def test_a_batch_in_pieces_takes_less_memory():
    config = wide("ijepa_fashion_mnist")
    config = replace(config, train=replace(config.train, batch_size=64))
    source, optimizer = setup_data_and_optimizer(config)
    state = first_state(config.method, optimizer, jr.key(0))
    (images,) = train_batches(config, source, 1, 0)
    fixed = {"optimizer": optimizer, "compute": jnp.float32, "guard": DEFAULT_GUARD, "log_every": 1}
    taken = [
        jit_train_step.lower(state, images, jr.key(0), **fixed, layout=ShardingPlan(make_mesh(1), pieces=n))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for n in (1, 8)
    ]
    assert taken[1] < taken[0] / 2


def test_pieces_that_the_devices_cannot_share_are_refused():
    with pytest.raises(UserError, match=r"batch_size=16 .* 8 devices in train.accumulate=4 pieces; try 32"):
        sharding.check_batch(16, 4)
