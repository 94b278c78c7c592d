"""Multinomial logistic regression of frozen features, to convergence: what a linear probe would reach at the end.

    minimise  mean_i -log softmax(W z_i + b)[y_i]  +  strength / 2 ||W||^2      over W and b

with z the features standardised by the training split's mean and deviation. scikit-learn's C is 1 / (n strength).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

from jepax.evals.eval_dataset import EvalDataset
from jepax.evals.progress import SILENT_PROGRESS, ProgressReporter
from jepax.evals.scoring import FittedProbe, TopKPredictions, check_labels, top1_accuracy, topk_classes
from jepax.types import AnyArray, Array, Float, Int, PRNGKeyArray, UserError

LayerChoice = Literal["last", "last four"]
GRADIENT_TOLERANCE = 2e-5
"""Of the largest slope in the descent's own coordinates, where the curvature is about 1: the objective is then within
about 1e-8 of its least value. Smaller ones are lost in the rounding of float32."""
CONVERGENCE_SLACK = 10
"""A descent that float32 stopped early has converged too if its slope is within so many tolerances."""
MAX_ITERATIONS = 1000
LBFGS_MEMORY = 20
"""Steps that L-BFGS remembers."""
MAX_LINE_SEARCH_STEPS = 10
"""Evaluations of one line search; more are spent only where float32 shows no descent any longer."""
MIN_CURVATURE = 1e-6
"""Of the curvature by which the descent's coordinates are scaled."""
GRAM_RIDGE = 1e-5
"""Added to the features' variances of 1 before they are inverted; it moves no optimum, only the way there."""
PADDED_SIZE_RANGE = (256, 8192)
"""Sets within are padded to a power of two, smaller ones to the first, so that few programs serve many sizes."""
BLAS_THREADS = ThreadpoolController()
MAX_SINGLE_THREAD_DIM = 1024
"""Inputs up to which the host's share of a descent runs on one thread: on a busy machine OpenBLAS's threads wait for
each other at every small product, and a fit was seen to take ten times as long."""
EXAMPLES_PER_CHUNK = 1024
"""Examples classified at once; bounds memory, changes no number."""


@dataclass(frozen=True)
class LogisticConfig:
    """Validation chooses among every strength on each choice of layers."""

    strengths: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """Weights of the L2 penalty; fitted from the strongest, each from where the last one ended."""
    layers: tuple[LayerChoice, ...] = ("last", "last four")
    """What is read: the last layer, or the last four side by side."""

    def __post_init__(self):
        check_l2_penalties(self.strengths)
        if not self.layers or set(self.layers) - set(get_args(LayerChoice)):
            raise UserError(f"layers={self.layers} must hold at least one of {get_args(LayerChoice)}, and nothing else")


def check_l2_penalties(strengths: tuple[float, ...]) -> None:
    """**Raises** `UserError` unless there is one, and all are above 0: without a penalty there may be no optimum."""
    if not strengths or not min(strengths) > 0:
        raise UserError(f"strengths={strengths} must hold at least one number, all above 0")


class FeatureScaler(eqx.Module):
    """How features are standardised."""

    mean: Float[Array, "layers dim"]
    deviation: Float[Array, "layers dim"]
    """1 where the feature is constant."""


class FittedLogistic(eqx.Module):
    """A fitted classifier. Called with features, it gives the logits, -inf for classes it had no example of."""

    weight: Float[np.ndarray, "inputs classes"]
    """On standardised features, the layers side by side."""
    bias: Float[np.ndarray, "classes"]
    standard: FeatureScaler
    converged: bool
    iterations: int

    def __call__(self, features: Float[AnyArray, "layers n dim"]) -> Float[np.ndarray, "n classes"]:
        count = features.shape[1]
        logits = np.empty((count, len(self.bias)), np.float32)
        for start in range(0, count, EXAMPLES_PER_CHUNK):
            part = features[:, start : start + EXAMPLES_PER_CHUNK]
            padded = np.pad(part, ((0, 0), (0, EXAMPLES_PER_CHUNK - part.shape[1]), (0, 0)))
            logits[start : start + EXAMPLES_PER_CHUNK] = _logits(padded, self.standard, self.weight, self.bias)[
                : part.shape[1]
            ]
        return logits


class PaddedExamples(eqx.Module):
    """Labelled features on the device."""

    z: Float[Array, "rows inputs"]
    """Standardised, the layers side by side, and a last column of ones for the bias; rows of padding are 0."""
    labels: Int[Array, "rows"]
    share: Float[Array, "rows"]
    """1 / n, or 0 for padding."""
    absent: Float[Array, "classes"]
    """Added to the logits: -inf for classes without an example, else 0."""


