"""Shared steps of the experiments: tasks, starting points, one run in one folder."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tqdm

from experiments.dashboards import Dashboard, Dashboards, Subject
from experiments.progress import Progress, summary
from occ import json_files, tasks
from occ.buckets import Path
from occ.models.policy import Policy
from occ.training import loop
from occ.training.config import TrainConfig
from occ.training.durable import disk, lock
from occ.training.durable.run_folder import as_json, check_usable
from occ.training.processes import is_first
from occ.training.start import starting_point as start_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM_STEPS_A_ROLLOUT = 8  # take as long as a rollout, its updates and its share of compilation


def load_task(config: TrainConfig) -> tasks.Task:
    """The task of a configuration."""
    return tasks.load(config.task, **config.task_options)


def check_folder(folder: Path, config: TrainConfig) -> None:
    """Finds out before anything is computed whether a run can work in a folder.

    Raises:
      ValueError: as `run_folder.check_usable` says.
      LockedError: another process works there.
    """
    check_usable(folder, as_json(config))
    if (folder / lock.NAME).exists():
        lock.take(folder).close()


def job(config: TrainConfig, starts: int, runs: int) -> Progress:
    """The line of a job of so many warm starts and runs, which counts in rollouts."""
    total = starts * _start_size(config) + runs * config.rollouts
    return Progress(total, quiet=not is_first())


def _start_size(config: TrainConfig) -> float:
    return config.warm_start.steps / WARM_STEPS_A_ROLLOUT


def starting_point(
    config: TrainConfig,
    task: tasks.Task,
    programs: loop.Programs,
    folder: Path,
    progress: Progress | None = None,
    title: str = "warm start",
    should_stop: Callable[[], bool] = lambda: False,
) -> Policy:
    """The policy after the warm start, which is a part of the job's progress, or all of it.

    Raises:
      KeyboardInterrupt: `should_stop`, asked now and then, said so; nothing of it is kept.
    """
    if progress is None:
        with contextlib.closing(job(config, starts=1, runs=0)) as alone:
            return starting_point(config, task, programs, folder, alone)
    with progress.part(title, _start_size(config)) as part:

        def show(step: int, losses: list[float]) -> None:
            share = (step + 1) / config.warm_start.steps
            part.show(share, share, "cross-entropy " + ", ".join(f"{x:.2f}" for x in losses))
            if should_stop():
                raise KeyboardInterrupt

        start = start_points.starting_point(config, task, programs, folder, show)
    if start.report and is_first():
        tqdm.tqdm.write(f"{title}: {start.report}")
    return start.policy


def run(
    title: str,
    config: TrainConfig,
    task: tasks.Task,
    programs: loop.Programs,
    start: Policy,
    folder: Path,
    progress: Progress,
    should_stop: Callable[[], bool],
    log: Sequence[Dashboard] = ("tensorboard",),
    *,
    keep_start: bool = True,
) -> dict[str, Any] | None:
    """One training run, a part of the job's progress; a finished one is not repeated."""
    train = functools.partial(
        loop.run, config, task, programs, start, folder, keep_start=keep_start
    )
    with progress.part(title, config.rollouts) as part:
        if (folder / "result.json").exists() or not is_first():
            return train(should_stop=should_stop)
        name = f"{config.name}/{folder.name}"
        dashboards = Dashboards(log, Subject(name, config.name, as_json(config), folder))

        def on_row(row: dict[str, Any]) -> None:
            part.show((row["rollout"] + 1) / config.rollouts, 1 / config.rollouts, summary(row))
            dashboards(row)

        try:
            return train(on_row, should_stop)
        finally:
            dashboards.close()


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file for people to read."""
    replace(file, json_files.dump(value, indent=2) + "\n")


def replace(file: Path, content: str | bytes) -> None:
    """Writes beside the file, then renames: a file that exists is whole.

    Raises:
      DiskFullError: it could not be written; what was there before is.
    """
    with disk.explained(file.parent, len(content)):
        disk.replace(file, content)


def save_figure(file: Path, figure: Figure, dpi: int) -> None:
    """Writes a picture in the same way."""
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix.removeprefix("."), dpi=dpi)
    replace(file, content.getvalue())


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows of JSON, all or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, "".join(json_files.dump(row) + "\n" for row in rows))


def rounded(value: Any) -> Any:
    """Numbers of five significant digits within dicts and lists, for rows that are committed.

    JSON has no word for a number that is not finite: it becomes null.
    """
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if value is None or isinstance(value, int | str):
        return value
    return float(f"{float(value):.5g}") if math.isfinite(value) else None
