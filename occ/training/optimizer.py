"""The optimizer: clipping by group, AdamW, and which parameters decay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from occ.models.parameters import ADAPTERS, is_shared
from occ.training.config import OptimizerConfig
from occ.trees import path_string

MATRICES = ("kernel", "embedding", "router", "gate_kernel", "up_kernel", "down_kernel", *ADAPTERS)


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up from one n-th of the peak, then constant."""
    if config.warmup_steps <= 1:
        return optax.constant_schedule(config.learning_rate)
    first = config.learning_rate / config.warmup_steps
    return optax.linear_schedule(first, config.learning_rate, config.warmup_steps - 1)


def is_matrix(path: str) -> bool:
    """Whether the leaf at "path/of/leaf" is a kernel or an embedding, by its name.

    By name and not by rank, because scanned layers give every scale and bias a further axis.
    """
    return path.split("/")[-1] in MATRICES


def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW, as the configuration describes."""
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=None if config.decay == "all" else _by_path(is_matrix),
    )
    return optax.chain(_clip(config), adamw)


def second_moment(opt_state: Any, config: OptimizerConfig) -> Any:
    """Adam's estimate of the squared gradient, like the parameters, without its bias to zero.

    Before the first step it is 1 everywhere: no direction is preferred yet.
    """

    def is_adam(node):
        return isinstance(node, optax.ScaleByAdamState)

    (adam,) = (s for s in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(s))
    correction = 1 - jnp.asarray(config.b2, jnp.float32) ** adam.count.astype(jnp.float32)
    started = adam.count > 0
    divisor = jnp.where(started, correction, 1)
    return jax.tree.map(
        lambda nu: jnp.where(started, nu / divisor.astype(nu.dtype), 1).astype(nu.dtype), adam.nu
    )


def _clip(config: OptimizerConfig) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.clip_groups == "together":
        return clip
    labels = _by_path(lambda path: "shared" if is_shared(path) else "own")
    return optax.partition({"shared": clip, "own": clip}, labels)


def _by_path(function: Any) -> Any:
    """A function of a tree that labels every leaf by its path."""
    return lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: function(path_string(path)), tree
    )
