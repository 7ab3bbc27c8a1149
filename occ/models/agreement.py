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


def check_agrees(config: ModelConfig, found: ModelConfig, source: str) -> None:
    """Raises if a configuration describes another model than files hold.

    Dtypes, rematerialisation and the like are the configuration's choice, and so are a shorter
    context and, where the files have none, MTP modules.

    Args:
      config: what is wanted.
      found: what the files say.
      source: their name, for the message.

    Raises:
      ValueError: lists the fields that differ.
    """
    names = [*DESCRIBED, "mtp"] if found.mtp.num_modules else [*DESCRIBED]
    if found.moe is not None and config.moe is not None:
        # Buffers between devices are the configuration's choice as well.
        capacity = config.moe.capacity_factor
        found = dataclasses.replace(
            found, moe=dataclasses.replace(found.moe, capacity_factor=capacity)
        )
    differ = [
        f"{name}: {getattr(config, name)} in the configuration, {getattr(found, name)} in the files"
        for name in names
        if getattr(config, name) != getattr(found, name)
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
