"""Policy losses, token by token: PPO clip with dual clip, GSPO, GMPO, CISPO, SAPO, REINFORCE."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ.checks import validate
from occ.objectives import masked


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Which policy loss.

    Attributes:
      kind: the loss; see `policy_loss`.
      clip_low: the ratio is clipped below at 1 - clip_low; 0 is legal. In GMPO a token's log-ratio
        is, at -clip_low.
      clip_high: and above at 1 + clip_high; larger than clip_low is DAPO's clip-higher. In GMPO the
        log-ratio, at clip_high. SAPO and REINFORCE have no clip.
      dual_clip: of PPO and GSPO, bound on the loss of tokens with negative advantage, as a multiple
        of |A|; > 1, or None for no bound.
      log_ratio_clamp: bound on |log pi - log pi_old| before the exponential (verl: 20); in GSPO and
        GMPO on the sequence's mean (verl: 10, and above only). None (TRL) is no bound but that of
        the floating-point format, at which a ratio still has a finite gradient.
      positive_temperature, negative_temperature: of SAPO's gate, for advantages above 0 and others;
        the larger, the sooner a token's gradient fades as its ratio leaves 1.
    """

    kind: Literal["ppo", "gspo", "gmpo", "cispo", "sapo", "reinforce"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    log_ratio_clamp: float | None = 20.0
    positive_temperature: float = 1.0
    negative_temperature: float = 1.05

    def __post_init__(self):
        validate(self)

    @property
    def by_token(self) -> bool:
        """Whether each token's loss depends on that token's log-prob alone."""
        return self.kind not in ("gspo", "gmpo")


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> PolicyConfig:
    """GSPO with the tiny clip range of its paper, which applies to sequence ratios."""
    return PolicyConfig(kind="gspo", clip_low=clip_low, clip_high=clip_high, dual_clip=None)


def gmpo(clip: float = 0.4) -> PolicyConfig:
    """GMPO with its paper's wide clip range, from exp(-0.4) to exp(0.4), of every token's ratio."""
    return PolicyConfig(kind="gmpo", clip_low=clip, clip_high=clip, dual_clip=None)


class PolicyTerms(NamedTuple):
    """A policy loss before aggregation; every array [B, T].

    Attributes:
      loss: per token, 0 outside the mask.
      clipped_high: tokens whose ratio passed the upper bound, so that they have no gradient (in
        CISPO: a bounded weight).
      clipped_low: the same at the lower bound.
      clipped_dual: tokens at the dual clip.
    """

    loss: jax.Array
    clipped_high: jax.Array
    clipped_low: jax.Array
    clipped_dual: jax.Array


def policy_loss(
    log_prob: Float[Array, "batch time"],
    old_log_prob: Float[Array, "batch time"],
    advantages: Float[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    *,
    config: PolicyConfig,
    sequences_per_row: int = 1,
) -> PolicyTerms:
    r"""The policy loss of every token; to be aggregated by `masked.aggregate`.

    With r = exp(log pi - log pi_old) and advantage A:

        ppo        max(-r A, -clip(r, 1 - low, 1 + high) A), and for A < 0 at most -dual_clip A
        gspo       the same with the sequence's ratio s = exp(mean_t log r_t), whose gradient is
                   spread evenly over the sequence's tokens
        gmpo       -s A with the sequence's ratio s = exp(mean_t c_t) of clipped token log-ratios:
                   c_t = min(log r_t, high) for A > 0, max(log r_t, -low) for A < 0
        cispo      -sg(clip(r, 1 - low, 1 + high)) A log pi: clipping bounds the *weight* of a
                   token's gradient, and removes none. (Other projects call `clip_high` the upper
                   bound itself; here it is always the distance from 1.)
        sapo       -(4 / tau) sigmoid(tau (r - 1)) A, a soft gate with a temperature tau for A > 0
                   and another for the others
        reinforce  -A log pi

    At r = 1 the gradient of each is -A grad log pi. GSPO, GMPO and SAPO average over a sequence's
    tokens first in their papers: aggregation "seq-mean-token-mean".

    Args:
      log_prob: [B, T], in token alignment.
      old_log_prob: [B, T], of the policy that the ratio divides by.
      advantages: [B, T].
      mask: bool [B, T], tokens that count; anything may stand in the others.
      segment_ids: int32 [B, T], for the sequences of GSPO.
      config: which loss.
      sequences_per_row: S.

    References: Schulman et al., PPO, arXiv 1707.06347; Ye et al., Mastering Complex Control in MOBA
    Games (dual clip), arXiv 1912.09729; Yu et al., DAPO, arXiv 2503.14476; Zheng et al., GSPO,
    arXiv 2507.18071; Zhao et al., Geometric-Mean Policy Optimization (GMPO), arXiv 2507.20673;
    MiniMax, MiniMax-M1 (CISPO), arXiv 2506.13585; Gao et al., Soft Adaptive Policy Optimization
    (SAPO), arXiv 2511.20347; Williams, REINFORCE, 1992.
    """
    log_prob = jnp.where(mask, log_prob, 0)
    old_log_prob = jax.lax.stop_gradient(jnp.where(mask, old_log_prob, 0))
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages, 0))
    log_ratio = log_prob - old_log_prob
    never = jnp.zeros_like(mask)
    if config.kind == "reinforce":
        return PolicyTerms(-advantages * log_prob, never, never, never)
    if config.kind == "gmpo":
        above = mask & (advantages > 0) & (log_ratio > config.clip_high)
        below = mask & (advantages < 0) & (log_ratio < -config.clip_low)
        log_ratio = jnp.where(above, config.clip_high, log_ratio)
        log_ratio = jnp.where(below, -config.clip_low, log_ratio)
    if not config.by_token:
        log_ratio = _sequence_log_ratio(log_ratio, mask, segment_ids, sequences_per_row)
    ratio = jnp.exp(_clamped(log_ratio, config.log_ratio_clamp))
    if config.kind == "gmpo":
        return PolicyTerms(-ratio * advantages, above, below, never)
    if config.kind == "sapo":
        return PolicyTerms(-_soft_gate(ratio, advantages, config) * advantages, never, never, never)
    low, high = 1 - config.clip_low, 1 + config.clip_high
    above, below = mask & (ratio > high), mask & (ratio < low)
    clipped = jnp.clip(ratio, low, high)
    if config.kind == "cispo":
        loss = -jax.lax.stop_gradient(clipped) * advantages * log_prob
        return PolicyTerms(loss, above, below, never)
    loss = jnp.maximum(-ratio * advantages, -clipped * advantages)
    dual = never
    if config.dual_clip is not None:
        bound = -config.dual_clip * advantages
        dual = mask & (advantages < 0) & (loss > bound)
        loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    return PolicyTerms(loss, above & (advantages > 0), below & (advantages < 0), dual)


