"""Tunix's GRPO step, in an environment with Tunix.

    python -m experiments.instruments.peers.tunix_step FILE

The step is that of Tunix's own trainer, jitted by it, with the loss that its GRPO learner
registers; rollout and rewards are left out. The model is Tunix's Llama 3 at the workload's sizes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import algo_core, common, trainer
from tunix.rl.grpo.dapo_learner import DAPOConfig
from tunix.sft import peft_trainer

from experiments.instruments.peers import workload as workloads
from experiments.instruments.peers.turns import Program, serve
from experiments.instruments.peers.workload import Workload


def model(workload: Workload) -> llama.Llama3:
    """Tunix's model with the workload's weights."""
    sizes, weights = workload.sizes, workload.weights
    config = llama.ModelConfig(
        num_layers=sizes.layers,
        vocab_size=sizes.vocab,
        embed_dim=sizes.width,
        hidden_dim=sizes.mlp_width,
        num_heads=sizes.heads,
        head_dim=sizes.head_dim,
        num_kv_heads=sizes.heads,
        rope_theta=workloads.ROPE_BASE,
        norm_eps=workloads.NORM_EPSILON,
        weight_tying=True,
    )
    decoder = llama.Llama3(config, rngs=nnx.Rngs(0))

    def put(parameter, value):
        if value.size != parameter[...].size:
            raise ValueError(f"tunix_step: {value.shape} does not fit {parameter[...].shape}.")
        parameter[...] = jnp.asarray(value).reshape(parameter[...].shape)

    put(decoder.embedder.input_embedding, weights["embedding"])
    put(decoder.final_norm.w, weights["final_norm"])
    for i, layer in enumerate(decoder.layers):
        attention, mlp = layer.attn, layer.mlp
        put(layer.input_layernorm.w, weights["attention_norm"][i])
        put(attention.q_proj.w, weights["query"][i])
        put(attention.k_proj.w, weights["key"][i])
        put(attention.v_proj.w, weights["value"][i])
        put(attention.o_proj.w, weights["output"][i])
        put(layer.post_attention_layernorm.w, weights["mlp_norm"][i])
        put(mlp.gate_proj.kernel, weights["gate"][i])
        put(mlp.up_proj.kernel, weights["up"][i])
        put(mlp.down_proj.kernel, weights["down"][i])
    return decoder


def example(workload: Workload) -> common.TrainExample:
    """The workload's batch as prompts and completions."""
    prompt, completion = jnp.split(jnp.asarray(workload.tokens), 2, axis=1)
    return common.TrainExample(
        prompt_ids=prompt,
        prompt_mask=jnp.ones_like(prompt),
        completion_ids=completion,
        completion_mask=jnp.ones_like(completion),
        advantages=jnp.asarray(workload.advantages),
        ref_per_token_logps=None,
        old_per_token_logps=jnp.asarray(workload.old_log_prob),
    )


def build(workload: Workload) -> Program:
    """The step of Tunix's trainer."""
    algorithm = DAPOConfig(
        loss_agg_mode="token-mean",
        beta=None,
        epsilon=workloads.CLIP_LOW,
        epsilon_high=workloads.CLIP_HIGH,
    )
    algorithm.temperature = 1.0  # copied from the rollout's configuration by the learner
    optimizer = optax.chain(
        optax.clip_by_global_norm(workloads.CLIP_NORM),
        optax.adamw(workloads.LEARNING_RATE, weight_decay=0.0),
    )
    tunix_trainer = trainer.Trainer(
        model(workload),
        optimizer,
        peft_trainer.TrainingConfig(eval_every_n_steps=1, max_steps=1),
        custom_checkpoint_metadata_fn=dict,
    )

    def loss(policy, train_example):
        return algo_core.grpo_loss_fn(
            policy, train_example, algorithm, pad_id=workloads.PAD, eos_id=-1
        )

    tunix_trainer.with_loss_fn(loss, has_aux=True)
    tunix_trainer.with_gen_model_input_fn(lambda batch: {"train_example": batch})
    train_step, _ = tunix_trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    batch = example(workload)

    def step() -> tuple[float, float]:
        value, _, norm = train_step(batch)
        jax.block_until_ready(nnx.state(tunix_trainer.model))
        return float(value), float(norm)

    versions = f"tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}"
    return Program(step, {"versions": versions, "threads": len(os.sched_getaffinity(0))})


if __name__ == "__main__":
    serve(functools.partial(build, workloads.load(pathlib.Path(sys.argv[1]))))
