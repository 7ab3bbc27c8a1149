"""Drafters along a training run: how good they stay by what they learn from, and what they save.

    python -m experiments.studies.drafters run       a row a run; half an hour on two quiet cores
    python -m experiments.studies.drafters report    the tables from the committed rows

Question 1: the trunk moves; which loss of the modules keeps their drafts accepted? Each loss acts
on the modules alone, so that all of these runs train the same trunk on the same samples, and
"untrained" leaves the modules as the warm start made them.
Question 2: how much sooner is the same reward reached with drafts, beside Detach without any? And
with joint regimes, whose trunk differs?

Every variant trains from the same starts, which are repeats: each has a warm start, an order of
prompts and sampling keys of its own. Intervals are 95 % Student-t over starts. Seconds are of
rollouts and updates, without compiling and evaluations; nothing else may run on the machine.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from experiments.configs import CONFIGS
from experiments.curves import elapsed, reached
from experiments.studies.command_line import command_line
from experiments.studies.variants import by_variant, quickened, run_missing
from occ.evaluation.intervals import mean_interval
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.durable.run_folder import read_rows
from occ.training.regimes import regime

RESULTS = pathlib.Path(__file__).parent / "results" / "drafters"
STARTS = (0, 1, 2, 3, 4)
SETTING = "filtering_easy"
LEVEL = 0.6
"""Mean reward of five rollouts, of whose time question 2 asks; Detach comes to 0.64."""


class Variant(NamedTuple):
    """What is trained, and how many tokens are drafted for every pass of the trunk."""

    mtp: MTPTrainingConfig
    depth: int


VARIANTS = {
    "no drafts": Variant(regime("detach"), 0),
    "cross-entropy, one draft": Variant(regime("detach"), 1),
    "cross-entropy": Variant(regime("detach"), 2),
    "distillation": Variant(dataclasses.replace(regime("detach"), loss="distill"), 2),
    "top-k distillation": Variant(
        dataclasses.replace(regime("drafter_top_k"), distilled_tokens=4), 2
    ),
    "total variation": Variant(regime("drafter_tv"), 2),
    "untrained": Variant(regime("rl_only"), 2),
    "joint, own ratio 0.2": Variant(regime("drafter"), 1),
    "joint, by worth": Variant(regime("worth"), 1),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Measures.

    Attributes:
      variants: names.
      starts: seeds.
      folder: of the runs.
      quick: three rollouts after a warm start of twenty steps, from one start, whose rows are not
        kept.
    """

    variants: tuple[str, ...] = tuple(VARIANTS)
    starts: tuple[int, ...] = STARTS
    folder: pathlib.Path = pathlib.Path("runs/drafters")
    quick: bool = False

    def __post_init__(self):
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown:
            raise ValueError(f"drafters: expected variants of {tuple(VARIANTS)}, got {unknown}.")


def config_of(name: str, seed: int, quick: bool = False) -> TrainConfig:
    """A variant from one start."""
    base, variant = CONFIGS[SETTING](), VARIANTS[name]
    config = dataclasses.replace(
        base,
        mtp=variant.mtp,
        layout=dataclasses.replace(base.layout, draft_depth=variant.depth),
        seed=seed,
    )
    if quick:
        config = quickened(config, 3)
    return config


def run(arguments: Run) -> int:
    """Runs what is missing, and adds its rows."""
    starts = arguments.starts[:1] if arguments.quick else arguments.starts
    folder = arguments.folder / "quick" if arguments.quick else arguments.folder
    file = folder / "rows.jsonl" if arguments.quick else RESULTS / "rows.jsonl"
    pairs = [(name, seed) for seed in starts for name in arguments.variants]
    run_missing(
        pairs, lambda name, seed: config_of(name, seed, arguments.quick), measured, folder, file
    )
    return report(Report(file))


