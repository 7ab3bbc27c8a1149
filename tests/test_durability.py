"""Runs that are killed, preempted or out of disk end as if nothing had happened.

Each is a process of its own (tests/durable_run.py). Programs are compiled once, by whoever comes
first: that a cached program gives the same bits is part of what is compared.
"""

import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from occ.training.durable.run_folder import read_rows
from tests import durable_run

ROOT = pathlib.Path(__file__).parent.parent
ROLLOUTS = durable_run.CONFIG.rollouts
PATIENCE = 300  # seconds, for any one process


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.fixture(scope="module")
def start(environment):
    """Starts a run in `at`/run, whose starting point is kept in `at` too."""

    def start(at):
        command = [sys.executable, "-m", "tests.durable_run", "run"]
        with (at / "log").open("a") as log:
            return subprocess.Popen(command, cwd=at, env=environment, stdout=log, stderr=log)

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nobody disturbed, and the seconds that it took."""
    at = tmp_path_factory.mktemp("whole")
    began = time.perf_counter()
    finish(start, at)
    return outcome(at), time.perf_counter() - began


def finish(start, at):
    assert start(at).wait(PATIENCE) == 0, (at / "log").read_text()[-3000:]


def outcome(at):
    """All that a run leaves, but for the clock; the final state by its arrays' fingerprints."""
    run = at / "run"
    metrics = read_rows(run / "metrics.jsonl")
    record = json.loads((run / "checkpoints" / str(ROLLOUTS) / "record" / "metadata").read_text())
    result = json.loads((run / "result.json").read_text())
    record["history"].pop("seconds")
    return {
        "rows": [{k: v for k, v in row.items() if "seconds" not in k} for row in metrics],
        "samples": (run / "samples.jsonl").read_text(),
        "state": record["fingerprint"],
        "history": record["history"],
        "result": {k: v for k, v in result.items() if "seconds" not in k},
    }


def phase(run, began):
    """Where the process that was started at `began` was killed, by what it left."""
    metrics = run / "metrics.jsonl"
    if (run / "result.json").exists():
        return "after the result"
    if saving(run, began):
        return "inside a save"
    if not metrics.exists() or metrics.stat().st_mtime < began:
        return "starting"
    return "after the last row" if count_lines(metrics) == ROLLOUTS else "between rows"


def saving(run, since):
    """Whether a checkpoint was begun since, and not finished."""
    try:
        return any(path.stat().st_mtime > since for path in run.glob("checkpoints/*tmp*"))
    except FileNotFoundError:  # finished while we looked
        return False


def kill(start, at, when, delay):
    """Kills a run `delay` seconds after `when(began)` holds; the phase, or None if it had ended."""
    began = time.time()
    process = start(at)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not when(began) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    return phase(at / "run", began) if process.wait(PATIENCE) == -signal.SIGKILL else None


def moment(generator, at, seconds):
    """A condition and a delay: at any time, after some row, or while a checkpoint is written."""
    run = at / "run"
    kind = generator.choice(["any time", "a row", "a save"])
    if kind == "any time":
        return lambda began: True, generator.uniform(0, seconds)
    if kind == "a save":
        return lambda began: saving(run, began), generator.uniform(0, 0.05)
    row = generator.randint(min(rows(run) + 1, ROLLOUTS), ROLLOUTS)
    return lambda began: rows(run) >= row, generator.uniform(0, 0.1)


def rows(run):
    return count_lines(run / "metrics.jsonl")


def count_lines(file):
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_a_run_killed_and_terminated_ends_as_the_whole_one(whole, start, tmp_path):
    generator = random.Random(0)
    run = tmp_path / "run"
    delay = generator.uniform(0, 0.01)
    assert kill(start, tmp_path, lambda began: saving(run, began), delay)
    row, delay = generator.randint(2, 5), generator.uniform(0, 0.05)
    assert kill(start, tmp_path, lambda began: rows(run) >= row, delay)

    process = start(tmp_path)
    changed = (run / "metrics.jsonl").stat().st_mtime_ns
    while process.poll() is None and (run / "metrics.jsonl").stat().st_mtime_ns == changed:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert "the same command goes on from the checkpoint in run" in (tmp_path / "log").read_text()
    assert rows(run) < ROLLOUTS and (run / "checkpoints" / str(rows(run))).is_dir()

    finish(start, tmp_path)
    assert outcome(tmp_path) == whole[0]


@pytest.mark.release
def test_twenty_kills_at_random_moments(whole, start, tmp_path, capsys):
    """Four on each of several runs, which then end undisturbed."""
    expected, seconds = whole
    generator = random.Random(0)
    phases = collections.Counter()
    for run in range(20):
        if phases.total() == 20:
            break
        at = tmp_path / str(run)
        at.mkdir()
        for _ in range(4):
            killed = kill(start, at, *moment(generator, at, seconds))
            if killed is not None:
                phases[killed] += 1
            if (at / "run" / "result.json").exists() or phases.total() == 20:
                break
        finish(start, at)
        assert outcome(at) == expected
    assert phases.total() == 20
    with capsys.disabled():
        print("\nkills:", dict(phases))


@pytest.mark.release
def test_a_full_disk_keeps_the_last_good_checkpoint(whole, environment, tmp_path):
    """On a real one, of a megabyte and a half, which holds fewer checkpoints than are to be kept.

    Mounted in a namespace of the test's own, which ends with it and needs no privilege.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} -m tests.durable_run run"
    script = f"""
        mount -t tmpfs -o size=1500k tmpfs {disk} && cd {disk} || exit 77
        {command} --keep 100 --every 1 >../first 2>&1 && exit 1
        ls run/checkpoints >../kept
        rm -r $(ls -d run/checkpoints/* | sort -V | grep -v tmp | head -n -1)
        {command} >../second 2>&1 || exit 2
        cp -r run ..
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount a small filesystem here: {done.stderr}")
    first, second = (tmp_path / "first").read_text(), tmp_path / "second"
    assert done.returncode == 0, second.read_text() if second.exists() else first
    error = first.strip().splitlines()[-1]
    assert error.startswith("[Errno 28] no space left for "), first
    kept = [int(name) for name in (tmp_path / "kept").read_text().split() if name.isdigit()]
    assert len(kept) > 2 and f"checkpoints/{kept[0]} (" in error, error
    assert f"checkpoints/{max(kept)} (" not in error
    assert "is damaged" not in second.read_text()
    assert outcome(tmp_path) == whole[0]
