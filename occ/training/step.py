"""The train step: (state, minibatch) -> (state, metrics), pure, to be jitted once.

    1. h   = trunk(tokens)                            one forward pass, for all losses
    2. g   : RL loss of the main head                 clip, KL term, entropy bonus, aggregation
    3. m_k : loss of MTP head k, K of them            cross-entropy, policy or distillation
    4. c_k = <g, m_k>,  V = [<m_j, m_k>]              over shared parameters, or an estimate
    5. lambda = lambda_+ (V + r)^-1 c                 OCC; or another rule; held if not due
    6. u   = g + sum_k lambda_k m_k                   shared parameters; the modules' own: m_k
    7. theta <- AdamW(clip(u)), unless u has a NaN    then nothing moves, and it is counted
    8. metrics of all of it

Lines 1 to 6 are `step_gradient` (gradient/placement.py), which takes them in one of two orders:
weights first, where 4 has an estimate before the trunk's backward pass, or weights last.

Differs from the paper: c and v^2 are by default those of the gradients themselves, where the paper
has its log-ratio proxy (`regime("occ_paper")`); the modules' own parameters get their gradient
unscaled. Differs from the paper's released code: that averages ratios over all response columns,
padding included, multiplies by 0.1 / K, scales the modules' own gradient too, and clips all
together (`regime("occ_released")` with `clip_groups="together"`); and its coefficient stands
inside the advantages, where a negative one turns the clip around.

Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
Optimal Coefficient Calibration, arXiv 2605.28184.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from occ.models.moe import update_router_bias
from occ.models.parameters import partition
from occ.training.batch import Minibatch, check
from occ.training.config import TrainConfig
from occ.training.durable.bad_updates import first_nonfinite
from occ.training.gradient.calibration import build_calibration
from occ.training.gradient.inputs import step_inputs
from occ.training.gradient.placement import step_gradient
from occ.training.metrics import StepSeen, step_metrics
from occ.training.optimizer import build_optimizer, learning_rate_schedule, second_moment
from occ.training.state import TrainState

TrainStep = Callable[[TrainState, Minibatch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(config: TrainConfig, *, prompt_columns: int = 0) -> TrainStep:
    """Builds the pure train step of a run.

    Args:
      config: the run's configuration.
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
        inputs = step_inputs(
            state.policy(config.model),
            batch,
            config,
            prompt_columns=prompt_columns,
            second_moment=second_moment(state.opt_state, config.optimizer),
        )
        gradient = step_gradient(inputs, calibration, state.calibration)  # lines 1 to 6
        bad_leaf = first_nonfinite((gradient.gradient, gradient.main.metrics["loss/rl"]))
        finite = bad_leaf < 0
        params, opt_state = _apply(state, gradient.gradient, optimizer, config, finite)
        after = state.replace(
            step=state.step + 1,
            params=params,
            rest=_balance(state.rest, gradient.router_load, config, finite),
            opt_state=opt_state,
            calibration=gradient.calibration,
            skipped=state.skipped + (~finite).astype(jnp.int32),
        )
        learning_rate = schedule(state.step - state.skipped)
        seen = StepSeen(state, after, gradient, batch, config, finite, learning_rate, bad_leaf)
        return after, step_metrics(seen)

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
