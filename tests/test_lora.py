"""Adapters of a frozen trunk: their gradient, what is weighed, and that nothing else moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.instruments.costs import trained
from occ.generation.decoding import generate
from occ.generation.sampling import SamplingConfig
from occ.models.config import LoRAConfig, MoEConfig
from occ.models.lora import adapt, is_adapter, merge
from occ.models.parameters import is_shared
from occ.models.policy import abstract_policy, new_policy
from occ.models.quantisation import dequantise, quantise, quantised_product
from occ.training.config import LayoutConfig, MTPTrainingConfig
from occ.training.gradient.calibration import build_calibration
from occ.training.programs import abstract_state
from occ.training.regimes import regime
from occ.training.sharding import abstract_mesh
from occ.training.step import make_train_step
from occ.trees import path_string
from tests import tiny
from tests.test_sharding import LAYOUTS, one_step, setting

LORA = LoRAConfig(rank=3, alpha=5.0)
SOME = LoRAConfig(rank=2, alpha=3.0, kernels=("value", "down"))
EIGHT_BITS = dataclasses.replace(SOME, quantised="int8")


def adapted_policy(model_config, seed=1):
    """With B of the size of the kernels, as after long training."""
    policy = tiny.new_policy(model_config)
    rng = np.random.default_rng(seed)

    def move(path, leaf):
        noise = 0.2 * rng.normal(size=leaf.shape)
        return leaf + noise.astype(leaf.dtype) if is_adapter(path_string(path)) else leaf

    return policy.replace(params=jax.tree_util.tree_map_with_path(move, policy.params))


@jax.jit
def logits(policy, *inputs):
    return policy.model(*inputs)


def model_of(policy):
    """In pieces, as `tiny` takes them."""
    return None, policy.params, policy.rest


def gradients(mtp, model_config, **changes):
    """The combined gradient on adapters, on all kernels with these merged, and the policy."""
    policy = adapted_policy(model_config)
    config = tiny.train_config(mtp, model_config, **changes)
    batch = tiny.minibatch(config, model_of(policy))
    got = compute(config, policy, batch)
    merged = merge(policy)
    whole = compute(tiny.train_config(mtp, merged.config, **changes), merged, batch)
    return got, whole, policy


def compute(config, policy, batch):
    calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    start = () if calibration is None else calibration.init(policy.params)

    @jax.jit
    def of(params, rest, batch, start):
        model = None, params, rest
        return tiny.step_gradient_of(config, model, batch, calibration, start)

    return of(policy.params, policy.rest, batch, start)


def projected(kernels, params, scale):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, by loops over layers, in float64."""

    def of_leaf(path, leaf):
        names = path_string(path).split("/")
        if not is_adapter(names[-1]):
            return at(kernels, names)
        whole = np.asarray(at(kernels, [*names[:-1], "kernel"]), np.float64)
        a, b = (np.asarray(at(params, [*names[:-1], n]), np.float64) for n in ("lora_a", "lora_b"))
        if names[-1] == "lora_a":
            return np.stack([scale * g @ b[layer].T for layer, g in enumerate(whole)])
        return np.stack([scale * a[layer].T @ g for layer, g in enumerate(whole)])

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def at(tree, names):
    for name in names:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("lora", "dtype", "placement", "chunk", "tolerance"),
    [
        (LORA, "float32", "exact", 0, 1e-5),
        (EIGHT_BITS, "float32", "exact", 0, 1e-5),
        pytest.param(SOME, "float32", "fused", 4, 1e-5, marks=pytest.mark.release),
        pytest.param(LORA, "float64", "fused", 0, 1e-12, marks=pytest.mark.release),
    ],
)
def test_the_gradient_is_the_whole_kernels_projected(
    request, lora, dtype, placement, chunk, tolerance
):
    """In closed form, of the RL loss plus a multiple of the MTP loss; modules' own as they were."""
    if dtype == "float64":
        request.getfixturevalue("x64")
    model_config = tiny.model_config(1, dtype, tied_embeddings=False, lora=lora)
    mtp = MTPTrainingConfig(loss="ce", rule="fixed", coefficient=0.37, placement=placement)
    got, whole, policy = gradients(mtp, model_config, layout=LayoutConfig(logits_chunk=chunk))
    expected = projected(whole.gradient, policy.params, lora.alpha / lora.rank)
    tiny.close(got.gradient, expected, tolerance)
    trained = {path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(got.gradient)}
    assert all(name.startswith("mtp/") or is_adapter(name) for name in trained)
    assert len([name for name in trained if is_adapter(name)]) == 2 * len(lora.kernels)


