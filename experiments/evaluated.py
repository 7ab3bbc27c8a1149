"""Models to evaluate: a checkpoint of a run, or a published model; with what samples from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import runs
from occ import sources, tasks
from occ.buckets import Path
from occ.evaluation import acceptance
from occ.evaluation.completions import Sampler, Settings, benchmark_key
from occ.generation.drafting import check_depth
from occ.generation.sampling import SamplingConfig, check_fits
from occ.models.policy import Policy
from occ.tasks import Problem, Task
from occ.tasks.prompts import encode_prompts
from occ.training import programs as training_programs
from occ.training.batch import segments_of
from occ.training.config import (
    LayoutConfig,
    PretrainedConfig,
    TrainConfig,
    WarmStartConfig,
)
from occ.training.durable.checkpoints import Checkpoints
from occ.training.durable.run_folder import identity, read_config
from occ.training.processes import to_host
from occ.training.regimes import REGIMES, regime
from occ.training.rollout import build_programs
from occ.training.rollout import sampler as rollout_sampler
from occ.training.score import Scores
from occ.training.sharding import make_mesh
from occ.training.start.pretrained import load_policy
from occ.training.start.starting_point import with_frozen
from occ.training.state import frozen_leaves

PUBLISHED = ("math", "dapo_math_17k")
"""Tasks that evaluate on published benchmarks; others on their own test problems."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy, and the task that it is judged by.

    Attributes:
      label: of its row in a table.
      name: which parameters these are, for `Settings.model`.
      config: of the run; of a published model, what generation and scoring read of one.
      task: judges, and has the tokenizer.
      benchmarks: problems of each.
      policy: the model.
      score: `RolloutPrograms.score`.
      mesh: that it lives on.
    """

    label: str
    name: str
    config: TrainConfig
    task: Task
    benchmarks: dict[str, Sequence[Problem]]
    policy: Policy
    score: Callable[..., Scores]
    mesh: Mesh


def from_run(
    folder: Path,
    which: Literal["newest", "best"],
    benchmarks: Sequence[str] | None,
    task_options: dict[str, Any],
    layout: LayoutConfig | None = None,
) -> Model:
    """A checkpoint of a run; its whole state is read, and checked.

    Args:
      folder: of the run.
      which: of its checkpoints.
      benchmarks: names; None are all six, or "test", the test problems of a task without any.
      task_options: in place of the run's own, for tasks of published problems; with a "data_dir"
        every run that has a tokenizer for texts is judged on published problems.
      layout: where it will live; None is where it was trained.

    Raises:
      ValueError: the folder holds no run or no checkpoint; the task has no such benchmarks.
    """
    config = read_config(folder)
    owner = identity(config)
    if "data_dir" in task_options:
        config = _on_published(config)
    if layout is not None:
        config = _moved(config, layout)
    task, problems = _task(config, benchmarks, task_options)
    built = training_programs.build(config, task)
    state, frozen = with_frozen(config, built.state), frozen_leaves(config.model)
    with (
        jax.set_mesh(built.mesh),
        Checkpoints(
            folder / "checkpoints", owner=owner, read_only=True, frozen=frozen
        ) as checkpoints,
    ):
        restored = checkpoints.read(state, which)
    return Model(
        label=label(config, folder),
        name=f"checkpoint {restored.number} of {config.name}",
        config=config,
        task=task,
        benchmarks=problems,
        policy=restored.state.policy(config.model),
        score=built.rollout.score,
        mesh=built.mesh,
    )


def from_pretrained(
    source: str,
    benchmarks: Sequence[str] | None,
    task_options: dict[str, Any],
    layout: LayoutConfig | None = None,
) -> Model:
    """A published model.

    Args:
      source: of its weights and tokenizer, as `sources.resolve` reads it: a folder or a .gguf file.
      benchmarks: names; None are all six.
      task_options: of `mathematics.load`; "data_dir" at least.
      layout: where it will live; None is one device.

    Raises:
      ValueError: no such files, or no "data_dir".
    """
    from occ.models import gguf, pretrained

    if "data_dir" not in task_options:
        raise ValueError("evaluate: a published model brings no benchmarks; give --data-dir.")
    path = sources.resolve(source)
    name = path.stem if path.is_file() else source.rstrip("/").split("/")[-1]
    model = gguf.read_config(path) if path.suffix == ".gguf" else pretrained.read_config(path)
    options = {"tokenizer": str(path), "extract": "boxed"} | task_options
    published = TrainConfig(
        name=name,
        model=model,
        task="math",
        task_options=options,
        mtp=regime("detach" if model.mtp.num_modules else "rl_only"),
        pretrained=PretrainedConfig(str(path)),
    )
    config = published if layout is None else _moved(published, layout)
    task, problems = _task(config, benchmarks, {})
    return Model(
        label=name,
        name=name,
        config=config,
        task=task,
        benchmarks=problems,
        policy=load_policy(config),
        score=build_programs(config, task).score,
        mesh=make_mesh(config.layout),
    )


def _moved(config: TrainConfig, layout: LayoutConfig) -> TrainConfig:
    """On another mesh, with no minibatch and no warm start that would have to fit it."""
    one = dataclasses.replace(config.rollout, prompts=layout.row_parts, samples=2, minibatches=1)
    return dataclasses.replace(config, layout=layout, rollout=one, warm_start=WarmStartConfig())


def _on_published(config: TrainConfig) -> TrainConfig:
    """As if the run had been on published problems, which its own tokenizer reads."""
    if config.task in PUBLISHED:
        return config
    tokenizer = config.task_options.get("tokenizer")
    if tokenizer is None:
        raise ValueError(
            f"evaluate: --data-dir asks for published problems, and task {config.task!r} of this "
            "run has no tokenizer for texts. Leave it out: the run is then judged on its own test "
            "problems."
        )
    options = {"tokenizer": tokenizer, "extract": "boxed"}
    return dataclasses.replace(
        config,
        task="math",
        task_options=options,
        max_prompt_tokens=None,
        max_response_tokens=None,
    )


def _task(
    config: TrainConfig, benchmarks: Sequence[str] | None, options: dict[str, Any]
) -> tuple[Task, dict[str, Sequence[Problem]]]:
    if config.task not in PUBLISHED:
        if benchmarks not in (None, ("test",)):
            raise ValueError(
                f"task {config.task!r} has one benchmark, 'test', got {list(benchmarks or ())}."
            )
        task = runs.load_task(config)
        return task, {"test": task.test}
    options = {**config.task_options, **options, "dataset": None}
    if benchmarks is not None:
        options["benchmarks"] = tuple(benchmarks)
    task = tasks.load("math", **options)
    return task, dict(task.benchmarks)  # type: ignore[attr-defined]


def label(config: TrainConfig, folder: Path) -> str:
    """The regime of a run, by its configuration, and its seed; or the folder's name."""
    for name in REGIMES:
        if config.mtp in (regime(name), regime(name, exact=True)):
            return f"{name}, seed {config.seed}"
    return folder.name


