"""Do the paper's claims hold on models that two CPU cores can train? Runs the grid, reads results.

    python -m experiments.studies.claims run           all of claims_grid.py, resumable
    python -m experiments.studies.claims run --quick   two variants, two seeds, five rollouts
    python -m experiments.studies.claims run --over-starts    from five warm starts a setting
    python -m experiments.studies.claims run --by-worth       candidates that a measurement chose
    python -m experiments.studies.claims report        tables and figures from the committed rows

Cost of the whole grid: about ninety minutes on two cores. A row a run is appended to
results/claims/SETTING/VARIANT.jsonl as soon as it is finished; the same command goes on with what
is missing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from experiments import runs
from experiments.compiled import keep_compiled
from experiments.configs import CONFIGS
from experiments.studies import claims_report, claims_rows
from experiments.studies.claims_grid import (
    BY_WORTH_STARTS,
    CONTROL,
    CONTROLS,
    SEEDS,
    SHUFFLED,
    STARTS,
    VARIANTS,
    Cell,
    apart,
    baseline,
    by_worth,
    by_worth_rates,
    cells,
    over_starts,
)
from experiments.studies.command_line import command_line
from experiments.studies.following import one_core_processes
from occ import json_files
from occ.training import loop
from occ.training.config import MTPTrainingConfig
from occ.training.durable.run_folder import environment, read_rows

RESULTS = pathlib.Path(__file__).parent / "results" / "claims"
SERIES = {
    "reward": "reward",
    "coefficient": "occ/coefficient",
    "correlation": "true/correlation",
    "perturbation": "true/perturbation",
    "cosine": "true/cosine",
    "ratio": "true/ratio",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Runs what is missing of the grid.

    Attributes:
      settings: only these; empty for all.
      variants: only these; empty for all.
      seeds: of the runs; start s adds 100 s to them.
      starts: seeds of the warm starts.
      workers: processes, each on one core.
      quick: a laptop-sized version in a folder of its own: two variants, two seeds, five rollouts.
      over_starts: the settings and variants of OVER_STARTS from every one of STARTS, into
        results/claims_over_starts; with `--seeds 0` a run each.
      by_worth: likewise those of BY_WORTH and BY_WORTH_STARTS, into results/claims_by_worth.
      by_worth_rates: likewise those of BY_WORTH_RATES, into the same folder.
      folder: of the rows; starting points and scratch files are in runs/claims.
    """

    settings: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    starts: tuple[int, ...] = (0,)
    workers: int = 2
    quick: bool = False
    over_starts: bool = False
    by_worth: bool = False
    by_worth_rates: bool = False
    folder: pathlib.Path = RESULTS

    def pairs(self) -> list[tuple[int, int]]:
        """(start, seed of the run), every start once before any again."""
        return [(start, 100 * start + seed) for seed in self.seeds for start in self.starts]


@dataclasses.dataclass(frozen=True)
class Report:
    """Tables and figures from the rows.

    Attributes:
      folder: of the rows.
      output: for table.md and figures.
    """

    folder: pathlib.Path = RESULTS
    output: pathlib.Path = pathlib.Path("runs/claims/report")


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------


def run(arguments: Run) -> int:
    """Runs every cell with a seed missing; returns the exit status."""
    if arguments.quick:
        arguments = dataclasses.replace(
            arguments,
            settings=arguments.settings or ("arithmetic_easy",),
            variants=arguments.variants or ("detach", "occ"),
            seeds=arguments.seeds[:2],
            folder=pathlib.Path("runs/claims/quick"),
        )
    grid = cells() + (apart() if arguments.variants else [])
    chosen = [
        (name, its_grid, starts)
        for asked, name, its_grid, starts in (
            (arguments.over_starts, "claims_over_starts", over_starts, STARTS),
            (arguments.by_worth, "claims_by_worth", by_worth, BY_WORTH_STARTS),
            (arguments.by_worth_rates, "claims_by_worth", by_worth_rates, BY_WORTH_STARTS),
        )
        if asked
    ]
    if len(chosen) > 1:
        raise ValueError(
            "claims: expected one of --over-starts, --by-worth and --by-worth-rates, got several."
        )
    for name, its_grid, starts in chosen:
        folder = arguments.folder
        folder = folder.with_name(name) if folder == RESULTS else folder
        arguments = dataclasses.replace(arguments, starts=starts, folder=folder)
        grid = its_grid()
    wanted = [
        cell
        for cell in grid
        if (not arguments.settings or cell.setting in arguments.settings)
        and (not arguments.variants or cell.variant in arguments.variants)
        and cell.setting in CONFIGS
    ]
    if not wanted:
        raise ValueError(
            f"claims: no cell of the grid fits settings {arguments.settings} and variants "
            f"{arguments.variants}; see experiments/studies/claims_grid.py."
        )
    # The controls read what the proxy's runs have left.
    for stage in (False, True):
        now = [cell for cell in wanted if (cell.variant in CONTROLS) == stage]
        _run_cells([cell for cell in now if missing(arguments, cell)], arguments)
    return 0


def _run_cells(now: list[Cell], arguments: Run) -> None:
    with (
        one_core_processes(arguments.workers) as pool,
        tqdm.tqdm(total=len(now), unit="cell") as bar,
    ):
        jobs = {pool.submit(run_cell, cell, arguments): cell for cell in now}
        for job in concurrent.futures.as_completed(jobs):
            seconds = job.result()
            bar.update()
            bar.set_postfix_str(f"{'/'.join(jobs[job])} {seconds:.0f} s")


