"""Where every array of a run lives on the mesh: one table of parameters, and all else follows."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from occ.models.parameters import ADAPTERS
from occ.models.partitioning import AXES, ROWS, parts, several_devices
from occ.training.batch import LEADING, Minibatch
from occ.training.config import LayoutConfig
from occ.trees import path_string

P = jax.P

STACKED = re.compile(r"(dense_layers|layers)/")  # their leaves have a leading layer axis
STACK = r"(dense_layers|layers)"  # of the trunk, which may have adapters and be quantised
BLOCK = r"(dense_layers|layers|mtp/\d+/block)"
CUT = ("fsdp", "expert")  # experts apart, parameters are cut along both


class Row(NamedTuple):
    """Where parameters of one kind live.

    Attributes:
      path: regular expression for the whole path.
      shape: names of the dimensions, the layer axis left out.
      spec: mesh axes of each of them.
    """

    path: str
    shape: str
    spec: jax.P


COMPUTED = ("kernel", "embedding", "gate_kernel", "up_kernel", "down_kernel", *ADAPTERS)
"""Names of leaves that layers cast to the dtype of computation before they use them."""

TABLE = (
    Row(r"(mtp/\d+/)?embedding/embedding", "vocab width", P("tensor", CUT)),
    Row(r"(mtp/\d+/)?output_head/kernel", "width vocab", P(CUT, "tensor")),
    Row(rf"{BLOCK}/attention/(query|key|value)/kernel", "width heads*head_dim", P(CUT, "tensor")),
    Row(rf"{STACK}/attention/(query|key|value)/kernel_scale", "heads*head_dim", P("tensor")),
    Row(rf"{STACK}/attention/output/kernel_scale", "width", P(CUT)),
    Row(rf"{STACK}/mlp/(shared/)?(gate|up)/kernel_scale", "hidden", P("tensor")),
    Row(rf"{STACK}/mlp/(shared/)?down/kernel_scale", "width", P(CUT)),
    Row(rf"{STACK}/attention/(query|key|value)/lora_a", "width rank", P(CUT, None)),
    Row(rf"{STACK}/attention/(query|key|value)/lora_b", "rank heads*head_dim", P(None, "tensor")),
    Row(rf"{STACK}/attention/output/lora_a", "heads*head_dim rank", P("tensor", None)),
    Row(rf"{STACK}/attention/output/lora_b", "rank width", P(None, CUT)),
    Row(rf"{STACK}/mlp/(shared/)?(gate|up)/lora_a", "width rank", P(CUT, None)),
    Row(rf"{STACK}/mlp/(shared/)?(gate|up)/lora_b", "rank hidden", P(None, "tensor")),
    Row(rf"{STACK}/mlp/(shared/)?down/lora_a", "hidden rank", P("tensor", None)),
    Row(rf"{STACK}/mlp/(shared/)?down/lora_b", "rank width", P(None, CUT)),
    Row(rf"{BLOCK}/attention/(query|key|value)/bias", "heads*head_dim", P("tensor")),
    Row(rf"{BLOCK}/attention/output/kernel", "heads*head_dim width", P("tensor", CUT)),
    Row(rf"{BLOCK}/attention/(query|key)_norm/scale", "head_dim", P(None)),
    Row(rf"{BLOCK}/mlp/(shared/)?(gate|up)/kernel", "width hidden", P(CUT, "tensor")),
    Row(rf"{BLOCK}/mlp/(shared/)?down/kernel", "hidden width", P("tensor", CUT)),
    Row(rf"{BLOCK}/mlp/router", "width experts", P(CUT, None)),
    Row(rf"{BLOCK}/mlp/router_bias", "experts", P(None)),
    Row(rf"{BLOCK}/mlp/(gate|up)_kernel", "experts width hidden", P("expert", "fsdp", "tensor")),
    Row(rf"{BLOCK}/mlp/down_kernel", "experts hidden width", P("expert", "tensor", "fsdp")),
    Row(rf"{BLOCK}/(attention|mlp)_norm/scale", "width", P(None)),
    Row(r"mtp/\d+/projection/kernel", "2*width width", P(CUT, "tensor")),
    Row(r"mtp/\d+/(hidden|embedding|final)_norm/scale", "width", P(None)),
    Row(r"final_norm/scale", "width", P(None)),
)
"""Every parameter and other variable of the model is matched by exactly one row."""


def parameter_spec(path: str, shape: tuple[int, ...]) -> jax.P:
    """Mesh axes of the dimensions of one parameter.

    Args:
      path: "layers/attention/query/kernel".
      shape: of the parameter, with its layer axis.

    Raises:
      ValueError: no row of the table, or more than one, matches; or the row is of another rank.

    >>> parameter_spec("layers/attention/query/kernel", (2, 64, 64))
    P(None, ('fsdp', 'expert'), 'tensor')
    """
    rows = [row for row in TABLE if re.fullmatch(row.path, path)]
    if len(rows) != 1:
        found = "none does" if not rows else f"these do: {[row.path for row in rows]}"
        raise ValueError(
            f"sharding: exactly one row of the table must match parameter {path!r}, and {found}. "
            "Add or narrow a row in occ/training/sharding.py."
        )
    stacked = bool(STACKED.match(path))
    spec = P(None, *rows[0].spec) if stacked else rows[0].spec
    if len(spec) != len(shape):
        raise ValueError(
            f"sharding: the row for {path!r} has dimensions {rows[0].shape!r}"
            f"{' after a layer axis' if stacked else ''}, the parameter has shape {shape}."
        )
    return spec


def make_mesh(layout: LayoutConfig, devices: Any = None) -> Mesh:
    """The mesh that a layout describes.

    Args:
      layout: sizes of the axes.
      devices: to place it on; default the first of this run's.

    Raises:
      ValueError: there are fewer devices than it takes, or several processes and devices over.
    """
    available = jax.devices() if devices is None else list(devices)
    sizes = tuple(getattr(layout, axis) for axis in AXES)
    product = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if layout.devices > len(available):
        raise ValueError(
            f"make_mesh: the layout {product} takes {layout.devices} devices, and there are "
            f"{len(available)}. Lower an axis of LayoutConfig."
        )
    if jax.process_count() > 1 and layout.devices < len(available):
        raise ValueError(
            f"make_mesh: the layout {product} takes {layout.devices} devices of "
            f"{len(available)}, and every process must take part with all of its devices. Raise "
            "an axis of LayoutConfig."
        )
    chosen = np.asarray(available[: layout.devices], dtype=object).reshape(sizes)
    return Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(layout: LayoutConfig) -> AbstractMesh:
    """A mesh of a layout's sizes without devices, for shapes alone."""
    sizes = tuple(getattr(layout, axis) for axis in AXES)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of parameters, or of a training state around them.

    Whatever has the path and the shape of a parameter (Adam's moments) lies where it lies; all
    else (counts, the calibration's small matrices) is on every device.

    Args:
      tree: arrays or shapes; a parameter's path is the end of its path in the tree.
      mesh: the mesh.

    Raises:
      ValueError: an axis of the mesh does not divide a dimension that is cut along it; all such
        parameters are listed.
    """
    parameters = _parameters(tree)
    problems: list[str] = []

    def place(path, leaf):
        name = _parameter_path(path_string(path), leaf.shape, parameters)
        if name is None:
            return NamedSharding(mesh, P())
        spec = parameter_spec(name, leaf.shape)
        problems.extend(_misfits(name, leaf.shape, spec, mesh))
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    if problems:
        listed = "\n  ".join(sorted(set(problems)))
        raise ValueError(
            f"sharding: these dimensions cannot be cut evenly:\n  {listed}\nChoose axes of "
            "LayoutConfig that divide them, or other sizes in ModelConfig."
        )
    return shardings


def cut_as_parameters(tree: Any) -> Any:
    """Gradients, or whatever else is like parameters, cut as these are; without a mesh, the tree.

    Args:
      tree: of some top-level names of the model's parameters.
    """
    if several_devices() is None:
        return tree

    def cut(path, leaf):
        spec = parameter_spec(path_string(path), leaf.shape)
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree_util.tree_map_with_path(cut, tree)


def for_generation(params: Any, dtype: Any) -> Any:
    """Parameters cast, and gathered along the axes that cut them for training, once for all tokens.

    Otherwise every new token would cast and gather them again. Experts stay on their devices, and
    "tensor" still cuts everything.

    Args:
      params: the model's, as they live in training.
      dtype: of computation, to which matrices are cast anyway; quantised ones stay as they are.
    """
    alone = several_devices() is None

    def gather(path, leaf):
        name = path_string(path)
        if name.split("/")[-1] in COMPUTED and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        if alone:
            return leaf
        spec = parameter_spec(name, leaf.shape)
        kept = [axes if axes in ("tensor", "expert") else None for axes in spec]
        return jax.lax.with_sharding_constraint(leaf, P(*kept))

    return jax.tree_util.tree_map_with_path(gather, params)


def _parameters(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's variables by path; those of a training state's `params` and `rest`."""
    variables = tree
    if hasattr(tree, "params"):
        variables = (tree.params, tree.rest)
    elif isinstance(tree, dict):
        variables = (tree,)
    return {
        path_string(path).split("/", 1)[1]: leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }


def _parameter_path(
    path: str, shape: tuple[int, ...], parameters: dict[str, tuple[int, ...]]
) -> str | None:
    """The parameter that a leaf belongs to: the longest end of its path that is one's path."""
    names = path.split("/")
    for start in range(len(names)):
        name = "/".join(names[start:])
        if parameters.get(name) == shape:
            return name
    return None


def _misfits(name: str, shape: tuple[int, ...], spec: jax.P, mesh: Mesh) -> list[str]:
    found = []
    for size, axes in zip(shape, spec, strict=True):
        cut = parts(mesh.shape, axes)
        if size % cut:
            found.append(f"{name} {shape}: {size} over {axes} = {cut}")
    return found


# ---------------------------------------------------------------------------------------------
# Rows of batches
# ---------------------------------------------------------------------------------------------


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Of an array whose dimension `axis` are rows."""
    return NamedSharding(mesh, P(*([None] * axis), ROWS))


def batch_shardings(mesh: Mesh, experts: bool = False) -> Minibatch:
    """Of every field of a minibatch, with or without experts that are replayed."""
    fields: dict[str, Any] = {
        name: rows_sharding(mesh, LEADING.get(name, 0)) for name in Minibatch.__dataclass_fields__
    }
    return Minibatch(**fields if experts else {**fields, "experts": None})


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, P())
