"""Adapters in files: checkpoints of them alone, resumed beside the frozen trunk, and exports."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluated, export
from occ import tasks
from occ.models import pretrained
from occ.models.config import LoRAConfig, MoEConfig
from occ.models.lora import adapt, merge
from occ.training import loop
from occ.training.config import EvaluationConfig, LayoutConfig, PretrainedConfig
from occ.training.durable.checkpoints import Checkpoints, DamagedError
from occ.training.durable.run_folder import read_rows
from occ.training.regimes import regime
from occ.training.start.starting_point import starting_point, with_frozen
from occ.training.state import frozen_leaves
from tests import tiny

pytestmark = pytest.mark.standard_promotion

LORA = LoRAConfig(rank=2, alpha=4.0, frozen_dtype="bfloat16", quantised="int8")
PLAIN = tiny.model_config(1, vocab_size=14, tied_embeddings=False)
TASK = tasks.load("arithmetic", digits=1, train_size=40, test_size=10)


def configuration(source):
    return tiny.run_config(
        "lora",
        model=dataclasses.replace(PLAIN, lora=LORA),
        mtp=regime("ce"),  # which moves them although nothing is rewarded
        pretrained=PretrainedConfig(str(source)),
        evaluation=EvaluationConfig(every=2, prompts=6, samples=2),
        rollouts=2,
        checkpoint_every=1,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder that the run begins from, published in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "base"
    published = dataclasses.replace(PLAIN, param_dtype="bfloat16", compute_dtype="float32")
    pretrained.save(folder, tiny.new_policy(published, 5))
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run that nobody stopped: its folder, configuration, programs and start."""
    folder, config = tmp_path_factory.mktemp("runs") / "run", configuration(source)
    with jax.numpy_dtype_promotion("standard"):
        programs = loop.build(config, TASK)
        start = starting_point(config, TASK, programs, folder / "starts").policy
        loop.run(config, TASK, programs, start, folder)
    return folder, config, programs, start


def newest(folder, config, state):
    frozen = frozen_leaves(config.model)
    with Checkpoints(folder / "checkpoints", read_only=True, frozen=frozen) as checkpoints:
        return checkpoints.read(state).state


def test_a_checkpoint_holds_adapters_and_modules_alone(whole):
    """And is read beside the trunk of the run's own start, whose bits it has."""
    folder, config, programs, start = whole
    names = (folder / "checkpoints" / "2" / "state" / "_METADATA").read_text()
    assert "lora_a" in names and "params.mtp" in names
    assert "rest." not in names
    state = newest(folder, config, with_frozen(config, programs.state))
    jax.tree.map(np.testing.assert_array_equal, state.rest, start.rest)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, start.params)
    assert all(jax.tree.leaves(moved))


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path):
    """Also where it takes the arrays of its start, the frozen trunk's included, for its own."""
    folder, config, programs, start = whole
    mine, seen = jax.tree.map(jnp.copy, start), []

    def enough():
        return len(seen) == 1

    files = config, TASK, programs, mine, tmp_path
    assert loop.run(*files, seen.append, enough, keep_start=False) is None
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((mine.params, mine.rest)))
    again = loop.run(config, TASK, programs, start, tmp_path)
    assert again is not None and len(read_rows(tmp_path / "metrics.jsonl")) == 2
    state = with_frozen(config, programs.state)
    ours, theirs = (newest(path, config, state) for path in (tmp_path, folder))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_other_frozen_weights_are_noticed(whole, tmp_path):
    """One bit of one kernel; a checkpoint is not damaged by it, and stays where it is."""
    folder, config, programs, start = whole
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    up = start.rest["layers"]["mlp"]["up"]
    other = up["kernel"].at[0, 0, 0].set(up["kernel"][0, 0, 0] ^ 1)
    layers = {**start.rest["layers"]}
    layers["mlp"] = {**layers["mlp"], "up": {**up, "kernel": other}}
    state = programs.begin(start.replace(rest={**start.rest, "layers": layers}))
    frozen = frozen_leaves(config.model)
    with (
        Checkpoints(tmp_path / "checkpoints", frozen=frozen) as checkpoints,
        pytest.raises(DamagedError, match=r"other frozen weights .*rest.layers.mlp.up.kernel"),
    ):
        checkpoints.restore(state)
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_state_without_frozen_weights_is_refused(whole):
    folder, config, programs, _ = whole
    with pytest.raises(ValueError, match="must bring its frozen weights"):
        newest(folder, config, programs.state)


