"""Grouped-query attention with rotary positions and a cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ.models.config import ModelConfig
from occ.models.layers import Linear, RMSNorm, at_least_float32, rotary
from occ.models.partitioning import ROWS, constrain, fit, several_devices

P = jax.P


CACHE_BLOCK = 256
"""Columns of a cache that attention reads at one time, between which its running sums travel."""


def columns_in_blocks(columns: int) -> int:
    """Columns of a cache with room for so many: whole blocks, if there is more than one.

    >>> columns_in_blocks(100), columns_in_blocks(CACHE_BLOCK + 1) // CACHE_BLOCK
    (100, 2)
    """
    if columns <= CACHE_BLOCK:
        return columns
    return -(-columns // CACHE_BLOCK) * CACHE_BLOCK


class StackCache(NamedTuple):
    """Keys and values of a stack of layers: [L, B, kv_heads, S, head_dim] each.

    What a head reads lies together, so that it is multiplied where it lies.
    """

    keys: jax.Array
    values: jax.Array

    def write(self, new: StackCache, columns: Int[Array, "batch"], layer: int = 0) -> StackCache:
        """With T further columns, from each row's own column on.

        One row after the other, each where it lies: written all at once, the compiler for TPUs
        wants rows along the slowest axis, reading wants layers there, and so the whole cache would
        be turned round and back for every token. A loop that writes two columns at a time makes it
        fail (libtpu 0.0.42).

        Args:
          new: [L', B, kv_heads, T, head_dim] each.
          columns: int32 [B], the first to write of each row.
          layer: the first of the L' layers.
        """

        def rows(old: StackCache, new: StackCache, columns):
            zero = jnp.zeros_like(columns[0])

            def one(number, old, new):
                row = jax.lax.dynamic_slice_in_dim(new, number, 1, axis=1)
                for token in range(row.shape[3]):
                    start = (zero + layer, number, zero, columns[number] + token, zero)
                    column = row[:, :, :, token : token + 1]
                    old = jax.lax.dynamic_update_slice(old, column, start)
                return old

            def both(number, old):
                return StackCache(*(one(number, *pair) for pair in zip(old, new, strict=True)))

            return jax.lax.fori_loop(zero, columns.shape[0], both, old)

        mesh = several_devices()
        if mesh is not None:
            whole = fit(self.keys.shape, None, ROWS, "tensor")
            rows = jax.shard_map(
                rows, mesh=mesh, in_specs=(whole, whole, P(whole[1])), out_specs=whole
            )
        return rows(self, new, columns)


class Past(NamedTuple):
    """What one layer sees of the tokens before: columns of a stack's cache, which is only read.

    Attributes:
      stack: of all layers.
      layer: int32 [], which of them.
      lengths: int32 [B], tokens of each row in the cache.
      first: the column of a row's token 0.
    """

    stack: StackCache
    layer: jax.Array | int
    lengths: jax.Array
    first: int = 0


class Context(NamedTuple):
    """What all layers share about the T tokens that pass through.

    Attributes:
      positions: int32 [B, T].
      segment_ids: int32 [B, T], 0 on padding.
    """

    positions: jax.Array
    segment_ids: jax.Array

    @property
    def valid(self) -> jax.Array:
        """bool [B, T], tokens that are not padding."""
        return self.segment_ids > 0


def visible(
    query_columns: Int[Array, "time"],
    segment_ids: Int[Array, "batch time"],
    key_segment_ids: Int[Array, "batch columns"],
) -> Bool[Array, "batch 1 time columns"]:
    """True where a query may see a key: not later, of the same sequence (padding is its own).

    >>> ids = jnp.array([[1, 1, 2]])
    >>> visible(jnp.arange(3), ids, ids)[0, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    columns = jnp.arange(key_segment_ids.shape[1], dtype=jnp.int32)
    causal = columns[None, :] <= query_columns[:, None]
    same = segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return (causal[None] & same)[:, None]


def attend(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch columns kv_heads head_dim"],
    value: Float[Array, "batch columns kv_heads head_dim"],
    context: Context,
    chunk: int = 0,
    kernel: str = "xla",
) -> Float[Array, "batch time heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over what each query may see, softmax at least in float32.

    Heads h * heads / kv_heads and those after it share key head h.

    Args:
      query, key, value: heads after rotary positions.
      context: who sees whom.
      chunk: queries whose scores exist at one time, recomputed in the backward pass; 0 is all.
      kernel: "splash" never has the scores in memory at all, on TPUs.

    Reference: Ainslie et al., GQA, arXiv 2305.13245.
    """
    if kernel == "splash":
        return _splash(query, key, value, context)
    time = query.shape[1]
    columns, segment_ids = jnp.arange(time, dtype=jnp.int32), context.segment_ids
    if not 0 < chunk < time:
        mask = visible(columns, segment_ids, segment_ids)
        return _attend(query, key, value, mask)
    count = -(-time // chunk)
    missing = count * chunk - time

    def cut(x, axis):
        padded = jnp.pad(x, [(0, missing) if i == axis else (0, 0) for i in range(x.ndim)])
        shape = (*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(padded.reshape(shape), axis, 0)

    @jax.checkpoint
    def some(inputs):
        some_query, some_columns, some_ids = inputs
        mask = visible(some_columns, some_ids, segment_ids)
        return _attend(some_query, key, value, mask)

    chunks = cut(query, 1), cut(columns, 0), cut(segment_ids, 1)
    mixed = jnp.moveaxis(jax.lax.map(some, chunks), 0, 1)
    return mixed.reshape(query.shape[0], count * chunk, *query.shape[2:])[:, :time]


def _attend(query, key, value, mask):
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    # JAX's function takes the softmax in float32 whatever it is given, which would leave float64
    # with eight digits.
    batch, time, heads, head_dim = query.shape
    grouped = query.reshape(batch, time, key.shape[2], -1, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key) * head_dim**-0.5
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1), value)
    return mixed.reshape(batch, time, heads, head_dim)


def attend_to_past(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads time head_dim"],
    value: Float[Array, "batch kv_heads time head_dim"],
    past: Past,
) -> Float[Array, "batch time heads head_dim"]:
    """The same for T further tokens of each row: they see the row's past, and those before them.

    The cache is read in blocks of columns up to the longest row's last, with a running maximum and
    sum of the softmax. A block beyond a row's own last changes nothing of that row, to the bit.

    Args:
      query, key, value: of the further tokens, after rotary positions.
      past: of this layer.

    Reference: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads, wide = key.shape[1], at_least_float32(query.dtype)
    grouped = query.reshape(batch, time, kv_heads, -1, head_dim)
    grouped = jnp.moveaxis(grouped, 1, 3).reshape(batch, kv_heads, -1, head_dim)

    def scores(keys, seen):
        product = jnp.einsum("bkqd,bksd->bkqs", grouped, keys, preferred_element_type=wide)
        seen = jnp.broadcast_to(seen, product.shape)
        return jnp.where(seen, product * head_dim**-0.5, -jnp.inf)

    def mixed(weights, values):
        weights = weights.astype(values.dtype)
        return jnp.einsum("bkqs,bksd->bkqd", weights, values, preferred_element_type=wide)

    def join(running, keys, values, seen):
        maximum, total, sums = running
        found = scores(keys, seen)
        larger = jnp.maximum(maximum, jnp.max(found, axis=-1, keepdims=True))
        shrink, weights = jnp.exp(maximum - larger), jnp.exp(found - larger)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return larger, total, sums * shrink + mixed(weights, values)

    size = past.stack.keys.shape[3]
    block = min(size, CACHE_BLOCK)

    def read(number, running):
        zero = jnp.zeros_like(number)
        start = (zero + past.layer, zero, zero, number * block, zero)
        shape = (1, batch, kv_heads, block, head_dim)
        keys, values = (jax.lax.dynamic_slice(x, start, shape)[0] for x in past.stack)
        column = number * block + jnp.arange(block, dtype=jnp.int32) - past.first
        seen = (column >= 0)[None] & (column[None] < past.lengths[:, None])
        return join(running, keys, values, seen[:, None, None])

    # Their own first: of these each sees one at least, itself.
    later = jnp.tile(jnp.tril(jnp.ones((time, time), bool)), (heads // kv_heads, 1))
    found = scores(key, later[None, None])
    maximum = jnp.max(found, axis=-1, keepdims=True)
    weights = jnp.exp(found - maximum)
    own = maximum, jnp.sum(weights, axis=-1, keepdims=True), mixed(weights, value)
    blocks = -(-(jnp.max(past.lengths) + past.first) // block)
    _, (_, total, sums) = jax.lax.while_loop(
        lambda state: (state[0] < size // block) & (state[0] < blocks),
        lambda state: (state[0] + 1, read(*state)),
        (jnp.zeros_like(blocks), own),
    )
    result = (sums / total).reshape(batch, kv_heads, heads // kv_heads, time, head_dim)
    return jnp.moveaxis(result, 3, 1).reshape(query.shape).astype(query.dtype)


def _splash(query, key, value, context: Context):
    """Pallas's kernel for TPUs, on each device's own rows and heads.

    Reference: Dao et al., FlashAttention, arXiv 2205.14135, whose order of summation it has.
    """
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    mesh = several_devices()
    if mesh is None:
        return _splash_on_device(scaled, key, value, context.segment_ids)
    heads = P(ROWS, None, "tensor")
    return jax.shard_map(
        _splash_on_device,
        mesh=mesh,
        in_specs=(heads, heads, heads, P(ROWS)),
        out_specs=heads,
        check_vma=False,  # which the kernel does not know; nothing it reads is replicated
    )(scaled, key, value, context.segment_ids)


def _splash_on_device(query, key, value, segment_ids):
    return jax.lax.platform_dependent(
        query,
        key,
        value,
        segment_ids,
        cpu=functools.partial(_splash_rows, interpret=True),
        default=functools.partial(_splash_rows, interpret=False),
    )


def _splash_rows(query, key, value, segment_ids, *, interpret: bool):
    # Here, since Pallas is slow to import and most runs do without it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, heads = query.shape[1:3]
    length = -(-time // 128) * 128  # the kernel's smallest block
    padding = [(0, 0), (0, length - time)]
    padded = [jnp.pad(x, [*padding, (0, 0), (0, 0)]) for x in (query, key, value)]
    block = next(size for size in (1024, 512, 256, 128) if length % size == 0)
    attend_row = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )

    def one_row(query, key, value, segment_ids):
        by_head = [jnp.swapaxes(x, 0, 1) for x in (query, key, value)]
        ids = kernel.SegmentIds(q=segment_ids, kv=segment_ids)
        return jnp.swapaxes(attend_row(*by_head, segment_ids=ids), 0, 1)

    inputs = (*padded, jnp.pad(segment_ids, padding))
    mixed = jax.vmap(one_row)(*inputs)
    return mixed[:, :time].astype(query.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Reference: Ainslie et al., GQA, arXiv 2305.13245.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.query = Linear(config.width, queries, config, rngs, bias=config.qkv_bias)
        self.key = Linear(config.width, keys, config, rngs, bias=config.qkv_bias)
        self.value = Linear(config.width, keys, config, rngs, bias=config.qkv_bias)
        self.output = Linear(queries, config.width, config, rngs)
        self.query_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.config = config

    def __call__(
        self, x: Float[Array, "batch time width"], context: Context, past: Past | None = None
    ) -> tuple[Float[Array, "batch time width"], StackCache]:
        """The output, and these tokens' keys and values [B, kv_heads, T, head_dim]."""
        batch, time, _ = x.shape
        config = self.config

        def heads(linear, norm):
            y = linear(x)
            if past is not None:
                # Without it the compiler for TPUs lays the product out by heads, turns the kernel
                # to that end, and so copies it out of the stack of layers for every token.
                y = jax.lax.optimization_barrier(y)
            y = y.reshape(batch, time, -1, config.head_dim)
            y = constrain(y, ROWS, None, "tensor")
            return y if norm is None else norm(y)

        def turn(y):
            return rotary(
                y,
                context.positions,
                base=config.rope_base,
                rotary_dim=config.rotary_dim,
                scaling=config.rope_scaling,
            )

        query = turn(heads(self.query, self.query_norm))
        key = turn(heads(self.key, self.key_norm))
        value = heads(self.value, None)
        new = StackCache(*(jnp.swapaxes(y, 1, 2) for y in (key, value)))
        if past is None:
            mixed = attend(query, key, value, context, config.attention_chunk, config.attention)
        else:
            mixed = attend_to_past(query, *new, past)
        return self.output(mixed.reshape(batch, time, -1)), new
