"""Packed minibatches give the padded one's step, lose no token, and come in few shapes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from occ import tasks
from occ.models.config import MoEConfig
from occ.objectives.policy import PolicyConfig
from occ.training import loop
from occ.training.batch import positions_from_segments, split, take_rows
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    MTPTrainingConfig,
    ObjectiveConfig,
    RolloutConfig,
    TrainConfig,
)
from occ.training.durable.run_folder import read_rows
from occ.training.packing import (
    RUNGS,
    first_fit,
    minibatches,
    pack,
    padding_waste,
    row_ladder,
    rows_needed,
)
from occ.training.regimes import regime
from tests import tiny

PACKED = LayoutConfig(pack=True, sequences_per_row=3)
ROLLOUT = RolloutConfig(prompts=4, samples=4, minibatches=2)


def varied(config, model, rows=16, time=12, seed=0):
    """Sequences of 2 to 12 tokens with padding on both sides; those of the second prompt idle."""
    batch = tiny.minibatch(config, model, seed, rows, time)
    rng = np.random.default_rng(seed)
    start, end = rng.integers(0, 7, (rows, 1)), rng.integers(8, 13, (rows, 1))
    column = np.arange(time)[None]
    present = (column >= start) & (column < end)
    segment_ids = jnp.asarray(present.astype(np.int32))
    counted = np.asarray(batch.response_mask) & present
    counted[4:8] = False
    return batch.replace(
        segment_ids=segment_ids,
        positions=positions_from_segments(segment_ids),
        response_mask=jnp.asarray(counted),
        advantages=jnp.where(counted, batch.advantages, jnp.nan),
    )


# -- the same step ----------------------------------------------------------------------------


def steps(mtp, *, heads=1, dtype="float64", layout=PACKED, model=None, **changes):
    """Every minibatch's step, padded and packed."""
    model_config = tiny.model_config(heads, dtype, **({} if model is None else model))
    model = tiny.build_model(model_config)
    plain = tiny.train_config(mtp, model_config, rollout=ROLLOUT, **changes)
    config = dataclasses.replace(plain, layout=layout)
    batch = varied(plain, model)
    return [
        (
            tiny.gradient(plain, model, padded),
            tiny.gradient(config, model, packed),
        )
        for padded, packed in zip(
            minibatches(batch, plain), minibatches(batch, config), strict=True
        )
    ]


def assert_same(padded, packed, tolerance):
    """Losses and all else that is reported, c, v^2 and coefficients, and gradients."""
    tiny.close(packed.gradient, padded.gradient, tolerance)
    for part in ("calibration", "gram", "router_load"):
        tiny.close(getattr(packed, part), getattr(padded, part), tolerance)
    tiny.close(
        [output.metrics for output in (packed.main, *packed.heads)],
        [output.metrics for output in (padded.main, *padded.heads)],
        tolerance,
    )


MTP = {
    "proxy": regime("occ_paper"),
    "exact": regime("occ"),
    "cross_fitted": MTPTrainingConfig(measure="cross_fitted"),
    "row_subset": MTPTrainingConfig(
        measure="row_subset", placement="fused", measure_options={"fraction": 0.3}
    ),
}
SLOW = ("exact", "cross_fitted", "row_subset")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.release] * (name in SLOW)) for name in MTP]
)
def test_packing_changes_no_step(x64, name):
    for padded, packed in steps(MTP[name]):
        assert_same(padded, packed, 1e-9)


@pytest.mark.release
def test_packing_under_what_is_counted_by_sequence(x64):
    """Sequences that idle are left out, and must not have been counted before."""
    objective = ObjectiveConfig(aggregation="seq-mean-token-mean", policy=PolicyConfig(kind="gspo"))
    for padded, packed in steps(MTP["exact"], heads=2, objective=objective):
        assert_same(padded, packed, 1e-9)


@pytest.mark.release
def test_packing_in_float32():
    for padded, packed in steps(MTP["exact"], dtype="float32"):
        assert_same(padded, packed, 1e-5)


@pytest.mark.release
def test_packing_and_micro_batches_of_halves(x64):
    layout = dataclasses.replace(PACKED, micro_batches=2)
    for padded, packed in steps(MTP["cross_fitted"], layout=layout):
        assert_same(padded, packed, 1e-9)


@pytest.mark.release
def test_packing_leaves_a_routers_load_as_it_is(x64):
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_width=8)
    for padded, packed in steps(MTP["proxy"], model={"moe": moe}):
        assert_same(padded, packed, 1e-9)


