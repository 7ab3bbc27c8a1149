"""What is an auxiliary gradient worth, measured before it is trained with?

    python -m experiments.studies.worth run       every setting from every warm start, resumable
    python -m experiments.studies.worth run --quick
    python -m experiments.studies.worth candidates    further objectives, modules and widths
    python -m experiments.studies.worth report    worths, coefficients, and what training gained

A run of Detach is followed. At four points of it many further minibatches are drawn from its
policy, and the gradients of the RL loss and of every auxiliary objective are taken on each of them:
their inner products on one minibatch and between different ones are all that the worth needs
(`occ.theory.worth`). It is the factor by which an auxiliary multiplies the samples of a minibatch,
as long as noise rules and the step's length is free; `report` compares what it predicts of a fixed
coefficient with what training at that coefficient gained from the same warm start, in runs of other
seeds (`experiments.studies.claims run --over-starts`).

Cost: 25 runs of four points and 64 minibatches each, three to five minutes a run and core. Of a
model such as SmolLM2 (`run --settings smollm2_sums --starts 0 --workers 1 --objectives policy_own
ce_rewarded alignment --points 0.07 --minibatches 16 --folder runs/worth/smollm2`) a minibatch takes
two to three minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runs
from experiments.compiled import keep_compiled
from experiments.studies import worth_report
from experiments.studies.claims_grid import OVER_STARTS_SETTINGS, STARTS
from experiments.studies.command_line import command_line
from experiments.studies.fidelity_estimators import PARTS, by_part, by_path, folded
from experiments.studies.following import (
    Followed,
    begin,
    file_of,
    follow_all,
    further_minibatches,
    inputs_of,
)
from experiments.studies.worth_objectives import (
    AUXILIARIES,
    CANDIDATES,
    check,
    rl_gradient,
    setting_of,
)
from experiments.studies.worth_report import COEFFICIENTS, GAINS, LARGER, RESULTS
from occ import theory
from occ.theory import SampledGram
from occ.training.batch import Minibatch, split
from occ.training.durable.run_folder import environment, read_rows
from occ.training.optimizer import second_moment
from occ.training.regimes import regime
from occ.training.rollout import collect, lengths
from occ.training.state import TrainState

OBJECTIVES = ("policy_own", "policy_main", "ce", "ce_rewarded", "distill")
"""Those of the committed rows of results/worth."""

POINTS = (0.07, 0.25, 0.5, 0.8)
"""Of a run; after one, two or three gradient steps of the rollout, in turn."""

CANDIDATE_RESULTS = RESULTS.with_name("worth_candidates")

MEMORY = 20
"""Minibatches in the average that a control variate is centred on: five rollouts."""

FOLDED = 2**20 - 3
"""Entries that are kept of a part of a gradient; odd, so that rows do not fall on one another."""

QUICK = pathlib.Path("runs/worth/quick")


@dataclasses.dataclass(frozen=True)
class Run:
    """Measures.

    Attributes:
      settings: configurations, as they are or with a changed model (`worth_objectives.MODELS`).
      starts: seeds of the warm starts.
      objectives: auxiliary ones, of `worth_objectives.AUXILIARIES`.
      points: shares of the run at which is measured; it ends with the last.
      minibatches: further ones at each point.
      workers: processes, each on one core.
      quick: one setting from one start, few minibatches.
      folder: of the rows.
    """

    settings: tuple[str, ...] = OVER_STARTS_SETTINGS
    starts: tuple[int, ...] = STARTS
    objectives: tuple[str, ...] = OBJECTIVES
    points: tuple[float, ...] = POINTS
    minibatches: int = 64
    workers: int = 2
    quick: bool = False
    folder: pathlib.Path = RESULTS

    def __post_init__(self):
        check(self.objectives, self.settings)
        if self.minibatches < 4:
            raise ValueError(f"worth: expected at least 4 minibatches, got {self.minibatches}.")
        if not self.points or not all(0 <= share < 1 for share in self.points):
            raise ValueError(f"worth: points are shares of a run in [0, 1), got {self.points}.")


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Measures further objectives, wider models and several modules, as CANDIDATES has them.

    Attributes:
      starts: seeds of the warm starts.
      minibatches: further ones at each point.
      workers: processes, each on one core.
      folder: of the rows, a folder a part.
    """

    starts: tuple[int, ...] = STARTS[:3]
    minibatches: int = 64
    workers: int = 2
    folder: pathlib.Path = CANDIDATE_RESULTS


@dataclasses.dataclass(frozen=True)
class Report:
    """Tables from the rows.

    Attributes:
      folder: of the rows.
      gains: rows of the training runs.
      output: for table.md and worth.png.
    """

    folder: pathlib.Path = RESULTS
    gains: pathlib.Path = GAINS
    output: pathlib.Path = pathlib.Path("runs/worth/report")


