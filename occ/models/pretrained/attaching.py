"""Fresh MTP modules for a model that was trained without."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp

from occ.models.config import ModelConfig
from occ.models.policy import Policy, abstract_policy, create_policy
from occ.models.pretrained.model import PretrainedWarning

Tree = dict[str, Any]


def attach(
    policy: Policy,
    *,
    num_modules: int,
    init: Literal["last_block", "random"] = "last_block",
    seed: int = 0,
) -> Policy:
    """Gives a model without MTP modules K fresh ones, and warns that they know nothing yet.

    From the "last_block", each module's block is a copy of the trunk's last and its final norm one
    of the trunk's; of a sequential module the norms are 1 and the projection adds its two inputs,
    [I; I] / sqrt(2). At "random", modules begin as in a fresh model.

    Args:
      policy: without modules; its arrays are shared with the result, and the `mtp` of its
        configuration says of which kind they are to be.
      num_modules: K >= 1.
      init: where their weights come from.
      seed: of the random ones.

    Returns:
      The policy with the modules.

    Raises:
      ValueError: the model has modules already, K < 1, or an unknown `init`.
    """
    config = policy.config
    _check(config, num_modules, init)
    mtp = dataclasses.replace(config.mtp, num_modules=num_modules)
    config = dataclasses.replace(config, mtp=mtp)
    if init == "random":
        modules, module_rest = _random_modules(config, seed)
    else:
        numbers = [str(number) for number in range(num_modules)]
        modules = {number: _from_trunk(policy.params, config) for number in numbers}
        bias = _last_block(policy.rest)
        module_rest = {number: {"block": bias} for number in numbers} if bias else {}
    warnings.warn(
        f"attach: the model now has {num_modules} MTP module(s) that were NEVER TRAINED "
        f"(init={init!r}). What they predict means nothing until they have been warmed up.",
        PretrainedWarning,
        stacklevel=2,
    )
    rest = {**policy.rest, "mtp": module_rest} if module_rest else policy.rest
    return Policy(config, {**policy.params, "mtp": modules}, rest)


def _check(config: ModelConfig, num_modules: int, init: str) -> None:
    if config.mtp.num_modules:
        raise ValueError(
            f"attach: the model has {config.mtp.num_modules} MTP module(s) already. Load it with "
            "mtp.num_modules=0 to replace them."
        )
    if num_modules < 1:
        raise ValueError(f"attach: num_modules must be >= 1, got {num_modules}.")
    if init not in ("last_block", "random"):
        raise ValueError(f"attach: init must be 'last_block' or 'random', got {init!r}.")


def _random_modules(config: ModelConfig, seed: int) -> tuple[Tree, Tree]:
    """The modules of a fresh model, of which nothing else is computed."""

    @jax.jit
    def create():
        policy = create_policy(config, seed)
        return policy.params["mtp"], policy.rest.get("mtp", {})

    return create()


def _last_block(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf[-1], tree.get("layers", {}))


def _from_trunk(params: Tree, config: ModelConfig) -> Tree:
    """One module's parameters, of the names that its configuration asks for."""
    ones = {"scale": jnp.ones((config.width,), config.params)}
    identity = jnp.eye(config.width, dtype=jnp.float32) * 2**-0.5
    kernel = jnp.concatenate([identity, identity]).astype(config.params)
    embedding = params["embedding"]["embedding"]
    head = params["output_head"]["kernel"] if "output_head" in params else embedding.T
    every = {
        "block": _last_block(params),
        "hidden_norm": ones,
        "embedding_norm": ones,
        "projection": {"kernel": kernel},
        "final_norm": params["final_norm"],
        "embedding": {"embedding": embedding},
        "output_head": {"kernel": head},
    }
    abstract = abstract_policy(config).params
    # Copies, since a train step gives its arrays away one by one.
    return {name: jax.tree.map(jnp.copy, every[name]) for name in abstract["mtp"]["0"]}
