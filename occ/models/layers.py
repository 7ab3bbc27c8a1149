"""The decoder's plain layers: linear, embedding, RMSNorm, rotary positions, SwiGLU.

Kernels are stored as [inputs, outputs]. Every layer computes in `config.compute_dtype`; statistics
of norms and rotary angles are at least float32.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from occ.measures import accumulation_dtype
from occ.models.config import ModelConfig, RopeScaling
from occ.models.partitioning import constrain
from occ.models.quantisation import quantise, quantised_product


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or the dtype itself where that is wider."""
    return accumulation_dtype(dtype)


def first_of_the_largest(scores: Float[Array, "*batch vocab"]) -> Int[Array, "*batch"]:
    """`argmax` over the last axis in two passes, the largest and the first equal to it; int32.

    The compiler for CPUs makes one pass of `argmax`, number by number with all that is fused into
    it: 24 ms for 32 rows of 49,152 tokens with their noise, where these take 10. A row in which one
    is NaN gives the last token.

    >>> first_of_the_largest(jnp.array([[0.0, 2.0, 2.0], [-jnp.inf, -jnp.inf, -1.0]])).tolist()
    [1, 2]
    """
    largest = jnp.max(scores, axis=-1, keepdims=True)
    number = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    return jnp.min(jnp.where(scores == largest, number, scores.shape[-1] - 1), axis=-1)


FEW_ROWS = 64
"""Up to so many, `turned_product` is the faster one."""


def turned_product(
    x: Float[Array, "*batch inputs"], turned: Float[Array, "outputs inputs"], wide: jnp.dtype
) -> Float[Array, "*batch outputs"]:
    """x W for few rows, from W^T in memory: (W^T x^T)^T, summed in the dtype `wide`.

    A library's product packs the matrix on its right: on CPUs that is the whole kernel, for every
    token of a few rows. With the rows on the right, 4 to 16 of them take 0.4 to 0.85 of the time.
    The barrier keeps the compiler from turning it back.
    """
    rows = x.reshape(-1, x.shape[-1])
    contracted = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(turned, rows, contracted, preferred_element_type=wide)
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], turned.shape[0])


def few_rows(x: Float[Array, "*batch inputs"]) -> bool:
    """Whether `turned_product` is for them."""
    return math.prod(x.shape[:-1]) <= FEW_ROWS


class Linear(nnx.Module):
    """y = x W (+ b); kernel [inputs, outputs]. With an adapter, y = x W + s (x A) B (+ b).

    A frozen W may be stored in eight bits, with a scale for each output.

    Args:
      inputs, outputs: sizes of the last axis.
      config: of the model.
      rngs: random numbers for the initial weights.
      bias: whether there is one.
      name: of the kernel in `LoRAConfig.kernels`; None never has an adapter, nor eight bits.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
        name: str | None = None,
    ):
        scale, key = inputs**-0.5, rngs.params()
        kernel = scale * jax.random.normal(key, (inputs, outputs), config.base)
        in_eight_bits = config.lora is not None and config.lora.quantised == "int8"
        scales = None
        if in_eight_bits and name is not None:
            kernel, scales = quantise(kernel)
        self.kernel_scale = None if scales is None else nnx.Param(scales)
        self.kernel = nnx.Param(kernel)
        self.turned: jax.Array | None = None
        self.bias = nnx.Param(jnp.zeros((outputs,), config.base)) if bias else None
        self.dtype = config.compute
        lora = config.lora
        self.scale = None if lora is None or name not in lora.kernels else lora.scale
        if self.scale is not None:
            assert lora is not None
            # Folded in, since a draw of its own would change all kernels after this one.
            key, shape = jax.random.fold_in(key, 1), (inputs, lora.rank)
            self.lora_a = nnx.Param(jax.random.uniform(key, shape, config.params, -scale, scale))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, outputs), config.params))

    def turn(self) -> None:
        """Keeps W^T as well, for few rows; what it costs is paid once, before a loop over tokens.

        A kernel in eight bits stays as it is.
        """
        if self.kernel_scale is None:
            turned = self.kernel[...].astype(self.dtype).T
            self.turned = nnx.data(jax.lax.optimization_barrier(turned))

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Multiplies the last axis."""
        if self.turned is not None and few_rows(x):
            y = turned_product(x, self.turned, self.dtype)
        elif self.kernel_scale is None:
            y = x @ self.kernel[...].astype(self.dtype)
        else:
            wide = at_least_float32(self.dtype)
            y = quantised_product(x, self.kernel[...], self.kernel_scale[...], wide)
            y = y.astype(self.dtype)
        if self.scale is not None:
            low = x @ self.lora_a[...].astype(self.dtype)
            y = y + self.scale * (low @ self.lora_b[...].astype(self.dtype))
        if self.bias is not None:
            y = y + jax.lax.broadcast_in_dim(
                self.bias[...].astype(self.dtype), y.shape, (y.ndim - 1,)
            )
        return y


