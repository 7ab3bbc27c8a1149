"""A run's rollout engine, where it is not this process."""

from __future__ import annotations

import pathlib

import jax

from occ.generation.engines import RolloutEngine
from occ.generation.engines.vllm import VLLMEngine
from occ.training.config import TrainConfig


def build_engine(config: TrainConfig, max_length: int) -> RolloutEngine | None:
    """The engine that `config.engine` names; nothing is started yet. None is this process.

    Args:
      config: of the run.
      max_length: tokens of a prompt and its response.

    Raises:
      ValueError: several processes train, or the engine has no such model.
    """
    if not config.engine.external:
        return None
    if jax.process_count() > 1:
        raise ValueError(
            f"engine {config.engine.kind!r} takes the weights of one process, got "
            f"{jax.process_count()} that train together. Use the in-process engine."
        )
    return VLLMEngine(
        config.engine,
        config.model,
        max_length,
        like=_like(config),
        keep_experts=config.rollout.routing_replay,
    )


def _like(config: TrainConfig) -> pathlib.Path | None:
    """The folder that the run began from, if there is one."""
    if config.pretrained is None:
        return None
    path = pathlib.Path(config.pretrained.path)
    return path if path.is_dir() else None
