"""Moving averages of what another measure measures."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.measures.base import Measure, Measurement


class SmoothedState(NamedTuple):
    """Moving averages, before the correction of their start at zero.

    Attributes:
      inner: state of the measure that is smoothed.
      gram: float [K+1, K+1].
      sampled_correlation: float [K]; stays 0 where the measure has none.
      weight: float [], sum of the weights in the averages: 1 - decay^n after n updates.
    """

    inner: Any
    gram: jax.Array
    sampled_correlation: jax.Array
    weight: jax.Array


def smoothed(inner: Measure, decay: float = 0.9) -> Measure:
    """Exponential moving averages of c and V: a ratio of averages, and no average of ratios.

        G_t = decay G_{t-1} + (1 - decay) gram_t,      measured: G_t / (1 - decay^t)

    Gradient noise swamps the c of a single minibatch, while the expected c changes slowly; 1 / (1 -
    decay) is how many updates the average remembers. Together with `calibrate(every=n)` it
    remembers n times as many steps.

    Args:
      inner: a measure that yields a Gram matrix.
      decay: in [0, 1).

    Raises:
      ValueError: decay outside [0, 1), or a measure that yields a ratio alone or averages already.

    Reference: the bias correction of Kingma and Ba, Adam, arXiv 1412.6980.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"smoothed: decay must be in [0, 1), got {decay}.")
    if inner.yields_signal:
        raise ValueError(
            f"smoothed: measure {inner.name!r} averages over updates by itself; set its own "
            "`decay` and `smoothing`."
        )
    if inner.yields_ratio:
        raise ValueError(
            f"smoothed: measure {inner.name!r} yields c / v^2 alone, and an average of ratios is "
            "another estimator than a ratio of averages. Smooth one that has c and v^2."
        )

    def init(num_auxiliary, leaves):
        size = num_auxiliary + 1
        return SmoothedState(
            inner=inner.init(num_auxiliary, leaves),
            gram=jnp.zeros((size, size)),
            sampled_correlation=jnp.zeros((num_auxiliary,)),
            weight=jnp.zeros(()),
        )

    def update(statistics, state, axis_name):
        measured, inner_state = inner.update(statistics, state.inner, axis_name)

        def average(old, new):
            return decay * old + (1 - decay) * new.astype(old.dtype)

        same = measured.sampled_correlation
        new = SmoothedState(
            inner=inner_state,
            gram=average(state.gram, measured.gram),
            sampled_correlation=(
                state.sampled_correlation
                if same is None
                else average(state.sampled_correlation, same)
            ),
            weight=decay * state.weight + (1 - decay),
        )
        corrected = None if same is None else new.sampled_correlation / new.weight
        return Measurement(new.gram / new.weight, None, corrected), new

    return inner._replace(name=f"smoothed({inner.name})", init=init, update=update)
