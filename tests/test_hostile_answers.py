"""Answers that try to hang, crash, exhaust or take over a verifier: a corpus and its offspring.

python -m pytest -m release tests/test_hostile_answers.py -s        10,000 of them
"""

import collections
import json
import pathlib
import random
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occ.tasks.math_task import MathVerifier, Verdict, first_tiers
from occ.tasks.workers import PROGRAM_REFUSED, Limits
from tests import hostile_answers
from tests.hostile_answers import HOSTILE
from tests.test_math_answers import boxed

# Requests to a worker.
X_AND_X, X_AND_Y = ((json.dumps([[["sym", "x"], ["sym", name]]]),) for name in ("x", "y"))


def test_the_corpus_is_of_the_size_it_claims():
    assert len(set(HOSTILE)) == len(HOSTILE) >= 120


def test_hostile_answers_do_nothing_and_are_wrong(verifier, tmp_path, monkeypatch):
    """They are wrong, and none is invalid, so no model can choose to be so."""
    monkeypatch.chdir(tmp_path)
    before = verifier.pool.map([X_AND_X] * 2)
    verdicts = verifier.judge(["x^2+1"] * len(HOSTILE), boxed(HOSTILE))
    by_answer = dict(zip(HOSTILE, verdicts, strict=True))
    assert {answer: v for answer, v in by_answer.items() if v.reward != 0.0} == {}
    for folder in (tmp_path, pathlib.Path("/"), pathlib.Path(__file__).parent):
        assert not (folder / hostile_answers.CANARY).exists()
    assert verifier.pool.map([X_AND_X] * 2) == before == [[True], [True]]
    assert verifier.pool.replaced == 0


@pytest.mark.parametrize("answer", [*hostile_answers.POWERS, *hostile_answers.FACTORIALS])
@pytest.mark.parametrize("reference", ["x^2+1", "2", r"\sqrt{2}"])
def test_large_values_are_refused_before_they_are_computed(verifier, answer, reference):
    start = time.perf_counter()
    [verdict] = verifier.judge([reference], boxed([answer]))
    assert verdict.reward == 0.0 and verdict.tier != "costly"
    assert time.perf_counter() - start < 1.0


def test_hostile_answers_are_not_evaluated_in_this_process(monkeypatch):
    """The cheap tiers alone, with every way to run a text taken away."""
    with monkeypatch.context() as patch:
        for name in ("eval", "exec", "compile"):
            patch.setattr(f"builtins.{name}", None)
        for answer in HOSTILE:
            for reference in ("12", "x^2+1", r"\sqrt{2}", "1,2"):
                verdict = first_tiers(reference, answer)
                assert not isinstance(verdict, Verdict) or verdict.reward == 0.0


FRAGMENTS = re.findall(
    r"\S+",
    r"""
    \frac{ \sqrt{ \text{ \left( \right) { } ( ) [ ] | ! ^ ^{ _ , . / + - * = < % & \\ \{ \} \pi
    \infty \cup \binom{ \log \sin \pm \cdot \in x n i e 0 1 2 9 12 99 __ ' " $ # import eval(
    """,
)
FRAGMENTS += [" ", "\0", "\n", "\N{SUPERSCRIPT TWO}"]


@given(st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join), max_size=8))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_answer_gets_a_verdict_and_costs_no_worker(verifier, answers):
    verdicts = verifier.judge(
        ["x^2+1"] * len(answers), [f"Answer\n\\boxed{{{a}}}" for a in answers]
    )
    assert all(verdict.reward in (0.0, 1.0, None) for verdict in verdicts)
    assert verifier.pool.map([X_AND_X, X_AND_Y]) == [[True], [False]]


def offspring(rng: random.Random) -> str:
    """One or two answers of the corpus, spliced, repeated, wrapped, or with characters changed."""
    answer, other = rng.choice(HOSTILE)[:2000], rng.choice(HOSTILE)[:2000]
    change = rng.randrange(6)
    if change == 0:
        answer = answer[: rng.randint(0, len(answer))] + other[rng.randint(0, len(other)) :]
    elif change == 1:
        answer = rng.choice([r"\frac{%s}{%s}", r"(%s)^{%s}", r"%s+%s", "%s,%s"]) % (answer, other)
    elif change == 2:
        answer = answer * rng.randint(2, 4)
    elif change == 3:
        place = rng.randint(0, len(answer))
        answer = answer[:place] + "".join(rng.choices(FRAGMENTS, k=3)) + answer[place:]
    elif change == 4 and answer:
        place = rng.randrange(len(answer))
        answer = answer[:place] + answer[place + 1 :]
    else:
        answer = re.sub(r"\d+", lambda _: str(rng.randint(0, 120)), answer)
    return answer


@pytest.mark.release
def test_ten_thousand_hostile_answers(tmp_path, monkeypatch):
    """None is executed, none hangs, none is lost; prints what it took."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    answers = list(HOSTILE)
    while len(answers) < 10_000:
        answers.append(offspring(rng))
    verdicts, seconds = [], []
    limits = Limits(cpu_seconds=0.5, wall_seconds=10.0)
    start = time.perf_counter()
    with MathVerifier(limits=limits) as verifier:
        for completion in boxed(answers):
            begin = time.perf_counter()
            verdicts += verifier.judge(["y^3+7"], [completion])
            seconds.append(time.perf_counter() - begin)
        replaced = verifier.pool.replaced
        assert verifier.pool.map([X_AND_X, X_AND_Y]) == [[True], [False]]
    took = time.perf_counter() - start
    tiers = collections.Counter(verdict.tier for verdict in verdicts)
    failures = collections.Counter(v.detail.split(":")[0] for v in verdicts if v.reward is None)
    p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    print(
        f"\n{len(verdicts)} answers, one at a time: {took:.0f} s, {len(verdicts) / took:.0f} a "
        f"second; p50 {p50:.1f} ms, p99 {p99:.0f} ms, longest {max(seconds):.2f} s; tiers "
        f"{dict(tiers)}; not judged {dict(failures)}; {replaced} workers replaced"
    )
    assert len(verdicts) == len(answers) == 10_000
    assert max(seconds) < limits.wall_seconds + 5  # a worker that starts again included
    # A program that a worker tried to run ends it with a status of its own (workers._guard).
    assert not [v for v in verdicts if f"exit status {PROGRAM_REFUSED}" in v.detail]
    for folder in (tmp_path, pathlib.Path("/"), pathlib.Path(__file__).parent):
        assert not (folder / hostile_answers.CANARY).exists()
    assert {verdict.reward for verdict in verdicts} <= {0.0, None}
    assert sum(verdict.reward is None for verdict in verdicts) <= 10
