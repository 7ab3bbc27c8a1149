"""The calibration that a training configuration describes."""

from __future__ import annotations

from typing import Any

from occ import measures, rules
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

    Rules that look at nothing still get a measure, which gives the run its diagnostics: the exact
    one in the exact placement, else the log-ratios, which cost nothing.
    """
    if config.loss == "none":
        return None
    measure = _measure(config)
    if config.smoothing:
        measure = measures.smoothed(measure, config.smoothing)
    rule = rules.by_name(config.rule, **_rule_options(config))
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


def _measure(config: MTPTrainingConfig) -> measures.Measure:
    name = config.measure
    if not config.data_dependent:
        name = "gradients" if config.placement == "exact" else "log_ratios"
    if name.startswith("released"):
        return measures.log_ratios(name, eps=config.added_eps)
    builders = {
        "gradients": measures.gradients,
        "first_layer": lambda: measures.gradients(measures.layer(0), name="first_layer"),
        "last_layer": lambda: measures.gradients(measures.layer(-1), name="last_layer"),
        "embedding": lambda: measures.gradients(measures.named("embedding"), name="embedding"),
        "cross_fitted": measures.cross_fitted,
        "preconditioned": measures.preconditioned,
        "preconditioned_euclidean": lambda: measures.preconditioned(norm="euclidean"),
        "sketched": lambda: measures.sketched(config.sketch_rank),
        "row_subset": measures.row_subset,
        "readout": measures.readout,
        "log_ratios": measures.log_ratios,
    }
    return builders[name]()


def _rule_options(config: MTPTrainingConfig) -> dict[str, Any]:
    if config.rule == "fixed":
        return {"coefficients": config.coefficient}
    if config.rule == "optimal":
        return {
            "scale": config.scale,
            "eps": config.added_eps,
            "relative_ridge": config.relative_ridge,
            "bounds": config.bounds,
        }
    return config.rule_options
