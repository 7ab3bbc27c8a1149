"""Weights out: a policy as a published folder, tensor by tensor."""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from occ import buckets
from occ.buckets import Path
from occ.extras import require
from occ.models.config import ModelConfig
from occ.models.lora import merge
from occ.models.policy import Policy
from occ.models.pretrained import architectures, names
from occ.models.pretrained.folder import (
    DIGESTS,
    INDEX,
    PICKLED,
    SINGLE,
    WeightFolder,
    write_digests,
)
from occ.models.pretrained.names import Stored
from occ.sources import resolve
from occ.trees import path_string

SHARD_BYTES = 2 * 2**30
"""Size that a file does not exceed, and so what is in host memory at one time."""

WEIGHTS = (*PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack")


class _Tensor(NamedTuple):
    """A tensor to be written: its place in a leaf, and the type that it is written in."""

    path: str
    place: tuple[int, ...]
    transposed: bool
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def save(
    path: str | Path,
    policy: Policy,
    *,
    config: ModelConfig | None = None,
    like: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a folder that `load` and other tools read; adapters merged into kernels.

    The folder appears when it is whole, with digests that `load` compares. In a bucket its files
    come one by one, from a copy on this host's disk, and config.json last. Of several processes all
    take part and the first writes.

    Args:
      path: the folder, which must not exist; may be "gs://BUCKET/FOLDER".
      policy: the model, its arrays on any mesh.
      config: what config.json is to say where it differs (a longer context); None takes the
        policy's own.
      like: the folder that the model was loaded from. Its names, dtypes, config.json and other
        files (tokenizer) are kept; a model that has not changed is written back to the same bits.
        None writes `param_dtype`, and no tokenizer.
      shard_bytes: size that a file does not exceed, unless by one tensor.

    Raises:
      ValueError: the folder exists, or the architecture has no published form.
    """
    require("pretrained", "occ.models.pretrained", "safetensors")
    target = buckets.path(path)
    if target.exists():
        raise ValueError(f"save: {target} exists already. Choose another folder, or delete it.")
    if buckets.is_bucket(target):
        with tempfile.TemporaryDirectory() as here:
            written = pathlib.Path(here) / target.name
            save(written, policy, config=config, like=like, shard_bytes=shard_bytes)
            if jax.process_index() == 0:
                from occ.buckets.staging import publish

                publish(written, target, last="config.json")
        return
    policy = merge(policy)
    config = policy.config if config is None else config.whole
    if like is not None and str(like).startswith("gs://"):
        like = resolve(str(like))
    source = None if like is None else WeightFolder(like)
    raw = architectures.to_json(
        config, None if source is None else architectures.read_json(source.path)
    )
    tensors = _tensors(config, raw, source)
    variables = {
        path_string(at): leaf
        for tree in (policy.params, policy.rest)
        for at, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    beside = target.with_name(target.name + ".new")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        if source is not None:
            _copy_other_files(source.path, beside)
        _write_json(beside / "config.json", raw)
    _write_shards(beside, tensors, _gather(variables), shard_bytes, first)
    if first:
        write_digests(beside)
        beside.rename(target)


def _tensors(
    config: ModelConfig, raw: dict[str, Any], source: WeightFolder | None
) -> dict[str, _Tensor]:
    """Everything that is to be written, by name."""
    tensors = {}
    for path, leaf in names.stored_leaves(config).items():
        for index, name in leaf.names.items():
            dtype = _dtype(name, leaf, raw, source)
            tensors[name] = _Tensor(path, index, leaf.transposed, leaf.tensor_shape, dtype)
    for copy in names.copies(config):
        if _is_written(copy, source):
            original = tensors[copy.original]
            if source is not None and copy.name in source.tensors:
                original = original._replace(dtype=source.dtype(copy.name))
            tensors[copy.name] = original
    return tensors


def _dtype(name: str, leaf: Stored, raw: dict[str, Any], source: WeightFolder | None) -> np.dtype:
    if source is None:
        return leaf.dtype
    if name in source.tensors:
        return source.dtype(name)
    # Of modules that were attached; a router's bias is float32 everywhere.
    given = np.dtype(raw.get("torch_dtype", raw.get("dtype", "float32")))
    return leaf.dtype if name.endswith("e_score_correction_bias") else given


def _is_written(copy: names.Copy, source: WeightFolder | None) -> bool:
    """Copies are written where they were, and with modules that are new."""
    if source is not None and copy.name in source.tensors:
        return True
    if copy.layer is None:
        return False
    return source is None or not any(name.startswith(copy.layer) for name in source.tensors)


def _gather(variables: dict[str, jax.Array]) -> Callable[[_Tensor], np.ndarray]:
    """The function that brings one tensor to the host, in every process."""

    def gather(tensor: _Tensor) -> np.ndarray:
        piece = _tensor(variables[tensor.path], tensor.place)
        if not piece.is_fully_addressable:
            piece = multihost_utils.process_allgather(piece, tiled=True)
        value = np.asarray(piece).astype(tensor.dtype, copy=False)
        return np.ascontiguousarray(value.T if tensor.transposed else value)

    return gather


@jax.jit
def _tensor(leaf: Any, place: tuple[Any, ...]) -> jax.Array:
    """One tensor of a leaf; compiled once for each shape and not for each layer and expert."""
    for index in place:
        leaf = jax.lax.dynamic_index_in_dim(leaf, index, axis=0, keepdims=False)
    return leaf


def _write_shards(
    folder: pathlib.Path,
    tensors: dict[str, _Tensor],
    gather: Callable[[_Tensor], np.ndarray],
    shard_bytes: int,
    first: bool,
) -> None:
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE if len(shards) == 1 else file
        values = {name: gather(tensors[name]) for name in shard}
        if first:
            save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if first and len(shards) > 1:
        total = sum(tensor.bytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_other_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Tokenizer, chat template, licence: all but the weights and what describes them."""
    for file in source.iterdir():
        described = file.name in ("config.json", DIGESTS) or file.name.endswith(".index.json")
        if file.is_file() and not described and file.suffix not in WEIGHTS:
            shutil.copyfile(file, target / file.name)


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
