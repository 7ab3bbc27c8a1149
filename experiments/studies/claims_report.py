"""Tables and figures of `experiments.studies.claims`, from its rows."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from experiments.studies.claims_grid import (
    APART,
    BEYOND,
    CONTROL,
    CORE,
    MAIN,
    SETTINGS,
    SHUFFLED,
    apart,
    baseline,
    cells,
)
from occ.evaluation.intervals import Estimate, mean_interval, paired_difference
from occ.training.durable.run_folder import read_rows

Rows = list[dict[str, Any]]
Results = dict[str, dict[str, Rows]]  # by setting, by variant; a row a seed, in order of seeds


def read(folder: pathlib.Path) -> Results:
    """All finished rows.

    Raises:
      ValueError: there are none, or some that do not share their warm start.
    """
    results: Results = {}
    for setting, variant in cells() + apart():
        file = folder / setting / f"{variant}.jsonl"
        if file.exists():
            rows = sorted(read_rows(file), key=lambda row: row["seed"])
            results.setdefault(setting, {})[variant] = rows
    for runs in results.values():
        for variant in runs:
            check_start(runs, variant)
    if not results:
        raise ValueError(
            f"no rows in {folder}: run `python -m experiments.studies.claims run` first, or "
            "pass the --folder that it wrote to."
        )
    return results


# ---------------------------------------------------------------------------------------------
# Quantities
# ---------------------------------------------------------------------------------------------


def values(rows: Rows, name: str) -> list[float]:
    """One number a seed."""
    return [row[name] for row in rows]


def check_start(runs: dict[str, Rows], variant: str) -> None:
    """Refuses to pair runs that began from different models.

    Before the first update every run of a seed is the warm start's, so the reward of its first
    rollout is the same in all variants of a model; rows of another commit or machine may stem from
    another warm start, which differs from this one in its last bits and then in all.

    Raises:
      ValueError: naming seeds and commits.
    """
    reference = {row["seed"]: row for row in runs.get(baseline(variant), [])}
    for row in runs.get(variant, []):
        other = reference.get(row["seed"], row)
        first, expected = row["reward_series"][0], other["reward_series"][0]
        if first != expected:
            raise ValueError(
                f"claims: {row['setting']}/{variant} seed {row['seed']} (commit {row['commit']}) "
                f"began with reward {first}, {baseline(variant)} (commit {other['commit']}) with "
                f"{expected}: they do not share a warm start and cannot be compared. Move the "
                "rows of one of them away and run its cells at the commit of the others."
            )


def difference(runs: dict[str, Rows], variant: str, name: str, other: str = "") -> Estimate | None:
    """Paired difference to another variant (default: its Detach) over the seeds that both have."""
    reference = runs.get(other or baseline(variant))
    if reference is None or variant not in runs:
        return None
    by_seed = {row["seed"]: row[name] for row in reference}
    both = [row for row in runs[variant] if row["seed"] in by_seed]
    if not both:
        return None
    return paired_difference(values(both, name), [by_seed[row["seed"]] for row in both])


def thirds(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Means over the first and the last third of training, one a seed."""
    series = np.array([row[f"{name}_series"] for row in rows])
    third = series.shape[1] // 3
    return series[:, :third].mean(axis=1).tolist(), series[:, -third:].mean(axis=1).tolist()


