"""Experts on several devices: rows stay where they are, and tokens travel to their experts.

Under plain compilation the sort by expert would gather the tokens of all devices on each. Here
every device sorts its own, sends them by one all-to-all along the mesh axis "expert", and gets
them back by another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.models.config import MoEConfig
from occ.models.partitioning import ROWS, several_devices

P = jax.P


class ExpertWeights(NamedTuple):
    """Of one layer, or a device's share of it.

    Attributes:
      router: [D, E].
      router_bias: float32 [E].
      gate, up: [E, D, F], in the dtype of computation.
      down: [E, F, D].
    """

    router: Any
    router_bias: Any
    gate: Any
    up: Any
    down: Any


_CUT = ExpertWeights(
    router=P(None, None),
    router_bias=P(None),
    gate=P("expert", "fsdp", "tensor"),
    up=P("expert", "fsdp", "tensor"),
    down=P("expert", "tensor", "fsdp"),
)
_WHOLE = _CUT._replace(
    gate=P("expert", None, "tensor"), up=P("expert", None, "tensor"), down=P("expert", "tensor")
)

Experts = Callable[..., jax.Array]


class Placement(NamedTuple):
    """How many devices share the experts; 1 keeps every token where it is."""

    devices: int = 1

    def apply_experts(
        self, tokens: jax.Array, pair_expert: jax.Array, experts: Experts, moe: MoEConfig
    ) -> tuple[jax.Array, jax.Array]:
        """Every (token, expert) pair through its expert.

        Args:
          tokens: [N, D], of this device.
          pair_expert: int32 [N * k], the expert of each pair; E for none.
          experts: `(x [n, D], expert [n]) -> [n, D]` with the numbers of this device's experts.
          moe: the layer's configuration.

        Returns:
          [N * k, D], 0 for pairs of no expert and for dropped ones; and int32 [E], the pairs of
          this device that each expert received.
        """
        if self.devices == 1:
            load = jnp.bincount(pair_expert, length=moe.num_experts + 1)[: moe.num_experts]
            k = moe.experts_per_token
            return experts(jnp.repeat(tokens, k, axis=0), pair_expert), load
        return self._travel(tokens, pair_expert, experts, moe)

    def _travel(self, tokens, pair_expert, experts: Experts, moe: MoEConfig):
        here = moe.num_experts // self.devices
        capacity = pair_capacity(tokens.shape[0], self.devices, moe)
        order = jnp.argsort(pair_expert, stable=True)
        sorted_expert = pair_expert[order]
        to = sorted_expert // here  # `devices` for pairs of no expert
        count = jnp.bincount(to, length=self.devices + 1)[: self.devices]
        start = jnp.cumsum(count) - count

        slot = jnp.arange(capacity, dtype=start.dtype)
        source = jnp.minimum(start[:, None] + slot[None], order.shape[0] - 1)
        taken = slot[None] < count[:, None]
        sent = jnp.where(taken[:, :, None], tokens[order[source] // moe.experts_per_token], 0)
        first = jnp.arange(self.devices, dtype=pair_expert.dtype)[:, None] * here
        sent_expert = jnp.where(taken, sorted_expert[source] - first, here)

        received, expert = _exchange(sent), _exchange(sent_expert)
        y = experts(received.reshape(-1, received.shape[-1]), expert.reshape(-1))
        returned = _exchange(y.reshape(received.shape))

        place = jnp.arange(order.shape[0], dtype=start.dtype)
        owner = jnp.minimum(to, self.devices - 1)
        rank = place - start[owner]
        arrived = (to < self.devices) & (rank < capacity)
        y_sorted = returned[owner, jnp.minimum(rank, capacity - 1)]
        y_sorted = jnp.where(arrived[:, None], y_sorted, 0)
        counted = jnp.where(arrived, sorted_expert, moe.num_experts)
        load = jnp.bincount(counted, length=moe.num_experts + 1)[: moe.num_experts]
        return y_sorted[jnp.argsort(order)], load


def pair_capacity(tokens: int, devices: int, moe: MoEConfig) -> int:
    """Pairs that one device may send to another, out of N tokens.

    The worst case, in which nothing is ever dropped, is that all its tokens choose experts of the
    same device; `moe.capacity_factor` bounds it by a multiple of an even spread.
    """
    worst = tokens * min(moe.experts_per_token, moe.num_experts // devices)
    if moe.capacity_factor is None:
        return worst
    even = tokens * moe.experts_per_token / devices
    return min(worst, max(math.ceil(moe.capacity_factor * even), 1))


def _exchange(x: jax.Array) -> jax.Array:
    """Block j of device i becomes block i of device j."""
    return jax.lax.all_to_all(x, "expert", 0, 0)


def on_mesh(
    function: Any,
    x: jax.Array,
    valid: jax.Array,
    replayed: jax.Array | None,
    weights: ExpertWeights,
    *,
    whole: bool,
) -> Any:
    """Runs `function(x, valid, replayed, weights, placement)` on every device's own rows.

    It gives the output of these rows, the load, and the experts of each token.

    Along "tensor" each device has a part of the experts' hidden width, and y is the sum of the
    parts. Their kernels are gathered along "fsdp", unless they are `whole` there.
    """
    mesh = several_devices()
    if mesh is None:
        return function(x, valid, replayed, weights, Placement())
    placement = Placement(mesh.shape["expert"])

    def local(x, valid, replayed, weights):
        if not whole:
            weights = weights._replace(
                gate=jax.lax.all_gather(weights.gate, "fsdp", axis=1, tiled=True),
                up=jax.lax.all_gather(weights.up, "fsdp", axis=1, tiled=True),
                down=jax.lax.all_gather(weights.down, "fsdp", axis=2, tiled=True),
            )
        y, load, chosen = function(x, valid, replayed, weights, placement)
        return jax.lax.psum(y, "tensor"), jax.lax.psum(load, ROWS), chosen

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(ROWS), P(ROWS), P(ROWS), _WHOLE if whole else _CUT),
        out_specs=(P(ROWS), P(None), P(ROWS)),
    )(x, valid, replayed, weights)
