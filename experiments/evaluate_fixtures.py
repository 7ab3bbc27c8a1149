"""Two tiny runs on files that are written in the published formats, to be evaluated.

One rollout each on a character tokenizer, from random weights: they know nothing, so that their
accuracy is 0. What is shown is the way from released files to the table.
"""

from __future__ import annotations

import dataclasses
import pathlib

from occ import tasks
from occ.models.config import ModelConfig, MTPConfig
from occ.tasks.mathematics import CHARACTERS
from occ.training import loop
from occ.training.config import EvaluationConfig, RolloutConfig, TrainConfig
from occ.training.regimes import regime

REGIMES = ("detach", "occ_paper")


def config(data_dir: pathlib.Path) -> TrainConfig:
    """A run of one rollout."""
    return TrainConfig(
        name="fixtures",
        model=ModelConfig(
            vocab_size=len(CHARACTERS) + 2,
            num_layers=2,
            width=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            mlp_width=64,
            max_length=192,
            mtp=MTPConfig(num_modules=1),
        ),
        task="dapo_math_17k",
        task_options={
            "tokenizer": "characters",
            "data_dir": str(data_dir),
            "extract": "boxed",
            "max_prompt_tokens": 160,
            "max_response_tokens": 24,
            "verify": False,
            "workers": 1,
        },
        rollout=RolloutConfig(prompts=4, samples=2, minibatches=1),
        evaluation=EvaluationConfig(every=1, prompts=12, samples=1),
        rollouts=1,
    )


def train(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Writes the files, prepares the sets, trains; returns the folders of the runs."""
    from tests import fixtures_math  # in the checkout, as this module

    fixtures_math.write(folder / "data")
    base = config(folder / "data")
    task = tasks.load(base.task, **base.task_options)
    for selection in task.selections:  # type: ignore[attr-defined]
        print(selection)
    start = loop.init_policy(base)
    paths = []
    rollout = None
    for name in REGIMES:
        run_config = dataclasses.replace(base, mtp=regime(name))
        programs = loop.build(run_config, task, rollout)
        rollout = programs.rollout
        path = folder / f"{name}-seed0"
        loop.run(run_config, task, programs, start, path)
        paths.append(path)
    task.verifier.close()  # type: ignore[attr-defined]
    return tuple(paths)
