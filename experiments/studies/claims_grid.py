"""The grid of `experiments.studies.claims`: fixed here before it runs.

Settings are configurations (experiments/configs); variants change a configuration in one respect.
The core grid crosses all settings with the core variants; everything else is varied one at a time
around one setting. Seeds 0 to 4 there; they decide prompts and samples, and share the warm start of
their setting, so that they are no replicates of it. OVER_STARTS is: warm starts of their own.

What was left out for want of time on two cores: fixed coefficients 0.1 and 0.5, rival rules,
learning rates, K = 2, GSPO and minibatches a rollout in settings other than MAIN; more seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from occ.objectives.policy import gspo
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.regimes import regime

SETTINGS = (
    "arithmetic_easy",
    "arithmetic_hard",
    "filtering_easy",
    "filtering_hard",
    "star_easy",
    "star_hard",
    "star_parallel",
)
MAIN = "filtering_easy"
SEEDS = (0, 1, 2, 3, 4)

Change = Callable[[TrainConfig], TrainConfig]


def _mtp(config: MTPTrainingConfig) -> Change:
    return lambda run: dataclasses.replace(run, mtp=config)


def _policy(coefficient: float, **changes: Any) -> MTPTrainingConfig:
    return MTPTrainingConfig(
        loss="policy", rule="fixed", coefficient=coefficient, placement="fused", **changes
    )


OCC = regime("occ")
# In the exact placement, so that the true c and v^2 stand beside the proxy's in every row.
PROXY = regime("occ_paper", exact=True)

CORE: dict[str, Change] = {
    "detach": _mtp(regime("detach")),
    "ce_0.2": _mtp(regime("ce", exact=True)),
    "policy_0.2": _mtp(regime("policy", exact=True)),
    "policy_1.0": _mtp(_policy(1.0)),
    "occ": _mtp(OCC),
    "occ_smoothed": _mtp(regime("occ_smoothed")),
    "occ_paper": _mtp(PROXY),
}
"""Run in every setting."""

CONTROL = "constant_as_proxy"
SHUFFLED = "shuffled_proxy"
CONTROLS = (CONTROL, SHUFFLED)
"""What decides whether the proxy calibrates: a constant coefficient of the mean that `occ_paper`
had with the same seed, and that run's own coefficients in random order."""


def _learning_rate(factor: float, mtp: MTPTrainingConfig) -> Change:
    def change(run):
        rate = run.optimizer.learning_rate * factor
        optimizer = dataclasses.replace(run.optimizer, learning_rate=rate)
        return dataclasses.replace(run, optimizer=optimizer, mtp=mtp)

    return change


def _minibatches(count: int, mtp: MTPTrainingConfig) -> Change:
    def change(run):
        rollout = dataclasses.replace(run.rollout, minibatches=count)
        return dataclasses.replace(run, rollout=rollout, mtp=mtp)

    return change


def _gspo(mtp: MTPTrainingConfig) -> Change:
    def change(run):
        objective = dataclasses.replace(
            run.objective, policy=gspo(), aggregation="seq-mean-token-mean"
        )
        return dataclasses.replace(run, objective=objective, mtp=mtp)

    return change


def _two_modules(mtp: MTPTrainingConfig) -> Change:
    def change(run):
        modules = dataclasses.replace(run.model.mtp, num_modules=2)
        return dataclasses.replace(run, model=dataclasses.replace(run.model, mtp=modules), mtp=mtp)

    return change


def _rule(name: str, **options: Any) -> MTPTrainingConfig:
    return dataclasses.replace(OCC, rule=name, rule_options=options)


def _occ(**changes: Any) -> MTPTrainingConfig:
    return dataclasses.replace(OCC, **changes)


