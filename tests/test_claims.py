"""The grid of claims and the fidelity of estimators: what they run, keep and report."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import CONFIGS
from experiments.studies import (
    claims,
    claims_grid,
    claims_report,
    claims_rows,
    estimator_fidelity,
    fidelity_report,
    one_step,
    worth,
    worth_report,
)
from experiments.studies.claims_grid import Cell
from experiments.studies.fidelity_estimators import PARTS
from experiments.studies.following import read_followed
from occ import theory
from occ.training.durable.run_folder import read_rows
from occ.training.gradient.calibration import build_calibration
from tests.test_experiments import small

pytestmark = pytest.mark.standard_promotion


def test_every_cell_of_the_grid_builds():
    """Configuration and calibration; the controls' are built from rows."""
    grid = claims_grid.cells() + claims_grid.apart()
    assert len(grid) == len(set(grid))
    for cell in {*grid, *claims_grid.over_starts(), *claims_grid.by_worth()}:
        assert cell.setting in CONFIGS
        if cell.variant in claims_grid.CONTROLS:
            continue
        config = claims_grid.VARIANTS[cell.variant](CONFIGS[cell.setting]())
        build_calibration(config.mtp, config.model.mtp.num_modules)
        assert claims_grid.baseline(cell.variant) in claims_grid.VARIANTS


def test_a_series_may_have_gaps(tmp_path):
    """A measure that needs averages has nothing to say in the first rollout."""
    row = {"start": 21, "seed": 2100, "area": 0.5, "reward_series": [0.1, 0.2, 0.3]}
    row["coefficient_series"] = [claims._rounded(value) for value in (None, 0.123456, 0.2)]
    file = tmp_path / claims_grid.MAIN / "worth.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(row) + "\n")
    (read,) = claims_rows.read(tmp_path)[claims_grid.MAIN]["worth"]
    np.testing.assert_array_equal(read["coefficient_series"], [np.nan, 0.1235, 0.2])
    assert claims_rows.third("coefficient", last=True)(read) == 0.2


@pytest.fixture
def at(monkeypatch, tmp_path):
    """In an empty folder, with a setting cut down to seconds."""
    monkeypatch.chdir(tmp_path)
    tiny = dataclasses.replace(small(), rollouts=2, checkpoint_every=100)
    monkeypatch.setitem(CONFIGS, claims_grid.MAIN, lambda: tiny)
    claims._setting.cache_clear()
    claims._SAMPLERS.clear()
    yield tmp_path
    claims._setting.cache_clear()


@pytest.mark.slow
@pytest.mark.slow
def test_a_cell_leaves_a_row_a_seed_and_repeats_none(at):
    arguments = claims.Run(seeds=(0, 1), folder=at / "rows")
    cell = Cell(claims_grid.MAIN, "occ_paper")
    claims.run_cell(cell, dataclasses.replace(arguments, seeds=(1,)))
    assert claims.missing(arguments, cell) == [(0, 0)]
    claims.run_cell(cell, arguments)
    rows = claims.read_cell(arguments.folder, cell)
    assert [row["seed"] for row in rows] == [0, 1] and claims.missing(arguments, cell) == []
    others = dataclasses.replace(arguments, starts=(0, 3))
    assert claims.missing(others, cell) == [(3, 300), (3, 301)]
    assert len(rows[0]["reward_series"]) == 2 and len(rows[0]["ratio_series"]) == 2
    assert 0 <= rows[0]["sampled"] <= 1 and "commit" in rows[0]

    control = claims._control(
        Cell(claims_grid.MAIN, claims_grid.CONTROL), 1, CONFIGS[claims_grid.MAIN](), at / "rows"
    )
    assert control.mtp.coefficient == pytest.approx(np.mean(rows[1]["coefficient_series"]))
    shuffled = claims._control(
        Cell(claims_grid.MAIN, claims_grid.SHUFFLED), 1, CONFIGS[claims_grid.MAIN](), at / "rows"
    ).mtp.rule_options["series"]
    assert sorted(shuffled) == sorted(np.repeat(rows[1]["coefficient_series"], 2).tolist())
    with pytest.raises(ValueError, match="needs the run occ_paper of the same seed first"):
        claims._control(
            Cell(claims_grid.MAIN, claims_grid.CONTROL), 7, CONFIGS[claims_grid.MAIN](), at / "rows"
        )


