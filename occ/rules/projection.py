"""Rules that look at angles: leave out, project away or turn what conflicts."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from occ.rules.base import (
    Rule,
    auxiliary_rule,
    cosines,
    nonzero,
    norms,
    present,
    register,
    stateless,
    times,
)


@register("cosine_gating")
def cosine_gating(*, weighted: bool = True) -> Rule:
    """Auxiliary gradients as far as their angle to the main one is acute.

        weighted:    w_k = max(0, cos(g, m_k))
        unweighted:  w_k = 1 where cos(g, m_k) > 0, else 0

    w_0 = 1, so the result is the main gradient plus what passes the gate, as in the paper. With a
    zero gradient the cosine is 0 and the gate is closed.

    Args:
      weighted: the first form, or the second.

    Reference: Du et al., Adapting Auxiliary Losses Using Gradient Similarity, arXiv 1812.02224, the
    weighted and the unweighted version.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[4.0, 3.0, -1.0], [3.0, 9.0, 0.0], [-1.0, 0.0, 1.0]])
    >>> rule = cosine_gating()
    >>> weights, _ = rule.update(Measurement(gram), rule.init(2), jax.random.key(0))
    >>> weights.tolist()
    [1.0, 0.5, 0.0]
    """

    def auxiliary_weights(measurement):
        cosine = cosines(measurement.gram)[0, 1:]
        if weighted:
            return jnp.maximum(cosine, 0)
        return (cosine > 0).astype(cosine.dtype)

    return auxiliary_rule("cosine_gating", auxiliary_weights)


@register("pcgrad")
def pcgrad(*, symmetric: bool = True) -> Rule:
    """Gradient surgery: each gradient loses its component against every one that it opposes.

        for each i:  g_i' = g_i;  for j != i in random order:
                         g_i' -= min(0, <g_i', g_j>) / ||g_j||^2 g_j
        combined:    sum_i g_i',      g_0 = g, g_k = m_k

    The combined gradient is the sum of the projected ones, as in the paper: without a conflict all
    weights are 1. For K = 1 nothing depends on the order: where c < 0,

        w_0 = 1 - c / ||g||^2,      w_1 = 1 - c / v^2

    Args:
      symmetric: the published form, which treats all K+1 gradients alike and so bends the main
        gradient too. If False, the main gradient stays as it is, and the auxiliary ones are
        projected against it alone: w_k = 1 and w_0 = 1 - sum_k min(0, c_k) / ||g||^2.

    Reference: Yu et al., Gradient Surgery for Multi-Task Learning, arXiv 2001.06782, algorithm 1.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[4.0, -1.0], [-1.0, 2.0]])
    >>> rule = pcgrad()
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> weights.tolist()
    [1.25, 1.5]
    """

    def update(measurement, state, key):
        gram = measurement.gram
        if not symmetric:
            return _project_against_main(gram), state
        return _surgery(gram, _orders(key, gram.shape[0])), state

    return Rule("pcgrad" if symmetric else "pcgrad(asymmetric)", stateless, update)


def _project_against_main(gram: jax.Array) -> jax.Array:
    """g + sum_k (m_k - min(0, c_k) / ||g||^2 g)."""
    weights = present(gram).astype(gram.dtype)
    removed = jnp.sum(jnp.minimum(gram[0, 1:], 0)) / nonzero(gram[0, 0])
    return weights.at[0].set(1 - removed)


def _orders(key: jax.Array, size: int) -> jax.Array:
    """Row i: the order in which gradient i meets the others (and itself): int [K+1, K+1]."""
    if size == 2:
        return jnp.broadcast_to(jnp.arange(2), (2, 2))
    return jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, size))


def _surgery(gram: jax.Array, orders: jax.Array) -> jax.Array:
    """PCGrad's weights for given orders."""
    size = gram.shape[0]
    identity = jnp.eye(size, dtype=gram.dtype)

    def project(row, order):
        def meet(position, weights):
            other = order[position]
            product = jnp.sum(weights * gram[:, other])
            conflict = (product < 0) & (other != row)
            amount = jnp.where(conflict, product / nonzero(gram[other, other]), 0)
            return weights - amount * identity[other]

        return jax.lax.fori_loop(0, size, meet, identity[row])

    rows = jax.vmap(project)(jnp.arange(size, dtype=orders.dtype), orders)
    return _sum_of_rows(gram, rows)


