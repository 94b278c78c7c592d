"""Multinomial logistic regression to convergence: the limit of a linear probe's training.

    minimize  mean_i -log softmax(W z_i + b)[y_i]  +  l2 / 2 ||W||^2      over W and b

with z the features standardized by the training split's mean and standard deviation. scikit-learn's C is 1 / (n l2).

The solver is SciPy's L-BFGS-B. Added to it: the loss and its gradient are computed on the device, by the only program,
and the parameters are preconditioned, which saves nine of ten iterations on correlated features. `optax.lbfgs` in the
same coordinates takes as many iterations, but its large program takes longer to compile than the fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

from jepax.evals.features import Labels, SplitLayers
from jepax.evals.programs import eval_jit
from jepax.types import AnyArray, Array, Float, Int

TOLERANCE = 2e-5
"""Largest gradient at convergence, in preconditioned coordinates, where the curvature is about 1: the objective is then
within about 1e-8 of its minimum. Smaller gradients are below the rounding error of float32."""
SLACK = 10
"""A fit that the line search stopped early counts as converged if its gradient is within so many tolerances."""
LBFGS_OPTIONS = {"maxiter": 1000, "maxcor": 20, "maxls": 10, "gtol": TOLERANCE, "ftol": 0}
"""A line search needs more than 10 evaluations only where float32 resolves no descent any longer."""
MIN_CURVATURE = 1e-6
RIDGE = 1e-5
"""Added to the features' variances of 1 before they are inverted; it changes the path, not the optimum."""
PADDED_SIZES = (256, 8192)
"""Sets up to the second size are padded to a power of two, at least the first: few programs serve many sizes."""
BLAS = ThreadpoolController()
SINGLE_THREAD_INPUTS = 1024
"""Up to so many inputs the host uses one thread: on a busy machine OpenBLAS's threads wait for each other at every
small product, and a fit takes up to ten times as long."""


class FeatureScaler(NamedTuple):
    """Mean and standard deviation that standardize features."""

    mean: Float[np.ndarray, "layers dim"]
    std: Float[np.ndarray, "layers dim"]
    """1 if the feature is constant."""

    def __call__(self, features: SplitLayers) -> list[Float[np.ndarray, "n dim"]]:
        """The standardized layers."""
        return [(x - mean) / std for x, mean, std in zip(features, self.mean, self.std, strict=True)]


@dataclass(frozen=True, eq=False)
class FittedLogistic:
    """A fitted classifier. Called on features, it returns logits: -inf for classes that had no example."""

    weight: Float[np.ndarray, "inputs classes"]
    """Applies to standardized features, the layers concatenated."""
    bias: Float[np.ndarray, "classes"]
    scaler: FeatureScaler
    converged: bool
    iterations: int

    def __call__(self, features: SplitLayers) -> Float[np.ndarray, "n classes"]:
        weights = np.split(self.weight, len(features))
        return sum(z @ weight for z, weight in zip(self.scaler(features), weights, strict=True)) + self.bias


class LogisticProblem(eqx.Module):
    """Labeled features on the device, and what the fits of all penalties share."""

    z: Float[Array, "rows inputs"]
    """Standardized, the layers concatenated, with a last column of ones for the bias; rows of padding are 0."""
    labels: Int[Array, "rows"]
    weight: Float[Array, "rows"]
    """1 / n, or 0 for padding."""
    absent: Float[Array, "classes"]
    """Added to the logits: -inf for classes without an example, otherwise 0."""


def regularization_path(
    features: SplitLayers,
    labels: Labels,
    classes: int,
    strengths: tuple[float, ...],
    scaler: FeatureScaler | None = None,
) -> Iterator[tuple[float, FittedLogistic]]:
    """Yields the optimum for each penalty, from the strongest down, each fitted from the one before.

    - `scaler`: standardizes the features; by default by their own statistics.
    """
    problem, scaler, gram = make_problem(features, labels, classes, scaler)
    model = None
    for strength in sorted(strengths, reverse=True):
        model = solve(problem, scaler, gram, strength, model)
        yield strength, model


def fit_scaler(features: SplitLayers) -> FeatureScaler:
    """Mean and standard deviation of every feature, computed in float64.

    Measured relative to the first example, so that a constant feature has a std of exactly 0, replaced by 1.
    """
    mean = np.array([x[0] + (x - x[0]).mean(axis=0, dtype=np.float64) for x in features])
    std = np.array([(x - x[0]).std(axis=0, dtype=np.float64) for x in features])
    return FeatureScaler(mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32))


