"""Mixture-of-experts MLP in the form of GLM-4.5 and DeepSeek-V3, without dropped tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ.models.config import ModelConfig
from occ.models.layers import MLP, at_least_float32


class RouterBias(nnx.Variable):
    """The router's correction bias: neither trained nor decayed, so not an `nnx.Param`."""


class MixtureOfExperts(nnx.Module):
    """Sigmoid routing with a correction bias, normalised top-k gates, shared experts.

        s = sigmoid(x W_router),   chosen = top-k of s + bias,   gate_e = s_e / sum_chosen s
        y = scaling * sum_chosen gate_e expert_e(x) + shared(x)

    The bias decides who is chosen and not how much it counts. Padding is sent to no expert.

    Reference: DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv 2412.19437, equations 12 to 16;
    GLM-4.5 team, GLM-4.5, arXiv 2508.06471.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        moe = config.moe
        if moe is None:
            raise ValueError("MixtureOfExperts needs ModelConfig.moe, got None.")

        def kernel(*shape):
            normal = jax.random.normal(rngs.params(), shape, config.params)
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
        self, x: Float[Array, "batch time width"], valid: Bool[Array, "batch time"]
    ) -> tuple[Float[Array, "batch time width"], Float[Array, "experts"]]:
        """The layer's output, and how many tokens each expert received."""
        tokens_NxD = x.reshape(-1, x.shape[-1])
        valid_N = valid.reshape(-1)
        experts_Nxk, gates_Nxk = self._route(tokens_NxD)
        y_NxD, load = self._dispatch(tokens_NxD, valid_N, experts_Nxk, gates_Nxk)
        y = y_NxD.reshape(x.shape)
        return (y if self.shared is None else y + self.shared(x)), load

    def _route(
        self, tokens: Float[Array, "tokens width"]
    ) -> tuple[Int[Array, "tokens k"], Float[Array, "tokens k"]]:
        moe = self.moe
        dtype = at_least_float32(tokens.dtype)
        logits = tokens.astype(dtype) @ self.router[...].astype(dtype)
        scores = jax.nn.sigmoid(logits)
        bias = jax.lax.stop_gradient(self.router_bias[...]).astype(dtype)
        choice = scores + bias[None]
        if moe.num_groups > 1:
            choice = self._keep_best_groups(choice)
        _, experts = jax.lax.top_k(jax.lax.stop_gradient(choice), moe.experts_per_token)
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

    def _dispatch(self, tokens_NxD, valid_N, experts_Nxk, gates_Nxk):
        """Sorts the (token, expert) pairs by expert, applies the experts, and sums per token."""
        moe = self.moe
        count, k = experts_Nxk.shape
        absent = moe.num_experts  # sorts behind every expert
        pair_expert = jnp.where(valid_N[:, None], experts_Nxk, absent).reshape(-1)
        order = jnp.argsort(pair_expert, stable=True)
        load = jnp.bincount(pair_expert, length=absent + 1)[:absent].astype(jnp.int32)
        routed = jnp.sum(load)
        x = tokens_NxD[order // k]
        hidden = jax.nn.silu(self._experts(x, self.gate_kernel, load)) * self._experts(
            x, self.up_kernel, load
        )
        y = self._experts(hidden, self.down_kernel, load)
        y = jnp.where((jnp.arange(count * k) < routed)[:, None], y, 0)
        # The inverse permutation, and a sum over k in fixed order: a scatter-add would add in
        # whatever order the device pleases.
        y = y[jnp.argsort(order)].reshape(count, k, -1)
        dtype = gates_Nxk.dtype
        total = jnp.sum(y.astype(dtype) * gates_Nxk[:, :, None], axis=1)
        return total.astype(self.dtype), jax.lax.stop_gradient(load).astype(jnp.float32)

    def _experts(self, x: jax.Array, kernel: nnx.Param, load: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, kernel[...].astype(self.dtype), load)


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
