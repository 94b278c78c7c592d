"""LeWorldModel's parts against recorded numbers of the public one, in both precisions, with gradients."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.evals.agents import goal_cost
from jepax.methods import lewm
from jepax.methods.lewm import Clips, LeWMConfig, RunningStatistics
from jepax.nn import ViTConfig
from jepax.nn.conditioned import ActionEncoder, CausalPredictor, CausalPredictorConfig, ConditionedBlock
from jepax.nn.projector import Head
from jepax.nn.transformer import FAST, PLAIN
from jepax.objectives.sigreg import epps_pulley, sigreg_by_group
from jepax.trees import trainable
from tests.parity.worldmodel import (
    assert_gradients,
    assert_outputs,
    named,
    named_vit,
    recorded,
    sizes,
    under,
    with_vit_weights,
    with_weights,
)


def forms(*quick):
    """Precisions and functions; those that are not in `quick` in the long run alone."""
    every = {"f64": ("f64", PLAIN), "f32": ("f32", PLAIN), "f32-fast": ("f32", FAST)}
    marked = [
        pytest.param(*form, id=name, marks=[pytest.mark.long] * (name not in quick)) for name, form in every.items()
    ]
    return pytest.mark.parametrize(("bits", "ops"), marked)


@pytest.fixture
def dtype(bits):
    """The type of a test's numbers; the fast form is for 32 bits and fewer."""
    with jax.enable_x64(True) if bits == "f64" else nullcontext():
        yield jnp.float64 if bits == "f64" else jnp.float32


def value_and_gradients(call, module, inputs, cotangent):
    """The value of `call(module, *inputs)`, and the gradients of its product with the cotangent."""

    @eqx.filter_jit
    def run(arguments):
        value, back = eqx.filter_vjp(lambda pair: call(pair[0], *pair[1]), arguments)
        return value, back(cotangent.astype(value.dtype))[0]

    value, (by_module, by_inputs) = run((module, inputs))
    return value, by_module, by_inputs


def blank(make, dtype):
    """The module that `make` returns, with zeros for every number of it, which spares its compilation."""
    shapes = eqx.filter_eval_shape(make, key=jr.key(0))
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, dtype), shapes)


def check(golden, bits, kind, make, call, dtype, *, names=("x",), suffix=""):
    """Value and all gradients of a part whose weights are in the file."""
    module = with_weights(blank(make, dtype), kind, under(golden, "w."), dtype)
    inputs = [jnp.asarray(golden[f"in.{name}"], dtype) for name in names]
    value, by_module, by_inputs = value_and_gradients(call, module, inputs, jnp.asarray(golden["in.cotangent"]))
    assert_outputs(value, golden[f"out{suffix}.{bits}"], "value")
    ours = {f"w.{name}": x for name, x in named(by_module, kind).items()}
    ours |= {f"in.{name}": np.asarray(x) for name, x in zip(names, by_inputs, strict=True)}
    assert_gradients(ours, under(golden, f"grad{suffix}.{bits}."))
    return module, inputs


def predictor_config(c, width):
    sizes = {"num_heads": c["heads"], "head_width": c["head_width"], "mlp_width": c["mlp_width"]}
    return CausalPredictorConfig(history=c["frames"], width=width, depth=c.get("depth", 1), **sizes)


@forms("f64", "f32-fast")
def test_block(bits, ops, dtype):
    golden = recorded("block")
    c = sizes(golden)
    make = partial(ConditionedBlock, predictor_config(c, c["width"]))
    check(golden, bits, "block", make, lambda m, *x: m(*x, ops=ops), dtype, names=("x", "condition"))


@forms("f64", "f32-fast")
@pytest.mark.parametrize("name", ["predictor", "predictor_projected"])
def test_predictor(name, bits, ops, dtype):
    golden = recorded(name)
    c = sizes(golden)
    make = partial(CausalPredictor, predictor_config(c, c["hidden_width"]), c["input_width"])

    def call(module, *x):
        return module(*x, ops=ops)

    module, inputs = check(golden, bits, "predictor", make, call, dtype, names=("x", "condition"))
    for part, frames in (("first_frame_only", slice(0, 1)), ("last_two_frames", slice(-2, None))):
        value = eqx.filter_jit(call)(module, *(x[:, frames] for x in inputs))
        assert_outputs(value, golden[f"out_{part}.{bits}"], part)