def show(
    estimate: Estimate | None, scale: float = 100, digits: int = 1, signed: bool = True
) -> str:
    """`+1.2 ± 0.4`, bold where a signed interval excludes 0."""
    if estimate is None:
        return ""
    text = f"{scale * estimate.mean:{'+' if signed else ''}.{digits}f}"
    if not np.isnan(estimate.half_width):
        text += f" ± {scale * estimate.half_width:.{digits}f}"
    return f"**{text}**" if signed and estimate.excludes(0.0) else text


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def accuracy_table(runs: dict[str, Rows]) -> str:
    """Every variant of one setting."""
    lines = [
        "| variant | n | sampled | greedy | MTP acceptance | sampled, minus Detach | "
        "greedy, minus Detach | mean reward, minus Detach |",
        "|" + "---|" * 8,
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
        lines.append("| " + " | ".join([variant, str(len(rows)), *absolute, *relative]) + " |")
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
        return show(mean_interval(thirds(rows, name)[int(last)]), **options)

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
    first, last = thirds(runs["policy_0.2"], "perturbation")
    logs = np.log(np.array(last) / np.array(first))
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
            if variant not in runs or "detach" not in runs:
                return ""
            n = min(len(runs[variant]), len(runs["detach"]))
            ours, detach = (thirds(runs[v][:n], "reward")[int(last)] for v in (variant, "detach"))
            return show(paired_difference(ours, detach))

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
            means = [np.mean(row[f"{name}_series"]) for row in runs[variant]]
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


def against_detach_table(results: Results, names: list[str]) -> str:
    """Claim 5: final sampled accuracy minus Detach's, a row a setting and a row over all."""
    text = _by_setting(
        results,
        {name: lambda runs, name=name: show(difference(runs, name, "sampled")) for name in names},
    )
    overall = [show(pooled(results, name, "sampled")) for name in names]
    return text + "\n| all, a setting one value | " + " | ".join(overall) + " |"


def pooled(results: Results, variant: str, name: str) -> Estimate | None:
    """The mean over settings of the mean difference to Detach, its interval over settings."""
    means = [
        estimate.mean
        for runs in results.values()
        if (estimate := difference(runs, variant, name)) is not None
    ]
    return mean_interval(means) if len(means) > 1 else None


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def forest_figure(results: Results, file: pathlib.Path) -> None:
    """Sampled accuracy minus Detach's, with intervals: the core variants in each setting."""
    variants = [name for name in (*CORE, CONTROL) if name != "detach"]
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
    figure.savefig(file, dpi=130)
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
    figure.savefig(file, dpi=130)
    plt.close(figure)


def report(folder: pathlib.Path, output: pathlib.Path) -> int:
    """Prints and writes everything; returns the exit status."""
    results = read(folder)
    output.mkdir(parents=True, exist_ok=True)
    core = [name for name in (*CORE, CONTROL) if name != "detach"]
    beyond = [name for name in (*BEYOND, *APART) if any(name in runs for runs in results.values())]
    sections = {
        "Correlation with the RL gradient (claims 1, 2, 7)": correlation_table(results),
        "Reward minus Detach's (claim 3)": fixed_table(results),
        "The log-ratio proxy (claim 4, and the control)": proxy_table(results),
        "Final sampled accuracy minus Detach's (claim 5)": against_detach_table(results, core),
        "Beyond the paper's regimes": against_detach_table(
            {s: r for s, r in results.items() if set(beyond) & set(r)}, beyond
        ),
        **{
            f"{setting}{', with changes one at a time' if setting == MAIN else ''}": accuracy_table(
                results[setting]
            )
            for setting in SETTINGS
            if setting in results
        },
    }
    counts = {len(rows) for runs in results.values() for rows in runs.values()}
    n = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    text = (
        "Points of per cent unless said otherwise; mean and 95 % Student-t interval over seeds "
        f"(n = {n}) of one warm start a setting, without the spread between warm starts; "
        "differences are paired by seed, bold where the interval excludes 0. With this many "
        "comparisons one in twenty is bold by chance.\n\n"
    )
    text += "\n\n".join(f"### {title}\n\n{table}" for title, table in sections.items()) + "\n"
    (output / "table.md").write_text(text)
    shown = {setting: runs for setting, runs in results.items() if "policy_0.2" in runs} or results
    forest_figure(shown, output / "differences.png")
    cosine_figure(shown, output / "cosines.png")
    print(text)
    print(f"{output}: table.md, differences.png, cosines.png")
    return 0
