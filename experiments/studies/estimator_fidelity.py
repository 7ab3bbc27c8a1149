"""How close does each estimator of the coefficient come to c / v^2 of the expected gradients?

    python -m experiments.studies.estimator_fidelity run       TASKS from every start, resumable
    python -m experiments.studies.estimator_fidelity run --quick
    python -m experiments.studies.estimator_fidelity report    tables from the rows
    python -m experiments.studies.estimator_fidelity cost      operations of each estimator

Training runs (policy loss, coefficient 0.2) are followed, each from a warm start of its own. At
chosen rollouts, after one, two or three of its four gradient steps, many further minibatches are
drawn from the policy of that rollout. Every estimator is applied to each of them, and its value
compared with the truth from all the others: c and v^2 of their mean gradients, at least 16
minibatches together. Averages over training steps are applied to the run's own minibatches.

Cost: about three minutes a run and core. `--models` takes the other sizes of MODELS.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import runs
from experiments.configs import CONFIGS
from experiments.studies import fidelity_report
from experiments.studies.command_line import command_line
from experiments.studies.fidelity_estimators import AVERAGES, PARTS, by_path, cost, estimate
from experiments.studies.following import (
    STARTS,
    Followed,
    begin,
    file_of,
    follow_all,
    further_minibatches,
    inputs_of,
)
from occ.training.batch import Minibatch, split
from occ.training.config import TrainConfig
from occ.training.durable.run_folder import environment
from occ.training.optimizer import second_moment
from occ.training.rollout import collect
from occ.training.state import TrainState

RESULTS = pathlib.Path(__file__).parent / "results" / "fidelity"


def _model(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    return lambda run: dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def _same(run: TrainConfig) -> TrainConfig:
    return run


MODELS: dict[str, tuple[str, Callable[[TrainConfig], TrainConfig]]] = {
    "arithmetic_easy": ("arithmetic_easy", _same),
    "arithmetic_hard": ("arithmetic_hard", _same),
    "filtering_easy": ("filtering_easy", _same),
    "star_easy": ("star_easy", _same),
    "width_32": ("arithmetic_easy", _model(width=32, num_heads=2, num_kv_heads=1, mlp_width=64)),
    "width_128": ("arithmetic_easy", _model(width=128, num_heads=8, num_kv_heads=4, mlp_width=256)),
    "layers_4": ("arithmetic_easy", _model(num_layers=4)),
    "vocabulary_512": ("arithmetic_easy", _model(vocab_size=512)),
}
"""Task and change of its model, by name: two tasks easy, one hard, one of planning; then width,
depth and vocabulary one at a time."""

TASKS = ("arithmetic_easy", "arithmetic_hard", "filtering_easy", "star_easy")


@dataclasses.dataclass(frozen=True)
class Run:
    """Measures.

    Attributes:
      models: of MODELS.
      starts: seeds of the warm starts.
      minibatches: further minibatches at each point; the truth for one is from all others.
      stride: rollouts between points.
      workers: processes, each on one core.
      quick: one model from one start, few points: two minutes.
      folder: of the rows.
    """

    models: tuple[str, ...] = TASKS
    starts: tuple[int, ...] = STARTS
    minibatches: int = 24
    stride: int = 2
    workers: int = 2
    quick: bool = False
    folder: pathlib.Path = RESULTS


@dataclasses.dataclass(frozen=True)
class Report:
    """Table and figure from the rows.

    Attributes:
      folder: of the rows.
      output: for table.md and figures.
    """

    folder: pathlib.Path = RESULTS
    output: pathlib.Path = pathlib.Path("runs/fidelity/report")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Compiled operations of a step under each estimator, beside Detach.

    Attributes:
      folder: for cost.json.
    """

    folder: pathlib.Path = RESULTS


