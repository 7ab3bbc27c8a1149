"""This project's step, in one of its regimes.

python -m experiments.instruments.peers.occ_step FILE REGIME
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from experiments.instruments.peers import workload as workloads
from experiments.instruments.peers.turns import Program, serve
from experiments.instruments.peers.workload import Sizes, Workload
from occ.models.config import ModelConfig, MTPConfig
from occ.models.policy import Policy, new_policy
from occ.objectives.policy import PolicyConfig
from occ.training.batch import Minibatch, positions_from_segments
from occ.training.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from occ.training.gradient.calibration import build_calibration
from occ.training.optimizer import build_optimizer
from occ.training.regimes import regime
from occ.training.score import score_sequences
from occ.training.state import init_state
from occ.training.step import make_train_step


def train_config(sizes: Sizes, name: str, scan: bool = False) -> TrainConfig:
    """The run: "rl_only" has no MTP module, as the peers have none, other regimes have one.

    Layers are unrolled, as the peers' are, unless `scan` wants them in a loop.
    """
    model = ModelConfig(
        vocab_size=sizes.vocab,
        num_layers=sizes.layers,
        width=sizes.width,
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads,
        head_dim=sizes.head_dim,
        mlp_width=sizes.mlp_width,
        max_length=sizes.length,
        rope_base=float(workloads.ROPE_BASE),
        norm_epsilon=workloads.NORM_EPSILON,
        scan_layers=scan,
        mtp=MTPConfig(num_modules=0 if name == "rl_only" else 1),
    )
    policy = PolicyConfig(
        clip_low=workloads.CLIP_LOW, clip_high=workloads.CLIP_HIGH, dual_clip=None
    )
    return TrainConfig(
        name="peers",
        model=model,
        task="arithmetic",
        objective=ObjectiveConfig(policy=policy, aggregation="token-mean"),
        mtp=regime(name),
        optimizer=OptimizerConfig(
            learning_rate=workloads.LEARNING_RATE, clip_norm=workloads.CLIP_NORM
        ),
    )


def parameters(workload: Workload, config: ModelConfig) -> Policy:
    """The model with the workload's weights; MTP modules are fresh."""
    weights = jax.tree.map(jnp.asarray, workload.weights)
    policy = new_policy(config)

    def kernels(*names):
        return {name: {"kernel": weights[name]} for name in names}

    layers = {
        "attention_norm": {"scale": weights["attention_norm"]},
        "attention": kernels("query", "key", "value", "output"),
        "mlp_norm": {"scale": weights["mlp_norm"]},
        "mlp": kernels("gate", "up", "down"),
    }
    params = policy.params | {
        "embedding": {"embedding": weights["embedding"]},
        "layers": layers,
        "final_norm": {"scale": weights["final_norm"]},
    }
    return policy.replace(params=params)


def minibatch(workload: Workload, modules: int) -> Minibatch:
    """The workload's batch in token alignment."""
    tokens = jnp.asarray(workload.tokens)
    prompt = workload.sizes.length - workload.sizes.response
    old = jnp.pad(jnp.asarray(workload.old_log_prob), [(0, 0), (prompt, 0)])
    advantages = jnp.broadcast_to(jnp.asarray(workload.advantages)[:, None], tokens.shape)
    segment_ids = jnp.ones_like(tokens)
    return Minibatch(
        tokens=tokens,
        segment_ids=segment_ids,
        positions=positions_from_segments(segment_ids),
        response_mask=jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= prompt, tokens.shape),
        advantages=advantages,
        old_log_prob=old,
        old_mtp_log_prob=jnp.broadcast_to(old, (modules, *old.shape)),
        rollout_log_prob=old,
        reference_log_prob=jnp.zeros_like(old),
    )


def on_policy_log_prob(workload: Workload) -> np.ndarray:
    """Log-probs [B, T / 2] of the responses under the workload's own weights."""
    config = train_config(workload.sizes, "rl_only")
    policy = parameters(workload, config.model)
    batch = minibatch(workload, 0)
    scores = jax.jit(score_sequences)(policy, batch.tokens, batch.segment_ids)
    return np.asarray(scores.log_prob)[:, -workload.sizes.response :]


def build(workload: Workload, key: str) -> Program:
    """The jitted step of a regime.

    Args:
      workload: what it computes.
      key: "REGIME", which "+prompts" makes run the output head on prompts as well, and "+scan" the
        layers in a loop.
    """
    name, *options = key.split("+")
    config = train_config(workload.sizes, name, scan="scan" in options)
    policy = parameters(workload, config.model)
    modules = config.model.mtp.num_modules
    batch = minibatch(workload, modules)
    calibration = build_calibration(config.mtp, modules)
    state = init_state(policy, build_optimizer(config.optimizer), calibration)
    state = jax.tree.map(jnp.array, state)  # donated: the weights may not be shared
    columns = 0 if "prompts" in options else workload.sizes.length - workload.sizes.response
    train_step = jax.jit(make_train_step(config, prompt_columns=columns), donate_argnums=0)

    def step() -> tuple[float, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(train_step(state, batch))
        return float(metrics["loss/rl"]), float(metrics["grad_norm/shared"])

    threads = len(os.sched_getaffinity(0))  # as XLA's pool for CPUs
    return Program(step, {"versions": f"jax {jax.__version__}", "threads": threads})


if __name__ == "__main__":
    serve(functools.partial(build, workloads.load(pathlib.Path(sys.argv[1])), sys.argv[2]))