def rows_of(shift, n=4, length=9):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=n) * 0.01
    return [
        {
            "seed": seed,
            "sampled": 0.5 + shift + noise[seed],
            "greedy": 0.6 + noise[seed],
            "acceptance": 0.9,
            "area": 0.4 + shift,
            **{
                f"{name}_series": (0.1 + 0.01 * rng.random(length)).tolist()
                for name in claims.SERIES
            },
        }
        for seed in range(n)
    ]


def test_the_report_pairs_seeds_and_marks_what_differs(tmp_path, capsys):
    folder = tmp_path / "rows"
    shifts = {"detach": 0.0, "policy_0.2": 0.0, "policy_1.0": -0.05, "occ_paper": 0.01}
    shifts |= {"ce_0.2": -0.1, "gspo_detach": 0.2, "gspo_occ": 0.2, "constant_as_proxy": 0.01}
    for variant, shift in shifts.items():
        file = folder / claims_grid.MAIN / f"{variant}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [row | {"seconds": 3.0} if variant == "ce_0.2" else row for row in rows_of(shift)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert claims_report.report(folder, tmp_path / "out") == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "**-5.0 ± 0.0**" in text  # policy_1.0, exactly, since the seeds' noise is shared
    timed = [line for line in text.splitlines() if line.endswith(" | 3 |")]
    assert len(timed) == 1 and timed[0].startswith("| ce_0.2 |")
    gspo = next(line for line in text.splitlines() if line.startswith("| gspo_occ"))
    assert "+0.0 ± 0.0" in gspo and "**" not in gspo  # compared with its own Detach
    for figure in ("differences.png", "cosines.png"):
        assert (tmp_path / "out" / figure).stat().st_size > 5_000
    with pytest.raises(ValueError, match="no rows in"):
        claims_rows.read(tmp_path / "nothing")