def test_a_run_is_exported_merged_and_as_adapters(whole, tmp_path):
    """Merged it loads as any folder; adapters come back to their bits beside the base."""
    folder, config, programs, _ = whole
    state = newest(folder, config, with_frozen(config, programs.state))
    trained = state.policy(config.model)
    assert export.export(export.Arguments(folder, tmp_path / "merged")) == 2
    loaded = pretrained.load(tmp_path / "merged")
    assert loaded.config.lora is None and loaded.config.param_dtype == "bfloat16"
    merged = merge(trained)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
        (loaded.params, loaded.rest),
        (merged.params, merged.rest),
    )
    assert export.export(export.Arguments(folder, tmp_path / "peft", form="peft")) == 2
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (2, 4.0)
    assert described["base_model_name_or_path"] == config.pretrained.path
    assert "q_proj" in described["target_modules"] and len(described["target_modules"]) == 7
    fresh = adapt(tiny.new_policy(dataclasses.replace(PLAIN, param_dtype="float32")), config.model)
    back = pretrained.load_adapters(tmp_path / "peft", fresh)
    jax.tree.map(np.testing.assert_array_equal, back.params, trained.params)


def test_a_run_is_evaluated_from_its_checkpoint(whole):
    folder, config, programs, _ = whole
    model = evaluated.from_run(folder, "newest", None, {}, LayoutConfig())
    state = newest(folder, config, with_frozen(config, programs.state))
    jax.tree.map(np.testing.assert_array_equal, model.policy.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, model.policy.rest, state.rest)


def test_adapters_of_another_form_are_refused(tmp_path):
    plain = tiny.new_policy(PLAIN)
    with pytest.raises(ValueError, match="has no adapters"):
        pretrained.save_adapters(tmp_path / "none", plain)
    policy = adapt(plain, dataclasses.replace(PLAIN, lora=LORA))
    pretrained.save_adapters(tmp_path / "some", policy)
    other = dataclasses.replace(LORA, rank=3)
    with pytest.raises(ValueError, match="rank 2 and alpha 4.0, the model has 3"):
        pretrained.load_adapters(
            tmp_path / "some", adapt(plain, dataclasses.replace(PLAIN, lora=other))
        )
    moe = MoEConfig(num_experts=4, experts_per_token=2, expert_width=8)
    mixture = tiny.new_policy(dataclasses.replace(PLAIN, moe=moe, lora=LORA))
    with pytest.raises(ValueError, match=r"\['down', 'gate', 'up'\] of a mixture"):
        pretrained.save_adapters(tmp_path / "mixture", mixture)
    fewer = dataclasses.replace(LORA, kernels=("query",))
    with pytest.raises(ValueError, match="v_proj"):
        pretrained.load_adapters(
            tmp_path / "some", adapt(plain, dataclasses.replace(PLAIN, lora=fewer))
        )
    with pytest.raises(ValueError, match="Load with config.whole"):
        pretrained.load(tmp_path / "some", policy.config)


def test_a_warm_start_of_adapters_keeps_them_alone(source, tmp_path):
    """Its start is found again, and the trunk comes from the files."""
    config = configuration(source)
    warm = dataclasses.replace(config.warm_start, steps=2, batch_size=8, learning_rate=1e-2)
    config = dataclasses.replace(config, warm_start=warm)
    programs = loop.build(config, TASK)
    first = starting_point(config, TASK, programs, tmp_path).policy
    again = starting_point(config, TASK, programs, tmp_path).policy
    jax.tree.map(np.testing.assert_array_equal, first, again)
    (saved,) = tmp_path.glob("*/0/state/_METADATA")
    assert "rest" not in saved.read_text()
