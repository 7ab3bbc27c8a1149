"""transformers' `generate`, in an environment with torch: `... FOLDER DTYPE`, for `engine_speed`.

A line of JSON is a request: prompts of equal length, how many new tokens, and the temperature. The
answer is a line with the tokens that came, of which none ends a response.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import transformers


def main() -> None:
    """Answers until standard input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    folder, dtype = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()
    model.generation_config.eos_token_id = None
    print(json.dumps({"transformers": transformers.__version__}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = torch.tensor(request["prompts"])
        sampled = request["temperature"] > 0
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=sampled,
                temperature=request["temperature"] if sampled else None,
                top_k=0 if sampled else None,
                max_new_tokens=request["tokens"],
                pad_token_id=0,
            )
        print(json.dumps(made[:, prompts.shape[1] :].tolist()), file=answers)


if __name__ == "__main__":
    main()
