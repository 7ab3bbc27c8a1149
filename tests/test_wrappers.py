"""`calibrate` in other people's chains: it works there, or says what to do instead."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import occ
from occ import measures, rules

MASK = {"trunk": {"kernel": True}, "head": True, "mtp": False}
LABELS = {"trunk": {"kernel": "rest"}, "head": "rest", "mtp": "own"}


def tree(seed, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "trunk": {"kernel": jax.random.normal(keys[0], (3, 4), dtype)},
        "head": jax.random.normal(keys[1], (5,), dtype),
        "mtp": jax.random.normal(keys[2], (2, 2), dtype),
    }


def close(actual, expected, tolerance=1e-6):
    """Norm-wise agreement of every leaf."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.linalg.norm(a - e) <= tolerance * np.linalg.norm(e)


def calibrate(**options):
    return occ.calibrate(shared=lambda path: path != "mtp", **options)


def combined(g, m):
    """By hand: the coefficient over shared leaves, the own leaf unscaled."""
    shared = [
        jnp.concatenate([jnp.ravel(x) for x in (t["trunk"]["kernel"], t["head"])]) for t in (g, m)
    ]
    weight = jnp.sum(shared[0] * shared[1]) / jnp.sum(shared[1] * shared[1])
    scaled = jax.tree.map(lambda a, b: a + weight * b, g, m)
    return {**scaled, "mtp": g["mtp"] + m["mtp"]}, weight


def adam():
    return optax.adam(1e-2)


# name: a chain with the calibration in it, and the same that gets the combined gradient
CHAINS = {
    "chain": lambda occ_: (optax.chain(occ_, adam()), adam()),
    "named_chain": lambda occ_: (optax.named_chain(("occ", occ_), ("adam", adam())), adam()),
    "apply_if_finite": lambda occ_: (optax.apply_if_finite(optax.chain(occ_, adam()), 3), adam()),
    "clip after": lambda occ_: (
        optax.chain(occ_, optax.clip_by_global_norm(0.1), adam()),
        optax.chain(optax.clip_by_global_norm(0.1), adam()),
    ),
    "partition after, one part frozen": lambda occ_: (
        optax.chain(occ_, optax.partition({"rest": optax.set_to_zero(), "own": adam()}, LABELS)),
        optax.partition({"rest": optax.set_to_zero(), "own": adam()}, LABELS),
    ),
    "masked after": lambda occ_: (
        optax.chain(occ_, optax.masked(optax.add_decayed_weights(0.1), MASK), adam()),
        optax.chain(optax.masked(optax.add_decayed_weights(0.1), MASK), adam()),
    ),
    "flatten after": lambda occ_: (optax.chain(occ_, optax.flatten(adam())), adam()),
    "MultiSteps of one": lambda occ_: (optax.MultiSteps(optax.chain(occ_, adam()), 1), adam()),
    "accumulate": lambda occ_: (occ.accumulate(optax.chain(occ_, adam()), 1), adam()),
    "conditionally_mask": lambda occ_: (
        optax.conditionally_mask(optax.chain(occ_, adam()), lambda step: step >= 0),
        adam(),
    ),
    "schedule_free around": lambda occ_: (
        optax.contrib.schedule_free(optax.chain(occ_, optax.sgd(1e-2)), 1e-2),
        optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
    ),
    "schedule_free after": lambda occ_: (
        optax.chain(occ_, optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2)),
        optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
    ),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", CHAINS)
def test_a_wrapper_trains_as_on_the_combined_gradient(name):
    tx, plain = CHAINS[name](calibrate())
    params = expected_params = tree(9)
    state, plain_state = tx.init(params), plain.init(params)
    step = jax.jit(lambda g, m, state, params: tx.update(g, state, params, auxiliary=m))
    for seed in range(2):
        g, m = tree(seed), tree(100 + seed)
        gradient, weight = combined(g, m)
        updates, state = step(g, m, state, params)
        expected, plain_state = plain.update(gradient, plain_state, expected_params)
        close(updates, expected, 1e-4)
        np.testing.assert_allclose(occ.coefficient(state), [weight], rtol=1e-5)
        params = optax.apply_updates(params, updates)
        expected_params = optax.apply_updates(expected_params, expected)


