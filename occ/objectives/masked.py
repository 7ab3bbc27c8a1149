"""Every masked reduction of the project.

Values outside a mask are replaced before they are used, never multiplied by zero: whatever stands
there, NaN included, has no influence on a value or a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant-length")


def masked_sum(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of the values where the mask is True."""
    return jnp.sum(jnp.where(mask, values, 0))


def masked_mean(values: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean of the values where the mask is True; 0 where it is nowhere.

    >>> float(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    count = jnp.sum(mask.astype(values.dtype))
    return masked_sum(values, mask) / jnp.maximum(count, 1)


def _membership(
    segment_ids: Int[Array, "batch time"], sequences_per_row: int
) -> Bool[Array, "batch time sequences"]:
    """Which of a row's sequences 1..S each token belongs to; padding to none."""
    numbers = jnp.arange(1, sequences_per_row + 1, dtype=segment_ids.dtype)
    return segment_ids[:, :, None] == numbers[None, None, :]


def sequence_sum(
    values: Float[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    sequences_per_row: int = 1,
) -> Float[Array, "batch sequences"]:
    """Sum over each of the S sequences that a row may hold.

    >>> sequence_sum(jnp.array([[1.0, 2.0, 4.0, 8.0]]), jnp.array([[1, 1, 2, 0]]), 2).tolist()
    [[3.0, 4.0]]
    """
    member = _membership(segment_ids, sequences_per_row)
    return jnp.sum(jnp.where(member, values[:, :, None], 0), axis=1)


def to_tokens(
    per_sequence: Float[Array, "batch sequences"], segment_ids: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Gives each token its sequence's value; 0 on padding.

    >>> to_tokens(jnp.array([[3.0, 4.0]]), jnp.array([[1, 1, 2, 0]])).tolist()
    [[3.0, 3.0, 4.0, 0.0]]
    """
    member = _membership(segment_ids, per_sequence.shape[1])
    return jnp.sum(jnp.where(member, per_sequence[:, None, :], 0), axis=2)


class Aggregate(NamedTuple):
    """A weighted sum whose two parts add up over micro-batches and devices.

    Attributes:
      total: float [].
      weight: float [], what the total is to be divided by.
    """

    total: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """Total / weight; 0 where nothing was counted."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)


def aggregate(
    values: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    *,
    mode: str = "token-mean",
    sequences_per_row: int = 1,
    constant_length: int | None = None,
) -> Aggregate:
    """Token losses as one number.

        token-mean            sum of all tokens / number of tokens                   (DAPO)
        seq-mean-token-sum    sum of all tokens / number of sequences
        seq-mean-token-mean   sum over sequences of their mean / number of sequences (GRPO, GSPO)
        constant-length       sum of all tokens / (number of sequences x a constant) (Dr.GRPO)

    A sequence counts if at least one of its tokens is in the mask.

    Args:
      values: token losses [B, T].
      mask: bool [B, T], tokens that count.
      segment_ids: int32 [B, T], sequences 1..S in each row, 0 on padding.
      mode: one of `AGGREGATIONS`.
      sequences_per_row: S.
      constant_length: tokens, for "constant-length".

    Raises:
      ValueError: unknown mode, or "constant-length" without a positive length.

    References: Shao et al., DeepSeekMath, arXiv 2402.03300; Yu et al., DAPO, arXiv 2503.14476;
    Liu et al., Understanding R1-Zero-Like Training (Dr.GRPO), arXiv 2503.20783.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregate: mode must be one of {AGGREGATIONS}, got {mode!r}.")
    counted = mask.astype(values.dtype)
    if mode == "token-mean":
        return Aggregate(masked_sum(values, mask), jnp.sum(counted))
    lengths = sequence_sum(counted, segment_ids, sequences_per_row)
    sequences = jnp.sum((lengths > 0).astype(values.dtype))
    if mode == "seq-mean-token-sum":
        return Aggregate(masked_sum(values, mask), sequences)
    if mode == "seq-mean-token-mean":
        sums = sequence_sum(jnp.where(mask, values, 0), segment_ids, sequences_per_row)
        return Aggregate(jnp.sum(sums / jnp.maximum(lengths, 1)), sequences)
    if constant_length is None or constant_length <= 0:
        raise ValueError(
            "aggregate: mode 'constant-length' needs constant_length > 0 tokens, got "
            f"{constant_length}. Dr.GRPO uses the longest response that is allowed."
        )
    return Aggregate(masked_sum(values, mask), sequences * constant_length)
