"""The fused placement: weights first, then one backward pass through the trunk."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.calibration import Calibration, CalibrationState
from occ.training.gradient.cotangents import Problem, Seam, all_seams, loss_outputs, scaled, trunk
from occ.training.gradient.exact import loss_gradients
from occ.training.gradient.losses import LossOutput
from occ.training.gradient.micro_batches import (
    add,
    cast_like,
    merge,
    over_micro_batches,
    zeros_like,
)
from occ.training.gradient.stages import join
from occ.training.gradient.step_gradient import StepGradient, log_ratios, through_trunk, total_load
from occ.trees import zero_unless


def fused(
    problem: Problem, calibration: Calibration, state: CalibrationState, held: bool = False
) -> StepGradient:
    """The combined gradient; `held` keeps the weights of the state and measures nothing."""
    if problem.config.layout.micro_batches > 1:
        return _fused_in_micro_batches(problem, calibration, state, held)
    hidden, pull_trunk, router_load = trunk(problem)
    main, *heads = all_seams(problem, hidden, attached=_attached(problem))
    auxiliary, finite = calibration.remove_nonfinite(tuple(head.gradient for head in heads))
    if held:
        state = calibration.hold(state, finite)
    else:
        state = _weigh_seams(problem, calibration, state, main, heads, finite)
    # A detached seam lacks the shared entries, where the main gradient stays as it is.
    reached = {name: main.gradient[name] for name in auxiliary[0]}
    combined = calibration.combine(state.weights, reached, auxiliary)
    gradient = through_trunk(pull_trunk, {**main.gradient, **combined}, problem.parts)
    outputs = [head.output for head in heads]
    return StepGradient(gradient, state, None, main.output, outputs, router_load)


def _attached(problem: Problem) -> bool:
    return problem.config.mtp.rule != "detach"


def _weigh_seams(problem, calibration: Calibration, state, main: Seam, heads: list[Seam], finite):
    """The calibration's state after measuring what is known at the seams, if it is due."""

    def measured(state):
        seams = [main, *heads]
        evidence = _early_evidence(
            problem, calibration, [seam.output for seam in seams], _readouts(problem, seams)
        )
        return calibration.weigh(state, evidence, finite=finite)

    return _if_due(calibration, state, measured, finite)


def _if_due(calibration: Calibration, state, measured, finite):
    if calibration.every == 1:
        return measured(state)
    held = functools.partial(calibration.hold, finite=finite)
    return jax.lax.cond(calibration.is_due(state), measured, held, state)


def _readouts(problem: Problem, seams: list[Seam]) -> tuple[dict[str, Any], ...]:
    """Each loss's gradient on what lies behind the trunk and is shared."""
    names = [name for name in problem.parts.readout if name in seams[-1].gradient]
    return tuple({name: seam.gradient[name] for name in names} for seam in seams)


def _early_evidence(
    problem: Problem, calibration: Calibration, outputs: list[LossOutput], readouts: Any
) -> dict[str, Any]:
    """What measures may read before the backward pass through the trunk."""
    evidence = log_ratios(problem, outputs)
    if "readout" in calibration.measure.evidence:
        evidence["readout"] = readouts
    if "row_subset" in calibration.measure.evidence:
        evidence["row_subset"] = _on_first_rows(problem)
    return evidence


def _on_first_rows(problem: Problem) -> tuple[dict[str, Any], ...]:
    """All losses' gradients on the leading share of the rows."""
    rows = problem.batch.tokens.shape[0]
    config = problem.config
    count = config.mtp.leading_rows(rows)
    parts = math.gcd(count, config.layout.micro_batches)
    layout = dataclasses.replace(config.layout, micro_batches=parts)
    few = problem.rows(slice(0, count))
    few = few._replace(config=dataclasses.replace(config, layout=layout))
    return loss_gradients(few).gradients


# ---------------------------------------------------------------------------------------------
# In micro-batches: where weights depend on the data, a pass up to the seams comes first
# ---------------------------------------------------------------------------------------------


