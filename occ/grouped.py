"""Coefficients of their own for groups of leaves, or for each layer of a stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from occ import measures as measures_lib
from occ import rules as rules_lib
from occ.calibration import Calibration, CalibrationState
from occ.finiteness import condition_number
from occ.trees import as_gradient, auxiliary_tuple, path_string, refuse_masked, unique

Group = Callable[[str], str | None]
READABLE = frozenset(["gradients", "gradient_halves", "second_moment"])
"""Evidence that can be cut into groups of leaves."""


class GroupedState(NamedTuple):
    """State of all groups.

    Attributes:
      total: over all groups together: the sum of their Gram matrices, the mean of their weights.
        `occ.correlation(state)` and its like read this one.
      groups: each group's state, by the group's name.
    """

    total: CalibrationState
    groups: dict[str, CalibrationState]


@dataclasses.dataclass(frozen=True)
class GroupedCalibration:
    """As `Calibration`, with a Gram matrix and weights for every group.

    `calibrate_groups` documents the fields.
    """

    group: Group
    measure: measures_lib.Measure
    rule: rules_lib.Rule
    num_auxiliary: int = 1
    stacked: Callable[[str], bool] | None = None
    scale_own: bool = False
    seed: int = 0
    every: int = 1

    def __post_init__(self):
        unreadable = sorted(set(self.measure.evidence) - READABLE)
        if self.every != 1:
            raise ValueError(
                f"calibrate_groups: groups are measured at every update, got every={self.every}. "
                "Use every=1, or calibrate(every=...) with one coefficient for all leaves."
            )
        if unreadable:
            raise ValueError(
                f"calibrate_groups: measure {self.measure.name!r} reads {unreadable}, which does "
                f"not fall into groups of leaves. Use a measure of {sorted(READABLE)}."
            )
        if self.measure.partial:
            raise ValueError(
                f"calibrate_groups: measure {self.measure.name!r} looks at some leaves alone, and "
                "most groups have none of them. Use a measure of all leaves, or calibrate with "
                "one coefficient."
            )

    def init(self, params: Any) -> GroupedState:
        """State for gradients shaped like `params`.

        Raises:
          ValueError: no leaf is in a group.
        """
        refuse_masked(params)
        grouped = self._cut(params)
        if not any(name is not None for name in grouped):
            raise ValueError(
                "calibrate_groups: `group` names no group for any leaf. It is called with paths "
                f"such as {next(iter(grouped.get(None, {})), '')!r}; return None only for leaves "
                "of their own."
            )
        states = {name: self._one.init(leaves) for name, leaves in _named(grouped)}
        # A copy: a donated state must not hold one buffer twice.
        return GroupedState(jax.tree.map(jnp.copy, _total(states)), states)

    def update(
        self, updates: Any, state: GroupedState, *, auxiliary: Any = None, **evidence: Any
    ) -> tuple[Any, GroupedState]:
        """All groups' stages; see `calibrate_groups`."""
        updates = as_gradient(updates, "`updates`")
        auxiliary = auxiliary_tuple(updates, auxiliary, self.num_auxiliary)
        auxiliary, finite = self._one.remove_nonfinite(auxiliary)
        evidence = {
            **{name: evidence[name] for name in self.measure.evidence if name in evidence},
            "gradients": (updates, *auxiliary),
        }
        cut_evidence = {name: self._cut_each(value) for name, value in evidence.items()}
        main, parts = self._cut(updates), [self._cut(tree) for tree in auxiliary]
        states: dict[str, CalibrationState] = {}
        combined: dict[str, jax.Array] = {}
        for name, leaves in _named(main):
            own_evidence = {key: _pick(value, name) for key, value in cut_evidence.items()}
            states[name] = self._one.weigh(state.groups[name], own_evidence, finite=finite)
            weights = states[name].weights
            combined |= self._one.apply_weights(
                weights, leaves, tuple(part[name] for part in parts)
            )
        total = _total(states)
        own = total.weights if self.scale_own else jnp.ones_like(total.weights)
        leaves = main.get(None, {})
        combined |= self._one.apply_weights(
            own, leaves, tuple(part.get(None, {}) for part in parts)
        )
        return self._restore(combined, updates), GroupedState(total, states)

    def if_due(
        self, state: GroupedState, measured: Callable[[GroupedState], Any], held: Any
    ) -> Any:
        """`measured(state)`: every update measures."""
        del held
        return measured(state)

    measured_update = update

    @property
    def _one(self) -> Calibration:
        return Calibration(self.measure, self.rule, self.num_auxiliary, seed=self.seed)

    def _pieces(self, tree: Any) -> list[tuple[str, str, jax.Array]]:
        """(key, path, piece) of every leaf; stacked ones are cut along their leading axis.

        Keys are unique, paths need not be.
        """
        pieces: list[tuple[str, jax.Array]] = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = path_string(path)
            if self.stacked is not None and self.stacked(name):
                pieces += [(f"{name}/{i}", leaf[i]) for i in range(leaf.shape[0])]
            else:
                pieces.append((name, leaf))
        keys = unique(name for name, _ in pieces)
        return [(key, *piece) for key, piece in zip(keys, pieces, strict=True)]

    def _cut(self, tree: Any) -> dict[str | None, dict[str, jax.Array]]:
        """{group: {key: piece}}."""
        cut: dict[str | None, dict[str, jax.Array]] = {}
        for key, path, piece in self._pieces(tree):
            group = self.group(path)
            if not isinstance(group, str | None):
                raise ValueError(
                    "calibrate_groups: `group` must return a group's name, or None, for the path "
                    f"of one leaf; for {path!r} it returned {group!r}."
                )
            cut.setdefault(group, {})[key] = piece
        return cut

    def _cut_each(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._cut_each(tree) for tree in value)
        return self._cut(value)

    def _restore(self, pieces: dict[str, jax.Array], like: Any) -> Any:
        """The inverse of `_cut`."""
        ordered = iter([pieces[key] for key, _, _ in self._pieces(like)])

        def leaf(path, old):
            if self.stacked is not None and self.stacked(path_string(path)):
                return jnp.stack([next(ordered) for _ in range(old.shape[0])])
            return next(ordered)

        return jax.tree_util.tree_map_with_path(leaf, like)


