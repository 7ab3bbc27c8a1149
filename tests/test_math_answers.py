"""Extraction, forms, exact values and symbolic equality of mathematical answers."""

import pathlib
import random
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.instruments import verifier_speed
from occ.tasks import Problem, VerifierError
from occ.tasks.math_answers import extract_answer, extract_answer_line, extract_boxed
from occ.tasks.math_compare import compare
from occ.tasks.math_reading import read
from occ.tasks.math_task import MathTask, MathVerifier, exactly
from occ.tasks.math_tokens import UnreadableError
from occ.tasks.tokenizer import CharacterTokenizer
from occ.tasks.workers import Limits, WorkerPool
from tests.faulty_checks import FAULTS

# Reference | answer. One pair a line.
EQUAL = r"""
12 | 12.
12 | +12
12 | 12.0
12 | $12$
12 | 012
1000 | 1,000
1000 | 1{,}000
12345678 | 12,\!345,\!678
\frac{1}{2} | 0.5
\frac{1}{2} | \dfrac12
\frac{1}{2} | 1/2
\frac{1}{2} | \frac{2}{4}
\$5 | 6-1
\frac{1}{2} | .5
-\frac{1}{2} | \frac{-1}{2}
-\frac{1}{2} | \frac{1}{-2}
\frac{3}{2} | 1\frac{1}{2}
\frac{1}{3} | 0.\overline{3}
1.2\times10^{5} | 120000
\{1,2,3\} | \{3, 2, 1\}
\{1,2\} | 1, 2
1,2 | 2,1
1,2 | 1 \text{ and } 2
x=1,2 | 1,2
1,-2 | x=1 \text{ or } x=-2
\pm 2 | 2,-2
1\pm\sqrt{2} | 1-\sqrt{2}, 1+\sqrt{2}
(1,2) | \left( 1 , \, 2 \right)
(1,\frac{1}{2}) | (1,0.5)
(1,\sqrt{8}) | (1,2\sqrt{2})
[0,1) | [0, 1.0)
(-\infty,3) | x<3
(-\infty,3)\cup(5,\infty) | (5,\infty)\cup(-\infty,3)
[2,5] | 2\leq x\leq 5
x\in[2,5] | [2,5]
5\text{ cm} | 5
5\text{ cm} | 5 cm
5\text{ cm} | 5\text{ centimeters}
6\pi\text{ inches} | 6\pi
25\text{ cm}^2 | 25\,\mathrm{cm^2}
25\text{ cm}^2 | 25\text{ cm}^2
\$5 | 5
\$5 | 5\text{ dollars}
50\% | 50
50\% | 0.5
0.5 | 50\%
90^\circ | 90
90^\circ | 90°
90 | 90^{\circ}
90^\circ | 90\text{ degrees}
50\% | 50\text{ percent}
-\frac{3}{2} | -1\frac{1}{2}
30^\circ | \frac{\pi}{6}
\frac{\pi}{6} | 30^\circ
12 | 2\cdot 6=12
2\sqrt{3} | \sqrt{12}
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
\sqrt[3]{16} | 2\sqrt[3]{2}
x^2+2x+1 | (x+1)^2
x=5 | 5
5 | x=5
y=2x+1 | y = 1+2x
y=2x+1 | 2x+1
f(x)=x^2 | x^2
\ln 4 | 2\ln 2
\log_2 8 | 3
\sin 30^\circ | \frac12
1+\sqrt{5}-\sqrt{5+2\sqrt{5}} | \tan 9^\circ
\frac{\pi}{4} | \arctan 1
e^{i\pi} | -1
\frac{1+i}{2} | \frac{1}{1-i}
3+4i | 4i+3
\binom{5}{2} | 10
5! | 120
2^{10} | 1024
2^10 | 1024
\text{Evelyn} | Evelyn
\text{Evelyn} | \text{evelyn}
\text{(C)} | C
A | \text{A}
1010_2 | 1010_{2}
1010_2 | 1010
3:4 | 3:4
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\ \frac{4}{2}\end{pmatrix}
\{1,2\}\cup\{3\} | \{1,2,3\}
\mathbb{R} | (-\infty,\infty)
\emptyset | \{\}
x^{2023} | x^{2023}
|x| | \sqrt{x^2}
2 \pi r | 2r\pi
(1,2),(3,4) | (3,4),(1,2)
(1,(2,3)) | (1,(2,3.0))
\frac{a}{b} | a/b
\frac{2024}{2025} | \frac{4048}{4050}
2x^2 | 2x^2
(n-1)! | \frac{n!}{n}
"""
UNEQUAL = r"""
12 | 13
12 | -12
12 | 1.2
12 | 12x
\frac{1}{3} | 0.333333
\frac{1}{3} | 0.33
\frac{1}{2} | \frac{2}{1}
1000 | 1,00
\{1,2,3\} | \{1,2\}
\{1,2\} | (1,2)
(1,2) | (2,1)
(1,2) | [1,2]
[0,1) | [0,1]
(1,2) | 1,2
5\text{ cm} | 5\text{ m}
25\text{ cm}^2 | 25\text{ cm}^3
50\% | 5
50\% | 50\text{ cm}
2\sqrt{3} | 3\sqrt{2}
\sqrt{2} | 1.414
x^2+2x+1 | x^2+1
x=5 | x=6
x=5 | y=5
2\leq x\leq 5 | (2,5)
\sqrt{2} | \pm\sqrt{2}
12 | 13,12
12 | x>12
10\% | 0.1\%
90^\circ | 90\pi
y=2x+1 | y=2x
2xy | 2
3t | 3
x | y
12 | \tan 9^\circ
x^2+1 | \begin{pmatrix}1&2\end{pmatrix}\begin{pmatrix}1&2\end{pmatrix}
\sin 30^\circ | \sin 30
\ln 4 | 2
1010_2 | 1010_3
\text{Evelyn} | \text{Carlos}
A | B
\text{yes} | 1
(-\infty,3) | x\leq 3
(-\infty,3) | x>3
(-\infty,3)\cup(5,\infty) | (-\infty,3)\cup[5,\infty)
2^{10} | 1023
12 | \frac{12}{0}
12 | 1{,}2
3:4 | 4:3
5! | 100
x^2 | x^{3}
1 | \infty
|x| | x
(1,\sqrt{8}) | (1,2\sqrt{3})
\emptyset | 0
1,2 | 1
1 | 1,2
"""


