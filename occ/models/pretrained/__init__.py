"""Weights in and out: published checkpoints as models, and models as published checkpoints.

    from occ.models import pretrained

    policy = pretrained.load(folder)         # a Policy: graph, params, rest; policy.config
    ...
    pretrained.save(target, policy, like=folder)

Folders of safetensors files in Hugging Face's layout: Llama, Qwen2, Qwen3, MiMo, GLM-4.5. Nothing
is downloaded, and nothing is unpickled. It takes the extra `pretrained`.
"""

from occ.models.pretrained.adapters import load_adapters, save_adapters
from occ.models.pretrained.attaching import attach
from occ.models.pretrained.model import PretrainedWarning
from occ.models.pretrained.reading import load, read_config
from occ.models.pretrained.writing import save

__all__ = [
    "PretrainedWarning",
    "attach",
    "load",
    "load_adapters",
    "read_config",
    "save",
    "save_adapters",
]
