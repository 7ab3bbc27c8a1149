"""Evaluation end to end on a tiny run: the files, resumption to the same lines, the table."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from experiments import evaluate, evaluate_fixtures, evaluate_report, evaluated
from experiments.configs import CONFIGS
from occ import tasks
from occ.evaluation import completions
from occ.evaluation.benchmarks import result
from occ.evaluation.completions import Settings
from occ.tasks import VerifierError
from occ.training import loop
from occ.training.durable.checkpoints import Checkpoints
from occ.training.durable.history import History
from occ.training.durable.run_folder import RunFolder, read_config
from occ.training.regimes import regime
from occ.training.score import Scores
from tests import fixtures_math, published, test_tokenizers, tiny

pytestmark = pytest.mark.standard_promotion


def begin(folder, config):
    """A run of which there are two checkpoints, the first the best; nothing is trained."""
    task = tasks.load(config.task, **config.task_options)
    programs = loop.build(config, task)
    RunFolder(folder, config).close()
    with jax.set_mesh(programs.mesh), Checkpoints(folder / "checkpoints") as checkpoints:
        state = programs.begin(loop.init_policy(config))
        checkpoints.save(1, state, History().evaluated(1, 0.5))
        later = state.replace(params=jax.tree.map(lambda x: 2 * x, state.params))
        checkpoints.save(2, later, History().evaluated(1, 0.5))
    return task


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One-digit sums."""
    folder = tmp_path_factory.mktemp("runs") / "occ_paper-seed0"
    options = {"digits": 1, "train_size": 40, "test_size": 10}
    begin(folder, tiny.run_config("tiny", task_options=options))
    return folder


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy without evaluations."""
    left_out = shutil.ignore_patterns("evaluation")
    shutil.copytree(trained, tmp_path / trained.name, ignore=left_out)
    return tmp_path / trained.name


def arguments(folder, **changes):
    base = evaluate.Run(folders=(folder,), k=3, rows=4, problems=5, acceptance_prompts=3)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def evaluated_once(trained):
    """The folder of one whole evaluation."""
    evaluate.run(arguments(trained))
    return trained / "evaluation"


@pytest.mark.slow
def test_on_another_mesh_the_samples_are_the_same(run_folder, evaluated_once):
    evaluate.run(arguments(run_folder, mesh={"data": 2, "tensor": 2}))
    moved = run_folder / "evaluation"
    assert (moved / "test.jsonl").read_text() == (evaluated_once / "test.jsonl").read_text()
    with pytest.raises(ValueError, match=r"--rows 4 cannot be cut evenly on 8 devices"):
        evaluate.run(arguments(run_folder, mesh={"fsdp": 8}, name="other"))
    evaluate.run(arguments(run_folder, mesh={"data": 3}, rows=None, name="other"))
    settings = json.loads((run_folder / "other" / "settings.json").read_text())
    assert settings["rows"] == 66
    with pytest.raises(ValueError, match=r"axes .*'tensor'.*, got \['model'\]"):
        evaluate.run(arguments(run_folder, mesh={"model": 2}))


def test_every_sample_is_a_line_and_the_measures_are_of_them(trained, evaluated_once):
    rows = [json.loads(line) for line in (evaluated_once / "test.jsonl").read_text().splitlines()]
    assert sorted((row["index"], row["sample"]) for row in rows) == [
        (i, s) for i in range(5) for s in range(3)
    ]
    task = tasks.load("arithmetic", digits=1, train_size=40, test_size=10)
    for row in rows:
        reward, _ = task.verify_batch([task.test[row["index"]]], [row["text"]])
        assert row["correct"] == bool(reward[0]) and 1 <= row["tokens"] <= 3
        assert row["answer"] == (row["text"] or None)
    summary = json.loads((evaluated_once / "summary.json").read_text())
    found = summary["benchmarks"]["test"]
    assert summary["label"] == "occ_paper, seed 0"
    assert summary["settings"]["model"] == "checkpoint 2 of tiny"
    assert found["avg@3"]["mean"] == np.mean([row["correct"] for row in rows])
    assert found["avg@3"] == found["pass@1"] and found["invalid"] == 0
    [module] = found["mtp_acceptance"]
    assert (
        module["module"] == 1
        and 0 <= module["share"] <= 1
        and list(module["positions"]) == ["0-15"]
    )
    assert summary["average"]["mean"] == found["avg@3"]["mean"]


@pytest.mark.parametrize("damage", ["in a line", "in a portion", "in the first", "all", "none"])
def test_a_killed_evaluation_goes_on_to_the_same_lines(run_folder, evaluated_once, damage):
    whole = (evaluated_once / "test.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    shutil.copytree(evaluated_once, run_folder / "evaluation")
    (run_folder / "evaluation" / "summary.json").unlink()
    file = run_folder / "evaluation" / "test.jsonl"
    left = {
        "in a line": "".join(lines[:9])[:-7],
        "in a portion": "".join(lines[:10]),
        "in the first": "".join(lines[:2]),
        "all": "",
        "none": whole,
    }[damage]
    file.write_text(left)
    made = []
    original = completions._rows

    def spy(*args):
        made.append(args[2])
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completions, "_rows", spy)
        evaluate.run(arguments(run_folder))
    assert file.read_text() == whole
    # 15 rows in portions of 4: what was whole is not made again.
    kept = {"in a line": 2, "in a portion": 2, "in the first": 0, "all": 0, "none": 4}[damage]
    assert made == list(range(kept, 4))


def test_samples_do_not_depend_on_other_samples_problems_or_portions(
    trained, evaluated_once, run_folder
):
    """Twice as many samples, in slots and with drafts: the first ones are those of before."""
    evaluate.run(arguments(run_folder, k=6, rows=8, slots=4, draft_depth=1, acceptance_prompts=0))

    def texts(folder):
        rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
        return {(row["index"], row["sample"]): row["text"] for row in rows}

    few, many = texts(evaluated_once), texts(run_folder / "evaluation")
    assert len(many) == 30 and {key: many[key] for key in few} == few
    assert len({many[0, sample] for sample in range(6)}) > 1


def test_acceptance_does_not_depend_on_the_rows_at_one_time(trained):
    """A portion is filled up with its last prompt, which then must not count twice."""
    model = evaluated.from_run(trained, "newest", None, {})

    def thirds(policy, tokens, segment_ids):
        return Scores(None, None, np.asarray(tokens)[None] % 3 == 0)

    model = dataclasses.replace(model, score=thirds)
    found = []
    with jax.set_mesh(model.mesh):
        for rows in (5, 8, 2):
            settings = Settings(max_prompt_tokens=4, max_response_tokens=3, rows=rows)
            found.append(evaluated.measure_acceptance(model, "test", 5, settings))
    assert found[0] == found[1] == found[2] and 0 < found[0][0]["share"] < 1


def test_other_settings_need_another_folder(evaluated_once, trained):
    with pytest.raises(ValueError, match=r"begun with other settings \(seed: 0 -> 1, top_p: 0.7 -"):
        evaluate.run(arguments(trained, seed=1, top_p=0.9))


def test_the_best_checkpoint_can_be_asked_for(run_folder):
    """Looking changes nothing in the folder; the best is what the newest remembers."""
    (run_folder / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # being written
    before = sorted(path.name for path in (run_folder / "checkpoints").iterdir())
    best = evaluated.from_run(run_folder, "best", None, {})
    newest = evaluated.from_run(run_folder, "newest", None, {})
    assert (best.name, newest.name) == ("checkpoint 1 of tiny", "checkpoint 2 of tiny")
    doubled = jax.tree.map(lambda x: 2 * x, best.policy.params)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), doubled, newest.policy.params))
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == before
    with pytest.raises(ValueError, match="holds no run"):
        evaluated.from_run(run_folder / "nothing", "newest", None, {})


def test_a_damaged_checkpoint_is_passed_over_and_left(run_folder):
    shutil.rmtree(run_folder / "checkpoints" / "2" / "state")
    assert evaluated.from_run(run_folder, "newest", None, {}).name == "checkpoint 1 of tiny"
    assert (run_folder / "checkpoints" / "2").exists()


def test_a_run_without_checkpoints_says_so(run_folder):
    for path in (run_folder / "checkpoints").iterdir():
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        evaluated.from_run(run_folder, "newest", None, {})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_comes_back_from_its_file(tmp_path, name):
    config = CONFIGS[name]()
    written = json.dumps(dataclasses.asdict(config))
    (tmp_path / "config.json").write_text(written)
    found = read_config(tmp_path)
    assert json.dumps(dataclasses.asdict(found)) == written
    assert dataclasses.replace(found, task_options=config.task_options) == config
    known = json.loads((tmp_path / "config.json").read_text()) | {"colour": "red"}
    (tmp_path / "config.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match="colour.*written by another version"):
        read_config(tmp_path)


def test_regimes_are_known_by_their_configuration(tmp_path):
    config = tiny.run_config("tiny")
    for name in ("detach", "occ", "policy"):
        exact = dataclasses.replace(config, mtp=regime(name, exact=True), seed=3)
        assert evaluated.label(exact, tmp_path) == f"{name}, seed 3"
    other = dataclasses.replace(config, mtp=dataclasses.replace(regime("policy"), coefficient=0.7))
    assert evaluated.label(other, tmp_path) == tmp_path.name


# -- published benchmarks -------------------------------------------------------------------------


def test_invalid_samples_stay_invalid(tmp_path):
    def verifier(problem, completion):
        if completion.startswith("1"):
            raise VerifierError
        return 1.0

    task = dataclasses.replace(
        tasks.load("arithmetic", digits=1, train_size=40, test_size=10), verifier=verifier
    )

    def sampler(prompts, mask, key, numbers, prompt_of):
        prompts, mask = prompts[prompt_of], mask[prompt_of]
        tokens = np.concatenate([prompts, 2 + (numbers[:, None] % 2)], axis=1)
        response = np.concatenate([np.zeros_like(mask), np.ones((len(numbers), 1), bool)], axis=1)
        ones = np.ones(len(numbers), int)
        return completions.Generation(tokens, response, None, ones > 0, ones, None)

    settings = Settings(samples=2, max_prompt_tokens=4, max_response_tokens=1, rows=3)
    completions.open_folder(tmp_path, settings)
    rows = completions.complete(sampler, task, "test", task.test[:4], settings, tmp_path)
    assert [row["correct"] for row in sorted(rows, key=lambda r: (r["index"], r["sample"]))] == [
        True,
        None,
    ] * 4
    found = result("test", rows)
    assert found.invalid == 4 and found.accuracy.tolist() == [1.0] * 4


def test_a_run_on_published_problems_is_evaluated_on_benchmarks(tmp_path):
    """Those that are asked for, without its training set; the demonstration goes all the way."""
    fixtures_math.write(tmp_path / "data", ["amc"])
    config = evaluate_fixtures.config(tmp_path / "data")
    task, benchmarks = evaluated._task(config, ("amc",), {"max_prompt_tokens": 150})
    task.verifier.close()
    assert list(benchmarks) == ["amc"] and len(benchmarks["amc"]) == 2 and len(task.train) == 0
    assert (task.max_prompt_tokens, task.max_response_tokens) == (150, 24)


def test_a_run_on_another_task_is_evaluated_on_benchmarks_where_it_reads_texts(
    tmp_path, run_folder
):
    fixtures_math.write(tmp_path / "data", ["amc"])
    data = str(tmp_path / "data")
    options = {"data_dir": data, "max_prompt_tokens": 150, "verify": False}
    other = dataclasses.replace(
        evaluate_fixtures.config(tmp_path / "elsewhere"),
        task="reasoning_gym",
        task_options={"dataset": "chain_sum", "tokenizer": "characters"},
    )
    task, benchmarks = evaluated._task(evaluated._on_published(other), ("amc",), options)
    task.verifier.close()
    assert list(benchmarks) == ["amc"] and "boxed" in benchmarks["amc"][0].prompt
    with pytest.raises(ValueError, match="'arithmetic' of this run has no tokenizer for texts"):
        evaluate.run(arguments(run_folder, data_dir=tmp_path / "data"))


def test_a_published_model_is_evaluated(tmp_path, monkeypatch, capsys):
    """MiMo's layout with random weights, its own tokenizer and chat template."""
    monkeypatch.chdir(tmp_path)
    raw = published.CASES["mimo"] | {"vocab_size": 700, "max_position_embeddings": 192}
    folder = published.write(tmp_path / "models" / "tiny", raw, published.tensors(raw))
    test_tokenizers.write_folder(folder)
    fixtures_math.write(tmp_path / "data", ["amc"])
    evaluate.run(
        evaluate.Run(
            pretrained=(str(folder),),
            data_dir=tmp_path / "data",
            benchmarks=("amc",),
            max_prompt_tokens=144,
            max_response_tokens=4,
            k=1,
            rows=2,
            acceptance_prompts=2,
            verify=False,
        )
    )
    evaluation = tmp_path / "runs" / "evaluations" / "tiny" / "evaluation"
    assert len((evaluation / "amc.jsonl").read_text().splitlines()) == 2
    assert "tiny: AMC: avg@1" in capsys.readouterr().out
    summary = json.loads((evaluation / "summary.json").read_text())
    assert summary["settings"]["max_prompt_tokens"] == 144
    assert len(summary["benchmarks"]["amc"]["mtp_acceptance"]) == 1


