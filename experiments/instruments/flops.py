"""Operations of a traced program, with the bodies of loops counted as often as they run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def matrix_flops(
    jaxpr: Any, while_trips: int = 1, usual: Mapping[int, float] | None = None
) -> float:
    """Operations of all matrix products of a traced program, on all devices together.

    Args:
      jaxpr: `jax.make_jaxpr(f)(...)`, or `jax.jit(f).trace(...).jaxpr`.
      while_trips: iterations of loops whose condition compares with no constant.
      usual: as of `hlo.Program`.

    Of branches the dearer one counts; of a kernel every block, also those that a mask skips.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * np.prod(eqn.outvars[0].aval.shape, dtype=float) * depth
        elif name.startswith("ragged_dot"):
            total += _ragged_flops(eqn)
        else:
            inside = [matrix_flops(sub, while_trips, usual) for sub in _inner(eqn)]
            times = 1.0
            if name == "scan":
                times = eqn.params["length"]
            elif name == "while":
                bound = _bound(eqn) or while_trips
                times = (usual or {}).get(bound, bound)
            elif name == "shard_map":
                times = eqn.params["mesh"].size
            elif name == "pallas_call":
                times = math.prod(eqn.params["grid_mapping"].grid)
            if inside:
                total += times * (max(inside) if name == "cond" else sum(inside))
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def _bound(loop: Any) -> int:
    """The constant that a loop's condition compares with, as `hlo.Program` reads it; else 0."""
    compared = [
        int(operand.val)
        for eqn in loop.params["cond_jaxpr"].jaxpr.eqns
        if eqn.primitive.name == "lt"
        for operand in eqn.invars
        if isinstance(operand, Literal)
    ]
    return max(compared, default=0)


def _ragged_flops(eqn: Any) -> float:
    """Every row meets one group's matrix."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = numbers.dot_dimension_numbers
    rows, other = (var.aval.shape for var in eqn.invars[:2])
    taken = {*contracted, *batched, *numbers.rhs_group_dimensions}
    free = math.prod(size for i, size in enumerate(other) if i not in taken)
    return 2.0 * math.prod(rows) * free
