"""Sampling of responses with a key-value cache, as one pure function."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ.models.decoder import Cache, Decoder
from occ.models.policy import Policy


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
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise ValueError(
                "SamplingConfig: expected max_new_tokens >= 1, temperature >= 0, top_k >= 0, got "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_k}."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig.top_p must be in (0, 1], got {self.top_p}.")


class Generation(NamedTuple):
    """Sampled sequences: left-padded prompts of P columns, then up to R response columns.

    Attributes:
      tokens: int32 [B, P + R].
      response_mask: bool [B, P + R], sampled tokens, the stop token included.
      log_prob: float32 [B, P + R], of each sampled token under the distribution that it was
        drawn from (temperature, top-k and top-p included); 0 elsewhere.
      finished: bool [B], the response ended in a stop token and was not cut off.
      lengths: int32 [B], response tokens.
    """

    tokens: jax.Array
    response_mask: jax.Array
    log_prob: jax.Array
    finished: jax.Array
    lengths: jax.Array


class _Progress(NamedTuple):
    step: jax.Array
    logits: jax.Array  # [B, V], of the next token
    cache: Cache
    tokens: jax.Array  # [B, R]
    log_prob: jax.Array  # [B, R]
    taken: jax.Array  # bool [B, R]
    stopped: jax.Array  # bool [B]


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


def generate(
    policy: Policy,
    prompts: Int[Array, "batch columns"],
    prompt_mask: Bool[Array, "batch columns"],
    key: jax.Array,
    *,
    config: SamplingConfig,
    rows: Int[Array, "batch"] | None = None,
) -> Generation:
    """Samples one response to each prompt; stops early when all have ended.

    A row's random numbers depend on the key, the row's number and the step alone, so a response
    does not change with the other rows or with the padding.

    Args:
      policy: the model.
      prompts: int32 [B, P], left-padded.
      prompt_mask: bool [B, P], False on padding. `check_fits` checks concrete ones.
      key: PRNG key.
      config: sampling; static under jit.
      rows: int32 [B], each row's number, where these are some rows of a larger batch; None numbers
        them from 0.
    """
    model = policy.model
    batch, _ = prompts.shape
    segment_ids = prompt_mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    cache = model.empty_cache(batch, prompts.shape[1] + config.max_new_tokens)
    hidden, cache = model.extend(prompts, positions, segment_ids, cache)
    lengths = jnp.sum(segment_ids, axis=1)
    numbers = jnp.arange(batch) if rows is None else rows
    row_keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    stop = jnp.asarray(config.stop_tokens, jnp.int32)

    def body(progress: _Progress) -> _Progress:
        keys = jax.vmap(lambda k: jax.random.fold_in(k, progress.step))(row_keys)
        token, log_prob = sample_token(progress.logits, keys, config)
        running = ~progress.stopped
        token = jnp.where(running, token, config.pad_token)
        column = progress.step

        def write(into, values):
            return jax.lax.dynamic_update_slice_in_dim(into, values[:, None], column, axis=1)

        is_stop = jnp.any(token[:, None] == stop[None, :], axis=1)
        logits, cache = _next_logits(model, token, lengths + column, running, progress.cache)
        return _Progress(
            step=progress.step + 1,
            logits=logits,
            cache=cache,
            tokens=write(progress.tokens, token),
            log_prob=write(progress.log_prob, jnp.where(running, log_prob, 0)),
            taken=write(progress.taken, running),
            stopped=progress.stopped | is_stop,
        )

    def unfinished(progress: _Progress) -> jax.Array:
        return (progress.step < config.max_new_tokens) & ~jnp.all(progress.stopped)

    shape = (batch, config.max_new_tokens)
    end = jax.lax.while_loop(
        unfinished,
        body,
        _Progress(
            step=jnp.zeros((), jnp.int32),
            logits=model.logits(hidden[:, -1:])[:, 0],
            cache=cache,
            tokens=jnp.full(shape, config.pad_token, jnp.int32),
            log_prob=jnp.zeros(shape, jnp.float32),
            taken=jnp.zeros(shape, bool),
            stopped=jnp.zeros((batch,), bool),
        ),
    )
    nothing = jnp.zeros(prompts.shape, bool)
    return Generation(
        tokens=jnp.concatenate([jnp.where(prompt_mask, prompts, config.pad_token), end.tokens], 1),
        response_mask=jnp.concatenate([nothing, end.taken], 1),
        log_prob=jnp.concatenate([nothing.astype(jnp.float32), end.log_prob], 1),
        finished=end.stopped,
        lengths=jnp.sum(end.taken.astype(jnp.int32), axis=1),
    )


def _next_logits(model: Decoder, token, position, running, cache):
    """Feeds one token a row; rows that have stopped feed padding, which nothing sees."""
    hidden, cache = model.extend(
        token[:, None], position[:, None], running[:, None].astype(jnp.int32), cache
    )
    return model.logits(hidden)[:, 0], cache


def sample_token(
    logits: Float[Array, "batch vocab"], keys: jax.Array, config: SamplingConfig
) -> tuple[Int[Array, "batch"], Float[Array, "batch"]]:
    """One token a row and its log-prob under the distribution that it was drawn from.

    Args:
      logits: [B, V].
      keys: PRNG keys [B].
      config: temperature, top_k and top_p.
    """
    if config.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jnp.zeros(token.shape, jnp.float32)
    log_prob = jax.nn.log_softmax(restrict(logits / config.temperature, config), axis=-1)
    token = jax.vmap(jax.random.categorical)(keys, log_prob).astype(jnp.int32)
    chosen = jnp.take_along_axis(log_prob, token[:, None], axis=-1)[:, 0]
    return token, chosen.astype(jnp.float32)


def restrict(
    logits: Float[Array, "batch vocab"], config: SamplingConfig
) -> Float[Array, "batch vocab"]:
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
