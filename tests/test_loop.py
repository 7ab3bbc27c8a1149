"""Whole runs: resumed ones equal uninterrupted ones; folders refuse other configurations."""

import dataclasses
import gc
import itertools
import json
import shutil
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import tasks
from occ.generation.depth import DraftDepth
from occ.models.config import LoRAConfig
from occ.tasks.task import VerifierError
from occ.training import draft_depth, loop
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    OptimizerConfig,
    PretrainedConfig,
    WarmStartConfig,
)
from occ.training.durable.bad_updates import first_nonfinite, leaf_name
from occ.training.durable.checkpoints import Checkpoints
from occ.training.durable.run_folder import RunFolder, identity, read_rows
from occ.training.gradient.calibration import build_calibration
from occ.training.optimizer import build_optimizer
from occ.training.start.demonstrations import demonstration_batch, learn_from_demonstrations
from occ.training.start.saved import load_start, save_start
from occ.training.start.starting_point import starting_point
from occ.training.state import init_state
from tests import tiny

pytestmark = pytest.mark.standard_promotion

TASK = tasks.load("arithmetic", digits=1, train_size=40, test_size=10)
CONFIG = tiny.run_config(
    "tiny",
    evaluation=EvaluationConfig(every=2, prompts=6, samples=2),
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
        return learn_from_demonstrations(loop.init_policy(CONFIG), CONFIG, TASK)


def rows_of(folder):
    """Metrics without the clock."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def newest(folder):
    state = init_state(
        loop.init_policy(CONFIG),
        build_optimizer(CONFIG.optimizer),
        build_calibration(CONFIG.mtp, 1),
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(state)


def numbers(folder):
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def final_state(folder):
    number, state, _ = newest(folder)
    return number, state


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


def unfinished(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "run")
    (folder / "result.json").unlink()
    return folder


def test_rows_without_a_checkpoint_are_no_fresh_start(whole, programs, start, tmp_path):
    folder = unfinished(whole, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match=r"rows of 4 rollouts, and no checkpoint .*checkpoints/ b"):
        loop.run(CONFIG, TASK, programs, start, folder)
    assert rows_of(folder) == rows_of(whole[0])


def test_rows_that_were_cut_go_back_to_the_checkpoint_that_fits(whole, programs, start, tmp_path):
    folder = unfinished(whole, tmp_path)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])  # within the last of four rows
    with pytest.warns(RuntimeWarning, match="4 cannot be used .*rows of 3 rollouts.* checkpoint 3"):
        result = loop.run(CONFIG, TASK, programs, start, folder)
    assert result["final"] == whole[1]["final"] and rows_of(folder) == rows_of(whole[0])


def test_before_the_first_row_there_is_a_checkpoint(programs, start, tmp_path):
    unjudged = dataclasses.replace(TASK, verifier=lambda problem, completion: None)
    with pytest.raises(VerifierError, match="last 3 rollouts could be judged.*Mend the verifier"):
        loop.run(CONFIG, unjudged, programs, start, tmp_path)
    assert (
        numbers(tmp_path) == [0, 3] and [row["reward"] for row in rows_of(tmp_path)] == [None] * 3
    )


def test_another_configuration_in_the_same_folder_is_refused(whole):
    other = dataclasses.replace(
        CONFIG, seed=1, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.5)
    )
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.01 -> 0.5, seed: 0 -> 1"):
        RunFolder(whole[0], other)


def test_fields_that_change_no_result_may_change(whole):
    layout = dataclasses.replace(CONFIG.layout, generation_rows=4)
    free = dataclasses.replace(CONFIG, layout=layout, keep_checkpoints=5, checkpoint_every=1)
    with RunFolder(whole[0], free) as files:
        assert files.result() == whole[1]
    RunFolder(whole[0], CONFIG).close()


def test_a_run_goes_on_where_a_field_has_come_since(whole, tmp_path):
    """At its default it changes nothing; at another value it is another run."""
    (tmp_path / "run").mkdir()
    older = json.loads((whole[0] / "config.json").read_text())
    del older["evaluation"]["temperature"], older["objective"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(older))
    RunFolder(tmp_path / "run", CONFIG).close()
    evaluation = dataclasses.replace(CONFIG.evaluation, temperature=0.5)
    with pytest.raises(ValueError, match=r"evaluation.temperature: 1.0 -> 0.5\)"):
        RunFolder(tmp_path / "run", dataclasses.replace(CONFIG, evaluation=evaluation))

    @dataclasses.dataclass(frozen=True)
    class Newer(type(CONFIG)):
        come_since: int = 3

    fields = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    assert identity(Newer(**fields)) == identity(CONFIG)
    others = [
        Newer(**fields, come_since=4),
        dataclasses.replace(CONFIG, pretrained=PretrainedConfig("x")),
        dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, lora=LoRAConfig())),
        dataclasses.replace(CONFIG, evaluation=evaluation),
    ]
    assert len({identity(other) for other in (CONFIG, *others)}) == 5


@pytest.mark.slow
def test_the_depth_of_drafts_is_chosen_and_kept(whole, start, tmp_path, monkeypatch):
    """What is measured at the beginning decides, also after a stop; samples are the same."""
    monkeypatch.setattr(draft_depth, "DEEPEST", 1)
    chosen = dataclasses.replace(CONFIG, layout=LayoutConfig(draft_depth="auto"))
    programs = loop.build(chosen, TASK)
    loop.run(chosen, TASK, programs, start, tmp_path, should_stop=lambda: True)
    known = newest(tmp_path).history.drafts
    assert len(known.seconds) == 2 and min(known.seconds) > 0 and 0 < known.acceptance[0] < 1
    # Drafts in every other rollout, whatever the clock said.
    monkeypatch.setattr(DraftDepth, "best", property(lambda self: 0 if self.undrafted < 1 else 1))
    monkeypatch.setattr(draft_depth, "measure", lambda *_: pytest.fail("known already"))
    loop.run(chosen, TASK, programs, start, tmp_path)
    rows, expected = rows_of(tmp_path), rows_of(whole[0])
    assert [row["reward"] for row in rows] == [row["reward"] for row in expected]
    depths = [row["rollout/draft_depth"] for row in rows]
    assert set(depths) == {0, 1} and ["rollout/acceptance" in row for row in rows] == depths
    assert newest(tmp_path).history.drafts.seconds == known.seconds


def test_the_best_is_kept_and_the_clock_goes_on(whole):
    folder, result = whole
    scores = {row["rollout"]: row["eval/sampled"] for row in rows_of(folder)[::2]}
    scores[4] = result["final"]["sampled"]
    best = max(scores, key=scores.get)
    assert result["best"] == {"rollout": best, "sampled": scores[best]}
    kept = {int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()}
    assert best in kept and 4 in kept
    assert 0 < newest(folder).history.seconds < result["wall_seconds"]


# -- updates that are not finite --------------------------------------------------------------


def poisoned(programs, calls):
    """With NaN for advantages in the given calls of the train step."""
    count = itertools.count()

    def train_step(state, batch):
        if next(count) in calls:
            batch = batch.replace(advantages=batch.advantages * jnp.nan)
        return programs.train_step(state, batch)

    return dataclasses.replace(programs, train_step=train_step)


def bad_updates(limit):
    return dataclasses.replace(CONFIG, max_bad_updates=limit, rollouts=6, checkpoint_every=100)


@pytest.mark.filterwarnings("ignore:update skipped:RuntimeWarning")
def test_bad_updates_in_a_row_end_the_run_and_leave_the_state_before(programs, start, tmp_path):
    """The third in a row is the first minibatch of the rollout after a resume."""
    before = []

    def stop_after(count):
        return lambda: len(before) == count

    config = bad_updates(3)
    sound = tmp_path / "sound"
    loop.run(config, TASK, programs, start, sound, before.append, stop_after(2))
    before.clear()
    run = tmp_path / "run"
    bad = poisoned(programs, range(4, 100))
    loop.run(config, TASK, bad, start, run, before.append, stop_after(3))
    assert newest(run).history.bad_updates == 2
    message = (
        r"3 updates in a row were skipped; in the last, the first non-finite leaf is the gradient "
        r"of embedding\S* \(rollout 3, minibatch 0; .*loss/rl = nan.*max_bad_updates is 3"
    )
    with pytest.raises(FloatingPointError, match=message):
        loop.run(config, TASK, poisoned(programs, range(100)), start, run)
    number, state, history = newest(run)
    assert number == 4 and history.bad_updates == 3 and state.skipped == 4
    with pytest.raises(FloatingPointError, match=message):  # as long as the limit is the same
        loop.run(config, TASK, programs, start, run)
    further = dataclasses.replace(config, max_bad_updates=5)
    assert loop.run(further, TASK, programs, start, run)["skipped"] == 4
    chex.assert_trees_all_equal(
        (state.params, state.opt_state),
        (final_state(sound)[1].params, final_state(sound)[1].opt_state),
    )
    assert [row["skipped"] for row in rows_of(run)] == [0, 0, 2, 4, 4, 4]


def test_a_good_update_between_bad_ones_breaks_the_row(programs, start, tmp_path):
    config = dataclasses.replace(bad_updates(2), rollouts=3)
    with pytest.warns(RuntimeWarning, match="update skipped: the first non-finite leaf") as caught:
        result = loop.run(config, TASK, poisoned(programs, {1, 3, 5}), start, tmp_path)
    assert result["skipped"] == 3 == len(caught)


def test_the_first_bad_leaf_is_named():
    params = {"b": [jnp.ones(2), jnp.ones(3)], "c": jnp.ones(())}
    for leaf, name in enumerate(["b.0", "b.1", "c"]):
        gradient = jax.tree.unflatten(
            jax.tree.structure(params),
            [x * (jnp.inf if i >= leaf else 1) for i, x in enumerate(jax.tree.leaves(params))],
        )
        index = int(first_nonfinite((gradient, jnp.nan)))
        assert index == leaf and leaf_name(params, index) == f"the gradient of {name}"
    assert "RL loss" in leaf_name(params, int(first_nonfinite((params, jnp.asarray(jnp.nan)))))
    assert first_nonfinite((params, jnp.asarray(1.0))) == -1


def test_training_leaves_the_starting_point_as_it_was(programs, start, tmp_path):
    before = jax.tree.map(jnp.copy, start)
    loop.run(dataclasses.replace(CONFIG, rollouts=1), TASK, programs, start, tmp_path)
    chex.assert_trees_all_equal(start, before)


def test_an_alarm_is_a_warning_that_names_the_module(programs, start, tmp_path):
    config = dataclasses.replace(CONFIG, rollouts=1, optimizer=OptimizerConfig(learning_rate=1e-30))
    with pytest.warns(RuntimeWarning, match="MTP module 1 did not change in an update") as caught:
        loop.run(config, TASK, loop.build(config, TASK, programs.rollout), start, tmp_path)
    rows = rows_of(tmp_path)
    assert len(caught) == rows[0]["alarm/module_unchanged"][0] >= 1


def test_a_kl_term_pulls_towards_the_starting_point(whole, programs, start, tmp_path):
    """Beside the policy loss, which alone moves away; with the same key and prompts."""
    objective = dataclasses.replace(CONFIG.objective, kl_coefficient=5.0, kl_estimator="k2")
    config = dataclasses.replace(CONFIG, objective=objective)
    loop.run(config, TASK, loop.build(config, TASK, programs.rollout), start, tmp_path)

    def distance(folder):
        params = final_state(folder)[1].params
        change = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), params, start.params)
        return sum(jax.tree.leaves(change["layers"]))

    assert distance(tmp_path) < distance(whole[0])


# -- the warm start ---------------------------------------------------------------------------


def test_the_warm_start_learns_from_demonstrations(programs):
    fresh = loop.init_policy(CONFIG)
    losses = []
    learn_from_demonstrations(fresh, CONFIG, TASK, lambda step, all: losses.append(all))
    assert len(losses[0]) == 2 and np.all(np.array(losses[-1]) < 0.8 * np.array(losses[0]))
    none = dataclasses.replace(CONFIG, warm_start=WarmStartConfig(steps=0))
    assert learn_from_demonstrations(fresh, none, TASK) is fresh


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
    saved = start.params, start.rest
    save_start(tmp_path, {"seed": 0}, saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chex.assert_trees_all_equal(load_start(tmp_path, {"seed": 0}, saved), saved)
        assert load_start(tmp_path, {"seed": 1}, saved) is None
    (kept,) = tmp_path.iterdir()
    assert json.loads((kept / "decides.json").read_text()) == {"seed": 0}


def test_a_damaged_start_is_set_aside(start, tmp_path):
    """One bit in its arrays; a file cut off; that of other settings in its place."""
    saved, decides = (start.params, start.rest), {"seed": 0}

    def flip(target):
        for file in (target / "0" / "state" / "ocdbt.process_0" / "d").iterdir():
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)

    def cut(target):
        file = target / "0" / "state" / "_METADATA"
        file.write_bytes(file.read_bytes()[:50])

    def exchange(target):
        save_start(tmp_path / "other", {"seed": 1}, saved)
        shutil.rmtree(target)
        shutil.copytree(next((tmp_path / "other").iterdir()), target)

    for damage in (flip, cut, exchange):
        folder = tmp_path / damage.__name__
        save_start(folder, decides, saved)
        (target,) = folder.iterdir()
        damage(target)
        with pytest.warns(RuntimeWarning, match=rf"{target.name} cannot be used .*made again"):
            assert load_start(folder, decides, saved) is None
        save_start(folder, decides, saved)
        chex.assert_trees_all_equal(load_start(folder, decides, saved), saved)
        assert {path.name for path in folder.iterdir()} == {target.name, f"{target.name}.damaged"}
    gc.collect()


def test_what_is_not_finite_is_neither_kept_nor_trained(programs, start, tmp_path):
    broken = start.replace(params=jax.tree.map(lambda x: x * jnp.nan, start.params))
    words = "starts from is not finite: the first such parameter is embedding"
    with pytest.raises(FloatingPointError, match=words):
        loop.run(CONFIG, TASK, programs, broken, tmp_path / "broken")
    optimizer = OptimizerConfig(learning_rate=1e38, weight_decay=1e3)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    huge = loop.build(config, TASK, programs.rollout)
    with pytest.raises(FloatingPointError, match=r"a finite gradient made embedding\S* infinite"):
        loop.run(config, TASK, huge, start, tmp_path / "huge")
    assert numbers(tmp_path / "huge") == [0] and rows_of(tmp_path / "huge") == []
    warm = dataclasses.replace(CONFIG.warm_start, steps=4, learning_rate=1e38)
    config = dataclasses.replace(CONFIG, warm_start=warm)
    with pytest.raises(FloatingPointError, match="the model after the warm start is not finite"):
        starting_point(config, TASK, programs, tmp_path / "starts")
    assert not (tmp_path / "starts").exists()
    half = dataclasses.replace(CONFIG.model, param_dtype="float16")
    with pytest.raises(ValueError, match="param_dtype='float16' .*bfloat16"):
        dataclasses.replace(CONFIG, model=half)
