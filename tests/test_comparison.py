"""What the main job shows: words, table and figure; one line for all; events behind a guard."""

import functools
import gc
import json
import re
import struct
import threading
import time

import numpy as np
import pytest

from experiments import dashboards, progress, report, runs
from experiments.events import EventFile, Guarded
from experiments.lanes import in_lanes
from experiments.progress import Interrupt, Progress
from experiments.report_figure import COLOURS, figure


def made(**differences):
    """Runs of a level a start (30, 50, 70 %), to which each regime adds its points."""
    levels, found = (30.0, 50.0, 70.0), {}
    for regime, added in ({"detach": (0, 0, 0)} | differences).items():
        found[regime] = []
        for level, points in zip(levels, added, strict=False):
            end = (level + points) / 100
            final = {"sampled": end, "greedy": 1.0, "mtp_acceptance": [0.5]}
            rewards = np.linspace(end - 0.1, end + 0.1, 20).tolist()
            found[regime].append({"final": final, "reward_area": end, "rewards": rewards})
    return found


@pytest.mark.parametrize(
    ("regime", "points", "said"),
    [
        # Half an interval is 4.303 * 1 / sqrt(3) for three values a point apart.
        ("ce_3", (-7, -8, -9), "Cross-entropy, coefficient 3 is 8.0 ± 2.5 points below Detach."),
        ("drafter", (2.5, 3.5, 4.5), "is 3.5 ± 2.5 points above Detach."),
        ("drafter", (1, 2, 3), "not told apart from Detach (+2.0 ± 2.5; within 4.5 points of it)."),
        ("occ", (0, -1, -2), "not told apart from Detach (-1.0 ± 2.5; within 3.5 points of it)."),
        ("occ", (-4, -5, -6), "OCC on policy loss is 5.0 ± 2.5 points below Detach."),
        ("occ_paper", (5, 6, 7), "OCC, paper's proxy is 6.0 ± 2.5 points above Detach."),
    ],
)
def test_the_words_say_what_the_intervals_decide(regime, points, said):
    words = report.words(made(**{regime: points}))
    assert words.endswith(said) and "mean reward over training, 3 warm starts" in words


def test_what_occ_saves_is_a_difference_of_its_own():
    """Both regimes may be undecided against Detach, and yet apart from each other."""
    words = report.words(made(ce_3=(-9, 0, 3), occ_ce=(-6, 3, 6)))
    assert words.count("not told apart from Detach") == 2
    assert words.endswith("and 3.00 ± 0.00 points above cross-entropy, coefficient 3.")
    words = report.words(made(policy_3=(1, -1, 3), occ=(0, 0, 0)))
    assert "and not told apart from policy loss, coefficient 3 (-1.0" in words


def test_one_start_has_no_interval_and_no_baseline_no_words():
    one = {name: found[:1] for name, found in made(ce_3=(-7, -8, -9)).items()}
    assert report.words(one).endswith(
        "1 warm start, so without intervals): Cross-entropy, coefficient 3 is 7.0 points below "
        "Detach."
    )
    same = {"detach": one["detach"], "occ": one["detach"]}
    assert report.words(same).endswith("OCC on policy loss is equal to Detach.")
    del one["detach"]
    assert "Without Detach" in report.words(one)
    assert "| cross-entropy, coefficient 3 | 23.0 |" in report.table(one)


def test_the_table_names_what_differs():
    lines = report.table(made(occ=(-10, -10.1, -9.9), drafter=(-1, 0, 1))).splitlines()
    detach, occ, drafter = lines[2:]
    assert "| 50.0 ± 49.7 |" in detach and detach.count("|") == lines[0].count("|")
    assert occ.count("**-10.00 ± 0.25**") == 2
    assert drafter.endswith("| +0.0 ± 2.5 | +0.0 ± 2.5 |")


def test_the_figure_shows_every_regime_with_its_label_and_its_band():
    results = made(ce_3=(-7, -8, -9), occ_ce=(-1, 0, 1), drafter=(0.4, 0.5, 0.6))
    left, right = figure(results).axes
    lines = {line.get_label(): line for line in left.lines}
    names = ["Detach", "cross-entropy, coefficient 3", "OCC on cross-entropy"]
    assert list(lines) == [*names, "drafter (own ratio, 0.2)"]
    assert [text.get_text() for text in left.texts] == list(lines)
    assert lines["Detach"].get_xdata()[[0, -1]].tolist() == [5, 16]  # a mean of nine rollouts
    np.testing.assert_allclose(lines[names[1]].get_ydata() - lines["Detach"].get_ydata(), -8)
    assert {line.get_color() for line in left.lines} <= set(COLOURS.values())
    heights = []
    for band in left.collections:
        y = band.get_paths()[0].vertices[:, 1]
        at_end = y[band.get_paths()[0].vertices[:, 0] == 16]
        heights.append((at_end.max() - at_end.min()) / 2)
    np.testing.assert_allclose(heights, [2.484, 2.484, 0.2484], rtol=1e-3)
    assert [float(box.lines[0].get_xdata()[0]) for box in right.containers] == pytest.approx(
        [-8, 0, 0.5]
    )
    assert right.texts[2].get_text() == "drafter (own ratio, 0.2)\n+0.50 ± 0.25"
    low, high = right.get_xlim()
    assert low < -10.4 and high > 2.4  # no interval is cut off
    assert "3 warm starts" in right.get_xlabel()


