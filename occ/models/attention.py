"""Grouped-query attention with rotary positions."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ.models.cache import Past, StackCache, attend_to_past, decode_kernel
from occ.models.config import ModelConfig
from occ.models.layers import Linear, RMSNorm, rotary
from occ.models.partitioning import ROWS, constrain, platform, several_devices

P = jax.P


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
      kernel: "splash" (TPUs) and "cudnn" (GPUs) never have the scores in memory at all.

    Reference: Ainslie et al., GQA, arXiv 2305.13245.
    """
    if kernel == "splash":
        return _splash(query, key, value, context)
    if kernel == "cudnn":
        return _cudnn(query, key, value, context.segment_ids)
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


def prefill_kernel(config: ModelConfig) -> str:
    """`attention`, where "auto" is what suits the devices.

    cuDNN takes 16 bits and heads of a multiple of 8, at most 128.
    """
    if config.attention != "auto":
        return config.attention
    suits = config.compute.itemsize == 2 and config.head_dim % 8 == 0 and config.head_dim <= 128
    return "cudnn" if suits and platform() == "gpu" else "xla"


CUDNN: Literal["cudnn", "xla"] = "cudnn"


def _cudnn(query, key, value, segment_ids):
    """NVIDIA's kernel, which wants an even number of tokens."""
    time = query.shape[1]
    padding = [(0, 0), (0, time % 2)]
    query, key, value = (jnp.pad(x, [*padding, (0, 0), (0, 0)]) for x in (query, key, value))
    return _cudnn_even(query, key, value, jnp.pad(segment_ids, padding))[:, :time]


def _cudnn_plain(query, key, value, segment_ids):
    same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=same, is_causal=True, implementation=CUDNN
    )


# Under vmap one after the other: JAX's own rule for several cotangents refuses a mask of all heads.
@jax.custom_batching.sequential_vmap
def _cudnn_forward(inputs):
    return _cudnn_plain(*inputs)


@jax.custom_batching.sequential_vmap
def _cudnn_backward(inputs, cotangent):
    query, key, value, segment_ids = inputs
    _, pull = jax.vjp(lambda q, k, v: _cudnn_plain(q, k, v, segment_ids), query, key, value)
    return pull(cotangent)


@jax.custom_vjp
def _cudnn_even(query, key, value, segment_ids):
    return _cudnn_forward((query, key, value, segment_ids))


_cudnn_even.defvjp(
    lambda *inputs: (_cudnn_forward(inputs), inputs),
    lambda inputs, cotangent: (*_cudnn_backward(inputs, cotangent), None),
)


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
        keys, bias = config.num_kv_heads * config.head_dim, config.qkv_bias
        self.query = Linear(config.width, queries, config, rngs, bias=bias, name="query")
        self.key = Linear(config.width, keys, config, rngs, bias=bias, name="key")
        self.value = Linear(config.width, keys, config, rngs, bias=bias, name="value")
        self.output = Linear(queries, config.width, config, rngs, name="output")
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
            mixed = attend(
                query, key, value, context, config.attention_chunk, prefill_kernel(config)
            )
        else:
            mixed = attend_to_past(query, *new, past, decode_kernel(config))
        return self.output(mixed.reshape(batch, time, -1)), new
