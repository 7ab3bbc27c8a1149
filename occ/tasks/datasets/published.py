r"""Published sets of mathematics problems: where their files are, and what the fields mean.

Each is read as it was released, at a fixed revision of its repository on the Hugging Face hub.
Nothing is fetched here; `builder.py` does that, or takes files that were put into a folder.

How the entries were found: no file was downloaded. Paths, revisions, fields and numbers of rows are
as recorded by public projects that pin the same revisions; a SHA-256 sum is entered only where
unrelated projects record the same one, and is None elsewhere. Not verified: that licences are as
their cards say today, and the file's path in `math-ai/minervamath`, which a single project names.
Should a file differ, the error names file, row and field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from occ.tasks.datasets import answers

HUB = "https://huggingface.co/datasets"


@dataclasses.dataclass(frozen=True)
class File:
    """One released file.

    Attributes:
      path: in the repository; ends in .parquet or .jsonl.
      sha256: of its bytes, in hexadecimal; None where it is not known.
    """

    path: str
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """One published set.

    Fields of a row are named by their path, "reward_model.ground_truth" or "prompt.0.content".

    Attributes:
      name: by which it is asked for, here and in configurations.
      title: for tables.
      repository, revision: on the hub.
      licence: as its card, or that of the original data, says.
      files: of each split; rows are taken in their order.
      sizes: rows that each split was released with; for documentation.
      problem: field with the text of the problem.
      answer: field with the reference answer, or with what holds it.
      read_answer: the answer from the value of that field.
      read_problem: the bare problem from the text of its field.
      context: field with a text that goes before the problem, where it is not empty.
      identity, subject, level: fields, if there are any.
      several: field that says whether the answer is a list, so what a comma in it means.
      others: changes of these fields in other releases of the set; a row is read by the first
        layout whose problem and answer it has.
      reference: who made it.
    """

    name: str
    title: str
    repository: str
    revision: str
    licence: str
    files: Mapping[str, tuple[File, ...]]
    sizes: Mapping[str, int]
    problem: str
    answer: str
    reference: str
    read_answer: Callable[[Any], str] = answers.text
    read_problem: Callable[[str], str] = str.strip
    context: str | None = None
    identity: str | None = None
    subject: str | None = None
    level: str | None = None
    several: str | None = None
    others: tuple[Mapping[str, Any], ...] = ()

    @property
    def layouts(self) -> tuple[Published, ...]:
        """Itself, and itself as other releases have it."""
        return (self, *(dataclasses.replace(self, others=(), **other) for other in self.others))

    @property
    def homepage(self) -> str:
        """Of its card."""
        return f"{HUB}/{self.repository}"

    def url(self, file: File) -> str:
        """Where one of its files is published, at the revision."""
        return f"{self.homepage}/resolve/{self.revision}/{file.path}"


DAPO_MATH_17K = Published(
    name="dapo_math_17k",
    title="DAPO-Math-17k",
    repository="BytedTsinghua-SIA/DAPO-Math-17k",
    revision="65877096c24ffa7abc4e4fa5edb95cf3413a5674",
    licence="Apache-2.0",
    files={
        "train": (
            File(
                "data/dapo-math-17k.parquet",
                "534375d6bb8630d22ab46a56e11f2ffec1d288d8f7d04099bc82d68948705941",
            ),
        )
    },
    # 17,917 rows a hundred times over; 17,398 distinct prompts, some of them with two answers.
    sizes={"train": 1_791_700},
    problem="prompt.0.content",
    answer="reward_model.ground_truth",
    read_answer=answers.number,
    read_problem=answers.without_dapo_template,
    identity="extra_info.index",
    subject="ability",
    reference="Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, "
    "2503.14476",
)

AIME_2024 = Published(
    name="aime_2024",
    title="AIME 2024",
    repository="HuggingFaceH4/aime_2024",
    revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    licence="none declared on its card; the problems are the MAA's",
    files={
        "test": (
            File(
                "data/train-00000-of-00001.parquet",
                "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf",
            ),
        )
    },
    sizes={"test": 30},
    problem="problem",
    answer="answer",
    read_answer=answers.number,  # some have leading zeros
    identity="id",
    reference="Mathematical Association of America, AIME I and II, 2024",
)

AIME_2025 = Published(
    name="aime_2025",
    title="AIME 2025",
    repository="math-ai/aime25",
    revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    licence="Apache-2.0",
    files={
        "test": (
            File("test.jsonl", "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331"),
        )
    },
    sizes={"test": 30},
    problem="problem",
    answer="answer",
    read_answer=answers.number,
    identity="id",
    reference="Mathematical Association of America, AIME I and II, 2025",
)

AMC = Published(
    name="amc",
    title="AMC",
    repository="math-ai/amc23",
    revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
    licence="Apache-2.0",
    files={
        "test": (
            File(
                "test-00000-of-00001.parquet",
                "b696e87ba47be4e879a60fd4ef1d4aa522ba78c5ae013c6aff5cc9788a397c5e",
            ),
        )
    },
    sizes={"test": 40},
    problem="question",
    answer="answer",
    read_answer=answers.number,  # "27.0" for 27
    identity="id",
    reference="Mathematical Association of America, AMC 12, 2023",
)

MATH_500 = Published(
    name="math_500",
    title="MATH-500",
    repository="HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    licence="MIT (MATH)",
    files={
        "test": (
            File("test.jsonl", "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132"),
        )
    },
    sizes={"test": 500},
    problem="problem",
    answer="answer",
    identity="unique_id",
    subject="subject",
    level="level",
    reference="Lightman et al., Let's Verify Step by Step, 2305.20050",
)

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

MATH = Published(
    name="math",
    title="MATH",
    repository="EleutherAI/hendrycks_math",
    revision="21a5633873b6a120296cce3e2df9d5550074f4a3",
    licence="MIT",
    files={
        split: tuple(File(f"{subject}/{split}-00000-of-00001.parquet") for subject in MATH_SUBJECTS)
        for split in ("train", "test")
    },
    sizes={"train": 7500, "test": 5000},
    problem="problem",
    answer="solution",
    read_answer=answers.boxed,
    subject="type",
    level="level",
    reference="Hendrycks et al., Measuring Mathematical Problem Solving With the MATH Dataset, "
    "2103.03874",
)

MINERVA_MATH = Published(
    name="minerva_math",
    title="Minerva Math",
    repository="math-ai/minervamath",
    revision="ee46ddc498933b1977577953250ca5c66be64f96",
    licence="see its card; the problems are MIT OpenCourseWare's (CC BY-NC-SA)",
    files={"test": (File("test.jsonl"),)},
    sizes={"test": 272},
    problem="question",
    answer="answer",
    # As first released: the answer is the last box of a worked solution.
    others=(
        {
            "problem": "problem",
            "answer": "solution",
            "read_answer": answers.boxed,
            "identity": "idx",
            "subject": "type",
        },
    ),
    reference="Lewkowycz et al., Solving Quantitative Reasoning Problems with Language Models, "
    "2206.14858",
)

OLYMPIAD_BENCH = Published(
    name="olympiad_bench",
    title="OlympiadBench",
    repository="Hothan/OlympiadBench",
    revision="91184b52131e7fc9455fef848035173aea8cc01a",
    licence="Apache-2.0",
    # Open-ended, text only, mathematics, English, competition.
    files={
        "test": (File("OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet"),),
    },
    sizes={"test": 674},
    problem="question",
    answer="final_answer",
    read_answer=answers.only,
    context="context",
    identity="id",
    subject="subfield",
    several="is_multiple_answer",
    level="difficulty",
    reference="He et al., OlympiadBench, 2402.14008",
)

TABLE: Mapping[str, Published] = {
    published.name: published
    for published in (
        DAPO_MATH_17K,
        AIME_2024,
        AIME_2025,
        AMC,
        MATH_500,
        MATH,
        MINERVA_MATH,
        OLYMPIAD_BENCH,
    )
}

SIX = ("aime_2024", "aime_2025", "amc", "math_500", "minerva_math", "olympiad_bench")
"""The benchmarks whose average is reported. Two of them, AIME 2024 and 2025, are known to be among
the paper's six; the others are those that are customary beside them."""


def find(name: str) -> Published:
    """The set of that name, or of that repository "OWNER/NAME".

    Raises:
      ValueError: there is none, or the repository has several.
    """
    if "/" in name:
        released = [one for one in TABLE.values() if one.repository == name]
        if len(released) == 1:
            return released[0]
    if name not in TABLE:
        raise ValueError(
            f"datasets: unknown set {name!r}; expected one of {sorted(TABLE)}, or the repository "
            "of one."
        )
    return TABLE[name]
