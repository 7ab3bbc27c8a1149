"""Verdicts on the committed pairs, and on the references of real files and their respellings."""

import json
import pathlib
import random
import re
from fractions import Fraction

import pytest

from experiments.instruments import answer_pairs, verifier_speed
from occ import tasks
from occ.tasks.datasets import published
from occ.tasks.math_answers import extract_answer
from occ.tasks.math_nodes import literal
from occ.tasks.math_reading import read
from occ.tasks.math_tokens import UnreadableError
from occ.tasks.tokenizer import CharacterTokenizer

PAIRS = answer_pairs.load()
KINDS = list(dict.fromkeys(pair.kind for pair in PAIRS))
DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


def test_the_pairs_are_many_and_half_of_them_are_wrong():
    right = sum(pair.right for pair in PAIRS)
    assert len(PAIRS) > 800 and 0.4 < right / len(PAIRS) < 0.6 and len(KINDS) >= 12
    assert len({pair[:3] for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_are_those_of_a_careful_marker(verifier, kind):
    pairs = [pair for pair in PAIRS if pair.kind == kind]
    verdicts = verifier.judge([p.reference for p in pairs], [p.completion for p in pairs])
    wrong = [
        (pair.reference, pair.answer, verdict)
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict.reward != float(pair.right)
    ]
    assert wrong == []


def test_pairs_that_were_written_before_they_were_judged(verifier):
    """No more misses than when they were judged first (14) less those that were mended then (8)."""
    pairs = answer_pairs.load(answer_pairs.HELD_OUT)
    assert not {pair[:3] for pair in pairs} & {pair[:3] for pair in PAIRS}
    verdicts = verifier.judge([p.reference for p in pairs], [p.completion for p in pairs])
    found = verifier_speed.accuracy(pairs, [verdict.reward for verdict in verdicts])
    assert sum(counts["pairs"] - counts.get("right", 0) for counts in found.values()) <= 6


def test_the_benchmark_reports_accuracy():
    pairs = PAIRS[:4]
    rewards = [float(pair.right) for pair in pairs]
    rewards[:3] = [None, 1.0 - rewards[1], rewards[2]]
    found = verifier_speed.accuracy(pairs, rewards)
    kind = "FP" if not pairs[1].right else "FN"
    assert found[pairs[0].kind] == {"pairs": 4, "invalid": 1, kind: 1, "right": 2}
    other = "FN" if kind == "FP" else "FP"
    line = verifier_speed.summary(found)
    assert line.startswith("verdicts: 2 of 4 right (FN ") and f"{kind} 1" in line
    assert f"{other} 0" in line and line.endswith("invalid 1)")


def test_a_line_that_is_no_pair_is_named(tmp_path):
    file = tmp_path / "pairs.txt"
    file.write_text("## kind\n1 | 2 -> 0\n1 | 2 -> no\n")
    with pytest.raises(ValueError, match=r"pairs.txt, line 3: expected .* got '1 \| 2 -> no'"):
        answer_pairs.load(file)


# -- real files -------------------------------------------------------------------------------

FILES = ["minerva_math_test", "olympiadbench_test", "aime24_test", "amc23_test"]
UNJUDGED = 2  # of OlympiadBench: a condition in words, and "t(0,4]"


def references(name):
    file = DATA / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"there is no {file}, which is not part of the project")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if name.startswith("minerva"):
        return [extract_answer(row["solution"]).strip() for row in rows]
    if name.startswith("olympiad"):
        return [published.OLYMPIAD_BENCH.read_answer(row["final_answer"]) for row in rows]
    return [str(row["answer"]) for row in rows]


def respelt(reference):
    """Other spellings of one reference, all of them right."""
    bare = reference.removesuffix(".")
    plain = bare.replace("$", "")
    found = [f"${bare}$", f"{bare}.", rf"\[ {plain} \]", rf"\( {plain} \).", f"$${plain}.$$"]
    number = re.fullmatch(r"-?[0-9.]+(?:e-?[0-9]+)?", reference)
    if number:
        mantissa, _, power = reference.partition("e")
        value = literal(reference.lstrip("-")) * (-1 if reference[0] == "-" else 1)
        if power:
            found += [rf"{mantissa} \times 10^{{{power}}}", rf"{mantissa}\cdot10^{power}"]
        found.append(f"{value.numerator}/{value.denominator}")
        if value.denominator == 1 and value >= 1000:
            found += [f"{value.numerator:,}", rf"{value.numerator:,}".replace(",", r"\,")]
        found.append(rf"{reference}\text{{ units}}")
    fraction = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", reference)
    if fraction:
        value = Fraction(int(fraction[1]), int(fraction[2]))
        found.append(rf"\dfrac{{{fraction[1]}}}{{{fraction[2]}}}")
        power = next((p for p in range(20) if 10**p % value.denominator == 0), None)
        if power is not None:
            digits = str(value.numerator * 10**power // value.denominator).zfill(power + 1)
            found.append(f"{digits[:-power]}.{digits[-power:]}")
        if value > 1:
            whole, part = divmod(value.numerator, value.denominator)
            found.append(rf"{whole}\frac{{{part}}}{{{value.denominator}}}")
    return found


@pytest.mark.parametrize(
    ("name", "file", "left_out"),
    [
        ("minerva_math", "minerva_math_test", 0),
        ("olympiad_bench", "olympiadbench_test", UNJUDGED),
        ("aime_2024", "aime24_test", 0),
        ("amc", "amc23_test", 0),
    ],
)
def test_a_real_file_is_prepared_end_to_end(tmp_path, name, file, left_out):
    """From the file to verdicts on right and wrong completions, in either form."""
    expected = references(file)
    folder = tmp_path / "manual" / name
    folder.mkdir(parents=True)
    (folder / f"{file}.jsonl").write_bytes((DATA / f"{file}.jsonl").read_bytes())
    task = tasks.load(
        "math",
        dataset=None,
        benchmarks=(name,),
        tokenizer=CharacterTokenizer("".join(map(chr, range(32, 0x2FFF))) + "\n\t"),
        data_dir=tmp_path,
        verify=False,
        max_prompt_tokens=100_000,
    )
    try:
        [selection] = task.selections
        assert selection.problems == len(expected) and len(selection.unjudged) == left_out
        problems = task.test[:: len(task.test) // 20]
        right = [rf"So \boxed{{{problem.answer}}}." for problem in problems]
        rewards, valid = task.verify_batch(problems, right)
        assert rewards.all() and valid.all()
        wrong = [f"Answer: {answer}" for answer in ("123456789", "x+y+z", r"\emptyset", "no")]
        for answer in wrong:
            rewards, valid = task.verify_batch(problems, [answer] * len(problems))
            assert not rewards.any() and valid.all()
    finally:
        task.verifier.close()


def values(reference):
    try:
        return read(reference)
    except UnreadableError:
        return ()


def with_another_digit(reference, rng):
    """The reference and itself with one digit changed, and with its sign changed."""
    places = [place for place, letter in enumerate(reference) if letter in "123456789"]
    if places:
        place = rng.choice(places)
        digit = rng.choice([d for d in "123456789" if d != reference[place]])
        yield reference, reference[:place] + digit + reference[place + 1 :]
        if "," not in reference and reference[0] != "-":
            yield reference, "-" + reference.strip("$")


@pytest.mark.parametrize("name", FILES)
def test_references_of_real_files_are_right_respelt_right_and_a_neighbours_wrong(verifier, name):
    found = list(dict.fromkeys(references(name)))
    bad = verifier.check_references(found)
    assert len(bad) <= (UNJUDGED if name.startswith("olympiad") else 0), bad
    good = [reference for reference in found if reference not in bad]
    pairs = [(reference, other) for reference in good for other in respelt(reference)]
    verdicts = verifier.judge_answers(*zip(*pairs, strict=True))
    assert [p for p, v in zip(pairs, verdicts, strict=True) if v.reward != 1.0] == []
    rng = random.Random(0)
    pairs = [
        (reference, other)
        for reference in good
        for other in [good[(good.index(reference) + 1) % len(good)], rng.choice(good)]
        if not set(values(reference)) & set(values(other))
    ]
    pairs += [pair for reference in good for pair in with_another_digit(reference, rng)]
    verdicts = verifier.judge_answers(*zip(*pairs, strict=True))
    rewarded = [p for p, v in zip(pairs, verdicts, strict=True) if v.reward != 0.0]
    assert rewarded == []
