"""A kernel for GPUs that reads each key and value of a row's past once, and no column beyond it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from occ.models.config import ModelConfig

BLOCK = 64
"""Columns that one program reads at one time; caches for this kernel are multiples of it."""

PROGRAMS = 256
"""Programs that keep a GPU busy: fewer pairs of row and head than that share a past's columns."""

FEWEST_QUERIES = 16
"""Of a matrix unit."""


class Sums(NamedTuple):
    """A softmax over some keys, before it is divided by its total.

    Attributes:
      maximum: float [..., Q, 1], of the scores.
      total: float [..., Q, 1], sum of exp(score - maximum).
      mixed: float [..., Q, head_dim], values summed with those weights.
    """

    maximum: jax.Array
    total: jax.Array
    mixed: jax.Array

    def join(self, other: Sums) -> Sums:
        """Over the keys of both."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        mine, others = jnp.exp(self.maximum - maximum), jnp.exp(other.maximum - maximum)
        return Sums(
            maximum,
            self.total * mine + other.total * others,
            self.mixed * mine + other.mixed * others,
        )


def suits(config: ModelConfig) -> bool:
    """Whether the kernel knows the model's heads and dtype."""
    power_of_two = config.head_dim & (config.head_dim - 1) == 0
    return power_of_two and config.head_dim >= 16 and config.compute.itemsize <= 4


def attend_to_cache(query, keys, values, layer, lengths, first: int) -> Sums:
    """Of all columns first .. first + lengths of each row, in Pallas on Triton.

    Rows and heads are each a program of their own; where these are few, several share a row's
    columns, and their sums are joined after.

    Args:
      query: [B, kv_heads, Q, head_dim].
      keys, values: [L, B, kv_heads, S, head_dim], S a multiple of `BLOCK`.
      layer: int32 [], which of L.
      lengths: int32 [B].
      first: the column of a row's token 0.

    Returns:
      Sums in float32; of an empty past a maximum of the lowest number, and nothing else.

    Reference: Dao et al., Flash-Decoding for long-context inference, 2023.
    """
    # Here, since Pallas is slow to import and most processes do without it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, kv_heads, count, head_dim = query.shape
    blocks = keys.shape[3] // BLOCK
    parts = max(1, min(blocks, PROGRAMS // (batch * kv_heads)))
    span = -(-blocks // parts) * BLOCK
    padded = max(FEWEST_QUERIES, 1 << (count - 1).bit_length())
    query = jnp.pad(query, [(0, 0), (0, 0), (0, padded - count), (0, 0)])
    row = pl.BlockSpec((None, None, padded, head_dim), lambda b, h, part: (b, h, 0, 0))

    def out(width):
        shape = (parts, batch, kv_heads, padded, width)
        block = (None, None, None, padded, width)
        spec = pl.BlockSpec(block, lambda b, h, part: (part, b, h, 0, 0))
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    specs, shapes = zip(out(1), out(1), out(head_dim), strict=True)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    maximum, total, mixed = pl.pallas_call(
        functools.partial(_read, first=first, span=span),
        grid=(batch, kv_heads, parts),
        in_specs=[whole, whole, row, whole, whole],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=jax.default_backend() != "gpu",
    )(jnp.reshape(jnp.asarray(layer, jnp.int32), (1,)), lengths, query, keys, values)
    largest = jnp.max(maximum, axis=0, keepdims=True)
    shrink = jnp.exp(maximum - largest)
    sums = largest[0], jnp.sum(total * shrink, axis=0), jnp.sum(mixed * shrink, axis=0)
    return Sums(*(x[:, :, :count] for x in sums))


def _read(layer, lengths, query, keys, values, maximum_out, total_out, mixed_out, *, first, span):
    """One row's one head: the columns of one part of its past."""
    from jax.experimental import pallas as pl

    row, head, part = (pl.program_id(axis) for axis in range(3))
    end = first + lengths[row]
    begin = part * span
    asked = query[...]
    # Products of float32 in float32: the matrix units would round its operands to ten bits.
    precision = jax.lax.Precision.HIGHEST if asked.dtype == jnp.float32 else None

    def product(a, b, contracted):
        return jax.lax.dot_general(
            a,
            b,
            (((1,), (contracted,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def block(number, sums):
        start = begin + number * BLOCK
        columns = pl.ds(start, BLOCK)
        key = keys[layer[0], row, head, columns, :]
        value = values[layer[0], row, head, columns, :]
        scores = product(asked, key, 1) * asked.shape[1] ** -0.5
        column = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = (column >= first) & (column < end)
        scores = jnp.where(seen, scores, -jnp.inf)
        maximum = jnp.maximum(sums.maximum, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - maximum)
        shrink = jnp.exp(sums.maximum - maximum)
        new = product(weights.astype(value.dtype), value, 0)
        return Sums(
            maximum,
            sums.total * shrink + jnp.sum(weights, axis=1, keepdims=True),
            sums.mixed * shrink + new,
        )

    count = asked.shape[0]
    nothing = Sums(
        jnp.full((count, 1), jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros((count, 1), jnp.float32),
        jnp.zeros(asked.shape, jnp.float32),
    )
    blocks = pl.cdiv(jnp.clip(end - begin, 0, span), BLOCK)
    sums = jax.lax.fori_loop(0, blocks, block, nothing)
    maximum_out[...], total_out[...], mixed_out[...] = sums
