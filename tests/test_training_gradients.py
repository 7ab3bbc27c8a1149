"""The heart of the train step: gradient isolation, both placements, and independence of layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import rules
from occ.models.config import MoEConfig
from occ.models.parameters import is_shared, partition
from occ.objectives import mtp as mtp_alignment
from occ.objectives.policy import PolicyConfig, gspo
from occ.training.config import LayoutConfig, MTPTrainingConfig, ObjectiveConfig
from occ.training.gradient.calibration import build_calibration
from occ.training.gradient.losses import mtp_loss, rl_loss
from occ.training.gradient.stages import Stages
from occ.training.regimes import regime
from tests import tiny

SEQUENTIAL = {"kind": "sequential"}
PARALLEL = {"kind": "parallel"}
OWN = {"own_embedding": True, "own_output_head": True}


def autodiff(config, model, batch, weights, own_weight=1.0):
    """The combined gradient by one plain jax.grad of the losses, weighed leaf by leaf."""
    params, stages = model[1], Stages(tiny.policy(config, model), batch)

    def loss(params, index):
        parts = partition(params)
        hidden = stages.trunk(parts).hidden
        if index == 0:
            return rl_loss(stages.head(parts, hidden, 0), batch, config)[0]
        states = stages.modules(parts, hidden)
        scores = stages.head(parts, states[index - 1], index)
        return mtp_loss(scores, batch, index, config)[0]

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(params, i) for i in range(len(weights))]

    def leaf(path, *values):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        scales = weights if is_shared(name) else [1.0] + [own_weight] * (len(weights) - 1)
        return sum(s * v for s, v in zip(scales, values, strict=True))

    return jax.tree_util.tree_map_with_path(leaf, *gradients), gradients


@pytest.mark.parametrize(
    ("tied", "loss", "placement"),
    [
        (True, "ce", "fused"),
        pytest.param(False, "ce", "fused", marks=pytest.mark.release),
        pytest.param(True, "policy", "fused", marks=pytest.mark.release),
        pytest.param(False, "policy", "exact", marks=pytest.mark.release),
    ],
)
def test_detach_leaves_the_shared_gradient_that_of_rl_alone(tied, loss, placement):
    """Exactly: nothing of the MTP loss reaches trunk, embedding or output head."""
    model_config = tiny.model_config(tied_embeddings=tied)
    model = tiny.build_model(model_config)
    mtp = MTPTrainingConfig(loss=loss, rule="detach", placement=placement)
    config = tiny.train_config(mtp, model_config)
    batch = tiny.minibatch(config, model)
    rl_only = tiny.train_config(regime("rl_only"), model_config)
    alone = tiny.gradient(rl_only, model, batch, as_users=True)
    detached = tiny.gradient(config, model, batch, as_users=True)
    for name, tree in detached.gradient.items():
        if is_shared(name):
            # The exact placement runs a vectorised backward pass, which rounds differently.
            compare = np.testing.assert_array_equal if placement == "fused" else _close
            jax.tree.map(compare, tree, alone.gradient[name])
        else:
            assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(tree))
            assert not any(np.any(x) for x in jax.tree.leaves(alone.gradient[name]))


def _close(actual, expected):
    scale = np.linalg.norm(expected)
    assert np.linalg.norm(np.asarray(actual) - np.asarray(expected)) <= 1e-6 * scale


@pytest.mark.parametrize(
    ("tied", "own"), [(True, {}), (False, {}), (True, OWN)], ids=["tied", "untied", "own"]
)
def test_a_detached_mtp_loss_does_not_depend_on_shared_parameters(tied, own):
    """The other way round: scaling the RL loss to zero leaves only the modules' own leaves."""
    model_config = tiny.model_config(tied_embeddings=tied, mtp=own)
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("detach"), model_config)
    batch = tiny.minibatch(config, model).replace(advantages=jnp.zeros((4, 9)))
    got = tiny.gradient(config, model, batch).gradient
    for name, tree in got.items():
        nonzero = [bool(np.any(np.asarray(x) != 0)) for x in jax.tree.leaves(tree)]
        assert all(nonzero) if name == "mtp" else not any(nonzero)