@forms("f64", "f32-fast")
def test_head(bits, ops, dtype):
    golden = recorded("head")
    c = sizes(golden)
    make = partial(Head, c["input_width"], c["hidden_width"], c["output_width"])
    running = jnp.asarray(np.stack([golden["w.bn.running_mean"], golden["w.bn.running_var"]]), dtype)
    arguments = (golden, bits, "head", make)
    check(*arguments, lambda m, x: m(x, running, ops)[0], dtype, suffix="_eval")
    module, _ = check(*arguments, lambda m, x: m(x, ops=ops)[0], dtype, suffix="_train")

    # The running statistics after each of two batches.
    statistics = eqx.filter_jit(lambda module, x: module(x, ops=ops)[1])
    for name, count in (("x", "one"), ("x_second", "two")):
        running = 0.9 * running + 0.1 * statistics(module, jnp.asarray(golden[f"in.{name}"], dtype))
        theirs = [golden[f"running_{part}_after_{count}.{bits}"] for part in ("mean", "var")]
        assert_outputs(running, np.stack(theirs), f"after {count}")


@forms("f64", "f32-fast")
def test_action_encoder(bits, ops, dtype):
    golden = recorded("action_encoder")
    c = sizes(golden)
    options = {"width": c["smooth_width"], "expansion": c["mlp_scale"]}
    make = partial(ActionEncoder, c["input_width"], c["output_width"], **options)
    check(golden, bits, "action", make, lambda m, x: m(x, ops), dtype)


@forms("f64", "f32-fast")
def test_sigreg(bits, ops, dtype):
    golden = recorded("sigreg")
    noise = jnp.asarray(golden["in.noise"], dtype)
    directions = noise / jnp.linalg.norm(noise, axis=0)
    z = jnp.asarray(golden["in.embeddings"], dtype)
    knots = sizes(golden)["knots"]
    loss, grad = jax.value_and_grad(lambda z: sigreg_by_group(jnp.swapaxes(z, 0, 1), directions, knots))(z)
    assert_outputs(loss, golden[f"loss.{bits}"], "loss")
    assert_gradients({"embeddings": np.asarray(grad)}, under(golden, f"grad.{bits}."))
    if bits == "f64":
        statistic = jax.vmap(lambda frame: epps_pulley(frame @ directions, knots))(jnp.swapaxes(z, 0, 1))
        assert_outputs(statistic, golden["statistic.f64"], "statistic")


PARTS = {"projector": "head", "pred_head": "head", "action": "action", "predictor": "predictor"}
OURS = {"projector": "projector", "pred_head": "head", "action": "action_encoder", "predictor": "predictor"}


