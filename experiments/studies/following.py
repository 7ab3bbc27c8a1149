"""What experiments share that follow one training run and measure along it."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import runs
from occ.models.policy import Policy
from occ.tasks import Task
from occ.training import loop
from occ.training.batch import Minibatch
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.gradient.calibration import build_calibration
from occ.training.gradient.inputs import StepInputs, step_inputs
from occ.training.optimizer import build_optimizer
from occ.training.rollout import collect
from occ.training.state import TrainState, init_state

TRAINED_WITH = MTPTrainingConfig(rule="fixed", coefficient=0.2, placement="fused")
FURTHER_STEPS = 10**6  # numbers of the rollouts that only measure, apart from those of training


class Followed(NamedTuple):
    """A training run at its start."""

    config: TrainConfig
    task: Task
    programs: loop.Programs
    state: TrainState

    def policy(self, state: TrainState) -> Policy:
        """The policy of one of its states."""
        return state.policy(self.config.model)


def begin(config: TrainConfig, *, seed: int, quick_rollouts: int | None = None) -> Followed:
    """The run of a configuration, with the policy loss at a fixed coefficient.

    Args:
      config: the configuration.
      seed: of the run.
      quick_rollouts: None, or so many rollouts after a warm start of at most 200 steps.
    """
    config = dataclasses.replace(config, mtp=TRAINED_WITH, seed=seed)
    if quick_rollouts is not None:
        warm = dataclasses.replace(config.warm_start, steps=min(config.warm_start.steps, 200))
        config = dataclasses.replace(config, rollouts=quick_rollouts, warm_start=warm)
    task = runs.load_task(config)
    programs = loop.build(config, task)
    start = runs.starting_point(config, task, programs, pathlib.Path("runs/fidelity/starts"))
    calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    state = init_state(start, build_optimizer(config.optimizer), calibration)
    return Followed(config, task, programs, jax.tree.map(jnp.array, state))


def further(run: Followed, state: TrainState, number: int) -> Minibatch:
    """A rollout of the same policy that training never sees."""
    sampler = run.programs.rollout
    step = FURTHER_STEPS + number
    return collect(sampler, run.policy(state), run.config, run.task, step).batch


def inputs_of(run: Followed, state: TrainState, batch: Minibatch) -> StepInputs:
    """What a step on this minibatch reads."""
    return step_inputs(run.policy(state), batch, run.config)


@contextlib.contextmanager
def one_core_processes(workers: int) -> Iterator[Any]:
    """A pool of fresh processes on one core each: two runs side by side beat one run on both."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield pool
