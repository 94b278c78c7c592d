"""Sharding of a run's state and batch: its losses do not depend on it."""

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
from jepax.distributed.sharding import ShardingConfig, ShardingPlan, choose_plan, make_mesh
from jepax.flops import tree_bytes
from jepax.io import logger
from jepax.io.checkpointer import CheckpointConfig
from jepax.optim import Optimizer
from jepax.recipes import RECIPES
from jepax.training.loop import train
from jepax.training.setup import abstract_state, make_setup
from jepax.training.step import jit_train_step, loss_and_grads, run_train_step
from jepax.trees import global_norm
from jepax.types import UserError
from tests.contracts.shrink import shrunk

STEPS = 4


def wide(name):
    """A tiny recipe, wide enough that its matrices are worth sharding."""
    config = shrunk(name)
    return replace(config, method=replace(config.method, encoder=replace(config.method.encoder, width=96, num_heads=4)))


def planned(config, plan):
    """The run's setup under this plan."""
    return replace(make_setup(config), plan=plan)


def trained(config, plan):
    """State after a few steps, and loss and gradient norm of each."""
    setup = planned(config, plan)
    state, base_key, context = setup.init_state(), setup.base_key, setup.context
    losses, programs = [], jit_train_step._cache_size()
    for batch in setup.batches(steps=STEPS):
        state, metrics = run_train_step(state, sharding.shard_batch(batch, plan.mesh), base_key, context)
        losses.append([float(metrics["train/loss"]), float(metrics["optim/grad_norm"])])
    assert jit_train_step._cache_size() == programs + 1
    return state, np.array(losses)


@pytest.mark.long
def test_a_run_may_resume_sharded_or_replicated(tmp_path):
    """Its last part sharded: the losses and scores of a run that is replicated on every device."""
    config = wide("ijepa_fashion_mnist")
    config = replace(
        config,
        train=replace(config.train, steps=6, log_every_steps=1, checkpoint=CheckpointConfig(every_steps=2)),
        eval=replace(config.eval, online=replace(config.eval.online, every_steps=3)),
    )
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/00000006")
    split = replace(config, train=replace(config.train, sharding=ShardingConfig("fsdp")))
    state = train(split, tmp_path / "parts")
    assert not state.method.encoder.stack.blocks.mlp.fc1.weight.is_fully_replicated
    whole, parts = (logger.read_metrics(tmp_path / name / logger.METRICS_FILE) for name in ("whole", "parts"))
    assert [line["step"] for line in parts] == list(range(6))
    np.testing.assert_allclose(*([line["train/loss"] for line in lines] for lines in (whole, parts)), rtol=1e-5)
    assert parts[5]["val/knn_top1"] == pytest.approx(whole[5]["val/knn_top1"], abs=5)
    assert sharding.to_local(state).method.encoder.stack.blocks.mlp.fc1.weight.is_fully_replicated


@pytest.fixture(
    scope="module",
    params=[
        "lejepa_fashion_mnist",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("ijepa_vith14_in1k", "ijepa_fashion_mnist")),
    ],
)
def config(request):
    """Unrolled and with Muon; scanned, rematerialized and with AdamW, as large recipes are."""
    return wide(request.param)


@pytest.fixture(scope="module")
def alone(config):
    return trained(config, ShardingPlan(make_mesh(1)))


@pytest.mark.parametrize(
    ("parameters", "teacher"),
    [(True, True), *(pytest.param(*other, marks=pytest.mark.long) for other in ((True, False), (False, True)))],
)
def test_sharded_over_eight_devices_it_trains_as_on_one(config, alone, parameters, teacher):
    plan = ShardingPlan(make_mesh(), parameters, teacher)
    state, losses = trained(config, plan)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    arrays = eqx.filter(state, eqx.is_array)
    weight = state.method.encoder.stack.blocks.mlp.fc1.weight
    assert weight.addressable_shards[0].data.size == weight.size // (8 if parameters else 1)
    assert jax.tree.map(lambda x: x.sharding, arrays) == plan.shardings(arrays)  # the step keeps it


def fraction(plan, tree):
    """Bytes of the tree on one device, over all of its bytes."""
    return plan.bytes(tree) / tree_bytes(tree)


@pytest.mark.parametrize("recipe", ["ijepa_vitb16_in1k", "ijepa_vith14_in1k", "lejepa_vitl14_in1k"])
def test_a_device_holds_an_eighth(recipe):
    config = RECIPES[recipe]()
    state = abstract_state(config.method, Optimizer(config.optim, 10, 0))
    assert 1 / 8 <= fraction(ShardingPlan(make_mesh(), True, True), state) <= 1.15 / 8
    assert fraction(ShardingPlan(make_mesh()), state) == 1
    if getattr(state.method, "target_encoder", None) is not None:
        assert fraction(ShardingPlan(make_mesh(), True, False), state.method.target_encoder) == 1
        assert fraction(ShardingPlan(make_mesh(), False, True), state.method.target_encoder) <= 1.15 / 8
        assert fraction(ShardingPlan(make_mesh(), False, True), state.opt_state) == 1


