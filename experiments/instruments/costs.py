"""What a program costs one device: from the compiler, or by arithmetic where there is none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.instruments import flops, hlo
from experiments.instruments.chips import Chip
from occ.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one program on one device.

    Attributes:
      arguments, temporaries, peak: bytes of memory.
      flops: operations of matrix products.
      traffic: bytes to and from its memory; NaN where not known.
      collectives: by kind.
    """

    arguments: float
    temporaries: float
    peak: float
    flops: float
    traffic: float
    collectives: dict[str, hlo.Traffic]

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


class Compiled(NamedTuple):
    """A program compiled for the mesh's devices.

    Attributes:
      jaxpr: as traced.
      text: as compiled.
      memory: the compiler's analysis.
    """

    jaxpr: Any
    text: str
    memory: Any

    def cost(self, devices: int, usual: Mapping[int, float] | None = None) -> Cost:
        """On one of so many devices.

        Args:
          devices: of the mesh.
          usual: iterations of loops that may end before their bound, by that bound.
        """
        memory, program = self.memory, hlo.parse(self.text, usual)
        return Cost(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            peak=memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes,
            flops=flops.matrix_flops(self.jaxpr, usual=usual) / devices,
            traffic=hlo.memory_traffic(program),
            collectives=hlo.collectives(program),
        )


def compile_traced(traced: Any) -> Compiled:
    """Compiles what `jax.jit(f).trace(...)` returned."""
    compiled = traced.lower().compile()
    return Compiled(traced.jaxpr, compiled.as_text(), compiled.memory_analysis())


class Trained(NamedTuple):
    """What training holds beside the model, on one device.

    Attributes:
      parameters, frozen: numbers, of all devices together.
      optimizer: bytes of the optimizer's state.
      gradients: bytes of the gradients, one a loss where each is taken by itself.
    """

    parameters: int
    frozen: int
    optimizer: int
    gradients: int

    def __str__(self) -> str:
        size = (self.optimizer + self.gradients) / 2**30
        return (
            f"{self.parameters / 1e6:.0f} million parameters trained, {self.frozen / 1e6:.0f} "
            f"million frozen; optimizer and gradients {size:.2f} GiB a device"
        )


def trained(config: TrainConfig, state: Any) -> Trained:
    """Of a run.

    Args:
      config: says how many losses have a gradient of their own.
      state: shapes with shardings, from `abstract_state`.
    """
    params, rest = (jax.tree.leaves(tree) for tree in (state.params, state.rest))
    return Trained(
        parameters=sum(leaf.size for leaf in params),
        frozen=sum(leaf.size for leaf in rest),
        optimizer=sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state.opt_state)),
        gradients=_losses_apart(config) * sum(_local_bytes(leaf) for leaf in params),
    )


def _losses_apart(config: TrainConfig) -> int:
    """Gradients of all parameters that exist at one time."""
    apart = config.mtp.loss != "none" and config.mtp.placement == "exact"
    return 1 + config.model.mtp.num_modules if apart else 1


def estimated_cost(
    config: TrainConfig, traced: Any, state: Any, shape: tuple[int, int], devices: int
) -> Cost:
    """Without a compiler: state from its shardings, the rest by the sizes of what must exist.

    `shape` are rows and columns of a minibatch.

    Temporaries are what is kept for the backward pass (the input of every layer), one layer
    computed again, the logits of a chunk and the gradients' accumulators; collectives are those of
    parameters that are cut: a gather in every pass through the trunk, a reduce-scatter at its end.
    """
    model, layout = config.model, config.layout
    width = jnp.dtype(model.compute_dtype).itemsize
    arguments = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state))
    params = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(state.params))
    # What a device has of the parameters when they are gathered for use: experts stay apart.
    whole, frozen = (
        sum(gathered_size(leaf) for leaf in jax.tree.leaves(tree))
        for tree in (state.params, state.rest)
    )
    rows, length = shape[0] / layout.row_parts / layout.micro_batches, shape[1]
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
    measured_first = config.mtp.data_dependent and gradients == 1 and layout.micro_batches > 1
    passes = layout.micro_batches * (3 + measured_first)
    gathered = (whole + frozen) * width
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
        flops=flops.matrix_flops(traced.jaxpr) / devices,
        traffic=math.nan,
        collectives=collectives,
    )


def _active_width(model: Any) -> int:
    moe = model.moe
    return moe.expert_width * (moe.experts_per_token + moe.num_shared_experts)


def gathered_size(leaf: Any) -> float:
    """Elements that a device has of a parameter when it is gathered for use."""
    spec, sizes = leaf.sharding.spec, leaf.sharding.mesh.shape
    return leaf.size / math.prod(sizes[axes] for axes in spec if axes in ("tensor", "expert"))


def _local_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _estimate(times: int, size: float, share: float) -> hlo.Traffic:
    return hlo.Traffic(times, int(times * size), times * size * share, int(size))
