"""The optax transformation: measure the auxiliary gradients, weigh them, combine.

    measure: evidence -> Gram matrix [K+1, K+1]       occ/measures.py
    rule:    Gram matrix -> weights [K+1]             occ/rules.py
    combine: weights, gradients -> w_0 g + sum_k w_k m_k

`calibrate` is the transformation for an optax chain, `Calibration` its three stages one by one,
for a training step that must know the weights before it has all gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from occ import measures as measures_lib
from occ import rules as rules_lib
from occ.trees import auxiliary_tuple, path_string, selected, tree_structure, zero_unless

Shared = Any  # None, a pytree of bools like the parameters, or a predicate on "path/of/leaf"


class CalibrationState(NamedTuple):
    """What the transformation remembers; its diagnostics are read from here.

    Attributes:
      count: int32 [], updates so far.
      gram: float [K+1, K+1], the last Gram matrix over the shared leaves; NaN where the measure
        never had one.
      weights: float [K+1], the last weights.
      condition_number: float [], of the last matrix V = [<m_j, m_k>]; 1 for K = 1, inf if singular.
      nonfinite: int32 [K], how often each auxiliary gradient was removed because it, or the
        evidence about it, was not finite.
      measure: the measure's own state.
      rule: the rule's own state.
    """

    count: jax.Array  # type: ignore[assignment]
    gram: jax.Array
    weights: jax.Array
    condition_number: jax.Array
    nonfinite: jax.Array
    measure: Any
    rule: Any


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measure, rule and combination, as three pure functions of one state.

    `calibrate` documents the fields. A training step that has all gradients calls `update`; one
    that measures before its last backward pass calls `weigh`, and combines with `state.weights`.
    """

    measure: measures_lib.Measure
    rule: rules_lib.Rule
    num_auxiliary: int = 1
    shared: Shared = None
    scale_own: bool = False
    every: int = 1
    axis_name: Any = None
    seed: int = 0

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(
                f"calibrate: `every` must be >= 1 updates, got {self.every}. With 1 every update "
                "measures."
            )
        if self.num_auxiliary < 1:
            raise ValueError(
                f"calibrate: num_auxiliary must be >= 1, got {self.num_auxiliary}. Without an "
                "auxiliary gradient there is nothing to calibrate: leave the transformation out."
            )
        if self.measure.yields_ratio and not self.rule.takes_ratio:
            raise ValueError(
                f"calibrate: rule {self.rule.name!r} needs a Gram matrix, but measure "
                f"{self.measure.name!r} yields the ratio c / v^2 alone. Use log_ratios('paper') "
                "or gradients(), or a rule that takes a ratio, such as optimal()."
            )

    def init(self, params: Any) -> CalibrationState:
        """State for gradients shaped like `params`."""
        shared = selected(params, self._shared_mask(params)).values()
        if not shared:
            raise ValueError(
                "calibrate: `shared` selects no leaf, so there is no gradient to measure. Pass the "
                "mask of the leaves that both losses reach, or None for all of them."
            )
        dtype = _real(measures_lib.accumulation_dtype(*(leaf.dtype for leaf in shared)))
        size = self.num_auxiliary + 1
        return CalibrationState(
            count=jnp.zeros((), jnp.int32),
            gram=jnp.zeros((size, size), dtype),
            weights=jnp.zeros((size,), dtype).at[0].set(1),
            condition_number=jnp.ones((), dtype),
            nonfinite=jnp.zeros((self.num_auxiliary,), jnp.int32),
            measure=self.measure.init(self.num_auxiliary),
            rule=self.rule.init(self.num_auxiliary),
        )

    def weigh(
        self,
        state: CalibrationState,
        evidence: dict[str, Any] | None = None,
        *,
        statistics: Any = None,
        finite: jax.Array | None = None,
    ) -> CalibrationState:
        """Measures and applies the rule; the new weights are in the returned state.

        Args:
          state: the state before.
          evidence: what the measure reads, by name; pytrees of gradients whole, of which the shared
            leaves are taken here. Ignored where `statistics` is given.
          statistics: the measure's statistics, already reduced and summed over micro-batches.
          finite: bool [K], False for auxiliary gradients that are to be removed; None if none is.

        Returns:
          The state after. The weight of a removed auxiliary is 0.

        Raises:
          ValueError: evidence that the measure needs is missing.
        """
        if statistics is None:
            evidence = {} if evidence is None else evidence
            self._require(evidence)
            statistics = self.measure.reduce(self._shared_only(evidence), self.num_auxiliary)
        measurement, measure_state = self.measure.update(statistics, state.measure, self.axis_name)
        measurement, main_ok, ok = self._clean(measurement, finite, state.gram.dtype)
        key = jax.random.fold_in(jax.random.key(self.seed), state.count)
        weights, rule_state = self.rule.update(measurement, state.rule, key)
        usable = jnp.concatenate([jnp.ones((1,), bool), ok & main_ok]) & jnp.isfinite(weights)
        weights = jnp.where(usable, weights, 0)

        def unless_poisoned(new, old):
            return jax.tree.map(lambda n, o: jnp.where(jnp.all(ok) & main_ok, n, o), new, old)

        return CalibrationState(
            count=optax.safe_increment(state.count),
            gram=measurement.gram,
            weights=weights.astype(state.weights.dtype),
            condition_number=condition_number(measurement.gram),
            nonfinite=state.nonfinite + (~ok).astype(jnp.int32),
            measure=unless_poisoned(measure_state, state.measure),
            rule=unless_poisoned(rule_state, state.rule),
        )

    def is_due(self, state: CalibrationState) -> jax.Array:
        """Whether this update measures: bool []."""
        return state.count % self.every == 0

    def hold(self, state: CalibrationState, finite: jax.Array | None = None) -> CalibrationState:
        """The state after an update that does not measure: it counts, and keeps the weights.

        Args:
          state: the state before.
          finite: bool [K], False for auxiliary gradients that were removed.
        """
        removed = 0 if finite is None else (~finite).astype(jnp.int32)
        return state._replace(
            count=optax.safe_increment(state.count), nonfinite=state.nonfinite + removed
        )

    def combine(self, weights: jax.Array, updates: Any, auxiliary: tuple[Any, ...]) -> Any:
        """w_0 g + sum_k w_k m_k on shared leaves, g + sum_k m_k on the others.

        Args:
          weights: float [K+1].
          updates: the main gradient.
          auxiliary: K pytrees like it; a weight of 0 does not protect from their non-finite
            entries, which `update` has removed.

        Returns:
          A pytree like `updates`, of its dtypes; the sum is formed in at least float32.
        """

        def leaf(shared, g, *ms):
            dtype = measures_lib.accumulation_dtype(g.dtype)
            if shared or self.scale_own:
                scales = weights.astype(_real(dtype))
                total = scales[0] * g.astype(dtype)
                for k, m in enumerate(ms, start=1):
                    total = total + scales[k] * m.astype(dtype)
            else:
                total = g.astype(dtype)
                for m in ms:
                    total = total + m.astype(dtype)
            return total.astype(g.dtype)

        return jax.tree.map(leaf, self._shared_mask(updates), updates, *auxiliary)

    def update(
        self,
        updates: Any,
        state: CalibrationState,
        *,
        auxiliary: Any = None,
        statistics: Any = None,
        **evidence,
    ) -> tuple[Any, CalibrationState]:
        """All three stages; see `calibrate`."""
        auxiliary = auxiliary_tuple(updates, auxiliary, self.num_auxiliary)
        auxiliary, finite = self.remove_nonfinite(auxiliary)
        evidence["gradients"] = (updates, *auxiliary)

        def measured(state):
            return self.weigh(state, evidence, statistics=statistics, finite=finite)

        if self.every == 1:
            state = measured(state)
        else:
            held = functools.partial(self.hold, finite=finite)
            state = jax.lax.cond(self.is_due(state), measured, held, state)
        # Evidence may be non-finite where the gradient is finite: then the weight is 0 already.
        return self.combine(state.weights, updates, auxiliary), state

    def remove_nonfinite(self, auxiliary: tuple[Any, ...]) -> tuple[tuple[Any, ...], jax.Array]:
        """Replaces auxiliary gradients that have a non-finite entry by zeros.

        Returns:
          The K trees, and bool [K], whether each was finite: for `weigh`, which counts.
        """
        finite = jnp.stack([self._all_finite(m) for m in auxiliary])
        return tuple(zero_unless(finite[k], m) for k, m in enumerate(auxiliary)), finite

    def _shared_only(self, evidence: dict[str, Any]) -> dict[str, Any]:
        """Evidence whose pytrees of gradients are reduced to {path: shared leaf}."""

        def leaves(tree):
            return selected(tree, self._shared_mask(tree))

        def each(tree_or_tuple):
            if isinstance(tree_or_tuple, tuple):
                return tuple(each(tree) for tree in tree_or_tuple)
            return leaves(tree_or_tuple)

        trees = measures_lib.TREE_EVIDENCE | {"gradients"}
        return {
            name: each(value) if name in trees and name in self.measure.evidence else value
            for name, value in evidence.items()
        }

    def _require(self, evidence: dict[str, Any]) -> None:
        missing = [name for name in self.measure.evidence if evidence.get(name) is None]
        if missing:
            got = sorted(k for k, v in evidence.items() if v is not None and k != "gradients")
            raise ValueError(
                f"calibrate: measure {self.measure.name!r} needs the evidence {missing}, got "
                f"{got or 'none'}. Pass it by keyword: "
                f"tx.update(grads, state, params, auxiliary=..., {missing[0]}=...)."
            )

    def _shared_mask(self, tree: Any) -> Any:
        """Pytree of bools like `tree`."""
        if self.shared is None:
            return jax.tree.map(lambda _: True, tree)
        if callable(self.shared):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: bool(self.shared(path_string(path))), tree
            )
        if tree_structure(self.shared) != tree_structure(tree):
            raise ValueError(
                "calibrate: `shared` must be a pytree of bools with the structure of the "
                f"gradients, {tree_structure(tree)}, got {tree_structure(self.shared)}. "
                "A predicate on the leaf's path, e.g. lambda path: not path.startswith('mtp'), "
                "fits every structure."
            )
        return self.shared

    def _all_finite(self, tree: Any) -> jax.Array:
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
        if self.axis_name is None:
            return finite
        return jax.lax.pmin(finite.astype(jnp.int32), self.axis_name) > 0

    def _clean(
        self, measurement: measures_lib.Measurement, finite: jax.Array | None, dtype: Any
    ) -> tuple[measures_lib.Measurement, jax.Array, jax.Array]:
        """Empties the rows of non-finite gradients; also whether the main and each other is ok."""
        size = self.num_auxiliary + 1
        ok = jnp.ones((self.num_auxiliary,), bool) if finite is None else finite
        if measurement.gram is None:
            assert measurement.ratio is not None
            ratio = jnp.broadcast_to(measurement.ratio, (self.num_auxiliary,)).astype(dtype)
            ok = ok & jnp.isfinite(ratio)
            gram = jnp.full((size, size), jnp.nan, dtype)
            ratio = jnp.where(ok, ratio, 0)
            return measures_lib.Measurement(gram, ratio), jnp.ones((), bool), ok
        gram = measurement.gram.astype(dtype)
        main_ok = jnp.isfinite(gram[0, 0])
        ok = ok & jnp.isfinite(jnp.diagonal(gram)[1:])
        kept = jnp.concatenate([main_ok[None], ok])
        gram = jnp.where(kept[:, None] & kept[None, :], gram, 0)
        # An overflow of <m_j, m_k> between finite heads leaves no usable matrix either.
        gram = jnp.where(jnp.isfinite(gram), gram, 0)
        sampled = measurement.sampled_correlation
        if sampled is not None:
            sampled = jnp.where(ok & jnp.isfinite(sampled), sampled, 0).astype(dtype)
        return measures_lib.Measurement(gram, None, sampled), main_ok, ok


