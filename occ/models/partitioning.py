"""Mesh axes, and constraints that keep activations where they belong.

data     copies of the parameters, each with rows of the batch of its own
fsdp     rows too, and the parameters are cut along it; gathered layer by layer
expert   rows too; experts are cut along it, and tokens travel to them
tensor   heads, hidden widths and vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
"""The axes that the rows of a batch are cut along."""


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Places an intermediate value on the mesh that is set; without a mesh, the value itself.

    Args:
      x: any array.
      spec: mesh axes for each of its leading dimensions; the others are not cut, nor is one that
        its axes do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fit(x.shape, *spec))


def fit(shape: tuple[int, ...], *spec: str | tuple[str, ...] | None) -> jax.P:
    """The axes of the mesh that is set that divide the leading dimensions of a shape.

    Args:
      shape, spec: as of `constrain`.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    spec += (None,) * (len(shape) - len(spec))
    return jax.P(
        *(
            axes if size % parts(sizes, axes) == 0 else None
            for size, axes in zip(shape, spec, strict=True)
        )
    )


def platform() -> str:
    """Kind of the devices ("cpu", "gpu", "tpu") of the mesh that is set, or else of JAX's default.

    A program may be compiled for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def several_devices() -> jax.sharding.AbstractMesh | None:
    """The mesh that is set, if it has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def in_order(*trees: Any) -> tuple[Any, ...]:
    """The same values; on a mesh, what uses any of them waits until all of them are computed."""
    if several_devices() is None:
        return trees
    return jax.lax.optimization_barrier(trees)


def parts(sizes: Mapping[str, int], axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts a dimension is cut along some axes.

    >>> parts({"data": 2, "fsdp": 4}, ("data", "fsdp"))
    8
    """
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(sizes[name] for name in names)
