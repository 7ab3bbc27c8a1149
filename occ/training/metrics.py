"""Every metric of a run, each in one entry: its name, its meaning, how minibatches add up.

    @step_metric("batch/tokens", "response tokens that count in the losses")
    def _tokens(seen): ...

is all that a new metric of the train step takes here: the step computes it, the loop averages it
over a rollout's minibatches, and it appears in metrics.jsonl, TensorBoard and `describe()` (`python
-m experiments.train metrics`). The tests' reference of the step asks for a second computation of
it, so that none goes unchecked. A step's metric that is nowhere declared is an error, so that none
is averaged by accident. What only engines report is declared beside them (`mismatch.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occ import diagnostics
from occ.grouped import GroupedState
from occ.models.parameters import module_leaves, partition
from occ.training.batch import Minibatch
from occ.training.config import TrainConfig
from occ.training.durable.bad_updates import first_nonfinite
from occ.training.gradient.placement import StepGradient
from occ.training.state import TrainState


class StepSeen(NamedTuple):
    """What the metrics of a train step are computed from.

    Attributes:
      before, after: the state around the step.
      gradient: the combined gradient, and what the losses reported.
      batch: the minibatch.
      config: of the run.
      finite: bool [], whether the update was taken.
      learning_rate: of this step.
      nonfinite_leaf: int32 [], the first bad leaf, or -1.
    """

    before: TrainState
    after: TrainState
    gradient: StepGradient
    batch: Minibatch
    config: TrainConfig
    finite: jax.Array
    learning_rate: Any
    nonfinite_leaf: jax.Array


class Metric(NamedTuple):
    """One metric.

    Attributes:
      name: as in metrics.jsonl; up to the slash, the group that dashboards show together.
      meaning: in words, with its unit.
      over_steps: from the values of a rollout's minibatches [N, ...] to that of the row; None for
        what a rollout has once.
      better: 1 if larger is better, -1 if smaller is, 0 if neither.
      compute: from a `StepSeen` to a scalar or [K]; None as a result where it does not apply. None
        itself for metrics that come from elsewhere (losses, rollout, evaluation).
      of_means: from the row's other means, in place of `over_steps`.
    """

    name: str
    meaning: str
    over_steps: Callable[[np.ndarray], Any] | None = None
    better: int = 0
    compute: Callable[[StepSeen], Any] | None = None
    of_means: Callable[[dict[str, Any]], Any] | None = None


METRICS: dict[str, Metric] = {}
"""Every metric by its name."""


def mean(values: np.ndarray) -> Any:
    """Mean over minibatches."""
    return values.mean(axis=0)


def last(values: np.ndarray) -> Any:
    """That of the last minibatch: for counts that go on."""
    return values[-1]


def total(values: np.ndarray) -> Any:
    """The number of minibatches in which it was so."""
    return values.sum(axis=0)


def mean_where_measured(values: np.ndarray) -> Any:
    """Mean over the steps that measured; NaN without any."""
    measured = np.isfinite(values)
    count = measured.sum(axis=0)
    added = np.where(measured, values, 0).sum(axis=0)
    return np.where(count > 0, added / np.maximum(count, 1), np.nan)


def declare(name: str, meaning: str, over_steps: Any = mean, *, better: int = 0) -> None:
    """Enters a metric that is computed where its parts are (a loss, a rollout)."""
    METRICS[name] = Metric(name, meaning, over_steps, better)


def step_metric(
    name: str, meaning: str, over_steps: Any = mean, *, better: int = 0, of_means: Any = None
) -> Callable:
    """Enters a metric of the train step; it decorates the function that computes it."""

    def enter(compute):
        METRICS[name] = Metric(name, meaning, over_steps, better, compute, of_means)
        return compute

    return enter


def step_metrics(seen: StepSeen) -> dict[str, jax.Array]:
    """All metrics of a step that apply: those of the losses, and every entry that computes one."""
    main, *heads = [output.metrics for output in seen.gradient.outputs]
    found = dict(main)
    if heads:
        found |= {name: jnp.stack([head[name] for head in heads]) for name in heads[0]}
    for metric in METRICS.values():
        value = None if metric.compute is None else metric.compute(seen)
        if value is not None:
            found[metric.name] = value
    return found


def over_steps(steps: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """A row's values, from those of a rollout's minibatches.

    Raises:
      ValueError: a metric that has no entry; it is named.
    """
    unknown = sorted(set(steps[0]) - set(METRICS))
    if unknown:
        raise ValueError(
            f"metrics: {unknown} have no entry, expected one of {sorted(METRICS)}. Add one with "
            "`declare` or `step_metric` (occ/training/metrics.py)."
        )
    row = {}
    for name in steps[0]:
        reduce = METRICS[name].over_steps
        if reduce is not None:
            row[name] = reduce(np.stack([np.asarray(step[name]) for step in steps]))
    for name in row:
        of_means = METRICS[name].of_means
        if of_means is not None:
            row[name] = of_means(row)
    return row


def describe() -> str:
    """A Markdown table of all metrics."""
    lines = ["| metric | meaning |", "|---|---|"]
    for metric in METRICS.values():
        meaning = metric.meaning.replace("|", "\\|")  # or a cell would end there
        lines.append(f"| `{metric.name}` | {meaning} |")
    return "\n".join(lines)


# -- Of the losses, the rollout and the evaluation; they are computed there

for _name, _meaning in {
    "loss/rl": "the RL loss, its KL term and entropy bonus included",
    "loss/mtp": "[K] loss of each MTP head",
    "policy/entropy": "nats a response token, main head",
    "policy/kl_to_old": "k3 estimate of KL(old || new), nats a token",
    "policy/clip_high": "share of response tokens clipped above",
    "policy/clip_low": "share clipped below",
    "policy/clip_dual": "share held by the dual clip",
    "mtp/clip_high": "[K] share of an MTP head's tokens clipped above",
    "mtp/clip_low": "[K] share clipped below",
    "mtp/clip_dual": "[K] share held by the dual clip",
    "mtp/cross_entropy": "[K] nats a token, of the response under each MTP head",
    "mtp/log_ratio": "[K] mean log-ratio to the reference that the loss names",
}.items():
    declare(_name, _meaning)

for _name, _meaning, _better in (
    ("rollout", "number of the rollout, from 0", 0),
    ("reward", "mean over the samples that could be judged; null if none could", 1),
    ("rollout/invalid", "share of the samples that could not be judged", -1),
    ("rollout/zero_variance_groups", "share of the prompts whose samples all have one reward", 0),
    ("rollout/response_length", "mean, tokens", 0),
    ("rollout/finished", "share of the responses that ended by themselves", 0),
    ("rollout/log_prob_mismatch", "mean |log-prob when sampled - when scored|, nats", -1),
    ("rollout/padding_waste", "share of what generation computed that holds no token", -1),
    ("rollout/acceptance", "[D] share of drafts kept, of those whose predecessors were", 1),
    ("rollout/tokens_a_pass", "of the trunk over a row; 1 without drafts", 1),
    ("rollout/draft_depth", "drafts of each pass of the trunk, where a run chooses them", 0),
    ("rollout/draft_share", "of the time of a step, what those drafts cost", -1),
    ("alarm/drafts_refused", "1 where not one draft was kept: the modules are stale", -1),
    ("batch/padding_waste", "share of what the train steps computed that holds no token", -1),
    ("eval/greedy", "share of held-out prompts whose most likely response is right", 1),
    ("eval/sampled", "avg@k of held-out prompts, at the evaluation's temperature", 1),
    ("eval/mtp_acceptance", "[K] share of greedy tokens that each module predicts", 1),
    ("seconds/rollout", "sampling, verifying, scoring", -1),
    ("seconds/updates", "the train steps", -1),
    ("seconds/evaluation", "the held-out evaluation", -1),
):
    declare(_name, _meaning, None, better=_better)


# -- Of the gradients


@step_metric("grad_norm/shared", "norm of the combined gradient on shared parameters")
def _shared_norm(seen: StepSeen) -> Any:
    parts = partition(seen.gradient.gradient)
    return optax.tree.norm((parts.blocks, parts.readout))


@step_metric("grad_norm/own", "norm of the gradient on the MTP modules' own parameters")
def _own_norm(seen: StepSeen) -> Any:
    modules = partition(seen.gradient.gradient).modules
    return optax.tree.norm(modules) if modules else jnp.zeros(())


def _with_heads(read: Callable[[Any], Any]) -> Callable[[StepSeen], Any]:
    """Of the calibration's state, where there is one."""

    def compute(seen: StepSeen) -> Any:
        if not seen.gradient.heads:
            return None
        return read(diagnostics.calibration_state(seen.gradient.calibration))

    return compute


