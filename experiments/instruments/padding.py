"""What is computed on padding, and what packing and generation in portions save of it.

Question: how much of what generation and training compute holds no token, and do fewer rows save
time? Asked in settings of the claims, whose rows are nearly full, and in one with long tails.
Command: python -m experiments.instruments.padding
Cost: five minutes on two CPU cores, most of it the settings' warm starts.

Each layout trains on the same rollout, of the policy after the warm start. Waste is the share of
computed token positions that hold no token. Layouts take turns within a round; ratios of seconds
are geometric means over rounds with 95 % Student-t intervals.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import tqdm
import tyro

from experiments import runs
from experiments.compiled import keep_compiled
from experiments.configs import CONFIGS
from occ.evaluation.intervals import ratio_interval
from occ.models.policy import Policy
from occ.tasks import Task
from occ.training import loop
from occ.training.batch import Minibatch
from occ.training.config import LayoutConfig, TrainConfig
from occ.training.durable.run_folder import environment
from occ.training.packing import minibatches, padding_waste
from occ.training.processes import to_mesh
from occ.training.rollout import collect
from occ.training.sharding import batch_shardings

LONG_TAIL = "long_tail"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      settings: names of configurations, or "long_tail".
      rows: that are generated at one time, in the layout with portions.
      repeats: timed rounds.
      folder: for result.json, table.md and the warm starts.
    """

    settings: tuple[str, ...] = ("filtering_easy", "star_easy", "arithmetic_easy", LONG_TAIL)
    rows: int = 32
    repeats: int = 10
    folder: pathlib.Path = pathlib.Path("runs/padding")


def configuration(name: str) -> TrainConfig:
    """The named setting; in "long_tail" an untrained policy stops by chance alone.

    One token in about a dozen is then the last one, so that lengths are geometric: most responses
    are short beside the longest, as those of models that reason at length are.
    """
    if name != LONG_TAIL:
        return CONFIGS[name]()
    config = CONFIGS["arithmetic_easy"]()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_length=80),
        max_response_tokens=64,
        warm_start=dataclasses.replace(config.warm_start, steps=0),
    )


def layouts(arguments: Arguments) -> dict[str, LayoutConfig]:
    """As a batch is sampled, and with less padding."""
    return {
        "padded": LayoutConfig(),
        "packed, in portions": LayoutConfig(pack=True, generation_rows=arguments.rows),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout of a setting, ready to be timed.

    Attributes:
      config: of the run.
      programs: compiled for it.
      batches: the rollout's minibatches on the host.
      rollout_waste: share of the positions that generation computed on padding.
    """

    config: TrainConfig
    programs: loop.Programs
    batches: list[Minibatch]
    rollout_waste: float


def case(config: TrainConfig, task: Task, start: Policy) -> Case:
    """Builds the programs and makes the rollout."""
    programs = loop.build(config, task)
    with jax.set_mesh(programs.mesh):
        rollout = collect(programs.rollout, start, config, task, 0)
    waste = rollout.metrics["rollout/padding_waste"]
    return Case(config, programs, minibatches(rollout.batch, config), waste)


def sample_seconds(made: Case, task: Task, start: Policy) -> float:
    """Time of a rollout, verification and scoring included."""
    with jax.set_mesh(made.programs.mesh):
        started = time.perf_counter()
        collect(made.programs.rollout, start, made.config, task, 0)
        return time.perf_counter() - started


def update_seconds(made: Case, start: Policy) -> float:
    """Time of the gradient steps on the rollout."""
    programs = made.programs
    with jax.set_mesh(programs.mesh):
        state = jax.block_until_ready(programs.begin(start))
        started = time.perf_counter()
        for batch in made.batches:
            state, _ = programs.train_step(state, to_mesh(batch, batch_shardings(programs.mesh)))
        jax.block_until_ready(state)
        return time.perf_counter() - started


def measure(name: str, arguments: Arguments) -> dict[str, dict[str, Any]]:
    """Waste and seconds of every layout in one setting; ratios are to the first layout."""
    config = configuration(name)
    task = runs.load_task(config)
    first = loop.build(config, task)
    start = runs.starting_point(config, task, first, arguments.folder / "starts")
    cases = {
        label: case(dataclasses.replace(config, layout=layout), task, start)
        for label, layout in layouts(arguments).items()
    }
    rollout: dict[str, list[float]] = {label: [] for label in cases}
    updates: dict[str, list[float]] = {label: [] for label in cases}
    for repeat in tqdm.trange(arguments.repeats + 1, desc=name):
        for label, made in cases.items():
            timed = sample_seconds(made, task, start), update_seconds(made, start)
            if repeat:  # the first round compiles
                rollout[label].append(timed[0])
                updates[label].append(timed[1])
    base = next(iter(cases))
    return {
        label: {
            "rollout_waste": made.rollout_waste,
            "rollout_seconds": statistics.median(rollout[label]),
            "rollout_ratio": ratio_interval(rollout[label], rollout[base])._asdict(),
            "update_waste": padding_waste(made.batches),
            "update_seconds": statistics.median(updates[label]),
            "update_ratio": ratio_interval(updates[label], updates[base])._asdict(),
        }
        for label, made in cases.items()
    }


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row a setting and layout."""
    lines = [
        "| setting, layout | padding in generation | s a rollout | ratio | padding in training "
        "| s of updates | ratio |",
        "|---" * 7 + "|",
    ]
    for setting, rows in results.items():
        for label, row in rows.items():
            cells = []
            for part in ("rollout", "update"):
                ratio = row[f"{part}_ratio"]
                interval = f"{ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
                cells += [f"{row[f'{part}_waste']:.2f}", f"{row[f'{part}_seconds']:.3f}", interval]
            lines.append(f"| {setting}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and writes."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    keep_compiled(arguments.folder / "compiled")
    results = {name: measure(name, arguments) for name in arguments.settings}
    text = table(results)
    print(text)
    runs.replace(arguments.folder / "table.md", text + "\n")
    runs.write_json(arguments.folder / "result.json", {"settings": results, **environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