AROUND: dict[str, Change] = {
    "policy_0.1": _mtp(_policy(0.1)),
    "policy_0.5": _mtp(_policy(0.5)),
    "policy_0.2_own": _mtp(_policy(0.2, reference="own")),
    "occ_own": _mtp(_occ(reference="own")),
    "occ_own_nonnegative": _mtp(_occ(reference="own", bounds=(0.0, float("inf")))),
    "occ_scale_0.3": _mtp(_occ(scale=0.3)),
    "occ_scale_3": _mtp(_occ(scale=3.0)),
    "occ_scale_10": _mtp(_occ(scale=10.0)),
    "occ_cross_fitted": _mtp(_occ(measure="cross_fitted")),
    "occ_preconditioned": _mtp(_occ(measure="preconditioned")),
    "rule_cosine_gating": _mtp(_rule("cosine_gating")),
    "rule_pcgrad": _mtp(_rule("pcgrad")),
    "rule_gradvac": _mtp(_rule("gradvac")),
    "rule_cagrad": _mtp(_rule("cagrad")),
    "rule_mgda": _mtp(_rule("mgda")),
    "rule_imtl_g": _mtp(_rule("imtl_g")),
    "rule_nash_mtl": _mtp(_rule("nash_mtl")),
    "rule_aligned_mtl": _mtp(_rule("aligned_mtl")),
    "rule_metabalance": _mtp(_rule("metabalance")),
    "two_modules_detach": _two_modules(regime("detach")),
    "two_modules_policy_0.2": _two_modules(_policy(0.2)),
    "two_modules_occ": _two_modules(OCC),
    "gspo_detach": _gspo(regime("detach")),
    "gspo_policy_0.2": _gspo(_policy(0.2)),
    "gspo_occ": _gspo(OCC),
}
for _factor in (0.5, 2.0, 4.0):
    for _name, _config in (
        ("detach", regime("detach")),
        ("policy_0.2", _policy(0.2)),
        ("occ", OCC),
    ):
        AROUND[f"rate_{_factor:g}_{_name}"] = _learning_rate(_factor, _config)
for _count in (1, 8):
    for _name, _config in (
        ("detach", regime("detach")),
        ("occ", OCC),
        ("occ_paper", regime("occ_paper")),
    ):
        AROUND[f"minibatches_{_count}_{_name}"] = _minibatches(_count, _config)

BEYOND_SETTINGS = ("arithmetic_easy", "filtering_easy", "star_easy")
BEYOND: dict[str, Change] = {
    "drafter_occ": _mtp(_occ(own_loss="ce")),
    "drafter_occ_own": _mtp(_occ(own_loss="ce", reference="own")),
    "distill_detach": _mtp(MTPTrainingConfig(loss="distill", rule="detach", placement="fused")),
    "distill_0.2": _mtp(
        MTPTrainingConfig(loss="distill", rule="fixed", coefficient=0.2, placement="fused")
    ),
    "distill_occ": _mtp(_occ(loss="distill")),
}
"""Where joint training might gain: modules that stay good drafters, a target of higher quality."""

APART: dict[str, Change] = {
    "occ_by_layer": _mtp(_occ(groups="layer")),
    "drafter_occ_by_layer": _mtp(_occ(own_loss="ce", reference="own", groups="layer")),
    "occ_noise_aware": _mtp(
        _occ(
            measure="cross_fitted",
            smoothing=0.9,
            rule="noisy_optimal",
            rule_options={"step_smoothness": 0.5},
        )
    ),
}
"""Fixed after the grid had run, in the settings of BEYOND and beside a Detach of their own: a
coefficient a layer, and averaged correlations between halves against the noise that a step carries.
Named by `--variants`, with a `--folder` of their own; a plain `run` leaves them out."""

OVER_STARTS: dict[str, Change] = {
    **{name: CORE[name] for name in ("detach", "ce_0.2", "policy_1.0", "occ", "occ_paper")},
    **{name: _mtp(regime(name)) for name in ("ce_3", "policy_3", "drafter")},
}
"""Run from several warm starts: `run --over-starts`, in a folder of its own."""

OVER_STARTS_SETTINGS = (
    "filtering_easy",
    "arithmetic_easy",
    "star_easy",
    "filtering_hard",
    "arithmetic_hard",
)
STARTS = (11, 12, 13, 14, 15)
"""Seeds of warm starts that no run had before; the runs from start s have seeds 100 s + 0, 1, ..,
which decide prompts and samples. First a run each from every start, then a second one."""

