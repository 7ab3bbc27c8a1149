"""The clock's part in how deep a run drafts: one look at its beginning."""

from __future__ import annotations

import time

import numpy as np

from occ.generation.depth import DraftDepth
from occ.models.config import MTPConfig
from occ.models.policy import Policy
from occ.tasks import Task
from occ.tasks.prompts import encode_prompts, prompt_indices
from occ.training.config import TrainConfig
from occ.training.processes import from_first, key_on_mesh
from occ.training.rollout import RolloutPrograms, lengths

DEEPEST = 4
"""Drafts of a step, at the most, of modules that go on from their own."""


def deepest(config: MTPConfig) -> int:
    """The deepest drafts that are tried."""
    if config.kind == "parallel" or not config.num_modules:
        return config.num_modules
    return max(DEEPEST, config.num_modules)


def measure(
    programs: RolloutPrograms, policy: Policy, config: TrainConfig, task: Task
) -> DraftDepth:
    """Samples the first rollout with drafts of every depth, and times it.

    This takes a rollout a depth, and a compilation each. All processes have the first one's times.

    Args:
      programs, policy, config, task: of the run.
    """
    rollout = config.rollout
    indices = prompt_indices(config.seed, 0, rollout.prompts, len(task.train))
    texts = [task.train[i].prompt for i in indices]
    prompts = encode_prompts(task.tokenizer, texts, lengths(config, task)[0])
    key, seconds, acceptance = key_on_mesh(config.seed, 0), [], ()
    for depth in range(deepest(config.model.mtp) + 1):
        sample = programs.drafting(depth).sample
        sample(policy, *prompts, key, rollout.samples)  # compiles
        started = time.perf_counter()
        sampled = sample(policy, *prompts, key, rollout.samples)
        seconds.append((time.perf_counter() - started) / max(int(sampled.work.steps), 1))
        acceptance = sampled.work.acceptance
    return DraftDepth(tuple(from_first(np.array(seconds)).tolist()), acceptance)