# -- what goes where --------------------------------------------------------------------------


def test_first_fit_places_every_sequence_once_and_in_the_room_there_is():
    rng = np.random.default_rng(0)
    for _ in range(50):
        length, most = int(rng.integers(5, 30)), int(rng.integers(1, 6))
        lengths = rng.integers(1, length + 1, int(rng.integers(0, 40))).tolist()
        filled = first_fit(lengths, length=length, sequences_per_row=most)
        assert sorted(index for row in filled for index in row) == list(range(len(lengths)))
        used = [sum(lengths[index] for index in row) for row in filled]
        for number, row in enumerate(filled):
            assert used[number] <= length and len(row) <= most
            # First fit: no sequence would have found room in an earlier row when it was placed.
            for index in row:
                for earlier in filled[:number]:
                    ahead = [i for i in earlier if (-lengths[i], i) < (-lengths[index], index)]
                    room = length - sum(lengths[i] for i in ahead)
                    assert room < lengths[index] or len(ahead) == most


def test_a_token_takes_all_that_is_said_of_it_along():
    config = tiny.train_config(regime("occ"), tiny.model_config(2))
    batch = varied(config, tiny.build_model(config.model))
    experts = np.random.default_rng(0).integers(-1, 8, (2, 3, *batch.tokens.shape)).astype(np.int8)
    batch = batch.replace(experts=experts)
    rows = rows_needed(batch, length=15, sequences_per_row=3, keep_uncounted=True)
    packed = pack(batch, length=15, sequences_per_row=3, rows=rows + 1, keep_uncounted=True)
    assert packed.tokens.shape == (rows + 1, 15) and packed.old_mtp_log_prob.shape[0] == 2
    assert not packed.segment_ids[-1].any()

    def sequences(batch):
        """The fields of each sequence, token by token."""
        found = []
        for row, segment_ids in enumerate(np.asarray(batch.segment_ids)):
            for number in range(1, segment_ids.max() + 1):
                columns = np.flatnonzero(segment_ids == number)
                assert columns.size and np.ptp(columns) == columns.size - 1
                fields = {
                    name: np.asarray(value)[..., row, columns].tolist()
                    for name, value in vars(batch).items()
                    if name != "segment_ids"
                }
                found.append(repr(sorted(fields.items())))
        return sorted(found)

    assert sequences(packed) == sequences(batch)
    assert {name: value.dtype for name, value in vars(packed).items()} == {
        name: value.dtype for name, value in vars(batch).items()
    }
    for name, value in vars(packed).items():
        assert not value[..., packed.segment_ids == 0].any(), name

    counted = pack(batch, length=15, sequences_per_row=3, rows=rows)
    assert len(sequences(counted)) == len(sequences(batch)) - 4
    again = pack(counted, length=15, sequences_per_row=3, rows=rows)
    assert sequences(again) == sequences(counted)


