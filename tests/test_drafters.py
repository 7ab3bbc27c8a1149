"""The study of drafters: what it keeps of a run, and that what drafts learn moves no sample."""

import numpy as np
import pytest

from experiments.studies import drafters, variants
from occ.training.durable.run_folder import read_rows

pytestmark = pytest.mark.standard_promotion


def test_drafters_are_told_by_depth_and_by_time():
    """By thirds of a run, and beside the same start without drafts."""

    def of(name, start, seconds, acceptance):
        rows = [
            {
                "reward": 0.1 * i,
                "seconds/rollout": seconds,
                "seconds/updates": 1.0,
                "rollout/acceptance": acceptance,
                "rollout/tokens_a_pass": 1.5,
            }
            for i in range(9)
        ]
        result = {"rollouts": 9, "reward_area": 0.4, "final": {"sampled": 0.5}}
        return variants.row_of(name, start, result, drafters.measured(name, rows))

    rows = [of("no drafts", start, 3.0, None) for start in (0, 1)]
    rows += [of("cross-entropy", start, 1.0 + start, [0.8, 0.5]) for start in (0, 1)]
    assert rows[0]["acceptance"] is None and rows[2]["acceptance"] == [[0.8, 0.5]] * 3
    assert rows[0]["seconds"] == 36 and rows[2]["seconds"] == 18
    # The mean of rollouts 4 to 8 is 0.6.
    assert rows[0]["reached"] == 9 and rows[2]["seconds_to_reach"] == 18
    rows += [of("total variation", start, 4.0, [0.9, 0.4 + 0.3 * start]) for start in (0, 1)]
    text = drafters.tables(rows)
    (accepted,) = [line for line in text if line.startswith("| cross-entropy | 2 | 0.8 ± 0 / ")]
    assert "| 0.5 ± 0 / 0.5 ± 0 / 0.5 ± 0 | 1.5 ± 0 | - |" in accepted
    assert any("| 10 ± 0 / 5 ± 1.9e+02 |" in line for line in text)
    assert any(line.endswith("| 1.67 ± 4.2 |") for line in text)  # of 36 / 18 and 36 / 27
    with pytest.raises(ValueError, match="expected variants of"):
        drafters.Run(variants=("no_drafts",))


@pytest.mark.release
def test_drafters_train_one_trunk_on_the_same_samples(tmp_path):
    """Whatever the modules learn, and however deep they draft."""
    same = ("no drafts", "cross-entropy", "total variation", "untrained")
    drafters.run(drafters.Run(variants=same, folder=tmp_path, quick=True))
    rows = read_rows(tmp_path / "quick" / "rows.jsonl")
    assert [row["variant"] for row in rows] == list(same)
    runs = [f"{name.replace(' ', '_')}-start0" for name in same]
    first, *others = (read_rows(tmp_path / "quick" / run / "metrics.jsonl") for run in runs)
    for found in others:
        for one, other in zip(first, found, strict=True):
            for what in ("reward", "rollout/response_length", "loss/rl"):
                assert one[what] == other[what], what
            assert one["loss/rl"] != 0
    assert np.shape(rows[1]["acceptance"]) == (3, 2)
