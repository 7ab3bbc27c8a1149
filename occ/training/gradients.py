"""Gradients of both losses, weighed by the calibration and combined: the heart of the train step.

Two placements of the coefficient give the same result for the same weights:

    fused   weights first, then one backward pass through the trunk for the weighted sum of the
            cotangents at its output
    exact   a backward pass for every loss (all in one vectorised pass), then true c and v^2,
            weights and the combination at the parameters; a step that does not measure, since it
            keeps the weights of one that did, is fused
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ import measures
from occ.calibration import Calibration, CalibrationState
from occ.grouped import GroupedCalibration, GroupedState
from occ.training.batch import Minibatch
from occ.training.config import TrainConfig
from occ.training.losses import LossOutput, merge_outputs
from occ.training.seams import HIDDEN, Problem, Seam, add_trees, mtp_seams, rl_seam, trunk
from occ.training.stages import Parts, Stages, is_shared, join, partition


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


class StepGradient(NamedTuple):
    """The combined gradient of a step.

    Attributes:
      gradient: like the parameters.
      calibration: its state after the step; () without MTP loss.
      gram: float [K+1, K+1], the true Gram matrix over the shared parameters, whatever the measure
        estimates; NaN in a step that did not measure, None in the fused placement, which never has
        the gradients it is made of.
      main: what the RL loss reported.
      heads: what each MTP loss reported.
      router_load: float [L, E], tokens an expert received; None without mixture of experts.
    """

    gradient: dict[str, Any]
    calibration: CalibrationState | GroupedState | tuple[()]
    gram: Any
    main: LossOutput
    heads: list[LossOutput]
    router_load: Any


def step_gradient(
    stages: Stages,
    params: dict[str, Any],
    batch: Minibatch,
    config: TrainConfig,
    calibration: Calibration | GroupedCalibration | None,
    state: CalibrationState | GroupedState | tuple[()],
    sequences_per_row: int = 1,
    second_moment: Any = None,
) -> StepGradient:
    """Both losses' gradients on one minibatch, combined.

    Args:
      stages: the model on this batch.
      params: its parameters.
      batch: the minibatch.
      config: the run's configuration.
      calibration: from `build_calibration`.
      state: the calibration's state.
      sequences_per_row: S, the most sequences packed in a row.
      second_moment: Adam's, like the parameters, for measures that read it.
    """
    problem = Problem(stages, partition(params), batch, config, sequences_per_row)
    if calibration is None:
        return _rl_alone(problem)
    if isinstance(calibration, GroupedCalibration):
        return _exact(problem, calibration, state, second_moment)
    assert isinstance(state, CalibrationState)
    if config.mtp.placement == "fused":
        return _fused(problem, calibration, state)
    if calibration.every == 1:
        return _exact(problem, calibration, state, second_moment)
    return jax.lax.cond(
        calibration.is_due(state),
        lambda: _exact(problem, calibration, state, second_moment),
        lambda: _held(problem, calibration, state),
    )


def _rl_alone(problem: Problem) -> StepGradient:
    hidden, pull_trunk, router_load = trunk(problem)
    main = rl_seam(problem, hidden)
    gradient = _through_trunk(pull_trunk, main.gradient, problem.parts)
    return StepGradient(gradient, (), None, main.output, [], router_load)


# ---------------------------------------------------------------------------------------------
# Fused: weights first, one backward pass through the trunk
# ---------------------------------------------------------------------------------------------


def _fused(
    problem: Problem, calibration: Calibration, state: CalibrationState, held: bool = False
) -> StepGradient:
    hidden, pull_trunk, router_load = trunk(problem)
    main = rl_seam(problem, hidden)
    heads = mtp_seams(problem, hidden, attached=problem.config.mtp.rule != "detach")
    auxiliary, finite = calibration.remove_nonfinite(tuple(head.gradient for head in heads))
    if held:
        state = calibration.hold(state, finite)
    else:
        state = _weigh_seams(problem, calibration, state, main, heads, finite)
    # A detached seam lacks the shared entries, where the main gradient stays as it is.
    reached = {name: main.gradient[name] for name in auxiliary[0]}
    combined = calibration.combine(state.weights, reached, auxiliary)
    gradient = _through_trunk(pull_trunk, {**main.gradient, **combined}, problem.parts)
    outputs = [head.output for head in heads]
    return StepGradient(gradient, state, None, main.output, outputs, router_load)


def _weigh_seams(problem, calibration: Calibration, state, main: Seam, heads: list[Seam], finite):
    """The calibration's state after measuring what is known at the seams, if it is due."""

    def measured(state):
        evidence = _log_ratios(problem, [main.output, *(head.output for head in heads)])
        if "readout" in calibration.measure.evidence:
            names = [name for name in problem.parts.readout if name in heads[0].gradient]
            evidence["readout"] = tuple(
                {name: seam.gradient[name] for name in names} for seam in (main, *heads)
            )
        if "row_subset" in calibration.measure.evidence:
            evidence["row_subset"] = _on_first_rows(problem)
        return calibration.weigh(state, evidence, finite=finite)

    if calibration.every == 1:
        return measured(state)
    held = functools.partial(calibration.hold, finite=finite)
    return jax.lax.cond(calibration.is_due(state), measured, held, state)


