"""Meshes: the table covers every parameter, and a sharded step is the single device's step."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from experiments.configs import CONFIGS
from occ.generation.decoding import generate
from occ.generation.sampling import SamplingConfig
from occ.models.config import MoEConfig
from occ.models.policy import Policy, abstract_policy
from occ.training import programs, sharding
from occ.training.config import LayoutConfig
from occ.training.regimes import regime
from tests import tiny

pytestmark = pytest.mark.standard_promotion

LAYOUTS = {
    "data": LayoutConfig(data=8),
    "fsdp": LayoutConfig(fsdp=8),
    "fsdp-tensor": LayoutConfig(fsdp=4, tensor=2),
    "data-fsdp-tensor": LayoutConfig(data=2, fsdp=2, tensor=2),
    "micro-batches": LayoutConfig(data=2, fsdp=2, tensor=2, micro_batches=2, logits_chunk=4),
}
SIZES = {"vocab_size": 16, "num_kv_heads": 2, "mlp_width": 32}


def setting(name, dtype, layout, moe=None):
    model_config = tiny.model_config(1, dtype, moe=moe, tied_embeddings=False, **SIZES)
    config = tiny.train_config(regime(name), model_config)
    model = tiny.build_model(model_config)
    batch = tiny.minibatch(config, model, rows=16)
    if moe is not None:  # every other token goes again to the experts of before
        rollout = dataclasses.replace(config.rollout, routing_replay=True)
        config = dataclasses.replace(config, rollout=rollout)
        rng, (rows, time) = np.random.default_rng(2), batch.tokens.shape
        chosen = np.argsort(rng.random((1, moe.num_experts, rows, time)), axis=1)
        chosen = chosen[:, : moe.experts_per_token]
        batch = batch.replace(experts=np.where(rng.random((rows, time)) < 0.5, chosen, -1))
        batch = batch.replace(experts=batch.experts.astype(np.int8))
    return dataclasses.replace(config, layout=layout), model, batch


def compiled_step(config, model, batch):
    """The production step, compiled for its mesh, and what it is called with."""
    mesh = sharding.make_mesh(config.layout)
    with jax.set_mesh(mesh):
        state = programs.fresh_state(config, tiny.policy(config, model))
        shapes = programs.abstract_state(config, tiny.policy(config, model), mesh)
        step = programs.jit_train_step(config, mesh, shapes)
        state = jax.tree.map(
            lambda x, like: jax.device_put(np.asarray(x), like.sharding), state, shapes
        )
        shardings = sharding.batch_shardings(mesh, config.rollout.routing_replay)
        batch = jax.device_put(batch, shardings)
        return step.lower(state, batch).compile(), state, batch


def one_step(config, model, batch):
    compiled, state, batch = compiled_step(config, model, batch)
    return jax.device_get(compiled(state, batch))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_parameter_of_every_configuration_has_its_place(name):
    config = CONFIGS[name]()
    policy = abstract_policy(config.model)
    mesh = sharding.make_mesh(LayoutConfig())
    placed = programs.abstract_state(config, policy, mesh)
    cut = jax.tree.leaves(jax.tree.map(lambda x: x.sharding.spec != jax.P(), placed.params))
    assert all(cut)  # a row of the table was found for each
    moments = [x for x in jax.tree.leaves(placed.opt_state) if x.ndim]
    assert all(x.sharding.spec != jax.P() for x in moments)


def test_a_parameter_without_a_row_is_refused():
    with pytest.raises(ValueError, match="none does"):
        sharding.parameter_spec("layers/attention/sink", (2, 4))
    with pytest.raises(ValueError, match="layer axis"):
        sharding.parameter_spec("layers/attention/query/kernel", (4, 4))


def test_two_rows_for_a_parameter_are_refused(monkeypatch):
    twice = (*sharding.TABLE, sharding.Row(r".*/scale", "width", jax.P(None)))
    monkeypatch.setattr(sharding, "TABLE", twice)
    with pytest.raises(ValueError, match="these do"):
        sharding.parameter_spec("final_norm/scale", (4,))


def test_dimensions_that_do_not_divide_are_listed():
    config, model, _ = setting("occ", "float32", LayoutConfig())
    mesh = sharding.make_mesh(LayoutConfig(tensor=3))
    with pytest.raises(ValueError, match=r"embedding/embedding \(16, 16\): 16 over tensor = 3"):
        programs.abstract_state(config, tiny.policy(config, model), mesh)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="takes 16 devices, and there are 8"):
        sharding.make_mesh(LayoutConfig(data=2, fsdp=8))


@functools.cache
def single(name):
    with jax.enable_x64(True):
        return one_step(*setting(name, "float64", LayoutConfig()))


@pytest.mark.parametrize(
    ("mtp", "layout"),
    [
        ("occ", "fsdp-tensor"),
        *(
            pytest.param(*pair, marks=pytest.mark.release)
            for pair in (
                ("occ_paper", "micro-batches"),
                ("occ", "data"),
                ("occ", "fsdp"),
                ("occ", "data-fsdp-tensor"),
                ("occ", "micro-batches"),
            )
        ),
    ],
)
def test_a_sharded_step_is_the_single_devices(x64, mtp, layout):
    """Under Adam: moments are the gradients', parameters within a rounding of its step."""
    expected, expected_metrics = single(mtp)
    state, metrics = one_step(*setting(mtp, "float64", LAYOUTS[layout]))
    tiny.close(state.opt_state, expected.opt_state, 1e-9)
    tiny.close(state.calibration, expected.calibration, 1e-9)
    tiny.close(metrics, expected_metrics, 1e-9)
    rate = 1e-2
    for new, old in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True
    ):
        assert np.abs(new - old).max() <= 2 * rate
    assert abs(expected.calibration.weights[1]) > 1e-3


