r"""avg@k, pass@k and maj@k of trained runs and published models on benchmarks of mathematics.

    python -m experiments.evaluate run RUN_FOLDER ... --data-dir data       # k 32, top-p 0.7
    python -m experiments.evaluate run RUN_FOLDER --benchmarks aime_2024 amc --k 8 --checkpoint best
    python -m experiments.evaluate run --pretrained models/MiMo-7B-RL --data-dir data
    python -m experiments.evaluate run RUN_FOLDER --mesh fsdp 128 --distributed      # on each host
    python -m experiments.evaluate table RUN_FOLDER ...         # the paper's layout, as Markdown
    python -m experiments.evaluate fixtures                     # all of it, on files made here

Every sample is a line of RUN_FOLDER/evaluation/BENCHMARK.jsonl, summary.json beside it has the
measures. Killed at any moment, the same command goes on after the last whole portion, to the same
lines. Runs of tasks that make their own problems are evaluated on their test problems ("test").
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import tqdm
import tyro

from experiments import evaluate_report as report
from experiments import evaluated, runs
from experiments.compiled import keep_compiled
from experiments.paths import PathArgument
from occ.buckets import Path
from occ.evaluation import benchmarks
from occ.evaluation.completions import Settings, complete, open_folder
from occ.models.partitioning import AXES
from occ.tasks.math_task import MathTask
from occ.training.config import LayoutConfig
from occ.training.processes import is_first, join, wait_for_all
from occ.training.rollout import lengths


@dataclasses.dataclass(frozen=True)
class Run:
    """Samples completions, and judges them.

    Attributes:
      folders: of runs, local or gs://BUCKET/FOLDER.
      pretrained: published models, each a folder (of a bucket too), a .gguf file, or "package:NAME"
        of a package that holds one; their evaluations go to runs/evaluations/NAME.
      benchmarks: names of published sets; none are the six of the paper's average.
      k: samples a problem.
      temperature, top_p, top_k: of sampling.
      checkpoint: of each run.
      data_dir: with the benchmarks; None takes the run's own, or the test problems of its task.
      extract: where the answer stands; None takes the run's own, and a box for published models
        and runs on other tasks.
      max_prompt_tokens, max_response_tokens: tokens; None takes the run's, or 2048 and 8192.
      problems: the first so many of each benchmark; 0 is all.
      rows: sampled at one time, and written; None is 64, or eight for each slot, rounded up so that
        all devices have as many.
      slots: of those rows, the ones that decode at one time: one that ends gives its slot to the
        next, and waits for no longer one. None are the run's own; 0 is all of them.
      draft_depth: tokens that the MTP modules draft for every pass of the trunk; None is the run's
        own. Neither this nor slots change a sample.
      acceptance_prompts: greedy responses a benchmark, on which MTP acceptance is measured.
      seed: of sampling.
      name: of the folder for the files, in each run's.
      verify: refuse files of benchmarks that are not the published ones.
      mesh: devices along its axes (data, fsdp, expert, tensor; 1 where left out); none are the
        run's own mesh, and one device for published models.
      distributed, coordinator, processes, index: one of several processes, as in
        `experiments.train`.
    """

    folders: tyro.conf.Positional[tuple[PathArgument, ...]] = ()
    pretrained: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    k: int = 32
    temperature: float = 1.0
    top_p: float = 0.7
    top_k: int = 0
    checkpoint: Literal["newest", "best"] = "newest"
    data_dir: PathArgument | None = None
    extract: Literal["boxed", "answer_line"] | None = None
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    problems: int = 0
    rows: int | None = None
    slots: int | None = None
    draft_depth: int | None = None
    acceptance_prompts: int = 32
    seed: int = 0
    name: str = "evaluation"
    verify: bool = True
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None

    def layout(self) -> LayoutConfig | None:
        """Where models live; None is for each to say.

        Raises:
          ValueError: no such axis.
        """
        sizes: dict[str, Any] = self.mesh
        unknown = sorted(set(sizes) - set(AXES))
        if unknown:
            raise ValueError(f"evaluate run: --mesh has the axes {AXES}, got {unknown}.")
        return LayoutConfig(**sizes) if sizes else None

    def task_options(self) -> dict[str, Any]:
        """Options of `mathematics.load` in place of a run's own."""
        given: dict[str, Any] = {
            "data_dir": None if self.data_dir is None else str(self.data_dir),
            "extract": self.extract,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_response_tokens": self.max_response_tokens,
            "verify": None if self.verify else False,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Table:
    """Prints the table of evaluations that are finished.

    Attributes:
      folders: of runs; differences are to the first.
      name: of the folder with the files, in each run's.
    """

    folders: tyro.conf.Positional[tuple[PathArgument, ...]]
    name: str = "evaluation"


@dataclasses.dataclass(frozen=True)
class Fixtures:
    """The whole way on problems, files and models that are made here; about a minute.

    Attributes:
      folder: for all files.
      k: samples a problem.
    """

    folder: pathlib.Path = pathlib.Path("runs/evaluate_fixtures")
    k: int = 4


def run(arguments: Run) -> list[Path]:
    """Evaluates every run and model; returns their folders.

    Raises:
      ValueError: nothing to evaluate.
    """
    if not arguments.folders and not arguments.pretrained:
        raise ValueError("evaluate run: expected folders of runs, or --pretrained.")
    if arguments.distributed:
        join(arguments.coordinator, arguments.processes, arguments.index)
    names = arguments.benchmarks or None
    options, layout = arguments.task_options(), arguments.layout()
    folders: list[Path] = []
    for folder in arguments.folders:
        model = evaluated.from_run(folder, arguments.checkpoint, names, options, layout)
        _evaluate_and_close(model, arguments, folder / arguments.name)
        folders.append(folder)
    for source in arguments.pretrained:
        model = evaluated.from_pretrained(source, names, options, layout)
        folder = pathlib.Path("runs/evaluations") / model.name
        _evaluate_and_close(model, arguments, folder / arguments.name)
        folders.append(folder)
    return folders


def _evaluate_and_close(model: evaluated.Model, arguments: Run, folder: Path) -> None:
    try:
        evaluate(model, arguments, folder)
    finally:
        if isinstance(model.task, MathTask):
            model.task.verifier.close()


def evaluate(model: evaluated.Model, arguments: Run, folder: Path) -> dict[str, Any]:
    """One model on its benchmarks; returns what summary.json holds, on the first process."""
    prompt, response = lengths(model.config, model.task)
    if arguments.max_prompt_tokens is not None:
        prompt = arguments.max_prompt_tokens
    if arguments.max_response_tokens is not None:
        response = arguments.max_response_tokens
    model = evaluated.decoding(model, arguments.slots, arguments.draft_depth)
    parts = model.config.layout.row_parts
    usual = 8 * arguments.slots if arguments.slots else 64
    rows = -(-usual // parts) * parts if arguments.rows is None else arguments.rows
    if rows % parts:
        raise ValueError(
            f"evaluate run: --rows {rows} cannot be cut evenly on {parts} devices (data x fsdp x "
            "expert). Choose a multiple, or leave it out."
        )
    settings = Settings(
        samples=arguments.k,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_prompt_tokens=prompt,
        max_response_tokens=response,
        rows=rows,
        problems=arguments.problems,
        seed=arguments.seed,
        model=model.name,
    )
    open_folder(folder, settings)
    with jax.set_mesh(model.mesh):
        sampler = evaluated.sampler(model, evaluated.sampling_config(model, settings))
        summary: dict[str, Any] = {
            "label": model.label,
            "settings": dataclasses.asdict(settings),
            "benchmarks": {},
        }
        results = {}
        for name, problems in model.benchmarks.items():
            title = f"{model.label}: {name}"
            with tqdm.tqdm(desc=title, unit="sample", leave=False, disable=not is_first()) as bar:

                def show(done: int, total: int, bar: tqdm.tqdm = bar) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                samples = complete(sampler, model.task, name, problems, settings, folder, show)
            accepted = evaluated.measure_acceptance(
                model, name, arguments.acceptance_prompts, settings
            )
            if not is_first():
                continue
            results[name] = benchmarks.result(name, samples)
            summary["benchmarks"][name] = results[name].summary() | {"mtp_acceptance": accepted}
            print(line(model.label, results[name], accepted))
    wait_for_all(f"{folder} is evaluated")
    if not is_first():
        return summary
    average = benchmarks.average(results, list(results))
    summary["average"] = {"benchmarks": list(results), **average._asdict()}
    runs.write_json(folder / "summary.json", summary)
    return summary


def line(label: str, result: benchmarks.Result, accepted: Sequence[dict[str, Any]]) -> str:
    """One benchmark of one model, for people."""
    summary = result.summary()

    def mean(name: str) -> str:
        return f"{name} {100 * summary[name]['mean']:.1f}"

    k = result.samples
    measures = dict.fromkeys([f"avg@{k}", f"pass@{k}", f"maj@{k}"])
    text = f"{label}: {report.title(result.name)}: " + ", ".join(map(mean, measures))
    text += f" ({len(result.problems)} problems, {result.invalid} invalid samples"
    text += f", {result.tokens:.0f} tokens, {100 * result.finished:.0f} % finished)"
    if accepted:
        shares = ", ".join(f"{module['share']:.3f}" for module in accepted)
        text += f"; MTP acceptance {shares}"
    return text


def table(arguments: Table) -> str:
    """Prints the table, and returns it."""
    evaluations = [report.read(folder, arguments.name) for folder in arguments.folders]
    text = report.table(evaluations) + "\n\n" + report.footnote(evaluations)
    print(text)
    return text


def fixtures(arguments: Fixtures) -> str:
    """Files in the published formats, two tiny runs on them, their evaluation and its table."""
    from experiments import evaluate_fixtures

    keep_compiled(arguments.folder / "compiled")
    folders = evaluate_fixtures.train(arguments.folder)
    run(Run(folders=folders, k=arguments.k, top_p=0.7, rows=16, acceptance_prompts=2, verify=False))
    print()
    return table(Table(folders))


def main() -> int:
    """Reads the command line."""
    commands: dict[str, Callable[..., Any]] = {"run": Run, "table": Table, "fixtures": Fixtures}
    chosen = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    if isinstance(chosen, Run):
        run(chosen)
    elif isinstance(chosen, Table):
        table(chosen)
    else:
        fixtures(chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