def recorded_method(golden, dtype, ops, **settings):
    """LeWM with the file's sizes and weights, without dropout."""
    c = sizes(golden)
    vit = {"width": c["vit_width"], "depth": c["vit_depth"], "num_heads": c["vit_heads"], "patch_size": c["patch"]}
    grid = (c["image"] // c["patch"],) * 2
    predictor = predictor_config(c | {"frames": c["history"]}, c["width"])
    config = LeWMConfig(
        encoder=ViTConfig(**vit, class_token=True, learned_grid=grid, norm_epsilon=1e-12, fast=ops is FAST),
        predictor=replace(predictor, dropout=0.0),
        action_dim=c["action_width"],
        embed_dim=c["width"],
        head_dim=c["head_hidden"],
        sigreg_weight=c["sigreg_weight"],
        num_slices=c["slices"],
        knots=c["knots"],
        **settings,
    )
    method = with_statistics(blank(partial(config.build, total_steps=1), dtype), golden, "w.{0}.bn.running_{1}", dtype)
    vit = with_vit_weights(method.encoder, under(golden, "w.vit."), dtype)
    method = eqx.tree_at(lambda m: m.encoder, method, vit)
    for part, kind in PARTS.items():
        module = with_weights(getattr(method, OURS[part]), kind, under(golden, f"w.{part}."), dtype)
        method = eqx.tree_at(lambda m, part=part: getattr(m, OURS[part]), method, module)
    return method


def with_statistics(method, golden, name, dtype):
    """The method with the running statistics of this name in the file."""
    parts = [[golden[name.format(part, each)] for each in ("mean", "var")] for part in ("projector", "pred_head")]
    running = RunningStatistics(*(jnp.asarray(np.stack(pair), dtype) for pair in parts))
    return eqx.tree_at(lambda m: m.statistics.average, method, running)


def clips(golden, dtype):
    pixels = golden["in.pixels"].transpose(0, 1, 3, 4, 2)
    return Clips(jnp.asarray(pixels, dtype), jnp.asarray(golden["in.actions"], dtype))


@pytest.fixture
def given_noise(monkeypatch):
    """The recorded directions of SIGReg in place of random ones."""

    def give(noise):
        monkeypatch.setattr(lewm, "random_unit_directions", lambda *_: noise / jnp.linalg.norm(noise, axis=0))

    return give


def loss_and_gradients(method, views):
    @eqx.filter_jit
    def run(params, frozen, views):
        def loss(params):
            method = eqx.combine(params, frozen)
            return method.objective(method.forward(views), key=jr.key(0))

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run(*eqx.partition(method, trainable(method)), views)


def named_method(grads):
    """All gradients under the recorded names."""
    found = {f"vit.{name}": x for name, x in named_vit(grads.encoder).items()}
    for part, kind in PARTS.items():
        found |= {f"{part}.{name}": x for name, x in named(getattr(grads, OURS[part]), kind).items()}
    return found


@forms("f64", "f32-fast")
def test_loss_and_gradients_of_the_method(bits, ops, dtype, given_noise):
    golden = recorded("lewm_step")
    method, views = recorded_method(golden, dtype, ops), clips(golden, dtype)
    given_noise(jnp.asarray(golden["in.noise"], dtype))

    (loss, metrics), grads = loss_and_gradients(method, views)
    for name, value in (("", loss), *((f"_{n}", metrics[f"train/{n}_loss"]) for n in ("prediction", "sigreg"))):
        assert_outputs(value, golden[f"loss{name}.{bits}"], f"loss{name}")
    assert_gradients(named_method(grads), under(golden, f"grad.{bits}."))

    # The embeddings, and the statistics that planning uses.
    @eqx.filter_jit
    def embed(method, views):
        return method.project(method.forward(views).tokens)[0], method.action_encoder(views.actions, ops)

    for name, value in zip(("embeddings", "action_embeddings"), embed(method, views), strict=True):
        assert_outputs(value, golden[f"{name}.{bits}"], name)
    moved, _ = method.after_update(jnp.int32(0), metrics)
    running = moved.statistics.average
    for part, ours in (("projector", running.projector), ("pred_head", running.head)):
        theirs = [golden[f"running_{name}_after.{part}.{bits}"] for name in ("mean", "var")]
        assert_outputs(ours, np.stack(theirs), part)


@forms("f64")
def test_gradients_with_a_detached_target(bits, ops, dtype, given_noise):
    golden = recorded("lewm_step")
    given_noise(jnp.asarray(golden["in.noise"], dtype))
    views = clips(golden, dtype)
    detached = recorded_method(golden, dtype, ops, detach_target=True)
    ours = named_method(loss_and_gradients(detached, views)[1])
    theirs = under(golden, f"grad_target_detached.{bits}.")
    assert_gradients({name: ours[name] for name in theirs}, theirs)
    for name, value in theirs.items():
        attached = golden[f"grad.{bits}.{name}"]
        assert np.linalg.norm(value - attached) > 0.5 * np.linalg.norm(attached)


@forms("f64")
@pytest.mark.parametrize("context", ["one_frame", "full_history"])
def test_rollout(context, bits, ops, dtype):
    step, golden = recorded("lewm_step"), recorded("rollout")
    method = with_statistics(recorded_method(step, dtype, ops), step, "running_{1}_after.{0}.f32", dtype)

    @eqx.filter_jit
    def embed(method, pixels):
        tokens = method.forward(Clips(pixels, jnp.zeros((*pixels.shape[:2], 1), dtype))).tokens
        return method.project(tokens, method.statistics.average.projector)[0]

    pixels = [golden[f"in.{name}_pixels"].transpose(0, 1, 3, 4, 2) for name in ("context", "goal")]
    frames, goal = (embed(method, jnp.asarray(x, dtype)) for x in pixels)
    past, candidates = (jnp.asarray(golden[f"in.{name}"], dtype) for name in ("past_actions", "candidates"))
    if context == "one_frame":
        frames, past = frames[:, -1:], past[:, :0]
    goal = goal[:, 0]
    embeddings = eqx.filter_jit(eqx.filter_vmap(method.rollout))(frames, past, candidates)
    assert_outputs(goal, golden[f"{context}.goal_embedding.{bits}"], "goal")
    assert_outputs(embeddings, golden[f"{context}.embeddings.{bits}"], "embeddings")
    costs = jax.vmap(goal_cost)(embeddings, goal)
    assert_outputs(costs, golden[f"{context}.cost.{bits}"], "cost", 1e-4 if bits == "f32" else None)
