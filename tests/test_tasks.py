"""Prompts, verifiers, splits and the tokenizer."""

import ast
import inspect
import textwrap

import numpy as np
import pytest
import reasoning_gym as package
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS

from occ import tasks
from occ.tasks import Problem, Task, VerifierError, demonstrations, number_filtering, splits
from occ.tasks import reasoning_gym as gym
from occ.tasks.prompts import encode_prompts, prompt_indices
from occ.tasks.tokenizer import CharacterTokenizer

ALPHABET = "0123456789+-="


@pytest.fixture(scope="module")
def sums():
    return tasks.load("arithmetic", train_size=60, test_size=20)


# -- arithmetic -------------------------------------------------------------------------------


def test_the_answer_to_a_sum_is_its_sum(sums):
    for problem in [*sums.train, *sums.test]:
        left, right = problem.prompt.removesuffix("=").split("+")
        assert int(left) + int(right) == int(problem.answer)
        assert len(problem.prompt) <= sums.max_prompt_tokens
        assert len(problem.answer) < sums.max_response_tokens


def test_only_the_exact_answer_is_rewarded(sums):
    problem = sums.train[0]
    right = problem.answer
    others = ["0" + right, "+" + right, right + " ", right + ".0", "", "-" + right, "abc"]
    rewards, valid = sums.verify_batch([problem] * 8, [right, *others])
    assert rewards.tolist() == [1.0] + [0.0] * 7 and valid.all()


def test_operators_with_subtraction_have_negative_answers():
    task = tasks.load("arithmetic", operators="+-", train_size=100, test_size=20)
    assert any(p.answer.startswith("-") for p in task.train)
    rewards, _ = task.verify_batch(task.train, [p.answer for p in task.train])
    assert rewards.all()
    assert all(len(p.answer) < task.max_response_tokens for p in task.train)


@given(answer=st.from_regex(r"-?[0-9]{1,3}", fullmatch=True), seed=st.integers(0, 1000))
def test_a_corrupt_answer_has_one_wrong_digit(answer, seed):
    wrong = demonstrations.corrupt(answer, np.random.default_rng(seed))
    assert len(wrong) == len(answer)
    assert sum(a != b for a, b in zip(answer, wrong, strict=True)) == 1
    assert answer.startswith("-") == wrong.startswith("-")


def test_demonstrations_are_wrong_as_often_as_asked(sums):
    problems = list(sums.train) * 50
    answers = demonstrations.demonstrations(problems, 0.6, np.random.default_rng(0))
    share = np.mean([a != p.answer for a, p in zip(answers, problems, strict=True)])
    assert abs(share - 0.6) < 0.03  # three standard errors of n = 3000


def test_a_verifier_that_fails_invalidates_its_sample_alone():
    def verifier(problem, completion):
        if completion == "?":
            raise VerifierError
        return 1.0

    problems = [Problem("a", "b")] * 3
    task = Task("t", CharacterTokenizer("ab?"), problems, [], verifier, 1, 1)
    rewards, valid = task.verify_batch(problems, ["b", "?", "b"])
    assert rewards.tolist() == [1, 0, 1] and valid.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "reward",
    [
        None,
        float("nan"),
        float("inf"),
        -float("inf"),
        1e30,
        -1,
        "1",
        [1.0],
        1j,
        1.001,
        ValueError(),
    ],
)
def test_a_reward_that_is_none_invalidates_its_sample_and_is_named(reward, caplog):
    def verifier(problem, completion):
        if completion == "a":
            return np.float32(0.5)
        if isinstance(reward, Exception):
            raise reward
        return reward

    problems = [Problem("What?", "b")] * 4
    task = Task("t", CharacterTokenizer("ab"), problems, [], verifier, 1, 1)
    rewards, valid = task.verify_batch(problems, ["a", "b", "a", "b"])
    assert rewards.tolist() == [0.5, 0, 0.5, 0] and valid.tolist() == [True, False, True, False]
    assert "t: 2 of 4 samples could not be judged" in caplog.text
    named = "ValueError" if isinstance(reward, Exception) else f"from 0.0 to 1.0, got {reward!r}"
    assert "sample 1 of problem 'What?'" in caplog.text and named in caplog.text


