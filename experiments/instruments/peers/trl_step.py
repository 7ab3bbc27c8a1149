"""TRL's GRPO step, in an environment with TRL.

    python -m experiments.instruments.peers.trl_step FILE MODE

The loss is `GRPOTrainer.compute_loss` of a trainer that TRL itself has built, on a Llama of
transformers at the workload's sizes; rollout and rewards are left out. MODE is "eager" or
"compile", which puts the model (TRL's output head included) through torch.compile.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import tempfile

import datasets
import tokenizers
import torch
import transformers
import trl

from experiments.instruments.peers import workload as workloads
from experiments.instruments.peers.turns import Program, serve
from experiments.instruments.peers.workload import Workload


def model(workload: Workload) -> transformers.LlamaForCausalLM:
    """transformers' model with the workload's weights; its matrices multiply from the left."""
    sizes, weights = workload.sizes, workload.weights
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.length,
        rms_norm_eps=workloads.NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": float(workloads.ROPE_BASE)},
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=workloads.PAD,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    decoder = transformers.LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": weights["embedding"],
        "lm_head.weight": weights["embedding"],
        "model.norm.weight": weights["final_norm"],
    }
    for i in range(sizes.layers):
        layer = f"model.layers.{i}"
        state[f"{layer}.input_layernorm.weight"] = weights["attention_norm"][i]
        state[f"{layer}.post_attention_layernorm.weight"] = weights["mlp_norm"][i]
        for name, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            state[f"{layer}.self_attn.{theirs}_proj.weight"] = weights[name][i].T
        for name in ("gate", "up", "down"):
            state[f"{layer}.mlp.{name}_proj.weight"] = weights[name][i].T
    decoder.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return decoder


def trainer(workload: Workload, folder: str) -> trl.GRPOTrainer:
    """A trainer whose tokenizer, prompt and reward are never used, but have to be there."""
    vocabulary = {"[PAD]": workloads.PAD, "[EOS]": 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[EOS]"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]"
    )
    sizes = workload.sizes
    arguments = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=sizes.rows,
        num_generations=sizes.rows,
        steps_per_generation=1,
        max_completion_length=sizes.response,
        loss_type="dapo",
        mask_truncated_completions=False,
        beta=0.0,
        epsilon=workloads.CLIP_LOW,
        epsilon_high=workloads.CLIP_HIGH,
        temperature=1.0,
        learning_rate=workloads.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=workloads.CLIP_NORM,
        max_steps=1,
        report_to="none",
    )
    return trl.GRPOTrainer(
        model=model(workload),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "[EOS]"}]),
        processing_class=tokenizer,
    )


def build(workload: Workload, mode: str, folder: str) -> Program:
    """TRL's loss, then what transformers' training loop does with it."""
    if mode not in ("eager", "compile"):
        raise ValueError(f"trl_step: expected the mode 'eager' or 'compile', got {mode!r}.")
    grpo = trainer(workload, folder)
    grpo.current_gradient_accumulation_steps = 1  # set by the training loop
    grpo.create_optimizer()
    policy = grpo.model.train()
    called = torch.compile(policy) if mode == "compile" else policy
    prompt, completion = torch.tensor(workload.tokens, dtype=torch.long).chunk(2, dim=1)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": torch.tensor(workload.advantages),
        "old_per_token_logps": torch.tensor(workload.old_log_prob),
        "num_items_in_batch": torch.tensor(completion.numel()),
    }

    def step() -> tuple[float, float]:
        loss = grpo.compute_loss(called, inputs)
        grpo.accelerator.backward(loss)
        norm = grpo.accelerator.clip_grad_norm_(policy.parameters(), grpo.args.max_grad_norm)
        grpo.optimizer.step()
        policy.zero_grad()
        return loss.item(), norm.item()

    versions = (
        f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    return Program(step, {"versions": versions, "threads": torch.get_num_threads()})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        loaded = workloads.load(pathlib.Path(sys.argv[1]))
        serve(functools.partial(build, loaded, sys.argv[2], scratch))