def test_rows_of_another_warm_start_are_refused(tmp_path):
    folder = tmp_path / "rows" / claims_grid.MAIN
    folder.mkdir(parents=True)
    rows = [{"setting": claims_grid.MAIN, "commit": "abc", **row} for row in rows_of(0.0)]
    (folder / "detach.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[2] = {**rows[2], "reward_series": [0.5, *rows[2]["reward_series"][1:]]}
    (folder / "ce_0.2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"ce_0.2 seed 2 .commit abc. began with reward 0.5"):
        claims_rows.read(tmp_path / "rows")


def test_over_warm_starts_a_start_is_one_value(tmp_path):
    """Two runs a start: their mean, however many; and the interval is over starts."""
    folder = tmp_path / "rows" / claims_grid.MAIN
    folder.mkdir(parents=True)
    by_start = {11: (0.01, 0.03), 12: (0.00, 0.02), 13: (0.02, 0.04)}
    levels = {"detach": 0.4, "drafter": 0.4, "rate_2_detach": 0.48, "rate_2_worth": 0.49}
    for variant, level in levels.items():
        rows = []
        for start, gains in by_start.items():
            for i, (gain, row) in enumerate(zip(gains, rows_of(0.0, n=2), strict=True)):
                area = level + gain * (variant == "drafter")
                changed = {"area": area, "reward_series": [0.1] * 9}
                named = {"start": start, "seed": 100 * start + i, "setting": claims_grid.MAIN}
                rows.append(row | changed | named | {"commit": "c"})
        (folder / f"{variant}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    runs = claims_rows.read(tmp_path / "rows")[claims_grid.MAIN]
    means = claims_rows.by_start(runs, "drafter", "area")
    assert means == pytest.approx({11: 0.02, 12: 0.01, 13: 0.03})
    found = claims_rows.difference(runs, "drafter", "area")
    half = 4.302653 * 0.01 / np.sqrt(3)  # Student's t with 2 degrees of freedom
    assert found.n == 3 and found.half_width == pytest.approx(half, rel=1e-5)
    assert claims_report.report(tmp_path / "rows", tmp_path / "out") == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "3 warm starts a setting" in text and "+2.00 ± 2.48" in text
    # A regime at another rate beside Detach at that rate, which stands beside Detach's own.
    first, _, rest = text.partition("### Final sampled accuracy")
    assert "| drafter | rate_2_worth |" in first and "| **+1.00 ± 0.00** |" in first
    rates = rest.partition("### Detach at other learning rates, area")[2]
    assert "| setting | rate_2_detach |" in rates and "| **+8.00 ± 0.00** |" in rates


def test_the_truth_is_that_of_the_other_minibatches():
    """c and v^2 of the mean over all but one, from explicit vectors."""
    rng = np.random.default_rng(0)
    n, parts = 5, (*PARTS, "rest")
    g, m = (rng.normal(size=(n, len(parts), 3)) + 0.3 for _ in range(2))
    further = [
        {
            "gradients": tuple(dict(zip(parts, x[i], strict=True)) for x in (g, m)),
            "gram": {"exact": np.array([[1.0, i], [i, 2.0]])},
            "ratio": {"form": float(i)},
        }
        for i in range(n)
    ]
    row = estimator_fidelity.compare(further, [np.eye(2), 3 * np.eye(2)])
    for i in range(n):
        others = [j for j in range(n) if j != i]
        mean_g, mean_m = g[others].mean(axis=0), m[others].mean(axis=0)
        np.testing.assert_allclose(row["truth"]["c"][i], np.sum(mean_g * mean_m), rtol=1e-12)
        np.testing.assert_allclose(row["truth"]["v2"][i], np.sum(mean_m**2), rtol=1e-12)
        rest = np.sum((mean_g * mean_m)[1:])  # all parts but the first
        np.testing.assert_allclose(row["other_leaves"][parts[0]]["c"][i], rest, rtol=1e-12)
    pairs = [np.sum(g[i] * m[j]) for i in range(n) for j in range(n) if i != j]
    np.testing.assert_allclose(row["unbiased"]["c"], np.mean(pairs), rtol=1e-12)
    assert row["estimates"]["exact"]["c"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert row["averages"]["exact"] == [0.0, 3.0]
    # Every fifth step: of two, the first alone.
    assert row["averages"]["every_5"] == [0.0, 1.0]
    decay = 0.9
    expected = (decay * 0.1 * 1 + 0.1 * 3) / (decay * 0.1 + 0.1)
    np.testing.assert_allclose(row["averages"]["smoothed_0.9"][1], expected, rtol=1e-12)


def test_scores_know_a_good_estimator_from_a_bad_one():
    truth = np.linspace(-1, 1, 40).reshape(10, 4)
    good, opposed = fidelity_report.score(truth + 0.1, truth), fidelity_report.score(-truth, truth)
    assert good.spearman == pytest.approx(1) and good.bias == pytest.approx(0.1)
    assert good.rmse == pytest.approx(0.1) and good.sign >= 0.9
    assert opposed.spearman == pytest.approx(-1) and opposed.sign == 0


@pytest.mark.slow
def test_following_a_run_measures_every_estimator(at, monkeypatch):
    monkeypatch.setitem(estimator_fidelity.MODELS, "tiny", (claims_grid.MAIN, lambda run: run))
    config = dataclasses.replace(CONFIGS[claims_grid.MAIN]())
    rollout = dataclasses.replace(config.rollout, prompts=8, minibatches=4)
    warm = dataclasses.replace(config.warm_start, steps=150, batch_size=32, wrong_fraction=0.3)
    tiny = dataclasses.replace(config, rollouts=4, rollout=rollout, warm_start=warm)
    monkeypatch.setitem(CONFIGS, claims_grid.MAIN, lambda: tiny)
    arguments = estimator_fidelity.Run(minibatches=5, stride=2, folder=at / "rows")
    estimator_fidelity.follow("tiny", 31, arguments)
    rows = read_followed(at / "rows", "estimator_fidelity")["tiny", 31]
    assert [(row["rollout"], row["minibatch"]) for row in rows] == [(1, 1), (3, 2)]
    truth = fidelity_report.ratios(rows, "truth")
    for name in fidelity_report.SHOWN:
        values = fidelity_report.estimates(rows, name)
        assert values.shape == truth.shape == (2, 5) and np.isfinite(values).all(), name
    assert fidelity_report.report(at / "rows", at / "out") == 0
    assert (at / "out" / "fidelity.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="at least 17 minibatches"):
        estimator_fidelity.run(estimator_fidelity.Run(minibatches=5, workers=1))


def test_worth_from_minibatches_is_that_of_their_gram_matrices():
    """Products, leave-one-out matrices and the jackknife, against explicit vectors."""
    rng = np.random.default_rng(0)
    parts, count = (*PARTS, "rest"), 12
    vectors = rng.normal(size=(count, 3, len(parts), 5)) + 1  # [M, A, parts, P]
    gradients = [{p: one[:, i] for i, p in enumerate(parts)} for one in vectors]
    matrices = worth.products(gradients)
    main_alone = np.array([[1.0], [0.0], [0.0]])  # a part that no auxiliary reaches
    nothing = [one | {"rest": one["rest"] * main_alone} for one in gradients]
    assert np.isfinite(worth.jackknife(worth.products(nothing))["by_part"]["value"]).all()
    grams = worth.sampled(matrices, left_out=4)
    kept = np.delete(vectors, 4, axis=0)
    same = np.einsum("mapd,mbpd->pab", kept, kept) / len(kept)
    np.testing.assert_allclose(grams.same, same, rtol=1e-12)
    total = np.einsum("mapd,nbpd->pab", kept, kept) - len(kept) * same
    cross = total / (len(kept) * (len(kept) - 1))
    np.testing.assert_allclose(grams.cross, (cross + cross.transpose(0, 2, 1)) / 2, rtol=1e-12)
    found = worth.jackknife(matrices)
    whole = [np.asarray(m).sum(0)[np.ix_([0, 2], [0, 2])] for m in worth.sampled(matrices)]
    plain = float(theory.worth(theory.SampledGram(*map(jnp.asarray, whole))).worth)
    assert abs(found["worth"]["value"][1] - plain) < 3 * found["worth"]["error"][1]
    assert np.shape(found["gain"]["value"]) == (2, len(worth_report.COEFFICIENTS))
    assert 0 < found["worth"]["error"][0] < 1 and found["joint"]["value"] > 0.9
    assert worth_report.LARGER[0] == 1
    np.testing.assert_allclose(
        np.array(found["larger"]["value"])[:, 0], found["worth"]["value"], rtol=1e-12
    )
    # With four times the samples the noise is a quarter of what it was, and the signal stays.
    same, cross = (np.asarray(m).sum(0)[:2, :2] for m in worth.sampled(matrices))
    fourth = cross + (same - cross) / 4
    ratio, cosine = cross[0, 1] / cross[0, 0], fourth[0, 1] / fourth[0, 0]
    rest = fourth[1, 1] - fourth[0, 1] ** 2 / fourth[0, 0]
    expected = 1 + (ratio - cosine) ** 2 * fourth[0, 0] / rest
    with jax.enable_x64(True):
        everything = worth.figures(worth.sampled(matrices))
    np.testing.assert_allclose(everything["larger"][0, worth_report.LARGER.index(4)], expected)
    with jax.enable_x64(True):
        pair = theory.SampledGram(jnp.asarray(same), jnp.asarray(cross))
        centred = theory.worth(theory.centred(pair, worth.MEMORY)).worth
    np.testing.assert_allclose(everything["centred"][0], centred)


def test_folding_keeps_inner_products_in_expectation():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=500) + shift) for shift in (0.3, 0.5))
    assert worth.folded(a, 500, jax.random.key(0)) is a

    def product(key):
        return worth.folded(a, 101, key) @ worth.folded(b, 101, key)

    found = np.asarray(jax.vmap(product)(jax.random.split(jax.random.key(1), 2000)))
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - float(a @ b)) < 4 * error
    bound = float(jnp.linalg.norm(a) * jnp.linalg.norm(b)) / np.sqrt(101)
    assert 0.5 * bound < found.std() < 2 * bound

    def apart(key):
        first, second = jax.random.split(key)
        return worth.folded(a, 101, first) @ worth.folded(b, 101, second)

    others = np.asarray(jax.vmap(apart)(jax.random.split(jax.random.key(1), 2000)))
    assert abs(others.mean()) < 4 * others.std() / np.sqrt(len(others))  # of two keys nothing is


@pytest.mark.parametrize(
    "wrong",
    [
        {"objectives": ("no",)},
        {"objectives": ()},
        {"objectives": ("ce", "ce")},
        {"objectives": ("policy_own_2",)},
        {"settings": ("filtering_easy-no",)},
        {"minibatches": 3},
        {"points": (1.0,)},
    ],
)
def test_a_measurement_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="worth: "):
        worth.Run(**wrong)


