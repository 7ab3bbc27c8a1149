"""Grouped-query attention with rotary positions and a cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ.models.config import ModelConfig
from occ.models.layers import Linear, RMSNorm, rotary
from occ.models.partitioning import ROWS, constrain, several_devices

P = jax.P


class StackCache(NamedTuple):
    """Keys and values of a stack of layers: [L, B, S, kv_heads, head_dim] each."""

    keys: jax.Array
    values: jax.Array


class LayerCache(NamedTuple):
    """One layer's part of a stack's cache, which stays whole so that it is written in place.

    Attributes:
      stack: of all layers.
      layer: int32 [], which of them.
    """

    stack: StackCache
    layer: jax.Array

    def add(self, keys: jax.Array, values: jax.Array, column: jax.Array) -> LayerCache:
        """With the keys and values [B, T, kv_heads, head_dim] of T columns from `column` on."""
        first = jnp.zeros_like(self.layer)
        start = (self.layer, first, column.astype(first.dtype), first, first)
        stack = StackCache(
            *(
                jax.lax.dynamic_update_slice(old, new[None], start)
                for old, new in zip(self.stack, (keys, values), strict=True)
            )
        )
        return self._replace(stack=stack)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """The layer's keys and values, [B, S, kv_heads, head_dim] each."""
        keys, values = (
            jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in self.stack
        )
        return keys, values


class Context(NamedTuple):
    """What all layers share about the T tokens that pass through, and the S columns they see.

    Attributes:
      positions: int32 [B, T].
      segment_ids: int32 [B, T], 0 on padding.
      key_segment_ids: int32 [B, S], of the cache, these tokens included; without a cache, theirs.
      column: int32 [], the column of the first token among the S; None without a cache (0).
    """

    positions: jax.Array
    segment_ids: jax.Array
    key_segment_ids: jax.Array
    column: jax.Array | None = None

    @property
    def valid(self) -> jax.Array:
        """bool [B, T], tokens that are not padding."""
        return self.segment_ids > 0

    @property
    def query_columns(self) -> jax.Array:
        """int32 [T], the columns of these tokens among the S."""
        columns = jnp.arange(self.segment_ids.shape[1], dtype=jnp.int32)
        return columns if self.column is None else self.column + columns


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
      kernel: "splash" never has the scores in memory at all, on TPUs; whole sequences only, so
        steps of generation are the compiler's either way.

    Reference: Ainslie et al., GQA, arXiv 2305.13245.
    """
    if kernel == "splash" and context.column is None:
        return _splash(query, key, value, context)
    time = query.shape[1]
    if not 0 < chunk < time:
        mask = visible(context.query_columns, context.segment_ids, context.key_segment_ids)
        return _attend(query, key, value, mask)
    count = -(-time // chunk)
    missing = count * chunk - time

    def cut(x, axis):
        padded = jnp.pad(x, [(0, missing) if i == axis else (0, 0) for i in range(x.ndim)])
        shape = (*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(padded.reshape(shape), axis, 0)

    @jax.checkpoint
    def some(inputs):
        some_query, columns, segment_ids = inputs
        mask = visible(columns, segment_ids, context.key_segment_ids)
        return _attend(some_query, key, value, mask)

    chunks = cut(query, 1), cut(context.query_columns, 0), cut(context.segment_ids, 1)
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
        self, x: Float[Array, "batch time width"], context: Context, cache: LayerCache | None = None
    ) -> tuple[Float[Array, "batch time width"], LayerCache | None]:
        """The output, and the cache with these tokens added to it if one was given."""
        batch, time, _ = x.shape
        config = self.config

        def heads(linear, norm):
            y = linear(x).reshape(batch, time, -1, config.head_dim)
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
        if cache is not None:
            assert context.column is not None
            cache = cache.add(key, value, context.column)
            key, value = cache.read()
        mixed = attend(query, key, value, context, config.attention_chunk, config.attention)
        return self.output(mixed.reshape(batch, time, -1)), cache
