"""Pytrees of gradients: paths, selections, comparisons."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def path_string(path: tuple) -> str:
    """A leaf's path as `"layers/attention/query"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_structure(tree: Any) -> Any:
    """`jax.tree.structure`, which type checkers cannot compare."""
    return jax.tree.structure(tree)


def selected(tree: Any, mask: Any) -> dict[str, jax.Array]:
    """The leaves where the mask is True, by their paths.

    >>> selected({"a": {"b": 1}, "c": 2}, {"a": {"b": True}, "c": False})
    {'a/b': 1}
    """
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(mask), strict=True)
    return {path_string(path): leaf for (path, leaf), chosen in pairs if chosen}


def zero_unless(condition: jax.Array, tree: Any) -> Any:
    """The tree, or zeros: by selection, since 0 * NaN is NaN."""
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jnp.zeros_like(leaf)), tree)


def check_like(updates: Any, tree: Any, number: int) -> None:
    """Checks auxiliary gradient `number` against the main one.

    Raises:
      ValueError: another tree structure, or a leaf of another shape, which is named.
    """
    if tree_structure(tree) != tree_structure(updates):
        raise ValueError(
            f"calibrate: auxiliary gradient {number} has the tree structure "
            f"{tree_structure(tree)}, expected that of `updates`, "
            f"{tree_structure(updates)}."
        )
    for (path, g), m in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(tree), strict=True
    ):
        if jnp.shape(g) != jnp.shape(m):
            raise ValueError(
                f"calibrate: auxiliary gradient {number} has shape {jnp.shape(m)} at "
                f"{path_string(path)!r}, expected {jnp.shape(g)}."
            )


def auxiliary_tuple(updates: Any, auxiliary: Any, num_auxiliary: int) -> tuple[Any, ...]:
    """The K auxiliary trees, checked against the main gradient.

    Args:
      updates: the main gradient.
      auxiliary: one tree like it (K = 1), or a tuple of K of them.
      num_auxiliary: K.

    Raises:
      ValueError: none, another number, or trees of another structure or shape.
    """
    if auxiliary is None:
        raise ValueError(
            "calibrate: the keyword argument `auxiliary` is missing. Pass the auxiliary gradient, "
            "tx.update(grads, state, params, auxiliary=mtp_grads), or a tuple of "
            f"num_auxiliary={num_auxiliary} of them."
        )
    structure = tree_structure(updates)
    if num_auxiliary == 1 and tree_structure(auxiliary) == structure:
        auxiliary = (auxiliary,)
    if not isinstance(auxiliary, tuple) or len(auxiliary) != num_auxiliary:
        got = f"a tuple of {len(auxiliary)}" if isinstance(auxiliary, tuple) else "one tree"
        raise ValueError(
            f"calibrate: expected num_auxiliary={num_auxiliary} auxiliary gradient(s) with the "
            f"tree structure {structure}, got {got} of structure {tree_structure(auxiliary)}. Pass "
            "one tree like `updates`, or a tuple of num_auxiliary such trees."
        )
    for k, tree in enumerate(auxiliary, start=1):
        check_like(updates, tree, k)
    return auxiliary