def _on_first_rows(problem: Problem) -> tuple[dict[str, Any], ...]:
    """All losses' gradients on the leading share of the rows."""
    rows = problem.batch.tokens.shape[0]
    count = max(round(rows * problem.config.mtp.row_fraction), 1)
    return loss_gradients(problem.rows(slice(0, count))).gradients


# ---------------------------------------------------------------------------------------------
# Exact: a backward pass for every loss, weights at the parameters
# ---------------------------------------------------------------------------------------------


def _exact(
    problem: Problem,
    calibration: Calibration | GroupedCalibration,
    state: Any,
    second_moment: Any,
) -> StepGradient:
    evidence: dict[str, Any] = {}
    if "gradient_halves" in calibration.measure.evidence:
        halves = _halves(problem)
        losses = _merge(*halves)
        evidence["gradient_halves"] = tuple(half.gradients for half in halves)
    else:
        losses = loss_gradients(problem)
    if "second_moment" in calibration.measure.evidence:
        evidence["second_moment"] = second_moment
    evidence |= _log_ratios(problem, losses.outputs)
    main, *auxiliary = losses.gradients
    # Whether it is due was decided outside, where the whole backward pass depends on it.
    always = dataclasses.replace(calibration, every=1)
    combined, state = always.update(main, state, auxiliary=tuple(auxiliary), **evidence)
    shared = tuple({k: g[k] for k in g if is_shared(k)} for g in losses.gradients)
    gram = measures.gram_matrix(shared)
    output, *heads = losses.outputs
    return StepGradient(combined, state, gram, output, heads, losses.router_load)


def _held(problem: Problem, calibration: Calibration, state: CalibrationState) -> StepGradient:
    """A step of the exact placement that does not measure: the price of a fused one."""
    step = _fused(problem, calibration, state, held=True)
    return step._replace(gram=jnp.full_like(state.gram, jnp.nan))


def loss_gradients(problem: Problem) -> LossGradients:
    """The gradients of all losses on all parameters: one backward pass each."""
    hidden, pull_trunk, router_load = trunk(problem)
    seams = [rl_seam(problem, hidden), *mtp_seams(problem, hidden, attached=True)]
    # jax.lax.ragged_dot has no rule for a second batch dimension.
    vectorized = problem.config.model.moe is None
    pulled = _pull_each(pull_trunk, [seam.gradient[HIDDEN] for seam in seams], vectorized)
    gradients = tuple(
        _through_trunk(lambda _, trunk=trunk: trunk, seam.gradient, problem.parts)
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
    return (
        loss_gradients(problem.rows(slice(0, rows // 2))),
        loss_gradients(problem.rows(slice(rows // 2, rows))),
    )


def _merge(first: LossGradients, second: LossGradients) -> LossGradients:
    """The gradients on the whole minibatch, from those on its halves."""
    outputs = [merge_outputs(a, b) for a, b in zip(first.outputs, second.outputs, strict=True)]
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


def _log_ratios(problem: Problem, outputs: list[LossOutput]) -> dict[str, Any]:
    return {
        "main_log_ratio": outputs[0].log_ratio,
        "auxiliary_log_ratios": jnp.stack([output.log_ratio for output in outputs[1:]]),
        "response_mask": problem.batch.response_mask,
    }


# ---------------------------------------------------------------------------------------------
# From the trunk's output to the parameters
# ---------------------------------------------------------------------------------------------


def _through_trunk(pull_trunk, seam: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """The gradient on all parameters of a loss whose seam is given."""
    blocks, readout = pull_trunk(seam[HIDDEN])
    return join(
        Parts(
            blocks=blocks,
            readout=add_trees(readout, {name: seam[name] for name in parts.readout}),
            modules={name: seam[name] for name in parts.modules},
        )
    )


def _pull_each(pull_trunk, cotangents: list[Any], vectorized: bool) -> list[Any]:
    """The trunk's gradient for every cotangent; vectorised, it recomputes activations once."""
    if not vectorized:
        return [pull_trunk(cotangent) for cotangent in cotangents]
    pulled = jax.vmap(pull_trunk)(jnp.stack(cotangents))
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], pulled)
        for index in range(len(cotangents))
    ]
