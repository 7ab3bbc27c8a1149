"""Everything that decides the future of a run, as one pytree."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from occ.calibration import Calibration
from occ.grouped import GroupedCalibration
from occ.models.config import ModelConfig
from occ.models.policy import Policy


class TrainState(struct.PyTreeNode):
    """State of training.

    Attributes:
      step: int32 [], minibatches seen, skipped ones included.
      params: nested dict of arrays, the trained parameters.
      rest: the model's other variables (a router's correction bias; beside adapters, the frozen
        trunk); {} without any.
      opt_state: the optimizer's.
      calibration: `CalibrationState`, the same tree in both placements, or `GroupedState` where
        every layer has a coefficient; () without MTP loss.
      skipped: int32 [], updates left out because a loss or gradient was not finite.
    """

    step: jax.Array
    params: chex.ArrayTree
    rest: chex.ArrayTree
    opt_state: chex.ArrayTree
    calibration: chex.ArrayTree
    skipped: jax.Array

    def policy(self, config: ModelConfig) -> Policy:
        """What is trained, as a policy of this architecture."""
        return Policy(config, self.params, self.rest)


def frozen_leaves(config: ModelConfig) -> Callable[[str], bool]:
    """Which leaves of a state, by path, no training ever changes: the trunk beside adapters.

    >>> frozen_leaves(ModelConfig(11, 2, 16, 2, 1, 8, 24, 32))("rest/layers/mlp/up/kernel")
    False
    """

    def is_frozen(path: str) -> bool:
        return config.lora is not None and path.startswith("rest/") and "router_bias" not in path

    return is_frozen


def init_state(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    calibration: Calibration | GroupedCalibration | None,
) -> TrainState:
    """A fresh state around a policy's variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=policy.params,
        rest=policy.rest,
        opt_state=optimizer.init(policy.params),
        calibration=() if calibration is None else calibration.init(policy.params),
        skipped=jnp.zeros((), jnp.int32),
    )
