"""How close does each estimator of the coefficient come to c / v^2 of the expected gradients?

    python -m experiments.studies.estimator_fidelity run       all models of MODELS, resumable
    python -m experiments.studies.estimator_fidelity run --quick
    python -m experiments.studies.estimator_fidelity report    tables from the rows
    python -m experiments.studies.estimator_fidelity cost      operations of each estimator

One training run (policy loss, coefficient 0.2) is followed. At chosen rollouts, after one, two or
three of its four gradient steps, many further minibatches are drawn from the policy of that
rollout. Every estimator is applied to each of them, and its value compared with the truth from all
the others: c and v^2 of their mean gradients, at least 16 minibatches together. Averages over
training steps are applied to the run's own minibatches.

Cost: about three minutes a model on one core; the whole of MODELS about half an hour on two.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import runs
from experiments.configs import CONFIGS
from experiments.instruments import step_cost
from experiments.studies import fidelity_report
from experiments.studies.following import Followed, begin, further, inputs_of, one_core_processes
from occ import measures, trees
from occ.models.config import ModelConfig
from occ.models.parameters import is_shared
from occ.training.batch import Minibatch, split
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.gradient.inputs import StepInputs
from occ.training.gradient.micro_batches import Pass
from occ.training.gradient.placement import loss_gradients
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


@dataclasses.dataclass(frozen=True)
class Run:
    """Measures.

    Attributes:
      models: only these; empty for all of MODELS that have a configuration.
      minibatches: further minibatches at each point; the truth for one is from all others.
      stride: rollouts between points.
      seed: of the training run.
      workers: processes, each on one core.
      quick: one model, few points: two minutes.
      folder: of the rows.
    """

    models: tuple[str, ...] = ()
    minibatches: int = 24
    stride: int = 2
    seed: int = 0
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


# ---------------------------------------------------------------------------------------------
# Estimators on one minibatch
# ---------------------------------------------------------------------------------------------

ON_GRADIENTS: dict[str, measures.Measure] = {
    "exact": measures.gradients(),
    "first_layer": measures.gradients(measures.layer(0)),
    "last_layer": measures.gradients(measures.layer(-1)),
    "embedding": measures.gradients(measures.named("embedding")),
    "sketched_8": measures.sketched(8),
    "sketched_32": measures.sketched(32),
}
PARTS = ("first_layer", "last_layer", "embedding")
ROW_FRACTION = 0.125


def estimate(inputs: StepInputs, moments: Any, key: jax.Array) -> dict[str, Any]:
    """Every estimator on one minibatch.

    Returns:
      "gram": {name: float [2, 2]} of every estimator that has a Gram matrix; "ratio": {name:
      float []} of those that have c / v^2 alone; "gradients": (g, m), each {part: float [P]}.
    """
    whole = loss_gradients(inputs)
    shared = _shared(whole)
    step = jax.random.randint(key, (), 0, 2**30, jnp.int32)
    gram = {}
    for name, measure in ON_GRADIENTS.items():
        statistics = measure.reduce({"gradients": shared}, 1)
        start = step if name.startswith("sketched") else ()
        gram[name] = measure.update(statistics, start, None)[0].gram
    scaled = {path: moments[path] for path in shared[0]}
    arrays = {"gradients": shared, "second_moment": scaled}
    adam = measures.preconditioned()
    gram["preconditioned"] = adam.update(adam.reduce(arrays, 1), (), None)[0].gram
    rows = inputs.batch.tokens.shape[0]
    halves = tuple(
        _shared(loss_gradients(inputs.rows(part)))
        for part in (slice(0, rows // 2), slice(rows // 2, rows))
    )
    crossed, _ = measures.cross_fitted().update((shared, halves), (), None)
    gram["cross_fitted"] = crossed.gram
    few = slice(0, max(round(rows * ROW_FRACTION), 1))
    gram["row_subset"] = measures.gram_matrix(_shared(loss_gradients(inputs.rows(few))))
    ratio = {}
    for reference in ("main", "own"):
        evidence = _log_ratios(inputs, reference)
        gram[f"log_ratios_{reference}"] = _by_log_ratios("paper", evidence).gram
        for form in ("released_masked", "released_unmasked"):
            ratio[f"{form}_{reference}"] = _by_log_ratios(form, evidence).ratio
    flat = tuple(_by_part(gradient) for gradient in shared)
    return {"gram": gram, "ratio": ratio, "gradients": flat}


def _by_part(gradient: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The gradient as one flat vector for each of PARTS, and one for what is left."""
    pieces: dict[str, list[jax.Array]] = {name: [jnp.zeros(0)] for name in (*PARTS, "rest")}
    for path, leaf in gradient.items():
        top = path.split("/")[0]
        if top == "layers":
            pieces["first_layer"].append(jnp.ravel(leaf[0]))
            pieces["last_layer"].append(jnp.ravel(leaf[-1]))
            pieces["rest"].append(jnp.ravel(leaf[1:-1]))
        else:
            pieces["embedding" if top == "embedding" else "rest"].append(jnp.ravel(leaf))
    return {name: jnp.concatenate(piece) for name, piece in pieces.items()}


