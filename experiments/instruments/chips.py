"""Accelerators and the meshes that they come in, for plans.

Figures are the makers': Google Cloud's pages on TPU v5e, v5p and v6e, NVIDIA's data sheets of H100
and H200 SXM; link speeds of TPUs from Austin et al., How to Scale Your Model,
jax-ml.github.io/scaling-book.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """One device.

    Attributes:
      memory: bytes.
      flops: bf16 operations a second.
      bandwidth: of its memory, bytes a second.
      link: bytes a second that leave it in a ring with its neighbours, one way.
      near: the same within a node, where that is faster; layouts keep "tensor" there.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    near: float | None = None


KINDS = {"H100": "h100", "H200": "h200", "TPU v5e": "v5e", "TPU v5 lite": "v5e"}
KINDS |= {"TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6": "v6e"}
"""How JAX names devices: the first of these that is in `device_kind`."""

CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 90e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 180e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9, 180e9),
    "h100": Chip(80e9, 989e12, 3350e9, 50e9, near=450e9),
    "h200": Chip(141e9, 989e12, 4800e9, 50e9, near=450e9),
}


def this_chip() -> Chip | None:
    """That of this process's first device; None of one that is not in `CHIPS`, such as a CPU."""
    kind = jax.devices()[0].device_kind
    return next((CHIPS[name] for part, name in KINDS.items() if part in kind), None)


def chip_of(topology: str) -> Chip:
    """The chip of "v5p:4x4x8" or "h100:128".

    Raises:
      ValueError: none of `CHIPS`.
    """
    kind = topology.split(":")[0]
    if kind not in CHIPS:
        raise ValueError(
            f"chip_of: expected a topology of one of {sorted(CHIPS)}, such as 'v5p:4x4x8' or "
            f"'h100:128', got {topology!r}."
        )
    return CHIPS[kind]


def tpu_devices(topology: str) -> list[Any]:
    """Devices of a pod slice that is not there, to compile for.

    Raises:
      RuntimeError: the TPU compiler is not installed.
    """
    # The compiler alone is wanted: no machine to ask, and no TPU that others must not use.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{topology.split(':')[0]}-8")
    # Otherwise JAX would look for TPUs to run on.
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (RuntimeError, ImportError) as error:
        raise RuntimeError(
            f"tpu_devices: no compiler for topology {topology!r} ({error}). Install it with "
            "pip install '.[plan]'; names are like v5e:4x4, v5p:4x4x8, v6e:16x16."
        ) from error
    return list(found.devices)
