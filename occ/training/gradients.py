"""Gradients of both losses, weighed by the calibration and combined: the heart of the train step.

Two placements of the coefficient give the same result for the same weights:

    fused   weights first, then one backward pass through the trunk for the weighted sum of the
            cotangents at its output
    exact   a backward pass for every loss (all in one vectorised pass), then true c and v^2,
            weights and the combination at the parameters
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ import measures, rules
from occ.calibration import Calibration, CalibrationState
from occ.training.batch import Minibatch
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.losses import LossOutput, mtp_loss, rl_loss
from occ.training.stages import Parts, Stages, is_shared, join, partition

HIDDEN = "hidden"  # the name of the trunk's output beside the readout's parameters in a seam


class Seam(NamedTuple):
    """One loss, differentiated back to the trunk's output.

    Attributes:
      gradient: dict of the readout's and the modules' top-level names, and `HIDDEN` for the
        cotangent [B, T, D] of the trunk's hidden state. A detached MTP loss has its modules alone.
      output: what the loss reported.
    """

    gradient: dict[str, Any]
    output: LossOutput


class StepGradient(NamedTuple):
    """The combined gradient of a step.

    Attributes:
      gradient: like the parameters.
      calibration: its state after the step; () without MTP loss.
      gram: float [K+1, K+1], the true Gram matrix over the shared parameters, whatever the measure
        estimates; None in the fused placement, which never has the gradients it is made of.
      main: what the RL loss reported.
      heads: what each MTP loss reported.
      router_load: float [L, E], tokens an expert received; None without mixture of experts.
    """

    gradient: dict[str, Any]
    calibration: CalibrationState | tuple[()]
    gram: Any
    main: LossOutput
    heads: list[LossOutput]
    router_load: Any


def build_calibration(config: MTPTrainingConfig, num_modules: int) -> Calibration | None:
    """The calibration that a training configuration describes; None without an MTP loss.

    In the fused placement the rules that look at nothing still get the log-ratio measure, which
    costs nothing and gives the run its diagnostics.
    """
    if config.loss == "none":
        return None
    forms = {"log_ratios": "paper"}
    if config.rule == "optimal":
        name = config.measure
    else:
        name = "gradients" if config.placement == "exact" else "log_ratios"
    measure = (
        measures.gradients()
        if name == "gradients"
        else measures.log_ratios(forms.get(name, name), eps=config.eps)
    )
    rule = {
        "detach": rules.detach,
        "fixed": lambda: rules.fixed(config.coefficient),
        "optimal": lambda: rules.optimal(
            config.scale,
            eps=config.eps,
            relative_ridge=config.relative_ridge,
            bounds=config.bounds,
        ),
    }[config.rule]()
    return Calibration(
        measure,
        rule,
        num_auxiliary=num_modules,
        shared=is_shared,
        scale_own=config.scale_own,
    )


def step_gradient(
    stages: Stages,
    params: dict[str, Any],
    batch: Minibatch,
    config: TrainConfig,
    calibration: Calibration | None,
    state: CalibrationState | tuple[()],
    sequences_per_row: int = 1,
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
    """
    parts = partition(params)

    def trunk(blocks, readout):
        output = stages.trunk(parts._replace(blocks=blocks, readout=readout))
        return output.hidden, output.router_load

    hidden, pull_trunk, router_load = jax.vjp(trunk, parts.blocks, parts.readout, has_aux=True)
    main = _rl_seam(stages, parts, hidden, batch, config, sequences_per_row)
    if calibration is None:
        gradient = _through_trunk(pull_trunk, main.gradient, parts)
        return StepGradient(gradient, (), None, main.output, [], router_load)

    attached = config.mtp.rule != "detach" or config.mtp.placement == "exact"
    heads = _mtp_seams(stages, parts, hidden, batch, config, sequences_per_row, attached)
    evidence = {
        "main_log_ratio": main.output.log_ratio,
        "auxiliary_log_ratios": jnp.stack([head.output.log_ratio for head in heads]),
        "response_mask": batch.response_mask,
    }
    at_seam = (pull_trunk, main, heads, parts, calibration, state, evidence)
    if config.mtp.placement == "exact":
        # jax.lax.ragged_dot has no rule for a second batch dimension.
        vectorized = config.model.moe is None
        gradient, state, gram = _combine_exact(*at_seam, vectorized)
    else:
        gradient, state, gram = _combine_fused(*at_seam)
    outputs = [head.output for head in heads]
    return StepGradient(gradient, state, gram, main.output, outputs, router_load)


# ---------------------------------------------------------------------------------------------
# From the losses to the trunk's output
# ---------------------------------------------------------------------------------------------


