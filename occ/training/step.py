"""The train step: (state, minibatch) -> (state, metrics), pure, to be jitted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from occ import diagnostics
from occ.grouped import GroupedState
from occ.models.moe import update_router_bias
from occ.training.batch import Minibatch, check
from occ.training.config import TrainConfig
from occ.training.durable.bad_updates import LEAF, first_nonfinite
from occ.training.gradient.calibration import build_calibration
from occ.training.gradient.placement import step_gradient
from occ.training.gradient.stages import Stages, partition
from occ.training.gradient.step_gradient import StepGradient
from occ.training.optimizer import build_optimizer, learning_rate_schedule, second_moment
from occ.training.state import TrainState

TrainStep = Callable[[TrainState, Minibatch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    *,
    sequences_per_row: int = 1,
    prompt_columns: int = 0,
) -> TrainStep:
    """Builds the pure train step of a run.

    Args:
      graphdef: the model without its variables, from `split_model`.
      config: the run's configuration.
      sequences_per_row: S, the most sequences packed in a row of a minibatch.
      prompt_columns: leading columns of all minibatches without a response token; the output head
        leaves them out.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. Jit it with `donate_argnums=0`. Metrics are
      scalars, or float [K] for what is measured of each MTP module (by group: [G, K]).
    """
    calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    optimizer = build_optimizer(config.optimizer)
    schedule = learning_rate_schedule(config.optimizer)

    def train_step(state: TrainState, batch: Minibatch):
        check(batch, config.model.mtp.num_modules)
        stages = Stages(
            graphdef,
            state.rest,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            config.rollout.temperature,
            config.layout.logits_chunk,
            prompt_columns,
        )
        gradient = step_gradient(
            stages,
            state.params,
            batch,
            config,
            calibration,
            state.calibration,
            sequences_per_row,
            second_moment(state.opt_state, config.optimizer),
        )
        bad_leaf = first_nonfinite((gradient.gradient, gradient.main.metrics["loss/rl"]))
        finite = bad_leaf < 0
        params, opt_state = _apply(state, gradient.gradient, optimizer, config, finite)
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            rest=_balance(state.rest, gradient.router_load, config, finite),
            opt_state=opt_state,
            calibration=gradient.calibration,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        learning_rate = schedule(state.step - state.skipped)
        metrics = {
            **_loss_metrics(gradient),
            **_gradient_metrics(gradient),
            **_router_metrics(gradient.router_load, batch, config),
            **_batch_metrics(batch),
            **_alarms(state, new_state, gradient, batch, config, finite),
            "learning_rate": jnp.asarray(learning_rate, jnp.float32),
            "skipped": new_state.skipped,
            LEAF: bad_leaf,
        }
        return new_state, metrics

    return train_step


def _apply(state: TrainState, gradient: Any, optimizer: Any, config: TrainConfig, finite: Any):
    """The parameters and optimizer state after the step, or before it if it must be skipped.

    As a branch, whose inside the compiler never fuses with what computed the gradient: equal
    gradients then give equal steps to the last bit, however they came about in each regime.
    """

    def update(gradient, opt_state, params):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        if config.mtp.loss == "none":
            # Nothing trains the modules, so weight decay must not shrink them either.
            updates = {**updates, **jax.tree.map(jnp.zeros_like, partition(updates).modules)}
        return optax.apply_updates(params, updates), opt_state

    def skip(gradient, opt_state, params):
        return params, opt_state

    return jax.lax.cond(finite, update, skip, gradient, state.opt_state, state.params)


def _balance(rest: Any, load: jax.Array | None, config: TrainConfig, finite: jax.Array) -> Any:
    """Moves the trunk routers' correction biases against the load of this step."""
    rate = config.optimizer.router_bias_rate
    if load is None or not rate:
        return rest
    layers = rest["layers"]
    bias = layers["mlp"]["router_bias"]
    moved = jnp.where(finite, update_router_bias(bias, load, rate), bias)
    return {**rest, "layers": {**layers, "mlp": {**layers["mlp"], "router_bias": moved}}}


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def _loss_metrics(gradient: StepGradient) -> dict[str, jax.Array]:
    heads = [output.metrics for output in gradient.heads]
    stacked = (
        {name: jnp.stack([head[name] for head in heads]) for name in heads[0]} if heads else {}
    )
    return {**gradient.main.metrics, **stacked}


