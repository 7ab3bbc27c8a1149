"""Portions change nothing: micro-batches and chunks of logits give the whole minibatch's step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from occ.objectives.policy import PolicyConfig, gspo
from occ.training.config import LayoutConfig, MTPTrainingConfig, ObjectiveConfig
from occ.training.gradient.cotangents import rl_gradient
from occ.training.gradient.inputs import step_inputs
from occ.training.gradient.micro_batches import interleave, micro_batches
from occ.training.regimes import regime
from tests import tiny


def result(mtp, layout, *, heads=1, dtype="float64", batch=None, **changes):
    """The step's gradient, calibration state and what the losses reported."""
    model_config = tiny.model_config(heads, dtype, **changes.pop("model", {}))
    model = tiny.build_model(model_config)
    config = tiny.train_config(mtp, model_config, **changes)
    if batch is None:
        batch = tiny.minibatch(config, model, rows=8)
    config = dataclasses.replace(config, layout=layout)
    return tiny.gradient(config, model, batch)


def assert_same(got, expected, tolerance):
    tiny.close(got.gradient, expected.gradient, tolerance)
    tiny.close(
        (got.main.metrics, got.calibration, [head.metrics for head in got.heads]),
        (expected.main.metrics, expected.calibration, [head.metrics for head in expected.heads]),
        tolerance,
    )
    np.testing.assert_array_equal(got.main.mask, expected.main.mask)
    tiny.close(got.main.log_ratio, expected.main.log_ratio, tolerance)


MTP = {
    "rl_only": regime("rl_only"),
    "detach": regime("detach"),
    "fixed_fused": regime("policy"),
    "proxy_fused": regime("occ_paper"),
    "readout": MTPTrainingConfig(measure="readout", placement="fused"),
    "row_subset": MTPTrainingConfig(
        measure="row_subset", placement="fused", measure_options={"fraction": 0.5}
    ),
    "exact": regime("occ"),
    "cross_fitted": MTPTrainingConfig(measure="cross_fitted"),
    "every": MTPTrainingConfig(smoothing=0.9, every=5),
    "every_fused": MTPTrainingConfig(measure="log_ratios", placement="fused", every=2),
    "layers": MTPTrainingConfig(groups="layer"),
    "distill": MTPTrainingConfig(loss="distill", own_loss="ce", placement="exact"),
}


QUICK = ("proxy_fused",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.release] * (name not in QUICK)) for name in MTP]
)
def test_micro_batches_give_the_whole_minibatchs_step(x64, name):
    whole = result(MTP[name], LayoutConfig())
    parts = result(MTP[name], LayoutConfig(micro_batches=4))
    assert_same(parts, whole, 1e-9)


@pytest.mark.release
@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_micro_batches_under_other_aggregations_and_two_heads(x64, aggregation):
    objective = ObjectiveConfig(aggregation=aggregation, kl_coefficient=0.1)
    for name in ("exact", "proxy_fused"):
        whole = result(MTP[name], LayoutConfig(), heads=2, objective=objective)
        parts = result(MTP[name], LayoutConfig(micro_batches=2), heads=2, objective=objective)
        assert_same(parts, whole, 1e-9)


@pytest.mark.release
def test_micro_batches_in_float32():
    whole = result(MTP["exact"], LayoutConfig(), dtype="float32")
    parts = result(MTP["exact"], LayoutConfig(micro_batches=4), dtype="float32")
    tiny.close(parts.gradient, whole.gradient, 1e-5)
    scale = np.sqrt(whole.gram[0, 0] * whole.gram[1, 1])
    assert abs(parts.gram[0, 1] - whole.gram[0, 1]) <= 1e-5 * scale


@pytest.mark.release
def test_a_mean_of_micro_batch_coefficients_would_be_another(x64):
    """What the tests above would miss if every micro-batch happened to agree."""
    model_config = tiny.model_config(1, "float64")
    model = tiny.build_model(model_config)
    config = tiny.train_config(regime("occ"), model_config)
    batch = tiny.minibatch(config, model, rows=8)
    cut = micro_batches(batch, 4)
    parts = [jax.tree.map(lambda x, j=j: x[j], cut) for j in range(4)]
    each = [tiny.gradient(config, model, part).calibration.weights[1] for part in parts]
    whole = tiny.gradient(config, model, batch).calibration.weights[1]
    assert abs(np.mean(each) - whole) > 0.01 * abs(whole)


