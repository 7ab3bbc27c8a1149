"""Where the coefficient meets the gradients: the heart of the train step.

    rl_alone       g
    weights_first  lambda from what is known at the trunk's output, then one backward pass through
                   the trunk for the weighted sum of the losses' cotangents
    weights_last   a backward pass for every loss, then the true c and v^2, lambda, and the weighted
                   sum at the parameters

For equal weights the last two give the same gradient. The coefficient itself is computed by
`Calibration.weigh` and applied by `Calibration.apply_weights` (occ/calibration.py; by group in
occ/grouped.py) in either placement; whether a step measures is decided by `Calibration.if_due`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ import measures
from occ.calibration import Calibration, CalibrationState
from occ.finiteness import all_finite
from occ.grouped import GroupedCalibration, GroupedState
from occ.models.parameters import is_shared, join
from occ.training.gradient.cotangents import (
    HIDDEN,
    HeadGradient,
    Trunk,
    head_gradients,
    loss_outputs,
    rl_gradient,
    through_trunk,
    trunk,
)
from occ.training.gradient.inputs import StepInputs
from occ.training.gradient.losses import LossOutput, merge_outputs
from occ.training.gradient.micro_batches import Pass, over_micro_batches, times_share
from occ.trees import zero_unless


class StepGradient(NamedTuple):
    """The combined gradient of a step.

    Attributes:
      gradient: like the parameters.
      calibration: its state after the step; () without MTP loss.
      gram: float [K+1, K+1], the true Gram matrix over the shared parameters, whatever the measure
        estimates; NaN in a step that did not measure, None with weights first, where the gradients
        that it is made of never exist.
      outputs: what each loss reported, the RL loss first.
      router_load: float [L, E], tokens an expert received; None without mixture of experts.
    """

    gradient: dict[str, Any]
    calibration: CalibrationState | GroupedState | tuple[()]
    gram: Any
    outputs: list[LossOutput]
    router_load: Any

    @property
    def main(self) -> LossOutput:
        """What the RL loss reported."""
        return self.outputs[0]

    @property
    def heads(self) -> list[LossOutput]:
        """What each MTP loss reported."""
        return self.outputs[1:]


def step_gradient(
    inputs: StepInputs,
    calibration: Calibration | GroupedCalibration | None,
    state: Any,
) -> StepGradient:
    """All losses' gradients on one minibatch, weighed and added.

    Args:
      inputs: the policy on the minibatch.
      calibration: from `build_calibration`; None trains on the RL loss alone.
      state: the calibration's state.
    """
    if calibration is None:
        return rl_alone(inputs)
    if inputs.config.mtp.placement == "fused":
        assert isinstance(calibration, Calibration)
        return weights_first(inputs, calibration, state)
    return calibration.if_due(
        state,
        lambda state: weights_last(inputs, calibration, state),
        lambda state: _weights_held(inputs, calibration, state),
    )


def rl_alone(inputs: StepInputs) -> StepGradient:
    """The RL loss's gradient."""

    def step(part: StepInputs, shares: Any) -> Pass:
        passed = trunk(part)
        main = rl_gradient(part, passed.hidden)
        gradient = through_trunk(passed.pull, main.gradient, part.parts)
        return Pass(times_share(gradient, shares, 0), [main.output], passed.router_load)

    total = over_micro_batches(inputs, step, join(inputs.parts))
    return StepGradient(total.gradient, (), None, total.outputs, total.router_load)


# ---------------------------------------------------------------------------------------------
# Weights first
# ---------------------------------------------------------------------------------------------


def weights_first(
    inputs: StepInputs, calibration: Calibration, state: CalibrationState, *, measure: bool = True
) -> StepGradient:
    """Weights, then one backward pass through the trunk; without `measure`, the state's weights.

    Of a minibatch in one piece, what is measured is on the way: the same forward pass serves. In
    micro-batches a forward pass over all of them comes first, since the weights are those of the
    whole minibatch; rules that do not depend on data skip it, and measure for the record alone.
    """
    in_one_piece = inputs.config.layout.micro_batches == 1
    here = _to_cotangents(inputs) if in_one_piece else None
    before = state

    def measured(state):
        if here is not None:
            seen = Pass(_readouts(inputs, here.heads), here.outputs, finite=here.finite)
        elif inputs.config.mtp.data_dependent:
            seen = _forward_pass(inputs, calibration)
        else:
            seen = Pass((), _nothing_measured(inputs), finite=_all_true(calibration))
        evidence = _early_evidence(inputs, calibration, seen)
        return calibration.weigh(state, evidence, finite=seen.finite), seen.finite

    def held(state):
        finite = _all_true(calibration) if here is None else here.finite
        return calibration.hold(state, finite), finite

    state, finite = calibration.if_due(state, measured, held) if measure else held(state)

    def step(part: StepInputs, shares: Any) -> Pass:
        at = _to_cotangents(part) if here is None else here
        main, *heads = (head_times_share(head, shares, k) for k, head in enumerate(at.heads))
        auxiliary = tuple(head.gradient for head in heads)
        if here is None:
            auxiliary = tuple(zero_unless(finite[k], m) for k, m in enumerate(auxiliary))
        # A detached head lacks the shared entries, where the main gradient stays as it is.
        reached = {name: main.gradient[name] for name in auxiliary[0]}
        combined = calibration.apply_weights(state.weights, reached, auxiliary)
        gradient = through_trunk(at.trunk.pull, {**main.gradient, **combined}, part.parts)
        return Pass(gradient, at.outputs, at.trunk.router_load, at.finite)

    total = over_micro_batches(inputs, step, join(inputs.parts))
    if measure and not (in_one_piece or inputs.config.mtp.data_dependent):
        evidence = _early_evidence(inputs, calibration, total)
        state = calibration.if_due(
            before,
            lambda state: calibration.weigh(state, evidence, finite=total.finite),
            lambda state: calibration.hold(state, total.finite),
        )
    else:
        found_later = (finite & ~total.finite).astype(jnp.int32)
        state = state._replace(nonfinite=state.nonfinite + found_later)
    return StepGradient(total.gradient, state, None, total.outputs, total.router_load)


