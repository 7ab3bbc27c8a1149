r"""Tasks whose answers are mathematics in LaTeX, verified by form, by value, and in processes.

A verdict is right, wrong or invalid, and has a reason. An answer passes through tiers, and the
first that decides ends it:

  extraction  no box and no `Answer:` line (`math_answers.extract_answer`): wrong.
  text        the text of the reference: right.
  form        longer or deeper than any reference, or nothing that denotes a value
              (`math_reading.read`): wrong.
  value       words, units, lists, exact numbers, compared as they were read (`math_compare`).
  symbolic    formulas, at many digits (`math_numeric.equal`), in a process that can be killed; and
              references that `math_reading` does not read, by math-verify (`symbolic.equivalent`),
              which knows integrals, sums and limits.
  costly      it took more computing than a verdict may, or a rollout has left for it: wrong.

What the model wrote is judged: no answer, one of a form that no answer has, or one that is legal
but too costly is *wrong*, with reward 0. Were it invalid, a model could leave the loss whenever it
does not know the answer. What the verifier could not do is no judgement: a worker that died,
raised or could not start, and a reference that cannot be read, make an *invalid* sample, never
reward 0.

A whole rollout waits at most `Limits.batch_seconds`, whatever the answers are. `math_numeric`
needs milliseconds for any of them, so these go first, side by side; should time run out among the
others, those whose turn did not come are invalid.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from occ.tasks import math_numeric
from occ.tasks.math_answers import extract_answer
from occ.tasks.math_compare import compare
from occ.tasks.math_reading import read, read_with_units
from occ.tasks.math_tokens import MAX_CHARACTERS, UnreadableError
from occ.tasks.math_typography import bare, typography
from occ.tasks.task import Problem, Task, VerifierError
from occ.tasks.workers import Failure, Limits, WorkerPool

FOLDER = pathlib.Path(__file__).parent
NUMERIC, SYMBOLIC = FOLDER / "math_numeric.py", FOLDER / "symbolic.py"

Tier = Literal["extraction", "text", "form", "value", "symbolic", "costly", "failed"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one answer.

    Attributes:
      reward: 1 for a right answer, 0 for a wrong one; None for an invalid sample.
      tier: that decided, or "failed".
      detail: why an answer is unreadable, too costly, or could not be judged.
    """

    reward: float | None
    tier: Tier
    detail: str = ""

    @property
    def outcome(self) -> Literal["right", "wrong", "invalid"]:
        """In a word."""
        return "invalid" if self.reward is None else "right" if self.reward else "wrong"


