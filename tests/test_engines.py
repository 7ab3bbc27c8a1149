"""Rollout engines in other processes: what they hold, what they answer, and how they fail.

The server is the real one, around our own model in place of vLLM's; tests/test_vllm.py has vLLM.
"""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from occ import tasks
from occ.generation.engines import (
    EngineError,
    MismatchError,
    Request,
    RolloutEngine,
    StaleWeightsError,
)
from occ.generation.engines import connection as connections
from occ.generation.engines.config import EngineConfig
from occ.generation.engines.connection import Connection
from occ.generation.engines.in_process import InProcessEngine
from occ.generation.engines.server import wire
from occ.generation.engines.vllm import VLLMEngine, assemble
from occ.generation.sampling import SamplingConfig
from occ.models import pretrained
from occ.models.config import MoEConfig
from occ.training import loop
from occ.training.config import EvaluationConfig, ObjectiveConfig, RolloutConfig
from occ.training.evaluate import evaluate
from occ.training.rollout import build_programs, collect
from tests import tiny
from tests.engine_server import Serving

TASK = dataclasses.replace(
    tasks.load("arithmetic", digits=1, train_size=40, test_size=10),
    verifier=lambda problem, completion: float(len(completion) % 2),
)
SCRIPT = pathlib.Path(__file__).with_name("engine_server.py")
SAMPLING = SamplingConfig(max_new_tokens=3, stop_tokens=(1,), pad_token=0)


def config_for(serving, **changes):
    engine = EngineConfig(kind="vllm", address=serving.address, **changes.pop("engine", {}))
    return tiny.run_config(
        "engines", engine=engine, evaluation=EvaluationConfig(prompts=4, samples=1), **changes
    )


def policy_for(config, seed=0):
    return tiny.policy(config, tiny.build_model(config.model, seed))


@pytest.fixture
def serving(tmp_path):
    with Serving(tmp_path) as one:
        yield one


@pytest.fixture
def setting(serving):
    """A configuration, its programs and the server's model."""
    config = config_for(serving)
    programs = build_programs(config, TASK)
    yield config, programs, serving.model
    programs.engine.close()


def request_of(rows=2, **sampling):
    prompts = np.array([[0, 5, 6], [3, 4, 5]], np.int32)[:rows]
    mask = prompts > 0
    return Request(
        prompts, mask, dataclasses.replace(SAMPLING, **sampling), jax.random.key(0), samples=2
    )


def answer(rows, **changes):
    return {
        "tokens": np.ones(rows, np.int32),
        "log_prob": np.full(rows, -0.5, np.float32),
        "lengths": np.ones(rows, np.int32),
        "finished": np.ones(rows, bool),
    } | changes


def test_a_rollout_does_not_care_which_engine_samples(setting):
    config, programs, model = setting
    policy = policy_for(config)
    rollout = collect(programs, policy, config, TASK, 0)
    inside = dataclasses.replace(programs, external=None)
    own_config = dataclasses.replace(config, engine=EngineConfig())
    own = collect(inside, policy, own_config, TASK, 0)
    assert isinstance(programs.engine, RolloutEngine)
    assert isinstance(inside.engine, RolloutEngine) and isinstance(inside.engine, InProcessEngine)
    for name in ("tokens", "segment_ids", "response_mask", "rollout_log_prob"):
        there, here = getattr(rollout.batch, name), getattr(own.batch, name)
        assert (there.shape, there.dtype) == (here.shape, here.dtype)
    columns = TASK.max_prompt_tokens
    np.testing.assert_array_equal(rollout.batch.tokens[:, :columns], own.batch.tokens[:, :columns])
    mask = rollout.batch.response_mask
    np.testing.assert_allclose(
        rollout.batch.rollout_log_prob[mask], rollout.batch.old_log_prob[mask], atol=1e-4
    )
    assert rollout.metrics["mismatch/largest"] < 1e-4
    assert rollout.metrics["mismatch/weight"] == pytest.approx(1, abs=1e-4)
    assert rollout.metrics["engine/weights_compared"] == 1
    assert not {name for name in own.metrics if name.startswith(("engine/", "mismatch/"))}
    assert rollout.metrics["rollout/padding_waste"] == 0
    again = collect(programs, policy, config, TASK, 0)
    np.testing.assert_array_equal(again.batch.tokens, rollout.batch.tokens)
    assert len(model.folders) == 1  # the very same arrays are not sent again
    assert set(evaluate(programs, policy, config, TASK)) == {"greedy", "sampled", "mtp_acceptance"}


