"""What a train step costs in each regime, beside Detach, on one model in one run.

Claim: OCC from log-ratios in the fused placement costs what joint training costs: the MTP loss's
backward pass through the output head's weights and the module's projection, 2DV + 4D^2 operations a
token, and nothing more. OCC from the exact gradients pays a second backward pass through the trunk.
Command: python -m experiments.instruments.step_cost
Cost: three minutes on two CPU cores.

Operations are the compiler's own count of the compiled step, with unrolled layers, since it counts
the body of a loop once; temporary memory is its allocation plan; wall time is the median over
rounds in which the regimes take turns, and its ratio the geometric mean over rounds with a 95 %
Student-t interval. Of a regime that measures at every n-th step, operations and time are the mean
over n steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from experiments import runs
from experiments.instruments.chips import this_chip
from experiments.instruments.flops import matrix_flops
from occ.evaluation.intervals import ratio_interval
from occ.models.config import LoRAConfig, ModelConfig, MTPConfig
from occ.models.policy import new_policy
from occ.training.batch import Minibatch, positions_from_segments
from occ.training.config import LayoutConfig, MTPTrainingConfig, TrainConfig
from occ.training.durable.run_folder import environment
from occ.training.gradient.calibration import build_calibration
from occ.training.gradient.cotangents import rl_gradient
from occ.training.gradient.inputs import step_inputs
from occ.training.optimizer import build_optimizer
from occ.training.regimes import RegimeName, regime
from occ.training.state import init_state
from occ.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      layers, width, vocab: of the model; heads of 64, MLP of four widths, one MTP module.
      rows, length: of the minibatch, sequences and tokens a sequence.
      regimes: what is measured, detach first: ratios are to it.
      repeats: timed steps a regime; 0 leaves the clock out.
      remat: rematerialisation settings to measure.
      dtype: of computation.
      scan: layers in a loop, as production has them; the compiler then counts operations of one
        layer alone, and theirs are those of the traced program.
      logits_chunk: measure every regime, and the RL loss alone, again with the logits of so many
        columns at a time (whose operations the compiler counts for one chunk alone); 0 leaves that
        out.
      lora_rank: measure every regime again with adapters of this rank on all kernels, the rest of
        the trunk frozen, as it is and in eight bits; 0 leaves that out.
      folder: for result.json and table.md.
    """

    layers: int = 6
    width: int = 256
    vocab: int = 128
    rows: int = 8
    length: int = 64
    regimes: tuple[RegimeName, ...] = ("detach", "ce", "policy", "occ_paper", "occ")
    repeats: int = 40
    remat: tuple[str, ...] = ("none", "full")
    dtype: str = "float32"
    scan: bool = False
    logits_chunk: int = 0
    lora_rank: int = 0
    folder: pathlib.Path = pathlib.Path("runs/step_cost")

    def __post_init__(self):
        if self.regimes[:1] != ("detach",):
            raise ValueError(
                f"step_cost: expected 'detach' first, the base of ratios, got {list(self.regimes)}."
            )


