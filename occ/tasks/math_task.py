"""Tasks whose answers are mathematics in LaTeX, verified in worker processes.

An answer passes through tiers, and the first that decides ends it:

  extraction  no box, or no `Answer:` line: wrong.
  text        the same text as the reference after normalisation: right.
  form        longer, deeper or larger than any reference, or with characters and commands that none
              has (`math_answers.unreadable`): wrong, before anything of it is evaluated.
  value       numbers, units, words, and lists of them, compared exactly (`math_values.compare`).
  symbolic    math-verify, in a process that can be killed (`symbolic.equivalent`).

What the model wrote is judged: no answer, or one of a form that no answer has, is *wrong*, with
reward 0. Were it invalid, a model could leave the loss whenever it does not know the answer. What
the verifier could not do is no judgement: a worker that ran out of time or memory, raised or died
is an *invalid* sample, never reward 0. The bounds on form are narrow in order that a model reaches
the second case rarely; `Verdict.tier` counts it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from occ.tasks.math_answers import MAX_CHARACTERS, extract_boxed, normalise, unreadable
from occ.tasks.math_values import compare, is_value, split_unit
from occ.tasks.task import Problem, Task, VerifierError
from occ.tasks.workers import Failure, Limits, WorkerPool

SYMBOLIC = pathlib.Path(__file__).with_name("symbolic.py")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one answer.

    Attributes:
      reward: 1 for a right answer, else 0; None if it could not be judged.
      tier: that decided, or "failed".
      detail: why an answer is unreadable or a verifier failed.
    """

    reward: float | None
    tier: Literal["extraction", "text", "form", "value", "symbolic", "failed"]
    detail: str = ""


class MathVerifier:
    """Judges the final answers of completions against references in LaTeX.

    Start one and keep it: its workers take half a second each to start. It is a context manager.

    Args:
      extract: the final answer of a completion, or None; `math_answers.extract_boxed` or
        `math_answers.extract_answer_line`.
      workers: processes.
      limits: bounds on each of them.

    Raises:
      RuntimeError: a worker does not start; math-verify is in the extra `math`.
    """

    def __init__(
        self,
        extract: Callable[[str], str | None] = extract_boxed,
        *,
        workers: int = 2,
        limits: Limits | None = None,
    ):
        self.extract = extract
        self.pool = WorkerPool(SYMBOLIC, "equivalent", workers=workers, limits=limits)

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
        verdicts: dict[int, Verdict] = {}
        open_pairs: dict[tuple[str, str], list[int]] = {}
        for i, (reference, completion) in enumerate(zip(references, completions, strict=True)):
            verdict = self._cheap(reference, self.extract(completion))
            if isinstance(verdict, Verdict):
                verdicts[i] = verdict
            else:
                open_pairs.setdefault(verdict, []).append(i)
        for result, places in zip(
            self.pool.map(list(open_pairs)), open_pairs.values(), strict=True
        ):
            verdicts.update(dict.fromkeys(places, _symbolic_verdict(result)))
        return [verdicts[i] for i in range(len(verdicts))]

    def check_references(self, references: Iterable[str]) -> None:
        """Raises for references that this verifier cannot judge answers against.

        Raises:
          ValueError: naming the references, and what is the matter with each.
        """
        problems = {}
        pairs = {text: normalise(text[: MAX_CHARACTERS + 1]) for text in references}
        results = self.pool.map([(text, text) for text in pairs.values()])
        for (reference, text), result in zip(pairs.items(), results, strict=True):
            form = unreadable(text)
            if form is not None:
                problems[reference] = form
            elif result is not True and not is_value(text):
                problems[reference] = "math-verify does not find it equal to itself"
        if problems:
            raise ValueError(
                f"MathVerifier: these references cannot be verified: {problems}. Leave their "
                "problems out, or write them otherwise."
            )

    def close(self) -> None:
        """Ends the workers."""
        self.pool.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _cheap(reference: str, answer: str | None) -> Verdict | tuple[str, str]:
        """A verdict without a worker, or what to ask one."""
        if answer is None:
            return Verdict(0.0, "extraction", "no final answer")
        if len(answer) > MAX_CHARACTERS:
            return Verdict(0.0, "form", f"more than {MAX_CHARACTERS} characters")
        expected, found = normalise(reference), normalise(answer)
        if expected == found:
            return Verdict(1.0, "text")
        form = unreadable(found)
        if form is not None:
            return Verdict(0.0, "form", form)
        form = unreadable(expected)
        if form is not None:
            return Verdict(None, "failed", f"the reference {reference!r} has {form}")
        equal = compare(expected, found)
        if equal is not None:
            return Verdict(float(equal), "value")
        (bare, unit), (found_bare, found_unit) = split_unit(expected), split_unit(found)
        if unit and found_unit and unit != found_unit:
            return Verdict(0.0, "value")
        if "degree" in (unit, found_unit) and r"\pi" in bare + found_bare:
            return expected, found  # an angle in degrees and in radians
        return bare, found_bare


def _symbolic_verdict(result: bool | Failure | None) -> Verdict:
    if isinstance(result, Failure):
        return Verdict(None, "failed", f"{result.reason}: {result.detail}")
    if result is None:
        return Verdict(None, "failed", "math-verify does not read the reference")
    return Verdict(float(result), "symbolic")


@dataclasses.dataclass(frozen=True)
class MathTask(Task):
    """A task whose `verifier` is a `MathVerifier`, which judges a whole batch in parallel."""

    verifier: MathVerifier

    def final_answer(self, completion: str) -> str | None:
        """As `Task.final_answer`; answers count as one if they are equal after normalisation."""
        answer = self.verifier.extract(completion)
        if answer is None or not answer.strip():
            return None
        return normalise(answer) if len(answer) <= MAX_CHARACTERS else answer[:MAX_CHARACTERS]

    def verify_batch(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Task.verify_batch`."""
        verdicts = self.verifier.judge([problem.answer for problem in problems], completions)
        rewards = np.array([verdict.reward or 0.0 for verdict in verdicts], np.float32)
        return rewards, np.array([verdict.reward is not None for verdict in verdicts], bool)