def test_parameters_are_born_where_they_live_and_do_not_depend_on_it():
    config, _, _ = setting("occ", "float32", LayoutConfig())
    alone = programs.init_policy(config)
    config = dataclasses.replace(config, layout=LAYOUTS["data-fsdp-tensor"])
    born = programs.init_policy(config)
    kernel = born.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, ("fsdp", "expert"), "tensor")
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    tiny.close(born, alone, 1e-6)


def test_what_a_measure_remembers_of_gradients_lies_where_the_parameters_lie():
    config, model, _ = setting("worth", "float32", LAYOUTS["data-fsdp-tensor"])
    mesh = sharding.make_mesh(config.layout)
    with jax.set_mesh(mesh):
        shapes = programs.abstract_state(config, tiny.policy(config, model), mesh)
    for past in shapes.calibration.measure.gradients:
        place = past["layers/mlp/up/kernel"].sharding
        assert place == shapes.params["layers"]["mlp"]["up"]["kernel"].sharding
        assert place.spec == jax.P(None, ("fsdp", "expert"), "tensor")


# ---------------------------------------------------------------------------------------------
# What the calibration adds to the communication
# ---------------------------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text):
    """(kind, number of elements) of every collective in compiled HLO."""
    found = []
    kinds = "|".join(COLLECTIVES)
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        sizes = [
            np.prod([int(n) for n in dims.split(",")] if dims else [1])
            for dims in re.findall(r"[a-z0-9]+\[([\d,]*)\]", shapes)
        ]
        found.append((kind, int(sum(sizes))))
    return found


def test_the_calibration_itself_communicates_scalars_alone():
    """The transformation alone, on gradients that live cut up: inner products cross devices."""
    import occ

    layout = LAYOUTS["data-fsdp-tensor"]
    _, model, _ = setting("occ", "float32", layout)
    mesh = sharding.make_mesh(layout)
    transformation = occ.calibrate(num_auxiliary=2)
    with jax.set_mesh(mesh):
        params = model[1]
        places = sharding.tree_shardings(params, mesh)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places
        )
        state = jax.eval_shape(transformation.init, params)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)),
            state,
        )

        def update(gradient, state, first, second):
            return transformation.update(gradient, state, auxiliary=(first, second))

        text = (
            jax.jit(update, out_shardings=(places, None))
            .lower(like, state, like, like)
            .compile()
            .as_text()
        )
    found = collectives(text)
    leaves = len(jax.tree.leaves(params))
    assert found, "nothing crosses devices: the test looks at the wrong program"
    assert {kind for kind, _ in found} == {"all-reduce"}
    # Inner products of K + 1 = 3 gradients a leaf; whether each of them is finite as it came, and
    # as it was measured, which tells an overflow of their products from a fault of theirs.
    assert sum(size for _, size in found) <= leaves * (9 + 3 + 3)
    assert max(size for _, size in found) <= leaves * 9