@dataclass(frozen=True, eq=False)
class LogisticProblem:
    """What the fits of every strength share."""

    examples: PaddedExamples
    standard: FeatureScaler
    gram: Float[np.ndarray, "inputs inputs"]
    """mean z z^T, on the host."""
    count: int
    """n, without the padding."""


def logistic(
    train: EvalDataset,
    validation: EvalDataset,
    classes: int,
    config: LogisticConfig,
    *,
    key: PRNGKeyArray,
    say: ProgressReporter = SILENT_PROGRESS,
) -> list[FittedProbe]:
    """The best strength and layers by validation top-1; of equals the first, the strongest penalty.

    `key` is not used: the problem is convex and nothing is drawn.

    **Raises** `UserError` if a split is empty or has a label out of range.
    """
    check_labels(train.labels, classes, "train")
    check_labels(validation.labels, classes, "validation")
    several = len(train.features.layers) > 1
    names = [name for name in config.layers if several or name == "last"] or ["last"]
    best, tried = None, []
    with say.counting("logistic regression", len(names) * len(config.strengths)) as done:
        for name in names:
            fits = regularization_path(select_layers(train, name), train.labels, classes, config.strengths)
            for strength, model in fits:
                reached = top1_accuracy(topk_classes(model(select_layers(validation, name))), validation.labels)
                tried.append({"layers": name, **fit_info(strength, model), "validation_top1": reached})
                if best is None or reached > best[0]["validation_top1"]:
                    best = (tried[-1], model)
                done(len(tried))
    chosen, model = best
    guess = make_predictor(model, chosen["layers"])
    return [
        FittedProbe("logistic regression", guess, chosen, f"{chosen['layers']}, strength {chosen['strength']:g}", tried)
    ]


def select_layers(split: EvalDataset, name: LayerChoice) -> Float[np.ndarray, "layers n dim"]:
    """The layers of that name, without a copy."""
    layers = split.features.layers
    return layers[-1:] if name == "last" else layers


def make_predictor(model: FittedLogistic, name: LayerChoice) -> Callable[[EvalDataset], TopKPredictions]:
    """The classes of greatest logit."""
    return lambda split: topk_classes(model(select_layers(split, name)))


def fit_info(strength: float, model: FittedLogistic) -> dict[str, float | bool | int]:
    """What `tried` tells of a fit."""
    return {"strength": strength, "converged": model.converged, "iterations": model.iterations}


def fit(
    features: Float[AnyArray, "layers n dim"],
    labels: Int[AnyArray, "n"],
    classes: int,
    strength: float,
    start: FittedLogistic | None = None,
) -> FittedLogistic:
    """The optimum for one strength, from zero or from `start`. For several strengths, `path` prepares only once."""
    return _minimize(_make_problem(features, labels, classes, None), strength, start)


def regularization_path(
    features: Float[AnyArray, "layers n dim"],
    labels: Int[AnyArray, "n"],
    classes: int,
    strengths: tuple[float, ...],
    standard: FeatureScaler | None = None,
) -> Iterator[tuple[float, FittedLogistic]]:
    """The optimum for each strength, from the strongest down, each from the one before.

    - `standard`: if not these features' own, as where they are few of many.
    """
    problem = _make_problem(features, labels, classes, standard)
    model = None
    for strength in sorted(strengths, reverse=True):
        model = _minimize(problem, strength, model)
        yield strength, model


def fit_scaler(features: Float[AnyArray, "layers n dim"]) -> FeatureScaler:
    """The mean and deviation of every feature."""
    count = features.shape[1]
    return _mean_and_std(features, np.full(count, 1 / count, np.float32))


@jax.jit
def _mean_and_std(features: Float[AnyArray, "layers rows dim"], share: Float[AnyArray, "rows"]) -> FeatureScaler:
    """Measured from the first example, so that a constant feature's deviation is 0 exactly, and replaced by 1."""
    part, first = share[:, None], features[:, :1]
    mean = first + jnp.sum(part * (features - first), axis=1, keepdims=True)
    deviation = jnp.sqrt(jnp.sum(part * (features - mean) ** 2, axis=1))
    return FeatureScaler(mean[:, 0], jnp.where(deviation > 0, deviation, 1))


def _make_problem(
    features: Float[AnyArray, "layers n dim"], labels: Int[AnyArray, "n"], classes: int, standard: FeatureScaler | None
) -> LogisticProblem:
    """Places the features on the device, padded; standardised by their own statistics if by no others."""
    labels, count = np.asarray(labels), len(labels)
    least, most = PADDED_SIZE_RANGE
    spare = max(least, 1 << (count - 1).bit_length()) - count if count <= most else 0
    if spare:
        features = np.pad(features, ((0, 0), (0, spare), (0, 0)))
        labels = np.pad(labels, (0, spare), mode="edge")
    on_device, labels = jnp.asarray(features), jnp.asarray(labels)
    share = jnp.asarray(np.where(np.arange(count + spare) < count, 1 / count, 0).astype(np.float32))
    standard = _mean_and_std(on_device, share) if standard is None else standard
    absent = jnp.where(jnp.bincount(labels, length=classes) > 0, 0.0, -jnp.inf)
    z, gram = _standardize_with_gram(on_device, standard, share)
    return LogisticProblem(
        PaddedExamples(z, labels, share, absent), standard, np.asarray(gram, np.float64) / count, count
    )


