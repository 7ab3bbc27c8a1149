"""Rules that give every gradient an equal share: IMTL-G, Nash-MTL, Aligned-MTL, MetaBalance."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from occ.rules.base import (
    Rule,
    balancing_rule,
    cosines,
    main_alone,
    nonzero,
    norms,
    present,
    register,
    rounding,
    times,
)


@register("imtl_g")
def imtl_g() -> Rule:
    """Impartial gradients: the combined gradient has equal projections on all K+1 of them.

        <d, g_i> / ||g_i|| equal for all i,      sum_i w_i = 1
        w_i = x_i / ||g_i|| / sum_j x_j / ||g_j||,      C x = 1,      C = cosines
        K = 1:  w_0 = ||m|| / (||g|| + ||m||),  w_1 = ||g|| / (||g|| + ||m||)

    For K = 1 that is the bisector of the angle, whatever the angle. The weights sum to 1, as in the
    paper, and may be negative for K > 1; where the sum before normalisation is negative, so are the
    common projections. Where it is zero the main gradient is taken alone. Auxiliary gradients of
    zero are left out.

    Differs from the paper in a ridge on C that is lost in rounding errors: of collinear gradients
    each gets the same share of the direction.

    Reference: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, equation 6.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[1.0, 0.5], [0.5, 9.0]])
    >>> rule = imtl_g()
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 5) for w in weights]
    [0.75, 0.25]
    """

    def weights(gram):
        matrix = _ridged(cosines(gram), rounding(gram.dtype))
        share = jnp.linalg.solve(matrix, jnp.ones_like(gram[0])) / nonzero(norms(gram))
        share = jnp.where(present(gram), share, 0)
        total, size = jnp.sum(share), jnp.sum(jnp.abs(share))
        return share / jnp.where(jnp.abs(total) > rounding(gram.dtype) * size, total, jnp.nan)

    return balancing_rule("imtl_g", weights)


@register("nash_mtl")
def nash_mtl(*, relative_ridge: float = 1e-6, max_iterations: int = 100) -> Rule:
    """The Nash bargaining solution: the direction in which no relative gain can be traded.

        G w = 1 / w,  w > 0      (elementwise, G the Gram matrix)
        K = 1:  w_0 = 1 / (||g|| sqrt(1 + cos)),  w_1 = 1 / (||m|| sqrt(1 + cos))

    It maximises sum_i log <d, g_i> among directions of one length. As in the paper, the combined
    gradient has norm sqrt(K+1) whatever the gradients' own: 1 / ||g|| is part of w_0, and the
    learning rate alone sets the step. Auxiliary gradients of zero are left out.

    Scaled by its norms, w_i = x_i / ||g_i|| minimises the convex function x' C x / 2 - sum_i log
    x_i of the cosines C, which damped Newton steps find from any start.

    Args:
      relative_ridge: added to the diagonal of C, >= 0. Where the gradients balance each other (0 in
        their convex hull) the exact weights are infinite; with the ridge they stay below
        1 / (||g_i|| sqrt(relative_ridge)), and the combined gradient is about zero.
      max_iterations: of Newton's method; a handful is the rule.

    Raises:
      ValueError: negative ridge, or no iteration.

    Differs from the authors' code, which approximates the solution by a sequence of convex
    programs, solves it every few steps only, and clips the norm of the result.

    Reference: Navon et al., Multi-Task Learning as a Bargaining Game, arXiv 2202.01017, claim 3.1
    and algorithm 1.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> rule = nash_mtl()
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 5) for w in weights]
    [0.5, 1.0]
    """
    if relative_ridge < 0 or max_iterations < 1:
        raise ValueError(
            "nash_mtl: relative_ridge must be >= 0 and max_iterations >= 1, got "
            f"{relative_ridge} and {max_iterations}."
        )

    def weights(gram):
        shares = _bargain(_ridged(cosines(gram), relative_ridge), max_iterations)
        return jnp.where(shares > 0, shares, jnp.nan) / nonzero(norms(gram))

    return balancing_rule("nash_mtl", weights)


def _bargain(matrix: jax.Array, max_iterations: int) -> jax.Array:
    """The x > 0 with C x = 1 / x: the minimum of x' C x / 2 - sum log x.

    The function is self-concordant: a Newton step divided by 1 + its length (in the norm of the
    Hessian matrix) never leaves x > 0 and always descends; whole steps are safe once it is short.
    """
    precision = jnp.finfo(matrix.dtype).eps

    def unfinished(carry):
        _, length, iteration = carry
        return (length * length > precision) & (iteration < max_iterations)

    def newton(carry):
        x, _, iteration = carry
        descent = 1 / x - times(matrix, x)
        step = jnp.linalg.solve(matrix + jnp.diag(1 / (x * x)), descent)
        length = jnp.sqrt(jnp.maximum(jnp.sum(descent * step), 0))
        damping = jnp.where(length < 0.25, 1, 1 + length)
        return x + step / damping, length, iteration + 1

    start = jnp.ones_like(matrix[0])
    first = (start, jnp.full((), jnp.inf, matrix.dtype), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(unfinished, newton, first)[0]


@register("aligned_mtl")
def aligned_mtl() -> Rule:
    """Independent component alignment: the principal components of the gradients, made equal.

        G = U diag(s^2) U',      w = s_min U diag(1 / s) U' 1,      s_min the least s > 0
        orthogonal gradients:  w_i = s_min / ||g_i||

    The matrix of the K+1 gradients is replaced by the nearest one with orthogonal rows of one
    length, the least of its singular values, and the rows are summed. (The paper's task weights
    are all 1 here, so that orthogonal gradients of one length stay as they are.) Nearly collinear
    gradients have a very small s_min, and the combined gradient shrinks with it. Components below
    the rounding errors of the largest are left out, and zero gradients with them.

    Reference: Senushkin et al., Independent Component Alignment for Multi-Task Learning, arXiv
    2305.19000, algorithm 1.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> rule = aligned_mtl()
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> [round(float(w), 5) for w in weights]
    [0.5, 1.0]
    """

    def weights(gram):
        values, vectors = jnp.linalg.eigh(gram / nonzero(jnp.trace(gram)))
        kept = values > values[-1] * gram.shape[0] * jnp.finfo(gram.dtype).eps
        least = jnp.min(jnp.where(kept, values, jnp.inf))
        inverse = jnp.where(kept, jnp.sqrt(least / jnp.where(kept, values, 1)), 0)
        return times(vectors, inverse * jnp.sum(vectors, axis=0))

    return balancing_rule("aligned_mtl", weights)


class MetaBalanceState(NamedTuple):
    """Moving averages of the norms, before the correction of their start at zero.

    Attributes:
      norms: float [K+1].
      mass: float [K+1], the sum of the weights in each average.
    """

    norms: jax.Array
    mass: jax.Array


@register("metabalance")
def metabalance(relax: float = 0.7, *, decay: float = 0.9) -> Rule:
    """Auxiliary gradients of the main gradient's magnitude.

        N_i = decay N_i + (1 - decay) ||g_i||,      g_0 = g, g_k = m_k
        w_k = relax N_0 / N_k + (1 - relax)

    w_0 = 1, so the result is the main gradient plus the scaled auxiliary ones, as in the paper. It
    looks at magnitudes alone: a conflict is scaled like an agreement. relax = 1 with decay = 0
    matches the norms at every step. A zero gradient leaves its average as it is, and gets weight 0
    if it is an auxiliary one.

    Args:
      relax: in [0, 1], how much of the gap in magnitude is closed.
      decay: of the averages, in [0, 1).

    Raises:
      ValueError: relax or decay outside their ranges.

    Differs from the paper in one norm for all shared leaves, where the paper balances each leaf
    apart: that needs one Gram matrix a leaf.

    Reference: He et al., MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient
    Magnitudes of Auxiliary Tasks, arXiv 2203.06801, and the code released with it.

    >>> from occ.measures import Measurement
    >>> gram = jnp.array([[1.0, 0.0], [0.0, 16.0]])
    >>> rule = metabalance(relax=1.0)
    >>> weights, _ = rule.update(Measurement(gram), rule.init(1), jax.random.key(0))
    >>> weights.tolist()
    [1.0, 0.25]
    """
    if not 0 <= relax <= 1:
        raise ValueError(f"metabalance: relax must be in [0, 1], got {relax}.")
    if not 0 <= decay < 1:
        raise ValueError(f"metabalance: decay must be in [0, 1), got {decay}.")

    def init(num_auxiliary):
        return MetaBalanceState(*(jnp.zeros((num_auxiliary + 1,)) for _ in range(2)))

    def update(measurement, state, key):
        del key
        gram = measurement.gram
        here = present(gram)

        def average(old, new):
            return jnp.where(here, decay * old + (1 - decay) * new.astype(old.dtype), old)

        length = norms(gram)
        new = MetaBalanceState(
            average(state.norms, length), average(state.mass, jnp.ones_like(length))
        )
        mean = (new.norms / nonzero(new.mass)).astype(gram.dtype)
        weights = relax * mean[0] / nonzero(mean) + (1 - relax)
        weights = jnp.where(here, weights, 0).at[0].set(1)
        defined = jnp.all(jnp.isfinite(weights))
        return jnp.where(defined, weights, main_alone(gram)), new

    return Rule("metabalance", init, update)


def _ridged(matrix: jax.Array, ridge: float | jax.Array) -> jax.Array:
    return matrix + jnp.asarray(ridge, matrix.dtype) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
