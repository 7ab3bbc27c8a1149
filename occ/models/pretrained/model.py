"""A model that was trained elsewhere, as it comes out of its files."""

from __future__ import annotations

import dataclasses
from typing import Any

from occ.models.config import ModelConfig


class PretrainedWarning(UserWarning):
    """The model is not what its files promise, or was changed on the way."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a folder or file of weights holds.

    Attributes:
      config: the architecture.
      params: nested dict of arrays, as `split_model` returns the trained parameters.
      rest: the model's other variables (a router's correction bias), likewise; {} without any.
    """

    config: ModelConfig
    params: dict[str, Any]
    rest: dict[str, Any]