class MathVerifier:
    """Judges the final answers of completions against references in LaTeX.

    Start one and keep it: its workers take a while to start. It is a context manager.

    Args:
      extract: the final answer of a completion, or None.
      workers: processes.
      limits: bounds on each of them, and on a batch.

    Raises:
      RuntimeError: a worker does not start; what it needs is in the extra `math`.
    """

    def __init__(
        self,
        extract: Callable[[str], str | None] = extract_answer,
        *,
        workers: int = 2,
        limits: Limits | None = None,
    ):
        self.extract = extract
        self._options: dict[str, Any] = {"workers": workers, "limits": limits}
        self._seconds = (Limits() if limits is None else limits).batch_seconds
        self.pool = WorkerPool(NUMERIC, "judge", **self._options)

    @functools.cached_property
    def symbolic(self) -> WorkerPool:
        """Processes with math-verify; few sets need them, so they start when they are asked for."""
        return WorkerPool(SYMBOLIC, "equivalent", **self._options)

    def __call__(self, problem: Problem, completion: str) -> float:
        """The reward of one completion.

        Raises:
          VerifierError: it could not be judged.
        """
        [verdict] = self.judge([problem.answer], [completion])
        if verdict.reward is None:
            raise VerifierError(verdict.detail)
        return verdict.reward

    def judge(self, references: Sequence[str], completions: Sequence[str]) -> list[Verdict]:
        """Verdicts on completions, in their order; equal answers are judged once.

        Args:
          references: the right answer of each, without a box.
          completions: N texts.
        """
        answers = [self.extract(completion) for completion in completions]
        return self.judge_answers(references, answers)

    def judge_answers(
        self, references: Sequence[str], answers: Sequence[str | None], *, by_text: bool = True
    ) -> list[Verdict]:
        """Verdicts on answers that were extracted.

        Args:
          references: the right answers.
          answers: N texts; None for a completion without an answer.
          by_text: whether equal texts are right without being read.
        """
        deadline = time.monotonic() + self._seconds
        pairs = list(zip(references, answers, strict=True))
        verdicts: dict[tuple[str, str | None], Verdict] = {}
        formulas: dict[tuple[str, str], list[Any]] = {}
        others: list[tuple[str, str]] = []
        for reference, answer in dict.fromkeys(pairs):
            try:
                found = first_tiers(reference, answer, by_text=by_text)
            except Exception as error:  # a fault of the reader's, which is no judgement
                found = Verdict(None, "failed", f"{type(error).__name__}: {error}")
            if isinstance(found, Verdict):
                verdicts[reference, answer] = found
            elif found:
                formulas[reference, str(answer)] = found
            else:
                others.append((reference, str(answer)))
        requests = [(json.dumps(found),) for found in formulas.values()]
        results = self.pool.map(requests, seconds=deadline - time.monotonic())
        for pair, found, result in zip(formulas, formulas.values(), results, strict=True):
            verdicts[pair] = _numeric_verdict(pair, found, result)
        if others:
            texts = [(plain(reference), plain(answer)) for reference, answer in others]
            results = self.symbolic.map(texts, seconds=deadline - time.monotonic())
            verdicts.update(zip(others, map(_symbolic_verdict, results), strict=True))
        return [verdicts[pair] for pair in pairs]

    def check_references(
        self, references: Iterable[str], neighbours: Iterable[str] | None = None
    ) -> dict[str, str]:
        """What is the matter with references that this verifier cannot judge answers against.

        Each is judged as an answer to itself, not by its text, and must be right; and so is its
        neighbour, another reference, unless that has the same text.

        Args:
          references: distinct or not.
          neighbours: one for each; by default the one that follows.

        Returns:
          Problems by reference; empty if all is well.
        """
        distinct = list(dict.fromkeys(references))
        others = [*distinct[1:], *distinct[:1]] if neighbours is None else list(neighbours)
        own = self.judge_answers(distinct, distinct, by_text=False)
        problems = {}
        for reference, verdict in zip(distinct, own, strict=True):
            if verdict.reward != 1.0:
                reason = verdict.detail or "it is not found equal to itself"
                problems[reference] = f"judged against itself it is {verdict.outcome}: {reason}"
        for reference, verdict in zip(distinct, self.judge_answers(distinct, others), strict=True):
            if verdict.reward is None and reference not in problems:
                problems[reference] = f"another answer cannot be judged: {verdict.detail}"
        return problems

    def close(self) -> None:
        """Ends the workers."""
        self.pool.close()
        if "symbolic" in self.__dict__:
            self.symbolic.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plain(text: str) -> str:
    """An answer without typography and what stands around it, spaces as one.

    >>> plain(" **３ +  x**.")
    '3 + x'
    """
    return re.sub(r"\s+", " ", bare(typography(text.strip())))


def first_tiers(
    reference: str, answer: str | None, *, by_text: bool = True
) -> Verdict | list[tuple[Any, Any]]:
    """A verdict without a worker; or pairs of formulas for one, none if math-verify is to judge."""
    if answer is None or not answer.strip():
        return Verdict(0.0, "extraction", "no final answer")
    if len(answer) > MAX_CHARACTERS:
        return Verdict(0.0, "form", f"more than {MAX_CHARACTERS} characters")
    if by_text and plain(reference) == plain(answer):
        return Verdict(1.0, "text")
    try:
        expected = read(reference)
    except UnreadableError as error:
        return _unread(reference, answer, str(error))
    try:
        found = _readings(reference, answer)
    except UnreadableError as error:
        return Verdict(0.0, "form", str(error))
    opened: dict[tuple[Any, Any], None] = {}

    def equal(one: Any, other: Any) -> bool | None:
        verdict = exactly(one, other)
        if verdict is None:
            opened[one, other] = None
        return verdict

    verdict = compare(expected, found, equal)
    return list(opened) if verdict is None else Verdict(float(verdict), "value")


