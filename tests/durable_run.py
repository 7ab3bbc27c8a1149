"""One tiny run in a process of its own, to be killed: `python -m tests.durable_run FOLDER`.

Every switch is on that could keep something which a checkpoint forgets, or compute in other
portions after a stop.
"""

import argparse
import dataclasses
import sys

from experiments import train
from occ.buckets import path
from occ.generation.engines.config import EngineConfig
from occ.models.config import MoEConfig
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    RolloutConfig,
    WarmStartConfig,
)
from tests import tiny

CONFIG = tiny.run_config(
    "durable",
    model=tiny.model_config(1, vocab_size=14, moe=MoEConfig(4, 2, 8)),
    rollout=RolloutConfig(prompts=4, samples=4, minibatches=2, routing_replay=True),
    layout=LayoutConfig(
        pack=True, micro_batches=2, logits_chunk=4, generation_rows=6, draft_depth=2
    ),
    engine=EngineConfig(overlap=True),
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
