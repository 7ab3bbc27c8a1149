"""A model, a configuration and minibatches that are small enough for every test."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from occ.models.config import ModelConfig, MTPConfig
from occ.models.decoder import Decoder, split_model
from occ.models.policy import Policy, create_policy
from occ.training.batch import Minibatch, Sequences, positions_from_segments
from occ.training.config import OptimizerConfig, RolloutConfig, TrainConfig
from occ.training.gradient.calibration import build_calibration
from occ.training.gradient.inputs import step_inputs
from occ.training.gradient.placement import step_gradient
from occ.training.gradient.stages import Stages
from occ.training.optimizer import build_optimizer
from occ.training.regimes import regime
from occ.training.state import init_state


def model_config(heads=1, dtype="float32", **changes):
    mtp = MTPConfig(num_modules=heads, **changes.pop("mtp", {}))
    base = ModelConfig(
        vocab_size=11,
        num_layers=2,
        width=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=24,
        max_length=32,
        param_dtype=dtype,
        compute_dtype=dtype,
        mtp=mtp,
    )
    return dataclasses.replace(base, **changes)


def train_config(mtp, model=None, **changes):
    return TrainConfig(
        name="tiny",
        model=model_config() if model is None else model,
        task="arithmetic",
        mtp=mtp,
        optimizer=changes.pop("optimizer", OptimizerConfig(learning_rate=1e-2)),
        **changes,
    )


def run_config(name, **changes):
    """A whole run of a few seconds on one-digit sums."""
    base = TrainConfig(
        name=name,
        model=model_config(1, vocab_size=14),
        task="arithmetic",
        mtp=regime("occ_paper"),
        rollout=RolloutConfig(prompts=4, samples=4, minibatches=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    return dataclasses.replace(base, **changes)


def policy(config, model):
    """The policy of a run's configuration, from a model in pieces."""
    return Policy(config.model, *model[1:])


@functools.cache
def new_policy(config, seed=0):
    """As `occ.models.policy.new_policy`, once for each configuration.

    Operation by operation: most shapes are those of another model here, and compiled already.
    """
    return create_policy(config, seed)


def build_model(config, seed=0):
    """The same in pieces: (graphdef, params, rest)."""
    graphdef, *_ = split_model(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    policy = new_policy(config, seed)
    return graphdef, policy.params, policy.rest


@jax.jit
def score(policy, tokens, positions, segment_ids):
    return Stages(policy, Sequences(tokens, segment_ids, positions)).score(policy.params)


def minibatch(config, model, seed=0, rows=4, time=9, drift=0.3):
    """Left-padded sequences, with old log-probs that the present ones have drifted from."""
    rng = np.random.default_rng(seed)
    dtype = config.model.compute
    prompt = rng.integers(2, 5, rows)
    present = np.ones((rows, time), bool)
    for row, pad in enumerate(rng.integers(0, 2, rows)):
        present[row, :pad] = False
    response = present & (np.arange(time)[None] >= (time - 5 + (prompt % 2))[:, None])
    segment_ids = jnp.asarray(present.astype(np.int32))
    tokens = jnp.asarray(np.where(present, rng.integers(2, 11, (rows, time)), 0), jnp.int32)
    positions = positions_from_segments(segment_ids)
    main, *heads = score(policy(config, model), tokens, positions, segment_ids)

    def drifted(log_prob):
        noise = rng.normal(size=(rows, time)) * drift
        return jnp.where(segment_ids > 0, log_prob + noise.astype(dtype), 0).astype(dtype)

    old = drifted(main.log_prob)
    own = [drifted(head.log_prob) for head in heads]
    return Minibatch(
        tokens=tokens,
        segment_ids=segment_ids,
        positions=positions,
        response_mask=jnp.asarray(response),
        advantages=jnp.asarray(np.where(response, rng.normal(size=(rows, 1)), 0), dtype),
        old_log_prob=old,
        old_mtp_log_prob=jnp.stack(own) if own else jnp.zeros((0, rows, time), dtype),
        # Last, so that nothing before it depends on it: importance weights are not 1.
        rollout_log_prob=drifted(old),
        reference_log_prob=jnp.zeros((rows, time), dtype),
    )


def state(config, model):
    calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    fresh = init_state(policy(config, model), build_optimizer(config.optimizer), calibration)
    return jax.tree.map(jnp.array, fresh)  # a copy, since train steps donate


# What conftest.py turns off for speed; tests to the last bit compile as users do.
FLAG = "xla_cpu_use_fusion_emitters"
AS_USERS = {FLAG: True} if FLAG in os.environ.get("XLA_FLAGS", "") else {}


def gradient(config, model, batch, calibration=None, as_users=False):
    """The combined gradient of one minibatch, from a fresh calibration state."""
    graphdef, params, rest = model
    given = calibration is not None
    if not given:
        calibration = build_calibration(config.mtp, config.model.mtp.num_modules)
    start = () if calibration is None else calibration.init(params)
    key = repr(config), graphdef, id(calibration) if given else None, as_users
    if key not in _COMPILED:
        options = AS_USERS if as_users else {}
        _COMPILED[key] = _compiled(config, graphdef, calibration, options)
    return _COMPILED[key](params, rest, batch, start)


_COMPILED: dict = {}


def _compiled(config, graphdef, calibration, options):
    def compute(params, rest, batch, start):
        return step_gradient_of(config, (graphdef, params, rest), batch, calibration, start)

    return jax.jit(compute, compiler_options=options)


def step_gradient_of(config, model, batch, calibration, start, moments=None):
    """`step_gradient` on a model in pieces, from a given calibration state."""
    inputs = step_inputs(policy(config, model), batch, config, second_moment=moments)
    return step_gradient(inputs, calibration, start)


def close(actual, expected, tolerance):
    """Norm-wise agreement of every leaf."""
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error, size = np.linalg.norm(a - e), np.linalg.norm(e)
        assert error <= tolerance * max(size, 1e-30), (path, error / max(size, 1e-30))
