"""Shared steps of the experiments: tasks, starting points, one run in one folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import tqdm

from experiments.progress import RunReporter
from occ import tasks
from occ.training import loop
from occ.training.config import TrainConfig
from occ.training.gradient.stages import partition
from occ.training.processes import is_first
from occ.training.start.demonstrations import warm_start
from occ.training.start.own_samples import warm_up_modules
from occ.training.start.pretrained import load_model, stamp
from occ.training.start.saved import load_start, save_start


def load_task(config: TrainConfig) -> tasks.Task:
    """The task of a configuration."""
    return tasks.load(config.task, **config.task_options)


def starting_point(
    config: TrainConfig, task: tasks.Task, programs: loop.Programs, folder: pathlib.Path
) -> tuple[Any, Any]:
    """Parameters after the warm start, from the folder if it was done there before.

    The cache is keyed on everything that decides it, so a changed setting never finds a stale one.
    """
    decides = _decides(config)
    like = programs.state.params, programs.state.rest
    if config.warm_start.learns_modules:
        # The rest of the model is in its own files, or quickly made.
        fresh = initial_model(config)
        cached = load_start(folder, decides, (partition(like[0]).modules, {}))
        if cached is not None:
            return {**fresh[0], **cached[0]}, fresh[1]
        params = _warm_start(config, task, programs, fresh)
        save_start(folder, decides, (partition(params).modules, {}))
        return params, fresh[1]
    if config.pretrained is not None and not config.warm_start.steps:
        return initial_model(config)
    cached = load_start(folder, decides, like)
    if cached is not None:
        return cached
    fresh = initial_model(config)
    params = _warm_start(config, task, programs, fresh)
    save_start(folder, decides, (params, fresh[1]))
    return params, fresh[1]


def initial_model(config: TrainConfig) -> tuple[Any, Any]:
    """Pretrained or fresh variables of the model, where they will live."""
    return loop.init_model(config) if config.pretrained is None else load_model(config)


def _decides(config: TrainConfig) -> dict[str, Any]:
    """All settings that a starting point depends on."""
    settings = config.warm_start
    decides = {
        "model": dataclasses.asdict(config.model),
        "warm_start": dataclasses.asdict(settings),
        "task": [config.task, config.task_options],
        "seed": config.seed,
    }
    if config.pretrained is not None:
        decides["pretrained"] = [
            dataclasses.asdict(config.pretrained),
            stamp(config.pretrained.path),
        ]
    if settings.learns_modules:
        decides["sampling"] = [
            dataclasses.asdict(config.rollout),
            config.max_prompt_tokens,
            config.max_response_tokens,
        ]
    return decides


def _warm_start(
    config: TrainConfig, task: tasks.Task, programs: loop.Programs, fresh: tuple[Any, Any]
) -> Any:
    """Parameters after supervised learning, with a bar, and what came of it in words."""
    started = time.perf_counter()
    settings, quiet = config.warm_start, not is_first()
    with (
        jax.set_mesh(programs.mesh),
        tqdm.tqdm(total=settings.steps, desc="warm start", unit="step", disable=quiet) as bar,
    ):

        def show(step: int, losses: list[float]) -> None:
            bar.update(step + 1 - bar.n)
            bar.set_postfix_str("cross-entropy " + ", ".join(f"{loss:.3f}" for loss in losses))

        text = ""
        if settings.learns_modules:
            params, before, after = warm_up_modules(programs, *fresh, config, task, show)
            shares = (", ".join(f"{share:.3f}" for share in both) for both in (before, after))
            text = "; MTP acceptance on own samples {} to {}".format(*shares)
        else:
            params = warm_start(programs.graphdef, *fresh, config, task, show)
    params = jax.block_until_ready(params)
    if not quiet:
        tqdm.tqdm.write(f"warm start: {time.perf_counter() - started:.0f} s{text}")
    return params


def run(
    title: str,
    config: TrainConfig,
    task: tasks.Task,
    programs: loop.Programs,
    start: tuple[Any, Any],
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
