"""The training loop: rollout, minibatches, evaluation, checkpoints; resumes by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from occ.buckets import Path
from occ.models.policy import Policy
from occ.tasks import Task
from occ.tasks.task import VerifierError
from occ.training import draft_depth
from occ.training.ahead import Ahead
from occ.training.config import TrainConfig
from occ.training.durable.bad_updates import BadUpdates, check_finite
from occ.training.durable.checkpoints import Checkpoints, Restored
from occ.training.durable.history import History
from occ.training.durable.run_folder import RunFolder, identity, plain
from occ.training.evaluate import evaluate
from occ.training.metrics import ALARMS, over_steps
from occ.training.packing import minibatches, padding_waste
from occ.training.processes import any_of_all, to_host, to_mesh
from occ.training.programs import Programs, build, init_policy
from occ.training.rollout import Rollout, collect
from occ.training.sharding import batch_shardings
from occ.training.state import TrainState, frozen_leaves

__all__ = ["Programs", "build", "init_policy", "run"]

SECONDS = "seconds/"  # beginning of the names of timings, which no two runs share
UNJUDGED = 3  # rollouts in a row of which no response could be judged, that end a run
OnRow = Callable[[dict[str, Any]], None]


def run(
    config: TrainConfig,
    task: Task,
    programs: Programs,
    start: Policy,
    folder: Path,
    on_row: OnRow = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    keep_start: bool = True,
) -> dict[str, Any] | None:
    """Trains to the end, from the newest checkpoint in the folder if there is one.

    Killed at any moment, the same call goes on as if nothing had been: rows of rollouts after the
    newest checkpoint are dropped and written again, to the same bits on the same layout.

    Args:
      config: of the run.
      task: prompts and verifier.
      programs: from `build`.
      start: the policy to start from (and the reference of the KL term).
      folder: of the run's files; the same call resumes an interrupted run.
      on_row: called with every row of metrics.
      should_stop: asked after every rollout; True saves a checkpoint and ends the run early.
      keep_start: the run works on a copy of `start`, which serves further runs. False takes its
        arrays, unless they stay as the reference of a KL term: they are in memory once, and gone
        from `start`.

    Returns:
      The result, as in result.json; None if the run was stopped before its end.

    Raises:
      ValueError: the folder holds a run with another configuration, or not all of its files.
      LockedError: another process works in the folder.
      DamagedError: it holds checkpoints, and none can be read.
      DiskFullError: the message says what can be deleted.
      FloatingPointError: `config.max_bad_updates` updates in a row were not finite, or a parameter
        is not.
      VerifierError: `UNJUDGED` rollouts in a row held no response that could be judged.
    """
    with jax.set_mesh(programs.mesh), RunFolder(folder, config) as files:
        return _run(config, task, programs, start, files, on_row, should_stop, keep_start)


def _run(
    config: TrainConfig,
    task: Task,
    programs: Programs,
    start: Policy,
    files: RunFolder,
    on_row: OnRow,
    should_stop: Callable[[], bool],
    keep_start: bool,
) -> dict[str, Any] | None:
    began = time.perf_counter()
    result = files.result()
    if result is not None:
        return result
    reference = start if config.objective.kl_coefficient else None
    ahead = Ahead(config, task, files)
    with contextlib.closing(ahead), _checkpoints(config, files) as checkpoints:

        def save(number: int, state: TrainState, history: History) -> None:
            ahead.save(number, checkpoints.numbers)
            checkpoints.save(number, state, _now(history, began))

        begin = programs.begin if keep_start or reference is not None else programs.take
        first, state, history = _restore(begin, start, checkpoints, files)
        files.keep_rows_before(first)
        began -= history.seconds
        bad_updates = BadUpdates(
            config.max_bad_updates, history.bad_updates, history.last_bad_update
        )
        bad_updates.check()
        history = _measure_drafts(config, task, programs, state, history)
        ahead.restore(first)
        unjudged = 0
        for number in range(first, config.rollouts):
            evaluated = {}
            programs = _drafting(config, programs, history)
            if number % config.evaluation.every == 0:
                ahead.wait()
                evaluated = _evaluate(config, task, programs, state)
                history = history.evaluated(number, evaluated["eval/sampled"])
            if number in (0, history.best_rollout):
                save(number, state, history)
            rollout, row, state = _train_on_rollout(
                config, task, programs, state, number, reference, bad_updates, ahead
            )
            row |= evaluated | _draft_metrics(config, history)
            if number == 0:
                checkpoints.wait()  # so that rows without a checkpoint mean that one was lost
            _log(files, rollout, row)
            on_row(row)
            history = history.trained(row, bad_updates.in_a_row, bad_updates.last)
            done = number + 1
            last = done == config.rollouts
            # Preemption first: all processes of a job must ask after every rollout.
            stop = checkpoints.reached_preemption(done)
            stop = stop or any_of_all(should_stop()) or bad_updates.too_many
            if stop or last or done % config.checkpoint_every == 0:
                save(done, state, history)
            bad_updates.check()
            unjudged = unjudged + 1 if math.isnan(row["reward"]) else 0
            _check_judged(task, unjudged)
            if stop and not last:
                return None
        final = evaluate(programs.rollout, state.policy(config.model), config, task)
        history = _now(history.evaluated(config.rollouts, final["sampled"]), began)
    # Not before the last checkpoint is whole, since a finished run is never opened again.
    result = _result(files.rows(config.rollouts), final, history)
    files.finish(result)
    return result


def _checkpoints(config: TrainConfig, files: RunFolder) -> Checkpoints:
    return Checkpoints(
        files.path / "checkpoints",
        config.keep_checkpoints,
        owner=identity(config),
        frozen=frozen_leaves(config.model),
    )


def _measure_drafts(
    config: TrainConfig, task: Task, programs: Programs, state: TrainState, history: History
) -> History:
    """With what drafts cost and bring, where that is asked and not known yet."""
    if config.layout.draft_depth != "auto" or history.drafts.seconds:
        return history
    policy = state.policy(config.model)
    drafts = draft_depth.measure(programs.rollout, policy, config, task)
    return dataclasses.replace(history, drafts=drafts)


def _drafting(config: TrainConfig, programs: Programs, history: History) -> Programs:
    """With drafts as deep as is best now."""
    if config.layout.draft_depth != "auto":
        return programs
    rollout = programs.rollout.drafting(history.drafts.best)
    return dataclasses.replace(programs, rollout=rollout)


def _draft_metrics(config: TrainConfig, history: History) -> dict[str, float]:
    if config.layout.draft_depth != "auto":
        return {}
    drafts = history.drafts
    return {"rollout/draft_depth": drafts.best, "rollout/draft_share": drafts.step_share}


def _now(history: History, began: float) -> History:
    """With the wall-clock time up to now."""
    return dataclasses.replace(history, seconds=time.perf_counter() - began)


def _restore(
    begin: Callable[[Policy], TrainState],
    start: Policy,
    checkpoints: Checkpoints,
    files: RunFolder,
) -> Restored:
    """The newest checkpoint, or a beginning."""
    recorded = files.recorded()
    for variables in (start.params, start.rest):
        check_finite(variables, "the model that the run starts from")
    fresh = begin(start)
    restored = checkpoints.restore(fresh, recorded.rollouts if recorded.cut else None)
    if restored is not None:
        return restored
    if recorded.rollouts or recorded.cut:
        raise ValueError(
            f"{files.path} holds rows of {recorded.rollouts} rollouts, and no checkpoint to go on "
            "from. Put its checkpoints/ back; to start from scratch, delete the folder or choose "
            "another."
        )
    return Restored(0, fresh, History())


def _check_judged(task: Task, unjudged: int) -> None:
    if unjudged >= UNJUDGED:
        raise VerifierError(
            f"no response of the last {unjudged} rollouts could be judged: see the warnings of "
            f"task {task.name!r} above for the first of each, with the reason. Mend the verifier, "
            "and give the same command again."
        )


def _evaluate(
    config: TrainConfig, task: Task, programs: Programs, state: TrainState
) -> dict[str, Any]:
    """Metrics of the held-out accuracy, for a row."""
    started = time.perf_counter()
    accuracy = evaluate(programs.rollout, state.policy(config.model), config, task)
    metrics = {f"eval/{name}": value for name, value in accuracy.items()}
    return metrics | {"seconds/evaluation": time.perf_counter() - started}


def _train_on_rollout(
    config: TrainConfig,
    task: Task,
    programs: Programs,
    state: TrainState,
    number: int,
    reference: Policy | None,
    bad_updates: BadUpdates,
    ahead: Ahead,
) -> tuple[Rollout, dict[str, Any], TrainState]:
    """One rollout and its gradient steps: with a row of metrics, and the new state."""
    started = time.perf_counter()
    policy = state.policy(config.model)
    drawn = ahead.take(number, programs.rollout, policy)
    if config.engine.external:
        drawn.metrics["engine/waited_seconds"] = time.perf_counter() - started
    ahead.begin(number + 1, programs.rollout, policy)
    rollout = collect(programs.rollout, policy, config, task, number, reference, drawn)
    if not config.engine.overlap:
        programs.rollout.engine.rest()
    sampled = time.perf_counter()
    steps = []
    batches = minibatches(rollout.batch, config)
    shardings = batch_shardings(programs.mesh, config.rollout.routing_replay)
    for minibatch in batches:
        minibatch = to_mesh(minibatch, shardings)
        state, metrics = programs.train_step(state, minibatch)
        steps.append(metrics)
    steps = to_host(steps)  # the only wait for the device within a rollout's updates
    if not math.isnan(rollout.metrics["reward"]):  # else all is masked, by no fault of a module
        _sound_alarms(steps, number)
    bad_updates.see(steps, state.params, number)
    row = {
        "rollout": number,
        **rollout.metrics,
        **plain(over_steps(steps)),
        "batch/padding_waste": padding_waste(batches),
        "seconds/rollout": sampled - started,
        "seconds/updates": time.perf_counter() - sampled,
    }
    return rollout, row, state


def _sound_alarms(steps: list[dict[str, np.ndarray]], number: int) -> None:
    for name, text in ALARMS.items():
        for step, metrics in enumerate(steps):
            for module in np.flatnonzero(metrics.get(name, np.zeros(0))):
                warnings.warn(
                    f"MTP module {module + 1} {text} (rollout {number}, minibatch {step}). If "
                    "this goes on, the module is not being trained: check masks, learning rate "
                    "and how the module's parameters reach the optimizer.",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _log(files: RunFolder, rollout: Rollout, row: dict[str, Any]) -> None:
    samples = [
        {"rollout": row["rollout"], "prompt": prompt, "completion": completion, "reward": reward}
        for prompt, completion, reward in rollout.examples
    ]
    files.append(*samples, name="samples.jsonl")
    files.append(row)


def _result(rows: list[dict[str, Any]], final: dict[str, Any], history: History) -> dict[str, Any]:
    """Final and best accuracies, and the area under the reward curve (its mean over rollouts)."""
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    return {
        "final": final,
        "best": {"rollout": history.best_rollout, "sampled": history.best_sampled},
        "reward_area": float(np.mean(rewards)) if rewards else math.nan,
        "rollouts": len(rows),
        "skipped": rows[-1]["skipped"],
        "seconds": float(
            sum(row[name] for row in rows for name in row if name.startswith(SECONDS))
        ),
        "wall_seconds": history.seconds,
    }
