"""Weights in: a published folder as a policy, each leaf straight to its place."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occ.models.config import ModelConfig
from occ.models.policy import Policy, abstract_policy
from occ.models.pretrained import architectures, names
from occ.models.pretrained.folder import WeightFolder, check_digests, listed
from occ.models.pretrained.model import PretrainedWarning
from occ.models.pretrained.names import Stored
from occ.sources import resolve
from occ.trees import path_string

DERIVED = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors in old files that follow from config.json."""

CHUNK = 2**24
"""Numbers that are compared at one time."""


PIECE_BYTES = 2**26
"""Parts of leaves that are larger are brought to their device one layer at a time."""


def read_config(path: str | pathlib.Path, **overrides: Any) -> ModelConfig:
    """The architecture of a published folder, as its files are.

    MTP modules that config.json counts and no file holds are left out, with a warning (see
    `attach`). An embedding or output head stored with a module is the module's own where it is no
    copy of the trunk's.

    Args:
      path: the folder.
      overrides: fields of `ModelConfig`, such as param_dtype="float32" or remat="full".

    Raises:
      ValueError: the architecture, or the folder, is not supported; a message says what to do.
    """
    folder = WeightFolder(path)
    return dataclasses.replace(_config(folder), **overrides)


def load(
    path: str | pathlib.Path, config: ModelConfig | None = None, *, shardings: Any = None
) -> Policy:
    """Loads a published folder of safetensors files, or a .gguf file.

    Every device is given its own part of every leaf, one layer after another: what is in host
    memory at one time is that part of one layer's tensor (of a mixture, of its experts').

    Args:
      path: the folder or the file, also as "gs://BUCKET/FOLDER"; or "package:NAME" for the file
        that an installed package holds.
      config: the architecture; None reads the folder's. Leaves take its `param_dtype`.
      shardings: (of params, of rest), trees of `jax.sharding.Sharding` as
        `occ.training.sharding.tree_shardings` makes them; None is the default device.

    Raises:
      ValueError: tensors are missing, left over or of another shape, and all are listed; or a file
        of a folder that `save` wrote has changed; or the configuration has adapters.
    """
    if config is not None and config.lora is not None:
        raise ValueError(
            "load: files hold models without adapters. Load with config.whole, then "
            "occ.models.lora.adapt(policy, config)."
        )
    elsewhere = str(path).startswith(("package:", "gs://"))
    source = resolve(str(path)) if elsewhere else pathlib.Path(path)
    if source.suffix == ".gguf":
        from occ.models import gguf  # here, since folders are read without that package

        return gguf.load(source, config, shardings=shardings)
    folder = WeightFolder(source)
    if jax.process_index() == 0:
        check_digests(source)
    if config is None:
        config = _config(folder)
    _check_counts(folder, config)
    stored = names.stored_leaves(config)
    _check_complete(folder, stored, config)
    _warn_of_rounding(folder, stored)

    def fill(path, leaf, sharding=None):
        return _leaf(folder, stored[path_string(path)], sharding)

    shapes = abstract_policy(config)
    trees = shapes.params, shapes.rest
    places: Any = [()] * len(trees) if shardings is None else [(tree,) for tree in shardings]
    params, rest = (
        jax.tree_util.tree_map_with_path(fill, tree, *place)
        for tree, place in zip(trees, places, strict=True)
    )
    return Policy(config, params, rest)


def _config(folder: WeightFolder) -> ModelConfig:
    """The architecture of config.json, with the MTP modules as they are stored."""
    raw = architectures.read_json(folder.path)
    try:
        config = architectures.from_json(raw)
        _check_counts(folder, config)
    except ValueError as error:
        raise ValueError(f"{folder.path / 'config.json'}: {error}") from error
    prefixes = [names.module_prefix(k, config) for k in range(config.mtp.num_modules)]
    if prefixes and not any(name.startswith(tuple(prefixes)) for name in folder.tensors):
        warnings.warn(
            f"{folder.path}: config.json counts {len(prefixes)} MTP module(s), and the files hold "
            "none (other tools leave them out when they save). The model is loaded without; "
            "occ.models.pretrained.attach creates fresh ones.",
            PretrainedWarning,
            stacklevel=4,
        )
        return dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, num_modules=0))
    own: dict[str, Any] = {
        copy.field: True
        for copy in names.copies(config)
        if copy.field is not None and copy.name in folder.tensors and not _equal(folder, copy)
    }
    return dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, **own))


def _check_counts(folder: WeightFolder, config: ModelConfig) -> None:
    """That there can be so many layers, before each tensor of each is named."""
    experts = 1 if config.moe is None else config.moe.num_experts
    dense = 0 if config.moe is None else config.moe.first_dense_layers
    least = max(dense + (config.num_layers - dense) * experts, config.mtp.num_modules)
    if least > len(folder.tensors):
        raise ValueError(
            f"{config.num_layers} layers of {experts} MLPs and {config.mtp.num_modules} MTP "
            f"modules need more tensors than the {len(folder.tensors)} in {folder.path}. Do "
            "configuration and weights belong to one model?"
        )


