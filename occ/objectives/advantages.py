"""Advantages from the rewards of a group of samples a prompt, and what shapes those rewards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

METHODS = (
    "grpo",
    "grpo-batch-std",
    "dr_grpo",
    "rloo",
    "opo",
    "remax",
    "reinforce++",
    "reinforce++-baseline",
)
"""One advantage a sample."""

TOKEN_METHODS = ("reinforce++-tokens", "reinforce++-baseline-tokens")
"""An advantage a token; see `whiten`, `returns_to_go`."""

WITHOUT_GROUP = ("remax", "reinforce++", "reinforce++-tokens")
"""Methods that do not compare the samples of one prompt, so that one sample a prompt will do."""


def group_advantages(
    rewards: Float[Array, "prompts group"],
    valid: Bool[Array, "prompts group"],
    *,
    method: str = "grpo",
    epsilon: float = 1e-6,
    ddof: int = 1,
    lengths: Int[Array, "prompts group"] | None = None,
    greedy: Float[Array, "prompts"] | None = None,
) -> Float[Array, "prompts group"]:
    """One advantage a sample, from the rewards of its group.

        grpo                   (r - mean) / (std + epsilon), over the prompt's group
        grpo-batch-std         r - mean over the group, divided by the std of all rewards + epsilon
        dr_grpo                r - mean, over the group
        rloo                   r - mean of the *other* samples in the group
        opo                    r - mean over the group, weighted by the responses' lengths
        remax                  r - reward of the most likely response to the prompt
        reinforce++            (r - mean) / (std + epsilon), over the whole batch
        reinforce++-baseline   r - group mean, then divided by the std of that over the whole batch

    TRL's scale_rewards="batch" is "grpo-batch-std", its "none" is "dr_grpo". The last two stand
    over *samples* here, as in the paper; verl has them over tokens, where long responses count
    more: `TOKEN_METHODS`.

    Args:
      rewards: [P, G].
      valid: bool [P, G]; samples whose verifier failed are False, have no influence on the others,
        and get advantage 0.
      method: one of `METHODS`.
      epsilon: added to the standard deviation. The default 1e-6 is verl's; TRL uses 1e-4.
      ddof: 1 is the unbiased standard deviation (verl and TRL), 0 the biased one.
      lengths: [P, G], tokens of each response, for "opo".
      greedy: [P], reward of the most likely response, for "remax".

    Returns:
      [P, G], 0 where invalid, and exactly 0 where no reward differs from those that it is compared
      with, whatever the rounding of their mean. A sample alone in its group gets 0 too, unless its
      method does not compare within groups; in verl it keeps its reward, which has no baseline.

    Raises:
      ValueError: unknown method, an empty batch, groups of one under a method that compares
        within the group, or an argument that the method needs is missing.

    References: Shao et al., DeepSeekMath (GRPO), arXiv 2402.03300, section 4.1; Liu et al., Part I:
    Tricks or Traps (std of the batch), arXiv 2508.08221; Liu et al. (Dr.GRPO), arXiv 2503.20783;
    Ahmadian et al., Back to Basics (RLOO), arXiv 2402.14740; Hao et al., On-Policy RL with Optimal
    Reward Baseline (OPO), arXiv 2505.23585; Li et al., ReMax, arXiv 2310.10505; Hu et al.,
    REINFORCE++, arXiv 2501.03262.
    """
    _check(rewards, method, lengths, greedy)
    rewards = jnp.where(valid, rewards, 0)
    counted = valid if method in WITHOUT_GROUP else _comparable(rewards, valid)
    if method == "reinforce++":
        counted = valid & (_spread(rewards, valid, axis=None) > 0)
    centred = rewards - _baseline(rewards, valid, method, lengths, greedy)
    centred = jnp.where(counted, centred, 0)
    if method == "grpo":
        centred = centred / (_std(rewards, valid, ddof, axis=1) + epsilon)
    elif method in ("grpo-batch-std", "reinforce++"):
        centred = centred / (_std(rewards, valid, ddof, axis=None) + epsilon)
    elif method == "reinforce++-baseline":
        centred = centred / (_std(centred, valid, ddof, axis=None) + epsilon)
    return centred


def _check(rewards, method: str, lengths, greedy) -> None:
    if method not in METHODS:
        raise ValueError(f"group_advantages: method must be one of {METHODS}, got {method!r}.")
    prompts, group = rewards.shape
    if prompts == 0 or group == 0:
        raise ValueError(
            f"group_advantages: expected rewards [prompts, group] with at least one of each, got "
            f"shape {rewards.shape}."
        )
    if group == 1 and method not in WITHOUT_GROUP:
        raise ValueError(
            f"group_advantages: method {method!r} compares the samples of one prompt, and a group "
            "of one has nothing to compare. Sample at least 2 responses a prompt, or use "
            f"another method: {', '.join(WITHOUT_GROUP)}."
        )
    for needed, argument, given in (("opo", "lengths", lengths), ("remax", "greedy", greedy)):
        if method == needed and given is None:
            raise ValueError(f"group_advantages: method {method!r} needs {argument}=.")


def _baseline(rewards, valid, method: str, lengths, greedy) -> jax.Array:
    """What is taken from each reward, [P, G] or broadcast to it."""
    if method == "reinforce++":
        return _mean(rewards, valid, axis=None)
    if method == "remax":
        return greedy[:, None].astype(rewards.dtype)
    weights = valid.astype(rewards.dtype)
    if method == "rloo":
        others = jnp.sum(weights, axis=1, keepdims=True) - weights
        total = jnp.sum(rewards, axis=1, keepdims=True) - rewards
        return total / jnp.maximum(others, 1)
    if method == "opo":
        weights = weights * lengths.astype(rewards.dtype)
    total = jnp.sum(weights * rewards, axis=1, keepdims=True)
    weight = jnp.sum(weights, axis=1, keepdims=True)
    return total / jnp.where(weight > 0, weight, 1)


def _comparable(rewards: jax.Array, valid: jax.Array) -> jax.Array:
    """Valid samples whose group has rewards that differ."""
    return valid & (_spread(rewards, valid, axis=1) > 0)


def _spread(rewards: jax.Array, valid: jax.Array, axis: int | None) -> jax.Array:
    """Largest valid reward minus the smallest; not positive where fewer than two are valid."""
    highest = jnp.max(jnp.where(valid, rewards, -jnp.inf), axis=axis, keepdims=True)
    return highest - jnp.min(jnp.where(valid, rewards, jnp.inf), axis=axis, keepdims=True)


def _mean(values: jax.Array, valid: jax.Array, axis: int | None) -> jax.Array:
    count = jnp.sum(valid.astype(values.dtype), axis=axis, keepdims=True)
    return jnp.sum(jnp.where(valid, values, 0), axis=axis, keepdims=True) / jnp.maximum(count, 1)


def _std(values: jax.Array, valid: jax.Array, ddof: int, axis: int | None) -> jax.Array:
    deviation = jnp.where(valid, values - _mean(values, valid, axis), 0)
    count = jnp.sum(valid.astype(values.dtype), axis=axis, keepdims=True)
    total = jnp.sum(deviation**2, axis=axis, keepdims=True)
    return jnp.sqrt(total / jnp.maximum(count - ddof, 1))


def optimal_token_baseline(
    returns: Float[Array, "prompts group time"],
    energy: Float[Array, "prompts group time"],
    mask: Bool[Array, "prompts group time"],
) -> Float[Array, "prompts group time"]:
    """The baseline of least variance at each token, from the samples of its prompt.

        b_t = sum_i W_i,t R_i,t / sum_i W_i,t,    W_i,t = sum_{s <= t} energy_i,s

    over the samples i that have a token t. A sample counts by how much it has moved the parameters
    so far; with equal energies it is the mean over the group.

    Args:
      returns: [P, G, T], of each token: the reward of its sample, where that is all there is.
        What is affine in the rewards of a group will do as well.
      energy: [P, G, T], squared norm of each token's gradient (`divergences.logit_energy`).
      mask: bool [P, G, T], sampled tokens.

    Returns:
      [P, G, T], the same for all samples of a prompt; 0 where none of them has a token.

    Reference: Li et al., The Optimal Token Baseline, arXiv 2602.07078.
    """
    weights = jnp.where(mask, jnp.cumsum(jnp.where(mask, energy, 0), axis=2), 0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    weighted = jnp.sum(weights * jnp.where(mask, returns, 0), axis=1, keepdims=True)
    baseline = weighted / jnp.where(total > 0, total, 1)
    return jnp.broadcast_to(baseline, returns.shape)


def whiten(
    values: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    *,
    epsilon: float = 1e-6,
    ddof: int = 1,
) -> Float[Array, "batch time"]:
    """(x - mean) / (std + epsilon) over the tokens of the mask; exactly 0 if they are all the same.

    What "reinforce++-tokens" does to `returns_to_go`, and "reinforce++-baseline-tokens" to what
    "dr_grpo" gives each token of a sample (verl's `masked_whiten`).

    >>> values, mask = jnp.array([[1.0, 3.0, jnp.nan]]), jnp.array([[True, True, False]])
    >>> whiten(values, mask, epsilon=0.0, ddof=0).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    counted = mask & (_spread(values, mask, axis=None) > 0)
    scaled = (values - _mean(values, mask, None)) / (_std(values, mask, ddof, None) + epsilon)
    return jnp.where(counted, scaled, 0)


def returns_to_go(
    rewards: Float[Array, "batch time"], mask: Bool[Array, "batch time"], *, gamma: float = 1.0
) -> Float[Array, "batch time"]:
    """Each token's own reward and all later ones of its row, discounted; 0 outside the mask.

        G_t = r_t + gamma G_{t+1}

    Args:
      rewards: [B, T], of tokens.
      mask: bool [B, T], the tokens of a row's one response.
      gamma: discount a token.

    Reference: Hu et al., REINFORCE++, arXiv 2501.03262.

    >>> returns_to_go(jnp.array([[0.0, 1.0, 8.0]]), jnp.array([[1, 1, 1]]) > 0, gamma=0.5).tolist()
    [[2.5, 5.0, 8.0]]
    """

    def step(later, token):
        reward, counts = token
        value = jnp.where(counts, reward + gamma * later, later)
        return value, jnp.where(counts, value, 0)

    columns = (jnp.where(mask, rewards, 0).T, mask.T)
    _, values = jax.lax.scan(step, jnp.zeros_like(rewards[:, 0]), columns, reverse=True)
    return values.T


def informative_groups(
    rewards: Float[Array, "prompts group"], valid: Bool[Array, "prompts group"]
) -> Bool[Array, "prompts"]:
    """Groups that dynamic sampling keeps: valid rewards that differ from each other.

    The rewards are those of the verifier: with a length penalty in them, a group whose answers are
    all right or all wrong would pass for one that has something to say.

    >>> rewards = jnp.array([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    >>> valid = jnp.array([[True, True], [True, True], [True, False]])
    >>> informative_groups(rewards, valid).tolist()
    [True, False, False]

    Reference: Yu et al., DAPO, arXiv 2503.14476, section 3.2.
    """
    return _spread(rewards, valid, axis=1)[:, 0] > 0


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
