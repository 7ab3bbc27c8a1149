"""The figure of a comparison of regimes: what happened, and by how much, at first sight."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.report import BASELINE, JUDGED, QUANTITIES, Runs, difference, percent
from occ.evaluation.intervals import paired_difference
from occ.training.regimes import REGIMES

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = {
    "detach": "#000000",
    "ce_3": "#D55E00",
    "policy_3": "#E69F00",
    "occ_ce": "#0072B2",
    "occ": "#CC79A7",
    "drafter": "#009E73",
}
OTHER_COLOUR = "#7F7F7F"
SMOOTHING = 9  # rollouts of the moving average


def figure(results: Runs) -> Figure:
    """Reward over rollouts, and the difference to Detach, with 95 % intervals over warm starts.

    Warm starts differ by more than regimes do, so a band is that of the paired difference to
    Detach, around the regime's mean.
    """
    with plt.rc_context({"font.size": 13, "text.color": "#222222"}):
        made, (left, right) = plt.subplots(
            1, 2, figsize=(14, 5.6), layout="constrained", width_ratios=(5, 4)
        )
        _draw_rewards(left, results)
        _draw_differences(right, results)
    plt.close(made)  # for pyplot, which would keep it; it can still be saved
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return made


def _draw_rewards(axis: Any, results: Runs) -> None:
    smoothed = {regime: 100 * _smooth(found) for regime, found in results.items()}
    rollouts = len(next(iter(results.values()))[0]["rewards"])
    points = next(iter(smoothed.values())).shape[1]
    x = np.arange(points) + (rollouts - points) / 2 + 1  # the middle of what was averaged
    for regime, series in smoothed.items():
        mean, colour = series.mean(0), COLOURS.get(regime, OTHER_COLOUR)
        dashed = "--" if regime == BASELINE else "-"
        above = 3 if regime == BASELINE else 2
        axis.plot(
            x, mean, dashed, color=colour, linewidth=2.2, label=REGIMES[regime].label, zorder=above
        )
        if regime != BASELINE and BASELINE in smoothed and len(series) > 1:
            pairs = zip(series.T, smoothed[BASELINE].T, strict=True)
            half = np.array([paired_difference(*pair).half_width for pair in pairs])
            axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
    means = np.stack([series.mean(0) for series in smoothed.values()])
    margin = 0.12 * np.ptp(means) + 1.0  # of the curves: a wide band must not squeeze them
    low, high = means.min() - margin, means.max() + margin
    ends = [series.mean(0)[-1] for series in smoothed.values()]
    places = _spread(ends, gap=(high - low) / 16)
    for regime, end, place in zip(smoothed, ends, places, strict=True):
        axis.annotate(
            REGIMES[regime].label,
            (x[-1], end),
            (x[-1] + 0.06 * (x[-1] - x[0] + 1), place),
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS.get(regime, OTHER_COLOUR),
                "linewidth": 1.5,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )
    axis.set(xlabel="rollout", ylabel="reward, % right", ylim=(low, high), xlim=(0, None))


def _draw_differences(axis: Any, results: Runs) -> None:
    axis.axvline(0, linestyle="--", color=COLOURS[BASELINE], linewidth=1.5)
    others = [regime for regime in results if regime != BASELINE and BASELINE in results]
    for row, regime in enumerate(others):
        estimate = difference(results, regime)
        axis.errorbar(
            100 * estimate.mean,
            row,
            xerr=None if np.isnan(estimate.half_width) else 100 * estimate.half_width,
            fmt="o",
            markersize=8,
            color=COLOURS.get(regime, OTHER_COLOUR),
            capsize=5,
            linewidth=2.2,
            label=REGIMES[regime].label,
        )
        axis.annotate(
            f"{REGIMES[regime].label}\n{percent(estimate, signed=True)}",
            (1.03, row),
            xycoords=("axes fraction", "data"),
            va="center",
            annotation_clip=False,
        )
    n = len(next(iter(results.values())))
    axis.set(
        ylim=(max(len(others), 1) - 0.5, -0.5),
        yticks=[],
        xlabel=f"{QUANTITIES[JUDGED][0]}, points above Detach\n({n} warm starts, 95 % intervals)",
    )
    axis.spines["left"].set_visible(False)


def _smooth(found: list[dict[str, Any]]) -> np.ndarray:
    """Moving averages of the rewards, [warm starts, rollouts]."""
    length = min(SMOOTHING, len(found[0]["rewards"]))
    kernel = np.ones(length) / length
    return np.stack([np.convolve(run["rewards"], kernel, mode="valid") for run in found])


def _spread(values: list[float], gap: float) -> np.ndarray:
    """Places for labels near these values, at least a gap apart."""
    order = np.argsort(values)
    wanted = np.asarray(values)[order]
    steps = gap * np.arange(len(wanted))
    placed = np.maximum.accumulate(wanted - steps) + steps
    placed -= np.mean(placed - wanted)
    places = np.empty_like(placed)
    places[order] = placed
    return places
