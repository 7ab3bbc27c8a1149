"""Pytrees of gradients: paths, selections, comparisons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def path_string(path: tuple) -> str:
    """A leaf's path as `"layers/attention/query"`.

    The attribute `value`, in which boxes such as `nnx.Variable` hold their array, is no part of it.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_structure(tree: Any) -> Any:
    """`jax.tree.structure`, which type checkers cannot compare."""
    return jax.tree.structure(tree)


def unique(names: Iterable[str]) -> list[str]:
    """The names, with a number behind each that was there before.

    A key may hold a slash, so two leaves can have one path: `{"x/y": .., "x": {"y": ..}}`.

    >>> unique(["x/y", "z", "x/y"])
    ['x/y', 'z', 'x/y#2']
    """
    seen: set[str] = set()
    result = []
    for name in names:
        candidate, number = name, 1
        while candidate in seen:
            number += 1
            candidate = f"{name}#{number}"
        seen.add(candidate)
        result.append(candidate)
    return result


def selected(tree: Any, mask: Any) -> dict[str, jax.Array]:
    """The leaves where the mask is True, by their paths.

    >>> selected({"a": {"b": 1}, "c": 2}, {"a": {"b": True}, "c": False})
    {'a/b': 1}
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    names = unique(path_string(path) for path, _ in pairs)
    leaves = [leaf for _, leaf in pairs]
    chosen = zip(names, leaves, jax.tree.leaves(mask), strict=True)
    return {name: leaf for name, leaf, is_chosen in chosen if is_chosen}


def leaf_mask(tree: Any, choice: Any, argument: str) -> Any:
    """A pytree of bools like `tree`.

    Args:
      tree: pytree of arrays.
      choice: a pytree of bools like it, or a predicate on a leaf's path ("layers/mlp/kernel").
      argument: the argument's name, for messages.

    Raises:
      ValueError: a mask of another structure, or something other than a bool, as from a function
        from a tree to a mask.
    """
    if callable(choice):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: _ask(choice, path_string(path), argument), tree
        )
    if tree_structure(choice) != tree_structure(tree):
        raise ValueError(
            f"calibrate: `{argument}` must be a pytree of bools with the structure of the "
            f"gradients, {tree_structure(tree)}, got {tree_structure(choice)}. "
            "A predicate on the leaf's path, e.g. lambda path: not path.startswith('mtp'), "
            "fits every structure."
        )
    return jax.tree.map(lambda value: _as_bool(value, argument), choice)


def _ask(predicate: Any, path: str, argument: str) -> bool:
    try:
        return _as_bool(predicate(path), argument)
    except (AttributeError, TypeError, IndexError) as error:
        # A function that expects a tree fails on a string in ways of its own.
        error.add_note(
            f"calibrate: `{argument}` was called with a leaf's path, the string {path!r}. A "
            f"function from a tree to a mask is to be called first: {argument}=function(params)."
        )
        raise


def _as_bool(value: Any, argument: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError(
            f"calibrate: `{argument}` must choose leaves by True or False, got {value!r}. Pass a "
            "pytree of bools like the parameters, or a function of one leaf's path that returns a "
            "bool. A function from a tree to a mask is to be called first: "
            f"{argument}=function(params)."
        )
    return bool(value)


def zero_unless(condition: jax.Array, tree: Any) -> Any:
    """The tree, or zeros: by selection, since 0 * NaN is NaN."""
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jnp.zeros_like(leaf)), tree)


def refuse_masked(tree: Any) -> None:
    """Refuses a tree of which `optax.masked` or `optax.partition` has taken leaves out.

    Raises:
      ValueError: there is an `optax.MaskedNode` in it.
    """

    def is_masked(node):
        return isinstance(node, optax.MaskedNode)

    if any(is_masked(node) for node in jax.tree.leaves(tree, is_leaf=is_masked)):
        raise ValueError(
            "calibrate: it stands inside optax.masked or optax.partition (multi_transform), which "
            "hide some leaves from it: those would never be given their auxiliary gradient. Put it "
            "before them, and name the leaves to be measured: optax.chain(occ.calibrate(shared="
            "mask), optax.partition(...)). With a frozen part let shared= leave it out, and "
            "optax.set_to_zero() in the partition freeze it."
        )


def as_gradient(tree: Any, name: str) -> Any:
    """The gradient with an array at each leaf; Python floats become arrays.

    Args:
      tree: pytree of arrays and Python floats.
      name: what it is, for messages.

    Raises:
      ValueError: a leaf that is no gradient, of an integer type or jax's float0; leaves that
        optax has masked.
    """
    refuse_masked(tree)

    def leaf(path, value):
        dtype = getattr(value, "dtype", None)
        if dtype is None and isinstance(value, float | complex):
            return jnp.asarray(value)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            got = type(value).__name__ if dtype is None else _dtype_name(dtype)
            raise ValueError(
                f"calibrate: {name} has no floating-point array at {path_string(path)!r}, but "
                f"{got}. Integers have no gradient (jax.grad with allow_int=True yields float0): "
                "differentiate the floating-point parameters alone, and keep the others out of "
                "what the optimizer gets."
            )
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _dtype_name(dtype: Any) -> str:
    return "float0" if dtype == jax.dtypes.float0 else str(dtype)


def check_like(updates: Any, tree: Any, number: int) -> None:
    """Checks auxiliary gradient `number` against the main one.

    Raises:
      ValueError: another tree structure, or a leaf of another shape, which is named.
    """
    if tree_structure(tree) != tree_structure(updates):
        raise ValueError(
            f"calibrate: auxiliary gradient {number} has the tree structure "
            f"{tree_structure(tree)}, expected that of `updates`, "
            f"{tree_structure(updates)}. Where the loss does not reach, None or zeros may stand."
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
    """The K auxiliary trees, whole, checked against the main gradient.

    Args:
      updates: the main gradient.
      auxiliary: one tree like it (K = 1), or a tuple or list of K of them. None in place of a leaf
        or a subtree stands for zeros: the loss does not reach there.
      num_auxiliary: K.

    Raises:
      ValueError: none, another number, or trees of another structure or shape.
    """
    if auxiliary is None:
        raise ValueError(
            "calibrate: the keyword argument `auxiliary` is missing. Pass the auxiliary gradient, "
            "tx.update(grads, state, params, auxiliary=mtp_grads), or a tuple of "
            f"num_auxiliary={num_auxiliary} of them. Some wrappers drop keywords on the way: "
            "flax's TrainState.apply_gradients, optax.MultiSteps(..).gradient_transformation()."
        )
    structure = tree_structure(updates)
    if num_auxiliary == 1 and tree_structure(_filled(updates, auxiliary)) == structure:
        auxiliary = (auxiliary,)
    if not isinstance(auxiliary, tuple | list) or len(auxiliary) != num_auxiliary:
        is_several = isinstance(auxiliary, tuple | list)
        got = f"a {type(auxiliary).__name__} of {len(auxiliary)}" if is_several else "one tree"
        raise ValueError(
            f"calibrate: expected num_auxiliary={num_auxiliary} auxiliary gradient(s) with the "
            f"tree structure {structure}, got {got} of structure {tree_structure(auxiliary)}. Pass "
            "one tree like `updates`, or a tuple of num_auxiliary such trees. Where a loss does "
            "not reach, None or zeros may stand. Wrappers that give `updates` another structure, "
            "such as optax.flatten, belong behind calibrate in the chain."
        )
    trees = []
    for k, tree in enumerate(auxiliary, start=1):
        tree = _filled(updates, tree)
        check_like(updates, tree, k)
        trees.append(as_gradient(tree, f"auxiliary gradient {k}"))
    return tuple(trees)


def _filled(updates: Any, tree: Any) -> Any:
    """The tree with zeros for None; the tree itself where it does not fit."""

    def zeros_for_none(value, like):
        return jax.tree.map(jnp.zeros_like, like) if value is None else value

    try:
        return jax.tree.map(zeros_for_none, tree, updates, is_leaf=lambda node: node is None)
    except (ValueError, TypeError):  # another structure, which the callers report
        return tree