def calibrate(
    measure: measures_lib.Measure | None = None,
    rule: rules_lib.Rule | None = None,
    *,
    num_auxiliary: int = 1,
    shared: Shared = None,
    scale_own: bool = False,
    every: int = 1,
    axis_name: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adds auxiliary gradients to the main one, each scaled by a calibrated coefficient.

        updates = g + sum_k w_k m_k,      OCC: w_k = scale * <g, m_k> / (||m_k||^2 + eps)

    Args:
      measure: how the Gram matrix of the gradients is estimated; default `measures.gradients()`,
        the exact one.
      rule: how weights follow from it; default `rules.optimal()`, OCC.
      num_auxiliary: K >= 1, the number of auxiliary gradients.
      shared: which leaves both losses reach: a pytree of bools like the parameters, or a predicate
        on the leaf's path ("layers/attention/query"). Gram matrix and weights concern these
        alone; elsewhere the result is g + sum_k m_k, unscaled. Default: every leaf.
      scale_own: multiply the leaves that are not shared by the weights too, as the paper's
        released code does. A coefficient of 0 or below then stops or reverses their training.
      every: measure at every n-th update, from the first on, and keep the weights in between.
      axis_name: mapped axis (shard_map, pmap) over which *parts* of the leaves, or of the evidence,
        are spread; inner products are summed over it. Under jit with NamedSharding leave it None.
      seed: of the key that rules which draw receive.

    Returns:
      A transformation whose `update` takes, by keyword:
        auxiliary: a pytree like `updates`, or a tuple of K of them. A gradient with a non-finite
          entry is removed and counted.
        further evidence by the names that the measure documents, or `statistics` in its place.
      Its state is a `CalibrationState`; `occ.coefficient(opt_state)` and its like read it.

    Raises:
      ValueError: K < 1, a measure and rule that do not fit; on update, missing or misshapen
        auxiliary gradients or evidence.

    Inside optax's wrappers: `chain`, `named_chain`, `inject_hyperparams` and `apply_if_finite` pass
    the keywords on. `masked` and `partition` need `mask_compatible_extra_args=True`, and do not
    mask a *tuple* of trees: use `shared=`. `apply_if_finite` looks at `updates` alone.
    `optax.MultiSteps` averages `updates` but hands on the last micro-batch's `auxiliary`, silently:
    use `occ.accumulate`.

    Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
    Optimal Coefficient Calibration, arXiv 2605.28184.

    >>> import jax.numpy as jnp, optax, occ
    >>> tx = optax.chain(occ.calibrate(), optax.sgd(1.0))
    >>> params = {"w": jnp.zeros(2)}
    >>> updates, state = tx.update(
    ...     {"w": jnp.array([1.0, 0.0])}, tx.init(params), params,
    ...     auxiliary={"w": jnp.array([2.0, 2.0])},
    ... )
    >>> float(occ.coefficient(state)[0])
    0.25
    >>> updates["w"].tolist()
    [-1.5, -0.5]
    """
    calibration = Calibration(
        measure=measures_lib.gradients() if measure is None else measure,
        rule=rules_lib.optimal() if rule is None else rule,
        num_auxiliary=num_auxiliary,
        shared=shared,
        scale_own=scale_own,
        every=every,
        axis_name=axis_name,
        seed=seed,
    )

    def update(updates, state, params=None, **extra_args):
        del params
        return calibration.update(updates, state, **extra_args)

    return optax.GradientTransformationExtraArgs(calibration.init, update)


def _real(dtype: Any) -> Any:
    """The dtype itself, or that of its real part."""
    return jnp.finfo(dtype).dtype


def condition_number(gram: jax.Array) -> jax.Array:
    """Condition number of V = [<m_j, m_k>]; NaN without a Gram matrix."""
    perturbations = gram[1:, 1:]
    if perturbations.shape[0] == 1:
        return jnp.where(jnp.isnan(perturbations[0, 0]), jnp.nan, jnp.ones((), gram.dtype))
    values = jnp.linalg.eigvalsh(perturbations)
    smallest = jnp.maximum(values[0], 0)
    return jnp.where(smallest > 0, values[-1] / jnp.where(smallest > 0, smallest, 1), jnp.inf)
