r"""Published problems of mathematics as a task: what to train on, and benchmarks to be judged by.

    task = tasks.load("math", dataset="dapo_math_17k", tokenizer="models/MiMo-7B-RL",
                      data_dir="data", benchmarks=("aime_2024", "math_500"))

Every prompt is a problem in the words of `PROMPTS[extract]`, for training and benchmarks alike;
whatever they ask for, an answer is found where it stands (`math_answers.extract_answer`). A prompt
goes through the tokenizer's chat template where that has one. With `extract="answer_line"` the
prompts of DAPO-Math-17k are, to the letter, those that were published.

What is left out is counted (`Selection`): prompts that are too long; references that the verifier
cannot judge, each tried as an answer to itself and to its neighbour, by name and reason; and, of
training, problems that a benchmark has too. The last are found by their
text alone, without case, space and punctuation (`answers.same_problem`): a problem told in other
words is not found.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, overload

import numpy as np

from occ import sources
from occ.tasks import datasets
from occ.tasks.datasets.answers import DAPO_AFTER, DAPO_BEFORE, same_problem
from occ.tasks.datasets.files import Row
from occ.tasks.math_task import MathTask, MathVerifier
from occ.tasks.task import Problem
from occ.tasks.tokenizer import CharacterTokenizer, Tokenizer
from occ.tasks.workers import Limits

Extract = Literal["boxed", "answer_line"]

PROMPTS = {
    # The instruction of Qwen2.5-Math's evaluation (arXiv 2409.12122), in general use since.
    "boxed": ("", "\n\nPlease reason step by step, and put your final answer within \\boxed{}."),
    "answer_line": (DAPO_BEFORE, DAPO_AFTER),
}
"""What stands before and after a problem."""

CHARACTERS = "".join(c for c in string.printable if c not in "\r\x0b\x0c")

NAMED = 20  # problems that cannot be judged, in a message

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What became of a set's problems, each counted once.

    Attributes:
      name: of the set.
      problems: in the set, duplicates already left out.
      too_long: left out; their prompts have more tokens than `max_prompt_tokens`.
      unjudged: left out; (identity, why the verifier cannot judge answers against its reference).
      in_benchmark: left out of training since a benchmark has them; (benchmark, problems).
      kept: problems.
    """

    name: str
    problems: int
    too_long: int
    unjudged: tuple[tuple[str, str], ...]
    in_benchmark: tuple[tuple[str, int], ...]
    kept: int

    def __str__(self) -> str:
        parts = [f"{self.too_long} too long", f"{len(self.unjudged)} that cannot be judged"]
        parts += [f"{count} also in {name}" for name, count in self.in_benchmark]
        named = [f"\n  {identity}: {reason}" for identity, reason in self.unjudged[:NAMED]]
        if len(self.unjudged) > NAMED:
            named.append(f"\n  and {len(self.unjudged) - NAMED} more")
        text = f"{self.name}: {self.kept} of {self.problems} problems; " + ", ".join(parts)
        return text + "".join(named)


class LazyProblems(Sequence[Problem]):
    """Problems that are read from array_record when they are asked for.

    Args:
      source: from `builder.as_data_source`.
      numbers: int [N], which of its records, and in what order.
      make: the problem of a record.
    """

    def __init__(self, source: Sequence[dict], numbers: np.ndarray, make: Callable[[Row], Problem]):
        self._source, self._numbers, self._make = source, numbers, make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> LazyProblems: ...
    def __getitem__(self, index: int | slice) -> Problem | LazyProblems:
        if isinstance(index, slice):
            return LazyProblems(self._source, self._numbers[index], self._make)
        return self._make(datasets.read(self._source[int(self._numbers[index])]))


@dataclasses.dataclass(frozen=True)
class Mathematics(MathTask):
    """A task of published problems.

    Attributes:
      benchmarks: problems of each, by name; `test` has all of them in this order.
      selections: what became of the problems of each set, that of training first.
    """

    benchmarks: Mapping[str, Sequence[Problem]]
    selections: tuple[Selection, ...]


