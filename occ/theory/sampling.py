"""Sampling noise: gradients and Gram matrices that come from a minibatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ import measures
from occ.theory.model import StepModel, lower_bound


class SampledGram(NamedTuple):
    """Gram matrices of gradients that are means over a sample, with and without its noise.

    Attributes:
      same: float [K+1, K+1], of the gradients of one and the same sample, as a step takes them:
        c_same = same[0, k] estimates <g, m_k> + tr Cov(g^, m^_k), v2_same = same[k, k].
      cross: float [K+1, K+1], of gradients from disjoint samples: c_cross = cross[0, k] estimates
        <g, m_k>, v2_cross = cross[k, k] estimates ||m_k||^2, and may turn out negative.
    """

    same: jax.Array
    cross: jax.Array


def sampled_gram(parts: tuple[Any, ...]) -> SampledGram:
    """Both Gram matrices, from the gradients of R parts of one minibatch.

        same_ij  = <d_i, d_j>                                     with d_i = mean_r d_i,r
        cross_ij = 1 / (R (R - 1)) sum_{r != s} <d_i,r, d_j,s>
                 = (R^2 same_ij - sum_r <d_i,r, d_j,r>) / (R (R - 1))

    Both are free of bias for independent parts: `same` for the expectation over minibatches of
    this size, `cross` for the true gradients.

    Args:
      parts: K+1 pytrees g, m_1, .., m_K, each leaf [R, ...] with the gradients of R >= 2 parts of
        equal size (the means over tokens, if a loss is one, of equally many tokens).

    Raises:
      ValueError: fewer than two parts.

    >>> same, cross = sampled_gram((jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [2.0]])))
    >>> float(same[0, 1]), float(cross[0, 1])
    (2.0, 1.0)
    """
    count = jax.tree.leaves(parts[0])[0].shape[0]
    if count < 2:
        raise ValueError(
            f"sampled_gram: expected leaves [R, ...] with R >= 2 parts, got R = {count}. One part "
            "has no other to be compared with: cut the minibatch in at least two."
        )
    summed = tuple(jax.tree.map(_sum_of_parts, part) for part in parts)
    of_sums = measures.gram_matrix(summed)
    within = measures.gram_matrix(parts)
    return SampledGram(of_sums / count**2, (of_sums - within) / (count * (count - 1)))


def at_batch_size(sampled: SampledGram, factor: float | jax.Array) -> SampledGram:
    """The same for minibatches `factor` times as large: noise falls as 1 / factor."""
    noise = (sampled.same - sampled.cross) / jnp.asarray(factor, sampled.same.dtype)
    return sampled._replace(same=sampled.cross + noise)


def sampled_lower_bound(sampled: SampledGram, *, smoothness: float | jax.Array) -> StepModel:
    """The expected guarantee of a step along sampled gradients.

    The step goes along g^ + lambda m^, while J changes by its true gradient g. Taking expectations
    over the sample in J(theta + d) >= J(theta) + <g, d> - (L / 2) ||d||^2, with a lambda that does
    not depend on it,

        eta (<g, E g^> + lambda <g, E m^>)
            - (L eta^2 / 2) (E||g^||^2 + 2 lambda E<g^, m^> + lambda^2 E||m^||^2),

    whose maximum over lambda is at

        lambda* = (c_cross - L eta c_same) / (L eta v2_same).

    Only the correlation of first order is without noise, since there g is the true gradient. The
    second order is the size of the step that is really taken: the sample's noise belongs to it,
    both in v^2 and in the correlation c_same = c_cross + tr Cov(g^, m^). With c_same in all places,
    noise common to both gradients would pass for correlation; with v2_cross for the
    perturbation, the noise that the step adds would be free.

    Args:
      sampled: from `sampled_gram`, or averages of it.
      smoothness: L.
    """
    return lower_bound(sampled.same, smoothness=smoothness, first_order=sampled.cross[0])


def _sum_of_parts(leaf: jax.Array) -> jax.Array:
    return jnp.sum(leaf.astype(measures.accumulation_dtype(leaf.dtype)), axis=0)