def calibrate_groups(
    group: Group,
    measure: measures_lib.Measure | None = None,
    rule: rules_lib.Rule | None = None,
    *,
    num_auxiliary: int = 1,
    stacked: Callable[[str], bool] | None = None,
    scale_own: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`calibrate`, with coefficients of their own for groups of leaves.

        for every group G:  updates_G = g_G + sum_k w_k(G) m_k,G,   OCC: w_k(G) from <g_G, m_k,G>

    The decomposition holds for each group by itself where the objective's curvature does not couple
    groups; a group's correlation is also noisier than that of all leaves together.

    Args:
      group: from a leaf's path to its group's name; None for a leaf that only one loss reaches,
        which gets g + sum_k m_k.
      measure: default `measures.gradients()`; one that reads gradients.
      rule: default `rules.optimal()`; each group has a state of its own.
      num_auxiliary: K >= 1.
      stacked: which leaves have a leading axis of layers. They are cut along it, and `group` sees
        "path/of/leaf/3" for each. Default: none.
      scale_own: multiply leaves without a group by the mean of the groups' weights.
      seed: of the keys of rules that draw.

    Returns:
      A transformation with the keywords of `calibrate`. Its state is a `GroupedState`;
      `occ.coefficient(state)` is the mean over groups, `state.groups[name].weights` one group's.

    Raises:
      ValueError: a measure whose evidence does not fall into groups; no group; on update, what
        `calibrate` raises.

    Differs from the paper, which has one coefficient for all parameters.

    >>> tx = calibrate_groups(lambda path: path)
    >>> g, m = ({"a": jnp.array([1.0]), "b": jnp.array([b])} for b in (1.0, -2.0))
    >>> updates, state = tx.update(g, tx.init(g), g, auxiliary=m)
    >>> {name: round(float(s.weights[1]), 3) for name, s in state.groups.items()}
    {'a': 1.0, 'b': -0.5}
    """
    calibration = GroupedCalibration(
        group,
        measures_lib.gradients() if measure is None else measure,
        rules_lib.optimal() if rule is None else rule,
        num_auxiliary=num_auxiliary,
        stacked=stacked,
        scale_own=scale_own,
        seed=seed,
    )

    def update(updates, state, params=None, **extra_args):
        del params
        return calibration.update(updates, state, **extra_args)

    return optax.GradientTransformationExtraArgs(calibration.init, update)


def _named(grouped: dict[str | None, Any]) -> list[tuple[str, Any]]:
    return [(name, leaves) for name, leaves in grouped.items() if name is not None]


def _pick(value: Any, name: str) -> Any:
    return tuple(_pick(v, name) for v in value) if isinstance(value, tuple) else value[name]


def _total(states: dict[str, CalibrationState]) -> CalibrationState:
    first, *others = states.values()
    gram, weights, overflowed = first.gram, first.weights, first.overflowed
    for state in others:
        gram, weights = gram + state.gram.astype(gram.dtype), weights + state.weights
        overflowed = jnp.maximum(overflowed, state.overflowed)
    return CalibrationState(
        count=first.count,
        gram=gram,
        weights=weights / len(states),
        condition_number=condition_number(gram),
        nonfinite=first.nonfinite,
        overflowed=overflowed,
        age=first.age,
        measure=(),
        rule=(),
    )
