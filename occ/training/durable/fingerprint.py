"""A number for the bits of every array of a tree, the same on every layout of devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


@jax.jit
def fingerprint(tree: Any) -> Any:
    """Fingerprints of all leaves: sum_i (2 i + 1) bits_i mod 2^32, over entries i.

    Sums of integers do not depend on their order, so neither on how arrays lie on devices. An
    odd factor has an inverse mod 2^32: a change of any one word of up to 32 bits always shows.

    Returns:
      A tree like it of uint32 [].
    """
    return jax.tree.map(_of_array, tree)


def _of_array(array: jax.Array) -> jax.Array:
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (index * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits of all entries, as uint32; entries of 64 bits have two words."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = min(array.dtype.itemsize, 4) * 8
    return jax.lax.bitcast_convert_type(array, f"uint{width}").astype(jnp.uint32)