def _readings(reference: str, answer: str) -> tuple[Any, ...]:
    """Of an answer; a letter after a space is a unit too, where the reference has no letters."""
    bare_reference = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+", "", reference)
    if re.search(r"[A-Za-z]", bare_reference):
        return read(answer)
    return read_with_units(answer)


# What only math-verify reads, and nothing that costs before it is known to.
_FOR_MATH_VERIFY = re.compile(r"[0-9A-Za-z \\{}()\[\]|+*/^_=<>.,:;!&'-]*", re.ASCII)


def _unread(reference: str, answer: str, problem: str) -> Verdict | list[tuple[Any, Any]]:
    if not re.search(r"\\(?:int|sum|prod|lim|cap|max|min|gcd)(?![A-Za-z])", reference):
        return Verdict(None, "failed", f"the reference {reference!r} cannot be read: {problem}")
    for text in (reference, answer):
        if _FOR_MATH_VERIFY.fullmatch(plain(text)) is None or "__" in text:
            return Verdict(0.0, "form", "characters that no formula has")
    return []


def exactly(one: Any, other: Any) -> bool | None:
    """Whether two formulas are equal as far as that takes no more than rational numbers."""
    if one == other:
        return True
    try:
        values = math_numeric.exact(one), math_numeric.exact(other)
    except math_numeric.TooLargeError:
        return False
    return None if None in values else values[0] == values[1]


def _numeric_verdict(
    pair: tuple[str, str], found: list[tuple[Any, Any]], result: list[bool | None] | Failure
) -> Verdict:
    if isinstance(result, Failure):
        return _failed(result)
    known = dict(zip(found, result, strict=True))

    def equal(one: Any, other: Any) -> bool | None:
        verdict = exactly(one, other)
        return known.get((one, other)) if verdict is None else verdict

    verdict = compare(read(pair[0]), _readings(*pair), equal)
    if verdict is None:
        return Verdict(None, "failed", f"the reference {pair[0]!r} has no value to compare with")
    return Verdict(float(verdict), "symbolic")


def _symbolic_verdict(result: bool | Failure | None) -> Verdict:
    if isinstance(result, Failure):
        return _failed(result)
    if result is None:
        return Verdict(None, "failed", "math-verify does not read the reference")
    return Verdict(float(result), "symbolic")


def _failed(failure: Failure) -> Verdict:
    detail = f"{failure.reason}: {failure.detail}"
    if failure.reason == "time":
        return Verdict(0.0, "costly", detail)
    return Verdict(None, "failed", detail)


@dataclasses.dataclass(frozen=True)
class MathTask(Task):
    """A task whose `verifier` is a `MathVerifier`, which judges a whole batch in parallel."""

    verifier: MathVerifier

    def final_answer(self, completion: str) -> str | None:
        """As `Task.final_answer`; answers count as one if they are read as one value."""
        answer = self.verifier.extract(completion)
        if answer is None or not answer.strip():
            return None
        if len(answer) > MAX_CHARACTERS:
            return answer[:MAX_CHARACTERS]
        try:
            [value, *_] = read(answer)
        except Exception:  # it is unreadable, or the reader fails: the text itself is the vote
            return plain(answer)
        return spelling(value) or plain(answer)

    def verify_batch(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Task.verify_batch`."""
        verdicts = self.verifier.judge([problem.answer for problem in problems], completions)
        invalid = {
            i: verdict.detail for i, verdict in enumerate(verdicts) if verdict.reward is None
        }
        self.warn_of_invalid(problems, completions, invalid)
        rewards = np.array([verdict.reward or 0.0 for verdict in verdicts], np.float32)
        return rewards, np.array([verdict.reward is not None for verdict in verdicts], bool)


def spelling(value: Any) -> str:
    """A number in one spelling; nothing for other values.

    >>> spelling(("num", 1, 2))
    '1/2'
    """
    return str(math_numeric.exact(value)) if value[0] == "num" else ""
