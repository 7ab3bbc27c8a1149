"""Dashboards of a run beside its own files: TensorBoard, Weights & Biases, MLflow.

Each is behind a guard (`events.Guarded`): what is shown elsewhere never blocks or ends training.
Where a service is, and whether it is asked at all, its own environment says (WANDB_PROJECT,
WANDB_MODE=offline, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from experiments.events import EventFile, Guarded, Logger, scalars
from occ.buckets import Path, absolute, is_bucket
from occ.training.durable.run_folder import flatten, read_rows

Dashboard = Literal["tensorboard", "wandb", "mlflow"]
PROJECT = "occ-jax"
PATIENCE = {"tensorboard": 10.0, "wandb": 60.0, "mlflow": 60.0}  # seconds, of the end of a run
SAMPLES = 200  # of the newest sample completions that are shown


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a dashboard shows.

    Attributes:
      name: of the run, for people.
      group: runs that belong together, say those of a comparison.
      config: the resolved configuration, as JSON has it.
      folder: of the run's files.
    """

    name: str
    group: str
    config: dict[str, Any]
    folder: Path

    @property
    def identity(self) -> str:
        """The same whenever the same run goes on."""
        return hashlib.blake2b(str(absolute(self.folder)).encode(), digest_size=8).hexdigest()

    def samples(self) -> list[list[Any]]:
        """Rollout, prompt, completion and reward of the newest samples."""
        file = self.folder / "samples.jsonl"
        rows = read_rows(file)[-SAMPLES:] if file.exists() else []
        return [[row[name] for name in SAMPLE_COLUMNS] for row in rows]

    def pictures(self) -> list[Path]:
        """Figures in the folder."""
        return sorted(self.folder.glob("*.png"))


@contextlib.contextmanager
def on_disk(file: Path) -> Iterator[pathlib.Path]:
    """The file, or a copy of one in a bucket, which is gone after the block."""
    if not is_bucket(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / file.name
        copy.write_bytes(file.read_bytes())
        yield copy


SAMPLE_COLUMNS = ("rollout", "prompt", "completion", "reward")


class WeightsAndBiases:
    """A run there; one that is resumed goes on under the same id."""

    def __init__(self, subject: Subject):
        import wandb

        self._subject, self._wandb = subject, wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=subject.name,
            group=subject.group,
            id=subject.identity,
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
            config=subject.config,
            dir=None if is_bucket(subject.folder) else str(subject.folder),
            reinit="create_new",  # runs that go on side by side in one process
        )

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes every number of a row."""
        self._run.log(scalars(row), step=row["rollout"])

    def close(self) -> None:
        """Sends samples and figures, and ends the run."""
        if samples := self._subject.samples():
            table = self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=samples)
            self._run.log({"samples": table})
        for picture in self._subject.pictures():
            with on_disk(picture) as file:
                self._run.log({picture.stem: self._wandb.Image(str(file))})
        self._run.finish()


class MLflow:
    """A run there; one that is resumed goes on in the same."""

    def __init__(self, subject: Subject):
        import mlflow

        self._subject, self._entities = subject, mlflow.entities
        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
        tags = {"mlflow.runName": subject.name, "group": subject.group, "run": subject.identity}
        runs = self._client.search_runs([experiment], f"tags.run = '{subject.identity}'")
        run = runs[0] if runs else self._client.create_run(experiment, tags=tags)
        self._id = run.info.run_id
        for name, value in flatten(subject.config).items():
            self._client.log_param(self._id, name, value)

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes every number of a row."""
        now, step = int(1000 * time.time()), row["rollout"]
        # Without the step: as files, metrics cannot be called "rollout" beside "rollout/invalid".
        shown = {name: value for name, value in scalars(row).items() if name != "rollout"}
        metrics = [self._entities.Metric(k, v, now, step) for k, v in shown.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Sends samples and figures, and ends the run."""
        for file in (*self._subject.pictures(), self._subject.folder / "samples.jsonl"):
            if file.exists():
                with on_disk(file) as here:
                    self._client.log_artifact(self._id, str(here))
        self._client.set_terminated(self._id)


MAKERS: dict[str, Callable[[Subject], Logger]] = {
    "tensorboard": lambda subject: EventFile(subject.folder / "tensorboard"),
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def check(names: Sequence[str]) -> None:
    """Finds out before anything is computed whether the dashboards can be had.

    Raises:
      ValueError: a package is missing.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"--log {name} needs the package {PACKAGES[name]}, which is not installed: "
                f"pip install {PACKAGES[name]}, or leave it out."
            )


class Dashboards:
    """Several at once, each behind a guard of its own."""

    def __init__(self, names: Sequence[str], subject: Subject):
        self._guarded = [
            Guarded(functools.partial(MAKERS[name], subject), name, patience=PATIENCE[name])
            for name in names
        ]

    def __call__(self, row: dict[str, Any]) -> None:
        """Hands a row to all of them, and returns at once."""
        for logger in self._guarded:
            logger(row)

    def close(self) -> None:
        """Waits for what was handed on, but no longer than their patience."""
        for logger in self._guarded:
            logger.close()