def measured(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run: thirds of it, and its seconds."""
    thirds = [[rows[i] for i in part] for part in np.array_split(np.arange(len(rows)), 3)]
    drafted = bool(VARIANTS[name].depth)

    def means(metric: str) -> list[Any] | None:
        if not drafted:
            return None
        return [np.mean([row[metric] for row in third], axis=0).tolist() for third in thirds]

    seconds = elapsed(rows)
    at = reached([row["reward"] for row in rows], LEVEL)
    return {
        "acceptance": means("rollout/acceptance"),
        "tokens_a_pass": means("rollout/tokens_a_pass"),
        "seconds": seconds[-1],
        "sampling": float(np.median([row["seconds/rollout"] for row in rows])),
        "reached": None if at is None else at + 1,
        "seconds_to_reach": None if at is None else seconds[at],
    }


@dataclasses.dataclass(frozen=True)
class Report:
    """Prints both tables.

    Attributes:
      rows: file of the rows.
    """

    rows: pathlib.Path = RESULTS / "rows.jsonl"


def report(arguments: Report) -> int:
    """Of acceptance, and of time."""
    print("\n".join(tables(read_rows(arguments.rows))))
    return 0


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Lines in Markdown: acceptance by depth over the run, then reward and seconds."""
    by = by_variant(rows)
    lines = [
        "| variant | starts | accepted of draft 1, first / middle / last third | of draft 2 "
        "| tokens a pass, last third | last third minus that of cross-entropy as deep, points |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in by.items():
        if VARIANTS[name].depth:
            shares = np.array([row["acceptance"] for row in found.values()])  # [starts, thirds, D]
            of_depth = [_cells(shares[:, :, d].T) for d in range(shares.shape[2])] + ["-"]
            passes = _cells(np.array([[row["tokens_a_pass"][-1] for row in found.values()]]))
            cells = [*of_depth[:2], passes, _beside(name, found, by)]
            lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    lines += [
        "",
        "| variant | starts | mean reward, % | minus that without drafts | final sampled, % "
        f"| s a run | s a rollout's samples | rollouts to a reward of {LEVEL} | s to it "
        "| times as soon there as without drafts |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return lines + [_time_line(name, found, by) for name, found in by.items()]


def _beside(name: str, found: dict[int, Any], by: dict[str, dict[int, Any]]) -> str:
    """Acceptance of each draft, paired by start."""
    like = next(n for n, v in VARIANTS.items() if v == (regime("detach"), VARIANTS[name].depth))
    shared = sorted(set(found) & set(by.get(like, {})))
    if name == like or not shared:
        return "-"
    last, theirs = (
        np.array([of[start]["acceptance"][-1] for start in shared]) for of in (found, by[like])
    )
    return _cells(100 * (last - theirs).T)


def _time_line(name: str, found: dict[int, Any], by: dict[str, dict[int, Any]]) -> str:
    plain = by.get("no drafts", {})
    pairs = [(row, plain[start]) for start, row in found.items() if start in plain]
    reached = [row for row in found.values() if row["reached"] is not None]
    columns = [
        [100 * row["reward"] for row in found.values()],
        [100 * (row["reward"] - base["reward"]) for row, base in pairs],
        [100 * row["sampled"] for row in found.values()],
        [row["seconds"] for row in found.values()],
        [row["sampling"] for row in found.values()],
        [row["reached"] for row in reached],
        [row["seconds_to_reach"] for row in reached],
        [
            base["seconds_to_reach"] / row["seconds_to_reach"]
            for row, base in pairs
            if None not in (row["reached"], base["reached"])
        ],
    ]
    never = len(found) - len(reached)
    cells = [_cells(np.array([values])) for values in columns]
    cells[-2] += f" ({never} never)" if never else ""
    return f"| {name} | {len(found)} | {' | '.join(cells)} |"


def _cells(parts: np.ndarray) -> str:
    """Means over starts with their half widths, of values [parts, starts]."""
    cells = []
    for values in parts:
        if not values.size:
            cells.append("-")
            continue
        found = mean_interval(values.astype(float))
        cells.append(f"{found.mean:.3g} ± {found.half_width:.2g}")
    return " / ".join(cells)


def main() -> int:
    """Reads the command line."""
    chosen = command_line(__doc__, Run, Report)
    return run(chosen) if isinstance(chosen, Run) else report(chosen)


if __name__ == "__main__":
    sys.exit(main())
