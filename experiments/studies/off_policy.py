"""What samples cost that are not quite of the policy: weights one step old, experts chosen anew.

    python -m experiments.studies.off_policy run       a row a run; twenty minutes on two cores
    python -m experiments.studies.off_policy report    the table from the committed rows

Question 1: `engine.overlap` samples rollout n + 1 while rollout n is trained on, and a truncated
importance weight stands for the updates in between. What does that cost in reward, with the weight
and without it?
Question 2: sampling and training round differently, and in a mixture of experts a token may then go
to other experts. How far apart are their log-probs, how far with `rollout.routing_replay`, and does
it cost reward?

The mixture is trained for long enough to be no random model, and no longer: a fifth of the warm
start and a third of the rollouts, since CPUs take eight times as long for it.

Every variant trains from the same starts, which are repeats: each has a warm start, an order of
prompts and sampling keys of its own. Differences are to the first variant of the same model, start
by start, with 95 % Student-t intervals over starts.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np

from experiments.configs import CONFIGS
from experiments.studies.command_line import command_line
from experiments.studies.variants import by_variant, quickened, run_missing
from occ.evaluation.intervals import mean_interval, paired_difference
from occ.generation.engines.config import EngineConfig
from occ.models.config import MoEConfig
from occ.training.config import TrainConfig
from occ.training.durable.run_folder import read_rows
from occ.training.regimes import regime

RESULTS = pathlib.Path(__file__).parent / "results" / "off_policy"
STARTS = (0, 1, 2, 3, 4)
SETTING = "filtering_easy"
MOE = MoEConfig(num_experts=8, experts_per_token=2, expert_width=64, first_dense_layers=0)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to sample and to train.

    Attributes:
      model: whose first variant is the baseline; each has a warm start of its own.
      overlap: sample one rollout ahead.
      weighted: with importance weights.
      replay: train with the experts of sampling.
    """

    model: str
    overlap: bool = False
    weighted: bool = True
    replay: bool = False


VARIANTS = {
    "on_policy": Variant("dense"),
    "one_step_off": Variant("dense", overlap=True),
    "one_step_off_unweighted": Variant("dense", overlap=True, weighted=False),
    "experts": Variant("experts, bfloat16"),
    "experts_replayed": Variant("experts, bfloat16", replay=True),
    "experts_float32": Variant("experts, float32"),
    "experts_float32_replayed": Variant("experts, float32", replay=True),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Measures.

    Attributes:
      variants: names.
      starts: seeds.
      rollouts: a run; None takes the configuration's.
      folder: of the runs.
      quick: two rollouts after a warm start of twenty steps, from one start. Its rows are not kept.
    """

    variants: tuple[str, ...] = tuple(VARIANTS)
    starts: tuple[int, ...] = STARTS
    rollouts: int | None = None
    folder: pathlib.Path = pathlib.Path("runs/off_policy")
    quick: bool = False


def config_of(name: str, seed: int, arguments: Run) -> TrainConfig:
    """A variant from one start, trained as Detach."""
    variant, base = VARIANTS[name], CONFIGS[SETTING]()
    model = base.model
    if variant.model != "dense":
        dtype = variant.model.split(", ")[1]
        model = dataclasses.replace(model, moe=MOE, compute_dtype=dtype)
        warm = base.warm_start
        warm = dataclasses.replace(warm, steps=warm.steps // 5, clean_steps=warm.clean_steps // 5)
        base = dataclasses.replace(base, warm_start=warm, rollouts=base.rollouts // 3)
    cap = EngineConfig.importance_cap if variant.weighted else None
    config = dataclasses.replace(
        base,
        name=f"{base.name}_{variant.model.replace(', ', '_')}",
        model=model,
        engine=EngineConfig(overlap=variant.overlap, importance_cap=cap),
        rollout=dataclasses.replace(base.rollout, routing_replay=variant.replay),
        mtp=regime("detach"),
        seed=seed,
    )
    if arguments.rollouts is not None:
        config = dataclasses.replace(config, rollouts=arguments.rollouts)
    if arguments.quick:
        config = quickened(config, 2)
    return config


def run(arguments: Run) -> int:
    """Runs what is missing, and adds its rows."""
    starts = arguments.starts[:1] if arguments.quick else arguments.starts
    folder = arguments.folder / "quick" if arguments.quick else arguments.folder
    file = folder / "rows.jsonl" if arguments.quick else RESULTS / "rows.jsonl"
    pairs = [(name, seed) for seed in starts for name in arguments.variants]
    run_missing(pairs, lambda name, seed: config_of(name, seed, arguments), _measured, folder, file)
    return report(Report(file))


def _measured(_: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"mismatch": float(np.mean([row["rollout/log_prob_mismatch"] for row in rows]))}


@dataclasses.dataclass(frozen=True)
class Report:
    """Prints the table.

    Attributes:
      rows: file of the rows.
    """

    rows: pathlib.Path = RESULTS / "rows.jsonl"


def report(arguments: Report) -> int:
    """A line a variant."""
    by = by_variant(read_rows(arguments.rows))
    print(
        "| variant | starts | mean reward | final sampled | difference of both | mismatch, nats |"
    )
    print("|---|---|---|---|---|---|")
    for name, found in by.items():
        print(_line(name, found, by))
    return 0


def _line(name: str, found: dict[int, Any], by: dict[str, dict[int, Any]]) -> str:
    base = next(n for n, v in VARIANTS.items() if v.model == VARIANTS[name].model)
    shared = sorted(set(found) & set(by.get(base, {})))

    def values(of: dict[int, Any], what: str, starts: Any = None) -> list[float]:
        return [of[start][what] for start in (sorted(of) if starts is None else starts)]

    cells = [f"{100 * mean_interval(values(found, w)).mean:.1f}" for w in ("reward", "sampled")]
    difference = "-"
    if name != base and shared:
        pairs = [
            paired_difference(values(found, what, shared), values(by[base], what, shared))
            for what in ("reward", "sampled")
        ]
        difference = ", ".join(f"{100 * d.mean:+.1f} ± {100 * d.half_width:.1f}" for d in pairs)
    mismatch = mean_interval(values(found, "mismatch"))
    measured = f"{mismatch.mean:.2g} ± {mismatch.half_width:.1g}"
    return f"| {name} | {len(found)} | {' | '.join(cells)} | {difference} | {measured} |"


def main() -> int:
    """Reads the command line."""
    chosen = command_line(__doc__, Run, Report)
    return run(chosen) if isinstance(chosen, Run) else report(chosen)


if __name__ == "__main__":
    sys.exit(main())
