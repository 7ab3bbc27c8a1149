"""Quadratic models of a step: under smoothness, in a preconditioner's norm, by Taylor."""

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

    >>> from occ.theory import contribution
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
    scaled = tuple(scaled_by(preconditioner, gradient) for gradient in gradients)
    slopes = [measures.inner_product(gradients[0], step) for step in scaled]
    if norm == "euclidean":
        gram = measures.gram_matrix(scaled)
    elif norm == "preconditioned":
        roots = jax.tree.map(jnp.sqrt, preconditioner)
        gram = measures.gram_matrix(tuple(scaled_by(roots, gradient) for gradient in gradients))
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
    directions = tuple(as_direction(params, direction) for direction in directions)
    images = [hessian(direction) for direction in directions]
    size = len(directions)
    curvatures = [
        [measures.inner_product(directions[min(i, j)], images[max(i, j)]) for j in range(size)]
        for i in range(size)
    ]
    slopes = [measures.inner_product(gradient, direction) for direction in directions]
    return StepModel(jnp.stack(slopes), jnp.stack([jnp.stack(row) for row in curvatures]))


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
    return jax.jvp(jax.grad(objective), (params,), (as_direction(params, direction),))[1]


def scaled_by(diagonal: Any, tree: Any) -> Any:
    """A diagonal matrix times a tree, in at least float32."""

    def leaf(p, x):
        dtype = measures.accumulation_dtype(p.dtype, x.dtype)
        return p.astype(dtype) * x.astype(dtype)

    return jax.tree.map(leaf, diagonal, tree)


def as_direction(params: Any, tree: Any) -> Any:
    """The tree in the parameters' dtypes, as differentiation wants its directions."""
    return jax.tree.map(lambda p, x: x.astype(p.dtype), params, tree)