@pytest.mark.slow
def test_the_demonstration_comes_to_its_table(tmp_path, capsys):
    text = evaluate.fixtures(evaluate.Fixtures(tmp_path, k=2))
    lines = text.splitlines()
    assert lines[0].startswith(
        "| regime | AIME 2024 | AIME 2025 | AMC | MATH-500 | Minerva Math | "
    )
    assert [line.split(" | ")[0] for line in lines[2:4]] == [
        "| detach, seed 0",
        "| occ_paper, seed 0",
    ]
    assert "dapo_math_17k: 20 of 21 problems" in capsys.readouterr().out


def test_a_task_of_its_own_problems_has_no_published_benchmarks(run_folder):
    with pytest.raises(ValueError, match=r"has one benchmark, 'test', got \['amc'\]"):
        evaluate.run(arguments(run_folder, benchmarks=("amc",)))
    with pytest.raises(ValueError, match="expected folders of runs"):
        evaluate.run(evaluate.Run())
    with pytest.raises(ValueError, match="give --data-dir"):
        evaluate.run(evaluate.Run(pretrained=("models/m",)))


# -- the table ------------------------------------------------------------------------------------


def write_evaluation(folder, label, **benchmarks):
    """An evaluation whose benchmarks have these verdicts, [problems][samples]."""
    target = folder / "evaluation"
    target.mkdir(parents=True)
    for name, correct in benchmarks.items():
        rows = [
            {"problem": f"{name}-{i}", "index": i, "sample": s, "answer": "1", "correct": verdict}
            | {"tokens": 5, "finished": True}
            for i, group in enumerate(correct)
            for s, verdict in enumerate(group)
        ]
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"label": label, "benchmarks": dict.fromkeys(benchmarks)}
    (target / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_table_has_the_papers_layout(tmp_path, capsys):
    """Written out; ends of intervals are those of the bootstrap of constant groups."""
    half, full, none = [[True, False]] * 4, [[True, True]] * 6, [[False, False]] * 6
    folders = (
        write_evaluation(tmp_path / "a", "detach", math_500=none, aime_2024=half),
        write_evaluation(tmp_path / "b", "occ", aime_2024=half, math_500=full),
        write_evaluation(tmp_path / "c", "ce", aime_2024=[[True, None]] * 4),
    )
    text = evaluate.table(evaluate.Table(folders))
    assert text + "\n" == capsys.readouterr().out
    assert text.split("\n\n")[0] == (
        "| regime | AIME 2024 | MATH-500 | average of 2 | minus the first |\n"
        "|---|---|---|---|---|\n"
        "| detach | 50.0 [50.0, 50.0] | 0.0 [0.0, 0.0] | 25.0 [25.0, 25.0] |  |\n"
        "| occ | 50.0 [50.0, 50.0] | 100.0 [100.0, 100.0] | 75.0 [75.0, 75.0] "
        "| **+50.0 [50.0, 50.0]**, p = 0.031 |\n"
        "| ce | 100.0 [100.0, 100.0] | n/a | n/a | n/a |"
    )
    assert "avg@2 in per cent" in text and "4 of 8 in AIME 2024 (ce)" in text


def test_other_problems_are_not_compared(tmp_path):
    folders = (
        write_evaluation(tmp_path / "a", "detach", amc=[[True]] * 3),
        write_evaluation(tmp_path / "b", "occ", amc=[[True]] * 4),
    )
    with pytest.raises(ValueError, match="on other problems of 'amc': 4 and 3"):
        evaluate.table(evaluate.Table(folders))
    with pytest.raises(ValueError, match="has no summary.json"):
        evaluate_report.read(tmp_path, "evaluation")


def test_the_command_line(run_folder, monkeypatch, capsys):
    command = ["evaluate", "run", str(run_folder), "--k", "2", "--top-p", "0.7", "--rows", "4"]
    command += ["--problems", "2", "--acceptance-prompts", "0"]
    monkeypatch.setattr(sys, "argv", command)
    assert evaluate.main() == 0
    assert "occ_paper, seed 0: test: avg@2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate", "table", str(run_folder)])
    assert evaluate.main() == 0
    assert "| occ_paper, seed 0 |" in capsys.readouterr().out