def test_layers_are_never_split_and_small_arrays_are_replicated():
    plan = ShardingPlan(make_mesh(), True, True)
    assert plan.spec((16, 64, 256)) == PartitionSpec(None, None, "data")
    assert plan.spec((16, 512, 256)) == PartitionSpec(None, "data")
    assert plan.spec((64, 1024, 3)) == PartitionSpec(None, "data")
    assert plan.spec((8, 9, 9999)) == PartitionSpec()  # the devices can share no axis but that of the layers
    assert plan.spec((16, 256)) == PartitionSpec()


def test_auto_shards_what_would_fill_a_device(monkeypatch):
    mesh, auto = make_mesh(), ShardingConfig()
    assert not choose_plan(auto, mesh, 10**15).shard_params  # devices of a CPU share its memory
    monkeypatch.setattr(sharding, "device_memory_bytes", lambda: 100e9)
    assert choose_plan(auto, mesh, 24 * 10**9) == ShardingPlan(mesh, False, False)
    assert choose_plan(auto, mesh, 26 * 10**9) == ShardingPlan(mesh, True, True)
    assert not choose_plan(auto, make_mesh(1), 26 * 10**9).shard_params
    assert choose_plan(ShardingConfig("fsdp", "ddp"), mesh, 1) == ShardingPlan(mesh, True, False)
    assert choose_plan(ShardingConfig("ddp", "fsdp"), mesh, 1) == ShardingPlan(mesh, False, True)
    assert str(ShardingPlan(mesh, True, False)) == "parameters sharded (FSDP), teacher replicated"


@pytest.mark.long
def test_gathers_move_parameters_and_no_activations():
    """The compiled step's messages between devices: about what the parameters take, thrice, and nothing else large."""
    config = wide("ijepa_fashion_mnist")
    setup = planned(config, ShardingPlan(make_mesh(), True, True))
    state = setup.init_state()
    batch = sharding.shard_batch(next(setup.batches(steps=1)), setup.plan.mesh)
    program = jit_train_step.lower(state, batch, setup.base_key, setup.context).compile()
    text = program.as_text()
    moving = re.findall(r" = (\S.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text)
    shapes = [shape for shapes, _ in moving for shape in re.findall(r"f32\[([\d,]+)\]", shapes)]
    moved = sum(4 * math.prod(map(int, shape.split(","))) for shape in shapes)
    assert "all-gather" in {kind for _, kind in moving} and "all-to-all" not in {kind for _, kind in moving}
    assert moved < 4 * tree_bytes(state.method), moved / tree_bytes(state.method)


def gradients(config, plan, dtype=jnp.float32):
    """Loss, metrics and gradients of the first batch."""
    setup = planned(config, plan)
    method = config.method.build(total_steps=STEPS, key=jr.key(0))
    batch = sharding.shard_batch(next(setup.batches(steps=1)), plan.mesh)
    context = setup.context._replace(compute_dtype=dtype)
    return eqx.filter_jit(loss_and_grads)(method, batch, jr.key(1), context)


@pytest.mark.long  # `test_the_loss_is_the_same_in_micro_batches` of the contract is the quick form
@pytest.mark.parametrize("name", ["lejepa", "ijepa", "ijepa_multilayer", "byol"])
def test_micro_batches_give_the_gradients_of_the_batch(name):
    """Also where the loss reads statistics of the batch, as LeJEPA's and a head's BatchNorm do."""
    method, *variant = name.split("_")
    config, mesh = shrunk("_".join([method, "fashion_mnist", *variant])), make_mesh(2)
    loss, metrics, grads = gradients(config, ShardingPlan(mesh))
    micro_loss, micro_metrics, micro_grads = gradients(config, ShardingPlan(mesh, num_microbatches=4))
    np.testing.assert_allclose(micro_loss, loss, rtol=1e-6)
    assert float(global_norm(jax.tree.map(jnp.subtract, micro_grads, grads))) <= 2e-6 * float(global_norm(grads))
    for name, value in metrics.items():
        np.testing.assert_allclose(micro_metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.long
def test_gradients_of_micro_batches_are_summed_in_float32():
    """In bfloat16, 8 micro-batches are no farther from float32 than one."""
    config, mesh = shrunk("lejepa_fashion_mnist"), make_mesh(1)
    exact = gradients(config, ShardingPlan(mesh))[2]

    def distance(n):
        grads = gradients(config, ShardingPlan(mesh, num_microbatches=n), jnp.bfloat16)[2]
        return float(global_norm(jax.tree.map(jnp.subtract, grads, exact)))

    assert distance(8) <= 1.1 * distance(1)


@pytest.mark.long
def test_micro_batches_take_less_memory():
    config = wide("ijepa_fashion_mnist")
    config = replace(config, train=replace(config.train, batch_size=64))

    def temporary_bytes(num_microbatches):
        setup = planned(config, ShardingPlan(make_mesh(1), num_microbatches=num_microbatches))
        (batch,) = setup.batches(steps=1)
        lowered = jit_train_step.lower(setup.init_state(), batch, setup.base_key, setup.context)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < temporary_bytes(1) / 2


def test_micro_batches_that_the_devices_do_not_divide_are_refused():
    with pytest.raises(
        UserError, match=r"batch_size=16 .* 8 devices in train.grad_accum_steps=4 micro-batches; try 32"
    ):
        sharding.check_batch(16, 4)