def _shared(losses: Pass) -> tuple[dict[str, jax.Array], ...]:
    """The gradients on shared leaves, by path."""
    return tuple(by_path(gradient) for gradient in losses.gradient)


def by_path(tree: Any) -> dict[str, jax.Array]:
    """The shared leaves by their paths."""
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: is_shared(trees.path_string(path)), tree
    )
    return trees.selected(tree, mask)


def _log_ratios(inputs: StepInputs, reference: str) -> dict[str, jax.Array]:
    batch = inputs.batch
    params = {**inputs.parts.blocks, **inputs.parts.readout, **inputs.parts.modules}
    main, head = inputs.stages.score(params)
    old = batch.old_log_prob if reference == "main" else batch.old_mtp_log_prob[0]
    predicted = batch.response_mask & inputs.stages.predictable(1)
    return {
        "main_log_ratio": jnp.where(batch.response_mask, main.log_prob - batch.old_log_prob, 0),
        "auxiliary_log_ratios": jnp.where(predicted, head.log_prob - old, 0)[None],
        "response_mask": batch.response_mask,
    }


def _by_log_ratios(form: str, evidence: dict[str, jax.Array]) -> measures.Measurement:
    measure = measures.log_ratios(form)
    return measure.update(measure.reduce(evidence, 1), (), None)[0]


# ---------------------------------------------------------------------------------------------
# Along one training run
# ---------------------------------------------------------------------------------------------


def follow(name: str, arguments: Run) -> pathlib.Path:
    """Follows one training run and writes a row a point; returns the file."""
    file = arguments.folder / f"{name}.jsonl"
    if file.exists():
        return file
    setting, change = MODELS[name]
    quick_rollouts = 6 if arguments.quick else None
    run = begin(change(CONFIGS[setting]()), seed=arguments.seed, quick_rollouts=quick_rollouts)
    config, task, programs, state = run
    measure = _compiled(run)
    lines: list[dict[str, Any]] = []
    own: list[dict[str, Any]] = []
    for number in range(config.rollouts):
        rollout = collect(programs.rollout, run.policy(state), config, task, number)
        point = number % arguments.stride == arguments.stride - 1
        # One, two or three steps after the rollout, in turn: the proxy has nothing to say before.
        steps = 1 + (number // arguments.stride) % (config.rollout.minibatches - 1)
        others = _others(run, state, number, arguments.minibatches) if point else []
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
                        **compare(measured, [one["gram"]["exact"] for one in own]),
                    }
                )
            own[-1].pop("gradients")
            state, _ = programs.train_step(state, minibatch)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(_rounded(line)) + "\n" for line in lines)
    runs.replace_text(file, text)
    return file


def _compiled(run: Followed) -> Callable[..., dict[str, Any]]:
    @jax.jit
    def compute(state: TrainState, batch: Minibatch, key: jax.Array):
        moments = by_path(second_moment(state.opt_state, run.config.optimizer))
        return estimate(inputs_of(run, state, batch), moments, key)

    return lambda *inputs: jax.device_get(compute(*inputs))


