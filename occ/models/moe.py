"""Mixture-of-experts MLP in the form of GLM-4.5 and DeepSeek-V3, without dropped tokens."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ.models.config import ModelConfig
from occ.models.expert_parallel import ExpertWeights, Placement, on_mesh
from occ.models.layers import MLP, at_least_float32

FEW = 256
"""Pairs up to which a product with every expert's matrix takes less than copying the matrices.

On a TPU v5p 166 operations take as long as reading a byte, so that 256 pairs take half as long
again as reading the matrices once; copied and read again they are moved three times.
"""


class Routed(NamedTuple):
    """What a mixture of experts hands on.

    Attributes:
      y: float [B, T, D].
      load: float32 [E], tokens that each expert received.
      chosen: int32 [B, T, k], the experts of each token, the likeliest first.
    """

    y: jax.Array
    load: jax.Array
    chosen: jax.Array


class RouterBias(nnx.Variable):
    """The router's correction bias: neither trained nor decayed, so not an `nnx.Param`."""


class MixtureOfExperts(nnx.Module):
    """Sigmoid routing with a correction bias, normalised top-k gates, shared experts.

        s = sigmoid(x W_router),   chosen = top-k of s + bias,   gate_e = s_e / sum_chosen s
        y = scaling * sum_chosen gate_e expert_e(x) + shared(x)

    The bias decides who is chosen and not how much it counts. Padding is sent to no expert.

    Sampling and training round differently, and where two experts are all but equal they then
    choose differently. Replaying the choice of sampling (Ma et al., arXiv 2510.11370) leaves the
    same experts in both.

    Reference: DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437, equations 12 to 16;
    GLM-4.5 team, GLM-4.5, arXiv 2508.06471.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        moe = config.moe
        if moe is None:
            raise ValueError("MixtureOfExperts needs ModelConfig.moe, got None.")

        def kernel(*shape):
            normal = jax.random.normal(rngs.params(), shape, config.base)
            return nnx.Param(shape[-2] ** -0.5 * normal)

        self.router = kernel(config.width, moe.num_experts)
        self.router_bias = RouterBias(jnp.zeros((moe.num_experts,), jnp.float32))
        self.gate_kernel = kernel(moe.num_experts, config.width, moe.expert_width)
        self.up_kernel = kernel(moe.num_experts, config.width, moe.expert_width)
        self.down_kernel = kernel(moe.num_experts, moe.expert_width, config.width)
        shared_width = moe.expert_width * moe.num_shared_experts
        self.shared = MLP(config, rngs, hidden=shared_width) if shared_width else None
        self.moe = moe
        self.dtype = config.compute

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        valid: Bool[Array, "batch time"],
        replayed: Int[Array, "batch time k"] | None = None,
        *,
        whole: bool = False,
    ) -> Routed:
        """The layer's output, how many tokens each expert received, and the experts of each token.

        On a mesh every device routes its own rows, and tokens travel to the experts' devices; see
        `occ.models.expert_parallel`.

        Args:
          x: hidden state.
          valid: tokens that are not padding.
          replayed: experts that were chosen before, and are taken again in place of the router's
            choice; it still weighs them, and its gradient is that of their weights. -1 is none, of
            which the router chooses.
          whole: expect the kernels gathered along "fsdp", as generation has them, once for all
            tokens.
        """
        on_device = functools.partial(self._on_device, generating=whole)
        y, load, chosen = on_mesh(on_device, x, valid, replayed, self._weights(), whole=whole)
        y = y.astype(self.dtype)
        return Routed(y if self.shared is None else y + self.shared(x), load, chosen)

    def _weights(self) -> ExpertWeights:
        kernels = (self.gate_kernel, self.up_kernel, self.down_kernel)
        return ExpertWeights(
            self.router[...],
            jax.lax.stop_gradient(self.router_bias[...]),
            *(kernel[...].astype(self.dtype) for kernel in kernels),
        )

    def _on_device(
        self, x, valid, replayed, weights: ExpertWeights, placement: Placement, *, generating
    ):
        """The routed experts' sum on the rows of one device, at least float32; load and choice."""
        tokens_NxD = x.reshape(-1, x.shape[-1])
        experts_Nxk, gates_Nxk = self._route(tokens_NxD, weights, replayed)
        absent = self.moe.num_experts  # sorts behind every expert
        pair_expert = jnp.where(valid.reshape(-1)[:, None], experts_Nxk, absent).reshape(-1)
        y_NkxD, load = placement.apply_experts(
            tokens_NxD,
            pair_expert,
            functools.partial(apply_experts, weights=weights, generating=generating),
            self.moe,
        )
        y_NxkxD = y_NkxD.reshape(*experts_Nxk.shape, -1)
        dtype = gates_Nxk.dtype
        total = jnp.sum(y_NxkxD.astype(dtype) * gates_Nxk[:, :, None], axis=1)
        load = jax.lax.stop_gradient(load).astype(jnp.float32)
        return total.reshape(x.shape), load, experts_Nxk.reshape(*x.shape[:2], -1)

    def _route(
        self, tokens: Float[Array, "tokens width"], weights: ExpertWeights, replayed: Any = None
    ) -> tuple[Int[Array, "tokens k"], Float[Array, "tokens k"]]:
        moe = self.moe
        dtype = at_least_float32(tokens.dtype)
        logits = tokens.astype(dtype) @ weights.router.astype(dtype)
        scores = jax.nn.sigmoid(logits)
        choice = scores + weights.router_bias.astype(dtype)[None]
        if moe.num_groups > 1:
            choice = self._keep_best_groups(choice)
        _, experts = jax.lax.top_k(jax.lax.stop_gradient(choice), moe.experts_per_token)
        if replayed is not None:
            before = replayed.reshape(experts.shape).astype(experts.dtype)
            experts = jnp.where(before >= 0, before, experts)
        gates = jnp.take_along_axis(scores, experts, axis=-1)
        if moe.normalise_top_k:
            gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
        return experts, gates * moe.routed_scaling

    def _keep_best_groups(self, choice: jax.Array) -> jax.Array:
        """Removes the experts outside the best groups from the choice."""
        moe = self.moe
        size = moe.num_experts // moe.num_groups
        grouped = choice.reshape(-1, moe.num_groups, size)
        group_score = jnp.sum(jax.lax.top_k(grouped, min(2, size))[0], axis=-1)
        _, best = jax.lax.top_k(group_score, moe.top_groups)
        groups = jnp.arange(moe.num_groups, dtype=best.dtype)
        kept = jnp.any(best[:, :, None] == groups[None, None], axis=1)
        return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def apply_experts(
    x: Float[Array, "pairs width"],
    expert: Int[Array, "pairs"],
    weights: ExpertWeights,
    *,
    generating: bool = False,
) -> Float[Array, "pairs width"]:
    """Each row through its expert; 0 for rows of no expert (numbers beyond the last).

    The result is in the order of the rows: sorted by expert, multiplied group by group, and put
    back by the inverse permutation, since a scatter-add would add in whatever order the device
    pleases.

    Args:
      x, expert: of the pairs of a token with an expert.
      weights: of this device's experts.
      generating: where there are `FEW` rows, and enough for every expert, each goes through all:
        grouped products are kernels, for which compilers copy the weights out of the stack of
        layers, and reading them is what generation waits for.
    """
    count = weights.gate.shape[0]
    if generating and count <= x.shape[0] <= FEW:
        hidden = jax.nn.silu(jnp.einsum("nd,edf->enf", x, weights.gate))
        hidden = hidden * jnp.einsum("nd,edf->enf", x, weights.up)
        y = jnp.einsum("enf,efd->end", hidden, weights.down)
        own = expert[None] == jnp.arange(count, dtype=expert.dtype)[:, None]
        return jnp.sum(jnp.where(own[:, :, None], y, 0), axis=0)
    order = jnp.argsort(expert, stable=True)
    load = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    x = x[order]
    hidden = jax.nn.silu(jax.lax.ragged_dot(x, weights.gate, load)) * jax.lax.ragged_dot(
        x, weights.up, load
    )
    y = jax.lax.ragged_dot(hidden, weights.down, load)
    y = jnp.where((jnp.arange(y.shape[0]) < jnp.sum(load))[:, None], y, 0)
    return y[jnp.argsort(order)]


def update_router_bias(
    bias: Float[Array, "*layers experts"], load: Float[Array, "*layers experts"], rate: float
) -> Float[Array, "*layers experts"]:
    """Moves the bias of overloaded experts down and of underloaded ones up, by `rate`.

        bias_e += rate * sign(mean load - load_e)

    Reference: Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts,
    arXiv 2408.15664, algorithm 1.

    >>> update_router_bias(jnp.zeros(3), jnp.array([4.0, 2.0, 0.0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    error = jnp.mean(load, axis=-1, keepdims=True) - load
    return bias + rate * jnp.sign(error).astype(bias.dtype)
