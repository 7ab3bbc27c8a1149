"""The optax transformation: closed forms, defined results, state, errors, wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import occ
from occ import measures, rules

KEY = jax.random.key(0)


def tree(seed, dtype=jnp.float32):
    """A gradient on three leaves of different ranks, one of them nested."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "trunk": {"kernel": jax.random.normal(keys[0], (3, 4), dtype)},
        "head": jax.random.normal(keys[1], (5,), dtype),
        "mtp": jax.random.normal(keys[2], (2, 2), dtype),
    }


def flat(t):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)])


def close(actual, expected, tolerance=1e-5):
    """Norm-wise agreement of two trees."""
    a, e = flat(actual), flat(expected)
    assert np.linalg.norm(a - e) <= tolerance * np.linalg.norm(e)


def update(tx, g, m, **evidence):
    return tx.update(g, tx.init(g), g, auxiliary=m, **evidence)


ANGLES = {"aligned": 0.0, "orthogonal": np.pi / 2, "opposed": np.pi, "oblique": 0.7}


@pytest.mark.parametrize("name", ANGLES)
def test_coefficient_in_closed_form_by_angle(name):
    """With ||g|| = 2, ||m|| = 3 at angle a: c = 6 cos a, v^2 = 9, w = (2/3) cos a."""
    angle = ANGLES[name]
    g = {"w": jnp.array([2.0, 0.0])}
    m = {"w": 3.0 * jnp.array([np.cos(angle), np.sin(angle)], jnp.float32)}
    updates, state = update(occ.calibrate(), g, m)
    expected = 2 / 3 * np.cos(angle)
    np.testing.assert_allclose(occ.coefficient(state)[0], expected, atol=1e-6)
    np.testing.assert_allclose(occ.correlation(state)[0], 6 * np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(occ.perturbation(state)[0], 9.0, rtol=1e-6)
    np.testing.assert_allclose(occ.cosine(state)[0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(updates["w"], g["w"] + np.float32(expected) * m["w"], atol=1e-5)


def test_several_auxiliaries_match_a_loop_in_float64(x64):
    """The joint solution of (V + r I) w = c, formed by hand from raveled vectors."""
    g, ms = tree(0, jnp.float64), tuple(tree(k, jnp.float64) for k in (1, 2, 3))
    tx = occ.calibrate(num_auxiliary=3, rule=rules.optimal(scale=0.5))
    updates, state = update(tx, g, ms)
    matrix = np.stack([flat(m) for m in ms])
    gram = matrix @ matrix.T
    ridge = 1e-4 * np.trace(gram) / 3
    weights = np.linalg.solve(gram + ridge * np.eye(3), 0.5 * matrix @ flat(g))
    np.testing.assert_allclose(occ.coefficient(state), weights, rtol=1e-12)
    np.testing.assert_allclose(flat(updates), flat(g) + weights @ matrix, rtol=1e-12)
    np.testing.assert_allclose(state.condition_number, np.linalg.cond(gram), rtol=1e-9)
    assert state.gram.dtype == jnp.float64


def test_shared_leaves_decide_and_own_leaves_are_unscaled():
    g, m = tree(0), tree(1)
    g = {**g, "mtp": jnp.zeros_like(g["mtp"])}
    tx = occ.calibrate(shared=lambda path: not path.startswith("mtp"))
    updates, state = update(tx, g, m)
    shared = [{key: t[key] for key in ("trunk", "head")} for t in (g, m)]
    c, v2 = flat(shared[0]) @ flat(shared[1]), flat(shared[1]) @ flat(shared[1])
    np.testing.assert_allclose(occ.coefficient(state)[0], c / v2, rtol=1e-5)
    np.testing.assert_array_equal(updates["mtp"], m["mtp"])
    close(updates["head"], g["head"] + np.float32(c / v2) * m["head"])
    mask = {"trunk": {"kernel": True}, "head": True, "mtp": False}
    by_mask, _ = update(occ.calibrate(shared=mask), g, m)
    jax.tree.map(np.testing.assert_array_equal, by_mask, updates)


def test_scale_own_scales_the_own_leaves_too():
    g, m = tree(0), tree(1)
    tx = occ.calibrate(rule=rules.fixed(0.25), shared=lambda p: p != "mtp", scale_own=True)
    updates, _ = update(tx, g, m)
    np.testing.assert_allclose(updates["mtp"], g["mtp"] + 0.25 * m["mtp"], rtol=1e-6)


def test_zero_auxiliary_gets_weight_zero():
    g = tree(0)
    zero = jax.tree.map(jnp.zeros_like, g)
    updates, state = update(occ.calibrate(), g, zero)
    assert float(occ.coefficient(state)[0]) == 0.0
    assert float(occ.cosine(state)[0]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, updates, g)
    _, state = update(occ.calibrate(num_auxiliary=2), g, (zero, tree(1)))
    assert float(occ.coefficient(state)[0]) == 0.0
    assert np.isfinite(occ.coefficient(state)[1])
    _, state = update(occ.calibrate(num_auxiliary=2), g, (zero, zero))
    np.testing.assert_array_equal(occ.coefficient(state), [0.0, 0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["head", "mtp"])
def test_nonfinite_auxiliary_is_removed_counted_and_forgotten(bad, leaf):
    """Also where only an own leaf is affected: the whole auxiliary gradient is suspect."""
    g, m1, m2 = tree(0), tree(1), tree(2)
    poisoned = {**m1, leaf: m1[leaf].at[(0,) * m1[leaf].ndim].set(bad)}
    tx = occ.calibrate(num_auxiliary=2, shared=lambda p: p != "mtp")
    state = tx.init(g)
    updates, state = tx.update(g, state, g, auxiliary=(poisoned, m2))
    np.testing.assert_array_equal(state.nonfinite, [1, 0])
    assert float(occ.coefficient(state)[0]) == 0.0
    assert np.isfinite(flat(updates)).all()
    expected, _ = update(tx, g, (jax.tree.map(jnp.zeros_like, m1), m2))
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    after, state = tx.update(g, state, g, auxiliary=(m1, m2))
    fresh, _ = update(tx, g, (m1, m2))
    jax.tree.map(np.testing.assert_array_equal, after, fresh)
    np.testing.assert_array_equal(state.nonfinite, [1, 0])


def test_nonfinite_main_gradient_reaches_the_caller_and_not_the_state():
    g, m = tree(0), tree(1)
    bad = {**g, "head": g["head"].at[0].set(np.nan)}
    tx = occ.calibrate()
    updates, state = update(tx, bad, m)
    assert not np.isfinite(flat(updates)).all()  # apply_if_finite outside can see it
    assert np.isfinite(flat(state._replace(measure=(), rule=()))).all()
    assert float(occ.coefficient(state)[0]) == 0.0
    np.testing.assert_array_equal(state.nonfinite, [0])


def test_bfloat16_is_combined_in_float32():
    """In bfloat16 1 + 0.003 rounds back to 1 at every partial sum; in float32 it accumulates."""
    g = {"w": jnp.ones((4,), jnp.bfloat16)}
    ms = tuple({"w": jnp.full((4,), 0.003, jnp.bfloat16)} for _ in range(2))
    tx = occ.calibrate(num_auxiliary=2, rule=rules.fixed(1.0))
    updates, state = update(tx, g, ms)
    assert updates["w"].dtype == jnp.bfloat16
    assert state.gram.dtype == jnp.float32
    assert float(updates["w"][0]) > 1.0


def test_scan_and_no_recompilation():
    tx = occ.calibrate()
    g, m = tree(0), tree(1)

    def body(state, _):
        updates, state = tx.update(g, state, g, auxiliary=m)
        return state, updates["head"]

    state, outputs = jax.lax.scan(body, tx.init(g), None, length=3)
    assert int(state.count) == 3
    np.testing.assert_array_equal(outputs[0], outputs[2])
    traces = []

    @jax.jit
    def step(state, g, m):
        traces.append(1)
        return tx.update(g, state, g, auxiliary=m)

    _, state = step(tx.init(g), g, m)
    step(state, m, g)
    assert len(traces) == 1


@pytest.mark.parametrize("wrapper", ["chain", "named_chain", "inject", "apply_if_finite"])
def test_wrappers_pass_the_evidence_on(wrapper):
    g, m = tree(0), tree(1)
    expected, inner = update(occ.calibrate(rule=rules.optimal(scale=0.5)), g, m)

    def build(scale):
        return occ.calibrate(rule=rules.optimal(scale=scale))

    tx = {
        "chain": lambda: optax.chain(build(0.5), optax.identity()),
        "named_chain": lambda: optax.named_chain(("occ", build(0.5)), ("id", optax.identity())),
        "inject": lambda: optax.inject_hyperparams(build)(scale=0.5),
        "apply_if_finite": lambda: optax.apply_if_finite(build(0.5), 3),
    }[wrapper]()
    updates, state = jax.jit(tx.update)(g, tx.init(g), g, auxiliary=m)
    close(updates, expected, 1e-6)
    np.testing.assert_allclose(occ.coefficient(state), occ.coefficient(inner), rtol=1e-6)


def test_masked_with_compatible_extra_args():
    g, m = tree(0), tree(1)
    mask = {"trunk": {"kernel": True}, "head": True, "mtp": False}
    tx = optax.masked(occ.calibrate(), mask, mask_compatible_extra_args=True)
    updates, state = update(tx, g, m)
    _, expected = update(occ.calibrate(shared=mask), g, m)
    np.testing.assert_allclose(occ.coefficient(state), occ.coefficient(expected), rtol=1e-6)
    np.testing.assert_array_equal(updates["mtp"], g["mtp"])


@pytest.mark.standard_promotion
def test_chain_with_adam_equals_a_hand_written_loop():
    params = tree(9)
    tx = optax.chain(occ.calibrate(), optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state, plain_state, other = tx.init(params), plain.init(params), params
    for seed in range(4):
        g, m = tree(seed), tree(100 + seed)
        updates, state = tx.update(g, state, params, auxiliary=m)
        weight = np.float32(flat(g) @ flat(m) / (flat(m) @ flat(m) + 1e-8))
        combined = jax.tree.map(lambda a, b, w=weight: a + w * b, g, m)
        expected, plain_state = plain.update(combined, plain_state, other)
        close(updates, expected, 1e-4)
        params, other = (
            optax.apply_updates(params, updates),
            optax.apply_updates(other, expected),
        )


def test_shard_map_parts_add_up_to_the_whole():
    """Each device holds a part of every leaf; `axis_name` sums the inner products over them."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    g, m = jnp.arange(8.0), jnp.cos(jnp.arange(8.0))
    whole, expected = update(occ.calibrate(), {"w": g}, {"w": m})
    tx = occ.calibrate(axis_name="x")

    def part(g, m):
        updates, state = update(tx, {"w": g}, {"w": m})
        return updates["w"], occ.coefficient(state)

    spec = jax.P("x")
    updates, weight = jax.jit(
        jax.shard_map(part, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, jax.P()))
    )(g, m)
    np.testing.assert_allclose(weight, occ.coefficient(expected), rtol=1e-6)
    np.testing.assert_allclose(updates, whole["w"], rtol=1e-6)


def test_errors_say_what_to_pass():
    g, m = tree(0), tree(1)
    tx = occ.calibrate()
    state = tx.init(g)
    with pytest.raises(ValueError, match=r"`auxiliary` is missing.*auxiliary=mtp_grads"):
        tx.update(g, state, g)
    with pytest.raises(ValueError, match=r"num_auxiliary=1 auxiliary gradient.*a tuple of 2"):
        tx.update(g, state, g, auxiliary=(m, m))
    with pytest.raises(ValueError, match="tree structure"):
        tx.update(g, state, g, auxiliary=({"head": m["head"]},))
    with pytest.raises(ValueError, match=r"shape \(6,\) at 'head', expected \(5,\)"):
        tx.update(g, state, g, auxiliary={**m, "head": jnp.zeros(6)})
    with pytest.raises(ValueError, match="num_auxiliary must be >= 1, got 0"):
        occ.calibrate(num_auxiliary=0)
    with pytest.raises(ValueError, match="selects no leaf"):
        occ.calibrate(shared=lambda path: False).init(g)
    with pytest.raises(ValueError, match="structure of the gradients"):
        occ.calibrate(shared={"head": True}).init(g)
    with pytest.raises(ValueError, match="found 0"):
        occ.coefficient(optax.sgd(1.0).init(g))
    proxy = occ.calibrate(measures.log_ratios())
    with pytest.raises(ValueError, match=r"needs the evidence.*main_log_ratio"):
        proxy.update(g, proxy.init(g), g, auxiliary=m)


def test_the_transformation_imports_jax_and_optax_alone():
    """Somebody who wants only the transformation pays for nothing else of this project."""
    import subprocess
    import sys

    code = (
        "import sys, jax, optax; before = set(sys.modules); import occ; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(new))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['occ']"