def missing(arguments: Run, cell: Cell) -> list[tuple[int, int]]:
    """Starts and seeds of a cell without a row."""
    done = {row["seed"] for row in read_cell(arguments.folder, cell)}
    return [(start, seed) for start, seed in arguments.pairs() if seed not in done]


@functools.cache
def _setting(name: str, quick: bool) -> tuple[Any, Any]:
    """Configuration and task of a setting, made once a process."""
    config = CONFIGS[name]()
    if quick:
        warm = dataclasses.replace(config.warm_start, steps=min(config.warm_start.steps, 100))
        config = dataclasses.replace(config, rollouts=5, warm_start=warm)
    return config, runs.load_task(config)


_SAMPLERS: dict[str, Any] = {}
"""Compiled sampling and scoring of every setting, which variants share; one dict a process."""


def run_cell(cell: Cell, arguments: Run) -> float:
    """Runs the missing seeds of one cell in this process; returns seconds."""
    started = time.perf_counter()
    scratch = pathlib.Path("runs/claims")
    keep_compiled(scratch / "compiled")
    config, task = _setting(cell.setting, arguments.quick)
    change = VARIANTS.get(cell.variant)
    programs = None
    for start_seed, seed in missing(arguments, cell):
        if change is None:
            varied = _control(cell, seed, config, arguments.folder)
        else:
            varied = change(config)
        if programs is None or change is None:
            sampler = f"{cell.setting} {varied.model} {varied.rollout}"
            programs = loop.build(varied, task, _SAMPLERS.get(sampler))
            _SAMPLERS[sampler] = programs.rollout
        begins = dataclasses.replace(varied, seed=start_seed)
        # Whoever comes first makes it; a second worker waits rather than make it again.
        with _lock(scratch / f"start-{cell.setting}.lock"):
            start = runs.starting_point(begins, task, programs, scratch / "starts")
        varied = dataclasses.replace(varied, seed=seed, checkpoint_every=10**9)
        with tempfile.TemporaryDirectory() as folder:
            result = loop.run(varied, task, programs, start, pathlib.Path(folder))
            rows = read_rows(pathlib.Path(folder) / "metrics.jsonl")
        assert result is not None
        row = _row(cell, start_seed, seed, result, rows)
        reference = Cell(cell.setting, baseline(cell.variant))
        finished = {reference.variant: read_cell(arguments.folder, reference), cell.variant: [row]}
        claims_rows.check_start(finished, cell.variant)
        _append(arguments.folder, cell, row)
    return time.perf_counter() - started


def _control(cell: Cell, seed: int, config: Any, folder: pathlib.Path) -> Any:
    """The proxy's coefficients of the same seed, as a constant or in random order."""
    rows = read_cell(folder, Cell(cell.setting, "occ_paper"))
    series = {row["seed"]: row["coefficient_series"] for row in rows}
    if seed not in series:
        raise ValueError(
            f"{'/'.join(cell)} seed {seed} needs the run occ_paper of the same seed first; run it "
            "by leaving --variants out."
        )
    if cell.variant == CONTROL:
        mean = float(np.mean(series[seed]))
        mtp = MTPTrainingConfig(rule="fixed", coefficient=mean, placement="fused")
    else:
        assert cell.variant == SHUFFLED
        shuffled = np.random.default_rng(seed).permutation(
            np.repeat(series[seed], config.rollout.minibatches)
        )
        mtp = MTPTrainingConfig(
            rule="replay", rule_options={"series": shuffled.tolist()}, placement="fused"
        )
    return dataclasses.replace(config, mtp=mtp)


def _row(
    cell: Cell, start: int, seed: int, result: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    row = {
        "setting": cell.setting,
        "variant": cell.variant,
        "start": start,
        "seed": seed,
        "sampled": result["final"]["sampled"],
        "greedy": result["final"]["greedy"],
        "acceptance": result["final"]["mtp_acceptance"][0],
        "area": result["reward_area"],
        "skipped": result["skipped"],
        "seconds": round(result["seconds"], 1),
        "commit": environment()["commit"],
    }
    for name, key in SERIES.items():
        if all(key in one for one in rows):
            row[f"{name}_series"] = [_rounded(np.ravel(one[key])[0]) for one in rows]
    return row


def _rounded(value: Any) -> float | None:
    """Four digits; None of a rollout in which it was not measured."""
    return None if value is None else float(f"{value:.4g}")


def _append(folder: pathlib.Path, cell: Cell, row: dict[str, Any]) -> None:
    file = _file(folder, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json_files.dump(row) + "\n")


def _file(folder: pathlib.Path, cell: Cell) -> pathlib.Path:
    return folder / cell.setting / f"{cell.variant}.jsonl"


def read_cell(folder: pathlib.Path, cell: Cell) -> list[dict[str, Any]]:
    """The finished rows of a cell, in order of seeds."""
    file = _file(folder, cell)
    rows = json_files.read_lines(file) if file.exists() else []
    return sorted(rows, key=lambda row: row["seed"])


@contextlib.contextmanager
def _lock(file: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of the block; the system lets go of it if this one dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Reads the command line."""
    arguments = command_line(__doc__, Run, Report)
    if isinstance(arguments, Run):
        return run(arguments)

    return claims_report.report(arguments.folder, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
