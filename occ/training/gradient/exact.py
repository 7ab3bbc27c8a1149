"""The exact placement: a backward pass for every loss, weights at the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ import measures
from occ.calibration import Calibration
from occ.grouped import GroupedCalibration
from occ.training.gradient.cotangents import HIDDEN, Problem, all_seams, trunk
from occ.training.gradient.losses import LossOutput, merge_outputs
from occ.training.gradient.micro_batches import (
    add,
    cast_like,
    merge,
    over_micro_batches,
    zeros_like,
)
from occ.training.gradient.stages import is_shared, join
from occ.training.gradient.step_gradient import StepGradient, log_ratios, through_trunk, total_load


class LossGradients(NamedTuple):
    """The gradients of all K+1 losses on all parameters, the RL loss first.

    Attributes:
      gradients: K+1 trees like the parameters.
      outputs: what the K+1 losses reported.
      router_load: float [L, E], tokens an expert received; None without mixture of experts.
    """

    gradients: tuple[dict[str, Any], ...]
    outputs: list[LossOutput]
    router_load: Any


def exact(
    problem: Problem,
    calibration: Calibration | GroupedCalibration,
    state: Any,
    second_moment: Any,
) -> StepGradient:
    """The combined gradient, with the true Gram matrix."""
    evidence: dict[str, Any] = {}
    if "gradient_halves" in calibration.measure.evidence:
        halves = _halves(problem)
        losses = _merge(*halves)
        evidence["gradient_halves"] = tuple(half.gradients for half in halves)
    else:
        losses = loss_gradients(problem)
    if "second_moment" in calibration.measure.evidence:
        evidence["second_moment"] = second_moment
    evidence |= log_ratios(problem, losses.outputs)
    main, *auxiliary = losses.gradients
    # Whether it is due was decided outside, where the whole backward pass depends on it.
    always = dataclasses.replace(calibration, every=1)
    combined, state = always.update(main, state, auxiliary=tuple(auxiliary), **evidence)
    shared = tuple({k: g[k] for k in g if is_shared(k)} for g in losses.gradients)
    gram = measures.gram_matrix(shared)
    output, *heads = losses.outputs
    return StepGradient(combined, state, gram, output, heads, losses.router_load)


def loss_gradients(problem: Problem) -> LossGradients:
    """The gradients of all losses on all parameters: one backward pass each.

    In micro-batches every loss has an accumulator of its own.
    """
    count = problem.config.layout.micro_batches
    if count == 1:
        return _loss_gradients(problem)

    def step(totals, part, shares):
        losses = _loss_gradients(part)
        totals = tuple(
            add(total, gradient, shares[k])
            for k, (total, gradient) in enumerate(zip(totals, losses.gradients, strict=True))
        )
        return totals, (losses.outputs, losses.router_load)

    params = join(problem.parts)
    zeros = tuple(zeros_like(params) for _ in range(problem.config.model.mtp.num_modules + 1))
    totals, (outputs, loads) = over_micro_batches(problem, step, zeros)
    return LossGradients(
        tuple(cast_like(total, params) for total in totals),
        merge(outputs, count),
        total_load(loads),
    )


def _loss_gradients(problem: Problem) -> LossGradients:
    hidden, pull_trunk, router_load = trunk(problem)
    seams = all_seams(problem, hidden, attached=True)
    # jax.lax.ragged_dot has no rule for a second batch dimension.
    vectorized = problem.config.model.moe is None
    pulled = _pull_each(pull_trunk, [seam.gradient[HIDDEN] for seam in seams], vectorized)
    gradients = tuple(
        through_trunk(lambda _, trunk=trunk: trunk, seam.gradient, problem.parts)
        for seam, trunk in zip(seams, pulled, strict=True)
    )
    return LossGradients(gradients, [seam.output for seam in seams], router_load)


def _halves(problem: Problem) -> tuple[LossGradients, LossGradients]:
    """The gradients on either half of the rows; a prompt's samples stand together."""
    rows = problem.batch.tokens.shape[0]
    if rows < 2:
        raise ValueError(
            "measure 'cross_fitted' compares two halves of a minibatch, and this one has a single "
            "row. Use larger minibatches, or measure='gradients'."
        )
    border = problem.config.mtp.leading_rows(rows)
    return (
        loss_gradients(problem.rows(slice(0, border))),
        loss_gradients(problem.rows(slice(border, rows))),
    )


def _merge(first: LossGradients, second: LossGradients) -> LossGradients:
    """The gradients on the whole minibatch, from those on its halves."""
    outputs = [
        merge_outputs(pair, jnp.concatenate)
        for pair in zip(first.outputs, second.outputs, strict=True)
    ]
    gradients = []
    for k, output in enumerate(outputs):
        weight = jnp.where(output.weight > 0, output.weight, 1)
        shares = [half.outputs[k].weight / weight for half in (first, second)]
        gradients.append(
            jax.tree.map(
                lambda a, b, shares=shares: (shares[0] * a + shares[1] * b).astype(a.dtype),
                first.gradients[k],
                second.gradients[k],
            )
        )
    load = None if first.router_load is None else first.router_load + second.router_load
    return LossGradients(tuple(gradients), outputs, load)


def _pull_each(pull_trunk, cotangents: list[Any], vectorized: bool) -> list[Any]:
    """The trunk's gradient for every cotangent; vectorised, it recomputes activations once."""
    if not vectorized:
        return [pull_trunk(cotangent) for cotangent in cotangents]
    pulled = jax.vmap(pull_trunk)(jnp.stack(cotangents))
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], pulled)
        for index in range(len(cotangents))
    ]