def test_every_update_is_handed_over_with_its_modules(setting):
    config, programs, model = setting
    first = policy_for(config)
    collect(programs, first, config, TASK, 0)
    second = first.replace(params=jax.tree.map(lambda x: x * 1.5, first.params))
    rollout = collect(programs, second, config, TASK, 1)
    assert rollout.metrics["mismatch/largest"] < 1e-4
    assert len(set(model.folders)) == 2
    held = jax.tree.map(np.asarray, model.policy.params)
    jax.tree.map(np.testing.assert_array_equal, held, jax.tree.map(np.asarray, second.params))
    assert "mtp" in held
    assert not pathlib.Path(model.folders[0]).exists()  # what nobody reads any more is deleted
    assert pathlib.Path(model.folders[1]).exists()


def test_a_server_that_keeps_its_old_weights_is_caught_by_its_log_probs(setting):
    """The planted stale weight of a server that lies about what it holds."""
    config, programs, model = setting
    first = policy_for(config)
    collect(programs, first, config, TASK, 0)
    second = first.replace(params=jax.tree.map(lambda x: x * 1.5, first.params))
    model.keeps_old = True
    with pytest.raises(MismatchError, match="nats from those of the policy.*holds other weights"):
        collect(programs, second, config, TASK, 1)


def test_a_server_that_finds_other_weights_in_its_model_is_not_used(setting):
    config, programs, model = setting
    model.wrong = ["lm_head.weight"]
    with pytest.raises(StaleWeightsError, match=r"does not hold what .* does in \['lm_head"):
        collect(programs, policy_for(config), config, TASK, 0)
    model.wrong = []
    collect(programs, policy_for(config), config, TASK, 0)  # and is used again when it does


def test_files_that_are_not_what_was_announced_are_refused(setting, monkeypatch):
    """The folder of the update before, in place of this one's."""
    config, programs, _ = setting
    collect(programs, policy_for(config), config, TASK, 0)
    engine = programs.engine
    write = engine._handover.write
    older = next(iter(engine._handover._before))
    monkeypatch.setattr(
        engine._handover, "write", lambda policy: write(policy)._replace(folder=older)
    )
    with pytest.raises(StaleWeightsError, match=r"was announced: the folder is stale"):
        collect(programs, policy_for(config, 1), config, TASK, 1)
    monkeypatch.setattr(engine._handover, "write", write)
    collect(programs, policy_for(config, 1), config, TASK, 1)


def test_weights_that_another_run_loaded_in_between_are_noticed(setting, serving):
    config, programs, _ = setting
    policy = policy_for(config)
    collect(programs, policy, config, TASK, 0)
    other = build_programs(config, TASK)
    collect(other, policy_for(config, 1), config, TASK, 0)
    with pytest.raises(StaleWeightsError, match="Has another run loaded its own in between"):
        collect(programs, policy, config, TASK, 1)
    other.engine.close()


def test_tensors_that_the_engine_has_no_place_for(setting):
    config, programs, model = setting
    model.unlike = ("model.mtp_layers.0.input_proj.weight",)
    collect(programs, policy_for(config), config, TASK, 0)  # modules, which do not draft there
    model.unlike = ("model.norm.weight",)
    with pytest.raises(StaleWeightsError, match=r"no place for 1 tensors.*model\.norm\.weight"):
        collect(programs, policy_for(config, 1), config, TASK, 0)


def test_wrong_log_probs_end_the_run(setting):
    config, programs, model = setting
    model.shift = -0.4
    with pytest.raises(MismatchError, match="0.4 nats"):
        collect(programs, policy_for(config), config, TASK, 0)
    model.shift = -0.2  # could be rounding, of a strange engine: it is measured
    rollout = collect(programs, policy_for(config), config, TASK, 0)
    assert rollout.metrics["mismatch/largest"] == pytest.approx(0.2, abs=1e-3)
    assert rollout.metrics["mismatch/weight"] == pytest.approx(np.exp(0.2), abs=1e-3)
    kl = np.exp(0.2) - 1 - 0.2
    assert rollout.metrics["mismatch/kl"] == pytest.approx(kl, abs=1e-3)
    capped = dataclasses.replace(config, objective=ObjectiveConfig(importance_cap=1.1))
    rollout = collect(programs, policy_for(config), capped, TASK, 0)
    assert rollout.metrics["mismatch/truncated"] == 1
    assert rollout.metrics["mismatch/weight"] == pytest.approx(1.1)


