"""Optimal Coefficient Calibration (OCC) of auxiliary gradients, as an optax transformation.

The transformation needs jax and optax alone. Models, objectives, tasks and the training loop are
subpackages that are imported on their own, and need the extra `train`.
"""

from occ import measures, rules
from occ.accumulation import AccumulationState, accumulate
from occ.calibration import Calibration, CalibrationState, calibrate
from occ.diagnostics import (
    calibration_state,
    coefficient,
    correlation,
    cosine,
    damping,
    perturbation,
)
from occ.grouped import GroupedCalibration, GroupedState, calibrate_groups

__version__ = "0.1.0"

__all__ = [
    "AccumulationState",
    "Calibration",
    "CalibrationState",
    "GroupedCalibration",
    "GroupedState",
    "accumulate",
    "calibrate",
    "calibrate_groups",
    "calibration_state",
    "coefficient",
    "correlation",
    "cosine",
    "damping",
    "measures",
    "perturbation",
    "rules",
]
