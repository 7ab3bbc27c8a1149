"""Rules that maximise the guaranteed improvement: OCC, with and without sampling noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from occ.rules.base import Rule, auxiliary_rule, nonzero, register

NONNEGATIVE = (0.0, math.inf)
"""Bounds for `optimal` that forbid steps against an auxiliary gradient."""

PAPER_EPS = 1e-8
"""What the paper adds to v^2: an absolute number, whatever the size of the gradients."""

Bounds = tuple[float, float] | None


@register("optimal")
def optimal(
    scale: float | jax.Array = 1.0,
    *,
    eps: float = 0.0,
    relative_ridge: float = 1e-4,
    bounds: Bounds = None,
) -> Rule:
    """Optimal coefficient calibration: the weights that maximise the guaranteed improvement.

        K = 1:  w_1 = scale * c / (v^2 + eps)
        K > 1:  (V + r I) w = scale * c,   V = [<m_j, m_k>],   r = relative_ridge * tr(V) / K

    With eps = 0 the coefficient has no unit to depend on: an auxiliary loss times a constant gives
    the same step, and so does a minibatch whose gradients are a thousand times smaller. Nothing has
    to be guarded against, since |w_1| ||m|| <= scale ||g|| by the inequality of Cauchy and Schwarz,
    however short m is; below the smallest normal number v^2 has lost its digits, and the weight is
    0. The paper adds eps = 1e-8 (`PAPER_EPS`), which counts where v^2 is as small: at ||m|| = 1e-4
    half of the coefficient is missing, and in groups of leaves (`calibrate_groups`) that is soon
    the case. `occ.damping` tells how much. For one head a relative ridge would only change the
    scale, by 1 / (1 + relative_ridge), so there is none. Two cases leave that inequality, and want
    `bounds`: weights that are kept for later, longer gradients (`calibrate(every=n)`, `smoothed`),
    and leaves that were not measured (`scale_own`, measures with a selection).

    For K > 1 the heads are solved jointly, because their gradients overlap: independent
    coefficients would count what they share several times. The ridge is relative to the mean
    perturbation, since nearly collinear heads otherwise get large weights of opposite sign.
    An auxiliary gradient of zero gets weight 0.

    A weight below zero is legal: it moves against an auxiliary gradient that opposes the main one.

    Args:
      scale: lambda_+ of the paper; the smoothness constants (1 - L eta) / (L eta) go into it. A
        traced array is legal.
      eps: added to v^2 for K = 1, an absolute number; >= 0. The paper has 1e-8.
      relative_ridge: for K > 1; >= 0.
      bounds: None, or (low, high) to which each w_k is clipped, e.g. (0.0, inf) for OCC that never
        goes against an auxiliary gradient.

    Raises:
      ValueError: negative eps or ridge, or bounds out of order.

    Differs from the paper in its eps, and in the joint solution for K > 1 heads; its release
    measures the first head and uses its coefficient for all.

    Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
    Optimal Coefficient Calibration, arXiv 2605.28184.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[1.0, 0.5], [0.5, 2.0]])
    >>> rule = optimal(scale=1.0)
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 6) for w in weights]
    [1.0, 0.25]
    """
    _check("optimal", eps, relative_ridge, bounds)

    def auxiliary_weights(measurement):
        if measurement.ratio is not None:
            ratio = measurement.ratio
        else:
            gram = measurement.gram
            ratio = _solve(gram[1:, 1:], gram[0, 1:], eps, relative_ridge)
        weights = jnp.asarray(scale, ratio.dtype) * ratio
        return weights if bounds is None else jnp.clip(weights, *bounds)

    return auxiliary_rule("optimal", auxiliary_weights, takes_ratio=True)


@register("noisy_optimal")
def noisy_optimal(
    step_smoothness: float | jax.Array,
    *,
    eps: float = 0.0,
    relative_ridge: float = 1e-4,
    bounds: Bounds = None,
) -> Rule:
    """The coefficient of a step that takes sampled gradients, while the objective sees true ones.

        K = 1:  w_1 = (c - s c_same) / (s (v^2 + eps)),        s = step_smoothness = L eta
        K > 1:  (V + r I) w = (c - s c_same) / s,              r as in `optimal`

    The gain of first order is an inner product with the *true* main gradient, so c should come from
    samples that the auxiliary gradients have not seen. What second order takes away belongs to the
    step as it is made, g + w m with all its noise: c_same = <g, m> and v^2 = ||m||^2 of the sampled
    gradients. `measures.cross_fitted` yields both, as does `measures.preconditioned` in its
    Euclidean norm, for a reason of its own; they are read from `Measurement.gram` and
    `Measurement.sampled_correlation`. A measure without the latter has c_same = c, and the rule is
    `optimal(scale=(1 - s) / s)`.

    Sampling noise that both gradients share makes c_same exceed c. Then the coefficient is smaller
    than `optimal` says, and falls below zero where s c_same > c.

    Args:
      step_smoothness: L eta, smoothness times learning rate, in (0, 1): at 1 the main step alone
        is as long as the bound allows. A traced array is legal, and not checked.
      eps: added to v^2 for K = 1, as in `optimal`; >= 0.
      relative_ridge: for K > 1; >= 0.
      bounds: as in `optimal`.

    Raises:
      ValueError: step_smoothness outside (0, 1), negative eps or ridge, or bounds out of order.

    Reference: the decomposition of arXiv 2605.28184, in expectation over the minibatch.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[1.0, 0.5], [0.5, 2.0]])
    >>> rule = noisy_optimal(0.5)
    >>> measurement = Measurement(gram, sampled_correlation=jnp.array([0.75]))
    >>> weights, _ = rule.update(measurement, rule.init(1), jax.random.key(0))
    >>> [round(float(w), 6) for w in weights]
    [1.0, 0.125]
    """
    _check("noisy_optimal", eps, relative_ridge, bounds)
    if isinstance(step_smoothness, int | float) and not 0 < step_smoothness < 1:
        raise ValueError(
            f"noisy_optimal: step_smoothness must be in (0, 1), got {step_smoothness}. It is the "
            "smoothness constant times the learning rate; at 1 there is no room for an auxiliary."
        )

    def auxiliary_weights(measurement):
        gram = measurement.gram
        correlation = gram[0, 1:]
        same = measurement.sampled_correlation
        same = correlation if same is None else same.astype(gram.dtype)
        smoothness = jnp.asarray(step_smoothness, gram.dtype)
        numerator = (correlation - smoothness * same) / smoothness
        weights = _solve(gram[1:, 1:], numerator, eps, relative_ridge)
        return weights if bounds is None else jnp.clip(weights, *bounds)

    return auxiliary_rule("noisy_optimal", auxiliary_weights)


def _check(name: str, eps: float, relative_ridge: float, bounds: Bounds) -> None:
    if eps < 0 or relative_ridge < 0:
        raise ValueError(
            f"{name}: eps and relative_ridge must be >= 0, got {eps} and {relative_ridge}."
        )
    if bounds is not None and not bounds[0] <= bounds[1]:
        raise ValueError(f"{name}: bounds must be (low, high) with low <= high, got {bounds}.")


def _solve(
    perturbations: jax.Array, correlation: jax.Array, eps: float, relative_ridge: float
) -> jax.Array:
    """V^-1 c, with the ridge; 0 where there is nothing to divide by."""
    num_auxiliary = correlation.shape[0]
    if num_auxiliary == 1:
        denominator = perturbations[0] + eps
        smallest = jnp.finfo(denominator.dtype).tiny
        return jnp.where(denominator >= smallest, correlation / nonzero(denominator), 0)
    trace = jnp.trace(perturbations)
    # A head whose gradient is zero leaves an empty row; a one on its diagonal gives it weight 0.
    empty = jnp.diagonal(perturbations) <= 0
    ridge = relative_ridge * trace / num_auxiliary
    diagonal = jnp.where(empty, 1, ridge)
    solution = jnp.linalg.solve(perturbations + jnp.diag(diagonal), correlation)
    return jnp.where(empty, 0, solution)
