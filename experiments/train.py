r"""One training run: `python -m experiments.train CONFIG [--regime NAME] [--config.FIELD VALUE]`.

For example

    python -m experiments.train laptop --regime occ_paper --config.seed 1 --config.rollouts 40

Fields of `config.mtp` that are given beside a regime go on top of it. What a regime or a metric is:
`python -m experiments.train regimes`, `... metrics`; which configurations there are: `... --list`.

On several hosts, with the same command on each (experiments/launch has both for clusters):

    python -m experiments.train mimo_7b_dapo --distributed
    python -m experiments.train laptop --distributed --coordinator 10.0.0.1:1234 \
        --processes 2 --index 0 --config.layout.data 2

On another published model, as a folder or by its name in huggingface_hub's cache:

    python -m experiments.train smollm2_arithmetic --pretrained Qwen/Qwen3-1.7B

Responses sampled by vLLM, in an environment of its own (experiments/README.md says how):

    python -m experiments.train smollm2_arithmetic --engine vllm --config.engine.python PYTHON

Ctrl-C, SIGTERM or SIGHUP ends after the rollout in hand; the same command goes on from there, as it
does after a crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from experiments import dashboards, runs
from experiments.compiled import keep_compiled
from experiments.configs import CONFIGS
from experiments.dashboards import Dashboard
from experiments.paths import PathArgument
from experiments.progress import Interrupt, interrupt
from occ.buckets import Path, UnreachableError, is_bucket
from occ.generation.engines import EngineError
from occ.models.config import LoRAConfig
from occ.training import loop, metrics, regimes
from occ.training.config import TrainConfig
from occ.training.durable.disk import DiskFullError
from occ.training.durable.lock import LockedError
from occ.training.durable.run_folder import as_json, environment, flatten
from occ.training.processes import check_alike, is_first, join, on_first
from occ.training.regimes import RegimeName, regime
from occ.training.start.pretrained import on_pretrained


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of one run.

    Attributes:
      config: the configuration; every field can be given.
      regime: a named training regime in place of `config.mtp`, whose fields that are given on the
        command line change it.
      pretrained: the model that the run begins from, in place of `config.pretrained.path`: a
        folder, a .gguf file, or OWNER/NAME in huggingface_hub's cache. `config.model` and the
        task's tokenizer become what it says; what it leaves open stays.
      lora_rank: train adapters of this rank beside a frozen trunk, as `config.model.lora` where the
        configuration has it.
      quantised: how the kernels of that frozen trunk are stored.
      engine: what samples responses, in place of `config.engine.kind`, whose other fields stay.
      folder: for the run, or gs://BUCKET/FOLDER; default runs/CONFIG/REGIME-seedN.
      shared: folder for what runs have in common, starting points and compiled programs; default
        runs/CONFIG, or for a run in a bucket the folder around its own.
      log: dashboards beside the folder's own files; `experiments.dashboards` says where they are.
      distributed: one of several processes, on a file system that all of them share.
      coordinator: host:port of process 0; on TPU pods and under SLURM the cluster knows.
      processes: how many; likewise.
      index: of this process, from 0; likewise.
    """

    config: TrainConfig
    regime: RegimeName | None = None
    pretrained: str | None = None
    lora_rank: int | None = None
    quantised: Literal["none", "int8"] | None = None
    engine: Literal["in_process", "vllm"] | None = None
    folder: PathArgument | None = None
    shared: PathArgument | None = None
    log: tuple[Dashboard, ...] = ("tensorboard",)
    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    index: int | None = None


