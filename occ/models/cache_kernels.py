"""Kernels that read each key and value of a row's past once, and no column beyond it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from occ.models.config import ModelConfig

COLUMNS = 128
"""Caches for these kernels are multiples of it."""

GPU_BLOCK, TPU_BLOCK = 64, 256
"""Columns that are multiplied at one time; on TPUs also what one transfer brings."""

PROGRAMS = 256
"""Programs that keep a GPU busy: fewer pairs of row and head than that share a past's columns."""

FEWEST_QUERIES = 16
"""Of a matrix unit."""

LANES = 128
"""Numbers side by side in a TPU's registers; what is one number fills them."""


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
    """Whether the kernels know the model's heads and dtype."""
    power_of_two = config.head_dim & (config.head_dim - 1) == 0
    return power_of_two and config.head_dim >= 16 and config.compute.itemsize <= 4


def attend_to_cache(query, keys, values, layer, lengths, first: int) -> Sums:
    """Of the columns first .. first + lengths of each row, in Pallas: on Triton, or for TPUs.

    Args:
      query: [B, kv_heads, Q, head_dim].
      keys, values: [L, B, kv_heads, S, head_dim], S a multiple of `COLUMNS`.
      layer: int32 [], which of L.
      lengths: int32 [B].
      first: the column of a row's token 0.

    Returns:
      Sums in float32; of an empty past a maximum of the lowest number, and nothing else.

    Reference: Dao et al., Flash-Decoding for long-context inference, 2023.
    """
    count = query.shape[2]
    padded = max(FEWEST_QUERIES, 1 << (count - 1).bit_length())
    query = jnp.pad(query, [(0, 0), (0, 0), (0, padded - count), (0, 0)])
    layer = jnp.reshape(jnp.asarray(layer, jnp.int32), (1,))
    sums = jax.lax.platform_dependent(
        layer,
        lengths,
        query,
        keys,
        values,
        cuda=functools.partial(on_gpu, first=first),
        tpu=functools.partial(on_tpu, first=first),
        default=functools.partial(on_gpu, first=first, interpret=True),
    )
    return Sums(*(x[:, :, :count] for x in sums))


