"""Adapters that PEFT reads: beside the same base model it says what we say."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from occ.models import pretrained
from occ.models.config import LORA_KERNELS, LoRAConfig
from occ.models.lora import adapt, is_adapter
from occ.trees import path_string
from tests.published import write_folder

EXTRA = "not installed; pip install -e '.[parity]' reads adapters with PEFT"
torch = pytest.importorskip("torch", reason=f"torch is {EXTRA}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {EXTRA}")
peft = pytest.importorskip("peft", reason=f"peft is {EXTRA}")

from tests.test_parity_models import batch, error  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("qwen2", LORA_KERNELS), ("llama", ("query", "down")), ("glm", LORA_KERNELS[:4])],
)
def test_peft_reads_our_adapters(tmp_path, name, kernels):
    """On random adapters, with padding on the left; no tensor is missing or left over."""
    folder = write_folder(tmp_path / "base", name)
    plain = pretrained.load(folder)
    lora = LoRAConfig(rank=3, alpha=7.0, kernels=kernels)
    policy = adapt(plain, dataclasses.replace(plain.config, lora=lora))
    rng = np.random.default_rng(0)

    def move(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return leaf + noise if is_adapter(path_string(path)) else leaf

    policy = policy.replace(params=jax.tree_util.tree_map_with_path(move, policy.params))
    pretrained.save_adapters(tmp_path / "adapters", policy, base=str(folder))
    tokens, positions, mask, _ = batch(plain.config.vocab_size)
    ours = jax.jit(lambda policy, *inputs: policy.model(*inputs)[0])(
        policy, tokens, positions, mask
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the other one wants rows of multiples of 16 bytes
    ).eval()
    inputs = {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.tensor(mask),
        "position_ids": torch.tensor(positions, dtype=torch.long),
    }
    with torch.no_grad():
        before = base(**inputs).logits.numpy()
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
        theirs = model(**inputs).logits.numpy()
    written = set(load_file(tmp_path / "adapters" / "adapter_model.safetensors"))
    assert set(peft.get_peft_model_state_dict(model)) == written
    seen = mask > 0
    assert error(np.asarray(ours)[seen], theirs[seen]) < 1e-5
    assert error(before[seen], theirs[seen]) > 0.1
