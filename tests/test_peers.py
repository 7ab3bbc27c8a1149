"""The comparison with peers: the workload, whose turn it is, and what is said of the times.

That TRL and Tunix compute the same is checked by the comparison itself, in their environments.
"""

import sys

import numpy as np
import pytest

from experiments.instruments.peers import compare, occ_step, workload
from experiments.instruments.peers.turns import Worker

SIZES = workload.Sizes(vocab=29, layers=2, width=16, head_dim=8, mlp_width=20, rows=4, length=12)

NOISY_PROGRAM = """
from experiments.instruments.peers.turns import Program, serve
def build():
    print("a library that prints when it is imported")
    losses = iter([0.5, 0.25])
    def step():
        print("and at every step")
        return next(losses), 2.0
    return Program(step, {"versions": "none"})
serve(build)
"""


@pytest.fixture(scope="module")
def near_policy():
    drawn = workload.draw(SIZES)
    return workload.off_policy(drawn, occ_step.on_policy_log_prob(drawn))


def clipped_loss(log_prob, old, advantages):
    total = 0.0
    for row, advantage in enumerate(advantages):
        for now, before in zip(log_prob[row], old[row], strict=True):
            ratio = np.exp(float(now) - float(before))
            clipped = min(max(ratio, 1 - workload.CLIP_LOW), 1 + workload.CLIP_HIGH)
            total -= min(ratio * advantage, clipped * advantage)
    return total / old.size


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_regimes_share_the_loss_and_the_rl_gradient(near_policy):
    log_prob = occ_step.on_policy_log_prob(near_policy)
    ratio = np.exp(log_prob - near_policy.old_log_prob)
    assert (ratio < 1 - workload.CLIP_LOW).any() and (ratio > 1 + workload.CLIP_HIGH).any()
    expected = clipped_loss(log_prob, near_policy.old_log_prob, near_policy.advantages)
    loss, norm = occ_step.build(near_policy, "rl_only").step()
    detached_loss, detached_norm = occ_step.build(near_policy, "detach").step()
    np.testing.assert_allclose([loss, detached_loss], expected, rtol=1e-5)
    np.testing.assert_allclose(detached_norm, norm, rtol=1e-5)
    assert norm > 0


def test_a_problem_is_read_as_it_was_written(near_policy, tmp_path):
    near_policy.save(tmp_path / "workload.npz")
    read = workload.load(tmp_path / "workload.npz")
    assert read.sizes == SIZES
    assert read.weights.keys() == near_policy.weights.keys()
    for name, value in near_policy.weights.items():
        np.testing.assert_array_equal(read.weights[name], value)
    for name in ("tokens", "advantages", "old_log_prob"):
        np.testing.assert_array_equal(getattr(read, name), getattr(near_policy, name))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="expected a width that is a multiple of head_dim"):
        workload.Sizes(width=100)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_worker_answers_in_turn_whatever_its_program_prints(tmp_path):
    worker = Worker([sys.executable, "-c", NOISY_PROGRAM], tmp_path / "log")
    try:
        assert worker.details == {"versions": "none"}
        first = worker.step()
        worker.forget_peak()
        assert (first["loss"], worker.step()["loss"]) == (0.5, 0.25)
        assert first["grad_norm"] == 2 and first["seconds"] > 0 and first["peak_mib"] > 1
        with pytest.raises(RuntimeError, match=f"is in {tmp_path / 'log'}"):
            worker.step()
    finally:
        worker.close()
    assert "at every step" in (tmp_path / "log").read_text()


def test_programs_that_differ_are_refused():
    base = {"loss": 0.1, "grad_norm": 2.0}
    compare.check_same({compare.BASE: base, "ours, OCC exact": base | {"grad_norm": 3.0}})
    for quantity in base:
        other = base | {quantity: 1.002 * base[quantity]}
        with pytest.raises(ValueError, match=f"{quantity} of 'Tunix'"):
            compare.check_same({compare.BASE: base, "Tunix": other})


def test_ratios_are_within_rounds():
    def program(factor):
        timed = [{"seconds": s * factor, "cpu_seconds": s, "peak_mib": s} for s in (1.0, 4.0, 2.0)]
        return {"first": {"loss": 0.1, "grad_norm": 2.0}, "timed": timed}

    row = compare.summary(program(0.5), program(1.0), tokens=100)
    assert row["seconds"] == 1.0 and row["tokens_per_second"] == 100 and row["peak_mib"] == 4
    np.testing.assert_allclose(
        [row[f"seconds_ratio{end}"] for end in ("", "_low", "_high")], 0.5, rtol=1e-12
    )
    assert "| peer | 0.10000 | 2.00000 | 1000 | 100 | 0.50 [0.50, 0.50] |" in compare.table(
        {"peer": row}
    )