@pytest.mark.slow
def test_worth_is_measured_along_a_run_and_compared_with_gains(at, monkeypatch, capsys):
    config = CONFIGS[claims_grid.MAIN]()
    rollout = dataclasses.replace(config.rollout, prompts=8, minibatches=4)
    warm = dataclasses.replace(config.warm_start, steps=150, batch_size=32, wrong_fraction=0.3)
    tiny = dataclasses.replace(config, rollouts=4, rollout=rollout, warm_start=warm)
    monkeypatch.setitem(CONFIGS, claims_grid.MAIN, lambda: tiny)
    arguments = worth.Run(
        objectives=("ce", "policy_own", "policy_rloo"),
        points=(0.5,),
        minibatches=6,
        folder=at / "rows",
    )
    worth.follow(claims_grid.MAIN, 11, arguments)
    (row,) = read_followed(at / "rows", "worth")[claims_grid.MAIN, 11]
    with pytest.raises(ValueError, match="has rows of the objectives .* Choose another --folder"):
        worth.follow(claims_grid.MAIN, 11, dataclasses.replace(arguments, objectives=("ce",)))
    assert row["rollout"] == 2 and row["minibatches"] == 6
    own, without_deviation = row["adam"]["coefficient"]["value"][1:]
    assert own != without_deviation  # the same samples with other advantages
    # An attempt that was ended before its run was keeps the points that it had measured.
    file = at / "rows" / claims_grid.MAIN / "start11.jsonl"
    file.rename(file.with_suffix(".unfinished"))
    with monkeypatch.context() as patch:
        patch.setattr(worth, "_measured", None)
        assert worth.follow(claims_grid.MAIN, 11, arguments) == file
    assert read_rows(file) == [row] and not file.with_suffix(".unfinished").exists()
    points = {(claims_grid.MAIN, 11 + i): [row] for i in range(4)}
    runs = {
        variant: [
            {"start": 11 + i, "seed": i, "area": (0.1 + 0.01 * i) * (variant != "detach")}
            for i in range(4)
        ]
        for variant in ("detach", "drafter", "ce_3")
    }
    found = worth_report.pairs(points, {claims_grid.MAIN: runs})
    assert len(found) == 8 and found[0].variant == "drafter" and found[0].start == 11
    assert found[0].measured == pytest.approx(0.1)
    said = worth_report.figure_of(row, "adam", "gain", "policy_own")
    assert found[0].predicted == pytest.approx(float(said[0]), nan_ok=True)
    value, low, high = worth_report.correlation(
        [pair._replace(predicted=pair.measured) for pair in found]
    )
    assert value == pytest.approx(1) and low <= high
    assert worth_report.report(at / "rows", None, at / "out") == 0
    said = capsys.readouterr().out
    assert "| filtering_easy | policy_own | 1 |" in said
    assert "| filtering_easy, 11, 2 | policy_own |" in said


