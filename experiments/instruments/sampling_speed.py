"""How fast responses are sampled, and with how much memory.

Claim: the cache is written in place, so that a token costs what reading it costs, and the memory
beside parameters is little more than the cache.
Command: python -m experiments.instruments.sampling_speed
Cost: two minutes on two CPU cores.

An untrained model samples without a stop token, so every row has all its new tokens.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
import tyro

from experiments import runs
from occ.generation.decoding import generate
from occ.generation.sampling import SamplingConfig
from occ.models.config import ModelConfig, MTPConfig
from occ.models.policy import new_policy
from occ.training.durable.run_folder import environment


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      layers, width, vocab: of the model; heads of 64, MLP of four widths, one MTP module.
      rows: sampled at one time.
      prompt, response: tokens a row.
      repeats: timed runs.
      folder: for result.json.
    """

    layers: int = 6
    width: int = 256
    vocab: int = 512
    rows: int = 64
    prompt: int = 64
    response: int = 192
    repeats: int = 5
    folder: pathlib.Path = pathlib.Path("runs/sampling_speed")


def measure(arguments: Arguments) -> dict[str, Any]:
    """Median seconds, tokens a second, and bytes of memory beside the arguments; cache's own."""
    heads = max(arguments.width // 64, 1)
    columns = arguments.prompt + arguments.response
    config = ModelConfig(
        vocab_size=arguments.vocab,
        num_layers=arguments.layers,
        width=arguments.width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        mlp_width=4 * arguments.width,
        max_length=columns,
        mtp=MTPConfig(num_modules=1),
    )
    policy = new_policy(config)
    never = arguments.vocab  # no such token
    sampling = SamplingConfig(max_new_tokens=arguments.response, stop_tokens=(never,))

    def sample(policy, prompts, mask, key):
        return generate(policy, prompts, mask, key, config=sampling)

    shape = (arguments.rows, arguments.prompt)
    inputs = policy, jnp.ones(shape, jnp.int32), jnp.ones(shape, bool), jax.random.key(0)
    compiled = jax.jit(sample).lower(*inputs).compile()
    seconds = []
    for repeat in tqdm.trange(arguments.repeats + 1, desc="sample"):
        started = time.perf_counter()
        generation = jax.block_until_ready(compiled(*inputs))
        if repeat:  # the first one warms caches up
            seconds.append(time.perf_counter() - started)
    made = int(generation.lengths.sum())
    memory: Any = compiled.memory_analysis()
    median = statistics.median(seconds)
    cache = 2 * arguments.layers * arguments.rows * columns * heads * 64 * 4
    return {
        "seconds": median,
        "all_seconds": seconds,
        "tokens": made,
        "tokens_per_second": made / median,
        "temporary_bytes": memory.temp_size_in_bytes,
        "cache_bytes": cache,
    }


def main() -> int:
    """Measures, prints, and writes result.json."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = measure(arguments)
    print(
        f"{found['tokens']} tokens in {found['seconds']:.3f} s, {found['tokens_per_second']:.0f} a "
        f"second; {found['temporary_bytes'] / 2**20:.0f} MiB beside parameters, of which the cache "
        f"takes {found['cache_bytes'] / 2**20:.0f}"
    )
    sizes = {name: str(value) for name, value in dataclasses.asdict(arguments).items()}
    result = {"arguments": sizes, **environment(), "result": found}
    runs.write_json(arguments.folder / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