@pytest.mark.parametrize("begun", [pytest.param(False, marks=pytest.mark.release), True])
def test_what_is_weighed_is_the_adapters_gradients(begun):
    """c = s^2 (<G B^T, M B^T> + <A^T G, A^T M>); at the start, where B = 0, the second alone."""
    model_config = tiny.model_config(1, lora=LORA)
    policy = adapted_policy(model_config) if begun else tiny.new_policy(model_config)
    config = tiny.train_config(regime("occ"), model_config)
    batch = tiny.minibatch(config, model_of(policy))
    got = compute(config, policy, batch)
    merged = merge(policy)
    whole = tiny.train_config(regime("rl_only"), merged.config)
    rl = compute(whole, merged, batch).gradient
    joint = tiny.train_config(
        MTPTrainingConfig(loss=config.mtp.loss, rule="fixed", coefficient=1.0), merged.config
    )
    both = compute(joint, merged, batch).gradient
    total, scale = np.zeros((2, 2)), LORA.alpha / LORA.rank
    for path, leaf in jax.tree_util.tree_leaves_with_path(policy.params):
        names = path_string(path).split("/")
        if names[-1] != "lora_a":
            continue
        a, b = np.asarray(leaf), np.asarray(at(policy.params, [*names[:-1], "lora_b"]))
        g, m = (np.asarray(at(tree, [*names[:-1], "kernel"])) for tree in (rl, both))
        for layer in range(a.shape[0]):
            pair = g[layer], m[layer] - g[layer]
            for i, j in np.ndindex(2, 2):
                outer = np.sum((pair[i] @ b[layer].T) * (pair[j] @ b[layer].T))
                inner = np.sum((a[layer].T @ pair[i]) * (a[layer].T @ pair[j]))
                total[i, j] += scale**2 * (outer + inner)
                assert begun or outer == 0
    np.testing.assert_allclose(got.gram, total, rtol=1e-4, atol=1e-4 * total.max())
    coefficient = total[0, 1] / total[1, 1]
    np.testing.assert_allclose(got.calibration.weights, [1, coefficient], rtol=1e-3)


def test_at_the_start_the_coefficient_estimates_the_whole_kernels_own():
    """Over random A, E c = s^2 r / 3 n <G, M>: the mean over seeds comes near, one seed does not.

    With B = 0, and A uniform in +-1 / sqrt(n) of n inputs, E[A A^T] = r / (3 n).
    """
    rng = np.random.default_rng(0)
    inputs, rank = 16, 4
    g, m = rng.normal(size=(2, inputs, 5))
    bound = inputs**-0.5
    drawn = rng.uniform(-bound, bound, size=(20_000, inputs, rank))
    seen_g, seen_m = (np.einsum("sir,io->sro", drawn, x) for x in (g, m))
    found = np.sum(seen_g * seen_m, axis=(1, 2))
    expected = rank / (3 * inputs) * np.sum(g * m)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - expected) < 4 * error
    # As the model draws it.
    policy = new_policy(tiny.model_config(width=inputs, lora=LoRAConfig(rank=64)))
    a = np.asarray(policy.params["layers"]["attention"]["query"]["lora_a"])
    np.testing.assert_allclose(a.var(), 1 / (3 * inputs), rtol=0.1)
    assert np.abs(a).max() <= bound


def test_adapters_begin_at_the_model_itself():
    """To the last bit; and a model that is made with adapters has the kernels of one without."""
    plain = tiny.new_policy(tiny.model_config(2))
    config = tiny.model_config(2, lora=LORA)
    policy = adapt(plain, config)
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    inputs = tokens, jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4)), jnp.ones_like(tokens)
    for here, there in zip(logits(policy, *inputs), logits(plain, *inputs), strict=True):
        np.testing.assert_array_equal(here, there)
    made = tiny.new_policy(config)
    jax.tree.map(np.testing.assert_array_equal, (made.params, made.rest), model_of(policy)[1:])
    back = merge(policy)
    assert back.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, (back.params, back.rest), model_of(plain)[1:])


