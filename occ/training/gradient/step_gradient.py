"""The gradient of a train step, and the steps towards it that both placements share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from occ.calibration import CalibrationState
from occ.grouped import GroupedState
from occ.training.gradient.cotangents import HIDDEN, Problem, add_trees
from occ.training.gradient.losses import LossOutput
from occ.training.gradient.stages import Parts, join


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


def through_trunk(pull_trunk, seam: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """The gradient on all parameters of a loss whose seam is given."""
    blocks, readout = pull_trunk(seam[HIDDEN])
    return join(
        Parts(
            blocks=blocks,
            readout=add_trees(readout, {name: seam[name] for name in parts.readout}),
            modules={name: seam[name] for name in parts.modules},
        )
    )


def log_ratios(problem: Problem, outputs: list[LossOutput]) -> dict[str, Any]:
    """The evidence of the log-ratio measures."""
    return {
        "main_log_ratio": outputs[0].log_ratio,
        "auxiliary_log_ratios": jnp.stack([output.log_ratio for output in outputs[1:]]),
        "response_mask": problem.batch.response_mask,
    }


def total_load(loads: Any) -> Any:
    """Tokens an expert received, over micro-batches; None without mixture of experts."""
    return None if loads is None else jnp.sum(loads, axis=0)
