"""What a run compiles, and the mesh that it is compiled for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from occ.models.policy import Policy, abstract_policy, create_policy
from occ.tasks import Task
from occ.training.config import TrainConfig
from occ.training.gradient.calibration import build_calibration
from occ.training.optimizer import build_optimizer
from occ.training.rollout import RolloutPrograms, build_programs, lengths
from occ.training.sharding import batch_shardings, make_mesh, replicated, tree_shardings
from occ.training.state import TrainState, init_state
from occ.training.step import TrainStep, make_train_step


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a run compiles; runs that differ by seed alone share it.

    Attributes:
      rollout: generation and scoring.
      train_step: jitted; it donates its state.
      begin: jitted `Policy -> TrainState`, a fresh state on the mesh around a copy of its
        variables, which serve further runs.
      take: the same around the variables themselves, which are then gone from the policy.
      mesh: all of them run on it, within `jax.set_mesh`.
      state: shapes of the training state, and where its arrays live.
    """

    rollout: RolloutPrograms
    train_step: TrainStep
    begin: Callable[[Policy], TrainState]
    take: Callable[[Policy], TrainState]
    mesh: Mesh
    state: TrainState


def build(config: TrainConfig, task: Task, rollout: RolloutPrograms | None = None) -> Programs:
    """Builds a run's programs, around those of a rollout that another regime compiled."""
    policy = abstract_policy(config.model)
    if rollout is None:
        rollout = build_programs(config, task)
    mesh = make_mesh(config.layout)
    state = abstract_state(config, policy, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def begin(policy):
        # Without a copy the very arrays would come out that went in.
        return fresh_state(config, jax.tree.map(jnp.copy, policy))

    return Programs(
        rollout,
        jit_train_step(config, mesh, state, lengths(config, task)[0]),
        jax.jit(begin, out_shardings=shardings),
        jax.jit(functools.partial(fresh_state, config), out_shardings=shardings, donate_argnums=0),
        mesh,
        state,
    )


def jit_train_step(
    config: TrainConfig,
    mesh: Mesh,
    state: TrainState,
    prompt_columns: int = 0,
) -> Any:
    """The train step for states and minibatches that live on the mesh as they should.

    Args:
      config, mesh: of the run.
      state: shapes and shardings, from `abstract_state`.
      prompt_columns: leading columns of padded minibatches that hold prompts alone.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    columns = 0 if config.layout.pack else prompt_columns
    step = make_train_step(config, prompt_columns=columns)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_shardings(mesh, config.rollout.routing_replay)),
        out_shardings=(shardings, replicated(mesh)),
    )


def abstract_state(config: TrainConfig, policy: Policy, mesh: Mesh) -> TrainState:
    """Shapes of the training state around a policy of shapes, each with its sharding."""
    shapes = jax.eval_shape(lambda policy: fresh_state(config, policy), policy)
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def fresh_state(config: TrainConfig, policy: Policy) -> TrainState:
    """The state in which a run begins, around the variables of a policy."""
    calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    return init_state(policy, build_optimizer(config.optimizer), calibration)


def init_policy(config: TrainConfig) -> Policy:
    """A policy with fresh variables, born where they will live."""
    mesh = make_mesh(config.layout)
    shapes = abstract_policy(config.model)
    shardings = shapes.replace(
        params=tree_shardings(shapes.params, mesh), rest=tree_shardings(shapes.rest, mesh)
    )
    create = functools.partial(create_policy, config.model, config.seed)
    with jax.set_mesh(mesh):
        return jax.jit(create, out_shardings=shardings)()