def _clamped(log_ratio: jax.Array, clamp: float | None) -> jax.Array:
    """Within the clamp, and below what overflows: infinity times a clip's zero slope is NaN."""
    largest = math.log(float(jnp.finfo(log_ratio.dtype).max)) - 10
    clamp = math.inf if clamp is None else clamp
    return jnp.clip(log_ratio, -clamp, min(clamp, largest))


def _soft_gate(ratio: jax.Array, advantages: jax.Array, config: PolicyConfig) -> jax.Array:
    """SAPO's gate: of slope 1 at ratio 1, and of ever less away from it."""
    positive, negative = config.positive_temperature, config.negative_temperature
    temperature = jnp.where(advantages > 0, positive, negative).astype(ratio.dtype)
    return 4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1))


def _sequence_log_ratio(log_ratio, mask, segment_ids, sequences_per_row):
    """Each token's copy of its sequence's mean, with gradient 1 on its own log-ratio."""
    counts = masked.sequence_sum(mask.astype(log_ratio.dtype), segment_ids, sequences_per_row)
    sums = masked.sequence_sum(jnp.where(mask, log_ratio, 0), segment_ids, sequences_per_row)
    mean = masked.to_tokens(sums / jnp.maximum(counts, 1), segment_ids)
    value = jax.lax.stop_gradient(mean)
    return jnp.where(mask, value + log_ratio - jax.lax.stop_gradient(log_ratio), 0)
