"""One tiny run in a process of its own, to be killed: `python -m tests.durable_run FOLDER`."""

import argparse
import dataclasses
import sys

from experiments import train
from occ.buckets import path
from occ.training.config import (
    EvaluationConfig,
    WarmStartConfig,
)
from tests import tiny

CONFIG = tiny.run_config(
    "durable",
    task_options={"digits": 1, "train_size": 40, "test_size": 10},
    evaluation=EvaluationConfig(every=3, prompts=6, samples=2),
    warm_start=WarmStartConfig(steps=20, batch_size=16, learning_rate=1e-2),
    rollouts=8,
    checkpoint_every=2,
)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=path)
    parser.add_argument("--keep", type=int, default=CONFIG.keep_checkpoints)
    parser.add_argument("--every", type=int, default=CONFIG.checkpoint_every)
    given = parser.parse_args()
    config = dataclasses.replace(CONFIG, keep_checkpoints=given.keep, checkpoint_every=given.every)
    return train.train(train.Arguments(config, folder=given.folder))


if __name__ == "__main__":
    sys.exit(main())