@pytest.mark.slow
def test_one_step_is_predicted_and_taken(at):
    config = CONFIGS[claims_grid.MAIN]()
    warm = dataclasses.replace(config.warm_start, steps=150, batch_size=32, wrong_fraction=0.3)
    rollout = dataclasses.replace(config.rollout, prompts=8, minibatches=4)
    tiny = dataclasses.replace(config, rollouts=4, rollout=rollout, warm_start=warm)
    CONFIGS[claims_grid.MAIN] = lambda: tiny  # `at` puts the old one back
    arguments = one_step.Run(stride=2, folder=at / "rows")
    one_step.follow(claims_grid.MAIN, 31, arguments)
    rows = read_followed(at / "rows", "one_step")[claims_grid.MAIN, 31]
    assert [(row["rollout"], row["minibatch"]) for row in rows] == [(1, 1), (3, 2)]
    for row in rows:
        # The step is short, so the second order is all but exact.
        assert row["main_realised"] == pytest.approx(row["main_second_order"], rel=0.1)
        assert row["step_size"] > 0 and row["believed"] != row["cross_fitted"]
    assert one_step.report(at / "rows", at / "out") == 0


def test_slope_through_the_origin():
    points = [{"realised": 0.5 * x, "first_order": x} for x in (1.0, 2.0, -1.0)]
    assert one_step.slope(points, "first_order") == pytest.approx(0.5)
    assert one_step.correlation(points, "first_order") == pytest.approx(1)
    apart = [{"realised": y, "first_order": x} for x, y in ((1.0, 1.0), (2.0, 0.0), (-1.0, 1.0))]
    assert one_step.slope(apart, "first_order") == pytest.approx(0.0)


