"""Gradient accumulation that keeps the coefficient that of the whole minibatch."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from occ import measures as measures_lib
from occ.trees import as_gradient, auxiliary_tuple


class AccumulationState(NamedTuple):
    """Sums over the micro-batches of the current minibatch.

    Attributes:
      inner: state of the wrapped transformation.
      micro_step: int32 [], micro-batches summed so far.
      updates: sum of the main gradients, in at least float32.
      auxiliary: tuple of K sums of auxiliary gradients.
      statistics: sum of the measure's statistics; () without a measure that needs any.
      count: float [], sum of `count`.
      auxiliary_count: float [K], sum of `auxiliary_count`.
    """

    inner: Any
    micro_step: jax.Array
    updates: Any
    auxiliary: tuple[Any, ...]
    statistics: Any
    count: jax.Array  # type: ignore[assignment]
    auxiliary_count: jax.Array


def accumulate(
    tx: optax.GradientTransformation,
    every: int,
    *,
    num_auxiliary: int = 1,
    measure: measures_lib.Measure | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies `tx` once to the sums over `every` micro-batches; in between, updates are zero.

    `optax.MultiSteps` averages `updates` but hands on the last micro-batch's `auxiliary`, so that
    a coefficient would be measured between a whole gradient and a part of another. Here gradients,
    auxiliary gradients, the measure's statistics and the token counts are all summed, and divided
    once at the end:

        g = sum_i g_i / sum_i count_i,      m_k = sum_i m_k,i / sum_i auxiliary_count_k,i

    Args:
      tx: the transformation to wrap, with one `calibrate` inside.
      every: micro-batches a minibatch, >= 1.
      num_auxiliary: K of that `calibrate`.
      measure: its measure, where that reads evidence other than gradients (`log_ratios`): only the
        measure knows what adds up.

    Returns:
      A transformation whose `update` takes, besides `auxiliary` and the evidence:
        count: scalar, what this micro-batch's gradients were summed over (response tokens). Left
          out, each micro-batch counts 1, and the result is the mean of their gradients.
        auxiliary_count: scalar or [K], the same of the auxiliary gradients; default `count`.
      Other keywords reach `tx` as the last micro-batch passed them.

    Raises:
      ValueError: `every` < 1; on update, evidence that no measure was given for.
    """
    if every < 1:
        raise ValueError(f"accumulate: `every` must be >= 1 micro-batches, got {every}.")
    accumulation = _Accumulation(
        optax.with_extra_args_support(tx),
        every,
        num_auxiliary,
        measure if measure is not None and measure.zero is not None else None,
    )
    return optax.GradientTransformationExtraArgs(accumulation.init, accumulation.update)


@dataclasses.dataclass(frozen=True)
class _Accumulation:
    """The transformation of `accumulate`; `measure` is None where nothing but gradients adds up."""

    tx: optax.GradientTransformationExtraArgs
    every: int
    num_auxiliary: int
    measure: measures_lib.Measure | None

    def init(self, params: Any) -> AccumulationState:
        def zeros():  # new buffers at each call: a donated state must not hold one twice
            return jax.tree.map(_accumulator, params)

        dtype = measures_lib.accumulation_dtype(*jax.tree.leaves(params))
        K = self.num_auxiliary
        return AccumulationState(
            inner=self.tx.init(params),
            micro_step=jnp.zeros((), jnp.int32),
            updates=zeros(),
            auxiliary=tuple(zeros() for _ in range(K)),
            statistics=self.measure.zero(K, dtype) if self.measure and self.measure.zero else (),
            count=jnp.zeros((), dtype),
            auxiliary_count=jnp.zeros((K,), dtype),
        )

    def update(
        self,
        updates,
        state,
        params=None,
        *,
        auxiliary=None,
        count=1.0,
        auxiliary_count=None,
        **extra,
    ):
        updates = as_gradient(updates, "`updates`")
        trees = auxiliary_tuple(updates, auxiliary, self.num_auxiliary)
        evidence = _take_evidence(extra, self.measure.evidence if self.measure else ())
        reduced = self.measure.reduce(evidence, self.num_auxiliary) if self.measure else ()
        counts = count if auxiliary_count is None else auxiliary_count
        counts = jnp.asarray(counts, state.count.dtype) * jnp.ones_like(state.auxiliary_count)
        summed = state._replace(
            micro_step=state.micro_step + 1,
            updates=_add(state.updates, updates),
            auxiliary=tuple(_add(s, m) for s, m in zip(state.auxiliary, trees, strict=True)),
            statistics=_add(state.statistics, reduced),
            count=state.count + jnp.asarray(count, state.count.dtype),
            auxiliary_count=state.auxiliary_count + counts,
        )

        def wait(summed):
            return jax.tree.map(jnp.zeros_like, updates), summed

        def emit(summed):
            return self._emit(summed, updates, params, extra)

        return jax.lax.cond(summed.micro_step >= self.every, emit, wait, summed)

    def _emit(
        self, summed: AccumulationState, like: Any, params: Any, extra: dict[str, Any]
    ) -> Any:
        """The wrapped transformation's update with the means, and a state that begins anew."""
        mean = _divide(summed.updates, summed.count, like)
        means = tuple(
            _divide(tree, summed.auxiliary_count[k], like)
            for k, tree in enumerate(summed.auxiliary)
        )
        sums = {"statistics": summed.statistics} if self.measure else {}
        result, inner = self.tx.update(mean, summed.inner, params, auxiliary=means, **sums, **extra)
        fresh = jax.tree.map(jnp.zeros_like, summed._replace(inner=()))
        return result, fresh._replace(inner=inner)


def _accumulator(leaf: jax.Array) -> jax.Array:
    """Zeros like the leaf, with its sharding, in at least float32."""
    return jnp.zeros_like(leaf, dtype=measures_lib.accumulation_dtype(leaf))


def _add(total: Any, term: Any) -> Any:
    return jax.tree.map(lambda s, x: s + jnp.asarray(x).astype(s.dtype), total, term)


def _divide(total: Any, count: jax.Array, like: Any) -> Any:
    """Sum over count, in the dtypes of `like`; 0 for a minibatch without a token."""
    divisor = jnp.where(count == 0, 1, count)
    return jax.tree.map(lambda s, g: (s / divisor.astype(s.dtype)).astype(g.dtype), total, like)


def _take_evidence(extra: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Moves the named evidence out of the keyword arguments."""
    unknown = sorted((set(measures_lib.EVIDENCE) - {"gradients", *names}) & set(extra))
    if unknown:
        raise ValueError(
            f"accumulate: got the evidence {unknown}, but no measure that could sum it. Pass the "
            "measure of the wrapped calibrate: accumulate(tx, every, measure=...)."
        )
    missing = [name for name in names if extra.get(name) is None]
    if missing:
        raise ValueError(
            f"accumulate: the measure needs the evidence {missing} in every micro-batch; pass it "
            "by keyword."
        )
    return {name: extra.pop(name) for name in names}
