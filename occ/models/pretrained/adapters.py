"""Adapters out and in, as a folder in the format of Hugging Face's PEFT.

    adapter_config.json           rank, alpha, target modules, the base model
    adapter_model.safetensors     base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight ...
    mtp_modules.safetensors       the MTP modules by their published names; PEFT does not read it

PEFT stores A as [rank, inputs] and B as [outputs, rank]: ours transposed.
"""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from occ import buckets, json_files
from occ.buckets import Path
from occ.extras import require
from occ.models.lora import is_adapter
from occ.models.parameters import ADAPTERS, MODULES
from occ.models.policy import Policy, abstract_policy
from occ.models.pretrained import names
from occ.models.pretrained.folder import listed
from occ.sources import resolve
from occ.trees import path_string

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE_WEIGHTS = "mtp_modules.safetensors"
PREFIX = "base_model.model."
THEIRS = dict(zip(ADAPTERS, ("lora_A.weight", "lora_B.weight"), strict=True))

Place = tuple[str, tuple[int, ...], bool]
"""Of a tensor: the leaf's path, the index of its leading dimensions, whether it is transposed."""


def save_adapters(path: str | Path, policy: Policy, *, base: str | None = None) -> None:
    """Writes the trained parts of a model with adapters, in their own dtype: PEFT's folder.

    The folder appears when it is whole; in a bucket its files come one by one, adapter_config.json
    last. Of several processes all take part and the first writes.

    Args:
      path: the folder, which must not exist; may be "gs://BUCKET/FOLDER".
      policy: the model, its arrays on any mesh.
      base: folder or name of the model that was adapted, which PEFT loads first. Adapters of a
        quantised trunk are then beside kernels that are not rounded, unlike those they learned
        beside.

    Raises:
      ValueError: the folder exists, the model has no adapters, or it is a mixture of experts with
        adapters in its MLPs.
    """
    target = buckets.path(path)
    _check_writable(policy)
    if target.exists():
        raise ValueError(f"save_adapters: {target} exists already. Choose another folder.")
    tensors = _gather(policy, {**_adapter_places(policy), **_module_places(policy)})
    if jax.process_index() != 0:
        return
    if buckets.is_bucket(target):
        from occ.buckets.staging import publish

        with tempfile.TemporaryDirectory() as here:
            _write(pathlib.Path(here), policy, tensors, base)
            publish(pathlib.Path(here), target, last=CONFIG)
        return
    beside = target.with_name(target.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _write(beside, policy, tensors, base)
    beside.rename(target)


def _check_writable(policy: Policy) -> None:
    lora = policy.config.lora
    if lora is None:
        raise ValueError("save_adapters: the model has no adapters. Write it whole, with `save`.")
    mlp = sorted({"gate", "up", "down"}.intersection(lora.kernels))
    if policy.config.moe is not None and mlp:
        raise ValueError(
            f"save_adapters: PEFT takes {mlp} of a mixture for those of its routed experts, which "
            "have no adapters. Write the model merged, with `save`, or adapt attention alone."
        )


def _write(
    folder: pathlib.Path, policy: Policy, tensors: dict[str, np.ndarray], base: str | None
) -> None:
    require("pretrained", "occ.models.pretrained", "safetensors")
    from safetensors.numpy import save_file

    lora = policy.config.lora
    assert lora is not None
    own = {name: value for name, value in tensors.items() if name.startswith(PREFIX)}
    modules = {name: value for name, value in tensors.items() if name not in own}
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({name.rsplit(".", 3)[1] for name in own}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json_files.dump(described, indent=2) + "\n", encoding="utf-8")
    save_file(own, folder / WEIGHTS, metadata={"format": "pt"})
    if modules:
        save_file(modules, folder / MODULE_WEIGHTS, metadata={"format": "pt"})


def load_adapters(path: str | Path, policy: Policy) -> Policy:
    """The model with the adapters of a PEFT folder, and its MTP modules where it holds some.

    Args:
      path: the folder, or what else `occ.sources.resolve` finds.
      policy: with adapters of the same rank, alpha and kernels, as `occ.models.lora.adapt` makes
        them; its other arrays are shared with the result.

    Raises:
      ValueError: rank, alpha or tensors are not the model's; they are named.
    """
    require("pretrained", "occ.models.pretrained", "safetensors")
    from safetensors.numpy import load_file

    folder, lora = pathlib.Path(path), policy.config.lora
    if lora is None:
        raise ValueError(
            "load_adapters: give the model adapters first, with occ.models.lora.adapt."
        )
    folder = resolve(str(path))
    raw = json_files.read_object(folder / CONFIG, "r", "lora_alpha")
    if (raw["r"], float(raw["lora_alpha"])) != (lora.rank, lora.alpha):
        raise ValueError(
            f"{folder / CONFIG}: rank {raw['r']} and alpha {raw['lora_alpha']}, the model has "
            f"{lora.rank} and {lora.alpha}. Take these in LoRAConfig."
        )
    places, tensors = _adapter_places(policy), load_file(folder / WEIGHTS)
    if (folder / MODULE_WEIGHTS).exists():
        places |= _module_places(policy)
        tensors |= load_file(folder / MODULE_WEIGHTS)
    if wrong := sorted(places.keys() ^ tensors.keys()):
        raise ValueError(
            f"load_adapters: tensors that either {folder} or the model lacks:{listed(wrong)}\n"
            "LoRAConfig.kernels must name those that the folder's target_modules do."
        )
    leaves = {path: np.array(leaf) for path, leaf in _leaves(policy).items()}
    for name, (at, index, transposed) in places.items():
        value = tensors[name].T if transposed else tensors[name]
        if value.shape != leaves[at][index].shape:
            raise ValueError(
                f"load_adapters: {name} has shape {tensors[name].shape}, which is not that of the "
                f"model's {at}, {leaves[at][index].shape}{' transposed' if transposed else ''}."
            )
        leaves[at][index] = value

    def put(at, leaf):
        return jax.device_put(leaves[path_string(at)], leaf.sharding)

    return policy.replace(params=jax.tree_util.tree_map_with_path(put, policy.params))


def _leaves(policy: Policy) -> dict[str, Any]:
    return {path_string(p): x for p, x in jax.tree_util.tree_leaves_with_path(policy.params)}


def _adapter_places(policy: Policy) -> dict[str, Place]:
    """Every tensor of the adapters, by PEFT's name: that of its kernel, which is a row's."""
    kernels = names.stored_leaves(policy.config.whole)
    places = {}
    for path in filter(is_adapter, _leaves(abstract_policy(policy.config))):
        layer, mine = path.rsplit("/", 1)
        for index, name in kernels[f"{layer}/kernel"].names.items():
            theirs = f"{PREFIX}{name.removesuffix('weight')}{THEIRS[mine]}"
            places[theirs] = (path, index, True)
    return places


def _module_places(policy: Policy) -> dict[str, Place]:
    """Every tensor of the MTP modules, by its published name."""
    return {
        name: (path, index, stored.transposed)
        for path, stored in names.stored_leaves(policy.config.whole).items()
        if path.split("/")[0] in MODULES and "router_bias" not in path
        for index, name in stored.names.items()
    }


def _gather(policy: Policy, places: dict[str, Place]) -> dict[str, np.ndarray]:
    """The tensors on the host, in every process."""
    leaves, whole = _leaves(policy), {}
    for path in sorted({path for path, _, _ in places.values()}):
        leaf = leaves[path]
        if not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        whole[path] = np.asarray(leaf)
    return {
        name: np.ascontiguousarray(np.swapaxes(whole[path][index], -1, -2))
        if transposed
        else np.ascontiguousarray(whole[path][index])
        for name, (path, index, transposed) in places.items()
    }
