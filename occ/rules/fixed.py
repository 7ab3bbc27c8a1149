"""Rules that look at nothing."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from occ.measures import Measurement
from occ.rules.base import Rule, auxiliary_rule, register


@register("fixed")
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

    rule = auxiliary_rule("fixed", auxiliary_weights, takes_ratio=True)
    return rule._replace(data_dependent=False)


def _broadcast(coefficients, measurement: Measurement) -> jax.Array:
    num_auxiliary = measurement.gram.shape[-1] - 1
    dtype = measurement.gram.dtype
    values = jnp.atleast_1d(jnp.asarray(coefficients, dtype))
    if values.shape not in ((1,), (num_auxiliary,)):
        raise ValueError(
            f"fixed: expected 1 or K={num_auxiliary} coefficients, got shape {values.shape}."
        )
    return jnp.broadcast_to(values, (num_auxiliary,))


@register("replay")
def replay(series: Sequence[float] | jax.Array) -> Rule:
    """A given coefficient for every update, in order; the last one from then on.

    With the coefficients of another run in random order it is the control for a calibration: the
    same values, without their timing.

    Args:
      series: float [N], N >= 1, the same for all K heads.

    Raises:
      ValueError: an empty series, or one of another shape.

    >>> gram = jnp.eye(2)
    >>> rule = replay([0.5, -0.25])
    >>> first, state = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> second, _ = rule.update(Measurement(gram), state, jax.random.key(0))
    >>> first.tolist(), second.tolist()
    ([1.0, 0.5], [1.0, -0.25])
    """
    values = series if isinstance(series, jax.Array) else np.asarray(series, np.float64)
    if values.ndim != 1 or not values.shape[0]:
        raise ValueError(f"replay: expected a series [N >= 1], got shape {values.shape}.")

    def init(num_auxiliary):
        del num_auxiliary
        return jnp.zeros((), jnp.int32)

    def update(measurement, step, key):
        del key
        dtype = measurement.gram.dtype
        value = jnp.asarray(values, dtype)[jnp.minimum(step, values.shape[0] - 1)]
        weights = jnp.full(measurement.gram.shape[-1], value, dtype).at[0].set(1)
        return weights, step + 1

    return Rule("replay", init, update, takes_ratio=True, data_dependent=False)


@register("detach")
def detach() -> Rule:
    """No auxiliary gradient on the shared parameters: all w_k = 0.

    What most systems do in RL. The auxiliary modules' own parameters still get their gradient.
    """
    rule = fixed(0.0)
    return rule._replace(name="detach")
