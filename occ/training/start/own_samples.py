"""MTP modules learn to predict what the model itself says; the model stays as it is.

    sum over modules k and tokens of -log q_k(token) / (K tokens),    tokens ~ the model

Fresh modules beside a model that was trained elsewhere would otherwise meet RL knowing nothing.
The gradient is cut where Detach cuts it: at the trunk's output, and at the embedding and the output
head that the modules share, so the model samples from one distribution all along and its responses
are drawn once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occ.models.parameters import join, partition
from occ.models.policy import Policy
from occ.objectives import masked, mtp
from occ.tasks import Task
from occ.tasks.prompts import encode_prompts, prompt_indices
from occ.training.batch import Sequences, positions_from_segments, segments_of
from occ.training.config import TrainConfig
from occ.training.evaluate import mtp_acceptance
from occ.training.gradient.stages import Stages
from occ.training.processes import key_on_mesh, to_host, to_mesh
from occ.training.programs import Programs
from occ.training.rollout import lengths
from occ.training.sharding import rows_sharding

SAMPLING_KEY = 2**30
"""Of the first portion; rollouts count from 0 and evaluation has the last."""


class Samples(NamedTuple):
    """Responses of the model, after left-padded prompts.

    Attributes:
      tokens: int32 [N, T].
      segment_ids: int32 [N, T].
      response_mask: bool [N, T].
    """

    tokens: Any
    segment_ids: Any
    response_mask: Any


class WarmedUp(NamedTuple):
    """What came of the warm-up.

    Attributes:
      policy: all parameters; those outside the modules are the ones that were given.
      before, after: [K], share of the tokens of held-out samples that a module predicts.
    """

    policy: Policy
    before: list[float]
    after: list[float]


def warm_up_modules(
    programs: Programs,
    policy: Policy,
    config: TrainConfig,
    task: Task,
    on_step: Callable[[int, list[float]], None] = lambda step, losses: None,
) -> WarmedUp:
    """Trains the MTP modules alone, by cross-entropy on the model's own responses.

    Args:
      programs: of the run; responses are sampled as its rollouts are.
      policy: the model.
      config: `config.warm_start` says how long.
      task: its training prompts are answered.
      on_step: called with the step and the modules' cross-entropies [K] now and then.
    """
    settings = config.warm_start
    held_out, pool = draw(programs, policy, config, task)
    before = mtp_acceptance(programs.rollout, policy, *held_out)
    columns, _ = lengths(config, task)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.steps // 10 + 1, settings.steps + 1, 0.0
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    parts = partition(policy.params)

    @jax.jit
    def step(modules, opt_state, policy, batch):
        def loss(modules):
            parts = partition(policy.params)._replace(modules=modules)
            return modules_loss(policy.replace(params=join(parts)), batch, config, columns)

        gradient, losses = jax.grad(loss, has_aux=True)(modules)
        updates, opt_state = optimizer.update(gradient, opt_state, modules)
        return optax.apply_updates(modules, updates), opt_state, losses

    modules, opt_state = parts.modules, optimizer.init(parts.modules)
    rows = rows_sharding(programs.mesh)
    for number in range(settings.steps):
        chosen = prompt_indices(config.seed, number, settings.batch_size, len(pool.tokens))
        batch = jax.tree.map(lambda x, chosen=chosen: x[chosen], pool)
        batch = to_mesh(batch, Samples(rows, rows, rows))
        modules, opt_state, losses = step(modules, opt_state, policy, batch)
        if number % 10 == 0 or number == settings.steps - 1:
            on_step(number, to_host(losses).tolist())
    warmed = policy.replace(params=join(parts._replace(modules=modules)))
    after = mtp_acceptance(programs.rollout, warmed, *held_out)
    return WarmedUp(warmed, before, after)


def modules_loss(
    policy: Policy,
    batch: Samples,
    config: TrainConfig,
    prompt_columns: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the modules on the responses, and each module's own [K].

    No gradient reaches the trunk's output; that of embedding and head is the caller's to leave out.
    """
    positions = positions_from_segments(batch.segment_ids)
    stages = Stages(
        policy,
        Sequences(batch.tokens, batch.segment_ids, positions),
        config.rollout.temperature,
        config.layout.logits_chunk,
        prompt_columns,
    )
    parts = partition(policy.params)
    hidden = jax.lax.stop_gradient(stages.trunk(parts).hidden)
    states = stages.modules(parts, hidden)
    losses = [
        masked.masked_mean(
            -stages.head(parts, states[k], k + 1).log_prob,
            mtp.aligned_mask(batch.response_mask, batch.segment_ids, k + 1),
        )
        for k in range(states.shape[0])
    ]
    return jnp.mean(jnp.stack(losses)), jnp.stack(losses)


def draw(
    programs: Programs, policy: Policy, config: TrainConfig, task: Task
) -> tuple[Samples, Samples]:
    """Responses to training prompts, one a prompt: a portion to measure on, and the pool."""
    per_rollout = config.rollout.prompts * config.rollout.samples
    portions = -(-config.warm_start.pool // per_rollout) + 1
    columns, _ = lengths(config, task)
    drawn = []
    for portion in range(portions):
        indices = prompt_indices(config.seed, portion, per_rollout, len(task.train))
        texts = [task.train[i].prompt for i in indices]
        prompts, prompt_mask = encode_prompts(task.tokenizer, texts, columns)
        key = key_on_mesh(config.seed, SAMPLING_KEY + portion)
        rollout = programs.rollout
        sampled = rollout.generate(rollout.sample, policy, prompts, prompt_mask, key)
        segment_ids = segments_of(prompt_mask, sampled.response_mask)
        drawn.append(Samples(sampled.tokens, segment_ids, sampled.response_mask))
    pool = jax.tree.map(lambda *portions: np.concatenate(portions), *drawn[1:])
    return drawn[0], pool
