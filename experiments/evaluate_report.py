"""The paper's table from run folders: a row a regime, a column a benchmark, and their average."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from occ import json_files
from occ.buckets import Path
from occ.evaluation import benchmarks
from occ.evaluation.benchmarks import Result
from occ.evaluation.bootstrap import bootstrap_interval, paired_test
from occ.evaluation.intervals import Estimate
from occ.tasks.datasets import SIX, TABLE
from occ.training.durable.run_folder import read_rows

MISSING = "n/a"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a run folder holds of an evaluation.

    Attributes:
      label: of its row.
      results: of each benchmark.
    """

    label: str
    results: Mapping[str, Result]


def read(folder: Path, name: str) -> Evaluation:
    """The results of a finished evaluation.

    Args:
      folder: of a run or a model.
      name: of the folder of the evaluation inside it.

    Raises:
      ValueError: it is not finished.
    """
    file = folder / name / "summary.json"
    if not file.exists():
        raise ValueError(
            f"{folder / name} has no summary.json: the evaluation was not run, or did not come to "
            "its end. `python -m experiments.evaluate run` goes on with it."
        )
    summary = json_files.read_object(file)
    results = {
        benchmark: benchmarks.result(benchmark, read_rows(folder / name / f"{benchmark}.jsonl"))
        for benchmark in summary["benchmarks"]
    }
    return Evaluation(summary["label"], results)


def title(name: str) -> str:
    """Of a benchmark's column."""
    return TABLE[name].title if name in TABLE else name


def columns(evaluations: Sequence[Evaluation]) -> list[str]:
    """All benchmarks that any has: the six first, in their order."""
    found = {name for evaluation in evaluations for name in evaluation.results}
    return [name for name in SIX if name in found] + sorted(found.difference(SIX))


def table(evaluations: Sequence[Evaluation]) -> str:
    """A Markdown table of avg@k in per cent, with 95 % intervals over problems.

    The last column is the average's difference to the first run, problem by problem, bold where its
    interval excludes 0, with the p-value of the paired test.

    Raises:
      ValueError: runs were evaluated on other problems of one benchmark.
    """
    names = columns(evaluations)
    heads = ["regime", *(title(name) for name in names), f"average of {len(names)}"]
    lines = ["| " + " | ".join([*heads, "minus the first"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for evaluation in evaluations:
        cells = [evaluation.label]
        for name in names:
            found = evaluation.results.get(name)
            cells.append(
                MISSING if found is None else percent(bootstrap_interval([found.accuracy]))
            )
        cells.append(percent(benchmarks.average(evaluation.results, names)))
        first = evaluation is evaluations[0]
        cells.append("" if first else difference(evaluation, evaluations[0], names))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(evaluation: Evaluation, baseline: Evaluation, names: Sequence[str]) -> str:
    """`+1.7 [0.2, 3.1], p = 0.03`, on the benchmarks named; missing if one lacks one of them.

    Raises:
      ValueError: other problems in one than in the other.
    """
    pairs = [(evaluation.results.get(name), baseline.results.get(name)) for name in names]
    values, others = [], []
    for name, (a, b) in zip(names, pairs, strict=True):
        if a is None or b is None:
            return MISSING
        if a.problems != b.problems:
            raise ValueError(
                f"{evaluation.label!r} and {baseline.label!r} were evaluated on other problems of "
                f"{name!r}: {len(a.problems)} and {len(b.problems)}. Use the same data and lengths."
            )
        values.append(a.accuracy)
        others.append(b.accuracy)
    test = paired_test(values, others)
    text = percent(test.difference, signed=True)
    if text == MISSING:
        return MISSING
    text = f"**{text}**" if test.difference.excludes(0.0) else text
    return f"{text}, p = {test.p_value:.2g}"


def percent(estimate: Estimate, signed: bool = False) -> str:
    """`45.3 [40.1, 50.2]`, in per cent."""
    if np.isnan(estimate.mean):
        return MISSING
    mean = format(100 * estimate.mean, "+.1f" if signed else ".1f")
    if np.isnan(estimate.low):
        return mean
    return f"{mean} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def footnote(evaluations: Sequence[Evaluation]) -> str:
    """What the numbers are, and what was left out."""
    found = [(e.label, result) for e in evaluations for result in e.results.values()]
    samples = sorted({result.samples for _, result in found})
    text = (
        f"avg@{'/'.join(map(str, samples))} in per cent; in brackets 95 % bootstrap intervals over "
        "problems; differences are paired by problem, bold where the interval excludes 0, with the "
        "p-value of a sign-flip test. They say nothing of other seeds of training."
    )
    invalid = [
        f"{result.invalid} of {len(result.problems) * result.samples} in {title(result.name)} "
        f"({label})"
        for label, result in found
        if result.invalid
    ]
    if invalid:
        text += " Samples that could not be judged are left out: " + ", ".join(invalid) + "."
    return text
