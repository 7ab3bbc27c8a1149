"""The parameters by what they are part of: the trunk's layers, the readout, the MTP modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

BLOCKS = ("dense_layers", "layers")
"""Top-level names of the trunk's layers; their leaves have a leading axis of layers."""
MODULES = ("mtp",)
"""Top-level names of the MTP modules' own parameters."""

ADAPTERS = ("lora_a", "lora_b")
"""Names of the leaves beside a kernel that adapt it: A [inputs, rank] and B [rank, outputs]."""


class Parts(NamedTuple):
    """The parameters by stage; each a dict of some of the model's top-level names.

    Attributes:
      blocks: the trunk's layers; with adapters, these alone.
      readout: what every loss reaches directly: embedding, final norm and output head; {} with
        adapters, beside which they are frozen.
      modules: the MTP modules' own.
    """

    blocks: dict[str, Any]
    readout: dict[str, Any]
    modules: dict[str, Any]


def partition(params: dict[str, Any]) -> Parts:
    """Sorts the model's top-level parameter names into stages."""
    return Parts(
        blocks={name: tree for name, tree in params.items() if name in BLOCKS},
        readout={name: tree for name, tree in params.items() if name not in BLOCKS + MODULES},
        modules={name: tree for name, tree in params.items() if name in MODULES},
    )


def join(parts: Parts) -> dict[str, Any]:
    """The inverse of `partition`."""
    return {**parts.blocks, **parts.readout, **parts.modules}


def substitute(parts: Parts, params: dict[str, Any]) -> Parts:
    """The parameters with others in place of the top-level names in `params`."""
    return Parts(*({name: params.get(name, part[name]) for name in part} for part in parts))


def is_stacked(path: str) -> bool:
    """Whether the leaf at "path/of/leaf" has a leading axis of layers."""
    return path.split("/")[0] in BLOCKS


def is_shared(path: str) -> bool:
    """Whether both losses reach the parameter at "path/of/leaf": all but the modules' own."""
    return path.split("/")[0] not in MODULES


def is_trained(path: Sequence[Any], adapted: bool) -> bool:
    """Whether the parameter with these names is trained: of a model with adapters, these alone.

    And the MTP modules, which are trained whole.
    """
    return not adapted or path[0] in MODULES or path[-1] in ADAPTERS


def module_leaves(params: dict[str, Any]) -> list[list[Any]]:
    """The leaves of each MTP module's own parameters, in the order of the modules."""
    modules = params.get("mtp", {})
    return [jax.tree.leaves(modules[name]) for name in sorted(modules, key=int)]
