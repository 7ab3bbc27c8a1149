"""Sampled completions of a benchmark, by portions, in a file that a killed run goes on with.

    FOLDER/settings.json       what decides the samples; another setting needs another folder
    FOLDER/BENCHMARK.jsonl     a line a sample, in the order in which they were made

A row's random numbers are a function of the seed, the benchmark, the problem's place and the number
of the sample alone, and a portion always holds the same rows: what was begun ends with the same
rows as what was never interrupted. A portion is written at once; one that was cut short is made
again. Of several processes all sample, and the first one judges and has the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from occ import json_files
from occ.buckets import Path
from occ.evaluation.portions import Portion, portions
from occ.generation.sampling import Generation
from occ.tasks import Problem, Task
from occ.tasks.prompts import encode_prompts
from occ.training.durable import disk
from occ.training.durable.run_folder import read_rows
from occ.training.processes import from_first, is_first, key_on_mesh, to_host

MAX_SAMPLES = 4096
"""Of a problem: its samples have numbers, and after so many begin those of the next problem."""

Sampler = Callable[[np.ndarray, np.ndarray, jax.Array, np.ndarray, np.ndarray], Generation]
"""`(prompts [N, P], prompt_mask, key, numbers [R], prompt_of [R]) -> Generation`; as `generate`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the samples.

    Attributes:
      samples: k, a problem.
      temperature, top_p, top_k: of sampling.
      max_prompt_tokens, max_response_tokens: tokens.
      rows: that are generated at one time.
      problems: the first so many of each benchmark; 0 is all.
      seed: of sampling.
      model: which; for a run, the number of its checkpoint too.
    """

    samples: int = 32
    temperature: float = 1.0
    top_p: float = 0.7
    top_k: int = 0
    max_prompt_tokens: int = 2048
    max_response_tokens: int = 8192
    rows: int = 64
    problems: int = 0
    seed: int = 0
    model: str = ""

    def __post_init__(self):
        if not 1 <= self.samples <= MAX_SAMPLES or self.rows < 1 or self.problems < 0:
            raise ValueError(
                f"Settings: expected 1 <= samples <= {MAX_SAMPLES}, rows >= 1 and problems >= 0, "
                f"got {self.samples}, {self.rows} and {self.problems}."
            )


def open_folder(folder: Path, settings: Settings) -> None:
    """Makes the folder, or checks that it was begun with the same settings.

    Raises:
      ValueError: it was begun with others; they are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    wanted = dataclasses.asdict(settings)
    if not file.exists():
        if is_first():
            disk.replace(file, json.dumps(wanted, indent=2) + "\n")
        return
    before = json_files.read_object(file)
    changes = ", ".join(
        f"{name}: {before.get(name)!r} -> {wanted.get(name)!r}"
        for name in sorted(before.keys() | wanted.keys())
        if before.get(name) != wanted.get(name)
    )
    if changes:
        raise ValueError(
            f"{folder} was begun with other settings ({changes}). Go on with the same, or choose "
            "another folder for these."
        )


def complete(
    sampler: Sampler,
    task: Task,
    name: str,
    problems: Sequence[Problem],
    settings: Settings,
    folder: Path,
    on_portion: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """All samples of a benchmark; those in its file are not made again.

    Args:
      sampler: of the model; called with the same N and R and few different P, so that it is
        compiled for few shapes.
      task: judges, and has the tokenizer.
      name: of the benchmark.
      problems: of the benchmark.
      settings: as of `open_folder`.
      folder: which that has opened.
      on_portion: told of rows done and rows in all, after every portion.

    Returns:
      The rows, as in the file; on other processes than the first, none.

    Raises:
      ValueError: a prompt is longer than `max_prompt_tokens`.
    """
    file = folder / f"{name}.jsonl"
    problems = problems[: settings.problems or len(problems)]
    columns, k = settings.max_prompt_tokens, settings.samples
    prompts, mask = encode_prompts(task.tokenizer, [p.prompt for p in problems], columns)
    lengths = np.repeat(mask.sum(axis=1), k)
    cut = portions(lengths, columns, settings.rows)
    rows = _whole_portions(file, cut) if is_first() else []
    on_portion(len(rows), len(lengths))
    finished = np.isin(np.arange(len(cut)), [row["portion"] for row in rows])
    key = benchmark_key(settings.seed, name)
    for number in np.flatnonzero(~from_first(finished)).tolist():
        portion = cut[number]
        which, sample = portion.rows // k, portion.rows % k
        asked, prompt_of = _distinct(which, k)
        generation = sampler(
            prompts[asked, columns - portion.columns :],
            mask[asked, columns - portion.columns :],
            key,
            (which * MAX_SAMPLES + sample).astype(np.int32),
            prompt_of,
        )
        generation = to_host(generation)
        if not is_first():
            continue
        made = _rows(task, problems, number, portion, k, generation)
        text = "".join(json.dumps(row) + "\n" for row in made)
        with disk.explained(folder, len(text)):
            disk.append_text(file, text)
        rows += made
        on_portion(len(rows), len(lengths))
    return rows


def _distinct(which: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The problems of a portion, each once, and which of them each row asks.

    As many as R rows can ask when the k samples of a problem follow each other: one shape for all.

    >>> _distinct(np.array([5, 5, 7, 7]), 3)
    (array([5, 7]), array([0, 0, 1, 1], dtype=int32))
    """
    asked, prompt_of = np.unique(which, return_inverse=True)
    most = min(len(which), (max(len(which), 2) - 2) // k + 2)
    padded = np.pad(asked, (0, max(most - len(asked), 0)), mode="edge")
    return padded, prompt_of.astype(np.int32)


def benchmark_key(seed: int, name: str) -> jax.Array:
    """The key of a benchmark: which others are evaluated, and in what order, changes nothing."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return key_on_mesh(seed, int.from_bytes(digest, "big") >> 1)


def _whole_portions(file: Path, cut: Sequence[Portion]) -> list[dict[str, Any]]:
    """The rows of portions that are there whole; all others are dropped from the file."""
    found = read_rows(file)
    counts: dict[int, int] = {}
    for row in found:
        counts[row["portion"]] = counts.get(row["portion"], 0) + 1
    whole = {n for n, portion in enumerate(cut) if counts.get(n) == len(np.unique(portion.rows))}
    rows = [row for row in found if row["portion"] in whole]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.exists() and file.read_text() != text:
        disk.replace(file, text)
    return rows


def _rows(
    task: Task,
    problems: Sequence[Problem],
    number: int,
    portion: Portion,
    k: int,
    generation: Generation,
) -> list[dict[str, Any]]:
    # The last row stands several times where rows are wanting.
    pairs = portion.rows[: len(np.unique(portion.rows))].tolist()
    size, start = len(pairs), portion.columns
    completions = task.tokenizer.decode_batch(
        np.asarray(generation.tokens)[:size, start:],
        np.asarray(generation.response_mask)[:size, start:],
    )
    asked = [problems[pair // k] for pair in pairs]
    rewards, valid = task.verify_batch(asked, completions)
    return [
        {
            "problem": str(problem.entry.get("id", pair // k)),
            "index": pair // k,
            "sample": pair % k,
            "portion": number,
            "text": completion,
            "answer": task.final_answer(completion),
            "correct": bool(rewards[i] == 1) if valid[i] else None,
            "tokens": int(generation.lengths[i]),
            "finished": bool(generation.finished[i]),
        }
        for i, (pair, problem, completion) in enumerate(zip(pairs, asked, completions, strict=True))
    ]
