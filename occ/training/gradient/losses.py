"""The RL loss of the main head and the loss of an MTP head, on one minibatch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from occ.objectives import divergences, masked, mtp, policy
from occ.training.batch import Minibatch
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.gradient.stages import TokenScores

CROSS_ENTROPIES = ("ce", "ce_rewarded")


class LossOutput(NamedTuple):
    """What a loss reports beside its value.

    Attributes:
      log_ratio: float [B, T], log-prob minus the old log-prob of its reference, 0 outside the
        mask: evidence for the log-ratio measures.
      mask: bool [B, T], the tokens that count in this loss.
      weight: float [], what the sum of token losses was divided by: how much this minibatch counts
        in a mean over several.
      metrics: scalars by name.
    """

    log_ratio: jax.Array
    mask: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


def rl_loss(
    scores: TokenScores, batch: Minibatch, config: TrainConfig
) -> tuple[Float[Array, ""], LossOutput]:
    """Policy loss, plus the KL term (unless the rewards have it), minus the entropy bonus.

    Args:
      scores: of the main head.
      batch: the minibatch.
      config: which loss, and how many sequences a row has.

    Returns:
      The loss, and what it reports.
    """
    objective, mask = config.objective, batch.response_mask

    def reduce(values):
        return _aggregate(values, mask, batch, config).mean()

    terms = policy.policy_loss(
        scores.log_prob,
        batch.old_log_prob,
        batch.advantages,
        mask,
        batch.segment_ids,
        config=objective.policy,
        sequences_per_row=config.layout.most_in_a_row,
    )
    policy_term = _aggregate(terms.loss * _importance(batch, config), mask, batch, config)
    loss = policy_term.mean()
    if objective.kl_coefficient and not objective.kl_in_reward:
        kl = divergences.kl(
            jnp.where(mask, scores.log_prob, 0),
            jnp.where(mask, batch.reference_log_prob, 0),
            estimator=objective.kl_estimator,
            clamp=objective.kl_clamp,
        )
        loss = loss + objective.kl_coefficient * reduce(kl)
    if objective.entropy_coefficient:
        loss = loss - objective.entropy_coefficient * reduce(scores.entropy)
    log_ratio = jnp.where(mask, scores.log_prob - batch.old_log_prob, 0)
    metrics = {
        "loss/rl": loss,
        "policy/entropy": masked.masked_mean(scores.entropy, mask),
        # k3: non-negative, and unbiased for KL(old || new) on samples of the old policy.
        "policy/kl_to_old": masked.masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        **_clip_fractions(terms, mask, "policy"),
    }
    output = LossOutput(log_ratio, mask, policy_term.weight, metrics)
    return loss, jax.lax.stop_gradient(output)


def mtp_loss(
    scores: TokenScores,
    batch: Minibatch,
    depth: int,
    config: TrainConfig,
    divergence: Float[Array, "batch time"] | None = None,
) -> tuple[Float[Array, ""], LossOutput]:
    """Loss of the MTP head at `depth`: cross-entropy, a divergence, or the policy loss.

    The policy loss has the main head's advantages, clipping and aggregation; its ratio is against
    the old log-prob that `config.mtp.reference` names. A minibatch in which every target is masked
    has loss 0. `divergence` is the token loss where `token_divergence` names one.
    """
    own = config.mtp.reference == "own"
    old = batch.old_mtp_log_prob[depth - 1] if own else batch.old_log_prob
    mask = mtp.aligned_mask(batch.response_mask, batch.segment_ids, depth)
    metrics: dict[str, Any] = {}
    if config.mtp.loss in CROSS_ENTROPIES:
        token_loss = mtp.cross_entropy(scores.log_prob, mask)
        if config.mtp.loss == "ce_rewarded":
            token_loss = jnp.where(batch.advantages > 0, token_loss, 0)
    elif divergence is not None:
        token_loss = jnp.where(mask, divergence, 0)
    else:
        terms = policy.policy_loss(
            scores.log_prob,
            old,
            batch.advantages,
            mask,
            batch.segment_ids,
            config=config.objective.policy,
            sequences_per_row=config.layout.most_in_a_row,
        )
        token_loss = terms.loss * _importance(batch, config)
        metrics = _clip_fractions(terms, mask, "mtp")
    aggregate = _aggregate(token_loss, mask, batch, config)
    loss = aggregate.mean()
    log_ratio = jnp.where(mask, scores.log_prob - old, 0)
    metrics |= {
        "loss/mtp": loss,
        "mtp/cross_entropy": -masked.masked_mean(scores.log_prob, mask),
        "mtp/log_ratio": masked.masked_mean(log_ratio, mask),
    }
    output = LossOutput(log_ratio, mask, aggregate.weight, metrics)
    return loss, jax.lax.stop_gradient(output)


def token_divergence(config: MTPTrainingConfig) -> Callable[..., jax.Array] | None:
    """`(logits, target_logits) -> [B, T]` of a loss that compares with the main head; else None."""
    between: dict[str, Callable[..., jax.Array]] = {
        "distill": mtp.distillation,
        "distill_top_k": functools.partial(mtp.top_k_distillation, k=config.distilled_tokens),
        "total_variation": mtp.total_variation,
    }
    return between.get(config.loss)


def loss_weights(batch: Minibatch, config: TrainConfig) -> Float[Array, "losses"]:
    """What the sum of token losses of each of the K+1 losses is divided by.

    A minibatch's share of a larger one in a loss is its weight over the larger one's.
    """
    nothing = jnp.zeros_like(batch.advantages)
    masks = [
        batch.response_mask,
        *(
            mtp.aligned_mask(batch.response_mask, batch.segment_ids, depth)
            for depth in range(1, config.model.mtp.num_modules + 1)
        ),
    ]
    return jnp.stack([_aggregate(nothing, mask, batch, config).weight for mask in masks])


def merge_outputs(
    parts: Sequence[LossOutput], join: Callable[[Sequence[jax.Array]], jax.Array]
) -> LossOutput:
    """What one loss reported on parts of a minibatch, as if of the whole.

    Losses are means by their own aggregation, all other metrics are means over tokens.

    Args:
      parts: at least one.
      join: makes [B, T] of the whole from those of the parts.
    """
    weights = jnp.stack([part.weight for part in parts])
    tokens = jnp.stack([jnp.sum(part.mask.astype(weights.dtype)) for part in parts])

    def mean(name, values):
        by = weights if name.startswith("loss/") else tokens
        total = jnp.sum(by)
        return jnp.sum(by / jnp.where(total > 0, total, 1) * jnp.stack(values))

    return LossOutput(
        log_ratio=join([part.log_ratio for part in parts]),
        mask=join([part.mask for part in parts]),
        weight=jnp.sum(weights),
        metrics={name: mean(name, [p.metrics[name] for p in parts]) for name in parts[0].metrics},
    )


def _aggregate(values, mask, batch: Minibatch, config: TrainConfig) -> masked.Aggregate:
    return masked.aggregate(
        values,
        mask,
        batch.segment_ids,
        mode=config.objective.aggregation,
        sequences_per_row=config.layout.most_in_a_row,
        constant_length=config.objective.constant_length,
    )


def _importance(batch: Minibatch, config: TrainConfig) -> Any:
    """Truncated importance weight of the old policy against the one that was sampled from."""
    if config.importance_cap is None:
        return jnp.ones((), batch.old_log_prob.dtype)
    mask = batch.response_mask
    return divergences.truncated_importance_weight(
        jnp.where(mask, batch.old_log_prob, 0),
        jnp.where(mask, batch.rollout_log_prob, 0),
        cap=config.importance_cap,
    )


def _clip_fractions(terms: policy.PolicyTerms, mask: jax.Array, name: str) -> dict[str, jax.Array]:
    dtype = terms.loss.dtype
    return {
        f"{name}/clip_{side}": masked.masked_mean(clipped.astype(dtype), mask)
        for side, clipped in (
            ("high", terms.clipped_high),
            ("low", terms.clipped_low),
            ("dual", terms.clipped_dual),
        )
    }
