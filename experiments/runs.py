"""Shared steps of the experiments: tasks, starting points, one run in one folder."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import tqdm

from experiments.progress import RunReporter
from occ import tasks
from occ.models.policy import Policy
from occ.training import loop
from occ.training.config import TrainConfig
from occ.training.processes import is_first
from occ.training.start import starting_point as start_points


def load_task(config: TrainConfig) -> tasks.Task:
    """The task of a configuration."""
    return tasks.load(config.task, **config.task_options)


def starting_point(
    config: TrainConfig, task: tasks.Task, programs: loop.Programs, folder: pathlib.Path
) -> Policy:
    """The policy after the warm start, with a bar while one is made."""
    started, quiet = time.perf_counter(), not is_first()
    bar: Any = None

    def show(step: int, losses: list[float]) -> None:
        nonlocal bar
        if bar is None:
            total = config.warm_start.steps
            bar = tqdm.tqdm(total=total, desc="warm start", unit="step", disable=quiet)
        bar.update(step + 1 - bar.n)
        bar.set_postfix_str("cross-entropy " + ", ".join(f"{loss:.3f}" for loss in losses))

    start = start_points.starting_point(config, task, programs, folder, show)
    if bar is not None:
        bar.close()
        report = f"; {start.report}" if start.report else ""
        if not quiet:
            tqdm.tqdm.write(f"warm start: {time.perf_counter() - started:.0f} s{report}")
    return start.policy


def run(
    title: str,
    config: TrainConfig,
    task: tasks.Task,
    programs: loop.Programs,
    start: Policy,
    folder: pathlib.Path,
    should_stop: Callable[[], bool],
) -> dict[str, Any] | None:
    """One training run with a progress bar; a finished one is not repeated."""
    result_file = folder / "result.json"
    if result_file.exists() or not is_first():
        return loop.run(config, task, programs, start, folder, should_stop=should_stop)
    reporter = RunReporter(title, folder, config.rollouts)
    try:
        return loop.run(config, task, programs, start, folder, reporter, should_stop)
    finally:
        reporter.close()


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes a JSON file for people to read."""
    replace_text(file, json.dumps(value, indent=2) + "\n")


def replace_text(file: pathlib.Path, text: str) -> None:
    """Writes beside the file, then renames: a file that exists is whole."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(text)
    beside.replace(file)


def plain_numbers(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of five significant digits, for rows that are committed."""
    return {name: float(f"{float(value):.5g}") for name, value in row.items()}