def _others(run: Followed, state: TrainState, number: int, count: int) -> list[Minibatch]:
    """Further minibatches from the policy of this rollout."""
    per_rollout = run.config.rollout.minibatches
    batches: list[Minibatch] = []
    for extra in range(-(-count // per_rollout)):
        batches += split(further(run, state, 1000 * number + extra), per_rollout)
    return batches[:count]


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


AVERAGES = {"exact": (0.0, 1), "smoothed_0.9": (0.9, 1), "smoothed_0.9_every_5": (0.9, 5)}
AVERAGES |= {"smoothed_0.8_every_5": (0.8, 5), "every_5": (0.0, 5), "smoothed_0.97": (0.97, 1)}
"""Decay and interval of averages over the run's own minibatches."""


def _moving_averages(grams: np.ndarray) -> dict[str, list[float]]:
    """c and v^2 of every average after the run's last minibatch."""
    result = {}
    for name, (decay, every) in AVERAGES.items():
        total, weight = np.zeros((2, 2)), 0.0
        for gram in grams[::every]:
            total, weight = decay * total + (1 - decay) * gram, decay * weight + 1 - decay
        result[name] = [float(total[0, 1] / weight), float(total[1, 1] / weight)]
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value if isinstance(value, int) else float(f"{float(value):.5g}")


def run(arguments: Run) -> int:
    """Measures every model that has no rows yet."""
    if arguments.quick:
        arguments = dataclasses.replace(
            arguments,
            models=arguments.models or ("arithmetic_easy",),
            minibatches=17,
            folder=pathlib.Path("runs/fidelity/quick"),
            workers=1,
        )
    names = arguments.models or tuple(n for n, (setting, _) in MODELS.items() if setting in CONFIGS)
    unknown = sorted(set(names) - set(MODELS))
    if unknown or arguments.minibatches < 17:
        raise ValueError(
            f"estimator_fidelity: expected models in {sorted(MODELS)} and at least 17 minibatches "
            f"(16 for the truth and one to estimate from), got {unknown or arguments.minibatches}."
        )
    if arguments.workers == 1:
        for name in names:
            print(follow(name, arguments))
        return 0
    with one_core_processes(arguments.workers) as pool:
        for file in pool.map(follow, names, [arguments] * len(names)):
            print(file)
    return 0


# ---------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------

COSTED: dict[str, MTPTrainingConfig] = {
    "exact": MTPTrainingConfig(),
    "first_layer": MTPTrainingConfig(measure="first_layer"),
    "last_layer": MTPTrainingConfig(measure="last_layer"),
    "embedding": MTPTrainingConfig(measure="embedding"),
    "preconditioned": MTPTrainingConfig(measure="preconditioned"),
    "cross_fitted": MTPTrainingConfig(measure="cross_fitted"),
    "sketched_8": MTPTrainingConfig(measure="sketched"),
    "row_subset": MTPTrainingConfig(measure="row_subset", placement="fused"),
    "readout": MTPTrainingConfig(measure="readout", placement="fused"),
    "log_ratios_main": MTPTrainingConfig(measure="log_ratios", placement="fused"),
}


def cost(arguments: Cost) -> int:
    """Compiles a step under every estimator; a step between measurements costs a fused one."""
    size = step_cost.Arguments(repeats=0)
    model: ModelConfig = step_cost.model_config(size, "none")
    batch = step_cost.minibatch(size)
    detach = _operations(
        model, MTPTrainingConfig(loss="ce", rule="detach", placement="fused"), batch
    )
    ratios = {name: _operations(model, mtp, batch) / detach for name, mtp in COSTED.items()}
    fused, exact = ratios["log_ratios_main"], ratios["exact"]
    for name, (_, every) in AVERAGES.items():
        ratios[name] = (exact + (every - 1) * fused) / every
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(arguments.folder / "cost.json", {k: round(v, 4) for k, v in ratios.items()})
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:.3f}")
    return 0


def _operations(model: ModelConfig, mtp: MTPTrainingConfig, batch: Minibatch) -> float:
    compiled, _ = step_cost.compile_step(model, mtp, batch)
    return float(compiled.cost_analysis()["flops"])


def main() -> int:
    """Reads the command line."""
    Command = (
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Cost, tyro.conf.subcommand("cost")]
    )
    arguments = tyro.cli(Command, description=__doc__)  # type: ignore[call-overload]
    if isinstance(arguments, Run):
        return run(arguments)
    if isinstance(arguments, Cost):
        return cost(arguments)
    return fidelity_report.report(arguments.folder, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