def _gradient_metrics(gradient: StepGradient) -> dict[str, jax.Array]:
    parts = partition(gradient.gradient)
    metrics = {
        "grad_norm/shared": optax.tree.norm((parts.blocks, parts.readout)),
        "grad_norm/own": optax.tree.norm(parts.modules) if parts.modules else jnp.zeros(()),
    }
    if gradient.heads:
        state = diagnostics.calibration_state(gradient.calibration)
        metrics |= {
            "occ/correlation": diagnostics.correlation(state),
            "occ/perturbation": diagnostics.perturbation(state),
            "occ/cosine": diagnostics.cosine(state),
            "occ/coefficient": diagnostics.coefficient(state),
            "occ/condition_number": state.condition_number,
            "occ/nonfinite": state.nonfinite,
            "occ/overflowed": state.overflowed,
        }
        if isinstance(gradient.calibration, GroupedState):
            groups = [group.weights[1:] for group in gradient.calibration.groups.values()]
            metrics["occ/coefficient_by_group"] = jnp.stack(groups)
    if gradient.gram is not None:
        metrics |= _true_metrics(gradient.gram)
    return metrics


def _true_metrics(gram: jax.Array) -> dict[str, jax.Array]:
    """From the true Gram matrix over the shared parameters; what the rule used may differ."""
    correlation, perturbation = gram[0, 1:], jnp.diagonal(gram)[1:]
    rl_norm, mtp_norm = jnp.sqrt(gram[0, 0]), jnp.sqrt(perturbation)
    return {
        "grad_norm/rl": rl_norm,
        "grad_norm/mtp": mtp_norm,
        "true/correlation": correlation,
        "true/perturbation": perturbation,
        "true/cosine": correlation / jnp.maximum(rl_norm * mtp_norm, jnp.finfo(gram.dtype).tiny),
        "true/ratio": correlation / jnp.maximum(perturbation, jnp.finfo(gram.dtype).tiny),
    }


def _router_metrics(
    load: jax.Array | None, batch: Minibatch, config: TrainConfig
) -> dict[str, jax.Array]:
    """How unevenly the trunk's experts are used, and the share of pairs that found no room."""
    if load is None:
        return {}
    assert config.model.moe is not None
    tokens = jnp.sum((batch.segment_ids > 0).astype(load.dtype))
    pairs = load.shape[0] * config.model.moe.experts_per_token * tokens
    busiest = jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1)
    return {
        "router/max_over_mean_load": jnp.max(busiest),
        "router/dropped": 1 - jnp.sum(load) / jnp.maximum(pairs, 1),
    }


def _batch_metrics(batch: Minibatch) -> dict[str, jax.Array]:
    counted = batch.response_mask
    magnitude = jnp.abs(jnp.where(counted, batch.advantages, 0))
    return {
        "batch/tokens": jnp.sum(counted.astype(jnp.int32)),
        "batch/mean_abs_advantage": jnp.sum(magnitude) / jnp.maximum(jnp.sum(counted), 1),
    }


def _alarms(
    before: TrainState,
    after: TrainState,
    gradient: StepGradient,
    batch: Minibatch,
    config: TrainConfig,
    finite: jax.Array,
) -> dict[str, jax.Array]:
    """bool [K] each: what should never be, unless something is wired wrongly.

    A surrogate loss near zero is normal at ratio 1; a gradient of exactly zero is not.
    """
    if not gradient.heads:
        return {}
    has_target = jnp.stack([jnp.any(output.mask) for output in gradient.heads])
    has_signal = jnp.any(jnp.where(batch.response_mask, batch.advantages, 0) != 0)
    own_loss = config.mtp.loss if config.mtp.own_loss == "same" else config.mtp.own_loss
    if own_loss != "policy":
        has_signal = jnp.ones_like(has_signal)
    active = has_target & has_signal & finite
    if not config.optimizer.learning_rate > 0:
        active = jnp.zeros_like(active)

    def any_nonzero(trees):
        return jnp.stack(
            [jnp.any(jnp.stack([jnp.any(x != 0) for x in leaves])) for leaves in trees]
        )

    changes = [
        [new - old for new, old in zip(a, b, strict=True)]
        for a, b in zip(_modules(after.params), _modules(before.params), strict=True)
    ]
    return {
        "alarm/no_module_gradient": active & ~any_nonzero(_modules(gradient.gradient)),
        "alarm/module_unchanged": active & ~any_nonzero(changes),
        "alarm/all_targets_masked": ~has_target,
    }


def _modules(params: dict[str, Any]) -> list[list[jax.Array]]:
    """The leaves of each MTP module's own parameters."""
    modules = params["mtp"]
    children = modules if isinstance(modules, list | tuple) else list(modules.values())
    return [jax.tree.leaves(child) for child in children]
