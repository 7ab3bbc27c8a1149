"""Tasks of the reasoning-gym package, as far as their verifiers are safe.

Some verifiers of that package evaluate the model's answer as Python code. A model's output must
never be run in this process, so only verifiers that were read and found to compare text or parse
numbers are allowed; the dangerous ones are refused with the reason, all others as not reviewed.

What they see is bounded (`too_large`), since a number such as 1e99999999999 would be written out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from occ.sources import resolve
from occ.tasks import splits
from occ.tasks.free_text import EXTRACTIONS
from occ.tasks.task import Problem, Task
from occ.tasks.tokenizer import CharacterTokenizer, Tokenizer

_EVAL = "its verifier calls Python's eval on the model's answer"
_SYMPY = "its verifier calls sympy's parse_expr, which evaluates the model's answer"

REFUSED = {
    "binary_matrix": _EVAL,
    "bitwise_arithmetic": "its module evaluates expressions with Python's eval",
    "codeio": "its module calls Python's exec",
    "composite": "it hands the answer on to the verifiers of other tasks",
    "countdown": _SYMPY,
    "intermediate_integration": _SYMPY,
    "n_queens": _EVAL,
    "number_sorting": _EVAL,
    "polynomial_multiplication": _SYMPY,
    "propositional_logic": "its module evaluates formulas with a parse_expr of its own",
    "puzzle24": _SYMPY,
    "rubiks_cube": "its verifier expands the answer with a library's evaluator",
    "simple_integration": _SYMPY,
    "spiral_matrix": _EVAL,
    "string_insertion": _EVAL,
}

# Verifiers inherited from the package's base class: they compare strings.
_COMPARES_STRINGS = frozenset(
    [
        "aiw",
        "base_conversion",
        "binary_alternation",
        "caesar_cipher",
        "count_bits",
        "count_primes",
        "gcd",
        "isomorphic_strings",
        "largest_island",
        "lcm",
        "leg_counting",
        "letter_counting",
        "maze",
        "modulo_grid",
        "number_filtering",
        "number_sequence",
        "ransom_note",
        "rotate_matrix",
        "rotten_oranges",
        "simple_equations",
        "simple_geometry",
        "string_manipulation",
        "string_splitting",
        "string_synthesis",
        "syllogism",
        "word_sequence_reversal",
    ]
)
# Verifiers of their own, read: they compare strings or parse numbers.
_READ = frozenset(
    [
        "calendar_arithmetic",
        "chain_sum",
        "coin_flip",
        "decimal_chain_sum",
        "family_relationships",
        "gsm_symbolic",
        "mini_sudoku",
        "path_star",
        "products",
        "shortest_path",
        "spell_backward",
        "sudoku",
        "word_sorting",
    ]
)
ALLOWED = _COMPARES_STRINGS | _READ


MAX_CHARACTERS = 4096  # of an answer, if the right one is not longer
_LARGE = re.compile(r"\d{200}|[eE][+-]?\d{3}")


def too_large(answer: str, right: str) -> bool:
    """Whether an answer is wrong by its form: too long, or a number that does not fit a float.

    >>> too_large("1e99,999,999", "0.5"), too_large("0.5e-3", "0.5")
    (True, False)
    """
    if len(answer) > max(MAX_CHARACTERS, 2 * len(right)):
        return True
    if answer == right:
        return False
    return _LARGE.search(re.sub(r"[\s,_]", "", answer)) is not None


def check_allowed(dataset: str) -> None:
    """Raises for a dataset whose verifier must not see a model's output.

    Raises:
      ValueError: unknown, refused or not reviewed; with the reason.
    """
    if dataset in REFUSED:
        raise ValueError(
            f"reasoning_gym: {dataset!r} is refused: {REFUSED[dataset]}. Choose one of "
            f"{sorted(ALLOWED)}."
        )
    if dataset not in DATASETS:
        raise ValueError(f"reasoning_gym: the package has no dataset {dataset!r}.")
    if dataset not in ALLOWED:
        raise ValueError(
            f"reasoning_gym: the verifier of {dataset!r} was not reviewed. Read its score_answer, "
            "and add the name to ALLOWED if it never evaluates the answer."
        )


def load(
    *,
    dataset: str,
    train_size: int = 1024,
    test_size: int = 256,
    seed: int = 0,
    max_response_tokens: int | None = None,
    tokenizer: str | None = None,
    system_prompt: str | None = None,
    extraction: str = "text",
    **options: Any,
) -> Task:
    """Any allowed dataset, with the package's own question as the prompt.

    The reward is 1 where the package's verifier gives full marks, and 0 otherwise.

    Args:
      dataset: name in reasoning-gym.
      train_size, test_size: distinct prompts.
      seed: of the problems.
      max_response_tokens: an end token included; default twice the longest answer and one.
      tokenizer: of a published model, as `occ.sources.resolve` finds it; questions are then written
        in its chat template. None has characters as tokens, and the plain question as the prompt.
      system_prompt: first message of the chat; None leaves it to the template.
      extraction: what of a completion is its answer, one of `free_text.EXTRACTIONS`: all of the
        "text", or the last "number" of its `Answer:` line, or else of all.
      **options: of the dataset's own configuration.

    Raises:
      ValueError: a dataset that is refused, unknown or not reviewed; an option that it rejects;
        another extraction; a system prompt without a tokenizer.
    """
    check_allowed(dataset)
    if extraction not in EXTRACTIONS:
        raise ValueError(
            f"reasoning_gym: extraction must be one of {sorted(EXTRACTIONS)}, got {extraction!r}."
        )
    extract = EXTRACTIONS[extraction]
    write, chat_tokenizer = _prompt_writer(tokenizer, system_prompt)
    count = 8 * (train_size + test_size)
    known = set(DATASETS[dataset][1].__dataclass_fields__) - {"size", "seed"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"reasoning_gym: {dataset!r} has no option {unknown}; expected some of {sorted(known)}."
        )
    source = reasoning_gym.create_dataset(dataset, size=count, seed=seed, **options)

    def problems() -> Iterator[Problem]:
        for index in range(count):
            entry = source[index]
            yield Problem(write(entry["question"]), entry["answer"], entry)

    def verify(problem: Problem, completion: str) -> float:
        answer = extract(completion)
        if answer is None or too_large(answer, problem.answer):
            return 0.0
        return float(source.score_answer(answer, problem.entry) >= 1.0)

    train, test = splits.split(problems(), train_size, test_size)
    everything = [*train, *test]
    if chat_tokenizer is None:
        alphabet = sorted({c for p in everything for c in p.prompt + p.answer})
        chat_tokenizer = CharacterTokenizer("".join(alphabet))
    encode = chat_tokenizer.encode
    longest = max(len(encode(problem.answer)) for problem in everything)
    return Task(
        name=dataset,
        tokenizer=chat_tokenizer,
        train=train,
        test=test,
        verifier=verify,
        max_prompt_tokens=max(len(encode(problem.prompt)) for problem in everything),
        max_response_tokens=2 * longest + 1 if max_response_tokens is None else max_response_tokens,
    )


def _prompt_writer(
    tokenizer: str | None, system_prompt: str | None
) -> tuple[Callable[[str], str], Tokenizer | None]:
    """How a question becomes a prompt, and the tokenizer whose template says so."""
    if tokenizer is None:
        if system_prompt is not None:
            raise ValueError(
                "reasoning_gym: a system_prompt needs a chat template. Give tokenizer=, the source "
                "of a published one, or leave the system prompt out."
            )
        return lambda question: question, None
    # Here, since tasks of characters do without the packages of published tokenizers.
    from occ.tasks import pretrained_tokenizer

    published = pretrained_tokenizer.load(resolve(tokenizer))
    first = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def write(question: str) -> str:
        return published.chat([*first, {"role": "user", "content": question}])

    return write, published
