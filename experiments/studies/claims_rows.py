"""The rows of `experiments.studies.claims`: reading them, and quantities of replicates.

A replicate is a warm start, whose runs are one value together; where all runs share one warm start
every seed is a value, and what they say is about that start alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.studies import claims_grid
from experiments.studies.claims_grid import baseline
from occ.evaluation.intervals import Estimate, mean_interval
from occ.training.durable.run_folder import read_rows

Rows = list[dict[str, Any]]
Results = dict[str, dict[str, Rows]]  # by setting, by variant; a row a seed, in order of seeds


def read(folder: pathlib.Path) -> Results:
    """All finished rows.

    Raises:
      ValueError: there are none, or some that do not share their warm start.
    """
    results: Results = {}
    for setting, variant in claims_grid.every():
        file = folder / setting / f"{variant}.jsonl"
        if file.exists():
            rows = [_known(row) for row in sorted(read_rows(file), key=lambda row: row["seed"])]
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


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """With NaN where a series has nothing: a measure that needs two minibatches, in the first."""
    series = {
        name: [np.nan if value is None else value for value in values]
        for name, values in row.items()
        if name.endswith("_series")
    }
    return row | series


Quantity = Callable[[dict[str, Any]], float]  # of one row


def units(rows: Rows, quantity: Quantity) -> list[float]:
    """One number a replicate: the mean of a warm start's runs, or of one warm start every run."""
    by: dict[int, list[float]] = {}
    for row in rows:
        by.setdefault(row.get("start", 0), []).append(quantity(row))
    (*several,) = by.values()
    return several[0] if len(several) == 1 else [float(np.mean(runs)) for runs in several]


def values(rows: Rows, name: str) -> list[float]:
    """One number a replicate."""
    return units(rows, lambda row: row[name])


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


def difference(
    runs: dict[str, Rows], variant: str, quantity: str | Quantity, other: str = ""
) -> Estimate | None:
    """Paired difference to another variant (default: its Detach) over the seeds that both have.

    Its interval is over warm starts, or within one over seeds where there is only one.
    """
    rows = _paired(runs, variant, quantity, other)
    return mean_interval(values(rows, "difference")) if rows else None


def by_start(runs: dict[str, Rows], variant: str, quantity: str | Quantity) -> dict[int, float]:
    """The mean paired difference to Detach of every warm start."""
    rows = _paired(runs, variant, quantity)
    starts = dict.fromkeys(row["start"] for row in rows)
    return {
        start: float(np.mean([row["difference"] for row in rows if row["start"] == start]))
        for start in starts
    }


def _paired(runs: dict[str, Rows], variant: str, quantity: str | Quantity, other: str = "") -> Rows:
    of = (lambda row: row[quantity]) if isinstance(quantity, str) else quantity
    reference = {row["seed"]: of(row) for row in runs.get(other or baseline(variant), [])}
    return [
        {"start": row.get("start", 0), "difference": of(row) - reference[row["seed"]]}
        for row in runs.get(variant, [])
        if row["seed"] in reference
    ]


def third(name: str, *, last: bool) -> Quantity:
    """Mean over the first or the last third of training."""

    def of(row: dict[str, Any]) -> float:
        series = row[f"{name}_series"]
        size = len(series) // 3
        return float(np.nanmean(series[-size:] if last else series[:size]))

    return of


def pooled(results: Results, variant: str, name: str, other: str = "") -> Estimate | None:
    """The mean over settings of the mean difference to Detach, its interval over settings."""
    means = [
        estimate.mean
        for runs in results.values()
        if (estimate := difference(runs, variant, name, other)) is not None
    ]
    return mean_interval(means) if len(means) > 1 else None


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