def test_engines_are_corrected_for_by_default(serving):
    assert config_for(serving).importance_cap == 2
    assert tiny.run_config("own").importance_cap is None
    objective = ObjectiveConfig(importance_cap=5.0)
    assert config_for(serving, objective=objective).importance_cap == 5
    assert config_for(serving, engine={"importance_cap": None}).importance_cap is None


@pytest.mark.standard_promotion
def test_a_run_with_an_engine(serving, tmp_path):
    """Two rollouts of the loop itself: each samples with the weights of the update before."""
    config = config_for(serving, rollouts=2, engine={"sleep": True})
    programs = loop.build(config, TASK)
    rows = []
    start = policy_for(config)
    result = loop.run(config, TASK, programs, start, tmp_path / "run", rows.append)
    programs.rollout.engine.close()
    assert result["rollouts"] == 2 and len(rows) == 2
    assert all(row["mismatch/largest"] < 1e-4 for row in rows)
    assert len(set(serving.model.folders)) >= 2


def test_seeds_are_of_the_key_and_the_row():
    seeds = request_of().seeds()
    assert seeds.shape == (4,) and len(set(seeds.tolist())) == 4 and (seeds >= 0).all()
    np.testing.assert_array_equal(request_of(rows=1).seeds(), seeds[:2])
    other = dataclasses.replace(request_of(), key=jax.random.key(1)).seeds()
    assert not set(other.tolist()) & set(seeds.tolist())


