"""The optax transformation: measure the auxiliary gradients, weigh them, apply the weights.

    measure: evidence -> Gram matrix [K+1, K+1]       occ/measures/    weigh
    rule:    Gram matrix -> weights [K+1]             occ/rules/       weigh
    apply:   weights, gradients -> w_0 g + sum_k w_k m_k               apply_weights

`calibrate` is the transformation for an optax chain, `Calibration` its three stages one by one,
for a training step that must know the weights before it has all gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from occ import measures as measures_lib
from occ import rules as rules_lib
from occ import trees
from occ.finiteness import all_finite, check, condition_number

T = TypeVar("T")
Leaves = Any  # None, a pytree of bools like the parameters, or a predicate on "path/of/leaf"


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
      overflowed: int32 [K+1], how often a gradient, the main one first, was finite and too large to
        be measured: its inner products exceed the dtype (in float32 from a norm of 1e19 on). An
        auxiliary gradient then counts nothing; without <g, g> none does.
      age: int32 [], updates that have used these weights, the one that measured them included; 0
        where it could not measure all gradients.
      measure: the measure's own state.
      rule: the rule's own state.
    """

    count: jax.Array  # type: ignore[assignment]
    gram: jax.Array
    weights: jax.Array
    condition_number: jax.Array
    nonfinite: jax.Array
    overflowed: jax.Array
    age: jax.Array
    measure: Any
    rule: Any


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measure, rule and application of the weights, as pure functions of one state.

    `calibrate` documents the fields. A training step that has all gradients calls `update`; one
    that measures before its last backward pass calls `weigh`, and combines with `state.weights`.
    """

    measure: measures_lib.Measure
    rule: rules_lib.Rule
    num_auxiliary: int = 1
    shared: Leaves = None
    scale_own: bool = False
    every: int = 1
    axis_name: Any = None
    replicated: Leaves = None
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
        if self.rule.takes_signal and not self.measure.yields_signal:
            raise ValueError(
                f"calibrate: rule {self.rule.name!r} needs inner products of expected gradients, "
                f"which measure {self.measure.name!r} does not have. Use past_gradients()."
            )

    def init(self, params: Any) -> CalibrationState:
        """State for gradients shaped like `params`."""
        trees.refuse_masked(params)
        shared = trees.selected(params, self._shared_mask(params))
        # optax.tree.map_params calls with a placeholder that has no leaves.
        if not shared and jax.tree.leaves(params):
            raise ValueError(
                "calibrate: `shared` selects no leaf, so there is no gradient to measure. Pass the "
                "mask of the leaves that both losses reach, or None for all of them."
            )
        dtype = _real(measures_lib.accumulation_dtype(*shared.values()))
        size = self.num_auxiliary + 1
        return CalibrationState(
            count=jnp.zeros((), jnp.int32),
            gram=jnp.zeros((size, size), dtype),
            weights=jnp.zeros((size,), dtype).at[0].set(1),
            condition_number=jnp.ones((), dtype),
            nonfinite=jnp.zeros((self.num_auxiliary,), jnp.int32),
            overflowed=jnp.zeros((size,), jnp.int32),
            age=jnp.zeros((), jnp.int32),
            measure=self.measure.init(self.num_auxiliary, shared),
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
        """Measures and asks the rule; the new weights are in the returned state.

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
        evidence_finite = jnp.zeros((), bool)
        if statistics is None:
            self.measure.require(evidence or {})
            evidence = self._shared_only(evidence or {})
            evidence_finite = self._evidence_finite(evidence)
            statistics = self.measure.reduce(evidence, self.num_auxiliary)
        measurement, measure_state = self.measure.update(statistics, state.measure, self.axis_name)
        checked = check(measurement, self.num_auxiliary, finite, evidence_finite, state.gram.dtype)
        key = jax.random.fold_in(jax.random.key(self.seed), state.count)
        weights, rule_state = self.rule.update(checked.measurement, state.rule, key)
        complete = jnp.all(checked.ok) & checked.main_ok & jnp.all(jnp.isfinite(weights))
        usable = jnp.concatenate([jnp.ones((1,), bool), checked.ok & checked.main_ok])
        weights = jnp.where(usable & jnp.isfinite(weights), weights, 0)

        def if_complete(new, old):
            return jax.tree.map(lambda n, o: jnp.where(complete, n, o), new, old)

        return CalibrationState(
            count=optax.safe_increment(state.count),
            gram=checked.measurement.gram,
            weights=weights.astype(state.weights.dtype),
            condition_number=condition_number(checked.measurement.gram),
            nonfinite=state.nonfinite + (~checked.ok & ~checked.overflowed[1:]).astype(jnp.int32),
            overflowed=state.overflowed + checked.overflowed.astype(jnp.int32),
            # Weights without one of the gradients must not be kept for the updates to come.
            age=complete.astype(jnp.int32),
            measure=if_complete(measure_state, state.measure),
            rule=if_complete(rule_state, state.rule),
        )

    def is_due(self, state: CalibrationState) -> jax.Array:
        """Whether this update measures: bool []."""
        return state.age % self.every == 0

    def hold(self, state: CalibrationState, finite: jax.Array | None = None) -> CalibrationState:
        """The state after an update that does not measure: it counts, and keeps the weights.

        Args:
          state: the state before.
          finite: bool [K], False for auxiliary gradients that were removed.
        """
        removed = 0 if finite is None else (~finite).astype(jnp.int32)
        return state._replace(
            count=optax.safe_increment(state.count),
            nonfinite=state.nonfinite + removed,
            age=jnp.where(state.age > 0, state.age + 1, 0),
        )

    def if_due(
        self, state: CalibrationState, measured: Callable[[Any], T], held: Callable[[Any], T]
    ) -> T:
        """`measured(state)` where this update measures, `held(state)` where it keeps the weights.

        The one place that decides it. Both must return the same structure of arrays; only the one
        that is taken runs.
        """
        if self.every == 1:
            return measured(state)
        return jax.lax.cond(self.is_due(state), measured, held, state)

    def apply_weights(self, weights: jax.Array, updates: Any, auxiliary: tuple[Any, ...]) -> Any:
        """Applies the coefficients lambda_k = w_k: w_0 g + sum_k w_k m_k on shared leaves.

        The others, which a single loss reaches, get g + sum_k m_k, unscaled.

        Args:
          weights: float [K+1].
          updates: the main gradient.
          auxiliary: K pytrees like it; a weight of 0 does not protect from their non-finite
            entries, which `update` has removed.

        Returns:
          A pytree like `updates`, of its dtypes; the sum is formed in at least float32.
        """
        unscaled = jnp.ones_like(weights)

        def leaf(shared, g, *ms):
            dtype = measures_lib.accumulation_dtype(g.dtype)
            scales = (weights if shared or self.scale_own else unscaled).astype(_real(dtype))
            total = scales[0] * g.astype(dtype)
            for k, m in enumerate(ms, start=1):
                total = total + scales[k] * m.astype(dtype)
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
        updates = trees.as_gradient(updates, "`updates`")
        auxiliary = trees.auxiliary_tuple(updates, auxiliary, self.num_auxiliary)
        auxiliary, finite = self.remove_nonfinite(auxiliary)
        evidence["gradients"] = (updates, *auxiliary)
        state = self.if_due(
            state,
            lambda state: self.weigh(state, evidence, statistics=statistics, finite=finite),
            lambda state: self.hold(state, finite),
        )
        # Evidence may be non-finite where the gradient is finite: then the weight is 0 already.
        return self.apply_weights(state.weights, updates, auxiliary), state

    def measured_update(self, updates: Any, state: CalibrationState, **keywords) -> Any:
        """`update` where `if_due` has already decided that this one measures."""
        return dataclasses.replace(self, every=1).update(updates, state, **keywords)

    def remove_nonfinite(self, auxiliary: tuple[Any, ...]) -> tuple[tuple[Any, ...], jax.Array]:
        """Replaces auxiliary gradients that have a non-finite entry by zeros.

        Returns:
          The K trees, and bool [K], whether each was finite: for `weigh`, which counts.
        """
        finite = jnp.stack([all_finite(m, self.axis_name) for m in auxiliary])
        return tuple(trees.zero_unless(finite[k], m) for k, m in enumerate(auxiliary)), finite

    def _shared_only(self, evidence: dict[str, Any]) -> dict[str, Any]:
        """Evidence whose pytrees of gradients are reduced to {path: shared leaf}."""
        chosen = self.measure.tree_evidence
        return {name: self._leaves(x) if name in chosen else x for name, x in evidence.items()}

    def _leaves(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._leaves(tree) for tree in value)
        shared = trees.selected(value, self._shared_mask(value))
        if self.axis_name is None or self.replicated is None:
            return shared
        # Inner products are summed over devices, so one device alone keeps a replicated leaf.
        replicated = trees.selected(
            trees.leaf_mask(value, self.replicated, "replicated"), self._shared_mask(value)
        )
        first = jax.lax.axis_index(self.axis_name) == 0
        return {
            name: trees.zero_unless(first, leaf) if replicated[name] else leaf
            for name, leaf in shared.items()
        }

    def _evidence_finite(self, evidence: dict[str, Any]) -> jax.Array:
        """Whether it is known of all evidence that it is finite: bool []."""
        if set(self.measure.evidence) - self.measure.tree_evidence:
            return jnp.zeros((), bool)  # masked cells of an array may hold anything
        return all_finite([evidence[name] for name in self.measure.evidence], self.axis_name)

    def _shared_mask(self, tree: Any) -> Any:
        """Pytree of bools like `tree`."""
        if self.shared is None:
            return jax.tree.map(lambda _: True, tree)
        return trees.leaf_mask(tree, self.shared, "shared")


