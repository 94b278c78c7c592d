"""A dry run: FLOPs counted from jaxprs, memory, one step, and no file written."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import pytest

from jepax import flops
from jepax.data import DataConfig
from jepax.distributed.sharding import ShardingConfig
from jepax.methods.ijepa_no_teacher import IJEPANoTeacherConfig
from jepax.methods.regularizer import RegularizerConfig
from jepax.recipes import RECIPES
from jepax.training import dry_run
from jepax.training.setup import make_setup
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
    data = {"dataset": "synthetic", "canvas_size": 28, "channels": 1, "synthetic_size": 64, **data}
    train = dataclasses.replace(config.train, batch_size=16, steps=4)
    encoder = dataclasses.replace(config.method.encoder, width=24, depth=1)
    predictor = dataclasses.replace(config.method.predictor, width=12, depth=1)
    method = dataclasses.replace(config.method, encoder=encoder, predictor=predictor)
    return dataclasses.replace(config, data=DataConfig(**data), train=train, method=method)


@pytest.fixture
def steps(monkeypatch):
    """Batch sizes of the steps that are run: none really is; `test_cli` runs one."""
    sizes = []

    def run(state, batch, base_key, context):
        sizes.append(len(batch.index))
        return state, {"train/loss": jnp.float32(0.5), "optim/grad_norm": jnp.float32(1.0)}

    monkeypatch.setattr(dry_run, "run_train_step", run)
    return sizes


def test_a_dry_run_prints_everything_and_writes_nothing(tmp_path, monkeypatch, steps):
    monkeypatch.chdir(tmp_path)
    lines = []
    dry_run.dry_run(small(), lines.append)
    text = "\n".join(lines)
    for word in (
        "recipe: ijepa_fashion_mnist",
        "target_encoder",
        "(not trained)",
        "trained in total",
        "GFLOP per example",
        "draw: views and masks",
        "forward: networks",
        "backward",
        "optimizer state",
        "one step of 16 examples ...",
        "loss 0.5",
    ):
        assert word in text, text
    assert steps == [16] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["train/loss", "optim/grad_norm"])
def test_a_first_step_that_is_not_finite_is_an_error(name, monkeypatch):
    values = {"train/loss": jnp.float32(1), "optim/grad_norm": jnp.float32(1)} | {name: jnp.float32(jnp.nan)}
    monkeypatch.setattr(dry_run, "run_train_step", lambda state, *_: (state, values))
    with pytest.raises(UserError, match=r"first step's loss is .* and its gradient norm"):
        dry_run.run_one_step(make_setup(small()), lambda line: None)


@pytest.mark.long
def test_published_settings_cost_what_their_networks_do():
    """ViT-B/16 on 224 x 224: the teacher on all patches, the context encoder and the predictor forward and back."""
    flops = dry_run.flops_by_verb(make_dry_setup(RECIPES["ijepa_vitb16_in1k"]()))
    step = flops.pop("step")
    assert step == pytest.approx(84e9, rel=0.02) and sum(flops.values()) == pytest.approx(step)
    assert flops["forward: networks"] > 0.4 * step and flops["backward"] > 0.3 * step
    assert 0 < flops["draw: views and masks"] + flops["objective: loss over the batch"] < 0.03 * step
    assert flops["optimizer"] == 0


def make_dry_setup(config):
    return dry_run.make_dry_setup(config, lambda line: None)


def test_a_dry_run_of_a_method_that_compares_views(steps):
    lines = []
    dry_run.dry_run(shrunk("byol_fashion_mnist"), lines.append)
    text = "\n".join(lines)
    for word in ("name: byol", "target ", "(not trained)", "forward: networks", "trained in total"):
        assert word in text, text


@pytest.mark.long
def test_the_flops_of_a_method_that_compares_views():
    """ViT-L/14: the networks' forward pass is a third of a step without a teacher."""
    flops = dry_run.flops_by_verb(make_dry_setup(RECIPES["lejepa_vitl14_in1k"]()))
    step = flops.pop("step")
    assert sum(flops.values()) == pytest.approx(step)
    assert flops["forward: networks"] == pytest.approx(step / 3, rel=0.02)
    assert flops["backward"] == pytest.approx(2 * step / 3, rel=0.02)
    assert 0 < flops["draw: views and masks"] + flops["objective: loss over the batch"] < 0.01 * step


