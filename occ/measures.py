"""Measures: evidence about the gradients -> their Gram matrix.

A main gradient g and K auxiliary gradients m_1..m_K have one Gram matrix of shape [K+1, K+1]:

    row 0:       <g, g>, <g, m_1>, ..., <g, m_K>      (the first-order correlations c_k)
    rows 1..K:   <m_j, m_k>                           (the second-order perturbations v_k^2
                                                       on the diagonal)

A measure turns evidence into that matrix. It does so in two stages, so that a coefficient does not
depend on how a minibatch was cut up: `reduce` makes statistics that *add up* over micro-batches and
devices, and `update` turns the sum of them, once, into a `Measurement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Statistics = Any
MeasureState = Any


class Measurement(NamedTuple):
    """What a measure knows after an update.

    Attributes:
      gram: float [K+1, K+1], the Gram matrix; None from an estimator that never had one, which
        `calibrate` fills with NaN before a rule sees it.
      ratio: None, or float [] or [K]: c_k / v_k^2 as estimated by a measure that yields it
        directly, one for all heads or one a head.
      sampled_correlation: None, or float [K]: <g, m_k> of the gradients that the step really
        takes, where the matrix holds an estimate of the expected gradients' correlation that is
        free of their common noise (`cross_fitted`).
    """

    gram: Any
    ratio: jax.Array | None = None
    sampled_correlation: jax.Array | None = None


class Measure(NamedTuple):
    """An estimator of the Gram matrix.

    Attributes:
      name: for messages and logs.
      evidence: keyword arguments of `tx.update` that it reads. `"gradients"` stands for the
        gradients themselves, which `calibrate` always has; every other name is the caller's to
        pass.
      init: `(num_auxiliary) -> state`.
      zero: `(num_auxiliary, dtype) -> statistics` of an empty minibatch; None where the statistics
        are the gradients, which have accumulators of their own.
      reduce: `(evidence, num_auxiliary) -> statistics`, additive over micro-batches.
      update: `(statistics, state, axis_name) -> (Measurement, state)`.
      yields_ratio: the measurement holds a ratio and no Gram matrix.
    """

    name: str
    evidence: tuple[str, ...]
    init: Callable[[int], MeasureState]
    zero: Callable[[int, Any], Statistics] | None
    reduce: Callable[[Mapping[str, Any], int], Statistics]
    update: Callable[[Statistics, MeasureState, Any], tuple[Measurement, MeasureState]]
    yields_ratio: bool = False


def accumulation_dtype(*dtypes: Any) -> Any:
    """The dtype in which gradients of these dtypes are summed: at least float32.

    Works under strict dtype promotion too, where mixing dtypes by accident is an error.

    >>> accumulation_dtype(jnp.bfloat16)
    dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def _stateless(num_auxiliary: int) -> MeasureState:
    del num_auxiliary
    return ()


def _psum(values: Any, axis_name: Any) -> Any:
    return values if axis_name is None else jax.lax.psum(values, axis_name)


# ---------------------------------------------------------------------------------------------
# The gradients themselves
# ---------------------------------------------------------------------------------------------


def inner_product(left: Any, right: Any) -> jax.Array:
    """Inner product of two pytrees of gradients, accumulated in at least float32.

    Leaf by leaf, without raveling: of a leaf that is sharded over devices each device sums its own
    part, and one scalar is communicated.

    Args:
      left: pytree of arrays.
      right: pytree of the same structure and shapes.

    Returns:
      Scalar, sum over all leaves of the elementwise product; the real part for complex leaves.

    >>> float(inner_product({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}))
    11.0
    """
    products = [
        _leaf_inner_product(a, b)
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    ]
    dtype = accumulation_dtype(*products)
    return sum((product.astype(dtype) for product in products), jnp.zeros((), dtype))


def _leaf_inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(a.dtype, b.dtype)
    return jnp.real(jnp.sum(jnp.conj(a.astype(dtype)) * b.astype(dtype)))


