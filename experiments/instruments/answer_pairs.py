"""The committed pairs of references and answers, with the verdict of a careful marker."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

FILE = pathlib.Path(__file__).with_name("answer_pairs.txt")
HELD_OUT = pathlib.Path(__file__).with_name("answer_pairs_held_out.txt")


class Pair(NamedTuple):
    """One line of the file.

    Attributes:
      kind: heading that it stands under.
      reference: as a set of problems has it.
      answer: as written in the file.
      completion: what a model would have written.
      right: the marker's verdict.
    """

    kind: str
    reference: str
    answer: str
    completion: str
    right: bool


def load(file: pathlib.Path = FILE) -> list[Pair]:
    """All pairs, in the order of the file.

    Raises:
      ValueError: a line is no pair; file and line are named.
    """
    pairs, kind = [], ""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("## "):
            kind = line[3:]
        elif line and not line.startswith("#"):
            pair, arrow, verdict = line.rpartition(" -> ")
            reference, bar, answer = pair.partition(" | ")
            if not arrow or not bar or verdict not in ("0", "1"):
                raise ValueError(
                    f"{file}, line {number}: expected 'reference | answer -> 1 or 0', got {line!r}."
                )
            whole = answer.startswith("@")
            completion = answer[1:].replace(r"\n", "\n") if whole else rf"\boxed{{{answer}}}"
            pairs.append(Pair(kind, reference, answer, completion, verdict == "1"))
    return pairs
