r"""A checkpoint of a run as a published folder: `python -m experiments.export RUN_FOLDER TARGET`.

    python -m experiments.export runs/mimo_7b_dapo/occ-seed0 exported/mimo --like models/MiMo-7B-RL
    python -m experiments.export runs/laptop/occ-seed0 exported/laptop --which best
    python -m experiments.export runs/mimo_7b_lora/occ-seed0 exported/adapters --form peft

The folder holds safetensors files with the published names, MTP modules included, and a
config.json: other tools load it. With --like, the folder that the run began from (the default where
the run's configuration names one), dtypes, tokenizer and all other files are kept. Of a run with
adapters these are merged into the kernels, or, with --form peft, written alone as PEFT reads them,
beside the MTP modules.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

import jax
import tyro

from experiments.paths import PathArgument
from occ.buckets import Path
from occ.models import pretrained
from occ.models.policy import abstract_policy
from occ.training.config import TrainConfig
from occ.training.durable.checkpoints import Checkpoints
from occ.training.durable.run_folder import identity, read_config
from occ.training.layout import LayoutConfig
from occ.training.programs import abstract_state
from occ.training.sharding import make_mesh
from occ.training.start.pretrained import folder_of
from occ.training.start.starting_point import with_frozen
from occ.training.state import frozen_leaves


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to export.

    Attributes:
      run: folder of the run, local or gs://BUCKET/FOLDER, as all others here.
      target: folder to be written, which must not exist.
      which: of its checkpoints.
      like: folder that the run began from.
      form: "whole" is a model, "peft" the adapters of a run that has some.
    """

    run: tyro.conf.Positional[PathArgument]
    target: tyro.conf.Positional[PathArgument]
    which: Literal["newest", "best"] = "newest"
    like: PathArgument | None = None
    form: Literal["whole", "peft"] = "whole"


def export(arguments: Arguments) -> int:
    """Writes it, and says which checkpoint it is; returns the number of finished rollouts.

    On the run's own mesh, or on one device where there are fewer than it takes.

    Raises:
      ValueError: the folder holds no run or no checkpoint, the target exists, or a run without
        adapters is to be written as such.
    """
    config = read_config(arguments.run)
    owner = identity(config)
    if arguments.form == "peft" and config.model.lora is None:
        raise ValueError(
            f"export: {arguments.run} trained all parameters; it has no adapters. Use --form whole."
        )
    if config.layout.devices > jax.device_count():
        config = dataclasses.replace(config, layout=LayoutConfig())
    mesh = make_mesh(config.layout)
    policy = abstract_policy(config.model)
    state = with_frozen(config, abstract_state(config, policy, mesh))
    folder, frozen = arguments.run / "checkpoints", frozen_leaves(config.model)
    with (
        jax.set_mesh(mesh),
        Checkpoints(folder, owner=owner, read_only=True, frozen=frozen) as checkpoints,
    ):
        number, restored, _ = checkpoints.read(state, arguments.which)
        trained = restored.policy(config.model)
        if arguments.form == "peft":
            base = None if arguments.like is None else str(arguments.like)
            if base is None and config.pretrained is not None and folder_of(config) is not None:
                base = config.pretrained.path  # a hub's name, where it is one
            pretrained.save_adapters(arguments.target, trained, base=base)
        else:
            like = _like(config) if arguments.like is None else arguments.like
            pretrained.save(arguments.target, trained, like=like)
    return number


def _like(config: TrainConfig) -> Path | None:
    """The folder that the run began from; says so if it was none, or is gone."""
    if config.pretrained is None:
        return None
    folder = folder_of(config)
    if folder is None:
        print(
            f"{config.pretrained.path} is no folder here: config.json is made anew, and no "
            "tokenizer is written. Give the folder that they are in as --like.",
            file=sys.stderr,
        )
    return folder


def main() -> int:
    """Reads the command line."""
    arguments = tyro.cli(Arguments)
    number = export(arguments)
    print(f"{arguments.target}: the checkpoint after {number} rollouts of {arguments.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
