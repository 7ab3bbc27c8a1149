"""Plans: what is read from programs, against programs whose cost is known."""

import dataclasses
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from experiments.configs import CONFIGS
from experiments.instruments import flops, hlo, plan
from experiments.instruments.chips import CHIPS, chip_of, tpu_devices
from occ.models.attention import Context, attend
from occ.models.cache import Past, StackCache, attend_to_past
from occ.training.config import LayoutConfig, RolloutConfig

pytestmark = pytest.mark.standard_promotion
P = jax.P


def small_config(**layout):
    config = CONFIGS["laptop"]()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=128, remat="full"),
        rollout=RolloutConfig(prompts=8, samples=4, minibatches=2),
        max_prompt_tokens=8,
        max_response_tokens=8,
        layout=LayoutConfig(**layout),
    )


def test_collectives_in_a_loop_count_as_often_as_they_run():
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("a", "b"))

    def body(x, w):
        return jnp.tanh(x @ w), None

    def run(x, ws):
        return jax.lax.scan(body, x, ws)[0]

    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    ws = jax.ShapeDtypeStruct(
        (5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "b", None))
    )
    compiled = jax.jit(run, out_shardings=NamedSharding(mesh, P("a", None))).lower(x, ws).compile()
    found = hlo.collectives(hlo.parse(compiled.as_text()))
    # Each product is a sum over the four parts of the contracted dimension: [16 / 2, 32] floats.
    assert found["all-reduce"].times == 5
    assert found["all-reduce"].largest == 8 * 32 * 4
    assert found["all-reduce"].bytes == 5 * 8 * 32 * 4
    assert found["all-reduce"].wire == pytest.approx(2 * 3 / 4 * 5 * 8 * 32 * 4)


def test_collectives_in_fusions_count_once():
    """As the TPU compiler writes them: a scattered sum, and a gather spread over two fusions."""
    group = "replica_groups={{0,1,2,3}}"
    text = f"""HloModule m
%all-reduce-scatter.1 (p: f32[64,8]) -> f32[16,8] {{
  %p = f32[64,8] parameter(0)
  %sum = f32[64,8] all-reduce(%p), channel_id=1, {group}, to_apply=%add
  ROOT %part = f32[16,8] dynamic-slice(%sum, %zero), dynamic_slice_sizes={{16,8}}
}}
%start (q: f32[16,8]) -> f32[64,8] {{
  %q = f32[16,8] parameter(0)
  ROOT %begun = f32[64,8] all-gather(%q), channel_id=2, {group}, dimensions={{0}}
}}
%done (r: f32[16,8]) -> f32[64,8] {{
  %r = f32[16,8] parameter(0)
  ROOT %ended = f32[64,8] all-gather(%r), channel_id=2, {group}, dimensions={{0}}
}}
ENTRY %main (x: f32[64,8]) -> f32[64,8] {{
  %x = f32[64,8] parameter(0)
  %cut = f32[16,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %first = f32[64,8] fusion(%cut), kind=kLoop, calls=%start
  ROOT %second = f32[64,8] fusion(%cut, %first), kind=kLoop, calls=%done
}}
"""
    whole = 64 * 8 * 4
    assert hlo.collectives(hlo.parse(text)) == {
        "reduce-scatter": hlo.Traffic(1, whole, 3 / 4 * whole, whole),
        "all-gather": hlo.Traffic(1, whole, 3 / 4 * whole, whole),
    }


def test_operations_of_loops_branches_and_recomputation():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    once = 2 * 4 * 8 * 8

    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=3)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    def waiting(x):
        return jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ w, x)

    def recomputed(x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x))

    assert flops.matrix_flops(jax.make_jaxpr(looped)(x)) == 3 * once
    assert flops.matrix_flops(jax.make_jaxpr(branched)(x)) == 2 * once
    assert flops.matrix_flops(jax.make_jaxpr(waiting)(x), while_trips=7) == 7 * once
    # Two products forward, both again for the backward pass, and two cotangents.
    assert flops.matrix_flops(jax.make_jaxpr(jax.grad(recomputed))(x)) == 6 * once


