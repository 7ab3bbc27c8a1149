"""The task of published problems: prompts, what is left out and why, judging."""

import numpy as np
import pytest

from experiments.configs import CONFIGS
from occ import tasks
from occ.tasks import mathematics
from occ.tasks.datasets.answers import DAPO_AFTER, DAPO_BEFORE
from occ.tasks.tokenizer import CharacterTokenizer
from tests import fixtures_math


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    fixtures_math.write(folder)
    return folder


@pytest.fixture
def load(data_dir, request):
    def load(**options):
        options = {"tokenizer": "characters", "data_dir": data_dir, "verify": False} | options
        task = tasks.load(options.pop("name", "math"), workers=1, **options)
        request.addfinalizer(task.verifier.close)
        return task

    return load


def test_dapos_prompts_are_those_that_were_published(load):
    task = load(name="dapo_math_17k")
    published = {row["prompt"][0]["content"] for row in fixtures_math.dapo_rows()}
    assert len(task.train) == 20
    assert {problem.prompt for problem in task.train} <= published
    assert task.train[0].answer == "5" and task.train[0].entry["id"] == "id-0000"
    assert task.name == "math(dapo_math_17k, answer_line)"
    assert [len(problems) for problems in task.benchmarks.values()] == [2] * 6
    assert [p for problems in task.benchmarks.values() for p in problems] == task.test
    assert task.test[0].prompt.startswith(DAPO_BEFORE) and DAPO_AFTER in task.test[0].prompt


@pytest.mark.parametrize(
    ("extract", "asked", "other"),
    [
        ("answer_line", "Answer: 5", r"\boxed{5}"),
        ("boxed", r"\boxed{5}", "Answer: 5"),
    ],
)
def test_one_convention_does_not_shut_out_the_other(load, extract, asked, other):
    task = load(extract=extract, benchmarks=("amc", "math_500"))
    problem = task.train[0]
    assert ("boxed" in problem.prompt) == (extract == "boxed")
    completions = [asked, other, r"Answer: \boxed{5}", asked.replace("5", "6"), "5"]
    rewards, valid = task.verify_batch([problem] * 5, completions)
    assert rewards.tolist() == [1, 1, 1, 0, 0] and valid.all()
    assert [task.final_answer(text) for text in (asked, other, "Answer:")] == ["5", "5", None]


def test_answers_in_two_spellings_are_one_vote(load):
    task = load(extract="boxed", benchmarks=("amc",))
    assert task.final_answer(r"\boxed{\dfrac12}") == task.final_answer(r"\boxed{ \frac{1}{2} }")


def test_a_chat_template_goes_around_the_problem(load):
    class Chat(CharacterTokenizer):
        chat_template = "a template"

        def chat(self, messages):
            [message] = messages
            return f"<{message['role']}>{message['content']}<assistant>"

    task = load(tokenizer=Chat(mathematics.CHARACTERS), extract="boxed", benchmarks=("amc",))
    assert task.test[0].prompt.startswith("<user>What is $3^3$?\n\nPlease reason")
    assert task.test[0].prompt.endswith("<assistant>") and task.test[0].entry["problem"] == (
        "What is $3^3$?"
    )


def test_problems_of_a_benchmark_are_not_trained_on(load):
    """AIME 2024's fixture has one of DAPO's problems, with other spaces."""
    task = load(benchmarks=("aime_2024", "amc"))
    assert task.selections[0].in_benchmark == (("aime_2024", 1),)
    assert not any("primes" in problem.prompt for problem in task.train)
    assert any("primes" in problem.prompt for problem in task.benchmarks["aime_2024"])
    assert "20 of 21 problems; 0 too long, 0 that cannot be judged, 1 also in aime_2024" in str(
        task.selections[0]
    )
    kept = load(benchmarks=("aime_2024",), decontaminate=False)
    assert len(kept.train) == 21 and kept.selections[0].in_benchmark == ()


def test_long_prompts_are_left_out_and_counted(load):
    whole = load(benchmarks=("minerva_math",))
    lengths = np.array([len(problem.prompt) for problem in whole.train])
    bound = int(np.sort(lengths)[-2])  # one problem, that of the primes, is longer
    task = load(benchmarks=("minerva_math",), max_prompt_tokens=bound)
    assert len(task.train) == 20 == task.selections[0].kept and task.selections[0].too_long == 1
    assert max(len(problem.prompt) for problem in task.train) == bound == task.max_prompt_tokens
    short = len(whole.test[1].prompt)
    assert [
        s.too_long
        for s in load(
            dataset=None, benchmarks=("minerva_math",), max_prompt_tokens=short
        ).selections
    ] == [1]


def test_problems_that_cannot_be_judged_are_left_out_counted_and_named(load, tmp_path, caplog):
    fixtures_math.write(tmp_path, ["dapo_math_17k"])
    rows = fixtures_math.dapo_rows()[:3]
    rows[1]["reward_model"]["ground_truth"] = r"\href{x}{y}"
    file = tmp_path / "manual" / "dapo_math_17k" / "data" / "dapo-math-17k.parquet"
    fixtures_math.write_rows(file, rows)
    task = load(data_dir=tmp_path, benchmarks=())
    [(identity, reason)] = task.selections[0].unjudged
    assert identity == "id-0001" and "href" in reason and len(task.train) == 2
    assert "1 that cannot be judged" in caplog.text and "id-0001: judged against" in caplog.text


def test_benchmarks_alone(load):
    task = load(dataset=None, benchmarks=("math",), extract="boxed")
    assert len(task.train) == 0 and len(task.test) == 7
    assert task.test[0].entry["level"] == "Level 1"


def test_the_papers_task_says_what_it_lacks(tmp_path, monkeypatch):
    """Its options are the loader's; without the model's folder and the data it cannot start."""
    monkeypatch.chdir(tmp_path)
    config = CONFIGS["mimo_7b_dapo"]()
    with pytest.raises(ValueError, match=r"there is no file or folder 'models/MiMo-7B-RL'"):
        tasks.load(config.task, **config.task_options)

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("requests.head", refuse)
    options = config.task_options | {"tokenizer": "characters"}
    with pytest.raises(FileNotFoundError, match=r"put it there"):
        tasks.load(config.task, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extract": "box"}, r"extract must be one of \['boxed', 'answer_line'\], got 'box'"),
        ({"dataset": "amc"}, r"'amc' has no split 'train', only \['test'\]"),
        ({"benchmarks": ("dapo_math_17k",)}, "has no split 'test'"),
        ({"benchmarks": ("amc", "aime")}, "unknown set 'aime'"),
        ({"benchmarks": (), "max_prompt_tokens": 3}, "nothing is left to train on"),
        ({"tokeniser": "x"}, "does not take these options"),
    ],
)
def test_load_refuses(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)
