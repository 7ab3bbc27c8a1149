"""Updates that are left out because a loss or gradient was not finite: found, counted, named."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEAF = "nonfinite_leaf"
"""Metric of a train step: where `first_nonfinite` found something; kept out of metrics.jsonl."""


def first_nonfinite(tree: Any) -> jax.Array:
    """Index of the first leaf with a NaN or an infinity, in the order of `jax.tree.leaves`.

    Returns:
      int32 []; -1 if every entry of every leaf is finite.
    """
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])
    return jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32), jnp.int32(-1))


def leaf_name(params: Any, index: int) -> str:
    """What `first_nonfinite((gradient, loss))` points at, in words.

    Args:
      params: a tree of the gradient's structure.
      index: as returned, not -1.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if index == len(paths):
        return "the RL loss, though its gradient is finite"
    return f"the gradient of {jax.tree_util.keystr(paths[index], simple=True, separator='.')}"


class BadUpdates:
    """Counts the updates in a row that were skipped, until it is enough.

    Args:
      limit: so many in a row end the run.
      in_a_row: how many there were when counting begins.
      last: the words for the last of them.
    """

    def __init__(self, limit: int, in_a_row: int = 0, last: str = ""):
        self.limit = limit
        self.in_a_row = in_a_row
        self.last = last

    @property
    def too_many(self) -> bool:
        """Whether the run must end."""
        return self.in_a_row >= self.limit

    def see(self, steps: list[dict[str, np.ndarray]], params: Any, rollout: int) -> None:
        """Counts those among the updates of one rollout, and warns of each.

        Args:
          steps: metrics of the updates in their order, with `LEAF` and the losses.
          params: a tree of the gradient's structure.
          rollout: for the texts.
        """
        for minibatch, metrics in enumerate(steps):
            if self.too_many:
                return
            index = int(metrics[LEAF])
            if index < 0:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            losses = ", ".join(
                f"{name} = {np.array2string(np.asarray(value), precision=4)}"
                for name, value in metrics.items()
                if name.startswith("loss/")
            )
            self.last = (
                f"the first non-finite leaf is {leaf_name(params, index)} "
                f"(rollout {rollout}, minibatch {minibatch}; {losses})"
            )
            warnings.warn(f"update skipped: {self.last}", RuntimeWarning, stacklevel=2)

    def check(self) -> None:
        """Ends a run that has seen too many.

        Raises:
          FloatingPointError: as many as the limit came in a row.
        """
        if self.too_many:
            raise FloatingPointError(
                f"{self.in_a_row} updates in a row were skipped; in the last, {self.last}. "
                "Parameters and optimizer are as before the first of them, in the newest "
                f"checkpoint. max_bad_updates is {self.limit}; a larger one goes on from there. "
                "Anything else that would help, as a lower learning rate, needs a new folder."
            )
