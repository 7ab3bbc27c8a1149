"""One training step beside TRL's on torch and Tunix's on JAX: same model, data and machine.

Question: does RL alone cost here what it costs there, and what does an MTP module add to it?
Command, after which --trl-python and --tunix-python may be given:

    python3.11 -m venv envs/trl && envs/trl/bin/pip install torch==2.13.0 trl==1.16.0
    python3.11 -m venv envs/tunix && envs/tunix/bin/pip install google-tunix==0.1.7
    python -m experiments.instruments.peers.compare --trl-python envs/trl/bin/python \
        --tunix-python envs/tunix/bin/python

Cost: Linux; a gigabyte of memory for each of the nine programs, which all stay alive. Without that
much to spare they time the machine's paging.

Every program is a process that has been warmed up, and the programs take one step each in turn. A
step is forward and backward pass, clipping and AdamW on 16 sequences of 256 tokens; sampling,
rewards and the loading of data are left out. Before anything is timed, losses and gradient norms
must agree. Wall and CPU time are medians; their ratios are geometric means of the ratios within
each round, with 95 % Student-t intervals. CPU time counts all threads, and is what to read on a
machine that does other work at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
import tqdm
import tyro

from experiments import runs
from experiments.instruments.peers import occ_step
from experiments.instruments.peers.turns import Worker
from experiments.instruments.peers.workload import Sizes, Workload, draw, off_policy
from occ.evaluation.intervals import ratio_interval
from occ.training.durable.run_folder import environment

BASE = "ours, RL alone"
OURS = {
    BASE: "rl_only",
    "ours, RL alone, prompts scored too": "rl_only+prompts",
    "ours, RL alone, layers in a loop": "rl_only+scan",
    "ours, Detach": "detach",
    "ours, OCC fused": "occ_paper",
    "ours, OCC exact": "occ",
}
COMBINED = ("ours, OCC fused", "ours, OCC exact")  # their norm is of both losses' gradients
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the comparison.

    Attributes:
      trl_python, tunix_python: interpreters of the peers' environments; without one, that peer is
        left out.
      trl_modes: "eager", and "compile" by torch.compile, which takes a C++ compiler and a minute.
      vocabs: vocabularies to measure with.
      sizes: of everything else.
      rounds: timed steps of each program.
      warmup: steps before them, of which the first compiles.
      folder: for result.json, table.md, and what the programs print.
    """

    trl_python: pathlib.Path | None = None
    tunix_python: pathlib.Path | None = None
    trl_modes: tuple[str, ...] = ("eager", "compile")
    vocabs: tuple[int, ...] = (2048, 16384)
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    rounds: int = 15
    warmup: int = 2
    folder: pathlib.Path = pathlib.Path("runs/peers")


def commands(arguments: Arguments, file: pathlib.Path) -> dict[str, list[str]]:
    """What to run for each program, by name."""

    def module(python, name, *rest):
        return [str(python), "-m", f"experiments.instruments.peers.{name}", str(file), *rest]

    programs = {name: module(sys.executable, "occ_step", key) for name, key in OURS.items()}
    if arguments.trl_python is not None:
        for mode in arguments.trl_modes:
            programs[f"TRL, {mode}"] = module(arguments.trl_python, "trl_step", mode)
    if arguments.tunix_python is not None:
        programs["Tunix"] = module(arguments.tunix_python, "tunix_step")
    return programs