def _equal(folder: WeightFolder, copy: names.Copy) -> bool:
    """Whether two stored tensors are the same, compared a few rows at a time."""
    one, other = (folder.tensors.get(name) for name in (copy.name, copy.original))
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    rows = max(CHUNK // max(math.prod(one.shape[1:]), 1), 1)
    for start in range(0, one.shape[0], rows):
        window = (slice(start, min(start + rows, one.shape[0])),)
        pair = (folder.read(name, window) for name in (copy.name, copy.original))
        if len({piece.tobytes() for piece in pair}) > 1:  # bits: 0 and -0 are written back apart
            return False
    return True


def _check_complete(folder: WeightFolder, stored: dict[str, Stored], config: ModelConfig) -> None:
    expected = {name: leaf.tensor_shape for leaf in stored.values() for name in leaf.names.values()}
    copies = {copy.name: copy for copy in names.copies(config)}
    found = {name: info.shape for name, info in folder.tensors.items()}
    both = expected.keys() & found.keys()
    extra = sorted(
        name for name in found.keys() - expected.keys() - copies.keys() if not DERIVED.search(name)
    )
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "left over": extra,
        "of another shape": [
            f"{name}: expected {expected[name]}, got {found[name]}"
            for name in sorted(both)
            if expected[name] != found[name]
        ],
        "not the copy that the configuration takes it for": [
            f"{name}: differs from {copy.original} ({_remedy(copy)})"
            for name, copy in copies.items()
            if name in found and not _equal(folder, copy)
        ],
    }
    lines = [f"\n{kind}:{listed(those)}" for kind, those in problems.items() if those]
    if lines:
        raise ValueError(
            f"load: the tensors in {folder.path} are not those of the configuration."
            f"{''.join(lines)}\nCompare ModelConfig with the folder's config.json; "
            "read_config(folder) is the configuration that fits it."
        )


def _remedy(copy: names.Copy) -> str:
    if copy.field is None:
        return "load with tied_embeddings=False to keep it"
    return f"MTPConfig.{copy.field}=True keeps it apart"


def _warn_of_rounding(folder: WeightFolder, stored: dict[str, Stored]) -> None:
    rounded = sorted(
        name
        for leaf in stored.values()
        for name in leaf.names.values()
        if not np.can_cast(folder.dtype(name), leaf.dtype, "safe")
    )
    if rounded:
        warnings.warn(
            f"load: {len(rounded)} tensors of {folder.path} are rounded to a narrower type, such "
            f"as {rounded[0]} from {folder.dtype(rounded[0])}; written back they will differ. "
            "ModelConfig.param_dtype decides: float32 holds all of them exactly.",
            PretrainedWarning,
            stacklevel=3,
        )


def _leaf(folder: WeightFolder, stored: Stored, sharding: Any) -> jax.Array:
    if sharding is None:
        whole = tuple(slice(0, size) for size in stored.shape)
        return _on_devices(folder, stored, whole, [None])[0]
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, window in sharding.addressable_devices_indices_map(stored.shape).items():
        bounds = _bounds(window, stored.shape)
        holders.setdefault(bounds, []).append(device)
    parts = [
        part
        for bounds, devices in holders.items()
        for part in _on_devices(folder, stored, tuple(slice(*b) for b in bounds), devices)
    ]
    return jax.make_array_from_single_device_arrays(stored.shape, sharding, parts)


def _bounds(window: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Beginning and end of a window along each dimension."""
    ranges = [cut.indices(size) for cut, size in zip(window, shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in ranges)


def _on_devices(
    folder: WeightFolder, stored: Stored, window: tuple[slice, ...], devices: list[Any]
) -> list[jax.Array]:
    """A part of a leaf on each device that holds it; large ones get there layer by layer."""
    shape = tuple(s.stop - s.start for s in window)
    if not stored.leading or math.prod(shape) * stored.dtype.itemsize <= PIECE_BYTES:
        part = _window(folder, stored, window)
        return [jax.device_put(part, device) for device in devices]
    parts = [jnp.zeros(shape, stored.dtype, device=device) for device in devices]
    for i in range(shape[0]):
        start = window[0].start + i
        piece = _window(folder, stored, (slice(start, start + 1), *window[1:]))
        # Waiting, since pieces that are still on their way are in host memory.
        parts = [jax.block_until_ready(_put(part, piece, i)) for part in parts]
    return parts


@functools.partial(jax.jit, donate_argnums=0)
def _put(part: jax.Array, piece: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(part, piece, index, axis=0)


def _window(folder: WeightFolder, stored: Stored, window: tuple[slice, ...]) -> np.ndarray:
    """A part of a leaf, as one device holds it."""
    ranges = [range(*bounds) for bounds in _bounds(window, stored.shape)]
    part = np.empty([len(numbers) for numbers in ranges], stored.dtype)
    for target, index in _indices(ranges[: stored.leading]):
        inner = tuple(slice(r.start, r.stop) for r in ranges[stored.leading :])
        if stored.transposed:
            part[target] = folder.read(stored.names[index], inner[::-1]).T
        else:
            part[target] = folder.read(stored.names[index], inner)
    return part


def _indices(ranges: list[range]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Indices within a part, and those within the whole."""
    for pairs in itertools.product(*(enumerate(numbers) for numbers in ranges)):
        yield tuple(i for i, _ in pairs), tuple(index for _, index in pairs)
