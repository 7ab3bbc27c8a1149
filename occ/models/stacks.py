"""Layers of equal shape in a stack: one loop over them, in training and in generation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from occ.models.attention import Context
from occ.models.block import Block
from occ.models.cache import Past, StackCache
from occ.models.config import ModelConfig
from occ.models.moe import MixtureOfExperts
from occ.models.partitioning import ROWS, constrain

Layers = tuple[list[Block], ...]
"""Stacks in their order, each as a list of its layers."""


def create_stack(config: ModelConfig, rngs: nnx.Rngs, size: int, *, sparse: bool) -> Block:
    """`size` blocks as one module whose variables have a leading layer axis."""

    @nnx.split_rngs(splits=size)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs):
        return Block(config, rngs, sparse=sparse)

    return create(rngs)


class Passed(NamedTuple):
    """What a stack of layers hands on, but for `hidden` with a leading layer axis."""

    hidden: jax.Array
    load: jax.Array | None
    new: StackCache | None
    experts: jax.Array | None


def apart(stack: Block) -> list[Block]:
    """Its layers one by one."""
    graphdef, variables = nnx.split(stack)
    size = jax.tree.leaves(variables)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], variables)) for i in range(size)]


def _one_by_one(
    layers: list[Block], hidden: jax.Array, context: Context, past: Past | None
) -> Passed:
    """As `apply_layers` in generation."""
    outputs = []
    for number, block in enumerate(layers):
        before = None if past is None else past._replace(layer=number)
        output = block(hidden, context, before, generating=True)
        hidden = constrain(output.hidden, ROWS)
        outputs.append((output.load, output.new, output.experts))
    return Passed(hidden, *jax.tree.map(lambda *values: jnp.stack(values), *outputs))


def apply_layers(
    stack: Block | list[Block],
    hidden: jax.Array,
    context: Context,
    config: ModelConfig,
    past: Past | None = None,
    replayed: jax.Array | None = None,
    *,
    generating: bool = False,
) -> Passed:
    """Applies the layers in order.

    All layers read the cache, and none writes into it: as an input and output of its own for each
    layer, it would be copied for every token.

    Args:
      stack: whose variables have a leading layer axis; or its layers one by one, for generation.
      hidden: float [B, T, D].
      context: of the tokens.
      config: says how the loop is compiled, and what is recomputed.
      past: what they see before them; None are whole sequences.
      replayed: int [L, k, B, T], experts of each token, as `replayed` of `MixtureOfExperts`; dense
        layers have none.
      generating: hand on what a cache keeps.
    """
    if isinstance(stack, list):
        return _one_by_one(stack, hidden, context, past)
    graphdef, variables = nnx.split(stack)
    size = jax.tree.leaves(variables)[0].shape[0]

    def layer(hidden, inputs):
        layer_variables, number, experts = inputs
        block = nnx.merge(graphdef, layer_variables)
        before = None if past is None else past._replace(layer=number)
        output = block(hidden, context, before, experts, generating=generating)
        further = (output.new, output.experts) if generating else (None, None)
        return constrain(output.hidden, ROWS), (output.load, *further)

    if replayed is not None:
        replayed = jnp.moveaxis(replayed, 1, -1) if _is_sparse(stack) else None
    numbers = jnp.arange(size, dtype=jnp.int32) if generating else None
    unroll = 1 if config.scan_layers else size
    hidden, (load, new, experts) = jax.lax.scan(
        remat(layer, config), hidden, (variables, numbers, replayed), unroll=unroll
    )
    return Passed(hidden, load, new, experts)


def _is_sparse(stack: Block) -> bool:
    return isinstance(stack.mlp, MixtureOfExperts)


def by_token(experts: Int[Array, "layers batch time k"]) -> Int[Array, "batch time layers k"]:
    """The experts of a token in all layers together."""
    return jnp.moveaxis(experts, 0, 2)


def expert_dtype(config: ModelConfig) -> Any:
    """Of numbers of experts, and of -1 for none."""
    return jnp.int8 if config.moe and config.moe.num_experts <= 128 else jnp.int16


def no_experts(config: ModelConfig, batch: int, columns: int) -> Int[Array, "batch columns L k"]:
    """For those of each token in the trunk's sparse layers."""
    moe = config.moe
    assert moe is not None
    sparse = config.num_layers - moe.first_dense_layers
    empty = jnp.full((batch, columns, sparse, moe.experts_per_token), -1, expert_dtype(config))
    return constrain(empty, ROWS)


def write_experts(kept: jax.Array, experts: jax.Array, columns: Int[Array, "batch"]) -> jax.Array:
    """The experts of further tokens of each row, from its own column on."""
    new = by_token(experts).astype(kept.dtype)
    return jax.vmap(
        lambda old, new, column: jax.lax.dynamic_update_slice(
            old, new, (column, 0 * column, 0 * column)
        )
    )(kept, new, columns)


def remat(function: Any, config: ModelConfig) -> Any:
    """The function, recomputed in the backward pass as the configuration says."""
    if config.remat == "none":
        return function
    policy = None
    if config.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=policy)