def model_config(arguments: Arguments, remat: str) -> ModelConfig:
    """The model, its layers unrolled."""
    return ModelConfig(
        vocab_size=arguments.vocab,
        num_layers=arguments.layers,
        width=arguments.width,
        num_heads=max(arguments.width // 64, 1),
        num_kv_heads=max(arguments.width // 64, 1),
        head_dim=64,
        mlp_width=4 * arguments.width,
        max_length=arguments.length,
        compute_dtype=arguments.dtype,
        scan_layers=arguments.scan,
        remat=remat,  # type: ignore[arg-type]
        mtp=MTPConfig(num_modules=1),
    )


def minibatch(arguments: Arguments, seed: int = 0) -> Minibatch:
    """Random tokens, the second half of each row a response, slightly off policy."""
    rng = np.random.default_rng(seed)
    shape = (arguments.rows, arguments.length)
    segment_ids = jnp.ones(shape, jnp.int32)

    def around(level):
        return jnp.asarray(rng.normal(level, 0.1, shape), jnp.float32)

    old = around(-np.log(arguments.vocab))
    response = np.broadcast_to(np.arange(shape[1]) >= shape[1] // 2, shape)
    return Minibatch(
        tokens=jnp.asarray(rng.integers(0, arguments.vocab, shape), jnp.int32),
        segment_ids=segment_ids,
        positions=positions_from_segments(segment_ids),
        response_mask=jnp.asarray(response),
        advantages=around(0.0),
        old_log_prob=old,
        old_mtp_log_prob=old[None],
        rollout_log_prob=old,
        reference_log_prob=jnp.zeros(shape, jnp.float32),
    )


def compile_step(
    model: ModelConfig, mtp: MTPTrainingConfig, batch: Minibatch, logits_chunk: int = 0
) -> tuple[Any, Any, float]:
    """The compiled step, which donates its state; a state for it; operations of its products.

    These are the traced program's with attention left to the compiler, since those of a kernel are
    not seen there: rematerialised ones count too.
    """
    layout = LayoutConfig(logits_chunk=logits_chunk)
    config = TrainConfig(name="step_cost", model=model, task="arithmetic", mtp=mtp, layout=layout)
    policy = new_policy(model)
    calibration = build_calibration(mtp, model.mtp.num_modules)
    state = init_state(policy, build_optimizer(config.optimizer), calibration)
    prompt_columns = batch.tokens.shape[1] // 2
    step = jax.jit(make_train_step(config, prompt_columns=prompt_columns), donate_argnums=0)
    plain = dataclasses.replace(config, model=dataclasses.replace(model, attention="xla"))
    traced = jax.jit(make_train_step(plain, prompt_columns=prompt_columns)).trace(state, batch)
    products = matrix_flops(traced.jaxpr)
    return step.lower(state, batch).compile(), jax.tree.map(jnp.array, state), products


def measure(arguments: Arguments, remat: str) -> dict[str, dict[str, float]]:
    """Operations, temporary bytes and seconds a step of every regime."""
    batch = minibatch(arguments)
    model = model_config(arguments, remat)
    compiled, states, products, every = {}, {}, {}, {}
    in_turn: dict[str, list[tuple[float, float]]] = {}
    chunks = (0, arguments.logits_chunk) if arguments.logits_chunk else (0,)
    adapters: dict[str, LoRAConfig | None] = {"": None}
    if rank := arguments.lora_rank:
        adapters[f", adapters of rank {rank}"] = LoRAConfig(rank=rank)
        adapters[f", adapters of rank {rank} beside eight bits"] = LoRAConfig(
            rank=rank, quantised="int8"
        )
    variants = list(itertools.product(adapters.items(), chunks, arguments.regimes))
    for (suffix, lora), chunk, name in tqdm.tqdm(variants, desc=f"compile, remat {remat}"):
        label = f"{name}, logits of {chunk} columns" if chunk else name
        label += suffix
        adapted, mtp = dataclasses.replace(model, lora=lora), regime(name)
        made = compile_step(adapted, mtp, batch, chunk)
        compiled[label], states[label], products[label] = made
        every[label] = mtp.every
        if mtp.every > 1:
            for one in _in_turn(mtp):
                program, _, dots = compile_step(adapted, one, batch, chunk)
                counted = float(program.cost_analysis()["flops"]), dots
                in_turn.setdefault(label, []).append(counted)

    def run(name):
        for _ in range(every[name]):
            states[name], metrics = compiled[name](states[name], batch)
        jax.block_until_ready((states[name], metrics))

    costs = _costs(compiled, run, arguments.repeats, every)
    for name, cost in costs.items():
        if name in in_turn:
            cost["flops"] = _usual([counted for counted, _ in in_turn[name]], every[name])
            products[name] = _usual([dots for _, dots in in_turn[name]], every[name])
        cost["products"] = products[name]
        held = (states[name].opt_state, states[name].params)  # and gradients like these
        cost["trained_bytes"] = float(sum(leaf.nbytes for leaf in jax.tree.leaves(held)))
        cost["frozen_bytes"] = float(
            sum(leaf.nbytes for leaf in jax.tree.leaves(states[name].rest))
        )
        if arguments.scan:  # of which the compiler counts one layer
            cost["flops"] = products[name]
    return costs


def _in_turn(mtp: MTPTrainingConfig) -> tuple[MTPTrainingConfig, MTPTrainingConfig]:
    """A step that measures, and one of those in between."""
    alone = dataclasses.replace(mtp, every=1)
    between = dataclasses.replace(
        alone,
        rule="fixed",
        rule_options={},
        measure="log_ratios",
        measure_options={},
        smoothing=0.0,
        placement="fused",
    )
    return alone, between


def _usual(costs: Sequence[float], every: int) -> float:
    """Of the mean step, where every so many-th has the first cost and the others the second."""
    return (costs[0] + (every - 1) * costs[1]) / every


def measure_head(arguments: Arguments) -> dict[str, dict[str, float]]:
    """The same of the RL loss alone: from the trunk's output to its gradients, whole and in chunks.

    Every layer of the step has memory of its own; here there is nothing but the loss.
    """
    batch = minibatch(arguments)
    model = model_config(arguments, "none")
    config = TrainConfig(name="step_cost", model=model, task="arithmetic")
    policy = new_policy(model)
    shape = (*batch.tokens.shape, arguments.width)
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def compiled_head(chunk):
        cut = dataclasses.replace(config, layout=LayoutConfig(logits_chunk=chunk))

        def gradient(policy, hidden):
            inputs = step_inputs(policy, batch, cut, prompt_columns=arguments.length // 2)
            head = rl_gradient(inputs, hidden)
            return head.gradient, head.output.metrics

        return jax.jit(gradient).lower(policy, hidden).compile()

    compiled = {
        "whole": compiled_head(0),
        f"logits of {arguments.logits_chunk} columns": compiled_head(arguments.logits_chunk),
    }

    def run(name):
        jax.block_until_ready(compiled[name](policy, hidden))

    return _costs(compiled, run, arguments.repeats)


def _costs(
    compiled: dict[str, Any],
    run: Callable[[str], None],
    repeats: int,
    every: dict[str, int] | None = None,
) -> dict[str, Any]:
    """What compiled programs cost; they take turns at running, and the first is the base.

    Args:
      compiled: the programs.
      run: runs one of them by name.
      repeats: rounds.
      every: how many times `run` runs it, if not once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for repeat in tqdm.trange(repeats + 2, desc="time", disable=not repeats):
        for name in compiled:
            started = time.perf_counter()
            run(name)
            if repeat >= 2:  # the first ones warm caches up
                seconds[name].append((time.perf_counter() - started) / (every or {}).get(name, 1))
        if not repeats:
            break
    base = next(iter(compiled))
    return {
        name: {
            "flops": float(program.cost_analysis()["flops"]),
            "temporary_bytes": float(program.memory_analysis().temp_size_in_bytes),
            "seconds": statistics.median(seconds[name]) if seconds[name] else float("nan"),
            **_time_ratio(seconds[name], seconds[base]),
        }
        for name, program in compiled.items()
    }


def _time_ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Geometric mean of the ratios within each round, and its 95 % interval."""
    if not seconds:
        return {name: float("nan") for name in ("ratio", "ratio_low", "ratio_high")}
    ratio = ratio_interval(seconds, base)
    return {"ratio": ratio.mean, "ratio_low": ratio.low, "ratio_high": ratio.high}


def predicted_share(arguments: Arguments, detach_flops: float) -> float:
    """2DV + 4D^2 operations a token, as a share of Detach's."""
    tokens = arguments.rows * arguments.length
    width, vocab = arguments.width, arguments.vocab
    return (2 * width * vocab + 4 * width**2) * tokens / detach_flops


def table(costs: dict[str, dict[str, float]]) -> str:
    """A row a program, each figure with its ratio to the first's; of a known chip its share."""
    lines = [
        "| program | GFLOP | ratio | temporary MiB | ratio | optimizer, gradient MiB | frozen MiB "
        "| ms a step | ratio | of the chip |",
        "|" + "---|" * 10,
    ]
    chip = this_chip()
    base = next(iter(costs.values()))
    for name, cost in costs.items():
        cells = [name]
        for key, unit, digits in (("flops", 1e9, 2), ("temporary_bytes", 2**20, 1)):
            cells += [f"{cost[key] / unit:.{digits}f}", f"{cost[key] / base[key]:.3f}"]
        for key in ("trained_bytes", "frozen_bytes"):
            cells.append(f"{cost[key] / 2**20:.1f}" if key in cost else "")
        interval = f"[{cost['ratio_low']:.3f}, {cost['ratio_high']:.3f}]"
        cells += [f"{cost['seconds'] * 1e3:.3g}", f"{cost['ratio']:.3f} {interval}"]
        cells.append("")
        if chip is not None and "products" in cost:
            cells[-1] = f"{cost['products'] / cost['seconds'] / chip.flops:.1%}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and writes result.json and table.md."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in dataclasses.asdict(arguments).items()},
        **environment(),
    }
    text = []
    for remat in arguments.remat:
        costs = measure(arguments, remat)
        share = predicted_share(arguments, costs["detach"]["flops"])
        result[remat] = {"costs": costs, "predicted_share": share}
        text.append(
            f"Rematerialisation: {remat}. Prediction for ce, policy and occ_paper: "
            f"{1 + share:.3f} times Detach's operations.\n\n{table(costs)}\n"
        )
        print("\n" + text[-1])
    if arguments.logits_chunk:
        result["head"] = measure_head(arguments)
        text.append(f"The RL loss alone, from the trunk's output:\n\n{table(result['head'])}\n")
        print("\n" + text[-1])
    runs.replace(arguments.folder / "table.md", "\n".join(text))
    runs.write_json(arguments.folder / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