def test_merged_kernels_say_the_same():
    """Adapters, or W + s A B in one piece: the same logits, and the same tokens are sampled."""
    config = tiny.model_config(1, lora=LORA)
    policy = adapted_policy(config)
    merged = merge(policy)
    plain = tiny.new_policy(tiny.model_config(1))
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    inputs = tokens, jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4)), jnp.ones_like(tokens)
    adapted, base = logits(policy, *inputs), logits(plain, *inputs)
    tiny.close(adapted, logits(merged, *inputs), 1e-5)
    assert np.linalg.norm(adapted[0] - base[0]) > 0.1 * np.linalg.norm(base[0])
    sampling = SamplingConfig(max_new_tokens=5)
    mask, key = jnp.ones_like(tokens) > 0, jax.random.key(0)
    sample = jax.jit(generate, static_argnames="config")
    ours, theirs = (sample(p, tokens, mask, key, config=sampling) for p in (policy, merged))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_a_quantised_trunk_is_off_by_half_a_step():
    """All kernels that can be, adapted or not; and it says what its kernels say in one piece."""
    plain = tiny.new_policy(tiny.model_config(1, qkv_bias=True))
    policy = adapt(plain, tiny.model_config(1, qkv_bias=True, lora=EIGHT_BITS))
    merged = merge(policy)
    assert merged.config == plain.config
    found = 0
    for path, was in jax.tree_util.tree_leaves_with_path(plain.params):
        names = path_string(path).split("/")
        now = np.asarray(at(merged.params, names))
        if names[0] != "layers" or names[-1] != "kernel":
            np.testing.assert_array_equal(now, was)
            continue
        kernel, scale = at(policy.rest, names), at(policy.rest, [*names[:-1], "kernel_scale"])
        assert kernel.dtype == jnp.int8 and np.abs(kernel).max(axis=1).min() == 127
        np.testing.assert_allclose(scale, np.abs(was).max(axis=1) / 127, rtol=1e-6)
        error = np.abs(now - was) / np.asarray(scale)[:, None, :]
        assert 0.3 < error.max() < 0.5 + 1e-4, names
        found += 1
    assert found == 7
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    inputs = tokens, jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2, 4)), jnp.ones_like(tokens)
    tiny.close(logits(policy, *inputs), logits(merged, *inputs), 1e-5)
    with pytest.raises(AssertionError):
        tiny.close(logits(policy, *inputs), logits(plain, *inputs), 1e-4)
    sampling = SamplingConfig(max_new_tokens=5)
    mask, key = jnp.ones_like(tokens) > 0, jax.random.key(0)
    sample = jax.jit(generate, static_argnames="config")
    ours, theirs = (sample(p, tokens, mask, key, config=sampling) for p in (policy, merged))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_a_quantised_product_goes_back_in_its_own_dtype():
    """As that with the kernel in bfloat16 does; and its gradient is of x alone."""
    rng = np.random.default_rng(0)
    values, scale = quantise(jnp.asarray(rng.normal(size=(8, 5)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(3, 8)), jnp.bfloat16)

    def ours(x):
        return jnp.sum(jnp.sin(quantised_product(x, values, scale, jnp.float32)))

    def plain(x):
        return jnp.sum(jnp.sin(x.astype(jnp.float32) @ dequantise(values, scale)))

    found = jax.grad(ours)(x)
    assert found.dtype == jnp.bfloat16
    tiny.close(found.astype(jnp.float32), jax.grad(plain)(x).astype(jnp.float32), 2e-2)
    made = jax.make_jaxpr(jax.grad(ours))(x)
    products = [e for e in made.eqns if e.primitive.name == "dot_general"]
    assert {v.aval.dtype.name for e in products for v in e.invars} == {"bfloat16"}


def test_a_column_of_zeros_stays_one():
    values, scale = quantise(jnp.array([[0.0, 1.0], [0.0, -0.5]]))
    assert not np.any(values[:, 0]) and scale[0] == 0
    np.testing.assert_array_equal(dequantise(values, scale)[:, 0], 0)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_moves_adapters_and_modules_alone(sparse):
    """Nothing else has a gradient or moments; the frozen trunk keeps its bits and its dtype."""
    lora = dataclasses.replace(
        LORA, frozen_dtype="bfloat16", quantised="int8" if sparse else "none"
    )
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_width=8) if sparse else None
    model_config = tiny.model_config(1, lora=lora, moe=moe)
    policy = tiny.new_policy(model_config)
    config = tiny.train_config(regime("occ"), model_config)
    batch = tiny.minibatch(config, model_of(policy))
    state = tiny.state(config, model_of(policy))
    after, metrics = jax.jit(make_train_step(config))(state, batch)
    assert np.isfinite(metrics["loss/rl"]) and int(after.skipped) == 0
    jax.tree.map(np.testing.assert_array_equal, after.rest, policy.rest)
    assert after.rest["embedding"]["embedding"].dtype == jnp.bfloat16
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), after.params, policy.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        # Where B = 0, A has no gradient yet.
        assert leaf != path_string(path).endswith("lora_a"), path
    adam = after.opt_state[1][0]
    assert jax.tree.structure(adam.mu) == jax.tree.structure(policy.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("float32")}
    shared = {k: v for k, v in policy.params.items() if is_shared(k)}
    names = {path_string(p).split("/")[-2] for p, _ in jax.tree_util.tree_leaves_with_path(shared)}
    assert names == set(LORA.kernels)