def train(arguments: Arguments, beside: tuple[str, ...] = ()) -> int:
    """Runs it.

    Args:
      arguments: of the run.
      beside: fields of `config.mtp` that go on top of the regime.

    Returns:
      The exit status: 0, even after SIGTERM; 130 after Ctrl-C; 1 where the disk is full, another
      process has the folder, its bucket does not answer, or the engine failed, which is said.
    """
    dashboards.check(arguments.log)
    if arguments.distributed:
        join(arguments.coordinator, arguments.processes, arguments.index)
    try:
        config = _chosen(arguments, beside)
    except UnreachableError as error:
        print(error, file=sys.stderr)
        return 1
    label = "custom" if arguments.regime is None else arguments.regime
    root = pathlib.Path("runs") / config.name
    folder = root / f"{label}-seed{config.seed}" if arguments.folder is None else arguments.folder
    if arguments.shared is not None:
        root = arguments.shared
    elif is_bucket(folder):
        root = folder.parent
    check_alike("command and packages", _of_command(config, folder))
    ended, should_stop = None, Interrupt()
    try:
        on_first(lambda: runs.check_folder(folder, config))
        keep_compiled(root / "compiled")
        task = runs.load_task(config)
        programs = loop.build(config, task)
        with (
            contextlib.closing(programs.rollout.engine),
            contextlib.closing(runs.job(config, starts=1, runs=1)) as progress,
        ):
            start = runs.starting_point(config, task, programs, root / "starts", progress)
            with interrupt() as should_stop:
                result = runs.run(
                    label,
                    config,
                    task,
                    programs,
                    start,
                    folder,
                    progress,
                    should_stop,
                    arguments.log,
                    keep_start=False,
                )
    except (DiskFullError, EngineError, LockedError, UnreachableError) as error:
        ended = str(error)
    except KeyboardInterrupt:  # in the warm start, or a second one
        print(f"stopped; the same command goes on from what is in {folder}")
        return 130
    if ended is not None:
        gc.collect()  # with it goes what Orbax still has to say, so that ours is the last word
        print(ended, file=sys.stderr)
        return 1
    if not is_first():
        return 0 if result is not None else should_stop.status
    if result is None:
        print(f"stopped; the same command goes on from the checkpoint in {folder}")
        return should_stop.status
    final = result["final"]
    print(
        f"{folder}: greedy {final['greedy']:.3f}, sampled {final['sampled']:.3f}, MTP acceptance "
        + ", ".join(f"{share:.3f}" for share in final["mtp_acceptance"])
    )
    return 0


def _chosen(arguments: Arguments, beside: tuple[str, ...]) -> TrainConfig:
    """The configuration with the model, the regime and the engine that were named."""
    config = arguments.config
    if arguments.pretrained is not None:
        config = on_pretrained(config, arguments.pretrained)
    if arguments.lora_rank is not None or arguments.quantised is not None:
        config = _with_adapters(config, arguments)
    if arguments.regime is not None:
        named = {name: getattr(config.mtp, name) for name in beside}
        mtp = dataclasses.replace(regime(arguments.regime), **named)
        config = dataclasses.replace(config, mtp=mtp)
    if arguments.engine is not None:
        engine = dataclasses.replace(config.engine, kind=arguments.engine)
        config = dataclasses.replace(config, engine=engine)
    return config


def _with_adapters(config: TrainConfig, arguments: Arguments) -> TrainConfig:
    lora, rank, quantised = config.model.lora, arguments.lora_rank, arguments.quantised
    if lora is None and rank is None:
        raise ValueError(
            "train: --quantised is how the frozen trunk beside adapters is stored, and this "
            "configuration has none; give --lora-rank as well."
        )
    lora = lora or LoRAConfig()
    lora = dataclasses.replace(
        lora, rank=lora.rank if rank is None else rank, quantised=quantised or lora.quantised
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))


def _of_command(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """What all processes of a run must have in common, by name."""
    return {
        **flatten(as_json(config)),
        "folder": str(folder),
        **environment()["versions"],
        "commit": environment()["commit"],
    }


def given_fields(words: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Fields of a configuration that a command line gives.

    >>> given_fields(["--regime", "occ", "--config.mtp.own-loss=ce"], "--config.mtp.")
    ('own_loss',)
    """
    names = [word.removeprefix(prefix) for word in words if word.startswith(prefix)]
    names = [name.partition("=")[0].partition(".")[0].replace("-", "_") for name in names]
    return tuple(name.removeprefix("no_") for name in names)


def listing() -> str:
    """Every configuration in a line, and where regimes and metrics are listed."""
    width = max(map(len, CONFIGS)) + 2
    lines = [
        f"{name:{width}}{(build.__doc__ or '').strip().splitlines()[0]}"
        for name, build in CONFIGS.items()
    ]
    more = "python -m experiments.train regimes, or metrics, lists those; NAME --help every field."
    return "\n".join([*lines, "", more])


def main() -> int:
    """Reads the command line."""
    tables = {"regimes": regimes.describe, "metrics": metrics.describe, "--list": listing}
    if len(sys.argv) == 2 and sys.argv[1] in tables:
        print(tables[sys.argv[1]]())
        return 0
    commands = {name: (build.__doc__ or "", Arguments(build())) for name, build in CONFIGS.items()}
    arguments = tyro.extras.overridable_config_cli(commands)
    return train(arguments, given_fields(sys.argv, "--config.mtp."))


if __name__ == "__main__":
    sys.exit(main())
