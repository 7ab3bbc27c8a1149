"""Table and words of a comparison of regimes."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from occ.buckets import Path
from occ.evaluation.intervals import Estimate, mean_interval, paired_difference
from occ.training.durable.run_folder import read_result, read_rows
from occ.training.regimes import REGIMES

RESCUES = {"occ_ce": "ce_3", "occ": "policy_3"}  # OCC, and what it replaces on the same loss
BASELINE = "detach"

Runs = dict[str, list[dict[str, Any]]]  # each regime's runs, one a warm start, in the same order
QUANTITIES = {
    "area": ("mean reward over training", lambda run: run["reward_area"]),
    "sampled": ("sampled accuracy at the end", lambda run: run["final"]["sampled"]),
    "greedy": ("greedy accuracy", lambda run: run["final"]["greedy"]),
    "acceptance": ("MTP acceptance", lambda run: run["final"]["mtp_acceptance"][0]),
}
COMPARED = ("area", "sampled")
JUDGED = "area"  # by what the words and the figure judge
TIME = "seconds a rollout"
NOTE = (
    "Per cent; mean and 95 % Student-t interval over warm starts; differences are paired by warm "
    "start, bold where the interval excludes 0. Seconds are the median, its updates included, on "
    "this machine and beside whatever else it did."
)


def read(folder: Path) -> dict[str, Any]:
    """Result, reward of every rollout, and the usual seconds of one, of a finished run."""
    rows = read_rows(folder / "metrics.jsonl")
    return read_result(folder) | {
        "rewards": [math.nan if row["reward"] is None else row["reward"] for row in rows],
        "rollout_seconds": statistics.median(
            row["seconds/rollout"] + row["seconds/updates"] for row in rows
        ),
    }


def percent(estimate: Estimate, signed: bool = False) -> str:
    """`94.1 ± 0.8`, in per cent; with a second decimal where half the interval is below 0.5."""
    narrow = 100 * estimate.half_width < 0.5
    form = ("+" if signed else "") + (".2f" if narrow else ".1f")
    mean = format(100 * estimate.mean, form)
    if np.isnan(estimate.half_width):
        return mean
    return f"{mean} ± {format(100 * estimate.half_width, form.strip('+'))}"


def difference(results: Runs, regime: str, to: str = BASELINE, name: str = JUDGED) -> Estimate:
    """Of a quantity between two regimes, paired by warm start."""
    return paired_difference(values_of(results[regime], name), values_of(results[to], name))


def table(results: Runs) -> str:
    """A Markdown table: every quantity of every regime, and differences to Detach."""
    titles = [title for title, _ in QUANTITIES.values()]
    titles += [f"{QUANTITIES[name][0]}, minus Detach" for name in COMPARED]
    timed = all("rollout_seconds" in run for found in results.values() for run in found)
    titles += [TIME] * timed
    lines = ["| regime | " + " | ".join(titles) + " |", "|" + "---|" * (len(titles) + 1)]
    for regime, found in results.items():
        cells = [percent(mean_interval(values_of(found, name))) for name in QUANTITIES]
        for name in COMPARED:
            if regime == BASELINE or BASELINE not in results:
                cells.append("")
                continue
            estimate = difference(results, regime, name=name)
            text = percent(estimate, signed=True)
            cells.append(f"**{text}**" if estimate.excludes(0.0) else text)
        if timed:
            cells.append(f"{np.mean([run['rollout_seconds'] for run in found]):.2f}")
        lines.append(f"| {REGIMES[regime].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def words(results: Runs) -> str:
    """What was seen, as the intervals decide it."""
    if BASELINE not in results:
        return "Without Detach there is nothing to compare with."
    n = len(results[BASELINE])
    sentences = []
    for regime in results:
        if regime == BASELINE:
            continue
        name = REGIMES[regime].label
        said = f"{name[0].upper()}{name[1:]} is {_verdict(difference(results, regime), 'Detach')}"
        fixed = RESCUES.get(regime)
        if fixed in results:
            verdict = _verdict(difference(results, regime, fixed), REGIMES[fixed].label)
            said += f", and {verdict}"
        sentences.append(said + ".")
    starts = f"{n} warm starts" if n > 1 else "1 warm start, so without intervals"
    return f"What was seen ({QUANTITIES[JUDGED][0]}, {starts}): " + " ".join(sentences)


def _verdict(estimate: Estimate, other: str) -> str:
    """`3.9 ± 0.3 points below Detach`, or that the interval leaves it open."""
    if estimate.mean == 0 and np.isnan(estimate.half_width):
        return f"equal to {other}"
    if estimate.low <= 0 <= estimate.high:
        bound = np.ceil(1000 * max(-estimate.low, estimate.high)) / 10
        shown = percent(estimate, signed=True)
        return f"not told apart from {other} ({shown}; within {bound:.1f} points of it)"
    size = percent(estimate._replace(mean=abs(estimate.mean)))
    return f"{size} points {'below' if estimate.mean < 0 else 'above'} {other}"


def values_of(found: list[dict[str, Any]], name: str) -> list[float]:
    """A quantity of each run."""
    values = [QUANTITIES[name][1](run) for run in found]
    return [math.nan if value is None else value for value in values]
