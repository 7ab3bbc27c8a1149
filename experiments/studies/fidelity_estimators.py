"""Estimators of the coefficient, each applied to one minibatch, and what a step costs with each."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments import runs
from experiments.instruments import step_cost
from occ import measures, trees
from occ.models.config import ModelConfig
from occ.models.parameters import is_shared
from occ.training.batch import Minibatch
from occ.training.config import MTPTrainingConfig
from occ.training.gradient.inputs import StepInputs
from occ.training.gradient.micro_batches import Pass
from occ.training.gradient.placement import loss_gradients

AVERAGES = {"exact": (0.0, 1), "smoothed_0.9": (0.9, 1), "smoothed_0.9_every_5": (0.9, 5)}
AVERAGES |= {"smoothed_0.8_every_5": (0.8, 5), "every_5": (0.0, 5), "smoothed_0.97": (0.97, 1)}
"""Decay and interval of averages over the run's own minibatches."""


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
    shared = shared_gradients(whole)
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
        shared_gradients(loss_gradients(inputs.rows(part)))
        for part in (slice(0, rows // 2), slice(rows // 2, rows))
    )
    crossed, _ = measures.cross_fitted().update((shared, halves), (), None)
    gram["cross_fitted"] = crossed.gram
    few = slice(0, max(round(rows * ROW_FRACTION), 1))
    gram["row_subset"] = measures.gram_matrix(shared_gradients(loss_gradients(inputs.rows(few))))
    ratio = {}
    for reference in ("main", "own"):
        evidence = _log_ratios(inputs, reference)
        gram[f"log_ratios_{reference}"] = _by_log_ratios("paper", evidence).gram
        for form in ("released_masked", "released_unmasked"):
            ratio[f"{form}_{reference}"] = _by_log_ratios(form, evidence).ratio
    flat = tuple(by_part(gradient) for gradient in shared)
    return {"gram": gram, "ratio": ratio, "gradients": flat}


def by_part(gradient: dict[str, jax.Array]) -> dict[str, jax.Array]:
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


def folded(vector: jax.Array, entries: int, key: jax.Array) -> jax.Array:
    """A vector as it is, or, if it is longer, each `entries`-th with random signs added up.

    Inner products of vectors that are folded with the same key are kept in expectation; their
    standard error is about ||a|| ||b|| / sqrt(entries). Of the mean over pairs of minibatches, the
    noise's part has an error for each pair, and the expected gradients' part one for all of them:
    their cosine is known to 1e-3 with FOLDED entries, which no jackknife shows.

    Args:
      vector: float [P].
      entries: of the result, at the most.
      key: of the signs.

    Reference: Charikar, Chen and Farach-Colton, Finding Frequent Items in Data Streams, 2002 (whose
    hash of a place is here the remainder).
    """
    if vector.size <= entries:
        return vector
    signed = jnp.where(jax.random.bits(key, vector.shape, "uint8") < 128, vector, -vector)
    return jnp.pad(signed, (0, -vector.size % entries)).reshape(-1, entries).sum(axis=0)


def shared_gradients(losses: Pass) -> tuple[dict[str, jax.Array], ...]:
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


def cost(folder: pathlib.Path) -> int:
    """Compiles a step under every estimator, and writes operations beside Detach's to cost.json.

    A step between measurements costs a fused one.
    """
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
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "cost.json", {k: round(v, 4) for k, v in ratios.items()})
    for name, ratio in ratios.items():
        print(f"{name:24} {ratio:.3f}")
    return 0


def _operations(model: ModelConfig, mtp: MTPTrainingConfig, batch: Minibatch) -> float:
    compiled, *_ = step_cost.compile_step(model, mtp, batch)
    return float(compiled.cost_analysis()["flops"])
