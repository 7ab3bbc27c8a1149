"""Writes the logits of the tiny published models by others' code: main ones by transformers,
those of MTP modules by `reference_torch`.

    python -m tests.make_published_logits

With them, agreement is tested where neither torch nor transformers is installed.
"""

import json
import pathlib
import tempfile

import numpy as np

from tests.published import CASES, TOKENS, write_folder

FILE = pathlib.Path(__file__).parent / "published_logits.safetensors"


def logits(name):
    """Main logits [2, T, V] and, where there is a module, its logits [2, T - 1, V]."""
    import torch
    import transformers

    from tests import reference_torch

    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(pathlib.Path(temporary) / "model", name)
        raw = json.loads((folder / "config.json").read_text())
        if raw["model_type"] == "mimo":  # which transformers does not know
            raw |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(raw))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            found = {f"{name}/main": model(torch.tensor(TOKENS).long()).logits.numpy()}
            if raw.get("num_nextn_predict_layers"):
                tensors, _ = reference_torch.read(folder)
                rows = [
                    reference_torch.logits(tensors, CASES[name], torch.tensor(row).long())[1]
                    for row in TOKENS
                ]
                found[f"{name}/module"] = np.stack([row.numpy() for row in rows])
    return found


def main():
    from safetensors.numpy import save_file

    every = {}
    for name in CASES:
        every |= logits(name)
    save_file(every, FILE)


if __name__ == "__main__":
    main()