def _weights_held(inputs: StepInputs, calibration: Any, state: Any) -> StepGradient:
    """A step that does not measure: it keeps the weights, so the trunk's single pass will do."""
    step = weights_first(inputs, calibration, state, measure=False)
    return step._replace(gram=jnp.full_like(state.gram, jnp.nan))


class _AtCotangents(NamedTuple):
    """A forward pass and all losses back to the trunk's output.

    Attributes:
      trunk: the way on from there.
      heads: the K+1 gradients; MTP gradients that are not finite are replaced by zeros.
      finite: bool [K], which were.
    """

    trunk: Trunk
    heads: list[HeadGradient]
    finite: jax.Array

    @property
    def outputs(self) -> list[LossOutput]:
        """What each loss reported."""
        return [head.output for head in self.heads]


def _to_cotangents(inputs: StepInputs) -> _AtCotangents:
    passed = trunk(inputs)
    attached = inputs.config.mtp.rule != "detach"
    main, *heads = head_gradients(inputs, passed.hidden, attached=attached)
    finite = jnp.stack([all_finite(head.gradient) for head in heads])
    heads = [
        head._replace(gradient=zero_unless(finite[k], head.gradient))
        for k, head in enumerate(heads)
    ]
    return _AtCotangents(passed, [main, *heads], finite)


def _forward_pass(inputs: StepInputs, calibration: Calibration) -> Pass:
    """What is known before the trunk's backward pass, of a minibatch in micro-batches."""
    if "readout" in calibration.measure.evidence:

        def step(part: StepInputs, shares: Any) -> Pass:
            at = _to_cotangents(part)
            readouts = tuple(
                times_share(readout, shares, k)
                for k, readout in enumerate(_readouts(part, at.heads))
            )
            return Pass(readouts, at.outputs, finite=at.finite)

        return over_micro_batches(inputs, step, (inputs.parts.readout,) * (inputs.num_modules + 1))

    def report(part: StepInputs, shares: Any) -> Pass:
        # The gradients come later; a log-ratio that is not finite tells of most that are not.
        outputs = loss_outputs(part, part.stages.trunk(part.parts).hidden)
        finite = jnp.stack([jnp.all(jnp.isfinite(head.log_ratio)) for head in outputs[1:]])
        return Pass((), outputs, finite=finite)

    return over_micro_batches(inputs, report, ())


def _readouts(inputs: StepInputs, heads: list[HeadGradient]) -> tuple[dict[str, Any], ...]:
    """Each loss's gradient on what lies behind the trunk and is shared."""
    names = [name for name in inputs.parts.readout if name in heads[-1].gradient]
    return tuple({name: head.gradient[name] for name in names} for head in heads)


def _early_evidence(inputs: StepInputs, calibration: Calibration, seen: Pass) -> dict[str, Any]:
    """What measures may read before the backward pass through the trunk."""
    evidence = _log_ratios(inputs, seen.outputs)
    if "readout" in calibration.measure.evidence:
        evidence["readout"] = seen.gradient
    if "row_subset" in calibration.measure.evidence:
        evidence["row_subset"] = _on_first_rows(inputs)
    return evidence


def _on_first_rows(inputs: StepInputs) -> tuple[dict[str, Any], ...]:
    """All losses' gradients on the leading share of the rows."""
    config, rows = inputs.config, inputs.batch.tokens.shape[0]
    count = config.mtp.leading_rows(rows)
    parts = math.gcd(count, config.layout.micro_batches)
    layout = dataclasses.replace(config.layout, micro_batches=parts)
    first = inputs.rows(slice(0, count))
    return loss_gradients(
        first._replace(config=dataclasses.replace(config, layout=layout))
    ).gradient


def _nothing_measured(inputs: StepInputs) -> list[LossOutput]:
    """Reports for a rule that gives the same weights whatever is measured."""
    zeros = jnp.zeros(inputs.batch.tokens.shape, inputs.batch.advantages.dtype)
    nothing = LossOutput(zeros, inputs.batch.response_mask, jnp.zeros(()), {})
    return [nothing] * (inputs.num_modules + 1)


