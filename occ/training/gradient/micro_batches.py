"""A minibatch's gradient in portions: sums over micro-batches that equal the whole.

Memory for activations falls with the number of micro-batches. Every loss is a sum over tokens that
is divided by the whole minibatch's count, so parts are added with their share of it, and what the
calibration measures is that of the whole minibatch, whatever the number of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.measures import accumulation_dtype
from occ.training.batch import Minibatch
from occ.training.gradient.inputs import StepInputs
from occ.training.gradient.losses import LossOutput, loss_weights, merge_outputs


class Pass(NamedTuple):
    """What a pass over a minibatch gives, or over a micro-batch of it.

    Attributes:
      gradient: a tree that adds up over micro-batches; () where nothing is differentiated.
      outputs: what each loss reported.
      router_load: float [L, E], tokens an expert received; None without mixture of experts.
      finite: bool [K], whether each MTP gradient was finite.
    """

    gradient: Any
    outputs: list[LossOutput]
    router_load: Any = None
    finite: Any = None


def over_micro_batches(
    inputs: StepInputs, step: Callable[[StepInputs, Any], Pass], like: Any
) -> Pass:
    """A pass over the whole minibatch: `step` once, or over its micro-batches one at a time.

    Args:
      inputs: on the whole minibatch.
      step: `(inputs of a micro-batch, its share [K+1] in each loss) -> Pass`, whose gradient is
        weighed by the shares already; of a minibatch in one piece the shares are None.
      like: a tree like the gradient.
    """
    count = inputs.config.layout.micro_batches
    if count == 1:
        return step(inputs, None)
    whole = loss_weights(inputs.batch, inputs.config)

    def body(total, batch):
        shares = loss_weights(batch, inputs.config) / jnp.where(whole > 0, whole, 1)
        part = step(inputs.on(batch), shares)
        return _add(total, part.gradient), part._replace(gradient=())

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), like)
    total, parts = jax.lax.scan(body, zeros, micro_batches(inputs.batch, count))
    return Pass(
        jax.tree.map(lambda x, y: x.astype(y.dtype), total, like),
        [_merge(output, count) for output in parts.outputs],
        None if parts.router_load is None else jnp.sum(parts.router_load, axis=0),
        None if parts.finite is None else jnp.all(parts.finite, axis=0),
    )


def micro_batches(batch: Minibatch, count: int) -> Minibatch:
    """The rows in `count` parts, [count, ..., B / count, T].

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
        *leading, _, time = values.shape
        return jnp.moveaxis(values.reshape(*leading, rows // count, count, time), -2, 0)

    return jax.tree.map(cut, batch)


def interleave(parts: Sequence[jax.Array]) -> jax.Array:
    """Rows [B, ...] in their order, from those of the micro-batches."""
    stacked = jnp.stack(list(parts), axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def times_share(tree: Any, shares: Any, loss: int) -> Any:
    """A gradient times a micro-batch's share in its loss, in at least float32, to be added up."""
    if shares is None:
        return tree

    def leaf(x):
        dtype = accumulation_dtype(x.dtype)
        return shares[loss].astype(dtype) * x.astype(dtype)

    return jax.tree.map(leaf, tree)


def _merge(output: LossOutput, count: int) -> LossOutput:
    """What a loss reported on the whole, from an output with a leading axis of micro-batches."""
    parts = [jax.tree.map(lambda x, j=j: x[j], output) for j in range(count)]
    return merge_outputs(parts, interleave)


def _add(total: Any, tree: Any) -> Any:
    """total + tree, leaf by leaf, in the dtypes of the total."""
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, tree)