def _minimize(problem: LogisticProblem, strength: float, start: FittedLogistic | None) -> FittedLogistic:
    """L-BFGS in coordinates u of even curvature, (W, b) = back u, with sums in float64 on the host.

    `back` is the inverse root of curvature * gram + strength: the Hessian, were every example's p (1 - p) the mean at
    the start. On correlated features it saves nine iterations of ten. The optimum is where it was.
    """
    examples, gram = problem.examples, problem.gram
    absent = np.asarray(examples.absent)
    shape = (len(gram), len(absent))
    penalty = np.full((shape[0], 1), strength)
    penalty[-1] = 0  # the bias
    theta = np.zeros(shape)
    if start is not None:
        theta[:-1], theta[-1] = start.weight, np.where(np.isfinite(start.bias), start.bias, 0)

    def entropies(theta):
        losses, slope = jax.device_get(_cross_entropy(theta.astype(np.float32), examples))
        return losses[: problem.count].astype(np.float64), slope.astype(np.float64)

    def objective(u):
        theta = back @ u.reshape(shape)
        losses, slope = entropies(theta)
        value = losses.mean() + 0.5 * np.sum(penalty * theta**2)
        return value, (back.T @ (slope + penalty * theta)).ravel()

    doubt = np.mean(1 - np.exp(-entropies(theta)[0]))  # what the right class's probability lacks
    curvature = max(2 * doubt / np.isfinite(absent).sum(), MIN_CURVATURE)
    options = {
        "maxiter": MAX_ITERATIONS,
        "maxcor": LBFGS_MEMORY,
        "maxls": MAX_LINE_SEARCH_STEPS,
        "gtol": GRADIENT_TOLERANCE,
        "ftol": 0,
    }
    with BLAS_THREADS.limit(limits=1 if shape[0] <= MAX_SINGLE_THREAD_DIM else None, user_api="blas"):
        root = cholesky(curvature * (gram + GRAM_RIDGE * np.eye(shape[0])) + np.diag(penalty[:, 0]), lower=True)
        back = solve_triangular(root, np.eye(shape[0]), lower=True).T
        end = minimize(objective, (root.T @ theta).ravel(), jac=True, method="L-BFGS-B", options=options)
    theta = (back @ end.x.reshape(shape)).astype(np.float32)
    converged = bool(np.abs(end.jac).max() <= CONVERGENCE_SLACK * GRADIENT_TOLERANCE)
    return FittedLogistic(theta[:-1], theta[-1] + absent, problem.standard, converged, int(end.nit))


@jax.jit
def _standardize_with_gram(
    features: Float[AnyArray, "layers rows dim"], standard: FeatureScaler, share: Float[AnyArray, "rows"]
) -> tuple[Float[Array, "rows inputs"], Float[Array, "inputs inputs"]]:
    """z, and z^T z."""
    scaled = [(x - m) / d for x, m, d in zip(features, standard.mean, standard.deviation, strict=True)]
    z = jnp.concatenate([*scaled, jnp.ones((len(share), 1))], axis=1) * (share > 0)[:, None]
    return z, jnp.dot(z.T, z, precision=lax.Precision.HIGHEST)


@jax.jit
def _cross_entropy(
    theta: Float[AnyArray, "inputs classes"], examples: PaddedExamples
) -> tuple[Float[Array, "rows"], Float[Array, "inputs classes"]]:
    """Every example's -log softmax(theta^T z)[y], and the slope of their mean."""

    def mean(theta):
        logits = jnp.dot(examples.z, theta, precision=lax.Precision.HIGHEST) + examples.absent
        right = jnp.take_along_axis(logits, examples.labels[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - right
        return jnp.sum(examples.share * losses), losses

    slope, losses = jax.grad(mean, has_aux=True)(theta)
    return losses, slope


@jax.jit
def _logits(
    features: Float[AnyArray, "layers n dim"],
    standard: FeatureScaler,
    weight: Float[AnyArray, "inputs classes"],
    bias: Float[AnyArray, "classes"],
) -> Float[Array, "n classes"]:
    z = (features - standard.mean[:, None]) / standard.deviation[:, None]
    parts = weight.reshape(len(z), -1, len(bias))
    return jnp.einsum("lnd,ldc->nc", z, parts, precision=lax.Precision.HIGHEST) + bias
