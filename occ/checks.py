"""What every configuration checks of its fields when it is made: kinds from the hints, one table.

A value that would crash a run minutes later, or train it wrongly, is named at once, with what was
expected and what came.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Hashable
from typing import Any

ABOVE_ZERO = "> 0"
ABOVE_ONE = "> 1"
NOT_NEGATIVE = ">= 0"
BELOW_ONE = "in [0, 1)"
SHARE = "in [0, 1]"
NUCLEUS = "in (0, 1]"

RANGES = {
    "ModelConfig": {
        "vocab_size": ABOVE_ZERO,
        "num_layers": ABOVE_ZERO,
        "width": ABOVE_ZERO,
        "num_heads": ABOVE_ZERO,
        "num_kv_heads": ABOVE_ZERO,
        "head_dim": ABOVE_ZERO,
        "mlp_width": ABOVE_ZERO,
        "max_length": ABOVE_ZERO,
        "rope_base": ABOVE_ZERO,
        "rotary_fraction": NUCLEUS,
        "norm_epsilon": NOT_NEGATIVE,
        "attention_chunk": NOT_NEGATIVE,
    },
    "MTPConfig": {"num_modules": NOT_NEGATIVE},
    "MoEConfig": {
        "num_experts": ABOVE_ZERO,
        "experts_per_token": ABOVE_ZERO,
        "expert_width": ABOVE_ZERO,
        "num_shared_experts": NOT_NEGATIVE,
        "num_groups": ABOVE_ZERO,
        "top_groups": ABOVE_ZERO,
        "capacity_factor": ABOVE_ZERO,
    },
    "LoRAConfig": {"rank": ABOVE_ZERO, "alpha": ABOVE_ZERO},
    "RopeScaling": {"factor": ABOVE_ZERO, "original_length": ABOVE_ZERO},
    "PolicyConfig": {
        "clip_low": SHARE,
        "clip_high": NOT_NEGATIVE,
        "dual_clip": ABOVE_ONE,
        "log_ratio_clamp": ABOVE_ZERO,
        "positive_temperature": ABOVE_ZERO,
        "negative_temperature": ABOVE_ZERO,
    },
    "ObjectiveConfig": {
        "constant_length": ABOVE_ZERO,
        "gamma": SHARE,
        "kl_coefficient": NOT_NEGATIVE,
        "kl_clamp": ABOVE_ZERO,
        "importance_cap": ABOVE_ZERO,
    },
    "MTPTrainingConfig": {
        "eps": NOT_NEGATIVE,
        "relative_ridge": NOT_NEGATIVE,
        "smoothing": BELOW_ONE,
        "every": ABOVE_ZERO,
        "distilled_tokens": ABOVE_ZERO,
    },
    "OptimizerConfig": {
        "learning_rate": NOT_NEGATIVE,
        "warmup_steps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "b1": BELOW_ONE,
        "b2": BELOW_ONE,
        "adam_epsilon": ABOVE_ZERO,
        "clip_norm": ABOVE_ZERO,
        "router_bias_rate": NOT_NEGATIVE,
    },
    "RolloutConfig": {
        "prompts": ABOVE_ZERO,
        "samples": ABOVE_ZERO,
        "minibatches": ABOVE_ZERO,
        "temperature": ABOVE_ZERO,
        "top_p": NUCLEUS,
        "top_k": NOT_NEGATIVE,
        "overlong_buffer": NOT_NEGATIVE,
        "overlong_penalty": NOT_NEGATIVE,
    },
    "EvaluationConfig": {
        "every": ABOVE_ZERO,
        "prompts": ABOVE_ZERO,
        "samples": ABOVE_ZERO,
        "temperature": ABOVE_ZERO,
        "top_p": NUCLEUS,
    },
    "EngineConfig": {
        "draft_depth": NOT_NEGATIVE,
        "cache_gib": ABOVE_ZERO,
        "memory_share": NUCLEUS,
        "tensor": ABOVE_ZERO,
        "importance_cap": ABOVE_ZERO,
        "largest_mismatch": ABOVE_ZERO,
        "start_seconds": ABOVE_ZERO,
        "request_seconds": ABOVE_ZERO,
        "silence_seconds": ABOVE_ZERO,
    },
    "WarmStartConfig": {
        "steps": NOT_NEGATIVE,
        "batch_size": ABOVE_ZERO,
        "learning_rate": ABOVE_ZERO,
        "clean_steps": NOT_NEGATIVE,
        "wrong_fraction": SHARE,
        "mtp_weight": NOT_NEGATIVE,
        "pool": ABOVE_ZERO,
    },
    "LayoutConfig": {
        "data": ABOVE_ZERO,
        "fsdp": ABOVE_ZERO,
        "tensor": ABOVE_ZERO,
        "expert": ABOVE_ZERO,
        "micro_batches": ABOVE_ZERO,
        "logits_chunk": NOT_NEGATIVE,
        "sequences_per_row": ABOVE_ZERO,
        "generation_rows": NOT_NEGATIVE,
        "draft_depth": NOT_NEGATIVE,
    },
    "TrainConfig": {
        "rollouts": ABOVE_ZERO,
        "max_prompt_tokens": ABOVE_ZERO,
        "max_response_tokens": ABOVE_ZERO,
        "checkpoint_every": ABOVE_ZERO,
        "keep_checkpoints": ABOVE_ZERO,
        "max_bad_updates": ABOVE_ZERO,
        "seed": NOT_NEGATIVE,
    },
}
"""The numbers that each field may have, by class and field."""

_HOLDS = {
    ABOVE_ZERO: lambda value: value > 0,
    ABOVE_ONE: lambda value: value > 1,
    NOT_NEGATIVE: lambda value: value >= 0,
    BELOW_ONE: lambda value: 0 <= value < 1,
    SHARE: lambda value: 0 <= value <= 1,
    NUCLEUS: lambda value: 0 < value <= 1,
}


def validate(config: Any) -> None:
    """Checks every field of a configuration: its kind, and its range in `RANGES`.

    A field whose metadata has "one_of" must be among the names in it as they are now, so that a
    measure that was registered a moment ago is legal.

    Args:
      config: a dataclass; its own `__post_init__` calls this first.

    Raises:
      ValueError: names the class, the field, what was expected and what came.
    """
    kind: Any = type(config)
    owner, hints = kind.__name__, _hints(kind)
    ranges = RANGES.get(owner, {})
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{owner}.{field.name}"
        names = field.metadata.get("one_of")
        if names is not None:
            _check_member(where, value, tuple(names))
        elif not _is_of_kind(value, hints[field.name]):
            _refuse(where, value, hints[field.name])
        number = value is not None and not isinstance(value, str)
        if number and field.name in ranges and not _HOLDS[ranges[field.name]](value):
            raise ValueError(f"{where} must be {ranges[field.name]}, got {value}.")


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _check_member(where: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{where} must be one of {allowed}, got {value!r}.")


def _refuse(where: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is typing.Literal:
        _check_member(where, value, typing.get_args(hint))
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ValueError(f"{where} must be {name}, got {value!r}.")


def _is_of_kind(value: Any, hint: Any) -> bool:
    """Whether a value is what a hint says; containers are not looked into."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of_kind(value, option) for option in typing.get_args(hint))
    if hint is float:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return number and not math.isnan(value)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, origin if isinstance(origin, type) else hint)
