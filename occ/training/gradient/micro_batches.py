"""A minibatch's gradient in portions: sums over micro-batches that equal the whole.

Memory for activations falls with the number of micro-batches. Every loss is a sum over tokens that
is divided by the whole minibatch's count, so parts are added with their share of it, and what the
calibration measures is that of the whole minibatch, whatever the number of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from occ.measures import accumulation_dtype
from occ.training.batch import Minibatch
from occ.training.gradient.cotangents import Problem
from occ.training.gradient.losses import LossOutput, loss_weights, merge_outputs

Carry = TypeVar("Carry")


def micro_batches(batch: Minibatch, count: int) -> Minibatch:
    """The rows in `count` parts, [count, B / count, ...]; old_mtp_log_prob [count, K, ...].

    Part j takes rows j, j + count, ...: each device's rows are cut alike, so none must move.

    Raises:
      ValueError: the rows cannot be divided evenly.
    """
    rows = batch.tokens.shape[0]
    if rows % count:
        raise ValueError(
            f"micro_batches: {rows} rows cannot be cut into {count} equal parts. Choose "
            "LayoutConfig.micro_batches as a divisor of the rows of a minibatch (of half of them "
            "under measure 'cross_fitted')."
        )

    def cut(values):
        return jnp.moveaxis(values.reshape(rows // count, count, *values.shape[1:]), 1, 0)

    parts = {
        name: jax.vmap(cut, 0, 1)(value) if name == "old_mtp_log_prob" else cut(value)
        for name, value in vars(batch).items()
    }
    return batch.replace(**parts)


def interleave(parts: Sequence[jax.Array]) -> jax.Array:
    """Rows [B, ...] in their order, from those of the micro-batches."""
    stacked = jnp.stack(list(parts), axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def merge(outputs: list[LossOutput], count: int) -> list[LossOutput]:
    """What the losses reported on the whole, from outputs with a leading axis of micro-batches."""
    return [
        merge_outputs([jax.tree.map(lambda x, j=j: x[j], output) for j in range(count)], interleave)
        for output in outputs
    ]


def over_micro_batches(
    problem: Problem,
    step: Callable[[Carry, Problem, jax.Array], tuple[Carry, Any]],
    carry: Carry,
) -> tuple[Carry, Any]:
    """Runs `step` over the micro-batches in order, one at a time.

    Args:
      problem: on the whole minibatch.
      step: `(carry, problem of a micro-batch, its share [K+1] in each loss) -> (carry, output)`.
      carry: before the first.

    Returns:
      The last carry, and the outputs with a leading axis of micro-batches.
    """
    objective, per_row = problem.config.objective, problem.sequences_per_row
    modules = problem.config.model.mtp.num_modules
    whole = loss_weights(problem.batch, modules, objective, per_row)

    def body(carry, batch):
        weights = loss_weights(batch, modules, objective, per_row)
        return step(carry, problem.on(batch), weights / jnp.where(whole > 0, whole, 1))

    count = problem.config.layout.micro_batches
    return jax.lax.scan(body, carry, micro_batches(problem.batch, count))


def zeros_like(tree: Any) -> Any:
    """Zeros to add up in: like the tree, in at least float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), tree)


def add(total: Any, tree: Any, factor: Any = 1) -> Any:
    """total + factor * tree, leaf by leaf, in the dtypes of the total."""
    return jax.tree.map(
        lambda t, x: t + (jnp.asarray(factor, t.dtype) * x.astype(t.dtype)), total, tree
    )


def cast_like(tree: Any, like: Any) -> Any:
    """The tree in the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
