"""Multinomial logistic regression to convergence: the limit of a linear probe's training.

    minimize  mean_i -log softmax(W z_i + b)[y_i]  +  l2 / 2 ||W||^2      over W and b

with z the features standardized by the training split's mean and standard deviation. scikit-learn's C is 1 / (n l2).

The solver is SciPy's L-BFGS-B. Added to it: the loss and its gradient are computed on the device, and the parameters
are preconditioned, which saves nine of ten iterations on correlated features. `optax.lbfgs` in the same coordinates
takes as many iterations, but compiles a large program for every size of the problem, which takes longer than the fit.
"""

from collections.abc import Iterator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

from jepax.evals.features import map_chunks
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


class FeatureScaler(eqx.Module):
    """Mean and standard deviation that standardize features."""

    mean: Float[Array, "layers dim"]
    std: Float[Array, "layers dim"]
    """1 if the feature is constant."""


class FittedLogistic(eqx.Module):
    """A fitted classifier. Called on features, it returns logits: -inf for classes that had no example."""

    weight: Float[np.ndarray, "inputs classes"]
    """Applies to standardized features, the layers concatenated."""
    bias: Float[np.ndarray, "classes"]
    scaler: FeatureScaler
    converged: bool
    iterations: int

    def __call__(self, features: Float[np.ndarray, "layers n dim"]) -> Float[np.ndarray, "n classes"]:
        return map_chunks(partial(_logits, self.scaler, self.weight, self.bias), features)


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
    features: Float[AnyArray, "layers n dim"],
    labels: Int[AnyArray, "n"],
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


def fit_scaler(features: Float[AnyArray, "layers n dim"]) -> FeatureScaler:
    """Mean and standard deviation of every feature."""
    count = features.shape[1]
    return _statistics(features, np.full(count, 1 / count, np.float32))


def make_problem(
    features: Float[AnyArray, "layers n dim"], labels: Int[AnyArray, "n"], classes: int, scaler: FeatureScaler | None
) -> tuple[LogisticProblem, FeatureScaler, Float[np.ndarray, "inputs inputs"]]:
    """Pads the features and standardizes them on the device. Returns the problem, the scaler and mean z z^T."""
    labels, count = np.asarray(labels), len(labels)
    smallest, largest = PADDED_SIZES
    padding = max(smallest, 1 << (count - 1).bit_length()) - count if count <= largest else 0
    if padding:
        features = np.pad(features, ((0, 0), (0, padding), (0, 0)))
        labels = np.pad(labels, (0, padding), mode="edge")
    features, labels = jnp.asarray(features), jnp.asarray(labels)
    weight = jnp.asarray(np.where(np.arange(count + padding) < count, 1 / count, 0).astype(np.float32))
    scaler = _statistics(features, weight) if scaler is None else scaler
    absent = jnp.where(jnp.bincount(labels, length=classes) > 0, 0.0, -jnp.inf)
    z, gram = _standardize(features, scaler, weight)
    return LogisticProblem(z, labels, weight, absent), scaler, np.asarray(gram, np.float64) / count


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


@jax.jit
def _statistics(features: Float[AnyArray, "layers rows dim"], weight: Float[AnyArray, "rows"]) -> FeatureScaler:
    """Measured relative to the first example, so that a constant feature has a std of exactly 0, replaced by 1."""
    weight, first = weight[:, None], features[:, :1]
    mean = first + jnp.sum(weight * (features - first), axis=1, keepdims=True)
    std = jnp.sqrt(jnp.sum(weight * (features - mean) ** 2, axis=1))
    return FeatureScaler(mean[:, 0], jnp.where(std > 0, std, 1))


@jax.jit
def _standardize(
    features: Float[AnyArray, "layers rows dim"], scaler: FeatureScaler, weight: Float[AnyArray, "rows"]
) -> tuple[Float[Array, "rows inputs"], Float[Array, "inputs inputs"]]:
    """z, and z^T z."""
    scaled = [(x - mean) / std for x, mean, std in zip(features, scaler.mean, scaler.std, strict=True)]
    z = jnp.concatenate([*scaled, jnp.ones((len(weight), 1))], axis=1) * (weight > 0)[:, None]
    return z, jnp.dot(z.T, z, precision=lax.Precision.HIGHEST)


@jax.jit
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


@jax.jit
def _logits(
    scaler: FeatureScaler,
    weight: Float[AnyArray, "inputs classes"],
    bias: Float[AnyArray, "classes"],
    features: Float[AnyArray, "layers n dim"],
) -> Float[Array, "n classes"]:
    z = (features - scaler.mean[:, None]) / scaler.std[:, None]
    parts = weight.reshape(len(z), -1, len(bias))
    return jnp.einsum("lnd,ldc->nc", z, parts, precision=lax.Precision.HIGHEST) + bias
