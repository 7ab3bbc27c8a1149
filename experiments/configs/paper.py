"""The paper's runs, at full size: MiMo-7B-RL and GLM-4.5-Air on DAPO-Math-17k.

Claim (Wang et al., arXiv 2605.28184, average over six mathematics benchmarks, avg@32): Detach 58.9,
CE 47.7, Policy 57.4, OCC 61.7 % for MiMo with DAPO; 57.8, 50.0, 56.2, 60.1 with GSPO; GLM with
DAPO 65.9, 54.8, 64.4, 67.6.
Hardware: 128 accelerators. They were not run here; tests build them and trace their train step.
Data: `data/` (occ/tasks/datasets says what belongs there); tokenizers: `models/NAME`.
"""

from __future__ import annotations

import dataclasses

from occ.models.config import LoRAConfig, ModelConfig, MoEConfig, MTPConfig
from occ.objectives.policy import PolicyConfig, gspo
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
)
from occ.training.regimes import regime

PROMPT_TOKENS = 2048
RESPONSE_TOKENS = 8192

# For 128 TPU v5p chips; `python -m experiments.instruments.plan` shows what they need.
MIMO_LAYOUT = LayoutConfig(fsdp=128, logits_chunk=512)
# For 8; of one H100 with --config.layout.fsdp 1 --config.layout.micro-batches 256.
LORA_LAYOUT = LayoutConfig(fsdp=8, micro_batches=32, logits_chunk=512, generation_rows=256)
GLM_LAYOUT = LayoutConfig(
    fsdp=8, expert=16, micro_batches=4, logits_chunk=512, generation_rows=1024
)


def mimo_7b() -> ModelConfig:
    """MiMo-7B: a dense trunk like Qwen2's, with one MTP module.

    Source: the published config.json of XiaomiMiMo/MiMo-7B-RL.
    """
    return ModelConfig(
        vocab_size=151_680,
        num_layers=36,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=11_008,
        max_length=32_768,
        rope_base=640_000.0,
        norm_epsilon=1e-5,
        qkv_bias=True,
        tied_embeddings=False,
        compute_dtype="bfloat16",
        remat="full",
        attention="splash",
        attention_chunk=128,  # of prompts, which attend to a cache
        mtp=MTPConfig(
            num_modules=1, concatenation="hidden_embedding", hidden_after_final_norm=True
        ),
    )


def glm_4_5_air() -> ModelConfig:
    """GLM-4.5-Air: 106 billion parameters, 12 active, with one MTP module.

    Source: the published config.json of zai-org/GLM-4.5-Air.
    """
    return ModelConfig(
        vocab_size=151_552,
        num_layers=46,
        width=4096,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=10_944,
        max_length=131_072,
        rope_base=1_000_000.0,
        rotary_fraction=0.5,
        norm_epsilon=1e-5,
        qkv_bias=True,
        tied_embeddings=False,
        compute_dtype="bfloat16",
        remat="full",
        attention="splash",
        attention_chunk=128,  # of prompts, which attend to a cache
        moe=MoEConfig(
            num_experts=128,
            experts_per_token=8,
            expert_width=1408,
            num_shared_experts=1,
            first_dense_layers=1,
            routed_scaling=1.0,
            normalise_top_k=True,
            # Between devices that share the experts; without a bound their buffers would hold 16
            # times the tokens. Dropped pairs are counted in "router/dropped".
            capacity_factor=2.0,
        ),
        mtp=MTPConfig(
            num_modules=1, concatenation="embedding_hidden", hidden_after_final_norm=True
        ),
    )


def _dapo(name: str, model: ModelConfig, layout: LayoutConfig, folder: str) -> TrainConfig:
    """What both models share; every figure is the paper's."""
    return TrainConfig(
        name=name,
        model=model,
        task="dapo_math_17k",
        task_options={
            "tokenizer": f"models/{folder}",
            "data_dir": "data",
            "extract": "answer_line",
            "max_prompt_tokens": PROMPT_TOKENS,
            "max_response_tokens": RESPONSE_TOKENS,
            "workers": 16,
        },
        rollouts=200,
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=RESPONSE_TOKENS,
        rollout=RolloutConfig(
            prompts=128,
            samples=16,
            minibatches=4,
            temperature=1.0,
            top_p=1.0,
            overlong_buffer=4096,
            overlong_penalty=1.0,
        ),
        objective=ObjectiveConfig(
            policy=PolicyConfig(kind="ppo", clip_low=0.2, clip_high=0.28, dual_clip=10.0),
            advantage="grpo",
            aggregation="token-mean",
            kl_coefficient=0.0,
            entropy_coefficient=0.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            warmup_steps=10,
            weight_decay=0.1,
            decay="all",
            clip_norm=1.0,
            clip_groups="together",
        ),
        # The paper's proxy: known before the backward pass, so it costs nothing over Detach.
        mtp=regime("occ_paper"),
        evaluation=EvaluationConfig(every=20, prompts=30, samples=32, top_p=0.7),
        layout=layout,
    )


def mimo_7b_dapo() -> TrainConfig:
    """MiMo-7B-RL with DAPO."""
    return _dapo("mimo_7b_dapo", mimo_7b(), MIMO_LAYOUT, "MiMo-7B-RL")


def mimo_7b_gspo() -> TrainConfig:
    """MiMo-7B-RL with GSPO: sequence ratios, and the clip range of the GSPO paper."""
    dapo = _dapo("mimo_7b_gspo", mimo_7b(), MIMO_LAYOUT, "MiMo-7B-RL")
    objective = dataclasses.replace(
        dapo.objective, policy=gspo(), aggregation="seq-mean-token-mean"
    )
    return dataclasses.replace(dapo, objective=objective)


def mimo_7b_lora() -> TrainConfig:
    """MiMo-7B-RL with DAPO, as adapters of a frozen trunk: for 8 chips, or one.

    Not the paper's. The learning rate is ten times that of all parameters; the optimizer and the
    gradients are a few per cent of theirs.
    """
    lora = LoRAConfig(rank=32, alpha=32.0, frozen_dtype="bfloat16")
    dapo = _dapo("mimo_7b_lora", mimo_7b(), LORA_LAYOUT, "MiMo-7B-RL")
    return dataclasses.replace(
        dapo,
        model=dataclasses.replace(dapo.model, lora=lora),
        optimizer=dataclasses.replace(dapo.optimizer, learning_rate=1e-5, decay="matrices"),
    )


def glm_4_5_air_dapo() -> TrainConfig:
    """GLM-4.5-Air with DAPO."""
    return _dapo("glm_4_5_air_dapo", glm_4_5_air(), GLM_LAYOUT, "GLM-4.5-Air")
