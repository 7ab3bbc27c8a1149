"""The same minibatch in every layout: how far loss, coefficient and gradients are from each other.

Claim: meshes, micro-batches, chunks of logits and packing change nothing but rounding.
Command: python -m experiments.instruments.layout_matrix
Cost: five minutes on two CPU cores, which simulate eight devices.

One production train step is run in each layout, and compared with one device and the whole, padded
minibatch: differences of loss and v^2 relative to themselves, of c relative to ||g|| ||m||, of the
coefficient relative to ||g|| / ||m||, of Adam's first moment (the gradient, after clipping) as the
largest of the leaves' relative norms. Several processes: pytest -m release tests/test_processes.py.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

from experiments import runs
from occ.models.config import ModelConfig, MTPConfig
from occ.models.policy import abstract_policy
from occ.training.batch import Minibatch, positions_from_segments
from occ.training.config import LayoutConfig, RolloutConfig, TrainConfig
from occ.training.durable.run_folder import environment
from occ.training.packing import pack
from occ.training.processes import to_mesh
from occ.training.programs import (
    abstract_state,
    fresh_state,
    init_policy,
    jit_train_step,
)
from occ.training.regimes import regime
from occ.training.sharding import batch_shardings, make_mesh

MESHES = {
    "1 device": LayoutConfig(),
    "data 8": LayoutConfig(data=8),
    "fsdp 8": LayoutConfig(fsdp=8),
    "fsdp 4, tensor 2": LayoutConfig(fsdp=4, tensor=2),
    "data 2, fsdp 2, tensor 2": LayoutConfig(data=2, fsdp=2, tensor=2),
}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
REGIMES = ("occ", "occ_paper")
ROWS, LENGTH, VOCAB = 32, 24, 64


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the matrix.

    Attributes:
      dtypes: of parameters and computation.
      folder: for result.json and table.md.
    """

    dtypes: tuple[str, ...] = ("float64", "float32")
    folder: pathlib.Path = pathlib.Path("runs/layout_matrix")


def layouts() -> dict[str, LayoutConfig]:
    """Every layout by its name, the one to compare with first."""
    found = dict(MESHES)
    for parts in (2, 4):
        found[f"1 device, {parts} micro-batches"] = LayoutConfig(micro_batches=parts)
    found["1 device, packed"] = LayoutConfig(pack=True, sequences_per_row=4)
    found["1 device, logits of 5 columns"] = LayoutConfig(logits_chunk=5)
    together: dict[str, Any] = {
        "micro_batches": 2,
        "logits_chunk": 5,
        "pack": True,
        "sequences_per_row": 4,
    }
    mesh = MESHES["data 2, fsdp 2, tensor 2"]
    found["data 2, fsdp 2, tensor 2, and all of these"] = dataclasses.replace(mesh, **together)
    return found


