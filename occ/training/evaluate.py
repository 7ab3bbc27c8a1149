"""Held-out accuracy of a policy, and how well its MTP modules would draft for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from occ.models.policy import Policy
from occ.tasks import Task
from occ.tasks.prompts import encode_prompts
from occ.training.batch import segments_of
from occ.training.config import TrainConfig
from occ.training.processes import key_on_mesh, to_host
from occ.training.rollout import RolloutPrograms, judge, lengths

SAMPLING_KEY = 2**31 - 1  # apart from the keys of rollouts, which count from 0


def evaluate(
    programs: RolloutPrograms, policy: Policy, config: TrainConfig, task: Task
) -> dict[str, Any]:
    """Accuracies on the first held-out prompts.

    Returns:
      "greedy": share of prompts whose most likely response is correct.
      "sampled": avg@k, as `EvaluationConfig` says.
      "mtp_acceptance": a list [K], share of the greedy response's tokens that each module
        predicts; for the first module, what speculative decoding would accept.
    """
    count, k = config.evaluation.prompts, config.evaluation.samples
    problems = list(task.test[:count])
    if len(problems) < count:
        raise ValueError(
            f"evaluate: {count} test prompts are asked for, task {task.name!r} has "
            f"{len(problems)}. Lower EvaluationConfig.prompts, or raise the task's test_size."
        )
    columns, _ = lengths(config, task)
    prompts, mask = encode_prompts(task.tokenizer, [p.prompt for p in problems], columns)
    key = key_on_mesh(config.seed, SAMPLING_KEY)

    greedy = programs.generate(programs.greedy, policy, prompts, mask, key)
    _, greedy_rewards, greedy_valid = judge(task, problems, greedy, columns)
    repeated = [problem for problem in problems for _ in range(k)]
    sampled = programs.generate(programs.evaluation, policy, prompts, mask, key, k)
    _, rewards, valid = judge(task, repeated, sampled, columns)
    return {
        "greedy": _share(greedy_rewards, greedy_valid),
        "sampled": _share(rewards, valid),
        "mtp_acceptance": mtp_acceptance(
            programs,
            policy,
            greedy.tokens,
            segments_of(mask, greedy.response_mask),
            greedy.response_mask,
        ),
    }


def _share(rewards: np.ndarray, valid: np.ndarray) -> float:
    return float(rewards[valid].mean()) if valid.any() else float("nan")


def mtp_acceptance(
    programs: RolloutPrograms,
    policy: Policy,
    tokens: Any,
    segment_ids: Any,
    response_mask: Any,
) -> list[float]:
    """Share of the response tokens that each module's most likely token is: [K].

    Args:
      programs: of the run.
      policy: the model.
      tokens, segment_ids: int32 [B, T].
      response_mask: bool [B, T].
    """
    scores = to_host(programs.score(policy, tokens, segment_ids))
    return [float(agrees[response_mask].mean()) for agrees in scores.mtp_agrees]
