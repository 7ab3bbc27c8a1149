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


def test_what_could_not_be_measured_stays_due():
    """One NaN would else switch the auxiliary gradient off until the next turn, `every` later."""
    g, m = tree(0), tree(1)
    tx = occ.calibrate(every=4)
    state, weights = tx.init(g), []
    for gradient, auxiliary in (
        (g, jax.tree.map(lambda x: x * np.nan, m)),
        (jax.tree.map(lambda x: x * np.nan, g), m),
        *[(g, jax.tree.map(lambda x, n=n: x / n, m)) for n in range(1, 7)],
    ):
        _, state = tx.update(gradient, state, g, auxiliary=auxiliary)
        weights.append(float(occ.coefficient(state)[0]))
    right = float(flat(g) @ flat(m) / (flat(m) @ flat(m)))
    np.testing.assert_allclose(weights, [0, 0, *[right] * 4, *[5 * right] * 2], rtol=1e-5)
    assert int(state.count) == 8 and int(state.age) == 2


def test_an_overflow_is_counted_as_such():
    """Finite gradients whose inner products are not: each in turn, the main one first."""
    small, large = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1e20, 1e20])}
    tx = occ.calibrate(num_auxiliary=2)
    cases = {
        (0, 0, 0): (small, small, small),
        (1, 0, 0): (large, small, small),
        (0, 0, 1): (small, small, large),
        (1, 1, 1): (large, large, large),
    }
    for overflowed, (g, *ms) in cases.items():
        updates, state = update(tx, g, ms)
        np.testing.assert_array_equal(state.overflowed, overflowed)
        np.testing.assert_array_equal(state.nonfinite, [0, 0])
        assert np.isfinite(flat((updates, state.gram, state.weights))).all()
        usable = np.array(overflowed[1:]) == overflowed[0]
        assert ((np.asarray(occ.coefficient(state)) != 0) == (usable & (not overflowed[0]))).all()
    infinite = {"w": jnp.array([np.inf, 0.0])}
    for g, *ms in ((infinite, small, small), (small, infinite, small)):
        _, state = update(tx, g, ms)
        np.testing.assert_array_equal(state.overflowed, [0, 0, 0])
    np.testing.assert_array_equal(state.nonfinite, [1, 0])


def test_two_leaves_with_one_path_are_both_measured():
    """A key may hold a slash, as those of haiku do."""
    g = {"x/y": jnp.array([3.0]), "x": {"y": jnp.array([4.0])}, "x/y#2": jnp.array([12.0])}
    for tx in (occ.calibrate(), occ.calibrate_groups(lambda path: "all")):
        updates, state = update(tx, g, g)
        np.testing.assert_array_equal(occ.perturbation(state), [169.0])
        jax.tree.map(lambda u, x: np.testing.assert_allclose(u, 2 * x), updates, g)


def test_none_and_a_list_of_auxiliary_gradients():
    """None stands where a loss does not reach: a leaf, a subtree, all of it."""
    g, m = tree(0), tree(1)
    zero = jax.tree.map(jnp.zeros_like, m)
    cases = {
        "leaf": ({**m, "mtp": None}, {**m, "mtp": zero["mtp"]}),
        "subtree": ({**m, "trunk": None}, {**m, "trunk": zero["trunk"]}),
    }
    for some, whole in cases.values():
        for tx in (occ.calibrate(), occ.calibrate_groups(lambda path: "all")):
            jax.tree.map(np.testing.assert_array_equal, update(tx, g, some), update(tx, g, whole))
        tx = occ.accumulate(occ.calibrate(), 1)
        jax.tree.map(np.testing.assert_array_equal, update(tx, g, some), update(tx, g, whole))
    tx = occ.calibrate(num_auxiliary=2)
    jax.tree.map(np.testing.assert_array_equal, update(tx, g, [m, None]), update(tx, g, (m, zero)))
    one = occ.calibrate()
    jax.tree.map(np.testing.assert_array_equal, update(one, g, [m]), update(one, g, m))
    # A tree may be a tuple or a list itself.
    pair = (jnp.ones(2), jnp.ones(3))
    updates, _ = update(one, pair, (None, jnp.ones(3)))
    np.testing.assert_array_equal(updates[0], pair[0])


def test_leaves_that_are_no_arrays():
    g, m = {"w": jnp.array([3.0, 4.0]), "b": 2.0}, {"w": jnp.array([6.0, 8.0]), "b": 4.0}
    for tx in (occ.calibrate(), occ.calibrate_groups(lambda path: "all")):
        updates, state = update(tx, g, m)
        assert float(occ.coefficient(state)[0]) == 0.5
        assert float(updates["b"]) == 4.0
    updates, _ = update(occ.accumulate(occ.calibrate(), 1), g, m)
    assert float(updates["b"]) == 4.0
    float0, tx = np.zeros((), jax.dtypes.float0), occ.calibrate()
    state = tx.init(g)
    for bad, got in ((float0, "float0"), (jnp.ones((), jnp.int32), "int32"), ("x", "str")):
        with pytest.raises(ValueError, match=f"`updates` has no floating.*at 'b', but {got}"):
            tx.update({**g, "b": bad}, state, auxiliary=m)
        with pytest.raises(ValueError, match=f"gradient 1 has no floating.*at 'b', but {got}"):
            tx.update(g, state, auxiliary={**m, "b": bad})


def test_shared_is_no_function_of_the_tree():
    g = tree(0)
    functions = (
        lambda params: dict.fromkeys(params, True),
        lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        lambda params: {name: params[name] for name in ("trunk", "head")},
        lambda path: 1,
    )
    for function in functions:
        with pytest.raises((ValueError, AttributeError, TypeError)) as raised:
            occ.calibrate(shared=function).init(g)
        told = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
        assert "shared=function(params)" in told
    with pytest.raises(ValueError, match="got 'yes'"):
        occ.calibrate(shared=jax.tree.map(lambda _: "yes", g)).init(g)
    with pytest.raises(ValueError, match=r"`group` must return a group's name.*returned \{"):
        occ.calibrate_groups(lambda tree: {}).init(g)
    occ.calibrate(shared=jax.tree.map(lambda leaf: np.bool_(leaf.ndim > 1), g)).init(g)


@pytest.mark.parametrize("length", [1e-8, 1e-4, 1.0, 1e4])
def test_the_coefficient_knows_no_units(length):
    """A shorter auxiliary gradient gets a larger coefficient, in a step that stays the same."""
    g, m = tree(0), tree(1)
    short = jax.tree.map(lambda x: np.float32(length) * x, m)
    close(update(occ.calibrate(), g, short)[0], update(occ.calibrate(), g, m)[0])
    paper = occ.calibrate(rule=rules.optimal(eps=rules.PAPER_EPS))
    _, exact = update(occ.calibrate(), g, short)
    _, state = update(paper, g, short)
    kept = float(occ.coefficient(state)[0] / occ.coefficient(exact)[0])
    np.testing.assert_allclose(occ.damping(state), [1 - kept], rtol=1e-4, atol=1e-6)
    v2 = float(occ.perturbation(state)[0])
    np.testing.assert_allclose(kept, v2 / (v2 + 1e-8), rtol=1e-4)


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
