"""Supervised learning on noisy demonstrations, so that RL has something to elicit."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occ.models.policy import Policy
from occ.objectives import masked, mtp
from occ.tasks import Task
from occ.tasks.demonstrations import demonstrations
from occ.tasks.prompts import encode_prompts
from occ.training.batch import Sequences, positions_from_segments
from occ.training.config import TrainConfig
from occ.training.gradient.stages import Stages
from occ.training.rollout import lengths


def supervised_loss(
    policy: Policy,
    tokens: jax.Array,
    segment_ids: jax.Array,
    response_mask: jax.Array,
    mtp_weight: float,
) -> tuple[jax.Array, jax.Array]:
    """Next-token cross-entropy of the responses, plus `mtp_weight` times the mean MTP one.

    Args:
      policy: the model.
      tokens: int32 [B, T].
      segment_ids: int32 [B, T].
      response_mask: bool [B, T], tokens to learn.
      mtp_weight: of the MTP cross-entropies, whose gradient reaches all parameters here.

    Returns:
      The loss, and the cross-entropies [1 + K], main head first.
    """
    batch = Sequences(tokens, segment_ids, positions_from_segments(segment_ids))
    stages = Stages(policy, batch)
    losses = jnp.stack(
        [
            masked.masked_mean(
                -scores.log_prob, mtp.aligned_mask(response_mask, segment_ids, depth)
            )
            for depth, scores in enumerate(stages.score(policy.params))
        ]
    )
    auxiliary = jnp.sum(losses[1:]) / max(losses.shape[0] - 1, 1)
    return losses[0] + mtp_weight * auxiliary, losses


def learn_from_demonstrations(
    policy: Policy,
    config: TrainConfig,
    task: Task,
    on_step: Callable[[int, list[float]], None] = lambda step, losses: None,
) -> Policy:
    """Trains the parameters on demonstrations, all modules included.

    Args:
      policy: the model.
      config: `config.warm_start` says how long and on what.
      task: its training problems are demonstrated.
      on_step: called with the step and the cross-entropies now and then.

    Returns:
      The trained policy.
    """
    settings = config.warm_start
    if not settings.steps:
        return policy
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(100, settings.steps // 10 + 1), settings.steps, 0.0
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def step(params, rest, opt_state, tokens, segment_ids, response_mask):
        def loss(params):
            moved = policy.replace(params=params, rest=rest)
            return supervised_loss(moved, tokens, segment_ids, response_mask, settings.mtp_weight)

        gradient, losses = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    params = policy.params
    opt_state = optimizer.init(params)
    for number in range(settings.steps):
        batch = demonstration_batch(config, task, number)
        params, opt_state, losses = step(params, policy.rest, opt_state, *batch)
        if number % 50 == 0 or number == settings.steps - 1:
            on_step(number, np.asarray(losses).tolist())
    return policy.replace(params=params)


def demonstration_batch(
    config: TrainConfig, task: Task, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segment ids and response mask of the demonstrations number `step`."""
    settings = config.warm_start
    rng = np.random.default_rng((config.seed, step))
    chosen = rng.integers(len(task.train), size=settings.batch_size)
    problems = [task.train[i] for i in chosen]
    wrong_fraction = 0.0 if step < settings.clean_steps else settings.wrong_fraction
    answers = demonstrations(problems, wrong_fraction, rng)
    columns, response = lengths(config, task)
    prompts, prompt_mask = encode_prompts(task.tokenizer, [p.prompt for p in problems], columns)
    tokens = np.full((len(problems), response), task.tokenizer.pad_id, np.int32)
    answered = np.zeros(tokens.shape, bool)
    for row, answer in enumerate(answers):
        ids = [*task.tokenizer.encode(answer), task.tokenizer.end_id][:response]
        tokens[row, : len(ids)] = ids
        answered[row, : len(ids)] = True
    present = np.concatenate([prompt_mask, answered], axis=1)
    response_mask = np.concatenate([np.zeros_like(prompt_mask), answered], axis=1)
    return np.concatenate([prompts, tokens], axis=1), present.astype(np.int32), response_mask