def make_problem(
    features: SplitLayers, labels: Labels, classes: int, scaler: FeatureScaler | None
) -> tuple[LogisticProblem, FeatureScaler, Float[np.ndarray, "inputs inputs"]]:
    """Standardizes the features and pads them. Returns the problem on the device, the scaler, and mean z z^T."""
    scaler, count, (smallest, largest) = scaler or fit_scaler(features), len(labels), PADDED_SIZES
    padding = max(smallest, 1 << (count - 1).bit_length()) - count if count <= largest else 0

    z = np.zeros((count + padding, features.shape[0] * features.shape[2] + 1), np.float32)
    np.concatenate([*scaler(features), np.ones((count, 1), np.float32)], axis=1, out=z[:count])
    gram = (z.T @ z).astype(np.float64) / count

    # Padding repeats the last label: the loss of a class without examples is infinite, and 0 times that is NaN.
    labels = np.pad(labels, (0, padding), mode="edge").astype(np.int32)
    weight = np.pad(np.full(count, 1 / count, np.float32), (0, padding))
    absent = np.where(np.bincount(labels, minlength=classes) > 0, 0, -np.inf).astype(np.float32)
    return LogisticProblem(*jax.device_put((z, labels, weight, absent))), scaler, gram


def solve(
    problem: LogisticProblem,
    scaler: FeatureScaler,
    gram: Float[np.ndarray, "inputs inputs"],
    strength: float,
    start: FittedLogistic | None = None,
) -> FittedLogistic:
    """Runs L-BFGS from zero or from `start`, in coordinates u with theta = (W, b) = transform u.

    `transform` is the inverse root of curvature * gram + penalty: the Hessian, if every example's p (1 - p) were the
    mean at the start. The sum over examples is in float64 on the host.
    """
    absent, count = np.asarray(problem.absent), np.count_nonzero(problem.weight)
    shape = (len(gram), len(absent))
    penalty = np.full((shape[0], 1), strength)
    penalty[-1] = 0  # the bias
    theta = np.zeros(shape)
    if start is not None:
        theta[:-1], theta[-1] = start.weight, np.where(np.isfinite(start.bias), start.bias, 0)

    def cross_entropy(theta):
        losses, grad = jax.device_get(_cross_entropy(theta.astype(np.float32), problem))
        return losses[:count].astype(np.float64), grad.astype(np.float64)

    def objective(u):
        theta = transform @ u.reshape(shape)
        losses, grad = cross_entropy(theta)
        value = losses.mean() + 0.5 * np.sum(penalty * theta**2)
        return value, (transform.T @ (grad + penalty * theta)).ravel()

    wrong_probability = np.mean(1 - np.exp(-cross_entropy(theta)[0]))
    curvature = max(2 * wrong_probability / np.isfinite(absent).sum(), MIN_CURVATURE)
    with BLAS.limit(limits=1 if shape[0] <= SINGLE_THREAD_INPUTS else None, user_api="blas"):
        root = cholesky(curvature * (gram + RIDGE * np.eye(shape[0])) + np.diag(penalty[:, 0]), lower=True)
        transform = solve_triangular(root, np.eye(shape[0]), lower=True).T
        end = minimize(objective, (root.T @ theta).ravel(), jac=True, method="L-BFGS-B", options=LBFGS_OPTIONS)
    theta = (transform @ end.x.reshape(shape)).astype(np.float32)
    converged = bool(np.abs(end.jac).max() <= SLACK * TOLERANCE)
    return FittedLogistic(theta[:-1], theta[-1] + absent, scaler, converged, int(end.nit))


@eval_jit
def _cross_entropy(
    theta: Float[AnyArray, "inputs classes"], problem: LogisticProblem
) -> tuple[Float[Array, "rows"], Float[Array, "inputs classes"]]:
    """Every example's -log softmax(theta^T z)[y], and the gradient of their mean."""

    def mean(theta):
        logits = jnp.dot(problem.z, theta, precision=lax.Precision.HIGHEST) + problem.absent
        correct = jnp.take_along_axis(logits, problem.labels[:, None], axis=1)[:, 0]
        losses = jax.nn.logsumexp(logits, axis=1) - correct
        return jnp.sum(problem.weight * losses), losses

    grad, losses = jax.grad(mean, has_aux=True)(theta)
    return losses, grad
