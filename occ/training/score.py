"""Log-probs of given sequences under every head: the old policy's, the reference's, an export's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from occ.models.policy import Policy
from occ.training.batch import Sequences, positions_from_segments
from occ.training.gradient.stages import Stages


class Scores(NamedTuple):
    """Forward pass over sampled sequences, in token alignment; prompts are not scored.

    Attributes:
      log_prob: float [B, T], main head.
      mtp_log_prob: float [K, B, T], MTP modules.
      mtp_agrees: bool [K, B, T], the module's most likely token is the token that stands there.
    """

    log_prob: jax.Array
    mtp_log_prob: jax.Array
    mtp_agrees: jax.Array


def score_sequences(
    policy: Policy,
    tokens: jax.Array,
    segment_ids: jax.Array,
    experts: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    logits_chunk: int = 0,
    prompt_columns: int = 0,
) -> Scores:
    """Log-probs of given sequences under every head.

    Args:
      policy: the model.
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], 0 on padding, 1..S for the sequences in a row.
      experts: int [L, k, B, T], that the trunk takes again; None are its routers' own choice.
      temperature: logits are divided by it.
      logits_chunk: columns whose logits exist at one time; 0 is all of them.
      prompt_columns: leading columns that are not scored.
    """
    batch = Sequences(tokens, segment_ids, positions_from_segments(segment_ids), experts)
    stages = Stages(policy, batch, temperature, logits_chunk, prompt_columns).with_frozen_head()
    main, *heads = stages.score(policy.params)
    if not heads:
        nothing = jnp.zeros((0, *tokens.shape), main.log_prob.dtype)
        return Scores(main.log_prob, nothing, nothing > 0)
    agrees = [
        (head.greedy == tokens) & stages.scored(depth) for depth, head in enumerate(heads, start=1)
    ]
    return Scores(main.log_prob, jnp.stack([head.log_prob for head in heads]), jnp.stack(agrees))
