"""A run at full size, compiled for machines that are not there: what it needs, and how long.

Claim: the paper's runs fit 128 TPU v5p chips. OCC from log-ratios in the fused placement needs the
memory of Detach, and a forward pass of its own where there are several micro-batches.
Command: python -m experiments.plan mimo_7b_dapo --topology v5p:4x4x8
Cost: some minutes a regime on two CPU cores. Needs the TPU compiler: pip install '.[plan]'.

For TPUs, the production train step and generation are compiled for the named slice. Memory is the
compiler's own plan, collectives are read from the compiled program with loops counted as often as
they run, operations from the traced one. For GPUs ("h100:128") memory of the state follows from its
shardings and operations from the traced program; temporaries and collectives are estimated.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments import hlo, runs
from experiments.chips import Chip, chip_of, tpu_devices
from experiments.configs import CONFIGS
from occ.generation.sampling import SamplingConfig, generate
from occ.training.batch import Minibatch
from occ.training.config import TrainConfig, regime
from occ.training.programs import abstract_model, abstract_state, jit_train_step
from occ.training.run_folder import environment
from occ.training.sharding import (
    abstract_mesh,
    batch_shardings,
    for_generation,
    make_mesh,
    replicated,
    rows_sharding,
)

REGIMES = {"Detach": "detach", "OCC fused": "occ_paper", "OCC exact": "occ"}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of a plan.

    Attributes:
      config: the configuration; every field can be given.
      topology: v5e:4x4, v5p:4x4x8, v6e:16x16, or h100:N.
      regimes: which of "Detach", "OCC fused", "OCC exact" to plan.
      rollouts: plan generation too.
      folder: for result.json and plan.md; default runs/plan/CONFIG-TOPOLOGY.
    """

    config: TrainConfig
    topology: str = "v5p:4x4x8"
    regimes: tuple[str, ...] = tuple(REGIMES)
    rollouts: bool = True
    folder: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one program on one device.

    Attributes:
      arguments, temporaries, peak: bytes of memory.
      flops: operations of matrix products.
      traffic: bytes to and from its memory; NaN where not known.
      collectives: by kind.
      compile_seconds: of the compiler; NaN without one.
    """

    arguments: float
    temporaries: float
    peak: float
    flops: float
    traffic: float
    collectives: dict[str, hlo.Traffic]
    compile_seconds: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Lower bounds on the time, by what limits it; in seconds."""
        links = 0.0
        for kind, traffic in self.collectives.items():
            near = chip.near if kind == "all-reduce" else None
            links += traffic.wire / (chip.link if near is None else near)
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "links": links,
        }


# ---------------------------------------------------------------------------------------------
# Abstract inputs
# ---------------------------------------------------------------------------------------------


def minibatch_shapes(config: TrainConfig, mesh: Any) -> Minibatch:
    """Shapes of a minibatch, with shardings."""
    assert config.max_prompt_tokens is not None and config.max_response_tokens is not None
    rows = config.rollout.prompts * config.rollout.samples // config.rollout.minibatches
    shape = (rows, config.max_prompt_tokens + config.max_response_tokens)
    dtypes = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}
    dtypes["response_mask"] = jnp.bool_
    fields = {
        name: jax.ShapeDtypeStruct(
            (config.model.mtp.num_modules, *shape) if name == "old_mtp_log_prob" else shape,
            dtypes.get(name, jnp.float32),
            sharding=sharding,
        )
        for name, sharding in vars(batch_shardings(mesh)).items()
    }
    return Minibatch(**fields)


def trace_train_step(config: TrainConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The traced production step, and the shapes of its state."""
    graphdef, params, rest = abstract_model(config)
    state = abstract_state(config, params, rest, mesh)
    step = jit_train_step(graphdef, config, mesh, state, config.max_prompt_tokens or 0)
    return step.trace(state, minibatch_shapes(config, mesh)), state


def trace_generation(config: TrainConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The traced sampling of a whole rollout, and the shapes of the parameters."""
    graphdef, params, rest = abstract_model(config)
    state = abstract_state(config, params, rest, mesh)
    sampling = SamplingConfig(
        max_new_tokens=config.max_response_tokens or 0,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_tokens=(0,),
    )
    rows = config.rollout.prompts * config.rollout.samples
    if config.layout.generation_rows:
        rows = min(rows, config.layout.generation_rows)
    shape = (rows, config.max_prompt_tokens or 0)
    sharding = rows_sharding(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def sample(params, rest, prompts, mask, key):
        gathered = for_generation(params, config.model.compute)
        return generate(graphdef, gathered, rest, prompts, mask, key, config=sampling)

    traced = jax.jit(sample).trace(
        state.params,
        state.rest,
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
        jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh)),
    )
    return traced, state.params


