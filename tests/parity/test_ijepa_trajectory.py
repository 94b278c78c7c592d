"""Six recorded steps of the public I-JEPA, in float32: values, gradients, schedules, losses and final parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jepax.methods.ijepa import take_patches
from jepax.optim import OptimConfig, Optimizer
from jepax.training.step import TrainContext, init_train_state, train_step
from jepax.trees import trainable
from jepax.types import ImageBatch
from tests.parity.reference import GOLDEN, group, method_of, named_parameters, views_of, with_parameters

FILE = GOLDEN / "ijepa_reference_trajectory.npz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE.name} is not in the folder of recorded numbers")


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def method(golden):
    patch = int(golden["config.patch_size"])
    method = method_of(golden)
    for kind, where in (
        ("encoder", lambda m: m.encoder),
        ("predictor", lambda m: m.predictor),
        ("target_encoder", lambda m: m.target_encoder.average),
    ):
        network = "predictor" if kind == "predictor" else "encoder"
        new = with_parameters(where(method), network, group(golden, f"init.{kind}."), patch)
        method = eqx.tree_at(where, method, new)
    return method


def close(ours, theirs, tolerance, name):
    """Largest difference over the recorded array's largest value."""
    error = np.max(np.abs(np.asarray(ours) - theirs)) / max(np.max(np.abs(theirs)), 1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e}"


def by_block(ours):
    """(batch, blocks, target, dim) in the recording's order: block 0 of every image first."""
    return jnp.swapaxes(ours, 0, 1).reshape(-1, *ours.shape[2:])


def test_position_tables(golden, method):
    from jepax.nn.pos_embed import sincos_2d

    for name, dim in (
        ("encoder.pos_embed", "config.embed_dim"),
        ("predictor.predictor_pos_embed", "config.predictor_dim"),
    ):
        close(sincos_2d(method.masks.grid, int(golden[dim])), golden[f"init.{name}"][0], 1e-6, name)


def test_every_recorded_parameter_has_a_place(golden, method):
    patch = int(golden["config.patch_size"])
    for kind in ("encoder", "predictor"):
        assert set(named_parameters(getattr(method, kind), kind, patch)) == set(group(golden, f"init.{kind}."))


def test_values_of_step_0(golden, method):
    @eqx.filter_jit
    def values(method, views):
        outputs, masks = method.forward(views), views.masks
        context = method.encoder(views.image, masks.context)
        targets = take_patches(outputs.embedded, masks.targets)
        return method.target_encoder.average(views.image), targets, context, outputs.predictions

    output, targets, context, predictions = values(method, views_of(golden, 0))
    close(output, golden["step0.target_encoder_output"], 1e-5, "target encoder")
    close(by_block(targets), golden["step0.targets"], 1e-5, "targets")
    close(context, golden["step0.context_embeddings"], 1e-5, "context")
    close(by_block(predictions), golden["step0.predictions"], 1e-5, "predictions")


def test_gradients_of_step_0(golden, method):
    patch = int(golden["config.patch_size"])
    params, rest = eqx.partition(method, trainable(method))
    views = views_of(golden, 0)

    def loss(params):
        method = eqx.combine(params, rest)
        return method.objective(method.forward(views), key=jr.key(0))[0]

    grads = jax.jit(jax.grad(loss))(params)
    for kind in ("encoder", "predictor"):
        theirs, ours = group(golden, f"step0.grad.{kind}."), named_parameters(getattr(grads, kind), kind, patch)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            close(ours[name], value, 1e-4, f"gradient of {kind}.{name}")


def optimizer_of(golden):
    config = OptimConfig(peak_lr=1e-3, start_lr=2e-4, final_lr=1e-6, weight_decay=0.04, final_weight_decay=0.4)
    return Optimizer(config, int(golden["config.total_steps"]), int(golden["config.warmup_steps"]))


def test_schedules(golden, method):
    optimizer = optimizer_of(golden)
    with jax.enable_x64(True):
        for step in range(len(golden["loss"])):
            for name, ours in (
                ("learning_rate", optimizer.learning_rate(step)),
                ("weight_decay", optimizer.weight_decay(step)),
                ("ema_momentum", method.config.ema.at(step, method.total_steps)),
            ):
                np.testing.assert_allclose(ours, golden[name][step], rtol=1e-12, err_msg=f"{name} of step {step}")


def test_losses_and_final_parameters(golden, method):
    """`train_step` itself, with the recorded views and masks in place of random ones."""
    optimizer, patch = optimizer_of(golden), int(golden["config.patch_size"])
    state, losses = init_train_state(method, optimizer), []
    batch = golden["step0.images"].shape[0]
    images = ImageBatch(np.zeros((batch, 1, 1, 3), np.uint8), np.ones((batch, 2), np.int32), np.arange(batch))

    @eqx.filter_jit
    def recorded_step(state, views):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(method), "draw", lambda self, batch, keys: views)
            return train_step(state, images, jr.key(0), TrainContext(optimizer))

    for step in range(len(golden["loss"])):
        state, metrics = recorded_step(state, views_of(golden, step))
        losses.append(float(metrics["train/loss"]))
    np.testing.assert_allclose(losses, golden["loss"], rtol=1e-5)
    final = state.method
    for kind, module in (
        ("encoder", final.encoder),
        ("predictor", final.predictor),
        ("target_encoder", final.target_encoder.average),
    ):
        ours = named_parameters(module, "predictor" if kind == "predictor" else "encoder", patch)
        for name, value in group(golden, f"final.{kind}.").items():
            close(ours[name], value, 1e-4, f"final {kind}.{name}")