def test_answers_become_a_generation():
    made = answer(
        6,
        tokens=np.array([7, 1, 8, 9, 9, 1], np.int32),
        log_prob=-np.arange(6, dtype=np.float32),
        lengths=np.array([2, 2, 1, 1], np.int32),
        finished=np.array([True, False, False, True]),
    )
    counts = {"drafts": [3], "accepted_tokens_per_pos": [2, 1]}
    got = assemble(request_of(), made, counts, draft_depth=2)
    np.testing.assert_array_equal(got.tokens[:, 3:], [[7, 1, 0], [8, 9, 0], [9, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(got.tokens[:, :3], [[0, 5, 6]] * 2 + [[3, 4, 5]] * 2)
    np.testing.assert_array_equal(got.log_prob[:, 3:].sum(axis=1), [-1, -5, -4, -5])
    np.testing.assert_array_equal(got.response_mask.sum(axis=1), made["lengths"])
    assert not got.response_mask[:, :3].any()
    assert (int(got.work.passes), got.work.judged.tolist()) == (6 - 3, [3, 2])
    assert got.work.acceptance == (2 / 3, 1 / 2)
    greedy = assemble(request_of(temperature=0.0), made, {})
    assert not greedy.log_prob.any()  # as in this process: there is no distribution


def test_experts_find_their_tokens():
    """Two prompts of two and three tokens, of two responses each; layer 0 has no experts."""
    request = request_of(keep_experts=True)
    lengths = np.array([2, 2, 1, 1], np.int32)
    seen = np.array([3, 3, 3, 3], np.int32)  # prompt and response, but for the last token
    experts = np.arange(12 * 3 * 2, dtype=np.int16).reshape(12, 3, 2)
    made = answer(4, lengths=lengths) | {"experts": experts, "experts_lengths": seen}
    made |= {"tokens": np.ones(6, np.int32), "log_prob": np.zeros(6, np.float32)}
    got = assemble(request, made, {}, first_sparse_layer=1).experts
    assert got.shape == (2, 2, 4, 6)
    np.testing.assert_array_equal(got[0, 0, 0], [-1, 2, 8, 14, -1, -1])  # token t is 2 + 6 t
    np.testing.assert_array_equal(got[1, 1, 0], [-1, 5, 11, 17, -1, -1])
    np.testing.assert_array_equal(got[0, 0, 3], [56, 62, 68, -1, -1, -1])
    for wrong in ({"experts": experts[:5]}, {"experts_lengths": seen - 2}, {"experts": None}):
        some = {name: value for name, value in (made | wrong).items() if value is not None}
        with pytest.raises(EngineError, match="asked for the experts of 4 sequences of 4"):
            assemble(request, some, {}, first_sparse_layer=1)


def test_experts_of_an_engine_are_replayed(serving):
    model = tiny.model_config(1, vocab_size=14, moe=MoEConfig(4, 2, 8))
    rollout = RolloutConfig(prompts=4, samples=4, minibatches=2, routing_replay=True)
    config = config_for(serving, model=model, rollout=rollout)
    programs = build_programs(config, TASK)
    there = collect(programs, policy_for(config), config, TASK, 0).batch
    programs.engine.close()
    assert there.experts.shape == (1, 2, *there.tokens.shape)
    seen = (there.experts >= 0).all(axis=(0, 1))
    assert seen.sum() == (there.segment_ids > 0).sum() - len(seen)
    np.testing.assert_allclose(
        there.old_log_prob[there.response_mask],
        there.rollout_log_prob[there.response_mask],
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": np.array([1, 1, 1, 4], np.int32)},
        {"lengths": np.array([1, 1, 2, 0], np.int32)},
        {"tokens": np.ones(3, np.int32)},
        {"log_prob": np.array([-1, np.nan, -1, -1], np.float32)},
        {"log_prob": np.array([-1, 0.5, -1, -1], np.float32)},
        {"finished": np.ones(3, bool)},
    ],
)
def test_an_answer_that_is_none_is_refused(changes):
    with pytest.raises(EngineError, match="the engine's answer is none to 4 rows of 1 to 3"):
        assemble(request_of(), answer(4, **changes), {})


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """Engines around processes that fail in the way that is named."""
    engines = []

    def start(how, **changes):
        config = EngineConfig(kind="vllm", folder=str(tmp_path), **changes)
        command = (sys.executable, str(SCRIPT), how)
        connection = Connection(config, command)
        engine = VLLMEngine(config, tiny.model_config(1), 8, connection=connection)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        process = engine._connection._process
        if process is not None and process.poll() is None:
            os.kill(process.pid, signal.SIGCONT)  # that hangs would not end
        engine.close()


def tiny_policy():
    return tiny.policy(tiny.run_config("engines", model=tiny.model_config(1)), built())


def built():
    return tiny.build_model(tiny.model_config(1))


@pytest.mark.parametrize(
    ("how", "changes", "message"),
    [
        ("dies", {}, r"(?s)went away within 'generate'.*out of memory, says the kernel"),
        ("hangs", {"silence_seconds": 4.0}, "no sign of life for 4 s within 'generate'"),
        ("slow", {"request_seconds": 3.0}, "has not done 'generate' in 3 s: it is at 'generate'"),
        ("raises", {}, "refused 'generate': RuntimeError: no such kernel"),
    ],
)
def test_a_server_that_fails_is_an_error_and_no_silence(started, how, changes, message):
    engine = started(how, **changes)
    engine.update_weights(tiny_policy())
    with pytest.raises(EngineError, match=message):
        engine.generate(request_of())


def test_a_server_that_does_not_start_says_why(started):
    engine = started("no start")
    with pytest.raises(EngineError, match=r"(?s)ended with status 1.*no module named vllm"):
        engine.update_weights(tiny_policy())
    engine = VLLMEngine(EngineConfig(kind="vllm", python="/no/python"), tiny.model_config(1), 8)
    with pytest.raises(EngineError, match=r"/no/python: No such file.*Give engine\.python"):
        engine.update_weights(tiny_policy())
    engine.close()


def test_a_started_server_ends_with_the_engine_and_leaves_nothing(started, tmp_path):
    engine = started("well")
    engine.update_weights(tiny_policy())
    got = engine.generate(request_of())
    assert got.tokens[:, 3:].tolist() == [[1, 0, 0]] * 4
    process = engine._connection._process
    assert list(tmp_path.iterdir())
    engine.close()
    assert process.poll() is not None and not list(tmp_path.iterdir())
    engine.update_weights(tiny_policy())  # it starts again when it is used
    assert engine.generate(request_of()).finished.all()


def test_a_started_server_ends_with_a_run_that_is_killed(tmp_path):
    """As with `kill -9`: nobody is there to stop it, and /dev/shm must not fill up."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, str(SCRIPT), "well", "--address", f"unix:{scratch}/socket"]
    process = subprocess.Popen(
        [*command, "--scratch", str(scratch)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (scratch / "socket").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.stdin.close()
    process.wait(20)
    assert not scratch.exists()


def test_a_busy_server_is_waited_for_aloud(serving, monkeypatch, caplog):
    config = config_for(serving)
    model, first = serving.model, build_programs(config, TASK)
    policy = policy_for(config)
    collect(first, policy, config, TASK, 0)
    monkeypatch.setattr(connections, "WORD_EVERY", 0.5)
    busy, go_on = threading.Event(), threading.Event()
    generate = model.generate

    def slowly(*inputs):
        busy.set()
        go_on.wait(30)
        return generate(*inputs)

    monkeypatch.setattr(model, "generate", slowly)
    other = threading.Thread(target=collect, args=(first, policy, config, TASK, 0))
    other.start()
    assert busy.wait(30)
    threading.Timer(3, go_on.set).start()
    reply, _ = first.engine._connection.ask({"do": "status"})
    assert reply["digest"] == first.engine._digest
    assert "waiting for the engine to status; it is at 'generate'" in caplog.text
    other.join(30)
    first.engine.close()


# ---------------------------------------------------------------------------------------------
# Messages and settings
# ---------------------------------------------------------------------------------------------


def test_messages_arrive_as_they_were_sent():
    left, right = socket.socketpair()
    with left, right:
        arrays = {
            "tokens": np.arange(6, dtype=np.int32).reshape(2, 3),
            "flags": np.array([True, False]),
            "none": np.zeros((0, 4), np.float32),
        }
        wire.send(left, {"do": "x", "n": 1.5}, **arrays)
        header, got = wire.receive(right)
        assert header == {"do": "x", "n": 1.5} and got.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[name], array)
            assert got[name].dtype == array.dtype
        with pytest.raises(TypeError, match="complex128, expected one of"):
            wire.send(left, {}, x=np.zeros(2, complex))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a header of .* bytes, expected at most"),
        ((5).to_bytes(8, "big") + b"[1,2]", "no header of a message"),
        ((9).to_bytes(8, "big") + b'{"a": 1}x', "no header of a message"),
        ((38).to_bytes(8, "big") + b'{"arrays": [["x", "object", [1]]]}    ', "no header"),
        ((37).to_bytes(8, "big") + b'{"arrays": [["x", "int32", [-1]]]}   ', "no header"),
        ((38).to_bytes(8, "big") + b'{"arrays": [["x", "int64", [1e300]]]} ', "no header"),
        ((9).to_bytes(8, "big") + b'{"ar', "the connection ended"),
    ],
)
def test_what_is_no_message_is_refused(content, message):
    left, right = socket.socketpair()
    with right:
        left.sendall(content)
        left.close()
        with pytest.raises(wire.WireError, match=message):
            wire.receive(right)


def test_a_client_of_another_version_is_refused(serving, monkeypatch):
    monkeypatch.setattr(wire, "VERSION", 0)
    with pytest.raises(EngineError, match="client speaks version 0.*this server 1"):
        Connection(config_for(serving).engine).ask({"do": "status"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sglang"}, "must be one of"),
        ({"options": {"dtype": "float32"}}, r"\['dtype'\] are set by the run"),
        ({"python": "python", "address": "unix:x"}, "Give one of them"),
        ({"request_seconds": 0.0}, "must be > 0"),
    ],
)
def test_settings_that_cannot_be_meant(unchecked, changes, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"kind": "vllm", **changes})


def test_what_vllm_does_not_draft_for(serving):
    with pytest.raises(ValueError, match=r"published as 'llama' with 1 modules"):
        VLLMEngine(EngineConfig(kind="vllm", draft_depth=1), tiny.model_config(1), 8)
    with pytest.raises(ValueError, match=r"layout\.draft_depth is of the in-process engine"):
        config_for(serving, layout=dataclasses.replace(tiny.run_config("x").layout, draft_depth=1))
    mimo = tiny.model_config(1, qkv_bias=True)
    with pytest.warns(pretrained.PretrainedWarning, match="drafts will be refused"):
        VLLMEngine(EngineConfig(kind="vllm", draft_depth=1), mimo, 8)


def test_sampling_that_was_not_compiled_is_refused(setting):
    config, programs, _ = setting
    inside = dataclasses.replace(programs, external=None).engine
    with pytest.raises(ValueError, match="call update_weights first"):
        inside.generate(request_of())
    inside.update_weights(policy_for(config))
    with pytest.raises(ValueError, match="nothing was compiled for SamplingConfig"):
        inside.generate(request_of(temperature=0.7))


def test_rollouts_are_what_an_engine_is_asked_for(setting):
    """The groups of a prompt stand together, in the order of the prompts."""
    config, programs, _ = setting
    config = dataclasses.replace(config, rollout=RolloutConfig(prompts=2, samples=3, minibatches=1))
    tokens = collect(programs, policy_for(config), config, TASK, 0).batch.tokens
    prompts = tokens[:, : TASK.max_prompt_tokens].reshape(2, 3, -1)
    assert (prompts == prompts[:, :1]).all() and (prompts[0, 0] != prompts[1, 0]).any()
