"""Correlations of expected gradients, from the present gradients and averages of past ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.measures.base import (
    Measure,
    Measurement,
    accumulation_dtype,
    gram_matrix,
    inner_product,
    psum,
    register,
    widen,
)


class PastState(NamedTuple):
    """Moving averages, before the correction of their start at zero.

    Attributes:
      gradients: K+1 trees like the shared leaves, in at least float32.
      weight: float [], sum of the weights in them.
      expected: float [K+1], inner products of averages with fresh gradients.
      expected_weight: float [], sum of the weights in it.
      same: float [K+1, K+1], Gram matrices of one minibatch.
      same_weight: float [], sum of the weights in it.
    """

    gradients: tuple[Any, ...]
    weight: jax.Array
    expected: jax.Array
    expected_weight: jax.Array
    same: jax.Array
    same_weight: jax.Array


@register("past_gradients")
def past_gradients(
    decay: float = 0.95, smoothing: float = 0.97, *, norm: str = "euclidean", eps: float = 1e-8
) -> Measure:
    """What expected gradients have in common, which one minibatch cannot tell.

        c_0 = <A(g), P g>,   c_k = (<A(g), P m_k> + <A(m_k), P g>) / 2,   V_ij = <m_i, P m_j>

    A(.) is the moving average of the gradients of updates before this one: it shares no sample with
    the fresh gradient, and its own noise is that of many minibatches. c and V are averaged once
    more over updates. Both are what `rules.signal_to_noise` needs. For other rules the matrix holds
    c_k in its first row and V elsewhere, as `cross_fitted` does at the price of two backward passes
    on halves; here the price is K+1 trees of memory like the shared parameters.

    **Bias**: A(.) is the mean of gradients at parameters up to about 1 / (1 - decay) measured
    updates old. Where the expected gradients turn within that time, c is too small.

    Evidence: `second_moment` with norm="preconditioned", as in `preconditioned`.

    Args:
      decay: of the averages of gradients, in [0, 1).
      smoothing: decay of the averages of c and V, in [0, 1).
      norm: "euclidean" (P = 1), or "preconditioned": Adam's, P = diag(1 / (sqrt(nu) + eps)).
      eps: Adam's, > 0.

    Raises:
      ValueError: decays outside [0, 1), eps <= 0, or another norm.
    """
    if not (0 <= decay < 1 and 0 <= smoothing < 1 and eps > 0):
        raise ValueError(
            f"past_gradients: expected decay and smoothing in [0, 1) and eps > 0, got {decay}, "
            f"{smoothing} and {eps}."
        )
    if norm not in ("euclidean", "preconditioned"):
        raise ValueError(
            f"past_gradients: norm must be 'euclidean' or 'preconditioned', got {norm!r}."
        )

    def reduce(evidence, num_auxiliary):
        del num_auxiliary
        return evidence["gradients"], evidence.get("second_moment")

    def update(statistics, state, axis_name):
        gradients, second_moment = statistics
        root = None
        if norm == "preconditioned":
            root = jax.tree.map(lambda nu: (jnp.sqrt(widen(nu)) + eps) ** -0.5, second_moment)

        def in_norm(tree):
            return tree if root is None else jax.tree.map(jnp.multiply, root, tree)

        fresh = tuple(jax.tree.map(widen, gradient) for gradient in gradients)
        here, before = ([in_norm(tree) for tree in trees] for trees in (fresh, state.gradients))
        along = [inner_product(before[0], gradient) for gradient in here]
        across = [inner_product(past, here[0]) for past in before[1:]]
        both = [along[0], *((a + b) / 2 for a, b in zip(along[1:], across, strict=True))]
        expected, same = psum((jnp.stack(both), gram_matrix(tuple(here))), axis_name)
        new = _advanced(state, fresh, expected, same, decay, smoothing)
        V = new.same / new.same_weight
        signal = new.expected / jnp.where(new.expected_weight > 0, new.expected_weight, 1)
        gram = V.at[0, 1:].set(signal[1:]).at[1:, 0].set(signal[1:])
        return Measurement(gram, None, V[0, 1:], signal), new

    evidence = ("gradients",) if norm == "euclidean" else ("gradients", "second_moment")
    return Measure("past_gradients", evidence, _init, None, reduce, update, yields_signal=True)


def _init(num_auxiliary: int, leaves: Mapping[str, Any]) -> PastState:
    def zeros(leaf):
        return jnp.zeros_like(leaf, dtype=accumulation_dtype(leaf.dtype))

    size = num_auxiliary + 1
    return PastState(
        gradients=tuple({path: zeros(leaf) for path, leaf in leaves.items()} for _ in range(size)),
        weight=jnp.zeros(()),
        expected=jnp.zeros((size,)),
        expected_weight=jnp.zeros(()),
        same=jnp.zeros((size, size)),
        same_weight=jnp.zeros(()),
    )


def _advanced(
    state: PastState,
    fresh: tuple[Any, ...],
    expected: jax.Array,
    same: jax.Array,
    decay: float,
    smoothing: float,
) -> PastState:
    """The averages with one update more; c enters once there are past gradients.

    Args:
      state: the averages before.
      fresh: K+1 gradients.
      expected: float [K+1], their inner products with the sums in `state.gradients`.
      same: float [K+1, K+1], their own Gram matrix.
      decay: of the gradients.
      smoothing: of the inner products.
    """

    def average(old, new, rate=smoothing):
        return rate * old + (1 - rate) * jnp.asarray(new, old.dtype)

    def if_known(new, old):
        return jnp.where(state.weight > 0, new, old)

    expected = expected / if_known(state.weight, 1).astype(expected.dtype)
    return PastState(
        gradients=jax.tree.map(lambda a, g: average(a, g, decay), state.gradients, fresh),
        weight=average(state.weight, 1.0, decay),
        expected=if_known(average(state.expected, expected), state.expected),
        expected_weight=if_known(average(state.expected_weight, 1.0), state.expected_weight),
        same=average(state.same, same),
        same_weight=average(state.same_weight, 1.0),
    )
