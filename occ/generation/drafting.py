"""Drafts from the MTP modules, which the trunk judges in one pass.

Positions, for a row whose last token that the trunk has seen is at p: token p + 1 is decided and
waits to be seen. Module k at position i needs the state before it at i and token i + k, and draws a
draft of token i + k + 1. So module 1 at p drafts token p + 2, module 2 at p the next one from that
draft, and so on. Beyond the K modules the last one goes on from its own state: at p + 1 with draft
K, and further.

A module's keys and values are exact where its token ahead is decided: up to p + 1 - k. Whatever was
written beyond is written again before anything reads it, from the trunk's own states: that is what
the window holds.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ.generation.sampling import SamplingConfig, choose, distribution
from occ.models.cache import Past, StackCache
from occ.models.config import MTPConfig
from occ.models.decoder import Decoder


class Window(NamedTuple):
    """The latest W = K + D tokens of each row, for K modules and D drafts.

    Attributes:
      hidden: float [B, W, width], the trunk's states; p is at `last`, and later ones mean nothing.
      tokens: int32 [B, W], each one position later than the state beside it: token p + 1 at `last`.
      last: int32 [B].
    """

    hidden: jax.Array | None
    tokens: jax.Array
    last: jax.Array

    @property
    def waiting(self) -> jax.Array:
        """int32 [B], the token that is decided and that the trunk has not seen."""
        return at(self.tokens, self.last[:, None])[:, 0]

    def move(self, hidden: jax.Array, tokens: jax.Array, count: jax.Array) -> Window:
        """After a pass of the trunk over D + 1 tokens.

        Args:
          hidden: float [B, D + 1, width], from position p + 1 on.
          tokens: int32 [B, D + 1], from p + 2 on.
          count: int32 [B], how many of them are decided.
        """
        before = self.tokens.shape[1] - tokens.shape[1]
        kept = self.last[:, None] + jnp.arange(1 - before, 1, dtype=jnp.int32)[None]
        return Window(
            None
            if self.hidden is None
            else jnp.concatenate([at(self.hidden, kept), hidden], axis=1),
            jnp.concatenate([at(self.tokens, kept), tokens], axis=1),
            before + count - 1,
        )


def at(values: jax.Array, columns: Int[Array, "batch columns"]) -> jax.Array:
    """Some columns of each row: [B, T, ...] to [B, columns, ...]."""
    return jax.vmap(lambda row, some: row[some])(values, columns)


def first_window(
    hidden: Float[Array, "batch time width"] | None,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, "batch"],
    modules: int,
    depth: int,
) -> Window:
    """That of prompts padded on the right, whose last token waits to be seen."""
    start = lengths[:, None] - 1 - modules
    columns = start + jnp.arange(modules + depth, dtype=jnp.int32)[None]

    def take(values, columns):
        return at(values, jnp.clip(columns, 0, values.shape[1] - 1))

    return Window(
        None if hidden is None else take(hidden, columns),
        take(tokens, columns + 1),
        jnp.full(lengths.shape, modules - 1, jnp.int32),
    )


def check_depth(config: MTPConfig, depth: int) -> None:
    """Checks that the modules can draft so many tokens.

    Raises:
      ValueError: there are no modules, or parallel heads, which see no draft, and fewer of them.
    """
    if depth and not config.num_modules:
        raise ValueError(
            f"draft_depth={depth} needs MTP modules to draft with, and the model has none. Use 0."
        )
    if config.kind == "parallel" and depth > config.num_modules:
        raise ValueError(
            f"draft_depth={depth} exceeds the model's {config.num_modules} parallel heads; only "
            "sequential modules go on from their own drafts. Use as many as there are heads."
        )


def draft(
    model: Decoder,
    window: Window,
    cache: StackCache,
    lengths: Int[Array, "batch"],
    running: Bool[Array, "batch"],
    noise: Float[Array, "batch tokens vocab"] | None,
    config: SamplingConfig,
    depth: int,
) -> tuple[Int[Array, "batch depth"], Float[Array, "batch depth vocab"], StackCache]:
    """The tokens that the modules expect after the one that waits; and their cache.

    Args:
      model: with K modules.
      window: of the rows.
      cache: of the modules; a row's token t is in column K + t, so that no column is negative.
      lengths: int32 [B], p + 1: tokens that the trunk has seen.
      running: bool [B].
      noise: of at least D tokens, with which the trunk may choose the same tokens; None at
        temperature 0.
      config: as the trunk's.
      depth: D >= 1.

    Returns:
      Drafts; the log-probs that they were drawn from (logits at temperature 0); the cache.
    """
    modules = model.config.mtp.num_modules
    width = window.tokens.shape[1]
    tokens = jnp.pad(window.tokens, ((0, 0), (0, depth)))
    assert window.hidden is not None
    inputs = states = model.module_input(window.hidden)
    drafts: list[jax.Array] = []
    drawn_from: list[jax.Array] = []
    for number in range(depth):
        head = min(number, modules - 1)
        if number < modules:
            start = lengths - 1 - window.last
            sequential = model.config.mtp.kind == "sequential"
            states, cache = model.extend_module(
                head,
                states if sequential else inputs,
                tokens[:, number : number + width],
                Past(cache, head, start, modules),
                running,
            )
            state = at(states, window.last[:, None])
        else:
            start = lengths + number - modules
            ahead = drafts[-1][:, None]
            past = Past(cache, head, start, modules)
            state, cache = model.extend_module(head, state, ahead, past, running)
        logits = model.mtp_logits(state, head)[:, 0]
        token, _ = choose(logits, None if noise is None else noise[:, number], config)
        drafts.append(token)
        drawn_from.append(logits if noise is None else distribution(logits, config))
        tokens = jax.vmap(lambda row, column, value: row.at[column].set(value))(
            tokens, window.last + 1 + number, token
        )
    return jnp.stack(drafts, axis=1), jnp.stack(drawn_from, axis=1), cache


class Verdict(NamedTuple):
    """What the trunk makes of drafts.

    Attributes:
      decided: int32 [B], its tokens that count: up to the first that differs from its draft.
      stopped: bool [B], the last of them is a stop token.
      judged: bool [B, D], drafts that were compared.
      kept: bool [B, D], those among them that were right.
    """

    decided: jax.Array
    stopped: jax.Array
    judged: jax.Array
    kept: jax.Array


def judge(
    tokens: Int[Array, "batch tokens"],
    drafts: Int[Array, "batch depth"],
    room: Int[Array, "batch"],
    running: Bool[Array, "batch"],
    config: SamplingConfig,
) -> Verdict:
    """How far the trunk's tokens count.

    Args:
      tokens: int32 [B, D + 1], the trunk's own, each after the drafts before it.
      drafts: int32 [B, D].
      room: int32 [B], tokens that the response may still take.
      running: bool [B].
      config: has the stop tokens.
    """
    depth = drafts.shape[1]
    stop = jnp.asarray(config.stop_tokens, jnp.int32)
    is_stop = jnp.any(tokens[:, :, None] == stop[None, None], axis=-1)
    right = drafts == tokens[:, :depth]
    more = jnp.arange(1, depth + 1, dtype=jnp.int32)[None] < room[:, None]
    goes_on = right & ~is_stop[:, :depth] & more
    decided = jnp.concatenate([running[:, None], goes_on], axis=1)
    decided = jnp.cumprod(decided, axis=1, dtype=jnp.int32)
    judged = decided[:, :depth] > 0
    return Verdict(
        decided=jnp.sum(decided, axis=1, dtype=jnp.int32),
        stopped=jnp.any((decided > 0) & is_stop, axis=1),
        judged=judged,
        kept=judged & right,
    )
