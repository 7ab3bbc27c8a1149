"""Is what the decomposition predicts of one step what the step does, on data that it has not seen?

    python -m experiments.studies.one_step run       a row a point of every run, resumable
    python -m experiments.studies.one_step run --quick
    python -m experiments.studies.one_step report    slopes and a scatter from the committed rows

Training runs (policy loss, coefficient 0.2) are followed, each from a warm start of its own. After
one, two or three of the gradient steps of every other rollout, its next minibatch gives directions
g and m, and a further rollout of the same policy the objective J: the clipped RL objective on fresh
prompts. A step of the length that the run's optimizer takes there goes along g + lambda m,
lambda = 1, and along g alone. What m contributes to J is the difference, and is compared with four
predictions of it:

    believed        eta lambda <g, m>, both from the minibatch: what OCC reads
    cross_fitted    the same between halves of the minibatch
    first_order     eta lambda <grad J, m>, from the fresh data
    second_order    with the curvature of J on the fresh data, by Hessian-vector products

A slope of realised on predicted of 1 is a calibrated prediction.

Cost: three minutes a run and core.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import runs
from experiments.configs import CONFIGS
from experiments.studies import claims_rows
from experiments.studies.command_line import command_line
from experiments.studies.following import (
    STARTS,
    Followed,
    begin,
    file_of,
    follow_all,
    further,
    inputs_of,
    read_followed,
)
from occ import theory
from occ.evaluation.intervals import mean_interval
from occ.measures import inner_product
from occ.models.parameters import is_shared, partition
from occ.training.batch import Minibatch, split
from occ.training.durable.run_folder import environment
from occ.training.gradient.inputs import StepInputs
from occ.training.gradient.losses import rl_loss
from occ.training.gradient.placement import loss_gradients
from occ.training.rollout import collect
from occ.training.state import TrainState

RESULTS = pathlib.Path(__file__).parent / "results" / "one_step"
PREDICTIONS = ("believed", "cross_fitted", "first_order", "second_order")
LAMBDA = 1.0


@dataclasses.dataclass(frozen=True)
class Run:
    """Measures.

    Attributes:
      settings: configurations.
      starts: seeds of the warm starts.
      stride: rollouts between points.
      workers: processes, each on one core.
      quick: one setting from one start, four rollouts after a short warm start.
      folder: of the rows.
    """

    settings: tuple[str, ...] = ("arithmetic_easy", "filtering_easy", "star_easy")
    starts: tuple[int, ...] = STARTS
    stride: int = 2
    workers: int = 2
    quick: bool = False
    folder: pathlib.Path = RESULTS


@dataclasses.dataclass(frozen=True)
class Report:
    """Slopes and a scatter.

    Attributes:
      folder: of the rows.
      output: for table.md and the figure.
    """

    folder: pathlib.Path = RESULTS
    output: pathlib.Path = pathlib.Path("runs/one_step/report")


def follow(setting: str, start: int, arguments: Run) -> pathlib.Path:
    """Follows one training run and writes a row a point; returns the file."""
    file = file_of(arguments.folder, setting, start)
    if file.exists():
        return file
    run = begin(CONFIGS[setting](), start, quick_rollouts=4 if arguments.quick else None)
    config, task, programs, state = run
    measure = _compiled(run)
    lines = []
    for number in range(config.rollouts):
        rollout = collect(programs.rollout, run.policy(state), config, task, number)
        if number % arguments.stride == arguments.stride - 1:
            fresh = further(run, state, number)
            wanted = 1 + (number // arguments.stride) % (config.rollout.minibatches - 1)
        else:
            fresh, wanted = None, -1
        for index, minibatch in enumerate(split(rollout.batch, config.rollout.minibatches)):
            before = jax.tree.map(jnp.array, state.params) if index == wanted else None
            given = jax.tree.map(jnp.array, state) if index == wanted else None
            state, _ = programs.train_step(state, minibatch)
            if given is not None:
                moved = jax.tree.map(jnp.subtract, state.params, before)
                length = jnp.sqrt(inner_product(_shared(moved), _shared(moved)))
                row = jax.device_get(measure(given, minibatch, fresh, length))
                at = {"rollout": number, "minibatch": index, "commit": environment()["commit"]}
                lines.append(at | runs.rounded(row))
    runs.write_rows(file, lines)
    return file


def _compiled(run: Followed) -> Callable[..., Any]:
    def ascent(inputs: StepInputs) -> list[Any]:
        """g and m, zero on the modules' own parameters."""
        return [
            jax.tree.map(jnp.negative, _shared(gradient))
            for gradient in loss_gradients(inputs).gradient
        ]

    @jax.jit
    def measure(state: TrainState, batch: Minibatch, fresh: Minibatch, length: jax.Array):
        inputs = inputs_of(run, state, batch)
        g, m = ascent(inputs)
        rows = batch.tokens.shape[0]
        halves = [
            ascent(inputs.rows(part)) for part in (slice(0, rows // 2), slice(rows // 2, rows))
        ]
        (g_first, m_first), (g_second, m_second) = halves
        cross = (inner_product(g_first, m_second) + inner_product(g_second, m_first)) / 2
        stages = inputs_of(run, state, fresh).stages

        def objective(params):
            parts = partition(params)
            scores = stages.head(parts, stages.trunk(parts).hidden, 0)
            return -rl_loss(scores, fresh, run.config)[0]

        joint = jax.tree.map(lambda a, b: a + LAMBDA * b, g, m)
        step_size = length / jnp.sqrt(inner_product(joint, joint))
        with_m = theory.check_step(objective, state.params, (g, m), LAMBDA, step_size=step_size)
        without = theory.check_step(objective, state.params, (g, m), 0.0, step_size=step_size)
        gain = jax.tree.map(jnp.subtract, with_m, without)
        return {
            "step_size": step_size,
            "believed": step_size * LAMBDA * inner_product(g, m),
            "cross_fitted": step_size * LAMBDA * cross,
            "first_order": gain.first_order,
            "second_order": gain.second_order,
            "realised": gain.realised,
            "main_realised": without.realised,
            "main_second_order": without.second_order,
        }

    return measure


def _shared(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with zeros on the modules' own parameters."""
    return {
        name: part if is_shared(name) else jax.tree.map(jnp.zeros_like, part)
        for name, part in tree.items()
    }


def column(points: list[dict[str, Any]], name: str) -> np.ndarray:
    """One figure of all points."""
    return np.array([point[name] for point in points])


def slope(points: list[dict[str, Any]], name: str) -> float:
    """Slope of realised on predicted through the origin."""
    predicted = column(points, name)
    return float(np.sum(predicted * column(points, "realised")) / np.sum(predicted**2))


def correlation(points: list[dict[str, Any]], name: str) -> float:
    """Of realised and predicted."""
    return float(np.corrcoef(column(points, name), column(points, "realised"))[0, 1])


def report(folder: pathlib.Path, output: pathlib.Path) -> int:
    """Prints and writes the table, and draws the scatter; returns the exit status."""
    found = read_followed(folder, "one_step")
    settings = sorted({setting for setting, _ in found})
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        "Means and 95 % intervals over starts.\n",
        "| setting | starts, points | prediction | slope | correlation |",
        "|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(
        len(settings),
        len(PREDICTIONS),
        figsize=(3 * len(PREDICTIONS), 2.9 * len(settings)),
        layout="constrained",
        squeeze=False,
    )
    for row, setting in zip(axes, settings, strict=True):
        several = [points for (name, _), points in found.items() if name == setting]
        for axis, name in zip(row, PREDICTIONS, strict=True):
            slopes = mean_interval([slope(points, name) for points in several])
            shown = claims_rows.show(slopes, 1, 2, signed=False)
            correlations = mean_interval([correlation(points, name) for points in several])
            lines.append(
                f"| {setting} | {len(several)}, {sum(map(len, several))} | {name} | {shown} | "
                f"{claims_rows.show(correlations, 1, 2, signed=False)} |"
            )
            for points in several:
                axis.scatter(column(points, name), column(points, "realised"), s=6)
            ends = np.array(axis.get_xlim())
            axis.plot(ends, slopes.mean * ends, color="tab:red", label=f"slope {shown}")
            axis.plot(ends, ends, color="black", linewidth=0.6, linestyle="--")
            axis.axhline(0, color="black", linewidth=0.4)
            axis.set(title=name, xlabel="predicted", ylabel=f"realised, {setting}")
            axis.ticklabel_format(style="sci", scilimits=(0, 0))
            axis.legend(fontsize="x-small")
    runs.save_figure(output / "one_step.png", figure, dpi=120)
    plt.close(figure)
    text = "\n".join(lines)
    runs.replace(output / "table.md", text + "\n")
    print(text)
    print(f"\n{output}: table.md, one_step.png")
    return 0


def main() -> int:
    """Reads the command line."""
    arguments = command_line(__doc__, Run, Report)
    if isinstance(arguments, Report):
        return report(arguments.folder, arguments.output)
    if arguments.quick:
        arguments = dataclasses.replace(
            arguments,
            settings=arguments.settings[:1],
            starts=arguments.starts[:1],
            workers=1,
            folder=pathlib.Path("runs/one_step/quick"),
        )
    return follow_all(follow, arguments.settings, arguments.starts, arguments)


if __name__ == "__main__":
    sys.exit(main())
