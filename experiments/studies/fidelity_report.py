"""Table and figure of `experiments.studies.estimator_fidelity`, from its rows."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from experiments import runs
from experiments.studies import claims_rows
from experiments.studies.following import Points, read_followed
from occ import json_files
from occ.evaluation.intervals import mean_interval

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


def by_model(points: Points) -> dict[str, list[Rows]]:
    """The runs of every model, one a start."""
    models = sorted({model for model, _ in points})
    return {m: [rows for (model, _), rows in points.items() if model == m] for m in models}


def show(points: Points, value: Callable[[Rows], float], digits: int) -> str:
    """Mean over models with its interval over starts, and the extremes of the models' means."""
    figures = {key: value(rows) for key, rows in points.items()}
    starts, models = {start for _, start in points}, {model for model, _ in points}
    means = np.array([np.mean([v for key, v in figures.items() if key[1] == s]) for s in starts])
    if np.isnan(means).any():
        return ""
    each = [np.mean([v for key, v in figures.items() if key[0] == m]) for m in models]
    return (
        f"{claims_rows.show(mean_interval(means), 1, digits, signed=False)} "
        f"({np.min(each):.{digits}f} to {np.max(each):.{digits}f})"
    )


def table(points: Points, costs: dict[str, float]) -> str:
    """A Markdown table of all estimators; the error beside that of the exact measure."""
    everything = {id(rows): scores(rows) for rows in points.values()}
    lines = [
        "| estimator | rank correlation | same sign, % | bias | deviation | error / exact's | "
        "with the same minibatch | operations / Detach |",
        "|" + "---|" * 8,
    ]
    for name in next(iter(everything.values())):
        reference = "exact" if name in SHOWN else "exact (run)"

        def figure_of(key, scale=1.0, n=name):
            return lambda rows: scale * getattr(everything[id(rows)][n], key)

        def relative(rows, n=name, r=reference):
            return everything[id(rows)][n].rmse / everything[id(rows)][r].rmse

        cells = [
            name,
            show(points, figure_of("spearman"), 2),
            show(points, figure_of("sign", 100), 0),
            show(points, figure_of("bias"), 3),
            show(points, figure_of("deviation"), 3),
            show(points, relative, 2),
            show(points, lambda rows, n=name: _with_same_minibatch(rows, n), 2),
            f"{costs[_cost_name(name)]:.2f}" if _cost_name(name) in costs else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cost_name(name: str) -> str:
    if name.startswith(("released", "log_ratios")):
        return "log_ratios_main"
    return {"exact (run)": "exact", "sketched_32": "sketched_8"}.get(name, name)


def _with_same_minibatch(rows: Rows, name: str) -> float:
    """Rank correlation with the exact value of the same minibatch."""
    if name not in SHOWN or name == "exact":
        return np.nan
    exact = estimates(rows, "exact").ravel()
    return float(scipy.stats.spearmanr(estimates(rows, name).ravel(), exact).statistic)


def parts_table(points: Points) -> str:
    """Measures on some leaves, scored against c / v^2 of all the *other* leaves."""
    lines = ["| measured on | rank correlation | same sign, % |", "|---|---|---|"]
    for part in PARTS:

        def of(key, scale=1.0, p=part):
            return lambda rows: (
                scale * getattr(score(estimates(rows, p), ratios(rows, "other_leaves", p)), key)
            )

        lines.append(
            f"| {part} | {show(points, of('spearman'), 2)} | {show(points, of('sign', 100), 0)} |"
        )
    return "\n".join(lines)


def models_table(points: Points) -> str:
    """A row a model: the truth early and late, what noise does to it, and who follows it."""
    names = ("exact", "smoothed_0.9_every_5", "log_ratios_main", "log_ratios_own")
    lines = [
        "| model | starts | true c / v^2, early | late | c, same samples / true | v^2, same / true "
        "| " + " | ".join(f"{name}: rank corr." for name in names) + " |",
        "|" + "---|" * (6 + len(names)),
    ]

    def noise(rows, key):
        return sum(row["same"][key] for row in rows) / sum(row["unbiased"][key] for row in rows)

    for model, several in by_model(points).items():
        truths = [ratios(rows, "truth").mean(axis=1) for rows in several]
        columns = [
            [truth[: len(truth) // 2].mean() for truth in truths],
            [truth[len(truth) // 2 :].mean() for truth in truths],
            *([noise(rows, key) for rows in several] for key in ("c", "v2")),
            *([scores(rows)[name].spearman for rows in several] for name in names),
        ]
        cells = (claims_rows.show(mean_interval(c), 1, 2, signed=False) for c in columns)
        lines.append(f"| {model} | {len(several)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(points: Points, file: pathlib.Path) -> None:
    """True c / v^2 and estimates along the first start's run, a panel a model."""
    models = {model: several[0] for model, several in by_model(points).items()}
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


def report(folder: pathlib.Path, output: pathlib.Path) -> int:
    """Prints and writes the tables, and draws the figure; returns the exit status."""
    points = read_followed(folder, "estimator_fidelity")
    cost_file = folder / "cost.json"
    costs = json_files.read_object(cost_file) if cost_file.exists() else {}
    output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        [
            "Means over models with 95 % intervals over starts, and in brackets the extremes of "
            "the models' means. Bias, deviation and error are of the coefficient c / v^2.",
            table(points, costs),
            "Measures on some leaves, against c / v^2 of all other leaves:",
            parts_table(points),
            "By model:",
            models_table(points),
        ]
    )
    runs.replace(output / "table.md", text + "\n")
    figure(points, output / "fidelity.png")
    print(text)
    print(f"\n{output}: table.md, fidelity.png")
    return 0
