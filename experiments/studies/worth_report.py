"""Tables and figure of `experiments.studies.worth`, from its rows."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from experiments.studies import claims_rows
from experiments.studies.following import Points, read_followed
from occ.evaluation.intervals import mean_interval

RESULTS = pathlib.Path(__file__).parent / "results" / "worth"
GAINS = RESULTS.with_name("claims_over_starts")
COEFFICIENTS = (0.2, 1.0, 3.0)
LARGER = (1, 4, 16, 64, 256, 1024)
"""Factors of the minibatch."""
PREDICTED = {
    "drafter": ("policy_own", 0.2),
    "policy_1.0": ("policy_main", 1.0),
    "policy_3": ("policy_main", 3.0),
    "ce_0.2": ("ce", 0.2),
    "ce_3": ("ce", 3.0),
}
"""Variants of `claims_grid.OVER_STARTS` whose gain a fixed coefficient predicts."""

NORMS = ("adam", "euclidean")


def figure_of(
    row: dict[str, Any], norm: str, name: str, objective: str, of: str = "value"
) -> np.ndarray:
    """One figure of one auxiliary at one point, or its standard "error"."""
    value = row[norm][name][of][row["objectives"].index(objective)]
    return np.array(value, np.float64)


def _mean(values: list[Any], of: Callable[..., Any] = np.mean) -> float:
    """Over the points at which it is defined: where the RL gradient has a signal."""
    known = np.array(values, np.float64)
    known = known[np.isfinite(known)]
    return float(of(known)) if known.size else np.nan


def worth_table(points: Points, norm: str) -> str:
    """Worth and coefficient a setting and auxiliary: medians over points, intervals over starts.

    Medians, since a quotient has no mean where the RL gradient has hardly a signal.
    """
    lines = [
        "| setting | auxiliary | starts | worth | a coefficient a part | as a control variate | "
        "coefficient | critical batch, minibatches | R(0.2) - 1, % |",
        "|" + "---|" * 9,
    ]
    settings = sorted({setting for setting, _ in points})
    for setting in settings:
        runs = [rows for (name, _), rows in points.items() if name == setting]
        for objective in runs[0][0]["objectives"]:

            def column(name, scale=1.0, digits=2, pick=None, o=objective, runs=runs, norm=norm):
                figures = [
                    [_picked(figure_of(row, norm, name, o), pick) for row in rows]
                    for rows in runs
                    if name in rows[0][norm]
                ]
                values = [v for v in (_mean(some, np.median) for some in figures) if v == v]
                estimate = mean_interval(values) if values else None
                return claims_rows.show(estimate, scale, digits, signed=False)

            critical = [figure_of(r, norm, "critical_batch", objective) for rs in runs for r in rs]
            lines.append(
                f"| {setting} | {objective} | {len(runs)} | {column('worth', digits=3)} | "
                f"{column('by_part', digits=3)} | {column('centred', digits=3)} | "
                f"{column('coefficient')} | "
                f"{_mean(critical, np.median):.1f} | {column('gain', 100, 1, pick=0)} |"
            )
    return "\n".join(lines)


def larger_table(points: Points, norm: str) -> str:
    """What larger minibatches leave of the worth: of each point, with its standard error.

    Empty where no row says it: the older ones do not.
    """
    lines = [
        "| setting, start, rollout | auxiliary | "
        + " | ".join(f"{factor} times" for factor in LARGER)
        + " |",
        "|" + "---|" * (2 + len(LARGER)),
    ]
    for (setting, start), rows in points.items():
        for row in (row for row in rows if "larger" in row[norm]):
            for objective in row["objectives"]:
                values = figure_of(row, norm, "larger", objective)
                errors = figure_of(row, norm, "larger", objective, of="error")
                cells = (f"{v:.3f} ({e:.3f})" for v, e in zip(values, errors, strict=True))
                lines.append(
                    f"| {setting}, {start}, {row['rollout']} | {objective} | "
                    + " | ".join(cells)
                    + " |"
                )
    return "\n".join(lines) if len(lines) > 2 else ""


def _picked(value: np.ndarray, pick: int | None) -> np.ndarray:
    return value if pick is None else value[pick]


def error_line(points: Points) -> str:
    """How well one point is measured."""
    rows = [row for several in points.values() for row in several]
    halves = [1.96 * error for row in rows for error in row["adam"]["worth"]["error"] if error]
    median, decile = (_mean(halves, lambda v, q=q: np.quantile(v, q)) for q in (0.5, 0.9))
    return (
        f"{len(points)} runs, {len(rows)} points of {rows[0]['minibatches']} minibatches: half the "
        f"95 % interval of a worth in Adam's norm is {median:.3f} in the median and {decile:.3f} "
        "at the ninth decile."
    )


class Pair(NamedTuple):
    """What the worth said of a variant, and what training gave.

    Attributes:
      setting: of the run.
      start: seed of the warm start.
      variant: of the grid.
      predicted: R(lambda) / R(0) - 1, mean over the points of a run of Detach.
      measured: mean reward minus Detach's, mean over the seeds of the start.
    """

    setting: str
    start: int
    variant: str
    predicted: float
    measured: float


def pairs(points: Points, gains: claims_rows.Results) -> list[Pair]:
    """Every variant, setting and start that was both measured and trained."""
    found = []
    for setting, runs in gains.items():
        for variant, (objective, value) in PREDICTED.items():
            for start, gain in claims_rows.by_start(runs, variant, "area").items():
                rows = points.get((setting, start), [])
                if not rows or objective not in rows[0]["objectives"]:
                    continue
                place = COEFFICIENTS.index(value)
                said = [figure_of(row, "adam", "gain", objective)[place] for row in rows]
                found.append(Pair(setting, start, variant, _mean(said), gain))
    return found


def correlation(found: list[Pair], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation and its 95 % bootstrap interval over pairs of setting and start.

    What belongs to one warm start is drawn together.
    """
    groups: dict[tuple[str, int], list[Pair]] = {}
    for pair in found:
        groups.setdefault((pair.setting, pair.start), []).append(pair)
    members = list(groups.values())
    rng = np.random.default_rng(seed)

    def spearman(some: list[Pair]) -> float:
        said, gave = ([getattr(p, name) for p in some] for name in ("predicted", "measured"))
        if len(set(said)) < 2 or len(set(gave)) < 2:  # drawn, or measured, alike
            return np.nan
        return float(scipy.stats.spearmanr(said, gave).statistic)

    drawn = [
        spearman(
            [pair for i in rng.integers(len(members), size=len(members)) for pair in members[i]]
        )
        for _ in range(2000)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return spearman(found), float(low), float(high)


def prediction_table(found: list[Pair]) -> str:
    """Rank correlation and signs, each variant alone and all together."""
    lines = ["| variant | pairs | rank correlation | sign right |", "|" + "---|" * 4]
    for variant in (*dict.fromkeys(pair.variant for pair in found), "all"):
        some = [pair for pair in found if variant in (pair.variant, "all")]
        if len(some) < 3:
            continue
        value, low, high = correlation(some)
        right = np.mean([np.sign(pair.predicted) == np.sign(pair.measured) for pair in some])
        lines.append(
            f"| {variant} | {len(some)} | {value:+.2f} ({low:+.2f} to {high:+.2f}) | {right:.0%} |"
        )
    return "\n".join(lines)


def prediction_figure(found: list[Pair], file: pathlib.Path) -> None:
    """Gain against prediction, a panel a variant, a colour a setting."""
    variants = list(dict.fromkeys(pair.variant for pair in found))
    settings = list(dict.fromkeys(pair.setting for pair in found))
    figure, axes = plt.subplots(
        1, len(variants), figsize=(2.6 * len(variants) + 0.8, 2.9), layout="constrained"
    )
    for axis, variant in zip(np.atleast_1d(axes), variants, strict=True):
        for colour, setting in enumerate(settings):
            some = [p for p in found if (p.variant, p.setting) == (variant, setting)]
            axis.scatter(
                [100 * p.predicted for p in some],
                [100 * p.measured for p in some],
                s=14,
                color=f"C{colour}",
                label=setting,
            )
        axis.axhline(0, color="black", linewidth=0.5)
        axis.axvline(0, color="black", linewidth=0.5)
        axis.set_title(variant, fontsize=9)
        axis.tick_params(labelsize=7)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("mean reward minus Detach, points", fontsize=8)
    first.legend(fontsize=6)
    figure.supxlabel("predicted change of signal to noise, per cent", fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def report(folder: pathlib.Path, gains: pathlib.Path | None, output: pathlib.Path) -> int:
    """Prints and writes everything; returns the exit status.

    Args:
      folder: rows of this study.
      gains: rows of training; None compares with none.
      output: for table.md and worth.png.
    """
    points = read_followed(folder, "worth")
    output.mkdir(parents=True, exist_ok=True)
    text = error_line(points) + "\n"
    for norm in NORMS:
        text += f"\n### Norm: {norm}\n\n{worth_table(points, norm)}\n"
        if larger := larger_table(points, norm):
            text += f"\nThe worth in larger minibatches (standard error):\n\n{larger}\n"
    found = pairs(points, claims_rows.read(gains)) if gains is not None and gains.exists() else []
    if len(found) > 2:
        text += f"\n### What training gave\n\n{prediction_table(found)}\n"
        prediction_figure(found, output / "worth.png")
    (output / "table.md").write_text(text)
    print(text)
    print(f"{output}: table.md" + (", worth.png" if len(found) > 2 else ""))
    return 0
