"""A policy: a model with its variables, as one pytree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from occ.models.config import ModelConfig
from occ.models.decoder import Decoder, merge_model, split_model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """A model: what is sampled from, scored, trained, saved and exported.

    The model's structure follows from its configuration, so a policy is a configuration and arrays.
    Under jit the arrays are traced and the configuration is static.

    Attributes:
      config: the architecture; static.
      params: nested dict of arrays, the trained parameters.
      rest: the model's other variables (a router's correction bias; beside adapters, the frozen
        trunk); {} without any.
    """

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    params: Any
    rest: Any

    @property
    def model(self) -> Decoder:
        """The model itself, around these variables; works under jit, grad and vmap."""
        return merge_model(_graph(self.config), self.params, self.rest)

    def replace(self, **changes: Any) -> Policy:
        """A copy with another configuration, other parameters or other `rest`."""
        return dataclasses.replace(self, **changes)


def new_policy(config: ModelConfig, seed: int = 0) -> Policy:
    """Random variables of a model, made by one compiled program."""
    return jax.jit(functools.partial(create_policy, config, seed))()


def create_policy(config: ModelConfig, seed: int) -> Policy:
    """The same, to be compiled or to ask for shapes of."""
    _, params, rest = split_model(Decoder(config, nnx.Rngs(seed)))
    return Policy(config, params, rest)


@functools.cache
def abstract_policy(config: ModelConfig) -> Policy:
    """A policy with shapes in place of arrays; one object for all, so not to be changed."""
    return jax.eval_shape(functools.partial(create_policy, config, 0))


@functools.cache
def _graph(config: ModelConfig) -> nnx.GraphDef:
    return split_model(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[0]
