"""One process of a tiny run on four devices: `python -m tests.process_run FOLDER DEVICES [...]`.

With `--evaluate NAME`, of the evaluation of a run that has ended.
"""

import argparse
import dataclasses
import pathlib
import sys

import jax

from experiments import evaluate, train
from occ.training.config import LayoutConfig
from tests.durable_run import CONFIG


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("devices", type=int)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--index", type=int)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--packed", action="store_true", help="and generated in slots, with drafts")
    parser.add_argument("--evaluate", metavar="NAME")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", given.devices)
    group = {
        "distributed": given.processes is not None,
        "coordinator": given.coordinator,
        "processes": given.processes,
        "index": given.index,
    }
    if given.evaluate:
        evaluate.run(
            evaluate.Run(
                folders=(given.folder,),
                mesh={"data": 2, "tensor": 2},
                name=given.evaluate,
                k=3,
                rows=4,
                acceptance_prompts=3,
                **group,
            )
        )
        return 0
    layout = LayoutConfig(data=2, fsdp=2)
    if given.packed:
        layout = dataclasses.replace(
            layout, pack=True, sequences_per_row=2, generation_rows=8, draft_depth=1
        )
    config = dataclasses.replace(CONFIG, layout=layout, rollouts=given.rollouts, checkpoint_every=2)
    return train.train(train.Arguments(config, folder=given.folder, **group))


if __name__ == "__main__":
    sys.exit(main())
