"""The training regimes by name: a row each; command lines, labels and help follow from it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, NamedTuple

from occ.training.config import MTPTrainingConfig


class Regime(NamedTuple):
    """A named way to train the MTP modules.

    Attributes:
      label: in tables and figures.
      meaning: in words.
      config: in its cheapest placement.
    """

    label: str
    meaning: str
    config: MTPTrainingConfig


def _fused(**fields) -> MTPTrainingConfig:
    return MTPTrainingConfig(placement="fused", **fields)


def _by_worth(**fields) -> MTPTrainingConfig:
    return MTPTrainingConfig(
        own_loss="ce",
        measure="past_gradients",
        measure_options={"decay": 0.9, "smoothing": 0.95, "norm": "preconditioned"},
        rule="signal_to_noise",
        every=5,
        **fields,
    )


REGIMES: dict[str, Regime] = {
    "rl_only": Regime(
        "RL alone", "the MTP modules are not trained", _fused(loss="none", rule="detach")
    ),
    "detach": Regime(
        "Detach",
        "cross-entropy on the modules alone: the industry's default",
        _fused(loss="ce", rule="detach"),
    ),
    "ce": Regime(
        "CE, 0.2",
        "cross-entropy, fixed coefficient 0.2 on shared parameters",
        _fused(loss="ce", rule="fixed"),
    ),
    "policy": Regime("Policy, 0.2", "policy loss, fixed coefficient 0.2", _fused(rule="fixed")),
    "ce_3": Regime(
        "cross-entropy, coefficient 3",
        "cross-entropy, a coefficient that is too large",
        _fused(loss="ce", rule="fixed", coefficient=3.0),
    ),
    "policy_3": Regime(
        "policy loss, coefficient 3",
        "policy loss, a coefficient that is too large",
        _fused(rule="fixed", coefficient=3.0),
    ),
    "occ": Regime(
        "OCC on policy loss", "policy loss, OCC with the exact c and v^2", MTPTrainingConfig()
    ),
    "occ_ce": Regime(
        "OCC on cross-entropy",
        "cross-entropy, OCC with the exact c and v^2",
        MTPTrainingConfig(loss="ce"),
    ),
    "occ_smoothed": Regime(
        "OCC, averaged",
        "policy loss, measured at every fifth step and averaged over about ten such",
        MTPTrainingConfig(smoothing=0.9, every=5),
    ),
    "occ_paper": Regime(
        "OCC, paper's proxy",
        "policy loss, OCC with the paper's log-ratio proxy",
        _fused(measure="log_ratios"),
    ),
    "occ_released": Regime(
        "OCC, released code",
        "the paper's released code: mean of ratios over all response columns, times 0.1 / K (scale "
        "is set for K = 1), modules' own gradient scaled too; a negative coefficient does not turn "
        "the clip around, as it does there",
        _fused(measure="released_unmasked", scale=0.1, scale_own=True),
    ),
    "drafter": Regime(
        "drafter (own ratio, 0.2)",
        "policy loss against the module's own old log-prob, fixed 0.2; the modules themselves "
        "learn from detached cross-entropy and stay good drafters",
        _fused(own_loss="ce", reference="own", rule="fixed"),
    ),
    "worth": Regime(
        "Own ratio, by worth",
        "as drafter, with the coefficient of the largest signal to noise, w = V^-1 c, from "
        "averages of past gradients at every fifth step, and 0.2 as its prior",
        _by_worth(reference="own"),
    ),
    "rewarded": Regime(
        "CE of the better, 0.6",
        "cross-entropy on the responses that were better than their group, fixed 0.6; the modules "
        "themselves learn from detached cross-entropy on all",
        _fused(loss="ce_rewarded", own_loss="ce", rule="fixed", coefficient=0.6),
    ),
    "worth_rewarded": Regime(
        "CE of the better, by worth",
        "as rewarded, with the coefficient of the largest signal to noise as in worth, and 0.6 as "
        "its prior",
        _by_worth(
            loss="ce_rewarded",
            rule_options={"prior": 0.6, "bounds": (0.0, 2.0), "largest_change": 0.06},
        ),
    ),
    "drafter_tv": Regime(
        "Detach, TV",
        "the modules alone learn to draft: total variation from the main head is what is refused",
        _fused(loss="total_variation", rule="detach"),
    ),
    "drafter_top_k": Regime(
        "Detach, top k",
        "the modules alone learn the main head's most likely tokens, all others as one",
        _fused(loss="distill_top_k", rule="detach"),
    ),
}
"""Every named regime."""

if TYPE_CHECKING:
    RegimeName = str
else:
    RegimeName = Literal[tuple(REGIMES)]


def regime(name: str, *, exact: bool = False) -> MTPTrainingConfig:
    """The configuration of a named regime.

    Args:
      name: a key of `REGIMES`.
      exact: measure the true c and v^2 in every regime, at the price of the second backward pass.

    Raises:
      ValueError: unknown name.
    """
    if name not in REGIMES:
        raise ValueError(f"regime: expected one of {tuple(REGIMES)}, got {name!r}.")
    config = REGIMES[name].config
    if not exact or config.loss == "none":
        return config
    return dataclasses.replace(config, placement="exact")


def describe() -> str:
    """A Markdown table of all regimes."""
    lines = ["| name | label | what it is |", "|---|---|---|"]
    rows = [f"| `{name}` | {r.label} | {r.meaning} |" for name, r in REGIMES.items()]
    return "\n".join(lines + rows)
