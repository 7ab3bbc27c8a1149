"""Rules: Gram matrix -> weights (w_0, w_1, .., w_K) of the combined gradient.

The combined gradient is w_0 g + sum_k w_k m_k. A rule sees what was measured: the Gram
matrix, or the ratio c_k / v_k^2 of measures that yield it directly, and of some measures the
correlations of what the step takes or of expected gradients.

    base.py          what a rule is; norms, cosines, fallbacks
    fixed.py         rules that look at nothing: fixed, detach, replay
    optimal.py       OCC, and its form for noisy gradients
    signal_to_noise.py  where a step of free length gains most, with a prior
    projection.py    angles: cosine_gating, pcgrad, gradvac
    minimum_norm.py  the convex hull of the gradients: mgda, cagrad
    balancing.py     equal shares: imtl_g, nash_mtl, aligned_mtl, metabalance

A new rule is one function under `@register("name")`, imported here; configurations and command
lines then know it by that name.

Methods from the literature differ in what they do to the scale: some sum the K+1 gradients, some
average them, and Nash-MTL sets the norm itself. Here each keeps its published scale, which its
docstring names, so a comparison has to search the learning rate of each, or run under an optimizer
that does not see the scale. Auxiliary gradients come as they are: to try a method on 0.1 m instead
of m, put the 0.1 into the auxiliary loss.

GradNorm (Chen et al., arXiv 1711.02257) is missing on purpose. It asks that the norms of the
weighted gradients be proportional to a power of how far each *loss* has come from its value at the
start. A Gram matrix knows nothing of losses. A policy loss could not tell it either: its value is
about zero by the normalisation of the advantages, whatever the policy has learnt. Only with that
power set to 0 do the losses drop out, and then all norms are to be equal: `metabalance(relax=1)`.
"""

from occ.rules.balancing import MetaBalanceState, aligned_mtl, imtl_g, metabalance, nash_mtl
from occ.rules.base import REGISTRY, Rule, RuleState, register
from occ.rules.fixed import detach, fixed, replay
from occ.rules.minimum_norm import cagrad, mgda
from occ.rules.optimal import NONNEGATIVE, PAPER_EPS, noisy_optimal, optimal
from occ.rules.projection import GradVacState, cosine_gating, gradvac, pcgrad
from occ.rules.signal_to_noise import SignalState, signal_to_noise

by_name = REGISTRY.build

__all__ = [
    "NONNEGATIVE",
    "PAPER_EPS",
    "REGISTRY",
    "GradVacState",
    "MetaBalanceState",
    "Rule",
    "RuleState",
    "SignalState",
    "aligned_mtl",
    "by_name",
    "cagrad",
    "cosine_gating",
    "detach",
    "fixed",
    "gradvac",
    "imtl_g",
    "metabalance",
    "mgda",
    "nash_mtl",
    "noisy_optimal",
    "optimal",
    "pcgrad",
    "register",
    "replay",
    "signal_to_noise",
]
