"""Named configurations."""

from __future__ import annotations

from collections.abc import Callable

from experiments.configs.claims import (
    arithmetic_easy,
    arithmetic_hard,
    filtering_easy,
    filtering_hard,
    star_easy,
    star_hard,
    star_parallel,
)
from experiments.configs.laptop import laptop
from experiments.configs.paper import (
    glm_4_5_air_dapo,
    mimo_7b_dapo,
    mimo_7b_gspo,
    mimo_7b_lora,
)
from experiments.configs.smollm2 import smollm2_arithmetic, smollm2_sums
from occ.training.config import TrainConfig

CONFIGS: dict[str, Callable[[], TrainConfig]] = {
    "laptop": laptop,
    "arithmetic_easy": arithmetic_easy,
    "arithmetic_hard": arithmetic_hard,
    "star_easy": star_easy,
    "star_hard": star_hard,
    "star_parallel": star_parallel,
    "filtering_easy": filtering_easy,
    "filtering_hard": filtering_hard,
    "smollm2_arithmetic": smollm2_arithmetic,
    "smollm2_sums": smollm2_sums,
    "mimo_7b_dapo": mimo_7b_dapo,
    "mimo_7b_gspo": mimo_7b_gspo,
    "mimo_7b_lora": mimo_7b_lora,
    "glm_4_5_air_dapo": glm_4_5_air_dapo,
}