for _name, _meaning, _over, _read in (
    ("correlation", "[K] c = <g, m> as measured", mean, diagnostics.correlation),
    ("perturbation", "[K] v^2 = |m|^2 as measured", mean, diagnostics.perturbation),
    ("cosine", "[K] c / (|g| |m|) as measured", mean, diagnostics.cosine),
    ("coefficient", "[K] lambda on shared parameters", mean, diagnostics.coefficient),
    ("condition_number", "of [<m_j, m_k>]", mean, lambda state: state.condition_number),
    ("nonfinite", "[K] MTP gradients removed so far", last, lambda state: state.nonfinite),
    ("overflowed", "[K+1] finite gradients whose norm overflowed", last, lambda s: s.overflowed),
):
    step_metric(f"occ/{_name}", _meaning, _over)(_with_heads(_read))


@step_metric("occ/coefficient_by_group", "[G, K] lambda of each group of parameters")
def _by_group(seen: StepSeen) -> Any:
    state = seen.gradient.calibration
    if not isinstance(state, GroupedState):
        return None
    return jnp.stack([group.weights[1:] for group in state.groups.values()])


def _of_gram(read: Callable[[Any], Any]) -> Callable[[StepSeen], Any]:
    """Of the true Gram matrix over the shared parameters; what the rule used may differ."""
    return lambda seen: None if seen.gradient.gram is None else read(seen.gradient.gram)