@pytest.mark.parametrize(
    "name",
    [
        "proxy_fused",
        pytest.param("detach", marks=pytest.mark.release),
        pytest.param("exact", marks=pytest.mark.release),
    ],
)
def test_a_non_finite_micro_batch_takes_its_head_out_and_is_counted_once(x64, name):
    """Its own old log-prob of one token is broken: the MTP loss alone is not finite."""
    mtp = dataclasses.replace(MTP[name], loss="policy", reference="own")
    model_config = tiny.model_config(1, "float64")
    model = tiny.build_model(model_config)
    config = tiny.train_config(mtp, model_config)
    batch = tiny.minibatch(config, model, rows=8)
    broken = batch.replace(old_mtp_log_prob=batch.old_mtp_log_prob.at[0, 5, 7].set(jnp.nan))
    assert bool(batch.response_mask[5, 7])
    got = result(mtp, LayoutConfig(micro_batches=4), batch=broken)
    assert got.calibration.nonfinite.tolist() == [1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got.gradient))
    if name != "detach":
        whole = result(mtp, LayoutConfig(), batch=broken)
        tiny.close(got.gradient, whole.gradient, 1e-9)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("proxy_fused", 5), ("exact", 1), ("exact", 4), ("distill", 4)],
)
@pytest.mark.release
def test_logits_in_chunks_give_the_same_step(x64, name, chunk):
    objective = ObjectiveConfig(entropy_coefficient=0.01)
    whole = result(MTP[name], LayoutConfig(), heads=2, objective=objective)
    chunked = result(MTP[name], LayoutConfig(logits_chunk=chunk), heads=2, objective=objective)
    assert_same(chunked, whole, 1e-9)


@pytest.mark.release
@pytest.mark.standard_promotion  # jax.nn.dot_product_attention mixes dtypes
def test_chunks_add_gradients_of_the_head_up_in_float32():
    """Under bfloat16 they differ by rounding of sums alone; bfloat16 sums would by 1e-3."""
    mtp, bfloat16 = regime("detach"), {"compute_dtype": "bfloat16", "tied_embeddings": False}
    whole, parts = (
        result(mtp, LayoutConfig(logits_chunk=chunk), dtype="float32", model=bfloat16)
        for chunk in (0, 3)
    )
    tiny.close(parts.gradient["output_head"], whole.gradient["output_head"], 1e-5)


def test_a_loss_of_whole_sequences_is_the_same_in_chunks(x64, monkeypatch):
    """Tokens of GSPO depend on their sequence's ratio, so no chunk has its gradient by itself."""
    mtp = MTPTrainingConfig(loss="policy", rule="fixed", placement="fused")
    objective = ObjectiveConfig(policy=gspo(0.3, 0.3))
    whole = result(mtp, LayoutConfig(), objective=objective)
    chunks = LayoutConfig(logits_chunk=4)
    assert_same(result(mtp, chunks, objective=objective), whole, 1e-9)
    monkeypatch.setattr(PolicyConfig, "by_token", True)
    monkeypatch.setattr(tiny, "_COMPILED", {})
    with pytest.raises(AssertionError):
        assert_same(result(mtp, chunks, objective=objective), whole, 1e-9)


@pytest.mark.parametrize(("policy", "products"), [(PolicyConfig(), 3), (gspo(), 4)])
def test_logits_in_chunks_are_computed_once_unless_the_loss_is_of_whole_sequences(policy, products):
    """Of the output head's products: logits, the gradient of its matrix, that of its input."""
    model_config = tiny.model_config(1)
    model = tiny.build_model(model_config)
    config = tiny.train_config(
        regime("detach"),
        model_config,
        objective=ObjectiveConfig(policy=policy),
        layout=LayoutConfig(logits_chunk=4),
    )
    batch = tiny.minibatch(config, model, rows=8)
    inputs = step_inputs(tiny.policy(config, model), batch, config)
    hidden = jnp.zeros((*batch.tokens.shape, model_config.width))
    jaxpr = jax.make_jaxpr(lambda hidden: rl_gradient(inputs, hidden).gradient)(hidden)
    assert products_with(model_config.vocab_size, jaxpr.jaxpr) == products


def products_with(size, jaxpr):
    """Matrix products in which an array has a dimension of this size; a loop's body counts once."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            variables = (*equation.invars, *equation.outvars)
            count += any(size in variable.aval.shape for variable in variables)
        for inner in jaxprs_in_params(equation.params):
            count += products_with(size, inner)
    return count


def test_rows_return_to_their_places():
    rows = jnp.arange(12).reshape(6, 2)
    parts = [rows[j::3] for j in range(3)]
    np.testing.assert_array_equal(interleave(parts), rows)


def test_rows_that_do_not_divide_are_refused():
    config = tiny.train_config(regime("occ"))
    batch = tiny.minibatch(config, tiny.build_model(config.model), rows=8)
    with pytest.raises(ValueError, match="8 rows cannot be cut into 3 equal parts"):
        micro_batches(batch, 3)
    with pytest.raises(
        ValueError, match=r"generation_rows \(6\) cannot be cut evenly on 4 devices"
    ):
        LayoutConfig(data=2, fsdp=2, generation_rows=6)
    with pytest.raises(ValueError, match="128 sequences cannot be cut evenly into 3 micro-batches"):
        dataclasses.replace(config, layout=LayoutConfig(micro_batches=3))
