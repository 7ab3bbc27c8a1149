"""Runs whose folder is in a bucket: killed, left without it, evaluated, exported.

As tests/test_durability.py has it for disks; the bucket is a server on this machine.
"""

import random
import signal
import subprocess
import sys
import time

import pytest

from tests import bucket_server, test_durability
from tests.test_durability import ROLLOUTS, outcome

pytestmark = [pytest.mark.release, bucket_server.needs_server]
KILLS = 10
PATIENCE = 1500  # seconds, for any one process


@pytest.fixture(scope="module")
def server():
    return bucket_server.server()


environment = test_durability.environment  # of disks, which `start` adds the bucket to


@pytest.fixture(scope="module")
def start(environment, server):
    """Starts a run in a folder of the bucket; its standard error goes to a local one."""

    def start(name, at, *more):
        folder = f"gs://{bucket_server.BUCKET}/{name}/run"
        command = [sys.executable, "-m", "tests.durable_run", folder, *more]
        surroundings = environment | server.environment
        with (at / "log").open("a") as log:
            return subprocess.Popen(command, cwd=at, env=surroundings, stdout=log, stderr=log)

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """What a run that nobody disturbed leaves, and the seconds that it took."""
    at = tmp_path_factory.mktemp("whole")
    began = time.perf_counter()
    finish(start, "whole", at)
    return outcome(of("whole")), time.perf_counter() - began


def of(name):
    from occ.buckets import path

    return path(f"gs://{bucket_server.BUCKET}/{name}")


def finish(start, name, at):
    assert start(name, at).wait(PATIENCE) == 0, (at / "log").read_text()[-3000:]


def rows(files):
    file = files / "run" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saving(files, since=0.0):
    """Whether a checkpoint was begun since, and not finished.

    What was deleted leaves empty folders, and what was begun is written to until it is finished.
    """
    for folder in (files / "run" / "checkpoints").glob("*"):
        begun = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
        if begun and max(begun) > since and not (folder / "commit_success.txt").exists():
            return True
    return False


def moment(generator, files, seconds):
    """A condition and a delay: at any time, after some row, or while a checkpoint is written."""
    kind = generator.choice(["any time", "a row", "a save"])
    if kind == "any time":
        return kind, lambda: True, generator.uniform(0, seconds)
    if kind == "a save":
        began, after = time.time(), rows(files)
        return (
            kind,
            lambda: saving(files, began) and (rows(files) > after or after == 0),
            generator.uniform(0, 0.3),
        )
    row = generator.randint(min(rows(files) + 1, ROLLOUTS), ROLLOUTS)
    return kind, lambda: rows(files) >= row, generator.uniform(0, 0.2)


def test_a_bucket_holds_what_a_disk_holds(whole, environment, tmp_path):
    command = [sys.executable, "-m", "tests.durable_run", "run"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert outcome(tmp_path) == whole[0]


def test_ten_kills_in_a_bucket(whole, start, server, tmp_path, capsys):
    """Up to three on each of several runs, which then end undisturbed."""
    expected, seconds = whole
    generator = random.Random(0)
    kills = []
    for run in range(KILLS):
        if len(kills) == KILLS:
            break
        name, at = f"killed{run}", tmp_path / str(run)
        at.mkdir()
        files = server.files(name)
        for _ in range(min(3, KILLS - len(kills))):
            kind, when, delay = moment(generator, files, seconds)
            process = start(name, at)
            deadline = time.monotonic() + PATIENCE
            while process.poll() is None and not when() and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(delay)
            process.kill()
            if process.wait(PATIENCE) == -signal.SIGKILL:
                kills.append((kind, rows(files), "in a save" if saving(files) else ""))
            if (files / "run" / "result.json").exists():
                break
        finish(start, name, at)
        assert outcome(of(name)) == expected
        assert "is damaged" not in (at / "log").read_text()
    assert len(kills) == KILLS
    with capsys.disabled():
        print("\nkills:", kills)


def test_a_run_waits_for_a_bucket_that_is_away(whole, start, server, tmp_path):
    """After some row, and in the middle of a save."""
    files = server.files("away")
    process = start("away", tmp_path)
    for when in (lambda: rows(files) >= 2, lambda: rows(files) >= 4 and saving(files)):
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not when() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        server.stop()
        time.sleep(12)
        server.start()
    assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    log = (tmp_path / "log").read_text()
    assert log.count("waiting for gs://runs at ") >= 2 and "does not answer" in log
    assert "answers again after" in log
    assert outcome(of("away")) == whole[0]


def test_a_run_in_a_bucket_is_evaluated_and_exported(whole, environment, server, tmp_path):
    surroundings = environment | server.environment
    run = f"gs://{bucket_server.BUCKET}/whole/run"

    def call(*words):
        command = [sys.executable, "-m", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=surroundings, check=True, capture_output=True, text=True
        ).stdout

    asked = ["experiments.evaluate", "run", run, "--k", "2", "--problems", "4"]
    assert "avg@2" in call(*asked)
    samples = of("whole") / "run" / "evaluation" / "test.jsonl"
    made = samples.read_text()
    samples.write_text(made[: len(made) // 2])  # as if it had been killed
    call(*asked)
    assert samples.read_text() == made
    assert "regime" in call("experiments.evaluate", "table", run)
    target = f"gs://{bucket_server.BUCKET}/exported/model"
    call("experiments.export", run, target)
    call("experiments.export", run, str(tmp_path / "model"))
    for file in (tmp_path / "model").iterdir():
        assert (of("exported") / "model" / file.name).read_bytes() == file.read_bytes()
