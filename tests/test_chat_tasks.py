"""Tasks that are asked in a chat template and answered in free text."""

import pytest

from occ import tasks
from occ.tasks.free_text import extract_number
from occ.tasks.pretrained_tokenizer import PretrainedTokenizer
from occ.tasks.prompts import encode_prompts
from tests.test_tokenizers import write_folder

SUMS = {"dataset": "chain_sum", "max_terms": 2, "max_digits": 1, "extraction": "number"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def sums(folder):
    return tasks.load(
        "reasoning_gym", **SUMS, train_size=12, test_size=4, tokenizer=folder, system_prompt="Add."
    )


def test_questions_are_asked_in_the_template(sums, folder):
    for problem in [*sums.train, *sums.test]:
        assert problem.prompt.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n")
        assert problem.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert problem.entry["question"] in problem.prompt
    assert isinstance(sums.tokenizer, PretrainedTokenizer)
    plain = tasks.load("reasoning_gym", **SUMS, train_size=12, test_size=4, tokenizer=folder)
    assert not any("system" in problem.prompt for problem in plain.train)


def test_the_longest_prompt_and_answer_fit(sums):
    problems = [*sums.train, *sums.test]
    encoded = [sums.tokenizer.encode(problem.prompt) for problem in problems]
    assert max(map(len, encoded)) == sums.max_prompt_tokens
    tokens, mask = encode_prompts(
        sums.tokenizer, [p.prompt for p in problems], sums.max_prompt_tokens
    )
    assert tokens[0, mask[0]].tolist() == encoded[0]
    assert all(
        len(sums.tokenizer.encode(problem.answer)) < sums.max_response_tokens
        for problem in problems
    )


def test_the_number_in_a_sentence_is_judged(sums):
    problem = sums.train[0]
    right, wrong = problem.answer, str(int(problem.answer) + 1)
    completions = {
        right: 1,
        f"The answer is {right}.": 1,
        f"{wrong}? No: {right}": 1,
        f"Answer: {right}\n(of 9 and 9)": 1,
        f"{right} or {wrong}": 0,
        f"Answer: {wrong}\nOr {right}.": 0,
        f"{right}{right}": 0,
        "I do not know.": 0,
        "": 0,
        "9" * 5000: 0,
        "__import__('os')": 0,
    }
    rewards, valid = sums.verify_batch([problem] * len(completions), list(completions))
    assert rewards.tolist() == list(completions.values()) and valid.all()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12 + 30 = 42.", "42"),
        ("= -7", "-7"),
        ("-7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("(-3)", "-3"),
        ("$1,234.50 in all", "1234.50"),
        ("1,2345", "2345"),
        ("12,34", "34"),
        ("3.14", "3.14"),
        ("x2", "2"),
        ("**42**", "42"),
        ("Answer: 5 apples", "5"),
        ("Answer: 5\nAnswer: 6\n7", "6"),
        ("Answer: none\n7", None),
        ("no", None),
        ("9" * 61, None),
        ("9" * 60, "9" * 60),
    ],
)
def test_the_last_number_is_the_answer(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "n_queens"}, "refused: its verifier calls Python's eval"),
        ({"dataset": "countdown"}, "refused: its verifier calls sympy's parse_expr"),
        ({"dataset": "gcd", "extraction": "last"}, r"one of \['number', 'text'\], got 'last'"),
        ({"dataset": "gcd", "tokenizer": None, "system_prompt": "x"}, "needs a chat template"),
        ({"dataset": "gcd", "tokenizer": "/nowhere"}, "no file or folder '/nowhere'"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load("reasoning_gym", **{"tokenizer": folder, **options})
