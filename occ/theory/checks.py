"""Predicted and realised changes of a real objective."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ import measures
from occ.theory.model import Objective, as_direction


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
    step = as_direction(params, step)
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
    step = as_direction(params, step)
    before = jax.grad(objective)(params)
    after = jax.grad(objective)(jax.tree.map(jnp.add, params, step))
    change = jax.tree.map(jnp.subtract, after, before)
    length = measures.inner_product(step, step)
    ratio = measures.inner_product(change, change) / jnp.where(length > 0, length, 1)
    return jnp.where(length > 0, jnp.sqrt(ratio), 0)
