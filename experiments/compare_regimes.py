"""The main job: the price of too large a coefficient, what OCC saves, what joint training gains.

Claim: with a coefficient of 3 on the shared parameters, cross-entropy and the policy loss of the
MTP modules harm RL; OCC on the same losses does not; and one joint regime gains a little. Each
replicate has a warm start, an order of prompts and sampling keys of its own, which all regimes
share.
Command: python -m experiments.compare_regimes
Cost: about twelve minutes on two CPU cores. Ctrl-C ends after the rollout in hand; the same
command goes on from there, and repeats nothing that is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import pathlib
import sys
import time

import jax
import tyro

from experiments import report, runs
from experiments.compiled import keep_compiled
from experiments.configs import CONFIGS
from experiments.progress import interrupt
from experiments.report_figure import figure
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
      rollouts: a run; None takes the configuration's.
      exact: measure the true c and v^2 in every regime, at the price of a second backward pass.
      folder: for all files.
      smoke: the shortest form: two rollouts of one layer, from one warm start of twenty steps, in
        two of the default's regimes, compiled in haste. It shows that all works, and no
        difference.
    """

    config: str = "filtering_easy"
    regimes: tuple[RegimeName, ...] = STORY
    starts: int = 3
    rollouts: int | None = None
    exact: bool = False
    folder: pathlib.Path = pathlib.Path("runs/compare_regimes")
    smoke: bool = False

    def __post_init__(self):
        if self.starts < 1:
            raise ValueError(f"compare_regimes: expected starts >= 1, got {self.starts}.")
        if self.smoke and self.regimes == STORY:
            object.__setattr__(self, "regimes", SMOKE)


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
        config = dataclasses.replace(config, rollouts=2)
    if arguments.rollouts is not None:
        config = dataclasses.replace(config, rollouts=arguments.rollouts)
    return config


def compare(arguments: Arguments) -> int:
    """Runs every regime from every warm start.

    Returns:
      The exit status: 130 after Ctrl-C; 1 where the disk is full or another process has a run's
      folder, which is said.
    """
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
    except (DiskFullError, LockedError) as error:
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


def _run_all(arguments: Arguments, folder: pathlib.Path) -> int | None:
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
    job = runs.job(config, starts, starts * len(programs))
    with contextlib.closing(job) as progress:
        for seed in range(starts):
            number = f"start {seed + 1} of {starts}"
            seeded = dataclasses.replace(config, seed=seed)
            first = next(iter(programs.values()))
            where = folder / "starts"
            start = runs.starting_point(seeded, task, first, where, progress, f"warm {number}")
            for name in arguments.regimes:
                with interrupt() as should_stop:
                    result = runs.run(
                        f"{REGIMES[name].label}, {number}",
                        _of_regime(arguments, config, name, seed),
                        task,
                        programs[name],
                        start,
                        _run_folder(folder, name, seed),
                        progress,
                        should_stop,
                    )
                if result is None:
                    return should_stop.status
        progress.begin("done", 0)
    return None


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


def _run_folder(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return folder / f"{name}-start{seed}"


def _write(arguments: Arguments, folder: pathlib.Path) -> None:
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
    return compare(tyro.cli(Arguments, description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
