"""Tables and figures of `experiments.studies.claims`, from its rows."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from experiments.runs import replace, save_figure
from experiments.studies.claims_grid import (
    APART,
    BEYOND,
    BY_WORTH,
    BY_WORTH_RATES,
    CONTROL,
    CORE,
    MAIN,
    OVER_STARTS,
    SETTINGS,
    SHUFFLED,
    baseline,
)
from experiments.studies.claims_rows import (
    Results,
    Rows,
    by_start,
    difference,
    pooled,
    read,
    show,
    third,
    units,
    values,
)
from occ.evaluation.intervals import mean_interval

# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def accuracy_table(runs: dict[str, Rows]) -> str:
    """Every variant of one setting; seconds are the median start's, beside what ran with it."""
    lines = [
        "| variant | n | sampled | greedy | MTP acceptance | sampled, minus Detach | "
        "greedy, minus Detach | mean reward, minus Detach | s a run |",
        "|" + "---|" * 9,
    ]
    for variant, rows in runs.items():
        absolute = [
            show(mean_interval(values(rows, name)), signed=False)
            for name in ("sampled", "greedy", "acceptance")
        ]
        relative = [
            "" if variant == baseline(variant) else show(difference(runs, variant, name))
            for name in ("sampled", "greedy", "area")
        ]
        timed = all("seconds" in row for row in rows)
        seconds = f"{np.median(values(rows, 'seconds')):.0f}" if timed else ""
        cells = [variant, str(len(rows)), *absolute, *relative, seconds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_setting(results: Results, columns: dict[str, Callable[[dict[str, Rows]], str]]) -> str:
    lines = ["| setting | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for setting, runs in results.items():
        cells_ = [column(runs) for column in columns.values()]
        lines.append("| " + " | ".join([setting, *cells_]) + " |")
    return "\n".join(lines)


def _third(variant: str, name: str, last: bool, **options: Any) -> Callable:
    def column(runs):
        rows = runs.get(variant)
        if not rows:
            return ""
        if not all(f"{name}_series" in row for row in rows):
            return ""
        return show(mean_interval(units(rows, third(name, last=last))), **options)

    return column


def correlation_table(results: Results) -> str:
    """Claims 1 and 2: cosine of both losses' gradients with the RL gradient, early and late."""
    cosine = {"scale": 1, "digits": 2}
    return _by_setting(
        results,
        {
            "CE, first third": _third("ce_0.2", "cosine", False, **cosine),
            "CE, last third": _third("ce_0.2", "cosine", True, **cosine),
            "Policy, first third": _third("policy_0.2", "cosine", False, **cosine),
            "Policy, last third": _third("policy_0.2", "cosine", True, **cosine),
            "Policy, v² last / first": _perturbation_ratio,
            "share cos² of Policy": _squared_cosine,
        },
    )


def _perturbation_ratio(runs: dict[str, Rows]) -> str:
    if "policy_0.2" not in runs:
        return ""
    first, last = (
        np.array(units(runs["policy_0.2"], third("perturbation", last=late)))
        for late in (False, True)
    )
    logs = np.log(last / first)
    return f"{np.exp(logs.mean()):.2f}"


def _squared_cosine(runs: dict[str, Rows]) -> str:
    if "policy_0.2" not in runs:
        return ""
    series = np.array([row["cosine_series"] for row in runs["policy_0.2"]])
    return show(mean_interval((series**2).mean(axis=1)), scale=1, digits=3, signed=False)


def fixed_table(results: Results) -> str:
    """Claim 3: reward minus Detach's, in the first and last third of training."""

    def column(variant: str, last: bool) -> Callable:
        def cell(runs):
            return show(difference(runs, variant, third("reward", last=last), "detach"))

        return cell

    return _by_setting(
        results,
        {
            f"{variant}, {'last' if last else 'first'} third": column(variant, last)
            for variant in ("ce_0.2", "policy_0.2", "policy_1.0")
            for last in (False, True)
        },
    )


def proxy_table(results: Results) -> str:
    """Claim 4 and the control: does the proxy follow c / v^2, and does it calibrate at all?"""

    def followed(runs):
        rows = runs.get("occ_paper")
        if not rows:
            return ""
        ranks = [
            scipy.stats.spearmanr(row["coefficient_series"], _ratio(row)).statistic for row in rows
        ]
        return show(mean_interval(ranks), scale=1, digits=2)

    def mean_of(variant: str, name: str) -> Callable:
        def cell(runs):
            if variant not in runs:
                return ""
            means = [np.nanmean(row[f"{name}_series"]) for row in runs[variant]]
            return show(mean_interval(means), scale=1, digits=3, signed=False)

        return cell

    return _by_setting(
        results,
        {
            "rank correlation over a run": followed,
            "mean proxy": mean_of("occ_paper", "coefficient"),
            "c / v²": lambda runs: _mean_ratio(runs.get("occ_paper", [])),
            "proxy minus constant, sampled": lambda runs: show(
                difference(runs, "occ_paper", "sampled", CONTROL)
            ),
            "constant minus Detach, sampled": lambda runs: show(
                difference(runs, CONTROL, "sampled")
            ),
            "proxy minus shuffled, sampled": lambda runs: show(
                difference(runs, "occ_paper", "sampled", SHUFFLED)
            ),
        },
    )


def _ratio(row: dict[str, Any]) -> np.ndarray:
    """c / v^2 of every rollout: of the means over its minibatches."""
    return np.array(row["correlation_series"]) / np.maximum(row["perturbation_series"], 1e-30)


def _mean_ratio(rows: Rows) -> str:
    """Sum of c over sum of v^2, over a run."""
    if not rows:
        return ""
    means = [np.sum(row["correlation_series"]) / np.sum(row["perturbation_series"]) for row in rows]
    return show(mean_interval(means), scale=1, digits=3, signed=False)


def against_detach_table(
    results: Results,
    names: list[str],
    quantity: str = "sampled",
    other: str = "",
    digits: int = 1,
) -> str:
    """Claim 5: a quantity minus Detach's (or another's), a row a setting and a row over all."""

    def column(name: str) -> Callable:
        return lambda runs: show(difference(runs, name, quantity, other), digits=digits)

    text = _by_setting(results, {name: column(name) for name in names})
    overall = [show(pooled(results, name, quantity, other), digits=digits) for name in names]
    return text + "\n| all, a setting one value | " + " | ".join(overall) + " |"


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def forest_figure(results: Results, file: pathlib.Path) -> None:
    """Sampled accuracy minus Detach's, with intervals: the core variants in each setting."""
    known = dict.fromkeys((*CORE, CONTROL, *OVER_STARTS, *BY_WORTH))
    variants = [v for v in known if v != "detach" and any(v in runs for runs in results.values())]
    figure, axes = plt.subplots(
        1, len(results), figsize=(2.2 * len(results) + 1.2, 3.6), layout="constrained", sharey=True
    )
    for axis, (setting, runs) in zip(np.atleast_1d(axes), results.items(), strict=True):
        for place, variant in enumerate(variants):
            estimate = difference(runs, variant, "sampled")
            if estimate is None:
                continue
            colour = "tab:red" if estimate.high < 0 else "tab:green" if estimate.low > 0 else "0.3"
            axis.errorbar(
                100 * estimate.mean,
                place,
                xerr=100 * estimate.half_width,
                fmt="o",
                color=colour,
                markersize=4,
                capsize=2,
            )
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_title(setting, fontsize=9)
        axis.set_yticks(range(len(variants)), variants, fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3, axis="x")
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.supxlabel("sampled accuracy minus Detach, points", fontsize=9)
    save_figure(file, figure, dpi=130)
    plt.close(figure)


def cosine_figure(results: Results, file: pathlib.Path) -> None:
    """Cosine with the RL gradient over training: cross-entropy and policy loss."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(2.3 * len(results) + 0.6, 2.8), layout="constrained", sharey=True
    )
    kernel = np.ones(5) / 5
    for axis, (setting, runs) in zip(np.atleast_1d(axes), results.items(), strict=True):
        for variant, label, colour in (
            ("ce_0.2", "CE", "tab:green"),
            ("policy_0.2", "Policy", "tab:red"),
        ):
            if variant not in runs:
                continue
            series = np.array([row["cosine_series"] for row in runs[variant]])
            smooth = np.stack([np.convolve(one, kernel, mode="valid") for one in series])
            x = np.arange(smooth.shape[1]) + 2
            axis.plot(x, smooth.mean(axis=0), color=colour, label=label)
            axis.fill_between(x, smooth.min(axis=0), smooth.max(axis=0), color=colour, alpha=0.15)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_title(setting, fontsize=9)
        axis.set_xlabel("rollout", fontsize=8)
        axis.tick_params(labelsize=8)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("cosine with the RL gradient", fontsize=8)
    if first.get_legend_handles_labels()[1]:
        first.legend(fontsize=8)
    save_figure(file, figure, dpi=130)
    plt.close(figure)


def by_start_table(results: Results, names: list[str]) -> str:
    """What each warm start gave, and all of them together, to the hundredth of a point."""
    lines = ["| setting | variant | all | by start |", "|---|---|---|---|"]
    for setting, runs in results.items():
        for name in names:
            starts = by_start(runs, name, "area")
            if starts:
                each = ", ".join(f"{start}: {100 * gain:+.2f}" for start, gain in starts.items())
                together = show(difference(runs, name, "area"), digits=2)
                lines.append(f"| {setting} | {name} | {together} | {each} |")
    return "\n".join(lines)


def over_starts_sections(results: Results) -> dict[str, str]:
    """Claims over warm starts: accuracy, reward, when in training, and each setting."""
    present = [
        name
        for name in dict.fromkeys((*OVER_STARTS, *BY_WORTH, *BY_WORTH_RATES))
        if any(name in runs for runs in results.values())
    ]
    names = [name for name in present if name != baseline(name)]
    rates = [name for name in present if name == baseline(name) != "detach"]
    titles = {
        "area": "Mean reward over training, minus Detach's",
        "sampled": "Final sampled accuracy, minus Detach's",
        "greedy": "Final greedy accuracy, minus Detach's",
        "acceptance": "MTP acceptance at the end, minus Detach's",
    }
    against = functools.partial(against_detach_table, results, digits=2)
    return {
        **{title: against(names, name) for name, title in titles.items()},
        **{
            f"Detach at other learning rates, {name}, minus Detach's at the common one": (
                against(rates, name, other="detach")
            )
            for name in ("area", "sampled")
            if rates
        },
        "Mean reward minus Detach's, by warm start": by_start_table(results, names),
        "Correlation with the RL gradient on the same minibatch (claims 1, 2)": correlation_table(
            results
        ),
        "Reward minus Detach's (claim 3)": fixed_table(results),
        **{setting: accuracy_table(results[setting]) for setting in results},
    }


def within_start_sections(results: Results) -> dict[str, str]:
    """Claims within one warm start a setting."""
    core = [name for name in (*CORE, CONTROL) if name != "detach"]
    beyond = [name for name in (*BEYOND, *APART) if any(name in runs for runs in results.values())]
    titled = {name: name + ", with changes one at a time" * (name == MAIN) for name in SETTINGS}
    return {
        "Correlation with the RL gradient (claims 1, 2, 7)": correlation_table(results),
        "Reward minus Detach's (claim 3)": fixed_table(results),
        "The log-ratio proxy (claim 4, and the control)": proxy_table(results),
        "Final sampled accuracy minus Detach's (claim 5)": against_detach_table(results, core),
        "Beyond the paper's regimes": against_detach_table(
            {s: r for s, r in results.items() if set(beyond) & set(r)}, beyond
        ),
        **{titled[name]: accuracy_table(results[name]) for name in SETTINGS if name in results},
    }


def report(folder: pathlib.Path, output: pathlib.Path) -> int:
    """Prints and writes everything; returns the exit status."""
    results = read(folder)
    output.mkdir(parents=True, exist_ok=True)
    starts = {row.get("start", 0) for runs in results.values() for r in runs.values() for row in r}
    counts = {len(rows) for runs in results.values() for rows in runs.values()}
    n = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    if len(starts) > 1:
        sections, figures = over_starts_sections(results), {"differences.png": forest_figure}
        over = f"{len(starts)} warm starts a setting, the mean of a start's runs one value"
    else:
        sections = within_start_sections(results)
        figures = {"differences.png": forest_figure, "cosines.png": cosine_figure}
        over = "seeds of one warm start a setting, without the spread between warm starts"
    text = (
        f"Points of per cent unless said otherwise; mean and 95 % Student-t interval over {over} "
        f"(n = {n} runs); differences are paired by seed, bold where the interval excludes 0. With "
        "this many comparisons one in twenty is bold by chance.\n\n"
    )
    text += "\n\n".join(f"### {title}\n\n{table}" for title, table in sections.items()) + "\n"
    replace(output / "table.md", text)
    shown = {setting: runs for setting, runs in results.items() if "policy_0.2" in runs} or results
    for name, draw in figures.items():
        draw(shown, output / name)
    print(f"{text}\n{output}: table.md, {', '.join(figures)}")
    return 0
