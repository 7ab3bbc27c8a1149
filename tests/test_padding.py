"""The benchmark of padding, on a run of a few seconds."""

import pytest

from experiments.configs import CONFIGS
from experiments.instruments import padding
from tests import tiny


@pytest.mark.standard_promotion
@pytest.mark.slow
@pytest.mark.slow
def test_packing_leaves_less_padding_and_is_compared_with_the_padded_layout(tmp_path, monkeypatch):
    config = tiny.run_config("tiny", max_prompt_tokens=20)  # prompts have four
    monkeypatch.setitem(CONFIGS, "tiny", lambda: config)
    arguments = padding.Arguments(("tiny",), rows=8, repeats=2, folder=tmp_path)
    rows = padding.measure("tiny", arguments)
    padded, packed = rows["padded"], rows["packed, in portions"]
    assert packed["update_waste"] < padded["update_waste"] - 0.2
    assert packed["rollout_waste"] < padded["rollout_waste"] - 0.2
    assert padded["update_ratio"]["mean"] == padded["rollout_ratio"]["mean"] == 1
    assert packed["update_seconds"] > 0 and packed["update_ratio"]["n"] == 2
    assert "| tiny, packed, in portions |" in padding.table({"tiny": rows})
