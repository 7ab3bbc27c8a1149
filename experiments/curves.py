"""Metrics of runs over their rollouts or their time, as one figure; and when a reward is reached.

    python -m experiments.curves RUN [RUN ...] [--metrics reward rollout/acceptance] [--output FILE]
    python -m experiments.curves RUN [RUN ...] --over seconds --reach 0.5 0.7

RUN is a run's folder, or a file of rows such as those in experiments/studies/results/one_gpu.
`python -m experiments.train metrics` lists the metrics.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from typing import Annotated, Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments.runs import save_figure
from occ.training.durable.run_folder import read_rows

MEAN_OF = 5  # rollouts


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to draw.

    Attributes:
      runs: folders, or files of rows.
      metrics: a panel each; of a list its first entry is drawn.
      over: rollouts, or the seconds that rollouts and updates have taken up to then, without
        compiling as far as `compiled` first rollouts did it.
      compiled: rollouts at the beginning whose seconds are those of the rollout after them.
      reach: rewards; it is said when the mean of MEAN_OF rollouts first is as large.
      names: of the runs; empty takes those of the folders or files.
      output: the figure.
    """

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    metrics: tuple[str, ...] = ("reward", "eval/sampled", "eval/mtp_acceptance")
    over: Literal["rollout", "seconds"] = "rollout"
    compiled: int = 1
    reach: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    output: pathlib.Path = pathlib.Path("runs/curves.png")

    def __post_init__(self):
        if self.compiled < 0:
            raise ValueError(f"curves: compiled is a number of rollouts, got {self.compiled}.")


def series(rows: list[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Rollouts that have a metric, and its values there.

    >>> series([{"rollout": 0, "a": 1.0}, {"rollout": 1}, {"rollout": 2, "a": [3.0, 4.0]}], "a")
    ([0, 2], [1.0, 3.0])
    """
    found = [(row["rollout"], float(np.ravel(row[metric])[0])) for row in rows if metric in row]
    found = [(rollout, value) for rollout, value in found if math.isfinite(value)]
    return [rollout for rollout, _ in found], [value for _, value in found]


def trained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of rollouts; files of results may end with an evaluation alone."""
    return [row for row in rows if "reward" in row]


def elapsed(rows: list[dict[str, Any]], compiled: int = 1) -> list[float]:
    """Seconds of rollouts and updates up to the end of each rollout, without evaluations.

    Raises:
      ValueError: rows without seconds.

    >>> elapsed([{"seconds/rollout": a, "seconds/updates": 1.0} for a in (9.0, 2.0, 3.0)])
    [3.0, 6.0, 10.0]
    """
    if not all("seconds/rollout" in row and "seconds/updates" in row for row in rows):
        raise ValueError("curves: these rows do not say how many seconds they took.")
    each = [row["seconds/rollout"] + row["seconds/updates"] for row in rows]
    if not each:
        return []
    first = min(compiled, len(each) - 1)
    return np.cumsum([each[first]] * first + each[first:]).tolist()


def reached(rewards: list[float], level: float) -> int | None:
    """The first rollout with which the mean of the last MEAN_OF rewards is as large as `level`.

    >>> reached([0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.5], 0.5)
    4
    >>> reached([0.1] * 9, 0.5), reached([0.9] * 3, 0.5)
    (None, None)
    """
    if len(rewards) < MEAN_OF:
        return None
    means = np.convolve(rewards, np.ones(MEAN_OF) / MEAN_OF, mode="valid")
    found = np.flatnonzero(means >= level)
    return int(found[0]) + MEAN_OF - 1 if found.size else None


def said(
    runs: dict[str, list[dict[str, Any]]], levels: tuple[float, ...], compiled: int
) -> list[str]:
    """When each run reaches the levels, in words."""
    if not levels:
        return []
    lines = []
    for name, rows in runs.items():
        rows = trained(rows)
        rewards = [math.nan if row["reward"] is None else row["reward"] for row in rows]
        seconds = elapsed(rows, compiled)
        for level in levels:
            at = reached(rewards, level)
            when = "never" if at is None else f"after {at + 1} rollouts, {seconds[at]:.0f} s"
            lines.append(f"{name}: reward {level:g} {when}")
    return lines


def draw(
    runs: dict[str, list[dict[str, Any]]],
    metrics: tuple[str, ...],
    over: str = "rollout",
    compiled: int = 1,
) -> Figure:
    """A panel a metric, a line a run.

    Raises:
      ValueError: no run has one of the metrics.
    """
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics), 3.0), squeeze=False, layout="constrained"
    )
    for panel, metric in zip(axes[0], metrics, strict=True):
        for name, rows in runs.items():
            x, y = series(rows, metric)
            if over == "seconds":
                own = trained(rows)
                ends = dict(
                    zip((row["rollout"] for row in own), elapsed(own, compiled), strict=True)
                )
                # An evaluation at the end has no rollout after it.
                x = [ends.get(rollout, max(ends.values(), default=0.0)) for rollout in x]
            panel.plot(x, y, label=name, marker="." * metric.startswith("eval/"))
        if not any(line.get_xdata().size for line in panel.lines):
            known = sorted({key for rows in runs.values() for row in rows for key in row})
            raise ValueError(f"curves: no run has the metric {metric!r}; there are {known}.")
        panel.set(title=metric, xlabel=over)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside right center", frameon=False)
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
    figure = draw(rows, arguments.metrics, arguments.over, arguments.compiled)
    save_figure(arguments.output, figure, dpi=110)
    print(*said(rows, arguments.reach, arguments.compiled), arguments.output, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
