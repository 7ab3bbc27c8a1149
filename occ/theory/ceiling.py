"""The main gradient alone, and the most that any coefficient can add to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.theory.contribution import maximiser, optimal_contribution
from occ.theory.model import StepModel, lower_bound


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
    return maximiser(model.first_order[:1], model.second_order[:1, :1])[0]


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
    explained = jnp.sum(model.first_order[1:] * maximiser(model.first_order[1:], -gram[1:, 1:]))
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
