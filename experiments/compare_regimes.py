"""The main job: the price of too large a coefficient, what OCC saves, what joint training gains.

Claim: with a coefficient of 3 on the shared parameters, cross-entropy and the policy loss of the
MTP modules harm RL; OCC on the same losses does not; and one joint regime gains a little. Each
replicate has a warm start, an order of prompts and sampling keys of its own, which all regimes
share.
Command: python -m experiments.compare_regimes
Cost: about eight minutes on two CPU cores. Ctrl-C ends after the rollout in hand; the same
command goes on from there, and repeats nothing that is finished.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable

import jax
import tyro

from experiments import dashboards, report, runs
from experiments.compiled import compile_quickly, keep_compiled
from experiments.configs import CONFIGS
from experiments.dashboards import Dashboard
from experiments.lanes import in_lanes, leave
from experiments.paths import PathArgument
from experiments.progress import Progress, interrupt
from experiments.report_figure import figure
from occ.buckets import Path, UnreachableError
from occ.models.policy import Policy
from occ.tasks import Task
from occ.training import loop
from occ.training.config import TrainConfig
from occ.training.durable.disk import DiskFullError
from occ.training.durable.lock import LockedError
from occ.training.regimes import REGIMES, RegimeName, regime

STORY: tuple[RegimeName, ...] = ("detach", "ce_3", "policy_3", "occ_ce", "occ", "drafter")
SMOKE: tuple[RegimeName, ...] = ("detach", "occ")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the comparison.

    Attributes:
      config: name of the configuration that all regimes share.
      regimes: which to compare; differences are to "detach".
      starts: repeats: seed 0, 1, .. n - 1 of the warm start, the order of prompts and sampling.
      rollouts: a run; None takes the configuration's. 40 show what it is about in eight minutes.
      exact: measure the true c and v^2 in every regime, at the price of a second backward pass.
      folder: for all files, or gs://BUCKET/FOLDER.
      lanes: runs that go on side by side; 0 is two on the cores of a CPU, which one run of a small
        model does not keep busy, and one on other devices.
      log: dashboards of each run; `experiments.dashboards` says where they are.
      smoke: the shortest form: two rollouts of one layer, from one warm start of twenty steps, in
        two of the default's regimes, compiled in haste. It shows that all works, and no
        difference.
    """

    config: str = "filtering_easy"
    regimes: tuple[RegimeName, ...] = STORY
    starts: int = 3
    rollouts: int | None = 40
    exact: bool = False
    folder: PathArgument = pathlib.Path("runs/compare_regimes")
    lanes: int = 0
    log: tuple[Dashboard, ...] = ("tensorboard",)
    smoke: bool = False

    def __post_init__(self):
        if self.starts < 1 or self.lanes < 0:
            raise ValueError(
                f"compare_regimes: expected starts >= 1 and lanes >= 0, got {self.starts} and "
                f"{self.lanes}."
            )
        for name, story, smoke in (("regimes", STORY, SMOKE), ("rollouts", 40, 2)):
            if self.smoke and getattr(self, name) == story:
                object.__setattr__(self, name, smoke)


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
        model = dataclasses.replace(config.model, num_layers=1)  # compiles in half the time
        config = dataclasses.replace(config, model=model, warm_start=warm, evaluation=evaluation)
    if arguments.rollouts is not None:
        config = dataclasses.replace(config, rollouts=arguments.rollouts)
    return config


def compare(arguments: Arguments) -> int:
    """Runs every regime from every warm start.

    Returns:
      The exit status: 130 after Ctrl-C; 1 where the disk is full, another process has a run's
      folder, or a bucket does not answer, which is said.
    """
    dashboards.check(arguments.log)
    began = time.perf_counter()
    folder = arguments.folder / "smoke" if arguments.smoke else arguments.folder
    if arguments.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of it
    ended = None
    try:
        status = _run_all(arguments, folder)
        if status is None:
            _write(arguments, folder)
    except KeyboardInterrupt:  # in a warm start, or a second one
        status = 130
    except (DiskFullError, LockedError, UnreachableError) as error:
        ended = str(error)
    if ended is not None:
        gc.collect()  # with it goes what Orbax still has to say, so that ours is the last word
        print(ended, file=sys.stderr)
        return 1
    if status is not None:
        print(f"stopped; the same command goes on in {folder}")
        return status
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


