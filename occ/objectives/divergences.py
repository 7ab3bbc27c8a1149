"""Divergences between policies, estimated token by token; entropy; importance weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl(
    log_prob: Float[Array, "batch time"],
    reference_log_prob: Float[Array, "batch time"],
    *,
    estimator: str = "k3",
    clamp: float | None = None,
) -> Float[Array, "batch time"]:
    """Estimates KL(pi || reference) from tokens that were sampled from pi.

    With d = log pi - log reference:

        k1: d      k2: d^2 / 2      k3: exp(-d) - 1 + d      abs: |d|

    As values k1 and k3 are unbiased. As losses they are not the same: the gradient of k1 has
    expectation 0, that of k2 is the gradient of the divergence.

    Args:
      log_prob: [B, T], of the policy that is trained.
      reference_log_prob: [B, T], of the frozen one.
      estimator: one of `ESTIMATORS`.
      clamp: bound on |d| before use (verl: 20, and k3's value at 10, which k3 passes where
        d < -2.61); None is none (TRL).

    Raises:
      ValueError: unknown estimator.

    Reference: Schulman, Approximating KL Divergence, joschu.net/blog/kl-approx.html, 2020.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"kl: estimator must be one of {ESTIMATORS}, got {estimator!r}.")
    difference = log_prob - reference_log_prob
    if clamp is not None:
        difference = jnp.clip(difference, -clamp, clamp)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return jnp.expm1(-difference) + difference
    return jnp.abs(difference)


def token_entropy(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    """Entropy in nats of the distribution that the logits describe; -inf is probability 0.

    >>> round(float(token_entropy(jnp.zeros((4,)))), 4)
    1.3863
    """
    log_prob = jax.nn.log_softmax(logits, axis=-1)
    probability = jnp.exp(log_prob)
    # Replaced before the product: 0 times -inf would be NaN in the gradient.
    return -jnp.sum(probability * jnp.where(probability > 0, log_prob, 0), axis=-1)


def logit_energy(
    logits: Float[Array, "*batch vocab"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Squared norm of the gradient of log p(label) by the logits: 1 - 2 p(label) + sum_v p(v)^2.

    Reference: Li et al., The Optimal Token Baseline, arXiv 2602.07078, which takes it for the
    squared norm of a token's gradient, as far as a forward pass can know it.

    >>> float(logit_energy(jnp.zeros(4), jnp.array(2)))
    0.75
    """
    p = jax.nn.softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(p, labels[..., None], axis=-1)[..., 0]
    return 1 - 2 * chosen + jnp.sum(p * p, axis=-1)


def truncated_importance_weight(
    old_log_prob: Float[Array, "batch time"],
    rollout_log_prob: Float[Array, "batch time"],
    *,
    cap: float,
) -> Float[Array, "batch time"]:
    """Weight min(pi_old / pi_rollout, cap) of samples from a slightly different policy.

    Engines that generate and engines that train differ in rounding, so samples are not quite from
    the policy that the ratio divides by. No gradient flows through the weight.

    Args:
      old_log_prob: [B, T], by the training pass.
      rollout_log_prob: [B, T], as sampled.
      cap: largest weight, > 0.

    Raises:
      ValueError: cap <= 0.

    Reference: Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training,
    2025 (truncated importance sampling).
    """
    if not cap > 0:
        raise ValueError(f"truncated_importance_weight: cap must be > 0, got {cap}.")
    weight = jnp.exp(old_log_prob - rollout_log_prob)
    return jax.lax.stop_gradient(jnp.minimum(weight, cap))