@pytest.mark.parametrize(
    ("loss", "heads", "kind"),
    [
        pytest.param("ce", 1, SEQUENTIAL, marks=pytest.mark.release, id="ce-1-sequential"),
        pytest.param("policy", 2, SEQUENTIAL, marks=pytest.mark.release, id="policy-2-sequential"),
        pytest.param("ce", 2, PARALLEL, marks=pytest.mark.slow, id="ce-2-parallel"),
        pytest.param("ce", 2, OWN, marks=pytest.mark.release, id="ce-2-own"),
    ],
)
def test_fused_equals_exact_equals_plain_autodiff(x64, heads, kind, loss):
    """The same weights at the trunk's output, at the parameters, or on whole gradients."""
    model_config = tiny.model_config(heads, "float64", mtp=kind)
    model = tiny.build_model(model_config)
    gradients = {}
    for placement in ("fused", "exact"):
        mtp = MTPTrainingConfig(loss=loss, rule="fixed", coefficient=0.37, placement=placement)
        config = tiny.train_config(mtp, model_config)
        batch = tiny.minibatch(config, model)
        gradients[placement] = tiny.gradient(config, model, batch).gradient
    expected, _ = autodiff(config, model, batch, [1.0] + [0.37] * heads)
    tiny.close(gradients["fused"], expected, 1e-12)
    tiny.close(gradients["exact"], expected, 1e-12)


@pytest.mark.release
def test_a_modules_own_head_says_the_same_in_chunks(x64):
    model_config = tiny.model_config(1, "float64", mtp=OWN)
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("detach"), model_config)
    batch = tiny.minibatch(config, model)
    params, stages = model[1], Stages(tiny.policy(config, model), batch)
    whole, chunked = (
        jax.jit(dataclasses.replace(stages, logits_chunk=chunk).score)(params) for chunk in (0, 4)
    )
    tiny.close([s.log_prob for s in chunked], [s.log_prob for s in whole], 1e-12)


@pytest.mark.release
def test_fused_equals_exact_in_float32():
    model_config = tiny.model_config(2, mtp=SEQUENTIAL, qkv_bias=True, qk_norm=True)
    model = tiny.build_model(model_config)
    got = []
    for placement in ("fused", "exact"):
        mtp = MTPTrainingConfig(rule="fixed", coefficient=-0.3, placement=placement)
        config = tiny.train_config(mtp, model_config)
        got.append(tiny.gradient(config, model, tiny.minibatch(config, model)).gradient)
    tiny.close(*got, 1e-5)


@pytest.mark.release
@pytest.mark.parametrize("scale_own", [False, True])
def test_own_parameters_are_unscaled_unless_asked(x64, scale_own):
    model_config = tiny.model_config(1, "float64")
    model = tiny.build_model(model_config)
    for placement in ("fused", "exact"):
        mtp = MTPTrainingConfig(
            rule="fixed", coefficient=0.25, placement=placement, scale_own=scale_own
        )
        config = tiny.train_config(mtp, model_config)
        batch = tiny.minibatch(config, model)
        got = tiny.gradient(config, model, batch).gradient
        own_weight = 0.25 if scale_own else 1.0
        expected, _ = autodiff(config, model, batch, [1.0, 0.25], own_weight)
        tiny.close(got, expected, 1e-12)


@pytest.mark.release
def test_exact_measures_the_gradients_of_the_shared_parameters(x64):
    """c = <g_RL, g_MTP> and v^2 from two separate calls of jax.grad, own leaves left out."""
    model_config = tiny.model_config(1, "float64")
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("occ"), model_config)
    batch = tiny.minibatch(config, model)
    got = tiny.gradient(config, model, batch)
    _, (g, m) = autodiff(config, model, batch, [1.0, 1.0])

    def flat(tree):
        shared = [tree[name] for name in sorted(tree) if is_shared(name)]
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(shared)])

    c, v2 = flat(g) @ flat(m), flat(m) @ flat(m)
    np.testing.assert_allclose(got.calibration.gram[0, 1], c, rtol=1e-10)
    np.testing.assert_allclose(got.calibration.gram[1, 1], v2, rtol=1e-10)
    np.testing.assert_allclose(got.calibration.weights[1], c / v2, rtol=1e-7)
    np.testing.assert_allclose(got.gram, got.calibration.gram, rtol=1e-10)