def configuration(name: str, dtype: str) -> TrainConfig:
    """A small decoder with one MTP module."""
    model = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=64,
        max_length=LENGTH,
        param_dtype=dtype,
        compute_dtype=dtype,
        tied_embeddings=False,
        mtp=MTPConfig(num_modules=1),
    )
    rollout = RolloutConfig(prompts=ROWS // 8, samples=8, minibatches=1)
    return TrainConfig(
        name="layout_matrix", model=model, task="arithmetic", rollout=rollout, mtp=regime(name)
    )


def minibatch(dtype: str) -> Minibatch:
    """Random sequences of various lengths, left-padded, somewhat off policy."""
    rng = np.random.default_rng(0)
    shape = (ROWS, LENGTH)
    lengths = rng.integers(6, LENGTH + 1, ROWS)
    present = np.arange(LENGTH)[None] >= LENGTH - lengths[:, None]
    response = np.arange(LENGTH)[None] >= LENGTH - lengths[:, None] // 2
    segment_ids = present.astype(np.int32)

    def around(level, shape=shape):
        return np.where(present, rng.normal(level, 0.3, shape), 0).astype(dtype)

    old = around(-np.log(VOCAB))
    advantages = np.where(response, rng.normal(size=(ROWS, 1)), 0).astype(dtype)
    return Minibatch(
        tokens=np.where(present, rng.integers(1, VOCAB, shape), 0).astype(np.int32),
        segment_ids=segment_ids,
        positions=np.asarray(positions_from_segments(jnp.asarray(segment_ids))),
        response_mask=response,
        advantages=advantages,
        old_log_prob=old,
        old_mtp_log_prob=around(-np.log(VOCAB))[None],
        rollout_log_prob=old,
        reference_log_prob=np.zeros(shape, dtype),
    )


def one_step(config: TrainConfig, batch: Minibatch) -> tuple[Any, Any]:
    """State and metrics after a production step in the configuration's layout, on the host."""
    policy = abstract_policy(config.model)
    mesh = make_mesh(config.layout)
    # The same values in every layout: born on one device, then moved.
    start = jax.device_get(init_policy(dataclasses.replace(config, layout=LayoutConfig())))
    with jax.set_mesh(mesh):
        like = abstract_state(config, policy, mesh)
        fresh = jax.device_get(fresh_state(config, start))
        state = jax.device_put(fresh, jax.tree.map(lambda leaf: leaf.sharding, like))
        step = jit_train_step(config, mesh, like)
        if config.layout.pack:
            per_row = config.layout.sequences_per_row
            batch = pack(batch, length=LENGTH, sequences_per_row=per_row, rows=ROWS * 3 // 4)
        return jax.device_get(step(state, to_mesh(batch, batch_shardings(mesh))))


def first_moment(state: Any) -> Any:
    """Adam's, like the parameters."""

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    (adam,) = (s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    return adam.mu


def differences(got: tuple[Any, Any], expected: tuple[Any, Any]) -> dict[str, float]:
    """Relative differences of one layout from another."""
    (state, metrics), (reference, wanted) = got, expected
    gram = np.asarray(reference.calibration.gram, np.float64)
    norms = np.sqrt(gram[0, 0]), np.sqrt(gram[1, 1])
    new = np.asarray(state.calibration.gram, np.float64)
    weight = state.calibration.weights[1] - reference.calibration.weights[1]
    pairs = zip(
        jax.tree.leaves(first_moment(state)), jax.tree.leaves(first_moment(reference)), strict=True
    )
    gradient = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs if b.any()]
    return {
        "loss": float(abs(metrics["loss/rl"] / wanted["loss/rl"] - 1)),
        "c": float(abs(new[0, 1] - gram[0, 1]) / (norms[0] * norms[1])),
        "v^2": float(abs(new[1, 1] / gram[1, 1] - 1)),
        "coefficient": float(abs(weight) / (norms[0] / norms[1])),
        "gradient": max(gradient),
    }


def measure(dtype: str) -> dict[str, dict[str, float]]:
    """Differences of all layouts in one dtype, by "regime, layout"."""
    found: dict[str, dict[str, float]] = {}
    with jax.enable_x64(dtype == "float64"):
        batch = minibatch(dtype)
        for name in REGIMES:
            config = configuration(name, dtype)
            reference = one_step(config, batch)
            for label, layout in tqdm.tqdm(layouts().items(), desc=f"{name}, {dtype}"):
                got = one_step(dataclasses.replace(config, layout=layout), batch)
                found[f"{name}, {label}"] = differences(got, reference)
    return found


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row a dtype, regime and layout."""
    names = ("loss", "c", "v^2", "coefficient", "gradient")
    lines = ["| dtype, regime, layout | " + " | ".join(names) + " |", "|---" * 6 + "|"]
    for dtype, rows in results.items():
        for label, row in rows.items():
            cells = [f"{row[name]:.0e}" for name in names]
            lines.append(f"| {dtype}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and writes; exit status 1 if a layout differs by more than rounding."""
    arguments = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_num_cpu_devices", 8)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = {dtype: measure(dtype) for dtype in arguments.dtypes}
    text = table(results)
    print(text)
    runs.replace(arguments.folder / "table.md", text + "\n")
    runs.write_json(arguments.folder / "result.json", {"differences": results, **environment()})
    worst = {
        dtype: max(value for row in rows.values() for value in row.values())
        for dtype, rows in results.items()
    }
    print(f"largest: {worst}; allowed: {TOLERANCE}")
    return int(any(worst[dtype] > TOLERANCE[dtype] for dtype in worst))


if __name__ == "__main__":
    sys.exit(main())
