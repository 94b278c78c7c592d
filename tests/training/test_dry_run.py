"""What a dry run tells: arithmetic counted off jaxprs, memory, and that nothing is written."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import pytest

from jepax import flops
from jepax.data import DataConfig
from jepax.distributed.sharding import ShardingConfig
from jepax.recipes import RECIPES
from jepax.training import dry_run
from jepax.training.step import first_state
from jepax.types import UserError
from tests.contracts.shrink import shrunk

X = jax.ShapeDtypeStruct((3, 5), jnp.float32)
W = jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 3 * 5 * 5


def looped(x, w):
    return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=7)[0]


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (lambda x, w: x @ w, 1),
        (jax.jit(lambda x, w: jnp.tanh(x @ w) @ w), 2),
        (looped, 7),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w), 2),
        (jax.grad(lambda x, w: jnp.sum(jnp.tanh(x @ w) @ w)), 4),
        (jax.grad(jax.checkpoint(lambda x, w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w)))), 6),
    ],
)
def test_matrix_products_are_counted_wherever_they_hide(function, products):
    assert flops.count_flops(function, X, W) == products * ONE


def test_batched_products_and_convolutions():
    a, b = jax.ShapeDtypeStruct((4, 3, 5), jnp.float32), jax.ShapeDtypeStruct((4, 5, 6), jnp.float32)
    assert flops.count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 4 * 3 * 5 * 6
    image, kernel = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32), jax.ShapeDtypeStruct((7, 3, 2, 2), jnp.float32)
    counted = flops.count_flops(lambda i, k: jax.lax.conv_general_dilated(i, k, (2, 2), "VALID"), image, kernel)
    assert counted == 2 * (2 * 7 * 4 * 4) * 3 * 2 * 2


def test_saved_bytes_leave_out_what_was_given():
    def loss(w, x):
        return jnp.sum(jnp.sin(x @ w) @ w)

    saved = flops.residual_bytes(loss, W, X)  # sin's result and its cosine
    assert saved == 2 * 4 * math.prod(X.shape)
    assert flops.residual_bytes(jax.checkpoint(loss), W, X) < saved


def small(**data):
    config = RECIPES["ijepa_fashion_mnist"]()
    data = {"source": "synthetic", "canvas": 28, "channels": 1, "synthetic_images": 64, **data}
    train = dataclasses.replace(config.train, batch_size=16, steps=4)
    encoder = dataclasses.replace(config.method.encoder, width=24, depth=1)
    predictor = dataclasses.replace(config.method.predictor, width=12, depth=1)
    method = dataclasses.replace(config.method, encoder=encoder, predictor=predictor)
    return dataclasses.replace(config, data=DataConfig(**data), train=train, method=method)


def test_a_dry_run_tells_everything_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "run_first_step", lambda plan, batch: "loss 0.5")  # a real one: in test_cli
    lines = []
    dry_run.dry_run(small(), lines.append)
    told = "\n".join(lines)
    for word in (
        "recipe: ijepa_fashion_mnist",
        "target_encoder",
        "(not trained)",
        "trained in all",
        "tokens per image",
        "GFLOP per image",
        "over the unpadded step",
        "optimiser state",
        "one step of 16 images ...",
        "loss ",
    ):
        assert word in told, told
    assert os.listdir(tmp_path) == []


def test_published_settings_cost_under_five_percent_more_than_unpadded():
    plan = dry_run.make_setup(RECIPES["ijepa_vitb16_in1k"](), lambda line: None)
    step = dry_run.step_flops(plan)
    assert step == pytest.approx(84e9, rel=0.02)
    assert 1.0 <= step / dry_run.unpadded_flops(plan, step) < 1.05
    parts = dry_run.part_flops(plan, step)
    assert 0 < parts["views and regularisers"] < 0.03 * step
    assert parts["optimiser, shared by the batch"] == 0


def test_a_dry_run_of_a_method_that_compares_views(monkeypatch):
    monkeypatch.setattr(dry_run, "run_first_step", lambda plan, batch: "loss 0.5")
    lines = []
    dry_run.dry_run(shrunk("byol_fashion_mnist"), lines.append)
    told = "\n".join(lines)
    for word in ("name: byol", "target ", "(not trained)", "2 global views of 36", "encoder, global views", "in all"):
        assert word in told, told
    assert "local views of" not in told and "unpadded" not in told


def test_the_parts_of_a_method_that_compares_views():
    """ViT-L/14: local views of 49 tokens, six of them, beside two global ones of 256."""
    plan = dry_run.make_setup(RECIPES["lejepa_vitl14_in1k"](), lambda line: None)
    step = dry_run.step_flops(plan)
    parts = dry_run.part_flops(plan, step)
    assert sum(parts.values()) == pytest.approx(step)
    large, small = parts["encoder, global views, both passes"], parts["encoder, local views, both passes"]
    assert small / large == pytest.approx(6 * 49 / (2 * 256), rel=0.05)  # attention is a small part of the products
    assert 0 < parts["views, heads, teacher and objective"] < 0.01 * step
    lines = []
    dry_run.print_flops(plan, lines.append)
    assert "tokens per image: 2 global views of 256, 6 local views of 49" in "\n".join(lines)


@pytest.mark.parametrize(("settings", "share"), [({}, 0.0), ({"teacher": "shared"}, 0.2)])
def test_a_shared_encoders_backward_pass_is_counted_as_the_targets(settings, share):
    config = small()
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, **settings))
    plan = dry_run.make_setup(config, lambda line: None)
    step = dry_run.step_flops(plan)
    parts = dry_run.part_flops(plan, step)
    backward = parts.get("target encoder, forward and backward", 0.0)
    assert backward >= share * step and sum(parts.values()) == pytest.approx(step)
    assert 0 <= parts["views and regularisers"] < 0.5 * step


def test_the_optimisers_arithmetic_is_shared_by_the_batch():
    """Five iterations of three products for each of the blocks' matrices, the smaller side first."""
    config = small()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, matrices="muon"))
    plan = dry_run.make_setup(config, lambda line: None)
    expected = 0
    for module in (config.method.encoder, config.method.predictor):
        width, hidden = module.width, round(module.width * module.mlp_ratio)
        for small_side, large_side in ((width, 3 * width), (width, width), (width, hidden), (width, hidden)):
            expected += module.depth * 5 * (4 * small_side**2 * large_side + 2 * small_side**3)
    assert dry_run.optimizer_flops(plan) == pytest.approx(expected / config.train.batch_size)
    parts = dry_run.part_flops(plan, dry_run.step_flops(plan))
    encoder = parts["context encoder, forward and backward"]
    assert 0 < parts["views and regularisers"] < encoder


