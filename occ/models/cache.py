"""Keys and values of the tokens before, and attention to them, for generation."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from occ.models import cache_kernels
from occ.models.cache_kernels import Sums
from occ.models.config import ModelConfig
from occ.models.layers import at_least_float32
from occ.models.partitioning import ROWS, fit, platform, several_devices

P = jax.P

CACHE_BLOCK = 256
"""Columns of a cache that attention reads at one time, between which its running sums travel."""


def columns_in_blocks(columns: int, kernel: str = "xla") -> int:
    """Columns of a cache with room for so many: whole blocks, if there is more than one.

    >>> columns_in_blocks(100), columns_in_blocks(CACHE_BLOCK + 1) // CACHE_BLOCK
    (100, 2)
    >>> columns_in_blocks(100, "pallas") // cache_kernels.COLUMNS
    1
    """
    if columns > CACHE_BLOCK:
        return -(-columns // CACHE_BLOCK) * CACHE_BLOCK
    if kernel == "pallas":
        return -(-columns // cache_kernels.COLUMNS) * cache_kernels.COLUMNS
    return columns


def decode_kernel(config: ModelConfig) -> str:
    """`decode_attention`, where "auto" is what suits the devices."""
    if config.decode_attention != "auto":
        return config.decode_attention
    return "pallas" if platform() == "gpu" and cache_kernels.suits(config) else "xla"


class StackCache(NamedTuple):
    """Keys and values of a stack of layers: [L, B, kv_heads, S, head_dim] each.

    What a head reads lies together, so that it is multiplied where it lies.
    """

    keys: jax.Array
    values: jax.Array

    def write(self, new: StackCache, columns: Int[Array, "batch"], layer: int = 0) -> StackCache:
        """With T further columns, from each row's own column on; as `write`, of one stack.

        Args:
          new: [L', B, kv_heads, T, head_dim] each.
          columns: int32 [B], the first to write of each row.
          layer: the first of the L' layers.
        """
        return write((self,), (new,), columns, layer)[0]


Stacks = tuple[StackCache, ...]


def write(stacks: Stacks, new: Stacks, columns: Int[Array, "batch"], layer: int = 0) -> Stacks:
    """Caches with T further columns each, from each row's own column on.

    On GPUs all at once, in one kernel. Elsewhere one row after the other, each where it lies:
    written all at once, the compiler for TPUs wants rows along the slowest axis, reading wants
    layers there, and so the whole cache would be turned round and back for every token. A loop
    that writes two columns at a time makes it fail (libtpu 0.0.42).

    Args:
      stacks: of several stacks of layers.
      new: [L', B, kv_heads, T, head_dim] each, of each stack.
      columns: int32 [B], the first to write of each row.
      layer: the first of the L' layers.
    """

    def rows(olds: Stacks, news: Stacks, columns):
        zero = jnp.zeros_like(columns[0])

        def one(number, old, new):
            row = jax.lax.dynamic_slice_in_dim(new, number, 1, axis=1)
            for token in range(row.shape[3]):
                start = (zero + layer, number, zero, columns[number] + token, zero)
                column = row[:, :, :, token : token + 1]
                old = jax.lax.dynamic_update_slice(old, column, start)
            return old

        def all_of(number, olds):
            return jax.tree.map(functools.partial(one, number), olds, news)

        return jax.lax.fori_loop(zero, columns.shape[0], all_of, olds)

    def at_once(olds: Stacks, news: Stacks, columns):
        row = jnp.arange(columns.shape[0], dtype=jnp.int32)[:, None]

        def one(old, new):
            layers, time = new.shape[0], new.shape[3]
            column = columns[:, None] + jnp.arange(time, dtype=jnp.int32)[None]
            where = old.at[layer : layer + layers, row, :, column]
            return where.set(jnp.transpose(new, (1, 3, 0, 2, 4)), unique_indices=True)

        return jax.tree.map(one, olds, news)

    do = at_once if platform() == "gpu" else rows
    mesh = several_devices()
    if mesh is not None:
        whole = jax.tree.map(lambda old: fit(old.shape, None, ROWS, "tensor"), stacks)
        of_rows = P(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, P))[0][1])
        do = jax.shard_map(do, mesh=mesh, in_specs=(whole, whole, of_rows), out_specs=whole)
    return do(stacks, new, columns)


class Cache(NamedTuple):
    """Keys and values of all layers, for generation; a row's token t is in column t.

    Attributes:
      stacks: of each stack of layers.
      lengths: int32 [B], tokens of each row; what is in later columns is not read.
      experts: int [B, C, L, k], of each token in the L layers that have some; None keeps none.
    """

    stacks: tuple[StackCache, ...]
    lengths: jax.Array
    experts: jax.Array | None = None

    @property
    def apart(self) -> Cache:
        """With each layer as a stack of its own, as `Decoder.layers_apart` has them."""
        of_layer = [
            jax.tree.map(lambda x, i=i: x[i : i + 1], stack)
            for stack in self.stacks
            for i in range(stack.keys.shape[0])
        ]
        return self._replace(stacks=tuple(of_layer))


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


def attend_to_past(
    query: Float[Array, "batch time heads head_dim"],
    key: Float[Array, "batch kv_heads time head_dim"],
    value: Float[Array, "batch kv_heads time head_dim"],
    past: Past,
    kernel: str = "xla",
) -> Float[Array, "batch time heads head_dim"]:
    """What `attend` is, for T further tokens of each row: they see its past, and those before them.

    The running maximum and sum of the softmax go from the tokens' own keys to the cache's.

    Args:
      query, key, value: of the further tokens, after rotary positions.
      past: of this layer.
      kernel: "xla" reads the cache in blocks of columns up to the longest row's last, and a block
        beyond a row's own last changes nothing of that row, to the bit; "pallas" reads the columns
        of each row, on GPUs and TPUs.

    Reference: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, time, kv_heads, -1, head_dim)
    grouped = jnp.moveaxis(grouped, 1, 3).reshape(batch, kv_heads, -1, head_dim)
    # Their own first: of these each sees one at least, itself.
    later = jnp.tile(jnp.tril(jnp.ones((time, time), bool)), (heads // kv_heads, 1))
    scores = _scores(grouped, key, later[None, None])
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - maximum)
    own = Sums(maximum, jnp.sum(weights, axis=-1, keepdims=True), _mixed(weights, value))
    if kernel == "pallas":
        sums = own.join(_read_by_kernel(grouped, past))
    else:
        sums = _read_in_blocks(grouped, past, own)
    result = (sums.mixed / sums.total).reshape(batch, kv_heads, heads // kv_heads, time, head_dim)
    return jnp.moveaxis(result, 3, 1).reshape(query.shape).astype(query.dtype)


def _scores(query, keys, seen):
    wide = at_least_float32(query.dtype)
    product = jnp.einsum("bkqd,bksd->bkqs", query, keys, preferred_element_type=wide)
    seen = jnp.broadcast_to(seen, product.shape)
    return jnp.where(seen, product * query.shape[-1] ** -0.5, -jnp.inf)


def _mixed(weights, values):
    return jnp.einsum(
        "bkqs,bksd->bkqd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=at_least_float32(values.dtype),
    )


def _read_in_blocks(query, past: Past, own: Sums) -> Sums:
    """With the keys of the past, a block of columns at one time."""
    batch, kv_heads, _, head_dim = query.shape
    size = past.stack.keys.shape[3]
    block = min(size, CACHE_BLOCK)

    def read(number, running: Sums) -> Sums:
        zero = jnp.zeros_like(number)
        start = (zero + past.layer, zero, zero, number * block, zero)
        shape = (1, batch, kv_heads, block, head_dim)
        keys, values = (jax.lax.dynamic_slice(x, start, shape)[0] for x in past.stack)
        column = number * block + jnp.arange(block, dtype=jnp.int32) - past.first
        seen = (column >= 0)[None] & (column[None] < past.lengths[:, None])
        found = _scores(query, keys, seen[:, None, None])
        larger = jnp.maximum(running.maximum, jnp.max(found, axis=-1, keepdims=True))
        shrink, weights = jnp.exp(running.maximum - larger), jnp.exp(found - larger)
        total = running.total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return Sums(larger, total, running.mixed * shrink + _mixed(weights, values))

    blocks = -(-(jnp.max(past.lengths) + past.first) // block)
    _, sums = jax.lax.while_loop(
        lambda state: (state[0] < size // block) & (state[0] < blocks),
        lambda state: (state[0] + 1, read(*state)),
        (jnp.zeros_like(blocks), own),
    )
    return sums


def _read_by_kernel(query, past: Past) -> Sums:
    """Of the past alone, on each device's own rows and heads."""
    read = functools.partial(cache_kernels.attend_to_cache, first=past.first)
    layer = jnp.asarray(past.layer, jnp.int32)
    mesh = several_devices()
    if mesh is not None:
        cache = fit(past.stack.keys.shape, None, ROWS, "tensor")
        rows = P(cache[1], cache[2])
        read = jax.shard_map(
            read,
            mesh=mesh,
            in_specs=(rows, cache, cache, P(), P(cache[1])),
            out_specs=rows,
            check_vma=False,  # which the kernel does not know
        )
    return read(query, *past.stack, layer, past.lengths)
