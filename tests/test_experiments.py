"""Every configuration builds, the command lines read, and a comparison leaves what it promises."""

import dataclasses
import functools
import json
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from experiments import compare_regimes, report, train
from experiments.configs import CONFIGS
from experiments.configs.laptop import laptop
from experiments.instruments import sampling_speed, step_cost
from experiments.progress import interrupt
from occ.models.policy import create_policy
from occ.training import loop
from occ.training.batch import Minibatch
from occ.training.config import EvaluationConfig, RolloutConfig, WarmStartConfig
from occ.training.gradient.calibration import build_calibration
from occ.training.optimizer import build_optimizer
from occ.training.regimes import regime
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
    [("mimo_7b_dapo", 7.8), ("mimo_7b_gspo", 7.8), ("glm_4_5_air_dapo", 110.5)],
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
    jax.config.update("jax_compilation_cache_dir", None)


def test_a_comparison_leaves_table_figures_and_results(at, capsys):
    arguments = compare_regimes.Arguments(regimes=("detach", "occ_paper"), seeds=2, exact=False)
    assert compare_regimes.compare(arguments) == 0
    folder = at / "runs" / "compare_regimes"
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert {name: len(runs) for name, runs in results.items()} == {"detach": 2, "occ_paper": 2}
    for name in ("detach-seed0", "occ_paper-seed1"):
        assert (folder / name / "metrics.jsonl").exists()
        assert list((folder / name).glob("**/events.out.tfevents*"))
    for figure in ("rewards.png", "coefficients.png"):
        assert (folder / figure).stat().st_size > 10_000
    # Again: everything is there, and nothing runs.
    stamp = (folder / "detach-seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert compare_regimes.compare(arguments) == 0
    assert (folder / "detach-seed0" / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_the_table_names_what_differs():
    def result(sampled, area):
        return {
            "final": {"sampled": sampled, "greedy": 1.0, "mtp_acceptance": [0.5]},
            "reward_area": area,
            "skipped": 0,
            "seconds": 1.0,
        }

    table = report.table(
        {
            "detach": [result(0.9, 0.80), result(0.8, 0.70)],
            "occ": [result(0.9, 0.70), result(0.8, 0.60)],
        }
    )
    detach, occ = table.splitlines()[2:]
    assert "85.0" in detach and "75.0" in detach
    assert "+0.0" in occ and "**-10.0" in occ and "**+0.0" not in occ


def test_one_run_by_its_command_line(at, monkeypatch, capsys):
    command = ["train", "laptop", "--regime", "ce", "--config.rollouts", "1", "--config.seed", "3"]
    monkeypatch.setattr(sys, "argv", command)
    assert train.main() == 0
    folder = at / "runs" / "laptop" / "ce-seed3"
    config = json.loads((folder / "config.json").read_text())
    assert (config["rollouts"], config["seed"], config["mtp"]["loss"]) == (1, 3, "ce")
    assert config["task_options"]["digits"] == 1
    assert "ce-seed3: greedy 0." in capsys.readouterr().out


def test_a_wrong_option_ends_with_a_message(at, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "laptop", "--config.rollout", "1"])
    with pytest.raises(SystemExit):
        train.main()
    assert "rollout" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"gs:/bucket/run looks like .* Mount the bucket"):
        train.Arguments(small(), folder=pathlib.Path("gs://bucket/run"))
    with pytest.raises(
        ValueError, match=r"unknown config 'lap'; expected one of \['arithmetic_easy', .*'laptop'"
    ):
        compare_regimes.base_config(compare_regimes.Arguments(config="lap"))


def test_every_argument_of_the_comparison_is_read():
    read = functools.partial(tyro.cli, compare_regimes.Arguments)
    got = read(args=["--regimes", "occ", "detach", "--seeds", "5", "--no-exact", "--smoke"])
    assert got.regimes == ("occ", "detach") and got.seeds == 5
    assert not got.exact and got.smoke and got.folder == pathlib.Path("runs/compare_regimes")


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


def test_the_transformation_alone_needs_jax_and_optax_alone():
    """The three files must be importable where nothing else of the project's needs is installed."""
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'flax', 'orbax', 'reasoning_gym', 'tqdm', 'tyro'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import occ, occ.calibration, occ.measures, occ.rules\n"
        "occ.calibrate(occ.measures.gradients(), occ.rules.optimal())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_benchmark_counts_what_is_expected():
    """By the compiler's count: fused OCC costs what joint training costs, exact a backward more."""
    arguments = step_cost.Arguments(
        layers=3,
        width=64,
        vocab=32,
        rows=2,
        length=16,
        regimes=("detach", "occ_paper", "occ"),
        repeats=0,
    )
    costs = step_cost.measure(arguments, "none")
    flops = {name: cost["flops"] / costs["detach"]["flops"] for name, cost in costs.items()}
    assert 1 <= flops["occ_paper"] < 1.03 and 1.3 < flops["occ"] < 1.7
    assert 0 < step_cost.predicted_share(arguments, costs["detach"]["flops"]) < 0.03
    assert "| occ |" in step_cost.table(costs)


def test_the_speed_of_sampling_is_of_all_tokens():
    arguments = sampling_speed.Arguments(
        layers=1, width=64, vocab=8, rows=2, prompt=2, response=3, repeats=1
    )
    found = sampling_speed.measure(arguments)
    assert found["tokens"] == 2 * 3
    assert found["cache_bytes"] == 2 * (2 * 5 * 64) * 4  # keys and values of 5 columns a row
    assert found["temporary_bytes"] > found["cache_bytes"]
