"""The built-in sweeps, on Fashion-MNIST for CPUs."""

from jepax.sweeps.base import Sweep, Variant, sweep

# Two passes and one learning rate for all.
SHARED = ("--train.epochs", "2", "--optim.warmup-epochs", "0.2", "--optim.peak-lr", "3e-3")
IJEPA, DENSE = "ijepa_fashion_mnist", "ijepa_fashion_mnist_multilayer"
# Without a teacher: stop-gradient targets, and a regularizer on the context's embedding.
NO_TEACHER = "ijepa_fashion_mnist_no_teacher"
# The gradient reaches the targets too, so only the regularizer prevents collapse.
GRADIENT_TO_TARGETS = (
    "--method.stop-gradient False --method.regularize-on targets --method.target-norm none --method.loss l2"
)


def row(name: str, recipe: str, overrides: str = "") -> Variant:
    return Variant(name, recipe, tuple(overrides.split()))


@sweep
def family_fashion_mnist() -> Sweep:
    """{masked prediction, two views} x {EMA teacher, SIGReg, RDMReg, VICReg, VISReg}, and three more of I-JEPA.

    The regularizer weights in I-JEPA were chosen on validation; the other methods use those of their papers or public
    code. Both teachers' momentum rises linearly from 0.99 to 1.
    """
    name, weight = "--method.regularizer.name", "--method.regularizer.weight"
    return Sweep(
        name="family_fashion_mnist",
        about="two passes over 54,000 images; encoder, optimizer, learning rate, batch and probes are the same",
        shared=SHARED,
        rows=(
            row("masked+ema", IJEPA, f"{name} none"),
            row("masked+sigreg", NO_TEACHER, f"{name} sigreg {weight} 5e-4"),
            row("masked+rdmreg", NO_TEACHER, f"{name} rdmreg {weight} 0.05"),
            row("masked+vicreg", NO_TEACHER, f"{name} vicreg {weight} 2e-4"),
            row("masked+visreg", NO_TEACHER, f"{name} visreg {weight} 0.01"),
            row("masked+neither", NO_TEACHER, f"{name} none {weight} 0"),
            row("masked+sigreg+gradient", NO_TEACHER, f"{name} sigreg {weight} 0.02 {GRADIENT_TO_TARGETS}"),
            row("masked+ema+vicreg", IJEPA),
            row("views+ema", "byol_fashion_mnist", "--method.ema.schedule linear"),
            row("views+sigreg", "lejepa_fashion_mnist"),
            row("views+rdmreg", "rectified_lpjepa_fashion_mnist"),
            row("views+vicreg", "vicreg_fashion_mnist"),
            row("views+visreg", "visreg_fashion_mnist"),
        ),
    )


@sweep
def ablations_fashion_mnist() -> Sweep:
    """Ablations of I-JEPA: EMA schedules, losses, placement of norms, clipping, layers."""
    return Sweep(
        name="ablations_fashion_mnist",
        about="two passes over 54,000 images; the other rows each change the first in what their names say",
        shared=SHARED,
        rows=(
            row("as_it_is", IJEPA),
            row("momentum_0.99_constant", IJEPA, "--method.ema.schedule constant"),
            row("momentum_0.99_cosine", IJEPA, "--method.ema.schedule cosine"),
            row("momentum_0.996", IJEPA, "--method.ema.start 0.996"),
            row("momentum_0.999_constant", IJEPA, "--method.ema.start 0.999 --method.ema.schedule constant"),
            row("l2", IJEPA, "--method.loss l2"),
            row("target_norm_none", IJEPA, "--method.target-norm none"),
            row("prediction_norm_affine", IJEPA, "--method.prediction-norm affine"),
            row("prediction_norm_no_affine", IJEPA, "--method.prediction-norm no_affine"),
            row("clip_1", IJEPA, "--optim.grad-clip-norm 1.0"),
            row("clip_0.1", IJEPA, "--optim.grad-clip-norm 0.1"),
            row("all_layers", DENSE, "--method.target-layer-weights 1 1 1 --method.context-loss-weight 0"),
            row("context_loss", DENSE, "--method.target-layers 3 --method.target-layer-weights 1"),
            row("adamw", IJEPA, "--optim.name adamw"),
            row("no_regularizer", IJEPA, "--method.regularizer.name none"),
        ),
    )
