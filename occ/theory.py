r"""The decomposition of a joint step: what auxiliary gradients add to the main objective.

An objective J, to be increased, has the gradient g and the Hessian H. A step along it and along
auxiliary ascent directions m_1..m_K,

    theta + eta sum_i w_i d_i,        d = (g, m_1, .., m_K),  w = (1, lambda_1, .., lambda_K),

changes J by a quadratic function of the weights,

    improvement(w) = eta f'w + (eta^2 / 2) w'C w,

exactly, in expectation or as a guarantee. The assumption decides f and C alone:

    assumption                                        f_i             C_ij
    J is L-smooth (a lower bound)                     <g, d_i>        -L <d_i, d_j>
    .. in the norm of P^-1, steps along P d_i         <g, P d_i>      -L <d_i, P d_j>
    .. in the Euclidean norm, steps along P d_i       <g, P d_i>      -L <P d_i, P d_j>
    .. steps along sampled d^_i (an expectation)      <g, E d^_i>     -L E<d^_i, d^_j>
    the Taylor polynomial of second order             <g, d_i>        d_i'H d_j

Here that pair is a `StepModel`, and everything else is a function of it. What depends on lambda is
the auxiliary gradients' contribution (Delta_MTP): a term linear in lambda, which for the first row
is the paper's first-order correlation eta lambda (1 - L eta) <g, m>, and a quadratic one, its
second-order perturbation (L eta^2 lambda^2 / 2) ||m||^2.

Losses to be decreased: with J = -loss both gradients change sign, g = -grad loss_RL and
m = -grad loss_MTP. Gram matrices, lambda and every gain (a gain in J is a fall of the loss) stay as
they are; H is the Hessian of J, so minus that of the loss. Functions that take the objective
itself want `lambda params: -loss(params)` and ascent directions.

The inner products are over the parameters that both losses reach.

Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
Optimal Coefficient Calibration, arXiv 2605.28184, for the first row and its optimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from occ import measures

Objective = Callable[[Any], jax.Array]  # parameters -> scalar, to be increased


class StepModel(NamedTuple):
    """A quadratic model of what a step changes, in the weights of its K + 1 directions.

    Attributes:
      first_order: float [K+1], f; the objective's slope along each direction, the main one first.
      second_order: float [K+1, K+1], C; symmetric.
    """

    first_order: jax.Array
    second_order: jax.Array


# ---------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------


def lower_bound(
    gram: jax.Array, *, smoothness: float | jax.Array, first_order: jax.Array | None = None
) -> StepModel:
    """The improvement that is guaranteed if J is L-smooth.

        J(theta + d) >= J(theta) + <grad J, d> - (L / 2) ||d||^2

    For one auxiliary gradient its contribution is Delta_MTP = eta lambda (1 - L eta) c -
    (L eta^2 lambda^2 / 2) v^2; for K of them eta (1 - L eta) lambda'c - (L eta^2 / 2) lambda'V
    lambda with V = [<m_j, m_k>].

    Args:
      gram: float [K+1, K+1], Gram matrix of the directions really taken, the main one first.
      smoothness: L > 0, a bound on the spectral norm of the Hessian.
      first_order: float [K+1], slopes of J along the directions, where the main direction is not
        its gradient; default the first row of `gram`.

    Reference: Wang et al., arXiv 2605.28184: the decomposition of the improvement.

    >>> model = lower_bound(jnp.array([[4.0, 1.0], [1.0, 2.0]]), smoothness=1.0)
    >>> float(contribution(model, 0.5, step_size=0.5).total)
    0.0625
    """
    gram = jnp.asarray(gram)
    first_order = gram[0] if first_order is None else jnp.asarray(first_order)
    return StepModel(first_order, -jnp.asarray(smoothness, gram.dtype) * gram)


def preconditioned_lower_bound(
    gradients: tuple[Any, ...],
    preconditioner: Any,
    *,
    smoothness: float | jax.Array,
    norm: Literal["preconditioned", "euclidean"] = "preconditioned",
) -> StepModel:
    """The guarantee for steps eta P (g + sum_k lambda_k m_k) with a diagonal P, such as Adam's.

        preconditioned   J(theta + d) >= J(theta) + <g, d> - (L / 2) <d, P^-1 d>: the plain
                         formulas hold with <a, P b> for every <a, b>
        euclidean        with (L / 2) ||d||^2, where <P g, P m> does not cancel:
                         lambda* = (<g, P m> - L eta <P g, P m>) / (L eta ||P m||^2)

    The norms measure different L: of P^(1/2) H P^(1/2) and of H.

    Args:
      gradients: K+1 pytrees g, m_1, .., m_K.
      preconditioner: a pytree like them, the diagonal of P > 0. It must not depend on lambda:
        for Adam that means its second moment *before* the step.
      smoothness: L in the chosen norm.
      norm: in which J is L-smooth.

    Raises:
      ValueError: unknown norm.
    """
    scaled = tuple(_multiply(preconditioner, gradient) for gradient in gradients)
    slopes = [measures.inner_product(gradients[0], step) for step in scaled]
    if norm == "euclidean":
        gram = measures.gram_matrix(scaled)
    elif norm == "preconditioned":
        roots = jax.tree.map(jnp.sqrt, preconditioner)
        gram = measures.gram_matrix(tuple(_multiply(roots, gradient) for gradient in gradients))
    else:
        raise ValueError(
            f"preconditioned_lower_bound: norm must be 'preconditioned' or 'euclidean', got "
            f"{norm!r}."
        )
    return lower_bound(gram, smoothness=smoothness, first_order=jnp.stack(slopes))


def second_order(objective: Objective, params: Any, directions: tuple[Any, ...]) -> StepModel:
    """The Taylor polynomial of second order, which needs no L.

        Delta = eta lambda (c + eta g'Hm) + (eta^2 lambda^2 / 2) m'Hm

    It costs a gradient and K + 1 Hessian-vector products. The slopes are those of `objective`, so
    the directions may be anything: sampled gradients, or what an optimizer made of them.

    Args:
      objective: `params -> scalar`, to be increased.
      params: pytree where the step begins.
      directions: K+1 pytrees like it, the main one first.
    """
    gradient, hessian = jax.linearize(jax.grad(objective), params)
    directions = tuple(_like(params, direction) for direction in directions)
    images = [hessian(direction) for direction in directions]
    size = len(directions)
    curvatures = [
        [measures.inner_product(directions[min(i, j)], images[max(i, j)]) for j in range(size)]
        for i in range(size)
    ]
    slopes = [measures.inner_product(gradient, direction) for direction in directions]
    return StepModel(jnp.stack(slopes), jnp.stack([jnp.stack(row) for row in curvatures]))


# ---------------------------------------------------------------------------------------------
# What the auxiliary gradients contribute
# ---------------------------------------------------------------------------------------------


class Contribution(NamedTuple):
    """What a model says the auxiliary gradients add to a step.

    Attributes:
      correlation: the part linear in the coefficients.
      perturbation: the loss by the part quadratic in them, >= 0 where the model is concave.
      total: correlation - perturbation; Delta_MTP of the paper.
    """

    correlation: jax.Array
    perturbation: jax.Array
    total: jax.Array


def contribution(
    model: StepModel, coefficients: float | jax.Array, *, step_size: float | jax.Array
) -> Contribution:
    """The improvement with these coefficients minus that with none.

        correlation  = eta sum_k lambda_k (f_k + eta C_0k)
        perturbation = -(eta^2 / 2) sum_jk lambda_j lambda_k C_jk

    Args:
      model: of the step.
      coefficients: float [..., K], lambda; a scalar for K = 1. Leading axes are a sweep.
      step_size: eta.

    Returns:
      Three arrays [...].

    Raises:
      ValueError: coefficients of another number than K.
    """
    slope, curvature = _parabola(model, step_size)
    values = jnp.asarray(coefficients, slope.dtype)
    if values.ndim == 0 and slope.shape == (1,):
        values = values[None]
    if values.shape[-1:] != slope.shape:
        raise ValueError(
            f"contribution: expected coefficients of shape [..., K={slope.shape[0]}], got "
            f"{values.shape}. Several values for K = 1 still need their last axis: pass "
            "coefficients[:, None]."
        )
    linear = _einsum("...k,k->...", values, slope)
    quadratic = _einsum("...j,jk,...k->...", values, curvature, values) / 2
    return Contribution(linear, -quadratic, linear + quadratic)


def optimal_coefficients(model: StepModel, *, step_size: float | jax.Array) -> jax.Array:
    """The coefficients at which the contribution is greatest.

        K = 1:  lambda* = -(c + eta C_01) / (eta C_11)     lower bound: (1 - L eta)/(L eta) c / v^2
        K > 1:  (eta C_aux) lambda* = -(f_aux + eta C_0,aux)

    A lower bound with a zero or repeated auxiliary gradient has many maximisers; this is the one
    of least norm, to rounding, so a zero gradient gets 0.

    Where the second-order model does not bend downwards (m'Hm >= 0) it has no maximiser: it
    promises the more the further one goes, beyond where it can be trusted. Then the result for
    K = 1 is infinite, with the sign of the slope; clipped to a range [-b, b] that is the best
    coefficient of that range. For K > 1 it is NaN.

    Args:
      model: of the step.
      step_size: eta > 0.

    Returns:
      float [K].

    >>> model = lower_bound(jnp.array([[4.0, 1.0], [1.0, 2.0]]), smoothness=1.0)
    >>> optimal_coefficients(model, step_size=0.5).tolist()
    [0.5]
    """
    return _maximiser(*_parabola(model, step_size))


def optimal_contribution(model: StepModel, *, step_size: float | jax.Array) -> jax.Array:
    """The contribution of the optimal coefficients: Delta* = (1 - L eta)^2 c^2 / (2 L v^2) >= 0.

    For K auxiliary gradients of a lower bound (1 - L eta)^2 / (2 L) c'V^-1 c. Infinite where the
    model has no maximiser.
    """
    slope, curvature = _parabola(model, step_size)
    best = _maximiser(slope, curvature)
    gain = jnp.where(jnp.all(jnp.isfinite(best)), jnp.sum(slope * best) / 2, jnp.inf)
    return jnp.where(_defined(slope, curvature), gain, jnp.nan)


def coefficient_scale(step_size: float | jax.Array, smoothness: float | jax.Array) -> Any:
    """lambda_+ = (1 - L eta) / (L eta): what OCC multiplies c / v^2 by, `scale` of its rule.

    It is 0 at eta = 1 / L, and negative beyond.

    >>> coefficient_scale(0.5, 1.0)
    1.0
    """
    return (1 - smoothness * step_size) / (smoothness * step_size)


# ---------------------------------------------------------------------------------------------
# The main gradient alone, and the ceiling
# ---------------------------------------------------------------------------------------------


def main_improvement(model: StepModel, *, step_size: float | jax.Array) -> jax.Array:
    """What the step changes without auxiliary gradients.

    Of a lower bound: eta (1 - L eta / 2) ||g||^2.
    """
    step_size = jnp.asarray(step_size, model.first_order.dtype)
    slope, curvature = model.first_order[0], model.second_order[0, 0]
    return step_size * slope + step_size * step_size * curvature / 2


def optimal_step_size(model: StepModel) -> jax.Array:
    """The step size at which the main gradient alone gains most: -f_0 / C_00.

    That is 1 / L for a lower bound, ||g||^2 / (L E||g^||^2) with sampled gradients, and
    -||g||^2 / g'Hg to second order; infinite where the model does not bend downwards along g.

    Reference: for sampled gradients, McCandlish et al., An Empirical Model of Large-Batch
    Training, arXiv 1812.06162.
    """
    return _maximiser(model.first_order[:1], model.second_order[:1, :1])[0]


class Ceiling(NamedTuple):
    """The most that auxiliary gradients can add to the guarantee, beside a better step size.

    Attributes:
      auxiliary: Delta*, what they add at their optimal coefficients.
      step_size: what the main gradient alone adds by going from eta to 1 / L.
      cosine_squared: of the angle between g and the span of the auxiliary gradients; <= 1, and
        the first over the second.
    """

    auxiliary: jax.Array
    step_size: jax.Array
    cosine_squared: jax.Array


def ceiling(
    gram: jax.Array, *, step_size: float | jax.Array, smoothness: float | jax.Array
) -> Ceiling:
    """Delta* is cos^2 times what the main gradient alone would gain by a better step size.

        at eta          eta (1 - L eta / 2) ||g||^2
        at 1 / L        ||g||^2 / (2 L)
        difference      (1 - L eta)^2 / (2 L)  ||g||^2
        Delta*          (1 - L eta)^2 / (2 L)  c'V^-1 c,       c'V^-1 c = cos^2 ||g||^2

    The guarantee knows one curvature for all directions, and no noise. So within it nothing beats
    the step size 1 / L, where Delta* is 0. Directions of different curvature (`second_order`) or
    different noise (`sampled_lower_bound`) obey no such ceiling.

    Args:
      gram: float [K+1, K+1], Gram matrix of g and the auxiliary gradients.
      step_size: eta.
      smoothness: L.

    >>> best = ceiling(jnp.array([[4.0, 2.0], [2.0, 4.0]]), step_size=0.5, smoothness=1.0)
    >>> float(best.auxiliary), float(best.step_size), float(best.cosine_squared)
    (0.125, 0.5, 0.25)
    """
    model = lower_bound(gram, smoothness=smoothness)
    main = model.first_order[0]
    explained = jnp.sum(model.first_order[1:] * _maximiser(model.first_order[1:], -gram[1:, 1:]))
    return Ceiling(
        optimal_contribution(model, step_size=step_size),
        main_improvement(model, step_size=optimal_step_size(model))
        - main_improvement(model, step_size=step_size),
        jnp.where(main > 0, explained / jnp.where(main > 0, main, 1), 0),
    )


def ceiling_share(
    cosine_squared: float | jax.Array, step_size: float | jax.Array, smoothness: float | jax.Array
) -> Any:
    """Delta* as a share of what the main gradient alone gains at the same step size.

        cos^2 (1 - L eta)^2 / (L eta (2 - L eta)),      0 < L eta < 2

    Large only because a step far below 1 / L gains little: the same share is to be had from the
    step size with cos^2 = 1.

    >>> round(ceiling_share(1.0, 0.5, 1.0), 4), round(ceiling_share(1.0, 0.01, 1.0), 2)
    (0.3333, 49.25)
    """
    relative = smoothness * step_size
    return cosine_squared * (1 - relative) * (1 - relative) / (relative * (2 - relative))


# ---------------------------------------------------------------------------------------------
# Sampling noise
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Checks on a real objective
# ---------------------------------------------------------------------------------------------


def hvp(objective: Objective, params: Any, direction: Any) -> Any:
    """Hessian-vector product: the derivative of the gradient along a direction.

    Args:
      objective: `params -> scalar`.
      params: pytree.
      direction: a pytree like it.

    Returns:
      H d, a pytree like the parameters; by forward over reverse differentiation.

    >>> hvp(lambda x: jnp.sum(x ** 3), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])).tolist()
    [6.0, 12.0]
    """
    return jax.jvp(jax.grad(objective), (params,), (_like(params, direction),))[1]


class StepCheck(NamedTuple):
    """What a step was predicted to change, and what it changed.

    Attributes:
      first_order: eta <grad J, d>.
      second_order: eta <grad J, d> + (eta^2 / 2) d'Hd.
      realised: J(theta + eta d) - J(theta).
    """

    first_order: jax.Array
    second_order: jax.Array
    realised: jax.Array


def check_step(
    objective: Objective,
    params: Any,
    directions: tuple[Any, ...],
    coefficients: float | jax.Array,
    *,
    step_size: float | jax.Array,
) -> StepCheck:
    """Predicted and realised improvement of the step eta (g + sum_k lambda_k m_k).

    The difference between two calls, with lambda and with 0, is what the auxiliary gradients
    contribute. The predictions use the objective's own derivatives; in float32 the realised one
    is a difference of two rounded values, so leave the smallest steps to float64.

    Args:
      objective: `params -> scalar`, to be increased.
      params: pytree where the step begins.
      directions: g, m_1, .., m_K, pytrees like it: gradients, or an optimizer's directions.
      coefficients: float [K], or a scalar for K = 1.
      step_size: eta.
    """
    step = joint_step(directions, coefficients, step_size=step_size)
    step = _like(params, step)
    gradient, image = jax.jvp(jax.grad(objective), (params,), (step,))
    slope = measures.inner_product(gradient, step)
    after = objective(jax.tree.map(jnp.add, params, step))
    return StepCheck(
        slope, slope + measures.inner_product(step, image) / 2, after - objective(params)
    )


def joint_step(
    directions: tuple[Any, ...],
    coefficients: float | jax.Array,
    *,
    step_size: float | jax.Array,
) -> Any:
    """eta (g + sum_k lambda_k m_k), formed in at least float32.

    Raises:
      ValueError: coefficients of another number than K.
    """
    values = jnp.atleast_1d(jnp.asarray(coefficients))
    if values.shape != (len(directions) - 1,):
        raise ValueError(
            f"joint_step: expected K={len(directions) - 1} coefficients for {len(directions)} "
            f"directions, got shape {values.shape}."
        )

    def leaf(main, *auxiliary):
        dtype = measures.accumulation_dtype(main.dtype)
        total = main.astype(dtype)
        for k, m in enumerate(auxiliary):
            total = total + values[k].astype(dtype) * m.astype(dtype)
        return jnp.asarray(step_size, dtype) * total

    return jax.tree.map(leaf, *directions)


def local_smoothness(objective: Objective, params: Any, step: Any) -> jax.Array:
    """How fast the gradient turns along a step: ||grad J(theta + s) - grad J(theta)|| / ||s||.

    No L below it is valid on the segment; other directions may need a larger one. For s -> 0 it is
    ||H s|| / ||s||. A step of zero gives 0.

    Args:
      objective: `params -> scalar`.
      params: pytree where the step begins.
      step: a pytree like it, the whole step.
    """
    step = _like(params, step)
    before = jax.grad(objective)(params)
    after = jax.grad(objective)(jax.tree.map(jnp.add, params, step))
    change = jax.tree.map(jnp.subtract, after, before)
    length = measures.inner_product(step, step)
    ratio = measures.inner_product(change, change) / jnp.where(length > 0, length, 1)
    return jnp.where(length > 0, jnp.sqrt(ratio), 0)


# ---------------------------------------------------------------------------------------------
# Parabolas and trees
# ---------------------------------------------------------------------------------------------


def _parabola(model: StepModel, step_size: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slope [K] and curvature [K, K] of the improvement in the coefficients, at lambda = 0."""
    step_size = jnp.asarray(step_size, model.first_order.dtype)
    slope = step_size * (model.first_order[1:] + step_size * model.second_order[0, 1:])
    return slope, step_size * step_size * model.second_order[1:, 1:]


