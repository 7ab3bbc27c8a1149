"""Alignment of multi-token predictions with the tokens that they are about.

The head at depth k (0 is the main head) predicts token i + k + 1 from source position i. Here every
per-token array has its value at the index of the *token*, so that a head's log-prob of token t
stands beside the main head's log-prob of the same token t.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from occ.measures import accumulation_dtype


def predictable(segment_ids: Int[Array, "batch time"], depth: int) -> Bool[Array, "batch time"]:
    """Tokens that the head at this depth can predict: their source is in the same sequence.

    >>> predictable(jnp.array([[0, 1, 1, 1, 2, 2]]), 1).tolist()
    [[False, False, False, True, False, False]]
    """
    _check_depth(depth)
    source = _shift(segment_ids, depth + 1)
    return (segment_ids == source) & (segment_ids > 0)


def aligned_mask(
    response_mask: Bool[Array, "batch time"], segment_ids: Int[Array, "batch time"], depth: int
) -> Bool[Array, "batch time"]:
    """Response tokens that the head at this depth can predict.

    The first k response tokens are predicted from prompt positions, which is legal; what has no
    source in its own sequence drops out.
    """
    return response_mask & predictable(segment_ids, depth)


def labels_at_source(tokens: Int[Array, "batch time"], depth: int) -> Int[Array, "batch time"]:
    """The token that each source position predicts; 0 where that is beyond the end.

    >>> labels_at_source(jnp.array([[5, 6, 7, 8]]), 1).tolist()
    [[7, 8, 0, 0]]
    """
    _check_depth(depth)
    time = tokens.shape[1]
    ahead = min(depth + 1, time)
    return jnp.pad(tokens[:, ahead:], [(0, 0), (0, ahead)])


def align(values_at_source: Shaped[Array, "batch time"], depth: int) -> Shaped[Array, "batch time"]:
    """Moves each value from its source position to the token that it is about; 0 before the first.

    >>> align(jnp.array([[1.0, 2.0, 3.0, 4.0]]), 1).tolist()
    [[0.0, 0.0, 1.0, 2.0]]
    """
    _check_depth(depth)
    return _shift(values_at_source, depth + 1)


def log_prob_at_source(
    logits: Float[Array, "batch time vocab"], labels: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Log-probability of each label, at the position whose logits these are.

    Args:
      logits: [B, T, V].
      labels: int32 [B, T], from `labels_at_source`.

    Returns:
      At least float32 [B, T].
    """
    logits = logits.astype(accumulation_dtype(logits.dtype))
    chosen = jnp.take_along_axis(logits, labels[:, :, None], axis=-1)[:, :, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def cross_entropy(
    log_prob: Float[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Cross-entropy of every token: -log pi, and 0 outside the mask."""
    return -jnp.where(mask, log_prob, 0)


def ahead(values: Shaped[Array, "batch time *rest"], depth: int) -> Any:
    """Moves what stands `depth` positions further on to each position; 0 beyond the end.

    >>> ahead(jnp.array([[1.0, 2.0, 3.0]]), 2).tolist()
    [[3.0, 0.0, 0.0]]
    """
    _check_depth(depth)
    by = min(depth, values.shape[1])
    return jnp.pad(values[:, by:], [(0, 0), (0, by)] + [(0, 0)] * (values.ndim - 2))


def distillation(
    logits: Float[Array, "batch time vocab"], target_logits: Float[Array, "batch time vocab"]
) -> Float[Array, "batch time"]:
    """KL(target || head) of two distributions of the same token.

        sum_v p_target(v) (log p_target(v) - log p_head(v))

    No gradient reaches the target: the main head's distribution, which for module k stands k
    positions further on (`ahead`).

    Args:
      logits: [B, T, V] of the head that learns.
      target_logits: [B, T, V] of the main head, moved to the same positions.

    Returns:
      At least float32 [B, T], at the positions of the logits.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """
    dtype = accumulation_dtype(logits.dtype)
    target_BxTxV = jax.nn.log_softmax(jax.lax.stop_gradient(target_logits).astype(dtype), axis=-1)
    logp_BxTxV = jax.nn.log_softmax(logits.astype(dtype), axis=-1)
    p_BxTxV = jnp.exp(target_BxTxV)
    # Replaced before the product: 0 times -inf, or -inf minus -inf, would be NaN.
    difference_BxTxV = jnp.where(p_BxTxV > 0, target_BxTxV - logp_BxTxV, 0)
    return jnp.sum(p_BxTxV * difference_BxTxV, axis=-1)


def total_variation(
    logits: Float[Array, "batch time vocab"], target_logits: Float[Array, "batch time vocab"]
) -> Float[Array, "batch time"]:
    """Half the distance of two distributions of the same token: what speculation refuses.

        1/2 sum_v |p_head(v) - p_target(v)|

    Rejection sampling keeps a draft with one minus that; with common random numbers it is kept with
    (1 - TV) / (1 + TV) at least.

    Args:
      logits, target_logits: as of `distillation`; no gradient reaches the target.

    Returns:
      At least float32 [B, T], in [0, 1].

    Reference: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv
    2211.17192, whose acceptance it is.
    """
    dtype = accumulation_dtype(logits.dtype)
    target_BxTxV = jax.nn.softmax(jax.lax.stop_gradient(target_logits).astype(dtype), axis=-1)
    p_BxTxV = jax.nn.softmax(logits.astype(dtype), axis=-1)
    return 0.5 * jnp.sum(jnp.abs(p_BxTxV - target_BxTxV), axis=-1)


def top_k_distillation(
    logits: Float[Array, "batch time vocab"],
    target_logits: Float[Array, "batch time vocab"],
    k: int,
) -> Float[Array, "batch time"]:
    """KL(target || head) over the target's k most likely tokens and, as one outcome, all others.

        sum_{v in top k} p(v) log(p(v) / q(v)) + P log(P / Q),    P, Q: of all other tokens

    At most `distillation`, with which it is equal where k is V: tokens that are hardly drafted do
    not pull at a small module.

    Args:
      logits, target_logits: as of `distillation`; no gradient reaches the target.
      k: at least 1.

    Returns:
      At least float32 [B, T].
    """
    dtype = accumulation_dtype(logits.dtype)
    target_BxTxV = jax.nn.log_softmax(jax.lax.stop_gradient(target_logits).astype(dtype), axis=-1)
    logp_BxTxV = jax.nn.log_softmax(logits.astype(dtype), axis=-1)
    _, kept_BxTxk = jax.lax.top_k(target_BxTxV, min(k, target_BxTxV.shape[-1]))
    all_BxTxV = jnp.ones(target_BxTxV.shape, bool)
    others_BxTxV = jnp.put_along_axis(all_BxTxV, kept_BxTxk, False, -1, inplace=False)

    def outcomes(values_BxTxV):
        rest_BxTx1 = jnp.sum(jnp.where(others_BxTxV, jnp.exp(values_BxTxV), 0), -1, keepdims=True)
        chosen_BxTxk = jnp.take_along_axis(values_BxTxV, kept_BxTxk, axis=-1)
        logp_BxTx1 = jnp.log(jnp.maximum(rest_BxTx1, jnp.finfo(dtype).tiny))
        return jnp.concatenate([chosen_BxTxk, logp_BxTx1], axis=-1)

    expected_BxTxo = outcomes(target_BxTxV)  # o = k + 1 outcomes
    p_BxTxo = jnp.exp(expected_BxTxo)
    difference_BxTxo = jnp.where(p_BxTxo > 0, expected_BxTxo - outcomes(logp_BxTxV), 0)
    return jnp.sum(p_BxTxo * difference_BxTxo, axis=-1)


def _shift(values: jax.Array, by: int) -> jax.Array:
    """Moves columns to the right; zeros enter on the left, and nothing wraps around."""
    by = min(by, values.shape[1])
    return jnp.pad(values[:, : values.shape[1] - by], [(0, 0), (by, 0)])


def _check_depth(depth: int) -> None:
    if depth < 0:
        raise ValueError(f"depth must be >= 0 (0 is the main head), got {depth}.")