def load(
    *,
    tokenizer: str | pathlib.Path | Tokenizer,
    data_dir: str | pathlib.Path,
    dataset: str | None = "dapo_math_17k",
    benchmarks: Sequence[str] = datasets.SIX,
    extract: Extract = "answer_line",
    max_prompt_tokens: int = 2048,
    max_response_tokens: int = 8192,
    decontaminate: bool = True,
    verify: bool = True,
    workers: int = 2,
    limits: Limits | None = None,
) -> Mathematics:
    """Prepares the sets that are not prepared yet, and selects from them.

    Args:
      tokenizer: where a model's is (`sources.resolve`): a folder with tokenizer.json, or a .gguf
        file; or one itself; or "characters", one token an ASCII character, for demonstrations.
      data_dir: for files and prepared sets; see `datasets.builder`.
      dataset: whose "train" split is trained on; None loads benchmarks alone.
      benchmarks: whose "test" splits are evaluated on.
      extract: where the final answer stands, and so what prompts ask for.
      max_prompt_tokens: longer prompts are left out.
      max_response_tokens: of responses.
      decontaminate: leave problems out of training that one of `benchmarks` has too.
      verify: refuse files that are not the published ones, where that is known.
      workers: processes of the verifier.
      limits: on each of them.

    Raises:
      ValueError: unknown set or `extract`; no such tokenizer; a set without that split; nothing is
        left to train on.
      FileNotFoundError: files of a set are missing and cannot be downloaded.
      RuntimeError: the verifier does not start.
    """
    if extract not in PROMPTS:
        raise ValueError(f"mathematics: extract must be one of {list(PROMPTS)}, got {extract!r}.")
    tokenizer = _tokenizer(tokenizer)
    ask = prompt_maker(tokenizer, extract)
    sources_of = {name: _source(name, "test", data_dir, verify) for name in benchmarks}
    if dataset is not None:
        training_source = _source(dataset, "train", data_dir, verify)
    verifier = MathVerifier(workers=workers, limits=limits)
    try:
        found = {
            name: _benchmark(name, source, ask, tokenizer, max_prompt_tokens, verifier)
            for name, source in sources_of.items()
        }
        selections = [selection for _, selection, _ in found.values()]
        train: Sequence[Problem] = ()
        if dataset is not None:
            known = {name: keys for name, (_, _, keys) in found.items()} if decontaminate else {}
            train, selection = _training(
                dataset, training_source, ask, tokenizer, max_prompt_tokens, verifier, known
            )
            selections.insert(0, selection)
    except BaseException:
        verifier.close()
        raise
    for selection in selections:
        logger.log(logging.WARNING if selection.unjudged else logging.INFO, "%s", selection)
    tests = {name: problems for name, (problems, _, _) in found.items()}
    return Mathematics(
        name=f"math({dataset}, {extract})",
        tokenizer=tokenizer,
        train=train,
        test=[problem for problems in tests.values() for problem in problems],
        verifier=verifier,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        benchmarks=tests,
        selections=tuple(selections),
    )


def prompt_maker(tokenizer: Tokenizer, extract: Extract) -> Callable[[str], str]:
    """What makes a prompt of a bare problem, with the chat template of tokenizers that have one."""
    before, after = PROMPTS[extract]
    if getattr(tokenizer, "chat_template", None) is None:
        return lambda problem: before + problem + after
    chat = tokenizer.chat  # type: ignore[attr-defined]
    return lambda problem: chat([{"role": "user", "content": before + problem + after}])


def _tokenizer(tokenizer: str | pathlib.Path | Tokenizer) -> Tokenizer:
    if isinstance(tokenizer, str | pathlib.Path):
        if str(tokenizer) == "characters":
            return CharacterTokenizer(CHARACTERS)
        from occ.tasks import pretrained_tokenizer

        return pretrained_tokenizer.load(sources.resolve(str(tokenizer)))
    return tokenizer


def _source(name: str, split: str, data_dir: str | pathlib.Path, verify: bool) -> Sequence[dict]:
    published = datasets.find(name)
    if split not in published.files:
        raise ValueError(
            f"mathematics: {name!r} has no split {split!r}, only {sorted(published.files)}."
        )
    builder = datasets.prepare(name, data_dir, verify=verify)
    logger.info("%s: %s", name, datasets.counts(builder)[split])
    return builder.as_data_source(split=split)


def _problem(name: str, row: Row, ask: Callable[[str], str]) -> Problem:
    entry = {
        "set": name,
        "id": row.identity,
        "problem": row.problem,
        "subject": row.subject,
        "level": row.level,
    }
    return Problem(ask(row.problem), row.answer, entry)


def _benchmark(
    name: str,
    source: Sequence[dict],
    ask: Callable[[str], str],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    verifier: MathVerifier,
) -> tuple[list[Problem], Selection, set[str]]:
    """Its problems, what became of them, and the keys of all of them."""
    rows = [datasets.read(source[i]) for i in range(len(source))]
    bad = verifier.check_references(row.answer for row in rows)
    unjudged = tuple((row.identity, bad[row.answer]) for row in rows if row.answer in bad)
    problems = [_problem(name, row, ask) for row in rows if row.answer not in bad]
    fitting = [p for p in problems if len(tokenizer.encode_prompt(p.prompt)) <= max_prompt_tokens]
    too_long = len(problems) - len(fitting)
    selection = Selection(name, len(rows), too_long, unjudged, (), len(fitting))
    return fitting, selection, {same_problem(row.problem) for row in rows}


def _training(
    name: str,
    source: Sequence[dict],
    ask: Callable[[str], str],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    verifier: MathVerifier,
    known: dict[str, set[str]],
) -> tuple[LazyProblems, Selection]:
    """The problems to train on, and what became of the others; each has one reason."""
    bad = verifier.check_references(datasets.read(row).answer for row in source)
    numbers, unjudged = [], []
    too_long = 0
    overlap = dict.fromkeys(known, 0)
    for number in range(len(source)):
        row = datasets.read(source[number])
        key = same_problem(row.problem)
        benchmark = next((name for name, keys in known.items() if key in keys), None)
        if benchmark is not None:
            overlap[benchmark] += 1
        elif row.answer in bad:
            unjudged.append((row.identity, bad[row.answer]))
        elif len(tokenizer.encode_prompt(ask(row.problem))) > max_prompt_tokens:
            too_long += 1
        else:
            numbers.append(number)
    in_benchmark = tuple((name, count) for name, count in overlap.items() if count)
    selection = Selection(name, len(source), too_long, tuple(unjudged), in_benchmark, len(numbers))
    if not numbers:
        raise ValueError(
            f"mathematics: nothing is left to train on ({selection}). Raise max_prompt_tokens, "
            "or take another set."
        )
    return LazyProblems(source, np.array(numbers), lambda row: _problem(name, row, ask)), selection