# -- sampling -------------------------------------------------------------------------------------


def decoding(model: Model, slots: int | None, draft_depth: int | None) -> Model:
    """With other slots and drafts than its run's; None leaves them.

    Raises:
      ValueError: slots cannot be cut evenly, or its modules cannot draft so many tokens.
    """
    given = {"generation_rows": slots, "draft_depth": draft_depth}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    layout = dataclasses.replace(model.config.layout, **changes)
    check_depth(model.config.model.mtp, layout.fixed_depth)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, layout=layout))


def sampling_config(model: Model, settings: Settings) -> SamplingConfig:
    """What `generate` needs.

    Raises:
      ValueError: prompts and responses do not fit the model's context.
    """
    config = SamplingConfig(
        max_new_tokens=settings.max_response_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_tokens=model.task.tokenizer.end_ids,
        pad_token=model.task.tokenizer.pad_id,
    )
    widest = np.ones((1, settings.max_prompt_tokens), bool)
    check_fits(widest, model.config.model.max_length, config)
    return config


def sampler(model: Model, config: SamplingConfig) -> Sampler:
    """What samples from the model; models of one architecture share what is compiled."""
    program = _compiled(config, model.config)
    return lambda prompts, prompt_mask, key, numbers, prompt_of: program(
        model.policy, prompts, prompt_mask, key, rows=numbers, prompt_of=prompt_of
    )


_PROGRAMS: dict[str, Any] = {}


def _compiled(sampling: SamplingConfig, config: TrainConfig) -> Any:
    key = repr((sampling, config.model, config.layout))
    if key not in _PROGRAMS:
        _PROGRAMS[key] = jax.jit(rollout_sampler(sampling, config))
    return _PROGRAMS[key]


def measure_acceptance(
    model: Model, name: str, prompts: int, settings: Settings
) -> list[dict[str, Any]]:
    """How far the MTP modules would draft, on greedy responses to a benchmark's first prompts.

    Args:
      model: with K modules.
      name: of the benchmark.
      prompts: how many.
      settings: lengths, and rows at one time.

    Returns:
      `acceptance.summary`; empty where the model has no modules, or no prompts are asked for.
    """
    problems = list(model.benchmarks[name][:prompts])
    if not problems or not model.config.model.mtp.num_modules:
        return []
    columns = settings.max_prompt_tokens
    texts = [problem.prompt for problem in problems]
    tokens, mask = encode_prompts(model.task.tokenizer, texts, columns)
    config = sampling_config(model, settings)
    greedy = sampler(model, dataclasses.replace(config, temperature=0.0))
    total = None
    for start in range(0, len(problems), settings.rows):
        size = min(settings.rows, len(problems) - start)
        rows = np.minimum(np.arange(start, start + settings.rows), len(problems) - 1)
        key = benchmark_key(settings.seed, name)
        each = np.arange(len(rows), dtype=np.int32)
        made = to_host(greedy(tokens[rows], mask[rows], key, rows.astype(np.int32), each))
        segment_ids = segments_of(mask[rows], made.response_mask)
        agrees = to_host(model.score(model.policy, made.tokens, segment_ids)).mtp_agrees
        counts = acceptance.count(agrees[:, :size], made.response_mask[:size])
        total = counts if total is None else total.plus(counts)
    assert total is not None
    return acceptance.summary(total)
