"""The training loop: rollout, minibatches, evaluation, checkpoints; resumes by itself."""

from __future__ import annotations

import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from occ.tasks import Task
from occ.training.checkpoints import Checkpoints
from occ.training.config import TrainConfig
from occ.training.evaluate import evaluate
from occ.training.packing import minibatches, padding_waste
from occ.training.programs import Programs, build, fresh_state, init_model
from occ.training.rollout import Rollout, collect
from occ.training.run_folder import RunFolder, plain
from occ.training.state import TrainState

__all__ = ["Programs", "build", "init_model", "run"]

OnRow = Callable[[dict[str, Any]], None]


def run(
    config: TrainConfig,
    task: Task,
    programs: Programs,
    start: tuple[Any, Any],
    folder: pathlib.Path,
    on_row: OnRow = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Trains to the end, from the newest checkpoint in the folder if there is one.

    Args:
      config: of the run.
      task: prompts and verifier.
      programs: from `build`.
      start: parameters and other variables to start from (and the reference of the KL term).
      folder: of the run's files; the same call resumes an interrupted run.
      on_row: called with every row of metrics.
      should_stop: asked after every rollout; True saves a checkpoint and ends the run early.

    Returns:
      The result, as in result.json; None if the run was stopped before its end.
    """
    with jax.set_mesh(programs.mesh):
        return _run(config, task, programs, start, folder, on_row, should_stop)


def _run(
    config: TrainConfig,
    task: Task,
    programs: Programs,
    start: tuple[Any, Any],
    folder: pathlib.Path,
    on_row: OnRow,
    should_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    files = RunFolder(folder, config)
    done = files.result()
    if done is not None:
        return done
    checkpoints = Checkpoints(folder / "checkpoints")
    state, first = _restore(config, programs, start, checkpoints)
    files.keep_rows_before(first)
    reference = start[0] if config.objective.kl_coefficient else None
    try:
        for number in range(first, config.rollouts):
            row, state = _train_on_rollout(config, task, programs, state, number, files, reference)
            files.append(row)
            on_row(row)
            stop = should_stop()
            last = number + 1 == config.rollouts
            if stop or last or (number + 1) % config.checkpoint_every == 0:
                checkpoints.save(number + 1, state)
            if stop and not last:
                return None
        result = _result(files, evaluate(programs.rollout, state.params, state.rest, config, task))
    finally:
        checkpoints.close()
    files.finish(result)
    return result


def _restore(
    config: TrainConfig, programs: Programs, start: tuple[Any, Any], checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    """The newest state and its number of finished rollouts."""
    # A copy, since the train step donates its state and `start` serves further runs.
    fresh = jax.tree.map(
        lambda value, like: jax.device_put(value, like.sharding, may_alias=False),
        fresh_state(config, *start),
        programs.state,
    )
    restored = checkpoints.restore(fresh)
    return (fresh, 0) if restored is None else (restored[1], restored[0])


def _train_on_rollout(
    config: TrainConfig,
    task: Task,
    programs: Programs,
    state: TrainState,
    number: int,
    files: RunFolder,
    reference: Any,
) -> tuple[dict[str, Any], TrainState]:
    """One rollout and its gradient steps; returns the row of metrics and the new state."""
    started = time.perf_counter()
    evaluated: dict[str, Any] = {}
    if number % config.evaluation.every == 0:
        accuracy = evaluate(programs.rollout, state.params, state.rest, config, task)
        evaluated = {f"eval/{name}": value for name, value in accuracy.items()}
    rollout = collect(programs.rollout, state.params, state.rest, config, task, number, reference)
    sampled = time.perf_counter()
    steps = []
    batches = minibatches(rollout.batch, config)
    for minibatch in batches:
        state, metrics = programs.train_step(state, minibatch)
        steps.append(metrics)
    steps = jax.device_get(steps)  # the only wait for the device within a rollout's updates
    _sound_alarms(steps, number)
    row = {
        "rollout": number,
        **rollout.metrics,
        **plain(_mean_over_steps(steps)),
        "batch/padding_waste": padding_waste(batches),
        **evaluated,
        "seconds/rollout": sampled - started,
        "seconds/updates": time.perf_counter() - sampled,
    }
    _log_samples(files, rollout, number)
    return row, state


def _mean_over_steps(steps: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over a rollout's minibatches; counts are the last, alarms the number of steps."""
    means = {}
    for name in steps[0]:
        values = np.stack([np.asarray(step[name]) for step in steps])
        if name.startswith("alarm/"):
            means[name] = values.sum(axis=0)
        elif name in ("skipped", "occ/nonfinite", "learning_rate"):
            means[name] = values[-1]
        elif name.startswith("true/") or name in ("grad_norm/rl", "grad_norm/mtp"):
            means[name] = _mean_where_measured(values)
        else:
            means[name] = values.mean(axis=0)
    if "true/ratio" in means:
        # A ratio of means: a mean of ratios is ruled by the minibatch with the smallest v^2.
        smallest = np.finfo(np.float32).tiny
        perturbation = np.maximum(means["true/perturbation"], smallest)
        means["true/ratio"] = means["true/correlation"] / perturbation
    return means


def _mean_where_measured(values: np.ndarray) -> np.ndarray:
    """Mean over the steps that measured; NaN without any."""
    measured = np.isfinite(values)
    total = np.where(measured, values, 0).sum(axis=0)
    count = measured.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _sound_alarms(steps: list[dict[str, np.ndarray]], number: int) -> None:
    texts = {
        "alarm/no_module_gradient": "received a gradient of exactly zero",
        "alarm/module_unchanged": "did not change in an update",
        "alarm/all_targets_masked": "had every target masked",
    }
    for name, text in texts.items():
        for step, metrics in enumerate(steps):
            for module in np.flatnonzero(metrics.get(name, np.zeros(0))):
                warnings.warn(
                    f"MTP module {module + 1} {text} (rollout {number}, minibatch {step}). If "
                    "this goes on, the module is not being trained: check masks, learning rate "
                    "and how the module's parameters reach the optimizer.",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _log_samples(files: RunFolder, rollout: Rollout, number: int) -> None:
    for prompt, completion, reward in rollout.examples:
        row = {"rollout": number, "prompt": prompt, "completion": completion, "reward": reward}
        files.append(row, "samples.jsonl")


def _result(files: RunFolder, final: dict[str, Any]) -> dict[str, Any]:
    """Final accuracies, and the area under the reward curve (its mean over rollouts)."""
    rows = files.rows()
    return {
        "final": final,
        "reward_area": float(np.mean([row["reward"] for row in rows])),
        "rollouts": len(rows),
        "skipped": rows[-1]["skipped"],
        "seconds": float(sum(row["seconds/rollout"] + row["seconds/updates"] for row in rows)),
    }
