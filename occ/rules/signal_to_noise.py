"""The direction of the largest signal to noise, with a prior."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from occ.rules.base import Rule, cosines, nonzero, norms, present, register, rounding


class SignalState(NamedTuple):
    """What the rule remembers.

    Attributes:
      coefficients: float [K], the last ones.
      count: float [], measurements that told something.
    """

    coefficients: jax.Array
    count: jax.Array  # type: ignore[assignment]


@register("signal_to_noise")
def signal_to_noise(
    prior: float = 0.2,
    prior_weight: float = 20.0,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    largest_change: float = 0.02,
) -> Rule:
    """Weights along w = V^-1 c, where a step of free length gains most; w_0 = 1.

        measured   lambda_k = w_k / w_0
        used       (n lambda_k + n_0 prior) / (n + n_0), within bounds, and at most
                   `largest_change` from the last one

    V [K+1, K+1] is the Gram matrix of one minibatch and c [K+1] the inner products of expected
    gradients, both with the main gradient's own, unlike those of `optimal` (`occ.theory.worth`
    derives it). Without noise lambda is 0, and so it is where the auxiliary
    gradient shares all its noise with the main one. Early on little is known, and early steps are
    where there is something to gain: hence the prior, which counts as n_0 measurements. A
    measurement in which the main gradient shows no signal (c_0 <= 0, w_0 <= 0) counts nothing.

    Args:
      prior: coefficient to begin with.
      prior_weight: n_0, measurements; >= 0.
      bounds: smallest and largest coefficient.
      largest_change: of a coefficient from one measurement to the next; > 0.

    Raises:
      ValueError: arguments outside these ranges.
    """
    if not (prior_weight >= 0 and largest_change > 0 and bounds[0] <= prior <= bounds[1]):
        raise ValueError(
            "signal_to_noise: expected prior_weight >= 0, largest_change > 0 and the prior within "
            f"bounds, got {prior_weight}, {largest_change}, {prior} and {bounds}."
        )

    def init(num_auxiliary):
        zeros = jnp.zeros((num_auxiliary,))
        return SignalState(jnp.full_like(zeros, prior), jnp.zeros(()))

    def update(measurement, state, key):
        del key
        found, defined = _measured(measurement)
        count = state.count + defined.astype(state.count.dtype)
        share = count / nonzero(count + prior_weight)
        target = share * found.astype(share.dtype) + (1 - share) * prior
        change = jnp.clip(
            jnp.clip(target, *bounds) - state.coefficients, -largest_change, largest_change
        )
        moved = jnp.where(defined, state.coefficients + change, state.coefficients)
        here = present(measurement.gram)[1:]
        weights = jnp.concatenate([jnp.ones((1,), moved.dtype), jnp.where(here, moved, 0)])
        return weights.astype(measurement.gram.dtype), SignalState(moved, count)

    return Rule("signal_to_noise", init, update, takes_signal=True)


def _measured(measurement):
    """lambda [K], and whether it is defined."""
    gram, c = measurement.gram, measurement.signal
    V = gram.at[0, 1:].set(measurement.sampled_correlation)
    V = V.at[1:, 0].set(measurement.sampled_correlation)
    # An auxiliary gradient of zero has a row of zeros: its weight is 0.
    scale = nonzero(norms(V))
    ridge = rounding(V.dtype) * jnp.eye(V.shape[0], dtype=V.dtype)
    w = jnp.linalg.solve(cosines(V) + ridge, jnp.where(present(V), c / scale, 0)) / scale
    defined = (c[0] > 0) & (w[0] > 0) & jnp.all(jnp.isfinite(w))
    return jnp.where(defined, w[1:] / jnp.where(defined, w[0], 1), 0), defined
