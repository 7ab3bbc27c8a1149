r"""Small files in the formats in which the published sets of problems are released.

The problems are written for the tests; fields, nesting, types and paths are those of the releases.
`write(data_dir)` puts them where the builders look for files that were put there by hand.
"""

import json
import pathlib

import pyarrow as pa
import pyarrow.parquet

from occ.tasks.datasets.answers import DAPO_AFTER, DAPO_BEFORE
from occ.tasks.datasets.published import MATH_SUBJECTS, TABLE

REPEATS = 3


def dapo_rows():
    """Every prompt three times, one with two answers, and one that AIME 2024 has too."""
    problems = [(f"What is ${a} + {b}$?", str(a + b)) for a in range(2, 7) for b in range(3, 7)]
    problems += [("Find the number of primes below $30$.", "10")]
    problems += [("A sum has two answers here.", "1"), ("A sum has two answers here.", "2")]
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO_BEFORE + problem + DAPO_AFTER, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"id-{number:04d}"},
        }
        for _ in range(REPEATS)
        for number, (problem, answer) in enumerate(problems)
    ]


def aime_2024_rows():
    return [
        {
            "id": 60,
            "problem": "Find the number of primes below   $30$ .",
            "solution": "Count them.",
            "answer": "010",
            "url": "https://example.org/1",
            "year": "2024",
        },
        {
            "id": 61,
            "problem": "Find the least positive multiple of $7$ above $40$.",
            "solution": r"It is $\boxed{042}$.",
            "answer": "042",
            "url": "https://example.org/2",
            "year": "2024",
        },
    ]


def aime_2025_rows():
    return [
        {"problem": "Find $3 \\cdot 5 + 55$.", "answer": "70", "id": "0"},
        {"problem": "How many subsets has a set of five elements?", "answer": "32", "id": "1"},
    ]


def amc_rows():
    return [
        {"id": 0, "question": "What is $3^3$?", "answer": "27.0", "url": "https://example.org/3"},
        {"id": 1, "question": "What is $6^2$?", "answer": "36.0", "url": "https://example.org/4"},
    ]


def math_500_rows():
    return [
        {
            "problem": "Simplify $\\frac{2}{4}$.",
            "solution": "It is $\\boxed{\\frac{1}{2}}$.",
            "answer": "\\frac{1}{2}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        },
        {
            "problem": "Solve $x^2 = 2$ for $x > 0$.",
            "solution": "So $x = \\boxed{\\sqrt{2}}$.",
            "answer": "\\sqrt{2}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/2.json",
        },
    ]


def math_rows(subject, split):
    return [
        {
            "problem": f"Compute $1 + 1$ ({subject}, {split}).",
            "level": "Level 1",
            "type": subject.title(),
            "solution": "First $\\boxed{3}$? No: $\\boxed{2}$.",
        }
    ]


def minerva_math_rows():
    return [
        {"question": "A mass of $2$ kg is pushed by $6$ N. Its acceleration?", "answer": "3"},
        {"question": "Write $1000$ in powers of ten.", "answer": "10^{3}"},
    ]


def olympiad_bench_rows():
    common = {
        "image_1": None,
        "modality": "Text-only",
        "difficulty": "Competition",
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subject": "Math",
        "language": "English",
    }
    return [
        common
        | {
            "id": 1606,
            "question": "Find the sum of the roots of $x^2 - 5x + 6$.",
            "solution": ["Vieta."],
            "final_answer": ["5"],
            "context": None,
            "is_multiple_answer": False,
            "subfield": "Algebra",
        },
        common
        | {
            "id": 1607,
            "question": "Find both roots.",
            "solution": ["Factor."],
            "final_answer": ["$2,3$"],
            "context": "Let $x^2 - 5x + 6 = 0$.",
            "is_multiple_answer": True,
            "subfield": "Algebra",
        },
    ]


ROWS = {
    "dapo_math_17k": dapo_rows,
    "aime_2024": aime_2024_rows,
    "aime_2025": aime_2025_rows,
    "amc": amc_rows,
    "math_500": math_500_rows,
    "minerva_math": minerva_math_rows,
    "olympiad_bench": olympiad_bench_rows,
}


def write_rows(file: pathlib.Path, rows):
    """One file, in the format that its ending says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(data_dir: pathlib.Path, names=tuple(TABLE)):
    """The files of these sets, into the folder for files that were put there by hand."""
    for name in names:
        folder = pathlib.Path(data_dir) / "manual" / name
        for split, files in TABLE[name].files.items():
            for number, file in enumerate(files):
                subject = MATH_SUBJECTS[number % len(MATH_SUBJECTS)]
                rows = math_rows(subject, split) if name == "math" else ROWS[name]()
                write_rows(folder / file.path, rows)
