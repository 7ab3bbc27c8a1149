"""How well and how fast mathematical answers are verified, beside math-verify alone.

Claim: of the committed pairs of `answer_pairs.txt` 99 % are judged as a careful marker would, and
no wrong answer is rewarded; of those of `answer_pairs_held_out.txt`, which were written before the
verifier judged any, 96 % when it did, and more since kinds that they showed were mended. Exact
answers cost a fraction of a millisecond and never reach a worker, formulas a few, and costly ones
no more computing than their bound, to nobody's harm but their own.
Command: python -m experiments.instruments.verifier_speed
Cost: half a minute on two CPU cores.

math-verify alone is its `parse` of the reference, in dollars, and of the completion, and its
`verify`, as its documentation has it, with `parse`'s and `verify`'s own bounds on time.

Latency is of one answer at a time, with warm workers. Throughput is of all answers in one batch, as
training asks for them, whose verdicts must be the same. Answers are drawn with a seed and hardly
ever repeat, since equal ones are judged once.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import math_verify
import numpy as np
import tyro

from experiments import runs
from experiments.instruments import answer_pairs
from occ.tasks.math_task import MathVerifier, Verdict
from occ.tasks.workers import Limits
from occ.training.durable.run_folder import environment

Pair = tuple[str, str]

# Within the bounds of form, about at the bound on time or beyond it.
COSTLY = [
    r"(x+y+z+w)^{{{0}}}+{1}",
    r"\frac{{x^{{{0}}}-1}}{{x-1}}\cdot\frac{{y^{{{0}}}-{1}}}{{y-1}}",
]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      answers: in the batch; 512 rollouts of a step, say.
      costly: answers among them that take seconds, or exceed the bound on time.
      workers: processes.
      cpu_seconds: a call.
      seed: of the answers.
      folder: for result.json and table.md.
    """

    answers: int = 2000
    costly: int = 4
    workers: int = 2
    cpu_seconds: float = 2.0
    seed: int = 0
    folder: pathlib.Path = pathlib.Path("runs/verifier_speed")


def number(rng: np.random.Generator) -> Pair:
    """A number, right in one of several ways of writing it, or wrong."""
    over, under = (int(n) for n in rng.integers(2, 10_000, 2))
    answer = [f"{over}/{under}", rf"\dfrac{{{2 * over}}}{{{2 * under}}}", f"{over + 1}/{under}"]
    return rf"\frac{{{over}}}{{{under}}}", str(rng.choice(answer))


def several(rng: np.random.Generator) -> Pair:
    """A set of numbers, in any order."""
    numbers = rng.choice(100_000, 4, replace=False)
    answer = rng.permutation(numbers)
    return rf"\{{{','.join(map(str, numbers))}\}}", rf"\{{{', '.join(map(str, answer))}\}}"


def radical(rng: np.random.Generator) -> Pair:
    """A root, simplified or not."""
    outer, inner = (int(n) for n in rng.integers(2, 1000, 2))
    return rf"{outer}\sqrt{{{inner}}}", rf"\sqrt{{{outer**2 * inner + int(rng.integers(2))}}}"


def polynomial(rng: np.random.Generator) -> Pair:
    """A product of two linear factors, expanded."""
    a, b = (int(n) for n in rng.integers(2, 1000, 2))
    return f"(x+{a})(x+{b})", f"x^2+{a + b}x+{a * b + int(rng.integers(2))}"


def answers(arguments: Arguments) -> list[Pair]:
    """References and completions: 40 % numbers, 20 % each of sets, roots and polynomials.

    Of these one in twenty is left without a box, and one in twenty has a form that is refused.
    """
    rng = np.random.default_rng(arguments.seed)
    kinds = [number, number, several, radical, polynomial]
    pairs = []
    for i in range(arguments.answers - arguments.costly):
        reference, answer = kinds[i % len(kinds)](rng)
        boxed = rf"It is \boxed{{{answer}}}."
        refused = rf"\boxed{{9^{{9^{{{i}}}}}}}"
        pairs.append((reference, rng.choice([boxed, answer, refused], p=[0.9, 0.05, 0.05])))
    for i in range(arguments.costly):
        pairs.append(("x^2+1", rf"\boxed{{{COSTLY[i % len(COSTLY)].format(99 - i, i + 1)}}}"))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def measure(arguments: Arguments) -> dict[str, Any]:
    """Latency by tier in seconds, and answers a second of the batch."""
    pairs = answers(arguments)
    references, completions = zip(*pairs, strict=True)
    limits = Limits(cpu_seconds=arguments.cpu_seconds)
    with MathVerifier(workers=arguments.workers, limits=limits) as verifier:
        verifier.judge(*zip(*pairs[:50], strict=True))  # warm
        start = time.perf_counter()
        batch = verifier.judge(references, completions)
        seconds = time.perf_counter() - start
        latencies: dict[str, list[float]] = collections.defaultdict(list)
        single: list[Verdict] = []
        for reference, completion in pairs:
            begin = time.perf_counter()
            single += verifier.judge([reference], [completion])
            latencies[single[-1].tier].append(time.perf_counter() - begin)
        replaced = verifier.pool.replaced
    if [verdict.reward for verdict in single] != [verdict.reward for verdict in batch]:
        raise ValueError("verifier_speed: a batch and its answers one by one were judged unlike.")
    return {
        "latencies": dict(latencies),
        "batch_seconds": seconds,
        "answers_per_second": len(pairs) / seconds,
        "replaced_workers": replaced,
    }


