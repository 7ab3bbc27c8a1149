"""What every exported rule and every measure has to stand, by one suite over all of them.

A new rule joins through `rules.REGISTRY`, a new measure by a row in `MEASURES`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occ
from occ import measures, rules


def trees(count, seed, dtype, mix=0.0):
    """Tiny gradients g, m_1, .. of one leaf, a stack of two layers: every leaf costs compile time.

    The m_k share a part of g, `mix` large, with either sign.
    """
    values = np.random.default_rng(seed).normal(size=(count, 2, 4, 3))
    for k in range(1, count):
        values[k] -= mix * (-1) ** k * values[0]
    return tuple({"layers": {"up": jnp.asarray(value, dtype)}} for value in values)


def none(heads, seed, dtype):
    return {}


def log_ratios(heads, seed, dtype):
    rng = np.random.default_rng(seed)
    return {
        "main_log_ratio": jnp.asarray(rng.normal(size=(2, 5)), dtype),
        "auxiliary_log_ratios": jnp.asarray(rng.normal(size=(heads, 2, 5)), dtype),
        "response_mask": jnp.asarray(rng.random((2, 5)) < 0.7),
    }


def second_moment(heads, seed, dtype):
    return {"second_moment": jax.tree.map(jnp.square, trees(1, seed + 50, dtype)[0])}


def halves(heads, seed, dtype):
    return {
        "gradient_halves": tuple(trees(heads + 1, seed + n, dtype) for n in (60, 70)),
    }


def one_of_its_own(name):
    return lambda heads, seed, dtype: {name: trees(heads + 1, seed + 80, dtype)}


# name: (factory, evidence that it needs besides the gradients: (heads, seed, dtype) -> keywords)
MEASURES = {
    "gradients": (measures.gradients, none),
    "gradients(select)": (lambda: measures.gradients(measures.layer(0)), none),
    "preconditioned": (measures.preconditioned, second_moment),
    "preconditioned(euclidean)": (
        lambda: measures.preconditioned(norm="euclidean"),
        second_moment,
    ),
    "cross_fitted": (measures.cross_fitted, halves),
    "row_subset": (measures.row_subset, one_of_its_own("row_subset")),
    "readout": (measures.readout, one_of_its_own("readout")),
    "sketched": (lambda: measures.sketched(2), none),
    "past_gradients": (measures.past_gradients, none),
    "past_gradients(preconditioned)": (
        lambda: measures.past_gradients(norm="preconditioned"),
        second_moment,
    ),
    "smoothed": (lambda: measures.smoothed(measures.gradients()), none),
    "smoothed(cross_fitted)": (lambda: measures.smoothed(measures.cross_fitted()), halves),
    "log_ratios(paper)": (measures.log_ratios, log_ratios),
    "log_ratios(released_masked)": (lambda: measures.log_ratios("released_masked"), log_ratios),
    "log_ratios(released_unmasked)": (lambda: measures.log_ratios("released_unmasked"), log_ratios),
}

OPTIONS = {
    "fixed": {"coefficients": 0.3},
    "noisy_optimal": {"step_smoothness": 0.5},
    "replay": {"series": [0.3, -0.1]},
}
RULES = {
    name: functools.partial(rules.by_name, name, **OPTIONS.get(name, {})) for name in rules.REGISTRY
} | {
    "cosine_gating(unweighted)": lambda: rules.cosine_gating(weighted=False),
    "pcgrad(asymmetric)": lambda: rules.pcgrad(symmetric=False),
}

NEEDED = {"signal_to_noise": measures.past_gradients}  # by a rule that cannot do with any measure
CASES = {f"measure {name}": (*row, rules.optimal) for name, row in MEASURES.items()} | {
    f"rule {name}": (NEEDED.get(name, measures.gradients), none, factory)
    for name, factory in RULES.items()
}


class Transformation:
    """A case's transformation with its inputs, and its compiled update, which counts its traces.

    The compiled update is one step of `lax.scan`, so all that is checked of it holds there.
    """

    def __init__(self, name, heads, dtype=jnp.float32):
        measure, self.evidence, rule = CASES[name]
        self.heads, self.dtype = heads, dtype
        self.measure = measure()
        self.tx = occ.calibrate(self.measure, rule(), num_auxiliary=heads)
        self.traces = 0
        self.compiled = jax.jit(self._traced)

    def init(self):
        return self.tx.init(trees(1, 0, self.dtype)[0])

    def inputs(self, seed, change=lambda m: m):
        """Gradients and evidence; `change` is applied to the first auxiliary gradient."""
        g, first, *rest = trees(self.heads + 1, seed, self.dtype, mix=0.6)
        evidence = self.evidence(self.heads, seed, self.dtype)
        return g, (jax.tree.map(change, first), *rest), evidence

    def eager(self, state, inputs, **unknown):
        g, ms, evidence = inputs
        return self.tx.update(g, state, None, auxiliary=ms, **evidence, **unknown)

    def _traced(self, state, inputs):
        self.traces += 1

        def body(state, inputs):
            updates, state = self.eager(state, inputs)
            return state, updates

        state, updates = jax.lax.scan(body, state, jax.tree.map(lambda x: x[None], inputs))
        return jax.tree.map(lambda x: x[0], updates), state


@functools.cache
def transformation(name, heads):
    return Transformation(name, heads)


def flat(pytree):
    return np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(pytree)] or [np.zeros(0)]
    )


def close(actual, expected, tolerance=1e-4):
    """Same structure, shapes and dtypes; each leaf agrees norm-wise, NaN and inf in place."""
    assert types(actual) == types(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = flat(a), flat(e)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(e))
        a, e = a[np.isfinite(e)], e[np.isfinite(e)]
        assert np.linalg.norm(a - e) <= tolerance * (np.linalg.norm(e) + 1e-6)


def types(pytree):
    leaves, structure = jax.tree.flatten(pytree)
    return structure, [(leaf.shape, leaf.dtype, leaf.aval.weak_type) for leaf in leaves]


def poisoned_leaves(state):
    """NaN in what the next step builds on."""
    return np.isnan(flat((state.weights, state.measure, state.rule))).any()


every_case = pytest.mark.parametrize("name", CASES)
# One head, two, and for the rules, where the number of heads matters most, three.
every_size = pytest.mark.parametrize(
    ("name", "heads"),
    [(name, k) for name in CASES for k in (1, 2, 3) if k < 3 or name.startswith("rule")],
)


def test_every_exported_measure_has_a_row():
    """Lower-case names are factories, or functions that a measure is given."""
    helpers = {"accumulation_dtype", "gram_matrix", "inner_product", "layer", "named"}
    helpers |= {"by_name", "declare_evidence", "register"}
    factories = {name for name in measures.__all__ if name.islower()} - helpers
    assert factories == {name.split("(")[0] for name in MEASURES}
    registered = {name for name in measures.REGISTRY if name in measures.__all__}
    assert registered == factories - {"smoothed"}


def test_a_measure_is_known_by_name_where_it_is_defined():
    @measures.register("of_a_user")
    def of_a_user(scale: float = 1.0):
        return measures.gradients()._replace(name=f"of_a_user({scale})")

    try:
        assert measures.by_name("of_a_user", scale=2.0).name == "of_a_user(2.0)"
        with pytest.raises(ValueError, match="'of_a_user' is there already"):
            measures.register("of_a_user")(of_a_user)
    finally:
        del measures.REGISTRY["of_a_user"]


def test_evidence_that_nothing_declares_is_not_early():
    unknown = measures.gradients()._replace(evidence=("of_a_user",))
    assert not unknown.early and not unknown.tree_evidence
    assert measures.log_ratios().early


@every_case
def test_compiled_equals_eager(name):
    """Two steps each, the second from a state that is not the initial one."""
    case = transformation(name, 2)
    expected_state, state = case.init(), case.init()
    for seed in (0, 1):
        expected, expected_state = case.eager(
            expected_state, case.inputs(seed), stranger="to be ignored", another=jnp.ones(3)
        )
        updates, state = case.compiled(state, case.inputs(seed))
        close(updates, expected)
        close(state, expected_state)


@every_size
def test_state_is_stable_and_nothing_is_compiled_twice(name, heads):
    case = transformation(name, heads)
    state = case.init()
    for seed in (0, 1):
        updates, new = case.compiled(state, case.inputs(seed))
        assert types(new) == types(state)
        assert np.isfinite(flat((updates, new.weights))).all()
        state = new
    assert int(state.count) == 2
    assert case.traces == 1


@every_size
def test_state_survives_a_checkpoint(name, heads):
    """Through numpy and back it has the same structure, and goes on to the same result."""
    case = transformation(name, heads)
    _, state = case.compiled(case.init(), case.inputs(0))
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.array(leaf)) for leaf in leaves])
    assert types(restored) == types(state)
    close(case.compiled(restored, case.inputs(1)), case.compiled(state, case.inputs(1)), 0.0)


@every_size
def test_zero_auxiliary(name, heads):
    """Finite for all; weight 0 where the measure sees the gradients and the rule looks at them."""
    case = transformation(name, heads)
    updates, state = case.compiled(case.init(), case.inputs(0, jnp.zeros_like))
    assert np.isfinite(flat(updates)).all()
    assert not poisoned_leaves(state)
    sees = set(case.measure.evidence) <= {"gradients", "second_moment"}
    if sees and name not in ("rule fixed", "rule replay"):
        assert float(state.weights[1]) == 0
    again, _ = case.compiled(state, case.inputs(1))
    assert np.isfinite(flat(again)).all()


@every_size
def test_nonfinite_auxiliary_is_removed_and_counted_and_poisons_nothing(name, heads):
    case = transformation(name, heads)
    _, before = case.compiled(case.init(), case.inputs(0))
    updates, state = case.compiled(before, case.inputs(1, lambda leaf: leaf.at[0].set(jnp.nan)))
    assert np.isfinite(flat(updates)).all()
    np.testing.assert_array_equal(state.nonfinite, [1] + [0] * (heads - 1))
    assert float(state.weights[1]) == 0
    close((state.measure, state.rule), (before.measure, before.rule), 0.0)
    assert not poisoned_leaves(state)
    # What follows is what would have followed without the accident (but for the count).
    after = case.compiled(state._replace(count=before.count), case.inputs(2))
    expected = case.compiled(before, case.inputs(2))
    close(after[0], expected[0], 0.0)
    close(after[1]._replace(nonfinite=before.nonfinite), expected[1], 0.0)


@every_case
def test_bfloat16_is_measured_and_combined_in_float32(name):
    """The updates are those of the same values in float32, rounded once."""
    case, wide = Transformation(name, 2, jnp.bfloat16), transformation(name, 2)
    updates, state = case.eager(case.init(), case.inputs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.gram.dtype == state.weights.dtype == jnp.float32
    same = jax.tree.map(
        lambda leaf: leaf if leaf.dtype == bool else leaf.astype(jnp.float32), case.inputs(0)
    )
    expected, expected_state = wide.eager(wide.init(), same)
    close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates), expected, 2**-8)
    close(state.weights, expected_state.weights)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@every_case
def test_types_in_a_float64_session(name, dtype):
    """Traced only: gradients keep their type, what is measured has it, the state stays stable."""
    with jax.enable_x64(True):
        case = Transformation(name, 2, dtype)
        state = case.init()
        updates, new = jax.eval_shape(case.eager, state, case.inputs(0))
        described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(new)]
        assert described == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert new.gram.dtype == new.weights.dtype == dtype


@pytest.mark.parametrize("name", RULES)
def test_rules_agree_in_float64_and_float32(name):
    case, rule = transformation(f"rule {name}", 2), RULES[name]()
    _, state = case.compiled(case.init(), case.inputs(0))
    with jax.enable_x64(True):
        gram = jnp.asarray(state.gram, jnp.float64)
        measurement, key = measures.Measurement(gram), jax.random.fold_in(jax.random.key(0), 0)
        if rule.takes_signal:  # there is nothing past at the first update
            measurement = measures.Measurement(gram, None, gram[0, 1:], jnp.zeros_like(gram[0]))
        weights, _ = rule.update(measurement, rule.init(2), key)
        close(weights.astype(jnp.float32), state.weights)


@pytest.mark.parametrize("name", RULES)
def test_rules_refuse_a_ratio_that_they_cannot_use(name):
    """A measure that never has a Gram matrix goes with rules that say so, and is refused else."""
    ratio, rule = measures.log_ratios("released_masked"), RULES[name]()
    if rule.takes_ratio:
        occ.calibrate(ratio, rule)
    else:
        with pytest.raises(ValueError, match="needs a Gram matrix"):
            occ.calibrate(ratio, rule)