def test_the_frozen_trunk_is_where_nothing_is_differentiated():
    """Of the trunk only adapters are parameters; the modules are all there, without adapters."""
    policy = abstract_policy(tiny.model_config(2, lora=LORA))
    assert set(policy.params) == {"layers", "mtp"}
    assert set(policy.rest) == {"embedding", "final_norm", "layers"}
    whole = abstract_policy(tiny.model_config(2))
    assert jax.tree.structure(policy.params["mtp"]) == jax.tree.structure(whole.params["mtp"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be > 0, got 0"),
        ({"kernels": ("query", "router")}, "different names among"),
        ({"kernels": ()}, "one at least"),
        ({"frozen_dtype": "int8"}, "must be"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**options)


def test_adapting_twice_is_refused():
    config = tiny.model_config(lora=LORA)
    with pytest.raises(ValueError, match="expected a policy without adapters"):
        adapt(tiny.new_policy(config), config)
    with pytest.raises(ValueError, match="must be the policy's own"):
        adapt(tiny.new_policy(tiny.model_config(2)), config)


@functools.cache
def single_device(quantised):
    with jax.enable_x64(True):
        return one_step(*sharded_setting(LayoutConfig(), quantised))


def sharded_setting(layout, quantised):
    lora = dataclasses.replace(LORA, rank=4, quantised=quantised)
    config, _, _ = setting("occ", "float64", layout)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    policy = adapted_policy(config.model)
    return config, model_of(policy), tiny.minibatch(config, model_of(policy), rows=16)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("layout", "quantised"),
    [
        pytest.param("micro-batches", "none", marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.release)
            for case in [("fsdp", "none"), ("fsdp-tensor", "none"), ("fsdp-tensor", "int8")]
        ),
    ],
)
def test_a_sharded_step_is_the_single_devices(x64, layout, quantised):
    """In micro-batches with the logits in chunks, too: the frozen head is gathered for them."""
    expected, expected_metrics = single_device(quantised)
    state, metrics = one_step(*sharded_setting(LAYOUTS[layout], quantised))
    tiny.close(state.opt_state, expected.opt_state, 1e-9)
    tiny.close(metrics, expected_metrics, 1e-9)
    assert abs(expected.calibration.weights[1]) > 1e-3


@pytest.mark.parametrize("measure", ["readout", "embedding"])
def test_a_measure_of_what_is_frozen_is_refused(measure):
    mtp = MTPTrainingConfig(measure=measure, placement="fused" if measure == "readout" else "exact")
    with pytest.raises(ValueError, match="which model.lora freezes"):
        tiny.train_config(mtp, tiny.model_config(lora=LORA))
    tiny.train_config(mtp, tiny.model_config())


@pytest.mark.parametrize("chips", [8, 1])
def test_mimos_optimizer_and_gradients_are_less_than_a_quarter(chips):
    """By the shapes and shardings of production, beside the same run of all parameters."""
    lora = CONFIGS["mimo_7b_lora"]()
    layout = dataclasses.replace(lora.layout, fsdp=chips)
    lora = dataclasses.replace(lora, layout=layout)
    whole = dataclasses.replace(lora, model=lora.model.whole)
    mesh = abstract_mesh(layout)
    held = {}
    for name, config in (("lora", lora), ("whole", whole)):
        state = abstract_state(config, abstract_policy(config.model), mesh)
        held[name] = trained(config, state)
    ours, theirs = held["lora"], held["whole"]
    assert ours.optimizer + ours.gradients <= (theirs.optimizer + theirs.gradients) / 4
    # A and B of query and output, key and value, and the MLP's three.
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 11_008)
    adapters = 36 * lora.model.lora.rank * layer
    assert ours.parameters + ours.frozen == theirs.parameters + adapters
    eight = dataclasses.replace(lora.model.lora, quantised="int8")
    eight = dataclasses.replace(lora, model=dataclasses.replace(lora.model, lora=eight))

    def trunk(config):
        rest = abstract_policy(config.model).rest
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rest["layers"]))

    assert 0.5 < trunk(eight) / trunk(lora) < 0.501