def on_gpu(layer, lengths, query, keys, values, *, first: int, interpret: bool = False) -> Sums:
    """A program for each row and head; where these are few, for each part of the row's columns.

    Sums of parts are joined after.
    """
    # Here, since Pallas is slow to import and most processes do without it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, kv_heads, count, head_dim = query.shape
    blocks = keys.shape[3] // GPU_BLOCK
    parts = max(1, min(blocks, PROGRAMS // (batch * kv_heads)))
    row = pl.BlockSpec((None, None, count, head_dim), lambda b, h, part: (b, h, 0, 0))

    def out(width):
        shape = (parts, batch, kv_heads, count, width)
        block = (None, None, None, count, width)
        spec = pl.BlockSpec(block, lambda b, h, part: (part, b, h, 0, 0))
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    specs, shapes = zip(out(1), out(1), out(head_dim), strict=True)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    maximum, total, mixed = pl.pallas_call(
        functools.partial(_gpu_program, first=first, span=-(-blocks // parts) * GPU_BLOCK),
        grid=(batch, kv_heads, parts),
        in_specs=[whole, whole, row, whole, whole],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(layer, lengths, query, keys, values)
    largest = jnp.max(maximum, axis=0, keepdims=True)
    shrink = jnp.exp(maximum - largest)
    return Sums(largest[0], jnp.sum(total * shrink, axis=0), jnp.sum(mixed * shrink, axis=0))


def _gpu_program(
    layer, lengths, query, keys, values, maximum_out, total_out, mixed_out, *, first, span
):
    """One row's one head: the columns of one part of its past."""
    from jax.experimental import pallas as pl

    row, head, part = (pl.program_id(axis) for axis in range(3))
    end, begin = first + lengths[row], part * span
    asked = query[...]

    def block(number, sums):
        start = begin + number * GPU_BLOCK
        columns = pl.ds(start, GPU_BLOCK)
        key = keys[layer[0], row, head, columns, :]
        value = values[layer[0], row, head, columns, :]
        return _further(sums, asked, key, value, start, first, end)

    blocks = pl.cdiv(jnp.clip(end - begin, 0, span), GPU_BLOCK)
    sums = jax.lax.fori_loop(0, blocks, block, _nothing(asked))
    maximum_out[...], total_out[...], mixed_out[...] = sums


def on_tpu(layer, lengths, query, keys, values, *, first: int, interpret: Any = False) -> Sums:
    """Blocks of a row follow each other, and the next is on its way while one is multiplied.

    Those beyond its past name its last block again, which brings nothing.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    batch, kv_heads, count, head_dim = query.shape
    block = next(size for size in (TPU_BLOCK, COLUMNS) if keys.shape[3] % size == 0)

    def of_row(width):
        return pl.BlockSpec((None, None, count, width), lambda b, h, *_: (b, h, 0, 0))

    def column(b, h, number, layer, lengths):
        last = jnp.maximum(pl.cdiv(first + lengths[b], block) - 1, 0)
        return layer[0], b, h, jnp.minimum(number, last), 0

    cache = pl.BlockSpec((None, None, None, block, head_dim), column)
    widths = (LANES, LANES, head_dim)
    maximum, total, mixed = pl.pallas_call(
        functools.partial(_tpu_program, first=first, block=block),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, keys.shape[3] // block),
            in_specs=[of_row(head_dim), cache, cache],
            out_specs=[of_row(width) for width in widths],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, count, width), jnp.float32) for width in widths
        ],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(layer, lengths, query, keys, values)
    return Sums(maximum[..., :1], total[..., :1], mixed)


def _tpu_program(
    layer, lengths, query, keys, values, maximum_out, total_out, mixed_out, *, first, block
):
    """One block of one row's one head; the sums stay in the outputs until the row has ended."""
    from jax.experimental import pallas as pl

    del layer
    number = pl.program_id(2)
    end, start = first + lengths[pl.program_id(0)], number * block
    asked = query[...]

    def write(sums):
        maximum_out[...] = jnp.broadcast_to(sums.maximum, maximum_out.shape)
        total_out[...] = jnp.broadcast_to(sums.total, total_out.shape)
        mixed_out[...] = sums.mixed

    @pl.when(number == 0)
    def _():
        write(_nothing(asked))

    @pl.when(start < end)
    def _():
        sums = Sums(maximum_out[:, :1], total_out[:, :1], mixed_out[...])
        write(_further(sums, asked, keys[...], values[...], start, first, end))


def _nothing(query) -> Sums:
    """Over no key."""
    count, head_dim = query.shape
    return Sums(
        jnp.full((count, 1), jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros((count, 1), jnp.float32),
        jnp.zeros((count, head_dim), jnp.float32),
    )


def _further(sums: Sums, query, key, value, start, first: int, end) -> Sums:
    """With a block of keys from column `start` on, of which first .. end are the row's."""
    # Products of float32 in float32: matrix units would round its operands to eight or ten bits.
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None

    def product(a, b, contracted):
        return jax.lax.dot_general(
            a,
            b,
            (((1,), (contracted,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    scores = product(query, key, 1) * query.shape[1] ** -0.5
    column = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where((column >= first) & (column < end), scores, -jnp.inf)
    maximum = jnp.maximum(sums.maximum, jnp.max(scores, axis=1, keepdims=True))
    weights, shrink = jnp.exp(scores - maximum), jnp.exp(sums.maximum - maximum)
    return Sums(
        maximum,
        sums.total * shrink + jnp.sum(weights, axis=1, keepdims=True),
        sums.mixed * shrink + product(weights.astype(value.dtype), value, 0),
    )