def ours(pairs: Sequence[answer_pairs.Pair], arguments: Arguments) -> list[float | None]:
    """Rewards of the pairs."""
    limits = Limits(cpu_seconds=arguments.cpu_seconds)
    with MathVerifier(workers=arguments.workers, limits=limits) as verifier:
        verdicts = verifier.judge([p.reference for p in pairs], [p.completion for p in pairs])
    return [verdict.reward for verdict in verdicts]


def math_verify_alone(pairs: Sequence[answer_pairs.Pair]) -> list[float | None]:
    """Rewards of the pairs; None where it raises."""
    rewards: list[float | None] = []
    for pair in pairs:
        try:
            reference = math_verify.parse(f"${pair.reference}$")
            rewards.append(float(math_verify.verify(reference, math_verify.parse(pair.completion))))
        except Exception:  # whatever it raises, it gave no verdict
            rewards.append(None)
    return rewards


def accuracy(
    pairs: Sequence[answer_pairs.Pair], rewards: Sequence[float | None]
) -> dict[str, dict[str, int]]:
    """Right verdicts, and wrong ones by how they are wrong, by kind."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for pair, reward in zip(pairs, rewards, strict=True):
        outcome = "invalid" if reward is None else "right"
        if reward is not None and bool(reward) != pair.right:
            outcome = "FP" if reward else "FN"
        counts[pair.kind]["pairs"] += 1
        counts[pair.kind][outcome] += 1
    return {kind: dict(found) for kind, found in counts.items()}


def judge_both(
    pairs: Sequence[answer_pairs.Pair], arguments: Arguments
) -> dict[str, dict[str, dict[str, int]]]:
    """`accuracy` of each verifier."""
    return {
        "ours": accuracy(pairs, ours(pairs, arguments)),
        "math-verify alone": accuracy(pairs, math_verify_alone(pairs)),
    }


def summary(found: dict[str, dict[str, int]]) -> str:
    """One line for all kinds."""
    total = sum(map(collections.Counter, found.values()), collections.Counter())
    return (
        f"verdicts: {total['right']} of {total['pairs']} right "
        f"(FN {total['FN']}, FP {total['FP']}, invalid {total['invalid']})"
    )


def kinds_table(judged: dict[str, dict[str, dict[str, int]]]) -> str:
    """A row a kind, and columns for each verifier."""
    names = list(judged)
    lines = ["| kind | pairs | " + " | ".join(f"{name}: right, FN, FP" for name in names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for kind, counts in judged[names[0]].items():
        cells = [
            ", ".join(str(judged[name][kind].get(key, 0)) for key in ("right", "FN", "FP"))
            for name in names
        ]
        lines.append(f"| {kind} | {counts['pairs']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """A row a tier, and one for all answers."""
    rows = dict(result["latencies"])
    everything = [latency for tier in rows.values() for latency in tier]
    lines = ["| tier | answers | share | p50 ms | p99 ms | max ms |", "|---|---|---|---|---|---|"]
    for tier, latencies in [*rows.items(), ("all", everything)]:
        middle, high, most = np.percentile(latencies, [50, 99, 100]) * 1e3
        share = len(latencies) / len(everything)
        lines.append(
            f"| {tier} | {len(latencies)} | {share:.1%} | {middle:.3f} | {high:.3f} | {most:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and writes result.json and table.md."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = measure(arguments)
    text = (
        f"{result['answers_per_second']:.0f} answers a second in a batch of {arguments.answers} "
        f"({result['batch_seconds']:.1f} s) with {arguments.workers} workers, of which "
        f"{result['replaced_workers']} were replaced.\n\n{table(result)}\n"
    )
    print(text)
    judged = judge_both(answer_pairs.load(), arguments)
    held_out = judge_both(answer_pairs.load(answer_pairs.HELD_OUT), arguments)
    for name, found in held_out.items():
        print(f"held out, {name}, {summary(found)}")
    print(f"{kinds_table(judged)}\n\nmath-verify alone, {summary(judged['math-verify alone'])}")
    print(summary(judged["ours"]))
    runs.replace(arguments.folder / "table.md", f"{text}\n{kinds_table(judged)}\n")
    runs.write_json(
        arguments.folder / "result.json",
        {
            "arguments": {k: str(v) for k, v in dataclasses.asdict(arguments).items()},
            **environment(),
            "verdicts": judged,
            "held_out": held_out,
            **{key: value for key, value in result.items() if key != "latencies"},
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
