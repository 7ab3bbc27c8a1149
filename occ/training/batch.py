"""The minibatch: what one gradient step reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Sequences(NamedTuple):
    """Sequences alone, several in a row if they are packed.

    Attributes:
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], 0 on padding, 1..S for the sequences in a row.
      positions: int32 [B, T], position within the sequence; 0 on padding.
      experts: int [L, k, B, T], that the layers of a mixture of experts take again; None are those
        that their routers choose.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    experts: Any = None


LEADING = {"old_mtp_log_prob": 1, "experts": 2}
"""Dimensions before the rows, of fields of a minibatch that have some."""


class Minibatch(struct.PyTreeNode):
    """Sampled sequences with what the losses need, in token alignment.

    Every per-token array has its value at the index of the token that it is about. B rows, T
    tokens a row, K MTP modules. A row holds one sequence or, packed, several. Arrays are
    JAX's or, as long as they are on the host, numpy's.

    Attributes:
      tokens: int32 [B, T], prompt and response.
      segment_ids: int32 [B, T], 0 on padding, 1..S for the sequences in a row.
      positions: int32 [B, T], position within the sequence; 0 on padding.
      response_mask: bool [B, T], sampled tokens that count in the losses: not prompt, not padding,
        not of a group that dynamic sampling dropped, not of an invalid sample.
      advantages: float32 [B, T], each token's advantage.
      old_log_prob: float32 [B, T], main head, before the first minibatch of this rollout.
      old_mtp_log_prob: float32 [K, B, T], the MTP modules' own, at the same moment.
      rollout_log_prob: float32 [B, T], of the distribution that was sampled from.
      reference_log_prob: float32 [B, T], of the frozen reference policy of the KL term; zeros
        where that term is off.
      experts: int [L, k, B, T], chosen when the tokens were sampled, in the L layers that have
        some; -1 where the router chooses anew. None without routing replay.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    response_mask: Any
    advantages: Any
    old_log_prob: Any
    old_mtp_log_prob: Any
    rollout_log_prob: Any
    reference_log_prob: Any
    experts: Any = None


def split(batch: Minibatch, parts: int) -> list[Minibatch]:
    """Cuts a rollout into minibatches of equal size, in order.

    Raises:
      ValueError: the rows cannot be divided evenly.
    """
    rows = batch.tokens.shape[0]
    if parts < 1 or rows % parts:
        raise ValueError(
            f"split: {rows} sequences cannot be cut into {parts} equal minibatches. Choose "
            "RolloutConfig.prompts as a multiple of RolloutConfig.minibatches."
        )
    size = rows // parts
    return [take_rows(batch, slice(i * size, (i + 1) * size)) for i in range(parts)]


def take_rows(batch: Minibatch, rows: slice) -> Minibatch:
    """Some rows of a minibatch."""
    return batch.replace(
        **{name: value[..., rows, :] for name, value in vars(batch).items() if value is not None}
    )


def check(batch: Minibatch, num_modules: int) -> None:
    """Checks shapes and kinds, which are known before anything runs.

    Raises:
      ValueError: names the first field that does not fit.
    """
    rows_and_time = jnp.shape(batch.tokens)
    if len(rows_and_time) != 2 or 0 in rows_and_time:
        raise ValueError(
            f"Minibatch.tokens: expected [B, T] with at least one token, got {rows_and_time}."
        )
    kinds = {
        "tokens": jnp.integer,
        "segment_ids": jnp.integer,
        "positions": jnp.integer,
        "experts": jnp.integer,
        "response_mask": jnp.bool_,
    }
    for name, value in vars(batch).items():
        if name == "experts" and value is None:
            continue
        shape: tuple[int, ...] = rows_and_time
        if name == "old_mtp_log_prob":
            shape = (num_modules, *rows_and_time)
        elif name == "experts":
            shape = (*jnp.shape(value)[:2], *rows_and_time)
        kind = kinds.get(name, jnp.floating)
        if jnp.shape(value) != shape or not jnp.issubdtype(jnp.result_type(value), kind):
            raise ValueError(
                f"Minibatch.{name}: expected {kind.__name__} {shape} for tokens {rows_and_time} "
                f"and {num_modules} MTP modules, got {jnp.result_type(value)} {jnp.shape(value)}."
            )


def segments_of(prompt_mask: np.ndarray, response_mask: np.ndarray) -> np.ndarray:
    """Segment ids of rows that hold one left-padded prompt and its response, on the host.

    Args:
      prompt_mask: bool [B, P], False on padding.
      response_mask: bool [B, T], False in the P columns of the prompt.

    Returns:
      int32 [B, T], 1 on tokens and 0 on padding.

    >>> segments_of(np.array([[False, True]]), np.array([[False, False, True, False]])).tolist()
    [[0, 1, 1, 0]]
    """
    present = np.array(response_mask)
    present[:, : prompt_mask.shape[1]] |= prompt_mask
    return present.astype(np.int32)


def positions_from_segments(segment_ids: jax.Array) -> jax.Array:
    """Position of every token within its sequence; 0 on padding.

    Args:
      segment_ids: int32 [B, T], each sequence contiguous, 0 on padding.

    >>> positions_from_segments(jnp.array([[0, 1, 1, 2, 2, 2, 0]])).tolist()
    [[0, 0, 1, 0, 1, 2, 0]]
    """
    index = jnp.broadcast_to(
        jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape
    )
    previous = jnp.pad(segment_ids, [(0, 0), (1, 0)], constant_values=-1)[:, :-1]
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return jnp.where(segment_ids > 0, index - start, 0)
