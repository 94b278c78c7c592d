"""LeWorldModel's parts against recorded numbers of the public one, in both precisions, with gradients."""

from contextlib import nullcontext
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.nn.conditioned import ActionEncoder, CausalPredictor, CausalPredictorConfig, ConditionedBlock
from jepax.nn.projector import Head
from jepax.nn.transformer import FAST, PLAIN
from jepax.objectives.sigreg import epps_pulley, sigreg_by_group
from tests.parity.worldmodel import (
    assert_gradients,
    assert_outputs,
    named,
    recorded,
    sizes,
    under,
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