def _maximiser(slope: jax.Array, curvature: jax.Array) -> jax.Array:
    """Where slope'x + x'curvature x / 2 is greatest; see `optimal_coefficients`."""
    if slope.shape == (1,):
        bend = curvature[0]
        flat = (slope == 0) & (bend == 0)
        unbounded = jnp.where(flat, 0, jnp.copysign(jnp.inf, slope))
        best = jnp.where(bend < 0, slope / jnp.where(bend < 0, -bend, 1), unbounded)
        return jnp.where(_defined(slope, curvature), best, jnp.nan)
    values, vectors = jnp.linalg.eigh(curvature)
    tolerance = slope.shape[0] * jnp.finfo(slope.dtype).eps * jnp.max(jnp.abs(values))
    bends = values < -tolerance
    along = _einsum("ki,k->i", vectors, slope)
    along = jnp.where(bends, along / jnp.where(bends, -values, 1), 0)
    return jnp.where(jnp.any(values > tolerance), jnp.nan, _einsum("ki,i->k", vectors, along))


def _defined(*arrays: jax.Array) -> jax.Array:
    return ~jnp.any(jnp.stack([jnp.any(jnp.isnan(array)) for array in arrays]))


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """In full precision: accelerators would round the operands otherwise."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def _sum_of_parts(leaf: jax.Array) -> jax.Array:
    return jnp.sum(leaf.astype(measures.accumulation_dtype(leaf.dtype)), axis=0)


def _multiply(diagonal: Any, tree: Any) -> Any:
    def leaf(p, x):
        dtype = measures.accumulation_dtype(p.dtype, x.dtype)
        return p.astype(dtype) * x.astype(dtype)

    return jax.tree.map(leaf, diagonal, tree)


def _like(params: Any, tree: Any) -> Any:
    """The tree in the parameters' dtypes, as differentiation wants its directions."""
    return jax.tree.map(lambda p, x: x.astype(p.dtype), params, tree)
