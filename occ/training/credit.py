"""Which advantage each token of a rollout gets, as the objective says."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from occ.objectives import advantages, divergences
from occ.training.config import ObjectiveConfig


def token_advantages(
    objective: ObjectiveConfig,
    rewards: Float[Array, "prompts group"],
    valid: Bool[Array, "prompts group"],
    response_mask: Bool[Array, "batch time"],
    *,
    old_log_prob: Float[Array, "batch time"],
    reference_log_prob: Float[Array, "batch time"],
    greedy: Float[Array, "prompts"] | None = None,
) -> Float[Array, "batch time"]:
    """Advantages of sampled tokens, one response a row, the samples of a prompt together.

    With the KL term in the reward, r_t = -beta kl_t at each token and the verifier's reward at the
    last one; a sample's reward is the sum of its tokens'.

    Args:
      objective: `advantage`, `gamma` and the KL term.
      rewards: [P, G], of the verifier, length penalty included; B = P G.
      valid: bool [P, G], samples that could be judged.
      response_mask: bool [B, T], sampled tokens.
      old_log_prob: [B, T], of the policy that sampled.
      reference_log_prob: [B, T], of the frozen one; read with `kl_in_reward` alone.
      greedy: [P], reward of the most likely response, for "remax".

    Returns:
      [B, T]; 0 outside the responses and where invalid.
    """
    mask = response_mask & valid.reshape(-1, 1)
    penalty = jnp.zeros(mask.shape, rewards.dtype)
    if objective.kl_in_reward:
        penalty = objective.kl_coefficient * divergences.kl(
            jnp.where(mask, old_log_prob, 0),
            jnp.where(mask, reference_log_prob, 0),
            estimator=objective.kl_estimator,
            clamp=objective.kl_clamp,
        )
    if objective.advantage == "reinforce++-tokens":
        ends = mask & ~jnp.pad(mask[:, 1:], [(0, 0), (0, 1)])
        by_token = jnp.where(ends, rewards.reshape(-1, 1), 0) - penalty
        returns = advantages.returns_to_go(by_token, mask, gamma=objective.gamma)
        return advantages.whiten(returns, mask)
    over_tokens = objective.advantage == "reinforce++-baseline-tokens"
    per_sample = advantages.group_advantages(
        rewards - jnp.sum(penalty, axis=1).reshape(rewards.shape),
        valid,
        method="dr_grpo" if over_tokens else objective.advantage,
        lengths=jnp.sum(response_mask.astype(jnp.int32), axis=1).reshape(rewards.shape),
        greedy=greedy,
    )
    spread = jnp.where(mask, per_sample.reshape(-1, 1), 0)
    return advantages.whiten(spread, mask) if over_tokens else spread
