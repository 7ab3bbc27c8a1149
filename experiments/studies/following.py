"""What experiments share that follow one training run and measure along it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import runs
from experiments.compiled import compile_quickly
from occ.models.policy import Policy
from occ.tasks import Task
from occ.training import loop
from occ.training.batch import Minibatch, split
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.durable.run_folder import read_rows
from occ.training.gradient.calibration import build_calibration
from occ.training.gradient.inputs import StepInputs, step_inputs
from occ.training.optimizer import build_optimizer
from occ.training.rollout import collect, draw, requests
from occ.training.state import TrainState, init_state

TRAINED_WITH = MTPTrainingConfig(rule="fixed", coefficient=0.2, placement="fused")
STARTS = (31, 32, 33, 34, 35)
"""Seeds of warm starts that nothing else has begun from."""

FURTHER_STEPS = 10**6  # numbers of the rollouts that only measure, apart from those of training


Points = dict[tuple[str, int], list[dict[str, Any]]]
"""Rows by what was followed and its start; a row a point of the run."""


class Followed(NamedTuple):
    """A training run at its start."""

    config: TrainConfig
    task: Task
    programs: loop.Programs
    state: TrainState

    def policy(self, state: TrainState) -> Policy:
        """The policy of one of its states."""
        return state.policy(self.config.model)


def begin(
    config: TrainConfig,
    start: int,
    *,
    mtp: MTPTrainingConfig = TRAINED_WITH,
    quick_rollouts: int | None = None,
) -> Followed:
    """The run of a configuration, of a seed apart from those that training is compared in.

    Args:
      config: the configuration.
      start: seed of the warm start; the run's is 100 start + 50.
      mtp: how its modules are trained: the policy loss at a fixed coefficient.
      quick_rollouts: None, or so many rollouts after a warm start of at most 200 steps.
    """
    config = dataclasses.replace(config, mtp=mtp, seed=100 * start + 50)
    if quick_rollouts is not None:
        warm = dataclasses.replace(config.warm_start, steps=min(config.warm_start.steps, 200))
        config = dataclasses.replace(config, rollouts=quick_rollouts, warm_start=warm)
    task = runs.load_task(config)
    programs = loop.build(config, task)
    begins = dataclasses.replace(config, seed=start)
    policy = runs.starting_point(begins, task, programs, pathlib.Path("runs/fidelity/starts"))
    calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    state = init_state(policy, build_optimizer(config.optimizer), calibration)
    return Followed(config, task, programs, jax.tree.map(jnp.array, state))


def further(run: Followed, state: TrainState, number: int) -> Minibatch:
    """A rollout of the same policy that training never sees."""
    return _with_advantages(run, state, number, ("",))[0]


def _with_advantages(
    run: Followed, state: TrainState, number: int, methods: Sequence[str]
) -> list[Minibatch]:
    """The same samples with the advantages of each method; "" is the run's own."""
    sampler, policy = run.programs.rollout, run.policy(state)
    step = FURTHER_STEPS + number
    drawn = draw(sampler.engine, policy, requests(sampler, run.config, run.task, step))
    found = []
    for method in methods:
        config = run.config
        if method:
            objective = dataclasses.replace(config.objective, advantage=method)
            config = dataclasses.replace(config, objective=objective)
        found.append(collect(sampler, policy, config, run.task, step, drawn=drawn).batch)
    return found


def further_minibatches(
    run: Followed, state: TrainState, number: int, count: int, methods: Sequence[str] = ()
) -> list[tuple[Minibatch, dict[str, Any]]]:
    """Minibatches that training never sees, from the policy of rollout `number`.

    Each with the advantages [B, T] of further methods, by name.
    """
    per_rollout = run.config.rollout.minibatches
    others = [method for method in methods if method]
    batches: list[tuple[Minibatch, dict[str, Any]]] = []
    for extra in range(-(-count // per_rollout)):
        rollouts = _with_advantages(run, state, 1000 * number + extra, ("", *others))
        for own, *same in zip(*(split(one, per_rollout) for one in rollouts), strict=True):
            advantages = [one.advantages for one in same]
            batches.append((own, dict(zip(others, advantages, strict=True))))
    return batches[:count]


def inputs_of(
    run: Followed, state: TrainState, batch: Minibatch, *, prompt_columns: int = 0
) -> StepInputs:
    """What a step on this minibatch reads; leading columns that hold prompts alone are left out."""
    return step_inputs(run.policy(state), batch, run.config, prompt_columns=prompt_columns)


def file_of(folder: pathlib.Path, name: str, start: int) -> pathlib.Path:
    """Where the rows of a followed run are."""
    return folder / name / f"start{start}.jsonl"


def read_followed(folder: pathlib.Path, study: str) -> Points:
    """All finished rows.

    Raises:
      ValueError: there are none.
    """
    points = {
        (file.parent.name, int(file.stem.removeprefix("start"))): read_rows(file)
        for file in sorted(folder.glob("*/start*.jsonl"))
    }
    if not points:
        raise ValueError(
            f"no rows in {folder}: run `python -m experiments.studies.{study} run` first, or pass "
            "the --folder that it wrote to."
        )
    return points


def follow_all(
    follow: Callable[[str, int, Any], pathlib.Path],
    names: Sequence[str],
    starts: Sequence[int],
    arguments: Any,
) -> int:
    """Follows a run of each name from each start, `arguments.workers` at one time.

    Args:
      follow: writes the rows of one run that has none yet, and returns their file.
      names: of what is followed.
      starts: seeds of the warm starts, each with all names before the next.
      arguments: of the study.
    """
    pairs = [(name, start) for start, name in itertools.product(starts, names)]
    if arguments.workers == 1:
        for pair in pairs:
            print(follow(*pair, arguments), flush=True)
        return 0
    with one_core_processes(arguments.workers) as pool:
        jobs = [pool.submit(follow, *pair, arguments) for pair in pairs]
        for job in jobs:
            print(job.result(), flush=True)
    return 0


@contextlib.contextmanager
def one_core_processes(workers: int) -> Iterator[Any]:
    """A pool of fresh processes on one core each: two runs side by side beat one run on both."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    compile_quickly()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        yield pool


def _end_with_parent() -> None:
    """Whoever ends the study, however, ends its processes: they would go on with what they have."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