# ---------------------------------------------------------------------------------------------
# Weights last
# ---------------------------------------------------------------------------------------------


def weights_last(
    inputs: StepInputs, calibration: Calibration | GroupedCalibration, state: Any
) -> StepGradient:
    """A backward pass for every loss, then weights from the true gradients, and their sum."""
    evidence: dict[str, Any] = {}
    if "gradient_halves" in calibration.measure.evidence:
        halves = _halves(inputs)
        losses = _merge_halves(*halves)
        evidence["gradient_halves"] = tuple(half.gradient for half in halves)
    else:
        losses = loss_gradients(inputs)
    if "second_moment" in calibration.measure.evidence:
        evidence["second_moment"] = inputs.second_moment
    evidence |= _log_ratios(inputs, losses.outputs)
    main, *auxiliary = losses.gradient
    combined, state = calibration.measured_update(
        main, state, auxiliary=tuple(auxiliary), **evidence
    )
    shared = tuple({k: g[k] for k in g if is_shared(k)} for g in losses.gradient)
    gram = measures.gram_matrix(shared)
    return StepGradient(combined, state, gram, losses.outputs, losses.router_load)


def loss_gradients(inputs: StepInputs) -> Pass:
    """The gradients of all K+1 losses on all parameters, the RL loss first: a tuple of trees.

    In micro-batches every loss has an accumulator of its own.
    """

    def step(part: StepInputs, shares: Any) -> Pass:
        passed = trunk(part)
        heads = head_gradients(part, passed.hidden, attached=True)
        # jax.lax.ragged_dot has no rule for a second batch dimension.
        vectorized = part.config.model.moe is None
        pulled = _pull_each(passed.pull, [head.gradient[HIDDEN] for head in heads], vectorized)
        gradients = tuple(
            times_share(
                through_trunk(lambda _, back=back: back, head.gradient, part.parts), shares, k
            )
            for k, (head, back) in enumerate(zip(heads, pulled, strict=True))
        )
        return Pass(gradients, [head.output for head in heads], passed.router_load)

    return over_micro_batches(inputs, step, (join(inputs.parts),) * (inputs.num_modules + 1))


def _pull_each(pull: Any, cotangents: list[Any], vectorized: bool) -> list[Any]:
    """The trunk's gradient for every cotangent; vectorised, it recomputes activations once."""
    if not vectorized:
        return [pull(cotangent) for cotangent in cotangents]
    pulled = jax.vmap(pull)(jnp.stack(cotangents))
    return [
        jax.tree.map(lambda leaf, index=index: leaf[index], pulled)
        for index in range(len(cotangents))
    ]


def _halves(inputs: StepInputs) -> tuple[Pass, Pass]:
    """The gradients on either half of the rows; a prompt's samples stand together."""
    rows = inputs.batch.tokens.shape[0]
    if rows < 2:
        raise ValueError(
            "measure 'cross_fitted' compares two halves of a minibatch, and this one has a single "
            "row. Use larger minibatches, or measure='gradients'."
        )
    border = inputs.config.mtp.leading_rows(rows)
    return (
        loss_gradients(inputs.rows(slice(0, border))),
        loss_gradients(inputs.rows(slice(border, rows))),
    )


def _merge_halves(first: Pass, second: Pass) -> Pass:
    """The gradients on the whole minibatch, from those on its halves."""
    outputs = [
        merge_outputs(pair, jnp.concatenate)
        for pair in zip(first.outputs, second.outputs, strict=True)
    ]
    gradients = []
    for k, output in enumerate(outputs):
        weight = jnp.where(output.weight > 0, output.weight, 1)
        shares = [half.outputs[k].weight / weight for half in (first, second)]
        gradients.append(
            jax.tree.map(
                lambda a, b, shares=shares: (shares[0] * a + shares[1] * b).astype(a.dtype),
                first.gradient[k],
                second.gradient[k],
            )
        )
    load = None if first.router_load is None else first.router_load + second.router_load
    return Pass(tuple(gradients), outputs, load)


# ---------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------


def head_times_share(head: HeadGradient, shares: Any, loss: int) -> HeadGradient:
    """The gradient of a head whose loss is multiplied by a micro-batch's share in it."""
    if shares is None:
        return head
    gradient = jax.tree.map(lambda x: (shares[loss] * x).astype(x.dtype), head.gradient)
    return head._replace(gradient=gradient)


def _log_ratios(inputs: StepInputs, outputs: list[LossOutput]) -> dict[str, Any]:
    """The evidence of the log-ratio measures; columns that hold prompts alone are left out."""
    columns = slice(inputs.stages.prompt_columns, None)
    return {
        "main_log_ratio": outputs[0].log_ratio[:, columns],
        "auxiliary_log_ratios": jnp.stack([out.log_ratio[:, columns] for out in outputs[1:]]),
        "response_mask": inputs.batch.response_mask[:, columns],
    }


def _all_true(calibration: Calibration) -> jax.Array:
    return jnp.ones((calibration.num_auxiliary,), bool)