def _rl_seam(stages, parts: Parts, hidden, batch, config: TrainConfig, sequences_per_row) -> Seam:
    def loss(readout, hidden):
        scores = stages.head(parts._replace(readout=readout), hidden, 0)
        return rl_loss(scores, batch, config.objective, sequences_per_row)

    (readout, cotangent), output = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        parts.readout, hidden
    )
    own = jax.tree.map(jnp.zeros_like, parts.modules)
    return Seam({**readout, **own, HIDDEN: cotangent}, output)


def _mtp_seams(
    stages, parts: Parts, hidden, batch, config: TrainConfig, sequences_per_row, attached: bool
) -> list[Seam]:
    """One seam a head. Detached, only the modules are differentiated: nothing is left to leak."""

    def unpack(modules, shared):
        readout, hidden_ = shared if attached else (parts.readout, hidden)
        return parts._replace(modules=modules, readout=readout), hidden_

    shared = (parts.readout, hidden) if attached else ()
    states, pull_modules = jax.vjp(
        lambda modules, shared: stages.modules(*unpack(modules, shared)), parts.modules, shared
    )

    def head_gradient(depth):
        def loss(modules, shared, state):
            head_parts, _ = unpack(modules, shared)
            scores = stages.head(head_parts, state, depth)
            return mtp_loss(scores, batch, depth, config.objective, config.mtp, sequences_per_row)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
            parts.modules, shared, states[depth - 1]
        )

    seams = []
    for k in range(states.shape[0]):
        (own, through_head, cotangent), output = head_gradient(k + 1)
        # With sequential modules head k's gradient also reaches modules 1..k-1.
        cotangents = jnp.zeros_like(states).at[k].set(cotangent)
        own_below, through_modules = pull_modules(cotangents)
        gradient = _add(own, own_below)
        if attached:
            readout, hidden_cotangent = _add(through_head, through_modules)
            gradient = {**gradient, **readout, HIDDEN: hidden_cotangent}
        seams.append(Seam(gradient, output))
    return seams


# ---------------------------------------------------------------------------------------------
# From the trunk's output to the parameters
# ---------------------------------------------------------------------------------------------


def _through_trunk(pull_trunk, seam: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """The gradient on all parameters of a loss whose seam is given."""
    blocks, readout = pull_trunk(seam[HIDDEN])
    return join(
        Parts(
            blocks=blocks,
            readout=_add(readout, {name: seam[name] for name in parts.readout}),
            modules={name: seam[name] for name in parts.modules},
        )
    )


def _combine_fused(
    pull_trunk,
    main: Seam,
    heads: list[Seam],
    parts: Parts,
    calibration: Calibration,
    state,
    evidence,
):
    """Weighs the seams, which the trunk's backward pass then sees as one loss."""
    auxiliary, finite = calibration.remove_nonfinite(tuple(head.gradient for head in heads))
    state = calibration.weigh(state, evidence, finite=finite)
    # A detached seam lacks the shared entries, where the main gradient stays as it is.
    reached = {name: main.gradient[name] for name in auxiliary[0]}
    combined = calibration.combine(state.weights, reached, auxiliary)
    return _through_trunk(pull_trunk, {**main.gradient, **combined}, parts), state, None


def _combine_exact(
    pull_trunk,
    main: Seam,
    heads: list[Seam],
    parts: Parts,
    calibration: Calibration,
    state,
    evidence,
    vectorized: bool,
):
    """Pulls the cotangents back one by one to the parameters, and weighs there."""
    seams = [main, *heads]
    pulled = _pull_each(pull_trunk, [seam.gradient[HIDDEN] for seam in seams], vectorized)
    gradients = tuple(
        _through_trunk(lambda _, trunk=trunk: trunk, seam.gradient, parts)
        for seam, trunk in zip(seams, pulled, strict=True)
    )
    shared = tuple({name: g[name] for name in g if is_shared(name)} for g in gradients)
    main_gradient, *auxiliary = gradients
    combined, state = calibration.update(
        main_gradient, state, auxiliary=tuple(auxiliary), **evidence
    )
    return combined, state, measures.gram_matrix(shared)


def _pull_each(pull_trunk, cotangents: list[Any], vectorized: bool) -> list[Any]:
    """The trunk's gradient for every cotangent; vectorised, it recomputes activations once."""
    if not vectorized:
        return [pull_trunk(cotangent) for cotangent in cotangents]
    pulled = jax.vmap(pull_trunk)(jnp.stack(cotangents))
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], pulled)
        for index in range(len(cotangents))
    ]


def _add(left: Any, right: Any) -> Any:
    return jax.tree.map(jnp.add, left, right)
