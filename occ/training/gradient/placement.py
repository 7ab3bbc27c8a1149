"""Gradients of both losses, weighed by the calibration and combined: the heart of the train step.

Two placements of the coefficient give the same result for the same weights:

    fused   weights first, then one backward pass through the trunk for the weighted sum of the
            cotangents at its output
    exact   a backward pass for every loss (all in one vectorised pass), then true c and v^2,
            weights and the combination at the parameters; a step that does not measure, since it
            keeps the weights of one that did, is fused
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from occ.calibration import Calibration, CalibrationState
from occ.grouped import GroupedCalibration, GroupedState
from occ.training.batch import Minibatch
from occ.training.config import TrainConfig
from occ.training.gradient.cotangents import Problem, rl_seam, trunk
from occ.training.gradient.exact import exact
from occ.training.gradient.fused import fused
from occ.training.gradient.micro_batches import (
    add,
    cast_like,
    merge,
    over_micro_batches,
    zeros_like,
)
from occ.training.gradient.stages import Stages, join, partition
from occ.training.gradient.step_gradient import StepGradient, through_trunk, total_load


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
        return exact(problem, calibration, state, second_moment)
    assert isinstance(state, CalibrationState)
    if config.mtp.placement == "fused":
        return fused(problem, calibration, state)
    if calibration.every == 1:
        return exact(problem, calibration, state, second_moment)
    return jax.lax.cond(
        calibration.is_due(state),
        lambda: exact(problem, calibration, state, second_moment),
        lambda: _held(problem, calibration, state),
    )


def _held(problem: Problem, calibration: Calibration, state: CalibrationState) -> StepGradient:
    """A step of the exact placement that does not measure: the price of a fused one."""
    step = fused(problem, calibration, state, held=True)
    return step._replace(gram=jnp.full_like(state.gram, jnp.nan))


def _rl_alone(problem: Problem) -> StepGradient:
    if problem.config.layout.micro_batches > 1:
        return _rl_alone_in_micro_batches(problem)
    hidden, pull_trunk, router_load = trunk(problem)
    main = rl_seam(problem, hidden)
    gradient = through_trunk(pull_trunk, main.gradient, problem.parts)
    return StepGradient(gradient, (), None, main.output, [], router_load)


def _rl_alone_in_micro_batches(problem: Problem) -> StepGradient:
    def step(total, part, shares):
        hidden, pull_trunk, router_load = trunk(part)
        main = rl_seam(part, hidden)
        gradient = through_trunk(pull_trunk, main.gradient, part.parts)
        return add(total, gradient, shares[0]), ([main.output], router_load)

    params = join(problem.parts)
    total, (outputs, loads) = over_micro_batches(problem, step, zeros_like(params))
    (main,) = merge(outputs, problem.config.layout.micro_batches)
    return StepGradient(cast_like(total, params), (), None, main, [], total_load(loads))
