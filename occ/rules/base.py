"""What a rule is, and what several rules read off a Gram matrix.

The combined gradient is w_0 g + sum_k w_k m_k. A rule sees a `Measurement`, as a rule its Gram
matrix alone, so a new one is one small function of a matrix of shape [K+1, K+1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.measures import Measurement
from occ.registry import Registry

RuleState = Any


class Rule(NamedTuple):
    """A function from the Gram matrix to weights, with state.

    Attributes:
      name: for messages and logs.
      init: `(num_auxiliary) -> state`.
      update: `(measurement, state, key) -> (weights [K+1], state)`; `key` is a PRNG key that is
        new at every step, for rules that draw.
      takes_signal: it needs `measurement.signal`.
      takes_ratio: it can also work from `measurement.ratio`, without a Gram matrix.
      data_dependent: False where the weights are the same whatever is measured, so that they are
        known before anything is.
    """

    name: str
    init: Callable[[int], RuleState]
    update: Callable[[Measurement, RuleState, jax.Array], tuple[jax.Array, RuleState]]
    takes_ratio: bool = False
    data_dependent: bool = True
    takes_signal: bool = False


REGISTRY = Registry("rule")
"""Every rule's factory by its name; `@register("name")` enters one where it is defined."""

register = REGISTRY.register


def stateless(num_auxiliary: int) -> RuleState:
    """`init` of a rule that remembers nothing."""
    del num_auxiliary
    return ()


def auxiliary_rule(name: str, auxiliary_weights: Callable, *, takes_ratio: bool = False) -> Rule:
    """A rule with w_0 = 1 whose auxiliary weights are a function of the measurement alone."""

    def update(measurement, state, key):
        del key
        weights = auxiliary_weights(measurement)
        return jnp.concatenate([jnp.ones((1,), weights.dtype), weights]), state

    return Rule(name, stateless, update, takes_ratio)


def balancing_rule(name: str, all_weights: Callable[[jax.Array], jax.Array]) -> Rule:
    """A rule that weighs all K+1 gradients alike, as a function of the Gram matrix alone.

    Where its function is not defined (a main gradient that is measured as zero, a result that is
    not finite) the rule falls back on the main gradient alone, w = (1, 0, .., 0). A weight w_0 of 0
    would be wrong: a proxy may measure zero where the gradient itself is not. An auxiliary gradient
    of zero gets weight 0.
    """

    def update(measurement, state, key):
        del key
        gram = measurement.gram
        weights = jnp.where(present(gram), all_weights(gram), 0)
        defined = (gram[0, 0] > 0) & jnp.all(jnp.isfinite(weights))
        return jnp.where(defined, weights, main_alone(gram)), state

    return Rule(name, stateless, update)


def main_alone(gram: jax.Array) -> jax.Array:
    """The weights (1, 0, .., 0)."""
    return jnp.zeros_like(gram[0]).at[0].set(1)


def present(gram: jax.Array) -> jax.Array:
    """Which gradients are not zero: bool [K+1]. `calibrate` empties the rows of removed ones."""
    return jnp.diagonal(gram) > 0


def norms(gram: jax.Array) -> jax.Array:
    """Norms of the K+1 gradients: float [K+1].

    >>> norms(jnp.array([[4.0, 1.0], [1.0, 9.0]])).tolist()
    [2.0, 3.0]
    """
    return jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))


def cosines(gram: jax.Array) -> jax.Array:
    """Cosines between the K+1 gradients: float [K+1, K+1], in [-1, 1].

    The row of a zero gradient is that of the identity: it is orthogonal to the others.

    >>> cosines(jnp.array([[4.0, 3.0], [3.0, 9.0]])).tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    inverse = 1 / nonzero(norms(gram))
    # An estimate of a correlation may exceed the product of the norms.
    cosine = jnp.clip(gram * inverse[:, None] * inverse[None, :], -1, 1)
    here = present(gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    off_diagonal = jnp.where(here[:, None] & here[None, :], cosine, 0)
    return jnp.where(identity > 0, identity, off_diagonal)


def times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix times vector, in full precision.

    Products and sums, not a matrix product: on accelerators that would be rounded to bfloat16 or
    TF32.
    """
    return jnp.sum(matrix * vector[None, :], axis=1)


def rounding(dtype: Any) -> float:
    """A ridge, relative to the trace, that is lost in the rounding errors of the dtype."""
    return 10 * float(jnp.finfo(dtype).eps)


def nonzero(values: jax.Array) -> jax.Array:
    """The values, with ones for those that are not positive: a safe denominator."""
    return jnp.where(values > 0, values, 1)