def _starts(arguments: Arguments) -> int:
    return 1 if arguments.smoke else arguments.starts


def _run_all(arguments: Arguments, folder: Path) -> int | None:
    """Runs what is missing; None where all is there, else the exit status."""
    config, starts = base_config(arguments), _starts(arguments)
    for seed in range(starts):
        for name in arguments.regimes:
            runs.check_folder(
                _run_folder(folder, name, seed), _of_regime(arguments, config, name, seed)
            )
    keep_compiled(folder / "compiled")
    task = runs.load_task(config)
    programs = _programs(arguments, config, task)
    with (
        contextlib.closing(runs.job(config, starts, starts * len(programs))) as progress,
        interrupt() as should_stop,
    ):
        begun = Starts(config, task, next(iter(programs.values())), folder, progress, should_stop)

        def run(name: RegimeName, seed: int) -> bool:
            result = runs.run(
                f"{REGIMES[name].label}, start {seed + 1} of {starts}",
                _of_regime(arguments, config, name, seed),
                task,
                programs[name],
                begun(seed),
                _run_folder(folder, name, seed),
                progress,
                should_stop,
                arguments.log,
            )
            return result is not None

        work: list[Callable[[], object]] = []
        for seed in range(starts):
            # Lanes begin with a start each, and those behind them find theirs made.
            ahead = range(2) if seed == 0 else range(seed + 1, seed + 2)
            work += [functools.partial(begun, one) for one in ahead if one < starts]
            work += [functools.partial(run, name, seed) for name in arguments.regimes]
        if not in_lanes(work, _lanes(arguments), should_stop):
            return should_stop.status
        progress.close("done")
    return None


class Starts:
    """The policies after warm starts, each made once, by whoever needs it first."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        programs: loop.Programs,
        folder: Path,
        progress: Progress,
        should_stop: Callable[[], bool],
    ):
        self._config, self._task, self._programs = config, task, programs
        self._folder, self._progress, self._should_stop = folder / "starts", progress, should_stop
        self._made: dict[int, Policy] = {}
        self._locks: dict[int, threading.Lock] = collections.defaultdict(threading.Lock)

    def __call__(self, seed: int) -> Policy:
        """That of a seed."""
        with self._locks[seed]:
            if seed not in self._made:
                self._made[seed] = runs.starting_point(
                    dataclasses.replace(self._config, seed=seed),
                    self._task,
                    self._programs,
                    self._folder,
                    self._progress,
                    f"warm start {seed + 1}",
                    self._should_stop,
                )
            return self._made[seed]


def _lanes(arguments: Arguments) -> int:
    if arguments.lanes:
        return arguments.lanes
    return min(2, os.cpu_count() or 1) if jax.default_backend() == "cpu" else 1


def _of_regime(
    arguments: Arguments, config: TrainConfig, name: RegimeName, seed: int
) -> TrainConfig:
    return dataclasses.replace(config, seed=seed, mtp=regime(name, exact=arguments.exact))


def _programs(arguments: Arguments, config: TrainConfig, task: Task) -> dict[str, loop.Programs]:
    """What each regime compiles; all sample with the same programs."""
    programs: dict[str, loop.Programs] = {}
    for name in arguments.regimes:
        sampler = next(iter(programs.values())).rollout if programs else None
        mtp = regime(name, exact=arguments.exact)
        programs[name] = loop.build(dataclasses.replace(config, mtp=mtp), task, sampler)
    return programs


def _run_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-start{seed}"


def _write(arguments: Arguments, folder: Path) -> None:
    """Table, figure and results, from the files of the runs."""
    results = {
        name: [report.read(_run_folder(folder, name, s)) for s in range(_starts(arguments))]
        for name in arguments.regimes
    }
    text = f"{report.table(results)}\n\n{report.NOTE}\n\n{report.words(results)}\n"
    runs.replace(folder / "table.md", text)
    runs.write_json(folder / "results.json", results)
    runs.save_figure(folder / "regimes.png", figure(results), dpi=150)
    print(f"\n{text}\n{folder}: regimes.png, table.md, results.json")


def main() -> int:
    """Reads the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if base_config(arguments).pretrained is None:
        compile_quickly()
    return compare(arguments)


if __name__ == "__main__":
    leave(main())
