"""Kernels in eight bits, with a scale for each output."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST = 127


def quantise(
    kernel: Float[Array, "*layers inputs outputs"],
) -> tuple[Int[Array, "*layers inputs outputs"], Float[Array, "*layers outputs"]]:
    """W = Q s to the nearest, Q int8 and s float32 the largest |W| of a column, over 127.

    An entry is off by s / 2 at the most.

    Reference: Dettmers et al., LLM.int8(), arXiv 2208.07339, section 2.1 (vector-wise, of the
    weights alone).

    >>> values, scale = quantise(jnp.array([[0.5, -2.0], [1.27, 1.0]]))
    >>> values.tolist(), [round(float(s), 4) for s in scale]
    ([[50, -127], [127, 64]], [0.01, 0.0157])
    """
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-2) / LARGEST
    divisor = jnp.where(scale > 0, scale, 1.0)[..., None, :]
    return jnp.round(wide / divisor).astype(jnp.int8), scale


def dequantise(
    values: Int[Array, "*layers inputs outputs"], scale: Float[Array, "*layers outputs"]
) -> Float[Array, "*layers inputs outputs"]:
    """Q s, in float32."""
    return values.astype(scale.dtype) * scale[..., None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantised_product(
    x: Float[Array, "*batch inputs"],
    values: Int[Array, "inputs outputs"],
    scale: Float[Array, "outputs"],
    wide: Any,
) -> Float[Array, "*batch outputs"]:
    """x (Q s), summed in the dtype `wide`, which it is returned in; Q is exact in any dtype of x.

    The scale comes last, so that no kernel is made of it. The gradient is of x alone, its product
    in x's own dtype, as that of a kernel of this dtype is.
    """
    y = jnp.matmul(x, values.astype(x.dtype), preferred_element_type=wide)
    return y * jax.lax.broadcast_in_dim(scale.astype(wide), y.shape, (y.ndim - 1,))


def _forward(x, values, scale, wide):
    return quantised_product(x, values, scale, wide), (values, scale, jnp.zeros((), x.dtype))


def _backward(_, residuals, cotangent):
    values, scale, like = residuals
    scale = jax.lax.broadcast_in_dim(
        scale.astype(cotangent.dtype), cotangent.shape, (cotangent.ndim - 1,)
    )
    scaled = (cotangent * scale).astype(like.dtype)
    return scaled @ values.T.astype(like.dtype), None, None


quantised_product.defvjp(_forward, _backward)
