"""What a run compiles, and the mesh that it is compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from occ.models.decoder import Decoder, split_model
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
      graphdef: the model without its variables.
      rollout: generation and scoring.
      train_step: jitted; it donates its state.
      begin: jitted `(params, rest) -> TrainState`, a fresh state on the mesh around a copy of given
        variables, which serve further runs.
      mesh: all of them run on it, within `jax.set_mesh`.
      state: shapes of the training state, and where its arrays live.
    """

    graphdef: nnx.GraphDef
    rollout: RolloutPrograms
    train_step: TrainStep
    begin: Callable[[Any, Any], TrainState]
    mesh: Mesh
    state: TrainState


def build(config: TrainConfig, task: Task, rollout: RolloutPrograms | None = None) -> Programs:
    """Builds a run's programs, around those of a rollout that another regime compiled."""
    graphdef, params, rest = abstract_model(config)
    if rollout is None:
        rollout = build_programs(graphdef, config, task)
    mesh = make_mesh(config.layout)
    state = abstract_state(config, params, rest, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def begin(params, rest):
        # Without a copy the very arrays would come out that went in.
        return fresh_state(config, *jax.tree.map(jnp.copy, (params, rest)))

    return Programs(
        graphdef,
        rollout,
        jit_train_step(graphdef, config, mesh, state, lengths(config, task)[0]),
        jax.jit(begin, out_shardings=shardings),
        mesh,
        state,
    )


def jit_train_step(
    graphdef: nnx.GraphDef,
    config: TrainConfig,
    mesh: Mesh,
    state: TrainState,
    prompt_columns: int = 0,
) -> Any:
    """The train step for states and minibatches that live on the mesh as they should.

    Args:
      graphdef, config, mesh: of the run.
      state: shapes and shardings, from `abstract_state`.
      prompt_columns: leading columns of padded minibatches that hold prompts alone.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    layout = config.layout
    step = make_train_step(
        graphdef,
        config,
        sequences_per_row=layout.sequences_per_row if layout.pack else 1,
        prompt_columns=0 if layout.pack else prompt_columns,
    )
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_shardings(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def abstract_model(config: TrainConfig) -> tuple[nnx.GraphDef, Any, Any]:
    """The model without its variables, and their shapes."""
    return split_model(nnx.eval_shape(lambda: Decoder(config.model, nnx.Rngs(0))))


def abstract_state(config: TrainConfig, params: Any, rest: Any, mesh: Mesh) -> TrainState:
    """Shapes of the training state, each with its sharding."""
    shapes = jax.eval_shape(lambda params, rest: fresh_state(config, params, rest), params, rest)
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def fresh_state(config: TrainConfig, params: Any, rest: Any) -> TrainState:
    """The state in which a run begins, around given variables of the model."""
    calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    return init_state(params, rest, build_optimizer(config.optimizer), calibration)


def init_model(config: TrainConfig) -> tuple[Any, Any]:
    """Fresh parameters, and the model's other variables, born where they will live."""

    def create():
        _, *variables = split_model(Decoder(config.model, nnx.Rngs(config.seed)))
        return tuple(variables)

    mesh = make_mesh(config.layout)
    shapes = jax.eval_shape(create)
    shardings = tuple(tree_shardings(variables, mesh) for variables in shapes)
    with jax.set_mesh(mesh):
        return jax.jit(create, out_shardings=shardings)()