# ---------------------------------------------------------------------------------------------
# Inner products of gradients
# ---------------------------------------------------------------------------------------------


def gradients_of(run: Followed, objectives: Sequence[str]) -> Callable[..., Any]:
    """`(state, minibatch, advantages) -> {norm: {part: float [A, P]}}`, compiled.

    The RL loss's gradient is the first; advantages are those of other methods, by name. Parts of
    more than FOLDED entries are folded.
    """
    key = jax.random.key(0)
    columns = lengths(run.config, run.task)[0]

    @jax.jit
    def compute(state: TrainState, batch: Minibatch, advantages: dict[str, jax.Array]):
        inputs = inputs_of(run, state, batch, prompt_columns=columns)
        found = [rl_gradient(inputs)]
        for auxiliary in (AUXILIARIES[name] for name in objectives):
            other = batch
            if auxiliary.advantage:
                other = batch.replace(advantages=advantages[auxiliary.advantage])
            found.append(auxiliary.gradient(inputs.on(other)))
        moments = by_path(second_moment(state.opt_state, run.config.optimizer))
        roots = {path: (jnp.sqrt(moments[path]) + 1e-8) ** -0.5 for path in found[0]}
        plain = [by_part(one) for one in found]
        adam = [by_part(jax.tree.map(jnp.multiply, roots, one)) for one in found]
        return {
            norm: {
                part: jnp.stack([folded(one[part], FOLDED, key) for one in several])
                for part in several[0]
            }
            for norm, several in (("adam", adam), ("euclidean", plain))
        }

    return lambda *inputs: jax.device_get(compute(*inputs))


def products(gradients: list[dict[str, np.ndarray]]) -> np.ndarray:
    """All inner products between M minibatches' gradients in one norm.

    Returns:
      float64 [parts, A, A, M, M], <d_i of minibatch r, d_j of minibatch s> on each part of the
      parameters; the main gradient is d_0.
    """
    found = []
    for part in (*PARTS, "rest"):
        stacked = np.stack([one[part] for one in gradients], axis=1).astype(np.float64)
        flat = stacked.reshape(-1, stacked.shape[-1])
        shape = stacked.shape[:2] * 2
        found.append((flat @ flat.T).reshape(shape).transpose(0, 2, 1, 3))
    return np.stack(found)


def sampled(matrices: np.ndarray, left_out: int | None = None) -> SampledGram:
    """Gram matrices on one minibatch and between different ones.

    Args:
      matrices: float64 [parts, A, A, M, M], inner products.
      left_out: a minibatch that is not to count.

    Returns:
      Leaves float64 [parts, A, A], numpy.
    """
    keep = np.arange(matrices.shape[-1]) != left_out
    kept = matrices[..., keep, :][..., keep]
    same = np.einsum("pijrr->pij", kept)
    n = int(keep.sum())
    cross = (kept.sum(axis=(-2, -1)) - same) / (n * (n - 1))
    return SampledGram(same / n, (cross + cross.transpose(0, 2, 1)) / 2)


def figures(parts: SampledGram) -> dict[str, jax.Array]:
    """What the report shows.

    Args:
      parts: leaves [parts, A, A].

    Returns:
      "worth", "coefficient", "critical_batch", "by_part" (worth with a coefficient a part) and
      "centred" (worth as a control variate, its average over MEMORY minibatches), each [A - 1], of
      every auxiliary alone; "gain" [A - 1, C], of fixed coefficients; "larger" [A - 1, F], the
      worth in minibatches LARGER times as large; "joint" [], the worth of all auxiliaries together.
    """
    total = SampledGram(*(matrix.sum(axis=0) for matrix in parts))

    def alone(k):
        here = jnp.array([0, k])
        pair = SampledGram(*(matrix[here][:, here] for matrix in total))
        groups = SampledGram(*(matrix[:, here][:, :, here] for matrix in parts))
        found = theory.worth(pair)
        return {
            "worth": found.worth,
            "coefficient": found.coefficients[0],
            "critical_batch": theory.critical_batch(pair),
            "by_part": theory.worth(theory.by_group(groups)).worth,
            "centred": theory.worth(theory.centred(pair, MEMORY)).worth,
            "gain": jnp.stack([theory.relative_gain(pair, value) for value in COEFFICIENTS]),
            "larger": jnp.stack(
                [theory.worth(theory.at_batch_size(pair, f)).worth for f in LARGER]
            ),
        }

    each = [alone(k) for k in range(1, len(total.same))]
    found = jax.tree.map(lambda *values: jnp.stack(values), *each)
    return {**found, "joint": theory.worth(total).worth}


