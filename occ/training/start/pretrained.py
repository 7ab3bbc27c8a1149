"""A run's model out of files that others wrote, with the MTP modules that they lack."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

import jax
from jax.sharding import Mesh

from occ.models import pretrained
from occ.models.agreement import as_described, check_agrees
from occ.models.config import ModelConfig
from occ.models.lora import adapt
from occ.models.policy import Policy, abstract_policy
from occ.sources import resolve
from occ.training.config import PretrainedConfig, TrainConfig
from occ.training.sharding import make_mesh, tree_shardings


def load_policy(config: TrainConfig) -> Policy:
    """The model of `config.pretrained`, its variables born where they will live.

    With adapters the files are read in the dtype of the frozen trunk, and adapters are attached.

    Raises:
      ValueError: there are no such files, they hold another model than `config.model` describes,
        or something that cannot be read.
    """
    if config.model.lora is None:
        return _load_whole(config)
    whole = dataclasses.replace(config.model.whole, param_dtype=config.model.base.name)
    policy = _load_whole(dataclasses.replace(config, model=whole))
    mesh = make_mesh(config.layout)
    shardings = tree_shardings(abstract_policy(config.model).params, mesh)
    return adapt(policy, config.model, seed=config.seed, shardings=shardings)


def _load_whole(config: TrainConfig) -> Policy:
    assert config.pretrained is not None
    path = resolve(config.pretrained.path)
    stored = _stored_modules(config.model, path)
    mtp = dataclasses.replace(config.model.mtp, num_modules=stored)
    bare = dataclasses.replace(config.model, mtp=mtp)
    mesh = make_mesh(config.layout)
    with jax.set_mesh(mesh):
        shapes = abstract_policy(bare)
        shardings = tuple(tree_shardings(tree, mesh) for tree in (shapes.params, shapes.rest))
        policy = pretrained.load(path, bare, shardings=shardings)
        if config.model.mtp.num_modules == stored:
            return policy
        return _with_modules(config, policy, bare, mesh)


def on_pretrained(config: TrainConfig, source: str) -> TrainConfig:
    """A run's configuration on the model, and with the tokenizer, of other files.

    What files leave open stays as it is: dtypes, rematerialisation, a shorter context, adapters,
    and, where the files hold none, MTP modules and the tokenizer.

    Args:
      config: of the run.
      source: as `occ.sources.resolve` reads it.

    Raises:
      ValueError: there are no such files, they describe a model that the decoder is not, or they
        have another vocabulary and no tokenizer.
    """
    path = resolve(source)
    found = _described(path)
    options = config.task_options
    if "tokenizer" in options:
        if path.suffix == ".gguf" or (path / "tokenizer.json").exists():
            options = options | {"tokenizer": source}
        elif found.vocab_size != config.model.vocab_size:
            raise ValueError(
                f"{source} has no tokenizer.json, and its vocabulary ({found.vocab_size}) is not "
                f"that of {options['tokenizer']!r} ({config.model.vocab_size}). Put one there, for "
                "instance by transformers' AutoTokenizer.from_pretrained(..).save_pretrained(..)."
            )
    given = config.pretrained or PretrainedConfig(source)
    return dataclasses.replace(
        config,
        model=as_described(config.model, found),
        task_options=options,
        pretrained=dataclasses.replace(given, path=source),
    )


def folder_of(config: TrainConfig) -> pathlib.Path | None:
    """The published folder that a run began from, or a local copy of it, if it is here."""
    if config.pretrained is None:
        return None
    try:
        path = resolve(config.pretrained.path)
    except ValueError:
        return None
    return path if path.is_dir() else None


def stamp(source: str) -> list[list[Any]]:
    """Name, size and time of all files behind a source, which change when it does."""
    path = resolve(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _described(path: pathlib.Path) -> ModelConfig:
    """The model that files describe."""
    if path.suffix != ".gguf":
        return pretrained.read_config(path)
    from occ.models import gguf

    return gguf.read_config(path)


def _stored_modules(model: ModelConfig, path: pathlib.Path) -> int:
    """MTP modules in the files, which describe the model that is asked for."""
    if path.suffix == ".gguf":
        return 0  # and `gguf.load` looks at the rest
    found = _described(path)
    check_agrees(model, found, str(path))
    return found.mtp.num_modules


def _with_modules(config: TrainConfig, policy: Policy, bare: ModelConfig, mesh: Mesh) -> Policy:
    assert config.pretrained is not None
    with warnings.catch_warnings():
        if config.warm_start.learns_modules:  # as the warning asks
            warnings.simplefilter("ignore", pretrained.PretrainedWarning)
        policy = pretrained.attach(
            policy,
            num_modules=config.model.mtp.num_modules,
            init=config.pretrained.attach,
            seed=config.seed,
        )
    shapes = abstract_policy(config.model)

    def place(tree, shape):
        if "mtp" not in tree:
            return tree
        shardings = tree_shardings(shape, mesh)["mtp"]
        return tree | {"mtp": jax.jit(lambda x: x, out_shardings=shardings)(tree["mtp"])}

    return Policy(
        config.model, place(policy.params, shapes.params), place(policy.rest, shapes.rest)
    )