def test_inject_hyperparams_changes_the_scale():
    g, m = tree(0), tree(1)
    tx = optax.inject_hyperparams(lambda scale: calibrate(rule=rules.optimal(scale)))(scale=0.5)
    state = tx.init(g)
    state.hyperparams["scale"] = jnp.asarray(2.0)
    _, state = tx.update(g, state, g, auxiliary=m)
    np.testing.assert_allclose(occ.coefficient(state), [2 * combined(g, m)[1]], rtol=1e-5)


@pytest.mark.standard_promotion
def test_lookahead_behind_it():
    """`lookahead` takes no keywords; in front of it nothing is lost."""
    g, m, params = tree(0), tree(1), tree(9)
    plain = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    both = optax.LookaheadParams.init_synced(params)
    tx = optax.chain(occ.calibrate(), plain)
    updates, _ = tx.update(g, tx.init(both), both, auxiliary=m)
    whole, _ = occ.calibrate().update(g, occ.calibrate().init(g), auxiliary=m)
    close(updates, plain.update(whole, plain.init(both), both)[0])


HIDES = {
    "masked": lambda: optax.masked(calibrate(), MASK, mask_compatible_extra_args=True),
    "masked by a function": lambda: optax.masked(occ.calibrate(), lambda tree: MASK),
    "partition": lambda: optax.partition(
        {"rest": optax.chain(occ.calibrate(), optax.sgd(1.0)), "own": optax.sgd(1.0)}, LABELS
    ),
    "masked groups": lambda: optax.masked(occ.calibrate_groups(lambda path: "all"), MASK),
}


@pytest.mark.parametrize("name", HIDES)
def test_inside_masked_and_partition_it_refuses(name):
    """Leaves outside the mask would never be given their own auxiliary gradient."""
    with pytest.raises(ValueError, match=r"never be given.*calibrate\(shared=mask\), optax.part"):
        HIDES[name]().init(tree(0))


def test_what_cannot_work_says_what_to_do():
    g, m = tree(0), tree(1)
    flattened = optax.flatten(calibrate())
    with pytest.raises(ValueError, match=r"optax.flatten, belong behind calibrate"):
        flattened.update(g, occ.calibrate().init(g), g, auxiliary=m)
    dropping = optax.chain(optax.MultiSteps(calibrate(), 1).gradient_transformation())
    with pytest.raises(ValueError, match=r"drop keywords on the way.*MultiSteps"):
        dropping.update(g, dropping.init(g), g, auxiliary=m)


@pytest.mark.standard_promotion
def test_placing_a_state_with_optax_map_params():
    """How others give an optimizer's state the shardings of the parameters."""
    params = tree(0)
    tx = occ.accumulate(optax.chain(occ.calibrate(), adam()), 2)
    mapped = optax.tree.map_params(
        tx, lambda _: "like a parameter", tx.init(params), transform_non_params=lambda _: "other"
    )
    assert mapped.auxiliary[0]["head"] == mapped.updates["mtp"] == "like a parameter"
    assert occ.calibration_state(mapped).gram == mapped.micro_step == "other"


# ---------------------------------------------------------------------------------- jax


def test_vmap_over_seeds_and_scan_over_steps():
    """The diagnostics keep leading axes: [seeds, steps, K]."""
    tx = calibrate(num_auxiliary=2)

    def gradients(seed, step):
        values = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)
        return tuple(
            {"trunk": jax.random.normal(k, (4,)), "mtp": jax.random.normal(k, (2,))} for k in values
        )

    def run(seed):
        def step(state, number):
            g, *ms = gradients(seed, number)
            _, state = tx.update(g, state, auxiliary=ms)
            return state, state

        return jax.lax.scan(step, tx.init(gradients(seed, 0)[0]), jnp.arange(4))

    last, stacked = jax.jit(jax.vmap(run))(jnp.arange(3))
    readings = (occ.coefficient, occ.correlation, occ.perturbation, occ.cosine, occ.damping)
    for read in readings:
        assert read(last).shape == (3, 2)
        assert read(stacked).shape == (3, 4, 2)
        one = jax.tree.map(lambda leaf: leaf[1, 2], stacked)
        np.testing.assert_allclose(read(stacked)[1, 2], read(one), rtol=1e-6)
    g, *ms = gradients(1, 2)
    products = [jnp.sum(g["trunk"] * m["trunk"]) for m in ms]
    np.testing.assert_allclose(occ.correlation(stacked)[1, 2], products, rtol=1e-5)