# ---------------------------------------------------------------------------------------------
# Mixture of experts
# ---------------------------------------------------------------------------------------------

MOE = MoEConfig(num_experts=8, experts_per_token=2, expert_width=8, first_dense_layers=1)
MOE_LAYOUTS = {
    "expert": LayoutConfig(expert=8),
    "fsdp-expert-tensor": LayoutConfig(fsdp=2, expert=2, tensor=2),
    "data-expert": LayoutConfig(data=2, expert=4, micro_batches=2),
    "fsdp": LayoutConfig(fsdp=8),
}


@functools.cache
def single_moe():
    with jax.enable_x64(True):
        return one_step(*setting("occ", "float64", LayoutConfig(), MOE))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("fsdp-expert-tensor", marks=pytest.mark.release),
        pytest.param("data-expert", marks=pytest.mark.release),
        pytest.param("expert", marks=pytest.mark.release),
        pytest.param("fsdp", marks=pytest.mark.release),
    ],
)
def test_a_sharded_mixture_of_experts_is_the_single_devices(x64, layout):
    expected, expected_metrics = single_moe()
    state, metrics = one_step(*setting("occ", "float64", MOE_LAYOUTS[layout], MOE))
    tiny.close(state.opt_state, expected.opt_state, 1e-9)
    tiny.close(state.calibration, expected.calibration, 1e-9)
    tiny.close(metrics, expected_metrics, 1e-9)


@pytest.mark.release
def test_tokens_travel_to_experts_and_are_never_gathered():
    config, model, batch = setting("occ_paper", "float32", MOE_LAYOUTS["data-expert"], MOE)
    config = dataclasses.replace(config, layout=LayoutConfig(data=2, expert=4))
    found = collectives(compiled_step(config, model, batch)[0].as_text())
    assert "all-to-all" in {kind for kind, _ in found}
    tokens = batch.tokens.size * config.model.width
    gathered = [size for kind, size in found if kind == "all-gather"]
    assert gathered and max(gathered) < tokens


@pytest.mark.release
def test_a_bounded_capacity_drops_and_counts(x64):
    """One pair a device and expert group: most of the tokens find no room."""
    tight = dataclasses.replace(MOE, capacity_factor=0.01)
    _, metrics = one_step(*setting("occ", "float64", MOE_LAYOUTS["expert"], tight))
    _, free = single_moe()
    assert free["router/dropped"] == 0
    assert 0.5 < metrics["router/dropped"] < 1


@pytest.mark.parametrize(
    ("moe", "layout"),
    [
        pytest.param(None, LAYOUTS["data-fsdp-tensor"], id="dense"),
        pytest.param(MOE, LayoutConfig(fsdp=4, expert=2), marks=pytest.mark.slow, id="moe"),
    ],
)
def test_generation_on_a_mesh_samples_the_same_tokens(moe, layout):
    """Parameters are gathered once for all tokens; rows are divided, and keys belong to rows.

    Sixteen samples of six prompts, which no mesh here divides.
    """
    config, model, batch = setting("occ", "float32", LayoutConfig(), moe)
    _, params, rest = model
    sampling = SamplingConfig(6, stop_tokens=(1,), keep_experts=moe is not None)
    prompts, mask = np.asarray(batch.tokens[:6, :3]) + 2, np.ones((6, 3), bool)
    prompt_of = np.arange(16, dtype=np.int32) % 6

    def sample(layout):
        mesh = sharding.make_mesh(layout)
        with jax.set_mesh(mesh):
            placed = jax.device_put(jax.device_get(params), sharding.tree_shardings(params, mesh))

            def run(params, prompts, mask):
                gathered = sharding.for_generation(params, config.model.compute)
                key = jax.random.key(3)
                policy = Policy(config.model, gathered, rest)
                return generate(
                    policy,
                    prompts,
                    mask,
                    key,
                    config=sampling,
                    prompt_of=jax.numpy.asarray(prompt_of),
                )

            # What every layer asked for, it would get anew for every token.
            assert "all_gather" not in str(jax.make_jaxpr(run)(placed, prompts, mask))
            return jax.device_get(jax.jit(run)(placed, prompts, mask))

    alone, together = sample(LayoutConfig()), sample(layout)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    np.testing.assert_allclose(together.log_prob, alone.log_prob, atol=1e-5)
    np.testing.assert_array_equal(together.experts, alone.experts)
    assert len(np.unique(alone.tokens)) > 4
