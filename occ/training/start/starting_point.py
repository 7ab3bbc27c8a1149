"""The policy that a run starts from: weights of others or fresh ones, and what comes before RL."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from occ.buckets import Path
from occ.models.parameters import partition
from occ.models.policy import Policy
from occ.models.pretrained.model import PretrainedWarning
from occ.tasks import Task
from occ.training.config import TrainConfig
from occ.training.durable.bad_updates import check_finite
from occ.training.programs import Programs, init_policy
from occ.training.start.demonstrations import learn_from_demonstrations
from occ.training.start.own_samples import warm_up_modules
from occ.training.start.pretrained import load_policy, stamp
from occ.training.start.saved import load_start, save_start
from occ.training.state import TrainState, frozen_leaves
from occ.trees import path_string

OnStep = Callable[[int, list[float]], None]


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
      policy: the model.
      report: what its warm start was good for, in words; "" where none was made now.
    """

    policy: Policy
    report: str = ""


def starting_point(
    config: TrainConfig,
    task: Task,
    programs: Programs,
    folder: Path,
    on_step: OnStep = lambda step, losses: None,
) -> Start:
    """The policy after the warm start, from the folder if it was made there before.

    The cache is keyed on everything that decides it, so a changed setting never finds a stale one.
    What is not finite is neither kept nor returned.

    Args:
      config: of the run.
      task: what is demonstrated, or answered.
      programs: of the run.
      folder: where starting points are kept.
      on_step: called with the step and the cross-entropies of the warm start now and then.

    Raises:
      FloatingPointError: a parameter is not finite; says which.
      DiskFullError: the starting point could not be kept.
    """
    decides = what_decides(config)
    like = programs.state.policy(config.model)
    if config.warm_start.learns_modules:
        # The rest of the model is in its own files, or quickly made.
        fresh = initial_policy(config)
        modules = load_start(folder, decides, (partition(like.params).modules, {}))
        if modules is not None:
            return Start(fresh.replace(params={**fresh.params, **modules[0]}))
        start = _warm_start(config, task, programs, fresh, on_step)
        save_start(folder, decides, (partition(start.policy.params).modules, {}))
        return start
    if config.pretrained is not None and not config.warm_start.steps:
        return Start(initial_policy(config))
    if config.model.lora is not None:  # the frozen trunk is in its own files, or quickly made
        fresh = initial_policy(config)
        trained = load_start(folder, decides, (like.params, {}))
        if trained is not None:
            return Start(fresh.replace(params=trained[0]))
        start = _warm_start(config, task, programs, fresh, on_step)
        save_start(folder, decides, (start.policy.params, {}))
        return start
    saved = load_start(folder, decides, (like.params, like.rest))
    if saved is not None:
        return Start(Policy(config.model, *saved))
    start = _warm_start(config, task, programs, initial_policy(config), on_step)
    save_start(folder, decides, (start.policy.params, start.policy.rest))
    return start


def initial_policy(config: TrainConfig) -> Policy:
    """Pretrained or fresh variables of the model, where they will live."""
    return init_policy(config) if config.pretrained is None else load_policy(config)


def with_frozen(config: TrainConfig, state: TrainState) -> TrainState:
    """The state, in place of whose frozen leaves are the weights that the run began from.

    A run with adapters does not write them; a state of shapes then serves to read a checkpoint.
    Without adapters the state is returned as it is.

    Args:
      config: of the run.
      state: arrays or shapes.
    """
    if config.model.lora is None:
        return state
    with warnings.catch_warnings():
        # That fresh modules were never trained; the checkpoint's were.
        warnings.simplefilter("ignore", PretrainedWarning)
        rest = initial_policy(config).rest
    is_frozen = frozen_leaves(config.model)

    def bring(path, leaf, weight):
        return weight if is_frozen(f"rest/{path_string(path)}") else leaf

    return state.replace(rest=jax.tree_util.tree_map_with_path(bring, state.rest, rest))


def what_decides(config: TrainConfig) -> dict[str, Any]:
    """All settings that a starting point depends on."""
    settings = config.warm_start
    decides = {
        "model": dataclasses.asdict(config.model),
        "warm_start": dataclasses.asdict(settings),
        "task": [config.task, config.task_options],
        "seed": config.seed,
    }
    if config.pretrained is not None:
        decides["pretrained"] = [
            dataclasses.asdict(config.pretrained),
            stamp(config.pretrained.path),
        ]
    if settings.learns_modules:
        decides["sampling"] = [
            dataclasses.asdict(config.rollout),
            config.max_prompt_tokens,
            config.max_response_tokens,
        ]
    return decides


def _warm_start(
    config: TrainConfig, task: Task, programs: Programs, fresh: Policy, on_step: OnStep
) -> Start:
    with jax.set_mesh(programs.mesh):
        if config.warm_start.learns_modules:
            warmed = warm_up_modules(programs, fresh, config, task, on_step)
            shares = (
                ", ".join(f"{share:.3f}" for share in both)
                for both in (warmed.before, warmed.after)
            )
            start = Start(warmed.policy, "MTP acceptance on own samples {} to {}".format(*shares))
        else:
            start = Start(learn_from_demonstrations(fresh, config, task, on_step))
        check_finite(start.policy.params, "the model after the warm start")
    return jax.block_until_ready(start)
