"""Rules that search the convex hull of the gradients: MGDA, CAGrad."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from occ.rules.base import Rule, balancing_rule, nonzero, present, register, rounding, times

MAX_AUXILIARY = 9


@register("mgda")
def mgda() -> Rule:
    """The shortest vector in the convex hull of the K+1 gradients.

        w = argmin ||w_0 g + sum_k w_k m_k||^2,      w >= 0, sum w = 1
        K = 1:  w_0 = (v^2 - c) / (||g||^2 + v^2 - 2 c), clipped to [0, 1]

    It opposes none of the gradients, and is zero where they balance (a Pareto-stationary point).
    The weights sum to 1, as in the paper: with two equal gradients the step is half of that of
    their sum. A short auxiliary gradient takes most of the weight. Auxiliary gradients of zero are
    left out, since otherwise they would be the shortest vector.

    The minimum is exact: every subset of gradients is tried, so K <= 9.

    Reference: Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, arXiv
    1810.04650, equation 3; Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization, Comptes Rendus Mathematique 350 (2012).

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> rule = mgda()
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 5) for w in weights]
    [0.75, 0.25]
    """

    def weights(gram):
        unit = gram / nonzero(jnp.trace(gram))
        one = jnp.ones((), gram.dtype)
        return _minimise_over_simplex(unit, jnp.zeros_like(unit[0]), one)

    return balancing_rule("mgda", weights)


@register("cagrad")
def cagrad(radius: float = 0.5) -> Rule:
    """Conflict-averse gradient: near the mean, with the largest gain for the worst-off objective.

        maximise  min_i <d, g_i>   where  ||d - g_mean|| <= radius ||g_mean||
        d = g_mean + s / ||g_w|| g_w,      s = radius ||g_mean||
        g_w = sum_i w_i g_i,      w = argmin <g_w, g_mean> + s ||g_w||,      w >= 0, sum w = 1

    with g_0 = g, g_k = m_k and their mean g_mean, all as in the paper: with radius 0 every weight
    is 1 / (K+1). Auxiliary gradients of zero are left out of the mean too.

    The minimum is exact: every subset of gradients is tried, so K <= 9. Where g_w vanishes, so that
    its direction is a rounding error, the second term does as well.

    Args:
      radius: c of the paper, >= 0. Below 1 it converges to a minimum of the mean.

    Raises:
      ValueError: radius below 0.

    Differs from the authors' code, which by default divides the result by 1 + radius^2.

    Reference: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, arXiv
    2110.14048, algorithm 1.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> rule = cagrad(radius=0.5)
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 5) for w in weights]
    [0.75, 0.75]
    """
    if radius < 0:
        raise ValueError(f"cagrad: radius must be >= 0, got {radius}.")

    def weights(gram):
        unit = gram / nonzero(jnp.trace(gram))
        here = present(gram).astype(gram.dtype)
        mean = here / nonzero(jnp.sum(here))
        linear = times(unit, mean)
        slope = radius * jnp.sqrt(jnp.maximum(jnp.sum(mean * linear), 0))
        hull = _minimise_over_simplex(unit, linear, slope)
        shortest = math.sqrt(rounding(gram.dtype))
        return mean + slope / jnp.maximum(_length(unit, hull), shortest) * hull

    return balancing_rule("cagrad", weights)


def _minimise_over_simplex(gram: jax.Array, linear: jax.Array, slope: jax.Array) -> jax.Array:
    """argmin of <linear, w> + slope sqrt(w' G w) over w >= 0, sum w = 1.

    The minimum is a stationary point on the affine hull of some subset of the gradients, and there
    it has a closed form. So all 2^(K+1) - 1 of them are solved at once, and the best one is taken
    that is a convex combination.

    Args:
      gram: float [K+1, K+1], of trace about 1.
      linear: float [K+1].
      slope: float [], >= 0.

    Returns:
      float [K+1], 0 for zero gradients.
    """
    size = gram.shape[0]
    if size > MAX_AUXILIARY + 1:
        raise ValueError(
            f"mgda, cagrad: at most {MAX_AUXILIARY} auxiliary gradients, got {size - 1}: all "
            "subsets of the gradients are tried."
        )
    subsets = np.array([[bool(s >> i & 1) for i in range(size)] for s in range(1, 2**size)])

    def candidate(inside):
        weights = _stationary_point(gram, linear, slope, inside)
        even = inside.astype(gram.dtype) / jnp.sum(inside.astype(gram.dtype))
        weights = jnp.maximum(jnp.where(jnp.all(jnp.isfinite(weights)), weights, even), 0)
        weights = weights / nonzero(jnp.sum(weights))
        value = jnp.sum(linear * weights) + slope * _length(gram, weights)
        return weights, jnp.where(jnp.any(inside & ~present(gram)), jnp.inf, value)

    weights, values = jax.vmap(candidate)(jnp.asarray(subsets))
    return weights[jnp.argmin(values)]


def _length(gram: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(jnp.sum(weights * times(gram, weights)), 0))


def _stationary_point(
    gram: jax.Array, linear: jax.Array, slope: jax.Array, inside: jax.Array
) -> jax.Array:
    """Where the objective is stationary on the affine hull of a subset; NaN where nowhere.

    There b + slope G w / n = mu 1 with n = sqrt(w' G w) and b = `linear`, so w is a combination of
    G^-1 1 and G^-1 b, and mu the larger root of a quadratic equation. Collinear gradients need a
    ridge, which is lost in the rounding errors of the others.
    """
    ones, linear = inside.astype(gram.dtype), jnp.where(inside, linear, 0)
    block = jnp.where(inside[:, None] & inside[None, :], gram, 0)
    block = block + jnp.diag(jnp.where(inside, rounding(gram.dtype), 1).astype(gram.dtype))
    solutions = jnp.linalg.solve(block, jnp.stack([ones, linear], axis=1))
    by_one, by_linear = solutions[:, 0], solutions[:, 1]
    a, b, c = jnp.sum(by_one), jnp.sum(by_linear), jnp.sum(linear * by_linear)
    discriminant = b * b - a * (c - slope * slope)
    root = jnp.sqrt(jnp.where(discriminant > 0, discriminant, jnp.nan))
    return ((b + root) / a * by_one - by_linear) / root
