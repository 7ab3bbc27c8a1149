"""Advantages from the rewards of a group of samples a prompt, and what shapes those rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

METHODS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline")


def group_advantages(
    rewards: Float[Array, "prompts group"],
    valid: Bool[Array, "prompts group"],
    *,
    method: str = "grpo",
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> Float[Array, "prompts group"]:
    """One advantage a sample, from the rewards of its group.

        grpo                   (r - mean) / (std + epsilon), over the prompt's group
        dr_grpo                r - mean, over the group
        rloo                   r - mean of the *other* samples in the group
        reinforce++            (r - mean) / (std + epsilon), over the whole batch
        reinforce++-baseline   r - group mean, then divided by the std over the whole batch

    Args:
      rewards: [P, G].
      valid: bool [P, G]; samples whose verifier failed are False, have no influence on the others,
        and get advantage 0.
      method: one of `METHODS`.
      epsilon: added to the standard deviation. The default 1e-6 is verl's; TRL uses 1e-4.
      ddof: 1 is the unbiased standard deviation (verl and TRL), 0 the biased one.

    Returns:
      [P, G], 0 where invalid. A group with fewer than two valid samples gets 0 (except under
      "reinforce++", which compares across groups).

    Raises:
      ValueError: unknown method, an empty batch, or groups of one under a method that compares
        within the group.

    References: Shao et al., DeepSeekMath (GRPO), arXiv 2402.03300, section 4.1; Liu et al.
    (Dr.GRPO), arXiv 2503.20783; Ahmadian et al., Back to Basics (RLOO), arXiv 2402.14740; Hu et
    al., REINFORCE++, arXiv 2501.03262.
    """
    if method not in METHODS:
        raise ValueError(f"group_advantages: method must be one of {METHODS}, got {method!r}.")
    prompts, group = rewards.shape
    if prompts == 0 or group == 0:
        raise ValueError(
            f"group_advantages: expected rewards [prompts, group] with at least one of each, got "
            f"shape {rewards.shape}."
        )
    if group == 1 and method != "reinforce++":
        raise ValueError(
            f"group_advantages: method {method!r} compares the samples of one prompt, and a group "
            "of one has nothing to compare. Sample at least 2 responses a prompt, or use "
            "method='reinforce++'."
        )
    rewards = jnp.where(valid, rewards, 0)
    if method == "reinforce++":
        centred = rewards - _mean(rewards, valid, axis=None)
        scaled = centred / (_std(rewards, valid, ddof, axis=None) + epsilon)
        return jnp.where(valid, scaled, 0)
    count = jnp.sum(valid.astype(rewards.dtype), axis=1, keepdims=True)
    centred = rewards - _mean(rewards, valid, axis=1)
    if method == "grpo":
        centred = centred / (_std(rewards, valid, ddof, axis=1) + epsilon)
    elif method == "rloo":
        # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        centred = centred * count / jnp.maximum(count - 1, 1)
    elif method == "reinforce++-baseline":
        centred = jnp.where(valid, centred, 0)
        centred = centred / (_std(centred, valid, ddof, axis=None) + epsilon)
    return jnp.where(valid & (count >= 2), centred, 0)


def _mean(values: jax.Array, valid: jax.Array, axis: int | None) -> jax.Array:
    count = jnp.sum(valid.astype(values.dtype), axis=axis, keepdims=True)
    return jnp.sum(jnp.where(valid, values, 0), axis=axis, keepdims=True) / jnp.maximum(count, 1)


def _std(values: jax.Array, valid: jax.Array, ddof: int, axis: int | None) -> jax.Array:
    deviation = jnp.where(valid, values - _mean(values, valid, axis), 0)
    count = jnp.sum(valid.astype(values.dtype), axis=axis, keepdims=True)
    total = jnp.sum(deviation**2, axis=axis, keepdims=True)
    return jnp.sqrt(total / jnp.maximum(count - ddof, 1))


def informative_groups(
    rewards: Float[Array, "prompts group"], valid: Bool[Array, "prompts group"]
) -> Bool[Array, "prompts"]:
    """Groups that dynamic sampling keeps: valid rewards that differ from each other.

    >>> rewards = jnp.array([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    >>> valid = jnp.array([[True, True], [True, True], [True, False]])
    >>> informative_groups(rewards, valid).tolist()
    [True, False, False]

    Reference: Yu et al., DAPO, arXiv 2503.14476, section 3.2.
    """
    highest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=1)
    return highest > lowest


def overlong_penalty(
    lengths: Int[Array, "*shape"],
    *,
    max_length: int,
    buffer: int,
    penalty: float = 1.0,
    floor: float | None = None,
) -> Float[Array, "*shape"]:
    """What is added to the reward of a long response: 0 down to -penalty, linearly.

        -penalty * max(0, length - (max_length - buffer)) / buffer

    Args:
      lengths: int, tokens of each response.
      max_length: tokens, the longest response allowed.
      buffer: tokens before it over which the penalty grows; > 0.
      penalty: its size at `max_length`.
      floor: lowest value (TRL: -1); None is none (verl).

    Raises:
      ValueError: buffer outside 1..max_length.

    Reference: Yu et al., DAPO, arXiv 2503.14476, equation 13.

    >>> overlong_penalty(jnp.array([4, 8, 10]), max_length=10, buffer=4).tolist()
    [0.0, -0.5, -1.0]
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"overlong_penalty: buffer must be between 1 and max_length={max_length} tokens, got "
            f"{buffer}. For no penalty, leave the call out."
        )
    excess = jnp.maximum(lengths - (max_length - buffer), 0).astype(jnp.float32)
    value = 0.0 - penalty * excess / buffer
    return value if floor is None else jnp.maximum(value, floor)