STATES = {
    "calibrate": lambda: occ.calibrate(num_auxiliary=2),
    "groups": lambda: occ.calibrate_groups(lambda path: path, num_auxiliary=2),
    "smoothed": lambda: occ.calibrate(
        measures.smoothed(measures.gradients()), rules.gradvac(), num_auxiliary=2
    ),
    "accumulate": lambda: occ.accumulate(occ.calibrate(num_auxiliary=2), 2, num_auxiliary=2),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_made_outside_jit_is_donated(name):
    """No buffer stands in two places of it."""
    tx, g, ms = STATES[name](), tree(0), (tree(1), tree(2))
    step = jax.jit(lambda state: tx.update(g, state, auxiliary=ms)[1], donate_argnums=0)
    state = tx.init(g)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)
    again = step(step(state))
    assert int(occ.calibration_state(again).count) == (1 if name == "accumulate" else 2)


def test_shard_map_parts_add_up_to_the_whole():
    """Each device holds a part of a leaf; `axis_name` sums the inner products over them.

    Of a leaf that all of them hold, one counts.
    """
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    g = {"split": jnp.arange(8.0), "whole": jnp.array([3.0, -1.0])}
    m = {"split": jnp.cos(jnp.arange(8.0)), "whole": jnp.array([2.0, 0.5])}
    tx = occ.calibrate()
    expected, state = tx.update(g, tx.init(g), auxiliary=m)
    by_path = occ.calibrate(axis_name="x", replicated=lambda path: path == "whole")
    by_mask = occ.calibrate(axis_name="x", replicated={"split": False, "whole": True})
    spec = {"split": jax.P("x"), "whole": jax.P()}

    def results(tx):
        def part(g, m):
            updates, state = tx.update(g, tx.init(g), auxiliary=m)
            return updates, state.gram

        mapped = jax.shard_map(part, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, jax.P()))
        return jax.jit(mapped)(g, m)

    for tx in (by_path, by_mask):
        updates, gram = results(tx)
        np.testing.assert_allclose(gram, state.gram, rtol=1e-6)
        close(updates, expected)
    _, several_times = results(occ.calibrate(axis_name="x"))
    assert abs(several_times[1, 1] - state.gram[1, 1] - 3 * jnp.sum(m["whole"] ** 2)) < 1e-4


@pytest.mark.standard_promotion
def test_bfloat16_parameters_in_a_whole_chain():
    """Twenty steps of scan: types stay, and the two losses go down."""
    tx = optax.chain(calibrate(), optax.clip_by_global_norm(1.0), optax.sgd(0.2))
    params = tree(0, jnp.bfloat16)

    def step(carry, _):
        params, state = carry
        g = {**params, "mtp": jnp.zeros_like(params["mtp"])}
        m = jax.tree.map(lambda x: (0.5 * x).astype(x.dtype), params)
        updates, state = tx.update(g, state, params, auxiliary=m)
        return (optax.apply_updates(params, updates), state), occ.coefficient(state)

    (after, _), weights = jax.lax.scan(step, (params, tx.init(params)), length=20)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(weights, 2.0, rtol=1e-2)
    for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
        assert jnp.linalg.norm(now.astype(float)) < 0.8 * jnp.linalg.norm(before.astype(float))


# ---------------------------------------------------------------------------------- flax


class TrainState(train_state.TrainState):
    """As notebook 02 has it."""

    def apply_gradients(self, *, grads, auxiliary, **changes):
        updates, state = self.tx.update(grads, self.opt_state, self.params, auxiliary=auxiliary)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=state, **changes)