@pytest.mark.parametrize("reference", ["main", "own"])
def test_log_ratio_coefficient_against_a_loop(x64, reference):
    """lambda = sum d_RL d_MTP / (sum d_MTP^2 + eps), over the tokens one by one."""
    model_config = tiny.model_config(1, "float64")
    model = tiny.build_model(model_config)
    mtp = dataclasses.replace(regime("occ_paper"), reference=reference)
    config = tiny.train_config(mtp, model_config)
    batch = tiny.minibatch(config, model)
    got = tiny.gradient(config, model, batch)
    main, head = tiny.score(
        tiny.policy(config, model), batch.tokens, batch.positions, batch.segment_ids
    )
    old = batch.old_log_prob if reference == "main" else batch.old_mtp_log_prob[0]
    c = v2 = 0.0
    for b, t in np.ndindex(*batch.tokens.shape):
        segments = np.asarray(batch.segment_ids)[b]
        if batch.response_mask[b, t] and t >= 2 and segments[t - 2] == segments[t]:
            d_rl = float(main.log_prob[b, t] - batch.old_log_prob[b, t])
            d_mtp = float(head.log_prob[b, t] - old[b, t])
            c, v2 = c + d_rl * d_mtp, v2 + d_mtp**2
    np.testing.assert_allclose(got.calibration.weights[1], c / (v2 + 1e-8), rtol=1e-9)


def _present(batch):
    return [name for name, value in vars(batch).items() if value is not None]


def _pad(batch, left, right):
    def pad(x, value=0):
        widths = [(0, 0)] * (x.ndim - 1) + [(left, right)]
        return jnp.pad(x, widths, constant_values=value)

    fields = {name: pad(getattr(batch, name)) for name in _present(batch)}
    return batch.replace(**fields)


def _reorder(batch, order):
    fields = {name: getattr(batch, name)[..., order, :] for name in _present(batch)}
    return batch.replace(**fields)


def _pack(batch):
    """Rows two by two into one, the padding of both left in between."""

    def pair(x):
        return jnp.concatenate([x[..., 0::2, :], x[..., 1::2, :]], axis=-1)

    fields = {name: pair(getattr(batch, name)) for name in _present(batch)}
    first, second = batch.segment_ids[0::2], batch.segment_ids[1::2]
    fields["segment_ids"] = jnp.concatenate([first, jnp.where(second > 0, 2, 0)], axis=-1)
    return batch.replace(**fields)


OBJECTIVES = {
    "dapo": ObjectiveConfig(),
    "gspo": ObjectiveConfig(policy=gspo(0.2, 0.2), aggregation="seq-mean-token-mean"),
    "full": ObjectiveConfig(
        policy=PolicyConfig(kind="cispo"),
        aggregation="seq-mean-token-sum",
        kl_coefficient=0.1,
        entropy_coefficient=0.01,
        importance_cap=2.0,
    ),
}


def packed(config, sequences):
    """The configuration for rows of so many sequences."""
    layout = LayoutConfig(pack=sequences > 1, sequences_per_row=sequences)
    return dataclasses.replace(config, layout=layout)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        pytest.param("occ", "full", marks=pytest.mark.release),
        pytest.param("occ_paper", "dapo", marks=pytest.mark.slow),
        pytest.param("occ_paper", "gspo", marks=pytest.mark.release),
    ],
)
def test_layout_changes_nothing(x64, name, objective):
    """Padding, order of rows and packing: coefficient to 1e-9, gradients to 1e-9."""
    model_config = tiny.model_config(1, "float64")
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime(name), model_config, objective=OBJECTIVES[objective])
    batch = tiny.minibatch(config, model)
    plain = tiny.gradient(config, model, batch)
    layouts = {
        "padded": (_pad(batch, 3, 4), 1),
        "reordered": (_reorder(batch, jnp.array([2, 0, 3, 1])), 1),
        "packed": (_pack(batch), 2),
    }
    for layout, (other, sequences) in layouts.items():
        got = tiny.gradient(packed(config, sequences), model, other)
        np.testing.assert_allclose(
            got.calibration.weights, plain.calibration.weights, rtol=1e-9, err_msg=layout
        )
        tiny.close(got.gradient, plain.gradient, 1e-9)


@pytest.mark.release
def test_layout_changes_nothing_in_float32():
    model_config = tiny.model_config(1)
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("occ_paper"), model_config)
    batch = tiny.minibatch(config, model)
    plain = tiny.gradient(config, model, batch).calibration.weights
    for other, sequences in ((_pad(batch, 2, 3), 1), (_pack(batch), 2)):
        got = tiny.gradient(packed(config, sequences), model, other)
        np.testing.assert_allclose(got.calibration.weights, plain, atol=1e-5)