class Embedding(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        normal = jax.random.normal(rngs.params(), (config.vocab_size, config.width), config.base)
        self.embedding = nnx.Param(config.width**-0.5 * normal)
        self.turned: jax.Array | None = None
        self.dtype = config.compute

    def turn(self) -> None:
        """As an output head, the table is W^T as it lies: for few rows."""
        self.turned = nnx.data(self.embedding[...].astype(self.dtype))

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
        """Rows of the table, in the compute dtype."""
        # Gathered where it is cut for training; else activations would be, after the lookup.
        table = constrain(self.embedding[...].astype(self.dtype), "tensor")
        return table[tokens]


def vocabulary_product(
    x: Float[Array, "batch time width"], kernel: Float[Array, "width vocab"], dtype: jnp.dtype
) -> Float[Array, "batch time vocab"]:
    """x W in a dtype of computation, summed in at least float32.

    So is the kernel's gradient. Where the dtype is narrower than the kernel's, autodiff would round
    it to that dtype: once for every chunk of columns, and before chips add theirs.
    """
    if kernel.dtype == dtype:
        return _product(x, kernel)
    return _narrow_product(x, kernel, dtype)


def _product(x, kernel):
    wide = at_least_float32(x.dtype)
    contracted = (((2,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, contracted, preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _narrow_product(x, kernel, dtype):
    return _product(x, kernel.astype(dtype))


def _narrow_forward(x, kernel, dtype):
    # What no gradient is asked for (a detached head's kernel) is not multiplied in vain.
    asked = tuple(() if primal.perturbed else None for primal in (x, kernel))
    return _narrow_product(x.value, kernel.value, dtype), (x.value, kernel.value, asked)


def _narrow_backward(dtype, residuals, cotangent):
    x, kernel, asked = residuals
    over_vocab, over_tokens = (((2,), (1,)), ((), ())), (((0, 1), (0, 1)), ((), ()))

    def product(a, b, contracted, like):
        wide = jax.lax.dot_general(a, b, contracted, preferred_element_type=cotangent.dtype)
        return wide.astype(like.dtype)

    return (
        None if asked[0] is None else product(cotangent, kernel.astype(dtype), over_vocab, x),
        None if asked[1] is None else product(x, cotangent, over_tokens, kernel),
    )


_narrow_product.defvjp(_narrow_forward, _narrow_backward, symbolic_zeros=True)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis.

    Reference: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    def __init__(self, width: int, config: ModelConfig):
        self.scale = nnx.Param(jnp.ones((width,), config.base))
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
    scaling: RopeScaling | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Rotates the first `rotary_dim` dimensions of each head by its position.

    Dimension i turns with dimension i + rotary_dim / 2 (the half-split convention of the published
    Llama, Qwen and MiMo weights), at frequency base^(-2 i / rotary_dim).

    Reference: Su et al., RoFormer, arXiv 2104.09864.
    """
    dtype = at_least_float32(x.dtype)
    half = rotary_dim // 2
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    if scaling is not None:
        frequency = scaled_frequency(frequency, scaling)
    angle = positions[:, :, None, None].astype(dtype) * frequency[None, None, None, :]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    turned, rest = x[..., :rotary_dim].astype(dtype), x[..., rotary_dim:]
    first, second = turned[..., :half], turned[..., half:]
    rotated = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def scaled_frequency(
    frequency: Float[Array, "pairs"], scaling: RopeScaling
) -> Float[Array, "pairs"]:
    """Rotary frequencies, radians a token, slowed down as `RopeScaling` says."""
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_length * frequency / (2 * math.pi)
    share = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (1 - share) * slow + share * frequency


class MLP(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down.

    Reference: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, hidden: int):
        self.gate = Linear(config.width, hidden, config, rngs, name="gate")
        self.up = Linear(config.width, hidden, config, rngs, name="up")
        self.down = Linear(hidden, config.width, config, rngs, name="down")

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """down(silu(gate(x)) * up(x))."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