def _positive(values: jax.Array) -> jax.Array:
    return jnp.maximum(values, jnp.finfo(values.dtype).tiny)


def _true_cosine(gram: jax.Array) -> jax.Array:
    norms = jnp.sqrt(gram[0, 0]) * jnp.sqrt(jnp.diagonal(gram)[1:])
    return gram[0, 1:] / _positive(norms)


for _name, _meaning, _read in (
    ("grad_norm/rl", "norm of the RL gradient", lambda gram: jnp.sqrt(gram[0, 0])),
    ("grad_norm/mtp", "[K] of MTP gradients", lambda gram: jnp.sqrt(jnp.diagonal(gram)[1:])),
    ("true/correlation", "[K] exact c of the minibatch", lambda gram: gram[0, 1:]),
    ("true/perturbation", "[K] exact v^2", lambda gram: jnp.diagonal(gram)[1:]),
    ("true/cosine", "[K] exact cosine", _true_cosine),
):
    step_metric(_name, _meaning, mean_where_measured)(_of_gram(_read))


def _ratio_of_means(row: dict[str, Any]) -> Any:
    # A mean of ratios is ruled by the minibatch with the smallest v^2.
    smallest = np.finfo(np.float32).tiny
    return row["true/correlation"] / np.maximum(row["true/perturbation"], smallest)


@step_metric(
    "true/ratio", "[K] exact c / v^2; over minibatches a ratio of means", of_means=_ratio_of_means
)
def _true_ratio(seen: StepSeen) -> Any:
    gram = seen.gradient.gram
    return None if gram is None else gram[0, 1:] / _positive(jnp.diagonal(gram)[1:])


# -- Of experts, the minibatch and the update


@step_metric("router/max_over_mean_load", "load of the busiest expert over the mean", better=-1)
def _busiest(seen: StepSeen) -> Any:
    load = seen.gradient.router_load
    if load is None:
        return None
    return jnp.max(jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1))


