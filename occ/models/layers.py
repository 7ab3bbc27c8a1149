"""The decoder's layers: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Kernels are stored as [inputs, outputs]. Every layer computes in `config.compute_dtype`; statistics
of norms, rotary angles and the attention softmax are at least float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ.measures import accumulation_dtype
from occ.models.config import ModelConfig
from occ.models.partitioning import ROWS, constrain


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or the dtype itself where that is wider."""
    return accumulation_dtype(dtype)


class Linear(nnx.Module):
    """y = x W (+ b); kernel [inputs, outputs]."""

    def __init__(
        self, inputs: int, outputs: int, config: ModelConfig, rngs: nnx.Rngs, *, bias: bool = False
    ):
        scale = inputs**-0.5
        kernel = scale * jax.random.normal(rngs.params(), (inputs, outputs), config.params)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((outputs,), config.params)) if bias else None
        self.dtype = config.compute

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Multiplies the last axis."""
        y = x @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + jax.lax.broadcast_in_dim(
                self.bias[...].astype(self.dtype), y.shape, (y.ndim - 1,)
            )
        return y


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    def __init__(self, width: int, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones((width,), config.params))
        self.epsilon = config.norm_epsilon
        self.dtype = config.compute

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises the last axis, in at least float32."""
        wide = x.astype(at_least_float32(x.dtype))
        variance = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normal = wide * jax.lax.rsqrt(variance + self.epsilon)
        scale = self.scale[...].astype(wide.dtype)
        scale = jax.lax.broadcast_in_dim(scale, normal.shape, (normal.ndim - 1,))
        return (normal * scale).astype(self.dtype)


def rotary(
    x: Float[Array, "batch time heads head_dim"],
    positions: Int[Array, "batch time"],
    *,
    base: float,
    rotary_dim: int,
) -> Float[Array, "batch time heads head_dim"]:
    """Rotates the first `rotary_dim` dimensions of each head by its position.

    Dimension i turns with dimension i + rotary_dim / 2 (the half-split convention of the published
    Llama, Qwen and MiMo weights), at frequency base^(-2 i / rotary_dim).

    Reference: Su et al., RoFormer, arXiv 2104.09864.
    """
    dtype = at_least_float32(x.dtype)
    half = rotary_dim // 2
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions[:, :, None, None].astype(dtype) * frequency[None, None, None, :]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    turned, rest = x[..., :rotary_dim].astype(dtype), x[..., rotary_dim:]
    first, second = turned[..., :half], turned[..., half:]
    rotated = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


class LayerCache(NamedTuple):
    """Keys and values of one layer: [B, S, kv_heads, head_dim] each."""

    keys: jax.Array
    values: jax.Array


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
) -> Float[Array, "batch time heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over what each query may see, softmax at least in float32.

    Heads h * heads / kv_heads and those after it share key head h.

    Args:
      query, key, value: heads after rotary positions.
      context: who sees whom.
      chunk: queries whose scores exist at one time, recomputed in the backward pass; 0 is all.

    Reference: Ainslie et al., GQA, arXiv 2305.13245.
    """
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
            return rotary(y, context.positions, base=config.rope_base, rotary_dim=config.rotary_dim)

        query = turn(heads(self.query, self.query_norm))
        key = turn(heads(self.key, self.key_norm))
        value = heads(self.value, None)
        if cache is not None:
            assert context.column is not None
            cache = LayerCache(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, new, context.column, axis=1)
                    for old, new in zip(cache, (key, value), strict=True)
                )
            )
            key, value = cache
        mixed = attend(query, key, value, context, config.attention_chunk)
        return self.output(mixed.reshape(batch, time, -1)), cache


class MLP(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down.

    Reference: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, hidden: int):
        self.gate = Linear(config.width, hidden, config, rngs)
        self.up = Linear(config.width, hidden, config, rngs)
        self.down = Linear(hidden, config.width, config, rngs)

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """down(silu(gate(x)) * up(x))."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
