"""What studies share that train several variants from several starts, a row a run."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from experiments import runs
from experiments.compiled import keep_compiled
from occ.training import loop
from occ.training.config import TrainConfig
from occ.training.durable.run_folder import environment, read_rows


def run_missing(
    pairs: Sequence[tuple[str, int]],
    config_of: Callable[[str, int], TrainConfig],
    measured: Callable[[str, list[dict[str, Any]]], dict[str, Any]],
    folder: pathlib.Path,
    file: pathlib.Path,
) -> None:
    """Trains the pairs of variant and start that have no row yet, and adds theirs.

    Args:
      pairs: in their order.
      config_of: the configuration of a pair.
      measured: what a variant's row has beside reward and final accuracy, of its run's metrics.
      folder: of runs, starts and compiled programs.
      file: of the rows.
    """
    done = {(row["variant"], row["start"]) for row in read_rows(file)}
    keep_compiled(folder / "compiled")
    for name, seed in pairs:
        if (name, seed) in done:
            continue
        config = config_of(name, seed)
        task = runs.load_task(config)
        programs = loop.build(config, task)
        at = folder / f"{name.replace(' ', '_')}-start{seed}"
        with contextlib.closing(runs.job(config, starts=1, runs=1)) as progress:
            start = runs.starting_point(config, task, programs, folder / "starts", progress)
            result = runs.run(name, config, task, programs, start, at, progress, lambda: False, ())
        assert result is not None
        row = row_of(name, seed, result, measured(name, read_rows(at / "metrics.jsonl")))
        runs.write_rows(file, [*read_rows(file), row])


def row_of(name: str, seed: int, result: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    return runs.rounded(
        {
            "variant": name,
            "start": seed,
            "rollouts": result["rollouts"],
            "reward": result["reward_area"],
            "sampled": result["final"]["sampled"],
            **further,
            "commit": environment()["commit"],
        }
    )


def by_variant(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by variant and start."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["variant"], {})[row["start"]] = row
    return by


def quickened(config: TrainConfig, rollouts: int) -> TrainConfig:
    """A few rollouts after a warm start of twenty steps."""
    warm = dataclasses.replace(config.warm_start, steps=20, clean_steps=0)
    evaluation = dataclasses.replace(config.evaluation, prompts=32)
    return dataclasses.replace(config, warm_start=warm, evaluation=evaluation, rollouts=rollouts)
