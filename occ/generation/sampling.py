"""How a token is sampled, and what a batch of responses is."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from occ.models.layers import first_of_the_largest


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled.

    Attributes:
      max_new_tokens: longest response, tokens, its stop token included.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_p: nucleus; the smallest set of tokens with at least this probability. 1 is off.
      top_k: only the k most likely tokens; 0 is off.
      stop_tokens: any of them ends the response, and belongs to it.
      pad_token: stands after the end.
      speculation: how the trunk judges drafts. "common": it samples with the random numbers that
        drew the draft, so that drafts change no sample (in float32 and float64, but for ties within
        rounding; in bfloat16 passes of several tokens round otherwise). "rejection": it keeps more
        of them, and samples follow the same distribution, but are others with each depth of drafts.
      keep_experts: of a mixture of experts, say which experts each token went to.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    speculation: Literal["common", "rejection"] = "common"
    keep_experts: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise ValueError(
                "SamplingConfig: expected max_new_tokens >= 1, temperature >= 0, top_k >= 0, got "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_k}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig.top_p must be in (0, 1], got {self.top_p}.")


class Work(NamedTuple):
    """What decoding took.

    Attributes:
      steps: int32 [], passes of the trunk over all places of rows.
      passes: int32 [], places with a running row in them, over all steps.
      judged: int32 [D], drafts that were compared with the trunk's token: those before were kept.
      kept: int32 [D], those among them that were the trunk's token.
      places: int32 [], of tokens: those of prompts with their padding, and the steps' of all slots.
    """

    steps: jax.Array
    passes: jax.Array
    judged: jax.Array
    kept: jax.Array
    places: jax.Array

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Of concrete counts, by depth: the share kept of drafts whose predecessors were."""
        judged, kept = np.asarray(self.judged, float), np.asarray(self.kept, float)
        return tuple((kept / np.maximum(judged, 1)).tolist())


class Generation(NamedTuple):
    """Sampled sequences: left-padded prompts of P columns, then up to R response columns.

    Attributes:
      tokens: int32 [B, P + R].
      response_mask: bool [B, P + R], sampled tokens, the stop token included.
      log_prob: float32 [B, P + R], of each sampled token under the distribution that it was
        drawn from (temperature, top-k and top-p included); 0 elsewhere.
      finished: bool [B], the response ended in a stop token and was not cut off.
      lengths: int32 [B], response tokens.
      work: what they took.
      experts: int [L, k, B, P + R], of the trunk's L sparse layers; -1 on padding, and on the last
        token of a response, which none has seen. None unless `SamplingConfig.keep_experts`.
    """

    tokens: jax.Array
    response_mask: jax.Array
    log_prob: jax.Array
    finished: jax.Array
    lengths: jax.Array
    work: Work
    experts: jax.Array | None = None


def check_fits(prompt_mask: Any, max_length: int, config: SamplingConfig) -> None:
    """Checks concrete prompts before they are traced.

    Args:
      prompt_mask: bool [B, P] array of concrete values.
      max_length: the model's context, tokens.
      config: sampling.

    Raises:
      ValueError: the context is too short, a prompt is empty, or it is not left-padded.
    """
    columns = prompt_mask.shape[1] + config.max_new_tokens
    if columns > max_length:
        raise ValueError(
            f"generate: prompts of {prompt_mask.shape[1]} columns and {config.max_new_tokens} new "
            f"tokens make {columns}, which exceeds the context of {max_length}. Shorten either, or "
            "raise ModelConfig.max_length."
        )
    if not prompt_mask[:, -1].all() or (prompt_mask[:, :-1] > prompt_mask[:, 1:]).any():
        raise ValueError(
            "generate: every prompt needs at least one token and must be left-padded: "
            "prompt_mask must be False up to some column and True from there to the last."
        )


def gumbel_noise(
    key: jax.Array,
    rows: Int[Array, "batch"],
    first: Int[Array, "batch"],
    shape: tuple[int, int],
    dtype: jnp.dtype,
) -> Float[Array, "batch tokens vocab"]:
    """The random numbers that decide on response tokens: each token's are its own.

    Args:
      key: PRNG key.
      rows: int32 [B], numbers of the rows.
      first: int32 [B], each row's first token, counted from 0 at the beginning of the response.
      shape: tokens a row, and V.
      dtype: of the logits.
    """
    tokens, vocab = shape
    return _by_token(lambda key: jax.random.gumbel(key, (vocab,), dtype), key, rows, first, tokens)


def uniform_noise(
    key: jax.Array,
    rows: Int[Array, "batch"],
    first: Int[Array, "batch"],
    tokens: int,
    dtype: jnp.dtype,
) -> Float[Array, "batch tokens"]:
    """log u, u uniform in (0, 1), of each response token; arguments as of `gumbel_noise`."""
    return _by_token(lambda key: -jax.random.exponential(key, (), dtype), key, rows, first, tokens)


