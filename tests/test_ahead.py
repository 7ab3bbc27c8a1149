"""Rollouts that are sampled one step ahead: whose samples they are, when, and after a kill."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ import tasks
from occ.generation.engines.config import EngineConfig
from occ.generation.engines.protocol import EngineError
from occ.training import ahead, loop
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from occ.training.durable.run_folder import RunFolder, read_rows
from occ.training.rollout import Drawn, draw, requests
from tests import tiny
from tests.engine_server import Serving

pytestmark = pytest.mark.standard_promotion

TASK = dataclasses.replace(
    tasks.load("arithmetic", digits=1, train_size=40, test_size=10),
    verifier=lambda problem, completion: float(sum(map(ord, completion)) % 2),
)
CONFIG = tiny.run_config(
    "ahead",
    engine=EngineConfig(overlap=True),
    layout=LayoutConfig(draft_depth=1),
    evaluation=EvaluationConfig(every=2, prompts=6, samples=2),
    optimizer=OptimizerConfig(learning_rate=3e-2),
    rollouts=5,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def programs():
    return loop.build(CONFIG, TASK)


@pytest.fixture(scope="module")
def start():
    return tiny.policy(CONFIG, tiny.build_model(CONFIG.model))


def copied(policy):
    return jax.tree.map(jnp.copy, policy)


def metrics_of(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]


@pytest.fixture(scope="module")
def whole(programs, start, tmp_path_factory):
    """An undisturbed run, with the policy and the minibatch of every rollout."""
    folder, seen = tmp_path_factory.mktemp("ahead") / "run", []
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        collect = loop.collect

        def watched(programs, policy, *arguments):
            rollout = collect(programs, policy, *arguments)
            seen.append((copied(policy), rollout.batch))
            return rollout

        patch.setattr(loop, "collect", watched)
        loop.run(CONFIG, TASK, programs, start, folder)
    return folder, seen


def distance(programs, policy, batch):
    """Largest |log-prob of this policy - log-prob of whoever sampled|."""
    scores = programs.rollout.score(policy, batch.tokens, batch.segment_ids)
    there = np.asarray(batch.rollout_log_prob)[batch.response_mask]
    return np.abs(np.asarray(scores.log_prob)[batch.response_mask] - there).max()


def test_samples_are_of_the_policy_before_the_updates_in_hand(programs, whole):
    _, seen = whole
    policies, batches = zip(*seen, strict=True)
    assert distance(programs, policies[0], batches[0]) < 1e-4
    for number in range(1, CONFIG.rollouts):
        assert distance(programs, policies[number - 1], batches[number]) < 1e-4
        assert distance(programs, policies[number], batches[number]) > 1e-3
        old = programs.rollout.score(
            policies[number], batches[number].tokens, batches[number].segment_ids
        )
        np.testing.assert_allclose(old.log_prob, batches[number].old_log_prob, atol=1e-5)


def test_what_has_moved_in_between_is_weighed():
    assert CONFIG.importance_cap == 2
    without = dataclasses.replace(CONFIG, engine=EngineConfig())
    assert without.importance_cap is None
    own = dataclasses.replace(CONFIG, objective=ObjectiveConfig(importance_cap=5.0))
    assert own.importance_cap == 5
    with pytest.raises(ValueError, match="sleep frees the device"):
        EngineConfig(kind="vllm", overlap=True, sleep=True)


def test_a_stopped_run_goes_on_to_the_same_bits(programs, start, whole, tmp_path):
    folder = tmp_path / "run"
    for stop in (2, 3):

        def enough(folder=folder, stop=stop):
            return len(metrics_of(folder)) >= stop

        assert loop.run(CONFIG, TASK, programs, start, folder, should_stop=enough) is None
        assert (folder / f"ahead-{stop}.npz").exists()
    loop.run(CONFIG, TASK, programs, start, folder)
    assert metrics_of(folder) == metrics_of(whole[0])


class KilledError(Exception):
    pass


def test_a_killed_run_goes_back_to_its_checkpoint(programs, start, whole, tmp_path):
    folder = tmp_path / "run"

    def kill(row):
        if row["rollout"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        loop.run(CONFIG, TASK, programs, start, folder, on_row=kill)
    assert (folder / "ahead-2.npz").exists()
    loop.run(CONFIG, TASK, programs, start, folder)
    assert metrics_of(folder) == metrics_of(whole[0])
    kept = {file.name for file in folder.glob("ahead-*")}
    assert 0 < len(kept) <= CONFIG.keep_checkpoints + 1  # one may wait for the next checkpoint


def _changed(content):
    """Bits of a compressed array turned."""
    middle = content.index(b"tokens.npy") + 60
    return (
        content[:middle]
        + bytes(255 - x for x in content[middle : middle + 8])
        + content[middle + 8 :]
    )


@pytest.mark.parametrize("damage", [lambda content: content[:200], _changed, None])
def test_lost_samples_are_drawn_again_and_said(programs, start, whole, tmp_path, damage):
    folder = tmp_path / "run"

    def enough():
        return len(metrics_of(folder)) >= 3

    loop.run(CONFIG, TASK, programs, start, folder, should_stop=enough)
    file = folder / "ahead-3.npz"
    content = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage(content))
    with pytest.warns(RuntimeWarning, match=r"samples of rollout 3 .* not to the same bits"):
        loop.run(CONFIG, TASK, programs, start, folder)
    assert metrics_of(folder)[:3] == metrics_of(whole[0])[:3]
    assert len(metrics_of(folder)) == CONFIG.rollouts


def test_what_one_process_cannot_read_all_draw_again(programs, start, tmp_path, monkeypatch):
    """Half of a run on samples of the old policy, half on others, would be no run."""
    with RunFolder(tmp_path / "run", CONFIG) as files:
        before, there, elsewhere = (ahead.Ahead(CONFIG, TASK, files) for _ in range(3))
        before.begin(2, programs.rollout, start)
        before.save(2, ())
        there.restore(2)
        assert there._begun is not None
        monkeypatch.setattr(ahead, "any_of_all", lambda flag: True)
        with pytest.warns(RuntimeWarning, match="by another process"):
            elsewhere.restore(2)
        assert elsewhere._begun is None


def test_samples_are_kept_whole(programs, start):
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(advantage="remax"))
    drawn = draw(programs.rollout.engine, start, requests(programs.rollout, config, TASK, 3))
    drawn = drawn._replace(metrics={"engine/generate_seconds": 0.25})
    again = ahead._from_bytes(ahead._to_bytes(drawn))
    assert isinstance(again, Drawn) and again.greedy is not None
    jax.tree.map(np.testing.assert_array_equal, again, drawn)
    kinds = [[x.dtype for x in jax.tree.leaves(one.sampled)] for one in (again, drawn)]
    assert kinds[0] == kinds[1]
    assert again.metrics == drawn.metrics


@pytest.mark.slow
def test_an_engine_of_its_own_samples_while_the_run_trains(start, tmp_path):
    """The train step does not return before the engine has the next request."""
    with Serving(tmp_path) as serving:
        config = dataclasses.replace(
            CONFIG,
            engine=EngineConfig(kind="vllm", address=serving.address, overlap=True),
            layout=LayoutConfig(),
            evaluation=EvaluationConfig(every=99, prompts=2, samples=1),
            optimizer=OptimizerConfig(learning_rate=3e-3),
            rollouts=3,
        )
        programs = loop.build(config, TASK)
        came, requests_so_far, trained, rows = threading.Condition(), [], [], []
        generate = serving.model.generate

        def announced(sampling, arrays):
            with came:
                requests_so_far.append(sampling)
                came.notify_all()
            return generate(sampling, arrays)

        def step(state, minibatch):
            rollout = len(trained) // config.rollout.minibatches
            if rollout + 1 < config.rollouts:
                expected = 2 + rollout + 2  # two evaluate, one is each rollout's, and the next's
                with came:
                    assert came.wait_for(lambda: len(requests_so_far) >= expected, 60)
            trained.append(rollout)
            return programs.train_step(state, minibatch)

        serving.model.generate = announced
        overlapping = dataclasses.replace(programs, train_step=step)
        loop.run(config, TASK, overlapping, start, tmp_path / "run", rows.append)
        programs.rollout.engine.close()
    assert len(rows) == 3
    assert rows[0]["mismatch/largest"] < 1e-4
    assert all(row["mismatch/largest"] > 1e-3 for row in rows[1:])  # a step of the policy
    assert all("engine/waited_seconds" in row for row in rows)


def test_an_engine_that_fails_ahead_ends_the_run(start, tmp_path):
    with Serving(tmp_path) as serving:
        config = dataclasses.replace(
            CONFIG,
            engine=EngineConfig(kind="vllm", address=serving.address, overlap=True),
            layout=LayoutConfig(),
        )
        programs = loop.build(config, TASK)
        generate, calls = serving.model.generate, []

        def fails(sampling, arrays):
            calls.append(sampling)
            if len(calls) > 3:  # after the first evaluation and rollout
                raise RuntimeError("no such kernel")
            return generate(sampling, arrays)

        serving.model.generate = fails
        with pytest.raises(EngineError, match="no such kernel"):
            loop.run(config, TASK, programs, start, tmp_path / "run")
        programs.rollout.engine.close()
