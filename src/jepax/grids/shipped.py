"""The grids that come with the library, on Fashion-MNIST for CPUs."""

from jepax.grids.base import Grid, Row, grid

SHARED = ("--train.epochs", "2", "--optim.warmup-epochs", "0.2", "--optim.peak-lr", "3e-3")
"""Two passes and one learning rate."""


def masked(name: str, *overrides: str) -> Row:
    """I-JEPA with the demo's encoder, predictor and masks."""
    return Row(name, "ijepa_fashion_mnist", overrides)


def dense(name: str, *overrides: str) -> Row:
    """The same, predicting several layers or the context too."""
    return Row(name, "ijepa_fashion_mnist_multilayer", overrides)


def no_teacher(name: str, regularizer: str, weight: str, *overrides: str) -> Row:
    """The same, the encoder embedding its own targets, gradient stopped; a regularizer of the context's embedding."""
    chosen = ("--method.regulariser.kind", regularizer, "--method.regulariser.weight", weight)
    return Row(name, "ijepa_fashion_mnist_no_teacher", (*chosen, *overrides))


def viewed(name: str, recipe: str, *overrides: str) -> Row:
    """Two views of each image, the same encoder, projector 512-64."""
    return Row(name, recipe, overrides)


WITH_GRADIENT = (
    *("--method.stop-gradient", "False", "--method.regularize-on", "targets"),
    *("--method.target-norm", "none", "--method.loss", "l2"),
)
"""The gradient flows into the targets too, so that only the regularizer prevents collapse."""


@grid
def family_fashion_mnist() -> Grid:
    """{masked prediction, two views} x {EMA teacher, SIGReg, RDMReg, VICReg, VISReg}, and three more of I-JEPA.

    The weights of the regularisers in I-JEPA were chosen on validation, the other methods' are those of their papers or
    public code. Both teachers' momentum goes from 0.99 to 1 in a line.
    """
    return Grid(
        name="family_fashion_mnist",
        about="two passes over 54,000 pictures; encoder, optimiser, learning rate, batch and probes are the same",
        shared=SHARED,
        rows=(
            masked("masked+ema", "--method.regulariser.kind", "none"),
            no_teacher("masked+sigreg", "sigreg", "5e-4"),
            no_teacher("masked+rdmreg", "rdmreg", "0.05"),
            no_teacher("masked+vicreg", "vicreg", "2e-4"),
            no_teacher("masked+visreg", "visreg", "0.01"),
            no_teacher("masked+neither", "none", "0"),
            no_teacher("masked+sigreg+gradient", "sigreg", "0.02", *WITH_GRADIENT),
            masked("masked+ema+vicreg"),
            viewed("views+ema", "byol_fashion_mnist", "--method.momentum.shape", "linear"),
            viewed("views+sigreg", "lejepa_fashion_mnist"),
            viewed("views+rdmreg", "rectified_lpjepa_fashion_mnist"),
            viewed("views+vicreg", "vicreg_fashion_mnist"),
            viewed("views+visreg", "visreg_fashion_mnist"),
        ),
    )


@grid
def ablations_fashion_mnist() -> Grid:
    """Open questions about I-JEPA: EMA schedules, losses, placement of norms, clipping, layers."""
    return Grid(
        name="ablations_fashion_mnist",
        about="two passes over 54,000 pictures; the other rows each change the first in what their names say",
        shared=SHARED,
        rows=(
            masked("as_it_is"),
            masked("momentum_0.99_constant", "--method.momentum.shape", "constant"),
            masked("momentum_0.99_cosine", "--method.momentum.shape", "cosine"),
            masked("momentum_0.996", "--method.momentum.start", "0.996"),
            masked(
                "momentum_0.999_constant", "--method.momentum.start", "0.999", "--method.momentum.shape", "constant"
            ),
            masked("l2", "--method.loss", "l2"),
            masked("target_norm_none", "--method.target-norm", "none"),
            masked("prediction_norm_trainable", "--method.prediction-norm", "trainable"),
            masked("prediction_norm_plain", "--method.prediction-norm", "plain"),
            masked("clip_1", "--optim.clip", "1.0"),
            masked("clip_0.1", "--optim.clip", "0.1"),
            dense("all_layers", "--method.layer-weights", "1", "1", "1", "--method.context-weight", "0"),
            dense("context_loss", "--method.layers", "3", "--method.layer-weights", "1"),
            masked("adamw", "--optim.matrices", "adamw"),
            masked("no_regulariser", "--method.regulariser.kind", "none"),
        ),
    )
