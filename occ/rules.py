"""Rules: Gram matrix -> weights (w_0, w_1, .., w_K) of the combined gradient.

The combined gradient is w_0 g + sum_k w_k m_k. A rule sees the Gram matrix alone (or, for measures
that yield it directly, the ratio c_k / v_k^2), so a new rule is one small function of a matrix of
shape [K+1, K+1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.measures import Measurement

RuleState = Any


class Rule(NamedTuple):
    """A function from the Gram matrix to weights, with state.

    Attributes:
      name: for messages and logs.
      init: `(num_auxiliary) -> state`.
      update: `(measurement, state, key) -> (weights [K+1], state)`; `key` is a PRNG key that is
        new at every step, for rules that draw.
      takes_ratio: it can also work from `measurement.ratio`, without a Gram matrix.
    """

    name: str
    init: Callable[[int], RuleState]
    update: Callable[[Measurement, RuleState, jax.Array], tuple[jax.Array, RuleState]]
    takes_ratio: bool = False


def _stateless_rule(name: str, auxiliary_weights: Callable, *, takes_ratio: bool = False) -> Rule:
    """A rule with w_0 = 1 whose auxiliary weights are a function of the measurement alone."""

    def init(num_auxiliary):
        del num_auxiliary
        return ()

    def update(measurement, state, key):
        del key
        weights = auxiliary_weights(measurement)
        return jnp.concatenate([jnp.ones((1,), weights.dtype), weights]), state

    return Rule(name, init, update, takes_ratio)


def optimal(
    scale: float | jax.Array = 1.0,
    *,
    eps: float = 1e-8,
    relative_ridge: float = 1e-4,
    bounds: tuple[float, float] | None = None,
) -> Rule:
    """Optimal coefficient calibration: the weights that maximise the guaranteed improvement.

        K = 1:  w_1 = scale * c / (v^2 + eps)
        K > 1:  (V + r I) w = scale * c,   V = [<m_j, m_k>],   r = relative_ridge * tr(V) / K

    For K > 1 the heads are solved jointly, because their gradients overlap: independent
    coefficients would count what they share several times. The ridge is relative to the mean
    perturbation, since nearly collinear heads otherwise get large weights of opposite sign.
    An auxiliary gradient of zero gets weight 0.

    A weight below zero is legal: it moves against an auxiliary gradient that opposes the main one.

    Args:
      scale: lambda_+ of the paper; the smoothness constants (1 - L eta) / (L eta) go into it. A
        traced array is legal.
      eps: added to v^2 for K = 1 (absolute, as in the paper); >= 0.
      relative_ridge: for K > 1; >= 0.
      bounds: None, or (low, high) to which each w_k is clipped, e.g. (0.0, inf) for OCC that never
        goes against an auxiliary gradient.

    Raises:
      ValueError: negative eps or ridge, or bounds out of order.

    Differs from the paper in the joint solution for K > 1 heads; its release measures the first
    head and uses its coefficient for all.

    Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
    Optimal Coefficient Calibration, arXiv 2605.28184.

    >>> gram = jnp.array([[1.0, 0.5], [0.5, 2.0]])
    >>> rule = optimal(scale=1.0)
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 6) for w in weights]
    [1.0, 0.25]
    """
    if eps < 0 or relative_ridge < 0:
        raise ValueError(
            f"optimal: eps and relative_ridge must be >= 0, got {eps} and {relative_ridge}."
        )
    if bounds is not None and not bounds[0] <= bounds[1]:
        raise ValueError(f"optimal: bounds must be (low, high) with low <= high, got {bounds}.")

    def auxiliary_weights(measurement):
        if measurement.ratio is not None:
            ratio = measurement.ratio
        else:
            ratio = _solve(measurement.gram, eps, relative_ridge)
        weights = jnp.asarray(scale, ratio.dtype) * ratio
        return weights if bounds is None else jnp.clip(weights, *bounds)

    return _stateless_rule("optimal", auxiliary_weights, takes_ratio=True)


def _solve(gram: jax.Array, eps: float, relative_ridge: float) -> jax.Array:
    """V^-1 c, with the ridge; 0 where there is nothing to divide by."""
    correlation, perturbations = gram[0, 1:], gram[1:, 1:]
    num_auxiliary = correlation.shape[0]
    if num_auxiliary == 1:
        denominator = perturbations[0] + eps
        return jnp.where(denominator > 0, correlation / _nonzero(denominator), 0)
    trace = jnp.trace(perturbations)
    # A head whose gradient is zero leaves an empty row; a one on its diagonal gives it weight 0.
    empty = jnp.diagonal(perturbations) <= 0
    ridge = relative_ridge * trace / num_auxiliary
    diagonal = jnp.where(empty, 1, ridge)
    solution = jnp.linalg.solve(perturbations + jnp.diag(diagonal), correlation)
    return jnp.where(empty, 0, solution)


def _nonzero(denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator > 0, denominator, 1)


def fixed(coefficients: float | Sequence[float] | jax.Array) -> Rule:
    """A fixed coefficient for each auxiliary gradient, whatever is measured.

    Args:
      coefficients: one number for all K heads, or K numbers. A traced array is legal.

    Raises:
      ValueError: the number of coefficients is neither 1 nor K (found when the rule is used).

    Reference: the MTP loss weight of DeepSeek-V3 (arXiv 2412.19437, equation 25), there for
    pre-training.
    """

    def auxiliary_weights(measurement):
        return _broadcast(coefficients, measurement)

    return _stateless_rule("fixed", auxiliary_weights, takes_ratio=True)


def _broadcast(coefficients, measurement: Measurement) -> jax.Array:
    num_auxiliary = measurement.gram.shape[-1] - 1
    dtype = measurement.gram.dtype
    values = jnp.atleast_1d(jnp.asarray(coefficients, dtype))
    if values.shape not in ((1,), (num_auxiliary,)):
        raise ValueError(
            f"fixed: expected 1 or K={num_auxiliary} coefficients, got shape {values.shape}."
        )
    return jnp.broadcast_to(values, (num_auxiliary,))


def detach() -> Rule:
    """No auxiliary gradient on the shared parameters: all w_k = 0.

    What most systems do in RL. The auxiliary modules' own parameters still get their gradient.
    """
    rule = fixed(0.0)
    return rule._replace(name="detach")


NONNEGATIVE = (0.0, math.inf)
"""Bounds for `optimal` that forbid steps against an auxiliary gradient."""