@pytest.mark.parametrize(("stop_gradient", "ratio"), [pytest.param(True, 1.0, marks=pytest.mark.long), (False, 1.2)])
def test_a_shared_encoders_backward_pass_is_counted(stop_gradient, ratio):
    """Where gradients reach the targets, their pass over all patches is run backward too."""
    config = small()
    fields = {field.name: getattr(config.method, field.name) for field in dataclasses.fields(config.method)}
    fields = {name: value for name, value in fields.items() if name != "ema"}
    fields["regularizer"] = RegularizerConfig(name="vicreg")
    method = IJEPANoTeacherConfig(**fields, stop_gradient=stop_gradient)
    usual, other = (
        dry_run.flops_by_verb(make_setup(dataclasses.replace(config, method=m))) for m in (config.method, method)
    )
    assert other["forward: networks"] == pytest.approx(usual["forward: networks"], rel=0.02)
    assert other["backward"] >= ratio * usual["backward"]
    assert ratio > 1 or other["backward"] == pytest.approx(usual["backward"], rel=0.05)


def test_the_optimizers_flops_are_shared_by_the_batch():
    """Five iterations of three products for each of the blocks' matrices, the smaller side first."""
    config = small()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="muon"))
    expected = 0
    for module in (config.method.encoder, config.method.predictor):
        width, hidden = module.width, round(module.width * module.mlp_ratio)
        for small_side, large_side in ((width, 3 * width), (width, width), (width, hidden), (width, hidden)):
            expected += module.depth * 5 * (4 * small_side**2 * large_side + 2 * small_side**3)
    flops = dry_run.flops_by_verb(make_setup(config))
    assert flops["optimizer"] == pytest.approx(expected / config.train.batch_size)


def sizes_of(monkeypatch, fixed, per_example, free):
    """Bytes of the state, of each example, and that are free, as given."""
    monkeypatch.setattr(dry_run, "fixed_bytes", lambda *_: {"all": fixed})
    monkeypatch.setattr(dry_run, "bytes_per_example", lambda *_: per_example)
    monkeypatch.setattr(dry_run, "free_memory_bytes", lambda: free)


def test_a_model_too_large_is_not_run(monkeypatch, steps):
    sizes_of(monkeypatch, 2_000_000, 1000, 1e6)
    lines = []
    dry_run.run_one_step(make_setup(small()), lines.append)
    assert "not run" in lines[-1] and steps == []


def test_the_step_shrinks_to_the_memory(monkeypatch, steps):
    sizes_of(monkeypatch, 1000, 10, 2 * (1000 + 1.5 * 10))
    lines = []
    dry_run.run_one_step(make_setup(small()), lines.append)
    assert steps == [jax.device_count()] and "not 16" in lines[-2]


def test_generated_images_replace_a_folder_that_is_not_given():
    lines = []
    config = small(dataset="image_folder", canvas_size=28)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_epochs=0.0))
    setup = dry_run.make_dry_setup(config, lines.append)
    assert "generated images replace it" in lines[0] and len(setup.source) > 1_000_000
    with pytest.raises(UserError, match=r"data\.root=/nowhere"):
        dry_run.make_dry_setup(small(dataset="image_folder", root="/nowhere"), lines.append)


def test_memory_of_the_state_is_exact():
    setup = make_setup(small())
    abstract, state = setup.abstract_state(), setup.init_state()
    assert flops.tree_bytes(abstract.method) == sum(x.nbytes for x in jax.tree.leaves(state.method))
    assert flops.tree_bytes(abstract.opt_state) == sum(x.nbytes for x in jax.tree.leaves(state.opt_state))


@pytest.mark.long
def test_the_memory_of_the_other_plan_is_printed():
    """As under that plan itself: a CPU's devices share one memory, so that `auto` replicates everything."""

    def printed(parameters):
        config = small()  # but as wide as the recipe is: narrower arrays would be replicated either way
        method = RECIPES["ijepa_fashion_mnist"]().method
        train = dataclasses.replace(config.train, sharding=ShardingConfig(params=parameters))
        config = dataclasses.replace(config, method=method, train=train)
        lines = []
        dry_run.print_memory(make_setup(config), lines.append)
        rows = [line.split() for line in lines if line.startswith("  ")]
        return {" ".join(name): float(number) for *name, number in rows}

    replicated, sharded = printed("ddp"), printed("fsdp")
    assert replicated["total with train.sharding.params=fsdp"] == sharded["total"]
    assert sharded["total with train.sharding.params=ddp"] == replicated["total"]
    assert sharded["total"] < replicated["total"]
