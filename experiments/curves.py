"""Metrics of runs over their rollouts, as one figure.

    python -m experiments.curves RUN [RUN ...] [--metrics reward rollout/acceptance] [--output FILE]

RUN is a run's folder, or a file of rows such as those in experiments/studies/results/one_gpu.
`python -m experiments.train metrics` lists the metrics.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments.runs import save_figure
from occ.training.durable.run_folder import read_rows


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to draw.

    Attributes:
      runs: folders, or files of rows.
      metrics: a panel each; of a list its first entry is drawn.
      names: of the runs; empty takes those of the folders or files.
      output: the figure.
    """

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    metrics: tuple[str, ...] = ("reward", "eval/sampled", "eval/mtp_acceptance")
    names: tuple[str, ...] = ()
    output: pathlib.Path = pathlib.Path("runs/curves.png")


def series(rows: list[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Rollouts that have a metric, and its values there.

    >>> series([{"rollout": 0, "a": 1.0}, {"rollout": 1}, {"rollout": 2, "a": [3.0, 4.0]}], "a")
    ([0, 2], [1.0, 3.0])
    """
    found = [(row["rollout"], float(np.ravel(row[metric])[0])) for row in rows if metric in row]
    found = [(rollout, value) for rollout, value in found if math.isfinite(value)]
    return [rollout for rollout, _ in found], [value for _, value in found]


def draw(runs: dict[str, list[dict[str, Any]]], metrics: tuple[str, ...]) -> Figure:
    """A panel a metric, a line a run.

    Raises:
      ValueError: no run has one of the metrics.
    """
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics), 3.0), squeeze=False, layout="constrained"
    )
    for panel, metric in zip(axes[0], metrics, strict=True):
        for name, rows in runs.items():
            panel.plot(*series(rows, metric), label=name, marker="." * metric.startswith("eval/"))
        if not any(line.get_xdata().size for line in panel.lines):
            known = sorted({key for rows in runs.values() for row in rows for key in row})
            raise ValueError(f"curves: no run has the metric {metric!r}; there are {known}.")
        panel.set(title=metric, xlabel="rollout")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    plt.close(figure)
    return figure


def main() -> int:
    """Reads the command line."""
    arguments = tyro.cli(Arguments, description=__doc__)
    names = arguments.names or tuple(run.stem for run in arguments.runs)
    files = [run / "metrics.jsonl" if run.is_dir() else run for run in arguments.runs]
    missing = [str(file) for file in files if not file.exists()]
    if missing or len(names) != len(files):
        print(f"curves: expected a run's folder or file of rows for each name; missing {missing}.")
        return 2
    rows = {name: read_rows(file) for name, file in zip(names, files, strict=True)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(arguments.output, draw(rows, arguments.metrics), dpi=110)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