def pairs(table):
    return [tuple(line.split(" | ")) for line in table.strip().splitlines()]


def boxed(answers):
    return [rf"\boxed{{{answer}}}" for answer in answers]


# -- where the answer is ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,\{2\}\}}", r"\{1,\{2\}\}"),
        (r"\boxed{\left\{ x \right\}", None),
        (r"\boxed{x\}", None),
        (r"\fbox{3}", "3"),
        (r"\boxed{1} \fbox{2}", "2"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1}, now \boxed{2", None),
        (r"\boxed 6", None),
        ("boxed{7}", None),
        ("\\boxed{a\nb}", "a\nb"),
        ("", None),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 12", "12"),
        ("Answer: 1\nAnswer: 2\nDone.", "2"),
        ("answer : $\\frac{1}{2}$  ", "$\\frac{1}{2}$"),
        ("**Answer:** 34", "34"),
        ("The answer is 12", None),
        ("Answer:", None),
        ("Answer: 1\nAnswer:  ", None),
        ("Final Answer: x = 5\r\n", "x = 5"),
        ("", None),
    ],
)
def test_the_last_answer_line_is_the_answer(text, answer):
    assert extract_answer_line(text) == answer


@pytest.mark.parametrize("extract", [extract_answer, extract_boxed, extract_answer_line])
@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed", "{", "}", "\\", "answer", "answer: ", " "]
)
def test_extraction_takes_linear_time(extract, piece):
    """A quadratic one would take hours for these."""
    extract("answer" + piece * (2**20 // len(piece)))


@given(st.text(alphabet="{}\\a,", max_size=30))
@settings(derandomize=True)
def test_a_balanced_answer_comes_out_as_it_went_in(inner):
    depth, escaped, balanced = 0, False, True
    for character in inner:
        if not escaped:
            depth += (character == "{") - (character == "}")
        escaped = character == "\\" and not escaped
        balanced = balanced and depth >= 0
    found = extract_boxed(rf"\boxed{{1}} then \boxed{{{inner}}}")
    if balanced and depth == 0 and not escaped:
        assert found == inner
    else:
        assert found is None or found != inner


# -- equality ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts(verifier):
    """Of the two tables, in one batch."""
    table = pairs(EQUAL) + pairs(UNEQUAL)
    return dict(zip(table, verifier.judge(*split(table)), strict=True))


def split(table):
    return [reference for reference, _ in table], boxed(answer for _, answer in table)


def test_equal_answers_are_right(verdicts):
    found = {pair: verdicts[pair] for pair in pairs(EQUAL)}
    assert {pair: verdict for pair, verdict in found.items() if verdict.reward != 1.0} == {}
    assert {verdict.tier for verdict in found.values()} == {"text", "value", "symbolic"}


def test_unequal_answers_are_wrong(verdicts):
    found = {pair: verdicts[pair] for pair in pairs(UNEQUAL)}
    assert {pair: verdict for pair, verdict in found.items() if verdict.reward != 0.0} == {}
    assert {verdict.tier for verdict in found.values()} == {"form", "value", "symbolic"}


def test_references_of_the_tables_can_be_verified(verifier):
    assert verifier.check_references(r for r, _ in pairs(EQUAL + UNEQUAL.lstrip())) == {}


@given(
    st.fractions(max_denominator=10**6),
    st.sampled_from(
        ["{0.numerator}/{0.denominator}", r"\frac{{{0.numerator}}}{{{0.denominator}}}"]
    ),
)
@settings(derandomize=True)
def test_a_fraction_is_read_exactly(value, form):
    assert read(form.format(value)) == (("num", value.numerator, value.denominator),)


def test_signs_of_typography_are_read():
    typed = "\N{MINUS SIGN}3\N{MULTIPLICATION SIGN}\N{GREEK SMALL LETTER PI}"
    assert read(typed) == read(r"-3\times\pi")


@given(st.decimals(-(10**9), 10**9, places=6), st.booleans())
@settings(derandomize=True)
def test_a_decimal_is_read_exactly(value, separators):
    found = read(f"{value:{',' if separators else ''}f}")[0]
    assert Fraction(*found[1:]) == Fraction(value)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.randoms())
@settings(derandomize=True)
def test_order_matters_in_a_tuple_and_not_in_a_set(numbers, rng):
    shuffled = rng.sample(numbers, len(numbers))
    first, second = (",".join(map(str, side)) for side in (numbers, shuffled))
    assert compared(rf"\{{{first}\}}", rf"\{{{second}\}}") is True
    assert compared(f"({first})", f"({second})") is (numbers == shuffled)


# -- what is wrong, and what is invalid -------------------------------------------------------


@given(st.text(max_size=200), st.text(max_size=200))
@settings(derandomize=True)
def test_any_text_is_compared_without_an_error(reference, answer):
    assert compared(reference, answer) in (True, False, None)


def compared(reference, answer):
    """Without a worker; None where that does not decide."""
    try:
        return compare(read(reference), read(answer), exactly)
    except UnreadableError as error:
        assert str(error)
        return None


def test_order_and_number_of_workers_do_not_change_the_verdicts(verdicts):
    table = random.Random(0).sample(list(verdicts), len(verdicts))
    with MathVerifier(workers=1) as alone:
        assert alone.judge(*split(table)) == [verdicts[pair] for pair in table]


def test_no_answer_and_a_long_answer_are_wrong(verifier):
    long = r"\boxed{" + "1+" * 300 + "1}"
    verdicts = verifier.judge(["1"] * 3, ["no box", r"\boxed{}", long])
    assert [(v.reward, v.tier) for v in verdicts] == [
        (0.0, "extraction"),
        (0.0, "extraction"),
        (0.0, "form"),
    ]


# -- as a task --------------------------------------------------------------------------------


def math_task(verifier, references=("x^2", "12")):
    problems = [Problem(f"p{i}", reference) for i, reference in enumerate(references)]
    alphabet = "".join(
        sorted(set("".join(problem.prompt + problem.answer for problem in problems)))
    )
    return MathTask("mathematics", CharacterTokenizer(alphabet), problems, [], verifier, 8, 64)


def test_a_task_verifies_in_batches_and_one_by_one(verifier):
    task = math_task(verifier)
    completions = [r"\boxed{x\cdot x}", r"\boxed{12.0}", r"\boxed{x}", "12"]
    problems = [task.train[i] for i in (0, 1, 0, 1)]
    rewards, valid = task.verify_batch(problems, completions)
    assert rewards.dtype == np.float32 and rewards.tolist() == [1, 1, 0, 0]
    assert valid.dtype == bool and valid.all()
    single = [task.verifier(p, c) for p, c in zip(problems, completions, strict=True)]
    assert single == [1.0, 1.0, 0.0, 0.0]
    rewards, valid = task.verify_batch([], [])
    assert rewards.shape == valid.shape == (0,)


def with_faults(verifier, **limits):
    """Its processes replaced by ones that go wrong at a variable with a fault's name."""
    verifier.pool.close()
    source = pathlib.Path(__file__).with_name("faulty_checks.py")
    verifier.pool = WorkerPool(source, "judge", limits=Limits(**limits))
    return math_task(verifier)


def fault_answer(fault):
    assert fault in FAULTS
    return rf"x_{{\text{{{fault.replace(' ', '')}}}}}"


@pytest.mark.parametrize("fault", ["eat memory", "exit 0", "kill", "raise", "sleep"])
def test_a_verifier_that_fails_invalidates_its_own_sample_alone(fault):
    with MathVerifier() as verifier:
        task = with_faults(verifier, cpu_seconds=2.0, wall_seconds=0.5, memory_mib=256)
        completions = boxed(["x^3", fault_answer(fault), "y^2", "x^2"])
        rewards, valid = task.verify_batch([task.train[0]] * 4, completions)
        assert rewards.tolist() == [0, 0, 0, 1] and valid.tolist() == [True, False, True, True]
        with pytest.raises(VerifierError):
            task.verifier(task.train[0], completions[1])


def test_an_answer_that_costs_too_much_is_wrong_and_counted():
    """Were it invalid, a model could leave the loss by writing it."""
    with MathVerifier() as verifier:
        task = with_faults(verifier, cpu_seconds=0.3)
        verdicts = verifier.judge(["x^2"] * 2, boxed([fault_answer("spin"), "x^3"]))
        assert [(v.reward, v.tier) for v in verdicts] == [(0.0, "costly"), (0.0, "symbolic")]
        assert [v.outcome for v in verdicts] == ["wrong", "wrong"]
        assert task.verify_batch([task.train[0]], boxed([fault_answer("spin")]))[1].all()


def test_a_rollout_waits_no_longer_than_its_bound_whatever_the_answers_are():
    """Of 64 answers that cost too much, those whose turn did not come are invalid."""
    with MathVerifier(workers=2) as verifier:
        with_faults(verifier, cpu_seconds=0.2)
        verifier._seconds = 3.0
        answers = [fault_answer("spin") + f"+{i}" for i in range(64)]
        start = time.monotonic()
        verdicts = verifier.judge(["x^2"] * 65, boxed([*answers, "x^2"]))
        assert time.monotonic() - start < 8.0  # all of them would take 30
    outcomes = [verdict.outcome for verdict in verdicts]
    assert outcomes.count("invalid") >= 30 and outcomes.count("wrong") >= 1
    assert outcomes[-1] == "right"


def test_a_reference_that_cannot_be_read_is_no_fault_of_the_answer(verifier):
    bad = ["x+", r"\frac{1}{}", "f(x)=ax, where $a$ is any integer"]
    verdicts = verifier.judge([*bad, bad[0]], boxed(["x^2", "x^2", "x^2", bad[0]]))
    assert [verdict.reward for verdict in verdicts] == [None, None, None, 1.0]
    assert list(verifier.check_references(["x^2", *bad, "12"])) == bad


@pytest.mark.parametrize("answer", [r"\frac{2+3\mathrm{_i}}{13}", "5 ± 21 个", "12_x", "12_{\\pi}"])
def test_odd_forms_are_wrong_and_no_fault(verifier, answer):
    """Found by splicing the committed pairs: these raised in the reader."""
    verdicts = verifier.judge(["2", r"\infty", r"-1,\sqrt{3}"], boxed([answer] * 3))
    assert [verdict.reward for verdict in verdicts] == [0.0, 0.0, 0.0]


def test_a_fault_of_the_reader_invalidates_its_sample_alone(verifier, monkeypatch):
    def fail(*_, **__):
        raise IndexError("planted")

    monkeypatch.setattr("occ.tasks.math_task.compare", fail)
    verdicts = verifier.judge(["2", "3"], boxed(["3", "3"]))
    assert [v.outcome for v in verdicts] == ["invalid", "right"]
    assert verdicts[0].detail == "IndexError: planted"


def test_what_only_math_verify_reads_is_left_to_it(verifier):
    integral = r"\int_{0}^{1} x dx"
    assert "symbolic" not in vars(verifier)  # no process of it before it is needed
    verdicts = verifier.judge([integral] * 4, boxed([r"\frac{1}{2}", "x^2", "0.5", r"\int_{0}"]))
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0, 0.0]


def test_the_other_form_of_final_answers():
    with MathVerifier(extract_answer_line, workers=1) as verifier:
        verdicts = verifier.judge(["12"] * 3, ["Answer: $12$", r"\boxed{12}", "Answer: 13"])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0]


def test_the_benchmark_judges_a_batch_and_its_answers_alike():
    arguments = verifier_speed.Arguments(answers=40, costly=0)
    result = verifier_speed.measure(arguments)
    assert sum(map(len, result["latencies"].values())) == 40
    assert {"value", "symbolic"} <= set(result["latencies"]) and result["replaced_workers"] == 0
    assert "| all | 40 | 100.0% |" in verifier_speed.table(result)
