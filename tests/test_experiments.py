"""Every configuration builds, the command lines read, and a comparison leaves what it promises."""

import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import compare_regimes, compiled, curves, report_figure, runs, train
from experiments.compiled import LEVEL, compile_quickly
from experiments.configs import CONFIGS
from experiments.configs.laptop import laptop
from experiments.instruments import rollout_speed, step_cost
from experiments.progress import interrupt
from occ.models.config import LoRAConfig
from occ.models.policy import create_policy
from occ.training import loop
from occ.training.batch import Minibatch
from occ.training.config import EvaluationConfig, RolloutConfig, WarmStartConfig
from occ.training.durable.lock import FolderLock
from occ.training.durable.run_folder import read_rows
from occ.training.gradient.calibration import build_calibration
from occ.training.optimizer import build_optimizer
from occ.training.regimes import regime
from occ.training.start.saved import save_start
from occ.training.state import init_state
from occ.training.step import make_train_step
from tests import tiny

pytestmark = pytest.mark.standard_promotion


def abstract_step(config, rows=4, time=64):
    """Shapes of the train step's outputs, without a single parameter in memory."""

    def start():
        policy = create_policy(config.model, 0)
        calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
        return init_state(policy, build_optimizer(config.optimizer), calibration)

    state = jax.eval_shape(start)
    ints, floats = (jax.ShapeDtypeStruct((rows, time), d) for d in (jnp.int32, jnp.float32))
    batch = Minibatch(
        tokens=ints,
        segment_ids=ints,
        positions=ints,
        response_mask=jax.ShapeDtypeStruct((rows, time), jnp.bool_),
        advantages=floats,
        old_log_prob=floats,
        old_mtp_log_prob=jax.ShapeDtypeStruct(
            (config.model.mtp.num_modules, rows, time), jnp.float32
        ),
        rollout_log_prob=floats,
        reference_log_prob=floats,
    )
    return state, *jax.eval_shape(make_train_step(config), state, batch)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mimo_7b_dapo", 7.8),
        ("mimo_7b_gspo", 7.8),
        pytest.param("glm_4_5_air_dapo", 110.5, marks=pytest.mark.slow),
    ],
)
def test_the_papers_runs_trace_at_full_size(unchecked, name, billions):
    config = CONFIGS[name]()
    before, after, metrics = abstract_step(config)
    count = sum(np.prod(leaf.shape, dtype=float) for leaf in jax.tree.leaves(before.params))
    assert count / 1e9 == pytest.approx(billions, rel=0.02)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )
    assert metrics["occ/coefficient"].shape == (1,)
    assert (config.rollout.prompts, config.rollout.samples) == (128, 16)
    assert config.optimizer.learning_rate == 1e-6 and config.optimizer.weight_decay == 0.1


def small():
    """The laptop's configuration, cut down to seconds."""
    return dataclasses.replace(
        laptop(),
        model=tiny.model_config(1, vocab_size=14),
        task_options={"digits": 1, "train_size": 40, "test_size": 10},
        rollout=RolloutConfig(prompts=4, samples=4, minibatches=2),
        evaluation=EvaluationConfig(every=1, prompts=6, samples=2),
        warm_start=WarmStartConfig(steps=3, batch_size=8, learning_rate=1e-2),
        rollouts=6,
        checkpoint_every=1,
    )