def test_garbage_in_masked_cells_changes_nothing():
    """NaN where no response token is, in everything that a minibatch carries about tokens."""
    model_config = tiny.model_config(1)
    model = tiny.build_model(model_config)
    config = tiny.train_config(
        regime("occ"), model_config, objective=ObjectiveConfig(importance_cap=2.0)
    )
    batch = tiny.minibatch(config, model)
    clean = tiny.gradient(config, model, batch)
    mask = batch.response_mask

    def spoil(x):
        return jnp.where(mask, x, jnp.nan)

    dirty = batch.replace(
        advantages=spoil(batch.advantages),
        old_log_prob=spoil(batch.old_log_prob),
        old_mtp_log_prob=spoil(batch.old_mtp_log_prob),
        rollout_log_prob=spoil(batch.rollout_log_prob),
    )
    got = tiny.gradient(config, model, dirty)
    jax.tree.map(np.testing.assert_array_equal, got.gradient, clean.gradient)
    np.testing.assert_array_equal(got.calibration.weights, clean.calibration.weights)


def test_every_target_masked_is_zero_and_finite():
    model_config = tiny.model_config(1)
    model = tiny.build_model(model_config)
    for name in ("occ", "occ_released"):
        config = tiny.train_config(regime(name), model_config)
        batch = tiny.minibatch(config, model)
        batch = batch.replace(response_mask=jnp.zeros_like(batch.response_mask))
        got = tiny.gradient(config, model, batch)
        assert not any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(got.gradient)), name
        assert np.isfinite(float(got.heads[0].metrics["loss/mtp"]))


@pytest.mark.release
@pytest.mark.parametrize("remat", ["none", "full"])
def test_mixture_of_experts_goes_through_both_placements(x64, remat):
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_width=8)
    model_config = tiny.model_config(1, "float64", moe=moe, remat=remat)
    model = tiny.build_model(model_config)
    got = []
    for placement in ("fused", "exact"):
        mtp = MTPTrainingConfig(rule="fixed", placement=placement)
        config = tiny.train_config(mtp, model_config)
        batch = tiny.minibatch(config, model)
        got.append(tiny.gradient(config, model, batch))
    tiny.close(got[0].gradient, got[1].gradient, 1e-12)
    tokens = int(np.sum(np.asarray(batch.segment_ids) > 0))
    assert float(jnp.sum(got[0].router_load)) == 2 * tokens  # one sparse layer, top 2


def test_nonfinite_mtp_gradient_is_removed_in_both_placements():
    """An infinite own old log-prob makes the MTP ratio vanish or explode; RL must go on."""
    model_config = tiny.model_config(1)
    model = tiny.build_model(model_config)
    alone = tiny.train_config(regime("rl_only"), model_config)
    for placement in ("fused", "exact"):
        mtp = MTPTrainingConfig(rule="fixed", coefficient=1.0, reference="own", placement=placement)
        config = tiny.train_config(mtp, model_config)
        batch = tiny.minibatch(config, model)
        bad = batch.replace(old_mtp_log_prob=batch.old_mtp_log_prob.at[:, 0].set(jnp.nan))
        got = tiny.gradient(config, model, bad)
        expected = tiny.gradient(alone, model, batch).gradient
        shared = {name: got.gradient[name] for name in got.gradient if is_shared(name)}
        tiny.close(shared, {name: expected[name] for name in shared}, 1e-6)
        np.testing.assert_array_equal(got.calibration.nonfinite, [1])


