"""Checkpoints of a run with Orbax: written in the background, kept by policy, resumed from."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from occ.training.state import TrainState


class Checkpoints:
    """Checkpoints in one folder, numbered by the rollouts that were finished.

    Args:
      folder: where they are; made if missing.
      keep: how many of the newest to keep.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, rollout: int, state: TrainState) -> None:
        """Starts to save the state after `rollout` finished rollouts; returns at once."""
        if rollout not in self._manager.all_steps():
            self._manager.save(
                rollout, args=ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(state)))
            )

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The newest checkpoint: its number and state; None without one.

        Args:
          like: a state of the shapes, dtypes and shardings wanted.
        """
        newest = self._manager.latest_step()
        if newest is None:
            return None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_dict(like)
        )
        restored = self._manager.restore(
            newest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        structure = jax.tree.structure(like)
        leaves = jax.tree.leaves(restored["state"])
        return newest, jax.tree.unflatten(structure, leaves)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The leaves by path: a form that does not change with the classes around them."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    width = len(str(len(leaves)))
    return {
        f"{i:0{width}d}:{jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for i, (path, leaf) in enumerate(leaves)
    }