def test_halves_hold_the_same_prompts():
    """Tokens name their rows: what the measure compares must not be mixed."""
    mtp = MTPTrainingConfig(measure="cross_fitted")
    config = tiny.train_config(mtp, tiny.model_config(), rollout=ROLLOUT, layout=PACKED)
    batch = varied(config, tiny.build_model(config.model))
    batch = batch.replace(tokens=jnp.broadcast_to(jnp.arange(16)[:, None], batch.tokens.shape))
    for padded, packed in zip(split(batch, 2), minibatches(batch, config), strict=True):
        rows = packed.tokens.shape[0]
        assert rows % 2 == 0 and rows < 8
        for rows_of, half in (
            (slice(0, rows // 2), slice(0, 4)),
            (slice(rows // 2, rows), slice(4, 8)),
        ):
            there = take_rows(packed, rows_of)
            here = take_rows(padded, half)
            expected = np.asarray(here.tokens)[np.asarray(here.response_mask).any(axis=1), 0]
            assert set(there.tokens[there.segment_ids > 0]) == set(expected.tolist())


def test_padding_waste_is_the_share_of_cells_without_a_token():
    config = tiny.train_config(regime("occ"), tiny.model_config(), rollout=ROLLOUT)
    batch = varied(config, tiny.build_model(config.model))
    lengths = np.asarray(batch.segment_ids).sum(axis=1)
    assert padding_waste(split(batch, 2)) == pytest.approx(1 - lengths.sum() / (16 * 12))
    packed = minibatches(batch, dataclasses.replace(config, layout=PACKED))
    left = lengths.sum() - lengths[4:8].sum()
    cells = sum(part.tokens.size for part in packed)
    assert padding_waste(packed) == pytest.approx(1 - left / cells)
    assert padding_waste(packed) < padding_waste(split(batch, 2))


# -- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [1, 2, 3, 8, 48])
def test_the_ladder_is_short_and_ends_with_all_rows(divisor):
    for rows in range(divisor, 200, divisor):
        rungs = row_ladder(rows, divisor)
        assert len(rungs) <= RUNGS and rungs[-1] == rows
        assert list(rungs) == sorted(set(rungs)) and not any(rung % divisor for rung in rungs)


def test_the_minibatches_of_a_rollout_have_one_shape():
    """Even where one of them alone would need fewer rows."""
    config = tiny.train_config(regime("occ"), tiny.model_config(), rollout=ROLLOUT, layout=PACKED)
    batch = varied(config, tiny.build_model(config.model))
    needed = [rows_needed(p, length=12, sequences_per_row=3) for p in split(batch, 2)]
    assert needed[0] != needed[1]
    assert {part.tokens.shape for part in minibatches(batch, config)} == {(max(needed), 12)}
    nothing = batch.replace(response_mask=jnp.zeros_like(batch.response_mask))
    assert {part.tokens.shape for part in minibatches(nothing, config)} == {(1, 12)}


@pytest.mark.release
@pytest.mark.standard_promotion
def test_a_run_compiles_once_or_when_packed_once_a_rung(tmp_path):
    """Whatever lengths it meets: counted by the compiled programs themselves."""
    task = tasks.load("arithmetic", digits=2, train_size=40, test_size=10)
    config = TrainConfig(
        name="tiny",
        model=tiny.model_config(1, vocab_size=task.tokenizer.vocab_size),
        task="arithmetic",
        mtp=regime("detach"),
        rollout=dataclasses.replace(ROLLOUT, dynamic_sampling=True),
        evaluation=EvaluationConfig(every=9, prompts=6, samples=2),
        max_prompt_tokens=18,
        rollouts=3,
    )
    judged = dataclasses.replace(
        task, verifier=lambda problem, completion: float(sum(map(ord, completion)) % 2)
    )
    layout = LayoutConfig(pack=True, sequences_per_row=4, generation_rows=4)
    waste = {}
    for name, layout_ in (("padded", LayoutConfig()), ("packed", layout)):
        run = dataclasses.replace(config, layout=layout_)
        programs = loop.build(run, judged)
        shapes = []

        def seeing(state, batch, step=programs.train_step, shapes=shapes):
            shapes.append(batch.tokens.shape)
            return step(state, batch)

        seen = dataclasses.replace(programs, train_step=seeing)
        loop.run(run, judged, seen, loop.init_policy(run), tmp_path / name)
        compiled = programs.train_step._cache_size()
        assert len(shapes) == 6
        assert compiled == len(set(shapes)) <= (1 if name == "padded" else RUNGS)
        assert programs.rollout.score._cache_size() == 2  # of rollouts, and of evaluations
        assert programs.rollout.sample.program._cache_size() <= (1 if name == "padded" else 4)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        waste[name] = {
            metric: np.mean([row[metric] for row in rows])
            for metric in ("batch/padding_waste", "rollout/padding_waste")
        }
    for metric, value in waste["packed"].items():
        assert 0 <= value < waste["padded"][metric] < 1


# -- errors -----------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_refused():
    config = tiny.train_config(regime("occ"), tiny.model_config(), rollout=ROLLOUT, layout=PACKED)
    batch = varied(config, tiny.build_model(config.model))
    with pytest.raises(ValueError, match=r"12 sequences take \d+ rows of 12 columns .* rows=1"):
        pack(batch, length=12, sequences_per_row=3, rows=1)
    with pytest.raises(ValueError, match=r"has 5 tokens, and a row holds 4"):
        first_fit([3, 5], length=4, sequences_per_row=3)
    halves = dataclasses.replace(config.mtp, measure="cross_fitted")
    eight = dataclasses.replace(PACKED, micro_batches=8)
    with pytest.raises(ValueError, match="8 sequences cannot be cut into 16 equal parts"):
        minibatches(batch, dataclasses.replace(config, mtp=halves, layout=eight))


def test_a_mean_over_padding_cannot_be_had_without_the_padding():
    unmasked = regime("occ_released")
    with pytest.raises(ValueError, match="'released_unmasked' is a mean over all positions"):
        tiny.train_config(unmasked, layout=PACKED)
    tiny.train_config(unmasked)
    tiny.train_config(dataclasses.replace(unmasked, rule="fixed"), layout=PACKED)
