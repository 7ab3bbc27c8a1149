"""Losses, gradients and parameters that are not finite: found, counted, named."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from occ.training.processes import to_host

LEAF = "nonfinite_leaf"
"""Metric of a train step: where `first_nonfinite` found something; kept out of metrics.jsonl."""

PARAMETER = "nonfinite_parameter"
"""Likewise, among the parameters after the update."""


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
    names = _names(params)
    if index == len(names):
        return "the RL loss, though its gradient is finite"
    return f"the gradient of {names[index]}"


def check_finite(params: Any, what: str) -> None:
    """Refuses parameters that no update could mend.

    Raises:
      FloatingPointError: one has a NaN or an infinity; says which.
    """
    if not jax.tree.leaves(params):
        return
    index = int(to_host(jax.jit(first_nonfinite)(params)))
    if index >= 0:
        raise FloatingPointError(
            f"{what} is not finite: the first such parameter is {_names(params)[index]}. A lower "
            "learning rate, or parameters in float32, would help."
        )


def _names(params: Any) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


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
          steps: metrics of the updates in their order, with `LEAF`, `PARAMETER` and the losses.
          params: a tree of the gradient's structure.
          rollout: for the texts.

        Raises:
          FloatingPointError: an update that was taken led to a parameter that is not finite.
        """
        for minibatch, metrics in enumerate(steps):
            broken = int(metrics[PARAMETER])
            if broken >= 0:
                raise FloatingPointError(
                    f"an update with a finite gradient made {_names(params)[broken]} infinite or "
                    f"NaN (rollout {rollout}, minibatch {minibatch}). Nothing of it is saved; the "
                    "newest checkpoint is from before. A lower learning rate, or parameters in "
                    "float32, needs a new folder."
                )
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
