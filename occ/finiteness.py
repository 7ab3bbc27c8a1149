"""Which gradients, and which of the inner products between them, are finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.measures import Measurement


class Checked(NamedTuple):
    """A measurement without what is not finite.

    Attributes:
      measurement: with zeros for the rows of gradients that are not `ok`.
      main_ok: bool [], whether the main gradient could be measured.
      ok: bool [K], whether each auxiliary gradient could be.
      overflowed: bool [K+1], whose products overflowed though the gradients are finite.
    """

    measurement: Measurement
    main_ok: jax.Array
    ok: jax.Array
    overflowed: jax.Array


def all_finite(tree: Any, axis_name: Any = None) -> jax.Array:
    """Whether every entry of every leaf is finite, on all devices of the axis: bool []."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    finite = jnp.all(jnp.stack(leaves)) if leaves else jnp.ones((), bool)
    if axis_name is None:
        return finite
    return jax.lax.pmin(finite.astype(jnp.int32), axis_name) > 0


def check(
    measurement: Measurement,
    num_auxiliary: int,
    finite: jax.Array | None,
    evidence_finite: jax.Array,
    dtype: Any,
) -> Checked:
    """Empties the rows of gradients that could not be measured.

    Args:
      measurement: of a measure.
      num_auxiliary: K.
      finite: bool [K], which auxiliary gradients are finite; None where all are.
      evidence_finite: bool [], whether all that was measured is known to be finite: what is not
        finite in the measurement has overflowed then.
      dtype: of the state.
    """
    ok = jnp.ones((num_auxiliary,), bool) if finite is None else finite
    if measurement.gram is None:
        return _check_ratio(measurement, ok, dtype)
    gram = measurement.gram.astype(dtype)
    main_ok = jnp.isfinite(gram[0, 0])
    # The whole first row is lost with the main gradient; that is no fault of the others.
    measured = jnp.isfinite(jnp.diagonal(gram)[1:]) & (jnp.isfinite(gram[0, 1:]) | ~main_ok)
    sampled = measurement.sampled_correlation
    if sampled is not None:
        measured &= jnp.isfinite(sampled) | ~main_ok
    lost = jnp.concatenate([~main_ok[None], ok & ~measured])
    ok &= measured
    kept = jnp.concatenate([main_ok[None], ok])
    gram = jnp.where(kept[:, None] & kept[None, :] & jnp.isfinite(gram), gram, 0)
    if sampled is not None:
        sampled = jnp.where(ok & main_ok, sampled, 0).astype(dtype)
    signal = measurement.signal
    if signal is not None:
        signal = jnp.where(kept & main_ok & jnp.isfinite(signal), signal, 0).astype(dtype)
    return Checked(Measurement(gram, None, sampled, signal), main_ok, ok, lost & evidence_finite)


def _check_ratio(measurement: Measurement, ok: jax.Array, dtype: Any) -> Checked:
    assert measurement.ratio is not None
    (num_auxiliary,) = ok.shape
    ratio = jnp.broadcast_to(measurement.ratio, (num_auxiliary,)).astype(dtype)
    ok &= jnp.isfinite(ratio)
    gram = jnp.full((num_auxiliary + 1,) * 2, jnp.nan, dtype)
    none = jnp.zeros((num_auxiliary + 1,), bool)
    return Checked(Measurement(gram, jnp.where(ok, ratio, 0)), jnp.ones((), bool), ok, none)


def condition_number(gram: jax.Array) -> jax.Array:
    """Condition number of V = [<m_j, m_k>]; NaN without a Gram matrix."""
    perturbations = gram[1:, 1:]
    if perturbations.shape[0] == 1:
        return jnp.where(jnp.isnan(perturbations[0, 0]), jnp.nan, jnp.ones((), gram.dtype))
    unknown = jnp.any(jnp.isnan(perturbations))
    values = jnp.linalg.eigvalsh(jnp.where(unknown, 0, perturbations))
    smallest = jnp.maximum(values[0], 0)
    found = jnp.where(smallest > 0, values[-1] / jnp.where(smallest > 0, smallest, 1), jnp.inf)
    return jnp.where(unknown, jnp.nan, found)