def _by_token(draw: Any, key: jax.Array, rows: Any, first: Any, tokens: int) -> Any:
    """What `draw` makes of each token's own key."""

    def one(row, token):
        return draw(jax.random.fold_in(jax.random.fold_in(key, row), token))

    numbers = first[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, (None, 0)))(rows, numbers)


def distribution(
    logits: Float[Array, "*batch vocab"], config: SamplingConfig
) -> Float[Array, "*batch vocab"]:
    """Log-probs with temperature, top-k and top-p: the distribution that tokens are drawn from."""
    return jax.nn.log_softmax(restrict(logits / config.temperature, config), axis=-1)


def choose(
    logits: Float[Array, "*batch vocab"],
    noise: Float[Array, "*batch vocab"] | None,
    config: SamplingConfig,
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """The token that the noise picks, and its log-prob under the distribution it is drawn from.

        token = argmax_v  log p_v + e_v,    e from a standard Gumbel distribution

    Two distributions that are near each other pick the same token with the same noise, more often
    than not: with probability (1 - TV) / (1 + TV) at least.

    Args:
      logits: [..., V].
      noise: e of `gumbel_noise`, [..., V]; None at temperature 0.
      config: temperature, top_k and top_p.

    Reference: Daliri, Musco and Suresh, Coupling without Communication and Drafter-Invariant
    Speculative Decoding, arXiv 2408.07978.
    """
    if noise is None:
        token = first_of_the_largest(logits)
        return token, jnp.zeros(token.shape, jnp.float32)
    log_prob = distribution(logits, config)
    token = first_of_the_largest(_once(log_prob + noise))
    return token, log_prob_of(token, log_prob).astype(jnp.float32)


def choose_by_rejection(
    log_prob: Float[Array, "batch tokens vocab"],
    noise: Float[Array, "batch tokens vocab"],
    drafts: Int[Array, "batch depth"],
    draft_log_prob: Float[Array, "batch depth vocab"],
    log_uniform: Float[Array, "batch depth"],
) -> Int[Array, "batch tokens"]:
    """The draft, with probability min(1, p / q); else a token of what q lacks of p.

        token = argmax_v  log max(p_v - q_v, 0) + e_v    where the draft is refused

    A draft is kept with probability 1 - TV, and the token follows p whatever q is. A refused draft
    has p <= q, so that the token is another one: equal to the draft means kept.

    Args:
      log_prob: log p [B, D + 1, V], the trunk's `distribution` after the drafts before each.
      noise: e of `gumbel_noise`, apart from that which drew the drafts.
      drafts: int32 [B, D], drawn from q.
      draft_log_prob: log q [B, D, V], in the very numbers that they were drawn from.
      log_uniform: of `uniform_noise` [B, D].

    Returns:
      int32 [B, D + 1].

    Reference: Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative
    Decoding, arXiv 2211.17192.
    """
    depth = drafts.shape[1]
    logp_BxDxV, logp_after_Bx1xV = log_prob[:, :depth], log_prob[:, depth:]
    ratio_BxD = log_prob_of(drafts, logp_BxDxV) - log_prob_of(drafts, draft_log_prob)
    lacking_BxDxV = jnp.maximum(jnp.exp(logp_BxDxV) - jnp.exp(draft_log_prob), 0)
    # Where p = q nothing is lacking, and by rounding alone a draft may yet be refused.
    lacks_BxDx1 = jnp.any(lacking_BxDxV > 0, axis=-1, keepdims=True)
    other_BxDxV = jnp.where(lacks_BxDx1, jnp.log(lacking_BxDxV), logp_BxDxV)
    other_BxTxV = jnp.concatenate([other_BxDxV, logp_after_Bx1xV], axis=1)
    other_BxT = first_of_the_largest(_once(other_BxTxV + noise))
    kept_BxT = jnp.pad(log_uniform < ratio_BxD, ((0, 0), (0, 1)))
    return jnp.where(kept_BxT, jnp.pad(drafts, ((0, 0), (0, 1))), other_BxT)


# Computed before it is read twice, and not within each reading.
_once = jax.lax.optimization_barrier


def log_prob_of(
    tokens: Int[Array, "*batch"], log_prob: Float[Array, "*batch vocab"]
) -> Float[Array, "*batch"]:
    """Of one token each."""
    return jnp.take_along_axis(log_prob, tokens[..., None], axis=-1)[..., 0]


def restrict(
    logits: Float[Array, "*batch vocab"], config: SamplingConfig
) -> Float[Array, "*batch vocab"]:
    """Logits of -inf outside the top k, and then outside the nucleus.

    Of equal logits those of the lower tokens stay, so that k tokens are k.

    Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
    """
    if config.top_k:
        values, kept = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))
        excluded = jnp.full_like(logits, -jnp.inf)
        logits = jnp.put_along_axis(excluded, kept, values, axis=-1, inplace=False)
    if config.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        inside = jnp.take_along_axis(before < config.top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(inside, logits, -jnp.inf)
    return logits
