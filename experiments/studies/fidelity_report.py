"""Table and figure of `experiments.studies.estimator_fidelity`, from its rows."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from experiments import runs
from occ import json_files
from occ.training.durable.run_folder import read_rows

Rows = list[dict[str, Any]]
PARTS = ("first_layer", "last_layer", "embedding")
STAGES = ("early", "late")
SHOWN = (
    "exact",
    "cross_fitted",
    "row_subset",
    "first_layer",
    "last_layer",
    "embedding",
    "sketched_8",
    "sketched_32",
    "log_ratios_main",
    "log_ratios_own",
    "released_masked_main",
    "released_unmasked_main",
    "released_masked_own",
    "released_unmasked_own",
)


class Score(NamedTuple):
    """How well estimates agree with a truth.

    Attributes:
      spearman: rank correlation.
      sign: share of equal signs.
      bias: mean error.
      deviation: standard deviation of the estimate at one point, root mean square over points; NaN
        with one estimate a point.
      rmse: root mean square error.
      n: estimates.
    """

    spearman: float
    sign: float
    bias: float
    deviation: float
    rmse: float
    n: int


def score(estimates: np.ndarray, truths: np.ndarray) -> Score:
    """Scores estimates [points, minibatches] against truths of the same shape."""
    error = estimates - truths
    single = estimates.shape[1] == 1
    return Score(
        spearman=float(scipy.stats.spearmanr(estimates.ravel(), truths.ravel()).statistic),
        sign=float(np.mean(np.sign(estimates) == np.sign(truths))),
        bias=float(error.mean()),
        deviation=np.nan if single else float(np.sqrt(estimates.var(axis=1, ddof=1).mean())),
        rmse=float(np.sqrt(np.mean(error**2))),
        n=error.size,
    )


def ratios(rows: Rows, *keys: str) -> np.ndarray:
    """c / v^2 [points, minibatches] of what stands under these keys."""
    columns = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value[key]
        columns.append(np.asarray(value["c"]) / np.maximum(np.asarray(value["v2"]), 1e-30))
    return np.stack(columns)


def estimates(rows: Rows, name: str) -> np.ndarray:
    """An estimator's values [points, minibatches]."""
    if name in rows[0]["ratios"]:
        return np.array([row["ratios"][name] for row in rows])
    return ratios(rows, "estimates", name)


def averages(rows: Rows, name: str) -> np.ndarray:
    """An average's values along the run: [points, 1]."""
    return np.array([[row["averages"][name][0] / row["averages"][name][1]] for row in rows])


def scores(rows: Rows) -> dict[str, Score]:
    """Every estimator against the truth."""
    truth = ratios(rows, "truth")
    result = {name: score(estimates(rows, name), truth) for name in SHOWN}
    at_points = truth.mean(axis=1, keepdims=True)
    for name in rows[0]["averages"]:
        label = "exact (run)" if name == "exact" else name
        result[label] = score(averages(rows, name), at_points)
    return result


