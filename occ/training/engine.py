"""A run's rollout engine, where it is not this process."""

from __future__ import annotations

import jax

from occ.generation.engines import RolloutEngine
from occ.generation.engines.vllm import VLLMEngine
from occ.training.config import TrainConfig
from occ.training.start.pretrained import folder_of


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
        like=folder_of(config),
        keep_experts=config.rollout.routing_replay,
    )