def take_turns(
    programs: dict[str, list[str]], arguments: Arguments, logs: pathlib.Path
) -> dict[str, dict[str, Any]]:
    """Every program's answers, first step and timed ones apart, and its details."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for i, (name, command) in enumerate(tqdm.tqdm(programs.items(), desc="start")):
            workers[name] = Worker(command, logs / f"{i}.log")
            stack.callback(workers[name].close)
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        order = list(workers)
        for number in tqdm.trange(arguments.warmup + arguments.rounds, desc="step"):
            if number == arguments.warmup:
                for worker in workers.values():
                    worker.forget_peak()
            for name in order:
                steps[name].append(workers[name].step())
            if not number:
                check_same({name: answers[0] for name, answers in steps.items()})
            order = order[1:] + order[:1]  # nobody always comes after the same other program
        return {
            name: {
                "details": worker.details,
                "first": steps[name][0],
                "timed": steps[name][arguments.warmup :],
            }
            for name, worker in workers.items()
        }


def check_same(first: dict[str, dict[str, float]]) -> None:
    """Checks that the programs compute the same, by the first step's loss and gradient norm.

    Raises:
      ValueError: a program's loss, or its norm where that is of the RL gradient alone, differs
        from `BASE`'s by more than a thousandth.
    """
    for name, answer in first.items():
        for quantity in ("loss", "grad_norm"):
            if quantity == "grad_norm" and name in COMBINED:
                continue
            expected, got = first[BASE][quantity], answer[quantity]
            if not abs(got - expected) <= TOLERANCE * abs(expected):
                raise ValueError(
                    f"compare: {quantity} of {name!r} is {got:.6f}, of {BASE!r} {expected:.6f}. "
                    "Programs that compute different things cannot be compared by their speed."
                )


def summary(result: dict[str, Any], base: dict[str, Any], tokens: int) -> dict[str, float]:
    """Medians of a program's timed steps, and its ratios to the base's with intervals."""

    def values(program, quantity):
        return np.array([answer[quantity] for answer in program["timed"]])

    row = {
        "loss": result["first"]["loss"],
        "grad_norm": result["first"]["grad_norm"],
        "peak_mib": float(values(result, "peak_mib").max()),
    }
    for quantity in ("seconds", "cpu_seconds"):
        row[quantity] = float(np.median(values(result, quantity)))
        ratio = ratio_interval(values(result, quantity), values(base, quantity))
        ends = [ratio.mean, ratio.low, ratio.high]
        names = (f"{quantity}_ratio{end}" for end in ("", "_low", "_high"))
        row |= dict(zip(names, ends, strict=True))
    return row | {"tokens_per_second": tokens / row["seconds"]}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A row a program."""
    lines = [
        "| program | loss | gradient norm | ms a step | tokens/s | time / ours | CPU ms | "
        "CPU time / ours | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [name, f"{row['loss']:.5f}", f"{row['grad_norm']:.5f}"]
        cells += [f"{row['seconds'] * 1e3:.0f}", f"{row['tokens_per_second']:.0f}"]
        cells += [_ratio(row, "seconds"), f"{row['cpu_seconds'] * 1e3:.0f}"]
        cells += [_ratio(row, "cpu_seconds"), f"{row['peak_mib']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(row: dict[str, float], quantity: str) -> str:
    middle, low, high = (row[f"{quantity}_ratio{end}"] for end in ("", "_low", "_high"))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def measure(arguments: Arguments, vocab: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All programs at one vocabulary: a summary each, and their details."""
    folder = arguments.folder / str(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    workload: Workload = draw(dataclasses.replace(arguments.sizes, vocab=vocab))
    workload = off_policy(workload, occ_step.on_policy_log_prob(workload))
    file = folder / "workload.npz"
    workload.save(file)
    results = take_turns(commands(arguments, file), arguments, folder)
    rows = {
        name: summary(result, results[BASE], workload.sizes.tokens)
        for name, result in results.items()
    }
    return rows, {name: result["details"] for name, result in results.items()}


def main() -> int:
    """Measures, prints, and writes result.json and table.md."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in dataclasses.asdict(arguments).items()},
        **environment(),
    }
    text = []
    for vocab in arguments.vocabs:
        rows, details = measure(arguments, vocab)
        result[f"vocab {vocab}"] = {"rows": rows, "details": details}
        named = [f"{name}: {d['versions']}, {d['threads']} threads" for name, d in details.items()]
        text.append(f"Vocabulary {vocab}.\n\n{table(rows)}\n\n" + "\n".join(named) + "\n")
        print("\n" + text[-1])
    runs.replace(arguments.folder / "table.md", "\n".join(text))
    runs.write_json(arguments.folder / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
