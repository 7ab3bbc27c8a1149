"""A run at full size, compiled for machines that are not there: what it needs, and how long.

Claim: the paper's runs fit 128 TPU v5p chips. OCC from log-ratios in the fused placement needs the
memory of Detach, and a forward pass of its own where there are several micro-batches.
Command: python -m experiments.instruments.plan mimo_7b_dapo --topology v5p:4x4x8
Cost: some minutes a regime on two CPU cores. Needs the TPU compiler: pip install '.[plan]'.

For TPUs, the production train step and generation are compiled for the named slice. Memory is the
compiler's own plan, collectives are read from the compiled program with loops counted as often as
they run, operations from the traced one. For GPUs ("h100:128") memory of the state follows from its
shardings and operations from the traced program; temporaries and collectives are estimated.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import runs
from experiments.configs import CONFIGS
from experiments.instruments.chips import Chip, chip_of, tpu_devices
from experiments.instruments.costs import (
    Compiled,
    Cost,
    Trained,
    compile_traced,
    estimated_cost,
    gathered_size,
    trained,
)
from occ.generation.depth import expected_tokens
from occ.generation.sampling import SamplingConfig
from occ.models.cache import CACHE_BLOCK, columns_in_blocks
from occ.models.parameters import partition
from occ.models.policy import abstract_policy
from occ.training.batch import Minibatch
from occ.training.config import TrainConfig
from occ.training.draft_depth import deepest
from occ.training.durable.run_folder import environment
from occ.training.programs import abstract_state, jit_train_step
from occ.training.regimes import RegimeName, regime
from occ.training.rollout import sampler
from occ.training.sharding import (
    abstract_mesh,
    batch_shardings,
    make_mesh,
    replicated,
)

GIB = 2**30
ACCEPTANCES = (0.7, 0.8, 0.9)
"""Of every draft whose predecessors were kept, for which speculation is planned."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of a plan.

    Attributes:
      config: the configuration; every field can be given.
      topology: v5e:4x4, v5p:4x4x8, v6e:16x16, or h100:N.
      regimes: which to plan.
      rollouts: plan generation too.
      draft_depths: of generation, as far as the model can draft; 0 is no drafts.
      folder: for result.json and plan.md; default runs/plan/CONFIG-TOPOLOGY.
    """

    config: TrainConfig
    topology: str = "v5p:4x4x8"
    regimes: tuple[RegimeName, ...] = ("detach", "occ_paper", "occ")
    rollouts: bool = True
    draft_depths: tuple[int, ...] = (0, 1)
    folder: pathlib.Path | None = None


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
        if sharding is not None
    }
    return Minibatch(**fields)


def trace_train_step(config: TrainConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The traced production step, and the shapes of its state."""
    policy = abstract_policy(config.model)
    state = abstract_state(config, policy, mesh)
    step = jit_train_step(config, mesh, state, config.max_prompt_tokens or 0)
    return step.trace(state, minibatch_shapes(config, mesh)), state


def portion_rows(config: TrainConfig) -> int:
    """Rows that decode at one time."""
    rows = config.rollout.prompts * config.rollout.samples
    return min(rows, config.layout.generation_rows or rows)


def trace_generation(config: TrainConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """The traced sampling of as many rows as decode at one time; shapes of the state."""
    policy = abstract_policy(config.model)
    state = abstract_state(config, policy, mesh)
    sampling = SamplingConfig(
        max_new_tokens=config.max_response_tokens or 0,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_tokens=(0,),
    )
    rows = portion_rows(config)
    prompts = max(rows // config.rollout.samples, 1)
    shape = (prompts, config.max_prompt_tokens or 0)
    sharding = replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))

    traced = jax.jit(sampler(sampling, config)).trace(
        state.policy(config.model),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
        jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding),
        prompt_of=jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding),
    )
    return traced, state


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
    holds: dict[str, Trained] = {}
    context: Any = jax.set_mesh(mesh) if devices else jax.sharding.use_abstract_mesh(mesh)
    with context:
        for name in arguments.regimes:
            one = dataclasses.replace(config, mtp=regime(name))
            traced, state = trace_train_step(one, mesh)
            title = f"{name}, train step"
            holds[name] = trained(one, state)
            report(f"{title}: {holds[name]}")
            if not devices:
                shape = minibatch_shapes(one, mesh).tokens.shape
                costs[name] = estimated_cost(one, traced, state, shape, count)
                report(describe(title, costs[name], chip, train_advice(config)))
            elif compiled := compile_or_report(title, traced, train_advice(config), report):
                costs[name] = compiled.cost(count)
                report(describe(title, costs[name], chip, train_advice(config)))
        for depth in arguments.draft_depths if arguments.rollouts and devices else ():
            if depth <= deepest(config.model.mtp):
                costs |= plan_generation(config, mesh, depth, chip, report)
    text = table(costs, chip)
    report(text)
    return {
        "config": dataclasses.asdict(config),
        "topology": arguments.topology,
        "trained": {name: held._asdict() for name, held in holds.items()},
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
        "seconds": {name: cost.seconds(chip) for name, cost in costs.items()},
        "table": text,
    }


