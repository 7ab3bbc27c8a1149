"""Columns of a batch in chunks of a few."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Columns `first` to `time` of arrays [B, T, ...], `size` at a time; the last are filled up.

    Attributes:
      first: columns before it are in no chunk.
      time: T.
      size: columns of a chunk.
    """

    first: int
    time: int
    size: int

    @property
    def count(self) -> int:
        """How many chunks."""
        return -(-(self.time - self.first) // self.size)

    def cut(self, values: jax.Array) -> jax.Array:
        """Chunks [count, B, size, ...] of an array [B, T, ...], filled up with zeros.

        >>> Chunks(1, 4, 2).cut(jnp.array([[1, 2, 3, 4]])).tolist()
        [[[2, 3]], [[4, 0]]]
        """
        missing = self.count * self.size - (self.time - self.first)
        padding = [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2)
        padded = jnp.pad(values[:, self.first :], padding)
        return jnp.moveaxis(padded.reshape(-1, self.count, self.size, *values.shape[2:]), 1, 0)

    def join(self, chunks: jax.Array) -> jax.Array:
        """The inverse of `cut`; 0 in the columns before the first."""
        columns = jnp.moveaxis(chunks, 0, 1).reshape(
            chunks.shape[1], self.count * self.size, *chunks.shape[3:]
        )
        return self.put_back(columns[:, : self.time - self.first])

    def place(self, chunk: jax.Array, index: jax.Array) -> jax.Array:
        """An array [B, T, ...] that is 0 outside the chunk [B, size, ...] with this index."""
        return self.join(jnp.zeros((self.count, *chunk.shape), chunk.dtype).at[index].set(chunk))

    def put_back(self, values: jax.Array) -> jax.Array:
        """Columns [B, T, ...], from those after `first`, with zeros before them."""
        if not self.first:
            return values
        return jnp.pad(values, [(0, 0), (self.first, 0)] + [(0, 0)] * (values.ndim - 2))