# ---------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------


def compiled_cost(traced: Any, devices: int, while_trips: int = 1) -> Cost:
    """From the compiler for the mesh's devices."""
    started = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text())
    return Cost(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        flops=hlo.matrix_flops(traced.jaxpr, while_trips) / devices,
        traffic=hlo.memory_traffic(program),
        collectives=hlo.collectives(program),
        compile_seconds=seconds,
    )


def estimated_cost(config: TrainConfig, traced: Any, state: Any, devices: int) -> Cost:
    """Without a compiler: state from its shardings, the rest by the sizes of what must exist.

    Temporaries are what is kept for the backward pass (the input of every layer), one layer
    computed again, the logits of a chunk and the gradients' accumulators; collectives are those of
    parameters that are cut: a gather in every pass through the trunk, a reduce-scatter at its end.
    """
    model, layout = config.model, config.layout
    width = jnp.dtype(model.compute_dtype).itemsize
    arguments = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state))
    params = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state.params))
    # What a device has of the parameters when they are gathered for use: experts stay apart.
    whole = sum(_gathered_size(leaf) for leaf in jax.tree.leaves(state.params))
    batch = minibatch_shapes(config, abstract_mesh(layout))
    rows = batch.tokens.shape[0] / layout.row_parts / layout.micro_batches
    length = batch.tokens.shape[1]
    tokens = rows * length
    hidden = model.mlp_width if model.moe is None else _active_width(model)
    layer = tokens * (4 * model.width + 3 * hidden / layout.tensor) * width
    chunk = layout.logits_chunk or length
    logits = 3 * rows * chunk * model.vocab_size / layout.tensor * 4
    gradients = 2 if config.mtp.placement == "exact" else 1
    kept = (model.num_layers + 2) * tokens * model.width * width * gradients
    temporaries = kept + layer + logits + params * (gradients + 1)

    cut = layout.fsdp * layout.expert
    share = (cut - 1) / cut
    # In one micro-batch the weights are known on the way.
    looks_first = config.mtp.looks and gradients == 1 and layout.micro_batches > 1
    passes = layout.micro_batches * (3 + looks_first)
    gathered = whole * width
    reduced = whole * 4 * gradients * layout.micro_batches
    summed = 4 * passes * model.num_layers * tokens * model.width * width
    collectives = {
        "all-gather": _estimate(passes, gathered, share),
        "reduce-scatter": _estimate(layout.micro_batches, reduced / layout.micro_batches, share),
    }
    if layout.tensor > 1:
        both_ways = 2 * (layout.tensor - 1) / layout.tensor
        collectives["all-reduce"] = _estimate(passes, summed / passes, both_ways)
    return Cost(
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries,
        flops=hlo.matrix_flops(traced.jaxpr) / devices,
        traffic=math.nan,
        collectives=collectives,
        compile_seconds=math.nan,
    )


def _active_width(model: Any) -> int:
    moe = model.moe
    return moe.expert_width * (moe.experts_per_token + moe.num_shared_experts)


def _gathered_size(leaf: Any) -> float:
    spec, sizes = leaf.sharding.spec, leaf.sharding.mesh.shape
    return leaf.size / math.prod(sizes[axes] for axes in spec if axes in ("tensor", "expert"))


def _local_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _estimate(times: int, size: float, share: float) -> hlo.Traffic:
    return hlo.Traffic(times, int(times * size), times * size * share, int(size))


# ---------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------


def plan(arguments: Arguments, report: Any = print) -> dict[str, Any]:
    """Plans a configuration on a topology; every line goes to `report`."""
    config = arguments.config
    chip = chip_of(arguments.topology)
    tpu = not arguments.topology.startswith("h100")
    devices = tpu_devices(arguments.topology) if tpu else None
    count = len(devices) if devices else int(arguments.topology.split(":")[1])
    if config.layout.devices != count:
        raise ValueError(
            f"plan: {arguments.topology} has {count} devices, the layout takes "
            f"{config.layout.devices}. Choose data, fsdp, expert and tensor of "
            "--config.layout so that their product is the number of devices."
        )
    mesh: Any = make_mesh(config.layout, devices) if devices else abstract_mesh(config.layout)
    costs: dict[str, Cost] = {}
    context: Any = jax.set_mesh(mesh) if devices else jax.sharding.use_abstract_mesh(mesh)
    with context:
        for name in arguments.regimes:
            one = dataclasses.replace(config, mtp=regime(REGIMES[name]))
            traced, state = trace_train_step(one, mesh)
            title = f"{name}, train step"
            if not devices:
                costs[name] = estimated_cost(one, traced, state, count)
                report(describe(title, costs[name], chip, train_advice(config)))
            elif cost := _compiled(title, traced, count, chip, train_advice(config), report):
                costs[name] = cost
        if arguments.rollouts and devices:
            traced, _ = trace_generation(config, mesh)
            title, trips = "Generation of a portion", config.max_response_tokens or 1
            ideas = generation_advice(config)
            if cost := _compiled(title, traced, count, chip, ideas, report, trips):
                costs["Generation"] = cost
    text = table(costs, chip)
    report(text)
    return {
        "config": dataclasses.asdict(config),
        "topology": arguments.topology,
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
        "seconds": {name: cost.seconds(chip) for name, cost in costs.items()},
        "table": text,
    }