def test_flax_train_state():
    g, m, params = tree(0), tree(1), tree(9)
    tx = optax.chain(calibrate(), optax.sgd(0.1))
    arguments = {"apply_fn": None, "params": params, "tx": tx}
    with pytest.raises(ValueError, match=r"drop keywords on the way.*TrainState"):
        train_state.TrainState.create(**arguments).apply_gradients(grads=g, auxiliary=m)
    step = jax.jit(lambda state, g, m: state.apply_gradients(grads=g, auxiliary=m))
    state = step(TrainState.create(**arguments), g, m)
    expected = jax.tree.map(lambda p, d: p - 0.1 * d, params, combined(g, m)[0])
    close(state.params, expected)
    assert int(state.step) == 1
    np.testing.assert_allclose(occ.coefficient(state.opt_state), [combined(g, m)[1]], rtol=1e-5)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.mtp = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, mtp=False):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return jnp.sum(self.mtp(x) if mtp else x)


def is_trunk_kernel(path):
    return path.endswith("kernel") and path.startswith("layers")


def test_nnx_optimizer():
    """It passes keywords on, and so must whoever wraps it; paths end in the parameter's name."""
    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 3))
    tx = optax.chain(occ.calibrate(shared=is_trunk_kernel), optax.sgd(0.1))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    g, m = nnx.grad(lambda net: net(x))(net), nnx.grad(lambda net: net(x, mtp=True))(net)

    def kernels(gradient):
        layers = nnx.to_pure_dict(gradient)["layers"]
        return np.concatenate([np.ravel(layers[i]["kernel"]) for i in (0, 1)])

    before = np.asarray(net.layers[1].kernel[...])
    optimizer.update(net, g, auxiliary=m)
    weight = kernels(g) @ kernels(m) / (kernels(m) @ kernels(m))
    np.testing.assert_allclose(occ.coefficient(optimizer.opt_state), [weight], rtol=1e-5)
    step = kernels(g)[9:] + weight * kernels(m)[9:]
    np.testing.assert_allclose(np.ravel(before - net.layers[1].kernel[...]), 0.1 * step, atol=1e-6)


def test_an_nnx_state_as_a_pytree():
    """The recommended way: split once, and a plain step over the states."""
    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 3))
    graph, params = nnx.split(net, nnx.Param)

    def gradient(mtp):
        return jax.grad(lambda params: nnx.merge(graph, params)(x, mtp=mtp))(params)

    paths = []
    tx = occ.calibrate(shared=lambda path: paths.append(path) or is_trunk_kernel(path))
    updates, state = tx.update(gradient(False), tx.init(params), params, auxiliary=gradient(True))
    assert set(paths) == {
        f"{layer}/{leaf}"
        for layer in ("layers/0", "layers/1", "mtp")
        for leaf in ("kernel", "bias")
    }
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert float(occ.perturbation(state)[0]) > 0
    grouped = occ.calibrate_groups(lambda path: None if path.startswith("mtp") else path[:8])
    updates, state = grouped.update(gradient(False), grouped.init(params), auxiliary=gradient(True))
    assert set(state.groups) == {"layers/0", "layers/1"}
    assert jax.tree.structure(updates) == jax.tree.structure(params)


# ---------------------------------------------------------------------------------- imports


def test_the_transformation_and_the_theory_need_jax_and_optax_alone():
    """Somebody who wants only this pays for nothing else of the project, though it be installed.

    After jax and optax have loaded what they need, only this package and the standard library are
    there to be imported.
    """
    code = """
import sys
import jax, jax.numpy, numpy, optax

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"occ", "jax", "jaxlib", "numpy", "optax"}:
            raise ImportError(f"{name} must not be imported")

before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import occ, occ.theory
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
tx = occ.calibrate()
g = {"w": jax.numpy.ones(3)}
tx.update(g, tx.init(g), auxiliary=g)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['occ']"


def test_that_check_can_fail():
    """flax is there, and optax does not bring it."""
    code = "import sys, jax, optax; print(any(n in sys.modules for n in ('flax', 'jaxtyping')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False"