def _fused_in_micro_batches(
    problem: Problem, calibration: Calibration, state: CalibrationState, held: bool
) -> StepGradient:
    """One accumulator; the price is a forward pass, paid by rules that look at what is measured."""
    finite = jnp.ones((calibration.num_auxiliary,), bool)
    if held:
        total = _add_up(problem, calibration, state.weights, finite)
        state = calibration.hold(state, total.finite)
    elif problem.config.mtp.looks:
        state, finite = _weigh_beforehand(problem, calibration, state)
        total = _add_up(problem, calibration, state.weights, finite)
        found_later = (finite & ~total.finite).astype(jnp.int32)
        state = state._replace(nonfinite=state.nonfinite + found_later)
    else:
        # A rule that does not look gives the same weights whatever is measured.
        weights = calibration.weigh(state, _nothing_measured(problem)).weights
        total = _add_up(problem, calibration, weights, finite)

        def measured(state):
            evidence = _early_evidence(problem, calibration, total.outputs, ())
            return calibration.weigh(state, evidence, finite=total.finite)

        state = _if_due(calibration, state, measured, total.finite)
    main, *heads = total.outputs
    return StepGradient(total.gradient, state, None, main, heads, total.router_load)


class _Sum(NamedTuple):
    """The combined gradient over micro-batches, and which MTP gradients were finite in all."""

    gradient: dict[str, Any]
    finite: jax.Array
    outputs: list[LossOutput]
    router_load: Any


def _add_up(
    problem: Problem, calibration: Calibration, weights: jax.Array, finite: jax.Array
) -> _Sum:
    """Adds the combined gradients of the micro-batches, without what is not finite."""

    def step(carry, part, shares):
        total, all_finite = carry
        hidden, pull_trunk, router_load = trunk(part)
        seams = all_seams(part, hidden, attached=_attached(part))
        main, *heads = (scaled(seam, share) for seam, share in zip(seams, shares, strict=True))
        gradients = tuple(head.gradient for head in heads)
        auxiliary, here = calibration.remove_nonfinite(gradients)
        auxiliary = tuple(zero_unless(finite[k], m) for k, m in enumerate(auxiliary))
        reached = {name: main.gradient[name] for name in auxiliary[0]}
        combined = calibration.combine(weights, reached, auxiliary)
        gradient = through_trunk(pull_trunk, {**main.gradient, **combined}, part.parts)
        outputs = [main.output, *(head.output for head in heads)]
        return (add(total, gradient), all_finite & here), (outputs, router_load)

    params = join(problem.parts)
    carry = zeros_like(params), finite
    (total, all_finite), (outputs, loads) = over_micro_batches(problem, step, carry)
    merged = merge(outputs, problem.config.layout.micro_batches)
    return _Sum(cast_like(total, params), all_finite, merged, total_load(loads))


def _nothing_measured(problem: Problem) -> dict[str, Any]:
    zeros = jnp.zeros(problem.batch.tokens.shape, problem.batch.advantages.dtype)
    heads = jnp.zeros((problem.config.model.mtp.num_modules, *zeros.shape), zeros.dtype)
    return {
        "main_log_ratio": zeros,
        "auxiliary_log_ratios": heads,
        "response_mask": problem.batch.response_mask,
    }


def _weigh_beforehand(
    problem: Problem, calibration: Calibration, state: CalibrationState
) -> tuple[CalibrationState, jax.Array]:
    """The calibration's state after measuring the whole minibatch, if it is due.

    Also which MTP gradients are finite on all of it; all of them are taken to be where it is not
    due, since nothing has been looked at.
    """
    count = problem.config.layout.micro_batches
    modules = calibration.num_auxiliary
    reads = "readout" in calibration.measure.evidence

    def step(carry, part, shares):
        readouts, finite = carry
        hidden = part.stages.trunk(part.parts).hidden
        if not reads:
            # The gradients come later; a log-ratio that is not finite tells of most that are not.
            outputs = loss_outputs(part, hidden)
            here = jnp.stack([jnp.all(jnp.isfinite(head.log_ratio)) for head in outputs[1:]])
            return (readouts, finite & here), outputs
        seams = all_seams(part, hidden, attached=_attached(part))
        _, here = calibration.remove_nonfinite(tuple(seam.gradient for seam in seams[1:]))
        readouts = tuple(
            add(total, readout, shares[k])
            for k, (total, readout) in enumerate(zip(readouts, _readouts(part, seams), strict=True))
        )
        return (readouts, finite & here), [seam.output for seam in seams]

    def measured(state):
        zeros = tuple(zeros_like(problem.parts.readout) for _ in range((modules + 1) * reads))
        carry = zeros, jnp.ones((modules,), bool)
        (readouts, finite), outputs = over_micro_batches(problem, step, carry)
        evidence = _early_evidence(problem, calibration, merge(outputs, count), readouts)
        return calibration.weigh(state, evidence, finite=finite), finite

    if calibration.every == 1:
        return measured(state)
    return jax.lax.cond(
        calibration.is_due(state),
        measured,
        lambda state: (calibration.hold(state), jnp.ones((modules,), bool)),
        state,
    )