def test_a_model_too_large_is_traced_and_not_run(monkeypatch):
    monkeypatch.setattr(dry_run, "free_memory_bytes", lambda: 1e6)
    monkeypatch.setattr(dry_run, "run_first_step", lambda *_: pytest.fail("it ran"))
    lines = []
    dry_run.run_one_step(dry_run.make_setup(small(), lines.append), 2e6, 1e3, lines.append)
    assert "traced" in lines[-1]


def test_the_step_shrinks_to_the_memory(monkeypatch):
    devices, lines = jax.device_count(), []
    monkeypatch.setattr(dry_run, "free_memory_bytes", lambda: 2 * (1000 + 1.5 * 10))
    monkeypatch.setattr(dry_run, "run_first_step", lambda plan, batch: f"took {batch}")
    dry_run.run_one_step(dry_run.make_setup(small(), lines.append), 1000.0, 10.0, lines.append)
    assert lines[-1] == f"took {devices}" and "not 16" in lines[-2]


def test_pictures_stand_in_for_a_folder_not_given():
    lines = []
    config = small(source="image_folder", canvas=28)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_epochs=0.0))
    plan = dry_run.make_setup(config, lines.append)
    assert "stand in" in lines[0] and len(plan.source) > 1_000_000
    with pytest.raises(UserError, match=r"data\.root=/nowhere"):
        dry_run.make_setup(small(source="image_folder", root="/nowhere"), lines.append)


def test_memory_of_the_state_is_exact():
    plan = dry_run.make_setup(small(), lambda line: None)
    config = plan.config
    state = first_state(config.method, plan.optimizer, jax.random.key(0))
    assert flops.tree_bytes(plan.state.method) == sum(x.nbytes for x in jax.tree.leaves(state.method))
    assert flops.tree_bytes(plan.state.opt_state) == sum(x.nbytes for x in jax.tree.leaves(state.opt_state))


def test_what_the_other_layout_would_take_is_told():
    """As a plan of that layout tells it: a CPU's devices share one memory, so that `auto` leaves everything whole."""

    def told(parameters):
        config = small()  # but as wide as the recipe is: narrower arrays would stay whole either way
        method = RECIPES["ijepa_fashion_mnist"]().method
        train = dataclasses.replace(config.train, sharding=ShardingConfig(parameters=parameters))
        config = dataclasses.replace(config, method=method, train=train)
        lines = []
        dry_run.print_memory(dry_run.make_setup(config, lambda line: None), lines.append)
        rows = [line.split() for line in lines if line.startswith("  ")]
        return {" ".join(name): float(number) for *name, number in rows}

    whole, split = told("replicated"), told("sharded")
    assert whole["in all with train.sharding.parameters=sharded"] == split["in all"]
    assert split["in all with train.sharding.parameters=replicated"] == whole["in all"]
    assert split["in all"] < whole["in all"]