def test_a_task_states_its_range_of_rewards():
    problems = [Problem("a", "b")] * 2
    task = Task(
        "t", CharacterTokenizer("ab"), problems, [], lambda p, c: -1, 1, 1, reward_range=(-1, 1)
    )
    rewards, valid = task.verify_batch(problems, ["b", "b"])
    assert rewards.tolist() == [-1, -1] and valid.all()


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "1e99999999999",
            "1e400",
            "1E+99_999_999",
            "1e99,999,999",
            "1e-99999999999",
            "1/0",
            "nan",
        ),
        *(
            "\N{FULLWIDTH DIGIT ONE}e" + "\N{FULLWIDTH DIGIT NINE}" * 9,
            "9" * 400,
            "1" * 10**6,
            "inf",
        ),
    ],
)
@pytest.mark.parametrize("dataset", ["coin_flip", "decimal_chain_sum", "products", "gsm_symbolic"])
def test_a_number_of_any_size_is_wrong_at_once(dataset, answer):
    """1e99999999999 for coin_flip never came back, and 1e400 ended the run."""
    task = gym.load(dataset=dataset, train_size=2, test_size=1)
    rewards, valid = task.verify_batch(task.train, [answer, task.train[1].answer])
    assert rewards.tolist() == [0, 1] and valid.all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arithmetics", {}, r"unknown task 'arithmetics'; expected one of \['arithmetic', 'dapo"),
        ("arithmetic", {"digit": 2}, "does not take these options.*digit"),
        ("arithmetic", {"operators": "*"}, "must be '\\+' or '\\+-', got '\\*'"),
        ("arithmetic", {"digits": 1, "train_size": 500}, "found .* expected 500 and 1024"),
        (
            "number_filtering",
            {"operations": ["keep"]},
            r"some of \['keep_larger', .*got \['keep'\]",
        ),
        ("number_filtering", {"operations": []}, r"got \[\]"),
        ("star_graph", {"degree": 1}, "expected degree >= 2 and arm_length >= 1, got 1 and 2"),
        ("star_graph", {"arm_length": 0}, "got 2 and 0"),
        ("star_graph", {"labels": 4}, "have 5 nodes; labels must be between that and 52, got 4"),
        ("star_graph", {"labels": 53}, "got 53"),
        ("star_graph", {"labels": 5, "train_size": 5000}, "found .* expected 5000 and 1024"),
        ("reasoning_gym", {"dataset": "n_queens"}, "refused: its verifier calls Python's eval"),
        ("reasoning_gym", {"dataset": "no_such"}, "has no dataset 'no_such'"),
        ("reasoning_gym", {"dataset": "zebra_puzzles"}, "was not reviewed"),
        ("reasoning_gym", {"dataset": "gcd", "nums": 1}, r"no option \['nums'\]; expected some"),
    ],
)
def test_load_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(name, **options)


def test_an_answer_without_digits_cannot_be_corrupted():
    with pytest.raises(ValueError, match="wrong_fraction to 0"):
        demonstrations.corrupt("yes", np.random.default_rng(0))


def test_a_problem_brings_its_own_mistakes():
    problem = Problem("p", "12", wrong_answers=("x", "y"))
    rng = np.random.default_rng(0)
    assert {demonstrations.mistake(problem, rng) for _ in range(30)} == {"x", "y"}
    assert demonstrations.demonstrations([problem] * 3, 0.0, rng) == ["12"] * 3
    assert demonstrations.mistake(Problem("p", "7"), rng) in set("012345689")


# -- number filtering -------------------------------------------------------------------------


KEEPS = {
    "k>": lambda number, bound: number > bound,
    "k<": lambda number, bound: number < bound,
    "r>": lambda number, bound: number <= bound,
    "r<": lambda number, bound: number >= bound,
}


