"""The main job: Detach, CE, Policy and OCC side by side on a task with checkable answers.

Claim: which regimes differ, in accuracy and in how fast they get there, when everything else is
equal: the same warm start (shared by all seeds), the same prompts in the same order, the same keys.
Command: python -m experiments.compare_regimes
Cost: about six minutes on two CPU cores. Ctrl-C ends after the rollout in hand; the same command
goes on from there, and repeats nothing that is finished.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Any

import tyro

from experiments import report, runs
from experiments.compiled import keep_compiled
from experiments.configs import CONFIGS
from experiments.progress import interrupt
from occ.training import loop
from occ.training.config import TrainConfig
from occ.training.regimes import REGIMES, RegimeName, regime


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the comparison.

    Attributes:
      config: name of the configuration that all regimes share.
      regimes: which to compare.
      seeds: repeats; seed 0, 1, .. n - 1.
      rollouts: a run; None takes the configuration's.
      exact: measure the true c and v^2 in every regime, at the price of a second backward pass.
      folder: for all files.
      smoke: the shortest form: two rollouts, one seed, a warm start of twenty steps.
    """

    config: str = "laptop"
    regimes: tuple[RegimeName, ...] = ("detach", "ce", "policy", "occ")
    seeds: int = 3
    rollouts: int | None = None
    exact: bool = True
    folder: pathlib.Path = pathlib.Path("runs/compare_regimes")
    smoke: bool = False


def base_config(arguments: Arguments) -> TrainConfig:
    """The configuration that the regimes share.

    Raises:
      ValueError: unknown name.
    """
    if arguments.config not in CONFIGS:
        raise ValueError(f"unknown config {arguments.config!r}; expected one of {sorted(CONFIGS)}.")
    config = CONFIGS[arguments.config]()
    if arguments.smoke:
        warm = dataclasses.replace(config.warm_start, steps=20)
        evaluation = dataclasses.replace(config.evaluation, prompts=32)
        config = dataclasses.replace(config, warm_start=warm, evaluation=evaluation, rollouts=2)
    if arguments.rollouts is not None:
        config = dataclasses.replace(config, rollouts=arguments.rollouts)
    return config


def compare(arguments: Arguments) -> int:
    """Runs every regime with every seed; returns the exit status, 130 after Ctrl-C."""
    started = time.perf_counter()
    config = base_config(arguments)
    seeds = range(1 if arguments.smoke else arguments.seeds)
    folder = arguments.folder / "smoke" if arguments.smoke else arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    keep_compiled(folder / "compiled")
    task = runs.load_task(config)
    first = loop.build(dataclasses.replace(config, mtp=_regime(arguments, 0)), task)
    start = runs.starting_point(config, task, first, folder / "starts")
    paths: dict[str, list[pathlib.Path]] = {name: [] for name in arguments.regimes}
    results: report.Runs = {name: [] for name in arguments.regimes}
    total = len(seeds) * len(arguments.regimes)
    with interrupt() as should_stop:
        for index, name in enumerate(arguments.regimes):
            run_config = dataclasses.replace(config, mtp=_regime(arguments, index))
            programs = first if index == 0 else loop.build(run_config, task, first.rollout)
            for seed in seeds:
                number = index * len(seeds) + seed + 1
                path = folder / f"{name}-seed{seed}"
                result = runs.run(
                    f"[{number}/{total}] {REGIMES[name].label}, seed {seed}",
                    dataclasses.replace(run_config, seed=seed),
                    task,
                    programs,
                    start,
                    path,
                    should_stop,
                )
                if result is None:
                    print(f"stopped; the same command goes on from {path}")
                    return should_stop.status
                paths[name].append(path)
                results[name].append(result)
    _write(folder, results, paths)
    print(f"\n{folder}: table.md, results.json, rewards.png, coefficients.png")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0


def _regime(arguments: Arguments, index: int) -> Any:
    return regime(arguments.regimes[index], exact=arguments.exact)


def _write(
    folder: pathlib.Path, results: report.Runs, paths: dict[str, list[pathlib.Path]]
) -> None:
    seeds = len(next(iter(results.values())))
    text = (
        report.table(results)
        + f"\n\nPer cent; mean and 95 % Student-t interval over n = {seeds} seeds; differences are "
        "paired by seed, bold where the interval excludes 0.\n"
    )
    (folder / "table.md").write_text(text)
    runs.write_json(folder / "results.json", results)
    report.reward_figure(paths, folder / "rewards.png")
    report.coefficient_figure(paths, folder / "coefficients.png")
    print("\n" + text)


def main() -> int:
    """Reads the command line."""
    return compare(tyro.cli(Arguments, description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
