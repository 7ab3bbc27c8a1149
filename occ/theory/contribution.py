"""What the auxiliary gradients contribute, and the coefficients that make it greatest."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.theory.model import StepModel


class Contribution(NamedTuple):
    """What a model says the auxiliary gradients add to a step.

    Attributes:
      correlation: the part linear in the coefficients.
      perturbation: the loss by the part quadratic in them, >= 0 where the model is concave.
      total: correlation - perturbation; Delta_MTP of the paper.
    """

    correlation: jax.Array
    perturbation: jax.Array
    total: jax.Array


def contribution(
    model: StepModel, coefficients: float | jax.Array, *, step_size: float | jax.Array
) -> Contribution:
    """The improvement with these coefficients minus that with none.

        correlation  = eta sum_k lambda_k (f_k + eta C_0k)
        perturbation = -(eta^2 / 2) sum_jk lambda_j lambda_k C_jk

    Args:
      model: of the step.
      coefficients: float [..., K], lambda; a scalar for K = 1. Leading axes are a sweep.
      step_size: eta.

    Returns:
      Three arrays [...].

    Raises:
      ValueError: coefficients of another number than K.
    """
    slope, curvature = _parabola(model, step_size)
    values = jnp.asarray(coefficients, slope.dtype)
    if values.ndim == 0 and slope.shape == (1,):
        values = values[None]
    if values.shape[-1:] != slope.shape:
        raise ValueError(
            f"contribution: expected coefficients of shape [..., K={slope.shape[0]}], got "
            f"{values.shape}. Several values for K = 1 still need their last axis: pass "
            "coefficients[:, None]."
        )
    linear = _einsum("...k,k->...", values, slope)
    quadratic = _einsum("...j,jk,...k->...", values, curvature, values) / 2
    return Contribution(linear, -quadratic, linear + quadratic)


def optimal_coefficients(model: StepModel, *, step_size: float | jax.Array) -> jax.Array:
    """The coefficients at which the contribution is greatest.

        K = 1:  lambda* = -(c + eta C_01) / (eta C_11)     lower bound: (1 - L eta)/(L eta) c / v^2
        K > 1:  (eta C_aux) lambda* = -(f_aux + eta C_0,aux)

    A lower bound with a zero or repeated auxiliary gradient has many maximisers; this is the one
    of least norm, to rounding, so a zero gradient gets 0.

    Where the second-order model does not bend downwards (m'Hm >= 0) it has no maximiser: it
    promises the more the further one goes, beyond where it can be trusted. Then the result for
    K = 1 is infinite, with the sign of the slope; clipped to a range [-b, b] that is the best
    coefficient of that range. For K > 1 it is NaN.

    Args:
      model: of the step.
      step_size: eta > 0.

    Returns:
      float [K].

    >>> from occ.theory import lower_bound
    >>> model = lower_bound(jnp.array([[4.0, 1.0], [1.0, 2.0]]), smoothness=1.0)
    >>> optimal_coefficients(model, step_size=0.5).tolist()
    [0.5]
    """
    return maximiser(*_parabola(model, step_size))


def optimal_contribution(model: StepModel, *, step_size: float | jax.Array) -> jax.Array:
    """The contribution of the optimal coefficients: Delta* = (1 - L eta)^2 c^2 / (2 L v^2) >= 0.

    For K auxiliary gradients of a lower bound (1 - L eta)^2 / (2 L) c'V^-1 c. Infinite where the
    model has no maximiser.
    """
    slope, curvature = _parabola(model, step_size)
    best = maximiser(slope, curvature)
    gain = jnp.where(jnp.all(jnp.isfinite(best)), jnp.sum(slope * best) / 2, jnp.inf)
    return jnp.where(_defined(slope, curvature), gain, jnp.nan)


def coefficient_scale(step_size: float | jax.Array, smoothness: float | jax.Array) -> Any:
    """lambda_+ = (1 - L eta) / (L eta): what OCC multiplies c / v^2 by, `scale` of its rule.

    It is 0 at eta = 1 / L, and negative beyond.

    >>> coefficient_scale(0.5, 1.0)
    1.0
    """
    return (1 - smoothness * step_size) / (smoothness * step_size)


def _parabola(model: StepModel, step_size: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slope [K] and curvature [K, K] of the improvement in the coefficients, at lambda = 0."""
    step_size = jnp.asarray(step_size, model.first_order.dtype)
    slope = step_size * (model.first_order[1:] + step_size * model.second_order[0, 1:])
    return slope, step_size * step_size * model.second_order[1:, 1:]


def maximiser(slope: jax.Array, curvature: jax.Array) -> jax.Array:
    """Where slope'x + x'curvature x / 2 is greatest; see `optimal_coefficients`."""
    if slope.shape == (1,):
        bend = curvature[0]
        flat = (slope == 0) & (bend == 0)
        unbounded = jnp.where(flat, 0, jnp.copysign(jnp.inf, slope))
        best = jnp.where(bend < 0, slope / jnp.where(bend < 0, -bend, 1), unbounded)
        return jnp.where(_defined(slope, curvature), best, jnp.nan)
    values, vectors = jnp.linalg.eigh(curvature)
    tolerance = slope.shape[0] * jnp.finfo(slope.dtype).eps * jnp.max(jnp.abs(values))
    bends = values < -tolerance
    along = _einsum("ki,k->i", vectors, slope)
    along = jnp.where(bends, along / jnp.where(bends, -values, 1), 0)
    return jnp.where(jnp.any(values > tolerance), jnp.nan, _einsum("ki,i->k", vectors, along))


def _defined(*arrays: jax.Array) -> jax.Array:
    return ~jnp.any(jnp.stack([jnp.any(jnp.isnan(array)) for array in arrays]))


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """In full precision: accelerators would round the operands otherwise."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