def test_the_answer_lists_the_numbers_that_pass():
    task = tasks.load("number_filtering", numbers=4, train_size=200, test_size=40)
    problems = [*task.train, *task.test]
    for problem in problems:
        head, given = problem.prompt.removesuffix("=").split(":")
        keeps, bound = KEEPS[head[:2]], int(head[2:])
        assert problem.answer == ",".join(n for n in given.split(",") if keeps(int(n), bound))
        assert len(problem.prompt) <= task.max_prompt_tokens
        assert len(problem.answer) < task.max_response_tokens
    assert {p.prompt[:2] for p in problems} == set(KEEPS)
    rewards, _ = task.verify_batch(problems, [p.answer for p in problems])
    assert rewards.all()


def test_only_the_exact_list_is_rewarded():
    task = tasks.load("number_filtering", train_size=200, test_size=40)
    problem = next(p for p in task.train if "," in p.answer)
    right = problem.answer
    others = [right + ",", "," + right, right + " ", right.replace(",", ", "), "", f"['{right}']"]
    rewards, _ = task.verify_batch([problem] * 7, [right, *others])
    assert rewards.tolist() == [1.0] + [0.0] * 6


def test_a_list_can_be_empty():
    task = tasks.load("number_filtering", digits=1, train_size=400, test_size=40)
    problem = next(p for p in task.train if p.answer == "")
    first = problem.prompt.removesuffix("=").split(":")[1].split(",")[0]
    rewards, _ = task.verify_batch([problem] * 2, ["", first])
    assert rewards.tolist() == [1, 0]


def test_a_wrong_list_has_one_number_too_many_or_too_few():
    task = tasks.load("number_filtering", train_size=200, test_size=40)
    for problem in task.train:
        right = [n for n in problem.answer.split(",") if n]
        for wrong in problem.wrong_answers:
            assert abs(len([n for n in wrong.split(",") if n]) - len(right)) == 1
        assert len(problem.wrong_answers) == 3


def test_operations_can_be_chosen():
    chosen = ("keep_larger", "remove_smaller")
    task = tasks.load("number_filtering", operations=chosen, train_size=60, test_size=20)
    assert {p.prompt[:2] for p in task.train} == {number_filtering.SYMBOLS[name] for name in chosen}


# -- star graphs ------------------------------------------------------------------------------