def test_operations_of_a_kernel_are_those_of_its_blocks():
    segment_ids = jnp.ones((1, 256), jnp.int32)
    context = Context(segment_ids, segment_ids)
    heads = jnp.ones((1, 256, 2, 128))

    def attention(query):
        return attend(query, heads, heads, context, kernel="splash")

    counted = flops.matrix_flops(jax.make_jaxpr(attention)(heads))
    scores_and_values = 2 * 2 * (2 * 256 * 256 * 128)
    assert scores_and_values / 2 <= counted <= 1.01 * scores_and_values


def test_operations_of_experts_are_those_of_the_rows():
    x, w = jnp.ones((6, 4)), jnp.ones((3, 4, 5))
    sizes = jnp.array([2, 3, 1], jnp.int32)

    def experts(x, w):
        return jnp.sum(jnp.sin(jax.lax.ragged_dot(x, w, sizes)))

    once = 2 * 6 * 4 * 5
    assert flops.matrix_flops(jax.make_jaxpr(experts)(x, w)) == once
    both = jax.make_jaxpr(jax.grad(experts, argnums=(0, 1)))(x, w)
    assert flops.matrix_flops(both) == 3 * once


def test_traffic_of_a_loop_over_slices_is_that_of_the_slices():
    """Each of 16 iterations reads one matrix of the stack, and not the stack."""
    ws = jnp.ones((16, 64, 64))

    def run(x):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, ws)[0]

    text = jax.jit(run).lower(jnp.ones((64, 64))).compile().as_text()
    traffic = hlo.memory_traffic(hlo.parse(text))
    matrix = 64 * 64 * 4
    assert 16 * 3 * matrix <= traffic < 16 * 10 * matrix


def test_traffic_of_a_slice_inside_a_fusion_of_a_fusion_is_the_slices():
    text = """HloModule m
%inner (a: f32[16,8,8]) -> f32[8,8] {
  %a = f32[16,8,8] parameter(0)
  %flat = f32[16,8,8] bitcast(%a)
  ROOT %one = f32[1,8,8] dynamic-slice(%flat, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
}
%outer (x: f32[8,8], w: f32[16,8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  %w = f32[16,8,8] parameter(1)
  %matrix = f32[8,8] fusion(%w), kind=kLoop, calls=%inner
  ROOT %product = f32[8,8] convolution(%x, %matrix), dim_labels=bf_io->bf
}
ENTRY %main (p: f32[8,8], q: f32[16,8,8]) -> f32[8,8] {
  %p = f32[8,8] parameter(0)
  %q = f32[16,8,8] parameter(1)
  ROOT %y = f32[8,8] fusion(%p, %q), kind=kOutput, calls=%outer
}
"""
    assert hlo.memory_traffic(hlo.parse(text)) == 3 * 8 * 8 * 4


def test_what_stays_on_the_chip_is_no_memory_traffic():
    text = """HloModule m

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %twice = f32[8,128]{1,0:T(8,128)S(1)} add(%done, %done)
  ROOT %out = f32[8,128]{1,0:T(8,128)} copy(%twice)
}
"""
    array = 8 * 128 * 4
    assert hlo.memory_traffic(hlo.parse(text)) == 2 * array  # in, and out


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.parse("nothing")


def test_a_plan_for_gpus_adds_up(tmp_path):
    config = small_config(fsdp=4, tensor=2)
    lines = []
    arguments = plan.Arguments(config, topology="h100:8", folder=tmp_path)
    result = plan.plan(arguments, lines.append)
    json.dumps(result)
    costs = result["costs"]
    assert costs["occ"]["flops"] > costs["occ_paper"]["flops"] > costs["detach"]["flops"]
    # Parameters and two moments in float32, cut in 8, but for norms and biases.
    whole = sum(
        np.prod(leaf.shape) for leaf in jax.tree.leaves(plan.abstract_policy(config.model).params)
    )
    assert 3 * 4 * whole / 8 < costs["detach"]["arguments"] < 1.2 * 3 * 4 * whole / 8
    assert "| occ_paper |" in result["table"]
    assert any("fits" in line for line in lines)