def calibrate(
    measure: measures_lib.Measure | None = None,
    rule: rules_lib.Rule | None = None,
    *,
    num_auxiliary: int = 1,
    shared: Leaves = None,
    scale_own: bool = False,
    every: int = 1,
    axis_name: Any = None,
    replicated: Leaves = None,
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
      every: measure at every n-th update, from the first on, and keep the weights in between. An
        update that could not measure all gradients leaves the next one due.
      axis_name: mapped axis (shard_map, pmap) over which *parts* of the leaves, or of the evidence,
        are spread; inner products are summed over it. Under jit with NamedSharding, and where all
        devices hold the same gradients (data parallelism, after a pmean), leave it None.
      replicated: with `axis_name`, the leaves that every device of the axis holds whole, chosen as
        in `shared`. They would else count once a device.
      seed: of the key that rules which draw receive.

    Returns:
      A transformation whose `update` takes, by keyword:
        auxiliary: a pytree like `updates`, or a tuple or list of K of them. None in place of a leaf
          or subtree stands for zeros. A gradient with a non-finite entry is removed and counted.
        further evidence by the names that the measure documents, or `statistics` in its place.
      Its state is a `CalibrationState`; `occ.coefficient(opt_state)` and its like read it.

    Raises:
      ValueError: K < 1, a measure and rule that do not fit; on update, missing or misshapen
        auxiliary gradients or evidence.

    In a chain it comes first. What stands before it sees g alone: clipping there shortens g and not
    m, which changes c and the coefficient; after it, clipping sees the one combined gradient.

    Inside optax's wrappers: `chain`, `named_chain`, `inject_hyperparams`, `apply_if_finite`,
    `conditionally_mask` and `contrib.schedule_free` pass the keywords on. `apply_if_finite` looks
    at `updates` alone. `lookahead` takes no keywords and `flatten` flattens `updates` alone: put it
    before them. Inside `masked` and `partition` it refuses to work, since the leaves that they hide
    would never be given their auxiliary gradient: put it before them, with `shared=`.
    `optax.MultiSteps` averages `updates` but hands on the last micro-batch's `auxiliary`, silently:
    use `occ.accumulate`. flax's `nnx.Optimizer.update(model, grads, auxiliary=...)` passes the
    keyword; `TrainState.apply_gradients` drops it (notebook 02 has the subclass that does not).

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
        replicated=replicated,
        seed=seed,
    )

    def update(updates, state, params=None, **extra_args):
        del params
        return calibration.update(updates, state, **extra_args)

    return optax.GradientTransformationExtraArgs(calibration.init, update)


def _real(dtype: Any) -> Any:
    """The dtype itself, or that of its real part."""
    return jnp.finfo(dtype).dtype