def _sum_of_rows(gram: jax.Array, rows: jax.Array) -> jax.Array:
    """Weights of sum_i g_i'; an auxiliary gradient of zero contributes no row."""
    counts = present(gram).at[0].set(True)
    return jnp.sum(jnp.where(counts[:, None], rows, 0), axis=0)


class GradVacState(NamedTuple):
    """Moving averages of the cosines.

    Attributes:
      targets: float [K+1, K+1], of the cosine between gradient i, as far as it was turned, and j.
    """

    targets: jax.Array


@register("gradvac")
def gradvac(*, decay: float = 0.99) -> Rule:
    """Gradient vaccine: turns each gradient until its cosines reach their moving averages.

        for each i:  g_i' = g_i;  for j != i in random order, phi = cos(g_i', g_j):
                         where phi < t_ij:
                             g_i' += ||g_i'|| (t_ij sqrt(1 - phi^2) - phi sqrt(1 - t_ij^2))
                                     / (||g_j|| sqrt(1 - t_ij^2)) g_j
                         t_ij = decay t_ij + (1 - decay) phi
        combined:    sum_i g_i',      g_0 = g, g_k = m_k

    The combined gradient is the sum of the turned ones, as in the paper. The targets t start at 0,
    where the correction is PCGrad's projection; once gradients are used to agree, the rule also
    acts on pairs that agree less than usual. A zero gradient has no angle: it contributes nothing
    and leaves its targets as they are.

    Args:
      decay: of the targets, in [0, 1]; 1 - beta of the paper. With 1 they stay at 0.

    Raises:
      ValueError: decay outside [0, 1].

    Differs from the paper in one target a pair for all shared leaves; its experiments compare the
    granularities whole model, layer, and matrix. Targets so close to 1 that only rounding errors
    tell the two gradients apart are lowered a little.

    Reference: Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models, arXiv 2010.05874, algorithm 1.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[4.0, -1.0], [-1.0, 2.0]])
    >>> rule = gradvac(decay=0.5)
    >>> weights, state = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 6) for w in weights]
    [1.25, 1.5]
    >>> round(float(state.targets[0, 1]), 6)
    -0.176777
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"gradvac: decay must be in [0, 1], got {decay}.")

    def init(num_auxiliary):
        return GradVacState(jnp.zeros((num_auxiliary + 1,) * 2))

    def update(measurement, state, key):
        gram = measurement.gram
        targets = state.targets.astype(gram.dtype)
        weights, targets = _vaccinate(gram, targets, _orders(key, gram.shape[0]), decay)
        return weights, GradVacState(targets.astype(state.targets.dtype))

    return Rule("gradvac", init, update)


def _vaccinate(
    gram: jax.Array, targets: jax.Array, orders: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """GradVac's weights and new targets for given orders."""
    size = gram.shape[0]
    identity = jnp.eye(size, dtype=gram.dtype)
    length = norms(gram)

    def turn(row, order, row_targets):
        def meet(position, carry):
            weights, goals = carry
            other = order[position]
            products = times(gram, weights)
            norm = jnp.sqrt(jnp.maximum(jnp.sum(weights * products), 0))
            scale = norm * length[other]
            cosine = jnp.clip(products[other] / nonzero(scale), -1, 1)
            counts = (other != row) & (scale > 0)
            acts = counts & (cosine < _attainable(goals[other]))
            amount = norm / nonzero(length[other]) * _turn(cosine, _attainable(goals[other]))
            weights = weights + jnp.where(acts, amount, 0) * identity[other]
            moved = decay * goals[other] + (1 - decay) * cosine
            change = jnp.where(counts, moved - goals[other], 0)
            return weights, goals + change * identity[other]

        return jax.lax.fori_loop(0, size, meet, (identity[row], row_targets))

    rows, targets = jax.vmap(turn)(jnp.arange(size, dtype=orders.dtype), orders, targets)
    return _sum_of_rows(gram, rows), targets


def _turn(cosine: jax.Array, target: jax.Array) -> jax.Array:
    """How much of a unit vector turns another one from this cosine with it to the target."""
    sine, target_sine = jnp.sqrt(1 - cosine * cosine), jnp.sqrt(1 - target * target)
    return target * sine / target_sine - cosine


def _attainable(target: jax.Array) -> jax.Array:
    """The target, kept away from 1, where the sine vanishes."""
    return jnp.minimum(target, 1 - math.sqrt(jnp.finfo(target.dtype).eps))
