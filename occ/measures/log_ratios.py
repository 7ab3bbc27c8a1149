"""Log-ratios: the paper's proxy, and the two forms in its released code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from occ.measures.base import (
    Measure,
    Measurement,
    accumulation_dtype,
    declare_evidence,
    psum,
    register,
    stateless,
)

LOG_RATIO_FORMS = ("paper", "released_masked", "released_unmasked")
LOG_RATIO_EVIDENCE = ("main_log_ratio", "auxiliary_log_ratios", "response_mask")


declare_evidence(*LOG_RATIO_EVIDENCE, trees=False, early=True)


@register("log_ratios")
def log_ratios(form: str = "paper", *, eps: float = 1e-8) -> Measure:
    r"""The log-ratio proxy: how far both policies have moved from the old one, token by token.

    With d_RL = log pi_theta(y_t) - log pi_old(y_t) of the main head, and d_k = log pi_k(y_t) -
    log pi_old(y_t) of the auxiliary head k for the *same* token y_t,

        paper:              c_k = sum_t d_RL d_k,  <m_j, m_k> = sum_t d_j d_k   over response tokens
        released_masked:    ratio_k = mean over response tokens of  d_RL d_1 / (d_1^2 + eps)
        released_unmasked:  the same mean over *all* T columns, padding included

    The first yields a Gram matrix. The other two are what the paper's released code computes (it
    uses the unmasked form); they average ratios instead of dividing sums, take the first head
    alone and use its coefficient for every head, and never have a c or v^2 to report. Its arrays
    are of the response columns: pass those alone, since columns of prompts, where every ratio is
    0, would make the unmasked mean smaller. Released code further multiplies by 0.1 / K: pass that
    as `scale` of the rule.

    Differs from the released code in where a negative coefficient acts: there it multiplies the
    advantages inside the heads' clipped loss, so that it also turns the clip around; here it
    multiplies the gradient of the loss, whose clip stays that of the advantages. Positive
    coefficients are the same.

    Evidence, as keyword arguments of `tx.update`:
      main_log_ratio: float [B, T], d_RL.
      auxiliary_log_ratios: float [K, B, T], d_k; 0 where head k cannot predict the token.
      response_mask: bool [B, T], the sampled response tokens. What stands in masked cells is
        ignored, NaN included; only `released_unmasked` reads them.

    In the first minibatch after a rollout pi_theta = pi_old, so d_RL = 0 and every form gives 0.

    Args:
      form: one of `LOG_RATIO_FORMS`.
      eps: added to d_1^2 in the released forms; >= 0.

    Raises:
      ValueError: unknown form, or negative eps.

    Reference: Wang et al., arXiv 2605.28184 (the proxy, and the code released with it).
    """
    if form not in LOG_RATIO_FORMS:
        raise ValueError(f"log_ratios: form must be one of {LOG_RATIO_FORMS}, got {form!r}.")
    if eps < 0:
        raise ValueError(f"log_ratios: eps must be >= 0, got {eps}.")
    if form == "paper":
        return Measure(
            "log_ratios(paper)",
            LOG_RATIO_EVIDENCE,
            stateless,
            lambda num_auxiliary, dtype: jnp.zeros((num_auxiliary + 1,) * 2, dtype),
            _log_ratio_gram,
            lambda statistics, state, axis_name: (
                Measurement(psum(statistics, axis_name)),
                state,
            ),
        )
    masked = form == "released_masked"
    return Measure(
        f"log_ratios({form})",
        LOG_RATIO_EVIDENCE,
        stateless,
        lambda num_auxiliary, dtype: (jnp.zeros((), dtype), jnp.zeros((), dtype)),
        lambda evidence, num_auxiliary: _ratio_sum(evidence, num_auxiliary, masked, eps),
        _mean_of_ratios,
        yields_ratio=True,
    )


@register("released_masked")
def released_masked(eps: float = 1e-8) -> Measure:
    """`log_ratios("released_masked")`."""
    return log_ratios("released_masked", eps=eps)


@register("released_unmasked")
def released_unmasked(eps: float = 1e-8) -> Measure:
    """`log_ratios("released_unmasked")`."""
    return log_ratios("released_unmasked", eps=eps)


def _log_ratio_arrays(evidence: Mapping[str, Any], num_auxiliary: int) -> tuple[jax.Array, ...]:
    """The three arrays, in at least float32, after their shapes were checked."""
    main, auxiliary, mask = (jnp.asarray(evidence[name]) for name in LOG_RATIO_EVIDENCE)
    if main.shape != mask.shape or auxiliary.shape != (num_auxiliary, *main.shape):
        raise ValueError(
            "log_ratios: expected main_log_ratio [B, T], auxiliary_log_ratios "
            f"[K={num_auxiliary}, B, T] and response_mask [B, T]; got shapes {main.shape}, "
            f"{auxiliary.shape} and {mask.shape}. A single head still needs its leading axis: "
            "pass auxiliary_log_ratios=d_mtp[None]."
        )
    dtype = accumulation_dtype(main.dtype, auxiliary.dtype)
    return main.astype(dtype), auxiliary.astype(dtype), mask.astype(bool)


def _log_ratio_gram(evidence: Mapping[str, Any], num_auxiliary: int) -> jax.Array:
    main, auxiliary, mask = _log_ratio_arrays(evidence, num_auxiliary)
    ratios = jnp.concatenate([main[None], auxiliary])
    ratios = jnp.where(mask[None], ratios, 0)
    # Products and sums, not a matrix product: on accelerators a matrix product would be rounded
    # to bfloat16 or TF32.
    return jnp.sum(ratios[:, None] * ratios[None, :], axis=tuple(range(2, ratios.ndim + 1)))


def _ratio_sum(
    evidence: Mapping[str, Any], num_auxiliary: int, masked: bool, eps: float
) -> tuple[jax.Array, jax.Array]:
    main, auxiliary, mask = _log_ratio_arrays(evidence, num_auxiliary)
    first = auxiliary[0]
    if not masked:
        mask = jnp.ones_like(mask)
    main, first = jnp.where(mask, main, 0), jnp.where(mask, first, 0)
    denominator = first * first + eps
    safe = jnp.where(denominator > 0, denominator, 1)
    return jnp.sum(main * first / safe), jnp.sum(mask.astype(main.dtype))


def _mean_of_ratios(statistics, state, axis_name):
    total, count = psum(statistics, axis_name)
    return Measurement(None, total / jnp.maximum(count, 1)), state
