"""What the last update measured, read from the state of `calibrate` or of a chain around it.

Leading axes of a state, of seeds under `jax.vmap` or of steps from `jax.lax.scan`, are kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from occ.calibration import CalibrationState
from occ.grouped import GroupedState
from occ.rules import PAPER_EPS


def calibration_state(state: Any) -> CalibrationState:
    """The `CalibrationState` inside an optimizer state, however deep a chain holds it.

    Of a state of `calibrate_groups` it is that of all groups together.

    Raises:
      ValueError: there is none, or more than one.
    """

    def is_calibration(node):
        return isinstance(node, CalibrationState | GroupedState)

    nodes = jax.tree.leaves(state, is_leaf=is_calibration)
    found = [node for node in nodes if is_calibration(node)]
    if len(found) != 1:
        raise ValueError(
            f"expected one CalibrationState in the optimizer state, found {len(found)}. Pass the "
            "state of a chain with one calibrate() in it, or the CalibrationState itself."
        )
    (state,) = found
    return state.total if isinstance(state, GroupedState) else state


def correlation(state: Any) -> jax.Array:
    """First-order correlations c_k = <g, m_k> of the last update: float [.., K]."""
    return calibration_state(state).gram[..., 0, 1:]


def perturbation(state: Any) -> jax.Array:
    """Second-order perturbations v_k^2 = ||m_k||^2 of the last update: float [.., K]."""
    return _squared_norms(calibration_state(state).gram)[..., 1:]


def coefficient(state: Any) -> jax.Array:
    """Coefficients w_k of the last update (lambda_t of the paper): float [.., K]."""
    return calibration_state(state).weights[..., 1:]


def cosine(state: Any) -> jax.Array:
    """Cosines of the angles between g and each m_k: float [.., K]; 0 where either is zero."""
    gram = calibration_state(state).gram
    norms = jnp.sqrt(_squared_norms(gram))
    product = norms[..., :1] * norms[..., 1:]
    zero = product == 0
    return jnp.where(zero, 0, gram[..., 0, 1:] / jnp.where(zero, 1, product))


def damping(state: Any, eps: float = PAPER_EPS) -> jax.Array:
    """The share of the coefficient that an absolute eps takes away: float [.., K], in [0, 1].

        w = scale * c / (v^2 + eps) = (1 - damping) * scale * c / v^2

    `rules.optimal(eps=1e-8)`, the paper's form, loses half of the coefficient at ||m|| = 1e-4. A
    compiled update cannot warn of that; watch this value, and use eps=0 where it is not small.

    Args:
      state: as the other diagnostics take it, after an update.
      eps: the rule's.
    """
    squared = perturbation(state)
    return jnp.where(squared + eps > 0, eps / jnp.where(squared + eps > 0, squared + eps, 1), 0)


def _squared_norms(gram: jax.Array) -> jax.Array:
    return jnp.diagonal(gram, axis1=-2, axis2=-1)
