"""What the last update measured, read from the state of `calibrate` or of a chain around it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from occ.calibration import CalibrationState


def calibration_state(state: Any) -> CalibrationState:
    """The `CalibrationState` inside an optimizer state, however deep a chain holds it.

    Raises:
      ValueError: there is none, or more than one.
    """

    def is_calibration(node):
        return isinstance(node, CalibrationState)

    nodes = jax.tree.leaves(state, is_leaf=is_calibration)
    found = [node for node in nodes if is_calibration(node)]
    if len(found) != 1:
        raise ValueError(
            f"expected one CalibrationState in the optimizer state, found {len(found)}. Pass the "
            "state of a chain with one calibrate() in it, or the CalibrationState itself."
        )
    return found[0]


def correlation(state: Any) -> jax.Array:
    """First-order correlations c_k = <g, m_k> of the last update: float [K]."""
    return calibration_state(state).gram[0, 1:]


def perturbation(state: Any) -> jax.Array:
    """Second-order perturbations v_k^2 = ||m_k||^2 of the last update: float [K]."""
    return jnp.diagonal(calibration_state(state).gram)[1:]


def coefficient(state: Any) -> jax.Array:
    """Coefficients w_k of the last update (lambda_t of the paper): float [K]."""
    return calibration_state(state).weights[1:]


def cosine(state: Any) -> jax.Array:
    """Cosines of the angles between g and each m_k: float [K]; 0 where either is zero."""
    gram = calibration_state(state).gram
    norms = jnp.sqrt(gram[0, 0]) * jnp.sqrt(jnp.diagonal(gram)[1:])
    zero = norms == 0
    return jnp.where(zero, 0, gram[0, 1:] / jnp.where(zero, 1, norms))