BY_WORTH: dict[str, Change] = {
    name: _mtp(regime(name)) for name in ("detach", "worth", "rewarded", "worth_rewarded")
}
"""The two objectives that were worth most (`experiments.studies.worth`, 25 runs of Detach from
STARTS): the policy loss with the module's own ratio, and cross-entropy on the better responses. The
second was never trained with when its worth was measured; 0.6 of it is about what its coefficient
0.2, in a mean over the better alone, was there."""

BY_WORTH_RATES: dict[str, Change] = {
    f"rate_{factor}_{name}": _learning_rate(factor, regime(name))
    for factor in (2, 4)
    for name in ("detach", "worth")
}
"""Detach at its better rates, and whether a joint regime still gains beside it there. Run with
seed 0 alone (`--by-worth-rates --seeds 0`); BY_WORTH with seeds 0 to 3, of which 0 was first."""

BY_WORTH_STARTS = (21, 22, 23, 24, 25)
"""Fresh ones, not seen by the worth or its report. Run in OVER_STARTS_SETTINGS; what the
worth says beforehand, of R(0.2) - 1 in Adam's norm: gains of cross-entropy on the better in
filtering_easy (+10 %), arithmetic_hard (+8) and filtering_hard (+8), losses of it at a fixed
coefficient in arithmetic_easy (-8) and star_easy (-12), where the rule should come near 0."""

VARIANTS = {**CORE, **AROUND, **BEYOND, **APART, **OVER_STARTS, **BY_WORTH, **BY_WORTH_RATES}
"""All but the controls, whose configurations come from other runs' rows."""

BASELINES = {"two_modules": "two_modules_detach", "gspo": "gspo_detach"}
BASELINES |= {f"rate_{factor}": f"rate_{factor}_detach" for factor in ("0.5", "2", "4")}
BASELINES |= {f"minibatches_{count}": f"minibatches_{count}_detach" for count in (1, 8)}
"""The Detach run that variants with this prefix are compared with; all others with "detach"."""


class Cell(NamedTuple):
    """Runs of one variant in one setting, which share their compiled programs."""

    setting: str
    variant: str


def cells() -> list[Cell]:
    """The whole grid, in the order in which it is run."""
    core = [Cell(setting, variant) for setting in SETTINGS for variant in CORE]
    controls = [Cell(setting, CONTROL) for setting in SETTINGS] + [Cell(MAIN, SHUFFLED)]
    around = [Cell(MAIN, variant) for variant in AROUND]
    beyond = [Cell(setting, variant) for setting in BEYOND_SETTINGS for variant in BEYOND]
    return core + controls + beyond + around


def apart() -> list[Cell]:
    """Cells that are run when they are named."""
    return [Cell(setting, variant) for setting in BEYOND_SETTINGS for variant in APART]


def over_starts() -> list[Cell]:
    """The cells of OVER_STARTS."""
    return [Cell(setting, name) for setting in OVER_STARTS_SETTINGS for name in OVER_STARTS]


def by_worth() -> list[Cell]:
    """The cells of BY_WORTH."""
    return [Cell(setting, name) for setting in OVER_STARTS_SETTINGS for name in BY_WORTH]


def by_worth_rates() -> list[Cell]:
    """The cells of BY_WORTH_RATES."""
    return [Cell(setting, name) for setting in OVER_STARTS_SETTINGS for name in BY_WORTH_RATES]


def every() -> list[Cell]:
    """All cells of any grid, each once."""
    grids = (cells, apart, over_starts, by_worth, by_worth_rates)
    return list(dict.fromkeys(cell for grid in grids for cell in grid()))


def baseline(variant: str) -> str:
    """The variant of Detach that this one differs from in its MTP loss alone."""
    for prefix, name in BASELINES.items():
        if variant.startswith(prefix + "_"):
            return name
    return "detach"