def test_a_layout_for_another_number_of_devices_is_refused(tmp_path):
    arguments = plan.Arguments(small_config(fsdp=4), topology="h100:8", folder=tmp_path)
    with pytest.raises(ValueError, match="has 8 devices, the layout takes 4"):
        plan.plan(arguments)
    with pytest.raises(ValueError, match="expected a topology of one of"):
        chip_of("v1:2")


def test_advice_names_what_to_change():
    cost = plan.Cost(10.0, 2e13, 3e13, 1.0, 1.0, {})
    config = small_config(generation_rows=8)
    for ideas, expected in (
        (plan.train_advice(config), "micro_batches (now 1)"),
        (plan.generation_advice(config), "lower layout.generation_rows (now 8)"),
    ):
        last = plan.describe("Step", cost, CHIPS["v5p"], ideas).splitlines()[-1]
        assert "does not fit" in last and expected in last
    small = dataclasses.replace(cost, peak=1.0)
    assert plan.describe("Step", small, CHIPS["v5p"], []).endswith("  fits")


def test_a_program_without_room_is_reported():
    """And any other fault of the compiler is not swallowed."""

    def traced(message):
        def compiled():
            raise jax.errors.JaxRuntimeError(message)

        return types.SimpleNamespace(lower=lambda: types.SimpleNamespace(compile=compiled))

    lines = []
    full = "RESOURCE_EXHAUSTED: out of memory, 166G\nand more"
    assert plan.compile_or_report("Step", traced(full), ["do this"], lines.append) is None
    assert lines == ["Step: does not fit; do this\n  The compiler: " + full.splitlines()[0]]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan.compile_or_report("Step", traced("INTERNAL: no"), [], lines.append)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install '.[plan]'",
)


@needs_compiler
def test_a_small_slice_compiles_for_tpus(tmp_path):
    config = small_config(fsdp=2, tensor=2)
    arguments = plan.Arguments(config, "v5e:2x2", ("occ_paper",), folder=tmp_path)
    result = plan.plan(arguments, lambda line: None)
    cost = result["costs"]["occ_paper"]
    assert 0 < cost["temporaries"] < 2**30
    assert cost["collectives"]


@needs_compiler
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_cache_kernel_compiles_for_tpus_and_copies_no_cache(unchecked, dtype):
    where = NamedSharding(Mesh(tpu_devices("v5e:2x2")[:1], ("x",)), P())

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def read(query, key, value, keys, values, layer, lengths):
        past = Past(StackCache(keys, values), layer, lengths, 2)
        return attend_to_past(query, key, value, past, "pallas")

    new, cached = shaped(4, 2, 3, 128), shaped(4, 4, 2, 512, 128)
    numbers = shaped(dtype="int32"), shaped(4, dtype="int32")
    inputs = shaped(4, 3, 4, 128), new, new, cached, cached, *numbers
    compiled = jax.jit(read).lower(*inputs).compile()
    assert "custom-call(" in compiled.as_text()
    cache = 4 * 4 * 2 * 512 * 128 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < cache


@needs_compiler
def test_a_small_slice_adds_the_heads_gradient_up_once(tmp_path):
    """Over the chips, however many chunks of logits there are."""
    added = []
    for chunk in (1, 4):
        config = small_config(fsdp=4, logits_chunk=chunk)
        arguments = plan.Arguments(config, "v5e:2x2", ("detach",), rollouts=False, folder=tmp_path)
        found = plan.plan(arguments, lambda line: None)["costs"]["detach"]["collectives"]
        sums = [found[kind] for kind in ("all-reduce", "reduce-scatter") if kind in found]
        added.append(sum(traffic.bytes for traffic in sums))
    gradient = 4 * config.model.vocab_size * config.model.width
    assert min(added) > gradient > abs(added[0] - added[1])