def jackknife(matrices: np.ndarray) -> dict[str, dict[str, Any]]:
    """`figures`, each with its "value", free of the bias of first order, and standard "error"."""
    count = matrices.shape[-1]
    grams = [sampled(matrices), *(sampled(matrices, r) for r in range(count))]
    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grams)
        found = jax.device_get(jax.jit(jax.vmap(figures))(stacked))
    result = {}
    for name, values in found.items():
        whole, left = values[0], values[1:]
        mean = left.mean(axis=0)
        error = np.sqrt((count - 1) / count * ((left - mean) ** 2).sum(axis=0))
        value = whole if name == "critical_batch" else count * whole - (count - 1) * mean
        result[name] = {"value": value.tolist(), "error": error.tolist()}
    return result


# ---------------------------------------------------------------------------------------------
# Along one training run
# ---------------------------------------------------------------------------------------------


def follow(setting: str, start: int, arguments: Run) -> pathlib.Path:
    """Follows a run of Detach and writes a row a point; returns the file.

    Until the run has ended, they are in a file beside it, which a further attempt goes on from: a
    point of a real model is half an hour.
    """
    file = file_of(arguments.folder, setting, start)
    unfinished = file.with_suffix(".unfinished")
    rows = read_rows(file if file.exists() else unfinished)
    if rows and rows[0]["objectives"] != list(arguments.objectives):
        raise ValueError(
            f"{file} has rows of the objectives {rows[0]['objectives']}, and "
            f"{list(arguments.objectives)} are asked for. Choose another --folder."
        )
    if file.exists():
        return file
    keep_compiled(pathlib.Path("runs/worth/compiled"))
    config = setting_of(setting)
    run = begin(
        # Objectives that compare the samples of a prompt need a row for each.
        dataclasses.replace(config, layout=dataclasses.replace(config.layout, pack=False)),
        start,
        mtp=regime("detach"),
        quick_rollouts=6 if arguments.quick else None,
    )
    config, task, programs, state = run
    last = config.rollouts - 1
    points = sorted({min(round(share * config.rollouts), last) for share in arguments.points})
    measure = gradients_of(run, arguments.objectives)
    methods = tuple(dict.fromkeys(AUXILIARIES[name].advantage for name in arguments.objectives))
    done = {row["rollout"] for row in rows if row["minibatches"] == arguments.minibatches}
    for number in range(max(points) + 1):
        rollout = collect(programs.rollout, run.policy(state), config, task, number)
        steps, count = -1, 0
        if number in points and number not in done:
            most = config.rollout.minibatches - 1
            steps = min(1 + points.index(number) % max(most, 1), most)
            count = arguments.minibatches
        others = further_minibatches(run, state, number, count, methods)
        for index, minibatch in enumerate(split(rollout.batch, config.rollout.minibatches)):
            if index == steps:
                row = {
                    "rollout": number,
                    "minibatch": index,
                    "minibatches": len(others),
                    "objectives": list(arguments.objectives),
                    "reward": rollout.metrics["reward"],
                    "commit": environment()["commit"],
                }
                row |= _measured([measure(state, *other) for other in others])
                rows = [other for other in rows if other["rollout"] != number] + [row]
                runs.write_rows(unfinished, runs.rounded(rows))
            state, _ = programs.train_step(state, minibatch)
    rows = [row for row in rows if row["rollout"] in points]
    runs.write_rows(file, sorted(runs.rounded(rows), key=lambda row: row["rollout"]))
    unfinished.unlink(missing_ok=True)
    return file


def _measured(gradients: list[dict[str, dict[str, np.ndarray]]]) -> dict[str, Any]:
    return {norm: jackknife(products([one[norm] for one in gradients])) for norm in gradients[0]}


def run(arguments: Run) -> int:
    """Measures every run that has no rows yet."""
    return follow_all(follow, arguments.settings, arguments.starts, arguments)


def candidates(arguments: Candidates) -> int:
    """Measures every part."""
    for part in CANDIDATES:
        run(
            Run(
                settings=part.settings,
                starts=arguments.starts,
                objectives=part.objectives,
                points=(POINTS[0], POINTS[2]),
                minibatches=arguments.minibatches,
                workers=arguments.workers,
                folder=arguments.folder / part.name,
            )
        )
    return 0


def main() -> int:
    """Reads the command line."""
    arguments = command_line(__doc__, Run, Candidates, Report)
    if isinstance(arguments, Report):
        return worth_report.report(arguments.folder, arguments.gains, arguments.output)
    if isinstance(arguments, Candidates):
        return candidates(arguments)
    if not arguments.quick:
        return run(arguments)
    few = dataclasses.replace(
        arguments,
        settings=arguments.settings[:1],
        starts=arguments.starts[:1],
        minibatches=16,
        workers=1,
        folder=QUICK if arguments.folder == RESULTS else arguments.folder,
    )
    return run(few) or worth_report.report(few.folder, None, QUICK.with_name("quick-report"))


if __name__ == "__main__":
    sys.exit(main())
