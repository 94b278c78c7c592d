"""The built-in sweeps, on Fashion-MNIST for CPUs."""

from jepax.sweeps.base import Sweep, Variant, sweep

SHARED_OVERRIDES = ("--train.epochs", "2", "--optim.warmup-epochs", "0.2", "--optim.peak-lr", "3e-3")
"""Two passes and one learning rate."""


def ijepa_variant(name: str, *overrides: str) -> Variant:
    """I-JEPA with the demo's encoder, predictor and masks."""
    return Variant(name, "ijepa_fashion_mnist", overrides)


def dense(name: str, *overrides: str) -> Variant:
    """`ijepa_variant` that predicts several layers or the context too."""
    return Variant(name, "ijepa_fashion_mnist_multilayer", overrides)


def no_teacher(name: str, regularizer: str, weight: str, *overrides: str) -> Variant:
    """`ijepa_variant` without a teacher: stop-gradient targets, and a regularizer on the context's embedding."""
    chosen = ("--method.regularizer.name", regularizer, "--method.regularizer.weight", weight)
    return Variant(name, "ijepa_fashion_mnist_no_teacher", (*chosen, *overrides))


def multiview_variant(name: str, recipe: str, *overrides: str) -> Variant:
    """Two views of each image, the demo's encoder, and a projector 512-64."""
    return Variant(name, recipe, overrides)


GRADIENT_TO_TARGETS = (
    *("--method.stop-gradient", "False", "--method.regularize-on", "targets"),
    *("--method.target-norm", "none", "--method.loss", "l2"),
)
"""The gradient reaches the targets too, so only the regularizer prevents collapse."""


@sweep
def family_fashion_mnist() -> Sweep:
    """{masked prediction, two views} x {EMA teacher, SIGReg, RDMReg, VICReg, VISReg}, and three more of I-JEPA.

    The regularizer weights in I-JEPA were chosen on validation; the other methods use those of their papers or public
    code. Both teachers' momentum rises linearly from 0.99 to 1.
    """
    return Sweep(
        name="family_fashion_mnist",
        about="two passes over 54,000 pictures; encoder, optimizer, learning rate, batch and probes are the same",
        shared=SHARED_OVERRIDES,
        rows=(
            ijepa_variant("masked+ema", "--method.regularizer.name", "none"),
            no_teacher("masked+sigreg", "sigreg", "5e-4"),
            no_teacher("masked+rdmreg", "rdmreg", "0.05"),
            no_teacher("masked+vicreg", "vicreg", "2e-4"),
            no_teacher("masked+visreg", "visreg", "0.01"),
            no_teacher("masked+neither", "none", "0"),
            no_teacher("masked+sigreg+gradient", "sigreg", "0.02", *GRADIENT_TO_TARGETS),
            ijepa_variant("masked+ema+vicreg"),
            multiview_variant("views+ema", "byol_fashion_mnist", "--method.ema.schedule", "linear"),
            multiview_variant("views+sigreg", "lejepa_fashion_mnist"),
            multiview_variant("views+rdmreg", "rectified_lpjepa_fashion_mnist"),
            multiview_variant("views+vicreg", "vicreg_fashion_mnist"),
            multiview_variant("views+visreg", "visreg_fashion_mnist"),
        ),
    )


@sweep
def ablations_fashion_mnist() -> Sweep:
    """Ablations of I-JEPA: EMA schedules, losses, placement of norms, clipping, layers."""
    return Sweep(
        name="ablations_fashion_mnist",
        about="two passes over 54,000 pictures; the other rows each change the first in what their names say",
        shared=SHARED_OVERRIDES,
        rows=(
            ijepa_variant("as_it_is"),
            ijepa_variant("momentum_0.99_constant", "--method.ema.schedule", "constant"),
            ijepa_variant("momentum_0.99_cosine", "--method.ema.schedule", "cosine"),
            ijepa_variant("momentum_0.996", "--method.ema.start", "0.996"),
            ijepa_variant(
                "momentum_0.999_constant", "--method.ema.start", "0.999", "--method.ema.schedule", "constant"
            ),
            ijepa_variant("l2", "--method.loss", "l2"),
            ijepa_variant("target_norm_none", "--method.target-norm", "none"),
            ijepa_variant("prediction_norm_affine", "--method.prediction-norm", "affine"),
            ijepa_variant("prediction_norm_no_affine", "--method.prediction-norm", "no_affine"),
            ijepa_variant("clip_1", "--optim.grad-clip-norm", "1.0"),
            ijepa_variant("clip_0.1", "--optim.grad-clip-norm", "0.1"),
            dense("all_layers", "--method.target-layer-weights", "1", "1", "1", "--method.context-loss-weight", "0"),
            dense("context_loss", "--method.target-layers", "3", "--method.target-layer-weights", "1"),
            ijepa_variant("adamw", "--optim.name", "adamw"),
            ijepa_variant("no_regularizer", "--method.regularizer.name", "none"),
        ),
    )
