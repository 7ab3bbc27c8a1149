"""The calibration that a training configuration describes."""

from __future__ import annotations

from occ import measures
from occ.calibration import Calibration
from occ.grouped import GroupedCalibration
from occ.models.parameters import is_shared, is_stacked
from occ.training.config import MTPTrainingConfig


def by_layer(path: str) -> str | None:
    """The group of a shared leaf: its layer, or its top-level name; None for a module's own.

    >>> by_layer("layers/mlp/up/kernel/3"), by_layer("embedding/embedding"), by_layer("mtp/0/x")
    ('layers/3', 'embedding', None)
    """
    if not is_shared(path):
        return None
    names = path.split("/")
    return f"{names[0]}/{names[-1]}" if is_stacked(path) else names[0]


def build_calibration(
    config: MTPTrainingConfig, num_modules: int
) -> Calibration | GroupedCalibration | None:
    """Measure, rule and when to measure; None without an MTP loss.

    Rules that depend on nothing still get a measure, which gives the run its diagnostics: the exact
    one in the exact placement, else the log-ratios, which cost nothing.
    """
    if config.loss == "none":
        return None
    rule = config.make_rule()
    measure = config.make_measure()
    if not rule.data_dependent:
        name = "gradients" if config.placement == "exact" else "log_ratios"
        measure = measures.by_name(name)
    if config.smoothing:
        measure = measures.smoothed(measure, config.smoothing)
    if config.groups == "layer":
        return GroupedCalibration(
            by_layer,
            measure,
            rule,
            num_auxiliary=num_modules,
            stacked=is_stacked,
            scale_own=config.scale_own,
        )
    return Calibration(
        measure,
        rule,
        num_auxiliary=num_modules,
        shared=is_shared,
        scale_own=config.scale_own,
        every=config.every,
    )
