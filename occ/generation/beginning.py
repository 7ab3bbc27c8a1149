"""Prompts before anything is sampled: run once, whatever the number of their samples."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from occ.generation.drafting import Window, first_window
from occ.generation.sampling import SamplingConfig
from occ.models import partitioning
from occ.models.cache import Cache, StackCache
from occ.models.decoder import Decoder
from occ.models.partitioning import ROWS, several_devices


class Prompts(NamedTuple):
    """What decoding begins with, for each of N prompts; the last token waits to be seen."""

    cache: Cache
    modules: StackCache | None
    window: Window


def modules_of(model: Decoder, depth: int) -> int:
    """K; without drafts the window holds one token alone."""
    return model.config.mtp.num_modules if depth else 1


def begin(
    model: Decoder, prompts, prompt_mask, rows: int, config: SamplingConfig, depth: int
) -> Prompts:
    """Runs the prompts through the trunk and, for drafts, the modules; so many at one time.

    The last one is repeated until they can be cut evenly.
    """
    mesh, count = several_devices(), prompts.shape[0]
    unit = 1 if mesh is None else partitioning.parts(mesh.shape, ROWS)
    rows = min(-(-rows // unit), -(-count // unit)) * unit
    parts = -(-count // rows)

    def cut(values):
        return jnp.pad(values, ((0, parts * rows - count), (0, 0)), mode="edge")

    if parts == 1:
        return _begin_all(model, cut(prompts), cut(prompt_mask), config, depth)
    begun = jax.lax.map(
        lambda part: _begin_all(model, part[0], part[1], config, depth),
        (cut(prompts).reshape(parts, rows, -1), cut(prompt_mask).reshape(parts, rows, -1)),
    )

    def join(values, axis=0):
        moved = jnp.moveaxis(values, 0, axis)
        return moved.reshape(*moved.shape[:axis], parts * rows, *moved.shape[axis + 2 :])

    stacks, modules = jax.tree.map(
        lambda values: join(values, 1), (begun.cache.stacks, begun.modules)
    )
    return Prompts(
        Cache(stacks, *jax.tree.map(join, (begun.cache.lengths, begun.cache.experts))),
        modules,
        jax.tree.map(join, begun.window),
    )


def _begin_all(model: Decoder, prompts, prompt_mask, config: SamplingConfig, depth: int) -> Prompts:
    columns = prompts.shape[1]
    lengths = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
    # From the left to the right end of the padding, so that token t is in column t.
    from_left = (columns - lengths)[:, None] + jnp.arange(columns, dtype=jnp.int32)[None]
    tokens = jnp.take_along_axis(prompts, from_left % columns, axis=1)
    hidden, cache = model.prefill(tokens, lengths, config.keep_experts)
    modules = model.prefill_modules(hidden, tokens, lengths) if depth else None
    window = first_window(
        hidden if depth else None, tokens, lengths, modules_of(model, depth), depth
    )
    return Prompts(cache._replace(lengths=lengths - 1), modules, window)