@given(degree=st.integers(2, 4), arm_length=st.integers(1, 4), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_path_is_the_only_one_to_the_goal(degree, arm_length, seed):
    task = tasks.load(
        "star_graph",
        degree=degree,
        arm_length=arm_length,
        labels=26,
        train_size=10,
        test_size=4,
        seed=seed,
    )
    for problem in [*task.train, *task.test]:
        listed, ends = problem.prompt.removesuffix("=").split("/")
        edges = listed.split("|")
        before = {head: tail for tail, head in edges}
        assert len(before) == len(edges) == degree * arm_length  # no node has two predecessors
        path = ends[1]
        while path[0] in before:
            path = before[path[0]] + path
        assert path == problem.answer and path[0] == ends[0]
        assert sum(edge[0] == ends[0] for edge in edges) == degree
        assert len(problem.prompt) == task.max_prompt_tokens
        assert len(problem.answer) + 1 == task.max_response_tokens == arm_length + 2


def test_wrong_paths_follow_the_other_arms():
    task = tasks.load("star_graph", degree=3, arm_length=2, train_size=50, test_size=10)
    for problem in task.train:
        edges = set(problem.prompt.split("/")[0].split("|"))
        arms = [problem.answer, *problem.wrong_answers]
        assert len({arm[1] for arm in arms}) == 3
        assert {arm[i : i + 2] for arm in arms for i in range(2)} == edges
        rewards, _ = task.verify_batch([problem] * 3, arms)
        assert rewards.tolist() == [1, 0, 0]


def test_the_goal_says_nothing_about_where_its_arm_is_listed():
    task = tasks.load("star_graph", train_size=4000, test_size=10)
    first = [
        p.prompt.index(p.answer[:2]) < p.prompt.index(p.wrong_answers[0][:2]) for p in task.train
    ]
    assert abs(np.mean(first) - 0.5) < 0.025  # three standard errors of n = 4000


# -- reasoning-gym ----------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["gcd", "spell_backward", "products", "caesar_cipher"])
def test_a_dataset_accepts_its_own_answers_and_no_empty_ones(dataset):
    task = tasks.load("reasoning_gym", dataset=dataset, train_size=12, test_size=4)
    problems = [*task.train, *task.test]
    right, _ = task.verify_batch(problems, [p.answer for p in problems])
    empty, _ = task.verify_batch(problems, ["" for _ in problems])
    assert right.all() and not empty.any()
    tokens, mask = encode_prompts(
        task.tokenizer, [p.prompt for p in problems], task.max_prompt_tokens
    )
    assert task.tokenizer.decode_batch(tokens, mask) == [p.prompt for p in problems]


def _calls(cls):
    """Names of the functions that the methods of a class call, its own bases included."""
    names = set()
    for base in cls.__mro__:
        if base.__module__.startswith(package.__name__) and base is not ProceduralDataset:
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(node, ast.Call):
                    names.add(getattr(node.func, "id", getattr(node.func, "attr", "")))
    return names


@pytest.mark.parametrize("dataset", sorted(gym.ALLOWED))
def test_no_allowed_verifier_evaluates_text(dataset):
    assert not _calls(DATASETS[dataset][0]) & {"eval", "exec", "parse_expr", "sympify", "loads"}


def test_the_scan_finds_evaluation_where_it_is():
    assert "eval" in _calls(DATASETS["n_queens"][0])
    assert "parse_expr" in _calls(DATASETS["countdown"][0])


def test_refused_and_allowed_are_known_and_apart():
    assert not gym.ALLOWED & set(gym.REFUSED)
    assert set(DATASETS) >= gym.ALLOWED | set(gym.REFUSED)


# -- splits, prompts, tokenizer ---------------------------------------------------------------


def test_no_prompt_is_in_both_splits_or_twice(sums):
    train, test = [p.prompt for p in sums.train], [p.prompt for p in sums.test]
    assert len(set(train)) == 60 and len(set(test)) == 20 and not set(train) & set(test)


def test_the_split_is_the_same_everywhere():
    """By a stable hash, not by Python's salted one."""
    tested = [i for i in range(12) if splits.in_test(f"{i}+1=")]
    assert tested == [9, 10]
    assert sum(splits.in_test(f"{i}+1=") for i in range(5000)) == 976  # a fifth of them


def test_prompts_are_left_padded():
    tokens, mask = encode_prompts(CharacterTokenizer("ab"), ["ab", "b"], 3)
    assert tokens.tolist() == [[0, 2, 3], [0, 0, 3]]
    assert mask.tolist() == [[False, True, True], [False, False, True]]


@pytest.mark.parametrize("prompt", ["", "abab"])
def test_a_prompt_that_does_not_fit_is_refused(prompt):
    with pytest.raises(ValueError, match="expected 1 to 3"):
        encode_prompts(CharacterTokenizer("ab"), ["a", prompt], 3)


@given(
    seed=st.integers(0, 50), count=st.integers(1, 7), size=st.integers(1, 9), step=st.integers(0, 5)
)
def test_every_epoch_is_a_permutation(seed, count, size, step):
    serial = np.concatenate([prompt_indices(seed, s, count, size) for s in range(step + 1)])
    for epoch in range(len(serial) // size):
        assert sorted(serial[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_prompt_order_depends_on_the_seed():
    assert not np.array_equal(prompt_indices(0, 0, 50, 50), prompt_indices(1, 0, 50, 50))
    with pytest.raises(ValueError, match="no prompts"):
        prompt_indices(0, 0, 1, 0)


@given(text=st.text(ALPHABET, max_size=12))
def test_decoding_undoes_encoding(text):
    tokenizer = CharacterTokenizer(ALPHABET)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, *tokenizer.encode(text), tokenizer.end_id, 5]) == text


def test_tokenizer_refuses():
    with pytest.raises(ValueError, match="'x' of '1x' is not in the alphabet"):
        CharacterTokenizer("12").encode("1x")
    with pytest.raises(ValueError, match="occurs twice"):
        CharacterTokenizer("121")


def test_tokens_beyond_the_alphabet_are_shown_as_unknown():
    assert CharacterTokenizer("a").decode([2, 9, 2]) == "a\N{REPLACEMENT CHARACTER}a"
