"""Whole runs: resumed ones equal uninterrupted ones; folders refuse other configurations."""

import dataclasses
import json
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import tasks
from occ.training import loop
from occ.training.calibration import build_calibration
from occ.training.checkpoints import Checkpoints
from occ.training.config import (
    EvaluationConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
    WarmStartConfig,
    regime,
)
from occ.training.optimizer import build_optimizer
from occ.training.run_folder import RunFolder, read_rows
from occ.training.start import load_start, save_start
from occ.training.state import init_state
from occ.training.warm_start import demonstration_batch, warm_start
from tests import tiny

pytestmark = pytest.mark.standard_promotion

TASK = tasks.load("arithmetic", digits=1, train_size=40, test_size=10)
CONFIG = TrainConfig(
    name="tiny",
    model=tiny.model_config(1, vocab_size=14),
    task="arithmetic",
    mtp=regime("occ_paper"),
    rollout=RolloutConfig(prompts=4, samples=4, minibatches=2),
    evaluation=EvaluationConfig(every=2, prompts=6, samples=2),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    warm_start=WarmStartConfig(steps=60, batch_size=32, learning_rate=1e-2),
    rollouts=4,
    checkpoint_every=3,
)


@pytest.fixture(scope="module")
def programs():
    return loop.build(CONFIG, TASK)


@pytest.fixture(scope="module")
def start(programs):
    with jax.numpy_dtype_promotion("standard"):
        params, rest = loop.init_model(CONFIG)
        return warm_start(programs.graphdef, params, rest, CONFIG, TASK), rest


def rows_of(folder):
    """Metrics without the clock."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def final_state(folder):
    state = init_state(
        *loop.init_model(CONFIG),
        build_optimizer(CONFIG.optimizer),
        build_calibration(CONFIG.mtp, 1),
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    number, restored, _ = checkpoints.restore(state)
    checkpoints.close()
    return number, restored


@pytest.fixture(scope="module")
def whole(programs, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        return folder, loop.run(CONFIG, TASK, programs, start, folder)


def test_a_run_leaves_its_files(whole):
    folder, result = whole
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "config.json").read_text())["mtp"]["measure"] == "log_ratios"
    assert "jax" in json.loads((folder / "environment.json").read_text())["versions"]
    rows = rows_of(folder)
    assert [row["rollout"] for row in rows] == [0, 1, 2, 3]
    assert ["eval/greedy" in row for row in rows] == [True, False, True, False]
    assert result["reward_area"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert len(read_rows(folder / "samples.jsonl")) == 16
    number, state = final_state(folder)
    assert number == 4 and state.step == 8  # the trained model is kept


def test_a_resumed_run_is_the_uninterrupted_one(whole, programs, start, tmp_path):
    """Stopped after the second rollout, whose checkpoint is then the newest."""
    seen = []
    stopped = loop.run(CONFIG, TASK, programs, start, tmp_path, seen.append, lambda: len(seen) == 2)
    assert stopped is None and len(seen) == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a crash in the third
        file.write('{"rollout": 2, "rew')
    result = loop.run(CONFIG, TASK, programs, start, tmp_path)
    assert rows_of(tmp_path) == rows_of(whole[0])
    assert result["final"] == whole[1]["final"]
    chex.assert_trees_all_equal(final_state(tmp_path)[1], final_state(whole[0])[1])


def test_a_crash_goes_back_to_the_last_checkpoint(whole, programs, start, tmp_path):
    def crash(row):
        if row["rollout"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(CONFIG, TASK, programs, start, tmp_path, crash)
    assert len(rows_of(tmp_path)) == 4
    repeated = []
    loop.run(CONFIG, TASK, programs, start, tmp_path, repeated.append)
    assert [row["rollout"] for row in repeated] == [3]
    assert rows_of(tmp_path) == rows_of(whole[0])


def test_a_finished_run_is_not_repeated(whole, programs, start):
    def never(row):
        raise AssertionError

    assert loop.run(CONFIG, TASK, programs, start, whole[0], never) == whole[1]


def test_another_configuration_in_the_same_folder_is_refused(whole):
    other = dataclasses.replace(
        CONFIG, seed=1, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.5)
    )
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.01 -> 0.5, seed: 0 -> 1"):
        RunFolder(whole[0], other)


def test_training_leaves_the_starting_point_as_it_was(programs, start, tmp_path):
    before = jax.tree.map(jnp.copy, start)
    loop.run(dataclasses.replace(CONFIG, rollouts=1), TASK, programs, start, tmp_path)
    chex.assert_trees_all_equal(start, before)


def test_an_alarm_is_a_warning_that_names_the_module(start, tmp_path):
    config = dataclasses.replace(CONFIG, rollouts=1, optimizer=OptimizerConfig(learning_rate=1e-30))
    with pytest.warns(RuntimeWarning, match="MTP module 1 did not change in an update") as caught:
        loop.run(config, TASK, loop.build(config, TASK), start, tmp_path)
    rows = rows_of(tmp_path)
    assert len(caught) == rows[0]["alarm/module_unchanged"][0] >= 1


def test_a_kl_term_pulls_towards_the_starting_point(start, tmp_path):
    """Beside the policy loss, which alone moves away; with the same key and prompts."""
    distance = {}
    for coefficient in (0.0, 5.0):
        objective = dataclasses.replace(
            CONFIG.objective, kl_coefficient=coefficient, kl_estimator="k2"
        )
        config = dataclasses.replace(CONFIG, objective=objective)
        folder = tmp_path / str(coefficient)
        loop.run(config, TASK, loop.build(config, TASK), start, folder)
        params = final_state(folder)[1].params
        change = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), params, start[0])
        distance[coefficient] = sum(jax.tree.leaves(change["layers"]))
    assert distance[5.0] < distance[0.0]


# -- the warm start ---------------------------------------------------------------------------


def test_the_warm_start_learns_from_demonstrations(programs):
    fresh = loop.init_model(CONFIG)
    losses = []
    warm_start(programs.graphdef, *fresh, CONFIG, TASK, lambda step, all: losses.append(all))
    assert len(losses[0]) == 2 and np.all(np.array(losses[-1]) < 0.8 * np.array(losses[0]))
    none = dataclasses.replace(CONFIG, warm_start=WarmStartConfig(steps=0))
    assert warm_start(programs.graphdef, *fresh, none, TASK) is fresh[0]


def test_demonstrations_hold_prompt_answer_and_end():
    config = dataclasses.replace(
        CONFIG, warm_start=dataclasses.replace(CONFIG.warm_start, wrong_fraction=0.0)
    )
    tokens, segment_ids, mask = demonstration_batch(config, TASK, 0)
    for row in range(4):
        text = TASK.tokenizer.decode(tokens[row])
        left, right = text.split("=")
        assert eval(left) == int(right)  # our own prompt, not a model's answer
        answer = tokens[row][mask[row]]
        assert answer[-1] == TASK.tokenizer.end_id and len(answer) == len(right) + 1
        assert (segment_ids[row] > 0).sum() == len(text) + 1
    again = demonstration_batch(config, TASK, 0)[0]
    assert np.array_equal(again, tokens)
    assert not np.array_equal(demonstration_batch(config, TASK, 1)[0], tokens)


def test_a_saved_start_is_found_by_what_decided_it(start, tmp_path):
    save_start(tmp_path, {"seed": 0}, start)
    with warnings.catch_warnings():
        chex.assert_trees_all_equal(load_start(tmp_path, {"seed": 0}, start), start)
    assert load_start(tmp_path, {"seed": 1}, start) is None