def test_intervals_are_over_starts_of_means_over_models(at):
    """A start that is off in all models shows, and models that differ widen nothing."""
    values = {("a", 1): 1.0, ("b", 1): 5.0, ("a", 2): 2.0, ("b", 2): 6.0}
    points = {key: [{"value": value}] for key, value in values.items()}
    shown = fidelity_report.show(points, lambda rows: rows[0]["value"], 1)
    half = 12.7062 * np.std([3, 4], ddof=1) / np.sqrt(2)
    assert shown == f"3.5 ± {half:.1f} (1.5 to 5.5)"
    with pytest.raises(ValueError, match="run `python -m experiments.studies.one_step run` first"):
        read_followed(at / "nothing", "one_step")


def test_processes_of_a_study_end_with_it(tmp_path):
    """Killed as by the system: what it had started would go on with what it has."""
    said = tmp_path / "pid"
    study = (
        "import os, pathlib, sys, time\n"
        "from experiments.studies.following import one_core_processes\n"
        "if __name__ == '__main__':\n"
        "    with one_core_processes(1) as pool:\n"
        "        pid = pool.submit(os.getpid).result()\n"
        "        pool.submit(time.sleep, 600)\n"
        f"        pathlib.Path({str(said)!r}).write_text(str(pid))\n"
        "        time.sleep(600)\n"
    )
    file = tmp_path / "study.py"
    file.write_text(study)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    with subprocess.Popen([sys.executable, file], env=environment) as process:
        try:
            waited_for(lambda: said.exists() and said.read_text(), 120)
        finally:
            process.kill()
    waited_for(lambda: not runs(int(said.read_text())), 20)


def runs(pid):
    try:
        return " Z " not in (pathlib.Path("/proc") / str(pid) / "stat").read_text()
    except OSError:
        return False


def waited_for(holds, seconds):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.1)