def follow(name: str, start: int, arguments: Run) -> pathlib.Path:
    """Follows one training run and writes a row a point; returns the file."""
    file = file_of(arguments.folder, name, start)
    if file.exists():
        return file
    setting, change = MODELS[name]
    run = begin(change(CONFIGS[setting]()), start, quick_rollouts=6 if arguments.quick else None)
    config, task, programs, state = run
    measure = _compiled(run)
    lines: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    for number in range(config.rollouts):
        rollout = collect(programs.rollout, run.policy(state), config, task, number)
        point = number % arguments.stride == arguments.stride - 1
        # One, two or three steps after the rollout, in turn: the proxy has nothing to say before.
        steps = 1 + (number // arguments.stride) % (config.rollout.minibatches - 1)
        count = arguments.minibatches if point else 0
        others = [batch for batch, _ in further_minibatches(run, state, number, count)]
        for index, minibatch in enumerate(split(rollout.batch, config.rollout.minibatches)):
            own.append(measure(state, minibatch, jax.random.key(len(own))))
            if point and index == steps:
                measured = [
                    measure(state, other, jax.random.key(10_000 + i))
                    for i, other in enumerate(others)
                ]
                lines.append(
                    {
                        "rollout": number,
                        "minibatch": index,
                        "reward": rollout.metrics["reward"],
                        "commit": environment()["commit"],
                        **compare(measured, [one["gram"]["exact"] for one in own]),
                    }
                )
            own[-1].pop("gradients")
            state, _ = programs.train_step(state, minibatch)
    runs.write_rows(file, runs.rounded(lines))
    return file


def _compiled(run: Followed) -> Callable[..., dict[str, Any]]:
    @jax.jit
    def compute(state: TrainState, batch: Minibatch, key: jax.Array):
        moments = by_path(second_moment(state.opt_state, run.config.optimizer))
        return estimate(inputs_of(run, state, batch), moments, key)

    return lambda *inputs: jax.device_get(compute(*inputs))


def compare(further: list[dict[str, Any]], own_grams: list[np.ndarray]) -> dict[str, Any]:
    """All estimators on every further minibatch, and the truth for each from all the others."""
    products = {part: _products(further, part) for part in (*PARTS, "rest")}
    gg, gm, mm = np.sum([np.stack(p) for p in products.values()], axis=0)
    n = len(further)
    truths = [_without(i, gm, mm) for i in range(n)]
    row: dict[str, Any] = {
        "truth": _columns(truths),
        "truth_error": _jackknife(truths),
        # The same without the noise that the mean of n minibatches still has, and with all of it.
        "unbiased": {"c": _off_diagonal(gm), "v2": _off_diagonal(mm), "g2": _off_diagonal(gg)},
        "same": {"c": float(np.trace(gm) / n), "v2": float(np.trace(mm) / n)},
        "other_leaves": {
            part: _columns(
                [_without(i, gm - products[part][1], mm - products[part][2]) for i in range(n)]
            )
            for part in PARTS
        },
        "estimates": {
            name: _columns([(one["gram"][name][0, 1], one["gram"][name][1, 1]) for one in further])
            for name in further[0]["gram"]
        },
        "ratios": {name: [one["ratio"][name] for one in further] for name in further[0]["ratio"]},
        "averages": _moving_averages(np.stack(own_grams)),
    }
    return row


def _products(further: list[dict[str, Any]], part: str) -> tuple[np.ndarray, ...]:
    """Inner products between all minibatches on one part: g with g, g with m, m with m."""
    g, m = (
        np.stack([one["gradients"][i][part] for one in further]).astype(np.float64) for i in (0, 1)
    )
    return g @ g.T, g @ m.T, m @ m.T


def _columns(pairs: list[tuple[Any, Any]]) -> dict[str, list[float]]:
    return {"c": [float(c) for c, _ in pairs], "v2": [float(v2) for _, v2 in pairs]}


def _without(i: int, gm: np.ndarray, mm: np.ndarray) -> tuple[float, float]:
    """c and v^2 of the mean gradients of all minibatches but one."""
    keep = np.arange(len(gm)) != i
    count = keep.sum() ** 2
    return float(gm[np.ix_(keep, keep)].sum() / count), float(mm[np.ix_(keep, keep)].sum() / count)


def _off_diagonal(products: np.ndarray) -> float:
    n = len(products)
    return float((products.sum() - np.trace(products)) / (n * (n - 1)))


def _jackknife(truths: list[tuple[float, float]]) -> float:
    """Jackknife standard error of the true ratio."""
    ratios = np.array([c / max(v2, 1e-30) for c, v2 in truths])
    n = len(ratios)
    return float(np.sqrt((n - 1) / n * np.sum((ratios - ratios.mean()) ** 2)))


def _moving_averages(grams: np.ndarray) -> dict[str, list[float]]:
    """c and v^2 of every average after the run's last minibatch."""
    result = {}
    for name, (decay, every) in AVERAGES.items():
        total, weight = np.zeros((2, 2)), 0.0
        for gram in grams[::every]:
            total, weight = decay * total + (1 - decay) * gram, decay * weight + 1 - decay
        result[name] = [float(total[0, 1] / weight), float(total[1, 1] / weight)]
    return result


def run(arguments: Run) -> int:
    """Measures every model that has no rows yet."""
    if arguments.quick:
        arguments = dataclasses.replace(
            arguments,
            models=arguments.models[:1],
            starts=arguments.starts[:1],
            minibatches=17,
            folder=pathlib.Path("runs/fidelity/quick"),
            workers=1,
        )
    unknown = sorted(set(arguments.models) - set(MODELS))
    if unknown or arguments.minibatches < 17:
        raise ValueError(
            f"estimator_fidelity: expected models in {sorted(MODELS)} and at least 17 minibatches "
            f"(16 for the truth and one to estimate from), got {unknown or arguments.minibatches}."
        )
    return follow_all(follow, arguments.models, arguments.starts, arguments)


def main() -> int:
    """Reads the command line."""
    arguments = command_line(__doc__, Run, Report, Cost)
    if isinstance(arguments, Run):
        return run(arguments)
    if isinstance(arguments, Cost):
        return cost(arguments.folder)
    return fidelity_report.report(arguments.folder, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
