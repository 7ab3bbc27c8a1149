"""The RL loss of the main head and the loss of an MTP head, on one minibatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from occ.objectives import divergences, masked, mtp, policy
from occ.training.batch import Minibatch
from occ.training.config import MTPTrainingConfig, ObjectiveConfig
from occ.training.gradient.stages import TokenScores


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
    scores: TokenScores, batch: Minibatch, config: ObjectiveConfig, sequences_per_row: int
) -> tuple[Float[Array, ""], LossOutput]:
    """Policy loss, plus the KL term, minus the entropy bonus.

    Args:
      scores: of the main head.
      batch: the minibatch.
      config: which loss.
      sequences_per_row: S, the most sequences packed in a row.

    Returns:
      The loss, and what it reports.
    """
    mask = batch.response_mask

    def reduce(values):
        return _aggregate(values, mask, batch, config, sequences_per_row).mean()

    terms = policy.policy_loss(
        scores.log_prob,
        batch.old_log_prob,
        batch.advantages,
        mask,
        batch.segment_ids,
        config=config.policy,
        sequences_per_row=sequences_per_row,
    )
    policy_term = _aggregate(
        terms.loss * _importance(batch, config), mask, batch, config, sequences_per_row
    )
    loss = policy_term.mean()
    if config.kl_coefficient:
        kl = divergences.kl(
            jnp.where(mask, scores.log_prob, 0),
            jnp.where(mask, batch.reference_log_prob, 0),
            estimator=config.kl_estimator,
        )
        loss = loss + config.kl_coefficient * reduce(kl)
    if config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * reduce(scores.entropy)
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
    objective: ObjectiveConfig,
    config: MTPTrainingConfig,
    sequences_per_row: int,
    divergence: Float[Array, "batch time"] | None = None,
) -> tuple[Float[Array, ""], LossOutput]:
    """Loss of the MTP head at `depth`: cross-entropy, divergence, or the policy loss.

    The policy loss has the main head's advantages, clipping and aggregation; its ratio is against
    the old log-prob that `config.reference` names. A minibatch in which every target is masked
    has loss 0. `divergence` is the token loss of "distill".
    """
    mask = mtp.aligned_mask(batch.response_mask, batch.segment_ids, depth)
    old = batch.old_log_prob if config.reference == "main" else batch.old_mtp_log_prob[depth - 1]
    metrics: dict[str, Any] = {}
    if config.loss == "ce":
        token_loss = mtp.cross_entropy(scores.log_prob, mask)
    elif config.loss == "distill":
        assert divergence is not None
        token_loss = jnp.where(mask, divergence, 0)
    else:
        terms = policy.policy_loss(
            scores.log_prob,
            old,
            batch.advantages,
            mask,
            batch.segment_ids,
            config=objective.policy,
            sequences_per_row=sequences_per_row,
        )
        token_loss = terms.loss * _importance(batch, objective)
        metrics = _clip_fractions(terms, mask, "mtp")
    aggregate = _aggregate(token_loss, mask, batch, objective, sequences_per_row)
    loss = aggregate.mean()
    log_ratio = jnp.where(mask, scores.log_prob - old, 0)
    metrics |= {
        "loss/mtp": loss,
        "mtp/cross_entropy": -masked.masked_mean(scores.log_prob, mask),
        "mtp/log_ratio": masked.masked_mean(log_ratio, mask),
    }
    output = LossOutput(log_ratio, mask, aggregate.weight, metrics)
    return loss, jax.lax.stop_gradient(output)


def loss_weights(
    batch: Minibatch, num_modules: int, config: ObjectiveConfig, sequences_per_row: int
) -> Float[Array, "losses"]:
    """What the sum of token losses of each of the K+1 losses is divided by.

    A minibatch's share of a larger one in a loss is its weight over the larger one's.
    """
    nothing = jnp.zeros_like(batch.advantages)
    masks = [
        batch.response_mask,
        *(
            mtp.aligned_mask(batch.response_mask, batch.segment_ids, depth)
            for depth in range(1, num_modules + 1)
        ),
    ]
    return jnp.stack(
        [_aggregate(nothing, mask, batch, config, sequences_per_row).weight for mask in masks]
    )


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


def _aggregate(
    values, mask, batch: Minibatch, config: ObjectiveConfig, sequences_per_row: int
) -> masked.Aggregate:
    return masked.aggregate(
        values,
        mask,
        batch.segment_ids,
        mode=config.aggregation,
        sequences_per_row=sequences_per_row,
        constant_length=config.constant_length,
    )


def _importance(batch: Minibatch, config: ObjectiveConfig) -> Any:
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