@step_metric("router/dropped", "share of (token, expert) pairs that found no room", better=-1)
def _dropped(seen: StepSeen) -> Any:
    load, moe = seen.gradient.router_load, seen.config.model.moe
    if load is None or moe is None:
        return None
    tokens = jnp.sum((seen.batch.segment_ids > 0).astype(load.dtype))
    pairs = load.shape[0] * moe.experts_per_token * tokens
    return 1 - jnp.sum(load) / jnp.maximum(pairs, 1)


@step_metric("batch/tokens", "response tokens that count in the losses")
def _tokens(seen: StepSeen) -> Any:
    return jnp.sum(seen.batch.response_mask.astype(jnp.int32))


@step_metric("batch/mean_abs_advantage", "mean |advantage| of those tokens")
def _mean_advantage(seen: StepSeen) -> Any:
    counted = seen.batch.response_mask
    magnitude = jnp.abs(jnp.where(counted, seen.batch.advantages, 0))
    return jnp.sum(magnitude) / jnp.maximum(jnp.sum(counted), 1)


@step_metric("learning_rate", "of the last update", last)
def _learning_rate(seen: StepSeen) -> Any:
    return jnp.asarray(seen.learning_rate, jnp.float32)


@step_metric("skipped", "updates left out so far: loss or gradient not finite", last, better=-1)
def _skipped(seen: StepSeen) -> Any:
    return seen.after.skipped


@step_metric("nonfinite_leaf", "index of the first bad leaf, -1 if none; not in rows", None)
def _nonfinite_leaf(seen: StepSeen) -> Any:
    return seen.nonfinite_leaf


@step_metric("nonfinite_parameter", "of the first bad parameter after it; not in rows", None)
def _nonfinite_parameter(seen: StepSeen) -> Any:
    return first_nonfinite(seen.after.params)


# -- Alarms: bool [K] each, what should never be unless something is wired wrongly

ALARMS = {
    "alarm/no_module_gradient": "received a gradient of exactly zero",
    "alarm/module_unchanged": "did not change in an update",
    "alarm/all_targets_masked": "had every target masked",
}
"""What an alarm says of its module."""


def _alarm(name: str) -> Callable:
    return step_metric(name, f"[K] minibatches in which an MTP module {ALARMS[name]}", total)


@_alarm("alarm/no_module_gradient")
def _no_gradient(seen: StepSeen) -> Any:
    if not seen.gradient.heads:
        return None
    return _active(seen) & ~_any_nonzero(module_leaves(seen.gradient.gradient))


@_alarm("alarm/module_unchanged")
def _unchanged(seen: StepSeen) -> Any:
    if not seen.gradient.heads:
        return None
    pairs = zip(module_leaves(seen.after.params), module_leaves(seen.before.params), strict=True)
    changes = [[new - old for new, old in zip(a, b, strict=True)] for a, b in pairs]
    return _active(seen) & ~_any_nonzero(changes)


@_alarm("alarm/all_targets_masked")
def _all_masked(seen: StepSeen) -> Any:
    return None if not seen.gradient.heads else ~_has_target(seen)


def _has_target(seen: StepSeen) -> jax.Array:
    return jnp.stack([jnp.any(output.mask) for output in seen.gradient.heads])


def _active(seen: StepSeen) -> jax.Array:
    """Which modules must learn. A loss near zero is normal at ratio 1; a gradient of 0 is not."""
    mtp, batch = seen.config.mtp, seen.batch
    active = _has_target(seen) & seen.finite
    if (mtp.loss if mtp.own_loss == "same" else mtp.own_loss) == "policy":
        active &= jnp.any(jnp.where(batch.response_mask, batch.advantages, 0) != 0)
    return active if seen.config.optimizer.learning_rate > 0 else jnp.zeros_like(active)


def _any_nonzero(trees: list[list[jax.Array]]) -> jax.Array:
    return jnp.stack([jnp.any(jnp.stack([jnp.any(x != 0) for x in leaves])) for leaves in trees])