@pytest.mark.slow
def test_zero_coefficient_through_the_rule_is_the_detached_shared_gradient():
    """The coefficient is data: forcing it to 0 gives Detach's shared gradient, bit for bit."""
    model_config = tiny.model_config(1)
    model = tiny.build_model(model_config)
    occ = tiny.train_config(regime("occ_paper"), model_config)
    batch = tiny.minibatch(occ, model)
    calibration = build_calibration(occ.mtp, 1)
    zero = dataclasses.replace(calibration, rule=rules.optimal(0.0))
    got = tiny.gradient(occ, model, batch, calibration=zero, as_users=True).gradient
    detach = MTPTrainingConfig(loss="policy", rule="detach", placement="fused")
    detached = tiny.train_config(detach, model_config)
    expected = tiny.gradient(detached, model, batch, as_users=True).gradient
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_alignment_of_the_first_response_tokens():
    """At depth k the first k response tokens are predicted from prompt positions."""
    mask = jnp.array([[False, False, True, True]])
    segments = jnp.ones((1, 4), jnp.int32)
    assert mtp_alignment.aligned_mask(mask, segments, 1).tolist() == mask.tolist()
    assert mtp_alignment.aligned_mask(mask, segments, 2).tolist() == [[False, False, False, True]]


@pytest.mark.release
def test_distillation_is_the_divergence_from_a_main_head_held_fixed(x64):
    """Its gradient by plain autodiff, with the main head's probabilities as numbers."""
    model_config = tiny.model_config(2, "float64", tied_embeddings=False)
    model = tiny.build_model(model_config)
    mtp = MTPTrainingConfig(loss="distill", rule="fixed", coefficient=0.37, placement="fused")
    config = tiny.train_config(mtp, model_config)
    batch = tiny.minibatch(config, model)
    params, stages = model[1], Stages(tiny.policy(config, model), batch)
    fixed = partition(params)
    main_logits = stages.model(fixed).logits(stages.trunk(fixed).hidden)
    probability = jax.nn.softmax(main_logits, axis=-1)

    response, segments = np.asarray(batch.response_mask), np.asarray(batch.segment_ids)

    def loss(params, depth):
        parts = partition(params)
        states = stages.modules(parts, stages.trunk(parts).hidden)
        model = stages.model(parts)
        log_prob = jax.nn.log_softmax(model.mtp_logits(states[depth - 1], depth - 1), axis=-1)
        total, count = 0.0, 0
        for b, t in np.ndindex(*batch.tokens.shape):
            source = t - 1 - depth
            if response[b, t] and source >= 0 and segments[b, source] == segments[b, t]:
                p = probability[b, t - 1]
                total = total + jnp.sum(p * (jnp.log(p) - log_prob[b, source]))
                count += 1
        return total / count

    rl, _ = autodiff(config_of_rl(config), model, batch, [1.0])
    values = {}
    for depth in (1, 2):
        values[depth], gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, depth)
        rl = jax.tree_util.tree_map_with_path(
            lambda path, g, m: g + (0.37 if is_shared(str(path[0].key)) else 1.0) * m, rl, gradient
        )
    got = tiny.gradient(config, model, batch)
    tiny.close(got.gradient, rl, 1e-11)
    for depth, value in values.items():
        np.testing.assert_allclose(got.heads[depth - 1].metrics["loss/mtp"], value, rtol=1e-12)


def config_of_rl(config):
    return dataclasses.replace(config, mtp=regime("rl_only"))


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param("fused", marks=pytest.mark.slow),
        pytest.param("exact", marks=pytest.mark.release),
    ],
)
def test_modules_may_learn_from_a_loss_of_their_own(x64, placement):
    """Shared parameters see the policy loss alone, the modules' own the detached cross-entropy."""
    model_config = tiny.model_config(2, "float64")
    model = tiny.build_model(model_config)
    policy = MTPTrainingConfig(rule="fixed", coefficient=0.4, placement=placement)
    got = {}
    for name, mtp in {
        "both": dataclasses.replace(policy, own_loss="ce"),
        "detached": dataclasses.replace(regime("detach"), loss="policy", own_loss="ce"),
        "policy": policy,
        "detach": regime("detach"),
    }.items():
        config = tiny.train_config(mtp, model_config)
        batch = tiny.minibatch(config, model)
        got[name] = partition(tiny.gradient(config, model, batch).gradient)
    tiny.close(got["both"].blocks, got["policy"].blocks, 1e-12)
    tiny.close(got["both"].readout, got["policy"].readout, 1e-12)
    tiny.close(got["both"].modules, got["detach"].modules, 1e-12)
    for part in ("blocks", "readout", "modules"):
        tiny.close(getattr(got["detached"], part), getattr(got["detach"], part), 1e-12)
    own, other = (jax.tree.leaves(got[name].modules) for name in ("detach", "policy"))
    assert any(not np.allclose(a, b, rtol=1e-3) for a, b in zip(own, other, strict=True))