def plan_generation(
    config: TrainConfig, mesh: Any, depth: int, chip: Chip, report: Any
) -> dict[str, Cost]:
    """Of a portion whose responses are all as long as they may be; by acceptance where it drafts.

    The cache is read as far as it is filled, which is half of the response on average.
    """
    layout = dataclasses.replace(config.layout, draft_depth=depth)
    traced, state = trace_generation(dataclasses.replace(config, layout=layout), mesh)
    title = f"Generation of a portion, {depth} drafts a pass"
    compiled = compile_or_report(title, traced, generation_advice(config), report)
    if compiled is None:
        return {}
    response = config.max_response_tokens or 1
    columns = (config.max_prompt_tokens or 0) + response
    blocks = columns_in_blocks(columns + depth + 1) // CACHE_BLOCK
    filled = float(np.mean(-(-np.arange(columns - response, columns) // CACHE_BLOCK)))
    costs: dict[str, Cost] = {}
    for accepted in ACCEPTANCES if depth else (0.0,):
        a_pass = expected_tokens([accepted] * depth)
        usual = {response: response / a_pass, blocks: filled}
        cost = compiled.cost(mesh.size, usual)
        name = f"Generation, {depth} drafts" + (f", {accepted} accepted" if depth else "")
        costs[name] = cost
        report(describe(name, cost, chip, generation_advice(config)))
    begun = compiled.cost(mesh.size, {response: 0})
    used = _weights(state, config, depth), _cache(config, filled * CACHE_BLOCK)
    took = (cost.traffic - begun.traffic) * a_pass / response
    report(
        f"  a pass moves {took / 1e9:.1f} GB, {took / sum(used):.2f} times the weights "
        f"({used[0] / 1e9:.1f}) and the cache ({used[1] / 1e9:.1f} on average)"
    )
    return costs


def _weights(state: Any, config: TrainConfig, depth: int) -> float:
    """Bytes that a device reads of them in a pass: all but the embeddings, of which it has rows."""
    used: list[Any] = []
    for parts in (partition(state.params), partition(state.rest)):
        readout = {
            name: leaf
            for name, leaf in parts.readout.items()
            if name != "embedding" or config.model.tied_embeddings
        }
        used += jax.tree.leaves((parts.blocks, readout, parts.modules if depth else {}))
    return sum(gathered_size(leaf) for leaf in used) * config.model.compute.itemsize


def _cache(config: TrainConfig, columns: float) -> float:
    """Bytes of the keys and values of so many columns of a device's rows, all layers together."""
    model, layout = config.model, config.layout
    rows = portion_rows(config) / layout.row_parts
    cut = 1 if model.num_kv_heads % layout.tensor else layout.tensor
    heads = model.num_kv_heads / cut
    a_column = 2 * model.num_layers * heads * model.head_dim * model.compute.itemsize
    return rows * columns * a_column


def compile_or_report(title: str, traced: Any, ideas: list[str], report: Any) -> Compiled | None:
    """The program; None, with a report, if the compiler finds no room for it."""
    try:
        return compile_traced(traced)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        report(f"{title}: does not fit; {'; '.join(ideas)}\n  The compiler: {reason}")
        return None


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
            f"  {kind}: {traffic.times:.0f} times, {traffic.bytes / 1e9:.2f} GB, "
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
    runs.replace(folder / "plan.md", "\n\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