def _compiled(
    title: str,
    traced: Any,
    devices: int,
    chip: Chip,
    ideas: list[str],
    report: Any,
    while_trips: int = 1,
) -> Cost | None:
    """The cost of a program, reported; None if the compiler finds no room for it."""
    try:
        cost = compiled_cost(traced, devices, while_trips)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        report(f"{title}: does not fit; {'; '.join(ideas)}\n  The compiler: {reason}")
        return None
    report(describe(title, cost, chip, ideas))
    return cost


def describe(title: str, cost: Cost, chip: Chip, ideas: list[str]) -> str:
    """A paragraph on one program; `ideas` say what to change if it does not fit."""
    seconds = cost.seconds(chip)
    lines = [
        f"{title}: {cost.peak / GIB:.1f} GiB a device of {chip.memory / GIB:.0f} "
        f"(arguments {cost.arguments / GIB:.1f}, temporaries {cost.temporaries / GIB:.1f})",
        f"  matrix products {cost.flops / 1e12:.1f} TFLOP a device: "
        + ", ".join(f"{kind} {value:.2f} s" for kind, value in seconds.items()),
    ]
    for kind, traffic in sorted(cost.collectives.items()):
        lines.append(
            f"  {kind}: {traffic.times} times, {traffic.bytes / 1e9:.2f} GB, "
            f"{traffic.wire / 1e9:.2f} GB over the links, largest {traffic.largest / 1e6:.1f} MB"
        )
    fits = cost.peak <= 0.95 * chip.memory
    return "\n".join([*lines, "  fits" if fits else f"  does not fit; {'; '.join(ideas)}"])


def train_advice(config: TrainConfig) -> list[str]:
    """What to change if a train step does not fit."""
    layout, model = config.layout, config.model
    ideas = [f"raise layout.micro_batches (now {layout.micro_batches})"]
    if model.remat != "full":
        ideas.append(f"model.remat='full' (now {model.remat!r})")
    if model.attention == "xla" and not model.attention_chunk:
        ideas.append("model.attention='splash', or an attention_chunk")
    ideas.append(f"lower layout.logits_chunk (now {layout.logits_chunk or 'all'})")
    ideas.append("cut parameters further: raise layout.fsdp, layout.expert or layout.tensor")
    return ideas


def generation_advice(config: TrainConfig) -> list[str]:
    """What to change if generation does not fit."""
    layout, model = config.layout, config.model
    ideas = [f"lower layout.generation_rows (now {layout.generation_rows or 'all'})"]
    if not model.attention_chunk:
        ideas.append("a model.attention_chunk, for the prompts")
    return [*ideas, "raise layout.tensor or layout.expert, which cut what is not gathered"]


def table(costs: dict[str, Cost], chip: Chip) -> str:
    """A row a program."""
    lines = [
        "| program | arguments GiB | temporaries GiB | peak GiB | TFLOP | traffic TB | links GB "
        "| compute s | memory s | links s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cost in costs.items():
        seconds = cost.seconds(chip)
        wire = sum(traffic.wire for traffic in cost.collectives.values())
        cells = [
            name,
            *(f"{x / GIB:.1f}" for x in (cost.arguments, cost.temporaries, cost.peak)),
            f"{cost.flops / 1e12:.0f}",
            f"{cost.traffic / 1e12:.2f}",
            f"{wire / 1e9:.0f}",
            *(f"{seconds[kind]:.2f}" for kind in ("compute", "memory", "links")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Plans, prints, and writes result.json and plan.md."""
    commands = {name: (build.__doc__ or "", Arguments(build())) for name, build in CONFIGS.items()}
    arguments = tyro.extras.overridable_config_cli(commands)
    folder = arguments.folder
    if folder is None:
        label = f"{arguments.config.name}-{arguments.topology.replace(':', '-')}"
        folder = pathlib.Path("runs/plan") / label
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def report(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    result = plan(arguments, report)
    runs.write_json(folder / "result.json", {**result, **environment()})
    runs.replace_text(folder / "plan.md", "\n\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