def gram_matrix(gradients: tuple[Any, ...]) -> jax.Array:
    """Gram matrix of a tuple of K+1 gradient pytrees, the main one first.

    Args:
      gradients: K+1 pytrees of the same structure.

    Returns:
      float [K+1, K+1], symmetric; (K+1)(K+2)/2 inner products are computed.

    >>> g, m = jnp.array([1.0, 0.0]), jnp.array([2.0, 1.0])
    >>> gram_matrix((g, m)).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    size = len(gradients)
    upper = {
        (i, j): inner_product(gradients[i], gradients[j])
        for i in range(size)
        for j in range(i, size)
    }
    rows = [jnp.stack([upper[min(i, j), max(i, j)] for j in range(size)]) for i in range(size)]
    return jnp.stack(rows)


def gradients() -> Measure:
    """The exact Gram matrix of the gradients that `tx.update` is given.

    c_k = <g, m_k> and <m_j, m_k> over the shared leaves. The evidence is there already: `updates`
    is g and `auxiliary` holds the m_k.

    Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
    Optimal Coefficient Calibration, arXiv 2605.28184: the first-order correlation and the
    second-order perturbation of its decomposition.
    """

    def reduce(evidence, num_auxiliary):
        del num_auxiliary
        return evidence["gradients"]

    def update(statistics, state, axis_name):
        return Measurement(_psum(gram_matrix(statistics), axis_name)), state

    return Measure("gradients", ("gradients",), _stateless, None, reduce, update)


# ---------------------------------------------------------------------------------------------
# Log-ratios: the paper's proxy, and the two forms in its released code
# ---------------------------------------------------------------------------------------------

LOG_RATIO_FORMS = ("paper", "released_masked", "released_unmasked")
LOG_RATIO_EVIDENCE = ("main_log_ratio", "auxiliary_log_ratios", "response_mask")


def log_ratios(form: str = "paper", *, eps: float = 1e-8) -> Measure:
    r"""The log-ratio proxy: how far both policies have moved from the old one, token by token.

    With d_RL = log pi_theta(y_t) - log pi_old(y_t) of the main head, and d_k = log pi_k(y_t) -
    log pi_old(y_t) of the auxiliary head k for the *same* token y_t,

        paper:              c_k = sum_t d_RL d_k,  <m_j, m_k> = sum_t d_j d_k   over response tokens
        released_masked:    ratio_k = mean over response tokens of  d_RL d_1 / (d_1^2 + eps)
        released_unmasked:  the same mean over *all* positions, padding included

    The first yields a Gram matrix. The other two are what the paper's released code computes (it
    uses the unmasked form); they average ratios instead of dividing sums, take the first head
    alone and use its coefficient for every head, and never have a c or v^2 to report. Released
    code further multiplies by 0.1 / K: pass that as `scale` of the rule.

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
            _stateless,
            lambda num_auxiliary, dtype: jnp.zeros((num_auxiliary + 1,) * 2, dtype),
            _log_ratio_gram,
            lambda statistics, state, axis_name: (
                Measurement(_psum(statistics, axis_name)),
                state,
            ),
        )
    masked = form == "released_masked"
    return Measure(
        f"log_ratios({form})",
        LOG_RATIO_EVIDENCE,
        _stateless,
        lambda num_auxiliary, dtype: (jnp.zeros((), dtype), jnp.zeros((), dtype)),
        lambda evidence, num_auxiliary: _ratio_sum(evidence, num_auxiliary, masked, eps),
        _mean_of_ratios,
        yields_ratio=True,
    )


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
    total, count = _psum(statistics, axis_name)
    return Measurement(None, total / jnp.maximum(count, 1)), state


KNOWN_EVIDENCE = frozenset(LOG_RATIO_EVIDENCE)
"""Every evidence name that a measure here reads, besides the gradients."""