def test_labels_of_curves_that_end_together_do_not_overlap():
    left, _ = figure(made(ce_3=(-20, -20, -20), occ=(0, 0, 0), drafter=(0, 0, 0))).axes
    places = sorted(text.xyann[1] for text in left.texts)
    low, high = left.get_ylim()
    assert np.diff(places).min() >= (high - low) / 16 - 1e-9


def test_figures_of_one_start_and_without_detach():
    one = {name: found[:1] for name, found in made(occ=(1, 2, 3)).items()}
    left, right = figure(one).axes
    assert len(left.lines) == 2 and not left.collections and len(right.containers) == 1
    left, right = figure({"occ": one["occ"]}).axes
    assert len(left.lines) == 1 and not right.containers


@pytest.fixture
def printed(monkeypatch, capsys):
    """What is printed where no terminal is, with every state of the line."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    return lambda: capsys.readouterr().err


def test_one_line_counts_the_whole_job(printed):
    job = Progress(total=30)
    with job.part("start 1", 10) as start:
        start.show(0.5, 0.5, "cross-entropy 0.3")
        with job.part("start 2", 10) as beside:
            beside.show(0.5, 0.5, "cross-entropy 0.4")
    with job.part("Detach", 10) as run:
        run.show(0.1, 0.1, "reward 0.2")
    job.close("done")
    text = printed()
    shown = [re.match(r" *(\d+) %.* left( .*)?$", line) for line in text.splitlines()]
    assert "\r" not in text and all(shown)
    states = [(int(match[1]), (match[2] or "").strip()) for match in shown]
    assert (17, "start 1: cross-entropy 0.3") in states and (70, "Detach: reward 0.2") in states
    assert (33, "start 2: cross-entropy 0.4") in states
    assert states[-1] == (100, "done")


def test_what_was_done_before_does_not_make_the_job_look_fast(printed, monkeypatch):
    now = [0.0]
    job = Progress(total=100)
    monkeypatch.setattr(job._bar, "_time", lambda: now[0])
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    with job.part("finished long ago", 40):
        pass
    with job.part("half done", 40) as part:
        now[0] = 1000.0  # compiled, and one of forty rollouts run, after twenty of an earlier call
        part.show(0.525, 0.025, "its first rollout")
        assert job._bar.n == job._bar.initial == pytest.approx(61)
        now[0] = 1001.0
        part.show(0.55, 0.025, "its second")
        assert job._bar.n == pytest.approx(62) and "00:38 left" in str(job._bar)
        now[0] = 1019.0
        part.show(1.0, 0.025, "its last")
    with job.part("half done too", 20) as part:
        now[0] = 1020.0
        part.show(0.55, 0.05, "its eleventh rollout of twenty")
        assert job._bar.n == pytest.approx(91) and "00:09 left" in str(job._bar)
    job.close()


def test_lanes_do_all_the_work_and_two_pieces_at_one_time():
    together, done = threading.Barrier(2, timeout=10), []

    def piece(number):
        together.wait()
        done.append(number)

    assert in_lanes([functools.partial(piece, n) for n in range(6)], 2, Interrupt())
    assert sorted(done) == list(range(6)) and {0, 1} == set(done[:2])


def test_a_piece_that_fails_ends_the_others_and_is_raised():
    wish, begun = Interrupt(), []

    def waits():
        begun.append("waits")
        while not wish():
            time.sleep(0.01)
        raise KeyboardInterrupt  # as a warm start obeys

    def fails():
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        in_lanes([waits, fails, waits], 2, wish)
    assert begun == ["waits"]
    stopped = Interrupt()
    assert not in_lanes([lambda: False, waits], 1, stopped) and not stopped()
    assert in_lanes([], 2, stopped)


def test_a_quiet_line_is_none(printed):
    job = Progress(total=2, quiet=True)
    with job.part("part", 2) as part:
        part.show(0.5, 0.5, "half")
    job.close()
    assert printed() == ""


def records(file):
    """Lengths of the records of an event file."""
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(length)
        at += 8 + 4 + length + 4
    return found


def test_events_hold_every_number_of_every_row(tmp_path):
    events = Guarded(functools.partial(EventFile, tmp_path / "tensorboard"))
    events({"rollout": 0, "reward": 0.5, "occ/coefficient": [0.1, 0.2]})
    events({"rollout": 1, "reward": 0.75, "occ/coefficient": [0.3, 0.4]})
    events.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents*")
    assert len(records(file)) == 1 + 2 * 4
    text = file.read_bytes()
    assert text.count(b"occ/coefficient/2") == 2 and struct.pack("<f", 0.75) in text


@pytest.fixture
def subject(tmp_path):
    """Of a run with two samples and a figure."""
    rows = [{"rollout": n, "prompt": "1+1=", "completion": str(n), "reward": 1.0} for n in (0, 1)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs.save_figure(tmp_path / "regimes.png", figure(made()), dpi=20)
    return dashboards.Subject("tiny/occ", "tiny", {"seed": 3, "mtp": {"rule": "occ"}}, tmp_path)


@pytest.mark.slow
def test_weights_and_biases_has_the_run(subject, monkeypatch, capsys):
    """Offline, as its own file has it: configuration, every number, samples and the figure."""
    wandb = pytest.importorskip("wandb", reason="the extra dashboards is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = dashboards.Dashboards(("wandb",), subject)
    logged({"rollout": 0, "reward": 0.5, "occ/coefficient": [0.1, 0.25]})
    logged({"rollout": 1, "reward": None})
    logged.close()
    assert "given up" not in capsys.readouterr().err
    (file,) = subject.folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for part in (b"tiny/occ", b"occ/coefficient/2", b"0.25", b"samples", b"regimes", b"rule"):
        assert part in content, part
    assert len(list(subject.folder.glob("wandb/offline-run-*/files/media/images/*.png"))) == 1
    assert wandb.run is None


@pytest.mark.slow
def test_mlflow_has_the_run(subject, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow", reason="the extra dashboards is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (subject.folder / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # in place of a server
    for row in ({"reward": 0.5, "occ/coefficient": [0.1, 0.25]}, {"reward": 0.75}):
        logged = dashboards.Dashboards(("mlflow",), subject)
        logged({"rollout": 0, "rollout/invalid": 0.0} | row)
        logged.close()
    assert "given up" not in capsys.readouterr().err
    (run,) = mlflow.search_runs(experiment_names=["occ-jax"], output_format="list")
    assert run.data.metrics["reward"] == 0.75 and run.data.metrics["occ/coefficient/2"] == 0.25
    assert run.data.params["mtp.rule"] == "occ" and run.info.status == "FINISHED"


def test_a_dashboard_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(dashboards.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ValueError, match="--log wandb needs the package no_such_package"):
        dashboards.check(("tensorboard", "wandb"))


class Broken:
    """A logger whose disk is full from the second row on."""

    def __init__(self):
        self.rows, self.failed = [], threading.Event()

    def __call__(self, row):
        if self.rows:
            self.failed.set()
            raise OSError(28, "No space left on device")
        self.rows.append(row)

    def close(self):
        self.closed = True
        raise OSError(28, "No space left on device")


def test_a_logger_that_raises_is_given_up_with_one_warning(capsys):
    logger = Broken()
    events = Guarded(lambda: logger, waiting=8)
    events({"rollout": 0})
    events({"rollout": 1})
    assert logger.failed.wait(60)
    for number in range(2, 1000):
        events({"rollout": number})
    events.close()
    assert logger.rows == [{"rollout": 0}] and logger.closed
    assert capsys.readouterr().err.count("logging was given up") == 1


def test_events_on_a_full_disk_are_given_up_and_say_nothing_later(tmp_path, monkeypatch, capsys):
    """What a file still holds when it is dropped would raise at some later moment."""
    opened = functools.partial(open, "/dev/full", "wb")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: opened())
    events = Guarded(functools.partial(EventFile, tmp_path))
    events({"rollout": 0, "reward": 0.5})
    events.close()
    del events
    gc.collect()
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_logger_that_cannot_be_made_is_given_up(tmp_path, capsys):
    (tmp_path / "file").touch()
    events = Guarded(functools.partial(EventFile, tmp_path / "file"))
    events.close()
    events.close()
    assert capsys.readouterr().err.count("FileExistsError") == 1


@pytest.mark.parametrize("rows", [1, 1000])
def test_a_logger_that_blocks_is_given_up_with_one_warning(rows, capsys):
    release = threading.Event()

    class Blocking:
        def __call__(self, row):
            release.wait()

        def close(self):
            release.wait()

    events = Guarded(Blocking, waiting=8, patience=0.05)
    try:
        for number in range(rows):
            events({"rollout": number})
        events.close()
        error = capsys.readouterr().err
        assert error.count("logging was given up") == 1
        assert ("8 rows wait for it" if rows > 8 else "did not end within 0.05 s") in error
    finally:
        release.set()
