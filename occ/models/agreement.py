"""Whether a configuration describes the model that files hold."""

from __future__ import annotations

import dataclasses

from occ.models.config import ModelConfig

DESCRIBED = (
    "vocab_size",
    "num_layers",
    "width",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_width",
    "rope_base",
    "rope_scaling",
    "rotary_fraction",
    "norm_epsilon",
    "qkv_bias",
    "qk_norm",
    "tied_embeddings",
    "moe",
)
"""Fields of `ModelConfig` that files decide; of the MTP modules, all if they hold any."""


def as_described(config: ModelConfig, found: ModelConfig) -> ModelConfig:
    """A configuration on the model that files hold, with what they leave open as it is.

    Dtypes, rematerialisation and the like are the configuration's choice, and so are a shorter
    context, buffers between devices and, where the files have none, MTP modules.

    Args:
      config: what is wanted.
      found: what the files say.
    """
    names = [*DESCRIBED, "mtp"] if found.mtp.num_modules else [*DESCRIBED]
    changes = {name: getattr(found, name) for name in names}
    if found.moe is not None and config.moe is not None:
        capacity = config.moe.capacity_factor
        changes["moe"] = dataclasses.replace(found.moe, capacity_factor=capacity)
    changes["max_length"] = min(config.max_length, found.max_length)
    return dataclasses.replace(config, **changes)


def check_agrees(config: ModelConfig, found: ModelConfig, source: str) -> None:
    """Raises if a configuration describes another model than files hold (`as_described`).

    Args:
      config: what is wanted.
      found: what the files say.
      source: their name, for the message.

    Raises:
      ValueError: lists the fields that differ.
    """
    there = as_described(config, found)
    differ = [
        f"{name}: {getattr(config, name)} in the configuration, {getattr(there, name)} in the files"
        for name in (*DESCRIBED, "mtp")
        if getattr(config, name) != getattr(there, name)
    ]
    if config.max_length > found.max_length:
        differ.append(
            f"max_length: {config.max_length} exceeds the {found.max_length} of the files"
        )
    if differ:
        listed = "\n  ".join(differ)
        raise ValueError(
            f"{source} holds another model than ModelConfig describes:\n  {listed}\nTake these "
            "values in the configuration, or other files."
        )
