"""Tables and figures of a comparison, from the files of its runs."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from occ.evaluation.intervals import Estimate, mean_interval, paired_difference
from occ.training.durable.run_folder import read_rows
from occ.training.regimes import REGIMES

COLOURS = dict(zip(REGIMES, itertools.cycle(matplotlib.color_sequences["tab10"]), strict=False))

Runs = dict[str, list[dict[str, Any]]]  # results of each regime, a seed each, in order of seeds
QUANTITIES = {
    "sampled": ("sampled accuracy", lambda result: result["final"]["sampled"]),
    "greedy": ("greedy accuracy", lambda result: result["final"]["greedy"]),
    "area": ("mean reward over training", lambda result: result["reward_area"]),
    "acceptance": ("MTP acceptance", lambda result: result["final"]["mtp_acceptance"][0]),
}


def percent(estimate: Estimate, signed: bool = False) -> str:
    """`94.1 ± 0.8`, in per cent."""
    form = "+.1f" if signed else ".1f"
    mean = format(100 * estimate.mean, form)
    return mean if np.isnan(estimate.half_width) else f"{mean} ± {100 * estimate.half_width:.1f}"


def table(results: Runs, baseline: str = "detach") -> str:
    """A Markdown table: every quantity of every regime, and differences to the baseline.

    Differences are paired by seed; those whose 95 % interval excludes 0 are bold.
    """
    names = list(QUANTITIES)
    titles = [QUANTITIES[name][0] for name in names]
    lines = [
        "| regime | "
        + " | ".join(titles)
        + " | sampled, minus Detach | mean reward, minus Detach |",
        "|" + "---|" * (len(titles) + 3),
    ]
    for regime, seeds in results.items():
        cells = [percent(mean_interval(_values(seeds, name))) for name in names]
        if regime != baseline and baseline in results:
            for name in ("sampled", "area"):
                difference = paired_difference(
                    _values(seeds, name), _values(results[baseline], name)
                )
                text = percent(difference, signed=True)
                cells.append(f"**{text}**" if difference.excludes(0.0) else text)
        else:
            cells += ["", ""]
        lines.append(f"| {REGIMES[regime].label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _values(seeds: list[dict[str, Any]], name: str) -> list[float]:
    return [QUANTITIES[name][1](result) for result in seeds]


def reward_figure(folders: dict[str, list[pathlib.Path]], file: pathlib.Path) -> None:
    """Reward over rollouts: mean over seeds, with the 95 % interval as a band."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for regime, paths in folders.items():
        reward = _series(paths, ["reward"])
        assert reward is not None
        _band(axis, reward, regime, smooth=3)
    axis.set(xlabel="rollout", ylabel="reward (sampled accuracy, training prompts)")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def coefficient_figure(folders: dict[str, list[pathlib.Path]], file: pathlib.Path) -> None:
    """Coefficient, true cosine and true c / v^2 of the first module over rollouts."""
    panels = (
        ("coefficient on shared parameters", ["occ/coefficient"]),
        ("cosine of MTP and RL gradient", ["true/cosine"]),
        ("exact $c / v^2$", ["true/ratio"]),
    )
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 8), layout="constrained", sharex=True)
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for regime, paths in folders.items():
            series = _series(paths, keys)
            if series is not None:
                _band(axis, series, regime, smooth=5)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(ylabel=title)
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="rollout")
    axes[0].legend(loc="upper right", fontsize="small")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _series(paths: list[pathlib.Path], keys: list[str]) -> np.ndarray | None:
    """[seeds, rollouts] of the first key that the rows have; None if they have none."""
    rows = [read_rows(path / "metrics.jsonl") for path in paths]
    for key in keys:
        if all(key in row for run in rows for row in run):
            length = min(len(run) for run in rows)
            values = [[np.ravel(row[key])[0] for row in run[:length]] for run in rows]
            return np.asarray(values, np.float64)
    return None


def _band(axis: Any, series: np.ndarray, regime: str, smooth: int) -> None:
    kernel = np.ones(smooth) / smooth
    smoothed = np.stack([np.convolve(run, kernel, mode="valid") for run in series])
    x = np.arange(smoothed.shape[1]) + smooth / 2
    estimates = [mean_interval(column) for column in smoothed.T]
    (line,) = axis.plot(
        x, [e.mean for e in estimates], label=REGIMES[regime].label, color=COLOURS[regime]
    )
    if len(series) > 1:
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axis.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