def table(models: dict[str, Rows], costs: dict[str, float]) -> str:
    """A Markdown table: means over models; the error beside that of the exact measure."""
    everything = {model: scores(rows) for model, rows in models.items()}
    lines = [
        "| estimator | rank correlation | same sign, % | bias | deviation | error / exact's | "
        "with the same minibatch | operations / Detach |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in next(iter(everything.values())):
        several = [one[name] for one in everything.values()]
        reference = "exact" if name in SHOWN else "exact (run)"
        relative = [one[name].rmse / one[reference].rmse for one in everything.values()]
        own = [_with_same_minibatch(rows, name) for rows in models.values()]
        cells = [
            name,
            _range([s.spearman for s in several], 2),
            _range([100 * s.sign for s in several], 0),
            f"{np.mean([s.bias for s in several]):+.3f}",
            f"{np.mean([s.deviation for s in several]):.3f}",
            _range(relative, 2),
            "" if np.isnan(own).any() else _range(own, 2),
            f"{costs[_cost_name(name)]:.2f}" if _cost_name(name) in costs else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cost_name(name: str) -> str:
    if name.startswith(("released", "log_ratios")):
        return "log_ratios_main"
    return {"exact (run)": "exact", "sketched_32": "sketched_8"}.get(name, name)


def _range(values: list[float], digits: int) -> str:
    """Mean over models, and its extremes."""
    low, high = np.min(values), np.max(values)
    return f"{np.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _with_same_minibatch(rows: Rows, name: str) -> float:
    """Rank correlation with the exact value of the same minibatch."""
    if name not in SHOWN or name == "exact":
        return np.nan
    exact = estimates(rows, "exact").ravel()
    return float(scipy.stats.spearmanr(estimates(rows, name).ravel(), exact).statistic)


def parts_table(models: dict[str, Rows]) -> str:
    """Measures on some leaves, scored against c / v^2 of all the *other* leaves."""
    lines = ["| measured on | rank correlation | same sign, % |", "|---|---|---|"]
    for part in PARTS:
        several = [
            score(estimates(rows, part), ratios(rows, "other_leaves", part))
            for rows in models.values()
        ]
        lines.append(
            f"| {part} | {_range([s.spearman for s in several], 2)} | "
            f"{_range([100 * s.sign for s in several], 0)} |"
        )
    return "\n".join(lines)


def models_table(models: dict[str, Rows]) -> str:
    """A row a model: the truth early and late, what noise does to it, and who follows it."""
    lines = [
        "| model | points | true c / v^2, early | late | c, same samples / true | "
        "v^2, same / true | exact: rank corr. | smoothed_0.9_every_5 | "
        "log_ratios_main | log_ratios_own |",
        "|" + "---|" * 10,
    ]
    for model, rows in models.items():
        truth = ratios(rows, "truth").mean(axis=1)
        half = len(truth) // 2
        noise = [
            sum(row["same"][key] for row in rows) / sum(row["unbiased"][key] for row in rows)
            for key in ("c", "v2")
        ]
        got = scores(rows)
        names = ("exact", "smoothed_0.9_every_5", "log_ratios_main", "log_ratios_own")
        lines.append(
            f"| {model} | {len(rows)} | {truth[:half].mean():.2f} | {truth[half:].mean():.2f} | "
            f"{noise[0]:.2f} | {noise[1]:.2f} | "
            + " | ".join(f"{got[name].spearman:.2f}" for name in names)
            + " |"
        )
    return "\n".join(lines)


def figure(models: dict[str, Rows], file: pathlib.Path) -> None:
    """True c / v^2 and estimates along the run, a panel a model."""
    names = list(models)
    columns = min(len(names), 2)
    lines = -(-len(names) // columns)
    canvas, axes = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 2.9 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.ravel()[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.ravel(), names, strict=False):
        rows = models[name]
        x = np.array([row["rollout"] for row in rows])
        exact, proxy = estimates(rows, "exact"), estimates(rows, "log_ratios_main")
        for values, label, colour in (
            (exact, "exact, one minibatch", "tab:blue"),
            (proxy, "log-ratio proxy, one minibatch", "tab:red"),
        ):
            low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
            axis.plot(x, middle, color=colour, linewidth=1, label=label)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        smooth = averages(rows, "smoothed_0.9_every_5")[:, 0]
        axis.plot(x, smooth, color="tab:green", linewidth=1.2, label="average, every 5th step")
        truth = ratios(rows, "truth").mean(axis=1)
        errors = [1.96 * row["truth_error"] for row in rows]
        axis.errorbar(x, truth, errors, color="black", fmt=".", markersize=4, label="truth", lw=0.8)
        axis.axhline(0, color="black", linewidth=0.5)
        limit = 2.5 * np.quantile(np.abs(truth), 0.9)
        axis.set(title=name, ylim=(-limit, limit), xlabel="rollout", ylabel="$c / v^2$")
    axes[0, 0].legend(fontsize="x-small", loc="lower left")
    runs.save_figure(file, canvas, dpi=120)
    plt.close(canvas)


def read(folder: pathlib.Path) -> dict[str, Rows]:
    """Rows of every model in the folder.

    Raises:
      ValueError: there are none.
    """
    models = {file.stem: read_rows(file) for file in sorted(folder.glob("*.jsonl"))}
    if not models:
        raise ValueError(
            f"no rows in {folder}: run `python -m experiments.studies.estimator_fidelity run` "
            "first, or pass the --folder that it wrote to."
        )
    return models


def report(folder: pathlib.Path, output: pathlib.Path) -> int:
    """Prints and writes the tables, and draws the figure; returns the exit status."""
    models = read(folder)
    cost_file = folder / "cost.json"
    costs = json_files.read_object(cost_file) if cost_file.exists() else {}
    output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        [
            "Means over models, with their extremes in brackets. Error and deviation are of the "
            "coefficient c / v^2.",
            table(models, costs),
            "Measures on some leaves, against c / v^2 of all other leaves:",
            parts_table(models),
            "By model:",
            models_table(models),
        ]
    )
    runs.replace(output / "table.md", text + "\n")
    figure(models, output / "fidelity.png")
    print(text)
    print(f"\n{output}: table.md, fidelity.png")
    return 0
