"""Rules that look at nothing."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from occ.measures import Measurement
from occ.rules.base import Rule, auxiliary_rule


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

    return auxiliary_rule("fixed", auxiliary_weights, takes_ratio=True)


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