@pytest.fixture
def at(monkeypatch, tmp_path):
    """In an empty folder, with "laptop" cut down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CONFIGS, "laptop", small)
    yield tmp_path


@pytest.mark.slow
def test_a_comparison_goes_on_after_ctrl_c_and_leaves_table_figure_and_results(
    at, capsys, monkeypatch
):
    arguments = compare_regimes.Arguments(
        config="laptop", regimes=("detach", "occ_paper"), starts=2, rollouts=2
    )
    folder = at / "runs" / "compare_regimes"

    def press(row):
        signal.raise_signal(signal.SIGINT)
        time.sleep(1)  # in a lane: the main thread, which hears of it, looks five times a second
        return ""

    with monkeypatch.context() as pressed:
        pressed.setattr(compare_regimes.runs, "summary", press)
        alone = dataclasses.replace(arguments, lanes=1)  # two would press twice, and end at once
        assert compare_regimes.compare(alone) == 130
    assert "goes on" in capsys.readouterr().out
    assert len(read_rows(folder / "detach-start0" / "metrics.jsonl")) == 1
    assert compare_regimes.compare(arguments) == 0
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[-1].startswith(
        "What was seen (mean reward over training, 2 warm starts): OCC, paper's proxy is "
    )
    assert (folder / "regimes.png").exists()
    results = json.loads((folder / "results.json").read_text())
    assert {name: len(runs) for name, runs in results.items()} == {"detach": 2, "occ_paper": 2}
    assert all(len(run["rewards"]) == 2 for runs in results.values() for run in runs)
    names = ("detach-start0", "detach-start1", "occ_paper-start0", "occ_paper-start1")
    seeds = [json.loads((folder / name / "config.json").read_text())["seed"] for name in names]
    assert seeds == [0, 1, 0, 1]
    first = {name: read_rows(folder / name / "metrics.jsonl")[0]["reward"] for name in names}
    assert first["detach-start0"] == first["occ_paper-start0"]  # the same start, prompts and keys
    assert len(list((folder / "starts").glob("*/decides.json"))) == 2
    assert all(list((folder / name).glob("**/events.out.tfevents*")) for name in names)
    for name in names:
        rows = read_rows(folder / name / "metrics.jsonl")
        assert [row["rollout"] for row in rows] == [0, 1]
    # Again: everything is there, and nothing runs.
    stamp = (folder / "detach-start0" / "metrics.jsonl").stat().st_mtime_ns
    assert compare_regimes.compare(arguments) == 0
    assert (folder / "detach-start0" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert "100 %" in capsys.readouterr().err


def test_ctrl_c_in_a_warm_start_ends_in_words(at, capsys, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_regimes.runs, "starting_point", press)
    arguments = compare_regimes.Arguments(config="laptop", regimes=("detach",))
    assert compare_regimes.compare(arguments) == 130
    assert "goes on" in capsys.readouterr().out


def test_the_story_is_told_by_default():
    arguments = compare_regimes.Arguments()
    wanted = {"detach", "ce_3", "policy_3", "occ", "occ_ce", "drafter"}
    assert set(arguments.regimes) == wanted and arguments.starts >= 3
    compare_regimes.base_config(arguments)
    short = compare_regimes.base_config(compare_regimes.Arguments(smoke=True))
    assert (short.rollouts, short.warm_start.steps) == (2, 20)
    assert compare_regimes.Arguments(smoke=True).regimes == ("detach", "occ")
    with pytest.raises(ValueError, match="starts >= 1 and lanes >= 0, got 0"):
        compare_regimes.Arguments(starts=0)


def test_llvm_is_asked_for_little_unless_the_user_chose(monkeypatch):
    monkeypatch.setattr(compiled, "cpu_alone", lambda: True)
    for before, after in (
        ("--xla_cpu_enable_fast_math=false", f"--xla_cpu_enable_fast_math=false {LEVEL}=1"),
        (f"{LEVEL}=3", f"{LEVEL}=3"),
        ("", f"{LEVEL}=1"),
    ):
        monkeypatch.setenv("XLA_FLAGS", before)
        compile_quickly()
        assert os.environ["XLA_FLAGS"] == after


def test_where_another_device_may_be_found_it_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(compiled.importlib.metadata, "entry_points", lambda group: ())
    asked = {"jax_platforms": None}
    config = types.SimpleNamespace(values=asked)
    monkeypatch.setattr(compiled, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(compiled, "ACCELERATORS", ("no_such_package",))
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compiled.cpu_alone()
    monkeypatch.setattr(compiled, "ACCELERATORS", ("json",))
    compile_quickly()
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setattr(compiled.importlib.metadata, "entry_points", lambda group: ("cuda",))
    monkeypatch.setattr(compiled, "ACCELERATORS", ())
    assert not compiled.cpu_alone()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # as processes on one core each have it
    assert compiled.cpu_alone()
    monkeypatch.delenv("JAX_PLATFORMS")
    asked["jax_platforms"] = "cpu"
    compile_quickly()
    assert os.environ["XLA_FLAGS"] == f"{LEVEL}=1"


@pytest.mark.slow
def test_one_run_by_its_command_line(at, monkeypatch, capsys):
    command = ["train", "laptop", "--regime", "ce", "--config.rollouts", "1", "--config.seed", "3"]
    command += ["--config.mtp.coefficient", "0.7"]
    monkeypatch.setattr(sys, "argv", command)
    assert train.main() == 0
    folder = at / "runs" / "laptop" / "ce-seed3"
    config = json.loads((folder / "config.json").read_text())
    assert (config["rollouts"], config["seed"], config["mtp"]["loss"]) == (1, 3, "ce")
    assert config["task_options"]["digits"] == 1
    # On top of the regime, whose rule it leaves.
    assert (config["mtp"]["rule"], config["mtp"]["coefficient"]) == ("fixed", 0.7)
    assert "ce-seed3: greedy 0." in capsys.readouterr().out


def test_a_folder_that_cannot_be_had_is_noticed_before_the_warm_start(at, monkeypatch, capsys):
    monkeypatch.setattr(runs, "starting_point", None)
    arguments = train.Arguments(small(), folder=at / "run")
    (at / "run").mkdir()
    held = FolderLock(at / "run")
    assert train.train(arguments) == 1
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    comparison = compare_regimes.Arguments("laptop", ("detach",), 1, folder=at)
    (at / "detach-start0").symlink_to(at / "run")
    assert compare_regimes.compare(comparison) == 1
    held.close()
    shutil.rmtree(at / "run")
    (at / "run").write_text("")
    with pytest.raises(ValueError, match="run is a file"):
        train.train(arguments)
    with pytest.raises(ValueError, match="detach-start0 is a file"):
        compare_regimes.compare(comparison)


def test_a_full_disk_ends_in_words(at, monkeypatch, capsys):
    """In the start cache, and in what a comparison writes at the end."""

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saved = {"w": jnp.ones(2)}, {}
    engine = types.SimpleNamespace(close=lambda: None)
    programs = types.SimpleNamespace(rollout=types.SimpleNamespace(engine=engine))
    monkeypatch.setattr(runs.loop, "build", lambda *_: programs)
    monkeypatch.setattr(runs, "starting_point", lambda *_: save_start(at / "starts", {}, saved))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        assert train.train(train.Arguments(small(), folder=at / "run")) == 1
        assert "no space left for" in capsys.readouterr().err
    assert list((at / "starts").iterdir()) == []
    picture, found = at / "regimes.png", [{"reward_area": 0.5, "rewards": [0.5] * 3}]
    runs.save_figure(picture, report_figure.figure({"detach": found}), dpi=20)
    before = picture.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        monkeypatch.setattr(compare_regimes, "_run_all", lambda *_: None)
        write = functools.partial(runs.replace, picture, b"half")
        monkeypatch.setattr(compare_regimes, "_write", lambda *_: write())
        assert compare_regimes.compare(compare_regimes.Arguments(folder=at)) == 1
    assert "no space left for" in capsys.readouterr().err and picture.read_bytes() == before


def test_options_that_stand_for_fields_of_the_configuration():
    plain = laptop()
    chosen = train._chosen(train.Arguments(plain, lora_rank=4, quantised="int8"), ())
    assert chosen.model.lora == LoRAConfig(rank=4, quantised="int8")
    assert dataclasses.replace(chosen.model, lora=None) == plain.model
    mimo = CONFIGS["mimo_7b_lora"]()
    chosen = train._chosen(train.Arguments(mimo, quantised="int8"), ())
    assert chosen.model.lora == dataclasses.replace(mimo.model.lora, quantised="int8")
    assert train._chosen(train.Arguments(mimo), ()) == mimo
    with pytest.raises(ValueError, match="give --lora-rank as well"):
        train._chosen(train.Arguments(plain, quantised="int8"), ())


def test_what_can_be_trained_is_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--list"])
    assert train.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[: len(CONFIGS)]} == set(CONFIGS)
    assert any(line.startswith("laptop ") and len(line.split()) > 4 for line in lines)


def test_rows_are_rounded_and_a_checkout_without_git_has_no_commit():
    row = {"commit": None, "minibatches": 3, "worth": [0.1234567, math.nan, -math.inf]}
    assert runs.rounded(row) == {"commit": None, "minibatches": 3, "worth": [0.12346, None, None]}


def test_only_a_second_ctrl_c_stops_at_once():
    names = ("SIGTERM", "SIGTERM", "SIGHUP", "SIGINT")
    with interrupt() as wish:
        for name in names:
            signal.raise_signal(getattr(signal, name))
        assert wish() and wish.status == 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with interrupt() as wish:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert wish.status == 130
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with interrupt() as wish:
        signal.raise_signal(signal.SIGHUP)
        assert not wish()
    signal.signal(signal.SIGHUP, before)


def test_a_wrong_option_ends_with_a_message(at, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "laptop", "--config.rollout", "1"])
    with pytest.raises(SystemExit):
        train.main()
    assert "rollout" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train", "laptop", "--folder", "s3://bucket/run"])
    with pytest.raises(SystemExit):
        train.main()
    said = " ".join(re.findall(r"[^\s│|]+", capsys.readouterr().err))  # out of its frame
    assert "expected a path or gs://BUCKET/FOLDER" in said
    with pytest.raises(
        ValueError, match=r"unknown config 'lap'; expected one of \['arithmetic_easy', .*'laptop'"
    ):
        compare_regimes.base_config(compare_regimes.Arguments(config="lap"))


def test_every_argument_of_the_comparison_is_read():
    read = functools.partial(tyro.cli, compare_regimes.Arguments)
    got = read(args=["--regimes", "occ", "detach", "--starts", "5", "--exact", "--smoke"])
    assert got.regimes == ("occ", "detach") and got.starts == 5
    assert got.exact and got.smoke and got.folder == pathlib.Path("runs/compare_regimes")


@pytest.mark.slow
def test_ctrl_c_stops_after_the_rollout_in_hand(at):
    config = dataclasses.replace(small(), mtp=regime("occ_paper"))
    task = train.runs.load_task(config)
    programs = loop.build(config, task)
    start = loop.init_policy(config)
    rows, before = [], signal.getsignal(signal.SIGINT)

    def press(row):
        rows.append(row)
        if len(rows) == 2:
            signal.raise_signal(signal.SIGINT)

    folder = at / "run"
    with interrupt() as should_stop:
        assert loop.run(config, task, programs, start, folder, press, should_stop) is None
    assert len(rows) == 2
    assert loop.run(config, task, programs, start, folder)["rollouts"] == 6
    assert signal.getsignal(signal.SIGINT) is before


def test_curves_of_committed_rows_are_drawn(tmp_path, monkeypatch, capsys):
    file = pathlib.Path(step_cost.__file__).parent.parent
    file = file / "studies/results/one_gpu/occ.jsonl"
    picture = tmp_path / "curves.png"

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["curves", *map(str, words), f"--output={picture}"])
        return curves.main()

    assert command(file) == 0 and picture.read_bytes().startswith(b"\x89PNG")
    figure = curves.draw({"occ": read_rows(file)}, ("reward",))
    assert figure.axes[0].lines[0].get_ydata()[-1] == 0.627
    rows = read_rows(file)
    assert command(file, "--over", "seconds", "--reach", "0.5", "2") == 0
    first, never, _ = capsys.readouterr().out.splitlines()[-3:]
    rollouts, seconds = map(int, re.findall(r"after (\d+) rollouts, (\d+) s", first)[0])
    assert np.mean([row["reward"] for row in rows[rollouts - 5 : rollouts]]) >= 0.5
    taken = [row["seconds/rollout"] + row["seconds/updates"] for row in rows]
    assert seconds == round(taken[1] + sum(taken[1:rollouts])) and never == "occ: reward 2 never"
    with pytest.raises(ValueError, match="no run has the metric 'rewards'; there are .*'reward'"):
        command(file, "--metrics", "rewards")
    assert command(tmp_path / "nothing") == 2 and "nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_counts_what_is_expected():
    """By the compiler's count: fused OCC costs what joint training costs, exact a backward more."""
    arguments = step_cost.Arguments(
        layers=3,
        width=64,
        vocab=32,
        rows=2,
        length=16,
        regimes=("detach", "occ_paper", "occ", "occ_smoothed", "drafter"),
        repeats=0,
    )
    costs = step_cost.measure(arguments, "none")
    flops = {name: cost["flops"] / costs["detach"]["flops"] for name, cost in costs.items()}
    assert 1 <= flops["occ_paper"] < 1.03 and 1.3 < flops["occ"] < 1.7
    # Every fifth step measures; a loss of the modules' own takes a way back through the module (of
    # three layers and one a third of a quarter), and no second way there.
    assert flops["occ_smoothed"] == pytest.approx((flops["occ"] + 4 * flops["occ_paper"]) / 5, 0.01)
    assert 1.03 < flops["drafter"] < 1.13
    assert 0 < step_cost.predicted_share(arguments, costs["detach"]["flops"]) < 0.03
    assert "| occ |" in step_cost.table(costs)


@pytest.mark.slow
def test_rollout_speed_samples_the_same_tokens_each_way(tmp_path):
    arguments = rollout_speed.Arguments(
        quick=True,
        warm_up=2,
        rows=(2,),
        depth=2,
        tokens=4,
        slots=2,
        prompt=8,
        samples=2,
        repeats=1,
        folder=tmp_path,
    )
    found = rollout_speed.measure(arguments)
    text = rollout_speed.table(found)
    assert text.splitlines()[-1].startswith("rollout_speed: speculation")
    assert text.endswith("same tokens yes")
    (drafts,) = found["speculation"]
    assert len(drafts["acceptance"]) == 2 and len(drafts["seconds_a_step"]) == 3
    assert found["slots"]["steps"][0] > found["slots"]["steps"][1]
