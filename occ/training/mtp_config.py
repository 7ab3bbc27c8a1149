"""Configuration of the MTP modules' training: their loss, the measure, the rule, the placement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from occ import measures, rules
from occ.checks import validate
from occ.training import named_measures as named_measures  # enters them

if TYPE_CHECKING:
    MeasureName = str
    RuleName = str
else:
    MeasureName = Literal[tuple(measures.REGISTRY)]
    RuleName = Literal[tuple(rules.REGISTRY)]


@dataclasses.dataclass(frozen=True)
class MTPTrainingConfig:
    """How the MTP modules are trained, and what their gradient does to the shared parameters.

    The default measure is `gradients`, the exact c and v^2, although it costs a second backward
    pass through the trunk (about half a step): it is the quantity that the coefficient is derived
    from. The paper's `log_ratios` costs nothing, and is what the paper's own configurations use,
    but its value does not track c / v^2 on the small models that we could measure, and it is 0
    in the first minibatch of every rollout.

    Attributes:
      loss: "ce" (cross-entropy on the sampled responses), "ce_rewarded" (on those of positive
        advantage; the others count 0 in the same mean), "policy" (the main head's policy loss on
        MTP log-probs), a divergence from the main head's distribution for the same token, which
        is held fixed ("distill", Kullback and Leibler's; "distill_top_k", that of its most likely
        tokens; "total_variation", the share of drafts that it would refuse) or "none" (RL alone).
      own_loss: what the modules' own parameters learn from: "same", or "ce" or a divergence,
        detached, so that they stay good drafters while `loss` acts on the shared parameters alone.
      distilled_tokens: k of "distill_top_k"; all others are one outcome.
      reference: old log-prob in the ratio of the policy loss, and in d_MTP of the log-ratio
        measures: the main head's for the same token, or the module's own.
      rule: coefficient on shared parameters: "detach" (0), "fixed", "optimal" (OCC), or another
        name in `occ.rules.REGISTRY`.
      coefficient: of rule "fixed".
      scale: lambda_+ of rule "optimal".
      eps: added to v^2 for one module, by rule "optimal". None is the paper's 1e-8 with its
        measures, the log-ratios, and 0 with the others, whose v^2 may be as small in a layer.
      relative_ridge: for several modules, by rule "optimal".
      bounds: clip range of the coefficients of rule "optimal"; None is none.
      rule_options: further keyword options of the rule.
      measure: a name in `occ.measures.REGISTRY`, where rules that depend on data have c and v^2
        from: the exact "gradients"; those of some leaves; "cross_fitted" between halves of the
        minibatch; against averages of "past_gradients"; in Adam's norm ("preconditioned");
        "sketched"; in the placement "fused" also of a "row_subset", or of the "readout" (output
        head, final norm, and the embedding as far as it is known there); the paper's "log_ratios"
        and its release's forms.
      measure_options: keyword options of the measure.
      smoothing: decay of moving averages of c and v^2; 0 is none.
      every: measure at every n-th step, and keep the weights in between. Choose an n that shares no
        factor with the minibatches a rollout: otherwise the same ones are always measured, and the
        first is unlike the others, since the policy has not moved yet.
      groups: "none" has one coefficient for all shared parameters, "layer" one for each layer of
        the trunk and for what is before and after them (rules that depend on data, placement
        "exact").
      placement: "fused" weighs the losses before one backward pass through the trunk; "exact"
        takes a backward pass for each where it measures, and knows the true c and v^2.
      scale_own: scale the modules' own gradient too, as the paper's released code does.
    """

    loss: Literal[
        "none", "ce", "ce_rewarded", "policy", "distill", "distill_top_k", "total_variation"
    ] = "policy"
    own_loss: Literal["same", "ce", "distill", "distill_top_k", "total_variation"] = "same"
    distilled_tokens: int = 16
    reference: Literal["main", "own"] = "main"
    rule: RuleName = dataclasses.field(default="optimal", metadata={"one_of": rules.REGISTRY})
    coefficient: float = 0.2
    scale: float = 1.0
    eps: float | None = None
    relative_ridge: float = 1e-4
    bounds: tuple[float, float] | None = None
    rule_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    measure: MeasureName = dataclasses.field(
        default="gradients", metadata={"one_of": measures.REGISTRY}
    )
    measure_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    smoothing: float = 0.0
    every: int = 1
    groups: Literal["none", "layer"] = "none"
    placement: Literal["fused", "exact"] = "exact"
    scale_own: bool = False

    def __post_init__(self):
        validate(self)
        measure = self.make_measure()
        self.make_rule()  # options that it does not have are named now
        self._check_groups(measure)
        self._check_placement(measure)

    def _check_groups(self, measure: measures.Measure) -> None:
        if self.groups == "none":
            return
        fits = self.placement == "exact" and self.every == 1 and self.data_dependent
        if not fits or measure.early or measure.partial:
            others = _measures_that(lambda one: one.early or one.partial)
            raise ValueError(
                "MTPTrainingConfig: groups='layer' measures the gradients of every layer at every "
                "step. Use placement='exact', every=1, a rule that depends on what is measured, "
                f"and a measure that is not in {others}; got {self.placement!r}, "
                f"{self.every}, {self.rule!r} and {self.measure!r}."
            )

    def _check_placement(self, measure: measures.Measure) -> None:
        if not self.data_dependent:
            return
        beforehand = _measures_that(_is_of_early_gradients)
        if self.placement == "exact" and self.measure in beforehand:
            raise ValueError(
                f"MTPTrainingConfig: measure={self.measure!r} is of gradients taken before "
                "the backward pass through the trunk, which placement='exact' has no need of. Use "
                f"placement='fused', or a measure that is not in {beforehand}."
            )
        if self.placement == "fused" and not measure.early:
            early = _measures_that(lambda one: one.early)
            raise ValueError(
                "MTPTrainingConfig: placement='fused' must know the coefficient before the "
                "backward pass through the trunk, when the gradients that "
                f"measure={self.measure!r} needs do not exist yet. Use placement='exact', or a "
                f"measure in {early}."
            )

    def make_measure(self) -> measures.Measure:
        """The measure that gives the rule its c and v^2."""
        options = dict(self.measure_options)
        if self.measure.startswith("released"):
            options.setdefault("eps", self.added_eps)
        return measures.by_name(self.measure, **options)

    def make_rule(self) -> rules.Rule:
        """The rule that turns them into weights."""
        options = self.rule_options
        if self.rule == "fixed":
            options = {"coefficients": self.coefficient} | options
        elif self.rule == "optimal":
            options = {
                "scale": self.scale,
                "eps": self.added_eps,
                "relative_ridge": self.relative_ridge,
                "bounds": self.bounds,
            } | options
        return rules.by_name(self.rule, **options)

    @property
    def data_dependent(self) -> bool:
        """Whether the rule depends on what is measured."""
        return self.make_rule().data_dependent

    @property
    def added_eps(self) -> float:
        """What is added to v^2: `eps`, or what it stands for if it is None."""
        if self.eps is not None:
            return self.eps
        return rules.PAPER_EPS if self.measure.startswith(("log_ratios", "released")) else 0.0

    def leading_rows(self, rows: int) -> int:
        """Rows at the top of a minibatch that the measure takes apart from the others; else all."""
        leading = self.make_measure().leading_rows
        return rows if leading is None else leading(rows)


def _measures_that(holds: Callable[[measures.Measure], bool]) -> list[str]:
    return [name for name in measures.REGISTRY if holds(measures.by_name(name))]


def _is_of_early_gradients(measure: measures.Measure) -> bool:
    known = measures.EVIDENCE
    return any(known[name].early for name in measure.tree_evidence)
